package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	_ "github.com/aws/aws-lambda-go/lambda" // of testdata/lambda, where no tool would look

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
)

// testMachine is the machine the tests run on: nothing of it is changed.
type testMachine struct{ dir string }

func (m testMachine) prepare(*call.Init) error { return nil }
func (m testMachine) identify(i *call.Identity) ([]string, error) {
	if len(i.Entropy) < entropySize {
		return nil, errors.New("too little entropy")
	}
	return nil, nil
}
func (m testMachine) settle()             {}
func (m testMachine) taskRoot() string    { return m.dir }
func (m testMachine) runtimeRoot() string { return "" }
func (m testMachine) api() string         { return "127.0.0.1:0" }

// function is a function role on this machine with the host's end of its port.
type function struct {
	*call.Conn
	agent *functionAgent
	dir   string
}

// answer collects an answer.
type answer struct {
	head blixard.ResponseHead
	body bytes.Buffer
}

func (a *answer) Begin(head blixard.ResponseHead) error { a.head = head; return nil }
func (a *answer) Write(p []byte) (int, error)           { return a.body.Write(p) }

// startFunction makes a function role with a code directory.
func startFunction(t *testing.T, files map[string]string) *function {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	host, port := net.Pipe()
	ctx, cancel := context.WithCancel(context.Background())
	children := newReaper()
	var wg sync.WaitGroup
	wg.Go(func() { children.run(ctx) })
	var guest *call.Guest
	log, err := newFunctionLog(os.Getuid(), func(p []byte) {
		// The test may be over.
		if err := guest.Log(p); err != nil && ctx.Err() == nil {
			t.Logf("log: %v", err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	processes := &functionProcesses{children: children, log: log, running: make(map[int]*functionProcess)}
	agent := newFunctionAgent(testMachine{dir}, processes, log)
	guest = call.NewGuest(port, agent)
	agent.guest = guest
	wg.Go(func() {
		// It ends with the test.
		err := guest.Serve()
		if ctx.Err() == nil {
			t.Errorf("serving: %v", err)
		}
	})
	go log.watch(agent.expired)
	f := &function{Conn: call.New(host, call.Options{}), agent: agent, dir: dir}
	t.Cleanup(func() {
		processes.killAll()
		cancel()
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		port.Close()
		if b, ok := agent.runtime.(*bootstrap); ok && b.api != nil {
			b.kill()
			b.api.close()
		}
		agent.restarted.Wait()
		log.close()
		wg.Wait()
	})
	return f
}

func testInit() call.Init {
	return call.Init{
		Function: "f", Version: "$LATEST", Region: "local", Runtime: "bootstrap", Handler: "main", MemoryMiB: 128, TimeoutMS: 3000, InitMS: 10_000,
		Env: []blixard.Label{{Key: "MINE", Value: "yes"}, {Key: "TZ", Value: "CET"}, {Key: "AWS_LAMBDA_FUNCTION_NAME", Value: "forged"}},
	}
}

// up initialises it.
func (f *function) up(t *testing.T, init call.Init) call.Ready {
	t.Helper()
	ready, err := f.Init(t.Context(), init)
	if err != nil {
		t.Fatal(err)
	}
	return ready
}

var testIDs = func() func() string {
	var mu sync.Mutex
	n := 0
	return func() string {
		mu.Lock()
		defer mu.Unlock()
		n++
		return fmt.Sprintf("8476a536-e9f4-11e8-9739-%012d", n)
	}
}()

func (f *function) invoke(t *testing.T, payload string, timeout time.Duration, stream bool) (call.Result, *answer, string) {
	t.Helper()
	id := testIDs()
	a := &answer{}
	result, err := f.Invoke(t.Context(), &blixard.Invocation{
		RequestID: id, Payload: []byte(payload), Deadline: time.Now().Add(timeout), Stream: stream, TraceID: "Root=1-2-3",
	}, call.Target{ARN: "arn:aws:lambda:local:000000000000:function:f"}, a)
	if err != nil {
		t.Fatalf("invoking with %.100s: %v", payload, err)
	}
	return result, a, id
}

// fails checks an error of the function's.
func (f *function) fails(t *testing.T, payload string, timeout time.Duration, wantType, wantMessage string) call.Result {
	t.Helper()
	result, a, id := f.invoke(t, payload, timeout, false)
	var body struct{ ErrorType, ErrorMessage string }
	if err := json.Unmarshal(a.body.Bytes(), &body); err != nil {
		t.Fatalf("%s: the error is no JSON: %.200q", payload, a.body.String())
	}
	want := strings.ReplaceAll(wantMessage, "ID", id)
	if result.Error == nil || result.Error.Type != wantType || result.Error.Kind != "Unhandled" || body.ErrorMessage != want || body.ErrorType != wantType {
		t.Errorf("%s: error %+v, body %.300s\nwant %s: %s", payload, result.Error, a.body.String(), wantType, want)
	}
	return result
}

// works checks that the function answers.
func (f *function) works(t *testing.T) call.Result {
	t.Helper()
	result, a, id := f.invoke(t, `{"text":"hello"}`, 20*time.Second, false)
	var got struct {
		Text, ID, Wd string
		Calls        int
	}
	if err := json.Unmarshal(a.body.Bytes(), &got); err != nil || result.Error != nil || got.Text != "hello" || got.ID != id || result.Broken {
		t.Fatalf("the function does not work: %+v, %.300s, %v", result, a.body.String(), err)
	}
	return result
}

// lambdaBinary builds the function on aws-lambda-go, once.
var lambdaBinary = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "blixard-lambda-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	command := exec.Command("go", "build", "-ldflags=-s -w", "-o", dir+"/bootstrap", "./testdata/lambda")
	command.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := command.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, output)
	}
	return os.ReadFile(dir + "/bootstrap")
})

