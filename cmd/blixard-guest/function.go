package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
)

// functionAgent is the function role: it initialises a function, gives a clone its
// identity and hands invocations to a runtime. It owns deadlines, the function's
// processes and its log; the runtime owns the words with the function.
//
// A function that has ended, or was killed at a deadline, is initialised again by
// the invocation that comes next, in that one's time.
type functionAgent struct {
	guest     *call.Guest
	log       *functionLog
	processes *functionProcesses
	machine   functionMachine
	kinds     map[string]functionKind
	host      *functionHost // nil before INIT
	kind      functionKind
	runtime   functionRuntime
	settings  call.Init

	mu        sync.Mutex
	phase     functionPhase
	open      map[*invocation]struct{}
	waiting   []*invocation // for the runtime to come up
	poisoned  bool          // a deadline has passed and others were let go on
	restarted sync.WaitGroup
}

// functionPhase is what can be said of the runtime.
type functionPhase int

const (
	functionDown functionPhase = iota // nothing is initialised
	functionStarting
	functionUp
)

// functionMachine is what the agent does to the machine it runs on; tests have
// one that does nothing.
type functionMachine interface {
	// prepare makes the machine ready for a function, before it starts.
	prepare(init *call.Init) error
	// identify makes a clone somebody of its own.
	identify(identity *call.Identity) (seen []string, err error)
	// settle is called when the function is ready and may be saved.
	settle()
	taskRoot() string
	runtimeRoot() string
	api() string
}

func newFunctionAgent(machine functionMachine, processes *functionProcesses, log *functionLog) *functionAgent {
	return &functionAgent{machine: machine, processes: processes, log: log, kinds: functionKinds(), open: make(map[*invocation]struct{})}
}

// Init implements call.Handler.
func (a *functionAgent) Init(init *call.Init) (call.Ready, error) {
	if a.host != nil {
		return call.Ready{}, errors.New("the function was initialised before")
	}
	setDefaults(init)
	if err := a.machine.prepare(init); err != nil {
		return call.Ready{}, fmt.Errorf("preparing the guest: %w", err)
	}
	a.settings = *init
	a.guest.SetMaxPayload(init.MaxPayload)
	a.host = &functionHost{
		init: &a.settings, log: a.log, processes: a.processes, exited: a.exited,
		taskRoot: a.machine.taskRoot(), runtimeRoot: a.machine.runtimeRoot(), api: a.machine.api(),
	}
	kind, ok := a.kinds[init.Runtime]
	if !ok {
		return call.Ready{}, fault("Runtime.InvalidTaskConfig", "this guest has no runtime %q", init.Runtime)
	}
	runtime := kind.make(a.host)
	a.mu.Lock()
	a.kind, a.runtime = kind, runtime
	a.mu.Unlock()
	began := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(init.InitMS)*time.Millisecond)
	defer cancel()
	a.setPhase(functionStarting)
	if err := a.start(ctx); err != nil {
		a.setPhase(functionDown)
		a.log.settle()
		return call.Ready{}, err
	}
	a.setPhase(functionUp)
	took := time.Since(began)
	a.log.settle()
	a.machine.settle()
	return call.Ready{Init: took, Boot: uptime(), UsedMiB: a.peakMiB()}, nil
}

// setDefaults makes zeros what they stand for.
func setDefaults(init *call.Init) {
	for _, d := range []struct {
		field *int64
		value int64
	}{
		{&init.MemoryMiB, 128},
		{&init.EphemeralMiB, 512},
		{&init.TimeoutMS, 3000},
		{&init.InitMS, 10_000},
		{&init.MaxPayload, call.MaxPayload},
		{&init.MaxResponse, call.MaxResponse},
		{&init.MaxStream, call.MaxStream},
	} {
		if *d.field <= 0 {
			*d.field = d.value
		}
	}
	init.Concurrency = max(1, init.Concurrency)
	if init.InitializationType == "" {
		init.InitializationType = "on-demand"
	}
	if init.Version == "" {
		init.Version = "$LATEST"
	}
}

func (a *functionAgent) setPhase(phase functionPhase) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.phase = phase
}

