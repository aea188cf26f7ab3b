package guest

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"sync"
	"time"
)

const (
	// helloAgain is how long an answer to HELLO may take before it is sent
	// again, first with filler, since the first may have been taken for the
	// rest of a former connection's frame.
	helloAgain = 250 * time.Millisecond
	// helloEvery is the interval after that: the guest may still be booting.
	helloEvery = time.Second
	// callTimeout bounds calls that end by themselves when their context does not.
	callTimeout = 30 * time.Second
	maxStreams  = 256
	maxMessage  = 2048 // bytes of an error message of the guest
)

// openRequest begins a stream.
type openRequest struct {
	Method string          `json:"method"`
	Body   json.RawMessage `json:"body,omitempty"`
}

// resultReply ends a stream.
type resultReply struct {
	Code  string          `json:"code,omitempty"` // set: it failed
	Error string          `json:"error,omitempty"`
	Body  json.RawMessage `json:"body,omitempty"`
}

type execReply struct {
	ExitCode int `json:"exit_code"`
}

type clockRequest struct {
	UnixNano int64 `json:"unix_nano"`
}

type shutdownRequest struct {
	GraceMS int64 `json:"grace_ms"`
}

// Client is the host's end of a guest channel. Its methods may be called
// concurrently. When the connection ends every method fails with ErrClosed;
// dial again for a new session.
type Client struct {
	link *link
	wg   sync.WaitGroup

	mu      sync.Mutex
	streams map[uint32]*stream
	lastID  uint32
}

// Dial makes a session with the guest on conn and owns conn from then on, also
// when it fails. It waits for a guest that still boots until ctx ends; ctx does
// not bound the Client.
func Dial(ctx context.Context, conn net.Conn) (*Client, error) {
	return dial(ctx, conn, helloAgain)
}

func dial(ctx context.Context, conn net.Conn, again time.Duration) (*Client, error) {
	var id session
	if _, err := rand.Read(id[:]); err != nil {
		return nil, errors.Join(fmt.Errorf("making a session id: %w", err), conn.Close())
	}
	c := &Client{link: newLink(conn), streams: make(map[uint32]*stream)}
	ready := make(chan struct{})
	c.wg.Go(c.link.write)
	c.wg.Go(func() { c.read(bufio.NewReaderSize(conn, MaxPayload), helloPayload(id), ready) })

	hello := appendFrame(nil, frame{kind: frameHello, payload: helloPayload(id)})
	// Zeros are no frame, whatever they follow: enough of them end a frame
	// that was cut off and make the guest look for the HELLO behind them.
	filled := append(make([]byte, MaxPayload+2*headerSize), hello...)
	c.link.out <- queued{bytes: hello}
	timer := time.NewTimer(again)
	defer timer.Stop()
	for {
		select {
		case <-ready:
			return c, nil
		case <-ctx.Done():
			c.link.fail(context.Cause(ctx))
			c.wg.Wait()
			return nil, fmt.Errorf("waiting for the guest to answer: %w", context.Cause(ctx))
		case <-c.link.done:
			c.wg.Wait()
			return nil, fmt.Errorf("waiting for the guest to answer: %w", c.link.closed())
		case <-timer.C:
			// A full queue means that the guest reads nothing yet.
			select {
			case c.link.out <- queued{bytes: filled}:
				filled = hello
			default:
			}
			timer.Reset(helloEvery)
		}
	}
}

// Close ends the session and waits for the Client's goroutines. Calls under
// way fail with ErrClosed.
func (c *Client) Close() error {
	c.link.fail(errors.New("closed by its owner"))
	c.wg.Wait()
	return nil
}

// Done is closed when the connection to the guest has ended.
func (c *Client) Done() <-chan struct{} { return c.link.done }

// read is the goroutine that reads; it never blocks on anything but the
// connection.
func (c *Client) read(r *bufio.Reader, ack []byte, ready chan<- struct{}) {
	if err := hunt(r, ack); err != nil {
		c.link.fail(fmt.Errorf("reading: %w", err))
		return
	}
	close(ready)
	for {
		f, err := readFrame(r)
		if err == nil {
			err = c.dispatch(f)
		}
		if err != nil {
			c.link.fail(fmt.Errorf("reading: %w", err))
			return
		}
	}
}

