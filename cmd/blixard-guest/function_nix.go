package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
)

const (
	// nixSpare is how many evaluators wait beyond those that answer.
	nixSpare = 1
	// nixSmallMiB of memory or less have no room for spare evaluators, of which
	// each takes 25 MiB.
	nixSmallMiB = 96
	// nixErrorBytes of an evaluator's messages are kept for its error.
	nixErrorBytes = 64 << 10
	// nixOpenWait is how long an evaluator that is ready may take to wait for its
	// event; it is a few instructions away from it.
	nixOpenWait = 2 * time.Second
	// nixTrace begins what evaluators say to us through builtins.trace. Handlers may
	// trace as well, which is their log.
	nixTrace = "trace: "
)

// nixRuntime evaluates functions with the real Nix evaluator. An evaluator is a
// process that is started ahead of its one call: it has loaded the function and
// waits for a pipe to be opened. Then it reads the event, traces the answer as one
// line of JSON and is killed, which is quicker than its own end. A call cannot
// leave anything behind for the next one, and whatever it does to its evaluator
// another one is there or can be started.
type nixRuntime struct {
	host *functionHost
	dir  string // of pipes and events
	args []string
	size int

	listeners sync.WaitGroup // one for each evaluator, until nothing is left of it

	mu       sync.Mutex
	life     int                        // grows with kill: evaluators of a former life are of no interest
	number   int                        // of evaluators, for their files' names
	all      map[*nixEvaluator]struct{} // that run
	ready    []*nixEvaluator
	starting int
	waiting  []*nixCall
	started  chan error // by evaluators that became ready, or not, while init waits
}

type nixCall struct {
	request *call.Request
	w       call.ResponseWriter
	begun   time.Time
}

type nixEvaluator struct {
	runtime *nixRuntime
	life    int
	dir     string
	words   [2]string // ready, answer; with "trace: " before them
	process *functionProcess
	read    int // of its messages
	trial   *nixCall
	ended   chan struct{} // closed when exit is known
	exit    functionExit
	said    string        // when it has ended: what was not for us
	gone    chan struct{} // closed when nothing is left of it

	// Under runtime.mu.
	isReady bool
	call    *nixCall // what it works on
	done    bool     // it has answered, and was killed for it
}

func newNix(host *functionHost) functionRuntime {
	return &nixRuntime{host: host, dir: "/run/blixard/nix", all: make(map[*nixEvaluator]struct{})}
}

