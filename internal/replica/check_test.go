package replica_test

import (
	"fmt"
	"hash/fnv"
	"strings"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/replica"
	"github.com/blixard/blixard/internal/schedule"
	"github.com/blixard/blixard/internal/state"
)

// checker knows what no node can know: all of them at once, and true time.
type checker struct {
	w        *world
	leaders  map[uint64]uint64    // by term
	hashes   map[uint64]uint64    // of the state, by index
	entries  map[[2]uint64]uint64 // hash of the data, by index and term
	started_ map[string]string    // incarnations that were ever started, with the machine
	runs     map[string]*guest    // exclusive slots that run now
	where    map[*guest]*machine  //
	rows     map[string]*row      // every incarnation ever seen in a state
	newest   map[string]uint64    // generation by slot
	ruled    map[uint64]uint64    // terms whose leader was compared with the clients
	index    uint64               // up to which changes were looked at
}

// hashEvery saves time: states that once differ go on differing.
const hashEvery = 3

type row struct {
	state blixard.InstanceState
	gone  bool
}

func newChecker(w *world) *checker {
	return &checker{
		w: w, leaders: map[uint64]uint64{}, hashes: map[uint64]uint64{}, entries: map[[2]uint64]uint64{}, started_: map[string]string{},
		runs: map[string]*guest{}, where: map[*guest]*machine{}, rows: map[string]*row{}, newest: map[string]uint64{}, ruled: map[uint64]uint64{},
	}
}

// after is asked after every event.
func (c *checker) after() {
	for _, m := range c.w.machines {
		if m.srv == nil || m.srv.r.Leader() != m.raftID {
			continue
		}
		term := m.srv.r.Term()
		if other, ok := c.leaders[term]; ok && other != m.raftID {
			c.w.violated("term %d has two leaders: %d and %d", term, other, m.raftID)
		}
		if c.leaders[term] == 0 {
			c.w.count["leader"]++
		}
		c.leaders[term] = m.raftID
		if m.srv.r.Leads() && c.ruled[term] == 0 {
			c.ruled[term] = m.raftID
			c.completeness(m)
		}
	}
}

// completeness: a leader knows every acknowledged command.
func (c *checker) completeness(m *machine) {
	c.w.say("%s rules in term %d from entry %d", m.name, m.srv.r.Term(), m.srv.r.View().Index)
	for _, cl := range c.w.clients {
		if cl.op == nil || cl.op.cmd == nil {
			cl.holds(m.srv.r.View(), "the new leader "+string(m.name))
		}
	}
}

// saved: an entry is the same on every replica that has it.
func (c *checker) saved(s *server, entries []*raftpb.Entry) {
	for _, e := range entries {
		h := fnv.New64a()
		if _, err := h.Write(e.Data); err != nil {
			panic(err)
		}
		at := [2]uint64{e.GetIndex(), e.GetTerm()}
		if old, ok := c.entries[at]; ok && old != h.Sum64() {
			c.w.violated("entry %d of term %d on %s differs from that on another node", at[0], at[1], s.m.name)
		}
		c.entries[at] = h.Sum64()
	}
}

// applied: equal states at equal indexes, rows that only move forward, nobody
// overbooked.
func (c *checker) applied(s *server, out replica.Output) {
	v := s.r.View()
	if v.Index == 0 {
		return
	}
	if v.Index%hashEvery == 0 || out.Restored {
		h := v.Hash()
		if old, ok := c.hashes[v.Index]; ok && old != h {
			c.w.violated("%s has another state at entry %d than an earlier one", s.m.name, v.Index)
		}
		c.hashes[v.Index] = h
		c.w.mixNumbers(uint64(s.m.at), v.Index, h)
	}
	for i := range out.Changes {
		ch := &out.Changes[i]
		if inst, ok := ch.Object.(*blixard.Instance); ok && ch.Index > c.index {
			c.changed(inst, ch.Deleted)
		}
	}
	if v.Index > c.index {
		if !out.Restored {
			c.index = v.Index
		}
		c.booked(v)
	}
}

