package route

import (
	"cmp"
	"slices"

	"github.com/blixard/blixard"
)

// provide orders one more start of a revision, from the pool when it can; the
// refusal tells why it did not.
func (n *Node) provide(r *revision) Refusal {
	switch {
	case n.nowMS < r.notBeforeMS:
		n.wakeAt(r.notBeforeMS)
		return StartFailed
	case n.starting >= n.limits.Starts, r.Burst > 0 && r.starting >= r.Burst, !r.Clones && r.starting >= n.limits.Boots,
		r.SlotsPerInstance > 0 && r.live >= r.f.leased/r.SlotsPerInstance:
		return Busy
	}
	in := r.newest()
	need := r.ChargeMiB
	if in != nil {
		need -= in.charge
	}
	if !n.shrink(n.budgetMiB-need, in, false) {
		return NoMemory
	}
	if in != nil {
		r.pooled = without(r.pooled, in)
		in.kind = blixard.StartPooled
	} else {
		in = n.newInstance(r)
		in.kind = blixard.StartBooted
		if r.Clones {
			in.kind = blixard.StartRestored
		}
	}
	fromPool := in.state == pooled
	n.usedMiB += r.ChargeMiB - in.charge
	in.charge, in.state = r.ChargeMiB, starting
	in.live = true
	n.starting++
	r.starting++
	r.live++
	r.demand, r.demandMS = max(n.demand(r), r.starting), n.nowMS
	n.add(Action{Kind: Start, Revision: r.Revision, Instance: in.id, Pooled: fromPool})
	return ""
}

func (r *revision) newest() *instance {
	if len(r.pooled) == 0 {
		return nil
	}
	return r.pooled[len(r.pooled)-1]
}

func (n *Node) newInstance(r *revision) *instance {
	n.nextInstance++
	in := &instance{id: n.nextInstance, r: r, usedMS: n.nowMS, idleMS: n.nowMS}
	n.instances[in.id] = in
	n.all = append(n.all, in)
	r.f.instanceCount++
	return in
}

// Spawned tells that an instance was spawned ahead and can be started.
func (n *Node) Spawned(nowMS int64, id InstanceID) []Action {
	n.begin(nowMS)
	in := n.instances[id]
	if in == nil || in.state != spawning {
		return nil // it is being killed
	}
	in.state = pooled
	in.r.spawning--
	n.spawning--
	in.r.badSpawns = 0
	in.r.pooled = append(in.r.pooled, in)
	n.pump(in.r)
	n.tend()
	return n.actions
}

// Started tells that an instance is ready for calls; kind is how it came up in
// the end, "" as it was ordered.
func (n *Node) Started(nowMS int64, id InstanceID, kind blixard.StartKind) []Action {
	n.begin(nowMS)
	in := n.instances[id]
	if in == nil || in.state != starting {
		return nil // it is being killed
	}
	r := in.r
	in.kind = cmp.Or(kind, in.kind)
	in.state, in.usedMS, in.idleMS = ready, nowMS, nowMS
	n.starting--
	r.starting--
	r.ready++
	r.failures, r.notBeforeMS = 0, 0
	r.warm = append(r.warm, in)
	n.quietMS = nowMS + n.limits.PoolDelayMS
	n.serve(r, func(got *instance) blixard.StartKind {
		if got == in {
			return in.kind
		}
		return blixard.StartWarm
	})
	switch {
	case len(in.calls) > 0:
	case r.Retired:
		n.kill(in, "superseded", Gone)
	case n.draining:
		n.kill(in, "the node drains", Gone)
	}
	n.pumpAll()
	n.tend()
	return n.actions
}

// Died tells that an instance's process is gone, or never came to be. An instance
// that was to start counts as a start that failed.
func (n *Node) Died(nowMS int64, id InstanceID) []Action {
	n.begin(nowMS)
	in := n.instances[id]
	if in == nil {
		return nil
	}
	r, was := in.r, in.state
	if was != ending {
		n.leave(in, Gone)
	}
	n.forget(in)
	switch was {
	case spawning, pooled:
		r.badSpawns++
		r.spawnMS = nowMS + n.backoff(r.badSpawns)
	case starting:
		r.failures++
		r.notBeforeMS = nowMS + n.backoff(r.failures)
		n.wakeAt(r.notBeforeMS)
		n.serve(r, func(*instance) blixard.StartKind { return blixard.StartWarm })
		n.rejectWaiting(r, r.starting*r.TargetConcurrency, StartFailed)
	case ready, ending:
	}
	n.letIn(r.f)
	n.returnSlots(r.f)
	n.pumpAll()
	n.tend()
	return n.actions
}

