package api

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"google.golang.org/protobuf/proto"
)

const (
	unaryReadBytes    = 8 << 10          // a request that is to be answered here fits into it
	unaryFirstFor     = 10 * time.Second // as long as net/http waits for a request's header
	unaryIdleFor      = 2 * time.Minute
	unaryWriteTimeout = 30 * time.Second
)

// Listen wraps a listener whose connections are to be served by an http.Server
// of this handler: connections on which a client of the Connect protocol makes
// short unary calls over HTTP/1.1 are served by one goroutine each, which reads,
// answers and writes. net/http starts a second goroutine for every request and
// interrupts it again, which costs more than such a call itself.
//
// Nothing is interpreted that is out of the ordinary: unless a request lies
// complete in the first read, is a POST of a known unary procedure, and every
// header is understood, the connection goes to net/http with all bytes that were
// read, and stays there. So limits, timeouts and every other protocol are
// net/http's.
//
// Close closes the connections that are served here and waits for them.
func (h *Handler) Listen(inner net.Listener) net.Listener {
	ctx, cancel := context.WithCancel(context.Background())
	l := &unaryListener{Listener: inner, h: h, ctx: ctx, cancel: cancel, other: make(chan net.Conn), failed: make(chan error, 1), conns: map[net.Conn]bool{}}
	l.wg.Go(l.accept)
	return l
}

type unaryListener struct {
	net.Listener
	h      *Handler
	ctx    context.Context //nolint:containedctx // of every call, ended by Close
	cancel context.CancelFunc
	other  chan net.Conn // for net/http
	failed chan error    // of accepting, room for one
	wg     sync.WaitGroup

	mu     sync.Mutex
	conns  map[net.Conn]bool // served here
	closed bool
}

// Accept implements net.Listener, for net/http.
func (l *unaryListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.other:
		return c, nil
	case err := <-l.failed:
		l.failed <- err // for the next call
		return nil, err
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *unaryListener) Close() error {
	err := l.Listener.Close()
	l.cancel()
	l.mu.Lock()
	l.closed = true
	for c := range l.conns {
		l.h.closeConn(c)
	}
	l.mu.Unlock()
	l.wg.Wait()
	return err
}

func (l *unaryListener) accept() {
	for backoff := time.Millisecond; ; {
		c, err := l.Listener.Accept()
		switch {
		case err == nil:
			backoff = time.Millisecond
			if l.track(c) {
				l.wg.Go(func() { l.serve(c) })
			}
			continue
		case !temporary(err) || l.ctx.Err() != nil:
			l.failed <- err
			return
		}
		// Out of file descriptors, most likely: some connection will end.
		l.h.opt.Log.Warn("accepting a connection", "error", err)
		select {
		case <-time.After(backoff):
		case <-l.ctx.Done():
		}
		backoff = min(2*backoff, time.Second)
	}
}

func temporary(err error) bool {
	ne, ok := err.(interface{ Temporary() bool }) // as net/http does
	return ok && ne.Temporary()
}

func (l *unaryListener) track(c net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		l.h.closeConn(c)
		return false
	}
	l.conns[c] = true
	return true
}

// untrack tells whether the connection is still ours to give away.
func (l *unaryListener) untrack(c net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.conns, c)
	return !l.closed
}

func (h *Handler) closeConn(c net.Conn) {
	if err := c.Close(); err != nil {
		h.opt.Log.Debug("closing a connection", "error", err)
	}
}

// serve answers calls until the connection ends or another has to serve it.
func (l *unaryListener) serve(c net.Conn) {
	br := bufio.NewReaderSize(c, unaryReadBytes)
	u := &unaryCall{l: l, peer: c.RemoteAddr().String()}
	for patience := unaryFirstFor; ; patience = unaryIdleFor {
		err := c.SetReadDeadline(time.Now().Add(patience))
		if err == nil {
			_, err = br.Peek(1)
		}
		if err != nil {
			l.untrack(c)
			l.h.closeConn(c)
			return
		}
		data, err := br.Peek(br.Buffered())
		if err != nil || !u.parse(data) {
			l.give(c, data)
			return
		}
		ok := u.answer()
		if err = c.SetWriteDeadline(time.Now().Add(unaryWriteTimeout)); err == nil && ok {
			_, err = c.Write(u.out)
		}
		if err == nil && ok {
			_, err = br.Discard(u.size)
		}
		if err != nil || !ok {
			l.untrack(c)
			l.h.closeConn(c)
			return
		}
		if cap(u.out) > maxKeepBytes {
			u.out = nil
		}
	}
}

