package qemu

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/blixard/blixard/internal/vmm"
	"github.com/blixard/blixard/internal/vmm/vmmtest"
)

const daemonRoot, daemonKernel, daemonTemplate = "QEMU_TEST_DAEMON_ROOT", "QEMU_TEST_DAEMON_KERNEL", "QEMU_TEST_DAEMON_TEMPLATE"

// TestDaemonBody is no test but what the daemon of the tests below does: it
// starts a VM, tells its pid and waits to be killed.
func TestDaemonBody(t *testing.T) {
	root := os.Getenv(daemonRoot)
	if root == "" {
		return
	}
	d, err := New(Options{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	spec := vmm.Spec{Ref: webapp, VCPUs: 1, MemoryMiB: 16, Kernel: os.Getenv(daemonKernel), Network: vmm.Network{Mode: "none"}}
	if os.Getenv("QEMU_TEST_DAEMON_HURRY") != "" {
		fmt.Println("starting")
	}
	begin := d.Start
	if spec.Template = os.Getenv(daemonTemplate); spec.Template != "" {
		spec.MemoryMiB, spec.CallPort, begin = 128, true, d.Clone
	}
	if err := begin(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	l, err := d.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println("pid", l[0].Pid)
	select {}
}

// daemon runs TestDaemonBody in a process of its own and returns what it says.
func daemon(t *testing.T, root string, extra ...string) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	command := exec.Command(os.Args[0], "-test.run=^TestDaemonBody$")
	command.Env = append(os.Environ(), append(extra, daemonRoot+"="+root, daemonKernel+"="+guestFile(t, idleGuest))...)
	command.Stderr = os.Stderr
	out, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	return command, bufio.NewScanner(out)
}

func killDaemon(t *testing.T, command *exec.Cmd) {
	t.Helper()
	if err := command.Process.Kill(); err != nil {
		t.Error(err)
	}
	var killed *exec.ExitError
	if err := command.Wait(); !errors.As(err, &killed) {
		t.Errorf("the daemon ended with %v", err)
	}
}

// A VM outlives a daemon that is killed; the next one, which is not its parent,
// finds it, stops it and learns of its end.
func TestDaemonKilled(t *testing.T) {
	needQEMU(t)
	root := filepath.Dir(filepath.Join(longRoot(t), "x"))
	command, lines := daemon(t, root)
	var pid int
	for lines.Scan() && pid == 0 {
		if text, found := strings.CutPrefix(lines.Text(), "pid "); found {
			var err error
			if pid, err = strconv.Atoi(text); err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	killDaemon(t, command)
	d := open(t, root, Options{})
	if s := status(t, d); s.Phase != vmm.Running || s.Pid != pid || pid == 0 {
		t.Fatalf("pid was %d, found %+v", pid, s)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	// A change from before, that it was found, may still be waiting, and the one of
	// its end may come before whoever has inherited the process has buried it.
	look := time.NewTicker(50 * time.Millisecond)
	defer look.Stop()
	for late, s := time.After(vmmtest.Patience), status(t, d); s.Phase != vmm.Exited; s = status(t, d) {
		select {
		case <-d.Changes():
		case <-look.C:
		case <-late:
			t.Fatalf("its end was not noticed: %+v", s)
		}
	}
	if s := status(t, d); s.ExitReason != "process ended" {
		t.Errorf("killed: %+v", s)
	}
	if err := d.Remove(t.Context(), webapp); err != nil {
		t.Error(err)
	}
	if left := leftovers(t, d); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// However early the daemon is killed during Start: what it leaves is listed,
// starts at most once and can be removed.
func TestDaemonKilledDuringStart(t *testing.T) {
	needQEMU(t)
	fresh(t)
	for step := range 24 {
		delay := time.Duration(step/2*(step/2)) * 300 * time.Microsecond
		root := longRoot(t)
		if step%2 == 0 { // with the probe of the machine, which takes most of the time
			if err := os.RemoveAll(filepath.Join(root, "probe.json")); err != nil {
				t.Fatal(err)
			}
		}
		command, lines := daemon(t, root, "QEMU_TEST_DAEMON_HURRY=1")
		for lines.Scan() && lines.Text() != "starting" {
		}
		<-time.After(delay)
		killDaemon(t, command)
		d := open(t, root, Options{})
		l, err := d.List(t.Context())
		if err != nil || len(l) > 1 {
			t.Fatalf("after %s: %+v, %v", delay, l, err)
		}
		if len(l) == 1 {
			t.Logf("after %s: %s", delay, l[0].Phase)
		}
		if len(l) == 1 && l[0].Phase != vmm.Prepared {
			if err := d.Start(t.Context(), specOf(idleGuest)(t, webapp)); !errors.Is(err, vmm.ErrStarted) {
				t.Errorf("after %s, %s: Start: %v", delay, l[0].Phase, err)
			}
		}
		if err := d.Remove(t.Context(), webapp); err != nil {
			t.Errorf("after %s: Remove: %v", delay, err)
		}
		// The probe's QEMU dies with the daemon, by signal, not at the same instant.
		eventually(t, "end of what the daemon left", func() bool { return len(leftovers(t, d)) == 0 })
	}
}