// backoff is how long nothing is tried again after so many failures in a row.
func (n *Node) backoff(failures int) int64 {
	return min(n.limits.BackoffMS<<min(failures-1, 20), n.limits.BackoffMax)
}

// kill ends an instance; calls in it are answered with why.
func (n *Node) kill(in *instance, reason string, why Refusal) {
	if in.state == ending {
		return
	}
	n.leave(in, why)
	n.add(Action{Kind: Kill, Revision: in.r.Revision, Instance: in.id, Why: reason})
}

// leave takes an instance out of use. Its slots are held until it is gone.
func (n *Node) leave(in *instance, why Refusal) {
	r := in.r
	for _, k := range in.calls {
		delete(n.calls, k.ID)
		n.add(Action{Kind: Abort, Revision: r.Revision, Call: k.ID, Instance: in.id, Refusal: why})
	}
	in.slots, in.calls = len(in.calls), nil
	switch in.state {
	case spawning:
		r.spawning--
		n.spawning--
	case pooled:
		r.pooled = without(r.pooled, in)
	case starting:
		r.starting--
		n.starting--
	case ready:
		if !in.recycle {
			r.ready--
		}
		r.warm = without(r.warm, in)
	case ending:
	}
	n.usedMiB -= in.charge
	in.charge, in.state = 0, ending
}

func (n *Node) forget(in *instance) {
	in.r.f.used -= in.slots
	if in.live {
		in.r.live--
	}
	in.r.f.instanceCount--
	delete(n.instances, in.id)
	at, _ := slices.BinarySearchFunc(n.all, in.id, func(in *instance, id InstanceID) int { return cmp.Compare(in.id, id) })
	n.all = slices.Delete(n.all, at, at+1)
}

// idle looks at an instance without calls that was idle long enough.
func (n *Node) idle(in *instance) {
	r := in.r
	if in.looking || r.ready <= r.Min {
		return
	}
	in.looking = true
	n.add(Action{Kind: Look, Revision: r.Revision, Instance: in.id})
}

// Looked tells whether the guest of an idle instance works on something. If so
// it is kept for a while.
func (n *Node) Looked(nowMS int64, id InstanceID, working bool) []Action {
	n.begin(nowMS)
	in := n.instances[id]
	if in == nil || in.state != ready || !in.looking {
		return nil // it was used or ended meanwhile
	}
	in.looking = false
	if working && nowMS < in.usedMS+in.r.ScaleDownMS+n.limits.WorkMS {
		in.idleMS = nowMS
		n.wakeAt(nowMS + max(in.r.ScaleDownMS, n.limits.TickMS))
		return n.actions
	}
	if in.r.ready > in.r.Min {
		n.kill(in, "idle", Gone)
		n.pumpAll()
		n.tend()
	}
	return n.actions
}

// shrink has instances take no more than mib: clones of the pool go first, then
// idle instances, least recently used first. Unless partly, it ends nothing when
// that would not do. spare is not touched. It tells whether the rest fits.
func (n *Node) shrink(mib int64, spare *instance, partly bool) bool {
	if n.usedMiB <= mib {
		return true
	}
	var victims []*instance
	for _, in := range n.all {
		idle := in.state == ready && len(in.calls) == 0 && !in.recycle
		if in != spare && (idle || in.state == pooled) {
			victims = append(victims, in)
		}
	}
	slices.SortStableFunc(victims, func(a, b *instance) int {
		return cmp.Or(cmp.Compare(a.state, b.state), cmp.Compare(a.usedMS, b.usedMS)) // pooled is before ready
	})
	chosen, sum, taken := victims[:0], int64(0), map[*revision]int{}
	for _, in := range victims {
		if n.usedMiB-sum <= mib {
			break
		}
		if in.state == ready {
			if in.r.ready-taken[in.r] <= in.r.Min {
				continue
			}
			taken[in.r]++
		}
		sum += in.charge
		chosen = append(chosen, in)
	}
	if n.usedMiB-sum > mib && !partly {
		return false
	}
	for _, in := range chosen {
		n.kill(in, "its memory is needed", Gone)
	}
	return n.usedMiB <= mib
}
