package qemu

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/vmm"
)

func template(t *testing.T, d *Driver, change func(*vmm.Spec)) vmm.Spec {
	t.Helper()
	spec := callSpec(t, vmm.Ref{Instance: "template", Generation: 1})
	change(&spec)
	return benchTemplate(t, d, spec, 1)
}

func unchanged(*vmm.Spec) {}

func cloneOf(spec vmm.Spec, n int) vmm.Spec {
	spec.Ref = vmm.Ref{Instance: "clone-" + strconv.Itoa(n), Generation: 1}
	spec.Kernel, spec.Initrd, spec.Cmdline = "", "", ""
	return spec
}

// Twenty at once, more than the machine has processors for.
func TestManyClones(t *testing.T) {
	needQEMU(t)
	d := fresh(t)
	spec := template(t, d, unchanged)
	const many = 20
	errs := make([]error, many)
	began := time.Now()
	var all sync.WaitGroup
	for n := range many {
		all.Go(func() { errs[n] = d.Clone(t.Context(), cloneOf(spec, n)) })
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d clones after %s", many, time.Since(began))
	var private, shared []int64
	for n := range many {
		all.Go(func() {
			ref := cloneOf(spec, n).Ref
			guest := dialLines(t, d, ref)
			defer guest.close(t)
			errs[n] = d.Resume(t.Context(), ref)
			if got := guest.say(t, "get"); got != "saved" {
				t.Errorf("%s says %q", ref, got)
			}
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d answers after %s", many, time.Since(began))
	for n := range many {
		p, s, err := d.MemoryUse(t.Context(), cloneOf(spec, n).Ref)
		if err != nil {
			t.Fatal(err)
		}
		private, shared = append(private, p>>20), append(shared, s>>20)
	}
	slices.Sort(private)
	slices.Sort(shared)
	t.Logf("private MiB %d, shared MiB %d", private, shared)
	if most := private[many-1]; most > 40 {
		t.Errorf("an idle clone takes %d MiB of its own", most)
	}
}

// The file of a template takes no more of the disk than the guest had written.
func TestTemplateIsSparse(t *testing.T) {
	needQEMU(t)
	d := fresh(t)
	spec := template(t, d, unchanged)
	var stat unix.Stat_t
	if err := unix.Stat(filepath.Join(spec.Template, fileMemory), &stat); err != nil {
		t.Fatal(err)
	}
	if stat.Size != int64(spec.MemoryMiB)<<20 || stat.Blocks*512 > stat.Size*3/4 {
		t.Errorf("the memory file of %d bytes takes %d", stat.Size, stat.Blocks*512)
	}
	t.Logf("%d of %d bytes", stat.Blocks*512, stat.Size)
}

func TestCopySparse(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"empty":     "",
		"short":     "abc",
		"zeros":     strings.Repeat("\x00", 3*copyBytes),
		"odd":       strings.Repeat("\x00", pageBytes+1) + "x" + strings.Repeat("\x00", copyBytes) + "y" + strings.Repeat("\x00", 77),
		"edges":     "x" + strings.Repeat("\x00", copyBytes-2) + "y" + strings.Repeat("z", pageBytes) + strings.Repeat("\x00", pageBytes),
		"no zeros":  strings.Repeat("abc", copyBytes),
		"last page": strings.Repeat("\x00", copyBytes) + strings.Repeat("z", 5),
	} {
		from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
		if err := os.WriteFile(from, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		size, err := copySparse(t.Context(), from, to)
		if err != nil || size != int64(len(text)) {
			t.Errorf("%s: %d, %v", name, size, err)
		}
		if got, err := os.ReadFile(to); err != nil || string(got) != text {
			t.Errorf("%s: the copy of %d bytes has %d and differs, %v", name, len(text), len(got), err)
		}
	}
}

// Each clone has a network of its own; its interface begins with the address of
// the template's.
func TestCloneNetwork(t *testing.T) {
	needQEMU(t)
	d := fresh(t)
	spec := template(t, d, func(s *vmm.Spec) { s.Network = vmm.Network{Mode: "user", MAC: "52:54:00:00:00:01"} })
	clone := cloneOf(spec, 0)
	clone.Network = vmm.Network{
		Mode: "user", MAC: "52:54:00:00:00:02", Subnet: "10.77.3.0/24",
		Ports: []vmm.Port{{HostIP: "127.0.0.1", GuestPort: 80}},
	}
	if err := d.Clone(t.Context(), clone); err != nil {
		t.Fatal(err)
	}
	if s := status(t, d); len(s.Ports) != 1 || s.Ports[0].HostPort == 0 {
		t.Errorf("published: %+v", s.Ports)
	}
	guest := dialLines(t, d, clone.Ref)
	defer guest.close(t)
	if err := d.Resume(t.Context(), clone.Ref); err != nil {
		t.Fatal(err)
	}
	if got := guest.say(t, "mac"); got != spec.Network.MAC {
		t.Errorf("the address is %q, of the template %q", got, spec.Network.MAC)
	}
	var usernet string
	err := d.control(t.Context(), clone.Ref, func(q *qmpConn) error {
		return q.execute(t.Context(), "human-monitor-command", map[string]string{"command-line": "info usernet"}, &usernet)
	})
	if err != nil || !strings.Contains(usernet, "10.77.3.15") {
		t.Errorf("%v: %s", err, usernet)
	}
}

// A template that QEMU cannot load: the error says so, and nothing runs on.
func TestSpoiledTemplate(t *testing.T) {
	needQEMU(t)
	d := fresh(t)
	spec := template(t, d, unchanged)
	path := filepath.Join(spec.Template, fileDevices)
	info, err := os.Stat(path)
	if err == nil {
		err = os.WriteFile(path, []byte(strings.Repeat("x", int(info.Size()))), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	err = d.Clone(t.Context(), cloneOf(spec, 0))
	if err == nil || !strings.Contains(err.Error(), "Not a migration stream") {
		t.Errorf("Clone: %v", err)
	}
	if s := status(t, d); s.Phase != vmm.Exited || !strings.Contains(s.ExitReason, "migration") {
		t.Errorf("%+v", s)
	}
}

// A guest that reads nothing, or talks without end, holds up nobody else.
func TestPausedCloneIsStopped(t *testing.T) {
	needQEMU(t)
	d := fresh(t)
	spec := template(t, d, unchanged)
	if err := d.Clone(t.Context(), cloneOf(spec, 0)); err != nil {
		t.Fatal(err)
	}
	s := status(t, d)
	if err := syscall.Kill(s.Pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := d.Stop(t.Context(), s.Ref, 0); err != nil {
		t.Errorf("Stop of a hung clone: %v", err)
	}
	if s := status(t, d); s.Phase != vmm.Exited {
		t.Errorf("%+v", s)
	}
}

// However early the daemon is killed during Clone: what it leaves is listed,
// starts at most once and can be removed, and the template is good.
func TestDaemonKilledDuringClone(t *testing.T) {
	needQEMU(t)
	d := fresh(t)
	spec := template(t, d, unchanged)
	for step := range 10 {
		delay := time.Duration(step) * 4 * time.Millisecond
		root := longRoot(t)
		command, lines := daemon(t, root, "QEMU_TEST_DAEMON_HURRY=1", daemonTemplate+"="+spec.Template)
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
		again := cloneOf(spec, 0)
		again.Ref = webapp
		err = d.Clone(t.Context(), again)
		if started := len(l) == 1 && l[0].Phase != vmm.Prepared; started != errors.Is(err, vmm.ErrStarted) {
			t.Errorf("after %s: %+v, Clone: %v", delay, l, err)
		}
		if err := d.Remove(t.Context(), webapp); err != nil {
			t.Errorf("after %s: Remove: %v", delay, err)
		}
		eventually(t, "end of what the daemon left", func() bool { return len(leftovers(t, d)) == 0 })
	}
}

func TestTemplateKeyTellsMachines(t *testing.T) {
	cpu := func(model, flags string) string {
		return cpuBaseline(fmt.Sprintf("processor\t: 0\nvendor_id\t: X\nmodel name\t: %s\ncpu MHz\t: 12.3\nflags\t\t: %s\n\nprocessor\t: 1\nvendor_id\t: Y\n", model, flags))
	}
	if a, b := cpu("one", "fpu sse"), cpu("one", "sse fpu"); a != b || !strings.HasPrefix(a, "X one flags ") {
		t.Errorf("the same CPU is %q and %q", a, b)
	}
	for _, other := range []string{cpu("two", "fpu sse"), cpu("one", "fpu")} {
		if other == cpu("one", "fpu sse") {
			t.Errorf("another CPU is also %q", other)
		}
	}
}