// start initialises the function, from nothing.
func (a *functionAgent) start(ctx context.Context) error {
	a.processes.killAll()
	a.runtime.kill()
	err := a.runtime.init(ctx)
	if err == nil {
		return nil
	}
	a.processes.killAll()
	a.runtime.kill()
	if ctx.Err() != nil && errors.Is(err, context.Cause(ctx)) {
		return fault("Sandbox.Timedout", "the function was not ready after %.2f seconds", float64(a.settings.InitMS)/1000)
	}
	return err
}

// fault is an error of the function's, in its words.
func fault(errorType, format string, args ...any) *call.InitError {
	return &call.InitError{Type: errorType, Message: fmt.Sprintf(format, args...)}
}

// Restore implements call.Handler.
func (a *functionAgent) Restore(identity *call.Identity) (call.Ack, error) {
	began := time.Now()
	seen, err := a.machine.identify(identity)
	if err != nil {
		return call.Ack{}, err
	}
	ack := call.Ack{Seen: seen}
	if a.runtime != nil {
		limit := identity.RestoreMS
		if limit <= 0 {
			limit = 10_000
		}
		hooks, hook := false, time.Now()
		if h, ok := a.runtime.(interface{ hooked() bool }); ok {
			hooks = h.hooked()
		}
		ctx := &lateContext{end: hook.Add(time.Duration(limit) * time.Millisecond)}
		defer ctx.cancel()
		if err := a.runtime.restored(ctx, identity); err != nil {
			return call.Ack{}, fmt.Errorf("telling the runtime that it is a clone: %w", err)
		}
		if hooks {
			ack.Hook = max(time.Since(hook), 1)
		}
	}
	ack.Took = time.Since(began)
	return ack, nil
}

// lateContext is a context with a deadline that makes its timer when somebody
// waits for it: most runtimes have nothing to do in a clone, which must not wake the
// scheduler for it.
type lateContext struct {
	end  time.Time
	mu   sync.Mutex
	real context.Context //nolint:containedctx // it is one
	stop context.CancelFunc
}

func (c *lateContext) made() context.Context {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.real == nil {
		c.real, c.stop = context.WithDeadline(context.Background(), c.end)
	}
	return c.real
}

func (c *lateContext) cancel() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stop != nil {
		c.stop()
	}
}

func (c *lateContext) Deadline() (time.Time, bool) { return c.end, true }
func (c *lateContext) Done() <-chan struct{}       { return c.made().Done() }
func (c *lateContext) Err() error                  { return c.made().Err() }
func (c *lateContext) Value(any) any               { return nil }

// Invoke implements call.Handler.
func (a *functionAgent) Invoke(request *call.Request, w call.ResponseWriter) {
	v := &invocation{agent: a, request: request, w: w}
	v.queued.Store(a.kind.inline)
	if a.runtime == nil {
		//nolint:errcheck // a host that is gone has no use for it
		w.Finish(call.Outcome{Error: unhandled("Sandbox.Failure"), Body: errorBody("Sandbox.Failure", "the function was never initialised", request.RequestID), Broken: true})
		return
	}
	v.deadline = request.Arrived.Add(time.Duration(max(1, request.RemainingMS)) * time.Millisecond)
	a.mu.Lock()
	a.open[v] = struct{}{}
	up := a.phase == functionUp
	if !up {
		a.waiting = append(a.waiting, v)
		if a.phase == functionDown {
			a.phase = functionStarting
			a.restarted.Go(a.restart)
		}
	}
	a.mu.Unlock()
	a.log.arm(v.deadline)
	if up {
		a.hand(v)
	}
}

func (a *functionAgent) hand(v *invocation) {
	if v.isClosed() {
		return // its time was over before the function was up
	}
	v.begin()
	v.queued.Store(a.kind.inline)
	if a.kind.inline {
		a.runtime.invoke(v.request, v)
		return
	}
	a.restarted.Go(func() { a.runtime.invoke(v.request, v) })
}

