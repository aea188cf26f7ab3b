package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/blixard/blixard/internal/call"
)

// maxExtensions is of a function, those in its own process included.
const maxExtensions = 10

// extensions are programs beside the function that are told of invocations and of
// the end: those in the extensions directories, and what the function itself
// registers. All fields are under bootstrap.mu.
type extensions struct {
	b          *bootstrap
	run        int
	dirs       []string
	list       []*extension
	registered chan struct{} // holds one: somebody has registered
}

type extension struct {
	name     string
	id       string // "" until it has registered
	external bool
	invoke   bool // wants INVOKE
	shutdown bool
	process  *functionProcess
	waiting  *apiConn // in event/next
	asked    bool     // event/next was called, once at least
	pending  [][]byte // events it has not asked for yet
	failure  *call.InitError
	over     bool // its process is gone
}

func newExtensions(b *bootstrap) *extensions {
	return &extensions{b: b, dirs: []string{"/opt/extensions", b.host.taskRoot + "/extensions"}, registered: make(chan struct{}, 1)}
}

// forget is called with mu held.
func (e *extensions) forget() { e.list = nil }

func (e *extensions) any() bool { return len(e.list) > 0 }

// ready tells whether all have asked for their first event. It is called with mu held.
func (e *extensions) ready() bool {
	for _, x := range e.list {
		if !x.asked {
			return false
		}
	}
	return true
}

// busy is called with mu held.
func (e *extensions) busy() bool {
	for _, x := range e.list {
		if x.waiting == nil && !x.over {
			return true
		}
	}
	return false
}

