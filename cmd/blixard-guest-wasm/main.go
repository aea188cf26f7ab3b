// Command blixard-guest-wasm runs a function's WebAssembly module in a guest, for
// blixard-guest, which starts it and speaks with it through package wasmlane. It
// compiles the module once, before the guest is saved, and gives each invocation an
// instance of its own: the event is its standard input, its standard output the
// answer, its standard error the function's log.
//
// It is a process apart so that a module that takes all memory harms no more than
// itself, and a program apart so that guests without WebAssembly do not carry it.
//
// Ownership: one goroutine for each lane, which is a descriptor from 3 on.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"
	"github.com/tetratelabs/wazero/sys"

	"github.com/blixard/blixard/internal/wasmlane"
)

// pageBytes is a page of WebAssembly.
const pageBytes = 64 << 10

// Errors as the caller of a function sees them.
const (
	invalidModule = "Runtime.InvalidEntrypoint"
	timedOut      = "Sandbox.Timedout"
	exited        = "Runtime.ExitError"
	trapped       = "Wasm.Trap"
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: blixard-guest-wasm MODULE MEMORY-MIB LANES\nIt is started by blixard-guest.")
		os.Exit(2)
	}
	memoryMiB, err := strconv.Atoi(os.Args[2])
	lanes, err2 := strconv.Atoi(os.Args[3])
	if err := errors.Join(err, err2); err != nil || memoryMiB < 1 || lanes < 1 {
		fmt.Fprintln(os.Stderr, "blixard-guest-wasm: the memory and the number of lanes are no numbers")
		os.Exit(2)
	}
	if err := run(os.Args[1], memoryMiB, lanes); err != nil {
		fmt.Fprintln(os.Stderr, "blixard-guest-wasm:", err)
		os.Exit(1)
	}
}

func run(path string, memoryMiB, lanes int) error {
	// Set here, since the environment is the module's.
	runtime.GOMAXPROCS(max(2, lanes))
	debug.SetGCPercent(50)
	files := make([]*os.File, lanes)
	for i := range files {
		files[i] = os.NewFile(uintptr(wasmlane.FirstDescriptor+i), "lane")
	}
	p := &program{name: filepath.Base(path), task: filepath.Dir(path)}
	if err := p.compile(path, memoryMiB); err != nil {
		// What is wrong with the module is for the user to know.
		return wasmlane.WriteOutcome(files[0], wasmlane.Outcome{Type: invalidModule, Message: err.Error()})
	}
	if err := wasmlane.WriteOutcome(files[0], wasmlane.Outcome{}); err != nil {
		return err
	}
	failed := make([]error, lanes)
	var serving sync.WaitGroup
	for i, file := range files {
		serving.Go(func() { failed[i] = p.serve(file) })
	}
	serving.Wait()
	return errors.Join(failed...)
}

// program is a compiled module.
type program struct {
	name     string
	task     string // directory of the code
	runtime  wazero.Runtime
	compiled wazero.CompiledModule
}

func (p *program) compile(path string, memoryMiB int) error {
	ctx := context.Background()
	binary, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	// An endless loop ends with its context, and a module gets no more memory than
	// the function has.
	config := wazero.NewRuntimeConfigCompiler().WithCloseOnContextDone(true).
		WithMemoryLimitPages(uint32(min(memoryMiB, 4096) << 20 / pageBytes)).WithDebugInfoEnabled(false)
	p.runtime = wazero.NewRuntimeWithConfig(ctx, config)
	if _, err := wasi_snapshot_preview1.Instantiate(ctx, p.runtime); err != nil {
		return fmt.Errorf("providing WASI: %w", err)
	}
	if p.compiled, err = p.runtime.CompileModule(ctx, binary); err != nil {
		return fmt.Errorf("compiling %s: %w", p.name, err)
	}
	if _, ok := p.compiled.ExportedFunctions()["_start"]; !ok {
		return fmt.Errorf("%s is no command: it exports no _start", p.name)
	}
	// An instance that does not run: the pages it needs are in memory then.
	trial, err := p.runtime.InstantiateModule(ctx, p.compiled, p.module(nil).WithStartFunctions())
	if err != nil {
		return fmt.Errorf("instantiating %s: %w", p.name, err)
	}
	return trial.Close(ctx)
}

// module is the configuration of an instance without its streams.
func (p *program) module(env []string) wazero.ModuleConfig {
	config := wazero.NewModuleConfig().WithName("").WithArgs(p.name).
		WithRandSource(rand.Reader).WithSysWalltime().WithSysNanotime().WithSysNanosleep().
		WithFSConfig(wazero.NewFSConfig().WithReadOnlyDirMount(p.task, p.task).WithDirMount("/tmp", "/tmp"))
	for _, entry := range append(os.Environ(), env...) {
		if name, value, ok := strings.Cut(entry, "="); ok && name != "" {
			config = config.WithEnv(name, value)
		}
	}
	return config
}

// serve runs the invocations of a lane until there are no more.
func (p *program) serve(lane *os.File) error {
	for {
		q, err := wasmlane.ReadRequest(lane)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := wasmlane.WriteOutcome(lane, p.invoke(q, lane)); err != nil {
			return err
		}
	}
}

// output is the module's standard output.
type output struct{ lane *os.File }

func (o output) Write(b []byte) (int, error) {
	if err := wasmlane.WriteOutput(o.lane, b); err != nil {
		return 0, err
	}
	return len(b), nil
}

func (p *program) invoke(q wasmlane.Request, lane *os.File) wasmlane.Outcome {
	ctx, cancel := context.WithTimeout(context.Background(), q.Remaining)
	defer cancel()
	config := p.module(q.Env).WithStdin(strings.NewReader(string(q.Event))).WithStdout(output{lane}).WithStderr(os.Stderr)
	instance, err := p.runtime.InstantiateModule(ctx, p.compiled, config)
	if instance != nil {
		err = errors.Join(err, instance.Close(context.Background()))
	}
	return outcome(ctx, err, q.Remaining)
}

func outcome(ctx context.Context, err error, limit time.Duration) wasmlane.Outcome {
	exit, isExit := errors.AsType[*sys.ExitError](err)
	switch {
	case err == nil || isExit && exit.ExitCode() == 0:
		return wasmlane.Outcome{}
	case isExit && exit.ExitCode() == sys.ExitCodeDeadlineExceeded, ctx.Err() != nil:
		return wasmlane.Outcome{Type: timedOut, Message: fmt.Sprintf("it has not ended in %s", limit.Round(time.Millisecond))}
	case isExit:
		return wasmlane.Outcome{Type: exited, Message: fmt.Sprintf("the module has exited with code %d", exit.ExitCode())}
	}
	// "wasm error: unreachable\nwasm stack trace:\n\t…": the trace is for the log.
	message, trace, _ := strings.Cut(err.Error(), "\n")
	if trace != "" {
		fmt.Fprintln(os.Stderr, trace)
	}
	return wasmlane.Outcome{Type: trapped, Message: strings.TrimPrefix(message, "module[] function[_start] failed: ")}
}
