package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// namedPrefix is where functions are called by name.
const namedPrefix = "/function/"

// entry is which way a request came in.
type entry struct {
	view      *state.View
	function  blixard.FunctionName
	qualifier string
	url       *blixard.FunctionURL // of a function URL; else nil
	named     bool                 // /function/<name>
	missed    bool                 // the view has no trigger or URL for it
	routeKey  string
	apiID     string
	path      string // escaped, as the function sees it
	prefix    string // what of the path was taken off
	param     string
	value     string
	identity  *Identity
}

// exchange is what one request needs; they are used again.
type exchange struct {
	g     *Gateway
	w     http.ResponseWriter
	r     *http.Request
	entry entry
	inv   blixard.Invocation
	head  blixard.HTTPRequest
	body  []byte
	event []byte
	out   answer
}

var exchanges = sync.Pool{New: func() any { return new(exchange) }}

// maxKept bounds the buffers of exchanges that are used again.
const maxKept = 256 << 10

func (x *exchange) free() {
	body, event, headers, buf := x.body[:0], x.event[:0], x.head.Headers[:0], x.out.buf[:0]
	if cap(body) > maxKept || cap(event) > maxKept || cap(buf) > maxKept {
		return
	}
	clear(headers[:cap(headers)])
	*x = exchange{body: body, event: event}
	x.head.Headers, x.out.buf = headers, buf
	exchanges.Put(x)
}

// ServeHTTP answers requests to function URLs, to functions by name
// (/function/<name>[:<qualifier>]/…) and to triggers, in that order. What is
// wrong is said as problem details (RFC 9457), at function URLs as AWS says it.
func (g *Gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	x, ok := exchanges.Get().(*exchange)
	if !ok {
		x = new(exchange)
	}
	x.g, x.w, x.r = g, w, r
	x.inv.Received = time.Now()
	if x.serve() {
		x.free()
	}
}

// serve tells whether nobody can hold on to what the exchange holds.
func (x *exchange) serve() bool {
	var err *Error
	if x.hasBody() {
		err = x.readUntil(x.inv.Received.Add(x.g.limits.Body))
	}
	if err == nil {
		err = x.enter()
	}
	if err == nil && x.entry.url != nil && x.cors() {
		return true
	}
	for _, step := range [...]func() *Error{x.authorize, x.readBody, x.verify} {
		if err == nil {
			err = step()
		}
	}
	if err != nil {
		x.fail(err)
		return true
	}
	return x.invoke()
}

// enter finds out what the request is for. A trigger or URL that is not known may
// have been made on another node a moment ago: then the newest state is asked for,
// now and then.
func (x *exchange) enter() *Error {
	err := x.enterBy(x.g.opt.View())
	if err == nil || !x.entry.missed {
		return err
	}
	v := x.g.fresh(x.r.Context())
	if v == nil {
		return err
	}
	x.w.Header().Del("Allow")
	x.entry = entry{}
	return x.enterBy(v)
}

// enterBy is enter by one view.
func (x *exchange) enterBy(v *state.View) *Error {
	r, e := x.r, &x.entry
	e.view, e.path = v, r.URL.EscapedPath()
	if id, ok := x.g.urlID(r.Host); ok {
		f, u := v.FunctionByURL(id)
		if u == nil || f.Deleting {
			e.missed = true
			return forbidden("null")
		}
		e.function, e.qualifier, e.url, e.routeKey, e.apiID = f.Name, u.Qualifier, u, "$default", id
		return nil
	}
	if r.Method == http.MethodConnect || !strings.HasPrefix(e.path, "/") {
		return refuse(http.StatusMethodNotAllowed, ReasonInvalid, blixard.CodeInvalid, "", "nothing is served this way here")
	}
	if rest, ok := strings.CutPrefix(e.path, namedPrefix); ok {
		return e.byName(rest)
	}
	m, allow, ok := x.g.routesOf(v).find(r.Method, r.Host, e.path)
	e.missed = !ok
	switch {
	case ok:
	case len(allow) > 0:
		x.w.Header()["Allow"] = []string{strings.Join(allow, ", ")}
		return refuse(http.StatusMethodNotAllowed, ReasonInvalid, blixard.CodeInvalid, "use "+strings.Join(allow, ", "), "the method %q is not served at this path", clip(r.Method))
	default:
		return refuse(http.StatusNotFound, ReasonNotFound, blixard.CodeNotFound, "`blixard function trigger NAME --http --path /…` makes one", "no trigger has the path %q", clip(e.path))
	}
	e.function, e.qualifier, e.apiID, e.param, e.value = m.function.Name, m.trigger.Qualifier, m.trigger.ID, m.name, unescape(m.rest)
	method := "ANY "
	if len(m.trigger.Methods) > 0 {
		method = r.Method + " "
	}
	e.routeKey = method + m.trigger.Path
	return nil
}