func (c *Client) dispatch(f frame) error {
	switch f.kind {
	case frameHelloAck: // of a HELLO that was sent more than once
		return nil
	case frameData, frameWindow, frameResult, frameReset:
	default:
		return fmt.Errorf("type %d is not the guest's to send: %w", f.kind, errGarbage)
	}
	c.mu.Lock()
	s := c.streams[f.stream]
	last := c.lastID
	c.mu.Unlock()
	if s == nil {
		if f.stream > last {
			return fmt.Errorf("stream %d was never opened: %w", f.stream, errGarbage)
		}
		return nil // late frames of a stream given up
	}
	if f.kind == frameReset {
		s.end(errors.New("the guest gave up the call"))
		return nil
	}
	if err := s.deliver(f); err != nil {
		return err
	}
	if f.kind == frameResult {
		s.end(io.ErrUnexpectedEOF)
	}
	return nil
}

func (c *Client) open(ctx context.Context, method string, body any) (*stream, error) {
	encoded, err := json.Marshal(body)
	if err != nil {
		return nil, fmt.Errorf("encoding the request: %w", err)
	}
	payload, err := json.Marshal(openRequest{Method: method, Body: encoded})
	if err != nil {
		return nil, fmt.Errorf("encoding the request: %w", err)
	}
	if len(payload) > MaxPayload {
		return nil, fmt.Errorf("the request is %d bytes long, at most %d are allowed: %w", len(payload), MaxPayload, ErrInvalid)
	}
	c.mu.Lock()
	if len(c.streams) >= maxStreams || c.lastID == math.MaxUint32 {
		c.mu.Unlock()
		return nil, fmt.Errorf("more than %d calls to one guest at once", maxStreams)
	}
	c.lastID++
	s := newStream(c.link, c.lastID)
	c.streams[s.id] = s
	c.mu.Unlock()
	if err := s.send(ctx, frame{kind: frameOpen, payload: payload}); err != nil {
		c.forget(s, false)
		return nil, err
	}
	return s, nil
}

// forget drops a stream; one without a result is reset in the guest.
func (c *Client) forget(s *stream, finished bool) {
	c.mu.Lock()
	delete(c.streams, s.id)
	c.mu.Unlock()
	s.end(context.Canceled)
	if !finished {
		c.link.reset(s.id)
	}
}

// call opens a stream and runs it to its result. data is called with each data
// frame, in order.
func (c *Client) call(ctx context.Context, method string, body, reply any, data func(frame) error) error {
	s, err := c.open(ctx, method, body)
	if err != nil {
		return fmt.Errorf("asking the guest to %s: %w", method, err)
	}
	finished, err := c.finish(ctx, s, reply, data)
	c.forget(s, finished)
	if err != nil {
		return fmt.Errorf("asking the guest to %s: %w", method, err)
	}
	return nil
}

func (c *Client) finish(ctx context.Context, s *stream, reply any, data func(frame) error) (finished bool, err error) {
	for {
		f, err := s.next(ctx)
		if err != nil {
			return false, err
		}
		if f.kind == frameResult {
			return true, decodeResult(f.payload, reply)
		}
		if f.kind != frameData || data == nil {
			continue
		}
		if err := data(f); err != nil {
			return false, err
		}
		if err := s.consumed(ctx, f); err != nil {
			return false, err
		}
	}
}

func decodeResult(payload []byte, reply any) error {
	var result resultReply
	if err := json.Unmarshal(payload, &result); err != nil {
		return fmt.Errorf("decoding the guest's answer: %w", err)
	}
	if result.Code != "" {
		return &Error{Code: printable(result.Code, 64), Message: printable(result.Error, maxMessage)}
	}
	if reply == nil {
		return nil
	}
	if err := json.Unmarshal(result.Body, reply); err != nil {
		return fmt.Errorf("decoding the guest's answer: %w", err)
	}
	return nil
}

// unary is a call without data, bounded in time also when ctx is not.
func (c *Client) unary(ctx context.Context, method string, body, reply any, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return c.call(ctx, method, body, reply, nil)
}

