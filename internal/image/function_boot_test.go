package image_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
	"github.com/blixard/blixard/internal/code"
	"github.com/blixard/blixard/internal/image"
)

// buildWasmRuntime compiles blixard-guest-wasm and points the store to it.
func buildWasmRuntime(t testing.TB) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "blixard-guest-wasm")
	goBuild(t, path, "github.com/blixard/blixard/cmd/blixard-guest-wasm", "GOOS=linux", "GOARCH=amd64")
	t.Setenv("BLIXARD_GUEST_WASM", path)
}

func goBuild(t testing.TB, out, source string, env ...string) {
	t.Helper()
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, source)
	build.Env = append(append(os.Environ(), "CGO_ENABLED=0"), env...)
	if text, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building %s: %v\n%s", source, err, text)
	}
}

// bootFunction boots the bundle of functions with disks, and connects to it.
func bootFunction(t *testing.T, b image.Bundle, memoryMiB int, disks ...string) *call.Conn {
	t.Helper()
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Fatalf("qemu-system-x86_64 is missing; run scripts/setup: %v", err)
	}
	dir, err := os.MkdirTemp("", "blixard-call") //nolint:usetesting // Unix socket paths are short, test directories are not
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "call")
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "microvm",
		"-accel", "tcg,tb-size=128", "-cpu", "max,la57=off", "-m", strconv.Itoa(memoryMiB), "-smp", "1",
		"-kernel", b.Kernel, "-initrd", b.Initrd,
		"-append", strings.TrimSpace("console=ttyS0 quiet panic=-1 reboot=t " + tscEarly(t) + b.Cmdline),
		"-chardev", "file,id=console,path=" + filepath.Join(dir, "console"), "-serial", "chardev:console",
		"-device", "virtio-serial-device,id=serial0",
		"-chardev", "socket,id=call,path=" + socket + ",server=on,wait=on",
		"-device", "virtserialport,bus=serial0.0,nr=1,chardev=call,name=" + call.PortName,
		"-device", "virtio-rng-device",
	}
	for i, disk := range disks {
		args = append(args,
			"-drive", fmt.Sprintf("if=none,id=disk%d,file=%s,format=raw,readonly=on", i, disk),
			"-device", fmt.Sprintf("virtio-blk-device,drive=disk%d", i))
	}
	command := exec.Command(qemu, args...)
	var stderr bytes.Buffer
	command.Stderr = &stderr
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := command.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Error(err)
		}
		if err := command.Wait(); err == nil {
			t.Log("QEMU had ended by itself")
		}
		if t.Failed() {
			console, err := os.ReadFile(filepath.Join(dir, "console"))
			t.Logf("console (%v):\n%s\nqemu: %s", err, console, stderr.String())
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	var conn net.Conn
	for end := time.Now().Add(10 * time.Second); ; {
		if conn, err = net.Dial("unix", socket); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("connecting to QEMU: %v", err)
		}
		pause := time.NewTimer(5 * time.Millisecond)
		<-pause.C
	}
	c := call.New(conn, call.Options{LogBytes: 16 << 10})
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

type answer struct {
	head blixard.ResponseHead
	bytes.Buffer
}

func (a *answer) Begin(head blixard.ResponseHead) error { a.head = head; return nil }

