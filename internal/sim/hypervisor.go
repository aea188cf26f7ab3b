package sim

import (
	"slices"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/converge"
)

// vm is one incarnation on a machine: a process that runs, or what a start has
// left on the disk.
type vm struct {
	ref       converge.Ref
	key       string
	exclusive bool // its slot may run once at a time
	stops     bool // on partition
	phase     converge.Phase
	reason    string
	orderly   bool
	bootedAt  int64 // true time at which its guest answers
	deaf      bool  // its guest never answers
	clings    bool  // its guest does not shut down when asked to
	exit      *converge.Exit
}

// hypervisor is what outlives the agent: processes, and traces on disk. True
// time decides what runs.
type hypervisor struct {
	m   *machine
	vms map[string]*vm // by incarnation

	// What goes wrong at the next occasions: how often.
	failStarts, slowStarts, dieStarts, deafGuests, failKills, failLists, hangStops int
	// lateMS: changes are told that much later, or never at half of the time.
	lateMS int64
}

// strikes uses up one occasion.
func strikes(n *int) bool {
	if *n <= 0 {
		return false
	}
	*n--
	return true
}

func (h *hypervisor) list() ([]converge.Found, bool) {
	if strikes(&h.failLists) {
		return nil, false
	}
	out := make([]converge.Found, 0, len(h.vms))
	for _, v := range h.vms { //order:any sorted below
		out = append(out, converge.Found{Ref: v.ref, Phase: v.phase, Reason: v.reason, Orderly: v.orderly, StopsOnPartition: v.stops})
	}
	slices.SortFunc(out, func(x, y converge.Found) int { return x.Ref.Compare(y.Ref) })
	return out, true
}

// changed wakes the agent, as a driver that watches its processes does.
func (h *hypervisor) changed() {
	w, p := h.m.w, h.m.proc
	if p == nil {
		return
	}
	late := h.lateMS
	if late > 0 && w.chance(50) {
		w.count["change told late"]++
		return // the next list shows it
	}
	p.after(w.between(0, 5)+late, p.agent.mistrust)
	if late > 0 {
		p.after(w.between(0, 5)+2*late, p.agent.mistrust)
	}
}

// do carries out an effect for the agent of p; done gets why it failed.
func (h *hypervisor) do(p *process, e *effect, row *blixard.Instance, done func(failure string)) {
	w, ref := h.m.w, e.act.Ref
	later := func(ms int64, do func()) {
		p.after(ms, func() {
			if !e.over {
				do()
			}
		})
	}
	v := h.vms[ref.String()]
	switch e.act.Kind {
	case converge.Prepare:
		later(w.between(1, w.k.StartMS), func() { done("") })
	case converge.Start:
		ms := w.between(1, w.k.StartMS)
		if strikes(&h.slowStarts) {
			w.count["start slow"]++
			ms += w.between(1000, 12_000)
		}
		later(ms, func() {
			if a := p.agent; row.Spec.EffectiveOnPartition() == blixard.OnPartitionStop && a.nowMS() >= a.book.StartByMS() {
				w.count["start too late"]++
				done(converge.TooLate)
				return
			}
			failure := h.start(ref, row)
			later(w.between(1, 30), func() { done(failure) })
		})
	case converge.Stop:
		h.stop(v, e.act.GraceMS, later, done)
	case converge.Kill:
		ms := w.between(1, 60)
		if strikes(&h.failKills) {
			later(ms+200, func() { done("the process does not end") })
			return
		}
		later(ms, func() {
			if v != nil {
				h.end(v, "killed", false)
			}
			later(1, func() { done("") })
		})
	case converge.Pause, converge.Resume:
		later(w.between(1, 20), func() {
			if v == nil || !alive(v.phase) {
				done("it does not run")
				return
			}
			v.phase = converge.Running
			if e.act.Kind == converge.Pause {
				v.phase = converge.Paused
			}
			done("")
		})
	case converge.Remove:
		later(w.between(1, 20), func() {
			switch {
			case v == nil:
			case alive(v.phase):
				done("it runs")
				return
			default:
				delete(h.vms, v.key)
			}
			done("")
		})
	case converge.None, converge.Configure, converge.Report:
		w.violated("only effects are carried out", "%s", e.act)
	}
}

