package route

import (
	"slices"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/assert"
)

// admit gives a call a slot, or has it wait for the cluster to lease one.
func (n *Node) admit(k *call) {
	f := k.r.f
	if len(f.queue) == 0 && f.used < f.leased {
		n.enter(k)
		n.leaseAhead(f)
		return
	}
	if !k.MayStart && k.r.free() == nil {
		n.reject(k, NoWarm)
		return
	}
	// More can be granted at the most than the limit leaves.
	if len(f.queue) >= f.max-f.leased {
		n.reject(k, NoSlot)
		return
	}
	if n.nowMS < f.dryUntilMS {
		n.reject(k, f.dry)
		return
	}
	k.state = forSlot
	f.queue = append(f.queue, k)
	n.ask(f, len(f.queue))
}

// enter lets a call in on a free slot.
func (n *Node) enter(k *call) {
	f := k.r.f
	assert.True(f.used < f.leased, "%s: no slot is free of %d", f.name, f.leased)
	f.used++
	if why := n.place(k); why != "" {
		f.used--
		n.reject(k, why)
		return
	}
	f.peak = max(f.peak, f.used)
}

// letIn lets in who waits for slots.
func (n *Node) letIn(f *function) {
	for len(f.queue) > 0 && f.used < f.leased {
		k := f.queue[0]
		f.queue = f.queue[1:]
		n.enter(k)
	}
}

// leaseAhead asks for slots before a call has to wait for them.
func (n *Node) leaseAhead(f *function) {
	if f.used == f.leased && !f.contended && !f.over && n.nowMS >= f.dryUntilMS {
		n.ask(f, 0)
	}
}

// ask asks the cluster for slots: those that calls wait for, and as many again
// as there are, within bounds.
func (n *Node) ask(f *function, need int) {
	if f.leasing > 0 || !n.lease {
		return
	}
	want := need
	if !f.contended && !f.over {
		want += min(max(f.leased, 2), n.limits.LeaseAhead)
	}
	for _, r := range f.revisions {
		if !r.Retired {
			want = max(want, r.SlotsPerInstance)
		}
	}
	if want = min(want, f.max-f.leased); want <= 0 {
		return
	}
	f.leasing = want
	n.add(Action{Kind: Lease, Revision: Revision{Function: f.name}, N: want})
}

// Granted tells how many of the slots asked for the cluster has leased.
func (n *Node) Granted(nowMS int64, name blixard.FunctionName, slots int) []Action {
	return n.granted(nowMS, name, slots, NoSlot)
}

// LeaseFailed tells that the cluster was not asked, or has not answered. Should
// slots have been leased after all, Slots will tell.
func (n *Node) LeaseFailed(nowMS int64, name blixard.FunctionName) []Action {
	return n.granted(nowMS, name, 0, NoLease)
}

func (n *Node) granted(nowMS int64, name blixard.FunctionName, slots int, why Refusal) []Action {
	n.begin(nowMS)
	f := n.functions[name]
	if f == nil || f.leasing == 0 || !n.lease {
		return nil // of a lease that was lost meanwhile
	}
	assert.True(slots >= 0 && slots <= f.leasing, "%s: %d slots granted of %d", name, slots, f.leasing)
	short := slots < f.leasing
	n.addSlots(f, slots)
	f.leasing = 0
	n.letIn(f)
	if short {
		f.dryUntilMS, f.dry = nowMS+n.limits.DryMS, why
		for _, k := range f.queue {
			n.reject(k, why)
		}
		f.queue = nil
	} else if len(f.queue) > 0 {
		n.ask(f, len(f.queue))
	}
	n.pumpAll()
	n.tend()
	return n.actions
}

func (n *Node) addSlots(f *function, slots int) {
	if f.leased == 0 && slots > 0 {
		f.periodMS, f.peak = n.nowMS, f.used
	}
	f.leased += slots
}

// Asking tells whether slots of the function are asked for.
func (n *Node) Asking(name blixard.FunctionName) bool {
	f := n.functions[name]
	return f != nil && f.leasing > 0
}

// Slots tells how many slots of a function the cluster has leased to this node.
// To be called only with what is newer than every answer to a Lease or Return.
func (n *Node) Slots(nowMS int64, name blixard.FunctionName, leased int) []Action {
	n.begin(nowMS)
	f := n.functions[name]
	if f == nil && leased == 0 || !n.lease {
		return nil
	}
	if f == nil {
		f = n.function(name)
		f.over = true // nobody wants them
	}
	if f.leasing > 0 || f.leased == leased {
		return nil
	}
	n.addSlots(f, leased-f.leased)
	n.cut(f)
	n.letIn(f)
	n.returnSlots(f)
	n.pumpAll()
	n.tend()
	return n.actions
}

// cut ends what runs without a slot: the cluster has taken some away.
func (n *Node) cut(f *function) {
	for _, r := range f.revisions {
		if over := f.used - f.leased; over > 0 {
			n.rejectWaiting(r, max(0, len(r.waiting)-over), NoLease)
		}
	}
	over := f.used - f.leased
	for _, in := range n.all {
		if in.r.f == f {
			over -= in.slots // on its way out
		}
	}
	for _, in := range slices.Backward(slices.Clone(n.all)) {
		if over <= 0 {
			return
		}
		if in.r.f == f && len(in.calls) > 0 {
			over -= len(in.calls)
			n.kill(in, "its slot was taken away", NoLease)
		}
	}
}

// returnSlots gives idle slots back: at once when they are too many or nobody
// wants them, otherwise those that were not needed for a while.
func (n *Node) returnSlots(f *function) {
	if !n.lease || f.leased == 0 {
		return
	}
	keep := f.used
	if !f.over && !n.draining {
		end := f.periodMS + n.slotsMS(f)
		if n.nowMS < end {
			n.wakeAt(end)
			return
		}
		keep = max(f.peak, f.used)
		f.peak, f.periodMS = f.used, n.nowMS
	}
	for _, r := range f.revisions {
		keep = max(keep, r.live*r.SlotsPerInstance, r.Min*r.SlotsPerInstance)
	}
	if give := f.leased - keep; give > 0 {
		f.leased -= give
		n.add(Action{Kind: Return, Revision: Revision{Function: f.name}, N: give})
	}
	if f.leased > 0 {
		n.wakeAt(n.nowMS + n.slotsMS(f))
	}
}

// slotsMS is how long idle slots are kept.
func (n *Node) slotsMS(f *function) int64 {
	if f.contended {
		return n.limits.ContendedMS
	}
	keep := n.limits.ContendedMS
	for _, r := range f.revisions {
		keep = max(keep, r.ScaleDownMS)
	}
	return min(keep, n.limits.IdleSlotsMS)
}
