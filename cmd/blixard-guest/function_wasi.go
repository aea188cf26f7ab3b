package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
	"github.com/blixard/blixard/internal/wasmlane"
)

const (
	// wasmOwnMiB of the function's memory are for the runtime itself.
	wasmOwnMiB = 48
	// wasmEarly is how long before the deadline the runtime ends an instance, so
	// that the agent need not end the runtime, which has compiled the module.
	wasmEarly = 50 * time.Millisecond
)

// wasmRuntime runs WebAssembly modules, by blixard-guest-wasm on the runtime's
// disk. Each invocation has a lane to it while it lasts.
type wasmRuntime struct {
	host *functionHost

	mu    sync.Mutex
	life  int // grows with kill
	free  []*wasmLane
	more  *sync.Cond // a lane is free, or all are gone
	ended chan struct{}
	exit  functionExit
}

// wasmLane is a blocking socket.
type wasmLane struct {
	fd   int
	life int
}

func (l *wasmLane) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(l.fd, p)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return 0, err
		case n == 0:
			return 0, errLaneEnd
		}
		return n, nil
	}
}

var errLaneEnd = errors.New("the runtime has ended")

func (l *wasmLane) Write(p []byte) (int, error) {
	for done := 0; done < len(p); {
		n, err := unix.SendmsgN(l.fd, p[done:], nil, nil, unix.MSG_NOSIGNAL)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return done, err
		}
		done += n
	}
	return len(p), nil
}

func (l *wasmLane) close() {
	if err := unix.Close(l.fd); err != nil {
		logf("closing a lane: %v", err)
	}
}

func newWasm(host *functionHost) functionRuntime {
	w := &wasmRuntime{host: host, life: 1}
	w.more = sync.NewCond(&w.mu)
	return w
}

func (w *wasmRuntime) init(ctx context.Context) error {
	module, err := w.module()
	if err != nil {
		return err
	}
	n := w.host.init.Concurrency
	lanes := make([]*wasmLane, 0, n)
	theirs := make([]uintptr, 0, n)
	closeTheirs := func() {
		for _, fd := range theirs {
			(&wasmLane{fd: int(fd)}).close()
		}
	}
	w.mu.Lock()
	life := w.life
	w.mu.Unlock()
	for range n {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			closeTheirs()
			return fmt.Errorf("making a lane: %w", err)
		}
		lanes = append(lanes, &wasmLane{fd: pair[0], life: life})
		theirs = append(theirs, uintptr(pair[1]))
	}
	ended := make(chan struct{})
	w.mu.Lock()
	w.ended = ended
	w.mu.Unlock()
	memory := max(16, w.host.init.MemoryMiB-wasmOwnMiB)
	_, err = w.host.processes.start(functionCommand{
		args:  []string{w.host.runtimeRoot + "/bin/blixard-guest-wasm", module, strconv.FormatInt(memory, 10), strconv.Itoa(n)},
		env:   w.host.environment(),
		files: theirs,
	}, func(exit functionExit) {
		w.mu.Lock()
		w.exit = exit
		current := life == w.life
		w.mu.Unlock()
		close(ended)
		if current {
			w.host.exited(exitFault(exit))
		}
	})
	closeTheirs()
	if err != nil {
		for _, lane := range lanes {
			lane.close()
		}
		return fmt.Errorf("starting the runtime: %w", err)
	}
	return w.awaitModule(ctx, lanes, ended)
}

// module finds the function's module.
func (w *wasmRuntime) module() (string, error) {
	root := w.host.taskRoot
	files, err := filepath.Glob(filepath.Join(root, "*.wasm"))
	if err != nil {
		return "", fmt.Errorf("looking for the module: %w", err)
	}
	for i := range files {
		files[i] = filepath.Base(files[i])
	}
	file, ok := blixard.WasmEntry(w.host.init.Handler, files, func(name string) bool { return isFile(filepath.Join(root, name)) })
	if !ok {
		return "", fault("Runtime.InvalidEntrypoint", "the code has no module %q", file)
	}
	return filepath.Join(root, file), nil
}

