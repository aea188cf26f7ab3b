// Package call is the protocol between a node and the function that runs in a
// guest: it starts the function, gives a clone its identity, and carries
// invocations. It is made for the first call after a restore, when an emulator
// has to translate every instruction anew: fixed binary frames, no reflection,
// and as few switches between threads as can be.
//
// # Wire
//
// One connection, of which both ends send frames: type (1 byte), id (4),
// length (4), payload (at most MaxFrame), numbers big endian. The host asks:
// each question has an id of its own, used once, and the answer bears it. What
// belongs to an invocation bears the invocation's id.
//
//	host:  INIT RESTORE STAT SHUTDOWN     a question
//	       INVOKE, then BODY…             an invocation, the payload's rest in order
//	       WINDOW                         that many more bytes of the answer may come
//	       CANCEL                         nobody waits for the answer any more
//	guest: OK, FAIL                       the answer to a question
//	       HEAD, DATA…, RESULT            the answer to an invocation; a short one is all in RESULT
//	       LOG                            output of the function, of an invocation or (id 0) of none
//
// There is no way to find the beginning of a frame again: a connection that
// broke or was misused is over, and the guest with it.
//
// # Ownership and order
//
// A Conn owns its connection and one goroutine that reads it, which never waits
// for anything else. A Guest is served by the thread that calls Serve, which
// reads frames and calls the Handler; everything else is written by whoever has
// something to say, a frame at a time. INIT comes once per boot, RESTORE once per
// clone and before its first INVOKE. LOG frames of an invocation come before its
// RESULT.
//
// # Trust
//
// The host takes the guest for hostile: every length is checked before anything
// is allocated, what a guest can make the host hold is bounded by windows and by
// Options, a frame out of place ends the connection, and no method waits longer
// than its context. The guest trusts the host, which could read its memory anyway.
package call

import (
	"errors"
	"time"

	"github.com/blixard/blixard"
)

// PortName is the name of the virtio-serial port.
const PortName = "blixard.call"

// RoleWord on the kernel's command line makes blixard-guest serve this protocol.
const RoleWord = "blixard.role=function"

// Version is of the protocol. Each end refuses another.
const Version = 1

// Bounds. Sizes are in bytes.
const (
	MaxFrame   = 64 << 10 // of a frame's payload
	MaxPayload = 6 << 20  // of an invocation, unless Init says otherwise
	// MaxResponse is the largest answer that is not streamed, unless Init says
	// otherwise: 6 MiB and what AWS Lambda grants for the envelope.
	MaxResponse = 6<<20 + 100
	MaxStream   = 200 << 20 // of a streamed answer, unless Init says otherwise
	// Window is how much of an answer may be under way to a host that has not
	// taken it yet.
	Window = 256 << 10
	// MaxOpen is how many questions and invocations may be open at once.
	MaxOpen = 1024
)

var (
	// ErrClosed: the connection is over; the guest has to be thrown away.
	ErrClosed = errors.New("connection to the guest is over")
	// ErrHostile: the guest broke the protocol; the connection is over.
	ErrHostile = errors.New("the guest broke the protocol")
	// ErrRefused: the guest could not do what it was asked, for a reason that is
	// not the function's.
	ErrRefused = errors.New("the guest refused")
)

// Init starts a function in a guest that has booted. It comes once per boot.
type Init struct {
	Function string
	Version  string // "$LATEST" or a number
	ARN      string // of the function, without a qualifier
	Region   string
	Runtime  string // "bootstrap", "nix", "http", "wasm"
	Handler  string
	Command  []string
	Port     int
	Env      []blixard.Label

	MemoryMiB    int64 // of the function's processes
	EphemeralMiB int64 // of /tmp
	TimeoutMS    int64 // of an invocation
	InitMS       int64 // what initialisation may take here (longer under emulation)
	Concurrency  int   // invocations at once; 0 is 1
	MaxPayload   int64 // 0: the constant
	MaxResponse  int64
	MaxStream    int64

	LogGroup  string
	LogStream string
	// InitializationType is told to the function: "on-demand", "snap-start",
	// "provisioned-concurrency".
	InitializationType string

	CodeDevice    string // "/dev/vda": file system with the code, mounted read-only at /var/task
	RuntimeDevice string // "/dev/vdb" or "": mounted read-only at /opt/blixard

	UnixNano int64  // the wall clock
	Entropy  []byte // for the kernel's generator, besides what the machine gives
	Hostname string
	// The network while it initialises; a clone gets its own. Address "" is none.
	Address string // "10.0.2.15/24"
	Gateway string
	DNS     []string
	MTU     int
}

// Ready tells of an initialised function.
type Ready struct {
	Init    time.Duration // of the runtime and extensions
	Boot    time.Duration // since the guest's kernel started
	UsedMiB int64         // by the function's processes
	Log     []byte        // what it wrote meanwhile: the newest, bounded by Options
}

