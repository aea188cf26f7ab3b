package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
	"github.com/blixard/blixard/internal/image"
)

// bench is a function role on this machine, without a guest round it, and the
// host's end of its port.
type bench struct {
	t     *testing.T
	conn  *call.Conn
	agent *functionAgent

	mu  sync.Mutex
	log bytes.Buffer
}

// ground is the machine of a bench: the test's directories.
type ground struct{ task, runtime string }

func (ground) prepare(*call.Init) error                  { return nil }
func (ground) identify(*call.Identity) ([]string, error) { return nil, nil }
func (ground) settle()                                   {}
func (g ground) taskRoot() string                        { return g.task }
func (g ground) runtimeRoot() string                     { return g.runtime }
func (ground) api() string                               { return "127.0.0.1:9001" }

// newBench starts a function role with the code in task. It reaps all children of
// the process: whatever else the test runs has to be over.
func newBench(t *testing.T, task, runtime string) *bench {
	t.Helper()
	b := &bench{t: t}
	ctx, cancel := context.WithCancel(context.Background())
	children := newReaper()
	host, inside := net.Pipe()
	log, err := newFunctionLog(0, func(p []byte) {
		if err := b.agent.guest.Log(p); err != nil && !errors.Is(err, io.ErrClosedPipe) {
			t.Logf("sending the log: %v", err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	processes := &functionProcesses{children: children, log: log, running: make(map[int]*functionProcess)}
	b.agent = newFunctionAgent(ground{task, runtime}, processes, log)
	b.agent.guest = call.NewGuest(inside, b.agent)
	var running sync.WaitGroup
	running.Go(func() { children.run(ctx) })
	running.Go(func() { log.watch(b.agent.expired) })
	running.Go(func() {
		if err := b.agent.guest.Serve(); err == nil {
			t.Error("the guest's end was over without an error")
		}
	})
	b.conn = call.New(host, call.Options{LogBytes: 64 << 10, Log: func(_ string, output []byte) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.log.Write(output)
	}})
	t.Cleanup(func() {
		b.agent.Shutdown("spindown", time.Second)
		if err := errors.Join(b.conn.Close(), inside.Close()); err != nil {
			t.Error(err)
		}
		b.agent.restarted.Wait()
		if n, ok := b.agent.runtime.(*nixRuntime); ok {
			n.listeners.Wait()
		}
		log.close()
		cancel()
		running.Wait()
	})
	return b
}

func (b *bench) logged() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.log.String()
}

func (b *bench) init(init call.Init) error {
	init.Function, init.ARN, init.InitMS, init.UnixNano = "f", "arn:aws:lambda:r:0:function:f", 60_000, time.Now().UnixNano()
	if init.TimeoutMS == 0 {
		init.TimeoutMS = 20_000
	}
	ctx, cancel := context.WithTimeout(b.t.Context(), time.Minute)
	defer cancel()
	_, err := b.conn.Init(ctx, init)
	return err
}

func (b *bench) mustInit(init call.Init) {
	b.t.Helper()
	if err := b.init(init); err != nil {
		b.t.Fatalf("%v\nlog: %s", err, b.logged())
	}
}

// sink keeps an answer.
type sink struct {
	head blixard.ResponseHead
	bytes.Buffer
}

func (s *sink) Begin(head blixard.ResponseHead) error { s.head = head; return nil }

func (b *bench) invoke(inv blixard.Invocation) (*sink, call.Result) {
	b.t.Helper()
	if inv.Deadline.IsZero() {
		inv.Deadline = time.Now().Add(20 * time.Second)
	}
	inv.RequestID, inv.Function = "8476a536-e9f4-11e8-9739-2dfe598c3fcd", "f"
	ctx, cancel := context.WithTimeout(b.t.Context(), time.Minute)
	defer cancel()
	s := &sink{}
	result, err := b.conn.Invoke(ctx, &inv, call.Target{ARN: "arn:aws:lambda:r:0:function:f"}, s)
	if err != nil {
		b.t.Fatalf("invoking: %v\nlog: %s", err, b.logged())
	}
	return s, result
}

// call invokes with an event and gives the answer and the type of its error.
func (b *bench) call(event string) (answer, errorType string) {
	b.t.Helper()
	s, result := b.invoke(blixard.Invocation{Payload: []byte(event)})
	if result.Broken {
		b.t.Errorf("the instance is broken after %s", event)
	}
	if result.Error != nil {
		errorType = result.Error.Type
	}
	return s.String(), errorType
}

// code makes a directory with files; those that begin with #! are programs.
func code(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files { //order:any independent files
		path := filepath.Join(dir, name)
		mode := fs.FileMode(0o644)
		if strings.HasPrefix(content, "#!") {
			mode = 0o755
		}
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), mode)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// nixRoot is where the disk of the nix runtime is unpacked, for all tests.
var nixRoot string

var nixDisk = sync.OnceValues(func() (string, error) {
	var err error
	if nixRoot, err = os.MkdirTemp("", "blixard-nix"); err != nil { //nolint:usetesting // for all tests of the package
		return "", err
	}
	disk, err := image.Store{Root: filepath.Join(nixRoot, "images")}.NixRuntime(context.Background())
	if err != nil {
		return "", err
	}
	content, err := os.ReadFile(disk.Path)
	if err != nil {
		return "", err
	}
	// The reader, unlike kernels, wants to read a little beyond the last inode.
	files, err := erofs.Open(bytes.NewReader(append(content, make([]byte, 4096)...)))
	if err != nil {
		return "", err
	}
	unpacked := filepath.Join(nixRoot, "unpacked")
	return unpacked, os.CopyFS(unpacked, files)
})

func nixBench(t *testing.T, files map[string]string) *bench {
	t.Helper()
	disk, err := nixDisk()
	if err != nil {
		t.Fatalf("run scripts/setup: %v", err)
	}
	return newBench(t, code(t, files), disk)
}

func TestNixRuntime(t *testing.T) {
	for _, test := range []struct {
		name, handler string
		files         map[string]string
		event, answer string
	}{
		{
			"function", "",
			map[string]string{"hello.nix": `{ event, context }: { statusCode = 200; body = "Hello ${event.type}"; }`},
			`{"type":"x"}`, `{"body":"Hello x","statusCode":200}`,
		},
		{"only the event", "hello", map[string]string{"hello.nix": `{ event }: event.n + 1`, "other.nix": `1`}, `{"n":41}`, `42`},
		{"plain argument", "", map[string]string{"handler.nix": `args: builtins.attrNames args`}, `{}`, `["context","event"]`},
		{"module", "", map[string]string{"handler.nix": `{ pkgs, lib, ... }: { microvm.mem = 128; handler = { event, ... }: lib.toUpper event.a; }`}, `{"a":"b"}`, `"B"`},
		{"set", "f.nix.api.process", map[string]string{"f.nix": `{ api.process = { event, context }: context.functionName; }`}, `{}`, `"f"`},
		{"more files", "", map[string]string{"handler.nix": `{ event, context }: import ./lib/a.nix + builtins.readFile ./data.txt`, "lib/a.nix": `"a"`, "data.txt": "b"}, `{}`, `"ab"`},
		{"own pkgs", "", map[string]string{
			"handler.nix": `{ pkgs, ... }: { handler = { event, context }: (pkgs.imagemagick.processImage event.imagePath).path; }`,
			"pkgs.nix":    `{ lib, ... }: { imagemagick.processImage = p: { path = lib.replaceStrings [ "input" ] [ "output" ] p; }; }`,
		}, `{"imagePath":"/data/input.jpg"}`, `"/data/output.jpg"`},
		{"environment", "", map[string]string{"handler.nix": `{ event, context }: context.env.GREETING`}, `{}`, `"hello ${there}"`},
		{"text that would do harm as source", "", map[string]string{"handler.nix": `{ event, context }: event.a`}, `{"a":"${builtins.readFile \"/etc/shadow\"} \" ; } in 1"}`, `"${builtins.readFile \"/etc/shadow\"} \" ; } in 1"`},
		{"letters", "", map[string]string{"handler.nix": `{ event, context }: event`}, `{"a":"grüße, 世界 \"\\\n\t\u001b[1m","b":[1.5,null,true,{}]}`, `{"a":"grüße, 世界 \"\\\n\t\u001b[1m","b":[1.5,null,true,{}]}`},
		{"no event", "", map[string]string{"handler.nix": `{ event, context }: event`}, ``, `{}`},
		{"trace", "", map[string]string{"handler.nix": `{ event, context }: builtins.trace "noted" 1`}, `{}`, `1`},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := nixBench(t, test.files)
			b.mustInit(call.Init{Runtime: "nix", Handler: test.handler, Env: []blixard.Label{{Key: "GREETING", Value: "hello ${there}"}}})
			for range 3 {
				if answer, failed := b.call(test.event); answer != test.answer || failed != "" {
					t.Fatalf("answered %s %s, want %s; log: %s", answer, failed, test.answer, b.logged())
				}
			}
			if test.name == "trace" && !strings.Contains(b.logged(), "trace: noted\n") {
				t.Errorf("logged %q", b.logged())
			}
			if strings.Contains(b.logged(), "answer-") || strings.Contains(b.logged(), "ready-") {
				t.Errorf("the log has what is ours: %q", b.logged())
			}
		})
	}
}

