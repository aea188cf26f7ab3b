package qemu

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/vmm"
)

// pretendGroups is a directory that looks like a mount of control groups, whose
// own files cannot be made elsewhere.
func pretendGroups(t *testing.T, available string) groups {
	t.Helper()
	g := newGroups(t.TempDir(), "/var/lib/blixard/vms")
	g.rmdir = func(path string) error {
		entries, err := os.ReadDir(path)
		for _, e := range entries {
			if !e.IsDir() && err == nil {
				err = os.Remove(filepath.Join(path, e.Name()))
			}
		}
		return errors.Join(err, unix.Rmdir(path))
	}
	put := func(path, text string) {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	put(filepath.Join(g.root, controllers), available+"\n")
	put(filepath.Join(g.root, subtreeControl), "\n")
	put(filepath.Join(g.parent(), subtreeControl), "cpu memory\n")
	put(filepath.Join(g.parent(), "somebody else's", groupProcesses), "")
	return g
}

func readGroup(t *testing.T, g groups, path ...string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(append([]string{g.root}, path...)...))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

func TestGroups(t *testing.T) {
	g := pretendGroups(t, "cpuset cpu io memory pids")
	if err := g.usable(); err != nil {
		t.Fatal(err)
	}
	spec := vmm.Spec{Ref: vmm.Ref{Instance: "web-1", Generation: 3}, VCPUs: 2, MemoryMiB: 1024}
	if err := g.limit(spec, 4711); err != nil {
		t.Fatal(err)
	}
	name := filepath.Base(g.group(spec.Ref))
	for file, want := range map[string]string{
		groupProcesses: "4711", "cpu.max": "225000 100000", "memory.max": strconv.Itoa((1024 + 16 + 384) << 20),
	} {
		if got := readGroup(t, g, groupParent, name, file); got != want {
			t.Errorf("%s is %q, want %q", file, got, want)
		}
	}
	if got := readGroup(t, g, subtreeControl); got != "+cpu +memory" {
		t.Errorf("the root enables %q", got)
	}
	// Again, as after a restart; then what nobody knows any more goes.
	if err := g.limit(spec, 4711); err != nil {
		t.Error(err)
	}
	gone := vmm.Ref{Instance: "web-1", Generation: 2}
	if err := g.limit(vmm.Spec{Ref: gone, VCPUs: 1, MemoryMiB: 64}, 1); err != nil {
		t.Fatal(err)
	}
	if err := g.removeOthers([]vmm.Ref{spec.Ref}); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(g.group(gone)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an unknown group is left: %v", err)
	}
	if g.killedForMemory(spec.Ref) {
		t.Error("without a word of the kernel it counts as killed for memory")
	}
	if err := os.WriteFile(filepath.Join(g.group(spec.Ref), "memory.events"), []byte("low 0\noom 1\noom_kill 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if !g.killedForMemory(spec.Ref) {
		t.Error("killed for memory, and it is not told")
	}
	for range 2 { // removing what is not there is fine
		if err := g.remove(spec.Ref); err != nil {
			t.Error(err)
		}
	}
	if got := readGroup(t, g, groupParent, "somebody else's", groupProcesses); got != "" {
		t.Errorf("others' groups hold %q", got)
	}
}

func TestGroupsThatCannotBeUsed(t *testing.T) {
	if err := newGroups(t.TempDir(), "").usable(); err == nil || !strings.Contains(err.Error(), "no control groups of version 2") {
		t.Errorf("nothing there: %v", err)
	}
	if err := pretendGroups(t, "hugetlb cpu").usable(); err == nil || !strings.Contains(err.Error(), "have no memory") {
		t.Errorf("a controller is missing: %v", err)
	}
}
