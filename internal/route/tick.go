package route

import (
	"cmp"
	"slices"

	"github.com/blixard/blixard"
)

// Tick does what is due: deadlines, idle instances and slots, the pool.
func (n *Node) Tick(nowMS int64) []Action {
	n.begin(nowMS)
	n.wakeMS = Never
	n.deadlines()
	n.pumpAll()
	n.tend()
	return n.actions
}

// deadlines answers calls that waited too long, and ends instances whose guest
// did not answer in time.
func (n *Node) deadlines() {
	if len(n.calls) == 0 {
		return
	}
	n.wakeAt(n.nowMS + n.limits.TickMS)
	late := func(k *call) bool { return k.DeadlineMS <= n.nowMS }
	for _, f := range n.order {
		for _, k := range f.queue {
			if late(k) {
				n.reject(k, Late)
			}
		}
		f.queue = slices.DeleteFunc(f.queue, late)
		for _, r := range f.revisions {
			for _, k := range slices.Clone(r.waiting) {
				if late(k) {
					n.unqueue(k)
					f.used--
					n.reject(k, Late)
				}
			}
		}
		n.letIn(f)
	}
	for _, in := range slices.Clone(n.all) {
		if slices.ContainsFunc(in.calls, func(k *call) bool { return k.DeadlineMS+n.limits.GraceMS <= n.nowMS }) {
			n.kill(in, "its guest did not answer in time", TimedOut)
		}
	}
}

// tend keeps in order what no call waits for.
func (n *Node) tend() {
	n.tendIdle()
	n.tendMin()
	n.tendPool()
	for _, f := range n.order {
		n.returnSlots(f)
	}
	n.sweep()
}

// tendIdle looks at the instances that were idle long enough.
func (n *Node) tendIdle() {
	for _, in := range n.all {
		if in.state != ready || len(in.calls) > 0 || in.recycle || in.looking || in.r.ready <= in.r.Min {
			continue
		}
		if end := in.idleMS + in.r.ScaleDownMS; n.nowMS < end {
			n.wakeAt(end)
		} else {
			n.idle(in)
		}
	}
}

// tendMin starts what is to be warm without a call.
func (n *Node) tendMin() {
	if !n.lease || n.draining {
		return
	}
	for _, f := range n.order {
		for _, r := range f.revisions {
			if r.Retired {
				continue
			}
			if r.Min*r.SlotsPerInstance > f.leased && n.nowMS >= f.dryUntilMS {
				n.ask(f, r.Min*r.SlotsPerInstance-f.leased)
			}
			for r.ready+r.starting < r.Min && n.provide(r) == "" {
			}
			if r.ready+r.starting < r.Min {
				n.wakeAt(n.nowMS + n.limits.BackoffMax)
			}
		}
	}
}

// tendPool spawns clones ahead of calls and ends those that are too many.
func (n *Node) tendPool() {
	wanted := n.poolWanted()
	total := 0
	for _, f := range n.order {
		for _, r := range f.revisions {
			for len(r.pooled) > wanted[r] {
				n.kill(r.pooled[0], "no demand", Gone)
			}
			total += len(r.pooled) + r.spawning
		}
	}
	for _, f := range n.order {
		for _, r := range f.revisions {
			for len(r.pooled)+r.spawning < wanted[r] && total < n.limits.Pool {
				if !n.spawn(r) {
					break
				}
				total++
			}
		}
	}
}

// spawn orders a clone for the pool, unless there is something better to do.
func (n *Node) spawn(r *revision) bool {
	at := max(n.quietMS, r.notBeforeMS, r.spawnMS)
	if n.nowMS < at {
		n.wakeAt(at)
		return false
	}
	if n.starting > 0 || n.spawning >= n.limits.Spawns || n.usedMiB+n.limits.PooledMiB > n.budgetMiB {
		return false
	}
	in := n.newInstance(r)
	in.charge = n.limits.PooledMiB
	n.usedMiB += in.charge
	r.spawning++
	n.spawning++
	n.add(Action{Kind: Spawn, Revision: r.Revision, Instance: in.id})
	return true
}

