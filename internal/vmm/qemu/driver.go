// Package qemu runs microVMs with QEMU. It is an adapter of the port vmm.
//
// # On disk
//
// Options.Root holds vms/<instance>.<generation>/ for every incarnation, with
// all its files and sockets in it, trash/ for what is being deleted,
// probe.json, and a lock that keeps a second daemon out. What a step did is
// told by the file it left (see record.go), so a crash between any two of them
// leaves something that List shows and Remove cleans: spec.json alone is
// Prepared; with the marker "started", written durably before anything is
// spawned, it is Running or Exited and never starts again. Remove first moves
// the directory to the trash in one step, so a half-deleted incarnation cannot
// look startable.
//
// # Processes
//
// QEMU outlives the daemon: a session of its own, standard streams to files, no
// descriptor of ours but its log. A lock on that log is taken before the fork
// and ends with the last descriptor; it tells a live incarnation from a dead
// one without any pid. A process is signalled only through a pidfd, and only
// when its start time, and the random UUID on its command line, are those of
// the incarnation. One goroutine per Driver waits on all pidfds, reaps children
// and writes down how they ended; Close ends it and no virtual machine.
//
// # Machine
//
// The machine is q35, also without KVM. The microvm machine boots a Linux guest
// about half a second sooner under emulation, but it has neither HPET nor PM
// timer, so a guest may fail to calibrate its clock and hang when the host is
// busy, and it has no power button. q35 was seen to boot at any load.
// Acceleration is probed by booting (probe.go), never by looking for /dev/kvm.
//
// # Templates
//
// A guest that is to become a template has its memory in a file of its
// incarnation's directory. Snapshot stops it, has QEMU write the state of the
// devices (memory that is shared is left out: x-ignore-shared), ends it, and
// copies both, without zeros, into the template's directory; template.json comes
// last. A clone is a QEMU with the same devices that maps the memory privately and
// loads the state. Kernel and initial RAM disk are in that memory and are not
// read again.
//
// The control socket and the call port of such a process are made, and connected
// to, before it is spawned, and passed as descriptors; so there is nothing to poll
// for, and the port's device begins connected, as the guest remembers it. The
// driver keeps both connections: the one to the call port for the first DialCall,
// the other until the first Resume. State is passed as a descriptor too, since
// the sandbox lets QEMU start no program.
//
// A clone's own memory is what it has written of the guest's, at most 32 MiB of
// translated code (emulation only), and some 12 MiB of QEMU's.
//
// # Limits
//
// Where control groups of version 2 can be written, each process is held to its
// memory and vCPUs and a fixed amount of QEMU's own (groups.go). Elsewhere memory
// is bounded by -m plus QEMU's own (the translation cache is capped), CPU by the
// number of vCPU threads: good for guests that are not hostile to QEMU.
package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/vmm"
)

// Options configure a Driver. Root is required.
type Options struct {
	// Root is the directory that the driver owns; it is created.
	Root string
	// Binary is QEMU's path or name; "qemu-system-x86_64" by default.
	Binary string
	// Log receives what happens to processes; nil for nowhere.
	Log *slog.Logger
	// ForceTCG leaves KVM unprobed and unused.
	ForceTCG bool
	// ProbeKernel is a Linux kernel that the probe boots under KVM, in addition
	// to a built-in stub: some hosts run the stub and hang in a real kernel.
	// "" leaves that out.
	ProbeKernel string
	// ConsoleLogBytes is the size at which List rotates a console log; 8 MiB by
	// default.
	ConsoleLogBytes int64
	// StartTimeout bounds how long QEMU may take to answer on its control
	// socket; 30 s by default.
	StartTimeout time.Duration
}

const (
	quitTimeout   = 2 * time.Second  // for QEMU to end after it was told to
	dyingTimeout  = time.Second      // for a QEMU that closed its control socket to end
	killTimeout   = 30 * time.Second // for the kernel to end a killed process
	statusTimeout = 2 * time.Second  // for a running QEMU to tell its status
	statusWorkers = 8                // QEMUs asked at the same time
	rootLockTries = 40               // × 50 ms: a daemon that is ending lets go
)

