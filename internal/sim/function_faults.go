package sim

import (
	"math/rand/v2"
	"slices"
)

func functionGuestDies(_ *world, m *machine, f *Fault) {
	if g := m.guests.pick(f.Arg); g != nil {
		g.end("it crashed")
	}
}

// functionCutOff cuts a machine off that runs calls, if one does, once its users
// have called: it has to end them before its slots are somebody else's.
func functionCutOff(w *world, m *machine, f *Fault) {
	for i := range w.machines {
		x := w.machines[(m.at+i)%len(w.machines)]
		if slices.ContainsFunc(x.guests.all, func(g *guest) bool { return len(g.calls) > 0 }) {
			m = x
			break
		}
	}
	m.guests.hangs++
	w.net.shut(f.ForMS, func(from, to *machine) bool { return from == m || to == m })
	w.soon(w.between(0, 1000), func() { stormOfCalls(w, m, f) })
}

// powerCutInAWrite cuts a machine's power while its disk is at work, as soon as it
// is, which it is whenever slots are leased.
func powerCutInAWrite(w *world, m *machine, f *Fault, tries int) {
	m.syncMS = max(m.syncMS, 5)
	switch {
	case w.faults.over || tries == 0 || m.proc == nil:
	case m.proc.syncing:
		m.syncMS = w.k.SyncMS
		m.powerCut()
		m.again(f.ForMS)
		return
	default:
		w.after(2, func() { powerCutInAWrite(w, m, f, tries-1) })
		return
	}
	m.syncMS = w.k.SyncMS
}

// stormOfCalls has users call many times at once.
func stormOfCalls(w *world, _ *machine, f *Fault) {
	for _, u := range w.functions.users {
		for range max(f.Arg, 6) {
			if u.exists {
				u.call(func(bool) {})
			}
		}
	}
}

// functionsPct is in how many of a hundred seeds functions are played.
const functionsPct = 40

// drawFunctions has functions played in some runs, and in some of those go wrong
// by themselves. It has a source of its own, so that all other runs stay what they
// were.
func (k *Knobs) drawFunctions(o Options) {
	r := rand.New(rand.NewPCG(o.Seed, 3))
	if r.IntN(100) >= functionsPct {
		return
	}
	k.Functions = 1 + r.IntN(2)
	if o.Profile == ProfileSwarm && r.IntN(100) < 70 {
		k.Classes = append(k.Classes, "function")
	}
}
