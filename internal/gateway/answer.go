package gateway

import (
	"bytes"
	"errors"
	"net/http"
	"net/textproto"
	"strings"
	"time"

	"github.com/blixard/blixard"
)

// answer takes a function's answer and makes an HTTP answer of it: as it comes,
// or, if it is short or has to be taken apart, when it is whole.
type answer struct {
	x       *exchange
	head    blixard.ResponseHead
	phase   phase
	buf     []byte
	written int64
	bounded bool   // the connection has a deadline for what is written
	err     *Error // why the answer was not taken to its end
}

// phase is what becomes of the answer's bytes.
type phase uint8

const (
	waiting    phase = iota // nothing has come
	collecting              // into buf
	prelude                 // into buf, until the end of the prelude
	live                    // to the client
)

const (
	// integration is the content type of streams that begin with a prelude: JSON
	// with status, headers and cookies, then 8 NUL bytes.
	integration = "application/vnd.awslambda.http-integration-response"
	maxPrelude  = 64 << 10
	// maxHeld is how much of a plain HTTP answer is held back, so that its
	// headers can tell how long it took.
	maxHeld = 64 << 10
)

var preludeEnd = make([]byte, 8)

func (a *answer) begin(x *exchange) { a.x, a.phase = x, waiting }

// Begin implements blixard.ResponseSink.
func (a *answer) Begin(h blixard.ResponseHead) error {
	a.head, a.phase = h, collecting
	switch {
	case h.Status != 0:
		if h.Streaming { // others are short, mostly
			a.start(h.Status, h.Headers)
		}
	case h.Streaming && a.streams() && isIntegration(h.ContentType):
		a.phase = prelude
	case h.Streaming && a.x.entry.url == nil && strings.HasPrefix(h.ContentType, "application/json"):
		// Many runtimes send any answer in pieces: this one is to be mapped.
	case h.Streaming && a.streams():
		kind := h.ContentType
		if kind == "" {
			kind = "application/octet-stream"
		}
		a.x.w.Header()["Content-Type"] = []string{kind}
		a.start(http.StatusOK, h.Headers)
	}
	if a.phase == live && h.Streaming {
		return flush(a.x.w)
	}
	return nil
}

// flush sends what was written; where that cannot be asked for it goes by itself.
func flush(w http.ResponseWriter) error {
	if err := http.NewResponseController(w).Flush(); !errors.Is(err, http.ErrNotSupported) {
		return err
	}
	return nil
}

// streams tells whether a stream is passed on as it comes.
func (a *answer) streams() bool {
	u := a.x.entry.url
	return u == nil || u.InvokeMode == "RESPONSE_STREAM"
}

func isIntegration(contentType string) bool {
	return strings.HasPrefix(contentType, integration)
}

// start sends the head of a live answer.
func (a *answer) start(status int, headers [][2]string) {
	a.phase = live
	a.copyHeaders(headers)
	a.x.w.WriteHeader(checkStatus(status))
}

// checkStatus makes an error of what cannot be the status of an answer.
func checkStatus(status int) int {
	if status < 200 || status > 599 {
		return http.StatusBadGateway
	}
	return status
}

// copyHeaders takes the function's headers that concern the client.
func (a *answer) copyHeaders(headers [][2]string) {
	h := a.x.w.Header()
	ours := a.x.entry.url != nil && a.x.entry.url.CORS != nil
	listed := ""
	for _, p := range headers {
		if strings.EqualFold(p[0], "Connection") {
			listed += p[1] + ","
		}
	}
	for _, p := range headers {
		name := textproto.CanonicalMIMEHeaderKey(p[0])
		switch {
		case hopByHop(name), listed != "" && lists(listed, name), name == "X-Amzn-Requestid", name == "Server-Timing" && a.phase != live:
		case ours && strings.HasPrefix(name, "Access-Control-"):
		case name == "Content-Type", name == "Content-Length", name == "Date":
			h[name] = []string{p[1]}
		default:
			h[name] = append(h[name], p[1])
		}
	}
	if h["Content-Type"] == nil {
		h["Content-Type"] = nil // net/http does not guess
	}
}

// Write implements blixard.ResponseSink.
func (a *answer) Write(p []byte) (int, error) {
	switch a.phase {
	case live:
		return a.send(p)
	case prelude:
		return len(p), a.takePrelude(p)
	case waiting, collecting:
	}
	g := a.x.g
	if a.head.Status != 0 && len(a.buf)+len(p) > maxHeld { // it said that it was short
		a.start(a.head.Status, a.head.Headers)
		if _, err := a.send(a.buf); err != nil {
			return 0, err
		}
		return a.send(p)
	}
	if int64(len(a.buf)+len(p)) > g.limits.ResponseBytes {
		a.err = refuse(http.StatusBadGateway, ReasonTooLarge, blixard.CodeInvalid, "return less, or stream it", "the answer of %s has more than %d bytes", a.x.inv.Function, g.limits.ResponseBytes)
		return 0, a.err
	}
	a.buf = append(a.buf, p...)
	return len(p), nil
}

// send passes bytes on.
func (a *answer) send(p []byte) (int, error) {
	a.written += int64(len(p))
	if a.written > a.x.g.limits.StreamBytes {
		a.err = refuse(http.StatusBadGateway, ReasonTooLarge, blixard.CodeInvalid, "", "the streamed answer of %s has more than %d bytes", a.x.inv.Function, a.x.g.limits.StreamBytes)
		return 0, a.err
	}
	if a.x.r.Method == http.MethodHead {
		return len(p), nil
	}
	// Who does not read would hold an instance.
	if err := a.writeUntil(time.Now().Add(a.x.g.limits.Body)); err != nil {
		return 0, err
	}
	n, err := a.x.w.Write(p)
	if err == nil && a.head.Streaming {
		err = flush(a.x.w)
	}
	return n, err
}

