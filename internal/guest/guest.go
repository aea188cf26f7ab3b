// Package guest is the protocol between a node's agent and the blixard-guest
// process inside a microVM, over one byte stream: a virtio-serial port or a
// vsock connection. Both ends live here: Dial makes the host's Client, Serve
// runs the guest's side on a Handler.
//
// Wire: frames of a ten byte header {stream u32, type u8, flags u8, length u32},
// big endian, and at most MaxPayload bytes. The host opens a stream per call
// with a JSON request, the guest ends it with a JSON result; in between either
// side sends data. Each direction of a stream has a window of bytes the
// receiver grants again as it consumes them, so a slow reader stops its own
// stream and never its neighbours, and memory is bounded by streams × window.
//
// Sessions: a virtio-serial port is one stream for the life of the guest, so
// bytes of a former connection may still be under way when a host connects. The
// host therefore begins with HELLO and a random session id and throws away all
// bytes until the HELLO-ACK with that id; the guest ends every stream of the
// former session on a new HELLO, and when it reads something that is no frame
// it throws bytes away until the next HELLO.
//
// Trust: the host treats the guest as hostile. A guest that breaks the protocol
// loses its connection and cannot make the host panic, block past its context
// or hold more memory than the bounds. The guest treats the host's stream as
// noisy, not as hostile.
//
// Ownership: Dial and Serve own the connections given to them and close them.
// Goroutines: a Client has two, ended and waited for by Close.
package guest

import (
	"context"
	"errors"
	"io"
	"strings"
	"time"
)

// PortName is the name of the virtio-serial port, VsockPort the vsock port the
// guest listens on.
const (
	PortName  = "blixard.guest"
	VsockPort = 1024
)

// Sentinels of errors that came from the guest; test with errors.Is.
var (
	// ErrConfigured: the guest has a different configuration already.
	ErrConfigured = errors.New("guest is configured differently")
	// ErrUnhealthy: the check ran and failed.
	ErrUnhealthy = errors.New("unhealthy")
	// ErrInvalid: the guest refused the request as it stands.
	ErrInvalid = errors.New("invalid request")
	// ErrCommand: the command could not be started (not found, not executable).
	ErrCommand = errors.New("command cannot be run")
	// ErrClosed: the connection to the guest has ended, or was never one. It
	// wraps what ended it.
	ErrClosed = errors.New("guest channel is closed")
)

// Error is a failure the guest reports. Message comes from the guest: it is
// bounded and free of control characters, and otherwise not to be trusted.
type Error struct {
	Code    string
	Message string
}

func (e *Error) Error() string { return "guest: " + e.Message }

// Unwrap gives the sentinel of the code.
func (e *Error) Unwrap() error {
	for _, c := range codes {
		if c.code == e.Code {
			return c.err
		}
	}
	return nil
}

var codes = []struct {
	code string
	err  error
}{
	{"configured", ErrConfigured},
	{"unhealthy", ErrUnhealthy},
	{"invalid", ErrInvalid},
	{"command", ErrCommand},
}

func codeOf(err error) string {
	for _, c := range codes {
		if errors.Is(err, c.err) {
			return c.code
		}
	}
	return "failed"
}

// Config is what makes a booted guest one particular instance. Two Configs
// that differ in ClockUnixNano only are the same configuration.
type Config struct {
	InstanceID    string   `json:"instance_id"`               // a DNS label such as webapp-1
	VM            string   `json:"vm"`                        // name of the VM
	Node          string   `json:"node"`                      // name of the node it runs on
	Generation    uint64   `json:"generation"`                // of the instance
	Hostname      string   `json:"hostname,omitempty"`        // default: InstanceID
	Env           []string `json:"env,omitempty"`             // KEY=value, for workload and exec
	Command       []string `json:"command,omitempty"`         // empty: the image's, else the builtin demo server
	Dir           string   `json:"dir,omitempty"`             // working directory of Command; default /
	Address       string   `json:"address,omitempty"`         // 10.0.2.15/24; empty: the network is left alone
	Gateway       string   `json:"gateway,omitempty"`         // 10.0.2.2
	DNS           []string `json:"dns,omitempty"`             // addresses
	Hosts         []Host   `json:"hosts,omitempty"`           // further lines of /etc/hosts
	MTU           int      `json:"mtu,omitempty"`             // bytes; 0: the device's own
	ClockUnixNano int64    `json:"clock_unix_nano,omitempty"` // 0: the clock is left alone
}