// maxKeepBytes bounds what a connection keeps between calls.
const maxKeepBytes = 64 << 10

// give hands a connection to net/http, with what was read of it.
func (l *unaryListener) give(c net.Conn, read []byte) {
	err := c.SetDeadline(time.Time{})
	if !l.untrack(c) || err != nil {
		l.h.closeConn(c)
		return
	}
	select {
	case l.other <- &readConn{Conn: c, read: bytes.Clone(read)}:
	case <-l.ctx.Done():
		l.h.closeConn(c)
	}
}

// readConn is a connection of which something was read already.
type readConn struct {
	net.Conn
	read []byte
}

func (c *readConn) Read(p []byte) (int, error) {
	if len(c.read) > 0 {
		n := copy(p, c.read)
		if c.read = c.read[n:]; len(c.read) == 0 {
			c.read = nil
		}
		return n, nil
	}
	return c.Conn.Read(p)
}

// unaryCall is one request and its answer; it is used again for the next.
type unaryCall struct {
	l    *unaryListener
	peer string

	spec connect.Spec
	info *connect.CallInfo
	body []byte // of the request; part of the connection's buffer
	size int    // of the whole request
	// timeout is how long the caller waits, the handler's own if it does not say.
	timeout time.Duration
	read    bool // the body was received
	sent    bool
	msg     []byte // the answer's
	out     []byte
}

// parse understands a request that lies complete at the beginning of data, and
// nothing else.
func (u *unaryCall) parse(data []byte) bool {
	head := bytes.Index(data, []byte("\r\n\r\n"))
	line, rest, _ := bytes.Cut(data[:max(head, 0)], []byte("\r\n"))
	path, found := bytes.CutPrefix(line, []byte("POST "))
	path, versioned := bytes.CutSuffix(path, []byte(" HTTP/1.1"))
	if head < 0 || !found || !versioned {
		return false
	}
	spec, known := u.l.h.unary[string(path)]
	if !known {
		return false
	}
	u.spec, u.info = spec, &connect.CallInfo{Spec: spec, PeerAddr: u.peer, Protocol: "connect", Codec: "proto", RequestEncoding: "identity", ResponseEncoding: "identity"}
	u.timeout = u.l.h.timeout
	length, hosts, typed := -1, 0, false
	for len(rest) > 0 {
		line, rest, _ = bytes.Cut(rest, []byte("\r\n"))
		name, value, ok := bytes.Cut(line, []byte(":"))
		value = bytes.Trim(value, " \t")
		if !ok || !ordinary(name, value) {
			return false
		}
		switch key := http.CanonicalHeaderKey(string(name)); key {
		case "Content-Length":
			n, err := strconv.ParseUint(string(value), 10, 31)
			if err != nil || length >= 0 || value[0] == '+' {
				return false
			}
			length = int(n)
		case "Content-Type":
			if typed || string(value) != "application/proto" {
				return false
			}
			typed = true
		case "Host":
			if hosts++; hosts > 1 || len(value) == 0 {
				return false
			}
		case "Connect-Protocol-Version":
			if string(value) != "1" {
				return false
			}
		case "Accept", "Accept-Encoding": // the answer is what these cannot exclude: its own type, unencoded
		case "Transfer-Encoding", "Content-Encoding", "Expect", "Upgrade", "Connection", "Te", "Trailer":
			return false
		case "Connect-Timeout-Ms":
			n, err := strconv.ParseUint(string(value), 10, 34)
			if err != nil || len(value) > 10 {
				return false
			}
			u.timeout = time.Duration(n) * time.Millisecond
		default:
			u.info.RequestHeader().Add(key, string(value))
		}
	}
	if !typed || hosts != 1 || length < 0 || len(data)-head-4 < length {
		return false
	}
	u.size = head + 4 + length
	u.body, u.read, u.sent, u.msg = data[head+4:u.size], false, false, u.msg[:0]
	return true
}

