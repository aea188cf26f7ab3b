package replica_test

import (
	"slices"

	"github.com/blixard/blixard/internal/replica"
	"github.com/blixard/blixard/internal/state"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// operator founds the cluster, has machines join, and while things go wrong
// removes some and takes them back with empty disks. One machine at a time, as
// an operator should: a member whose disk is wiped has left the raft
// configuration before the next one is taken.
type operator struct {
	w       *world
	ready   bool
	stopped bool
	key     int
	leaving uint64 // raft ID of a member that is on its way out
}

func identity(m *machine) state.NodeIdentity {
	return state.NodeIdentity{Name: m.name, Address: string(m.name) + ":7"}
}

func (o *operator) found() {
	m := o.w.machines[0]
	m.join(1)
	opened, err := m.disk.Open()
	if err != nil {
		o.w.violated("opening a new log: %v", err)
	}
	boot := replica.NewCluster(1)
	v := boot.State.View()
	meta := &raftpb.SnapshotMetadata{ConfState: boot.Conf, Index: proto.Uint64(v.Index), Term: proto.Uint64(v.Term)}
	if err := opened.Log.Install(meta, writeView(v)); err != nil {
		o.w.violated("beginning a log: %v", err)
	}
	if err := opened.Log.Save(boot.HardState, nil, true); err != nil {
		o.w.violated("beginning a log: %v", err)
	}
	if err := opened.Log.Close(); err != nil {
		o.w.violated("beginning a log: %v", err)
	}
	m.start()
	o.do(&state.Bootstrap{ClusterID: "c", Name: "c", RaftID: 1, Node: identity(m)}, func(state.Result) { o.admit(1) })
}

// admit has the machines join one after another.
func (o *operator) admit(at int) {
	if at == len(o.w.machines) {
		o.ready = true
		return
	}
	o.join(o.w.machines[at], func() { o.admit(at + 1) })
}

func (o *operator) join(m *machine, then func()) {
	o.do(&state.JoinNode{Node: identity(m), Replace: true}, func(res state.Result) {
		if res.Err != nil {
			o.w.violated("%s cannot join: %v", m.name, res.Err)
		}
		o.w.count["join"]++
		m.join(res.Outcome.Value)
		m.start()
		then()
	})
}

// do proposes a command again and again, through any node, until it is
// answered.
func (o *operator) do(cmd state.Command, then func(state.Result)) {
	o.key++
	e := state.Envelope{Key: "operator/" + string(rune('0'+o.key%10)) + string(rune('A'+o.key/10)), Actor: "operator", Command: cmd}
	done := false
	var try func()
	try = func() {
		if done {
			return
		}
		if s := o.w.anyServer(); s != nil {
			s.enter(func() {
				s.propose(e, func(res state.Result) {
					if !done {
						done = true
						o.w.say("operator is answered by %s: %T %+v %v", s.m.name, cmd, res.Outcome, res.Err)
						then(res)
					}
				})
			})
		}
		o.w.after(2000, try)
	}
	try()
}

func (o *operator) begin() { o.w.after(o.w.between(500, 8000), o.change) }

func (o *operator) stop() { o.stopped = true }

// change removes a machine, or replaces it without a word.
func (o *operator) change() {
	if o.stopped {
		return
	}
	again := func() { o.w.after(o.w.between(1000, 10_000), o.change) }
	m := o.w.machines[o.w.rng.IntN(len(o.w.machines))]
	if o.leaving != 0 || m.raftID == 0 || !o.settled() {
		again()
		return
	}
	id := m.raftID
	o.leaving = id
	o.do(&state.RemoveNode{Name: m.name, Force: true}, func(res state.Result) {
		if res.Err != nil {
			o.leaving = 0
			again()
			return
		}
		o.w.count["removal"]++
		o.wipe(m, id, func() { o.takeBack(m, again) })
	})
}

// settled tells whether every machine is a member that the leader counts: only
// then may one be taken away for good.
func (o *operator) settled() bool {
	m := o.w.ruler()
	if m == nil {
		return false
	}
	conf := m.srv.r.ConfState()
	for _, x := range o.w.machines {
		if x.raftID == 0 || !slices.Contains(conf.GetVoters(), x.raftID) && !slices.Contains(conf.GetLearners(), x.raftID) {
			return false
		}
	}
	return true
}

// wipe empties a removed machine once the others go on without it.
func (o *operator) wipe(m *machine, id uint64, then func()) {
	if r := o.w.ruler(); r != nil && r != m {
		conf := r.srv.r.ConfState()
		if !slices.Contains(conf.GetVoters(), id) && !slices.Contains(conf.GetLearners(), id) {
			m.wipe()
			o.leaving = 0
			then()
			return
		}
	}
	o.w.after(300, func() { o.wipe(m, id, then) })
}

// takeBack has a removed machine join again, perhaps at once.
func (o *operator) takeBack(m *machine, then func()) {
	o.w.after(o.w.between(0, 4000), func() {
		if o.w.chance(20) && o.stopped {
			return // it stays away
		}
		o.join(m, then)
	})
}

// member tells whether a machine is to be counted on in the end.
func (o *operator) member(m *machine) bool {
	r := o.w.ruler()
	if r == nil || m.raftID == 0 {
		return false
	}
	n := r.srv.r.View().Node(m.name)
	return n != nil && n.RaftID == m.raftID
}
