package api

import (
	"context"
	"crypto/subtle"
	"errors"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/api/blixard/v1/blixardv1connect"
	"github.com/blixard/blixard/client"
)

// errNoToken refuses callers that are not known. All look alike.
var errNoToken = &blixard.Error{
	Code: blixard.CodeDenied, Message: "the request carries no valid token",
	Hint: "give one with --token or BLIXARD_TOKEN, or as the header Authorization: Bearer …",
}

// errNoMember refuses callers of a node that is not part of a cluster.
var errNoMember = &blixard.Error{
	Code: blixard.CodeUnavailable, Message: "this node is not a member of a cluster yet",
	Hint: "make it one with `blixard init` or `blixard cluster join`",
}

// authorize checks the token of a request.
func (h *Handler) authorize(authorization string) error {
	if h.opt.Token == nil {
		return nil
	}
	want := h.opt.Token()
	if want == "" {
		return errNoMember
	}
	scheme, got, _ := strings.Cut(authorization, " ")
	if !strings.EqualFold(scheme, "bearer") || subtle.ConstantTimeCompare([]byte(got), []byte(want)) != 1 {
		return errNoToken
	}
	return nil
}

// guard surrounds every RPC, before anything of it is decoded: it checks the
// token, sets the deadline, catches bugs and makes errors fit for the wire.
func (h *Handler) guard(next connect.ServerFunc) connect.ServerFunc {
	return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) (err error) {
		defer func() {
			if p := recover(); p != nil {
				if p == http.ErrAbortHandler { //nolint:errorlint // compared as net/http does
					panic(p)
				}
				h.opt.Log.Error("a request ran into a bug", "procedure", spec.Procedure, "panic", p, "stack", string(debug.Stack()))
				err = wireError(blixard.Errorf(blixard.CodeInternal, "the request ran into a bug; the log of the node tells more"))
			}
		}()
		info, ok := connect.CallInfoForServerContext(ctx)
		if !ok {
			return wireError(blixard.Errorf(blixard.CodeInternal, "the request came without its headers"))
		}
		if spec.Procedure != blixardv1connect.ClusterServiceJoinProcedure {
			if err := h.authorize(info.RequestHeader().Get("Authorization")); err != nil {
				return h.refuse(info, err)
			}
		}
		if spec.StreamType == connect.StreamTypeUnary {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, h.timeout)
			defer cancel()
		}
		err = next(ctx, spec, stream)
		h.note(ctx, spec, info, err)
		if err != nil {
			return h.refuse(info, err)
		}
		return nil
	}
}

// note logs a request: at level debug, since there may be thousands a second.
func (h *Handler) note(ctx context.Context, spec connect.Spec, info *connect.CallInfo, err error) {
	if !h.opt.Log.Enabled(ctx, slog.LevelDebug) {
		return
	}
	code := "ok"
	if err != nil {
		code = string(blixard.CodeOf(err))
	}
	h.opt.Log.Debug("request", "component", "api", "event", spec.Procedure[strings.LastIndexByte(spec.Procedure, '/')+1:], "code", code, "trace_id", traceID(info.RequestHeader().Get))
}

// traceID is the trace a caller says the request belongs to (W3C Trace
// Context), else its idempotency key.
func traceID(header func(string) string) string {
	if parts := strings.Split(header("Traceparent"), "-"); len(parts) == 4 && len(parts[1]) == 32 && printable(parts[1]) {
		return parts[1]
	}
	if key := header(client.KeyHeader); len(key) <= 128 && printable(key) {
		return key
	}
	return ""
}

// refuse makes an error fit for the wire, and says when to try again.
func (h *Handler) refuse(info *connect.CallInfo, err error) error {
	err = known(err)
	e := blixardv1.AsError(err)
	if after := blixardv1.RetryAfter(e.Code); after > 0 && info.Protocol != protocolREST {
		info.ResponseHeader().Set("Retry-After", seconds(after))
	}
	if e.Code == blixard.CodeInternal {
		h.opt.Log.Error("a request failed", "procedure", info.Spec.Procedure, "error", err)
	}
	return wireError(err)
}

// known gives errors of the RPC library a kind: what it could not read is
// invalid.
func known(err error) error {
	var e *blixard.Error
	var ce *connect.Error
	if errors.As(err, &e) || !errors.As(err, &ce) {
		return err
	}
	if verdict, _, ok := blixardv1.FromRPC(err); ok { // of another node
		return verdict
	}
	switch ce.Code() {
	case connect.CodeInvalidArgument:
		return blixard.Errorf(blixard.CodeInvalid, "the request cannot be read: %s", ce.Message())
	case connect.CodeResourceExhausted:
		return blixard.Errorf(blixard.CodeInvalid, "the request is too large; at most %d bytes are allowed", MaxBodyBytes)
	case connect.CodeDeadlineExceeded:
		return context.DeadlineExceeded
	case connect.CodeCanceled:
		return context.Canceled
	case connect.CodeUnavailable:
		return blixard.Errorf(blixard.CodeUnavailable, "%s", ce.Message())
	}
	return err
}

// wireError makes an error that the RPC library sends as it is.
func wireError(err error) error {
	var e *blixard.Error
	var ce *connect.Error
	switch {
	case errors.Is(err, errNoToken):
		out := blixardv1.ToRPC(errNoToken)
		unauthenticated := connect.NewError(connect.CodeUnauthenticated, out.Message()).WithCause(errNoToken)
		for _, d := range out.Details() {
			unauthenticated = unauthenticated.WithDetail(d)
		}
		return unauthenticated
	case !errors.As(err, &e) && errors.As(err, &ce):
		return ce
	}
	return blixardv1.ToRPC(err)
}

func seconds(d time.Duration) string {
	s := int((d + time.Second - 1) / time.Second)
	return itoa(max(1, s))
}

// forwarded tells which node has passed the request on, "" if none.
func forwarded(ctx context.Context) string {
	if info, ok := connect.CallInfoForServerContext(ctx); ok {
		return info.RequestHeader().Get(client.ForwardedHeader)
	}
	return ""
}

// unblockKey is the context key of what ends a blocked Receive.
type unblockKey struct{}

func withUnblock(ctx context.Context, c *http.ResponseController) context.Context {
	return context.WithValue(ctx, unblockKey{}, c)
}

// unblock makes a Receive that waits for the caller return, so that the
// goroutine in it can be waited for.
func unblock(ctx context.Context) {
	if c, ok := ctx.Value(unblockKey{}).(*http.ResponseController); ok {
		if err := c.SetReadDeadline(time.Unix(1, 0)); err != nil {
			return // the connection is gone: Receive returns anyway
		}
	}
}