func TestNixFaults(t *testing.T) {
	const harmless = `if event ? ok then "fine" else `
	for _, test := range []struct{ name, body, failed, message string }{
		{"missing attribute", `event.type`, "Nix.MissingAttribute", "attribute 'type' missing"},
		{"throw", `throw "no such order"`, "Nix.EvalError", "no such order"},
		{"type", `"${event.n}"`, "Nix.TypeError", "cannot coerce an integer to a string"},
		{"a function as answer", `{ body = x: x; }`, "Nix.TypeError", "cannot convert a function to JSON"},
		{"infinite recursion", `let x = x; in x`, "Nix.InfiniteRecursion", "infinite recursion encountered"},
		{"stack overflow", `let f = x: f (x + 1); in f 0`, "Nix.StackOverflow", "stack overflow"},
		{"circle", `let a = { b = a; }; in a`, "Nix.StackOverflow", "stack overflow"},
		{"memory bomb", `builtins.foldl' (a: b: a + 1) 0 (builtins.genList (x: "${toString x}") 200000000)`, "Runtime.OutOfMemory", ""},
		{"file of the machine", `builtins.readFile "/etc/passwd"`, "Nix.Forbidden", "forbidden"},
		{"network", `builtins.readFile (builtins.fetchurl "http://127.0.0.1:1/x")`, "Nix.Forbidden", "forbidden"},
		{"build", `import (derivation { name = "x"; system = "x86_64-linux"; builder = "/bin/sh"; })`, "Nix.EvalError", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := nixBench(t, map[string]string{"handler.nix": "{ event, context }:\n" + harmless + test.body})
			b.mustInit(call.Init{Runtime: "nix", MemoryMiB: 256})
			for range 2 {
				answer, failed := b.call(`{"n":1}`)
				if failed != test.failed || !strings.Contains(answer, test.message) || !strings.HasPrefix(answer, `{"errorMessage":"`) {
					t.Errorf("%s %s", failed, answer)
				}
				if answer, failed := b.call(`{"ok":1}`); answer != `"fine"` || failed != "" {
					t.Errorf("afterwards: %s %s", failed, answer)
				}
			}
			if !strings.Contains(b.logged(), "error: ") {
				t.Errorf("the log lacks the error: %q", b.logged())
			}
		})
	}

	t.Run("endless", func(t *testing.T) {
		b := nixBench(t, map[string]string{"handler.nix": "{ event, context }:\n" + harmless + `builtins.foldl' (a: b: a + b) 0 (builtins.concatMap (x: builtins.genList (y: y) 1000) (builtins.genList (x: x) 100000))`})
		b.mustInit(call.Init{Runtime: "nix", MemoryMiB: 4096, TimeoutMS: 300})
		s, result := b.invoke(blixard.Invocation{Payload: []byte(`{}`), Deadline: time.Now().Add(300 * time.Millisecond)})
		if result.Error == nil || result.Error.Type != "Sandbox.Timedout" || !strings.Contains(s.String(), "Task timed out after 0.30 seconds") {
			t.Errorf("%+v %s", result.Error, s)
		}
		if answer, failed := b.call(`{"ok":1}`); answer != `"fine"` || failed != "" {
			t.Errorf("afterwards: %s %s", failed, answer)
		}
	})

	for _, test := range []struct{ name, handler, source, failed, message string }{
		{"syntax", "", "{ event, context }: { statusCode = 200 body = 1; }", "Nix.SyntaxError", "syntax error"},
		{"no file", "other", "{ event }: 1", "Runtime.InvalidEntrypoint", "other"},
		{"no handler", "", "{ pkgs, ... }: { }", "Nix.EvalError", "no `handler'"},
		{"no function", "", "{ handler = 1; }", "Nix.EvalError", "not a function"},
		{"undefined", "", "{ event }: evnt", "Nix.UndefinedVariable", "evnt"},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := nixBench(t, map[string]string{"handler.nix": test.source})
			err := b.init(call.Init{Runtime: "nix", Handler: test.handler})
			f, ok := errors.AsType[*call.InitError](err)
			if !ok || f.Type != test.failed || !strings.Contains(f.Message, test.message) {
				t.Errorf("%v", err)
			}
		})
	}

	t.Run("events", func(t *testing.T) {
		b := nixBench(t, map[string]string{"handler.nix": "{ event, context }: event"})
		b.mustInit(call.Init{Runtime: "nix"})
		for event, want := range map[string]string{ //order:any each is a call of its own
			`{"a":"\u0000"}`: "Runtime.InvalidEvent", `{"a":9223372036854775808}`: "Runtime.InvalidEvent", `[-9223372036854775809]`: "Runtime.InvalidEvent",
			`{"a":"\\u0000 9999999999999999999","b":[9223372036854775807,-9223372036854775807,1e30,0.12345678901234567890]}`: "",
			`not JSON`: "Runtime.InvalidEvent",
		} {
			if answer, failed := b.call(event); failed != want {
				t.Errorf("%s: %s %s", event, failed, answer)
			}
		}
		large := `"` + strings.Repeat("x", 3<<20) + `"`
		if answer, failed := b.call(large); failed != "" || answer != large {
			t.Errorf("a large event: %s, %d bytes", failed, len(answer))
		}
	})

	t.Run("large answer", func(t *testing.T) {
		b := nixBench(t, map[string]string{"handler.nix": `{ event, context }: builtins.foldl' (s: x: s + s) "0123456789abcdef" (builtins.genList (x: x) 19)`})
		b.mustInit(call.Init{Runtime: "nix", MemoryMiB: 512})
		if _, failed := b.call(`{}`); failed != "Function.ResponseSizeTooLarge" {
			t.Error(failed)
		}
	})

	t.Run("flood of messages", func(t *testing.T) {
		b := nixBench(t, map[string]string{"handler.nix": `{ event, context }: let long = builtins.foldl' (s: x: s + s) "0123456789abcdef" (builtins.genList (x: x) event.n); in builtins.trace long (builtins.foldl' (n: x: builtins.trace "again" (n + 1)) 0 (builtins.genList (x: x) 2000))`})
		b.mustInit(call.Init{Runtime: "nix", MemoryMiB: 512})
		for range 2 {
			if answer, failed := b.call(`{"n":19}`); failed != "" || answer != "2000" {
				t.Errorf("%s %.100s", failed, answer)
			}
		}
	})

	t.Run("many at once", func(t *testing.T) {
		b := nixBench(t, map[string]string{"handler.nix": `{ event, context }: event * 2`})
		b.mustInit(call.Init{Runtime: "nix", Concurrency: 4, MemoryMiB: 1024})
		var calls sync.WaitGroup
		for range 4 {
			calls.Go(func() {
				for range 5 {
					if answer, failed := b.call(`21`); answer != "42" {
						t.Errorf("%s %s", answer, failed)
					}
				}
			})
		}
		calls.Wait()
	})
}

