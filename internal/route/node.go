package route

import (
	"cmp"
	"slices"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/assert"
)

// Node is one node's part of all functions. The zero Node is not usable; see
// NewNode. It takes no calls before SetLease and SetSettings.
type Node struct {
	limits    Limits
	nowMS     int64
	lease     bool
	draining  bool
	budgetMiB int64
	usedMiB   int64

	functions    map[blixard.FunctionName]*function // found by name
	order        []*function                        // in order of names
	revisions    map[Revision]*revision             // found by name; in order in their functions
	calls        map[CallID]*call                   // those that have no answer yet
	instances    map[InstanceID]*instance
	all          []*instance // in order of IDs
	nextInstance InstanceID
	starting     int   // starts under way
	spawning     int   // for the pool
	quietMS      int64 // nothing is spawned ahead before
	waiting      int   // calls that wait for an instance
	wakeMS       int64
	actions      []Action
}

type function struct {
	name          blixard.FunctionName
	max           int // MaxConcurrent
	contended     bool
	over          bool
	leased        int // slots the cluster has leased to the node
	used          int // by calls, and by dying instances that had calls
	leasing       int // asked for, not yet answered
	queue         []*call
	dryUntilMS    int64
	dry           Refusal // why none is asked for until then
	peak          int     // most slots in use since periodMS
	periodMS      int64
	revisions     []*revision // in order
	instanceCount int         // of all revisions, in any state
}

type revision struct {
	RevisionSettings
	f        *function
	gone     bool        // not in the settings any more
	warm     []*instance // that have room for a call, in order of last use
	pooled   []*instance // spawned, in order of age
	waiting  []*call     // for an instance
	spawning int
	starting int
	ready    int // neither starting nor ending; a recycled one is not counted
	live     int // all that are not of the pool, until they are gone

	failures    int // starts that failed, in a row
	notBeforeMS int64
	badSpawns   int // the same for the pool
	spawnMS     int64
	demand      int // most cold starts at once, halving from demandMS on
	demandMS    int64
	calledMS    int64
}

type instanceState int

const (
	spawning instanceState = iota
	pooled
	starting
	ready
	ending
)

type instance struct {
	id       InstanceID
	r        *revision
	state    instanceState
	kind     blixard.StartKind
	calls    []*call
	slots    int // held until it is gone: of calls that were aborted
	done     int // calls that ended
	firstMiB int64
	charge   int64
	usedMS   int64 // last call began or ended
	idleMS   int64 // idle since, or found working
	looking  bool
	recycle  bool
	broken   bool // recycled, since a call left it in a state nobody knows
	live     bool // counted as live in its revision
}

type callState int

const (
	forSlot callState = iota
	forInstance
	running
)

type call struct {
	Call
	r     *revision
	state callState
	in    *instance
}

// Call is a call that is offered to the node.
type Call struct {
	ID         CallID
	Revision   Revision
	DeadlineMS int64
	// MayStart: an instance may be started for it. MayWait: no other node takes
	// it, so it may wait until one can be started here.
	MayStart, MayWait bool
}

// Ended tells what became of a call that was assigned.
type Ended struct {
	Broken  bool  // the instance is not to be used again
	UsedMiB int64 // in the guest; 0: not known
}

// NewNode makes a Node without anything.
func NewNode(limits Limits) *Node {
	limits.defaults()
	return &Node{
		limits: limits, wakeMS: Never,
		functions: map[blixard.FunctionName]*function{}, revisions: map[Revision]*revision{},
		calls: map[CallID]*call{}, instances: map[InstanceID]*instance{},
	}
}

// WakeMS is when Tick has to be called at the latest.
func (n *Node) WakeMS() int64 { return n.wakeMS }

// Rests tells whether there is neither call, instance nor slot here: nothing that
// would have to end soon after the lease.
func (n *Node) Rests() bool {
	if len(n.calls) > 0 || len(n.all) > 0 {
		return false
	}
	for _, f := range n.order {
		if f.leased > 0 || f.leasing > 0 {
			return false
		}
	}
	return true
}

