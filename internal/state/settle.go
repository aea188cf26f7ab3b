package state

import (
	"cmp"

	"github.com/blixard/blixard"
)

// Attempt is what became of an attempt at an asynchronous event.
type Attempt struct {
	Made bool // false: it was not made, since the event was too old
	// Failure is why it did not succeed, in words; "" for success.
	Failure string
	// FunctionError: the function itself has failed.
	FunctionError bool
}

// TooOld tells whether an event is not attempted any more.
func TooOld(e *blixard.AsyncEvent, nowMS int64) bool { return nowMS > e.AcceptedMS+e.MaxAgeMS }

// Settlement says what follows from an attempt that ended at nowMS, without the
// destination's event. f is the event's function, nil if it is gone.
func (a Attempt) Settlement(e *blixard.AsyncEvent, f *blixard.Function, nowMS int64) *SettleEvent {
	s := &SettleEvent{ID: e.ID, Owner: e.Owner, OwnerEpoch: e.OwnerEpoch}
	switch {
	case !a.Made:
		s.Result, s.Condition, s.Error = SettleDead, ConditionEventAgeExceeded, cmp.Or(e.LastError, "it was not attempted in time")
	case a.Failure == "":
		s.Result, s.Condition = SettleSuccess, ConditionSuccess
	case !a.FunctionError && f != nil && f.MaxConcurrent == 0:
		s.Result, s.Condition, s.Error = SettleDead, ConditionZeroConcurrency, a.Failure
	default:
		s.FunctionError, s.Error, s.Result = a.FunctionError, a.Failure, SettleRetry
		if s.NotBeforeMS, s.Condition = NextAttempt(e, s.FunctionError, nowMS); s.Condition != "" {
			s.Result, s.NotBeforeMS = SettleDead, 0
		}
	}
	return s
}