// restart initialises the function again, for the invocations that wait.
func (a *functionAgent) restart() {
	for {
		began := time.Now()
		a.mu.Lock()
		var end time.Time
		for _, v := range a.waiting {
			if v.deadline.After(end) {
				end = v.deadline
			}
		}
		a.mu.Unlock()
		ctx, cancel := context.WithDeadline(context.Background(), end)
		err := a.start(ctx)
		late := ctx.Err() != nil
		cancel()
		a.mu.Lock()
		waiting := a.waiting
		a.waiting = nil
		again := false
		switch {
		case err == nil:
			a.phase = functionUp
		case late && a.someAreOpen(waiting):
			// The one for which it was started is over; another has come since.
			a.waiting, again = waiting, true
		default:
			a.phase = functionDown
		}
		a.mu.Unlock()
		if again {
			continue
		}
		took := time.Since(began)
		for _, v := range waiting {
			v.mu.Lock()
			v.init = took
			v.mu.Unlock()
			switch {
			case err == nil:
				a.hand(v)
			case late:
				a.timeOut(v)
			default:
				v.fail(initFault(err))
			}
		}
		return
	}
}

// someAreOpen is called with mu held.
func (a *functionAgent) someAreOpen(list []*invocation) bool {
	now := time.Now()
	for _, v := range list {
		if _, open := a.open[v]; open && now.Before(v.deadline) {
			return true
		}
	}
	return false
}

func initFault(err error) *call.InitError {
	if f, ok := errors.AsType[*call.InitError](err); ok {
		return f
	}
	return fault("Sandbox.Failure", "%v", err)
}

// exited is called by the runtime when the function has ended by itself.
func (a *functionAgent) exited(cause *call.InitError) {
	a.mu.Lock()
	if a.phase != functionUp {
		a.mu.Unlock()
		return // who starts or kills it knows
	}
	a.phase = functionDown
	var lost, again []*invocation
	for v := range a.open { //order:any each is told the same
		if v.undelivered() {
			again = append(again, v)
		} else {
			lost = append(lost, v)
		}
	}
	if len(again) > 0 {
		a.phase = functionStarting
		a.waiting = append(a.waiting, again...)
		a.restarted.Go(a.restart)
	} else {
		a.processes.strike() // what it has left behind
	}
	a.mu.Unlock()
	for _, v := range lost {
		a.note("RequestId: %s Error: %s\n%s\n", v.request.RequestID, cause.Message, cause.Type)
		v.fail(cause)
	}
}

// note writes a line of the platform's into the function's log.
func (a *functionAgent) note(format string, args ...any) {
	if _, err := fmt.Fprintf(a.log, format, args...); err != nil {
		logf("writing to the function's log: %v", err)
	}
}

// expired ends the invocations whose deadline has passed, and arms the next one.
func (a *functionAgent) expired() {
	now := time.Now()
	a.mu.Lock()
	var late []*invocation
	var next time.Time
	for v := range a.open { //order:any each is told the same
		switch {
		case !now.Before(v.deadline):
			late = append(late, v)
		case next.IsZero() || v.deadline.Before(next):
			next = v.deadline
		}
	}
	a.mu.Unlock()
	if !next.IsZero() {
		a.log.arm(next)
	}
	for _, v := range late {
		a.abort()
		a.timeOut(v)
	}
}

// timeOut ends an invocation whose deadline has passed.
func (a *functionAgent) timeOut(v *invocation) {
	if v.isClosed() {
		return
	}
	seconds := float64(a.settings.TimeoutMS) / 1000
	a.note("%s %s Task timed out after %.2f seconds\n\n", time.Now().UTC().Format("2006-01-02T15:04:05.000Z"), v.request.RequestID, seconds)
	v.fail(fault("Sandbox.Timedout", "Task timed out after %.2f seconds", seconds))
}

// abort stops work on an invocation that nobody waits for any more: with the
// function, when it is the only one. Others are let go on, and the instance is used
// for nothing else.
func (a *functionAgent) abort() {
	a.mu.Lock()
	alone := len(a.open) == 1
	if a.phase == functionStarting {
		a.mu.Unlock()
		return // its time is bounded by those that wait for it
	}
	if alone || a.settings.Concurrency == 1 {
		a.phase = functionDown
		// Under the lock: a moment later it might hit the next start.
		a.processes.strike()
		a.mu.Unlock()
		return
	}
	a.poisoned = true
	a.mu.Unlock()
}

// Cancel implements call.Handler.
func (a *functionAgent) Cancel(request *call.Request) {
	a.mu.Lock()
	var found *invocation
	for v := range a.open { //order:any there is one
		if v.request == request {
			found = v
		}
	}
	a.mu.Unlock()
	if found != nil {
		a.abort()
		found.drop()
	}
}

