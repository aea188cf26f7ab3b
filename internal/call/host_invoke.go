package call

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/assert"
)

// windowStep is how much an invocation takes before it grants that much again.
const windowStep = Window / 4

// ErrSink is wrapped round an error of the sink, which ends the invocation.
var ErrSink = errors.New("the answer could not be passed on")

// Target is what an Invocation says nothing of and the guest has to know.
type Target struct {
	ARN    string // as called, with its qualifier
	Tenant string
}

// Invoke has the function answer one invocation. The guest ends it at
// inv.Deadline; ctx should end somewhat later, for guests that do not. When ctx
// ends the guest is told that nobody waits, and Invoke returns at once with the
// cause and a Result that says Broken.
//
// A nil error means that the sink has the whole answer, also when the function
// failed (Result.Error). After an error the Result says whether the instance can
// be used again; ErrSink is the sink's, ErrClosed the connection's.
func (c *Conn) Invoke(ctx context.Context, inv *blixard.Invocation, target Target, sink blixard.ResponseSink) (Result, error) {
	x, err := c.ask(true, inv.RequestID)
	if err != nil {
		return Result{Broken: true}, fmt.Errorf("invoking: %w", err)
	}
	if err := c.sendInvocation(ctx, x, inv, target); err != nil {
		c.leave(x)
		broken := !errors.Is(err, &blixard.Error{Code: blixard.CodeInvalid})
		return Result{Broken: broken}, fmt.Errorf("invoking: %w", err)
	}
	result, err := c.answer(ctx, x, sink)
	if err != nil {
		return result, fmt.Errorf("invoking: %w", err)
	}
	return result, nil
}

func (c *Conn) sendInvocation(ctx context.Context, x *exchange, inv *blixard.Invocation, target Target) error {
	request := Request{
		RequestID: inv.RequestID, ARN: target.ARN, Tenant: target.Tenant, TraceID: inv.TraceID, ClientContext: inv.ClientContext,
		DeadlineMS: inv.Deadline.UnixMilli(), RemainingMS: time.Until(inv.Deadline).Milliseconds(),
		Stream: inv.Stream, Payload: inv.Payload, HTTP: inv.HTTP,
	}
	part := 0
	frames, err := frame(kindInvoke, x.id, func(w *writer) {
		w.request(&request)
		part = min(len(inv.Payload), max(0, headerBytes+MaxFrame-len(w.b)))
		w.b = append(w.b, inv.Payload[:part]...)
	})
	if err != nil {
		return blixard.Invalid("headers", "send shorter headers", "the head of the request is too long: %v", err)
	}
	if err := c.write(ctx, frames); err != nil {
		return err
	}
	for rest := inv.Payload[part:]; len(rest) > 0; {
		n := min(len(rest), MaxFrame)
		frames = append(frames[:0], make([]byte, headerBytes)...)
		putHeader(frames, kindBody, x.id, n)
		if err := c.write(ctx, append(frames, rest[:n]...)); err != nil {
			c.fail(fmt.Errorf("sending a payload: %w", err)) // the guest has half of it
			return err
		}
		rest = rest[n:]
	}
	return nil
}

// answer passes what comes to the sink until the end.
func (c *Conn) answer(ctx context.Context, x *exchange, sink blixard.ResponseSink) (Result, error) {
	var bytes int64
	granted := 0 // taken and not granted again yet
	for {
		select {
		case <-x.wake:
		default:
			select {
			case <-x.wake:
			case <-c.done:
			case <-ctx.Done():
				c.cancel(x)
				return Result{Broken: true, Bytes: bytes, Log: c.logOf(x)}, context.Cause(ctx)
			}
		}
		c.mu.Lock()
		chunks, final, last, over := x.chunks, x.final, x.last, c.err != nil
		x.chunks = nil
		c.mu.Unlock()
		for _, part := range chunks {
			if err := c.pass(part, sink); err != nil {
				c.cancel(x)
				return Result{Broken: true, Bytes: bytes, Log: c.logOf(x)}, err
			}
			if part.kind == kindData {
				bytes += int64(len(part.payload))
				granted += len(part.payload)
			}
		}
		if final != 0 {
			return c.result(x, last, bytes, sink)
		}
		if over {
			return Result{Broken: true, Bytes: bytes, Log: c.logOf(x)}, c.Err()
		}
		if bytes > c.options.MaxAnswer {
			c.fail(fmt.Errorf("an answer of more than %d bytes: %w", c.options.MaxAnswer, ErrHostile))
			return Result{Broken: true, Bytes: bytes, Log: c.logOf(x)}, c.Err()
		}
		if granted >= windowStep {
			if err := c.grant(ctx, x, granted); err != nil {
				return Result{Broken: true, Bytes: bytes, Log: c.logOf(x)}, err
			}
			granted = 0
		}
	}
}