// start starts an incarnation: its mark on the disk first, then its process.
func (h *hypervisor) start(ref converge.Ref, row *blixard.Instance) (failure string) {
	w := h.m.w
	key := ref.String()
	if h.vms[key] != nil {
		return "it was started before"
	}
	v := &vm{ref: ref, key: key, exclusive: row.Spec.Singleton, stops: row.Spec.EffectiveOnPartition() == blixard.OnPartitionStop}
	h.vms[key] = v
	if strikes(&h.failStarts) {
		w.count["start fails"]++
		v.phase, v.reason = converge.Exited, "it could not be started"
		return "it could not be started"
	}
	v.phase = converge.Running
	v.bootedAt = w.now + w.between(1, w.k.BootMS)
	if strikes(&h.deafGuests) {
		w.count["guest never answers"]++
		v.deaf = true
	}
	w.count["guest start"]++
	w.say("%s starts %s", h.m.name, key)
	w.check.started(h.m, v)
	if strikes(&h.dieStarts) {
		w.count["hypervisor dies at once"]++
		h.end(v, "it died", false)
	}
	return ""
}

// stop asks the guest, and kills what has not ended in time.
func (h *hypervisor) stop(v *vm, graceMS int64, later func(int64, func()), done func(string)) {
	w := h.m.w
	switch {
	case v == nil || !alive(v.phase):
		later(1, func() { done("") })
	case strikes(&h.hangStops):
		w.count["stop hangs"]++
		later(graceMS+5000, func() { done("it took too long") })
	case v.deaf || v.clings:
		later(graceMS, func() {
			h.end(v, "killed", false)
			later(1, func() { done("") })
		})
	default:
		later(w.between(1, min(graceMS, 400)), func() {
			h.end(v, "guest shut down", true)
			later(1, func() { done("") })
		})
	}
}

// end ends a process.
func (h *hypervisor) end(v *vm, reason string, orderly bool) {
	if h.vms[v.key] != v || !alive(v.phase) {
		return
	}
	v.phase, v.reason, v.orderly = converge.Exited, reason, orderly
	h.m.w.say("%s: %s ends: %s", h.m.name, v.key, reason)
	h.m.w.check.stopped(v)
	h.changed()
}

// killAll ends what runs and is meant.
func (h *hypervisor) killAll(reason string, meant func(*vm) bool) {
	for _, key := range sorted(h.vms) {
		if v := h.vms[key]; alive(v.phase) && meant(v) {
			h.end(v, reason, false)
		}
	}
}

// powerCut ends every process; what is on the disk stays.
func (h *hypervisor) powerCut() {
	h.killAll("the machine was off", func(*vm) bool { return true })
}

// deleted has somebody delete the files of what has ended. That something was
// started is durable before it is, so only that of which the cluster knows it
// can be missed.
func (h *hypervisor) deleted() {
	r := h.m.w.ruler()
	if r == nil {
		return
	}
	for _, key := range sorted(h.vms) {
		row := rowOf(r.proc.r.View(), h.m, key)
		if !alive(h.vms[key].phase) && row != nil && row.State != blixard.Pending && row.State != blixard.Preparing {
			delete(h.vms, key)
		}
	}
}

// wiped is a new machine in the place of the old one.
func (h *hypervisor) wiped() {
	h.powerCut()
	h.vms = map[string]*vm{}
	h.m.guests = newGuests(h.m)
}

// mend has nothing go wrong any more.
func (h *hypervisor) mend() {
	*h = hypervisor{m: h.m, vms: h.vms}
}

// pick is some incarnation that runs here, nil if none does.
func (h *hypervisor) pick(n int64) *vm {
	var up []*vm
	for _, key := range sorted(h.vms) {
		if v := h.vms[key]; alive(v.phase) {
			up = append(up, v)
		}
	}
	if len(up) == 0 {
		return nil
	}
	return up[int(uint64(n)%uint64(len(up)))]
}
