package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/vmm"
)

const (
	// templateMachine is that of templates and clones. Memory is a file, which
	// clones map privately; merging equal pages would only tell neighbours apart
	// by time.
	templateMachine = "q35,sata=off,smbus=off,vmport=off,usb=off,mem-merge=off,dump-guest-core=off"
	// cloneTranslationMiB bounds the largest part of a clone's own memory under
	// emulation.
	cloneTranslationMiB = 32
	// cloneOwnMemoryMiB is ownMemoryMiB for the lean machine.
	cloneOwnMemoryMiB = 192
)

// Descriptors of QEMU: sockets that listen, connected to already.
const (
	fdQMP     = 3
	fdCall    = 4 // /dev/null without a call port
	fdDevices = 5 // of a clone: the state to load
)

// capabilities of the migration, at both ends: memory is in the file already,
// and the end is told.
var migrationCapabilities = map[string]any{"capabilities": []map[string]any{
	{"capability": "x-ignore-shared", "state": true},
	{"capability": "events", "state": true},
}}

// templateArguments is the command line of a guest that is to become a template,
// or of a clone. The devices and their order have to be the same for both.
func templateArguments(record specRecord, f features) []string {
	spec := record.Spec
	memory, share := fileMemory, "on"
	if record.Clone {
		memory, share = filepath.Join(spec.Template, fileMemory), "off"
	}
	a := append(f.argumentsFor(templateMachine+",memory-backend=mem", cloneTranslationMiB),
		"-name", "guest="+spec.Ref.String(),
		"-uuid", record.UUID,
		"-smp", strconv.Itoa(spec.VCPUs),
		"-m", strconv.Itoa(spec.MemoryMiB),
		"-object", fmt.Sprintf("memory-backend-file,id=mem,size=%dM,mem-path=%s,share=%s", spec.MemoryMiB, escape(memory), share),
		"-chardev", inherited("qmp", fdQMP), "-mon", "chardev=qmp,mode=control",
		"-serial", "file:"+fileConsole,
		"-device", "virtio-serial-pci,id=serial0,max_ports=4",
		"-device", "virtio-rng-pci",
	)
	if spec.CallPort {
		a = append(a, "-chardev", inherited("call", fdCall), "-device", "virtserialport,bus=serial0.0,nr=2,chardev=call,name="+callPort)
	}
	if record.Clone {
		a = append(a, "-S", "-incoming", "defer")
	} else {
		// What the guest has freed is zero, and takes no place in the template.
		words := "console=ttyS0 quiet panic=-1 reboot=t init_on_free=1 init_on_alloc=0"
		if f.Acceleration != "kvm" {
			// What guards against speculation guards nothing of an emulated CPU, and
			// each clone would translate it anew; nor would a watchdog of the clock
			// understand why time stood still.
			words += " mitigations=off tsc=reliable"
		}
		a = append(a, "-kernel", spec.Kernel, "-append", strings.Join(strings.Fields(words+" "+f.clockWord()+" "+spec.Cmdline), " "))
		if spec.Initrd != "" {
			a = append(a, "-initrd", spec.Initrd)
		}
	}
	a = append(a, diskArguments(spec.Disks)...)
	return append(a, networkArguments(spec.Network)...)
}

// inherited is a socket that QEMU gets by descriptor. Somebody has connected to
// it before, so that waiting for that takes no time and the device begins
// connected.
func inherited(id string, fd int) string {
	return fmt.Sprintf("socket,id=%s,fd=%d,server=on,wait=on", id, fd)
}

// Clone implements vmm.Cloner.
func (d *Driver) Clone(ctx context.Context, spec vmm.Spec) error {
	release, err := d.beginStart(ctx, spec.Ref)
	if err != nil {
		return err
	}
	defer release()
	if err := checkSpec(spec, false); err != nil {
		return err
	}
	probed, err := d.probe(ctx)
	if err != nil {
		return fmt.Errorf("cloning %s: %w", spec.Ref, err)
	}
	devices, err := d.openTemplate(spec, probed)
	if err != nil {
		return err
	}
	defer devices.Close()
	return d.launch(ctx, specRecord{Spec: spec, Clone: true}, probed, devices)
}

