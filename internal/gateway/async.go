package gateway

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// The runner's times.
const (
	// lookEvery is how often the runner looks without being woken: events come
	// from other nodes, too.
	lookEvery = 500 * time.Millisecond
	// lookPause is the least time between two looks; it is lookShare times as long
	// as a look took if that is more.
	lookPause = 2 * time.Millisecond
	lookShare = 10
	// A settlement that is not taken is proposed again, so often and so long.
	settleAgain  = time.Second
	settleWithin = 10 * time.Minute
)

// eventContext is what goes with an asynchronous call beside its payload: JSON,
// opaque to the state.
type eventContext struct {
	Trace         string               `json:"trace,omitempty"`
	ClientContext string               `json:"clientContext,omitempty"`
	Caller        string               `json:"caller,omitempty"`
	HTTP          *blixard.HTTPRequest `json:"http,omitempty"`
}

// Enqueue accepts a call that is made later: when it returns without error the
// call is committed and is attempted until it succeeds or has failed for good,
// at least once, whichever node dies. It fills in inv's RequestID, which all
// attempts have, and keeps no reference to inv.
func (g *Gateway) Enqueue(ctx context.Context, inv *blixard.Invocation) error {
	if inv.RequestID == "" {
		inv.RequestID = NewRequestID()
	}
	if !g.enter() {
		return errDraining()
	}
	defer g.leave()
	if n, most := int64(len(inv.Payload)), min(g.limits.AsyncBytes, state.MaxEventPayload); n > most {
		return tooLarge(n, most)
	}
	if _, err := g.resolve(ctx, inv); err != nil {
		return errorOf(err)
	}
	more, err := json.Marshal(eventContext{Trace: inv.TraceID, ClientContext: inv.ClientContext, Caller: inv.Caller, HTTP: inv.HTTP})
	if err != nil {
		return errorOf(fmt.Errorf("encoding the context of an asynchronous call: %w", err))
	}
	c := g.event(inv.RequestID, inv.Function, inv.Qualifier)
	c.Payload, c.Context = slices.Clone(inv.Payload), string(more)
	if _, err := g.opt.Propose(ctx, c, "enqueue-"+inv.RequestID); err != nil {
		e := errorOf(err)
		g.metrics.refused(e)
		return e
	}
	g.metrics.async.WithLabelValues("accepted").Inc()
	g.async.wakeUp()
	return nil
}

// event is an event that this node is to attempt.
func (g *Gateway) event(id string, name blixard.FunctionName, qualifier string) *state.EnqueueEvent {
	c := &state.EnqueueEvent{ID: id, Function: name, Qualifier: qualifier}
	if n := g.opt.View().Node(g.opt.Node); n != nil {
		c.Owner, c.OwnerEpoch = n.Name, n.Epoch
	}
	return c
}

// runner attempts the asynchronous calls that this node owns. What it knows is
// in the state; what it remembers is only what is under way.
type runner struct {
	g    *Gateway
	wake chan struct{}

	mu    sync.Mutex
	busy  map[string]blixard.FunctionName // by event
	calls map[blixard.FunctionName]int    // of busy
}

func newRunner(g *Gateway) *runner {
	return &runner{g: g, wake: make(chan struct{}, 1), busy: map[string]blixard.FunctionName{}, calls: map[blixard.FunctionName]int{}}
}

func (r *runner) wakeUp() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// run attempts what is due until ctx ends, and waits for the attempts.
func (r *runner) run(ctx context.Context) {
	var attempts sync.WaitGroup
	defer attempts.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-r.wake:
		}
		began := time.Now()
		due, next := r.look(began)
		for _, e := range due {
			attempts.Go(func() {
				defer r.done(e)
				r.attempt(ctx, e)
			})
		}
		// Looking costs a little for each event that waits: it may not take the node.
		rest := time.NewTimer(max(lookPause, lookShare*time.Since(began)))
		select {
		case <-ctx.Done():
			rest.Stop()
			return
		case <-rest.C:
		}
		timer.Reset(max(min(next, lookEvery)-time.Since(began), 0))
	}
}