func startLambda(t *testing.T, more map[string]string) *function {
	t.Helper()
	binary, err := lambdaBinary()
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{"bootstrap": string(binary)}
	maps.Copy(files, more)
	return startFunction(t, files)
}

func TestLambdaGo(t *testing.T) {
	f := startLambda(t, nil)
	f.up(t, testInit())
	_, a, id := f.invoke(t, `{"text":"first"}`, 3*time.Second, false)
	var got struct {
		Text, ID, ARN, Wd string
		Calls             int
		LeftMS            int64 `json:"left_ms"`
		Env               []string
	}
	if err := json.Unmarshal(a.body.Bytes(), &got); err != nil {
		t.Fatalf("%v: %s", err, a.body.String())
	}
	if got.Text != "first" || got.ID != id || got.ARN != "arn:aws:lambda:local:000000000000:function:f" || got.LeftMS < 1000 || got.LeftMS > 3000 || got.Wd != f.dir || got.Calls != 1 {
		t.Errorf("got %+v", got)
	}
	env := strings.Join(got.Env, "\n") + "\n"
	for _, want := range []string{
		"_HANDLER=main", "AWS_REGION=local", "AWS_DEFAULT_REGION=local", "AWS_LAMBDA_FUNCTION_NAME=f", "AWS_LAMBDA_FUNCTION_VERSION=$LATEST", "AWS_LAMBDA_FUNCTION_MEMORY_SIZE=128",
		"AWS_LAMBDA_INITIALIZATION_TYPE=on-demand", "LAMBDA_TASK_ROOT=" + f.dir, "MINE=yes", "TZ=CET", "LANG=en_US.UTF-8",
	} {
		if !strings.Contains(env, want+"\n") {
			t.Errorf("%s is not in the environment:\n%s", want, env)
		}
	}
	if strings.Contains(env, "forged") || strings.Contains(env, "TZ=:UTC") || strings.Contains(env, "MAX_CONCURRENCY") {
		t.Errorf("environment:\n%s", env)
	}
	f.works(t)
	stat, err := f.Stat(t.Context())
	if err != nil || stat.Open != 0 || !stat.RuntimeUp || stat.Invocations != 2 {
		t.Errorf("Stat = %+v, %v", stat, err)
	}
}

