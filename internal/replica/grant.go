package replica

import (
	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// Grant is the leader's answer to an agent's heartbeat.
type Grant struct {
	// OK: the lease is granted, counted from when the heartbeat was sent.
	OK bool
	// Index is the leader's applied index: a view as new as this knows
	// everything that was decided about the node before.
	Index uint64
}

// GrantLease answers a heartbeat, once a majority has confirmed, since it
// arrived, that this node leads: a leader that was deposed without knowing it
// can extend no lease. False: this node does not lead, nobody will be answered.
func (l *Loop) GrantLease(name blixard.NodeName, raftID uint64, w Waiter[Grant]) bool {
	if !l.r.ruling {
		return false
	}
	l.Read(&beat{l: l, name: name, raftID: raftID, waiter: w})
	return true
}

// beat is a heartbeat that waits for the leadership to be confirmed.
type beat struct {
	l      *Loop
	name   blixard.NodeName
	raftID uint64
	waiter Waiter[Grant]
}

func (b *beat) Gone() bool { return b.waiter.Gone() }

func (b *beat) Answer(*state.View) {
	ok := b.l.r.Heartbeat(b.name, b.raftID)
	b.waiter.Answer(Grant{OK: ok, Index: b.l.r.View().Index})
}