// clip shortens what strangers sent, for messages.
func clip(s string) string {
	const most = 100
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

// byName reads <name>[:<qualifier>]/….
func (e *entry) byName(rest string) *Error {
	head, below, _ := strings.Cut(rest, "/")
	name, qualifier, _ := strings.Cut(unescape(head), ":")
	if err := blixard.CheckFunctionName(name); err != nil {
		return errorOf(err)
	}
	if err := blixard.CheckQualifier(qualifier); err != nil {
		return errorOf(err)
	}
	e.function, e.qualifier, e.named, e.routeKey, e.apiID = blixard.FunctionName(name), qualifier, true, "$default", name
	e.prefix, e.path = namedPrefix+head, "/"+below
	return nil
}

func (x *exchange) hasBody() bool {
	return x.r.ContentLength != 0 && x.r.Body != nil && x.r.Body != http.NoBody
}

// readBody reads the request's body, which is not longer than a payload may be.
func (x *exchange) readBody() *Error {
	r, limit := x.r, x.g.limits.SyncBytes
	if !x.hasBody() {
		return nil
	}
	if r.ContentLength > limit {
		return tooLarge(r.ContentLength, limit)
	}
	var err error
	if x.body, err = appendAll(x.body, r.Body, limit); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return refuse(http.StatusRequestTimeout, ReasonInvalid, blixard.CodeInvalid, "", "the request did not arrive within %v", x.g.limits.Body)
		}
		return refuse(http.StatusBadRequest, ReasonInvalid, blixard.CodeInvalid, "", "the request's body cannot be read: %v", err)
	}
	if int64(len(x.body)) > limit {
		return tooLarge(int64(len(x.body)), limit)
	}
	return x.readUntil(time.Time{})
}

// readUntil bounds how long the client may take to send the request, also where
// the server reads what nobody else wants to.
func (x *exchange) readUntil(at time.Time) *Error {
	err := http.NewResponseController(x.w).SetReadDeadline(at)
	if err != nil && !errors.Is(err, http.ErrNotSupported) {
		return errorOf(err)
	}
	return nil
}

// appendAll is io.ReadAll into buf, up to one byte more than limit.
func appendAll(buf []byte, r io.Reader, limit int64) ([]byte, error) {
	for int64(len(buf)) <= limit {
		if len(buf) == cap(buf) {
			buf = append(buf, make([]byte, max(512, min(cap(buf), 1<<20)))...)[:len(buf)]
		}
		n, err := r.Read(buf[len(buf):min(int64(cap(buf)), limit+1)])
		buf = buf[:len(buf)+n]
		if err != nil {
			if errors.Is(err, io.EOF) {
				return buf, nil
			}
			return buf, err
		}
	}
	return buf, nil
}