func TestFunctionsThatMisbehave(t *testing.T) {
	f := startLambda(t, nil)
	init := testInit()
	init.TimeoutMS = 300
	f.up(t, init)
	long := 20 * time.Second
	f.fails(t, `{"do":"error","text":"no"}`, long, "errorString", "no")
	f.works(t)
	result := f.fails(t, `{"do":"exit","n":5}`, long, "Runtime.ExitError", "RequestId: ID Error: Runtime exited with error: exit status 5")
	if !bytes.HasPrefix(result.Log, []byte("going\n")) {
		t.Errorf("log %q", result.Log)
	}
	if again := f.works(t); again.Init == 0 {
		t.Error("the function was not initialised again")
	}
	f.fails(t, `{"do":"exit"}`, long, "Runtime.ExitError", "RequestId: ID Error: Runtime exited without providing a reason")
	f.works(t)
	result = f.fails(t, `{"do":"hang"}`, 300*time.Millisecond, "Sandbox.Timedout", "RequestId: ID Error: Task timed out after 0.30 seconds")
	if !bytes.Contains(result.Log, []byte("Task timed out after 0.30 seconds")) {
		t.Errorf("log %q", result.Log)
	}
	f.works(t)
	f.fails(t, fmt.Sprintf(`{"do":"big","n":%d}`, 7<<20), long, "Function.ResponseSizeTooLarge", "Response payload size exceeded maximum allowed payload size (6291556 bytes).")
	f.works(t)
	f.fails(t, `not json`, long, "SyntaxError", "invalid character 'o' in literal null (expecting 'u')")
	result, a, _ := f.invoke(t, fmt.Sprintf(`{"do":"big","n":%d}`, 6<<20), long, false)
	if result.Error != nil || a.body.Len() != 6<<20+2 {
		t.Errorf("6 MiB: %+v, %d bytes", result.Error, a.body.Len())
	}
	result, _, _ = f.invoke(t, `{"do":"print","n":20000}`, long, false)
	if result.Error != nil || result.Dropped < 18<<20 || len(result.Log) > 600<<10 || !bytes.Contains(result.Log, []byte("bytes of output are not kept")) || !bytes.Contains(result.Log, []byte("last words\n")) {
		t.Errorf("20 MB of output: %+v, dropped %d, %d are kept, end %.100q", result.Error, result.Dropped, len(result.Log), result.Log[max(0, len(result.Log)-100):])
	}
	f.works(t)
}

// At the deadline all that a function has started is killed, wherever it hides.
func TestForksAreKilled(t *testing.T) {
	f := startLambda(t, nil)
	f.up(t, testInit())
	note := filepath.Join(t.TempDir(), "pid")
	f.invoke(t, fmt.Sprintf(`{"do":"fork","text":%q}`, note), 500*time.Millisecond, false)
	text, err := os.ReadFile(note)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(5 * time.Second); ; {
		state, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || bytes.Contains(state, []byte(") Z ")) {
			break
		}
		if time.Now().After(end) {
			syscall.Kill(pid, syscall.SIGKILL)
			t.Fatalf("the grandchild lives on: %s", state)
		}
	}
	f.works(t)
}

func TestStreams(t *testing.T) {
	f := startLambda(t, nil)
	f.up(t, testInit())
	for _, stream := range []bool{true, false} {
		result, a, _ := f.invoke(t, `{"do":"stream","text":"second"}`, 10*time.Second, stream)
		if result.Error != nil || a.body.String() != "first second" || a.head.Streaming != stream || a.head.ContentType != "application/octet-stream" {
			t.Errorf("stream %v: %+v, %q, %+v", stream, result.Error, a.body.String(), a.head)
		}
	}
	result, a, _ := f.invoke(t, `{"do":"breaks","text":"second"}`, 10*time.Second, true)
	if result.Error == nil || result.Error.Type != "errorString" || !strings.Contains(result.Detail, "in the middle") || a.body.String() != "first second" {
		t.Errorf("an error within a stream: %+v, %q, body %q", result.Error, result.Detail, a.body.String())
	}
	result, a, _ = f.invoke(t, fmt.Sprintf(`{"do":"big","n":%d}`, 20<<20), 20*time.Second, true)
	if result.Error != nil || a.body.Len() != 20<<20+2 {
		t.Errorf("20 MiB: %+v, %d bytes", result.Error, a.body.Len())
	}
	f.works(t)
}

