package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// The Runtime API is served by blocking system calls, one thread to a connection:
// a first call must not pay for pollers and the scheduler, whose code the emulator
// would have to translate first. Clients are the function's own processes, which
// could do worse to the guest than to open connections.
const (
	apiMaxConns    = 256
	apiHeadBytes   = 64 << 10
	apiCauseBytes  = 1 << 20 // of the one header that may be long (X-Ray cause)
	apiMaxHeaders  = 100
	apiDrainBytes  = 64 << 20 // of a body that is too long, read so that the answer is
	apiInputBytes  = 16 << 10
	apiInlineWrite = 64 << 10 // written at once by the thread that has it
)

var errMalformed = errors.New("malformed request")

// apiServer accepts connections and calls handle with each request, which it does
// for one request of a connection at a time.
type apiServer struct {
	fd     int
	port   int
	handle func(*apiConn, *apiRequest)
	gone   func(*apiConn) // the connection is over

	mu     sync.Mutex
	conns  map[*apiConn]bool
	closed bool
	served sync.WaitGroup
}

func newAPIServer(port int, handle func(*apiConn, *apiRequest), gone func(*apiConn)) (*apiServer, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("making the Runtime API's socket: %w", err)
	}
	s := &apiServer{fd: fd, handle: handle, gone: gone, conns: make(map[*apiConn]bool)}
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.Bind(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}),
		unix.Listen(fd, 64),
	)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening the Runtime API on port %d: %w", port, err), unix.Close(fd))
	}
	bound, err := unix.Getsockname(fd)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening the Runtime API: %w", err), unix.Close(fd))
	}
	if address, ok := bound.(*unix.SockaddrInet4); ok {
		s.port = address.Port
	}
	s.served.Go(s.accept)
	return s, nil
}

func (s *apiServer) accept() {
	for {
		fd, _, err := unix.Accept4(s.fd, unix.SOCK_CLOEXEC)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) {
			continue
		}
		if err != nil {
			s.mu.Lock()
			closed := s.closed
			s.mu.Unlock()
			if !closed {
				logf("accepting on the Runtime API: %v", err)
			}
			return
		}
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
			logf("setting up a connection: %v", err)
		}
		c := &apiConn{fd: fd, in: make([]byte, apiInputBytes)}
		s.mu.Lock()
		full := s.closed || len(s.conns) >= apiMaxConns
		if !full {
			s.conns[c] = true
			s.served.Go(func() { s.serve(c) })
		}
		s.mu.Unlock()
		if full {
			c.close()
		}
	}
}

func (s *apiServer) serve(c *apiConn) {
	for {
		request, err := c.next()
		if err != nil {
			if errors.Is(err, errMalformed) {
				c.answerError(400, "InvalidRequest", err.Error())
			}
			break
		}
		if request.close {
			// It may be answered much later, by another thread: that one ends it.
			c.makeLast()
		}
		s.handle(c, request)
		if c.over.Load() {
			break
		}
		if err := c.skipBody(request); err != nil {
			break
		}
	}
	s.gone(c)
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
	c.close()
}

// drop ends all connections; their threads notice.
func (s *apiServer) drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns { //order:any all are ended
		c.shut()
	}
}

// close ends the server and waits for its threads.
func (s *apiServer) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.drop()
	// It wakes the thread that accepts; closing the descriptor would not.
	if err := unix.Shutdown(s.fd, unix.SHUT_RDWR); err != nil {
		logf("closing the Runtime API: %v", err)
	}
	s.served.Wait()
	if err := unix.Close(s.fd); err != nil {
		logf("closing the Runtime API: %v", err)
	}
}

// apiConn is a connection. One thread reads it; any may write an answer.
type apiConn struct {
	fd         int
	in         []byte
	start, end int         // of what was read and not used
	over       atomic.Bool // to be closed after this request

	writing sync.Mutex
	out     []byte
	closed  bool // under writing
	last    bool // under writing: nothing follows the answer
}

type apiRequest struct {
	method, path string
	headers      [][2]string
	length       int64 // of the body; -1: chunked
	expect       bool  // the client waits for leave to send the body
	close        bool
	consumed     bool // the body was read
}

// header finds a value; name is lower-case.
func (r *apiRequest) header(name string) string {
	for _, h := range r.headers {
		if h[0] == name {
			return h[1]
		}
	}
	return ""
}

func (c *apiConn) makeLast() {
	c.writing.Lock()
	defer c.writing.Unlock()
	c.last = true
}

