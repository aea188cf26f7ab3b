package sim

// Scenes are ordinary faults that meet: each of them happens alone too, but what
// they find together would take too many seeds to meet by chance.

// lateAnswers has a machine hear everything late, and then not be heard any more:
// the last leases it was given reach it long after they were given.
func lateAnswers(w *world, m *machine, f *Fault) {
	w.net.change(w.net.slow, f.Arg, f.ForMS, func(_, to *machine) bool { return to == m })
	w.soon(f.Arg2, func() {
		w.net.shut(f.ForMS-f.Arg2, func(from, _ *machine) bool { return from == m })
	})
}

// leaderBelieved cuts a leader off together with another machine, and has it hear
// late what the rest told it before: it takes itself for the leader for a while
// after the others have a new one, and the other machine believes it.
func leaderBelieved(w *world, m *machine, f *Fault) {
	x := w.machines[int(f.Arg2)%len(w.machines)]
	if x == m {
		x = w.machines[int(f.Arg2+1)%len(w.machines)]
	}
	pair := func(y *machine) bool { return y == m || y == x }
	w.net.change(w.net.slow, f.Arg, f.ForMS, func(from, to *machine) bool { return to == m && !pair(from) })
	w.net.shut(f.ForMS, func(from, to *machine) bool { return pair(from) && !pair(to) || to == x && !pair(from) })
}

// clocksApart has a machine's clock run as slow as the bound of clocks allows, all
// others' as fast, and stops the process of the slow one: only its watchdog ends
// what may not outlast the lease.
func clocksApart(w *world, m *machine, f *Fault) {
	for _, x := range w.machines {
		if x == m {
			x.setRate(1000 - f.Arg)
		} else {
			x.setRate(1000 + f.Arg)
		}
	}
	w.soon(f.Arg2, func() { m.pause(f.ForMS) })
}

// soon has something happen a little later, if things still go wrong then.
func (w *world) soon(ms int64, do func()) {
	w.after(ms, func() {
		if !w.faults.over {
			do()
		}
	})
}

// stoodStill tells whether a leader has stood still lately, which it may not hold
// against the nodes: it has not heard the heartbeats that came meanwhile. A pause
// counts if it began while the machine led, and only what was proposed after it.
func (c *checker) stoodStill(m *machine, proposedMS int64) bool {
	const least = 3500 // what is shorter makes no lease look old
	p := m.lastPause
	if p.ms < least || p.skewMS != m.skewMS || p.ledTerm != m.proc.r.Term() {
		return false
	}
	proposed := proposedMS - wallBaseMS - m.skewMS // in true time
	return proposed >= p.untilMS && proposed < p.untilMS+c.w.k.LeaseMS*1000/m.ratePermille-100
}
