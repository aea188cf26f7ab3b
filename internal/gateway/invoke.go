package gateway

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/route"
)

// Invoke has a call answered: it says which version, checks the limits, finds an
// instance and hands the answer to sink. It fills in inv's RequestID, Received,
// Number, Seq and Deadline, the last being when it gives up: the timeout of the
// function's configuration and what a start may take, or sooner if ctx or the
// caller say so. An error is an *Error: no function has answered. That a
// function has failed is in the report, with its error as answer.
func (g *Gateway) Invoke(ctx context.Context, inv *blixard.Invocation, sink blixard.ResponseSink) (blixard.InvocationReport, error) {
	return g.answer(ctx, inv, nil, sink)
}

// answer is Invoke for a call whose target may be known already.
func (g *Gateway) answer(ctx context.Context, inv *blixard.Invocation, t *target, sink blixard.ResponseSink) (blixard.InvocationReport, error) {
	if inv.Received.IsZero() {
		inv.Received = time.Now()
	}
	if inv.RequestID == "" {
		inv.RequestID = NewRequestID()
	}
	if !g.enter() {
		return blixard.InvocationReport{RequestID: inv.RequestID}, errDraining()
	}
	defer g.leave()
	traced := g.opt.Traces.begin(inv)
	report, err := g.invoke(ctx, inv, t, sink)
	report.RequestID = inv.RequestID
	if err != nil {
		e := errorOf(err)
		g.opt.Traces.end(traced, &report, e)
		g.metrics.refused(e)
		g.note(inv, e)
		return report, e
	}
	report.Parts.Total = time.Since(inv.Received)
	g.opt.Traces.end(traced, &report, nil)
	g.metrics.answered(&report)
	return report, nil
}

// note logs calls that were lost, some of them: callers learn no more than that.
func (g *Gateway) note(inv *blixard.Invocation, e *Error) {
	if (e.Handed || e.Status == http.StatusInternalServerError) && g.notes.take(time.Now(), 1) {
		g.log.Warn("a call was lost", "event", "call_lost", "function", string(inv.Function), "request", inv.RequestID, "reason", e.Reason, "error", e)
	}
}

func (g *Gateway) invoke(ctx context.Context, inv *blixard.Invocation, t *target, sink blixard.ResponseSink) (blixard.InvocationReport, error) {
	c := call{g: g, inv: inv, sink: begunSink{sink: sink}}
	if t != nil {
		c.target = *t
	} else if err := c.resolve(ctx); err != nil {
		return blixard.InvocationReport{}, err
	}
	if err := g.admit(c.target, inv); err != nil {
		return blixard.InvocationReport{}, err
	}
	ctx, cancel := g.deadline(ctx, c.target, inv)
	defer cancel()
	return c.run(ctx)
}

// admit checks the limits that need no node.
func (g *Gateway) admit(t target, inv *blixard.Invocation) error {
	if n := int64(len(inv.Payload)); n > g.limits.SyncBytes {
		return tooLarge(n, g.limits.SyncBytes)
	}
	if t.function.MaxConcurrent == 0 {
		return throttle(ReasonReservedConcurrency, 0, "the function %s may not run: its limit of executions is 0", t.function.Name)
	}
	if !t.callable {
		return notActive(t)
	}
	return g.rates.take(t.function, inv.Caller, g.table, inv.Received)
}

func notActive(t target) *Error {
	v := t.version
	if v.State == blixard.FunctionPending {
		e := refuse(http.StatusServiceUnavailable, ReasonNotActive, blixard.CodeConflict, "try again in a second",
			"the function %s is being prepared: it is in the state Pending", v.Function)
		e.RetryAfter = time.Second
		return e
	}
	return refuse(http.StatusBadGateway, ReasonNotActive, blixard.CodeConflict, "`blixard function describe` shows the whole of it; update its code or configuration",
		"the function %s cannot be called, it is in the state %s: %s", v.Function, v.State, v.StateReason)
}

