package main

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"regexp"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
)

const (
	runtimePrefix    = "/2018-06-01"
	invocationPrefix = runtimePrefix + "/runtime/invocation/"
	maxErrorBody     = 256 << 10 // of an error that a function posts
	notAllowed       = "State transition is not allowed"
)

// serve answers a request of the function or an extension. It is called by the
// connection's thread.
func (b *bootstrap) serve(c *apiConn, r *apiRequest) {
	if rest, ok := strings.CutPrefix(r.path, invocationPrefix); ok {
		if rest == "next" {
			b.serveGet(c, r, b.serveNext)
			return
		}
		id, what, _ := strings.Cut(rest, "/")
		switch {
		case r.method == "POST" && what == "response":
			b.serveResponse(c, r, id)
			return
		case r.method == "POST" && what == "error":
			b.serveError(c, r, id)
			return
		}
	}
	switch path := strings.TrimPrefix(r.path, runtimePrefix); {
	case path == "/ping":
		b.serveGet(c, r, func(c *apiConn) { c.answer(200, "", []byte("pong")) })
	case path == "/runtime/restore/next":
		b.serveGet(c, r, b.serveRestoreNext)
	case r.method == "POST" && path == "/runtime/init/error":
		b.serveInitError(c, r, "Started", "InitError")
	case r.method == "POST" && path == "/runtime/restore/error":
		b.serveInitError(c, r, "Restoring", "RestoreError")
	default:
		if !b.extensions.serve(c, r) {
			c.answerError(404, "NotFound", "there is no "+r.method+" "+r.path)
		}
	}
}

func (b *bootstrap) serveGet(c *apiConn, r *apiRequest, serve func(*apiConn)) {
	if r.method != "GET" {
		c.answerError(405, "MethodNotAllowed", r.path+" is to be read with GET")
		return
	}
	serve(c)
}

func (b *bootstrap) forbidden(c *apiConn, from, to string) {
	c.answerError(403, "InvalidStateTransition", "State transition from "+from+" to "+to+" failed for runtime. Error: "+notAllowed)
}

// serveNext is answered when there is an invocation.
func (b *bootstrap) serveNext(c *apiConn) {
	b.mu.Lock()
	if b.phase == bootstrapDown || b.initError != nil || len(b.running) >= b.host.init.Concurrency {
		b.mu.Unlock()
		b.forbidden(c, "Running", "Ready")
		return
	}
	b.next = append(b.next, c)
	b.nextSeen = true
	b.settleInit()
	var conn *apiConn
	var t *bootstrapCall
	if len(b.queue) > 0 && b.phase == bootstrapServing {
		t = b.queue[0]
		b.queue = append(b.queue[:0], b.queue[1:]...)
		conn = b.claim(t)
	}
	b.mu.Unlock()
	if conn != nil {
		deliver(conn, t)
	}
}

// serveRestoreNext is answered in a clone. A function that waits here is ready to
// be saved.
func (b *bootstrap) serveRestoreNext(c *apiConn) {
	b.mu.Lock()
	if b.phase != bootstrapInit || b.nextSeen || b.parked {
		b.mu.Unlock()
		b.forbidden(c, "Ready", "RestoreReady")
		return
	}
	b.restores = append(b.restores, c)
	b.parked = true
	b.settleInit()
	b.mu.Unlock()
}

func (b *bootstrap) serveInitError(c *apiConn, r *apiRequest, from, to string) {
	body, err := readBody(c, r, maxErrorBody)
	if err != nil {
		c.over.Store(true)
		return
	}
	f := postedError(r, body)
	b.mu.Lock()
	if b.phase != bootstrapInit || b.initError != nil || b.nextSeen {
		b.mu.Unlock()
		b.forbidden(c, from, to)
		return
	}
	b.initError = f
	b.mu.Unlock()
	c.accepted()
	b.report(f)
}

// take finds a call that is to be answered, and tells the function when it may not
// answer it.
func (b *bootstrap) take(c *apiConn, id string) *bootstrapCall {
	b.mu.Lock()
	t := b.running[id]
	delete(b.running, id)
	again := false
	if t != nil {
		b.answered[b.answeredAt%len(b.answered)] = id
		b.answeredAt++
	} else {
		for _, old := range b.answered {
			again = again || old == id && id != ""
		}
	}
	b.mu.Unlock()
	switch {
	case t != nil:
	case again:
		b.forbidden(c, "ResponseSent", "InvocationResponse")
	default:
		c.answerError(400, "InvalidRequestID", "Invalid request ID")
	}
	return t
}

// serveResponse passes an answer on: as it comes when the caller takes a stream,
// else as a whole.
func (b *bootstrap) serveResponse(c *apiConn, r *apiRequest, id string) {
	t := b.take(c, id)
	if t == nil {
		return
	}
	mode := r.header("lambda-runtime-function-response-mode")
	if mode != "" && mode != "streaming" {
		b.finish(t, call.Outcome{Error: unhandled("Runtime.InvalidResponseModeHeader"), Body: errorBody("Runtime.InvalidResponseModeHeader", "the response mode "+mode+" is not known", "")})
		c.answerError(400, "InvalidFunctionResponseMode", "Invalid function response mode")
		return
	}
	head := blixard.ResponseHead{ContentType: r.header("content-type"), Streaming: t.request.Stream && (mode != "" || r.length < 0)}
	if head.Streaming {
		b.stream(c, r, t, head)
		return
	}
	limit := b.host.init.MaxResponse
	body := make([]byte, 0, max(0, min(r.length, limit)))
	var total int64
	trailers, err := c.body(r, func(p []byte) error {
		total += int64(len(p))
		switch {
		case total <= limit:
			body = append(body, p...)
		case body != nil:
			body = nil
			b.tooLarge(t, limit)
		case total > apiDrainBytes:
			return errMalformed
		}
		return nil // most clients look for an answer only when they have sent everything
	})
	switch {
	case total > limit:
		if err != nil {
			c.over.Store(true)
		}
		c.answerError(413, "RequestEntityTooLarge", tooLargeMessage(limit))
	case err != nil:
		b.truncated(c, t)
	default:
		outcome := trailerOutcome(trailers)
		if outcome.Error == nil {
			b.write(t, head, body)
		}
		b.finish(t, outcome)
		c.accepted()
	}
}

