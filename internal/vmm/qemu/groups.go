package qemu

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/vmm"
)

const (
	controlGroups  = "/sys/fs/cgroup"
	groupParent    = "blixard" // below the root, so that a service manager that ends the daemon's group ends no guest
	controllers    = "cgroup.controllers"
	subtreeControl = "cgroup.subtree_control"
	groupProcesses = "cgroup.procs"
	cpuPeriodUS    = 100_000
	// ownCPUUS is what QEMU's own threads get beside the vCPUs: a guest that
	// computes at full speed must not starve its disks and network.
	ownCPUUS = cpuPeriodUS / 4
	// ownMemoryMiB is what QEMU needs beside the guest's memory: its code and
	// buffers, and under emulation a translation cache of 128 MiB.
	ownMemoryMiB  = 384
	groupEndsIn   = 2 * time.Second // for the kernel to let a dead process's group go
	groupMakeTrys = 10              // against another node of this machine that takes the empty parent away
)

// wantedControllers are those the limits need.
var wantedControllers = []string{"cpu", "memory"}

// groups are the control groups (version 2) that bound what a hypervisor
// process takes of the machine: one per incarnation, made when it starts and
// removed with it. Several drivers share a machine, so names begin with what
// tells the driver's root.
type groups struct {
	root   string // where control groups are mounted
	prefix string
	rmdir  func(path string) error
}

func newGroups(root, driverRoot string) groups {
	sum := sha256.Sum256([]byte(driverRoot))
	return groups{root: root, prefix: hex.EncodeToString(sum[:4]) + "-", rmdir: unix.Rmdir}
}

func (g groups) parent() string           { return filepath.Join(g.root, groupParent) }
func (g groups) path(name string) string  { return filepath.Join(g.parent(), name) }
func (g groups) group(ref vmm.Ref) string { return g.path(g.prefix + ref.String()) }
func memoryLimitMiB(spec vmm.Spec) int64 {
	own := int64(ownMemoryMiB)
	if spec.Template != "" {
		own = cloneOwnMemoryMiB
	}
	return int64(spec.MemoryMiB) + int64(spec.MemoryMiB)/64 + own
}
func cpuLimitUS(spec vmm.Spec) int { return spec.VCPUs*cpuPeriodUS + ownCPUUS }
func missing(have string) (without []string) {
	for _, c := range wantedControllers {
		if !slices.Contains(strings.Fields(have), c) {
			without = append(without, c)
		}
	}
	return without
}

// usable tells why there can be no limits here, nil if there can. It changes
// nothing.
func (g groups) usable() error {
	have, err := os.ReadFile(filepath.Join(g.root, controllers))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("there are no control groups of version 2 at %s", g.root)
	}
	if err != nil {
		return fmt.Errorf("looking for control groups: %w", err)
	}
	if without := missing(string(have)); len(without) > 0 {
		return fmt.Errorf("the control groups of version 2 at %s have no %s", g.root, strings.Join(without, " and "))
	}
	if err := unix.Access(g.root, unix.W_OK); err != nil {
		return fmt.Errorf("the control groups at %s cannot be changed by this user", g.root)
	}
	return nil
}

// limit puts a process into the group of its incarnation.
func (g groups) limit(spec vmm.Spec, pid int) error {
	if err := g.prepare(spec); err != nil {
		return err
	}
	return set(g.group(spec.Ref), groupProcesses, strconv.Itoa(pid))
}

// prepare makes the group of an incarnation with its limits.
func (g groups) prepare(spec vmm.Spec) error {
	group := g.group(spec.Ref)
	if err := g.make(group); err != nil {
		return err
	}
	if err := set(group, "memory.max", strconv.FormatInt(memoryLimitMiB(spec)<<20, 10)); err != nil {
		return err
	}
	return set(group, "cpu.max", fmt.Sprintf("%d %d", cpuLimitUS(spec), cpuPeriodUS))
}

func set(group, name, value string) error {
	if err := os.WriteFile(filepath.Join(group, name), []byte(value), 0o600); err != nil {
		return fmt.Errorf("setting a limit: %w", err)
	}
	return nil
}

