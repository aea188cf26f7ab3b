package dispatch

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
	"github.com/blixard/blixard/internal/route"
)

// Request is a call for this node.
type Request struct {
	Invocation *blixard.Invocation // with Number and Seq; not kept
	// MayStart: an instance may be started for it. MayWait: no other node takes
	// it, so it may wait until one can be started here.
	MayStart, MayWait bool
}

// Refused is the error of a call that no function has answered.
type Refused = route.Refused //nolint:errname // a refusal, as everywhere

// pending is a call from when it is offered until it has ended.
type pending struct {
	id   route.CallID
	sink blixard.ResponseSink
	// begun is written by the goroutine that runs the call only.
	begun bool

	// Guarded by the dispatcher's mu.
	answered bool
	done     chan struct{} // made by who waits, closed by the answer
	in       *instance     // it was assigned to
	start    blixard.StartKind
	why      route.Refusal // it was rejected, or aborted
	assigned time.Time
	commit   time.Duration
}

// Begin implements blixard.ResponseSink.
func (p *pending) Begin(head blixard.ResponseHead) error {
	p.begun = true
	return p.sink.Begin(head)
}

// Write implements blixard.ResponseSink.
func (p *pending) Write(b []byte) (int, error) { return p.sink.Write(b) }

// assign hands a call to its goroutine. Callers hold mu.
func (d *Dispatcher) assign(a *route.Action) {
	p := d.calls[a.Call]
	p.in, p.start, p.assigned = d.instances[a.Instance], a.Start, time.Now()
	p.wake()
}

// answer ends a call that no function answers. Callers hold mu.
func (d *Dispatcher) answer(id route.CallID, why route.Refusal, aborted bool) {
	p := d.calls[id]
	if p == nil {
		return // its caller has left
	}
	p.why = why
	if !aborted {
		p.wake()
	}
	// An aborted one notices when its guest is gone.
}

func (p *pending) wake() {
	p.answered = true
	if p.done != nil {
		close(p.done)
	}
}

// Invoke runs a call on this node. The answer goes to w; the function's own
// error, too, with InvocationReport.Error. Any other outcome is a *Refused, or
// an error of ctx or w.
func (d *Dispatcher) Invoke(ctx context.Context, r Request, w blixard.ResponseSink) (blixard.InvocationReport, error) {
	began := time.Now()
	inv := r.Invocation
	rev, why := d.find(ctx, inv)
	if why != "" {
		return blixard.InvocationReport{}, d.refuse(&pending{}, rev, why, false)
	}
	p := &pending{sink: w}
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return blixard.InvocationReport{}, d.refuse(p, rev, route.Draining, false)
	}
	d.nextCall++
	p.id = d.nextCall
	d.calls[p.id] = p
	d.wakeTime()
	now := d.nowMS()
	deadline := now + int64(time.Until(inv.Deadline)/time.Millisecond)
	d.perform(d.node.Call(now, route.Call{ID: p.id, Revision: rev, DeadlineMS: deadline, MayStart: r.MayStart, MayWait: r.MayWait}))
	if !p.answered {
		if err := d.await(ctx, p, rev, began); err != nil {
			return blixard.InvocationReport{}, err
		}
	}
	in := p.in
	why = p.why
	if in == nil {
		delete(d.calls, p.id)
		d.mu.Unlock()
		d.throttled(rev, why)
		return blixard.InvocationReport{}, d.refuse(p, rev, why, false)
	}
	d.mu.Unlock()
	return d.run(ctx, p, inv, in, began)
}

// find tells the revision that a call is for. A gateway's view may be a little
// ahead of this node's; the refusal tells why none was found.
func (d *Dispatcher) find(ctx context.Context, inv *blixard.Invocation) (route.Revision, route.Refusal) {
	const patience = time.Second
	rev := route.Revision{Function: inv.Function, Number: inv.Number, Seq: inv.Seq}
	for began := time.Now(); ; {
		view := d.o.Cluster.View()
		if f := view.Function(inv.Function); f != nil {
			rev.UID = f.UID
			d.mu.Lock()
			known := d.node.Knows(rev)
			d.mu.Unlock()
			if known {
				return rev, ""
			}
		}
		if fv := view.FunctionVersion(inv.Function, inv.Number); fv != nil {
			if c := fv.Callable(); c != nil && c.Seq > inv.Seq {
				return rev, route.Superseded
			}
		}
		poke(d.look)
		if time.Since(began) > patience || !pause(ctx, 5*time.Millisecond) {
			return rev, route.Unknown
		}
	}
}