// TestExamples runs every function of examples/functions in a real guest, built
// and packed as its README says.
func TestExamples(t *testing.T) {
	if testing.Short() {
		t.Skip("boots guests")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	buildGuest(t)
	buildWasmRuntime(t)
	images, store := image.Store{Root: t.TempDir()}, code.Store{Root: t.TempDir()}
	bundle, err := images.Function(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := images.Function(ctx); err != nil || again.Digest != bundle.Digest {
		t.Errorf("made another one: %+v, %v", again, err)
	}
	for _, e := range examples() {
		t.Run(e.name, func(t *testing.T) {
			disks, init := e.prepare(ctx, t, images, store)
			conn := bootFunction(t, bundle, 256, disks...)
			ready, err := conn.Init(ctx, init)
			if err != nil {
				if f, ok := errors.AsType[*call.InitError](err); ok {
					t.Logf("log: %s", f.Log)
				}
				t.Fatal(err)
			}
			t.Logf("ready: boot %s, init %s, %d MiB used", ready.Boot.Round(time.Millisecond), ready.Init.Round(time.Millisecond), ready.UsedMiB)
			for range 3 {
				began := time.Now()
				a, result := e.invoke(ctx, t, conn, e.event)
				if a.String() != e.answer || result.Error != nil || result.Broken {
					t.Fatalf("%q %+v\n%s", a, result.Error, result.Log)
				}
				t.Logf("answered in %s, %s in the handler", time.Since(began).Round(100*time.Microsecond), result.Handler.Round(100*time.Microsecond))
				if !strings.Contains(string(result.Log), e.log) || strings.Contains(string(result.Log), "warning:") {
					t.Errorf("logged %q", result.Log)
				}
			}
			if e.wrong == "" {
				return
			}
			if a, result := e.invoke(ctx, t, conn, e.wrong); result.Error == nil || result.Error.Type != e.failure || result.Broken {
				t.Errorf("%q %+v\n%s", a, result.Error, result.Log)
			}
			if a, result := e.invoke(ctx, t, conn, e.event); a.String() != e.answer || result.Error != nil {
				t.Errorf("afterwards: %q %+v\n%s", a, result.Error, result.Log)
			}
		})
	}
}

// TestNixFaultsInGuest: whatever a function does to the evaluator of its call in
// the smallest of guests, the next call works.
func TestNixFaultsInGuest(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a guest")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	buildGuest(t)
	images, store := image.Store{Root: t.TempDir()}, code.Store{Root: t.TempDir()}
	bundle, err := images.Function(ctx)
	if err != nil {
		t.Fatal(err)
	}
	zipped, err := code.Zip("handler.nix", 0o644, []byte(`{ event, context }:
		if event ? bomb then builtins.foldl' (a: b: a + 1) 0 (builtins.genList (x: "${toString x}") 200000000)
		else if event ? loop then (let f = x: 1 + f (x + 1); in f 0)
		else if event ? forbidden then builtins.readFile "/proc/self/environ"
		else "fine"`))
	if err != nil {
		t.Fatal(err)
	}
	p, err := store.Put(ctx, bytes.NewReader(zipped))
	if err != nil {
		t.Fatal(err)
	}
	disk, err := store.Disk(ctx, p.Digest)
	if err != nil {
		t.Fatal(err)
	}
	runtime, err := images.NixRuntime(ctx)
	if err != nil {
		t.Fatal(err)
	}
	conn := bootFunction(t, bundle, 128, disk, runtime.Path)
	_, err = conn.Init(ctx, call.Init{
		Function: "f", ARN: "arn:aws:lambda:r:0:function:f", Runtime: "nix", MemoryMiB: 64, TimeoutMS: 20_000, InitMS: 120_000,
		CodeDevice: "/dev/vda", RuntimeDevice: "/dev/vdb", UnixNano: time.Now().UnixNano(), Entropy: make([]byte, 64), Hostname: "f",
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range [][2]string{{`{"bomb":1}`, "Runtime.OutOfMemory"}, {`{"loop":1}`, "Nix.StackOverflow"}, {`{"forbidden":1}`, "Nix.Forbidden"}} {
		if a, result := (example{}).invoke(ctx, t, conn, test[0]); result.Error == nil || result.Error.Type != test[1] || result.Broken {
			t.Errorf("%s: %s %+v", test[0], a, result.Error)
		}
		if a, result := (example{}).invoke(ctx, t, conn, `{}`); a.String() != `"fine"` || result.Error != nil {
			t.Errorf("after %s: %s %+v", test[0], a, result.Error)
		}
	}
}

// example is a directory of examples/functions.
type example struct {
	name    string
	runtime string
	config  string // what is deployed, relative to the directory; "" is what is built
	build   []string
	out     string // of the build
	command []string
	http    string // it is called by GET of this
	event   string
	answer  string
	log     string // a part of it
	wrong   string // an event that makes the function fail
	failure string
}

func examples() []example {
	return []example{
		{name: "nix-hello", runtime: "nix", config: "hello.nix", event: `{"type":"order"}`, answer: `{"body":"Hello from NixOS serverless! Event: order","statusCode":200}`, wrong: `{}`, failure: "Nix.MissingAttribute"},
		{name: "image-processor", runtime: "nix", config: "image-processor.nix", event: `{"imagePath":"/data/input.jpg"}`, answer: `{"body":{"outputPath":"/data/input.processed.jpg","processed":true},"statusCode":200}`},
		{name: "bootstrap-go", runtime: "bootstrap", build: []string{}, out: "bootstrap", event: `{"name":"you"}`, answer: `{"message":"Hello, you","requestId":"` + requestID + `"}`, log: "greeting you\n", wrong: `{}`, failure: "errorString"},
		{name: "bootstrap-shell", runtime: "bootstrap", config: "bootstrap", event: `1`, answer: `{"handler": "", "event": 1}`, log: "answering " + requestID},
		{name: "extension", runtime: "bootstrap", config: ".", event: `1`, answer: `{"handler": "", "event": 1}`},
		{name: "streaming", runtime: "bootstrap", build: []string{}, out: "bootstrap", event: `{"parts":3}`, answer: "part 1\npart 2\npart 3\n"},
		{name: "http-server", runtime: "http", build: []string{}, out: "server", http: "/", answer: "hello from f\n"},
		{name: "http-busybox", runtime: "http", config: ".", command: []string{"httpd", "-f", "-p", "127.0.0.1:8080", "-h", "/var/task"}, http: "/cgi-bin/echo?hello", answer: "hello\n"},
		{name: "wasm-hello", runtime: "wasm", build: []string{"GOOS=wasip1", "GOARCH=wasm"}, out: "hello.wasm", event: `{"name":"you"}`, answer: "{\"message\":\"Hello, you\"}\n", log: "greeting you\n", wrong: `not JSON`, failure: "Runtime.ExitError"},
	}
}

const requestID = "8476a536-e9f4-11e8-9739-2dfe598c3fcd"

// prepare deploys it: what a guest is to have, and to be told.
func (e example) prepare(ctx context.Context, t testing.TB, images image.Store, store code.Store) (disks []string, init call.Init) {
	t.Helper()
	dir := filepath.Join("../../examples/functions", e.name)
	path := filepath.Join(dir, e.config)
	if e.build != nil {
		path = filepath.Join(t.TempDir(), e.out)
		build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, ".")
		build.Dir = dir
		build.Env = append(append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=mod"), e.build...)
		if text, err := build.CombinedOutput(); err != nil {
			t.Fatalf("building %s: %v\n%s", e.name, err, text)
		}
	}
	zipped, err := code.ZipPath(path)
	if err != nil {
		t.Fatal(err)
	}
	if guessed := code.Runtime(path); e.runtime != "http" && guessed != e.runtime {
		t.Errorf("guessed the runtime %q", guessed)
	}
	p, err := store.Put(ctx, bytes.NewReader(zipped))
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Inspect(ctx, p.Digest, blixard.FunctionSpec{Runtime: e.runtime, Command: e.command}); err != nil {
		t.Fatal(err)
	}
	disk, err := store.Disk(ctx, p.Digest)
	if err != nil {
		t.Fatal(err)
	}
	disks = []string{disk}
	init = call.Init{
		Function: "f", ARN: "arn:aws:lambda:r:0:function:f", Runtime: e.runtime, Command: e.command, MemoryMiB: 192, TimeoutMS: 20_000, InitMS: 120_000,
		CodeDevice: "/dev/vda", UnixNano: time.Now().UnixNano(), Entropy: make([]byte, 64), Hostname: "f",
	}
	runtime, err := images.Runtime(ctx, e.runtime)
	if err != nil {
		t.Fatal(err)
	}
	if runtime.Path != "" {
		disks, init.RuntimeDevice = append(disks, runtime.Path), "/dev/vdb"
	}
	return disks, init
}

func (e example) invoke(ctx context.Context, t testing.TB, conn *call.Conn, event string) (*answer, call.Result) {
	t.Helper()
	inv := blixard.Invocation{RequestID: requestID, Function: "f", Payload: []byte(event), Deadline: time.Now().Add(20 * time.Second)}
	if e.http != "" {
		inv.HTTP = &blixard.HTTPRequest{Method: "GET", Target: e.http, Host: "f"}
	}
	a := &answer{}
	result, err := conn.Invoke(ctx, &inv, call.Target{ARN: "arn:aws:lambda:r:0:function:f"}, a)
	if err != nil {
		t.Fatalf("%v\n%s", err, result.Log)
	}
	return a, result
}
