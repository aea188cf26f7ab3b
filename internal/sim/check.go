package sim

import (
	"fmt"
	"maps"
	"math"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/replica"
	"github.com/blixard/blixard/internal/state"
)

// checker knows what no node can know: all of them at once, and true time.
//
//	S1 a term has one leader                       applied
//	S2 replicas agree: entries, states             saved, applied, equal
//	S3 what was acknowledged is in every leader    ruled, client.holds
//	S4 a slot that is exclusive runs once          started
//	S5 no node is overbooked                       booked
//	S6 anti-affinity holds                         booked
//	S7 one key, one answer; linearizable histories client.answered, sharers
//	S9 changes come in order, without a gap        changed, watchers
//	S11 nothing is left behind, queues are bounded unsettled
//	S13 a state is its log's, also through a file  applied, equal
type checker struct {
	w       *world
	leaders map[uint64]uint64 // by term
	ruled   uint64            // the newest term whose leader was compared with the clients
	hashes  map[uint64]uint64 // of the state, by index
	prints  map[uint64]uint64 // of what an entry changed, by index
	entries map[[2]uint64]uint64
	pruned  uint64 // entries below are forgotten

	level int    // the highest at which the cluster ever worked
	newer uint64 // the first entry that holds what an old release does not know

	starts map[string]string // incarnations that were ever started, with the machine
	runs   map[blixard.InstanceID]*run
	books  books
	nodes  map[blixard.NodeName]string // as told last
	lostMS map[blixard.NodeName]int64  // when they were lost last, as the rows say
}

// run is an exclusive slot that runs.
type run struct {
	vm *vm
	at *machine
}

// books are what the rows of the newest known state hold, counted apart from
// the state's own derived tables.
type books struct {
	index  uint64
	rows   map[string]*rowSeen // every incarnation ever seen
	newest map[blixard.InstanceID]uint64
	live   map[blixard.InstanceID]uint64
	used   map[blixard.NodeName]blixard.Resources
	groups map[groupAt]string
}

type groupAt struct {
	group string
	node  blixard.NodeName
}

type rowSeen struct {
	state blixard.InstanceState
	holds bool // counted
	gone  bool
}

func newChecker(w *world) *checker {
	return &checker{
		w: w, newer: math.MaxUint64, leaders: map[uint64]uint64{}, hashes: map[uint64]uint64{}, prints: map[uint64]uint64{}, entries: map[[2]uint64]uint64{}, starts: map[string]string{}, runs: map[blixard.InstanceID]*run{}, nodes: map[blixard.NodeName]string{}, lostMS: map[blixard.NodeName]int64{},
		books: books{rows: map[string]*rowSeen{}, newest: map[blixard.InstanceID]uint64{}},
	}
}

// wholeHere tells whether the whole state at an index is compared: seldom, since
// that takes time, and states that once differ go on differing. It depends on
// the state alone, so that all replicas are asked at the same indexes.
func wholeHere(v *state.View) bool {
	every := uint64(8)
	for every < v.Cluster().NextEvent+uint64(v.InstanceCount()) && every < 16_384 {
		every *= 2
	}
	return v.Index%every == 0
}

// fingerprint is what an entry changed, in short. It is compared at every index.
func fingerprint(changes []state.Change) uint64 {
	h := uint64(14695981039346656037)
	text := func(s string) {
		for i := range len(s) {
			h = (h ^ uint64(s[i])) * 1099511628211
		}
	}
	for i := range changes {
		ch := &changes[i]
		h = (h ^ uint64(ch.Kind)) * 1099511628211
		if ch.Deleted {
			h++
		}
		switch x := ch.Object.(type) {
		case *blixard.Instance:
			text(string(x.ID))
			text(string(x.Node))
			text(string(x.State))
			text(string(x.Wanted))
			h = (h ^ x.Generation ^ x.Version<<20) * 1099511628211
		case *blixard.VM:
			text(string(x.Name))
			h = (h ^ x.Version ^ x.SpecVersion<<20 ^ x.FirstGeneration<<40) * 1099511628211
		case *blixard.Node:
			text(string(x.Name))
			text(string(x.State))
			h = (h ^ x.Epoch ^ x.RaftID<<20) * 1099511628211
		}
	}
	return h
}

