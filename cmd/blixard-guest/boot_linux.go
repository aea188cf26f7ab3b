package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const clockBoottime = unix.CLOCK_BOOTTIME

func uintptrOf[T any](p *T) uintptr { return uintptr(unsafe.Pointer(p)) }

const modulesDir = "/lib/blixard/modules"

// boot does what an init has to do before anything else works. Nothing here
// ends the process: a machine without one mount is more use than a panic.
func boot() {
	for _, m := range []struct {
		source, target, kind string
		flags                uintptr
		data                 string
	}{
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
		{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620,ptmxmode=0666"},
		{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
		{"tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	} {
		if err := mount(m.source, m.target, m.kind, m.flags, m.data); err != nil {
			logf("mounting %s: %v", m.target, err)
		}
	}
	links := [][2]string{{"/proc/self/fd", "/dev/fd"}, {"/proc/self/fd/0", "/dev/stdin"}, {"/proc/self/fd/1", "/dev/stdout"}, {"/proc/self/fd/2", "/dev/stderr"}}
	for _, link := range links {
		if err := os.Symlink(link[0], link[1]); err != nil && !errors.Is(err, os.ErrExist) {
			logf("linking %s: %v", link[1], err)
		}
	}
	adoptConsole()
	unix.Umask(0o022)
	if os.Getenv("PATH") == "" {
		if err := os.Setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"); err != nil {
			logf("setting PATH: %v", err)
		}
	}
	loadModules("list")
	if err := enterRoot(); err != nil {
		logf("entering the root file system: %v", err)
	}
	if err := setHostname("blixard"); err != nil {
		logf("%v", err)
	}
}

func mount(source, target, kind string, flags uintptr, data string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, kind, flags, data); err != nil && !errors.Is(err, unix.EBUSY) {
		return err
	}
	return nil
}

// adoptConsole makes /dev/console the standard streams when the kernel could
// not (its initial RAM disk held no device node).
func adoptConsole() {
	if _, err := unix.FcntlInt(1, unix.F_GETFD, 0); err == nil {
		return
	}
	console, err := os.OpenFile("/dev/console", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return
	}
	for fd := range 3 {
		if err := unix.Dup2(int(console.Fd()), fd); err != nil {
			return
		}
	}
}

// loadModules loads the drivers a list file names, in its order.
func loadModules(list string) {
	names, err := os.ReadFile(filepath.Join(modulesDir, list))
	if err != nil {
		return // a kernel with everything built in
	}
	for name := range strings.Lines(string(names)) {
		name = strings.TrimSpace(name)
		if name == "" || strings.HasPrefix(name, "#") {
			continue
		}
		if err := loadModule(filepath.Join(modulesDir, filepath.Base(name))); err != nil {
			logf("loading driver %s: %v", name, err)
		}
	}
}

func loadModule(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	err = unix.FinitModule(int(file.Fd()), "", 0)
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// enterRoot moves to the disk that blixard.root= on the kernel's command line
// names, and stays PID 1 there.
func enterRoot() error {
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	var device string
	for field := range bytes.FieldsSeq(cmdline) {
		if value, ok := bytes.CutPrefix(field, []byte("blixard.root=")); ok {
			device = string(value)
		}
	}
	if device == "" {
		return nil
	}
	if findPort() == "" {
		loadModules("vsock") // they stay behind on the RAM disk
	}
	const root = "/newroot"
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	if err := mountDisk(device, root); err != nil {
		return err
	}
	for _, dir := range []string{"/proc", "/sys", "/dev", "/run", "/tmp"} {
		if err := os.MkdirAll(root+dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(dir, root+dir, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("moving %s: %w", dir, err)
		}
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("moving the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return os.Chdir("/")
}

// mountDisk waits for the device, which a driver may still be finding.
func mountDisk(device, target string) error {
	for range 200 {
		if _, err := os.Stat(device); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	known, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return err
	}
	last := fmt.Errorf("no file system fits")
	for line := range strings.Lines(string(known)) {
		kind := strings.TrimSpace(line)
		if strings.HasPrefix(kind, "nodev") || kind == "" {
			continue
		}
		for _, flags := range []uintptr{0, unix.MS_RDONLY} {
			err := unix.Mount(device, target, kind, flags, "")
			if err == nil {
				return nil
			}
			if !errors.Is(err, unix.EINVAL) {
				last = err
			}
		}
	}
	return fmt.Errorf("mounting %s: %w", device, last)
}

func setHostname(name string) error {
	if err := unix.Sethostname([]byte(name)); err != nil {
		return fmt.Errorf("setting the host name: %w", err)
	}
	return nil
}

// restart ends the machine. A restart and not a power-off: it works on every
// machine type, and hypervisors are told to end on it.
func restart() {
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART); err != nil {
		logf("restarting: %v", err)
	}
}