// await waits until a call is assigned or rejected. It is called and returns
// with mu held, but for an error.
func (d *Dispatcher) await(ctx context.Context, p *pending, rev route.Revision, began time.Time) error {
	p.done = make(chan struct{})
	leasing := d.node.WaitsForSlot(p.id)
	d.mu.Unlock()
	select {
	case <-p.done:
	case <-ctx.Done():
	}
	d.mu.Lock()
	if f := d.functions[rev.Function]; leasing && f != nil {
		p.commit = max(0, f.granted.Sub(began))
	}
	if p.answered {
		return nil
	}
	d.perform(d.node.CallEnded(d.nowMS(), p.id, route.Ended{}))
	delete(d.calls, p.id)
	d.mu.Unlock()
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return d.refuse(p, rev, route.Late, false) // as the node would have said a moment later
	}
	return context.Cause(ctx)
}

// run has the guest answer a call that was assigned to it.
func (d *Dispatcher) run(ctx context.Context, p *pending, inv *blixard.Invocation, in *instance, began time.Time) (blixard.InvocationReport, error) {
	v := in.v
	handed := time.Now()
	given := *inv
	if limit := handed.Add(time.Duration(v.spec.TimeoutMS) * time.Millisecond); v.spec.TimeoutMS > 0 && limit.Before(given.Deadline) {
		given.Deadline = limit
	}
	v.f.log.begin(handed, in.name, inv.RequestID, v.rev.Number)
	unused := in.conn.Err() != nil // nothing reaches a guest whose connection is over
	var result call.Result
	var err error
	if unused {
		err, result.Broken = in.conn.Err(), true
	} else {
		result, err = in.conn.Invoke(ctx, &given, call.Target{ARN: target(v.arn, inv.Qualifier)}, p)
	}
	took := time.Since(handed)
	broken := result.Broken || err != nil && ctx.Err() == nil || spoils(result.Error)

	d.mu.Lock()
	aborted := p.why
	delete(d.calls, p.id)
	d.perform(d.node.CallEnded(d.nowMS(), p.id, route.Ended{Broken: broken, UsedMiB: result.UsedMiB}))
	d.mu.Unlock()

	report := blixard.InvocationReport{
		RequestID: inv.RequestID, Node: d.o.Node, Instance: in.name, Number: v.rev.Number, Start: p.start, Error: result.Error,
		MemoryMiB: v.spec.MemoryMiB, UsedMiB: result.UsedMiB, Parts: parts(p, in, &result, began, handed, took),
	}
	if err != nil {
		err = d.failed(p, in, inv, &report, aborted, err, unused, given.Deadline.Sub(handed))
	}
	v.f.log.end(inv.RequestID, in.name, v.rev.Number, &report)
	if inv.LogTail {
		report.Log = tail(&report, inv.RequestID, v.rev.Number, result.Log)
	}
	v.f.stats.ended(&report, err)
	return report, err
}

// spoils tells whether a guest is not to be used again after an error of its
// function. The guest makes the runtime new after each, which is enough when that
// ended by itself. What was cut short may have left children that ignore signals
// or still eat the memory, and the next call would pay for them.
func spoils(e *blixard.FunctionError) bool {
	return e != nil && (e.Type == "Sandbox.Timedout" || e.Type == "Runtime.OutOfMemory")
}

// failed finds out what an error of the guest's connection means for the caller.
func (d *Dispatcher) failed(p *pending, in *instance, inv *blixard.Invocation, report *blixard.InvocationReport, aborted route.Refusal, err error, unused bool, limit time.Duration) error {
	switch {
	case aborted == route.TimedOut && !p.begun:
		report.Error = &blixard.FunctionError{Kind: "Unhandled", Type: "Sandbox.Timedout"}
		body := fmt.Sprintf(`{"errorType":"Sandbox.Timedout","errorMessage":"RequestId: %s Error: Task timed out after %.2f seconds"}`, inv.RequestID, limit.Seconds())
		if err := p.Begin(blixard.ResponseHead{ContentType: "application/json"}); err != nil {
			return err
		}
		_, err := p.Write([]byte(body))
		return err
	case aborted != "":
		return d.refuse(p, in.v.rev, aborted, true)
	case isOver(err):
		return d.refuse(p, in.v.rev, route.Gone, !unused)
	default:
		return err // the caller's, or its sink's
	}
}