// Host is one line of /etc/hosts.
type Host struct {
	Address string   `json:"address"`
	Names   []string `json:"names"`
}

// Workload is what the guest's workload is doing.
type Workload string

const (
	// WorkloadNone: the guest was not configured yet.
	WorkloadNone Workload = "none"
	// WorkloadRunning: its process (or the demo server) runs.
	WorkloadRunning Workload = "running"
	// WorkloadExited: it has ended; it runs once, and the host decides what follows.
	WorkloadExited Workload = "exited"
	// WorkloadFailed: it could not be started.
	WorkloadFailed Workload = "failed"
)

// State is what the guest tells about itself.
type State struct {
	BootID        string   `json:"boot_id"` // random per boot
	Configured    bool     `json:"configured"`
	InstanceID    string   `json:"instance_id,omitempty"`
	Generation    uint64   `json:"generation,omitempty"`
	Workload      Workload `json:"workload"`
	Pid           int      `json:"pid,omitempty"`       // of the workload while it runs
	ExitCode      int      `json:"exit_code,omitempty"` // when exited; 128+n for signal n
	Reason        string   `json:"reason,omitempty"`    // why it failed or how it ended
	UptimeMS      int64    `json:"uptime_ms"`           // of the kernel
	ClockUnixNano int64    `json:"clock_unix_nano"`     // the guest's wall clock
	Agent         string   `json:"agent"`               // version of blixard-guest
}

// ExecRequest runs a command beside the workload, with the configured
// environment and Env over it.
type ExecRequest struct {
	Args []string `json:"args"`
	Env  []string `json:"env,omitempty"`
	Dir  string   `json:"dir,omitempty"`
	TTY  bool     `json:"tty,omitempty"` // one terminal; everything arrives as stdout
	Rows uint16   `json:"rows,omitempty"`
	Cols uint16   `json:"cols,omitempty"`
}

// Size is a terminal's, in characters.
type Size struct {
	Rows uint16 `json:"rows"`
	Cols uint16 `json:"cols"`
}

// LogRequest selects from the workload's log.
type LogRequest struct {
	Follow    bool  `json:"follow,omitempty"`     // go on until the context ends
	TailLines int   `json:"tail_lines,omitempty"` // the last so many; 0: all that is kept
	Since     int64 `json:"since,omitempty"`      // Unix nanoseconds; 0: all that is kept
}

// Check is a health probe run inside the guest.
type Check struct {
	Kind      string   `json:"kind"`                 // exec, tcp, http
	Args      []string `json:"args,omitempty"`       // exec: exit code 0 is healthy
	Port      int      `json:"port,omitempty"`       // tcp, http: on 127.0.0.1
	Path      string   `json:"path,omitempty"`       // http: default /; 200 to 399 is healthy
	TimeoutMS int64    `json:"timeout_ms,omitempty"` // default 5,000
}

// Timeout is how long the check may take.
func (c Check) Timeout() time.Duration {
	if c.TimeoutMS <= 0 {
		return 5 * time.Second
	}
	return time.Duration(min(c.TimeoutMS, 600_000)) * time.Millisecond
}

// Streams are the guest's ends of an exec's input and output.
type Streams struct {
	Stdin          io.Reader // io.EOF when the host's input has ended
	Stdout, Stderr io.Writer
	Resize         <-chan Size // closed when no more will come
}

// Handler is what the guest can do. Methods are called concurrently and must
// return soon after their context ends. Errors wrapping one of this package's
// sentinels keep their meaning on the host.
type Handler interface {
	// Configure is idempotent; a different second Config is ErrConfigured.
	Configure(ctx context.Context, config Config) error
	State(ctx context.Context) (State, error)
	Exec(ctx context.Context, request ExecRequest, streams Streams) (exitCode int, err error)
	Logs(ctx context.Context, request LogRequest, w io.Writer) error
	Check(ctx context.Context, check Check) error
	SetClock(ctx context.Context, unixNano int64) error
	// Shutdown begins an orderly end and returns before it is done.
	Shutdown(ctx context.Context, grace time.Duration) error
}

// printable bounds a text of the other side and takes its control characters.
func printable(s string, limit int) string {
	if len(s) > limit {
		s = s[:limit] + "…"
	}
	return strings.Map(func(r rune) rune {
		if r == '\t' || r == '\n' {
			return ' '
		}
		if r < 0x20 || (r >= 0x7f && r < 0xa0) {
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}
