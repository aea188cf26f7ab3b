package guest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// handler is a guest in memory.
type handler struct {
	mu     sync.Mutex
	config *Config
	exec   func(ctx context.Context, request ExecRequest, streams Streams) (int, error)
	ended  chan string // calls that ended with their context
}

func (h *handler) Configure(_ context.Context, config Config) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.config != nil && h.config.InstanceID != config.InstanceID {
		return fmt.Errorf("%w: as %s", ErrConfigured, h.config.InstanceID)
	}
	h.config = &config
	return nil
}

func (h *handler) State(context.Context) (State, error) {
	return State{BootID: "boot\x1b[31m", Workload: WorkloadNone}, nil
}

func (h *handler) Exec(ctx context.Context, request ExecRequest, streams Streams) (int, error) {
	return h.exec(ctx, request, streams)
}

func (h *handler) Logs(ctx context.Context, request LogRequest, w io.Writer) error {
	if _, err := io.WriteString(w, "one\n"); err != nil {
		return err
	}
	if request.Follow {
		<-ctx.Done()
		h.ended <- "logs"
	}
	return nil
}

func (h *handler) Check(ctx context.Context, check Check) error {
	switch check.Kind {
	case "tcp":
		return fmt.Errorf("%w: refused", ErrUnhealthy)
	case "slow":
		<-ctx.Done()
		return ErrUnhealthy
	}
	return nil
}

func (h *handler) SetClock(context.Context, int64) error             { return nil }
func (h *handler) Shutdown(_ context.Context, _ time.Duration) error { return nil }

// port is a virtio-serial port: the guest's side survives the host's connections.
type port struct{ conns chan net.Conn }

