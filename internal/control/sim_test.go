package control

import (
	"fmt"
	"slices"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/schedule"
	"github.com/blixard/blixard/internal/state"
)

// sim is a cluster with one leader: the real state and controller, and agents
// that do what the state tells them, on one virtual clock.
type sim struct {
	fail   func(format string, args ...any)
	log    func(line string) // each command of the leader; may be nil
	s      *state.State
	index  uint64
	now    int64 // ms; the leader's monotonic and wall clock
	skewMS int64 // of the wall clock
	c      *Controller
	wake   int64
	agents []*agent
	passes int
	idleMS int64 // since when the leader proposed nothing
	seen   map[string]uint64
	level  int // feature level that nodes report

	condemned []state.Victim // by earlier commands of the same pass
}

// agent is a machine and what runs on it.
type agent struct {
	name     blixard.NodeName
	raftID   uint64
	kind     machine
	cut      bool // no message gets through
	leaseEnd int64
	beatMS   int64
	guests   map[string]*guest
	slow     int // steps an instance takes to come up
}

type machine struct {
	cores, memoryMiB int64
	zone             string
}

// guest is an incarnation that really runs.
type guest struct {
	vm         blixard.VMName
	ordinal    int
	generation uint64
	exclusive  bool
	steps      int
	crash      bool
	health     blixard.Health
}

func newSim(fail func(string, ...any)) *sim {
	return &sim{fail: fail, s: state.New(), now: 1000, c: New(Config{}), seen: map[string]uint64{}}
}

func (m *sim) view() *state.View { return m.s.View() }

func (m *sim) apply(actor string, commands ...state.Command) []state.Result {
	m.index++
	var e []state.Envelope
	for _, c := range commands {
		e = append(e, state.Envelope{NowMS: m.now + m.skewMS, Actor: actor, Command: c})
	}
	results, changes, err := m.s.Apply(m.index, 1, state.EncodeEntry(e))
	if err != nil {
		m.fail("applying: %v", err)
	}
	m.c.Observe(changes)
	if len(changes) > 0 {
		m.wake = m.now
	}
	m.check()
	return results
}

func (m *sim) addNode(name blixard.NodeName, k machine) {
	id := state.NodeIdentity{Name: name, Address: string(name) + ":7", Zone: k.zone}
	a := &agent{name: name, raftID: 1, kind: k, guests: map[string]*guest{}, slow: 2}
	if m.view().NodeCount() == 0 {
		m.apply("ops", &state.Bootstrap{ClusterID: "c", RaftID: 1, Node: id})
		m.c.Reset(m.view(), m.now)
	} else {
		r := m.apply("ops", &state.JoinNode{Node: id})[0]
		if r.Err != nil {
			m.fail("joining: %v", r.Err)
		}
		a.raftID = r.Outcome.Value
	}
	m.agents = append(m.agents, a)
	m.reportNode(a)
}

func (m *sim) reportNode(a *agent) {
	m.apply("agent", &state.ReportNode{
		Name: a.name, RaftID: a.raftID, Address: string(a.name) + ":7", Zone: a.kind.zone, Hypervisors: []string{"qemu"},
		Capacity: blixard.Resources{MilliCPU: a.kind.cores * 1000, MemoryMiB: a.kind.memoryMiB, DiskMiB: 1 << 20}, FeatureLevel: m.level,
	})
}

func (m *sim) agent(name blixard.NodeName) *agent {
	for _, a := range m.agents {
		if a.name == name {
			return a
		}
	}
	return nil
}

// run lets time pass in steps of 100 ms.
func (m *sim) run(ms int64) {
	for end := m.now + ms; m.now < end; {
		m.now += 100
		for _, a := range m.agents {
			m.fence(a)
		}
		for _, a := range m.agents {
			m.act(a)
		}
		m.lead()
	}
}

// lead makes passes as the shell does.
func (m *sim) lead() {
	for range 50 {
		if m.now < m.wake {
			return
		}
		out := m.c.Step(Input{View: m.view(), NowMonoMS: m.now, NowWallMS: m.now + m.skewMS})
		m.passes++
		m.wake = out.NextWakeMonoMS
		if len(out.Commands) == 0 {
			if m.wake <= m.now && m.c.queue.Len() == 0 && m.c.freshVMs.Len() == 0 && m.c.freshNodes.Len() == 0 {
				m.fail("a pass that proposes nothing wants another at once")
			}
			continue
		}
		m.idleMS = m.now
		m.condemned = nil
		for _, c := range out.Commands {
			m.checkProposal(c)
		}
		results := m.apply("leader", out.Commands...)
		for k, r := range results {
			if m.log != nil {
				m.log(render(out.Commands[k], r))
			}
		}
	}
	m.fail("the leader does not come to rest at %d ms", m.now)
}