func (n *Node) begin(nowMS int64) {
	assert.True(nowMS >= n.nowMS, "time goes back from %d to %d", n.nowMS, nowMS)
	n.nowMS, n.actions = nowMS, n.actions[:0]
}

func (n *Node) wakeAt(ms int64) { n.wakeMS = min(n.wakeMS, ms) }

func (n *Node) add(a Action) { n.actions = append(n.actions, a) }

// Call offers a call. It is assigned, rejected, or waits: for slots that were
// asked for, or for an instance that is being started.
func (n *Node) Call(nowMS int64, c Call) []Action {
	n.begin(nowMS)
	assert.True(n.calls[c.ID] == nil, "call %d is offered twice", c.ID)
	r := n.revisions[c.Revision]
	k := &call{Call: c, r: r}
	switch {
	case !n.lease:
		n.reject(k, NoLease)
	case n.draining:
		n.reject(k, Draining)
	case r == nil:
		n.reject(k, Unknown)
	case r.Retired:
		n.reject(k, Superseded)
	default:
		r.calledMS = nowMS
		n.calls[c.ID] = k
		n.wakeAt(nowMS + n.limits.TickMS)
		n.admit(k)
	}
	return n.actions
}

// CallEnded tells that an assigned call has ended, or that nobody waits any more
// for one that was not.
func (n *Node) CallEnded(nowMS int64, id CallID, e Ended) []Action {
	n.begin(nowMS)
	k := n.calls[id]
	if k == nil {
		return nil // aborted before
	}
	delete(n.calls, id)
	f := k.r.f
	switch k.state {
	case forSlot:
		f.queue = without(f.queue, k)
		return n.actions
	case forInstance:
		n.unqueue(k)
		f.used--
	case running:
		f.used--
		n.vacate(k, e)
	}
	n.letIn(f)
	n.returnSlots(f)
	return n.actions
}

// Lost tells that nothing is to be had of an instance any more: its hypervisor
// has ended, or its guest broke the rules. It is killed.
func (n *Node) Lost(nowMS int64, id InstanceID) []Action {
	n.begin(nowMS)
	in := n.instances[id]
	if in == nil || in.state == ending || in.state == starting || in.state == spawning {
		return nil // who starts it will tell
	}
	n.kill(in, "its guest is gone", Gone)
	n.pump(in.r)
	n.tend()
	return n.actions
}

// Knows tells whether the node has been told of a revision.
func (n *Node) Knows(r Revision) bool { return n.revisions[r] != nil }

// WaitsForSlot tells whether a call waits for the cluster to lease a slot.
func (n *Node) WaitsForSlot(id CallID) bool {
	k := n.calls[id]
	return k != nil && k.state == forSlot
}

// reject answers a call that was not handed to a guest and holds no slot.
func (n *Node) reject(k *call, why Refusal) {
	delete(n.calls, k.ID)
	n.add(Action{Kind: Reject, Revision: k.Revision, Call: k.ID, Refusal: why})
}

// place finds an instance for a call that holds a slot, or has it wait for one.
func (n *Node) place(k *call) Refusal {
	r := k.r
	if len(r.waiting) == 0 {
		if in := r.free(); in != nil {
			n.assign(k, in, blixard.StartWarm)
			return ""
		}
	}
	if !k.MayStart {
		return NoWarm
	}
	if len(r.waiting) >= r.starting*r.TargetConcurrency { // otherwise a start has room to spare
		if why := n.provide(r); why != "" && (!k.MayWait || why == StartFailed) {
			return why
		}
	}
	k.state = forInstance
	r.waiting = append(r.waiting, k)
	n.waiting++
	return ""
}

func (n *Node) unqueue(k *call) {
	k.r.waiting = without(k.r.waiting, k)
	n.waiting--
}

// assign hands a call to an instance with room for it.
func (n *Node) assign(k *call, in *instance, kind blixard.StartKind) {
	r := in.r
	assert.True(in.state == ready && !in.recycle && len(in.calls) < r.TargetConcurrency, "instance %d gets a call it has no room for", in.id)
	k.state, k.in = running, in
	if r.TimeoutMS > 0 {
		k.DeadlineMS = min(k.DeadlineMS, n.nowMS+r.TimeoutMS)
	}
	in.calls = append(in.calls, k)
	in.usedMS, in.looking = n.nowMS, false
	if len(in.calls) == r.TargetConcurrency {
		r.warm = without(r.warm, in)
	}
	n.add(Action{Kind: Assign, Revision: r.Revision, Call: k.ID, Instance: in.id, Start: kind})
}