var errDeadline = context.DeadlineExceeded

// deadline sets when the gateway gives up.
func (g *Gateway) deadline(ctx context.Context, t target, inv *blixard.Invocation) (context.Context, context.CancelFunc) {
	at := inv.Received.Add(time.Duration(t.version.Spec.TimeoutMS)*time.Millisecond + g.limits.Start)
	if inv.Deadline.IsZero() || at.Before(inv.Deadline) {
		inv.Deadline = at
	}
	if d, ok := ctx.Deadline(); ok && d.Before(inv.Deadline) {
		inv.Deadline = d
	}
	return context.WithDeadline(ctx, inv.Deadline)
}

// call is one invocation on its way to a node.
type call struct {
	g      *Gateway
	inv    *blixard.Invocation
	sink   begunSink
	target target
	place  time.Duration
	worst  *route.Refused
}

// begunSink knows whether an answer has begun, and whether it was not taken.
type begunSink struct {
	sink  blixard.ResponseSink
	begun bool
	err   error
}

func (s *begunSink) Begin(h blixard.ResponseHead) error {
	s.begun = true
	if err := s.sink.Begin(h); err != nil {
		s.err = err
	}
	return s.err
}

func (s *begunSink) Write(p []byte) (int, error) {
	n, err := s.sink.Write(p)
	if err != nil {
		s.err = err
	}
	return n, err
}

// maxSuperseded bounds how often a call follows a version that changes under it.
const maxSuperseded = 3

func (c *call) run(ctx context.Context) (report blixard.InvocationReport, err error) {
	for range maxSuperseded {
		c.worst = nil
		if report, err = c.once(ctx); err == nil {
			return report, nil
		}
		if r, ok := errors.AsType[*route.Refused](err); !ok || r.Why != route.Superseded {
			return report, err
		}
		before := c.target.raw()
		if rerr := c.resolve(ctx); rerr != nil {
			return report, rerr
		}
		if c.target.raw() != before {
			break // the payload is of the wrong kind now
		}
	}
	return report, err
}

func (c *call) resolve(ctx context.Context) (err error) {
	c.target, err = c.g.resolve(ctx, c.inv)
	return err
}

// once offers the call to nodes until one has taken it.
func (c *call) once(ctx context.Context) (blixard.InvocationReport, error) {
	if c.g.opt.Local != nil {
		report, err := c.g.opt.Local.Invoke(ctx, c.inv, Try{}, &c.sink)
		if err == nil || !c.again(err) {
			return report, c.final(ctx, err)
		}
	}
	began := time.Now()
	choices := c.g.choose(c.target, rand.Uint64())
	c.place += time.Since(began)
	if n := c.g.limits.Tries; len(choices) > n {
		choices = append(choices[:n-1], choices[len(choices)-1]) // the last one may wait
	}
	for _, choice := range choices {
		if ctx.Err() != nil {
			break
		}
		report, err := c.offer(ctx, choice)
		report.Parts.Place += c.place
		if err == nil || !c.again(err) {
			return report, c.final(ctx, err)
		}
	}
	return blixard.InvocationReport{}, c.refusal(ctx)
}

func (c *call) offer(ctx context.Context, choice route.Choice) (blixard.InvocationReport, error) {
	try := Try{MayStart: choice.MayStart, MayWait: choice.MayWait}
	if choice.Node == c.g.opt.Node {
		return c.g.opt.Local.Invoke(ctx, c.inv, try, &c.sink)
	}
	node := c.target.view.Node(choice.Node)
	if node == nil {
		return blixard.InvocationReport{}, unreachable(choice.Node, errors.New("it is no member any more"))
	}
	report, err := c.g.forward(ctx, node, c.inv, try, &c.sink)
	if r, ok := errors.AsType[*route.Refused](err); ok && r.Why == route.Unreachable && !r.Handed {
		c.g.table.down(choice.Node, time.Now())
	}
	return report, err
}

