package guest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// maxCalls bounds calls the guest works on at once, over all sessions.
const maxCalls = 64

// openAgain is the pause before a channel that could not be opened, or ended at
// once, is tried again.
const openAgain = 20 * time.Millisecond

// Serve answers hosts on the connections open gives, one after the other,
// until ctx ends; then it waits for the calls under way. open waits until there
// is a host, and a connection may carry several sessions.
func Serve(ctx context.Context, open func(context.Context) (io.ReadWriteCloser, error), h Handler) {
	server := &server{handler: h, slots: make(chan struct{}, maxCalls)}
	defer server.calls.Wait()
	for ctx.Err() == nil {
		conn, err := open(ctx)
		if err == nil {
			server.connection(ctx, conn)
		}
		select {
		case <-ctx.Done():
		case <-time.After(openAgain):
		}
	}
}

type server struct {
	handler Handler
	slots   chan struct{}
	calls   sync.WaitGroup
}

// connection serves one connection until it ends.
func (v *server) connection(ctx context.Context, conn io.ReadWriteCloser) {
	l := newLink(conn)
	stop := context.AfterFunc(ctx, func() { l.fail(context.Cause(ctx)) })
	defer stop()
	var writer sync.WaitGroup
	writer.Go(l.write)
	defer writer.Wait()

	c := &serverConn{server: v, link: l}
	l.fail(c.read(ctx, bufio.NewReaderSize(conn, MaxPayload)))
	c.endSession()
}

// serverConn is one connection and the session it carries now. Its fields
// belong to the reading goroutine, but streams, which calls remove themselves from.
type serverConn struct {
	server  *server
	link    *link
	id      session
	started bool
	ctx     context.Context //nolint:containedctx // of the session
	cancel  context.CancelFunc

	mu      sync.Mutex
	streams map[uint32]*stream
}

func (c *serverConn) read(ctx context.Context, r *bufio.Reader) error {
	for {
		f, err := readFrame(r)
		switch {
		case errors.Is(err, errGarbage):
			if err := c.resynchronise(ctx, r); err != nil {
				return err
			}
		case err != nil:
			return err
		case f.kind == frameHello:
			if err := c.hello(ctx, session(f.payload[len(helloMagic):])); err != nil {
				return err
			}
		case c.started:
			c.dispatch(f)
		}
	}
}

// resynchronise drops everything up to the next HELLO.
func (c *serverConn) resynchronise(ctx context.Context, r *bufio.Reader) error {
	c.endSession()
	if err := hunt(r, []byte(helloMagic)); err != nil {
		return err
	}
	var id session
	if _, err := io.ReadFull(r, id[:]); err != nil {
		return err
	}
	return c.hello(ctx, id)
}

func (c *serverConn) hello(ctx context.Context, id session) error {
	if !c.started || c.id != id {
		c.endSession()
		c.started, c.id = true, id
		c.link.epoch.Add(1)
		c.ctx, c.cancel = context.WithCancel(ctx)
		c.mu.Lock()
		c.streams = make(map[uint32]*stream)
		c.mu.Unlock()
	}
	return c.link.send(ctx, c.link.epoch.Load(), frame{kind: frameHelloAck, payload: helloPayload(id)})
}

// endSession gives up all streams; their calls end by themselves.
func (c *serverConn) endSession() {
	if !c.started {
		return
	}
	c.started = false
	c.cancel()
	c.mu.Lock()
	defer c.mu.Unlock()
	//order:any every stream is ended, none sees another
	for _, s := range c.streams {
		s.end(context.Canceled)
	}
	c.streams = nil
}

func (c *serverConn) dispatch(f frame) {
	if f.kind == frameOpen {
		c.open(f)
		return
	}
	c.mu.Lock()
	s := c.streams[f.stream]
	c.mu.Unlock()
	if s == nil {
		return
	}
	switch f.kind {
	case frameData, frameWindow, frameResize:
		if err := s.deliver(f); err != nil {
			s.end(err)
		}
	default:
		s.end(context.Canceled)
	}
}

func (c *serverConn) open(f frame) {
	c.mu.Lock()
	_, exists := c.streams[f.stream]
	c.mu.Unlock()
	if exists {
		return
	}
	s := newStream(c.link, f.stream)
	select {
	case c.server.slots <- struct{}{}:
	default:
		c.result(c.ctx, s, nil, fmt.Errorf("%d calls are under way", maxCalls))
		return
	}
	c.mu.Lock()
	c.streams[s.id] = s
	c.mu.Unlock()
	ctx, cancel := context.WithCancel(c.ctx)
	c.server.calls.Go(func() {
		defer func() { <-c.server.slots }()
		defer cancel()
		body, err := c.run(ctx, cancel, s, f.payload)
		c.mu.Lock()
		if c.streams[s.id] == s { // a later session may use the number again
			delete(c.streams, s.id)
		}
		c.mu.Unlock()
		c.result(ctx, s, body, err)
	})
}

// result ends a stream; that it cannot be sent is known by the connection.
func (c *serverConn) result(ctx context.Context, s *stream, body any, err error) {
	var reply resultReply
	if err == nil && body != nil {
		reply.Body, err = json.Marshal(body)
	}
	if err != nil {
		reply = resultReply{Code: codeOf(err), Error: printable(err.Error(), maxMessage)}
	}
	payload, err := json.Marshal(reply)
	if err != nil || len(payload) > MaxPayload {
		payload = []byte(`{"code":"failed","error":"the answer cannot be encoded"}`)
	}
	//nolint:errcheck // the connection knows
	s.send(ctx, frame{kind: frameResult, payload: payload})
}

