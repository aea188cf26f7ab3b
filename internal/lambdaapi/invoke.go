package lambdaapi

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// The types of invocations.
const (
	invocationSync   = "RequestResponse"
	invocationAsync  = "Event"
	invocationDryRun = "DryRun"
)

const (
	maxClientContext = 3583
	maxLogTail       = 4 << 10
)

func (c *call) invocationType() string {
	if c.op.name == "InvokeAsync" {
		return invocationAsync
	}
	if t := c.r.Header.Get("X-Amz-Invocation-Type"); t != "" {
		return t
	}
	return invocationSync
}

func (c *call) payloadLimit() int64 {
	if c.invocationType() == invocationAsync {
		return c.s.opt.Limits.AsyncBytes
	}
	return c.s.opt.Limits.SyncBytes
}

// invocation makes the invocation that a request asks for.
func (c *call) invocation() (*blixard.Invocation, error) {
	t, err := c.functionTarget()
	if err != nil {
		return nil, err
	}
	h := c.r.Header
	var v violations
	types := []string{invocationAsync, invocationSync, invocationDryRun}
	if c.op.name == "InvokeWithResponseStream" {
		types = types[1:]
	}
	v.oneOf("invocationType", c.invocationType(), types...)
	v.oneOf("logType", h.Get("X-Amz-Log-Type"), "None", "Tail")
	if err := v.err(); err != nil {
		return nil, err
	}
	switch context := h.Get("X-Amz-Client-Context"); {
	case h.Get("X-Amz-Durable-Execution-Name") != "":
		return nil, invalidParameter("Blixard does not know durable executions")
	case h.Get("X-Amz-Tenant-Id") != "":
		return nil, invalidParameter("Blixard does not know tenants: the function was not created with tenant isolation")
	case len(context) > maxClientContext:
		return nil, invalidParameter("The client context is %d bytes long; at most %d are allowed", len(context), maxClientContext)
	case context != "" && !isBase64JSON(context):
		return nil, refuse("InvalidRequestContentException", "Client context must be a valid Base64-encoded JSON object.")
	}
	if err := c.callable(t); err != nil {
		return nil, err
	}
	payload := c.body
	if len(payload) == 0 {
		payload = []byte("{}")
	}
	if !json.Valid(payload) {
		return nil, refuse("InvalidRequestContentException", "Could not parse request body into json: %v", jsonError(payload))
	}
	inv := &blixard.Invocation{
		RequestID: c.requestID, Function: t.name, Qualifier: t.qualifier, Payload: payload, TraceID: c.traceID(),
		LogTail: h.Get("X-Amz-Log-Type") == "Tail", Caller: c.keyID, Received: c.now,
	}
	if c.invocationType() != invocationAsync {
		inv.ClientContext = h.Get("X-Amz-Client-Context")
	}
	return inv, nil
}

func isBase64JSON(text string) bool {
	raw, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return false
	}
	raw = bytes.TrimSpace(raw)
	return json.Valid(raw) && raw[0] == '{'
}

// jsonError says what is wrong with what is no JSON.
func jsonError(data []byte) error {
	var v json.RawMessage
	if err := json.Unmarshal(data, &v); err != nil {
		return err
	}
	return errNotJSON
}

// traceID is the caller's trace, or a new one.
func (c *call) traceID() string {
	if id := c.r.Header.Get("X-Amzn-Trace-Id"); id != "" && len(id) <= 512 {
		return id
	}
	id := strings.ReplaceAll(newUUID(), "-", "")
	return "Root=1-" + hex.EncodeToString([]byte{byte(c.now.Unix() >> 24), byte(c.now.Unix() >> 16), byte(c.now.Unix() >> 8), byte(c.now.Unix())}) + "-" + id[:24]
}

// callable tells why a function cannot be called. The view at hand is enough
// when it says yes: a warm call waits for no other node.
func (c *call) callable(t target) error {
	if c.callableIn(c.s.opt.Backend.View(), t) == nil {
		return nil
	}
	view, err := c.view()
	if err != nil {
		return err
	}
	return c.callableIn(view, t)
}

func (c *call) callableIn(view *state.View, t target) error {
	_, fv, err := c.s.find(view, t)
	if err != nil {
		return err
	}
	if fv.Callable() != nil {
		return nil
	}
	return c.notActive(fv)
}

func (c *call) notActive(fv *blixard.FunctionVersion) error {
	if fv.State == blixard.FunctionPending {
		return refuse("ResourceConflictException", "The operation cannot be performed at this time. The function is currently in the following state: Pending")
	}
	return refuse("ResourceConflictException", "The operation cannot be performed at this time. The function is currently in the following state: %s (%s)", fv.State, fv.StateReason)
}

// invocationError puts why the function did not answer into the API's words.
func (c *call) invocationError(inv *blixard.Invocation, err error) error {
	f, ok := errors.AsType[failure](err)
	if !ok {
		return err
	}
	status, reason, _, after := f.Failure()
	text := f.Error()
	if e, ok := errors.AsType[*blixard.Error](err); ok {
		text = e.Error()
	}
	seconds := int((after + time.Second - 1) / time.Second)
	switch {
	case status == http.StatusNotFound:
		return c.s.notFound(target{name: inv.Function, qualifier: inv.Qualifier})
	case reason == "NotActive":
		return refuse("ResourceConflictException", "The operation cannot be performed at this time: %s", text)
	case status == http.StatusRequestEntityTooLarge:
		return refuse("RequestTooLargeException", "%s", text)
	case status == http.StatusTooManyRequests:
		e := throttled(reason)
		e.RetryAfter = max(seconds, 1)
		return e
	case status == http.StatusBadRequest:
		return refuse("InvalidRequestContentException", "%s", text)
	case status == http.StatusForbidden:
		return refuse("AccessDeniedException", "%s", text)
	case status >= 500:
		return &exception{Type: "ServiceException", Message: text, Reason: reason, RetryAfter: seconds, status: status}
	}
	return err
}

