// Package gateway takes invocations of functions on a node and sees that each is
// answered: by an instance here, by one on another node, or by a refusal that
// says why. It serves HTTP (triggers, function URLs, /function/<name>), it is
// what the APIs call, and it makes the attempts of asynchronous invocations.
//
// Ownership: a Gateway owns what other nodes have told it of their load, the
// token buckets of rate limits and the attempts of the asynchronous invocations
// that this node owns in the state. Instances, slots and starts are the
// dispatcher's (Local); who answers is decided by package route.
//
// Ordering: a call asks for a free instance here first; that path touches
// neither lock of the state nor disk. Only then nodes are compared. A call goes
// to another node as long as none has handed it to a guest; from then on an
// answer that does not come is the caller's to know (502, 504), and only
// asynchronous calls are made again.
//
// Invariants: Enqueue returns after the call is committed; an accepted call is
// attempted until it is settled, by this node or by who owns it next. The sink
// of a call sees one answer. What was handed to a guest is not handed to another.
// Nothing here is unbounded: payloads, answers, attempts, peers and callers that
// are remembered all have a limit (Limits and the constants of the files).
package gateway

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// Limits of a Gateway; 0 means the default.
type Limits struct {
	SyncBytes     int64 // payload of a synchronous call; 6 MiB
	AsyncBytes    int64 // payload of an asynchronous call; 1 MiB
	ResponseBytes int64 // answer that is not streamed; 6 MiB and 100
	StreamBytes   int64 // answer that is streamed; 200 MiB
	// CallerRate is how many calls per second one caller may make through this
	// node, to all functions together; 0: no limit.
	CallerRate float64
	AsyncCalls int // attempts of asynchronous calls at once; 64
	Tries      int // nodes that one call is offered to; 6
	// Start is what a call may wait for an instance, beyond its timeout; 30 s.
	Start time.Duration
	// Body is how long a client may take to send a request; 60 s.
	Body time.Duration
	// Announce is the least time between two announcements of this node's load;
	// 250 ms.
	Announce time.Duration
}

func (l *Limits) defaults() {
	l.SyncBytes, l.AsyncBytes = cmp.Or(l.SyncBytes, 6<<20), cmp.Or(l.AsyncBytes, 1<<20)
	l.ResponseBytes, l.StreamBytes = cmp.Or(l.ResponseBytes, 6<<20+100), cmp.Or(l.StreamBytes, 200<<20)
	l.AsyncCalls, l.Tries = cmp.Or(l.AsyncCalls, 64), cmp.Or(l.Tries, 6)
	l.Start, l.Body = cmp.Or(l.Start, 30*time.Second), cmp.Or(l.Body, time.Minute)
	l.Announce = cmp.Or(l.Announce, 250*time.Millisecond)
}

// Options are what a Gateway works with. Node, View and Propose are required.
type Options struct {
	Node blixard.NodeName
	View func() *state.View
	// Fresh is a view that has every change acknowledged before the call; it is
	// asked for, now and then, when a name is not known. May be nil.
	Fresh func(ctx context.Context) (*state.View, error)
	// Propose has a command committed and applied, once for each key.
	Propose func(ctx context.Context, c state.Command, key string) (state.Outcome, error)
	// Local is this node's dispatcher; nil: it runs no functions.
	Local Local
	// OvercommitPercent is how much memory functions may be promised of what VMs
	// leave; below 100 it is 100.
	OvercommitPercent int
	// Secret is what nodes present to each other.
	Secret func() string
	// Verify checks signed requests to function URLs; nil: they are refused.
	Verify Verifier
	// Authorize tells whether a request may call a function by name
	// (/function/…); nil: all may.
	Authorize func(r *http.Request) error
	Domain    string // of function URLs: <id>.lambda-url.<region>.<domain>
	Region    string
	AccountID string
	// TrustForwarded: a proxy stands before this gateway, whose X-Forwarded-…
	// headers say where requests come from.
	TrustForwarded bool
	Limits         Limits
	Metrics        *Metrics // nil: not counted
	Traces         *Traces  // nil: none are sent
	Log            *slog.Logger
}

// Local is this node's dispatcher.
type Local interface {
	// Invoke runs the call on this node. The answer, also a function's own error,
	// goes to w. An error means that no function has answered; if it is a
	// *route.Refused it tells whether one may have run. It returns soon after ctx has
	// ended and keeps no reference to inv.
	Invoke(ctx context.Context, inv *blixard.Invocation, try Try, w blixard.ResponseSink) (blixard.InvocationReport, error)
	// Load is what functions hold of this node, and what there is of each
	// revision; cheap. Nobody changes it afterwards.
	Load() NodeLoad
}

// Try says what a node may do for a call.
type Try struct {
	MayStart bool // an instance may be started for it
	MayWait  bool // it may wait for one that is busy or being started
}

// Gateway answers invocations on one node. Make it with New; Run lets it talk to
// other nodes and make asynchronous calls.
type Gateway struct {
	opt     Options
	limits  Limits
	log     *slog.Logger
	metrics *Metrics
	table   *table
	rates   *rates
	peers   *peers
	routes  atomic.Pointer[routes]
	async   *runner
	asks    *bucket // for fresh views
	notes   *bucket // for lines in the log

	urlSuffix string // of the hosts of function URLs

	calls    atomic.Int64
	draining atomic.Bool
	idle     chan struct{} // room for one: calls came to 0 while draining
}

// New makes a Gateway.
func New(o Options) (*Gateway, error) {
	if o.Node == "" || o.View == nil || o.Propose == nil {
		return nil, errors.New("a gateway needs a node, a view and a way to propose")
	}
	o.Region, o.Domain = cmp.Or(o.Region, "us-east-1"), cmp.Or(o.Domain, "localhost")
	o.AccountID = cmp.Or(o.AccountID, "000000000000")
	o.Limits.defaults()
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Metrics == nil {
		o.Metrics = NewMetrics()
	}
	if o.Secret == nil {
		o.Secret = func() string { return "" }
	}
	g := &Gateway{
		opt: o, limits: o.Limits, log: o.Log, metrics: o.Metrics, table: newTable(), rates: newRates(o.Limits.CallerRate),
		peers: newPeers(o.Secret), idle: make(chan struct{}, 1), asks: newBucket(20, 20), notes: newBucket(1, 10),
		urlSuffix: strings.ToLower(".lambda-url." + o.Region + "." + o.Domain),
	}
	g.async = newRunner(g)
	return g, nil
}

// enter counts a call in, unless the gateway drains.
func (g *Gateway) enter() bool {
	g.calls.Add(1)
	if g.draining.Load() {
		g.leave()
		return false
	}
	return true
}

func (g *Gateway) leave() {
	if g.calls.Add(-1) == 0 && g.draining.Load() {
		select {
		case g.idle <- struct{}{}:
		default:
		}
	}
}

// Calls is how many calls are under way here, in both roles: those that came to
// this gateway and those that another one sent to this node.
func (g *Gateway) Calls() int { return int(g.calls.Load()) }

// Drain refuses calls from now on and waits for those under way.
func (g *Gateway) Drain(ctx context.Context) error {
	g.draining.Store(true)
	for g.calls.Load() > 0 {
		select {
		case <-g.idle:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

func errDraining() *Error {
	e := refuse(http.StatusServiceUnavailable, ReasonDraining, blixard.CodeUnavailable, "ask another node", "this node takes no more calls, it is being stopped")
	e.RetryAfter = time.Second
	return e
}