// open makes the group of an incarnation for a process that is to begin in it.
func (g groups) open(spec vmm.Spec) (*os.File, error) {
	if err := g.prepare(spec); err != nil {
		return nil, err
	}
	f, err := os.Open(g.group(spec.Ref))
	if err != nil {
		return nil, fmt.Errorf("opening a control group: %w", err)
	}
	return f, nil
}

// make makes a group with the controllers that its limits need.
func (g groups) make(group string) error {
	err := g.enable(g.root)
	for range groupMakeTrys {
		if err != nil {
			break
		}
		if err = os.Mkdir(g.parent(), 0o755); err == nil || errors.Is(err, fs.ErrExist) {
			err = g.enable(g.parent())
		}
		if err == nil {
			err = os.Mkdir(group, 0o755)
		}
		if err == nil || errors.Is(err, fs.ErrExist) {
			return nil
		}
		if errors.Is(err, fs.ErrNotExist) {
			err = nil // the parent was empty a moment ago, and somebody removed it
		}
	}
	return errors.Join(fmt.Errorf("making the control group %s failed", group), err)
}

// enable has the groups below dir counted and limited.
func (g groups) enable(dir string) error {
	path := filepath.Join(dir, subtreeControl)
	have, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("looking at the control groups of %s: %w", dir, err)
	}
	without := missing(string(have))
	if len(without) == 0 {
		return nil
	}
	if err := os.WriteFile(path, []byte("+"+strings.Join(without, " +")), 0o600); err != nil {
		return fmt.Errorf("enabling %s for the control groups of %s: %w", strings.Join(without, " and "), dir, err)
	}
	return nil
}

// remove takes away the group of an incarnation whose process has ended.
func (g groups) remove(ref vmm.Ref) error { return g.removeGroup(g.group(ref)) }

func (g groups) removeGroup(group string) error {
	deadline := time.Now().Add(groupEndsIn)
	err := g.rmdir(group)
	for errors.Is(err, unix.EBUSY) && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
		err = g.rmdir(group)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the control group %s: %w", group, err)
	}
	if err == nil {
		if err := g.rmdir(g.parent()); err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("removing the control group %s: %w", g.parent(), err)
		}
	}
	return nil
}

// removeOthers takes away the groups of this driver but those of the kept
// incarnations.
func (g groups) removeOthers(kept []vmm.Ref) error {
	entries, err := os.ReadDir(g.parent())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("looking for control groups: %w", err)
	}
	var errs []error
	for _, e := range entries {
		name, ours := strings.CutPrefix(e.Name(), g.prefix)
		if ours && e.IsDir() && !slices.ContainsFunc(kept, func(r vmm.Ref) bool { return r.String() == name }) {
			errs = append(errs, g.removeGroup(g.path(e.Name())))
		}
	}
	return errors.Join(errs...)
}

// killedForMemory tells whether the kernel ended an incarnation's process since
// it wanted more memory than its limit.
func (g groups) killedForMemory(ref vmm.Ref) bool {
	text, err := os.ReadFile(filepath.Join(g.group(ref), "memory.events"))
	if err != nil {
		return false // no limits here, or nothing is known of it
	}
	for line := range strings.Lines(string(text)) {
		if count, found := strings.CutPrefix(line, "oom_kill "); found {
			return strings.TrimSpace(count) != "0"
		}
	}
	return false
}

// CanLimit tells why the processes of guests cannot be held to their memory and
// CPU on this machine, nil if they can. It changes nothing.
func CanLimit() error { return newGroups(controlGroups, "").usable() }

// RemoveGroups takes away what is left of the limits of a driver's guests, all
// of whose processes have ended. Drivers remove their own; it is for a root that
// is deleted without one.
func RemoveGroups(root string) error {
	path, err := filepath.Abs(root)
	if err != nil {
		return fmt.Errorf("resolving %s: %w", root, err)
	}
	return newGroups(controlGroups, path).removeOthers(nil)
}
