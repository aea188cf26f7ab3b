package control

import (
	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/schedule"
	"github.com/blixard/blixard/internal/state"
)

// Reasons why the leader ends an incarnation. The restart policy tells them
// apart.
const (
	reasonStopped    = "stopped by the user"
	reasonDeleted    = "the VM is being deleted"
	reasonScaled     = "the VM was scaled down"
	reasonUnhealthy  = "its health check fails"
	reasonOutdated   = "replaced: the VM was changed"
	reasonRestart    = "replaced: a restart is wanted"
	reasonSuperseded = "a newer incarnation runs"
	reasonDrain      = "moved: its node is being drained"
)

// slot is a place among a VM's replicas and what is known of it.
type slot struct {
	ordinal int
	live    *blixard.Instance   // the incarnation that has not ended
	ended   *blixard.Instance   // the newest that has
	former  []*blixard.Instance // older ones that have
	newest  uint64              // highest generation of a row

	phase phase
}

// phase is what the leader makes of a slot.
type phase uint8

const (
	phaseNone     phase = iota
	phaseRunning        // up, and wanted so
	phaseChanging       // coming up or going down
	phaseBackoff        // waits to be restarted
	phaseDone           // ended for good
	phaseWaiting        // waits for a lease, a dependency or the end of maintenance
	phaseRefused        // has no place
)

// lookAtVM brings one VM closer to what is wanted.
func (p *pass) lookAtVM(name blixard.VMName) {
	p.sync(name)
	vm := p.v.VM(name)
	if vm == nil {
		delete(p.books, name)
		p.refused.Delete(name)
		return
	}
	slots, stamp := p.slots(vm)
	b := p.book(name)
	if !b.mayAct(p, name, stamp) {
		return
	}
	before := len(p.out)
	l := &life{pass: p, vm: vm, slots: slots, book: b}
	l.run()
	if p.full() {
		p.freshVMs.Insert(name) // something may have been left out
	}
	if len(p.out) > before {
		p.freshVMs.Insert(name) // see what became of it
	}
	if len(p.out) > before+l.preempted { // that does not show in the rows of this VM
		b.stamp, b.acted = stamp, true
	}
	if b.idle() && !p.refused.Contains(name) {
		delete(p.books, name)
	}
}

// slots sorts a VM's rows into its slots, wanted ones without rows included.
func (p *pass) slots(vm *blixard.VM) ([]slot, stamp) {
	out := make([]slot, 0, vm.Spec.Replicas)
	st := stamp{vm: vm}
	fill := func(until int) {
		for n := len(out) + 1; n < until; n++ {
			out = append(out, slot{ordinal: n})
		}
	}
	p.v.InstancesOf(vm.Name, func(i *blixard.Instance) bool {
		st.rows++
		st.version = max(st.version, i.Version)
		if len(out) == 0 || out[len(out)-1].ordinal != i.Ordinal {
			fill(min(i.Ordinal, vm.Spec.Replicas+1))
			out = append(out, slot{ordinal: i.Ordinal})
		}
		s := &out[len(out)-1]
		s.newest = i.Generation
		switch {
		case !i.State.Terminal():
			s.live = i
		default:
			if s.ended != nil {
				s.former = append(s.former, s.ended)
			}
			s.ended = i
		}
		return true
	})
	fill(vm.Spec.Replicas + 1)
	p.rows += st.rows + 1
	return out, st
}

// life is one look at one VM.
type life struct {
	*pass
	vm    *blixard.VM
	slots []slot
	book  *book

	missing int    // slots that have no place, or cannot be moved
	why     string // the first reason
	refused bool   // some of them for lack of room
	awaits  bool   // why tells of a nomination

	preempted int // proposals that are about other VMs
}

func (l *life) run() {
	wanted := l.vm.Desired == blixard.DesiredRunning && !l.vm.Deleting
	for i := range l.slots {
		s := &l.slots[i]
		l.clean(s)
		switch {
		case l.vm.Deleting:
			l.end(s.live, blixard.WantRemove, reasonDeleted)
		case s.ordinal > l.vm.Spec.Replicas:
			l.end(s.live, blixard.WantRemove, reasonScaled)
		case !wanted:
			l.end(s.live, blixard.WantStop, reasonStopped)
		case s.live != nil:
			l.tend(s)
		}
	}
	if wanted {
		l.place()
	}
	l.book.settle(l.slots)
	if wanted {
		l.replace()
	}
	l.resettle()
	l.report()
	if l.refused {
		l.pass.refused.Insert(l.vm.Name)
	} else {
		l.pass.refused.Delete(l.vm.Name)
	}
}