func (c *checker) changed(i *blixard.Instance, deleted bool) {
	key, slot := i.Incarnation(), string(i.ID)
	r := c.rows[key]
	switch {
	case r == nil:
		if i.Generation <= c.newest[slot] {
			c.w.violated("%s appears after generation %d", key, c.newest[slot])
		}
		c.newest[slot] = i.Generation
		r = &row{state: i.State}
		c.rows[key] = r
	case r.gone:
		c.w.violated("%s comes back from the dead as %s", key, i.State)
	case r.state != i.State && !blixard.CanFollow(r.state, i.State):
		c.w.violated("%s goes from %s to %s", key, r.state, i.State)
	}
	if r.state != i.State {
		c.w.count["instance "+string(i.State)]++
	}
	r.state, r.gone = i.State, deleted
}

// booked counts what the rows hold, without trusting the derived tables.
func (c *checker) booked(v *state.View) {
	used, live, groups := map[blixard.NodeName]blixard.Resources{}, map[blixard.InstanceID]uint64{}, map[string]string{}
	v.Instances(func(i *blixard.Instance) bool {
		if i.State.Terminal() {
			return true
		}
		if g := live[i.ID]; g != 0 {
			c.w.violated("%s has two incarnations at entry %d: %d and %d", i.ID, v.Index, g, i.Generation)
		}
		live[i.ID] = i.Generation
		used[i.Node] = used[i.Node].Add(i.Spec.Needs())
		if !used[i.Node].Fits(capacity) {
			c.w.violated("%s is overbooked at entry %d: %+v", i.Node, v.Index, used[i.Node])
		}
		if g := i.Spec.AntiAffinityGroup; g != "" {
			at := g + " on " + string(i.Node)
			if groups[at] != "" {
				c.w.violated("%s and %s share %s", groups[at], i.ID, at)
			}
			groups[at] = string(i.ID)
		}
		return true
	})
}

// started: a generation starts once, an exclusive slot runs once at a time.
func (c *checker) started(m *machine, g *guest) {
	if where, ok := c.started_[g.key]; ok {
		c.w.violated("%s starts on %s, and has been started on %s", g.key, m.name, where)
	}
	c.started_[g.key] = string(m.name)
	if !g.exclusive {
		return
	}
	if other := c.runs[string(g.slot)]; other != nil {
		c.w.violated("%s starts on %s while %s runs on %s", g.key, m.name, other.key, c.where[other].name)
	}
	c.runs[string(g.slot)], c.where[g] = g, m
}

func (c *checker) stopped(_ *machine, g *guest) {
	if c.runs[string(g.slot)] == g {
		delete(c.runs, string(g.slot))
		delete(c.where, g)
	}
}

// leaderless tells what keeps the cluster from having a leader that all follow.
func (c *checker) leaderless() string {
	r := c.w.ruler()
	if r == nil {
		return "nobody rules"
	}
	for _, m := range c.w.machines {
		if m.srv != nil && c.w.operator.member(m) && m.srv.r.Leader() != r.raftID {
			return fmt.Sprintf("%s follows %d, not %d", m.name, m.srv.r.Leader(), r.raftID)
		}
	}
	return ""
}

// unsettled tells what still differs from what is wanted.
func (c *checker) unsettled() string {
	if why := c.leaderless(); why != "" {
		return why
	}
	for _, cl := range c.w.clients {
		if cl.op != nil {
			return cl.name + " waits for an answer to " + cl.op.key
		}
	}
	if c.w.operator.leaving != 0 {
		return fmt.Sprintf("member %d is still on its way out", c.w.operator.leaving)
	}
	r := c.w.ruler()
	v := r.srv.r.View()
	for _, m := range c.w.machines {
		if !c.w.operator.member(m) || m.srv == nil {
			if m.raftID != 0 {
				return string(m.name) + " is not in"
			}
			continue
		}
		n := v.Node(m.name)
		if n.State != blixard.NodeReady || n.Raft == blixard.RoleNone {
			return fmt.Sprintf("%s is %s, %s", m.name, n.State, n.Raft)
		}
		if at := m.srv.r.View().Index; at != v.Index {
			return fmt.Sprintf("%s is at entry %d of %d", m.name, at, v.Index)
		}
	}
	if why := c.voters(r); why != "" {
		return why
	}
	return c.unsettledVMs(v)
}