// InitError tells that the function, not the guest, could not be initialised.
type InitError struct {
	Type    string // "Runtime.ExitError", "Sandbox.Timedout", "Runtime.InvalidEntrypoint", the function's own
	Message string
	Body    []byte // the JSON that the runtime has posted, or one made of Type and Message
	Log     []byte // what it wrote: the newest, bounded by Options
}

func (e *InitError) Error() string { return e.Type + ": " + e.Message }

// Identity makes a clone somebody of its own. A guest that does not acknowledge
// it must never be given an invocation.
type Identity struct {
	Epoch      uint64 // of this restore; never the same in two clones of a template
	UnixNano   int64  // the wall clock
	Entropy    []byte // 64 bytes, for the kernel's generator
	MachineID  string // 32 hexadecimal digits
	BootID     string // a UUID
	Hostname   string
	Instance   string
	Node       string
	MAC        string // "" keeps the template's (there is no interface)
	Address    string // "10.0.2.15/24"; "" keeps the template's
	Gateway    string
	DNS        []string
	MTU        int    // 0: unchanged
	LogStream  string // as told by /runtime/restore and the file; the environment of a running process stays
	InitType   string // as Init.InitializationType
	RestoreMS  int64  // what hooks of the runtime may take; 0: 10,000
	CheckClone bool   // answer with what the guest sees of itself, for tests
}

// Ack tells that a clone is somebody of its own.
type Ack struct {
	Took time.Duration // in the guest
	Hook time.Duration // of that, hooks of the function's own; 0: it has none
	// Seen is what the guest reads back, when Identity.CheckClone asked for it:
	// one "name=value" each of machine-id, boot_id, hostname, mac, address,
	// random (16 bytes of the kernel's, in hexadecimal), epoch and clock.
	Seen []string
}

// Stat is how a guest is.
type Stat struct {
	UsedMiB     int64         // by the function's processes
	PeakMiB     int64         // most that it was, since the start
	CPU         time.Duration // that the function's processes have used
	Processes   int           // of the function
	Open        int           // invocations that have not ended, in the guest's eyes
	Busy        bool          // an invocation has been answered, and the runtime or an extension still works on it
	RuntimeUp   bool          // false: the next invocation pays for an initialisation
	Invocations uint64        // that have ended
}

// Result tells how an invocation ended. Its body went to the sink.
type Result struct {
	Error   *blixard.FunctionError // the body is {errorMessage, errorType, …}, unless the answer had begun
	Detail  string                 // words of an error that came after the answer had begun
	Handler time.Duration          // from handing the event over to the answer
	Init    time.Duration          // of a runtime that had to be started for this call
	UsedMiB int64                  // most that the function's processes used, since the start
	Log     []byte                 // the newest output, bounded by Options
	Dropped int64                  // bytes of output that were thrown away
	Bytes   int64                  // of the answer
	// Broken: the instance must not be used again.
	Broken bool
}

// Request is an invocation as the guest has it.
type Request struct {
	RequestID     string
	ARN           string // with the qualifier that was called
	TraceID       string
	ClientContext string // JSON
	Tenant        string
	DeadlineMS    int64 // since 1970, as the host's clock has it
	RemainingMS   int64 // until then, when it was sent; what the guest keeps to
	Stream        bool  // the caller takes a streamed answer
	Payload       []byte
	HTTP          *blixard.HTTPRequest // nil unless it came as one

	// Arrived is when the guest had all of it, of its monotonic clock.
	Arrived time.Time
}

// Outcome ends an answer.
type Outcome struct {
	Error *blixard.FunctionError
	// Body, when not nil, is the answer instead of what was written and has not
	// been sent; it has no effect on an answer that the host has begun to take,
	// where Detail tells what happened.
	Body    []byte
	Detail  string
	Handler time.Duration
	Init    time.Duration
	UsedMiB int64
	Dropped int64
	Broken  bool
}

// ResponseWriter takes the answer to one invocation in the guest. It may be used
// by one goroutine at a time; Finish may come from any, and what comes later
// fails.
type ResponseWriter interface {
	// Begin says what kind of answer follows. Without it, it is a payload of JSON.
	Begin(head blixard.ResponseHead) error
	// Write adds to the answer. It waits while the host has not taken what was
	// sent before. An answer that is not streamed is sent when it ends or grows.
	Write(p []byte) (int, error)
	// Finish ends the invocation, also while a Write is waiting. Only the first has
	// an effect.
	Finish(outcome Outcome) error
}

// Handler is what the guest does. Init, Restore, Invoke and Stat are called by
// the thread that serves, which reads nothing meanwhile.
type Handler interface {
	// Init fails with an *InitError when it is the function's fault.
	Init(init *Init) (Ready, error)
	Restore(identity *Identity) (Ack, error)
	// Invoke must not wait for the invocation to end.
	Invoke(request *Request, w ResponseWriter)
	// Cancel tells that nobody waits for the answer.
	Cancel(request *Request)
	Stat() (Stat, error)
	// Shutdown is called by a goroutine of its own.
	Shutdown(reason string, grace time.Duration)
}