// startTemplate is Start of a guest that is to become a template.
func (d *Driver) startTemplate(ctx context.Context, spec vmm.Spec) error {
	if _, err := os.Lstat(filepath.Join(spec.Template, fileTemplate)); err == nil {
		return fmt.Errorf("vm %s: %s holds a template already: %w", spec.Ref, spec.Template, vmm.ErrInvalid)
	}
	probed, err := d.probe(ctx)
	if err != nil {
		return fmt.Errorf("starting %s: %w", spec.Ref, err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return fmt.Errorf("opening the null device: %w", err)
	}
	defer null.Close()
	return d.launch(ctx, specRecord{Spec: spec}, probed, null)
}

// launch makes a guest on the lean machine; it returns when it runs, or is
// loaded and stopped if it is a clone.
func (d *Driver) launch(ctx context.Context, record specRecord, probed *probeRecord, devices *os.File) error {
	ref, began := record.Spec.Ref, time.Now()
	inc, err := d.prepare(record)
	if err != nil {
		return fmt.Errorf("preparing %s: %w", ref, err)
	}
	prepared := time.Now()
	p, h, err := d.spawnConnected(inc, templateArguments(inc.spec, probed.Features), devices)
	if err != nil {
		return fmt.Errorf("starting %s: %w", ref, err)
	}
	spawned := time.Now()
	if err := d.bringUp(ctx, inc, p, h); err != nil {
		return errors.Join(d.giveUp(ctx, inc, p, err), h.close())
	}
	if err := d.hold(ref, h); err != nil {
		return d.giveUp(ctx, inc, p, err)
	}
	d.log.Debug("started vm", "instance", ref.Instance, "generation", ref.Generation, "pid", p.pid,
		"acceleration", probed.Features.Acceleration, "clone", record.Clone,
		"prepare", prepared.Sub(began), "spawn", spawned.Sub(prepared), "load", time.Since(spawned))
	return nil
}

// spawnConnected is spawn of a process whose sockets are connected to before it
// begins: there is nothing to wait for but QEMU itself.
func (d *Driver) spawnConnected(inc *incarnation, arguments []string, devices *os.File) (p *process, h *held, err error) {
	h = &held{}
	files := []*os.File{devices, devices, devices} // as long as there is nothing better for a descriptor
	listen := func(fd int, socket string) (net.Conn, error) {
		listening, conn, err := rendezvous(inc.dir, socket)
		if err == nil {
			files[fd-fdQMP] = listening
		}
		return conn, err
	}
	defer func() {
		for _, file := range files[:fdDevices-fdQMP] { // QEMU has its own descriptors of them
			if file != devices {
				err = errors.Join(err, file.Close())
			}
		}
		if err != nil {
			err = errors.Join(err, h.close())
		}
	}()
	if h.raw, err = listen(fdQMP, sockQMP); err != nil {
		return nil, nil, err
	}
	if inc.spec.Spec.CallPort {
		if h.call, err = listen(fdCall, sockCall); err != nil {
			return nil, nil, err
		}
	}
	p, err = d.spawn(inc, arguments, files...)
	return p, h, err
}

// rendezvous makes a socket that listens, and a connection to it.
func rendezvous(dir, name string) (listening *os.File, conn net.Conn, err error) {
	var server, client int
	err = inDir(dir, func(short string) error {
		address := &unix.SockaddrUnix{Name: short + "/" + name}
		if server, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		listening = os.NewFile(uintptr(server), name)
		if err = unix.Bind(server, address); errors.Is(err, unix.EADDRINUSE) { // left by a start that came to nothing
			if err = unix.Unlink(address.Name); err == nil {
				err = unix.Bind(server, address)
			}
		}
		if err == nil {
			err = unix.Listen(server, 4)
		}
		if err != nil {
			return err
		}
		if client, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
			return err
		}
		file := os.NewFile(uintptr(client), name)
		if err = unix.Connect(client, address); err == nil { // it is queued: that does not wait
			conn, err = net.FileConn(file)
		}
		return errors.Join(err, file.Close())
	})
	if err != nil {
		if listening != nil {
			err = errors.Join(err, listening.Close())
		}
		if conn != nil {
			err = errors.Join(err, conn.Close())
		}
		return nil, nil, fmt.Errorf("making %s: %w", name, err)
	}
	return listening, conn, nil
}