// saved: an entry is the same on every replica that has it.
func (c *checker) saved(p *process, entries []*raftpb.Entry) {
	for _, e := range entries {
		h := uint64(14695981039346656037)
		for _, b := range e.Data {
			h = (h ^ uint64(b)) * 1099511628211
		}
		at := [2]uint64{e.GetIndex(), e.GetTerm()}
		if at[0] < c.pruned {
			continue
		}
		if old, ok := c.entries[at]; ok && old != h {
			c.w.violated("S2 replicas agree", "entry %d of term %d on %s differs from that on another node", at[0], at[1], p.m.name)
		}
		c.entries[at] = h
	}
	const most, keep = 20_000, 5_000
	if len(c.entries) > most && c.books.index > keep {
		c.pruned = c.books.index - keep
		for at := range c.entries { //order:any each stands alone
			if at[0] < c.pruned {
				delete(c.entries, at)
			}
		}
		old := func(index, _ uint64) bool { return index < c.pruned }
		maps.DeleteFunc(c.hashes, old)
		maps.DeleteFunc(c.prints, old)
	}
}

// applied: one leader in a term, equal states at equal indexes, rows that only
// move forward, nobody overbooked.
func (c *checker) applied(p *process, out replica.Output) {
	w, r := c.w, p.r
	if r.Leader() == p.m.raftID {
		c.leads(p)
	}
	index := r.View().Index
	if index == 0 {
		return
	}
	for at := out.Changes; len(at) > 0; {
		n := 1
		for n < len(at) && at[n].Index == at[0].Index {
			n++
		}
		c.same(p, c.prints, at[0].Index, fingerprint(at[:n]))
		at = at[n:]
	}
	if wholeHere(r.View()) || out.Restored {
		h := r.View().Hash()
		c.same(p, c.hashes, index, h)
		w.mix(uint64(p.m.at), index, h)
	}
	if index <= c.books.index {
		return
	}
	if out.Restored {
		c.recount(r.View())
		return
	}
	for i := range out.Changes {
		if ch := &out.Changes[i]; ch.Index > c.books.index {
			c.changed(p, ch)
		}
	}
	c.books.index = index
}

// same: what is known of an index is the same on every replica.
func (c *checker) same(p *process, known map[uint64]uint64, index, h uint64) {
	if index < c.pruned {
		return
	}
	if old, ok := known[index]; ok && old != h {
		c.w.violated("S2 replicas agree", "%s has another state at entry %d than an earlier one", p.m.name, index)
	}
	known[index] = h
}

func (c *checker) leads(p *process) {
	w, term := c.w, p.r.Term()
	if other, ok := c.leaders[term]; ok && other != p.m.raftID {
		w.violated("S1 a term has one leader", "term %d has two: %d and %d", term, other, p.m.raftID)
	} else if !ok {
		w.count["leader"]++
		c.leaders[term] = p.m.raftID
	}
	if p.r.Leads() && term > c.ruled {
		c.ruled = term
		v := p.r.View()
		w.say("%s rules in term %d from entry %d", p.m.name, term, v.Index)
		for _, cl := range w.clients {
			if cl.op == nil || cl.op.cmd == nil {
				cl.holds(v, "the new leader "+string(p.m.name))
			}
		}
	}
}

// changed takes in a row that changed.
func (c *checker) changed(p *process, ch *state.Change) {
	if n, ok := ch.Object.(*blixard.Node); ok {
		if n.State == blixard.NodeLost && n.LostMS != c.lostMS[n.Name] {
			c.lostMS[n.Name] = n.LostMS
			if p.r.Leads() && c.stoodStill(p.m, n.LostMS) {
				c.w.violated("L3 a leader that stood still blames nobody", "%s declares %s lost, %d ms after it stood still for %d ms", p.m.name, n.Name, c.w.now-p.m.lastPause.untilMS, p.m.lastPause.ms)
			}
		}
		if now := fmt.Sprintf("%s, %s, epoch %d", n.State, n.Availability, n.Epoch); ch.Deleted || c.nodes[n.Name] != now {
			c.w.say("entry %d: %s is %s (deleted: %t)", ch.Index, n.Name, now, ch.Deleted)
			c.nodes[n.Name] = now
		}
	}
	i, ok := ch.Object.(*blixard.Instance)
	if !ok {
		return
	}
	b, key := &c.books, i.Incarnation()
	r := b.rows[key]
	switch {
	case r == nil:
		if i.Generation <= b.newest[i.ID] {
			c.w.violated("states go forward", "%s appears after generation %d", key, b.newest[i.ID])
		}
		b.newest[i.ID] = i.Generation
		r = &rowSeen{state: i.State}
		b.rows[key] = r
		c.w.count["instance "+string(i.State)]++
	case r.gone:
		c.w.violated("states go forward", "%s comes back from the dead as %s", key, i.State)
	case r.state != i.State:
		if !blixard.CanFollow(r.state, i.State) {
			c.w.violated("states go forward", "%s goes from %s to %s", key, r.state, i.State)
		}
		c.w.count["instance "+string(i.State)]++
	}
	r.state, r.gone = i.State, ch.Deleted
	c.book(r, i, !i.State.Terminal() && !ch.Deleted, ch.Index)
}