// shut ends both directions.
func (c *apiConn) shut() {
	c.writing.Lock()
	defer c.writing.Unlock()
	if c.closed {
		return
	}
	// ENOTCONN: the other side was faster.
	if err := unix.Shutdown(c.fd, unix.SHUT_RDWR); err != nil && !errors.Is(err, unix.ENOTCONN) {
		logf("ending a connection: %v", err)
	}
}

func (c *apiConn) close() {
	c.writing.Lock()
	defer c.writing.Unlock()
	if c.closed {
		return
	}
	c.closed = true
	if err := unix.Close(c.fd); err != nil {
		logf("closing a connection: %v", err)
	}
}

// fill reads more; what is in use stays.
func (c *apiConn) fill() error {
	if c.start > 0 {
		c.end = copy(c.in, c.in[c.start:c.end])
		c.start = 0
	}
	if c.end == len(c.in) {
		c.in = append(c.in, make([]byte, len(c.in))...)
	}
	for {
		n, err := unix.Read(c.fd, c.in[c.end:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if n <= 0 {
			return io.EOF
		}
		c.end += n
		return nil
	}
}

// line reads up to a line's end, which it leaves out. The bytes are valid until
// the next read.
func (c *apiConn) line(limit int) ([]byte, error) {
	for scanned := 0; ; {
		if i := bytes.IndexByte(c.in[c.start+scanned:c.end], '\n'); i >= 0 {
			line := c.in[c.start : c.start+scanned+i]
			c.start += scanned + i + 1
			return bytes.TrimSuffix(line, []byte{'\r'}), nil
		}
		scanned = c.end - c.start
		if scanned > limit {
			return nil, fmt.Errorf("%w: a line of more than %d bytes", errMalformed, limit)
		}
		if err := c.fill(); err != nil {
			return nil, err
		}
	}
}

// next reads the head of a request.
func (c *apiConn) next() (*apiRequest, error) {
	line, err := c.line(apiHeadBytes)
	if err != nil {
		return nil, err
	}
	if len(line) == 0 { // some clients send an empty line after a body
		if line, err = c.line(apiHeadBytes); err != nil {
			return nil, err
		}
	}
	method, rest, ok := bytes.Cut(line, []byte{' '})
	path, proto, ok2 := bytes.Cut(rest, []byte{' '})
	if !ok || !ok2 || !bytes.HasPrefix(proto, []byte("HTTP/1.")) {
		return nil, fmt.Errorf("%w: no HTTP/1.1 request line", errMalformed)
	}
	r := &apiRequest{method: string(method), path: string(path), close: bytes.Equal(proto, []byte("HTTP/1.0"))}
	if r.headers, err = c.fields(); err != nil {
		return nil, err
	}
	for _, h := range r.headers {
		switch h[0] {
		case "content-length":
			if r.length, err = strconv.ParseInt(h[1], 10, 64); err != nil || r.length < 0 {
				return nil, fmt.Errorf("%w: content length %q", errMalformed, h[1])
			}
		case "connection":
			r.close = r.close || equalFold(h[1], "close")
		case "expect":
			r.expect = equalFold(h[1], "100-continue")
		}
	}
	if encoding := r.header("transfer-encoding"); encoding != "" {
		if !equalFold(encoding, "chunked") {
			return nil, fmt.Errorf("%w: transfer encoding %q", errMalformed, encoding)
		}
		r.length = -1
	}
	return r, nil
}

// fields reads header lines up to the empty one. Names become lower-case.
func (c *apiConn) fields() ([][2]string, error) {
	headers := make([][2]string, 0, 12)
	for total := 0; ; {
		line, err := c.line(apiHeadBytes + apiCauseBytes)
		if err != nil {
			return nil, err
		}
		if len(line) == 0 {
			return headers, nil
		}
		total += len(line)
		name, value, ok := bytes.Cut(line, []byte{':'})
		if !ok || total > apiHeadBytes+apiCauseBytes || len(headers) == apiMaxHeaders {
			return nil, fmt.Errorf("%w: headers", errMalformed)
		}
		for i, b := range name {
			if 'A' <= b && b <= 'Z' {
				name[i] = b + 'a' - 'A'
			}
		}
		headers = append(headers, [2]string{string(name), string(bytes.TrimSpace(value))})
	}
}

func equalFold(a, b string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range len(a) {
		if a[i]|0x20 != b[i]|0x20 {
			return false
		}
	}
	return true
}

// body gives a request's body to take, in pieces that are valid until it returns.
// It stops at the first error of take. The trailers of a chunked body are given.
func (c *apiConn) body(r *apiRequest, take func([]byte) error) (trailers [][2]string, err error) {
	if r.consumed {
		return nil, nil
	}
	if r.expect {
		r.expect = false
		if err := c.write([]byte("HTTP/1.1 100 Continue\r\n\r\n")); err != nil {
			return nil, err
		}
	}
	if r.length >= 0 {
		if err := c.span(r.length, take); err != nil {
			return nil, err
		}
		r.consumed = true
		return nil, nil
	}
	for {
		line, err := c.line(1 << 10)
		if err != nil {
			return nil, err
		}
		text, _, _ := bytes.Cut(line, []byte{';'})
		size, err := strconv.ParseInt(string(bytes.TrimSpace(text)), 16, 64)
		if err != nil || size < 0 {
			return nil, fmt.Errorf("%w: chunk size %.20q", errMalformed, text)
		}
		if size == 0 {
			trailers, err = c.fields()
			r.consumed = err == nil
			return trailers, err
		}
		if err := c.span(size, take); err != nil {
			return nil, err
		}
		if line, err := c.line(2); err != nil || len(line) > 0 {
			return nil, errors.Join(fmt.Errorf("%w: no line end after a chunk", errMalformed), err)
		}
	}
}

// span gives the next n bytes to take.
func (c *apiConn) span(n int64, take func([]byte) error) error {
	for n > 0 {
		if c.start == c.end {
			if err := c.fill(); err != nil {
				if errors.Is(err, io.EOF) {
					err = io.ErrUnexpectedEOF
				}
				return err
			}
		}
		part := c.in[c.start:min(c.end, c.start+int(min(n, 1<<30)))]
		c.start += len(part)
		n -= int64(len(part))
		if err := take(part); err != nil {
			return err
		}
	}
	return nil
}

// skipBody reads what nobody was interested in.
func (c *apiConn) skipBody(r *apiRequest) error {
	if r.consumed || r.length == 0 {
		return nil
	}
	left := apiDrainBytes
	_, err := c.body(r, func(p []byte) error {
		if left -= len(p); left < 0 {
			return errMalformed
		}
		return nil
	})
	return err
}

// write writes everything.
func (c *apiConn) write(p []byte) error {
	c.writing.Lock()
	defer c.writing.Unlock()
	return c.put(p)
}

// put is called with writing held.
func (c *apiConn) put(p []byte) error {
	if c.closed {
		return io.ErrClosedPipe
	}
	for len(p) > 0 {
		n, err := sendNow(c.fd, p)
		if errors.Is(err, unix.EAGAIN) {
			// No SIGPIPE: it would be the agent's.
			n, err = unix.SendmsgN(c.fd, p, nil, nil, unix.MSG_NOSIGNAL)
		}
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

// answer sends a whole response. fields are header lines with their line ends.
func (c *apiConn) answer(status int, fields string, body []byte) {
	c.writing.Lock()
	defer c.writing.Unlock()
	b := append(c.out[:0], "HTTP/1.1 "...)
	b = strconv.AppendInt(b, int64(status), 10)
	b = append(b, ' ')
	b = append(b, statusText(status)...)
	b = append(b, "\r\nContent-Type: application/json\r\n"...)
	if c.over.Load() {
		b = append(b, "Connection: close\r\n"...)
	}
	b = append(b, fields...)
	b = append(b, "Content-Length: "...)
	b = strconv.AppendInt(b, int64(len(body)), 10)
	b = append(b, "\r\n\r\n"...)
	if len(body) <= apiInlineWrite {
		b = append(b, body...)
		body = nil
	}
	c.out = b
	err := c.put(b)
	if err == nil && body != nil {
		err = c.put(body)
	}
	if err == nil && c.last && !c.closed {
		err = unix.Shutdown(c.fd, unix.SHUT_WR)
	}
	if err != nil {
		c.over.Store(true) // by its own thread, which will see that it is gone
	}
}

// answerError sends an error as the Runtime API has it.
func (c *apiConn) answerError(status int, errorType, message string) {
	c.answer(status, "", append(errorBody(errorType, message, ""), '\n'))
}

func (c *apiConn) accepted() { c.answer(202, "", []byte("{\"status\":\"OK\"}\n")) }

func statusText(status int) string {
	switch status {
	case 200:
		return "OK"
	case 202:
		return "Accepted"
	case 400:
		return "Bad Request"
	case 403:
		return "Forbidden"
	case 404:
		return "Not Found"
	case 405:
		return "Method Not Allowed"
	case 413:
		return "Request Entity Too Large"
	default:
		return "Internal Server Error"
	}
}