// clean forgets what is left of ended incarnations once it serves nobody: the
// newest is kept until its successor runs, so that its logs can be read.
func (l *life) clean(s *slot) {
	for _, i := range s.former {
		l.discard(i)
	}
	switch e := s.ended; {
	case e == nil:
	case l.vm.Deleting, s.ordinal > l.vm.Spec.Replicas, e.State == blixard.Lost, s.live != nil && s.live.State == blixard.Running:
		l.discard(e)
	case l.vm.Desired == blixard.DesiredStopped && e.Wanted == blixard.WantRun:
		// It ended by itself before: a later start begins afresh.
		l.emit(&state.EndInstance{VM: e.VM, Ordinal: e.Ordinal, Generation: e.Generation, Wanted: blixard.WantStop, Paused: e.Paused, Reason: reasonStopped})
	}
}

// discard has an ended incarnation's row go away.
func (l *life) discard(i *blixard.Instance) {
	switch n := l.v.Node(i.Node); {
	case i.State == blixard.Lost && i.Spec.Singleton && l.now < l.Leases.lostEndMS(l.v, i):
		l.wakeAt(l.vm.Name, l.Leases.lostEndMS(l.v, i))
	case i.State == blixard.Lost, n == nil, n.State != blixard.NodeReady: // who joins anew knows nothing of it
		l.emit(&state.DropInstance{VM: i.VM, Ordinal: i.Ordinal, Generation: i.Generation})
	case i.Wanted != blixard.WantRemove:
		l.emit(&state.EndInstance{VM: i.VM, Ordinal: i.Ordinal, Generation: i.Generation, Wanted: blixard.WantRemove, Paused: i.Paused, Reason: reasonSuperseded})
	}
}

// end wants a live incarnation stopped or removed, unless it is already.
func (l *life) end(i *blixard.Instance, w blixard.Wanted, reason string) bool {
	if i == nil || i.Wanted == w || i.Wanted == blixard.WantRemove {
		return false
	}
	return l.emit(&state.EndInstance{VM: i.VM, Ordinal: i.Ordinal, Generation: i.Generation, Wanted: w, Paused: i.Paused, Reason: reason})
}

// tend looks after a live incarnation of a wanted slot.
func (l *life) tend(s *slot) {
	i := s.live
	s.phase = phaseChanging
	if i.Wanted != blixard.WantRun {
		return
	}
	if i.Paused != l.vm.Paused {
		l.emit(&state.EndInstance{VM: i.VM, Ordinal: i.Ordinal, Generation: i.Generation, Wanted: blixard.WantRun, Paused: l.vm.Paused})
	}
	switch {
	case i.State != blixard.Running:
		if l.outdated(i) && !l.maintenance {
			l.end(i, blixard.WantStop, l.outdatedReason(i))
		}
	case i.Health == blixard.HealthUnhealthy && l.vm.Spec.Restart.Mode != "never" && !l.maintenance:
		l.end(i, blixard.WantStop, reasonUnhealthy)
	default:
		s.phase = phaseRunning
	}
}

func (l *life) outdated(i *blixard.Instance) bool {
	return i.SpecVersion != l.vm.SpecVersion || i.RestartSeq != l.vm.RestartSeq
}

func (l *life) outdatedReason(i *blixard.Instance) string {
	if i.SpecVersion != l.vm.SpecVersion {
		return reasonOutdated
	}
	return reasonRestart
}

// place gives each empty slot that is due an incarnation.
func (l *life) place() {
	waits, asked := "", false
	for k := range l.slots {
		s := &l.slots[k]
		if s.live != nil || s.ordinal > l.vm.Spec.Replicas {
			continue
		}
		d := l.due(s)
		s.phase = d.phase
		if d.phase != phaseNone {
			continue
		}
		if !asked {
			waits, asked = l.waitsFor(), true
		}
		if waits != "" {
			s.phase = phaseWaiting
			l.miss(waits)
			continue
		}
		if l.full() {
			s.phase = phaseChanging
			continue
		}
		l.placeSlot(s, d)
	}
}