// bringUp shakes hands with a new process, has a clone load its state, and
// writes down the host ports that were bound.
func (d *Driver) bringUp(ctx context.Context, inc *incarnation, p *process, h *held) error {
	ctx, cancel := context.WithTimeoutCause(ctx, d.options.StartTimeout,
		fmt.Errorf("QEMU did not answer within %s", d.options.StartTimeout))
	defer cancel()
	// All that is to be said is said at once.
	var commands []qmpCommand
	if inc.spec.Clone {
		commands = []qmpCommand{
			{"migrate-set-capabilities", migrationCapabilities},
			{"migrate-incoming", map[string]string{"uri": "fd:" + strconv.Itoa(fdDevices)}},
		}
	}
	q, err := newQMP(ctx, h.raw, commands...)
	h.raw = nil
	if err == nil {
		h.control = q
		if inc.spec.Clone {
			err = q.awaitMigration(ctx)
		}
	}
	if err == nil {
		if err = learnPorts(ctx, q, inc); err == nil && len(inc.process.Ports) > 0 {
			err = writeJSON(filepath.Join(inc.dir, fileProcess), inc.process, false)
		}
	}
	return whyNot(ctx, p, err)
}

// held are the connections to a process that were made with it.
type held struct {
	raw     net.Conn // until hands are shaken
	control *qmpConn // until the first Resume
	call    net.Conn // until it is dialled
}

func (h *held) close() error {
	var errs []error
	if h.raw != nil {
		errs = append(errs, h.raw.Close())
	}
	if h.control != nil {
		errs = append(errs, h.control.Close())
	}
	if h.call != nil {
		errs = append(errs, h.call.Close())
	}
	return errors.Join(errs...)
}

// hold keeps connections until they are taken, or the process ends.
func (d *Driver) hold(ref vmm.Ref, h *held) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.held == nil {
		return errors.Join(os.ErrClosed, h.close())
	}
	d.held[ref] = h
	return nil
}

func (d *Driver) takeCall(ref vmm.Ref) (conn net.Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if h := d.held[ref]; h != nil {
		conn, h.call = h.call, nil
	}
	return conn
}

// heldControl is the control connection that is held for ref, nil if there is
// none; whoever asks has the turn to speak to its QEMU.
func (d *Driver) heldControl(ref vmm.Ref) *qmpConn {
	d.mu.Lock()
	defer d.mu.Unlock()
	if h := d.held[ref]; h != nil {
		return h.control
	}
	return nil
}

func (d *Driver) dropControl(ref vmm.Ref) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	h := d.held[ref]
	if h == nil || h.control == nil {
		return nil
	}
	q := h.control
	h.control = nil
	return q.Close()
}

func (d *Driver) dropHeld(ref vmm.Ref) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if h := d.held[ref]; h != nil {
		delete(d.held, ref)
		if err := h.close(); err != nil {
			d.log.Warn("closing the connections to a vm", "instance", ref.Instance, "generation", ref.Generation, "error", err)
		}
	}
}

// closeHeld lets go of all connections, for good.
func (d *Driver) closeHeld() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for _, h := range d.held { //order:any each is only closed
		errs = append(errs, h.close())
	}
	d.held = nil
	return errors.Join(errs...)
}
