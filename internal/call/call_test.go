package call_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// sink keeps an answer.
type sink struct {
	head  blixard.ResponseHead
	body  bytes.Buffer
	begun int
	fail  error         // of Write
	gate  chan struct{} // a value for each Write, unless nil
}

func (s *sink) Begin(head blixard.ResponseHead) error { s.head = head; s.begun++; return nil }

func (s *sink) Write(p []byte) (int, error) {
	if s.gate != nil {
		<-s.gate
	}
	if s.fail != nil {
		return 0, s.fail
	}
	return s.body.Write(p)
}

// handler is a guest whose functions are Go functions.
type handler struct {
	init     func(*call.Init) (call.Ready, error)
	restore  func(*call.Identity) (call.Ack, error)
	invoke   func(*call.Request, call.ResponseWriter)
	canceled chan string
	shutdown chan string
	wg       sync.WaitGroup
}

func (h *handler) Init(i *call.Init) (call.Ready, error)         { return h.init(i) }
func (h *handler) Restore(i *call.Identity) (call.Ack, error)    { return h.restore(i) }
func (h *handler) Invoke(q *call.Request, w call.ResponseWriter) { h.wg.Go(func() { h.invoke(q, w) }) }
func (h *handler) Cancel(q *call.Request)                        { h.canceled <- q.RequestID }
func (h *handler) Stat() (call.Stat, error) {
	return call.Stat{UsedMiB: 12, Open: 1, RuntimeUp: true}, nil
}

func (h *handler) Shutdown(reason string, grace time.Duration) {
	h.shutdown <- fmt.Sprint(reason, grace)
}

// pair connects a host with a guest for the test's time.
func pair(t *testing.T, h *handler, options call.Options) (*call.Conn, *call.Guest) {
	t.Helper()
	host, port := net.Pipe()
	conn := call.New(host, options)
	guest := call.NewGuest(port, h)
	served := make(chan error, 1)
	go func() { served <- guest.Serve() }()
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		port.Close()
		<-served
		h.wg.Wait()
	})
	return conn, guest
}

func invocation(payload string) *blixard.Invocation {
	return &blixard.Invocation{RequestID: "r-1", Payload: []byte(payload), Deadline: time.Now().Add(10 * time.Second), TraceID: "Root=1", ClientContext: "{}"}
}

func finish(t *testing.T, w call.ResponseWriter, o call.Outcome) {
	if err := w.Finish(o); err != nil {
		t.Error(err)
	}
}

func TestQuestions(t *testing.T) {
	init := call.Init{
		Function: "f", Version: "7", ARN: "arn", Region: "local", Runtime: "bootstrap", Handler: "h", Command: []string{"a", "b"}, Port: 8080,
		Env: []blixard.Label{{Key: "A", Value: "1"}}, MemoryMiB: 128, EphemeralMiB: 512, TimeoutMS: 3000, InitMS: 10000, Concurrency: 2,
		MaxPayload: 1, MaxResponse: 2, MaxStream: 3, LogGroup: "g", LogStream: "s", InitializationType: "snap-start",
		CodeDevice: "/dev/vda", RuntimeDevice: "/dev/vdb", UnixNano: 5, Entropy: []byte{1, 2}, Hostname: "n", Address: "10.0.2.15/24", Gateway: "10.0.2.2", DNS: []string{"10.0.2.3"}, MTU: 1400,
	}
	identity := call.Identity{
		Epoch: 9, UnixNano: 8, Entropy: bytes.Repeat([]byte{7}, 64), MachineID: "m", BootID: "b", Hostname: "h", Instance: "i", Node: "n",
		MAC: "52:54:00:00:00:01", Address: "10.0.2.15/24", Gateway: "10.0.2.2", DNS: []string{"1.1.1.1"}, MTU: 1, LogStream: "l", InitType: "snap-start", RestoreMS: 3, CheckClone: true,
	}
	var guest *call.Guest
	h := &handler{
		shutdown: make(chan string, 1),
		init: func(got *call.Init) (call.Ready, error) {
			if diff := cmp.Diff(&init, got); diff != "" {
				t.Errorf("init (-sent +got):\n%s", diff)
			}
			if err := guest.Log([]byte("hello\n")); err != nil {
				t.Error(err)
			}
			return call.Ready{Init: time.Second, Boot: time.Minute, UsedMiB: 3}, nil
		},
		restore: func(got *call.Identity) (call.Ack, error) {
			if diff := cmp.Diff(&identity, got); diff != "" {
				t.Errorf("identity (-sent +got):\n%s", diff)
			}
			return call.Ack{Took: 1, Hook: 2, Seen: []string{"a=b"}}, nil
		},
	}
	conn, g := pair(t, h, call.Options{})
	guest = g
	ctx := t.Context()
	ready, err := conn.Init(ctx, init)
	if want := (call.Ready{Init: time.Second, Boot: time.Minute, UsedMiB: 3, Log: []byte("hello\n")}); err != nil || !cmp.Equal(ready, want) {
		t.Errorf("Init = %+v, %v, want %+v", ready, err, want)
	}
	ack, err := conn.Restore(ctx, identity)
	if want := (call.Ack{Took: 1, Hook: 2, Seen: []string{"a=b"}}); err != nil || !cmp.Equal(ack, want) {
		t.Errorf("Restore = %+v, %v, want %+v", ack, err, want)
	}
	if stat, err := conn.Stat(ctx); err != nil || stat.UsedMiB != 12 || !stat.RuntimeUp {
		t.Errorf("Stat = %+v, %v", stat, err)
	}
	if err := conn.Shutdown(ctx, "spindown", time.Second); err != nil || <-h.shutdown != "spindown1s" {
		t.Errorf("Shutdown: %v", err)
	}
}

