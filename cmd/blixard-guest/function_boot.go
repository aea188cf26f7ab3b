package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/call"
)

const (
	functionTaskRoot    = "/var/task"
	functionRuntimeRoot = "/opt/blixard"
	functionAPI         = "127.0.0.1:9001"
	// functionReserve is memory that the function's processes do not get: the
	// kernel's and the agent's.
	functionReserve = 24 << 20
)

// functionRole tells whether the kernel's command line asks for it.
func functionRole() bool {
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return false
	}
	for word := range bytes.FieldsSeq(cmdline) {
		if string(word) == call.RoleWord {
			return true
		}
	}
	return false
}

// serveFunction is the function role of PID 1; it never returns.
func serveFunction() {
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	// No collection in the middle of a call; what it would free is bounded.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(functionReserve)
	// One more than CPUs: the thread that takes an answer in need not wait for the one
	// that has handed the event over. And said by hand, it is not looked after in
	// every clone.
	runtime.GOMAXPROCS(runtime.NumCPU() + 1)
	if err := unix.Setpriority(unix.PRIO_PROCESS, 0, -10); err != nil {
		logf("taking precedence over the function: %v", err)
	}
	children := newReaper()
	go children.run(context.Background())
	var guest *call.Guest
	log, err := newFunctionLog(functionUser, func(p []byte) {
		if err := guest.Log(p); err != nil {
			logf("sending the function's output: %v", err)
		}
	})
	if err != nil {
		dieFunction(err)
	}
	processes := &functionProcesses{children: children, log: log, user: functionUser, init: true, running: make(map[int]*functionProcess)}
	if processes.group, err = newFunctionGroup("/sys/fs/cgroup"); err != nil {
		logf("the function's memory is bounded by the machine's only: %v", err)
	}
	machine := &functionGuest{processes: processes}
	agent := newFunctionAgent(machine, processes, log)
	port, err := openCallPort()
	if err != nil {
		dieFunction(err)
	}
	guest = call.NewGuest(port, agent)
	agent.guest = guest
	go log.watch(agent.expired)
	logf("the function role of %s is ready after %s", version, uptime().Round(time.Millisecond))
	runtime.LockOSThread()
	for {
		port.waitForHost()
		if err := guest.Serve(); !errors.Is(err, io.EOF) {
			logf("serving the host: %v", err)
			if !errors.Is(err, io.ErrUnexpectedEOF) {
				restart() // there is no way back to the beginning of a frame
			}
		}
	}
}

// dieFunction ends a machine that will never be of use.
func dieFunction(err error) {
	logf("the function role cannot start: %v", err)
	restart()
	select {}
}

// callPort is the virtio-serial port by blocking system calls. Closing it would
// drop what the host has sent, so it stays open.
type callPort struct{ fd int }

func openCallPort() (*callPort, error) {
	for range 500 {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, path := range names {
			name, err := os.ReadFile(path)
			if err != nil || strings.TrimSpace(string(name)) != call.PortName {
				continue
			}
			fd, err := unix.Open("/dev/"+filepath.Base(filepath.Dir(path)), unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				return nil, fmt.Errorf("opening the call port: %w", err)
			}
			return &callPort{fd}, nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, fmt.Errorf("this machine has no port named %s", call.PortName)
}

// waitForHost returns when the host's end is open: until then the port reads as
// ended.
func (p *callPort) waitForHost() {
	fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLOUT}}
	for pause := time.Millisecond; ; pause = min(2*pause, 10*time.Millisecond) {
		if _, err := unix.Poll(fds, 0); err == nil && fds[0].Revents&unix.POLLHUP == 0 {
			return
		}
		time.Sleep(pause)
	}
}

func (p *callPort) Read(b []byte) (int, error) {
	for {
		n, err := unix.Read(p.fd, b)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case err != nil:
			return 0, err
		case n <= 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

func (p *callPort) Write(b []byte) (int, error) {
	written := 0
	for written < len(b) {
		n, err := unix.Write(p.fd, b[written:])
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case err != nil:
			return written, err
		}
		written += max(n, 0)
	}
	return written, nil
}

// functionGuest is the machine when it is a guest of ours.
type functionGuest struct {
	processes *functionProcesses
	identity  functionIdentity
}

func (*functionGuest) taskRoot() string    { return functionTaskRoot }
func (*functionGuest) runtimeRoot() string { return functionRuntimeRoot }
func (*functionGuest) api() string         { return functionAPI }

// prepare implements functionMachine.
func (m *functionGuest) prepare(init *call.Init) error {
	if err := m.identity.open(); err != nil {
		return err
	}
	if err := m.identity.assume(init); err != nil {
		return err
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return fmt.Errorf("asking for the machine's memory: %w", err)
	}
	total := int64(info.Totalram) * int64(info.Unit)
	memory := max(min(init.MemoryMiB<<20, total-functionReserve), 16<<20)
	if m.processes.group != nil {
		if err := m.processes.group.bound(memory); err != nil {
			return err
		}
	}
	// /tmp is memory, too: a function that fills it is told so before it is killed.
	size := min(init.EphemeralMiB<<20, memory/2)
	if err := unix.Mount("tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("mode=1777,size=%d,nr_inodes=%d", size, max(1024, size>>13))); err != nil {
		return fmt.Errorf("mounting /tmp: %w", err)
	}
	if init.CodeDevice != "" {
		if err := mountReadOnly(init.CodeDevice, functionTaskRoot); err != nil {
			return err
		}
	}
	if init.RuntimeDevice != "" {
		if err := mountReadOnly(init.RuntimeDevice, functionRuntimeRoot); err != nil {
			return err
		}
	}
	return addUser()
}

// settle implements functionMachine: what was garbage need not be saved, and what a
// call will touch is touched afterwards.
func (m *functionGuest) settle() {
	// The host gives a clone its entropy; the device's thread would wake up for more.
	if err := os.WriteFile("/sys/class/misc/hw_random/rng_current", []byte("none"), 0o644); err != nil && !errors.Is(err, os.ErrNotExist) {
		logf("leaving the random device: %v", err)
	}
	m.processes.prefault()
	debug.FreeOSMemory()
	warmUp()
	warmUp()
}

// mountReadOnly waits for the device, which a driver may still be finding.
func mountReadOnly(device, target string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	var err error
	for range 200 {
		for _, kind := range []string{"erofs", "squashfs", "ext4"} {
			err = unix.Mount(device, target, kind, unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, "")
			if err == nil {
				return nil
			}
			if errors.Is(err, unix.ENOENT) {
				break
			}
		}
		if !errors.Is(err, unix.ENOENT) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("mounting %s at %s: %w", device, target, err)
}

// addUser gives the function's user a name, which some programs insist on.
func addUser() error {
	const path = "/etc/passwd"
	text, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("naming the function's user: %w", err)
	}
	if bytes.Contains(text, []byte("sbx_user1051")) {
		return nil
	}
	text = fmt.Appendf(text, "sbx_user1051:x:%d:%d::/tmp:/bin/false\n", functionUser, functionUser)
	if err := os.WriteFile(path, text, 0o644); err != nil {
		return fmt.Errorf("naming the function's user: %w", err)
	}
	return nil
}
