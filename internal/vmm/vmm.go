// Package vmm is the port to a hypervisor. A Driver runs incarnations
// (instance + generation) of microVMs on this machine and nothing else: it
// decides nothing, retries nothing and remembers only what is on disk.
//
// Ownership: each incarnation has one directory below the driver's root, which
// holds everything the driver made for it. The hypervisor process outlives the
// daemon: a Driver opened later on the same root finds it again by List.
//
// The contract every adapter keeps, checked by vmmtest.Suite:
//   - An incarnation starts at most once, ever: Start durably marks the
//     incarnation before it spawns, and a second Start answers ErrStarted.
//   - Every method is idempotent and safe to repeat after a crash in its middle.
//   - Remove leaves nothing behind: process, sockets, files, taps.
//   - A Driver touches only what it can prove to be its own (pid and start
//     time and directory agree).
package vmm

import (
	"context"
	"errors"
	"net"
	"time"
)

var (
	// ErrStarted: this incarnation was started before and will not be again.
	ErrStarted = errors.New("incarnation was already started")
	// ErrNotFound: the driver holds nothing of that incarnation.
	ErrNotFound = errors.New("no such incarnation")
	// ErrNotRunning: the incarnation's hypervisor process is not running.
	ErrNotRunning = errors.New("incarnation is not running")
)

// Ref names one incarnation. Instance is a DNS label such as "webapp-1".
type Ref struct {
	Instance   string
	Generation uint64
}

// Spec is everything a driver needs to run one incarnation.
type Spec struct {
	Ref       Ref
	VCPUs     int
	MemoryMiB int
	Kernel    string   // path of the kernel image
	Initrd    string   // path of the initial RAM disk; "" for none
	Cmdline   string   // extra kernel command line
	Disks     []Disk   // in order: vda, vdb, …
	Network   Network  // the one interface of the guest
	Labels    []string // "key=value", kept with the incarnation for List
}

// Disk is a raw or qcow2 image given to the guest as a virtio block device.
type Disk struct {
	Path     string
	Format   string // raw, qcow2
	ReadOnly bool
	// Overlay lets the guest write while Path is only read, and may be shared:
	// what it writes belongs to the incarnation and is gone when that ends. It
	// excludes ReadOnly.
	Overlay bool
}

// Network says how the guest is connected.
type Network struct {
	Mode string // "user" (needs no root), "tap", "none"
	MAC  string
	Tap  string // name of an existing tap device, mode tap
	// Ports are published from the host into the guest, mode user. A zero
	// HostPort asks the driver to choose one; Status tells which.
	Ports []Port
}

// Port is one published port.
type Port struct {
	Protocol  string // tcp, udp
	HostIP    string
	HostPort  int
	GuestPort int
}

// Phase is what a driver sees of an incarnation.
type Phase string

const (
	// Prepared: directory and files exist, nothing was started.
	Prepared Phase = "prepared"
	// Running: the hypervisor process runs (the guest may still be booting).
	Running Phase = "running"
	// Paused: the process runs, its vCPUs do not.
	Paused Phase = "paused"
	// Exited: it was started and its process is gone.
	Exited Phase = "exited"
)

// Status is one incarnation as found on this machine.
type Status struct {
	Ref        Ref
	Phase      Phase
	Pid        int       // of the hypervisor, 0 unless running or paused
	StartedAt  time.Time // zero unless started
	Ports      []Port    // with the host ports really in use
	ExitReason string    // why it exited, in words, when known
	Labels     []string  // as given at Start
	ConsoleLog string    // path of the console log; rotated ones end in .1, .2, …
}

// Capabilities of a driver on this machine.
type Capabilities struct {
	Driver        string // "qemu", "fake"
	Version       string
	Acceleration  string // "kvm", "tcg", "none"
	Why           string // why not kvm, in words
	Pause         bool
	GuestChannel  bool
	TapNetworking bool
}

// Driver runs incarnations.
type Driver interface {
	// Capabilities probes the machine; slow the first time, then cached.
	Capabilities(ctx context.Context) (Capabilities, error)
	// Start prepares the incarnation's directory, durably marks it started and
	// spawns it; it returns when the process runs and its control socket
	// answers. After an error the incarnation is Exited (or unknown) and has to
	// be Removed; it will never run. A Spec that cannot work is ErrInvalid, and
	// nothing was made.
	Start(ctx context.Context, spec Spec) error
	// Stop asks the guest to shut down and kills the process when grace has
	// passed (0: at once). It returns when the process is gone.
	Stop(ctx context.Context, ref Ref, grace time.Duration) error
	// Remove deletes everything of a stopped incarnation; it kills what still
	// runs.
	Remove(ctx context.Context, ref Ref) error
	// List tells every incarnation found, in order of Ref.
	List(ctx context.Context) ([]Status, error)
}

// Pauser is a Driver that can pause.
type Pauser interface {
	Pause(ctx context.Context, ref Ref) error
	Resume(ctx context.Context, ref Ref) error
}

// Channels is a Driver whose guests can be talked to.
type Channels interface {
	// DialGuest connects to the guest's channel (virtio-serial or vsock), which
	// takes one connection at a time; the guest end may not be open yet.
	DialGuest(ctx context.Context, ref Ref) (net.Conn, error)
	// DialConsole connects to the guest's serial console, both ways.
	DialConsole(ctx context.Context, ref Ref) (net.Conn, error)
}
