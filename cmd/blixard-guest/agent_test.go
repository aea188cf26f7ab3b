package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/blixard/blixard/internal/guest"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("os/signal.loop"), goleak.Cleanup(func(code int) {
		if err := os.RemoveAll(nixRoot); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
		os.Exit(code)
	}))
}

// serveAgent runs the agent as a service of this machine and connects to it. It
// reaps all children of the process, so there may be one at a time.
func serveAgent(t *testing.T) (*agent, *guest.Client) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	children := newReaper()
	reaping, serving := make(chan struct{}), make(chan struct{})
	log := newLog(io.Discard)
	a := newAgent(false, children, log)
	go func() {
		defer close(reaping)
		children.run(ctx)
	}()
	host, inside := net.Pipe()
	conns := make(chan net.Conn, 1)
	conns <- inside
	go func() {
		defer close(serving)
		guest.Serve(ctx, func(ctx context.Context) (io.ReadWriteCloser, error) {
			select {
			case c := <-conns:
				return c, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}, a)
	}()
	dialling, stop := context.WithTimeout(ctx, 10*time.Second)
	defer stop()
	c, err := guest.Dial(dialling, host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		a.workload.stop(time.Second)
		cancel()
		<-serving
		<-reaping
		log.close()
	})
	return a, c
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestWorkloadRunsOnceAndIsReported(t *testing.T) {
	_, c := serveAgent(t)
	ctx := testContext(t)
	config := guest.Config{
		InstanceID: "job-1", Generation: 2, Env: []string{"WORD=hello"},
		Command: []string{"sh", "-c", "echo $WORD $BLIXARD_INSTANCE; printf 'no end' >&2; exit 5"},
	}
	if err := c.Configure(ctx, config); err != nil {
		t.Fatal(err)
	}
	state := guest.State{Workload: guest.WorkloadRunning}
	for state.Workload == guest.WorkloadRunning && ctx.Err() == nil {
		var err error
		if state, err = c.State(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if state.Workload != guest.WorkloadExited || state.ExitCode != 5 || state.Pid != 0 {
		t.Errorf("state %+v", state)
	}
	var log bytes.Buffer
	if err := c.Logs(ctx, guest.LogRequest{}, &log); err != nil || log.String() != "hello job-1\nno end\n" {
		t.Errorf("log %q, %v", log.String(), err)
	}
	if err := c.Configure(ctx, config); err != nil {
		t.Errorf("configuring again: %v", err)
	}
	if state, err := c.State(ctx); err != nil || state.Workload != guest.WorkloadExited {
		t.Errorf("the workload was started again: %+v, %v", state, err)
	}
}

func TestWorkloadThatCannotStartIsAState(t *testing.T) {
	_, c := serveAgent(t)
	ctx := testContext(t)
	if err := c.Configure(ctx, guest.Config{InstanceID: "x-1", Command: []string{"no-such-program"}}); err != nil {
		t.Fatal(err)
	}
	if state, err := c.State(ctx); err != nil || state.Workload != guest.WorkloadFailed || !strings.Contains(state.Reason, "no-such-program") {
		t.Errorf("state %+v, %v", state, err)
	}
	if err := c.Configure(ctx, guest.Config{InstanceID: "x-1", Env: []string{"NOVALUE"}}); err == nil {
		t.Error("another configuration was taken")
	}
}

func TestWorkloadIsStoppedAndThenKilled(t *testing.T) {
	t.Run("stopped", func(t *testing.T) { stopWorkload(t, "trap 'exit 9' TERM; echo up; while :; do sleep 0.01; done", 9) })
	t.Run("killed", func(t *testing.T) { stopWorkload(t, "trap '' TERM; echo up; while :; do sleep 0.01; done", 137) })
}

func stopWorkload(t *testing.T, script string, code int) {
	a, c := serveAgent(t)
	ctx := testContext(t)
	if err := c.Configure(ctx, guest.Config{InstanceID: "x-1", Command: []string{"sh", "-c", script}}); err != nil {
		t.Fatal(err)
	}
	up, w := io.Pipe()
	following, stop := context.WithCancel(ctx)
	logs := make(chan error, 1)
	go func() { logs <- c.Logs(following, guest.LogRequest{Follow: true}, w) }()
	if _, err := io.ReadFull(up, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	stop()
	if err := <-logs; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	a.workload.stop(300 * time.Millisecond)
	if state, err := c.State(ctx); err != nil || state.Workload != guest.WorkloadExited || state.ExitCode != code {
		t.Errorf("state %+v, %v, want code %d", state, err, code)
	}
}

func TestExecsSideBySide(t *testing.T) {
	_, c := serveAgent(t)
	ctx := testContext(t)
	results := make(chan error, 16)
	for i := range cap(results) {
		go func() {
			var out bytes.Buffer
			code, err := c.Exec(ctx, guest.ExecRequest{Args: []string{"sh", "-c", fmt.Sprintf("cat; exit %d", i)}}, strings.NewReader("in"), &out, nil, nil)
			if err == nil && (code != i || out.String() != "in") {
				err = fmt.Errorf("exec %d: code %d, output %q", i, code, out.String())
			}
			results <- err
		}()
	}
	for range cap(results) {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

func TestDemoServer(t *testing.T) {
	log := newLog(io.Discard)
	defer log.close()
	s, err := startDemo("127.0.0.1:0", identity{Instance: "web-1", Generation: 4, Node: "node7"}, log)
	if err != nil {
		t.Fatal(err)
	}
	defer s.stop()
	ask := func(request string) string {
		conn, err := net.Dial("tcp", s.listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := io.WriteString(conn, request); err != nil {
			t.Fatal(err)
		}
		reply, err := io.ReadAll(conn)
		if err != nil {
			t.Fatal(err)
		}
		return string(reply)
	}
	for _, tc := range []struct{ request, want string }{
		{"GET / HTTP/1.0\r\n\r\n", "\r\n\r\nHello from web-1 (generation 4) on node7\n"},
		{"GET /?x HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n", "\r\n\r\nok\n"},
		{"GET /env HTTP/1.0\r\n\r\n", `"generation":4,"node":"node7"`},
		{"HEAD / HTTP/1.0\r\n\r\n", "Content-Length: 41\r\nConnection: close\r\n\r\n"},
		{"GET /nowhere HTTP/1.0\r\n\r\n", "HTTP/1.1 404"},
		{"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\n", "HTTP/1.1 405"},
		{"hello\r\n", "HTTP/1.1 400"},
		{"GET / HTTP/1.1\r\nnonsense\r\n\r\n", "HTTP/1.1 400"},
	} {
		if got := ask(tc.request); !strings.Contains(got, tc.want) {
			t.Errorf("%q answered %q, want %q in it", tc.request, got, tc.want)
		}
	}
}

func TestLogIsBoundedAndTellsWhatIsLost(t *testing.T) {
	var console bytes.Buffer
	l := newLog(&console)
	line := strings.Repeat("x", 1000) + "\n"
	for range 2000 {
		if _, err := io.WriteString(l, line); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.Write(bytes.Repeat([]byte("y"), lineBytes+5)); err != nil {
		t.Fatal(err)
	}
	l.end()
	if l.bytes > logBytes {
		t.Errorf("%d bytes are kept", l.bytes)
	}
	var all, last bytes.Buffer
	err := errors.Join(
		l.copyTo(t.Context(), guest.LogRequest{}, &all),
		l.copyTo(t.Context(), guest.LogRequest{TailLines: 1}, &last),
		l.copyTo(t.Context(), guest.LogRequest{Since: time.Now().Add(time.Hour).UnixNano()}, &all),
	)
	if err != nil {
		t.Fatal(err)
	}
	if all.Len() != l.bytes || last.String() != "yyyyy\n" {
		t.Errorf("%d bytes of log, %d kept, last %q", all.Len(), l.bytes, last.String())
	}
	l.close()
	if !bytes.Contains(console.Bytes(), []byte("bytes of output are not shown here")) && console.Len() < 2000*len(line) {
		t.Error("the console lost output and does not say so")
	}
}

func TestMergeEnv(t *testing.T) {
	got := mergeEnv([]string{"A=1", "B=2"}, []string{"B=3", "C=4", "A=5"})
	if strings.Join(got, " ") != "A=5 B=3 C=4" {
		t.Errorf("merged %q", got)
	}
}

func TestLookPath(t *testing.T) {
	if path, err := lookPath("sh", nil); err != nil || !strings.HasSuffix(path, "/sh") {
		t.Errorf("sh is %q, %v", path, err)
	}
	if _, err := lookPath("sh", []string{"PATH=/nowhere"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("sh in an empty PATH: %v", err)
	}
}
