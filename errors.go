package blixard

import (
	"errors"
	"fmt"
)

// Code classifies an error for machines. Each maps to one HTTP status, one RPC
// code and one exit code of the CLI.
type Code string

// The codes.
const (
	CodeInvalid     Code = "invalid"     // the request can never succeed as it is
	CodeNotFound    Code = "not_found"   // the named thing is not there
	CodeExists      Code = "exists"      // the name is taken
	CodeConflict    Code = "conflict"    // the thing changed since it was read, or is in the wrong state
	CodeRefused     Code = "refused"     // allowed, but it cannot be done now: no capacity, last voter, …
	CodeUnavailable Code = "unavailable" // no leader, or not in time; trying again may help
	CodeOverloaded  Code = "overloaded"  // queue full; try again after the hint
	CodeDenied      Code = "denied"      // not allowed
	CodeGone        Code = "gone"        // a watch's index is no longer kept; list again
	CodeInternal    Code = "internal"    // a bug
)

// Error is what every refusal of Blixard looks like: what, why and what to do.
type Error struct {
	Code    Code
	Message string // what and why
	Hint    string // what to do; may be empty
	Field   string // the offending field, such as "spec.memory"; may be empty
	Version uint64 // of the existing thing, for exists and conflict
}

func (e *Error) Error() string {
	if e.Hint != "" {
		return e.Message + " (" + e.Hint + ")"
	}
	return e.Message
}

// Is makes errors.Is compare codes: errors.Is(err, &Error{Code: CodeNotFound}).
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code && (t.Message == "" || t.Message == e.Message)
}

// Errorf makes an Error without hint.
func Errorf(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// Invalid makes a CodeInvalid error about a field.
func Invalid(field, hint, format string, args ...any) *Error {
	return &Error{Code: CodeInvalid, Field: field, Hint: hint, Message: fmt.Sprintf(format, args...)}
}

// CodeOf is the code of the first Error in err's chain, CodeInternal without one.
func CodeOf(err error) Code {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Code
	}
	return CodeInternal
}