// ordinary tells whether a header has nothing that readers could differ about.
func ordinary(name, value []byte) bool {
	for _, b := range name {
		if b != '-' && (b < '0' || b > '9') && (b|0x20 < 'a' || b|0x20 > 'z') {
			return false
		}
	}
	for _, b := range value {
		if b < ' ' || b == 0x7f {
			return false
		}
	}
	return len(name) > 0
}

// answer makes the call and its answer; false ends the connection.
func (u *unaryCall) answer() (ok bool) {
	defer func() {
		if p := recover(); p != nil {
			if p != http.ErrAbortHandler { //nolint:errorlint // compared as net/http does
				u.l.h.opt.Log.Error("a request ran into a bug", "procedure", u.spec.Procedure, "panic", p, "stack", string(debug.Stack()))
			}
			ok = false
		}
	}()
	ctx := u.l.ctx
	if u.timeout < u.l.h.timeout { // guard sets the handler's own
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, u.timeout)
		defer cancel()
	}
	err := u.l.h.rest.server.Call(ctx, u.spec.Procedure, u.info, u)
	if err == nil && !u.sent {
		err = connect.NewError(connect.CodeInternal, "the call has no answer")
	}
	w := answerWriter{header: http.Header{}, status: http.StatusOK, body: u.msg}
	if err != nil {
		w.body = nil
		if err := errorWriter.Write(&w, &http.Request{Method: http.MethodPost, Header: http.Header{"Content-Type": {"application/proto"}}}, err); err != nil {
			u.l.h.opt.Log.Error("encoding an error", slog.String("procedure", u.spec.Procedure), slog.Any("error", err))
			return false
		}
	} else {
		w.header["Content-Type"] = protoType
	}
	u.encode(&w)
	return true
}

var (
	errorWriter = connecthttp.NewErrorWriter()
	protoType   = []string{"application/proto"}
)

func (u *unaryCall) encode(w *answerWriter) {
	b := append(u.out[:0], "HTTP/1.1 "...)
	b = strconv.AppendInt(b, int64(w.status), 10)
	b = append(append(append(b, ' '), http.StatusText(w.status)...), "\r\nDate: "...)
	b = append(time.Now().UTC().AppendFormat(b, http.TimeFormat), "\r\nContent-Length: "...)
	b = append(strconv.AppendInt(b, int64(len(w.body)), 10), "\r\n"...)
	line := func(prefix, name, value string) {
		b = append(append(append(append(append(b, prefix...), name...), ": "...), value...), "\r\n"...)
	}
	for name, values := range w.header {
		for _, v := range values {
			line("", name, v)
		}
	}
	for name, values := range u.info.ResponseHeader().All() {
		for _, v := range values {
			line("", name, v)
		}
	}
	for name, values := range u.info.ResponseTrailer().All() {
		for _, v := range values {
			line("Trailer-", name, v)
		}
	}
	u.out = append(append(b, "\r\n"...), w.body...)
}

// Receive implements connect.ServerStream.
func (u *unaryCall) Receive(msg any) error {
	if u.read {
		return io.EOF
	}
	u.read = true
	m, ok := msg.(proto.Message)
	if !ok {
		return connect.Errorf(connect.CodeInternal, "%T is no message", msg)
	}
	if err := proto.Unmarshal(u.body, m); err != nil {
		return connect.Errorf(connect.CodeInvalidArgument, "unmarshal message: %v", err)
	}
	return nil
}

// SendHeaders implements connect.ServerStream: they go with the answer.
func (u *unaryCall) SendHeaders() error { return nil }

// Send implements connect.ServerStream.
func (u *unaryCall) Send(msg any) error {
	m, ok := msg.(proto.Message)
	if !ok || u.sent {
		return connect.Errorf(connect.CodeInternal, "an answer is one message, not %T", msg)
	}
	u.sent = true
	var err error
	if u.msg, err = (proto.MarshalOptions{}).MarshalAppend(u.msg[:0], m); err != nil {
		return connect.Errorf(connect.CodeInternal, "marshal message: %v", err)
	}
	return nil
}

// answerWriter is an http.ResponseWriter in memory.
type answerWriter struct {
	header http.Header
	status int
	body   []byte
}

func (w *answerWriter) Header() http.Header    { return w.header }
func (w *answerWriter) WriteHeader(status int) { w.status = status }
func (w *answerWriter) Write(b []byte) (int, error) {
	w.body = append(w.body, b...)
	return len(b), nil
}
