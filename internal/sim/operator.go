package sim

import (
	"fmt"
	"slices"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/raftlog/wal/memfs"
	"github.com/blixard/blixard/internal/replica"
	"github.com/blixard/blixard/internal/state"
)

// operator founds the cluster, has machines join, and while things go wrong
// removes some and takes them back, drains, and hands leadership over. A member
// is taken away for good one at a time, as an operator should: one whose disk is
// lost has left the raft configuration before the next one is taken.
type operator struct {
	w       *world
	ready   bool
	key     int
	open    int    // commands that are not answered
	leaving uint64 // raft ID of a member that is on its way out
	goes    bool   // it was removed, and is alive until the others do without it
	// old are disks of former members, with their raft IDs.
	old map[*machine]oldDisk
}

type oldDisk struct {
	raftID uint64
	fs     *memfs.FS
}

func identity(m *machine) state.NodeIdentity {
	return state.NodeIdentity{Name: m.name, Address: address(m), Zone: m.zone}
}

func (o *operator) found() {
	m := o.w.machines[0]
	o.old = map[*machine]oldDisk{}
	m.member(1)
	if err := beginLog(m); err != nil {
		o.w.violated("a log can be begun", "%v", err)
	}
	m.start()
	o.do(&state.Bootstrap{ClusterID: "c", Name: "c", RaftID: 1, Node: identity(m), FeatureLevel: m.level}, func(state.Result) { o.admit(1) })
}

// admit has the machines join one after another.
func (o *operator) admit(at int) {
	if at == len(o.w.machines) {
		o.ready = true
		return
	}
	o.join(o.w.machines[at], func() { o.admit(at + 1) })
}

// join makes a machine a member with an empty log.
func (o *operator) join(m *machine, then func()) {
	o.do(&state.JoinNode{Node: identity(m), Replace: true}, func(res state.Result) {
		if res.Err != nil {
			o.w.violated("a machine can join", "%s: %v", m.name, res.Err)
		}
		o.w.count["join"]++
		m.member(res.Outcome.Value)
		m.start()
		then()
	})
}

// do proposes a command again and again, through any node, until it is
// answered.
func (o *operator) do(cmd state.Command, then func(state.Result)) {
	o.key++
	o.open++
	e := state.Envelope{Key: fmt.Sprintf("operator/%d", o.key), Actor: "operator", Command: cmd}
	done := false
	var try func()
	try = func() {
		if done {
			return
		}
		if p := o.w.anyProcess(o.w.rng); p != nil {
			p.enter(func() {
				p.propose(e, func(res state.Result) {
					if !done {
						done = true
						o.open--
						o.w.say("operator is answered by %s: %T %+v %v", p.m.name, cmd, res.Outcome, res.Err)
						then(res)
					}
				}, func() bool { return done })
			})
		}
		o.w.after(2000, try)
	}
	try()
}

// settled tells whether every machine is a member that the leader counts, and
// knows it: only then may one be taken away for good.
func (o *operator) settled() bool {
	r := o.w.ruler()
	if r == nil || o.leaving != 0 || len(o.w.machines) < 3 || o.w.check.voters(r) != "" {
		return false // also a majority of two is two
	}
	for _, x := range o.w.machines {
		if x.raftID == 0 || x.damaged || x.proc == nil || !replica.InConf(r.proc.r.ConfState(), x.raftID) {
			return false
		}
		// Who has not heard that it votes cannot stand in for who is taken away.
		if conf := x.proc.r.ConfState(); !slices.Equal(conf.GetVoters(), r.proc.r.ConfState().GetVoters()) {
			return false
		}
	}
	return true
}

// remove takes a machine out of the cluster and takes it back after a while.
func (o *operator) remove(m *machine, awayMS int64) {
	if o.settled() {
		o.removing(m, awayMS, func() {})
	}
}

// removing is remove; then is called when the removal is agreed upon, yet not
// carried out.
func (o *operator) removing(m *machine, awayMS int64, then func()) {
	id := m.raftID
	o.leaving = id
	o.w.count["removal"]++
	o.do(&state.RemoveNode{Name: m.name, Force: true}, func(res state.Result) {
		if res.Err != nil {
			o.leaving = 0
			return
		}
		o.goes = true
		then()
		o.gone(id, func() {
			o.goes = false
			if m.raftID == id && m.fs != nil {
				o.old[m] = oldDisk{id, m.fs.Crash(o.w.rng, memfs.All)}
			}
			m.wipe()
			o.leaving = id // until it is back
			o.w.after(awayMS, func() { o.join(m, func() { o.leaving = 0 }) })
		})
	})
}

// replace has a machine whose log is lost join again.
func (o *operator) replace(m *machine, awayMS int64) {
	id := m.raftID
	o.leaving = id
	m.damaged = true
	o.w.after(awayMS, func() {
		o.w.count["replacement"]++
		m.wipe()
		o.join(m, func() { o.gone(id, func() { o.leaving = 0 }) })
	})
}

// gone goes on once the others do without a member.
func (o *operator) gone(id uint64, then func()) {
	if r := o.w.ruler(); r != nil && r.raftID != id && !replica.InConf(r.proc.r.ConfState(), id) {
		then()
		return
	}
	o.w.after(300, func() { o.gone(id, then) })
}

// revive puts a former member's disk into its machine for a while.
func (o *operator) revive(m *machine, forMS int64) {
	old, ok := o.old[m]
	if !ok || !o.settled() {
		return
	}
	o.w.count["old disk"]++
	id := m.raftID
	o.leaving = id
	m.powerCut()
	fs := m.fs
	m.raftID, m.fs = old.raftID, old.fs.Crash(o.w.rng, memfs.All)
	o.w.say("%s gets its old disk, of member %d", m.name, old.raftID)
	m.start()
	o.w.after(forMS, func() {
		m.powerCut()
		m.end()
		m.raftID, m.fs, m.damaged = id, fs, false
		o.leaving = 0
		m.start()
	})
}

// recall undoes what keeps instances away from nodes.
func (o *operator) recall() {
	r := o.w.ruler()
	if r == nil {
		o.w.after(500, o.recall)
		return
	}
	v := r.proc.r.View()
	v.Nodes(func(n *blixard.Node) bool {
		if n.Availability != blixard.Active {
			o.do(&state.SetNode{Name: n.Name, Availability: blixard.Active}, func(state.Result) {})
		}
		return true
	})
	o.do(&state.SetMaintenance{}, func(state.Result) {})
}

// member tells whether a machine is to be counted on in the end.
func (o *operator) member(m *machine) bool {
	r := o.w.ruler()
	if r == nil || m.raftID == 0 {
		return false
	}
	n := r.proc.r.View().Node(m.name)
	return n != nil && n.RaftID == m.raftID
}