// voters: as many as there should be.
func (c *checker) voters(r *machine) string {
	members := r.srv.r.View().NodeCount()
	want := min(members, c.w.opt.MaxVoters)
	if want%2 == 0 {
		want--
	}
	conf := r.srv.r.ConfState()
	if len(conf.GetVoters()) != want || len(conf.GetVoters())+len(conf.GetLearners()) != members {
		return fmt.Sprintf("voters %v, learners %v; %d nodes, want %d voters", conf.GetVoters(), conf.GetLearners(), members, want)
	}
	return ""
}

func (c *checker) unsettledVMs(v *state.View) string {
	var out []string
	v.VMs(func(vm *blixard.VM) bool {
		up, live, missing := 0, 0, 0
		v.InstancesOf(vm.Name, func(i *blixard.Instance) bool {
			if !i.State.Terminal() {
				live++
			}
			if g := c.guest(i); i.Counts() && i.State == blixard.Running && g && i.SpecVersion == vm.SpecVersion && i.RestartSeq == vm.RestartSeq {
				up++
			}
			return true
		})
		if vm.Refusal != nil {
			missing = vm.Refusal.Missing
		}
		switch {
		case vm.Deleting:
			out = append(out, string(vm.Name)+" is not deleted")
		case vm.Desired == blixard.DesiredStopped && live > 0:
			out = append(out, string(vm.Name)+" is not stopped")
		case vm.Desired == blixard.DesiredRunning && up+missing < vm.Spec.Replicas:
			out = append(out, fmt.Sprintf("%s has %d of %d up, %d refused", vm.Name, up, vm.Spec.Replicas, missing))
		case missing > 0 && !strings.HasPrefix(schedule.Refuse(v, &vm.Spec).Summary, "0/") && strings.HasPrefix(vm.Refusal.Summary, "0/"):
			out = append(out, fmt.Sprintf("%s is refused (%s) but a node fits", vm.Name, vm.Refusal.Summary))
		}
		return true
	})
	for _, m := range c.w.machines {
		for _, key := range sorted(m.guests) {
			if c.w.operator.member(m) && !c.hasRow(v, key, m) {
				out = append(out, key+" runs on "+string(m.name)+" and should not")
			}
		}
	}
	return strings.Join(out, "; ")
}

func (c *checker) guest(i *blixard.Instance) bool {
	m := c.w.machine(i.Node)
	return m != nil && m.guests[i.Incarnation()] != nil
}

func (c *checker) hasRow(v *state.View, key string, m *machine) bool {
	found := false
	v.InstancesOn(m.name, func(i *blixard.Instance) bool {
		found = found || i.Incarnation() == key && !i.State.Terminal()
		return true
	})
	return found
}

// equal: in the end all replicas hold the same, and what the clients were
// promised.
func (c *checker) equal() {
	r := c.w.ruler()
	want := r.srv.r.View()
	for _, m := range c.w.machines {
		if m.srv == nil {
			continue
		}
		if v := m.srv.r.View(); v.Index == want.Index && v.Hash() != want.Hash() {
			c.w.violated("%s and %s differ at entry %d", m.name, r.name, v.Index)
		}
	}
	for _, cl := range c.w.clients {
		cl.holds(want, "in the end")
	}
	again, err := copyView(want)
	if err != nil || again.View().Hash() != want.Hash() {
		c.w.violated("the state at %d does not survive being written and read: %v", want.Index, err)
	}
}
