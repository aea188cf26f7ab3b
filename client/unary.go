package client

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Bounds of unaryHTTP.
const (
	maxUnaryBytes  = 1 << 20 // of a request's body; larger ones go through net/http
	maxIdleConns   = 512     // per node
	idleConnFor    = 60 * time.Second
	maxHeaderBytes = 64 << 10 // of an answer
	readAheadBytes = 4 << 10
	maxWholeBytes  = 256 << 10 // answers up to here are read whole
)

// unaryHTTP is what unary calls without TLS go through: HTTP/1.1 written and
// read by the calling goroutine itself. net/http hands every request to two
// goroutines of its connection and back, which costs more than all else that a
// short call does. What is out of the ordinary is left to next.
//
// A connection serves one call at a time and goes back when its answer was read
// to the end, so there are as many as there are calls at once.
type unaryHTTP struct {
	dial func(ctx context.Context, network, address string) (net.Conn, error)
	next *http.Client

	mu   sync.Mutex
	idle map[string][]*unaryConn // by host:port, the one used last at the end
}

// unaryConn is one connection.
type unaryConn struct {
	net.Conn
	br   *bufio.Reader
	lim  *io.LimitedReader
	out  []byte // the request, kept for the next
	used bool   // has served a call
	at   time.Time
}

func newUnaryHTTP(dial func(context.Context, string, string) (net.Conn, error), next *http.Client) *unaryHTTP {
	return &unaryHTTP{dial: dial, next: next, idle: map[string][]*unaryConn{}}
}

// Do implements connecthttp.HTTPClient.
func (u *unaryHTTP) Do(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "http" || req.Method != http.MethodPost || req.ContentLength < 0 || req.ContentLength > maxUnaryBytes || req.GetBody == nil || !plainHeader(req) {
		return u.next.Do(req)
	}
	for {
		c, err := u.get(req.Context(), req.URL.Host)
		if err != nil {
			return nil, err
		}
		again := c.used
		res, answered, err := u.try(c, req)
		if err == nil {
			return res, nil
		}
		// The node may have closed a connection that was idle while this request
		// was on its way. Every call may be repeated: it changes nothing, or
		// carries an idempotency key.
		if !again || answered || req.Context().Err() != nil {
			return nil, err
		}
		if req.Body, err = req.GetBody(); err != nil {
			return nil, fmt.Errorf("repeating a request: %w", err)
		}
	}
}

// plainHeader tells whether the headers can be written as they are.
func plainHeader(req *http.Request) bool {
	bad := func(s string) bool { return strings.ContainsAny(s, "\r\n\x00") }
	if bad(req.URL.RequestURI()) || bad(req.Host) {
		return false
	}
	for name, values := range req.Header {
		if name == "Expect" || name == "Transfer-Encoding" || name == "Content-Length" || name == "Connection" || name == "Host" || name == "" || strings.ContainsAny(name, " :\r\n\x00") {
			return false
		}
		if slices.ContainsFunc(values, bad) {
			return false
		}
	}
	return true
}

// get takes an idle connection, or makes one.
func (u *unaryHTTP) get(ctx context.Context, host string) (*unaryConn, error) {
	u.mu.Lock()
	for list := u.idle[host]; len(list) > 0; list = u.idle[host] {
		c := list[len(list)-1]
		u.idle[host] = list[:len(list)-1]
		if time.Since(c.at) < idleConnFor {
			u.mu.Unlock()
			return c, nil
		}
		for _, old := range append(u.idle[host], c) { // the others are older still
			old.drop()
		}
		u.idle[host] = nil
	}
	u.mu.Unlock()
	conn, err := u.dial(ctx, "tcp", host)
	if err != nil {
		return nil, err
	}
	c := &unaryConn{Conn: conn, lim: &io.LimitedReader{R: conn}}
	c.br = bufio.NewReaderSize(c.lim, readAheadBytes)
	return c, nil
}

func (u *unaryHTTP) put(host string, c *unaryConn) {
	c.used, c.at = true, time.Now()
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.idle[host]) >= maxIdleConns {
		c.drop()
		return
	}
	u.idle[host] = append(u.idle[host], c)
}

// CloseIdleConnections lets go of what no call uses.
func (u *unaryHTTP) CloseIdleConnections() {
	u.mu.Lock()
	defer u.mu.Unlock()
	for host, list := range u.idle {
		for _, c := range list {
			c.drop()
		}
		delete(u.idle, host)
	}
}