// book counts what an incarnation holds.
func (c *checker) book(r *rowSeen, i *blixard.Instance, holds bool, index uint64) {
	b := &c.books
	if b.live == nil {
		b.live, b.used, b.groups = map[blixard.InstanceID]uint64{}, map[blixard.NodeName]blixard.Resources{}, map[groupAt]string{}
	}
	if r.holds == holds {
		return
	}
	r.holds = holds
	at := groupAt{i.Spec.AntiAffinityGroup, i.Node}
	if !holds {
		b.used[i.Node] = b.used[i.Node].Sub(i.Spec.Needs())
		if b.live[i.ID] == i.Generation {
			delete(b.live, i.ID)
		}
		if b.groups[at] == string(i.ID) {
			delete(b.groups, at)
		}
		return
	}
	if g := b.live[i.ID]; g != 0 {
		c.w.violated("a slot has one incarnation", "%s has two at entry %d: %d and %d", i.ID, index, g, i.Generation)
	}
	b.live[i.ID] = i.Generation
	b.used[i.Node] = b.used[i.Node].Add(i.Spec.Needs())
	if m := c.w.machine(i.Node); m != nil && !b.used[i.Node].Fits(m.capacity()) {
		c.w.violated("S5 no node is overbooked", "%s is at entry %d: %+v of %+v", i.Node, index, b.used[i.Node], m.capacity())
	}
	if at.group != "" {
		if b.groups[at] != "" {
			c.w.violated("S6 anti-affinity holds", "%s and %s share %+v at entry %d", b.groups[at], i.ID, at, index)
		}
		b.groups[at] = string(i.ID)
	}
}

// recount takes in a state whose changes are not known.
func (c *checker) recount(v *state.View) {
	b := &c.books
	b.index, b.live = v.Index, nil
	for _, r := range b.rows { //order:any each stands alone
		r.holds = false
	}
	seen := map[string]bool{}
	v.Instances(func(i *blixard.Instance) bool {
		key := i.Incarnation()
		seen[key] = true
		r := b.rows[key]
		if r == nil {
			r = &rowSeen{}
			b.rows[key] = r
			b.newest[i.ID] = max(b.newest[i.ID], i.Generation)
		} else if r.gone || // the table leads from each state to all that follow, so one step will do
			r.state != i.State && !blixard.CanFollow(r.state, i.State) {
			c.w.violated("states go forward", "%s goes from %s (gone: %t) to %s", key, r.state, r.gone, i.State)
		}
		r.state = i.State
		c.book(r, i, !i.State.Terminal(), v.Index)
		return true
	})
	for key, r := range b.rows { //order:any each stands alone
		r.gone = r.gone || !seen[key]
	}
}

// started: a generation starts once, an exclusive slot runs once at a time.
func (c *checker) started(m *machine, v *vm) {
	if where, ok := c.starts[v.key]; ok {
		c.w.violated("S4 an incarnation starts once", "%s starts on %s, and has been started on %s", v.key, m.name, where)
	}
	c.starts[v.key] = string(m.name)
	if !v.exclusive {
		return
	}
	if other := c.runs[v.ref.Instance]; other != nil {
		c.w.violated("S4 an exclusive slot runs once", "%s starts on %s while %s runs on %s", v.key, m.name, other.vm.key, other.at.name)
	}
	c.runs[v.ref.Instance] = &run{v, m}
}

func (c *checker) stopped(v *vm) {
	if r := c.runs[v.ref.Instance]; r != nil && r.vm == v {
		delete(c.runs, v.ref.Instance)
	}
}

// equal: in the end all replicas hold the same, and what the clients were
// promised.
func (c *checker) equal() {
	w := c.w
	want := w.ruler().proc.r.View()
	for _, m := range w.machines {
		if m.proc == nil {
			continue
		}
		if v := m.proc.r.View(); v.Index == want.Index && !sameState(v, want) {
			w.violated("S2 replicas agree", "%s differs from the leader at entry %d", m.name, v.Index)
		}
	}
	for _, cl := range w.clients {
		cl.holds(want, "in the end")
	}
	again, err := copyView(want)
	if err != nil || !sameState(again.View(), want) {
		w.violated("S13 a state is the same after it was written and read", "that of entry %d is not: %v", want.Index, err)
	}
}
