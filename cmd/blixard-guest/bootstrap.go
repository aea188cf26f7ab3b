package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/call"
)

// bootstrap runs any executable that speaks the AWS Lambda Runtime API, and
// extensions beside it. The thread that reads the port writes an event to the
// connection on which the function waits for it, and the thread of the connection
// on which the answer comes writes that to the port: nothing lies between.
//
// Lock order: nothing of the agent is called with mu held.
type bootstrap struct {
	host       *functionHost
	api        *apiServer
	extensions *extensions

	mu         sync.Mutex
	phase      bootstrapPhase
	run        int // counts starts: what an earlier one reports is out of date
	process    *functionProcess
	next       []*apiConn // wait in /next
	restores   []*apiConn // wait in /restore/next
	nextSeen   bool
	parked     bool // a /restore/next was seen
	queue      []*bootstrapCall
	running    map[string]*bootstrapCall // by request ID: handed over, and not answered
	answered   [16]string                // the last that were; a second answer is a wrong state
	answeredAt int
	initError  *call.InitError // posted
	events     chan initEnd    // to init; holds one
}

// initEnd is how an initialisation ended.
type initEnd struct{ err error }

type bootstrapPhase int

const (
	bootstrapDown bootstrapPhase = iota
	bootstrapInit
	bootstrapServing
)

// bootstrapCall is an invocation.
type bootstrapCall struct {
	request *call.Request
	w       call.ResponseWriter
}

// seen tells the agent that the function is about to see it; false when it has
// been given it before.
func (t *bootstrapCall) seen() bool {
	v, ok := t.w.(*invocation)
	return !ok || v.queued.CompareAndSwap(true, false)
}

func newBootstrap(host *functionHost) functionRuntime {
	b := &bootstrap{host: host, running: make(map[string]*bootstrapCall), events: make(chan initEnd, 1)}
	b.extensions = newExtensions(b)
	return b
}

// listen opens the Runtime API, once.
func (b *bootstrap) listen() error {
	if b.api != nil {
		return nil
	}
	_, portText, _ := strings.Cut(b.host.api, ":")
	port, err := strconv.Atoi(portText)
	if err != nil {
		return fmt.Errorf("reading the Runtime API's address: %w", err)
	}
	if b.api, err = newAPIServer(port, b.serve, b.hangUp); err != nil {
		return err
	}
	b.host.api = "127.0.0.1:" + strconv.Itoa(b.api.port) // a port 0 was for the kernel to choose
	return nil
}

