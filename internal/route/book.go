package route

import "github.com/blixard/blixard"

// SlotBook tells when a view of the cluster may be believed about the slots that
// are leased to a node, which Node.Slots asks for. Two things make a view too old:
// it is from before the node's lease, when all slots may have been given to
// others; or it lacks what became of a proposal that the node has made, and would
// bring back slots that were returned. Make it with NewSlotBook.
type SlotBook struct {
	holds     bool
	tickets   uint64 // of leases so far
	fresh     uint64 // a view as new as this shows all from before the lease; 0: not known yet
	functions map[blixard.FunctionName]*proposals
}

type proposals struct {
	flights int    // under way
	index   uint64 // a view as new as this shows what became of those that were answered
}

// NewSlotBook makes the book of a node that holds no lease.
func NewSlotBook() SlotBook { return SlotBook{functions: map[blixard.FunctionName]*proposals{}} }

// Lease tells whether the node's lease holds. When that is new it answers with a
// ticket, 0 otherwise: somebody has to find out how new a view is that shows all
// that was decided before now, and tell it to Fresh.
func (b *SlotBook) Lease(holds bool) (ticket uint64) {
	if holds && !b.holds {
		b.tickets++
		ticket = b.tickets
	}
	b.holds = holds
	if !holds {
		b.fresh = 0
	}
	return ticket
}

// Asks tells whether the answer to a ticket is still waited for.
func (b *SlotBook) Asks(ticket uint64) bool { return b.holds && b.fresh == 0 && ticket == b.tickets }

// Fresh tells the index of a view that was linearizable after Lease had given the
// ticket. The answer to an earlier lease's counts for nothing.
func (b *SlotBook) Fresh(ticket, index uint64) {
	if b.Asks(ticket) {
		b.fresh = index
	}
}

// Current tells whether a view of that index shows all from before the lease.
func (b *SlotBook) Current(index uint64) bool { return b.holds && b.fresh > 0 && index >= b.fresh }

// Holds tells whether the lease holds, as Lease was told.
func (b *SlotBook) Holds() bool { return b.holds }

// Began notes that slots of a function are being leased or returned.
func (b *SlotBook) Began(name blixard.FunctionName) { b.of(name).flights++ }

// Landed notes the answer to what Began noted: the index of its entry, or if it
// failed, or its outcome is not known, one more than that of the newest view.
// Should slots have been leased all the same, a later view tells.
func (b *SlotBook) Landed(name blixard.FunctionName, index uint64) {
	p := b.of(name)
	p.flights--
	p.index = max(p.index, index)
}

// Believes tells whether a view of that index tells the truth about the slots of
// a function.
func (b *SlotBook) Believes(name blixard.FunctionName, index uint64) bool {
	p := b.functions[name]
	return b.Current(index) && (p == nil || p.flights == 0 && index >= p.index)
}

// Forget drops what is remembered of a function; false if something is under way.
func (b *SlotBook) Forget(name blixard.FunctionName) bool {
	if p := b.functions[name]; p != nil && p.flights > 0 {
		return false
	}
	delete(b.functions, name)
	return true
}

func (b *SlotBook) of(name blixard.FunctionName) *proposals {
	p := b.functions[name]
	if p == nil {
		p = new(proposals)
		b.functions[name] = p
	}
	return p
}