func TestInitFails(t *testing.T) {
	cases := map[string]struct {
		files map[string]string
		init  func(*call.Init)
		want  string
	}{
		"no bootstrap":   {want: "Runtime.InvalidEntrypoint: Couldn't find valid bootstrap(s): [DIR/bootstrap /opt/bootstrap]"},
		"empty":          {files: map[string]string{"bootstrap": ""}, want: "Runtime.InvalidEntrypoint: DIR/bootstrap: exec format error"},
		"exits":          {files: map[string]string{"bootstrap": "#!/bin/sh\necho oh no\nexit 4\n"}, want: "Runtime.ExitError: Runtime exited with error: exit status 4"},
		"killed":         {files: map[string]string{"bootstrap": "#!/bin/sh\nkill -9 $$\n"}, want: "Runtime.ExitError: Runtime exited with error: signal: killed"},
		"hangs":          {files: map[string]string{"bootstrap": "#!/bin/sh\nexec sleep 100\n"}, init: func(i *call.Init) { i.InitMS = 200 }, want: "Sandbox.Timedout: the function was not ready after 0.20 seconds"},
		"no such kind":   {init: func(i *call.Init) { i.Runtime = "cobol" }, want: `Runtime.InvalidTaskConfig: this guest has no runtime "cobol"`},
		"bad extension":  {files: map[string]string{"bootstrap": "#!/bin/sh\nsleep 100\n", "extensions/x": ""}, want: "Extension.LaunchError: DIR/extensions/x: exec format error"},
		"dead extension": {files: map[string]string{"bootstrap": "#!/bin/sh\nsleep 100\n", "extensions/x": "#!/bin/sh\nexit 3\n"}, want: "Extension.Crash: extension x exited: exit status 3"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			f := startFunction(t, c.files)
			init := testInit()
			if c.init != nil {
				c.init(&init)
			}
			_, err := f.Init(t.Context(), init)
			fault, ok := errors.AsType[*call.InitError](err)
			if !ok || fault.Error() != strings.ReplaceAll(c.want, "DIR", f.dir) {
				t.Fatalf("Init: %v\nwant %s", err, c.want)
			}
			if name == "exits" && string(fault.Log) != "oh no\n" {
				t.Errorf("log %q", fault.Log)
			}
			if f.agent.processes.alive() {
				t.Error("something of it runs on")
			}
		})
	}
}

// A function that was not ready in time is started again by the next call, in that
// one's time.
func TestInitWithinInvoke(t *testing.T) {
	binary, err := lambdaBinary()
	if err != nil {
		t.Fatal(err)
	}
	const slow = "#!/bin/sh\nif [ $(wc -c <count) -lt 2 ]; then printf x >>count; exec sleep 100; fi\nexec ./real\n"
	f := startFunction(t, map[string]string{"bootstrap": slow, "real": string(binary), "count": ""})
	init := testInit()
	init.InitMS = 300
	if _, err := f.Init(t.Context(), init); initFault(err).Type != "Sandbox.Timedout" {
		t.Fatalf("Init: %v", err)
	}
	f.fails(t, `{}`, 300*time.Millisecond, "Sandbox.Timedout", "RequestId: ID Error: Task timed out after 3.00 seconds")
	if result := f.works(t); result.Init == 0 {
		t.Error("the initialisation is not in the result")
	}
	// One that ends between two calls costs the next one a start, and no error.
	f.invoke(t, `{"do":"exit-later"}`, 20*time.Second, false)
	for end := time.Now().Add(10 * time.Second); f.agent.processes.alive() && time.Now().Before(end); {
		if _, err := f.Stat(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if result := f.works(t); result.Init == 0 {
		t.Error("the function was not started again")
	}
}

// Several calls at once, as AWS_LAMBDA_MAX_CONCURRENCY asks for.
func TestConcurrency(t *testing.T) {
	f := startLambda(t, nil)
	init := testInit()
	init.Concurrency = 4
	f.up(t, init)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 25 {
				f.works(t)
			}
		})
	}
	wg.Wait()
	// One that hangs spoils the instance, and not the others' calls.
	hung := make(chan call.Result)
	go func() {
		result, _, _ := f.invoke(t, `{"do":"hang"}`, 300*time.Millisecond, false)
		hung <- result
	}()
	other, _, _ := f.invoke(t, `{"text":"a"}`, 10*time.Second, false)
	result := <-hung
	if other.Error != nil || result.Error == nil || result.Error.Type != "Sandbox.Timedout" {
		t.Errorf("other %+v, hung %+v", other.Error, result.Error)
	}
}