// init implements functionRuntime.
func (b *bootstrap) init(ctx context.Context) error {
	if err := b.listen(); err != nil {
		return err
	}
	b.mu.Lock()
	b.run++
	run := b.run
	b.phase, b.nextSeen, b.parked, b.initError = bootstrapInit, false, false, nil
	select {
	case <-b.events:
	default:
	}
	b.mu.Unlock()
	env := b.host.environment()
	if err := b.extensions.start(ctx, run, env); err != nil {
		return err
	}
	path, args, err := b.entrypoint()
	if err != nil {
		return err
	}
	process, err := b.host.processes.start(functionCommand{args: args, env: env, dir: b.host.taskRoot}, func(exit functionExit) { b.ended(run, exit) })
	if err != nil {
		return fault("Runtime.InvalidEntrypoint", "%s: %v", path, rootCause(err))
	}
	b.mu.Lock()
	b.process = process
	b.mu.Unlock()
	select {
	case end := <-b.events:
		return end.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// rootCause is what the system said.
func rootCause(err error) error {
	if errno, ok := errors.AsType[unix.Errno](err); ok {
		return errno
	}
	return err
}

// entrypoint finds what to start.
func (b *bootstrap) entrypoint() (path string, args []string, err error) {
	if command := b.host.init.Command; len(command) > 0 {
		return command[0], command, nil
	}
	candidates := []string{b.host.taskRoot + "/bootstrap", "/opt/bootstrap"}
	for _, path := range candidates {
		if info, err := os.Stat(path); err == nil && !info.IsDir() {
			return path, []string{path}, nil
		}
	}
	return "", nil, fault("Runtime.InvalidEntrypoint", "Couldn't find valid bootstrap(s): [%s]", strings.Join(candidates, " "))
}

// report tells init how it went; only the first word counts.
func (b *bootstrap) report(err error) {
	select {
	case b.events <- initEnd{err}:
	default:
	}
}

// settleInit is called with mu held when something came that init waits for.
func (b *bootstrap) settleInit() {
	if b.phase == bootstrapInit && (b.nextSeen || b.parked) && b.extensions.ready() {
		b.phase = bootstrapServing
		b.report(nil)
	}
}

// ended is called when the function's process is gone.
func (b *bootstrap) ended(run int, exit functionExit) {
	cause := exitFault(exit)
	b.mu.Lock()
	if run != b.run || b.phase == bootstrapDown {
		b.mu.Unlock()
		return
	}
	if b.initError != nil {
		cause = b.initError
	}
	starting := b.phase == bootstrapInit
	b.phase = bootstrapDown
	clear(b.running)
	b.queue = nil // the agent gives them again
	b.mu.Unlock()
	if starting {
		b.report(cause)
		return
	}
	b.host.exited(cause)
}

// exitFault is how AWS Lambda tells of it.
func exitFault(exit functionExit) *call.InitError {
	switch {
	case exit.memory:
		return fault("Runtime.OutOfMemory", "Runtime exited with error: signal: %s", exit.signal)
	case exit.signal != "":
		return fault("Runtime.ExitError", "Runtime exited with error: signal: %s", exit.signal)
	case exit.code != 0:
		return fault("Runtime.ExitError", "Runtime exited with error: exit status %d", exit.code)
	default:
		return fault("Runtime.ExitError", "Runtime exited without providing a reason")
	}
}

// kill implements functionRuntime.
func (b *bootstrap) kill() {
	b.mu.Lock()
	b.phase = bootstrapDown
	b.run++
	b.next, b.restores, b.queue, b.process = nil, nil, nil, nil
	clear(b.running)
	b.extensions.forget()
	b.mu.Unlock()
	if b.api != nil {
		b.api.drop()
	}
}

// invoke implements functionRuntime.
func (b *bootstrap) invoke(request *call.Request, w call.ResponseWriter) {
	t := &bootstrapCall{request: request, w: w}
	b.mu.Lock()
	if b.phase != bootstrapServing {
		// It has just ended; the agent learns so, and gives this one again.
		b.mu.Unlock()
		return
	}
	restores := b.restores
	b.restores = nil // this instance was booted and not restored: it may go on
	b.extensions.invoke(request)
	conn := b.claim(t)
	b.mu.Unlock()
	for _, c := range restores {
		c.answer(200, "", nil)
	}
	if conn != nil {
		deliver(conn, t)
	}
}

// claim finds a connection that waits, or queues the call. It is called with mu held.
func (b *bootstrap) claim(t *bootstrapCall) *apiConn {
	if len(b.next) == 0 {
		b.queue = append(b.queue, t)
		return nil
	}
	if !t.seen() {
		return nil
	}
	conn := b.next[0]
	b.next = append(b.next[:0], b.next[1:]...)
	b.running[t.request.RequestID] = t
	return conn
}

// deliver hands an event over.
func deliver(conn *apiConn, t *bootstrapCall) {
	q := t.request
	if v, ok := t.w.(*invocation); ok {
		v.begin()
	}
	fields := make([]byte, 0, 512)
	fields = appendField(fields, "Lambda-Runtime-Aws-Request-Id", q.RequestID)
	fields = append(fields, "Lambda-Runtime-Deadline-Ms: "...)
	fields = strconv.AppendInt(fields, q.DeadlineMS, 10)
	fields = append(fields, "\r\n"...)
	fields = appendField(fields, "Lambda-Runtime-Invoked-Function-Arn", q.ARN)
	fields = appendField(fields, "Lambda-Runtime-Trace-Id", q.TraceID)
	fields = appendField(fields, "Lambda-Runtime-Client-Context", q.ClientContext)
	fields = appendField(fields, "Lambda-Runtime-Aws-Tenant-Id", q.Tenant)
	if len(q.Payload) > apiInlineWrite {
		// It may have to wait for the function to read, which the port's thread must not.
		go conn.answer(200, string(fields), q.Payload)
		return
	}
	conn.answer(200, string(fields), q.Payload)
}

// appendField adds a header line, unless there is no value. What would end the
// line is left out.
func appendField(b []byte, name, value string) []byte {
	if value == "" {
		return b
	}
	b = append(b, name...)
	b = append(b, ": "...)
	for i := range len(value) {
		if value[i] >= ' ' && value[i] != 0x7f {
			b = append(b, value[i])
		}
	}
	return append(b, "\r\n"...)
}

// hangUp forgets a connection.
func (b *bootstrap) hangUp(c *apiConn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.next = without(b.next, c)
	b.restores = without(b.restores, c)
	b.extensions.hangUp(c)
}

func without(list []*apiConn, c *apiConn) []*apiConn {
	for i, item := range list {
		if item == c {
			return append(list[:i], list[i+1:]...)
		}
	}
	return list
}

// hooked tells whether a restore has anything to tell the function's own code.
func (b *bootstrap) hooked() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.restores) > 0
}

// restored implements functionRuntime: hooks that wait in /restore/next run, and
// the function is ready again when it asks for the next invocation.
func (b *bootstrap) restored(ctx context.Context, _ *call.Identity) error {
	b.mu.Lock()
	restores := b.restores
	b.restores = nil
	if len(restores) == 0 {
		b.mu.Unlock()
		return nil
	}
	run := b.run
	b.phase = bootstrapInit
	b.parked, b.nextSeen = false, false
	b.mu.Unlock()
	for _, c := range restores {
		c.answer(200, "", nil)
	}
	select {
	case end := <-b.events:
		return end.err
	case <-ctx.Done():
		b.mu.Lock()
		defer b.mu.Unlock()
		if run == b.run {
			b.phase = bootstrapDown
		}
		return fault("Runtime.RestoreHookTimedout", "the function's hooks have taken too long after the restore")
	}
}

// stop implements functionRuntime. Without extensions a function is not told, as in
// AWS Lambda; with them it gets SIGTERM, and then they get their event.
func (b *bootstrap) stop(ctx context.Context, reason string) {
	b.mu.Lock()
	process, told := b.process, b.extensions.any()
	b.phase = bootstrapDown
	b.mu.Unlock()
	if !told {
		return
	}
	if process != nil {
		if err := process.signal(syscall.SIGTERM); err != nil {
			logf("asking the function to end: %v", err)
		}
		limit := functionGrace
		if end, ok := ctx.Deadline(); ok {
			limit = time.Until(end) / 3
		}
		select {
		case <-process.gone:
		case <-time.After(limit):
		case <-ctx.Done():
		}
	}
	b.extensions.stop(ctx, reason)
}

// busy tells whether the function or an extension still works on what was answered.
func (b *bootstrap) busy() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.phase == bootstrapServing && (len(b.next) == 0 && len(b.restores) == 0 || b.extensions.busy())
}
