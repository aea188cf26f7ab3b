package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/blixard/blixard"
)

// Reasons of an Error: the machine's words. Those of throttled calls are the
// Lambda API's.
const (
	ReasonConcurrency         = "ConcurrentInvocationLimitExceeded"                 // no node has room now
	ReasonReservedConcurrency = "ReservedFunctionConcurrentInvocationLimitExceeded" // the function is at its limit
	ReasonRate                = "FunctionInvocationRateLimitExceeded"
	ReasonCallerRate          = "CallerRateLimitExceeded"
	ReasonNotFound            = "NotFound"
	ReasonNotActive           = "NotActive" // no version of it can be called yet, or its build has failed
	ReasonTooLarge            = "TooLarge"
	ReasonInvalid             = "Invalid"
	ReasonDraining            = "Draining"
	ReasonNodeLost            = "NodeLost" // who had the call in hand is gone: the function may have run
	ReasonTimeout             = "Timeout"  // nobody answered by the deadline
	ReasonUnavailable         = "Unavailable"
	ReasonLeft                = "CallerLeft" // nobody waits for the answer any more
	ReasonInternal            = "Internal"

	reasonFunction  = "FunctionError" // HTTP only: the function has failed
	reasonForbidden = "Forbidden"     // function URLs only
)

// Error is why an invocation was not answered by a function. It wraps a
// *blixard.Error.
type Error struct {
	Err    *blixard.Error
	Status int    // the HTTP status that says it
	Reason string // one of the above
	// Handed: the call may have reached a guest, so that the function may have run.
	Handed     bool
	RetryAfter time.Duration // 0: nothing is known
	cause      error
}

func (e *Error) Error() string { return e.Err.Error() }

// Unwrap makes errors.Is and errors.As see the refusal and what caused it.
func (e *Error) Unwrap() []error {
	if e.cause == nil {
		return []error{e.Err}
	}
	return []error{e.Err, e.cause}
}

// Throttled tells whether the caller was refused for a limit.
func (e *Error) Throttled() bool { return e.Status == http.StatusTooManyRequests }

func refuse(status int, reason string, code blixard.Code, hint, format string, args ...any) *Error {
	return &Error{Status: status, Reason: reason, Err: &blixard.Error{Code: code, Hint: hint, Message: fmt.Sprintf(format, args...)}}
}

func throttle(reason string, after time.Duration, format string, args ...any) *Error {
	e := refuse(http.StatusTooManyRequests, reason, blixard.CodeOverloaded, "try again later", format, args...)
	e.RetryAfter = after
	return e
}

func tooLarge(size, limit int64) *Error {
	return refuse(http.StatusRequestEntityTooLarge, ReasonTooLarge, blixard.CodeInvalid, "",
		"the payload has %d bytes; at most %d are taken", size, limit)
}

// errorOf makes an Error of any error that reached the end of an invocation.
func errorOf(err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	be, ok := errors.AsType[*blixard.Error](err)
	if !ok {
		be = blixard.Errorf(blixard.CodeInternal, "%v", err)
	}
	out := &Error{Err: be, Reason: ReasonInternal, Status: http.StatusInternalServerError, cause: err}
	if errors.Is(err, context.DeadlineExceeded) {
		out.Status, out.Reason = http.StatusGatewayTimeout, ReasonTimeout
		return out
	}
	switch be.Code {
	case blixard.CodeInvalid:
		out.Status, out.Reason = http.StatusBadRequest, ReasonInvalid
	case blixard.CodeNotFound:
		out.Status, out.Reason = http.StatusNotFound, ReasonNotFound
	case blixard.CodeOverloaded:
		out.Status, out.Reason, out.RetryAfter = http.StatusTooManyRequests, ReasonConcurrency, time.Second
	case blixard.CodeUnavailable, blixard.CodeRefused:
		out.Status, out.Reason, out.RetryAfter = http.StatusServiceUnavailable, ReasonUnavailable, time.Second
	case blixard.CodeDenied:
		out.Status, out.Reason = http.StatusForbidden, "Denied"
	case blixard.CodeConflict, blixard.CodeExists, blixard.CodeGone, blixard.CodeInternal:
	}
	return out
}

// Failure is what other edges tell their callers.
func (e *Error) Failure() (status int, reason string, handed bool, retryAfter time.Duration) {
	return e.Status, e.Reason, e.Handed, e.RetryAfter
}