// Stat implements call.Handler.
func (a *functionAgent) Stat() (call.Stat, error) {
	a.mu.Lock()
	stat := call.Stat{Open: len(a.open), RuntimeUp: a.phase == functionUp}
	a.mu.Unlock()
	stat.Invocations = a.guest.Ended()
	if worker, ok := a.runtime.(interface{ busy() bool }); ok && stat.RuntimeUp {
		stat.Busy = worker.busy()
	}
	if group := a.processes.group; group != nil {
		stat.UsedMiB, stat.PeakMiB = mib(group.usedBytes()), mib(group.peakBytes())
		stat.CPU, stat.Processes = group.cpuTime(), group.processes()
	}
	return stat, nil
}

func mib(bytes int64) int64 { return (bytes + 1<<20 - 1) >> 20 }

func (a *functionAgent) peakMiB() int64 {
	if a.processes.group == nil {
		return 0
	}
	return mib(a.processes.group.peakBytes())
}

// Shutdown implements call.Handler.
func (a *functionAgent) Shutdown(reason string, grace time.Duration) {
	if a.runtime == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	a.mu.Lock()
	up := a.phase == functionUp
	a.phase = functionDown
	a.mu.Unlock()
	if up && grace > 0 {
		a.runtime.stop(ctx, reason)
	}
	a.processes.killAll()
	a.runtime.kill()
	a.log.settle()
}

// environment is what the function's processes are told, as AWS Lambda does; what
// the user wants comes last and cannot change what is reserved.
func (h *functionHost) environment(extra ...string) []string {
	init := h.init
	reserved := []string{
		"_HANDLER=" + init.Handler,
		"AWS_REGION=" + init.Region,
		"AWS_EXECUTION_ENV=AWS_Lambda_" + init.Runtime,
		"AWS_LAMBDA_FUNCTION_NAME=" + init.Function,
		"AWS_LAMBDA_FUNCTION_VERSION=" + init.Version,
		fmt.Sprintf("AWS_LAMBDA_FUNCTION_MEMORY_SIZE=%d", init.MemoryMiB),
		"AWS_LAMBDA_INITIALIZATION_TYPE=" + init.InitializationType,
		"AWS_LAMBDA_LOG_GROUP_NAME=" + init.LogGroup,
		"AWS_LAMBDA_LOG_STREAM_NAME=" + init.LogStream,
		"AWS_LAMBDA_RUNTIME_API=" + h.api,
		"LAMBDA_TASK_ROOT=" + h.taskRoot,
		"LAMBDA_RUNTIME_DIR=/var/runtime",
		"BLIXARD_RESTORE_FILE=" + restoreFile,
	}
	if init.Concurrency > 1 {
		reserved = append(reserved, fmt.Sprintf("AWS_LAMBDA_MAX_CONCURRENCY=%d", init.Concurrency))
	}
	reserved = append(reserved, extra...)
	// These may be changed.
	env := []string{
		"AWS_DEFAULT_REGION=" + init.Region,
		"PATH=/usr/local/bin:/usr/bin:/bin:/opt/bin",
		"LD_LIBRARY_PATH=/lib64:/usr/lib64:/var/runtime:/var/runtime/lib:" + h.taskRoot + ":" + h.taskRoot + "/lib:/opt/lib",
		"LANG=en_US.UTF-8",
		"TZ=:UTC",
	}
	taken := make(map[string]bool)
	for _, entry := range reserved {
		name, _, _ := strings.Cut(entry, "=")
		taken[name] = true
	}
	own := make(map[string]bool)
	var users []string
	for _, label := range init.Env {
		if label.Key != "" && !strings.ContainsAny(label.Key, "=\x00") && !strings.Contains(label.Value, "\x00") && !taken[label.Key] {
			users = append(users, label.Key+"="+label.Value)
			own[label.Key] = true
		}
	}
	for _, entry := range env {
		if name, _, _ := strings.Cut(entry, "="); !own[name] {
			reserved = append(reserved, entry)
		}
	}
	return append(reserved, users...)
}

// restoreFile tells a function which clone it is: lines of "name=value", with
// epoch, instance, node, unix_ns and log_stream; it is written again at each
// restore, and empty before the first.
const restoreFile = "/run/blixard/restore"

func unhandled(errorType string) *blixard.FunctionError {
	return &blixard.FunctionError{Kind: "Unhandled", Type: errorType}
}