// buildWasm builds a module, and the runtime's program beside it.
func wasmBench(t *testing.T, sources map[string]string) *bench {
	t.Helper()
	disk, task := t.TempDir(), t.TempDir()
	build(t, nil, filepath.Join(disk, "bin/blixard-guest-wasm"), "github.com/blixard/blixard/cmd/blixard-guest-wasm")
	for name, source := range sources { //order:any independent files
		main := filepath.Join(t.TempDir(), "main.go")
		if err := os.WriteFile(main, []byte(source), 0o644); err != nil {
			t.Fatal(err)
		}
		build(t, []string{"GOOS=wasip1", "GOARCH=wasm"}, filepath.Join(task, name), main)
	}
	return newBench(t, task, disk)
}

func build(t *testing.T, env []string, out, source string) {
	t.Helper()
	command := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, source)
	command.Env = append(append(os.Environ(), "CGO_ENABLED=0"), env...)
	if text, err := command.CombinedOutput(); err != nil {
		t.Fatalf("building %s: %v\n%s", source, err, text)
	}
}

const wasmSource = `package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
)

func main() {
	var event struct{ Do, Name string }
	if err := json.NewDecoder(os.Stdin).Decode(&event); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
	fmt.Fprintln(os.Stderr, "working on", event.Name)
	switch event.Do {
	case "panic":
		panic("as told")
	case "loop":
		for {
		}
	case "bomb":
		var all [][]byte
		for {
			all = append(all, make([]byte, 1<<20))
			for i := range all[len(all)-1] {
				all[len(all)-1][i] = 1
			}
		}
	case "long":
		fmt.Print(strings.Repeat("x", 7<<20))
	case "write":
		fmt.Print(os.WriteFile(os.Getenv("LAMBDA_TASK_ROOT")+"/x", nil, 0o644) != nil)
	case "env":
		fmt.Print(os.Getenv("GREETING"), os.Getenv("AWS_REQUEST_ID"))
	default:
		fmt.Printf("{\"hello\":%q}", event.Name)
	}
}
`