func TestFaultsOfInit(t *testing.T) {
	var failure error
	h := &handler{init: func(*call.Init) (call.Ready, error) { return call.Ready{}, failure }}
	conn, _ := pair(t, h, call.Options{})
	failure = &call.InitError{Type: "Runtime.ExitError", Message: "exit status 1\x1b[2J", Body: []byte(`{"a":1}`)}
	_, err := conn.Init(t.Context(), call.Init{})
	if fault, ok := errors.AsType[*call.InitError](err); !ok || fault.Type != "Runtime.ExitError" || string(fault.Body) != `{"a":1}` || fault.Message != "exit status 1?[2J" {
		t.Errorf("Init: %v, want the function's fault", err)
	}
	failure = errors.New("no disk")
	if _, err := conn.Init(t.Context(), call.Init{}); !errors.Is(err, call.ErrRefused) || !strings.Contains(err.Error(), "no disk") {
		t.Errorf("Init: %v, want ErrRefused", err)
	}
}

func TestInvoke(t *testing.T) {
	var guest *call.Guest
	h := &handler{invoke: func(q *call.Request, w call.ResponseWriter) {
		if q.RequestID != "r-1" || q.ARN != "arn:x" || q.TraceID != "Root=1" || q.RemainingMS < 5000 || q.HTTP == nil || q.HTTP.Headers[0][1] != "v" {
			t.Errorf("request %+v", q)
		}
		if err := guest.Log([]byte("working\n")); err != nil {
			t.Error(err)
		}
		if err := w.Begin(blixard.ResponseHead{Status: 201, ContentType: "text/plain", Headers: [][2]string{{"a", "b"}}}); err != nil {
			t.Error(err)
		}
		if _, err := w.Write(append([]byte("got "), q.Payload...)); err != nil {
			t.Error(err)
		}
		finish(t, w, call.Outcome{Handler: time.Second, UsedMiB: 4, Dropped: 2})
		if err := w.Finish(call.Outcome{}); !errors.Is(err, call.ErrEnded) {
			t.Errorf("second Finish: %v", err)
		}
	}}
	var streamed bytes.Buffer
	conn, g := pair(t, h, call.Options{Log: func(id string, p []byte) { fmt.Fprint(&streamed, id, ":", string(p)) }})
	guest = g
	inv := invocation(`{"a":1}`)
	inv.HTTP = &blixard.HTTPRequest{Method: "GET", Target: "/x", Host: "h", Headers: [][2]string{{"k", "v"}}}
	var s sink
	result, err := conn.Invoke(t.Context(), inv, call.Target{ARN: "arn:x"}, &s)
	if err != nil {
		t.Fatal(err)
	}
	want := call.Result{Handler: time.Second, UsedMiB: 4, Dropped: 2, Log: []byte("working\n"), Bytes: 11}
	if diff := cmp.Diff(want, result); diff != "" {
		t.Errorf("result (-want +got):\n%s", diff)
	}
	if s.body.String() != `got {"a":1}` || s.head.Status != 201 || s.head.ContentType != "text/plain" || s.begun != 1 {
		t.Errorf("answer %q %+v", s.body.String(), s.head)
	}
	if streamed.String() != "r-1:working\n" {
		t.Errorf("log %q", streamed.String())
	}
}