// again tells whether the call may be offered to another node, and remembers
// what to say if no one takes it.
func (c *call) again(err error) bool {
	r, ok := errors.AsType[*route.Refused](err)
	if !ok {
		return false
	}
	// That no instance was free is what made the others be asked.
	if c.worst == nil || c.worst.Why == route.NoWarm || r.Why != route.NoWarm && route.Worst([]route.Refusal{c.worst.Why, r.Why}) == r.Why {
		c.worst = r
	}
	return r.Again() && !c.sink.begun
}

// final makes the error of a call that is offered to nobody any more.
func (c *call) final(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if r, ok := errors.AsType[*route.Refused](err); ok {
		e := c.explain(ctx, r)
		e.Handed = r.Handed || c.sink.begun
		return e
	}
	if c.sink.err != nil {
		if e, ok := errors.AsType[*Error](c.sink.err); ok {
			return e
		}
		return left(c.sink.err)
	}
	e := errorOf(err)
	if ctx.Err() != nil && errors.Is(context.Cause(ctx), errDeadline) {
		e = c.late()
	}
	e.Handed = true
	return e
}

// refusal is what to say when no node has taken the call.
func (c *call) refusal(ctx context.Context) error {
	if ctx.Err() != nil {
		if errors.Is(context.Cause(ctx), errDeadline) {
			return c.late()
		}
		return left(context.Cause(ctx))
	}
	if c.worst == nil {
		e := refuse(http.StatusServiceUnavailable, ReasonUnavailable, blixard.CodeUnavailable, "`blixard cluster status` shows the nodes", "no node runs functions now")
		e.RetryAfter = time.Second
		return e
	}
	return c.explain(ctx, c.worst)
}

// left tells that nobody waits for the answer any more.
func left(why error) *Error {
	const status = 499 // as nginx has it; nobody sees it
	e := refuse(status, ReasonLeft, blixard.CodeUnavailable, "", "the caller has left: %v", why)
	e.cause = why
	return e
}

// lateRetry is after what time a call may be made again that found no instance
// until its deadline: those that are being started then may be there.
const lateRetry = 5 * time.Second

func (c *call) late() *Error {
	return refuse(http.StatusGatewayTimeout, ReasonTimeout, blixard.CodeUnavailable, "", "the function %s has not answered within %v", c.inv.Function,
		c.inv.Deadline.Sub(c.inv.Received).Round(time.Millisecond))
}

func (c *call) explain(_ context.Context, r *route.Refused) *Error {
	name := c.inv.Function
	var e *Error
	switch r.Why {
	case route.NoSlot:
		e = throttle(ReasonReservedConcurrency, time.Second, "the function %s is at its limit of %d executions", name, c.target.function.MaxConcurrent)
	case route.NoMemory, route.Busy, route.NoWarm:
		e = throttle(ReasonConcurrency, time.Second, "no node has room for another execution of %s: %s", name, r.Err.Message)
	case route.StartFailed:
		e = refuse(http.StatusBadGateway, ReasonUnavailable, blixard.CodeUnavailable, "`blixard function logs` may show why", "no instance of %s can be started now: %s", name, r.Err.Message)
		e.RetryAfter = time.Second
	case route.Gone:
		e = refuse(http.StatusBadGateway, ReasonNodeLost, blixard.CodeUnavailable, "the function may have run", "the instance of %s has ended in the middle of the call: %s", name, r.Err.Message)
	case route.Late: // nothing has run: it may well be asked for again
		e = c.late()
		e.RetryAfter = lateRetry
	case route.TimedOut:
		e = c.late()
	default:
		e = refuse(http.StatusServiceUnavailable, ReasonUnavailable, blixard.CodeUnavailable, "try again in a second", "no node takes calls of %s now: %s", name, r.Err.Message)
		e.RetryAfter = time.Second
		if r.Handed {
			e.Status, e.Reason, e.Err.Hint = http.StatusBadGateway, ReasonNodeLost, "the function may have run"
		}
	}
	e.cause = r
	return e
}