func TestWasmRuntime(t *testing.T) {
	b := wasmBench(t, map[string]string{"hello.wasm": wasmSource})
	b.mustInit(call.Init{Runtime: "wasm", MemoryMiB: 192, TimeoutMS: 20_000, Concurrency: 2, Env: []blixard.Label{{Key: "GREETING", Value: "hello "}}})
	for _, test := range []struct{ event, answer, failed string }{
		{`{"name":"x"}`, `{"hello":"x"}`, ""},
		{`{"name":"y"}`, `{"hello":"y"}`, ""},
		{`{"do":"env"}`, `hello 8476a536-e9f4-11e8-9739-2dfe598c3fcd`, ""},
		{`{"do":"write"}`, `true`, ""},
		{`not JSON`, "code 3", "Runtime.ExitError"},
		{`{"do":"panic"}`, "code 2", "Runtime.ExitError"},
		{`{"do":"bomb"}`, "", "Runtime.ExitError"},
		{`{"do":"long"}`, "exceeded maximum allowed payload size", "Function.ResponseSizeTooLarge"},
		{`{"name":"z"}`, `{"hello":"z"}`, ""},
	} {
		answer, failed := b.call(test.event)
		if failed != test.failed || !strings.Contains(answer, test.answer) {
			t.Errorf("%s: %s %.200s; log: %.2000s", test.event, failed, answer, b.logged())
		}
	}
	if !strings.Contains(b.logged(), "working on x\n") {
		t.Errorf("logged %.2000q", b.logged())
	}
	// An endless loop ends at its deadline, and the module stays compiled.
	began := time.Now()
	_, result := b.invoke(blixard.Invocation{Payload: []byte(`{"do":"loop"}`), Deadline: time.Now().Add(time.Second)})
	if result.Error == nil || result.Error.Type != "Sandbox.Timedout" || result.Broken || time.Since(began) > 10*time.Second {
		t.Errorf("an endless loop: %+v, broken %t, after %s", result.Error, result.Broken, time.Since(began))
	}
	if _, result := b.invoke(blixard.Invocation{Payload: []byte(`{}`)}); result.Error != nil || result.Init != 0 {
		t.Errorf("afterwards: %+v, init %s", result.Error, result.Init)
	}
}