// Configure gives the guest its identity and starts its workload. Repeating it
// changes nothing; a different Config fails with ErrConfigured.
func (c *Client) Configure(ctx context.Context, config Config) error {
	return c.unary(ctx, "configure", config, nil, callTimeout)
}

// State asks the guest how it is. Texts in it are bounded and printable.
func (c *Client) State(ctx context.Context) (State, error) {
	var state State
	if err := c.unary(ctx, "state", struct{}{}, &state, callTimeout); err != nil {
		return State{}, err
	}
	for _, text := range []*string{&state.BootID, &state.InstanceID, &state.Reason, &state.Agent, (*string)(&state.Workload)} {
		*text = printable(*text, maxMessage)
	}
	return state, nil
}

// Check runs a health probe in the guest: nil when healthy, ErrUnhealthy when
// not, any other error when that is not known.
func (c *Client) Check(ctx context.Context, check Check) error {
	// The guest keeps the check's own limit; the margin is for the way.
	return c.unary(ctx, "check", check, nil, check.Timeout()+5*time.Second)
}

// SetClock steps the guest's clock to so many nanoseconds since 1970 (UTC).
func (c *Client) SetClock(ctx context.Context, unixNano int64) error {
	return c.unary(ctx, "set_clock", clockRequest{UnixNano: unixNano}, nil, callTimeout)
}

// Shutdown asks the guest to end: SIGTERM for the workload, SIGKILL after
// graceMS, sync, off. It returns when the guest has begun; that the hypervisor
// ends is seen by its driver.
func (c *Client) Shutdown(ctx context.Context, graceMS int64) error {
	return c.unary(ctx, "shut_down", shutdownRequest{GraceMS: graceMS}, nil, callTimeout)
}

// Logs copies the workload's combined output to w until its end is reached, or
// with Follow until ctx ends. An error of w ends it too.
func (c *Client) Logs(ctx context.Context, request LogRequest, w io.Writer) error {
	return c.call(ctx, "logs", request, nil, func(f frame) error {
		_, err := w.Write(f.payload)
		return err
	})
}

// Exec runs a command in the guest and copies its input and output. When ctx
// ends the command is killed. stdin may be nil; a Read of it that blocks is not
// waited for, its goroutine ends when that Read does. resize may be nil.
func (c *Client) Exec(ctx context.Context, request ExecRequest, stdin io.Reader, stdout, stderr io.Writer, resize <-chan Size) (int, error) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	s, err := c.open(ctx, "exec", request)
	if err != nil {
		return -1, fmt.Errorf("asking the guest to exec: %w", err)
	}
	if resize != nil {
		wg.Go(func() { sendSizes(ctx, s, resize) })
	}
	go sendStdin(ctx, s, stdin)
	var reply execReply
	finished, err := c.finish(ctx, s, &reply, func(f frame) error {
		w := stdout
		if f.flags&channelMask == channelStderr {
			w = stderr
		}
		if len(f.payload) == 0 || w == nil {
			return nil
		}
		_, err := w.Write(f.payload)
		return err
	})
	c.forget(s, finished)
	if err != nil {
		return -1, fmt.Errorf("asking the guest to exec: %w", err)
	}
	return reply.ExitCode, nil
}

// sendStdin ends when the stream does; its errors are those of the stream,
// which the call itself reports.
func sendStdin(ctx context.Context, s *stream, stdin io.Reader) {
	if stdin != nil {
		buffer := make([]byte, dataChunk)
		for {
			n, err := stdin.Read(buffer)
			if _, sendErr := s.write(ctx, channelStdin, buffer[:n]); sendErr != nil {
				return
			}
			if err != nil {
				break
			}
		}
	}
	//nolint:errcheck // the call reports how the stream ended
	s.writeEnd(ctx, channelStdin)
}

func sendSizes(ctx context.Context, s *stream, resize <-chan Size) {
	for {
		select {
		case <-ctx.Done():
			return
		case size, ok := <-resize:
			if !ok {
				return
			}
			payload, err := json.Marshal(size)
			if err != nil {
				return
			}
			if err := s.send(ctx, frame{kind: frameResize, payload: payload}); err != nil {
				return
			}
		}
	}
}