// invoke calls the function and answers. It tells whether the call has ended as
// calls should, so that nothing is under way that reads the payload.
func (x *exchange) invoke() bool {
	g, r, inv, e := x.g, x.r, &x.inv, &x.entry
	ip := x.sourceIP()
	inv.RequestID, inv.Function, inv.Qualifier, inv.Caller = NewRequestID(), e.function, e.qualifier, ip
	if e.identity != nil {
		inv.Caller = e.identity.AccessKey
	}
	if inv.TraceID = r.Header.Get("X-Amzn-Trace-Id"); inv.TraceID == "" || len(inv.TraceID) > 512 {
		if inv.TraceID = traceOf(r.Header.Get("Traceparent")); inv.TraceID == "" {
			inv.TraceID = newTraceID(inv.Received)
		}
	}
	x.w.Header()["X-Amzn-Requestid"] = []string{inv.RequestID}
	target, err := g.resolve(r.Context(), inv)
	if err != nil {
		e := errorOf(err)
		g.metrics.refused(e)
		x.fail(e)
		return true
	}
	if target.raw() {
		x.request(ip)
		inv.HTTP, inv.Payload = &x.head, x.body
	} else {
		in := eventInput{
			request: r, body: x.body, path: e.path, routeKey: e.routeKey, apiID: e.apiID, accountID: "anonymous", identity: e.identity, param: e.param, value: e.value,
			requestID: inv.RequestID, sourceIP: ip, forwarded: x.forwarded(ip), traceID: inv.TraceID, now: inv.Received,
			fields: blixard.RuntimeKind(target.version.Spec.Runtime) == "nix",
		}
		if e.identity != nil {
			in.accountID = e.identity.AccountID
		}
		x.event = appendEvent(x.event, &in)
		inv.Payload = x.event
	}
	if e.named && strings.EqualFold(r.Header.Get("X-Amz-Invocation-Type"), "Event") {
		x.enqueue()
		return false
	}
	x.out.begin(x)
	inv.Stream = inv.HTTP != nil || x.out.streams()
	// What is not streamed runs to its end though the client may have left, as
	// functions do; a stream ends when nobody reads it any more.
	report, err := g.answer(context.WithoutCancel(r.Context()), inv, &target, &x.out)
	if err != nil {
		x.out.refused(errorOf(err))
		return false
	}
	x.out.end(&report)
	return report.Error == nil
}

// enqueue accepts the call for later.
func (x *exchange) enqueue() {
	if err := x.g.Enqueue(x.r.Context(), &x.inv); err != nil {
		x.fail(errorOf(err))
		return
	}
	x.w.WriteHeader(http.StatusAccepted)
}

// sourceIP is the client's address; behind a proxy that is trusted, the one that
// the proxy saw.
func (x *exchange) sourceIP() string {
	if x.g.opt.TrustForwarded {
		if all := x.r.Header["X-Forwarded-For"]; len(all) > 0 {
			last := all[len(all)-1]
			if i := strings.LastIndexByte(last, ','); i >= 0 {
				last = last[i+1:]
			}
			if last = strings.TrimSpace(last); last != "" && len(last) < 64 {
				return last
			}
		}
	}
	addr := x.r.RemoteAddr
	if i := strings.LastIndexByte(addr, ':'); i >= 0 {
		addr = addr[:i]
	}
	return strings.Trim(addr, "[]")
}

func (x *exchange) forwarded(ip string) forwarded {
	r := x.r
	f := forwarded{client: ip, proto: "http"}
	if r.TLS != nil {
		f.proto = "https"
	}
	if i := strings.LastIndexByte(r.Host, ':'); i >= 0 && strings.IndexByte(r.Host[i:], ']') < 0 {
		f.port = r.Host[i+1:]
	} else if r.TLS != nil {
		f.port = "443"
	} else {
		f.port = "80"
	}
	if x.g.opt.TrustForwarded {
		if all := r.Header["X-Forwarded-For"]; len(all) > 0 {
			f.client = strings.Join(all, ", ")
		}
		if p := r.Header.Get("X-Forwarded-Proto"); p == "http" || p == "https" {
			f.proto = p
		}
		if p := r.Header.Get("X-Forwarded-Port"); p != "" && len(p) <= 5 {
			f.port = p
		}
	}
	return f
}