// fence stops exclusive guests whose lease is over.
func (m *sim) fence(a *agent) {
	if m.now < a.leaseEnd {
		return
	}
	for k, g := range a.guests {
		if g.exclusive {
			delete(a.guests, k)
		}
	}
}

// act is an agent's step: a heartbeat, then what the view wants.
func (m *sim) act(a *agent) {
	n := m.view().Node(a.name)
	if a.cut || n == nil || n.RaftID != a.raftID {
		return
	}
	if m.now-a.beatMS >= 1000 {
		a.beatMS = m.now
		if n.State == blixard.NodeReady {
			m.c.Leases.Ack(n, m.now)
			a.leaseEnd = m.now + m.c.config.LeaseMS
		} else {
			m.c.Leases.Heard(n, m.now)
		}
	}
	known := map[string]bool{}
	var items []state.Observation
	m.view().InstancesOn(a.name, func(i *blixard.Instance) bool {
		key := i.Incarnation()
		known[key] = true
		if o, ok := a.step(i, m.now < a.leaseEnd); ok {
			items = append(items, o)
		}
		return true
	})
	for k := range a.guests {
		if !known[k] {
			delete(a.guests, k)
		}
	}
	if len(items) > 0 {
		m.apply("agent", &state.Observe{Node: a.name, RaftID: a.raftID, Items: items})
	}
}

// step brings one incarnation a step further.
func (a *agent) step(i *blixard.Instance, leased bool) (state.Observation, bool) {
	o := state.Observation{VM: i.VM, Ordinal: i.Ordinal, Generation: i.Generation, State: i.State, Paused: i.StatePaused, Health: i.Health}
	key := i.Incarnation()
	g := a.guests[key]
	if i.State.Terminal() {
		delete(a.guests, key)
		o.Removed = i.Wanted == blixard.WantRemove
		return o, o.Removed
	}
	if i.Wanted != blixard.WantRun {
		switch {
		case i.State != blixard.Stopping && g != nil:
			o.State = blixard.Stopping
		default:
			delete(a.guests, key)
			o.State = blixard.Stopped
		}
		return o, true
	}
	switch {
	case g == nil && (i.State == blixard.Running || i.State == blixard.Starting):
		o.State, o.Message = blixard.Failed, "it is gone"
	case g == nil && i.State == blixard.Pending:
		o.State = blixard.Preparing
	case g == nil:
		if i.Spec.Singleton && !leased {
			return o, false
		}
		a.guests[key] = &guest{vm: i.VM, ordinal: i.Ordinal, generation: i.Generation, exclusive: i.Spec.Singleton}
		o.State = blixard.Starting
	case g.crash:
		delete(a.guests, key)
		o.State, o.Message = blixard.Failed, "the guest crashed"
	case i.State == blixard.Starting:
		if g.steps++; g.steps < a.slow {
			return o, false
		}
		o.State = blixard.Running
	case g.health != i.Health || i.Paused != i.StatePaused:
		o.Health, o.Paused = g.health, i.Paused
	default:
		return o, false
	}
	return o, true
}

// lose is the end of a machine: what ran there is gone.
func (a *agent) crash() { a.guests = map[string]*guest{} }

// elect makes another replica leader: its controller knows nothing.
func (m *sim) elect() {
	m.c = New(Config{})
	m.c.Reset(m.view(), m.now)
	m.wake = m.now
}

// checkProposal holds what is proposed against what really runs.
func (m *sim) checkProposal(c state.Command) {
	switch c := c.(type) {
	case *state.PlaceInstance:
		m.checkPlace(c)
	case *state.PreemptInstances:
		m.checkPreempt(c)
	case *state.EndInstance:
		if c.Wanted != blixard.WantRun {
			m.checkEnd(c)
		}
	}
}

// checkPlace: at no instant two exclusive incarnations of one slot.
func (m *sim) checkPlace(p *state.PlaceInstance) {
	vm := m.view().VM(p.VM)
	if vm == nil || !vm.Spec.Singleton {
		return
	}
	for _, a := range m.agents {
		for _, key := range keys(a.guests) {
			if g := a.guests[key]; g.vm == p.VM && g.ordinal == p.Ordinal && g.exclusive {
				m.fail("%s-%d#%d is placed while %s still runs on %s", p.VM, p.Ordinal, p.Generation, key, a.name)
			}
		}
	}
}