// vacate takes an ended call out of its instance.
func (n *Node) vacate(k *call, e Ended) {
	in, r := k.in, k.r
	in.calls = without(in.calls, k)
	in.done++
	in.usedMS, in.idleMS = n.nowMS, n.nowMS
	if in.firstMiB == 0 {
		in.firstMiB = e.UsedMiB
	}
	grown := r.GrowthMiB > 0 && in.firstMiB > 0 && e.UsedMiB-in.firstMiB > r.GrowthMiB
	switch {
	case e.Broken:
		n.recycle(in)
		in.broken = true
	case grown, r.RecycleCalls > 0 && in.done >= r.RecycleCalls:
		n.recycle(in)
	case in.recycle:
	default:
		r.warm = append(without(r.warm, in), in)
	}
	if in.recycle && len(in.calls) == 0 {
		why := "recycled"
		if in.broken {
			why = "broken" // nothing in it is asked to end in order
		}
		n.kill(in, why, Gone)
		n.pumpAll()
		return
	}
	n.pump(r)
	if len(in.calls) > 0 || in.state != ready {
		return
	}
	switch {
	case r.Retired:
		n.kill(in, "superseded", Gone)
	case n.draining:
		n.kill(in, "the node drains", Gone)
	case r.ScaleDownMS == 0:
		n.idle(in)
	default:
		n.wakeAt(n.nowMS + r.ScaleDownMS)
	}
}

// recycle lets an instance have no more calls than those it has.
func (n *Node) recycle(in *instance) {
	if in.recycle {
		return
	}
	in.recycle = true
	in.r.ready--
	in.r.warm = without(in.r.warm, in)
}

// free is the most recently used instance with room for a call.
func (r *revision) free() *instance {
	if len(r.warm) == 0 {
		return nil
	}
	return r.warm[len(r.warm)-1]
}

// pump gives waiting calls the instances there are and orders starts for those
// that no start is under way for.
func (n *Node) pump(r *revision) {
	n.serve(r, func(*instance) blixard.StartKind { return blixard.StartWarm })
	for len(r.waiting) > r.starting*r.TargetConcurrency {
		if n.provide(r) != "" {
			return
		}
	}
}

func (n *Node) serve(r *revision, kind func(*instance) blixard.StartKind) {
	for len(r.waiting) > 0 {
		in := r.free()
		if in == nil {
			return
		}
		k := r.waiting[0]
		n.unqueue(k)
		n.assign(k, in, kind(in))
	}
}

// pumpAll lets those wait no longer for which there is room now; who waits
// longest comes first.
func (n *Node) pumpAll() {
	if n.waiting == 0 {
		return
	}
	var hungry []*revision
	for _, f := range n.order {
		for _, r := range f.revisions {
			if len(r.waiting) > 0 {
				hungry = append(hungry, r)
			}
		}
	}
	slices.SortStableFunc(hungry, func(a, b *revision) int { return cmp.Compare(a.waiting[0].ID, b.waiting[0].ID) })
	for _, r := range hungry {
		n.pump(r)
	}
}

// SetSettings takes the functions as the cluster has them, in order of their
// names. What is not there any more is drained.
func (n *Node) SetSettings(nowMS int64, all []Settings) []Action {
	n.begin(nowMS)
	for _, f := range n.order {
		f.max, f.contended, f.over = 0, false, true
		for _, r := range f.revisions {
			r.Retired, r.gone, r.Min = true, true, 0
		}
	}
	for _, s := range all {
		f := n.function(s.Function)
		f.max, f.contended, f.over = s.MaxConcurrent, s.Contended, s.Over
		for _, rs := range s.Revisions {
			n.revision(f, rs)
		}
	}
	for _, f := range n.order {
		for _, r := range f.revisions {
			if r.Retired {
				n.retire(r)
			}
		}
	}
	n.pumpAll() // there may be a template now, or more may start at once
	n.tend()
	return n.actions
}

