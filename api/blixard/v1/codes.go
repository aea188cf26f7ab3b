package blixardv1

import (
	"context"
	"errors"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectproto"

	"github.com/blixard/blixard"
)

// codeRow is what one blixard.Code is called elsewhere.
type codeRow struct {
	code blixard.Code
	http int
	rpc  connect.Code
	exit int
}

// codeTable is the one table of codes: HTTP status, RPC code, exit code of the
// CLI (0 is success, 1 any other failure).
var codeTable = []codeRow{
	{blixard.CodeInternal, 500, connect.CodeInternal, 1},
	{blixard.CodeInvalid, 400, connect.CodeInvalidArgument, 2},
	{blixard.CodeNotFound, 404, connect.CodeNotFound, 3},
	{blixard.CodeExists, 409, connect.CodeAlreadyExists, 4},
	{blixard.CodeConflict, 409, connect.CodeAborted, 5},
	{blixard.CodeRefused, 422, connect.CodeFailedPrecondition, 6},
	{blixard.CodeUnavailable, 503, connect.CodeUnavailable, 7},
	{blixard.CodeOverloaded, 429, connect.CodeResourceExhausted, 8},
	{blixard.CodeDenied, 403, connect.CodePermissionDenied, 9},
	{blixard.CodeGone, 410, connect.CodeOutOfRange, 10},
}

func rowOf(code blixard.Code) codeRow {
	for _, r := range codeTable {
		if r.code == code {
			return r
		}
	}
	return codeTable[0]
}

// HTTPStatus is the HTTP status of a code.
func HTTPStatus(code blixard.Code) int { return rowOf(code).http }

// ExitCode is what a program ends with after err: 0 without one, 1 when it is
// of no kind in particular.
func ExitCode(err error) int {
	if err == nil {
		return 0
	}
	return rowOf(blixard.CodeOf(err)).exit
}

// Times after which clients are asked to try again.
const (
	retryUnavailable = time.Second
	retryOverloaded  = 500 * time.Millisecond
)

// RetryAfter is when to try again after an error of that code, 0 if trying
// again as it is makes no sense.
func RetryAfter(code blixard.Code) time.Duration {
	switch code {
	case blixard.CodeUnavailable:
		return retryUnavailable
	case blixard.CodeOverloaded:
		return retryOverloaded
	default:
		return 0
	}
}

// AsError turns any error into the one that users see. A context that ended is
// CodeUnavailable; what is of no kind is CodeInternal.
func AsError(err error) *blixard.Error {
	var e *blixard.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &e):
		return e
	case errors.Is(err, context.DeadlineExceeded):
		return &blixard.Error{Code: blixard.CodeUnavailable, Message: "no answer in time", Hint: "try again; `blixard cluster status` tells whether there is a leader"}
	case errors.Is(err, context.Canceled):
		return &blixard.Error{Code: blixard.CodeUnavailable, Message: "the request was given up"}
	}
	return blixard.Errorf(blixard.CodeInternal, "%v", err)
}

// ToRPC turns an error into the one that goes over the wire.
func ToRPC(err error) *connect.Error {
	e := AsError(err)
	rpcCode := rowOf(e.Code).rpc
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		rpcCode = connect.CodeDeadlineExceeded
	case errors.Is(err, context.Canceled):
		rpcCode = connect.CodeCanceled
	}
	out := connect.NewError(rpcCode, e.Message).WithCause(err)
	detail, packErr := connectproto.NewErrorDetail(DetailOf(e))
	if packErr != nil {
		return out
	}
	return out.WithDetail(detail)
}

// DetailOf is an error as a message.
func DetailOf(e *blixard.Error) *ErrorDetail {
	return &ErrorDetail{
		Code: string(e.Code), Message: e.Message, Hint: e.Hint, Field: e.Field, Version: e.Version,
		RetryAfterMs: RetryAfter(e.Code).Milliseconds(),
	}
}

// FromRPC turns an error from the wire back into the server's; verdict tells
// whether it is the server's word, not a failure to reach it. retryAfter is
// when the server asks to be tried again.
func FromRPC(err error) (e *blixard.Error, retryAfter time.Duration, verdict bool) {
	var ce *connect.Error
	if !errors.As(err, &ce) {
		return nil, 0, false
	}
	for _, d := range ce.Details() {
		m, unpackErr := connectproto.UnmarshalErrorDetail(d)
		if unpackErr != nil {
			continue
		}
		if detail, ok := m.(*ErrorDetail); ok {
			return &blixard.Error{
				Code: blixard.Code(detail.Code), Message: detail.Message, Hint: detail.Hint, Field: detail.Field, Version: detail.Version,
			}, time.Duration(detail.RetryAfterMs) * time.Millisecond, true
		}
	}
	if !ce.IsRemote() {
		return nil, 0, false
	}
	code := blixard.CodeInternal
	for _, r := range codeTable {
		if r.rpc == ce.Code() {
			code = r.code
		}
	}
	switch ce.Code() {
	case connect.CodeUnauthenticated:
		code = blixard.CodeDenied
	case connect.CodeDeadlineExceeded, connect.CodeCanceled:
		code = blixard.CodeUnavailable
	}
	message := ce.Message()
	if message == "" {
		message = ce.Code().String()
	}
	return &blixard.Error{Code: code, Message: message}, 0, true
}