func (n *nixRuntime) init(ctx context.Context) error {
	if n.args == nil {
		if err := n.prepare(); err != nil {
			return err
		}
		if err := n.tryOut(ctx); err != nil {
			return err
		}
	}
	n.mu.Lock()
	results := make(chan error, n.size)
	n.started = results
	life := n.life
	n.mu.Unlock()
	defer func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.started = nil
	}()
	// The first one tells whether the function is good; the others follow.
	for range n.size {
		if err := n.startOne(life); err != nil {
			return err
		}
		select {
		case err := <-results:
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// tryOut has an evaluator answer once, so that what it needs for an answer is in
// memory when the guest is saved.
func (n *nixRuntime) tryOut(ctx context.Context) error {
	n.mu.Lock()
	n.number++
	e := n.evaluator()
	n.mu.Unlock()
	done := make(chan struct{})
	e.trial = &nixCall{request: &call.Request{RequestID: "warm", Payload: []byte(`{"text":"warm"}`)}, w: &nixTrial{done: done}}
	disk := n.host.runtimeRoot
	if err := e.start(n.commandLine(disk+"/nix", "warm.nix", "", "{}")); err != nil {
		return err
	}
	select {
	case <-done:
	case <-e.gone:
		return fmt.Errorf("trying the evaluator out: %s", nixFault(e.said, e.exit).message)
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-e.gone:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// nixTrial takes the answer of a trial.
type nixTrial struct {
	once sync.Once
	done chan struct{}
}

func (*nixTrial) Begin(blixard.ResponseHead) error { return nil }
func (*nixTrial) Write(p []byte) (int, error)      { return len(p), nil }
func (t *nixTrial) Finish(call.Outcome) error {
	t.once.Do(func() { close(t.done) })
	return nil
}

// prepare finds the function's file and makes the evaluators' command line.
func (n *nixRuntime) prepare() error {
	init := n.host.init
	root := n.host.taskRoot
	files, err := filepath.Glob(filepath.Join(root, "*.nix"))
	if err != nil {
		return fmt.Errorf("looking for the function: %w", err)
	}
	for i := range files {
		files[i] = filepath.Base(files[i])
	}
	file, attribute, ok := blixard.NixEntry(init.Handler, files, func(name string) bool { return isFile(filepath.Join(root, name)) })
	if !ok {
		return &call.InitError{Type: "Runtime.InvalidEntrypoint", Message: fmt.Sprintf("the code has no file %q for the handler %q", file, init.Handler)}
	}
	if err := os.MkdirAll(n.dir, 0o755); err != nil {
		return fmt.Errorf("making room for events: %w", err)
	}
	n.size = max(1, init.Concurrency) + nixSpare
	if init.MemoryMiB > 0 && init.MemoryMiB <= nixSmallMiB {
		n.size = max(1, init.Concurrency)
	}
	environment := []byte{'{'}
	for i, variable := range init.Env {
		if i > 0 {
			environment = append(environment, ',')
		}
		environment = append(appendJSONString(environment, variable.Key), ':')
		environment = appendJSONString(environment, variable.Value)
	}
	environment = append(environment, '}')
	n.args = n.commandLine(root, file, attribute, string(environment))
	return nil
}

// commandLine starts an evaluator; what is the one evaluator's follows.
func (n *nixRuntime) commandLine(task, file, attribute, environment string) []string {
	disk := n.host.runtimeRoot
	return []string{
		// Messages come through a pipe of the evaluator's own, not the common log.
		"/bin/sh", "-c", "ulimit -s " + strconv.FormatInt(n.stackKiB(), 10) + `; exec "$@" 2>&3 3>&- >/dev/null`, "sh",
		disk + "/lib/ld.so", "--library-path", disk + "/lib", disk + "/bin/nix-instantiate",
		"--eval", "--strict", "--store", "dummy://",
		"-I", n.dir, "-I", task, "-I", disk + "/nix",
		disk + "/nix/call.nix",
		"--argstr", "task", task, "--argstr", "file", file, "--argstr", "attribute", attribute,
		"--argstr", "environment", environment,
	}
}

// stackKiB of an evaluator is at most what Nix would give itself, and so little that
// a function without an end overflows it before it has used up its memory, which
// would make it very slow first.
func (n *nixRuntime) stackKiB() int64 {
	return min(64, max(8, n.host.init.MemoryMiB/4)) << 10
}

// environment of evaluators is nothing of the function's.
func (n *nixRuntime) environment() []string {
	// The heap is bounded so that a function that grows without end gets an error
	// it can be told of, before the kernel kills it.
	heap := n.host.init.MemoryMiB << 20
	if heap <= 0 {
		heap = 128 << 20
	}
	heap = max(heap-heap/8-int64(n.size-1)*(16<<20), heap/2)
	return []string{
		"HOME=/tmp", "NO_COLOR=1", "LC_ALL=C", "PATH=/bin",
		// Names are looked up now, not when functions are called for the first time.
		"LD_BIND_NOW=1",
		"GC_INITIAL_HEAP_SIZE=" + strconv.FormatInt(min(16<<20, heap), 10),
		"GC_MAXIMUM_HEAP_SIZE=" + strconv.FormatInt(heap, 10),
		"GC_MARKERS=1",
		"NIX_STATE_DIR=/tmp/nix/state", "NIX_LOG_DIR=/tmp/nix/log", "NIX_CONF_DIR=/tmp/nix/conf", "NIX_USER_CONF_FILES=",
		"NIX_CONFIG=restrict-eval = true\nallow-import-from-derivation = false\nsubstitute = false\nbuild-users-group =\n",
	}
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// startOne starts an evaluator, unless there are enough or that life is over. Those
// for which no call waits are started one after the other: together each would be
// ready later.
func (n *nixRuntime) startOne(life int) error {
	n.mu.Lock()
	if n.life != life || len(n.ready)+n.starting >= max(n.size, len(n.waiting)) || n.starting >= max(1, len(n.waiting)) {
		n.mu.Unlock()
		return nil
	}
	n.starting++
	n.number++
	e := n.evaluator()
	n.mu.Unlock()
	err := e.start(n.args)
	if err != nil {
		n.mu.Lock()
		n.starting--
		n.mu.Unlock()
		return fmt.Errorf("starting an evaluator: %w", err)
	}
	return nil
}

// evaluator is called with mu held, after number has grown.
func (n *nixRuntime) evaluator() *nixEvaluator {
	return &nixEvaluator{
		runtime: n, life: n.life, dir: filepath.Join(n.dir, strconv.Itoa(n.number)),
		ended: make(chan struct{}), gone: make(chan struct{}),
	}
}

func (e *nixEvaluator) start(commandLine []string) error {
	n := e.runtime
	token, err := randomWord()
	if err != nil {
		return err
	}
	ready, answer := "ready-"+token, "answer-"+token+":"
	e.words = [2]string{nixTrace + ready, nixTrace + answer}
	if err := os.Mkdir(e.dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := unix.Mkfifo(e.pipe(), 0o644); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("making its pipe: %w", err)
	}
	var messages [2]int
	if err := unix.Pipe2(messages[:], unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("making the pipe of its messages: %w", err)
	}
	e.read = messages[0]
	args := append(slices.Clip(commandLine),
		"--argstr", "pipe", e.pipe(), "--argstr", "input", e.input(), "--argstr", "ready", ready, "--argstr", "answer", answer)
	e.process, err = n.host.processes.start(functionCommand{args: args, env: n.environment(), dir: "/", files: []uintptr{uintptr(messages[1])}},
		func(exit functionExit) {
			e.exit = exit
			close(e.ended)
		})
	err = errors.Join(err, unix.Close(messages[1]))
	if e.process == nil {
		return errors.Join(err, unix.Close(e.read), os.RemoveAll(e.dir))
	}
	n.mu.Lock()
	late := e.life != n.life
	if !late {
		n.all[e] = struct{}{}
	}
	n.mu.Unlock()
	if late {
		err = errors.Join(err, e.process.signal(unix.SIGKILL))
	}
	n.listeners.Go(e.listen)
	return err
}

func (e *nixEvaluator) pipe() string  { return e.dir + "/pipe" }
func (e *nixEvaluator) input() string { return e.dir + "/input" }

// listen reads what the evaluator says until its end.
func (e *nixEvaluator) listen() {
	var line []byte // not ended yet
	var said []byte // what was said and is not for us
	limit := int(e.runtime.host.init.MaxResponse)
	if limit <= 0 {
		limit = call.MaxResponse
	}
	buffer := make([]byte, 32<<10)
	answered := false
	for {
		n, err := unix.Read(e.read, buffer)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n <= 0 {
			break
		}
		if answered {
			continue // it is about to end
		}
		for part := buffer[:n]; len(part) > 0; {
			end := bytes.IndexByte(part, '\n')
			if end < 0 {
				line = append(line, part...)
				break
			}
			line = append(line, part[:end]...)
			part = part[end+1:]
			if answered = e.hear(line, &said); answered {
				break
			}
			line = line[:0]
		}
		isAnswer := bytes.HasPrefix(line, []byte(e.words[1]))
		if len(line) > nixErrorBytes && !isAnswer {
			e.note(line, &said)
			line = line[:0]
		}
		if len(line) > limit+4096 {
			answered = true
			e.finish(func(c *nixCall) {
				c.fault("Function.ResponseSizeTooLarge", fmt.Sprintf("Response payload size exceeded maximum allowed payload size (%d bytes).", limit))
			})
		}
	}
	if err := unix.Close(e.read); err != nil {
		logf("closing the messages of an evaluator: %v", err)
	}
	<-e.ended
	if len(line) > 0 && !answered {
		e.hear(line, &said)
	}
	e.said = string(said)
	if err := os.RemoveAll(e.dir); err != nil {
		logf("removing an event: %v", err)
	}
	e.runtime.mu.Lock()
	delete(e.runtime.all, e)
	e.runtime.mu.Unlock()
	close(e.gone)
	if e.trial == nil {
		e.over()
	}
}

// hear takes a line and tells whether it was the answer.
func (e *nixEvaluator) hear(line []byte, said *[]byte) bool {
	if answer, ok := bytes.CutPrefix(line, []byte(e.words[1])); ok {
		e.finish(func(c *nixCall) {
			if err := c.w.Begin(blixard.ResponseHead{ContentType: "application/json"}); err != nil {
				return // it was ended behind our back
			}
			if _, err := c.w.Write(answer); err != nil {
				return
			}
			c.end(call.Outcome{})
		})
		return true
	}
	if string(line) == e.words[0] {
		e.becomeReady()
		return false
	}
	e.note(line, said)
	return false
}

// note keeps what is not for us, for the log and as a possible error.
func (e *nixEvaluator) note(line []byte, said *[]byte) {
	if room := nixErrorBytes - len(*said); room > 0 {
		*said = append(append(*said, line[:min(len(line), room)]...), '\n')
	}
	// Nobody is to be told when the log cannot be written.
	fmt.Fprintf(e.runtime.host.log, "%s\n", line)
}

func (c *nixCall) end(outcome call.Outcome) {
	outcome.Handler = time.Since(c.begun)
	if err := c.w.Finish(outcome); err != nil && !errors.Is(err, call.ErrEnded) {
		logf("answering: %v", err)
	}
}

func (c *nixCall) fault(errorType, message string) {
	e := nixError{kind: errorType, message: message}
	c.end(call.Outcome{Error: unhandled(errorType), Body: e.body(c.request.RequestID)})
}

// finish ends the evaluator's call, and the evaluator.
func (e *nixEvaluator) finish(answer func(*nixCall)) {
	n := e.runtime
	n.mu.Lock()
	c := e.call
	e.call, e.done = nil, true
	n.mu.Unlock()
	if c != nil {
		answer(c)
	}
	if err := e.process.signal(unix.SIGKILL); err != nil {
		logf("ending an evaluator: %v", err)
	}
}

func (e *nixEvaluator) becomeReady() {
	n := e.runtime
	n.mu.Lock()
	if e.trial != nil && !e.isReady {
		e.isReady, e.call = true, e.trial
		n.mu.Unlock()
		e.work(e.trial)
		return
	}
	if e.isReady || e.life != n.life {
		n.mu.Unlock()
		return
	}
	e.isReady = true
	n.starting--
	var next *nixCall
	if len(n.waiting) > 0 {
		next = n.waiting[0]
		n.waiting = n.waiting[1:]
		e.call = next
	} else {
		n.ready = append(n.ready, e)
	}
	if n.started != nil {
		select {
		case n.started <- nil:
		default: // init has heard of enough
		}
	}
	n.mu.Unlock()
	if next != nil {
		e.work(next)
	} else if err := n.startOne(e.life); err != nil {
		logf("%v", err)
	}
}

// over takes account of an evaluator that has ended, by itself or not.
func (e *nixEvaluator) over() {
	n := e.runtime
	fault := nixFault(e.said, e.exit)
	n.mu.Lock()
	if e.exit.signal != "" && e.life == n.life && !e.done && n.started == nil {
		// Killed, and not by us: by the agent, who knows it, or for want of memory,
		// which takes the others with it.
		n.mu.Unlock()
		n.host.exited(&call.InitError{Type: fault.kind, Message: fault.message})
		return
	}
	if e.life != n.life {
		n.mu.Unlock()
		return
	}
	c := e.call
	e.call = nil
	var failed []*nixCall
	if c != nil {
		failed = append(failed, c)
	}
	if !e.isReady {
		n.starting--
		// It would fail for those who wait, too.
		failed = append(failed, n.waiting...)
		n.waiting = nil
		if n.started != nil {
			select {
			case n.started <- &call.InitError{Type: fault.kind, Message: fault.message, Body: fault.body("")}:
			default:
			}
		}
	}
	for i, other := range n.ready {
		if other == e {
			n.ready = append(n.ready[:i], n.ready[i+1:]...)
			break
		}
	}
	good := e.isReady
	n.mu.Unlock()
	for _, c := range failed {
		c.end(call.Outcome{Error: unhandled(fault.kind), Body: fault.body(c.request.RequestID)})
	}
	if good {
		// Only now, so that it does not take time from the call.
		if err := n.startOne(e.life); err != nil {
			logf("%v", err)
		}
	}
}

// work gives the event to the evaluator.
func (e *nixEvaluator) work(c *nixCall) {
	err := os.WriteFile(e.input(), e.runtime.event(c.request), 0o644)
	if err == nil {
		err = e.wake()
	}
	if err != nil {
		logf("giving an event to an evaluator: %v", err)
		e.finish(func(c *nixCall) {
			c.fault("Runtime.ExitError", "the evaluator did not take the event: "+err.Error())
		})
	}
}

// wake opens the pipe on which the evaluator waits, and closes it.
func (e *nixEvaluator) wake() error {
	for end := time.Now().Add(nixOpenWait); ; time.Sleep(time.Millisecond) {
		fd, err := unix.Open(e.pipe(), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		switch {
		case err == nil:
			return unix.Close(fd)
		case errors.Is(err, unix.EINTR):
		case !errors.Is(err, unix.ENXIO) || time.Now().After(end):
			return err
		}
	}
}

func (n *nixRuntime) invoke(request *call.Request, w call.ResponseWriter) {
	c := &nixCall{request: request, w: w, begun: time.Now()}
	if err := checkNixEvent(request.Payload); err != nil {
		c.fault("Runtime.InvalidEvent", err.Error())
		return
	}
	n.mu.Lock()
	if last := len(n.ready) - 1; last >= 0 {
		e := n.ready[last]
		n.ready = n.ready[:last]
		e.call = c
		n.mu.Unlock()
		e.work(c)
		return
	}
	n.waiting = append(n.waiting, c)
	life := n.life
	n.mu.Unlock()
	if err := n.startOne(life); err != nil {
		logf("%v", err)
		n.mu.Lock()
		mine := false
		for i, other := range n.waiting {
			if other == c {
				n.waiting = append(n.waiting[:i], n.waiting[i+1:]...)
				mine = true
				break
			}
		}
		n.mu.Unlock()
		if mine {
			c.fault("Runtime.ExitError", err.Error())
		}
	}
}

func (n *nixRuntime) kill() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.life++
	n.ready, n.waiting, n.starting = nil, nil, 0
	// One may have been started just when the agent was ending all processes.
	for e := range n.all { //order:any each gets the same
		if err := e.process.signal(unix.SIGKILL); err != nil {
			logf("ending an evaluator: %v", err)
		}
	}
}

// busy tells whether evaluators are being started or ended.
func (n *nixRuntime) busy() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.starting > 0 || len(n.all) > len(n.ready)
}

func (n *nixRuntime) restored(context.Context, *call.Identity) error { return nil }

// stop has nothing to do: evaluators have no last words.
func (n *nixRuntime) stop(context.Context, string) {}

// event is what the evaluator reads.
func (n *nixRuntime) event(q *call.Request) []byte {
	init := n.host.init
	payload := q.Payload
	if len(bytes.TrimSpace(payload)) == 0 {
		payload = []byte("{}")
	}
	b := make([]byte, 0, len(payload)+1024)
	b = append(b, `{"event":`...)
	b = append(b, payload...)
	b = append(b, `,"context":{`...)
	for i, field := range [][2]string{
		{"awsRequestId", q.RequestID},
		{"requestId", q.RequestID},
		{"functionName", init.Function},
		{"functionVersion", init.Version},
		{"invokedFunctionArn", q.ARN},
		{"traceId", q.TraceID},
		{"logGroupName", init.LogGroup},
		{"logStreamName", init.LogStream},
	} {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(append(append(b, '"'), field[0]...), `":`...)
		b = appendJSONString(b, field[1])
	}
	b = append(b, `,"memoryLimitInMB":`...)
	b = strconv.AppendInt(b, init.MemoryMiB, 10)
	b = append(b, `,"deadlineMs":`...)
	b = strconv.AppendInt(b, q.DeadlineMS, 10)
	b = append(b, `,"remainingTimeMs":`...)
	b = strconv.AppendInt(b, q.RemainingMS, 10)
	if strings.HasPrefix(strings.TrimSpace(q.ClientContext), "{") && checkNixEvent([]byte(q.ClientContext)) == nil {
		b = append(append(b, `,"clientContext":`...), q.ClientContext...)
	}
	return append(b, "}}"...)
}