// run decodes a request and does it.
func (c *serverConn) run(ctx context.Context, cancel context.CancelFunc, s *stream, payload []byte) (any, error) {
	var open openRequest
	if err := json.Unmarshal(payload, &open); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	h := c.server.handler
	switch open.Method {
	case "exec":
		request, err := decode[ExecRequest](open.Body)
		if err != nil {
			return nil, err
		}
		return runExec(ctx, cancel, s, h, request)
	case "logs":
		request, err := decode[LogRequest](open.Body)
		if err != nil {
			return nil, err
		}
		defer watch(ctx, cancel, s)()
		return nil, h.Logs(ctx, request, channelWriter{ctx, s, channelStdout})
	}
	defer watch(ctx, cancel, s)()
	switch open.Method {
	case "configure":
		config, err := decode[Config](open.Body)
		if err != nil {
			return nil, err
		}
		return nil, h.Configure(ctx, config)
	case "state":
		return h.State(ctx)
	case "check":
		check, err := decode[Check](open.Body)
		if err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(ctx, check.Timeout())
		defer cancel()
		return nil, h.Check(ctx, check)
	case "set_clock":
		request, err := decode[clockRequest](open.Body)
		if err != nil {
			return nil, err
		}
		return nil, h.SetClock(ctx, request.UnixNano)
	case "shut_down":
		request, err := decode[shutdownRequest](open.Body)
		if err != nil {
			return nil, err
		}
		return nil, h.Shutdown(ctx, time.Duration(min(max(request.GraceMS, 0), 86_400_000))*time.Millisecond)
	}
	return nil, fmt.Errorf("%w: this guest knows no method %q", ErrInvalid, printable(open.Method, 64))
}

func decode[T any](body json.RawMessage) (T, error) {
	var value T
	if err := json.Unmarshal(body, &value); err != nil {
		return value, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return value, nil
}

// watch cancels a call without input when the host gives it up. The returned
// function ends the watching and waits for it.
func watch(ctx context.Context, cancel context.CancelFunc, s *stream) func() {
	ctx, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			if _, err := s.next(ctx); err != nil {
				if ctx.Err() == nil {
					cancel()
				}
				return
			}
		}
	})
	return func() {
		stop()
		wg.Wait()
	}
}

func runExec(ctx context.Context, cancel context.CancelFunc, s *stream, h Handler, request ExecRequest) (any, error) {
	if len(request.Args) == 0 || request.Args[0] == "" {
		return nil, fmt.Errorf("%w: no command", ErrInvalid)
	}
	stdin, stdinWriter := io.Pipe()
	sizes := make(chan Size, 1)
	pumping, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(sizes)
		err := pumpInput(pumping, s, stdinWriter, sizes)
		if pumping.Err() == nil && err != nil {
			cancel() // the host gave it up
		}
		stdinWriter.CloseWithError(io.ErrClosedPipe)
	})
	code, err := h.Exec(ctx, request, Streams{
		Stdin:  stdin,
		Stdout: channelWriter{ctx, s, channelStdout},
		Stderr: channelWriter{ctx, s, channelStderr},
		Resize: sizes,
	})
	stop()
	//nolint:errcheck // a PipeReader's Close returns nil
	stdin.Close()
	wg.Wait()
	if err != nil {
		return nil, err
	}
	return execReply{ExitCode: code}, nil
}

// pumpInput takes a stream's input until it is given up. A command that does
// not read its input holds the window back, nothing else.
func pumpInput(ctx context.Context, s *stream, stdin *io.PipeWriter, sizes chan Size) error {
	input := newStdinQueue(ctx, s, stdin)
	defer input.wait()
	for {
		f, err := s.next(ctx)
		if err != nil {
			input.stop()
			return err
		}
		switch f.kind {
		case frameResize:
			var size Size
			if json.Unmarshal(f.payload, &size) == nil {
				select {
				case <-sizes: // the newest counts
				default:
				}
				select {
				case sizes <- size:
				default:
				}
			}
		case frameData:
			input.push(f)
		default: // of no meaning to a command
		}
	}
}

// stdinQueue writes input to a command beside the pump, so that a command which
// does not read stdin can still be resized and given up. The stream's window
// bounds what it holds.
type stdinQueue struct {
	frames chan frame
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

func newStdinQueue(ctx context.Context, s *stream, stdin *io.PipeWriter) *stdinQueue {
	ctx, cancel := context.WithCancel(ctx)
	q := &stdinQueue{frames: make(chan frame, windowSize/frameOverhead), cancel: cancel}
	stop := context.AfterFunc(ctx, func() { stdin.CloseWithError(context.Canceled) })
	q.wg.Go(func() {
		defer stop()
		for {
			select {
			case <-ctx.Done():
				return
			case f := <-q.frames:
				// A command that has closed its input just does not get more.
				if _, err := stdin.Write(f.payload); err != nil && !errors.Is(err, io.ErrClosedPipe) {
					return
				}
				if f.flags&flagEnd != 0 {
					//nolint:errcheck // a PipeWriter's Close returns nil
					stdin.Close()
				}
				if err := s.consumed(ctx, f); err != nil {
					return
				}
			}
		}
	})
	return q
}

// push never blocks: the window allows no more frames than the channel holds.
func (q *stdinQueue) push(f frame) {
	select {
	case q.frames <- f:
	default:
	}
}

func (q *stdinQueue) stop() { q.cancel() }
func (q *stdinQueue) wait() { q.cancel(); q.wg.Wait() }