func (c *Conn) pass(part chunk, sink blixard.ResponseSink) error {
	if part.kind == kindHead {
		r := reader{b: part.payload}
		head := r.head()
		if err := c.decoded(&r); err != nil {
			return err
		}
		if err := sink.Begin(head); err != nil {
			return fmt.Errorf("%w: %w", ErrSink, err)
		}
		return nil
	}
	if _, err := sink.Write(part.payload); err != nil {
		return fmt.Errorf("%w: %w", ErrSink, err)
	}
	return nil
}

// result reads the frame that ends an invocation, which holds a short answer.
func (c *Conn) result(x *exchange, last []byte, bytes int64, sink blixard.ResponseSink) (Result, error) {
	r := reader{b: last}
	o := r.outcome()
	result := Result{
		Error: o.Error, Detail: printable(o.Detail, maxTextBytes), Handler: o.Handler, Init: o.Init, UsedMiB: max(0, o.UsedMiB),
		Dropped: max(0, o.Dropped), Broken: o.Broken, Log: c.logOf(x), Bytes: bytes,
	}
	if o.Error != nil {
		o.Error.Kind, o.Error.Type = printable(o.Error.Kind, 64), printable(o.Error.Type, 256)
	}
	inline := r.flag()
	var head blixard.ResponseHead
	if inline {
		head = r.head()
	}
	body := r.b
	if err := c.decoded(&r); err != nil {
		result.Broken = true
		return result, err
	}
	c.mu.Lock()
	begun := x.begun
	c.mu.Unlock()
	if inline == begun || begun && len(body) > 0 {
		c.fail(fmt.Errorf("an answer without a head, or with two: %w", ErrHostile))
		result.Broken = true
		return result, c.Err()
	}
	if !inline {
		return result, nil
	}
	err := sink.Begin(head)
	if err == nil && len(body) > 0 {
		_, err = sink.Write(body)
	}
	if err != nil {
		// The guest has done its part.
		return result, fmt.Errorf("%w: %w", ErrSink, err)
	}
	result.Bytes = int64(len(body))
	return result, nil
}

// cancel gives an invocation up. A guest that cannot even be told so in a moment
// is over.
func (c *Conn) cancel(x *exchange) {
	c.leave(x)
	frames, err := frame(kindCancel, x.id, func(*writer) {})
	if err != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	// Not in the caller's time: a guest that does not read would hold it up. The
	// reader is there, so that whoever waits for it waits for this one, too.
	c.reading.Go(func() {
		ctx, stop := context.WithTimeout(context.Background(), time.Second)
		defer stop()
		if err := c.write(ctx, frames); err != nil {
			c.fail(fmt.Errorf("giving an invocation up: %w", err))
		}
	})
}

func (c *Conn) grant(ctx context.Context, x *exchange, n int) error {
	c.mu.Lock()
	x.window += n
	c.mu.Unlock()
	frames, err := frame(kindWindow, x.id, func(w *writer) { w.uint(uint64(n)) })
	if err != nil {
		return err
	}
	return c.write(ctx, frames)
}

// DryInvocation is an invocation as a host sends it, for a guest that tries its own
// way before it is saved. The payload must fit into a frame.
func DryInvocation(inv *blixard.Invocation) []byte {
	frames, err := frame(kindInvoke, 1, func(w *writer) {
		w.request(&Request{RequestID: inv.RequestID, DeadlineMS: inv.Deadline.UnixMilli(), RemainingMS: time.Until(inv.Deadline).Milliseconds(), Payload: inv.Payload})
		w.b = append(w.b, inv.Payload...)
	})
	assert.True(err == nil, "a dry invocation is too long: %v", err)
	return frames
}
