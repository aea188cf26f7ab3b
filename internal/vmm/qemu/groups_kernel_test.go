//go:build inguest

package qemu

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"github.com/blixard/blixard/internal/vmm"
)

// TestGroupsOfTheKernel is TestGroups with the kernel's own: a process that takes
// more than its limit is ended, and nothing is left. The kernel of the machine
// that builds may have none, so internal/e2e builds it with this tag and runs it
// in a guest.
func TestGroupsOfTheKernel(t *testing.T) {
	g := newGroups(controlGroups, t.TempDir())
	if err := g.usable(); err != nil {
		t.Fatal(err)
	}
	// It takes memory without end: its limit, QEMU's share included, is 400 MiB.
	cmd := exec.Command("/bin/sh", "-c", "read go; exec tail /dev/zero")
	begin, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	spec := vmm.Spec{Ref: vmm.Ref{Instance: "web-1", Generation: 1}, VCPUs: 1, MemoryMiB: 16}
	if err := g.limit(spec, cmd.Process.Pid); err != nil {
		t.Error(errors.Join(err, cmd.Process.Kill()))
	}
	for file, want := range map[string]string{
		groupProcesses: strconv.Itoa(cmd.Process.Pid), "cpu.max": "125000 100000", "memory.max": strconv.Itoa(400 << 20),
	} {
		if got := readGroup(t, g, groupParent, filepath.Base(g.group(spec.Ref)), file); got != want {
			t.Errorf("%s is %q, want %q", file, got, want)
		}
	}
	if err := begin.Close(); err != nil {
		t.Error(err)
	}
	exit := (*exec.ExitError)(nil)
	if err := cmd.Wait(); !errors.As(err, &exit) {
		t.Errorf("it ended with %v", err)
	} else if status, ok := exit.Sys().(interface{ Signaled() bool }); !ok || !status.Signaled() {
		t.Errorf("it was not killed: %v", err)
	}
	if !g.killedForMemory(spec.Ref) {
		t.Error("it was killed for memory, and that is not told")
	}
	begunInGroup(t, g)
	if err := g.removeOthers(nil); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(g.group(spec.Ref)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("its group is left: %v", err)
	}
}

// begunInGroup has a process be in its group from its first instruction on.
func begunInGroup(t *testing.T, g groups) {
	t.Helper()
	spec := vmm.Spec{Ref: vmm.Ref{Instance: "clone-1", Generation: 1}, VCPUs: 1, MemoryMiB: 64, Template: "/template"}
	group, err := g.open(spec)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", "read go")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd())}
	begin, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{
		groupProcesses: strconv.Itoa(cmd.Process.Pid), "cpu.max": "125000 100000", "memory.max": strconv.Itoa((64 + 1 + cloneOwnMemoryMiB) << 20),
	} {
		if got := readGroup(t, g, groupParent, filepath.Base(g.group(spec.Ref)), file); got != want {
			t.Errorf("%s is %q, want %q", file, got, want)
		}
	}
	if err := errors.Join(begin.Close(), group.Close()); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Logf("it ended with %v", err) // read told that there was nothing
	}
}