// writeUntil bounds how long the client may take to read; the zero time ends that.
func (a *answer) writeUntil(at time.Time) error {
	err := http.NewResponseController(a.x.w).SetWriteDeadline(at)
	if errors.Is(err, http.ErrNotSupported) {
		return nil
	}
	a.bounded = !at.IsZero()
	return err
}

// takePrelude looks for the end of the prelude, and goes live.
func (a *answer) takePrelude(p []byte) error {
	from := max(0, len(a.buf)-len(preludeEnd))
	a.buf = append(a.buf, p...)
	at := bytes.Index(a.buf[from:], preludeEnd)
	if at < 0 {
		if len(a.buf) > maxPrelude {
			a.err = refuse(http.StatusBadGateway, ReasonInvalid, blixard.CodeInvalid, "", "the answer of %s has no prelude", a.x.inv.Function)
			return a.err
		}
		return nil
	}
	head, body := a.buf[:from+at], a.buf[from+at+len(preludeEnd):]
	m, ok := parsePrelude(head)
	if !ok {
		a.err = refuse(http.StatusBadGateway, ReasonInvalid, blixard.CodeInvalid, "", "the prelude of the answer of %s is not usable", a.x.inv.Function)
		return a.err
	}
	a.mapped(&m)
	a.phase = live
	a.x.w.WriteHeader(m.status)
	_, err := a.send(body)
	return err
}

// mapped sets the headers of a mapped answer.
func (a *answer) mapped(m *mappedResponse) {
	h := a.x.w.Header()
	h["Content-Type"] = []string{"application/json"}
	a.copyHeaders(m.headers)
	if len(m.cookies) > 0 {
		h["Set-Cookie"] = append(h["Set-Cookie"], m.cookies...)
	}
}

// end answers after the function has.
func (a *answer) end(report *blixard.InvocationReport) {
	switch {
	case a.err != nil:
		a.refused(a.err)
	case report.Error != nil:
		a.failed(report.Error)
	case a.phase == live:
	case a.phase == prelude:
		a.refused(refuse(http.StatusBadGateway, ReasonInvalid, blixard.CodeInvalid, "", "the answer of %s ended in its prelude", a.x.inv.Function))
	default:
		a.whole(report)
	}
	if a.bounded {
		if err := a.writeUntil(time.Time{}); err != nil {
			panic(http.ErrAbortHandler) // the connection is over
		}
	}
}

// whole answers with what was collected.
func (a *answer) whole(report *blixard.InvocationReport) {
	x := a.x
	if len(a.buf) > maxHeld {
		if err := a.writeUntil(time.Now().Add(x.g.limits.Body)); err != nil {
			panic(http.ErrAbortHandler) // the connection is over
		}
	}
	h := x.w.Header()
	h["Server-Timing"] = []string{report.Parts.ServerTiming()}
	h["X-Blixard-Start"] = []string{string(report.Start)}
	h["X-Blixard-Node"] = []string{string(report.Node)}
	if a.head.Status != 0 {
		a.copyHeaders(a.head.Headers)
		kept := h["Content-Length"]
		if x.r.Method == http.MethodHead && len(a.buf) == 0 && kept != nil {
			x.w.WriteHeader(checkStatus(a.head.Status))
			return
		}
		x.write(checkStatus(a.head.Status), "", a.buf)
		return
	}
	take := mapResponse
	if isIntegration(a.head.ContentType) {
		take = wholePrelude
	}
	m, ok := take(a.buf)
	if !ok {
		a.refused(refuse(http.StatusBadGateway, ReasonInvalid, blixard.CodeInvalid, "return JSON", "the answer of %s is not usable as an HTTP answer", x.inv.Function))
		return
	}
	a.mapped(&m)
	delete(h, "Content-Length")
	x.write(m.status, "", m.body)
}

// failed answers for a function that has failed: no more than that is told.
func (a *answer) failed(e *blixard.FunctionError) {
	if a.phase == live {
		panic(http.ErrAbortHandler) // the client has to see that the answer is cut off
	}
	x := a.x
	x.w.Header()["X-Amz-Function-Error"] = []string{e.Kind}
	if x.entry.url != nil {
		x.write(http.StatusBadGateway, "text/plain", []byte("Internal Server Error"))
		return
	}
	status, what := http.StatusBadGateway, "has failed"
	if e.Type == "Sandbox.Timedout" {
		status, what = http.StatusGatewayTimeout, "has not answered in its time"
	}
	f := refuse(status, reasonFunction, blixard.CodeUnavailable, "`blixard function logs "+string(x.inv.Function)+"` shows why", "the function %s %s", x.inv.Function, what)
	x.fail(f)
}

// refused answers for a call that no function has answered.
func (a *answer) refused(e *Error) {
	if a.phase == live {
		panic(http.ErrAbortHandler)
	}
	if a.err != nil {
		e = a.err
	}
	h := a.x.w.Header()
	for name := range h { //order:any each by itself
		if name != "X-Amzn-Requestid" && !strings.HasPrefix(name, "Access-Control-") && name != "Vary" {
			delete(h, name)
		}
	}
	a.x.fail(e)
}
