package main

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
)

const (
	httpHeadBytes = 64 << 10 // of the head of an answer
	httpBuffer    = 32 << 10
	// httpSmall answers whose length is known are not worth a stream.
	httpSmall = 48 << 10
)

// errUnanswered: the connection has ended before a byte of the answer came.
var errUnanswered = errors.New("the server has closed the connection without an answer")

// httpConn is a connection to the server, of HTTP/1.1.
type httpConn struct {
	fd    int
	life  int // of the runtime; 0: not told yet
	limit int // of an answer that is not streamed, in bytes; 0: none
	in    []byte
	at    int // in[at:] was read and not used
}

func (c *httpConn) close() {
	if err := unix.Close(c.fd); err != nil {
		logf("closing a connection to the server: %v", err)
	}
}

// quiet tells whether nothing has come on an idle connection, its end above all.
func (c *httpConn) quiet() bool {
	if c.at < len(c.in) {
		return false
	}
	var b [1]byte
	_, _, err := unix.Recvfrom(c.fd, b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	return errors.Is(err, unix.EAGAIN)
}

func (c *httpConn) write(p []byte) error {
	for len(p) > 0 {
		n, err := unix.SendmsgN(c.fd, p, nil, nil, unix.MSG_NOSIGNAL)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// fill reads more; it fails with errEnd at the end.
func (c *httpConn) fill() error {
	if c.at > 0 {
		c.in = c.in[:copy(c.in, c.in[c.at:])]
		c.at = 0
	}
	if cap(c.in)-len(c.in) < httpBuffer/2 {
		c.in = append(make([]byte, 0, 2*cap(c.in)+httpBuffer), c.in...)
	}
	for {
		n, err := unix.Read(c.fd, c.in[len(c.in):cap(c.in)])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case n <= 0:
			return errEnd
		}
		c.in = c.in[:len(c.in)+n]
		return nil
	}
}

var errEnd = errors.New("the server has closed the connection in the middle of its answer")

// hopHeaders are between two ends of a connection, and are not passed on.
func hopHeader(name string) bool {
	switch strings.ToLower(name) {
	case "connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade":
		return true
	}
	return false
}

// httpRequest writes an invocation as a request.
func httpRequest(q *call.Request) []byte {
	b := make([]byte, 0, len(q.Payload)+1024)
	add := func(name, value string) {
		// Nothing of a caller's may end a line.
		if value == "" || strings.ContainsAny(name, "\r\n: ") || strings.ContainsAny(value, "\r\n\x00") {
			return
		}
		b = append(append(append(append(b, name...), ": "...), value...), "\r\n"...)
	}
	if q.HTTP == nil {
		b = append(b, "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"...)
	} else {
		target := q.HTTP.Target
		if !strings.HasPrefix(target, "/") && target != "*" || strings.ContainsAny(target, " \r\n\x00") {
			target = "/"
		}
		method := q.HTTP.Method
		if method == "" || strings.ContainsAny(method, " \r\n\x00:/") {
			method = "GET"
		}
		b = append(append(append(append(b, method...), ' '), target...), " HTTP/1.1\r\n"...)
		host := q.HTTP.Host
		if host == "" {
			host = "localhost"
		}
		add("Host", host)
		for _, h := range q.HTTP.Headers {
			if lower := strings.ToLower(h[0]); hopHeader(lower) || lower == "host" || lower == "content-length" || lower == "expect" || strings.HasPrefix(lower, "x-blixard-") {
				continue
			}
			add(h[0], h[1])
		}
	}
	add("X-Blixard-Request-Id", q.RequestID)
	add("X-Blixard-Function-Arn", q.ARN)
	add("X-Blixard-Deadline-Ms", strconv.FormatInt(q.DeadlineMS, 10))
	if !headerGiven(q, "x-amzn-trace-id") {
		add("X-Amzn-Trace-Id", q.TraceID)
	}
	if len(q.Payload) > 0 || q.HTTP == nil || q.HTTP.Method == "POST" || q.HTTP.Method == "PUT" || q.HTTP.Method == "PATCH" {
		add("Content-Length", strconv.Itoa(len(q.Payload)))
	}
	b = append(b, "\r\n"...)
	return append(b, q.Payload...)
}

func headerGiven(q *call.Request, name string) bool {
	if q.HTTP == nil {
		return false
	}
	for _, h := range q.HTTP.Headers {
		if strings.EqualFold(h[0], name) {
			return true
		}
	}
	return false
}

// httpHead is the head of an answer.
type httpHead struct {
	blixard.ResponseHead
	length  int64 // -1: not known
	chunked bool
	keep    bool // the connection can be used again
}

// exchange sends a request and passes the answer on. keep tells whether the
// connection can be used again.
func (c *httpConn) exchange(q *call.Request, request []byte, w call.ResponseWriter) (keep bool, err error) {
	// Servers may answer without having read all, and close: what they said counts.
	sendErr := c.write(request)
	var head httpHead
	for {
		if head, err = c.readHead(); err != nil {
			if sendErr != nil && errors.Is(err, errUnanswered) {
				return false, fmt.Errorf("%w: %w", errUnanswered, sendErr)
			}
			return false, err
		}
		if head.Status >= 200 {
			break
		}
		if head.Status == 101 {
			return false, errors.New("the server wants to switch to another protocol")
		}
	}
	method := "POST"
	if q.HTTP != nil {
		method = q.HTTP.Method
	}
	if method == "HEAD" || head.Status == 204 || head.Status == 304 {
		head.length, head.chunked = 0, false
	}
	head.Streaming = q.Stream && (head.length < 0 || head.length > httpSmall)
	if err := w.Begin(head.ResponseHead); err != nil {
		return false, err
	}
	if !head.Streaming && head.length != 0 {
		// Whoever does not take streams wants all of an answer or an error.
		whole := &wholeAnswer{ResponseWriter: w, limit: c.limit}
		w = whole
		defer func() {
			if err == nil {
				_, err = whole.ResponseWriter.Write(whole.body)
			}
			keep = keep && err == nil
		}()
	}
	switch {
	case head.chunked:
		err = c.copyChunks(w)
	case head.length >= 0:
		err = c.copyBytes(w, head.length)
	default:
		head.keep = false
		err = c.copyAll(w)
	}
	return err == nil && sendErr == nil && head.keep, err
}

// wholeAnswer keeps an answer until it is complete.
type wholeAnswer struct {
	call.ResponseWriter
	body  []byte
	limit int // 0: none
}

func (a *wholeAnswer) Write(p []byte) (int, error) {
	if a.limit > 0 && len(a.body)+len(p) > a.limit {
		// It says so itself when it gets more than it takes.
		return a.ResponseWriter.Write(append(a.body, p...))
	}
	a.body = append(a.body, p...)
	return len(p), nil
}

// readLine gives a line without its end, valid until the next read.
func (c *httpConn) readLine() ([]byte, error) {
	for searched := 0; ; {
		if i := bytes.IndexByte(c.in[c.at+searched:], '\n'); i >= 0 {
			line := c.in[c.at : c.at+searched+i]
			c.at += searched + i + 1
			return bytes.TrimSuffix(line, []byte{'\r'}), nil
		}
		searched = len(c.in) - c.at
		if searched > httpHeadBytes {
			return nil, errors.New("the server's answer has an endless line")
		}
		if err := c.fill(); err != nil {
			return nil, err
		}
	}
}

func (c *httpConn) readHead() (head httpHead, err error) {
	if c.at == len(c.in) {
		c.in, c.at = c.in[:0], 0
		if err := c.fill(); err != nil {
			return head, fmt.Errorf("%w: %w", errUnanswered, err)
		}
	}
	line, err := c.readLine()
	if err != nil {
		return head, err
	}
	// "HTTP/1.1 200 OK"
	if len(line) < 12 || !bytes.HasPrefix(line, []byte("HTTP/1.")) || line[8] != ' ' {
		return head, fmt.Errorf("the server's answer is not HTTP: it begins with %.40q", line)
	}
	if head.Status, err = strconv.Atoi(string(line[9:12])); err != nil || head.Status < 100 || len(line) > 12 && line[12] != ' ' {
		return head, fmt.Errorf("the server's answer has the status %.40q", line[9:])
	}
	head.length = -1
	head.keep = line[7] != '0'
	for size := 0; ; {
		if line, err = c.readLine(); err != nil {
			return head, err
		}
		if len(line) == 0 {
			break
		}
		if size += len(line); size > httpHeadBytes {
			return head, fmt.Errorf("the head of the server's answer has more than %d KiB", httpHeadBytes>>10)
		}
		name, value, ok := strings.Cut(string(line), ":")
		if !ok || name == "" || strings.ContainsAny(name, " \t") {
			return head, fmt.Errorf("the server's answer has the header %.60q", line)
		}
		if err := head.take(name, strings.TrimSpace(value)); err != nil {
			return head, err
		}
	}
	if head.chunked {
		head.length = -1
	}
	return head, nil
}

func (head *httpHead) take(name, value string) error {
	switch strings.ToLower(name) {
	case "content-length":
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil || n < 0 || head.length >= 0 && head.length != n {
			return fmt.Errorf("the server's answer has the length %.40q", value)
		}
		head.length = n
		return nil // it is said anew by whoever passes the answer on
	case "transfer-encoding":
		if !strings.EqualFold(value, "chunked") {
			return fmt.Errorf("the server's answer is encoded as %.40q", value)
		}
		head.chunked = true
		return nil
	case "connection":
		for word := range strings.SplitSeq(value, ",") {
			switch strings.ToLower(strings.TrimSpace(word)) {
			case "close":
				head.keep = false
			case "keep-alive":
				head.keep = true
			}
		}
		return nil
	case "content-type":
		head.ContentType = value
	}
	if !hopHeader(name) {
		head.Headers = append(head.Headers, [2]string{name, value})
	}
	return nil
}

// copyBytes passes n bytes on.
func (c *httpConn) copyBytes(w call.ResponseWriter, n int64) error {
	for n > 0 {
		if c.at == len(c.in) {
			if err := c.fill(); err != nil {
				return err
			}
		}
		part := c.in[c.at:min(int64(len(c.in)), int64(c.at)+n)]
		if _, err := w.Write(part); err != nil {
			return err
		}
		c.at += len(part)
		n -= int64(len(part))
	}
	return nil
}

// copyAll passes on what comes until the connection ends.
func (c *httpConn) copyAll(w call.ResponseWriter) error {
	for {
		if c.at < len(c.in) {
			if _, err := w.Write(c.in[c.at:]); err != nil {
				return err
			}
			c.at = len(c.in)
		}
		if err := c.fill(); errors.Is(err, errEnd) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

func (c *httpConn) copyChunks(w call.ResponseWriter) error {
	for {
		line, err := c.readLine()
		if err != nil {
			return err
		}
		size, _, _ := bytes.Cut(line, []byte{';'})
		n, err := strconv.ParseInt(string(bytes.TrimSpace(size)), 16, 64)
		if err != nil || n < 0 {
			return fmt.Errorf("the server's answer has a part of %.20q bytes", size)
		}
		if n == 0 {
			break
		}
		if err := c.copyBytes(w, n); err != nil {
			return err
		}
		if line, err = c.readLine(); err != nil || len(line) != 0 {
			return errors.Join(errors.New("the server's answer has a part that is longer than it says"), err)
		}
	}
	for size := 0; ; {
		line, err := c.readLine()
		if err != nil || len(line) == 0 {
			return err
		}
		if size += len(line); size > httpHeadBytes {
			return errors.New("the server's answer has an endless trailer")
		}
	}
}