func (c *unaryConn) drop() {
	if err := c.Close(); err != nil {
		return // it was broken already
	}
}

// try makes one call on a connection. answered tells whether any of an answer
// came.
func (u *unaryHTTP) try(c *unaryConn, req *http.Request) (res *http.Response, answered bool, err error) {
	ctx := req.Context()
	stop := watchContext(ctx, c)
	release := func() bool { // the connection is ours again, unless ctx ended first
		return stop == nil || stop()
	}
	if res, answered, err = c.roundTrip(req); err != nil {
		release()
		c.drop()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, answered, err
	}
	reusable := !res.Close && !req.Close
	if res.ContentLength >= 0 && res.ContentLength <= maxWholeBytes {
		body := make([]byte, res.ContentLength)
		_, err := io.ReadFull(res.Body, body)
		if ok := release(); err != nil || !ok || !reusable {
			c.drop()
		} else {
			u.put(req.URL.Host, c)
		}
		if err != nil {
			if ctx.Err() != nil {
				err = ctx.Err()
			}
			return nil, true, fmt.Errorf("reading an answer: %w", err)
		}
		res.Body = io.NopCloser(bytes.NewReader(body))
		return res, true, nil
	}
	res.Body = &unaryBody{ReadCloser: res.Body, end: func(whole bool) {
		if ok := release(); whole && ok && reusable {
			u.put(req.URL.Host, c)
		} else {
			c.drop()
		}
	}}
	return res, true, nil
}

// watchContext breaks off what a connection does when ctx ends, until the
// returned function is called, which tells whether that was in time.
func watchContext(ctx context.Context, c *unaryConn) (stop func() bool) {
	if ctx.Done() == nil {
		return nil
	}
	return context.AfterFunc(ctx, func() {
		if err := c.SetDeadline(time.Unix(1, 0)); err != nil {
			return // it is closed: nothing waits on it
		}
	})
}

// roundTrip writes the request and reads the head of the answer.
func (c *unaryConn) roundTrip(req *http.Request) (res *http.Response, answered bool, err error) {
	if err := c.encode(req); err != nil {
		return nil, false, err
	}
	if _, err := c.Write(c.out); err != nil {
		return nil, false, fmt.Errorf("sending a request: %w", err)
	}
	for range 5 { // informational answers come before the real one
		c.lim.N = maxHeaderBytes
		res, err := http.ReadResponse(c.br, req)
		if err != nil {
			if c.lim.N <= 0 {
				err = errors.New("the head of the answer is too long")
			}
			if errors.Is(err, io.ErrUnexpectedEOF) {
				err = io.EOF
			}
			return nil, answered || c.br.Buffered() > 0, fmt.Errorf("reading an answer: %w", err)
		}
		answered, c.lim.N = true, 1<<62
		if res.StatusCode >= 200 || res.StatusCode == http.StatusSwitchingProtocols {
			return res, true, nil
		}
	}
	return nil, true, errors.New("reading an answer: only informational ones came")
}

// encode makes the bytes of a request, in one piece.
func (c *unaryConn) encode(req *http.Request) error {
	b := append(c.out[:0], "POST "...)
	b = append(b, req.URL.RequestURI()...)
	b = append(b, " HTTP/1.1\r\nHost: "...)
	host := req.Host
	if host == "" {
		host = req.URL.Host
	}
	b = append(b, host...)
	b = append(b, "\r\n"...)
	for name, values := range req.Header {
		for _, v := range values {
			b = append(append(append(append(b, name...), ": "...), v...), "\r\n"...)
		}
	}
	b = append(b, "Content-Length: "...)
	b = strconv.AppendInt(b, req.ContentLength, 10)
	b = append(b, "\r\n\r\n"...)
	if n := int(req.ContentLength); n > 0 {
		at := len(b)
		b = append(b, make([]byte, n)...)
		if _, err := io.ReadFull(req.Body, b[at:]); err != nil {
			return fmt.Errorf("reading the request's own body: %w", err)
		}
	}
	c.out = b
	if err := req.Body.Close(); err != nil {
		return fmt.Errorf("closing the request's own body: %w", err)
	}
	return nil
}

// unaryBody is a long answer's body.
type unaryBody struct {
	io.ReadCloser
	once sync.Once
	end  func(whole bool)
}

func (b *unaryBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		b.once.Do(func() { b.end(errors.Is(err, io.EOF)) })
	}
	return n, err
}

func (b *unaryBody) Close() error {
	b.once.Do(func() { b.end(false) })
	return nil
}