func TestWasmInvalid(t *testing.T) {
	disk := t.TempDir()
	build(t, nil, filepath.Join(disk, "bin/blixard-guest-wasm"), "github.com/blixard/blixard/cmd/blixard-guest-wasm")
	for name, module := range map[string]string{ //order:any independent cases
		"damaged":    "\x00asm\x01\x00\x00\x00 nonsense",
		"no command": "\x00asm\x01\x00\x00\x00",
	} {
		b := newBench(t, code(t, map[string]string{"a.wasm": module}), disk)
		err := b.init(call.Init{Runtime: "wasm"})
		if f, ok := errors.AsType[*call.InitError](err); !ok || f.Type != "Runtime.InvalidEntrypoint" {
			t.Errorf("%s: %v", name, err)
		}
		b.agent.Shutdown("failure", 0)
	}
}

const httpSource = `package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"
)

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("X-Path", r.URL.String())
		w.Header().Add("Set-Cookie", "a=b")
		w.Header().Add("Set-Cookie", "c=d")
		switch r.URL.Path {
		case "/teapot":
			w.WriteHeader(http.StatusTeapot)
		case "/stream":
			for i := range 3 {
				fmt.Fprintf(w, "part %d\n", i)
				w.(http.Flusher).Flush()
			}
			return
		case "/long":
			fmt.Fprint(w, strings.Repeat("x", 7<<20))
			return
		case "/exit":
			os.Exit(7)
		case "/hang":
			time.Sleep(time.Hour)
		case "/abort":
			panic(http.ErrAbortHandler)
		case "/empty":
			w.WriteHeader(http.StatusNoContent)
			return
		}
		fmt.Fprintf(w, "%s %s %s %q %s", r.Method, r.Host, r.Header.Get("Content-Type"), body, r.Header.Get("X-A"))
	})
	fmt.Println("listening")
	fmt.Println(http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), nil))
}
`

