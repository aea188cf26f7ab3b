package control

import (
	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// Leases is the leader's own record of the leases it gave, on its own
// monotonic clock. A node may run exclusive instances until its lease runs
// out, counted from when it sent the heartbeat; the leader counts from when it
// answered, which is later, and adds the margin for clocks that run apart.
//
// A leader knows nothing of what its predecessors gave: Reset takes the moment
// of the election as the last answer to every node.
//
// An answer belongs to the row it was given to: a node that was lost, removed
// or replaced and is back does not prolong what it held before.
type Leases struct {
	config    Config
	electedMS int64
	nodes     map[blixard.NodeName]*lease
}

type lease struct {
	raftID, epoch uint64
	ackMS         int64 // last answer to this raftID and epoch
	formerMS      int64 // last answer to any earlier one

	heard      int // heartbeats in a row since it was lost
	heardMS    int64
	heardEpoch uint64
}

// Reset begins a leadership: every lease is assumed to have been given now.
func (l *Leases) Reset(nowMonoMS int64) {
	l.electedMS, l.nodes = nowMonoMS, map[blixard.NodeName]*lease{}
}

// Ack notes that the node, whose row is n and Ready, is given a lease now. It
// must be called before the answer is sent.
func (l *Leases) Ack(n *blixard.Node, nowMonoMS int64) {
	r := l.of(n)
	r.ackMS = max(r.ackMS, nowMonoMS)
	r.heard = 0
}

// Heard notes a heartbeat of a node, whether or not it is given a lease.
func (l *Leases) Heard(n *blixard.Node, nowMonoMS int64) {
	r := l.of(n)
	if r.heardEpoch != n.Epoch || nowMonoMS-r.heardMS > 3*l.config.HeartbeatMS {
		r.heard = 0
	}
	if r.heard == 0 || nowMonoMS-r.heardMS >= l.config.HeartbeatMS/2 {
		r.heard++
		r.heardMS, r.heardEpoch = nowMonoMS, n.Epoch
	}
}

// of is the record of a row.
func (l *Leases) of(n *blixard.Node) *lease {
	r := l.nodes[n.Name]
	if r == nil {
		r = &lease{raftID: n.RaftID, epoch: n.Epoch, ackMS: l.electedMS, formerMS: l.electedMS}
		l.nodes[n.Name] = r
	}
	if r.raftID != n.RaftID || r.epoch != n.Epoch {
		r.formerMS = max(r.formerMS, r.ackMS)
		r.raftID, r.epoch = n.RaftID, n.Epoch
	}
	return r
}

// EndMS is when a node's present lease is over for certain.
func (l *Leases) EndMS(n *blixard.Node) int64 {
	return l.of(n).ackMS + l.config.LeaseMS + l.config.MarginMS
}

// Expired tells whether a node's present lease is over for certain.
func (l *Leases) Expired(n *blixard.Node, nowMonoMS int64) bool { return nowMonoMS >= l.EndMS(n) }

// renew assumes that a node whose row has just become Ready was answered now.
func (l *Leases) renew(n *blixard.Node, nowMonoMS int64) {
	r := l.of(n)
	r.ackMS = max(r.ackMS, nowMonoMS)
}

// assumeAll assumes that every lease was given now.
func (l *Leases) assumeAll(nowMonoMS int64) {
	l.electedMS = max(l.electedMS, nowMonoMS)
	//order:any each record is changed by itself
	for _, r := range l.nodes {
		r.ackMS = max(r.ackMS, nowMonoMS)
	}
}

// back tells whether a lost node was heard of for two heartbeats.
func (l *Leases) back(n *blixard.Node, nowMonoMS int64) bool {
	r := l.of(n)
	return r.heard >= 2 && r.heardEpoch == n.Epoch && nowMonoMS-r.heardMS <= 3*l.config.HeartbeatMS
}

// lostEndMS is when the lease under which a lost incarnation ran is over for
// certain. Its row is Lost, so it belongs to an earlier row of its node than
// the present one.
func (l *Leases) lostEndMS(v *state.View, i *blixard.Instance) int64 {
	return l.formerEndMS(v, i.Node)
}

// formerEndMS is when every lease of a node's earlier rows is over for certain.
func (l *Leases) formerEndMS(v *state.View, name blixard.NodeName) int64 {
	last := l.electedMS
	if r := l.nodes[name]; r != nil {
		last = max(r.ackMS, r.formerMS)
		if n := v.Node(name); n != nil && n.RaftID == r.raftID && n.Epoch == r.epoch {
			last = r.formerMS
		}
	}
	return last + l.config.LeaseMS + l.config.MarginMS
}

// forget drops the record of a name that is no member and whose last lease is
// over.
func (l *Leases) forget(name blixard.NodeName, nowMonoMS int64) {
	if r := l.nodes[name]; r != nil && nowMonoMS >= max(r.ackMS, r.formerMS)+l.config.LeaseMS+l.config.MarginMS {
		delete(l.nodes, name)
	}
}