func (b *bootstrap) write(t *bootstrapCall, head blixard.ResponseHead, body []byte) {
	err := t.w.Begin(head)
	if err == nil && len(body) > 0 {
		_, err = t.w.Write(body)
	}
	// One that has ended was given another answer: its time was over.
	if err != nil && !errors.Is(err, call.ErrEnded) {
		logf("passing an answer on: %v", err)
	}
}

func (b *bootstrap) finish(t *bootstrapCall, outcome call.Outcome) {
	if err := t.w.Finish(outcome); err != nil && !errors.Is(err, call.ErrEnded) {
		logf("ending an answer: %v", err)
	}
}

func (b *bootstrap) stream(c *apiConn, r *apiRequest, t *bootstrapCall, head blixard.ResponseHead) {
	if err := t.w.Begin(head); err != nil {
		c.over.Store(true)
		return
	}
	trailers, err := c.body(r, func(p []byte) error {
		_, err := t.w.Write(p)
		return err
	})
	switch {
	case errors.Is(err, call.ErrEnded):
		// Too long, or its time is over: the agent has answered.
		c.over.Store(true)
		c.answerError(413, "RequestEntityTooLarge", tooLargeMessage(b.host.init.MaxStream))
	case err != nil:
		b.truncated(c, t)
	default:
		b.finish(t, trailerOutcome(trailers))
		c.accepted()
	}
}

func tooLargeMessage(limit int64) string {
	return "Exceeded maximum allowed payload size (" + decimal(limit) + " bytes)."
}

// tooLarge ends a call whose answer is too long.
func (b *bootstrap) tooLarge(t *bootstrapCall, limit int64) {
	message := "Response payload size exceeded maximum allowed payload size (" + decimal(limit) + " bytes)."
	b.finish(t, call.Outcome{Error: unhandled("Function.ResponseSizeTooLarge"), Body: errorBody("Function.ResponseSizeTooLarge", message, ""), Detail: message})
}

func (b *bootstrap) truncated(c *apiConn, t *bootstrapCall) {
	const message = "the function's response was cut off"
	b.finish(t, call.Outcome{Error: unhandled("Runtime.TruncatedResponse"), Body: errorBody("Runtime.TruncatedResponse", message, t.request.RequestID), Detail: message})
	c.over.Store(true)
	c.answerError(400, "TruncatedHTTPRequest", "HTTP request detected as truncated")
}

// serveError passes on that the function has failed, in its own words.
func (b *bootstrap) serveError(c *apiConn, r *apiRequest, id string) {
	t := b.take(c, id)
	if t == nil {
		return
	}
	body, err := readBody(c, r, b.host.init.MaxResponse)
	if err != nil {
		b.truncated(c, t)
		return
	}
	f := postedError(r, body)
	b.finish(t, call.Outcome{Error: unhandled(f.Type), Body: f.Body, Detail: f.Message})
	c.accepted()
}

// trailerOutcome reads an error that came after the answer had begun.
func trailerOutcome(trailers [][2]string) call.Outcome {
	var errorType string
	var body []byte
	for _, h := range trailers {
		switch h[0] {
		case "lambda-runtime-function-error-type":
			errorType = h[1]
		case "lambda-runtime-function-error-body":
			if decoded, err := base64.StdEncoding.DecodeString(h[1]); err == nil {
				body = decoded
			}
		}
	}
	if errorType == "" && body == nil {
		return call.Outcome{}
	}
	if errorType == "" {
		errorType = "Runtime.Unknown"
	}
	if body == nil {
		body = errorBody(errorType, "the function has failed", "")
	}
	return call.Outcome{Error: unhandled(errorType), Body: body, Detail: string(body)}
}

func readBody(c *apiConn, r *apiRequest, limit int64) ([]byte, error) {
	var body []byte
	_, err := c.body(r, func(p []byte) error {
		if int64(len(body)+len(p)) <= limit {
			body = append(body, p...)
		}
		return nil
	})
	return body, err
}

var errorTypePattern = regexp.MustCompile(`^(Runtime|Function|Extension)\.[A-Z][a-zA-Z]+$`)

// postedError is an error that a function or an extension has posted. Its body is
// passed on as it is.
func postedError(r *apiRequest, body []byte) *call.InitError {
	var said struct {
		Type    string `json:"errorType"`
		Message string `json:"errorMessage"`
	}
	// It need not be JSON; then there is nothing in it to read.
	valid := json.Unmarshal(body, &said) == nil
	f := &call.InitError{Type: said.Type, Message: said.Message, Body: body}
	if header := r.header("lambda-runtime-function-error-type"); errorTypePattern.MatchString(header) || f.Type == "" && header != "" {
		f.Type = header
	}
	if f.Type == "" {
		f.Type = "Runtime.Unknown"
	}
	if !valid || len(body) == 0 {
		f.Message = "the function has posted an error that is no JSON"
		f.Body = errorBody(f.Type, f.Message, "")
		if len(body) > 0 {
			f.Body = body
		}
	}
	return f
}
