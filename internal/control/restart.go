package control

import "github.com/blixard/blixard"

// due is when and how an empty slot gets its next incarnation.
type due struct {
	phase    phase // phaseNone: now
	restarts int   // of the incarnation to come
	avoid    []blixard.NodeName
}

// avoidAfter is the number of restarts in a row from which another node is
// preferred.
const avoidAfter = 2

// due applies the restart policy to a slot without a live incarnation.
func (l *life) due(s *slot) due {
	e := s.ended
	if e == nil {
		return due{}
	}
	if until := l.leaseHolds(s); until > l.now {
		l.wakeAt(l.vm.Name, until)
		return due{phase: phaseWaiting}
	}
	policy := &l.vm.Spec.Restart
	failed := e.State == blixard.Failed || e.WantReason == reasonUnhealthy
	switch {
	case l.outdated(e) || e.WantReason == reasonStopped:
		return due{}
	case e.State == blixard.Lost, e.Wanted != blixard.WantRun && e.WantReason != reasonUnhealthy:
		return due{restarts: e.Restarts}
	case policy.Mode == "never", policy.Mode == "on-failure" && !failed:
		return due{phase: phaseDone}
	}
	streak := e.Restarts
	if e.StartedMS > 0 && e.EndedMS-e.StartedMS >= l.config.StableMS {
		streak = 0
	}
	if policy.MaxRestarts > 0 && streak >= policy.MaxRestarts {
		return due{phase: phaseDone}
	}
	wait := policy.MaxBackoffMS
	if shift := min(streak, 40); policy.BackoffMS < policy.MaxBackoffMS>>shift {
		wait = policy.BackoffMS << shift
	}
	if at := l.book.backoff(s.ordinal, e.Generation, l.now, min(max(e.EndedMS+wait-l.wall, 0), wait)); at > l.now {
		l.wakeAt(l.vm.Name, at)
		return due{phase: phaseBackoff}
	}
	d := due{restarts: streak + 1}
	if failed && d.restarts >= avoidAfter {
		d.avoid = []blixard.NodeName{e.Node}
	}
	return d
}

// leaseHolds is until when a lost exclusive incarnation of the slot may still
// run.
func (l *life) leaseHolds(s *slot) int64 {
	until := int64(0)
	for _, i := range append(s.former[:len(s.former):len(s.former)], s.ended) {
		if i.State == blixard.Lost && i.Spec.Singleton {
			until = max(until, l.Leases.lostEndMS(l.v, i))
		}
	}
	return until
}