// look takes the events that are due and may be attempted now, the longest due
// first, and tells when to look again. Of one function no more are attempted at
// once than it may have executions: the others are not throttled but wait.
func (r *runner) look(now time.Time) (due []*blixard.AsyncEvent, next time.Duration) {
	next = lookEvery
	view := r.g.opt.View()
	self := view.Node(r.g.opt.Node)
	if self == nil || r.g.draining.Load() {
		return nil, next
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	nowMS, owned := now.UnixMilli(), 0
	view.EventsOwnedBy(self.Name, self.Epoch, func(e *blixard.AsyncEvent) bool {
		owned++
		if _, busy := r.busy[e.ID]; busy {
			return true
		}
		if wait := e.NotBeforeMS - nowMS; wait > 0 {
			next = min(next, time.Duration(wait)*time.Millisecond)
			return true
		}
		due = append(due, e)
		return true
	})
	r.g.metrics.waiting.Set(float64(owned))
	slices.SortStableFunc(due, func(a, b *blixard.AsyncEvent) int { return cmp.Compare(a.NotBeforeMS, b.NotBeforeMS) })
	due = slices.DeleteFunc(due, func(e *blixard.AsyncEvent) bool { return !r.begin(view, e) })
	return due, next
}

// begin takes an event if there is room for its attempt; with r.mu.
func (r *runner) begin(view *state.View, e *blixard.AsyncEvent) bool {
	most := r.g.limits.AsyncCalls
	if len(r.busy) >= most {
		return false
	}
	f := view.Function(e.Function)
	if f == nil || r.calls[e.Function] >= max(1, min(f.MaxConcurrent, (most+1)/2)) {
		return false
	}
	r.busy[e.ID] = e.Function
	r.calls[e.Function]++
	return true
}

func (r *runner) done(e *blixard.AsyncEvent) {
	r.mu.Lock()
	delete(r.busy, e.ID)
	if r.calls[e.Function]--; r.calls[e.Function] == 0 {
		delete(r.calls, e.Function)
	}
	r.mu.Unlock()
	r.wakeUp()
}

// outcome is what became of one attempt.
type outcome struct {
	report  blixard.InvocationReport
	err     *Error // no function has answered
	tried   bool   // an attempt was made at all
	answer  []byte
	tooLong bool // answer is not whole
}

// attempt makes one attempt and settles it.
func (r *runner) attempt(ctx context.Context, e *blixard.AsyncEvent) {
	out := outcome{}
	if !state.TooOld(e, time.Now().UnixMilli()) {
		out = r.call(ctx, e)
		if ctx.Err() != nil && (out.err != nil || out.report.Error != nil) {
			return // this node stops: who owns the event next tries again
		}
	}
	s := r.g.settlement(e, &out, time.Now().UnixMilli())
	r.g.metrics.async.WithLabelValues(string(s.Result)).Inc()
	// What came of an attempt is kept although this node is told to stop.
	if err := r.settle(context.WithoutCancel(ctx), ctx.Done(), s); err != nil {
		r.g.log.Warn("what became of an asynchronous call was not recorded: it may be made again", "event", "async_unsettled", "request", e.ID, "function", string(e.Function), "error", err)
	}
}

func (r *runner) call(ctx context.Context, e *blixard.AsyncEvent) outcome {
	inv := &blixard.Invocation{RequestID: e.ID, Function: e.Function, Qualifier: e.Qualifier, Payload: e.Payload}
	var more eventContext
	if err := json.Unmarshal([]byte(e.Context), &more); err == nil { // else it was not this gateway's kind: nothing is lost but a trace
		inv.TraceID, inv.ClientContext, inv.Caller, inv.HTTP = more.Trace, more.ClientContext, more.Caller, more.HTTP
	}
	sink := keptAnswer{limit: r.g.limits.ResponseBytes}
	report, err := r.g.Invoke(ctx, inv, &sink)
	out := outcome{report: report, tried: true, answer: sink.buf, tooLong: sink.over}
	if err != nil {
		out.err = errorOf(err)
	}
	return out
}

// keptAnswer keeps an answer up to a limit; what is longer is not kept.
type keptAnswer struct {
	buf   []byte
	limit int64
	over  bool
}

func (k *keptAnswer) Begin(blixard.ResponseHead) error { return nil }

func (k *keptAnswer) Write(p []byte) (int, error) {
	if int64(len(k.buf)+len(p)) > k.limit {
		k.buf, k.over = nil, true
	}
	if !k.over {
		k.buf = append(k.buf, p...)
	}
	return len(p), nil
}

// settlement says what follows from an attempt.
func (g *Gateway) settlement(e *blixard.AsyncEvent, out *outcome, nowMS int64) *state.SettleEvent {
	f := g.opt.View().Function(e.Function)
	conf := blixard.AsyncConfig{}
	if f != nil {
		conf = f.AsyncFor(e.Qualifier)
	}
	made := state.Attempt{Made: out.tried}
	switch {
	case out.err != nil:
		made.Failure = out.err.Error()
	case out.report.Error != nil:
		made.Failure, made.FunctionError = out.report.Error.Type+": "+clip(string(out.answer)), true
	}
	s := made.Settlement(e, f, nowMS)
	to := ""
	switch s.Result {
	case state.SettleSuccess:
		to = conf.OnSuccess
	case state.SettleDead:
		to = conf.OnFailure
	case state.SettleRetry:
	}
	if to != "" && to != deadLetters {
		s.Next = g.destination(e, out, s, to, nowMS)
	}
	return s
}

// settle records what became of an attempt, trying as long as that can help. The
// key is this attempt's alone: another attempt, here or by another owner, may have
// ended otherwise, and would be refused under the same key for ever.
func (r *runner) settle(ctx context.Context, stop <-chan struct{}, s *state.SettleEvent) error {
	key := settleKey(s)
	ctx, cancel := context.WithTimeout(ctx, settleWithin)
	defer cancel()
	for {
		try, done := context.WithTimeout(ctx, settleWithin/10)
		_, err := r.g.opt.Propose(try, s, key)
		done()
		switch code := blixard.CodeOf(err); {
		case err == nil:
			return nil
		case code != blixard.CodeUnavailable && code != blixard.CodeOverloaded && !errors.Is(err, context.DeadlineExceeded):
			return err
		case code == blixard.CodeOverloaded && s.Next != nil:
			// Perhaps there was no room for the destination's event. That answer
			// belongs to the key; a repeat without it ends the event once all the same.
			key = settleKey(s)
		}
		timer := time.NewTimer(settleAgain)
		select {
		case <-timer.C:
		case <-stop:
			timer.Stop()
			return err
		case <-ctx.Done():
			timer.Stop()
			return err
		}
	}
}

func settleKey(s *state.SettleEvent) string { return "settle-" + s.ID + "-" + NewRequestID() }
