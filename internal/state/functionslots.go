package state

import (
	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/wire"
)

// LeaseSlots asks for executions that a node may run at once, on top of those it
// has. Outcome.Value is how many it got: all that are left, if fewer than Want;
// 0 is no error. What was not got is noted, so that nodes with idle ones return
// them (View.SlotsShort); Want 0 takes that note back.
//
// Never are more leased than the function's MaxConcurrent: what a node was given
// counts until it returned it or was declared lost.
type LeaseSlots struct {
	Function  blixard.FunctionName
	Node      blixard.NodeName
	NodeEpoch uint64
	Want      int
}

func (m *LeaseSlots) kind() uint8 { return 50 }

func (m *LeaseSlots) code(c *wire.Coder) {
	wire.String(c, &m.Function)
	wire.String(c, &m.Node)
	wire.Uint(c, &m.NodeEpoch)
	wire.Int(c, &m.Want)
}

func (m *LeaseSlots) apply(tx *txn) (Outcome, *blixard.Error) {
	f, err := tx.findFunction(m.Function, 0)
	if err != nil {
		return Outcome{}, err
	}
	if m.Want < 0 || m.Want > blixard.MaxFunctionConcurrent {
		return Outcome{}, blixard.Invalid("want", "", "%d slots are asked for; at most %d may be", m.Want, blixard.MaxFunctionConcurrent)
	}
	if err := tx.takesWork(m.Node, m.NodeEpoch); err != nil {
		return Outcome{}, err
	}
	old := tx.slotsOf(m.Function, m.Node)
	if old.Count > 0 && old.NodeEpoch != m.NodeEpoch {
		return Outcome{}, &blixard.Error{
			Code: blixard.CodeUnavailable, Message: "what " + string(m.Node) + " leased before it was replaced is not free yet", Hint: "try again in a few seconds",
		}
	}
	leased, _ := tx.t.leased.Get(m.Function)
	s := old
	s.NodeEpoch = m.NodeEpoch
	granted := max(0, min(m.Want, f.MaxConcurrent-leased))
	s.Count += granted
	s.Short, s.ShortMS = m.Want-granted, 0
	if s.Short > 0 {
		s.ShortMS = tx.nowMS
	}
	// One that asks again and again need not change the row each time.
	if s == old || granted == 0 && s.Short == old.Short && s.ShortMS-old.ShortMS < shortForMS/2 && s.ShortMS >= old.ShortMS {
		return Outcome{Noop: true}, nil
	}
	tx.setSlots(&s)
	return Outcome{Version: tx.index, Value: uint64(granted)}, nil
}

func (tx *txn) slotsOf(name blixard.FunctionName, node blixard.NodeName) blixard.FunctionSlots {
	if s, ok := tx.t.slots.Get(slotsKey(name, node)); ok {
		return *s
	}
	return blixard.FunctionSlots{Function: name, Node: node}
}

// ReturnSlots gives back slots that a node does not use: nothing runs under them
// any more, and nothing will. Count above what it has is all. After an epoch has
// ended there is nothing to return. A repeat returns more: it needs the key of the
// first one.
type ReturnSlots struct {
	Function  blixard.FunctionName
	Node      blixard.NodeName
	NodeEpoch uint64
	Count     int
}

func (m *ReturnSlots) kind() uint8 { return 51 }

func (m *ReturnSlots) code(c *wire.Coder) {
	wire.String(c, &m.Function)
	wire.String(c, &m.Node)
	wire.Uint(c, &m.NodeEpoch)
	wire.Int(c, &m.Count)
}

func (m *ReturnSlots) apply(tx *txn) (Outcome, *blixard.Error) {
	if m.Count < 0 {
		return Outcome{}, blixard.Invalid("count", "", "%d slots are returned", m.Count)
	}
	old := tx.slotsOf(m.Function, m.Node)
	if old.Count == 0 && old.Short == 0 || old.NodeEpoch != m.NodeEpoch {
		return Outcome{Noop: true}, nil
	}
	s := old
	s.Count -= min(m.Count, s.Count)
	s.Short, s.ShortMS = 0, 0
	if s == old {
		return Outcome{Noop: true}, nil
	}
	tx.setSlots(&s)
	tx.settleDeleted(m.Function)
	return Outcome{Version: tx.index, Value: uint64(old.Count - s.Count)}, nil
}

// slotsHeld is how many slots of all functions a node has.
func (t *functionTables) slotsHeld(node blixard.NodeName) (n int) {
	under(t.slotsOn, string(node)+"\x00", func(s *blixard.FunctionSlots) bool { n += s.Count; return true })
	return n
}

// slotsEpoch is the first epoch of a node in which nothing is leased yet: a name
// that was removed while it held slots must not come by them when it joins again.
func (t *functionTables) slotsEpoch(node blixard.NodeName) (epoch uint64) {
	under(t.slotsOn, string(node)+"\x00", func(s *blixard.FunctionSlots) bool { epoch = max(epoch, s.NodeEpoch+1); return true })
	return epoch
}

// loseSlots takes all slots of a node whose lease is over: it runs nothing any
// more. Those of a node that was removed or replaced stay until the leader, who
// knows when the lease is over, returns them.
func (tx *txn) loseSlots(node blixard.NodeName) {
	var had []*blixard.FunctionSlots
	under(tx.t.slotsOn, string(node)+"\x00", func(s *blixard.FunctionSlots) bool { had = append(had, s); return true })
	for _, s := range had {
		gone := *s
		gone.Count, gone.Short, gone.ShortMS = 0, 0, 0
		tx.setSlots(&gone)
		tx.settleDeleted(s.Function)
	}
}
