package sim

import (
	"bytes"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/blixard/blixard/internal/replica"
	"github.com/blixard/blixard/internal/state"
)

// network loses, delays, repeats and reorders what it carries. Messages go
// through their encoding, so that nothing is shared between replicas.
type network struct {
	w *world
	// cut counts the faults that keep a direction between two machines shut, and
	// slow what they add to its delay, in milliseconds. cost is how many it takes to
	// carry a KiB, one after another, and busy until when each direction does.
	cut, slow       [][]int64
	cost, busy      [][]int64
	lossPct, dupPct int
	delayMS         int64
	mended          int // how often all was made sound
}

func newNetwork(w *world) *network {
	n := &network{w: w, delayMS: w.k.DelayMS}
	for range w.k.Nodes {
		for _, table := range []*[][]int64{&n.cut, &n.slow, &n.cost, &n.busy} {
			*table = append(*table, make([]int64, w.k.Nodes))
		}
	}
	return n
}

// mend makes the network sound.
func (n *network) mend() {
	n.mended++
	for i := range n.cut {
		clear(n.cut[i])
		clear(n.slow[i])
		clear(n.cost[i])
		clear(n.busy[i])
	}
	n.lossPct, n.dupPct, n.delayMS = 0, 0, min(n.w.k.DelayMS, 2)
}

// smallBytes is about what a heartbeat, or a refusal, takes.
const smallBytes = 100

// longestQueueMS is how long a message may wait for a narrow link; what comes
// when the queue is full is lost.
const longestQueueMS = 8000

// queued is how long something has to wait for its turn on a link, and to pass;
// false if it finds no room.
func (n *network) queued(from, to *machine, bytes int) (int64, bool) {
	cost := n.cost[from.at][to.at]
	if cost == 0 {
		return 0, true
	}
	at := max(n.busy[from.at][to.at], n.w.now) + (int64(bytes)*cost+1023)/1024
	if at > n.w.now+longestQueueMS {
		n.w.count["queue full"]++
		return 0, false
	}
	n.busy[from.at][to.at] = at
	return at - n.w.now, true
}

// carry delivers something to a machine, or calls lost (which may be nil).
func (n *network) carry(from, to *machine, bytes int, deliver, lost func()) {
	queued, room := n.queued(from, to, bytes)
	if !room || n.cut[from.at][to.at] > 0 || !to.powered || n.w.chance(n.lossPct) {
		n.w.count["message lost"]++
		if lost != nil {
			n.w.after(n.w.between(0, 100), lost)
		}
		return
	}
	slow := n.slow[from.at][to.at]
	n.w.after(queued+n.w.between(0, n.delayMS)+n.w.between(slow/2, slow), deliver)
	if n.dupPct > 0 && n.w.chance(n.dupPct) {
		n.w.count["message repeated"]++
		n.w.after(queued+n.w.between(0, n.delayMS+slow), deliver)
	}
}

// refusing has a peer notice that a process is gone whose machine is up.
func (n *network) refusing(peer, gone *machine) {
	id, p := gone.raftID, peer.proc
	n.carry(gone, peer, smallBytes, func() {
		if p != nil && gone.proc == nil && peer.proc == p {
			p.enter(func() {
				if p.loop.PeerGone(id) {
					n.w.count["leader's process gone"]++
				}
			})
		}
	}, nil)
}

// send carries a raft message. Losses are reported to the sender, sometimes.
func (n *network) send(p *process, m *raftpb.Message) {
	id := m.GetTo()
	to := n.w.byRaftID(id)
	unreachable := func() {
		if p.alive() && n.w.chance(50) {
			p.enter(func() { p.r.Unreachable(id) })
		}
	}
	if to == nil || !p.reaches(id) {
		n.w.after(1, unreachable)
		return
	}
	data, err := proto.Marshal(m)
	if err != nil {
		n.w.violated("messages can be encoded", "%v", err)
	}
	from := p.m.raftID
	// A stream tells where its sender can be reached.
	n.carry(p.m, to, len(data), func() {
		r := to.proc
		if r == nil || to.raftID != id {
			if to.powered && to.raftID == id {
				n.refusing(p.m, to)
			}
			unreachable()
			return
		}
		if !replica.Known(r.r.View(), r.r.ConfState(), from) {
			n.stranger(p, r, from)
			return
		}
		got := new(raftpb.Message)
		if err := proto.Unmarshal(data, got); err != nil {
			n.w.violated("messages can be decoded", "%v", err)
		}
		r.heard[from] = true
		n.w.mix(uint64(n.w.now), got.GetFrom()<<32|got.GetTo(), uint64(got.GetType()), got.GetTerm(), got.GetIndex())
		r.enter(func() { r.step(got) })
	}, unreachable)
}

// stranger refuses who is not a member, and tells it if it was one and will
// never be again: its process then ends for good.
func (n *network) stranger(p, at *process, from uint64) {
	if !replica.WasRemoved(at.r.View(), at.r.ConfState(), from) {
		return
	}
	n.carry(at.m, p.m, smallBytes, func() {
		if p.alive() && p.m.raftID == from {
			n.w.count["told that it was removed"]++
			n.w.say("%s ends: it was removed", p.m.name)
			p.m.kill()
			p.m.damaged = true // its mark keeps it from starting again
		}
	}, nil)
}

// sendSnapshot carries a snapshot message and the state that goes with it.
func (n *network) sendSnapshot(p *process, m *raftpb.Message, v *state.View) {
	id := m.GetTo()
	to := n.w.byRaftID(id)
	report := func(ok bool) {
		if p.alive() {
			p.enter(func() { p.r.SnapshotSent(id, ok) })
		}
	}
	if to == nil || !p.reaches(id) {
		n.w.after(1, func() { report(false) })
		return
	}
	head, err := proto.Marshal(m)
	if err != nil {
		n.w.violated("messages can be encoded", "%v", err)
	}
	var body bytes.Buffer
	if _, err := v.WriteTo(&body); err != nil {
		n.w.violated("a state can be written", "%v", err)
	}
	n.w.count["snapshot sent"]++
	n.w.say("%s sends a snapshot of %d to %s", p.m.name, v.Index, to.name)
	n.carry(p.m, to, len(head)+body.Len(), func() {
		r := to.proc
		if r == nil || to.raftID != id {
			report(false)
			return
		}
		got := new(raftpb.Message)
		if err := proto.Unmarshal(head, got); err != nil {
			n.w.violated("messages can be decoded", "%v", err)
		}
		st, err := state.Read(bytes.NewReader(body.Bytes()))
		if err != nil {
			n.w.violated("a state can be read", "%v", err)
		}
		if !sameState(st.View(), v) {
			n.w.violated("S2 a state is the same after it was written and read", "that of entry %d is not", v.Index)
		}
		r.enter(func() {
			err := r.loop.Replica().StepSnapshot(got, st)
			n.w.say("%s takes the snapshot of %d: %v", to.name, v.Index, err)
			n.w.after(1, func() { report(err == nil) })
		})
	}, func() { report(false) })
}
