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
//
// A Cloner also saves a booted guest as a template and makes copies of it. Clones
// are throw-away: the mark that one was started survives the daemon and not the
// machine, as waiting for the disk would cost a good part of what a clone saves.
// So whoever clones must not use a Ref again after the machine was restarted,
// which nodes keep by numbering clones within a boot. Within a boot a clone starts
// at most once, as every incarnation does.
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
	// ErrTemplate: there is no complete template in that directory, or it is one
	// of another hypervisor, machine type or CPU. Nothing was made; it has to be
	// built again.
	ErrTemplate = errors.New("template cannot be used")
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
	// Template is the absolute path of a template's directory, "" for none. Start
	// makes a guest that Snapshot can save there, on the lean machine that
	// templates have: disks are read-only, and the only channel is the call port,
	// without DialGuest and DialConsole. The directory is created and must hold no
	// template yet. Clone copies the one that is there.
	Template string
	// CallPort gives the guest a second channel, named "blixard.call" and
	// /dev/vport0p2 in Linux; see Channels.DialCall.
	CallPort bool
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
	// MAC of the guest's interface. A clone's device begins with that of the
	// template whatever is said here: the guest sets its own when it is told its
	// identity.
	MAC string
	// Subnet is the guest's IPv4 network in mode user, such as "10.0.2.0/24",
	// which is the default: its address 2 is the gateway, 3 answers DNS, 15 is
	// what DHCP gives to the guest.
	Subnet string
	Tap    string // name of an existing tap device, mode tap
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
	Template   bool      // it was started to become a template, or is a clone of one
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
	Snapshot      bool // it is a Cloner
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
	// DialCall connects to the guest's call port (Spec.CallPort), which takes one
	// connection at a time. The call port of a clone was connected before its
	// state was loaded, so that the guest, which was waiting on it when it was
	// saved, never sees it closed: the first DialCall of a clone is given that
	// connection. What is written to a paused guest may block. ErrInvalid when the
	// incarnation has no call port.
	DialCall(ctx context.Context, ref Ref) (net.Conn, error)
}

// Cloner is a Driver that can save a guest and make copies of it. A template is
// a directory with the files "memory" (sparse), "devices" and "template.json",
// which is written last: without it there is no template. It may be copied to
// another machine as it is, and is of use there where TemplateKey is the same.
type Cloner interface {
	Driver
	Pauser
	// Snapshot stops the vCPUs of an incarnation that was started with
	// Spec.Template and saves it there, durably; then it ends the incarnation,
	// which is Exited and has to be Removed. What the guest has open on its call
	// port stays open for it in every clone; nothing may be under way there, or
	// every clone gets it. Nobody touches the template again. After an error there
	// is no template, and the incarnation is of no more use.
	Snapshot(ctx context.Context, ref Ref) error
	// Clone spawns a hypervisor for a copy of the template and loads its state;
	// the vCPUs stay stopped (Paused) until Resume. The clone's memory is that of
	// the template, copied on write. Directory, mark and errors are as with Start,
	// but for the durability of the mark (see the package comment). vCPUs, memory,
	// kind of network and number and format of disks have to be the template's,
	// else ErrInvalid; what the disks hold has to be as well, and is not checked.
	// Kernel, Initrd and Cmdline are not used. ErrTemplate when there is no
	// template that fits this machine.
	Clone(ctx context.Context, spec Spec) error
	// TemplateKey says what of this machine a template depends on: hypervisor and
	// its version, machine type, acceleration, CPU. Templates made under equal
	// keys can be cloned on each other's machine.
	TemplateKey(ctx context.Context) (string, error)
}

// Meter is a Driver that tells what incarnations really take of the machine's
// memory.
type Meter interface {
	// MemoryUse of a running incarnation's hypervisor, in bytes: private is what
	// would be free if it ended, shared is what others have mapped as well.
	MemoryUse(ctx context.Context, ref Ref) (private, shared int64, err error)
}