// Payloads and answers of all sizes round the bounds of frames and windows come
// through as they are, several at once.
func TestSizes(t *testing.T) {
	h := &handler{invoke: func(q *call.Request, w call.ResponseWriter) {
		for rest := q.Payload; len(rest) > 0; {
			n := min(len(rest), 100_000)
			if _, err := w.Write(rest[:n]); err != nil {
				t.Error(err)
			}
			rest = rest[n:]
		}
		finish(t, w, call.Outcome{})
	}}
	conn, _ := pair(t, h, call.Options{})
	var wg sync.WaitGroup
	for i, size := range []int{0, 1, 48<<10 - 1, 48 << 10, 48<<10 + 1, call.MaxFrame - 40, call.MaxFrame, call.MaxFrame + 1, call.Window, call.Window + 1, 3 << 20, call.MaxPayload} {
		wg.Go(func() {
			payload := bytes.Repeat([]byte{byte('a' + i)}, size)
			var s sink
			inv := invocation(string(payload))
			inv.Deadline = time.Now().Add(time.Minute)
			result, err := conn.Invoke(t.Context(), inv, call.Target{}, &s)
			if err != nil || result.Bytes != int64(size) || !bytes.Equal(s.body.Bytes(), payload) || s.begun != 1 {
				t.Errorf("%d bytes: %v, %d came back of %d, begun %d", size, err, s.body.Len(), result.Bytes, s.begun)
			}
		})
	}
	wg.Wait()
}

// A sink that is slow holds up its own invocation only.
func TestSlowSink(t *testing.T) {
	h := &handler{invoke: func(q *call.Request, w call.ResponseWriter) {
		if string(q.Payload) == "long" {
			for range 64 {
				if _, err := w.Write(make([]byte, 64<<10)); err != nil {
					t.Error(err)
					return
				}
			}
		}
		finish(t, w, call.Outcome{})
	}}
	conn, _ := pair(t, h, call.Options{})
	slow := &sink{gate: make(chan struct{})}
	done := make(chan error, 1)
	go func() {
		_, err := conn.Invoke(context.Background(), invocation("long"), call.Target{}, slow)
		done <- err
	}()
	slow.gate <- struct{}{}
	for range 10 {
		if _, err := conn.Invoke(t.Context(), invocation("short"), call.Target{}, &sink{}); err != nil {
			t.Fatal(err)
		}
	}
	close(slow.gate)
	if err := <-done; err != nil || slow.body.Len() != 4<<20 {
		t.Errorf("%v, %d bytes", err, slow.body.Len())
	}
}

func TestErrorsOfFunctions(t *testing.T) {
	cases := map[string]func(w call.ResponseWriter){
		"nothing was written": func(call.ResponseWriter) {},
		"not sent yet": func(w call.ResponseWriter) {
			if _, err := w.Write([]byte("half")); err != nil {
				t.Error(err)
			}
		},
	}
	for name, write := range cases {
		t.Run(name, func(t *testing.T) {
			h := &handler{invoke: func(_ *call.Request, w call.ResponseWriter) {
				write(w)
				finish(t, w, call.Outcome{Error: &blixard.FunctionError{Kind: "Unhandled", Type: "T"}, Body: []byte("{}"), Detail: "d"})
			}}
			conn, _ := pair(t, h, call.Options{})
			var s sink
			result, err := conn.Invoke(t.Context(), invocation(""), call.Target{}, &s)
			if err != nil || result.Error == nil || result.Error.Type != "T" || s.body.String() != "{}" || s.head.ContentType != "application/json" {
				t.Errorf("%+v, %v, body %q", result, err, s.body.String())
			}
		})
	}
	t.Run("sent already", func(t *testing.T) {
		h := &handler{invoke: func(_ *call.Request, w call.ResponseWriter) {
			if err := w.Begin(blixard.ResponseHead{Streaming: true}); err != nil {
				t.Error(err)
			}
			if _, err := w.Write(make([]byte, 50<<10)); err != nil {
				t.Error(err)
			}
			finish(t, w, call.Outcome{Error: &blixard.FunctionError{Kind: "Unhandled", Type: "T"}, Body: []byte("{}"), Detail: "why"})
		}}
		conn, _ := pair(t, h, call.Options{})
		var s sink
		result, err := conn.Invoke(t.Context(), invocation(""), call.Target{}, &s)
		if err != nil || result.Error == nil || result.Detail != "why" || s.body.Len() != 50<<10 || !s.head.Streaming {
			t.Errorf("%+v, %v, body of %d bytes", result, err, s.body.Len())
		}
	})
}

