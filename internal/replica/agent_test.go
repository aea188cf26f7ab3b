package replica_test

import (
	"cmp"
	"slices"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// guest is an incarnation that really runs.
type guest struct {
	key       string // incarnation
	slot      blixard.InstanceID
	exclusive bool
	lease     *lease // under which it was started
}

// lease is what a membership's acknowledged heartbeats gave. It is kept by the
// machine's watchdog and outlives the server's process.
type lease struct {
	untilMS int64  // monotonic: when the heartbeat was sent, plus its length
	index   uint64 // of the leader's state when it answered
}

// agent does what the state wants of its machine, at once. It is part of the
// server's process: what it remembers is forgotten with that.
type agent struct {
	s         *server
	acked     bool // a heartbeat of this process was answered: lease.index holds
	reporting bool
	observing bool
	seenIndex uint64 // its view must be as new before it observes again
}

func newAgent(s *server) *agent { return &agent{s: s} }

func (a *agent) begin() {
	a.s.after(0, a.beat)
	a.s.every(beatMS, a.beat)
	a.s.every(500, a.act)
}

// beat asks the leader to renew the lease.
func (a *agent) beat() {
	s, w := a.s, a.s.m.w
	if s.m.paused() {
		return
	}
	sent, l := s.m.monoMS(), s.m.lease
	answered := func(ok bool, index uint64) {
		s.enter(func() {
			if ok {
				a.granted(l, sent, index)
			} else if n := s.r.View().Node(s.m.name); n != nil && n.State == blixard.NodeJoining {
				a.report()
			}
		})
	}
	leader := w.byRaftID(s.r.Leader())
	switch {
	case leader == nil || leader.srv == nil:
	case leader == s.m:
		s.enter(func() { s.grant(s.m.name, s.m.raftID, answered) })
	default:
		to, name, id := leader.srv, s.m.name, s.m.raftID
		w.net.carry(s.m, leader, func() {
			to.enter(func() {
				to.grant(name, id, func(ok bool, index uint64) {
					w.net.carry(leader, s.m, func() { answered(ok, index) }, nil)
				})
			})
		}, nil)
	}
	a.s.enter(a.report)
}

// grant answers a heartbeat on the leader, as internal/server.GrantLease does.
func (s *server) grant(name blixard.NodeName, raftID uint64, answer func(bool, uint64)) {
	if !s.r.Leads() {
		return
	}
	s.read(func(*state.View) {
		s.enter(func() {
			ok := s.r.Heartbeat(name, raftID)
			answer(ok, s.r.View().Index)
		})
	})
}

func (a *agent) granted(l *lease, sentMS int64, index uint64) {
	m := a.s.m
	l.untilMS = max(l.untilMS, sentMS+leaseMS)
	if !a.acked || index > l.index {
		l.index = index
	}
	a.acked = true
	m.w.mixNumbers(uint64(m.at), uint64(l.untilMS), index)
	m.w.after(m.trueMS(l.untilMS-m.monoMS()), func() { m.fence(l) })
	a.act()
}

// fence kills what may not outlast a lease. It is the watchdog's work, which
// neither waits for the server nor ends with it.
func (m *machine) fence(l *lease) {
	if m.monoMS() < l.untilMS {
		return
	}
	for _, key := range sorted(m.guests) {
		if g := m.guests[key]; g.exclusive && g.lease == l {
			m.w.count["fence"]++
			m.w.say("%s fences %s", m.name, key)
			m.stopGuest(key)
		}
	}
}

func (m *machine) stopGuest(key string) {
	if g := m.guests[key]; g != nil {
		delete(m.guests, key)
		m.w.check.stopped(m, g)
	}
}

// report tells the cluster what the machine has.
func (a *agent) report() {
	s := a.s
	n := s.r.View().Node(s.m.name)
	if a.reporting || n == nil || n.RaftID != s.m.raftID || n.State != blixard.NodeJoining {
		return
	}
	a.reporting = true
	s.after(3000, func() { a.reporting = false })
	s.propose(state.Envelope{Actor: "agent", Command: &state.ReportNode{
		Name: s.m.name, RaftID: s.m.raftID, Address: string(s.m.name) + ":7", Hypervisors: []string{"qemu"}, Capacity: capacity,
	}}, func(state.Result) { a.reporting = false })
}

// capacity is what every machine has: some VMs are refused.
var capacity = blixard.Resources{MilliCPU: 4000, MemoryMiB: 2048, DiskMiB: 1 << 20}

// act brings the machine in line with the view.
func (a *agent) act() {
	s, m := a.s, a.s.m
	if m.paused() {
		return
	}
	v := s.r.View()
	n := v.Node(m.name)
	fresh := a.acked && m.monoMS() < m.lease.untilMS && v.Index >= m.lease.index
	if n == nil || n.RaftID != m.raftID {
		return
	}
	known := map[string]bool{}
	var items []state.Observation
	v.InstancesOn(m.name, func(i *blixard.Instance) bool {
		known[i.Incarnation()] = true
		if o, ok := a.one(i, fresh); ok {
			items = append(items, o)
		}
		return true
	})
	if fresh {
		for _, key := range sorted(m.started) {
			if !known[key] {
				m.stopGuest(key)
				delete(m.started, key)
			}
		}
	}
	a.observe(v, items)
}

// one brings one incarnation in line with its row and tells what to report.
func (a *agent) one(i *blixard.Instance, fresh bool) (state.Observation, bool) {
	m, key := a.s.m, i.Incarnation()
	o := state.Observation{VM: i.VM, Ordinal: i.Ordinal, Generation: i.Generation, State: i.State, Paused: i.Paused}
	running := m.guests[key] != nil
	switch {
	case i.State == blixard.Lost:
		if fresh {
			m.stopGuest(key)
		}
		return o, false
	case i.State.Terminal() || i.Wanted != blixard.WantRun:
		m.stopGuest(key)
		switch {
		case i.Wanted == blixard.WantRemove:
			delete(m.started, key)
			o.Removed = true
		case i.State.Terminal():
			return o, false
		default:
			o.State = blixard.Stopped
		}
		return o, true
	case running:
		o.State = blixard.Running
		return o, i.State != blixard.Running || i.StatePaused != i.Paused
	case m.started[key] || i.State != blixard.Pending:
		o.State = blixard.Failed
		return o, true
	case !fresh:
		return o, false
	}
	m.started[key] = true
	m.guests[key] = &guest{key: key, slot: i.ID, exclusive: i.Spec.EffectiveOnPartition() == blixard.OnPartitionStop, lease: m.lease}
	m.w.count["guest start"]++
	m.w.say("%s starts %s", m.name, key)
	m.w.check.started(m, m.guests[key])
	o.State = blixard.Running
	return o, true
}

// observe reports, one report at a time.
func (a *agent) observe(v *state.View, items []state.Observation) {
	if len(items) == 0 || a.observing || v.Index < a.seenIndex {
		return
	}
	s := a.s
	a.observing = true
	round := s.request + 1
	s.enter(func() {
		s.propose(state.Envelope{Actor: "agent", Command: &state.Observe{Node: s.m.name, RaftID: s.m.raftID, Items: items}}, func(res state.Result) {
			a.observing, a.seenIndex = false, res.Outcome.Index
		})
	})
	s.after(5000, func() { // lost with a leader
		if a.observing && s.request >= round {
			a.observing = false
		}
	})
}

// sorted are the keys of a map in order.
func sorted[K cmp.Ordered, V any](m map[K]V) []K {
	out := make([]K, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}
