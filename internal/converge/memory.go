package converge

import "math"

// How long nothing is ordered after an effect failed.
const (
	effectRestMS = 1000
	killRestMS   = 250
)

// Begin notes that an effect was begun. stops is whether the incarnation of a
// Start stops on partition.
func (l *Local) Begin(kind Kind, stops bool) {
	l.Busy = kind
	if kind == Start {
		l.StopsOnPartition = stops
	}
}

// End notes how the effect that act ordered has ended: failure is why it failed,
// "" if it did not; interrupted tells that it was broken off because the daemon
// ends. bootMS is what a guest gets to answer.
func (l *Local) End(act Action, failure string, interrupted bool, nowMS, bootMS int64) {
	l.Busy = None
	failed := failure != ""
	switch act.Kind {
	case Prepare:
		l.Prepared = !failed
		if failed && !interrupted {
			l.Failure = failure
		}
	case Start:
		if failed {
			l.Failure = failure
		} else {
			l.BootDeadlineMS = nowMS + bootMS
		}
	case Stop, Kill:
		switch {
		case failed && interrupted:
		case failed:
			l.FailedStops++
		default:
			l.FailedStops = 0
			if act.Blame {
				l.Killed = act.Why
			}
		}
	case None, Configure, Pause, Resume, Remove, Report:
	}
	switch {
	case !failed:
	case act.Kind == Kill:
		l.NotBeforeMS = nowMS + killRestMS
	default:
		l.NotBeforeMS = nowMS + effectRestMS
	}
}

// Tell notes that o is being reported.
func (l *Local) Tell(o *Observation, nowMS int64) {
	l.Sent, l.SentIndex, l.SentMS = o, math.MaxUint64, nowMS
}

// Told notes what became of the report of o, unless there is a newer one: it was
// applied at index, or failed.
func (l *Local) Told(o *Observation, index uint64, failed bool) {
	switch {
	case !l.Sent.Equal(o):
	case failed:
		l.Sent, l.SentIndex = nil, 0
	default:
		l.SentIndex = index
	}
}