// awaitModule waits until the module is compiled.
func (w *wasmRuntime) awaitModule(ctx context.Context, lanes []*wasmLane, ended chan struct{}) error {
	type news struct {
		outcome wasmlane.Outcome
		err     error
	}
	compiled := make(chan news, 1)
	go func() {
		var n news
		n.outcome, n.err = wasmlane.ReadAnswer(lanes[0], func([]byte) error { return wasmlane.ErrMalformed })
		compiled <- n
		if n.err == nil && n.outcome.Type == "" {
			w.mu.Lock()
			defer w.mu.Unlock()
			if lanes[0].life == w.life {
				w.free = append(w.free, lanes...)
				w.more.Broadcast()
				return
			}
		}
		for _, lane := range lanes {
			lane.close()
		}
	}()
	select {
	case n := <-compiled:
		switch {
		case n.err == nil && n.outcome.Type != "":
			return fault(n.outcome.Type, "%s", n.outcome.Message)
		case n.err == nil:
			return nil
		}
		select {
		case <-ended:
			w.mu.Lock()
			defer w.mu.Unlock()
			return exitFault(w.exit)
		case <-ctx.Done():
			return ctx.Err()
		}
	case <-ctx.Done():
		// The agent ends the runtime, and the goroutine with it.
		return ctx.Err()
	}
}

func (w *wasmRuntime) invoke(q *call.Request, answer call.ResponseWriter) {
	began := time.Now()
	lane := w.take()
	if lane == nil {
		return // the agent has ended the runtime, and this with it
	}
	remaining := time.Duration(q.RemainingMS)*time.Millisecond - time.Since(q.Arrived)
	remaining -= min(wasmEarly, remaining/4)
	event := q.Payload
	if len(event) == 0 {
		event = []byte("{}")
	}
	err := wasmlane.WriteRequest(lane, wasmlane.Request{
		Remaining: remaining, Event: event,
		Env: []string{
			"AWS_REQUEST_ID=" + q.RequestID, "BLIXARD_REQUEST_ID=" + q.RequestID, "BLIXARD_FUNCTION_ARN=" + q.ARN,
			"BLIXARD_DEADLINE_MS=" + strconv.FormatInt(q.DeadlineMS, 10), "_X_AMZN_TRACE_ID=" + q.TraceID,
		},
	})
	var end wasmlane.Outcome
	// An answer counts only once the module has ended well.
	var output []byte
	limit := int(w.host.init.MaxResponse)
	if err == nil {
		end, err = wasmlane.ReadAnswer(lane, func(p []byte) error {
			// One byte more than allowed tells that it was too much.
			output = append(output, p[:min(len(p), limit+1-len(output))]...)
			return nil
		})
	}
	if err != nil {
		lane.close()
		w.lost(q, answer)
		return
	}
	w.put(lane)
	outcome := call.Outcome{Handler: time.Since(began)}
	if end.Type != "" {
		message := end.Message
		if end.Type == "Sandbox.Timedout" {
			message = fmt.Sprintf("Task timed out after %.2f seconds", float64(w.host.init.TimeoutMS)/1000)
		}
		outcome.Error, outcome.Detail, outcome.Body = unhandled(end.Type), message, errorBody(end.Type, message, q.RequestID)
	} else if _, err := answer.Write(output); err != nil {
		return // it was too large, or was ended behind our back
	}
	finishHTTP(answer, outcome)
}

// lost ends an invocation whose runtime has gone, unless the agent does: it hears
// of the end by exited, or has made it.
func (w *wasmRuntime) lost(q *call.Request, answer call.ResponseWriter) {
	w.mu.Lock()
	ended := w.ended
	w.mu.Unlock()
	select {
	case <-ended:
		return
	case <-time.After(time.Second):
	}
	finishHTTP(answer, call.Outcome{Error: unhandled("Runtime.ExitError"), Body: errorBody("Runtime.ExitError", errLaneEnd.Error(), q.RequestID)})
}

// take waits for a free lane; nil when the runtime has been ended meanwhile.
func (w *wasmRuntime) take() *wasmLane {
	w.mu.Lock()
	defer w.mu.Unlock()
	for life := w.life; len(w.free) == 0; w.more.Wait() {
		if w.life != life {
			return nil
		}
	}
	lane := w.free[len(w.free)-1]
	w.free = w.free[:len(w.free)-1]
	return lane
}

func (w *wasmRuntime) put(lane *wasmLane) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if lane.life != w.life {
		lane.close()
		return
	}
	w.free = append(w.free, lane)
	w.more.Signal()
}

func (w *wasmRuntime) kill() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.life++
	for _, lane := range w.free {
		lane.close()
	}
	w.free = nil
	w.more.Broadcast()
}

func (w *wasmRuntime) restored(context.Context, *call.Identity) error { return nil }

// stop has nothing to do: a module runs only while it is called.
func (w *wasmRuntime) stop(context.Context, string) {}
