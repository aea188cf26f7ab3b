package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
)

// invocation is the ResponseWriter that runtimes get: it bounds answers and adds
// to the outcome what the agent knows.
type invocation struct {
	agent    *functionAgent
	request  *call.Request
	w        call.ResponseWriter
	deadline time.Time

	// queued is true until a runtime that takes invocations inline clears it, when
	// the function is about to see this one: before, it may be given to the next
	// start of the function.
	queued atomic.Bool

	mu      sync.Mutex
	started time.Time     // when the runtime, or the function, got it
	init    time.Duration // of a runtime that was started for it
	head    blixard.ResponseHead
	bytes   int64
	closed  bool
}

// begin notes that somebody begins to work on it.
func (v *invocation) begin() {
	now := time.Now()
	v.mu.Lock()
	defer v.mu.Unlock()
	v.started = now
}

func (v *invocation) undelivered() bool { return v.queued.Load() }

// Begin implements call.ResponseWriter.
func (v *invocation) Begin(head blixard.ResponseHead) error {
	v.mu.Lock()
	v.head = head
	v.mu.Unlock()
	return v.w.Begin(head)
}

// Write implements call.ResponseWriter. An answer that grows too long ends the
// invocation.
func (v *invocation) Write(p []byte) (int, error) {
	v.mu.Lock()
	limit := v.agent.settings.MaxResponse
	if v.head.Streaming {
		limit = v.agent.settings.MaxStream
	}
	v.bytes += int64(len(p))
	tooLong := v.bytes > limit
	v.mu.Unlock()
	if tooLong {
		v.tooLarge(limit)
		return 0, call.ErrEnded
	}
	return v.w.Write(p)
}

// tooLarge ends it as AWS Lambda does.
func (v *invocation) tooLarge(limit int64) {
	message := fmt.Sprintf("Response payload size exceeded maximum allowed payload size (%d bytes).", limit)
	v.end(call.Outcome{
		Error: unhandled("Function.ResponseSizeTooLarge"), Detail: message,
		Body: errorBody("Function.ResponseSizeTooLarge", message, ""),
	})
}

// Finish implements call.ResponseWriter.
func (v *invocation) Finish(o call.Outcome) error {
	if !v.leave() {
		return call.ErrEnded
	}
	a := v.agent
	v.mu.Lock()
	if o.Handler == 0 && !v.started.IsZero() {
		o.Handler = time.Since(v.started)
	}
	o.Init = v.init
	v.mu.Unlock()
	o.Dropped = a.log.settle()
	o.UsedMiB = a.peakMiB()
	a.mu.Lock()
	o.Broken = o.Broken || a.poisoned
	a.mu.Unlock()
	return v.w.Finish(o)
}

func (v *invocation) isClosed() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.closed
}

func (v *invocation) end(o call.Outcome) {
	// A host that is gone has no use for the answer, and one that came too late
	// has been given another.
	if err := v.Finish(o); err != nil && !errors.Is(err, call.ErrEnded) {
		logf("ending an invocation: %v", err)
	}
}

// leave closes it; false when it was closed before.
func (v *invocation) leave() bool {
	v.mu.Lock()
	closed := v.closed
	v.closed = true
	v.mu.Unlock()
	if closed {
		return false
	}
	v.agent.mu.Lock()
	delete(v.agent.open, v)
	v.agent.mu.Unlock()
	return true
}

// drop closes it without an answer.
func (v *invocation) drop() {
	if v.leave() {
		v.agent.log.settle()
	}
}

// fail ends it with a fault of the function's.
func (v *invocation) fail(f *call.InitError) {
	message := f.Message
	if f.Body == nil {
		message = "RequestId: " + v.request.RequestID + " Error: " + f.Message
	}
	body := f.Body
	if body == nil {
		body = errorBody(f.Type, message, "")
	}
	v.end(call.Outcome{Error: unhandled(f.Type), Body: body, Detail: message})
}

// errorBody is the JSON of an error; requestID is left out when it is "".
func errorBody(errorType, message, requestID string) []byte {
	body, err := json.Marshal(struct {
		Type      string `json:"errorType"`
		Message   string `json:"errorMessage"`
		RequestID string `json:"requestId,omitempty"`
	}{errorType, message, requestID})
	if err != nil {
		return []byte(`{"errorType":"Sandbox.Failure"}`) // of three texts it cannot be
	}
	return body
}