// poolWanted shares the pool among the functions that were called lately: one
// for each, by how recently, then as many as had to be started at once.
func (n *Node) poolWanted() map[*revision]int {
	var recent []*revision
	for _, f := range n.order {
		for _, r := range f.revisions {
			end := r.calledMS + n.limits.PoolKeepMS
			if !r.Clones || r.Retired || f.max == 0 || !n.lease || n.draining || n.nowMS >= end {
				continue
			}
			n.wakeAt(end)
			recent = append(recent, r)
		}
	}
	slices.SortStableFunc(recent, func(a, b *revision) int { return cmp.Compare(b.calledMS, a.calledMS) })
	wanted, left := map[*revision]int{}, n.limits.Pool
	for _, r := range recent {
		if left > 0 {
			wanted[r] = 1
			left--
		}
	}
	for _, r := range recent {
		more := min(n.demand(r)-1, left)
		if more > 0 && wanted[r] > 0 {
			wanted[r] += more
			left -= more
			n.wakeAt(r.demandMS + ((n.nowMS-r.demandMS)/n.limits.PoolHalfMS+1)*n.limits.PoolHalfMS)
		}
	}
	return wanted
}

// demand is how many cold starts at once are to be expected.
func (n *Node) demand(r *revision) int {
	return r.demand >> min((n.nowMS-r.demandMS)/n.limits.PoolHalfMS, 62)
}

// sweep forgets what the cluster has forgotten and of which nothing is left.
func (n *Node) sweep() {
	n.order = slices.DeleteFunc(n.order, func(f *function) bool {
		f.revisions = slices.DeleteFunc(f.revisions, func(r *revision) bool {
			idle := r.live == 0 && r.spawning == 0 && len(r.pooled) == 0 && len(r.waiting) == 0
			if r.gone && idle && len(f.queue) == 0 {
				delete(n.revisions, r.Revision)
				return true
			}
			return false
		})
		if len(f.revisions) > 0 || f.instanceCount > 0 || f.leased > 0 || f.used > 0 || f.leasing > 0 || f.max > 0 {
			return false
		}
		delete(n.functions, f.name)
		return true
	})
}

// RevisionReport is what a Node has of a revision.
type RevisionReport struct {
	Revision  Revision
	Instances int // started ones, until they are gone
	Ready     int
	Idle      int // of those, without a call
	Free      int // calls that idle and partly used instances have room for
	Busy      int // calls that run
	Waiting   int
	Starting  int
	Pooled    int
	Failures  int // starts that failed, in a row
	Retired   bool
}

// FunctionReport is what a Node has of a function.
type FunctionReport struct {
	Function  blixard.FunctionName
	Leased    int // slots
	Used      int
	Revisions []RevisionReport
}

// Report tells what there is, in order of names.
func (n *Node) Report() []FunctionReport {
	all := make([]FunctionReport, 0, len(n.order))
	for _, f := range n.order {
		fr := FunctionReport{Function: f.name, Leased: f.leased, Used: f.used}
		for _, r := range f.revisions {
			rr := RevisionReport{
				Revision: r.Revision, Instances: r.live, Ready: r.ready, Waiting: len(r.waiting), Starting: r.starting,
				Pooled: len(r.pooled), Failures: r.failures, Retired: r.Retired,
			}
			for _, in := range r.warm {
				rr.Free += r.TargetConcurrency - len(in.calls)
				if len(in.calls) == 0 {
					rr.Idle++
				}
			}
			fr.Revisions = append(fr.Revisions, rr)
		}
		all = append(all, fr)
	}
	for _, in := range n.all {
		if len(in.calls) == 0 {
			continue
		}
		at, _ := slices.BinarySearchFunc(all, in.r.f.name, func(f FunctionReport, name blixard.FunctionName) int { return cmp.Compare(f.Function, name) })
		rev, _ := slices.BinarySearchFunc(all[at].Revisions, in.r.Revision, func(r RevisionReport, k Revision) int { return r.Revision.Compare(k) })
		all[at].Revisions[rev].Busy += len(in.calls)
	}
	return all
}

// Instances are the IDs of all instances in the books, in order.
func (n *Node) Instances() []InstanceID {
	ids := make([]InstanceID, len(n.all))
	for i, in := range n.all {
		ids[i] = in.id
	}
	return ids
}

// Memory is what instances take of the budget.
func (n *Node) Memory() (usedMiB, budgetMiB int64) { return n.usedMiB, n.budgetMiB }
