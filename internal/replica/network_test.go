package replica_test

import (
	"bytes"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/blixard/blixard/internal/state"
)

// link is one direction between two machines.
type link struct{ from, to int }

// network loses, delays, repeats and reorders what it carries. Messages go
// through their encoding, so that nothing is shared between replicas.
type network struct {
	w                *world
	cut              map[link]bool
	lossPct, dupPct  int
	delayMS          int64
	sent, lost, dups int
}

// carry delivers something to a machine, or calls lost (which may be nil).
func (n *network) carry(from, to *machine, deliver, lost func()) {
	n.sent++
	if n.cut[link{from.at, to.at}] || n.w.chance(n.lossPct) {
		n.lost++
		if lost != nil {
			n.w.after(n.w.between(0, 100), lost)
		}
		return
	}
	copies := 1
	if n.w.chance(n.dupPct) {
		n.dups++
		copies = 2
	}
	for range copies {
		n.w.after(n.w.between(0, max(n.delayMS, 1)), deliver)
	}
}

// send carries a raft message. Losses are reported to the sender, sometimes.
func (n *network) send(s *server, m *raftpb.Message) {
	to := n.w.byRaftID(m.GetTo())
	data, err := proto.Marshal(m)
	if err != nil {
		n.w.violated("encoding a message: %v", err)
	}
	unreachable := func() {
		if s.alive() && n.w.chance(50) {
			s.enter(func() { s.r.Unreachable(m.GetTo()) })
		}
	}
	if to == nil {
		n.w.after(1, unreachable)
		return
	}
	n.carry(s.m, to, func() {
		if to.srv == nil || to.raftID != m.GetTo() {
			unreachable()
			return
		}
		got := new(raftpb.Message)
		if err := proto.Unmarshal(data, got); err != nil {
			n.w.violated("decoding a message: %v", err)
		}
		n.w.mixNumbers(uint64(n.w.now), got.GetFrom(), got.GetTo(), uint64(got.GetType()), got.GetTerm(), got.GetIndex())
		r := to.srv
		r.enter(func() { r.step(got) })
	}, unreachable)
}

// sendSnapshot carries a snapshot message and the state that goes with it.
func (n *network) sendSnapshot(s *server, m *raftpb.Message, v *state.View) {
	to := n.w.byRaftID(m.GetTo())
	report := func(ok bool) {
		if s.alive() {
			s.enter(func() { s.r.SnapshotSent(m.GetTo(), ok) })
		}
	}
	if to == nil {
		n.w.after(1, func() { report(false) })
		return
	}
	head, err := proto.Marshal(m)
	if err != nil {
		n.w.violated("encoding a snapshot message: %v", err)
	}
	var body bytes.Buffer
	if _, err := v.WriteTo(&body); err != nil {
		n.w.violated("writing a snapshot: %v", err)
	}
	n.w.say("%s sends a snapshot of %d to %s", s.m.name, v.Index, to.name)
	n.carry(s.m, to, func() {
		if to.srv == nil || to.raftID != m.GetTo() {
			report(false)
			return
		}
		got := new(raftpb.Message)
		if err := proto.Unmarshal(head, got); err != nil {
			n.w.violated("decoding a snapshot message: %v", err)
		}
		st, err := state.Read(bytes.NewReader(body.Bytes()))
		if err != nil {
			n.w.violated("reading a snapshot: %v", err)
		}
		if st.View().Hash() != v.Hash() {
			n.w.violated("the state at %d changes by being written and read", v.Index)
		}
		r := to.srv
		r.enter(func() {
			err := r.r.StepSnapshot(got, st)
			n.w.say("%s takes the snapshot of %d: %v", to.name, v.Index, err)
			n.w.after(1, func() { report(err == nil) })
		})
	}, func() { report(false) })
}