func (l *life) placeSlot(s *slot, d due) {
	r := schedule.Request{VM: l.vm.Name, Spec: &l.vm.Spec, Avoid: d.avoid}
	generation := max(s.newest+1, l.vm.FirstGeneration)
	was := l.nominated(s.ordinal)
	at, ok := l.index.Place(r, s.ordinal, generation)
	if !ok {
		s.phase = phaseRefused
		if waits := l.makeRoom(r, s, generation, was, d.restarts); waits != "" {
			s.phase = phaseChanging
			l.await(waits, r)
			return
		}
		l.refuse("", r)
		return
	}
	s.phase = phaseChanging
	l.emit(&state.PlaceInstance{
		VM: l.vm.Name, UID: l.vm.UID, Ordinal: s.ordinal, Generation: generation, SpecVersion: l.vm.SpecVersion, RestartSeq: l.vm.RestartSeq,
		Restarts: d.restarts, Node: at.Node, NodeEpoch: at.Epoch,
	})
}

// waitsFor tells what keeps a VM from being placed at all, "" if nothing.
func (l *life) waitsFor() string {
	if l.maintenance {
		return "the cluster is in maintenance mode: nothing is placed"
	}
	for _, name := range l.vm.Spec.DependsOn {
		if why := l.notReady(name); why != "" {
			l.waitFor(name)
			return "waits for " + string(name) + ", which " + why
		}
	}
	return ""
}

// waitFor has this VM looked at again when another is.
func (l *life) waitFor(other blixard.VMName) {
	for _, w := range l.waiters[other] {
		if w == l.vm.Name {
			return
		}
	}
	l.waiters[other] = append(l.waiters[other], l.vm.Name)
}

// notReady tells why a dependency is not up, "" if it is.
func (l *life) notReady(name blixard.VMName) string {
	vm := l.v.VM(name)
	switch {
	case vm == nil:
		return "does not exist"
	case vm.Deleting:
		return "is being deleted"
	case vm.Desired != blixard.DesiredRunning:
		return "is stopped"
	}
	up := 0
	healthy, unhealthy := true, false
	l.v.InstancesOf(name, func(i *blixard.Instance) bool {
		if i.Ordinal <= vm.Spec.Replicas && i.Counts() && i.State == blixard.Running {
			up++
			healthy = healthy && (vm.Spec.Health == nil || i.Health == blixard.HealthHealthy)
			unhealthy = unhealthy || i.Health == blixard.HealthUnhealthy
		}
		return true
	})
	switch {
	case up < vm.Spec.Replicas:
		return "does not run yet"
	case unhealthy:
		return "is unhealthy"
	case !healthy:
		return "is not known to be healthy yet"
	}
	return ""
}

// replace moves one incarnation at a time: off nodes that drain, and from an
// outdated spec to the present one. A slot holds one incarnation, so the old
// one ends first; it does only if the new one will have a place, and only
// while no other slot of the VM is on its way.
func (l *life) replace() {
	if l.maintenance {
		return
	}
	for k := range l.slots {
		s := &l.slots[k]
		if s.phase != phaseRunning || s.ordinal > l.vm.Spec.Replicas {
			continue
		}
		n := l.v.Node(s.live.Node)
		outdated, drains := l.outdated(s.live), n != nil && n.Availability == blixard.Draining
		if !outdated && !drains || !l.othersSettled(k, outdated) {
			continue
		}
		verb, reason := "move "+string(s.live.ID)+" off "+string(s.live.Node), reasonDrain
		if outdated {
			verb, reason = "replace "+string(s.live.ID), l.outdatedReason(s.live)
		}
		if waits := l.waitsFor(); waits != "" {
			l.miss("cannot " + verb + ": " + waits)
			return
		}
		r := schedule.Request{VM: l.vm.Name, Spec: &l.vm.Spec}
		was := l.nominated(s.ordinal)
		to, ok := l.index.FindWithout(r, s.ordinal, s.live.Generation)
		if !ok {
			if waits := l.makeRoom(r, s, s.live.Generation+1, was, 0); waits != "" {
				l.await("cannot "+verb+" yet: "+waits, r)
				return
			}
			l.refuse("cannot "+verb+": ", r)
			continue
		}
		if l.end(s.live, blixard.WantStop, reason) {
			l.reserve(s, to.Node)
		}
		return
	}
}

// othersSettled tells whether no other slot is on its way. A slot that keeps
// failing does not hold up a drain, but it holds up an update: the update may
// be the cause.
func (l *life) othersSettled(k int, update bool) bool {
	for o := range l.slots {
		if o == k || l.slots[o].ordinal > l.vm.Spec.Replicas {
			continue
		}
		switch l.slots[o].phase {
		case phaseRunning, phaseDone, phaseRefused:
		case phaseBackoff, phaseWaiting:
			if update {
				return false
			}
		case phaseNone, phaseChanging:
			return false
		}
	}
	return true
}
