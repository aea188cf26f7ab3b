package client

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"strconv"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// KeyHeader carries the idempotency key of a call whose request has none.
const KeyHeader = "Idempotency-Key"

// ActorHeader says who wants a change, for events.
const ActorHeader = "Blixard-Actor"

const (
	minBackoff = 20 * time.Millisecond
	maxBackoff = time.Second
	// unreachableFor is how long a call goes on when no node can be reached at
	// all: most likely none is there.
	unreachableFor = 3 * time.Second
	// readsFor bounds the repeats of a read, which somebody waits for and can
	// make again; a change is worth more patience.
	readsFor = 5 * time.Second
	// silentFor is how long a node may be silent before another one is asked the
	// same, once: a process that hangs still takes connections.
	silentFor = 5 * time.Second
)

// NewKey makes an idempotency key. Keys made later sort after those made before,
// give or take clocks: the cluster keeps them in order, and neighbours in time
// are then neighbours in memory.
func NewKey() string {
	return strconv.FormatInt(time.Now().UnixMilli(), 32) + "-" + rand.Text()[:16]
}

// read makes a call that changes nothing, change one that does. method picks
// the generated method of an endpoint.
func read[Req, Res any](ctx context.Context, c *Client, req Req, method func(*endpoint) func(context.Context, Req) (Res, error)) (Res, error) {
	return call(ctx, c, "", req, method)
}

func change[Req, Res any](ctx context.Context, c *Client, req Req, method func(*endpoint) func(context.Context, Req) (Res, error)) (Res, error) {
	return call(ctx, c, NewKey(), req, method)
}

func call[Req, Res any](ctx context.Context, c *Client, key string, req Req, method func(*endpoint) func(context.Context, Req) (Res, error)) (Res, error) {
	var res Res
	asked := 0
	limit := c.retryFor
	if key == "" {
		limit = min(limit, readsFor)
	}
	err := c.retryWithin(ctx, limit, func(e *endpoint) error {
		attempt, cancel := ctx, context.CancelFunc(func() {})
		if asked++; asked < len(c.endpoints) && c.retryFor > 0 {
			attempt, cancel = context.WithTimeout(ctx, silentFor)
		}
		defer cancel()
		callCtx, info := connect.NewClientContext(attempt)
		if key != "" {
			info.RequestHeader().Set(KeyHeader, key)
		}
		var err error
		res, err = method(e)(callCtx, req)
		if err != nil && attempt.Err() != nil && ctx.Err() == nil {
			return &blixard.Error{Code: blixard.CodeUnavailable, Message: fmt.Sprintf("no answer from %s within %s: %v", e.url, silentFor, err), Hint: "does the node hang? --addr names others"}
		}
		return err
	})
	return res, err
}

// retry makes attempts, at one endpoint after the other, until one succeeds,
// is refused for good, or time is up.
func (c *Client) retry(ctx context.Context, attempt func(*endpoint) error) error {
	return c.retryWithin(ctx, c.retryFor, attempt)
}

func (c *Client) retryWithin(ctx context.Context, limit time.Duration, attempt func(*endpoint) error) error {
	c.settle(ctx)
	r := retries{c: c, limit: limit, at: int(c.preferred.Load())}
	for {
		e := c.endpoints[r.at]
		err := attempt(e)
		if err == nil {
			c.preferred.Store(int32(r.at))
			return nil
		}
		if err := r.next(ctx, err); err != nil {
			return err
		}
	}
}

// retries is the state of one call's repeats.
type retries struct {
	c       *Client
	limit   time.Duration // since the first attempt failed
	at      int           // endpoint
	started time.Time
	tries   int  // attempts that failed
	reached bool // a node has answered
	backoff time.Duration
	last    *blixard.Error // the last word of a node
}

// next waits for the next attempt, or returns the error that ends the call.
func (r *retries) next(ctx context.Context, err error) error {
	if r.started.IsZero() {
		r.started, r.backoff = time.Now(), minBackoff
	}
	r.tries++
	verdict, after, ok := blixardv1.FromRPC(err)
	if !ok { // perhaps a plain one already
		ok = errors.As(err, &verdict)
	}
	switch {
	case ctx.Err() != nil:
		return ended(ctx, r.last)
	case ok && verdict.Code != blixard.CodeUnavailable && verdict.Code != blixard.CodeOverloaded:
		return verdict
	case ok:
		r.reached, r.last = true, verdict
	default:
		verdict = r.unreachable(err)
	}
	limit := r.limit
	if !r.reached {
		limit = min(limit, unreachableFor)
	}
	wait := r.wait(after)
	if time.Since(r.started)+wait > limit {
		if r.last != nil {
			return r.last // a node knows better than that another one is gone
		}
		return verdict
	}
	if verdict.Code != blixard.CodeOverloaded { // another node may know better
		r.at = (r.at + 1) % len(r.c.endpoints)
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ended(ctx, verdict)
	}
}

// wait is how long to wait: not at all before each node was tried once, what
// the server asks for when it is overloaded, else growing, with chance.
func (r *retries) wait(after time.Duration) time.Duration {
	if r.tries < len(r.c.endpoints) {
		return 0
	}
	wait := r.backoff/2 + mathrand.N(r.backoff)
	r.backoff = min(2*r.backoff, maxBackoff)
	if after > 0 && after < wait || r.tries > 8 {
		return max(wait, after)
	}
	return wait
}

func (r *retries) unreachable(err error) *blixard.Error {
	e := r.c.endpoints[r.at]
	var ce *connect.Error
	text := err.Error()
	if errors.As(err, &ce) && ce.Message() != "" {
		text = ce.Message()
	}
	return &blixard.Error{
		Code: blixard.CodeUnavailable, Message: "cannot reach " + e.url + ": " + text,
		Hint: "is `blixard server` running there? --addr or BLIXARD_ADDR names another node",
	}
}

// ended is the error of a call whose context has ended, with the last word of
// a node if there was one.
func ended(ctx context.Context, last *blixard.Error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return context.Canceled
	}
	if last == nil {
		last = blixardv1.AsError(context.DeadlineExceeded)
	}
	return deadlineError{last}
}

// deadlineError is the last word of a node when a deadline had come; it is a
// context.DeadlineExceeded, and does not say so in words that nobody asked for.
type deadlineError struct{ last *blixard.Error }

func (e deadlineError) Error() string   { return e.last.Error() }
func (e deadlineError) Unwrap() []error { return []error{e.last, context.DeadlineExceeded} }

// deadlineSlack is how much earlier than the caller's clock a node may notice
// that the deadline it was told of has come.
const deadlineSlack = 20 * time.Millisecond

// asError turns the end of a stream into the server's error, io.EOF when it
// ended as it should.
func (c *Client) asError(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, io.EOF):
		return io.EOF
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	if e, _, ok := blixardv1.FromRPC(err); ok {
		if d, limited := ctx.Deadline(); limited && (connect.CodeOf(err) == connect.CodeDeadlineExceeded || e.Code == blixard.CodeUnavailable && time.Until(d) < deadlineSlack) {
			return deadlineError{e} // the node was told of the deadline, and was first
		}
		return e
	}
	return &blixard.Error{Code: blixard.CodeUnavailable, Message: "the connection broke: " + err.Error()}
}

// ExitCode is what a program ends with after err: 0 without one, 2 for an
// invalid request, 3 not found, 4 exists, 5 conflict, 6 refused, 7 unavailable,
// 8 overloaded, 9 denied, 10 gone, 1 for anything else.
func ExitCode(err error) int { return blixardv1.ExitCode(err) }