// When the caller's time is over it is told so at once, whatever the guest does,
// and the guest is told that nobody waits.
func TestCancel(t *testing.T) {
	release, started := make(chan struct{}), make(chan struct{})
	h := &handler{canceled: make(chan string, 1), invoke: func(q *call.Request, w call.ResponseWriter) {
		if string(q.Payload) != "hang" {
			finish(t, w, call.Outcome{})
			return
		}
		close(started)
		<-release
		if err := w.Finish(call.Outcome{}); !errors.Is(err, call.ErrEnded) {
			t.Errorf("Finish after the cancellation: %v", err)
		}
	}}
	conn, _ := pair(t, h, call.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		result, err := conn.Invoke(ctx, invocation("hang"), call.Target{}, &sink{})
		if !errors.Is(err, context.Canceled) || !result.Broken {
			t.Errorf("%+v, %v", result, err)
		}
	}()
	<-started
	cancel()
	<-done
	if id := <-h.canceled; id != "r-1" {
		t.Errorf("cancelled %q", id)
	}
	close(release)
	if _, err := conn.Invoke(t.Context(), invocation(""), call.Target{}, &sink{}); err != nil {
		t.Errorf("the connection is of no use any more: %v", err)
	}
}

func TestSinkFails(t *testing.T) {
	broken := errors.New("client is gone")
	h := &handler{canceled: make(chan string, 1), invoke: func(_ *call.Request, w call.ResponseWriter) {
		for {
			if _, err := w.Write(make([]byte, 60<<10)); err != nil {
				return
			}
		}
	}}
	conn, _ := pair(t, h, call.Options{})
	result, err := conn.Invoke(t.Context(), invocation(""), call.Target{}, &sink{fail: broken})
	if !errors.Is(err, call.ErrSink) || !errors.Is(err, broken) || !result.Broken {
		t.Errorf("%+v, %v", result, err)
	}
	<-h.canceled
}

// A guest that takes nothing in does not hold the host up.
func TestDeafGuest(t *testing.T) {
	host, port := net.Pipe()
	defer port.Close()
	conn := call.New(host, call.Options{})
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	result, err := conn.Invoke(ctx, invocation("x"), call.Target{}, &sink{})
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, call.ErrClosed) || !result.Broken {
		t.Errorf("%+v, %v", result, err)
	}
	<-conn.Done()
	if _, err := conn.Stat(t.Context()); !errors.Is(err, call.ErrClosed) {
		t.Errorf("Stat: %v", err)
	}
}

func TestLogIsBounded(t *testing.T) {
	var guest *call.Guest
	h := &handler{invoke: func(_ *call.Request, w call.ResponseWriter) {
		for i := range 1000 {
			if err := guest.Log(fmt.Appendf(nil, "%04d %s\n", i, strings.Repeat("x", 94))); err != nil {
				t.Error(err)
			}
		}
		finish(t, w, call.Outcome{})
	}}
	conn, g := pair(t, h, call.Options{LogBytes: 1000})
	guest = g
	result, err := conn.Invoke(t.Context(), invocation(""), call.Target{}, &sink{})
	if err != nil || len(result.Log) > 2000 || !bytes.HasSuffix(result.Log, []byte("x\n")) || !bytes.Contains(result.Log, []byte("0999 ")) {
		t.Errorf("%v, %d bytes: %q", err, len(result.Log), result.Log)
	}
}

func TestHeadTooLong(t *testing.T) {
	conn, _ := pair(t, &handler{}, call.Options{})
	inv := invocation("")
	inv.HTTP = &blixard.HTTPRequest{Headers: [][2]string{{"a", strings.Repeat("x", call.MaxFrame)}}}
	result, err := conn.Invoke(t.Context(), inv, call.Target{}, &sink{})
	if !errors.Is(err, &blixard.Error{Code: blixard.CodeInvalid}) || result.Broken {
		t.Errorf("%+v, %v", result, err)
	}
}