func TestHTTPRuntime(t *testing.T) {
	task := t.TempDir()
	main := filepath.Join(t.TempDir(), "main.go")
	if err := os.WriteFile(main, []byte(httpSource), 0o644); err != nil {
		t.Fatal(err)
	}
	build(t, nil, filepath.Join(task, "server"), main)
	b := newBench(t, task, "")
	b.mustInit(call.Init{Runtime: "http", Port: freeTCPPort(t), Concurrency: 4})
	request := func(method, target string) blixard.Invocation {
		return blixard.Invocation{Payload: []byte("body"), HTTP: &blixard.HTTPRequest{
			Method: method, Target: target, Host: "example.org",
			Headers: [][2]string{{"Content-Type", "text/plain"}, {"X-A", "1"}, {"Connection", "close"}, {"Content-Length", "99"}, {"X-B", "2\r\nX-A: 3"}},
		}}
	}
	s, result := b.invoke(request("PUT", "/a/b?c=d"))
	if result.Error != nil || s.head.Status != 200 || s.String() != `PUT example.org text/plain "body" 1` {
		t.Errorf("%+v %+v %s", s.head, result.Error, s)
	}
	var cookies []string
	for _, h := range s.head.Headers {
		if h[0] == "Set-Cookie" || h[0] == "X-Path" {
			cookies = append(cookies, h[1])
		}
	}
	if strings.Join(cookies, " ") != "a=b c=d /a/b?c=d" && strings.Join(cookies, " ") != "/a/b?c=d a=b c=d" {
		t.Errorf("headers %v", s.head.Headers)
	}
	if s, _ := b.invoke(request("GET", "/teapot")); s.head.Status != 418 {
		t.Errorf("%+v", s.head)
	}
	if s, result := b.invoke(request("HEAD", "/")); s.head.Status != 200 || s.Len() != 0 || result.Error != nil {
		t.Errorf("HEAD: %+v %s", s.head, s)
	}
	if s, result := b.invoke(request("GET", "/empty")); s.head.Status != 204 || s.Len() != 0 || result.Error != nil {
		t.Errorf("no content: %+v %s", s.head, s)
	}
	if s, result := b.invoke(request("GET", "/stream")); s.String() != "part 0\npart 1\npart 2\n" || result.Error != nil {
		t.Errorf("stream: %+v %s", s.head, s)
	}
	if s, result := b.invoke(request("GET", "/long")); result.Error == nil || result.Error.Type != "Function.ResponseSizeTooLarge" || !strings.HasPrefix(s.String(), "{") {
		t.Errorf("a long answer: %+v %.100s", result.Error, s)
	}
	if answer, failed := b.call(`{"n":1}`); failed != "" || !strings.HasPrefix(answer, `POST localhost application/json "{\"n\":1}"`) {
		t.Errorf("an event: %s %s", failed, answer)
	}
	var calls sync.WaitGroup
	for range 4 {
		calls.Go(func() {
			for range 25 {
				if s, result := b.invoke(request("GET", "/")); s.head.Status != 200 || result.Error != nil {
					t.Errorf("%+v %+v", s.head, result)
				}
			}
		})
	}
	calls.Wait()
	if _, result := b.invoke(request("GET", "/abort")); result.Error == nil || result.Error.Type != "Runtime.BadResponse" {
		t.Errorf("no answer: %+v", result.Error)
	}
	if s, result := b.invoke(request("GET", "/exit")); result.Error == nil || result.Error.Type != "Runtime.ExitError" || !strings.Contains(s.String(), "exit status 7") {
		t.Errorf("exit: %+v %s", result.Error, s)
	}
	if s, result := b.invoke(request("GET", "/")); s.head.Status != 200 || result.Init == 0 {
		t.Errorf("after an exit: %+v %+v", s.head, result)
	}
	if !strings.Contains(b.logged(), "listening\n") {
		t.Errorf("logged %q", b.logged())
	}
}