// request makes the head of the request that an HTTP server in a guest gets.
func (x *exchange) request(ip string) {
	r, h, f := x.r, &x.head, x.forwarded(ip)
	h.Method, h.Host, h.Target = r.Method, r.Host, x.entry.path
	if r.URL.RawQuery != "" || r.URL.ForceQuery {
		h.Target += "?" + r.URL.RawQuery
	}
	listed := strings.Join(r.Header["Connection"], ",")
	for name, values := range r.Header { //order:any headers of one name keep theirs
		// Who expects to be asked for the body was asked.
		if hopByHop(name) || isForwarded(name) || name == "Expect" || listed != "" && lists(listed, name) {
			continue
		}
		for _, v := range values {
			h.Headers = append(h.Headers, [2]string{name, v})
		}
	}
	h.Headers = append(h.Headers, [2]string{"X-Amzn-Trace-Id", x.inv.TraceID}, [2]string{"X-Forwarded-For", f.client},
		[2]string{"X-Forwarded-Port", f.port}, [2]string{"X-Forwarded-Proto", f.proto}, [2]string{"X-Forwarded-Host", r.Host})
	if x.entry.prefix != "" {
		h.Headers = append(h.Headers, [2]string{"X-Forwarded-Prefix", x.entry.prefix})
	}
	if r.ContentLength < 0 { // it came in chunks and goes on whole
		h.Headers = append(h.Headers, [2]string{"Content-Length", strconv.Itoa(len(x.body))})
	}
}

// lists tells whether a Connection header names a header.
func lists(listed, name string) bool {
	for token := range strings.SplitSeq(listed, ",") {
		if strings.EqualFold(strings.TrimSpace(token), name) {
			return true
		}
	}
	return false
}

// problem is an error as the callers of triggers see it (RFC 9457).
type problem struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail"`
	Code   string `json:"code"`
	Reason string `json:"reason,omitempty"`
	Hint   string `json:"hint,omitempty"`
}

// fail answers with an error.
func (x *exchange) fail(e *Error) {
	h := x.w.Header()
	if e.RetryAfter > 0 {
		h["Retry-After"] = []string{strconv.Itoa(int((e.RetryAfter + time.Second - 1) / time.Second))}
	}
	if e.Status == http.StatusRequestEntityTooLarge || e.Status == http.StatusRequestTimeout {
		h["Connection"] = []string{"close"} // the rest of the request is not read
	}
	if x.entry.url != nil || e.Reason == reasonForbidden {
		x.failURL(e)
		return
	}
	if e.Status == http.StatusUnauthorized {
		h["Www-Authenticate"] = []string{`Bearer realm="blixard"`}
	}
	detail, hint := e.Err.Message, e.Err.Hint
	if !x.entry.named && (e.Status >= http.StatusInternalServerError || e.Throttled()) {
		detail, hint = strangersDetail(e), "" // anybody may ask here, and learns nothing of nodes and code
	}
	body, err := json.Marshal(problem{
		Type: "https://blixard.dev/problems/" + string(e.Err.Code), Title: http.StatusText(e.Status), Status: e.Status, Detail: detail,
		Code: string(e.Err.Code), Reason: e.Reason, Hint: hint,
	})
	if err != nil { // plain strings and numbers always marshal
		body = []byte("{}")
	}
	x.write(e.Status, "application/problem+json", append(body, '\n'))
}

// strangersDetail is what callers of triggers are told when things go wrong.
func strangersDetail(e *Error) string {
	switch {
	case e.Throttled():
		return "there are more calls than may be answered now"
	case e.Reason == reasonFunction:
		return "what answers here has failed"
	case e.Reason == ReasonTimeout:
		return "there was no answer in time"
	case e.Reason == ReasonNodeLost:
		return "who had the call in hand is gone; it may have been done"
	case e.Reason == ReasonTooLarge, e.Reason == ReasonInvalid:
		return "what answers here gave no answer that can be passed on"
	}
	return "nobody can answer now"
}

// write sends a whole answer.
func (x *exchange) write(status int, contentType string, body []byte) {
	h := x.w.Header()
	if contentType != "" {
		h["Content-Type"] = []string{contentType}
	}
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	if status == http.StatusNoContent || status == http.StatusNotModified {
		delete(h, "Content-Length")
	}
	x.w.WriteHeader(status)
	if x.r.Method == http.MethodHead || len(body) == 0 {
		return
	}
	if _, err := x.w.Write(body); err != nil {
		x.g.metrics.left.Inc() // the client has left
	}
}
