package qemu

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/blixard/blixard/internal/vmm"
)

// stub is a multiboot kernel (stub.asm) that enters long mode and
// ends QEMU with status 3 through the isa-debug-exit device.
//
//go:embed stub.bin
var stub []byte

const (
	stubStatus         = 3
	kvmStubLimit       = 3 * time.Second
	kvmLinuxLimit      = 8 * time.Second
	emulatedStubLimit  = 20 * time.Second // a busy machine
	probeRecordVersion = 1
)

// probeRecord is what one probe found, good until the machine restarts or
// another QEMU is installed.
type probeRecord struct {
	Key      string
	Version  string
	Features features
	Why      string // not kvm
}

// Capabilities implements vmm.Driver.
func (d *Driver) Capabilities(ctx context.Context) (vmm.Capabilities, error) {
	probed, err := d.probe(ctx)
	if err != nil {
		return vmm.Capabilities{}, err
	}
	_, tunErr := os.Stat("/dev/net/tun")
	return vmm.Capabilities{
		Driver: "qemu", Version: probed.Version,
		Acceleration: probed.Features.Acceleration, Why: probed.Why,
		Pause: true, GuestChannel: true, Snapshot: true,
		TapNetworking: tunErr == nil && os.Geteuid() == 0,
	}, nil
}

func (d *Driver) binary() (string, error) {
	path, err := exec.LookPath(d.options.Binary)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return "", fmt.Errorf("finding QEMU (scripts/setup installs it, or apt-get install qemu-system-x86): %w", err)
	}
	return path, nil
}

func (d *Driver) probe(ctx context.Context) (*probeRecord, error) {
	d.probing.Lock()
	defer d.probing.Unlock()
	if d.probed != nil {
		return d.probed, nil
	}
	binary, err := d.binary()
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(binary)
	if err != nil {
		return nil, fmt.Errorf("looking at QEMU: %w", err)
	}
	key := fmt.Sprintf("%d %s %s %d %d tcg=%t kernel=%s", probeRecordVersion, d.boot, binary, info.Size(), info.ModTime().UnixNano(),
		d.options.ForceTCG, d.options.ProbeKernel)
	path := filepath.Join(d.options.Root, "probe.json")
	var record probeRecord
	if ok, err := readJSON(path, &record); err != nil {
		return nil, err
	} else if ok && record.Key == key {
		d.probed = &record
		return d.probed, nil
	}
	record, err = d.look(ctx, binary)
	if err != nil {
		return nil, err
	}
	record.Key = key
	if err := writeJSON(path, record, false); err != nil {
		return nil, err
	}
	d.probed = &record
	d.log.Info("probed QEMU", "version", record.Version, "acceleration", record.Features.Acceleration, "why", record.Why)
	return d.probed, nil
}

// look boots until it knows what works here.
func (d *Driver) look(ctx context.Context, binary string) (record probeRecord, err error) {
	text, err := exec.CommandContext(ctx, binary, "-version").Output()
	if err != nil {
		return record, fmt.Errorf("asking QEMU for its version: %w", err)
	}
	first, _, _ := strings.Cut(string(text), "\n")
	record.Version = strings.TrimPrefix(first, "QEMU emulator version ")

	dir, err := os.MkdirTemp(filepath.Join(d.options.Root, "trash"), "probe-")
	if err != nil {
		return record, fmt.Errorf("making a directory for the probe: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	kernel := filepath.Join(dir, "stub.bin")
	if err := os.WriteFile(kernel, stub, 0o600); err != nil {
		return record, fmt.Errorf("writing the probe: %w", err)
	}
	// Not every build of QEMU has the sandbox and traces that go to its log.
	var refused error
	for _, f := range []features{{"tcg", true, true}, {"tcg", true, false}, {"tcg", false, false}} {
		if refused = bootStub(ctx, binary, kernel, f, emulatedStubLimit); refused == nil {
			record.Features = f
			break
		}
		if ctx.Err() != nil {
			return record, fmt.Errorf("probing QEMU: %w", context.Cause(ctx))
		}
	}
	if refused != nil {
		return record, fmt.Errorf("QEMU boots nothing here: %w", refused)
	}
	record.Why = d.whyNotKVM(ctx, binary, kernel, record.Features)
	if ctx.Err() != nil {
		return record, fmt.Errorf("probing QEMU: %w", context.Cause(ctx))
	}
	if record.Why == "" {
		record.Features.Acceleration = "kvm"
	}
	return record, nil
}

func (d *Driver) whyNotKVM(ctx context.Context, binary, kernel string, f features) string {
	if d.options.ForceTCG {
		return "emulation was asked for"
	}
	device, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return "there is no /dev/kvm: virtualization is off in the firmware, or this is a virtual machine without nesting"
	}
	if errors.Is(err, os.ErrPermission) {
		return "/dev/kvm may not be opened: add this user to the group kvm"
	}
	if err == nil {
		err = device.Close()
	}
	if err != nil {
		return "/dev/kvm cannot be used: " + err.Error()
	}
	f.Acceleration = "kvm"
	if err := bootStub(ctx, binary, kernel, f, kvmStubLimit); err != nil {
		return "/dev/kvm is there, but a guest does not boot with it: " + err.Error()
	}
	if d.options.ProbeKernel == "" {
		return ""
	}
	if err := bootLinux(ctx, filepath.Dir(kernel), binary, d.options.ProbeKernel, f); err != nil {
		return "/dev/kvm is there, but Linux does not boot with it: " + err.Error()
	}
	return ""
}

func bootStub(ctx context.Context, binary, kernel string, f features, limit time.Duration) error {
	status, text, err := boot(ctx, limit, filepath.Dir(kernel), binary, append(f.machineArguments(),
		"-m", "16", "-kernel", kernel, "-device", "isa-debug-exit,iobase=0x501,iosize=1"))
	if err == nil && status != stubStatus {
		err = fmt.Errorf("status %d", status)
	}
	if err != nil {
		return errors.New(withLines(err.Error(), lastLines(text)))
	}
	return nil
}

// bootLinux waits for the kernel to find that it has no root file system.
func bootLinux(ctx context.Context, dir, binary, kernel string, f features) error {
	_, text, err := boot(ctx, kvmLinuxLimit, dir, binary, append(f.machineArguments(),
		"-m", "256", "-kernel", kernel, "-append", "console=ttyS0 panic=-1 reboot=t", "-serial", "stdio"))
	if err == nil && !strings.Contains(text, "Unable to mount root fs") {
		err = errors.New("it ended without a word")
	}
	if err != nil {
		return errors.New(withLines(err.Error(), lastLines(text)))
	}
	return nil
}

// boot runs QEMU to its end and tells its status and what it wrote.
func boot(ctx context.Context, limit time.Duration, dir, binary string, arguments []string) (int, string, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	command := exec.CommandContext(ctx, binary, arguments...)
	command.WaitDelay = time.Second
	command.Dir = dir // a QEMU that aborts may leave its core there
	// Unlike a VM, it must not outlive a daemon that dies. The kernel watches the
	// thread, not the process, so that one has to stay.
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	text, err := command.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return 0, string(text), fmt.Errorf("no sign of life within %s", limit)
	case errors.As(err, &exit) && exit.Exited():
		return exit.ExitCode(), string(text), nil
	case errors.As(err, &exit):
		return 0, string(text), errors.New(exit.String())
	case err != nil:
		return 0, string(text), fmt.Errorf("running QEMU: %w", err)
	}
	return 0, string(text), nil
}