func (n *Node) function(name blixard.FunctionName) *function {
	if f := n.functions[name]; f != nil {
		return f
	}
	f := &function{name: name, periodMS: n.nowMS}
	n.functions[name] = f
	at, _ := slices.BinarySearchFunc(n.order, name, func(f *function, name blixard.FunctionName) int { return cmp.Compare(f.name, name) })
	n.order = slices.Insert(n.order, at, f)
	return f
}

func (n *Node) revision(f *function, s RevisionSettings) {
	s.TargetConcurrency = max(s.TargetConcurrency, 1)
	r := n.revisions[s.Revision]
	if r == nil {
		r = &revision{f: f, calledMS: n.nowMS - n.limits.PoolKeepMS}
		n.revisions[s.Revision] = r
		at, _ := slices.BinarySearchFunc(f.revisions, s.Revision, func(r *revision, k Revision) int { return r.Revision.Compare(k) })
		f.revisions = slices.Insert(f.revisions, at, r)
	}
	if s.Fresh && s.Clones && !r.Clones {
		r.calledMS = n.nowMS // the first call is to find a clone
	}
	// What is already there keeps its bounds.
	if r.live > 0 {
		s.TargetConcurrency = r.TargetConcurrency
	}
	r.RevisionSettings, r.gone = s, false
}

// retire ends what does nothing of a revision that takes no calls any more.
func (n *Node) retire(r *revision) {
	for _, in := range slices.Clone(n.all) {
		if in.r != r || in.state == ending || len(in.calls) > 0 {
			continue
		}
		if in.state == starting && len(r.waiting) > 0 {
			continue
		}
		n.kill(in, "superseded", Gone)
	}
}

// SetLease tells whether the node may run functions: its lease holds. When it is
// lost everything ends at once, and no slot is left until Slots tells of some.
func (n *Node) SetLease(nowMS int64, holds bool) []Action {
	n.begin(nowMS)
	if n.lease == holds {
		return nil
	}
	n.lease = holds
	if holds {
		n.tend()
		return n.actions
	}
	for _, f := range n.order {
		n.rejectAll(f, NoLease)
		f.leased, f.leasing = 0, 0
	}
	for _, in := range slices.Clone(n.all) {
		n.kill(in, "this node lost touch with the cluster", NoLease)
	}
	return n.actions
}

// rejectAll answers the calls of a function that were not handed to a guest.
func (n *Node) rejectAll(f *function, why Refusal) {
	for _, k := range f.queue {
		n.reject(k, why)
	}
	f.queue = nil
	for _, r := range f.revisions {
		n.rejectWaiting(r, 0, why)
	}
}

// rejectWaiting answers those that wait for an instance, but for the last keep.
func (n *Node) rejectWaiting(r *revision, keep int, why Refusal) {
	for len(r.waiting) > keep {
		k := r.waiting[0]
		n.unqueue(k)
		r.f.used--
		n.reject(k, why)
	}
}

// SetDraining tells whether the node is to become empty: it takes no call any
// more, and ends what it runs as it becomes idle.
func (n *Node) SetDraining(nowMS int64, draining bool) []Action {
	n.begin(nowMS)
	if n.draining == draining {
		return nil
	}
	n.draining = draining
	if draining {
		for _, in := range slices.Clone(n.all) {
			if len(in.calls) == 0 && (in.state != starting || len(in.r.waiting) == 0) {
				n.kill(in, "the node drains", Gone)
			}
		}
	}
	n.tend()
	return n.actions
}

// SetBudget tells how much memory instances may take in all.
func (n *Node) SetBudget(nowMS, mib int64) []Action {
	n.begin(nowMS)
	if mib == n.budgetMiB {
		return nil
	}
	n.budgetMiB = mib
	n.shrink(mib, nil, true)
	n.pumpAll()
	n.tend()
	return n.actions
}

// without takes x out of a list, keeping the order. What is taken out is mostly
// at the end.
func without[T comparable](list []T, x T) []T {
	for i, y := range slices.Backward(list) {
		if y == x {
			return slices.Delete(list, i, i+1)
		}
	}
	return list
}
