package blixard

import (
	"strconv"
	"time"
)

// Invocation is one call of a function.
type Invocation struct {
	RequestID string // a UUID; the same in all attempts of an asynchronous call
	Function  FunctionName
	Qualifier string // as the caller said: "", "$LATEST", a number, an alias
	Number    int    // the version that answers, once the alias was resolved
	Seq       uint64 // and its sequence
	Payload   []byte
	// HTTP is set when the call came as an HTTP request; the http runtime gets it
	// as it is, the others as an event (payload 2.0) that is in Payload.
	HTTP          *HTTPRequest
	Deadline      time.Time // wall clock
	ClientContext string    // base64, as the Lambda API has it
	TraceID       string    // X-Amzn-Trace-Id
	LogTail       bool      // the report shall hold the last 4 KiB of the log
	Stream        bool      // the caller takes an answer that comes bit by bit, up to the limit of streams
	Caller        string    // who calls, for limits by caller
	Received      time.Time // when the gateway had it
}

// HTTPRequest is the head of an HTTP request; its body is the payload.
type HTTPRequest struct {
	Method  string
	Target  string // path and query, as on the wire
	Host    string
	Headers [][2]string
}

// ResponseHead begins the answer to an invocation.
type ResponseHead struct {
	// Status and Headers are set by the http runtime, and by others that stream
	// an HTTP prelude; Status 0: the body is a payload.
	Status      int
	Headers     [][2]string
	ContentType string
	Streaming   bool
}

// FunctionError tells that the function, not Blixard, has failed. Its JSON
// {errorMessage, errorType, …} is the body of the answer.
type FunctionError struct {
	Kind string // "Unhandled", "Handled"
	Type string // "Sandbox.Timedout", "Runtime.ExitError", "Function.ResponseSizeTooLarge", the function's own
}

// InvocationReport tells what became of an invocation that reached a function.
type InvocationReport struct {
	RequestID string
	Node      NodeName
	Instance  string
	Number    int // the version that answered
	Start     StartKind
	Error     *FunctionError // nil: the function has answered
	Parts     Breakdown
	MemoryMiB int64  // configured
	UsedMiB   int64  // most that was used in the guest
	Log       []byte // the tail, when it was asked for
}

// StartKind is how the instance that answered came to be.
type StartKind string

// Kinds of starts.
const (
	StartWarm     StartKind = "warm"     // it was there
	StartPooled   StartKind = "pooled"   // a clone whose hypervisor was spawned ahead
	StartRestored StartKind = "restored" // a clone, spawned for this call
	StartBooted   StartKind = "booted"   // a whole boot
)

// Cold tells whether the call had to wait for a start.
func (k StartKind) Cold() bool { return k != StartWarm }

// Breakdown is where the time of an invocation went; parts that did not occur
// are 0, and what is between the parts is in Total only.
type Breakdown struct {
	Queue    time.Duration // waited for a slot or a start that was under way
	Place    time.Duration // deciding where
	Commit   time.Duration // waited for slots to be leased
	Spawn    time.Duration // hypervisor process
	Restore  time.Duration // device state, vCPUs running, the guest's acknowledgement
	Boot     time.Duration // a whole boot instead
	Init     time.Duration // of the runtime, when not in the template
	Handler  time.Duration // as the guest measured it
	Transfer time.Duration // payload and answer between gateway and guest, with what the guest needed around the handler
	Total    time.Duration // as the gateway measured it
}

// ServerTiming writes the parts as the HTTP header of that name wants them, in
// milliseconds: "queue;dur=0.012, handler;dur=3.4". Parts that are 0 are left out.
func (b *Breakdown) ServerTiming() string {
	var room [256]byte
	out := room[:0]
	for _, p := range []struct {
		name string
		took time.Duration
	}{
		{"queue", b.Queue},
		{"place", b.Place},
		{"commit", b.Commit},
		{"spawn", b.Spawn},
		{"restore", b.Restore},
		{"boot", b.Boot},
		{"init", b.Init},
		{"handler", b.Handler},
		{"transfer", b.Transfer},
		{"total", b.Total},
	} {
		if p.took <= 0 {
			continue
		}
		if len(out) > 0 {
			out = append(out, ", "...)
		}
		out = append(append(out, p.name...), ";dur="...)
		us := p.took.Microseconds()
		out = strconv.AppendInt(out, us/1000, 10)
		us %= 1000
		out = append(out, '.', byte('0'+us/100), byte('0'+us/10%10), byte('0'+us%10))
	}
	return string(out)
}

// ResponseSink takes the answer to an invocation as it comes: Begin once, then
// any number of writes. An error of it ends the call.
type ResponseSink interface {
	Begin(head ResponseHead) error
	Write(p []byte) (int, error)
}