// start starts those in the directories and waits until they have registered.
func (e *extensions) start(ctx context.Context, run int, env []string) error {
	paths := e.find()
	e.b.mu.Lock()
	e.list, e.run = nil, run
	select {
	case <-e.registered:
	default:
	}
	e.b.mu.Unlock()
	if len(paths) > maxExtensions {
		return fault("Extension.LaunchError", "%d extensions, at most %d are allowed", len(paths), maxExtensions)
	}
	for _, path := range paths {
		x := &extension{name: filepath.Base(path), external: true}
		e.b.mu.Lock()
		e.list = append(e.list, x)
		e.b.mu.Unlock()
		process, err := e.b.host.processes.start(functionCommand{args: []string{path}, env: env, dir: "/"}, func(exit functionExit) { e.ended(run, x, exit) })
		if err != nil {
			return fault("Extension.LaunchError", "%s: %v", path, rootCause(err))
		}
		e.b.mu.Lock()
		x.process = process
		e.b.mu.Unlock()
	}
	for !e.allRegistered() {
		select {
		case <-e.registered:
		case end := <-e.b.events:
			return end.err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

func (e *extensions) allRegistered() bool {
	e.b.mu.Lock()
	defer e.b.mu.Unlock()
	for _, x := range e.list {
		if x.id == "" {
			return false
		}
	}
	return true
}

// find lists the programs, in order of directories and names.
func (e *extensions) find() []string {
	var paths []string
	for _, dir := range e.dirs {
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue // most functions have none
		}
		for _, entry := range entries {
			info, err := os.Stat(filepath.Join(dir, entry.Name()))
			if err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
				paths = append(paths, filepath.Join(dir, entry.Name()))
			}
		}
	}
	return paths
}

// ended is called when an extension's process is gone.
func (e *extensions) ended(run int, x *extension, exit functionExit) {
	e.b.mu.Lock()
	x.over = true
	if run != e.b.run || e.b.phase == bootstrapDown {
		e.b.mu.Unlock()
		return
	}
	cause := x.failure
	if cause == nil {
		words := "exit status " + decimal(int64(exit.code))
		if exit.signal != "" {
			words = "signal: " + exit.signal
		}
		cause = fault("Extension.Crash", "extension %s exited: %s", x.name, words)
	}
	starting := e.b.phase == bootstrapInit
	e.b.phase = bootstrapDown
	clear(e.b.running)
	e.b.queue = nil
	e.b.mu.Unlock()
	if starting {
		e.b.report(cause)
		return
	}
	e.b.host.exited(cause)
}

// hangUp is called with mu held.
func (e *extensions) hangUp(c *apiConn) {
	for _, x := range e.list {
		if x.waiting == c {
			x.waiting = nil
		}
	}
}

// invoke tells of an invocation. It is called with mu held.
func (e *extensions) invoke(q *call.Request) {
	if len(e.list) == 0 {
		return
	}
	type tracing struct {
		Type  string `json:"type"`
		Value string `json:"value"`
	}
	event, err := json.Marshal(struct {
		EventType  string  `json:"eventType"`
		DeadlineMS int64   `json:"deadlineMs"`
		RequestID  string  `json:"requestId"`
		ARN        string  `json:"invokedFunctionArn"`
		Tracing    tracing `json:"tracing"`
	}{"INVOKE", q.DeadlineMS, q.RequestID, q.ARN, tracing{"X-Amzn-Trace-Id", q.TraceID}})
	if err != nil {
		logf("writing an event: %v", err)
		return
	}
	for _, x := range e.list {
		if x.invoke {
			x.tell(event)
		}
	}
}

// maxPendingEvents bounds what an extension has not asked for.
const maxPendingEvents = 1024

// tell is called with bootstrap.mu held.
func (x *extension) tell(event []byte) {
	if x.waiting == nil {
		if len(x.pending) < maxPendingEvents {
			x.pending = append(x.pending, event)
		}
		return
	}
	conn := x.waiting
	x.waiting = nil
	conn.answer(200, "Lambda-Extension-Event-Identifier: "+newUUID()+"\r\n", event)
}

// stop tells extensions of the end and waits for them to go.
func (e *extensions) stop(ctx context.Context, reason string) {
	end, ok := ctx.Deadline()
	if !ok {
		end = time.Now().Add(functionGrace)
	}
	event, err := json.Marshal(struct {
		EventType  string `json:"eventType"`
		DeadlineMS int64  `json:"deadlineMs"`
		Reason     string `json:"shutdownReason"`
	}{"SHUTDOWN", end.UnixMilli(), reason})
	if err != nil {
		logf("writing an event: %v", err)
		return
	}
	var processes []*functionProcess
	e.b.mu.Lock()
	for _, x := range e.list {
		if x.shutdown {
			x.tell(event)
		}
		if x.process != nil && x.shutdown && !x.over {
			processes = append(processes, x.process)
		}
	}
	e.b.mu.Unlock()
	for _, process := range processes {
		select {
		case <-process.gone:
		case <-ctx.Done():
			return
		}
	}
}

const extensionPrefix = "/2020-01-01/extension/"

// serve answers a request of an extension; false: it is none.
func (e *extensions) serve(c *apiConn, r *apiRequest) bool {
	path, ok := strings.CutPrefix(r.path, extensionPrefix)
	if !ok {
		return e.serveTelemetry(c, r)
	}
	switch {
	case r.method == "POST" && path == "register":
		e.serveRegister(c, r)
		return true
	case r.method == "GET" && path == "event/next", r.method == "POST" && (path == "init/error" || path == "exit/error"):
	default:
		return false
	}
	id := r.header("lambda-extension-identifier")
	if id == "" {
		c.answerError(403, "Extension.MissingExtensionIdentifier", "Missing Lambda-Extension-Identifier header")
		return true
	}
	if !isUUID(id) {
		c.answerError(403, "Extension.InvalidExtensionIdentifier", "Invalid Lambda-Extension-Identifier")
		return true
	}
	if path == "event/next" {
		e.serveNext(c, id)
		return true
	}
	e.serveFailure(c, r, id, path == "init/error")
	return true
}

// serveTelemetry tells that logs cannot be subscribed to, in the documented words:
// extensions go on without.
func (e *extensions) serveTelemetry(c *apiConn, r *apiRequest) bool {
	switch {
	case r.method == "PUT" && r.path == "/2022-07-01/telemetry":
		c.answerError(202, "Telemetry.NotSupported", "Telemetry API is not supported")
	case r.method == "PUT" && r.path == "/2020-08-15/logs":
		c.answerError(202, "Logs.NotSupported", "Logs API is not supported")
	default:
		return false
	}
	return true
}

func (e *extensions) serveRegister(c *apiConn, r *apiRequest) {
	name := r.header("lambda-extension-name")
	if name == "" {
		c.answerError(403, "Extension.InvalidExtensionName", "Empty extension name")
		return
	}
	body, err := readBody(c, r, 64<<10)
	var wants struct {
		Events []string `json:"events"`
	}
	if err == nil {
		err = json.Unmarshal(body, &wants)
	}
	if err != nil {
		c.answerError(403, "InvalidRequestFormat", err.Error())
		return
	}
	e.b.mu.Lock()
	id, errorType, message := e.register(name, wants.Events)
	e.b.mu.Unlock()
	if errorType != "" {
		c.answerError(403, errorType, message)
		return
	}
	init := e.b.host.init
	about, err := json.Marshal(struct {
		Name    string `json:"functionName"`
		Version string `json:"functionVersion"`
		Handler string `json:"handler"`
	}{init.Function, init.Version, init.Handler})
	if err != nil {
		c.answerError(500, "InternalServerError", err.Error())
		return
	}
	c.answer(200, "Lambda-Extension-Identifier: "+id+"\r\n", about)
	select {
	case e.registered <- struct{}{}:
	default:
	}
}

// register is called with mu held.
func (e *extensions) register(name string, events []string) (id, errorType, message string) {
	i := slices.IndexFunc(e.list, func(x *extension) bool { return x.name == name })
	external := i >= 0 && e.list[i].external
	for _, event := range events {
		if event != "INVOKE" && (event != "SHUTDOWN" || !external) {
			return "", "Extension.InvalidEventType", event + ": the event is not known, or not for extensions in the function's process"
		}
	}
	switch {
	case i >= 0 && (!external || e.list[i].id != ""):
		return "", "Extension.InvalidExtensionState", "Extension with this name already registered"
	case e.b.phase != bootstrapInit || e.b.nextSeen:
		return "", "Extension.RegistrationClosed", "Extension registration closed already"
	case i < 0 && len(e.list) >= maxExtensions:
		return "", "Extension.TooManyExtensions", fmt.Sprintf("Extension limit (%d) reached", maxExtensions)
	}
	x := &extension{name: name}
	if external {
		x = e.list[i]
	} else {
		e.list = append(e.list, x)
	}
	x.id, x.invoke, x.shutdown = newUUID(), slices.Contains(events, "INVOKE"), slices.Contains(events, "SHUTDOWN")
	return x.id, "", ""
}

// byID is called with mu held.
func (e *extensions) byID(id string) *extension {
	for _, x := range e.list {
		if x.id == id {
			return x
		}
	}
	return nil
}

func (e *extensions) serveNext(c *apiConn, id string) {
	e.b.mu.Lock()
	defer e.b.mu.Unlock()
	x := e.byID(id)
	if x == nil {
		c.answerError(403, "Extension.UnknownExtensionIdentifier", "Unknown extension "+id)
		return
	}
	if x.failure != nil || x.waiting != nil {
		c.answerError(403, "Extension.InvalidExtensionState", "State transition from Ready to Ready failed for extension "+x.name+". Error: "+notAllowed)
		return
	}
	x.waiting, x.asked = c, true
	if len(x.pending) > 0 {
		event := x.pending[0]
		x.pending = x.pending[1:]
		x.tell(event)
	}
	e.b.settleInit()
}

func (e *extensions) serveFailure(c *apiConn, r *apiRequest, id string, init bool) {
	errorType := r.header("lambda-extension-function-error-type")
	if errorType == "" {
		c.answerError(403, "Extension.MissingHeader", "Lambda-Extension-Function-Error-Type not found")
		return
	}
	e.b.mu.Lock()
	x := e.byID(id)
	if x != nil {
		kind := "Extension.ExitError"
		if init {
			kind = "Extension.InitError"
		}
		x.failure = fault(kind, "extension %s: %s", x.name, errorType)
	}
	starting := e.b.phase == bootstrapInit
	e.b.mu.Unlock()
	if x == nil {
		c.answerError(403, "Extension.UnknownExtensionIdentifier", "Unknown Lambda-Extension-Identifier")
		return
	}
	c.accepted()
	if init && starting {
		e.b.report(x.failure)
	}
}

// newUUID makes a random one.
func newUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func isUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i := range len(s) {
		digit := s[i]|0x20 >= 'a' && s[i]|0x20 <= 'f' || s[i] >= '0' && s[i] <= '9'
		if dash := i == 8 || i == 13 || i == 18 || i == 23; dash != (s[i] == '-') || !dash && !digit {
			return false
		}
	}
	return true
}

func decimal(n int64) string { return fmt.Sprint(n) }