// Driver implements vmm.Driver, vmm.Cloner, vmm.Channels, vmm.Meter and
// vmm.Watcher. Its methods may be called concurrently.
type Driver struct {
	options Options
	log     *slog.Logger
	boot    string
	lock    *os.File
	watch   *watch
	changes chan struct{}
	groups  groups
	limits  bool // control groups can be made

	probing sync.Mutex
	probed  *probeRecord
	cpu     string // baseline of templates

	mu    sync.Mutex
	turns map[vmm.Ref]*turn
	held  map[vmm.Ref]*held // nil when closed
}

// turn lets one at a time change an incarnation, and one at a time speak to its
// QEMU, which serves one control connection.
type turn struct {
	change, control chan struct{} // semaphores of one
	users           int
}

var (
	_ vmm.Driver   = (*Driver)(nil)
	_ vmm.Cloner   = (*Driver)(nil)
	_ vmm.Meter    = (*Driver)(nil)
	_ vmm.Channels = (*Driver)(nil)
	_ vmm.Watcher  = (*Driver)(nil)
)

// New opens the driver on its root and finds again what runs there. It fails
// when another process has the root open. Close it.
func New(options Options) (*Driver, error) {
	if options.Root == "" {
		return nil, errors.New("the QEMU driver needs a root directory")
	}
	root, err := filepath.Abs(options.Root)
	if err != nil {
		return nil, fmt.Errorf("resolving %s: %w", options.Root, err)
	}
	options.Root = root
	if options.Binary == "" {
		options.Binary = "qemu-system-x86_64"
	}
	if options.ConsoleLogBytes <= 0 {
		options.ConsoleLogBytes = 8 << 20
	}
	if options.StartTimeout <= 0 {
		options.StartTimeout = 30 * time.Second
	}
	if options.Log == nil {
		options.Log = slog.New(slog.DiscardHandler)
	}
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{"vms", "trash"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o700); err != nil {
			return nil, fmt.Errorf("creating the driver's root: %w", err)
		}
	}
	d := &Driver{
		options: options, log: options.Log, boot: boot,
		changes: make(chan struct{}, 1), turns: map[vmm.Ref]*turn{}, held: map[vmm.Ref]*held{}, groups: newGroups(controlGroups, root),
	}
	if err := d.groups.usable(); err != nil {
		d.log.Info("guests are not held to their limits by control groups", "reason", err)
	} else {
		d.limits = true
	}
	if d.lock, err = lockRoot(root); err != nil {
		return nil, err
	}
	if d.watch, err = newWatch(d.recordEnd); err != nil {
		return nil, errors.Join(err, d.lock.Close())
	}
	if err := d.recover(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func lockRoot(root string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(root, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the driver's lock: %w", err)
	}
	for range rootLockTries {
		ours, err := lockFile(f, unix.LOCK_EX)
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		if ours {
			return f, nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return nil, errors.Join(fmt.Errorf("%s is in use by another process", root), f.Close())
}

// recover empties the trash and watches what still runs.
func (d *Driver) recover() error {
	entries, err := os.ReadDir(filepath.Join(d.options.Root, "trash"))
	if err != nil {
		return fmt.Errorf("reading the trash: %w", err)
	}
	for _, entry := range entries {
		if err := os.RemoveAll(filepath.Join(d.options.Root, "trash", entry.Name())); err != nil {
			return fmt.Errorf("emptying the trash: %w", err)
		}
	}
	refs, err := d.refs()
	if err != nil {
		return err
	}
	for _, ref := range refs {
		inc, err := d.load(ref)
		if err != nil {
			return err
		}
		p, err := d.find(inc)
		if err != nil {
			return err
		}
		if p != nil {
			d.log.Info("found running vm again", "instance", ref.Instance, "generation", ref.Generation, "pid", p.pid)
			d.limit(inc, p) // a crash may have come between
		}
	}
	if d.limits {
		if err := d.groups.removeOthers(refs); err != nil {
			d.log.Warn("clearing control groups", "error", err)
		}
	}
	return nil
}

// limit holds a process to its limits. A guest without them is better than none,
// as on machines that have no control groups.
func (d *Driver) limit(inc *incarnation, p *process) {
	if !d.limits {
		return
	}
	if err := d.groups.limit(inc.spec.Spec, p.pid); err != nil {
		d.warnUnlimited(inc, err)
	}
}

func (d *Driver) warnUnlimited(inc *incarnation, err error) {
	d.log.Warn("a vm runs without limits", "instance", inc.ref.Instance, "generation", inc.ref.Generation, "error", err)
}

// openGroup is the control group that a process is to begin in; nil if there is
// none. Moving it there later would wait for all of the machine's processors.
func (d *Driver) openGroup(inc *incarnation) *os.File {
	if !d.limits {
		return nil
	}
	group, err := d.groups.open(inc.spec.Spec)
	if err != nil {
		d.warnUnlimited(inc, err)
		return nil
	}
	return group
}

// Close lets go of everything and leaves the virtual machines running.
func (d *Driver) Close() error {
	return errors.Join(d.watch.close(), d.closeHeld(), d.lock.Close())
}

// Changes implements vmm.Watcher.
func (d *Driver) Changes() <-chan struct{} { return d.changes }

func (d *Driver) recordEnd(e ended) {
	p := e.process
	d.dropHeld(p.ref)
	reason := endReason(p.dir, e)
	if d.groups.killedForMemory(p.ref) {
		reason = "QEMU wanted more memory than its limit: " + reason
	}
	d.log.Info("vm process ended", "instance", p.ref.Instance, "generation", p.ref.Generation, "pid", p.pid, "reason", reason)
	err := writeJSON(filepath.Join(p.dir, fileExit), exitRecord{Reason: reason, EndedAtUnixM: time.Now().UnixMilli()}, false)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // List works it out again from the log
		d.log.Warn("recording the end of a vm", "instance", p.ref.Instance, "generation", p.ref.Generation, "error", err)
	}
	select {
	case d.changes <- struct{}{}:
	default:
	}
}

func (d *Driver) dir(ref vmm.Ref) string {
	return filepath.Join(d.options.Root, "vms", ref.String())
}

func (d *Driver) load(ref vmm.Ref) (*incarnation, error) {
	if err := ref.Check(); err != nil {
		return nil, err
	}
	return load(d.dir(ref), ref)
}

// find is the live process of inc, watched from now on; nil when there is none
// that can be identified.
func (d *Driver) find(inc *incarnation) (*process, error) {
	if p := d.watch.get(inc.ref); p != nil {
		return p, nil
	}
	if !inc.started || inc.exit != nil {
		return nil, nil
	}
	var p *process
	var err error
	switch {
	case inc.process == nil:
		held, heldErr := logHeld(inc.dir)
		if heldErr != nil || !held {
			return nil, heldErr
		}
		if pid := scan(inc.spec.UUID); pid != 0 {
			p, err = identify(inc, pid, 0)
		}
	case inc.process.BootID == d.boot:
		p, err = identify(inc, inc.process.Pid, inc.process.StartTicks)
	}
	if p == nil || err != nil {
		return nil, err
	}
	return d.watch.add(p)
}

// takeTurn waits for the semaphore that which picks; give it back with release.
func (d *Driver) takeTurn(ctx context.Context, ref vmm.Ref, which func(*turn) chan struct{}) (release func(), err error) {
	d.mu.Lock()
	t := d.turns[ref]
	if t == nil {
		t = &turn{change: make(chan struct{}, 1), control: make(chan struct{}, 1)}
		d.turns[ref] = t
	}
	t.users++
	d.mu.Unlock()
	leave := func() {
		d.mu.Lock()
		if t.users--; t.users == 0 {
			delete(d.turns, ref)
		}
		d.mu.Unlock()
	}
	select {
	case which(t) <- struct{}{}:
		return func() { <-which(t); leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, fmt.Errorf("waiting for another operation on %s: %w", ref, context.Cause(ctx))
	}
}

func changing(t *turn) chan struct{}    { return t.change }
func controlling(t *turn) chan struct{} { return t.control }

// inDir calls use with a path of the directory that is short whatever the
// root's length; it is good only during the call.
func inDir(dir string, use func(short string) error) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("opening the incarnation's directory: %w", err)
	}
	return errors.Join(use("/proc/self/fd/"+strconv.Itoa(int(f.Fd()))), f.Close())
}

// newUUID is a random UUID; it comes from the kernel, which has the generator.
func newUUID() (string, error) {
	var b [16]byte
	if _, err := unix.Getrandom(b[:], 0); err != nil {
		return "", fmt.Errorf("reading randomness: %w", err)
	}
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:]), nil
}