// parts tells where the time went.
func parts(p *pending, in *instance, result *call.Result, began, handed time.Time, took time.Duration) blixard.Breakdown {
	b := blixard.Breakdown{
		Commit: p.commit, Handler: result.Handler, Init: result.Init,
		Transfer: max(0, took-result.Handler-result.Init), Total: handed.Sub(began) + took,
	}
	waited := handed.Sub(began) - b.Commit
	if p.start.Cold() {
		b.Spawn, b.Restore, b.Boot = in.spawn, in.restore, in.boot
		b.Init += in.init
		waited -= in.spawn + in.restore + in.boot + in.init
	}
	b.Queue = max(0, waited)
	return b
}

func target(arn, qualifier string) string {
	if qualifier == "" {
		return arn
	}
	return arn + ":" + qualifier
}

// refuse makes the error of a call that no function has answered.
func (d *Dispatcher) refuse(p *pending, rev route.Revision, why route.Refusal, handed bool) *Refused {
	return &Refused{Why: why, Handed: handed, Begun: p.begun, Err: d.words(rev, why, handed)}
}

func (d *Dispatcher) words(rev route.Revision, why route.Refusal, handed bool) *blixard.Error {
	name, node := rev.Function, d.o.Node
	switch why {
	case route.NoSlot:
		return &blixard.Error{Code: blixard.CodeOverloaded, Hint: "try again, or raise its limit of concurrent executions", Message: fmt.Sprintf("the function %s runs as often at once as it may", name)}
	case route.NoMemory:
		return &blixard.Error{Code: blixard.CodeOverloaded, Hint: "try again", Message: fmt.Sprintf("the node %s has no memory for another instance of %s", node, name)}
	case route.NoWarm, route.Busy:
		return &blixard.Error{Code: blixard.CodeOverloaded, Hint: "try again", Message: fmt.Sprintf("the node %s starts as many instances of %s as it can", node, name)}
	case route.StartFailed:
		d.mu.Lock()
		reason := "no reason is known any more"
		if v := d.versions[rev]; v != nil && v.failure != "" {
			reason = v.failure
		}
		d.mu.Unlock()
		return &blixard.Error{Code: blixard.CodeUnavailable, Hint: "see `blixard function logs " + string(name) + "`", Message: fmt.Sprintf("instances of %s cannot be started on %s: %s", name, node, reason)}
	case route.Superseded:
		return blixard.Errorf(blixard.CodeConflict, "%s was updated while the call was on its way", name)
	case route.Draining:
		return blixard.Errorf(blixard.CodeUnavailable, "the node %s takes no new calls: it drains or stops", node)
	case route.NoLease:
		if handed {
			return blixard.Errorf(blixard.CodeUnavailable, "the node %s lost touch with the cluster while it ran a call of %s, which may or may not have been done", node, name)
		}
		return blixard.Errorf(blixard.CodeUnavailable, "the node %s has no touch with the cluster", node)
	case route.Late:
		return blixard.Errorf(blixard.CodeUnavailable, "no instance of %s became free in time", name)
	case route.Unknown:
		return blixard.Errorf(blixard.CodeUnavailable, "the node %s does not know this version of %s", node, name)
	case route.TimedOut:
		return blixard.Errorf(blixard.CodeUnavailable, "%s did not answer in time and was ended", name)
	case route.Gone:
		if !handed {
			return blixard.Errorf(blixard.CodeUnavailable, "the instance of %s ended before the call reached it", name)
		}
		return blixard.Errorf(blixard.CodeUnavailable, "the instance of %s on %s ended while it ran the call, which may or may not have been done", name, node)
	default:
		return blixard.Errorf(blixard.CodeUnavailable, "the node %s does not take the call: %s", node, why)
	}
}