func (c *call) invoke() error {
	inv, err := c.invocation()
	if err != nil {
		return err
	}
	c.w.Header().Set("X-Amzn-Trace-Id", inv.TraceID)
	switch c.invocationType() {
	case invocationDryRun:
		return c.answer(http.StatusNoContent, nil)
	case invocationAsync:
		if err := c.s.opt.Invoker.Enqueue(c.r.Context(), inv); err != nil {
			return c.invocationError(inv, err)
		}
		c.w.Header().Set("Content-Length", "0")
		return c.answer(http.StatusAccepted, nil)
	}
	sink := &buffer{}
	report, err := c.s.opt.Invoker.Invoke(c.r.Context(), inv, sink)
	if err != nil {
		return c.invocationError(inv, err)
	}
	body := sink.body.Bytes()
	if sink.head.Status != 0 && report.Error == nil {
		if body, err = encodeHTTP(&sink.head, body); err != nil {
			return err
		}
	}
	c.reportHeaders(&report)
	h := c.w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	c.w.WriteHeader(http.StatusOK)
	if _, err := c.w.Write(body); err != nil {
		return nil //nolint:nilerr // the client has left: there is nobody to tell
	}
	return nil
}

// invokeAsync is the old way of asynchronous calls.
func (c *call) invokeAsync() error {
	inv, err := c.invocation()
	if err != nil {
		return err
	}
	if err := c.s.opt.Invoker.Enqueue(c.r.Context(), inv); err != nil {
		return c.invocationError(inv, err)
	}
	return c.answer(http.StatusAccepted, struct{ Status int }{http.StatusAccepted})
}

// reportHeaders tells what became of a call, and where its time went.
func (c *call) reportHeaders(r *blixard.InvocationReport) {
	h := c.w.Header()
	h.Set("X-Amz-Executed-Version", blixard.VersionName(r.Number))
	if r.Error != nil {
		kind := r.Error.Kind
		if kind == "" {
			kind = "Unhandled"
		}
		h.Set("X-Amz-Function-Error", kind)
	}
	if len(r.Log) > 0 {
		h.Set("X-Amz-Log-Result", logTail(r.Log))
	}
	h.Set("X-Blixard-Start", string(r.Start))
	h.Set("X-Blixard-Node", string(r.Node))
	var parts []string
	for _, p := range []struct {
		name string
		took time.Duration
	}{
		{"queue", r.Parts.Queue}, {"place", r.Parts.Place}, {"commit", r.Parts.Commit}, {"spawn", r.Parts.Spawn}, {"restore", r.Parts.Restore}, {"boot", r.Parts.Boot},
		{"init", r.Parts.Init}, {"handler", r.Parts.Handler}, {"transfer", r.Parts.Transfer}, {"total", r.Parts.Total},
	} {
		if p.took > 0 {
			parts = append(parts, fmt.Sprintf("%s;dur=%.3f", p.name, float64(p.took)/1e6))
		}
	}
	if len(parts) > 0 {
		h.Set("Server-Timing", strings.Join(parts, ", "))
	}
}

// logTail is the last 4 KiB of a log, as headers and events carry it.
func logTail(log []byte) string {
	return base64.StdEncoding.EncodeToString(log[max(0, len(log)-maxLogTail):])
}

// buffer holds an answer until it is known whether it is an error. Who calls
// bounds its size.
type buffer struct {
	head blixard.ResponseHead
	body bytes.Buffer
}

// Begin implements blixard.ResponseSink.
func (b *buffer) Begin(head blixard.ResponseHead) error {
	b.head = head
	b.head.Headers = slices.Clone(head.Headers)
	return nil
}

// Write implements blixard.ResponseSink.
func (b *buffer) Write(p []byte) (int, error) { return b.body.Write(p) }

// encodeHTTP writes an HTTP answer as a payload: function URLs and API gateways
// read it back.
func encodeHTTP(head *blixard.ResponseHead, body []byte) ([]byte, error) {
	out := struct {
		StatusCode      int               `json:"statusCode"`
		Headers         map[string]string `json:"headers"`
		Cookies         []string          `json:"cookies,omitempty"`
		Body            string            `json:"body"`
		IsBase64Encoded bool              `json:"isBase64Encoded"`
	}{StatusCode: head.Status, Body: string(body)}
	out.Headers, out.Cookies = httpHeaders(head)
	if !utf8.Valid(body) {
		out.Body, out.IsBase64Encoded = base64.StdEncoding.EncodeToString(body), true
	}
	return encodeJSON(out)
}

func httpHeaders(head *blixard.ResponseHead) (headers map[string]string, cookies []string) {
	headers = make(map[string]string, len(head.Headers))
	for _, h := range head.Headers {
		name := strings.ToLower(h[0])
		if name == "set-cookie" {
			cookies = append(cookies, h[1])
			continue
		}
		if before, ok := headers[name]; ok {
			headers[name] = before + "," + h[1]
		} else {
			headers[name] = h[1]
		}
	}
	if head.ContentType != "" && headers["content-type"] == "" {
		headers["content-type"] = head.ContentType
	}
	return headers, cookies
}