func TestHTTPDeadline(t *testing.T) {
	task := code(t, map[string]string{"bootstrap": "#!/bin/sh\nexec httpd -f -p 127.0.0.1:$PORT -h " + "$LAMBDA_TASK_ROOT\n"})
	main := filepath.Join(t.TempDir(), "main.go")
	if err := os.WriteFile(main, []byte(httpSource), 0o644); err != nil {
		t.Fatal(err)
	}
	build(t, nil, filepath.Join(task, "server"), main)
	b := newBench(t, task, "")
	b.mustInit(call.Init{Runtime: "http", Port: freeTCPPort(t), Command: []string{"./server"}, TimeoutMS: 300})
	inv := blixard.Invocation{HTTP: &blixard.HTTPRequest{Method: "GET", Target: "/hang"}, Deadline: time.Now().Add(300 * time.Millisecond)}
	if _, result := b.invoke(inv); result.Error == nil || result.Error.Type != "Sandbox.Timedout" {
		t.Errorf("%+v", result)
	}
	inv.HTTP.Target, inv.Deadline = "/", time.Time{}
	if s, result := b.invoke(inv); s.head.Status != 200 || result.Init == 0 {
		t.Errorf("afterwards: %+v %+v", s.head, result)
	}
}

func TestHTTPNeverListens(t *testing.T) {
	b := newBench(t, code(t, map[string]string{"bootstrap": "#!/bin/sh\necho no >&2; exit 3\n"}), "")
	err := b.init(call.Init{Runtime: "http", Port: freeTCPPort(t)})
	if f, ok := errors.AsType[*call.InitError](err); !ok || f.Type != "Runtime.ExitError" || !strings.Contains(f.Message, "exit status 3") {
		t.Errorf("%v", err)
	}
}

