package sim

import "slices"

// Shrink looks for a shorter schedule that breaks the same invariant as what o
// plays, with at most budget runs: first without whole stretches of faults, then
// without single ones, with a shorter end, fewer VMs and clients, and fewer
// nodes. It returns the shortest that was found with what came of it; if o
// breaks nothing, its own.
func Shrink(o Options, budget int) (Schedule, Result) {
	s, err := Plan(o)
	if err != nil {
		return s, Result{Seed: s.Seed, Profile: s.Profile, Violation: &Violation{Invariant: "options", Detail: err.Error()}}
	}
	x := &shrinker{best: s, left: budget}
	x.res = x.play(s)
	if x.res.OK {
		return s, x.res
	}
	if last := x.res.Violation.AtMS; last < s.DurationMS { // what came after does not matter
		short := clone(s)
		short.Faults = slices.DeleteFunc(short.Faults, func(f Fault) bool { return f.AtMS > last })
		short.DurationMS = max(last, 1000)
		x.try(short)
	}
	for x.left > 0 {
		before := len(x.best.Faults)
		x.faults()
		if !x.knobs() && len(x.best.Faults) == before {
			break
		}
	}
	return x.best, x.res
}

type shrinker struct {
	best Schedule
	res  Result
	left int
}

func (x *shrinker) play(s Schedule) Result {
	x.left--
	return Run(Options{Schedule: &s})
}

// try takes a schedule for the best if it breaks the same.
func (x *shrinker) try(s Schedule) bool {
	if x.left <= 0 {
		return false
	}
	res := x.play(s)
	if res.OK || res.Violation.Invariant != x.res.Violation.Invariant {
		return false
	}
	x.best, x.res = s, res
	return true
}

// faults leaves out stretches of faults, ever shorter ones.
func (x *shrinker) faults() {
	for n := len(x.best.Faults); n >= 1 && x.left > 0; n /= 2 {
		for at := 0; at < len(x.best.Faults) && x.left > 0; {
			s := clone(x.best)
			s.Faults = slices.Delete(s.Faults, at, min(at+n, len(s.Faults)))
			if !x.try(s) {
				at += n
			}
		}
	}
}

// knobs makes the cluster smaller and the story shorter; false if it cannot.
func (x *shrinker) knobs() (changed bool) {
	changes := []func(s *Schedule) bool{
		func(s *Schedule) bool {
			end := int64(1000)
			if n := len(s.Faults); n > 0 {
				end += s.Faults[n-1].AtMS + s.Faults[n-1].ForMS
			}
			shorter := end < s.DurationMS
			s.DurationMS = min(s.DurationMS, end)
			return shorter
		},
		func(s *Schedule) bool { had := s.Knobs.Sharers > 0; s.Knobs.Sharers = 0; return had },
		func(s *Schedule) bool { s.Knobs.VMs /= 2; return s.Knobs.VMs >= s.Knobs.Clients },
		func(s *Schedule) bool { s.Knobs.Clients--; return s.Knobs.Clients >= 1 },
		func(s *Schedule) bool { s.Knobs.Nodes--; return s.Knobs.Nodes >= 1 },
	}
	for _, change := range changes {
		s := clone(x.best)
		if change(&s) && x.try(s) {
			changed = true
		}
	}
	return changed
}

func clone(s Schedule) Schedule {
	s.Faults = slices.Clone(s.Faults)
	return s
}