func (p *port) open(ctx context.Context) (io.ReadWriteCloser, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func serve(t *testing.T, h Handler) *port {
	t.Helper()
	p := &port{conns: make(chan net.Conn)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		Serve(ctx, p.open, h)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return p
}

func connect(t *testing.T, h Handler) *Client {
	t.Helper()
	p := serve(t, h)
	host, inside := net.Pipe()
	p.conns <- inside
	c, err := Dial(testContext(t), host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeClient(t, c) })
	return c
}

func closeClient(t *testing.T, c *Client) {
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestCalls(t *testing.T) {
	ctx := testContext(t)
	c := connect(t, &handler{})
	config := Config{InstanceID: "web-1", Env: []string{"A=b"}}
	for range 2 {
		if err := c.Configure(ctx, config); err != nil {
			t.Fatal(err)
		}
	}
	config.InstanceID = "web-2"
	if err := c.Configure(ctx, config); !errors.Is(err, ErrConfigured) {
		t.Fatalf("a different configuration: %v, want ErrConfigured", err)
	}
	state, err := c.State(ctx)
	if err != nil || state.BootID != "boot[31m" {
		t.Fatalf("state %+v, %v", state, err)
	}
	if err := c.Check(ctx, Check{Kind: "tcp"}); !errors.Is(err, ErrUnhealthy) {
		t.Fatalf("check: %v, want ErrUnhealthy", err)
	}
	if err := c.Check(ctx, Check{Kind: "slow", TimeoutMS: 10}); !errors.Is(err, ErrUnhealthy) {
		t.Fatalf("slow check: %v, want ErrUnhealthy", err)
	}
	if err := c.call(ctx, "fly", nil, nil, nil); !errors.Is(err, ErrInvalid) {
		t.Fatalf("unknown method: %v, want ErrInvalid", err)
	}
	if err := c.Configure(ctx, Config{Env: []string{strings.Repeat("x", MaxPayload)}}); !errors.Is(err, ErrInvalid) {
		t.Fatalf("huge request: %v, want ErrInvalid", err)
	}
	if err := errors.Join(c.SetClock(ctx, 1), c.Shutdown(ctx, 1000)); err != nil {
		t.Fatal(err)
	}
}

func TestExecCopiesInputAndOutput(t *testing.T) {
	h := &handler{exec: func(_ context.Context, request ExecRequest, s Streams) (int, error) {
		if _, err := fmt.Fprintf(s.Stderr, "args %q\n", request.Args); err != nil {
			return 0, err
		}
		n, err := io.Copy(s.Stdout, s.Stdin)
		return int(n % 251), err
	}}
	c := connect(t, h)
	input := bytes.Repeat([]byte("0123456789abcdef"), 200_000) // many windows
	var stdout, stderr bytes.Buffer
	code, err := c.Exec(testContext(t), ExecRequest{Args: []string{"cat"}}, bytes.NewReader(input), &stdout, &stderr, nil)
	if err != nil {
		t.Fatal(err)
	}
	if code != len(input)%251 || !bytes.Equal(stdout.Bytes(), input) || stderr.String() != "args [\"cat\"]\n" {
		t.Fatalf("code %d, %d bytes of stdout, stderr %q", code, stdout.Len(), stderr.String())
	}
}

// gate blocks writes until it is opened.
type gate struct{ open chan struct{} }

func (g gate) Write(p []byte) (int, error) {
	<-g.open
	return len(p), nil
}

func TestSlowExecReaderDoesNotBlockOthers(t *testing.T) {
	const total = 4 << 20
	h := &handler{exec: func(_ context.Context, _ ExecRequest, s Streams) (int, error) {
		_, err := s.Stdout.Write(make([]byte, total))
		return 7, err
	}}
	c := connect(t, h)
	ctx := testContext(t)
	g := gate{make(chan struct{})}
	result := make(chan error, 1)
	go func() {
		code, err := c.Exec(ctx, ExecRequest{Args: []string{"yes"}}, nil, g, g, nil)
		if err == nil && code != 7 {
			err = fmt.Errorf("exit code %d", code)
		}
		result <- err
	}()
	for range 50 {
		if err := c.Check(ctx, Check{}); err != nil {
			t.Fatal(err)
		}
	}
	close(g.open)
	if err := <-result; err != nil {
		t.Fatal(err)
	}
}

func TestCancelEndsTheCallInTheGuest(t *testing.T) {
	h := &handler{ended: make(chan string, 2)}
	h.exec = func(ctx context.Context, _ ExecRequest, _ Streams) (int, error) {
		<-ctx.Done()
		h.ended <- "exec"
		return 0, ctx.Err()
	}
	c := connect(t, h)
	ctx, cancel := context.WithCancel(testContext(t))
	read, write := io.Pipe() // a stdin that blocks
	result := make(chan error, 2)
	lines := make(chan struct{}, 1)
	go func() {
		_, err := c.Exec(ctx, ExecRequest{Args: []string{"sleep"}}, read, io.Discard, io.Discard, nil)
		result <- err
	}()
	go func() {
		result <- c.Logs(ctx, LogRequest{Follow: true}, writerFunc(func(p []byte) (int, error) {
			lines <- struct{}{}
			return len(p), nil
		}))
	}()
	<-lines
	cancel()
	for range 2 {
		if err := <-result; !errors.Is(err, context.Canceled) {
			t.Fatalf("cancelled call: %v", err)
		}
	}
	// The guest may have got exec and its reset in one go and not have begun.
	if got := <-h.ended; got == "exec" {
		<-h.ended
	}
	if err := errors.Join(write.Close(), c.Check(testContext(t), Check{})); err != nil {
		t.Fatal(err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestResizeReachesTheGuest(t *testing.T) {
	h := &handler{exec: func(_ context.Context, _ ExecRequest, s Streams) (int, error) {
		size := <-s.Resize
		return int(size.Rows)*1000 + int(size.Cols), nil
	}}
	c := connect(t, h)
	resize := make(chan Size, 1)
	resize <- Size{Rows: 24, Cols: 80}
	code, err := c.Exec(testContext(t), ExecRequest{Args: []string{"sh"}, TTY: true}, nil, io.Discard, io.Discard, resize)
	if err != nil || code != 24080 {
		t.Fatalf("code %d, %v", code, err)
	}
}

// A port whose guest never sees that the host has changed: all connections are
// one stream of bytes for it, in the middle of whatever was sent.
func TestNewSessionOnTheSameBytes(t *testing.T) {
	for _, cut := range []int{0, 1, 4, 5, 9, 10, 11, 500} {
		t.Run(fmt.Sprint(cut), func(t *testing.T) {
			h := &handler{ended: make(chan string, 1)}
			p := serve(t, h)
			host, inside := net.Pipe()
			p.conns <- inside
			first, err := Dial(testContext(t), &keepOpen{Conn: host})
			if err != nil {
				t.Fatal(err)
			}
			lines := make(chan struct{}, 1)
			result := make(chan error, 1)
			go func() {
				result <- first.Logs(testContext(t), LogRequest{Follow: true}, writerFunc(func(p []byte) (int, error) {
					lines <- struct{}{}
					return len(p), nil
				}))
			}()
			<-lines
			closeClient(t, first)
			if err := <-result; !errors.Is(err, ErrClosed) {
				t.Fatalf("call of a closed client: %v", err)
			}
			// The rest of a frame that the former host did not finish.
			unfinished := appendFrame(nil, frame{stream: 9, kind: frameData, payload: make([]byte, 40_000)})[:cut]
			if _, err := host.Write(unfinished); err != nil {
				t.Fatal(err)
			}
			if err := host.SetReadDeadline(time.Time{}); err != nil {
				t.Fatal(err)
			}
			second, err := Dial(testContext(t), host)
			if err != nil {
				t.Fatal(err)
			}
			defer closeClient(t, second)
			<-h.ended // the former session's call was ended
			if _, err := second.State(testContext(t)); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// keepOpen stops reading on Close and leaves the connection alone.
type keepOpen struct{ net.Conn }

func (k *keepOpen) Close() error { return k.SetReadDeadline(time.Unix(1, 0)) }

func TestHostDiscardsBytesOfTheFormerSession(t *testing.T) {
	p := serve(t, &handler{})
	host, inside := net.Pipe()
	stale := helloPayload(session{1})
	junk := append(appendFrame(nil, frame{stream: 3, kind: frameData, payload: []byte("old")}), stale[:20]...)
	p.conns <- &prefixed{Conn: inside, prefix: junk}
	c, err := Dial(testContext(t), host)
	if err != nil {
		t.Fatal(err)
	}
	defer closeClient(t, c)
	if _, err := c.State(testContext(t)); err != nil {
		t.Fatal(err)
	}
}

// prefixed writes junk ahead of the first bytes.
type prefixed struct {
	net.Conn
	prefix []byte
}

func (p *prefixed) Write(b []byte) (int, error) {
	if len(p.prefix) > 0 {
		if _, err := p.Conn.Write(p.prefix); err != nil {
			return 0, err
		}
		p.prefix = nil
	}
	return p.Conn.Write(b)
}

func TestDialWaitsForTheGuestAndNoLonger(t *testing.T) {
	host, inside := net.Pipe()
	defer inside.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := Dial(ctx, host); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("dialling a silent guest: %v", err)
	}
	host, inside = net.Pipe()
	go inside.Close()
	if _, err := Dial(testContext(t), host); !errors.Is(err, ErrClosed) {
		t.Fatalf("dialling a guest that hangs up: %v", err)
	}
}

// evilGuest answers the hello and then sends what it likes.
func evilGuest(t *testing.T, send func(conn net.Conn)) *Client {
	t.Helper()
	host, inside := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		hello := make([]byte, headerSize+len(helloMagic)+sessionSize)
		if _, err := io.ReadFull(inside, hello); err != nil {
			return
		}
		if _, err := inside.Write(appendFrame(nil, frame{kind: frameHelloAck, payload: hello[headerSize:]})); err != nil {
			return
		}
		drained := make(chan struct{})
		request := make([]byte, 1)
		if _, err := inside.Read(request); err != nil {
			return
		}
		go func() {
			defer close(drained)
			// until it is closed
			io.Copy(io.Discard, inside)
		}()
		send(inside)
		<-drained
	}()
	c, err := Dial(testContext(t), host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		closeClient(t, c)
		// of a test's pipe
		inside.Close()
		<-done
	})
	return c
}

func TestHostileGuestLosesItsConnection(t *testing.T) {
	data := func(size int) []byte {
		return appendFrame(nil, frame{stream: 1, kind: frameData, flags: channelStdout, payload: make([]byte, size)})
	}
	cases := map[string][]byte{
		"window overrun":   bytes.Repeat(data(dataChunk), 20),
		"tiny frames":      bytes.Repeat(data(1), 1<<13),
		"empty frames":     bytes.Repeat(data(0), 1<<13),
		"payload too long": binary.BigEndian.AppendUint32([]byte{0, 0, 0, 1, byte(frameData), 1}, MaxPayload+1),
		"unknown stream":   appendFrame(nil, frame{stream: 99, kind: frameResult}),
		"window of air":    appendFrame(nil, frame{stream: 1, kind: frameWindow, payload: []byte{0xff, 0xff, 0xff, 0xff}}),
		"host's frame":     appendFrame(nil, frame{stream: 1, kind: frameOpen}),
		"noise":            []byte("\xff\xfe<html>this is no frame"),
	}
	for name, bytes := range cases {
		t.Run(name, func(t *testing.T) {
			g := gate{make(chan struct{})}
			c := evilGuest(t, func(conn net.Conn) {
				// the host hangs up in the middle
				conn.Write(bytes)
			})
			result := make(chan error, 1)
			go func() { result <- c.Logs(testContext(t), LogRequest{}, g) }()
			select {
			case <-c.Done():
			case <-time.After(10 * time.Second):
				t.Error("the host did not hang up")
			}
			close(g.open)
			if err := <-result; err == nil {
				t.Error("the call succeeded")
			}
		})
	}
}

func TestHostileAnswers(t *testing.T) {
	result := func(payload string) []byte {
		return appendFrame(nil, frame{stream: 1, kind: frameResult, payload: []byte(payload)})
	}
	for name, payload := range map[string]string{
		"no JSON":    "}{",
		"wrong type": `{"body":[1,2]}`,
		"no body":    `{}`,
		"deep":       `{"body":` + strings.Repeat("[", 30_000) + strings.Repeat("]", 30_000) + `}`,
	} {
		t.Run(name, func(t *testing.T) {
			c := evilGuest(t, func(conn net.Conn) {
				if _, err := conn.Write(result(payload)); err != nil {
					t.Error(err)
				}
			})
			if _, err := c.State(testContext(t)); err == nil {
				t.Error("the call succeeded")
			}
		})
	}
	t.Run("long error", func(t *testing.T) {
		c := evilGuest(t, func(conn net.Conn) {
			if _, err := conn.Write(result(`{"code":"x","error":"` + strings.Repeat(`\u001b[1m`, 5000) + `"}`)); err != nil {
				t.Error(err)
			}
		})
		_, err := c.State(testContext(t))
		var remote *Error
		if !errors.As(err, &remote) || len(remote.Message) > maxMessage+8 || strings.ContainsRune(remote.Message, 0x1b) {
			t.Errorf("error %.100q", err)
		}
	})
}