// checkEnd: what is wanted and runs well is ended only to be replaced by what
// its user asked for, or to leave a node that drains.
func (m *sim) checkEnd(c *state.EndInstance) {
	vm, i := m.view().VM(c.VM), m.view().Instance(c.VM, c.Ordinal, c.Generation)
	if vm == nil || i == nil {
		m.fail("%s-%d#%d is to %s, but there is none", c.VM, c.Ordinal, c.Generation, c.Wanted)
		return
	}
	n := m.view().Node(i.Node)
	switch {
	case i.State.Terminal(), vm.Deleting, vm.Desired != blixard.DesiredRunning, i.Ordinal > vm.Spec.Replicas:
	case i.SpecVersion != vm.SpecVersion, i.RestartSeq != vm.RestartSeq, i.Health == blixard.HealthUnhealthy:
	case n != nil && n.Availability == blixard.Draining:
	default:
		m.fail("%s is to %s (%s), but it is wanted and well", i.Incarnation(), c.Wanted, c.Reason)
	}
}

// checkPreempt: only what has a lower priority is ended, only where it helps,
// and all of it is needed.
func (m *sim) checkPreempt(c *state.PreemptInstances) {
	v := m.view()
	vm, node := v.VM(c.VM), v.Node(c.Node)
	var own, victims, ending []*blixard.Instance
	v.InstancesOn(c.Node, func(i *blixard.Instance) bool {
		ref := state.Victim{VM: i.VM, Ordinal: i.Ordinal, Generation: i.Generation}
		victim := slices.Contains(c.Victims, ref)
		switch {
		case i.Generation == c.Succeeds && i.VM == c.VM && i.Ordinal == c.Ordinal:
			own = append(own, i)
		case victim:
			victims = append(victims, i)
		case i.Holds() && (i.Wanted != blixard.WantRun || slices.Contains(m.condemned, ref)):
			ending = append(ending, i)
		}
		return true
	})
	for _, i := range victims {
		if p := v.VM(i.VM).Spec.Priority; p >= vm.Spec.Priority || !i.Counts() {
			m.fail("%s of priority %d (%s, to %s) is preempted by %s of priority %d", i.Incarnation(), p, i.State, i.Wanted, vm.Name, vm.Spec.Priority)
		}
	}
	m.condemned = append(m.condemned, c.Victims...)
	if len(victims) != len(c.Victims) {
		m.fail("%s preempts %v, of which %d run on %s", vm.Name, c.Victims, len(victims), c.Node)
	}
	q := v.Case(node, &vm.Spec)
	if then := q.Without(slices.Concat(own, victims, ending)); then.Objection() != nil {
		m.fail("%s preempts %v on %s in vain: %s", vm.Name, c.Victims, c.Node, then.Objection().Detail)
	}
}

// check holds the state against the invariants.
func (m *sim) check() {
	v := m.view()
	live := map[string]string{}
	v.Instances(func(i *blixard.Instance) bool {
		slot := string(i.ID)
		if !i.State.Terminal() {
			if live[slot] != "" {
				m.fail("%s has two incarnations: %s and %s", slot, live[slot], i.Incarnation())
			}
			live[slot] = i.Incarnation()
		}
		// A name can be used again by another VM: generations grow all the same.
		if i.State == blixard.Pending {
			if i.Generation < m.seen[slot] {
				m.fail("%s: generation %d after %d", slot, i.Generation, m.seen[slot])
			}
			m.seen[slot] = i.Generation
		}
		return true
	})
	v.Nodes(func(n *blixard.Node) bool {
		used := v.Usage(n.Name).Used
		if !used.Fits(n.Allocatable()) && n.State != blixard.NodeJoining {
			m.fail("%s is overbooked: %+v of %+v", n.Name, used, n.Allocatable())
		}
		groups := map[string]string{}
		v.InstancesOn(n.Name, func(i *blixard.Instance) bool {
			if g := i.Spec.AntiAffinityGroup; g != "" && i.Holds() {
				if groups[g] != "" {
					m.fail("%s and %s of group %s share %s", groups[g], i.ID, g, n.Name)
				}
				groups[g] = string(i.ID)
			}
			return true
		})
		return true
	})
	physical := map[string]string{}
	for _, a := range m.agents {
		for key, g := range a.guests {
			slot := fmt.Sprintf("%s-%d", g.vm, g.ordinal)
			if g.exclusive && physical[slot] != "" {
				m.fail("%s runs as %s and as %s on %s", slot, physical[slot], key, a.name)
			}
			if g.exclusive {
				physical[slot] = key
			}
		}
	}
}