func freeTCPPort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// answers is what a server says on its one connection.
func exchangeWith(t *testing.T, says string) (*sink, error) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	server, c := os.NewFile(uintptr(pair[1]), "server"), &httpConn{fd: pair[0]}
	defer c.close()
	// What a server says fits into the socket, or it is cut off.
	go func() {
		if _, err := io.ReadFull(server, make([]byte, len("GET / HTTP/1.1\r\n\r\n"))); err != nil {
			t.Error(err)
		}
		if _, err := server.WriteString(says); err != nil && !errors.Is(err, unix.EPIPE) {
			t.Error(err)
		}
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	}()
	w := &plainWriter{}
	_, err = c.exchange(&call.Request{HTTP: &blixard.HTTPRequest{Method: "GET", Target: "/"}}, []byte("GET / HTTP/1.1\r\n\r\n"), w)
	return &w.sink, err
}

type plainWriter struct{ sink }

func (*plainWriter) Finish(call.Outcome) error { return nil }

func TestHTTPAnswers(t *testing.T) {
	for _, test := range []struct{ says, body, failed string }{
		{"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "ok", ""},
		{"HTTP/1.0 200 OK\r\n\r\nto the end", "to the end", ""},
		{"HTTP/1.1 200\nContent-Length: 2\n\nok", "ok", ""},
		{"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "ok", ""},
		{"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nok\r\n3\r\nay!\r\n0\r\nTrailer: x\r\n\r\n", "okay!", ""},
		{"", "", "without an answer"},
		{"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok", "", "in the middle"},
		{"SSH-2.0-OpenSSH\r\n", "", "not HTTP"},
		{"HTTP/1.1 2x0 OK\r\n\r\n", "", "status"},
		{"HTTP/1.1 200 OK\r\nbad header\r\n\r\n", "", "header"},
		{"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "", "length"},
		{"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "", "length"},
		{"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", "", "encoded"},
		{"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "", "part"},
		{"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nok\r\n", "", "longer"},
		{"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 200_000), "", "endless"},
		{"HTTP/1.1 200 OK\r\n" + strings.Repeat("X: "+strings.Repeat("x", 1000)+"\r\n", 70) + "\r\n", "", "more than 64 KiB"},
		{"HTTP/1.1 101 Switching Protocols\r\n\r\n", "", "another protocol"},
	} {
		s, err := exchangeWith(t, test.says)
		if s.String() != test.body || (err == nil) != (test.failed == "") || err != nil && !strings.Contains(err.Error(), test.failed) {
			t.Errorf("%.60q: %q, %v", test.says, s, err)
		}
	}
}

func FuzzHTTPAnswer(f *testing.F) {
	f.Add("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
	f.Add("HTTP/1.1 204 No\r\nConnection: close, x\r\n\r\n")
	f.Fuzz(func(t *testing.T, says string) {
		if len(says) > 100_000 {
			return
		}
		if s, err := exchangeWith(t, says); err == nil && s.head.Status < 200 {
			t.Errorf("took %q for an answer", says)
		}
	})
}