// settled is what still differs from what is wanted, "" if nothing does.
func (m *sim) unsettled() string {
	v := m.view()
	var out []string
	v.VMs(func(vm *blixard.VM) bool {
		up, missing, done, worn := 0, 0, 0, false
		newest := map[int]*blixard.Instance{}
		v.InstancesOf(vm.Name, func(i *blixard.Instance) bool {
			newest[i.Ordinal] = i
			worn = worn || i.Restarts >= maxPreemptRestarts
			if i.Ordinal <= vm.Spec.Replicas && i.Counts() && i.State == blixard.Running {
				up++
			}
			return true
		})
		for _, i := range newest {
			if i.Wanted == blixard.WantRun && (i.State == blixard.Failed && vm.Spec.Restart.Mode == "never") {
				done++
			}
		}
		if vm.Refusal != nil {
			missing = vm.Refusal.Missing
		}
		switch {
		case vm.Deleting:
			out = append(out, fmt.Sprintf("%s is not deleted", vm.Name))
		case vm.Desired == blixard.DesiredStopped && up > 0:
			out = append(out, fmt.Sprintf("%s is not stopped", vm.Name))
		case vm.Desired == blixard.DesiredRunning && up+missing+done < vm.Spec.Replicas:
			out = append(out, fmt.Sprintf("%s has %d of %d up, %d refused, %d done", vm.Name, up, vm.Spec.Replicas, missing, done))
		}
		if vm.Refusal != nil && !vm.Deleting {
			// Refused ones fit nowhere, or wait.
			r := schedule.Refuse(v, &vm.Spec)
			if !strings.HasPrefix(r.Summary, "0/") && strings.HasPrefix(vm.Refusal.Summary, "0/") {
				out = append(out, fmt.Sprintf("%s is refused (%s) but: %s", vm.Name, vm.Refusal.Summary, r.Summary))
			}
			if room, ok := schedule.ExplainRoom(v, schedule.Want{Request: schedule.Request{VM: vm.Name, Spec: &vm.Spec}}); ok && !worn && strings.HasPrefix(vm.Refusal.Summary, "0/") {
				out = append(out, fmt.Sprintf("%s is refused (%s) but could get %s", vm.Name, vm.Refusal.Summary, room.String()))
			}
		}
		return true
	})
	return strings.Join(out, "; ")
}

func keys[V any](m map[string]V) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// render writes a command as a line of a story.
func render(c state.Command, r state.Result) string {
	line := ""
	switch c := c.(type) {
	case *state.PlaceInstance:
		line = fmt.Sprintf("place %s-%d#%d on %s", c.VM, c.Ordinal, c.Generation, c.Node)
		if c.Restarts > 0 {
			line += fmt.Sprintf(" (restart %d)", c.Restarts)
		}
	case *state.EndInstance:
		line = fmt.Sprintf("%s %s-%d#%d: %s", c.Wanted, c.VM, c.Ordinal, c.Generation, c.Reason)
		if c.Wanted == blixard.WantRun {
			line = fmt.Sprintf("paused=%t %s-%d#%d", c.Paused, c.VM, c.Ordinal, c.Generation)
		}
	case *state.DropInstance:
		line = fmt.Sprintf("drop %s-%d#%d", c.VM, c.Ordinal, c.Generation)
	case *state.RefuseVM:
		line = fmt.Sprintf("refuse %s: %d missing: %s", c.Name, c.Missing, c.Summary)
		if c.Missing == 0 {
			line = fmt.Sprintf("refuse %s: no more", c.Name)
		}
	case *state.PreemptInstances:
		line = fmt.Sprintf("preempt for %s-%d on %s:", c.VM, c.Ordinal, c.Node)
		for _, v := range c.Victims {
			line += fmt.Sprintf(" %s-%d#%d", v.VM, v.Ordinal, v.Generation)
		}
	case *state.LoseNode:
		line = fmt.Sprintf("lose %s", c.Name)
	case *state.ReviveNode:
		line = fmt.Sprintf("revive %s", c.Name)
	default:
		line = fmt.Sprintf("%T", c)
	}
	if r.Err != nil {
		line += " -> " + r.Err.Message
	}
	return line
}
