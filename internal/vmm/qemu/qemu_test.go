package qemu

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/blixard/blixard/internal/vmm"
	"github.com/blixard/blixard/internal/vmm/vmmtest"
)

var probeCache []byte // the probe is tested once; other roots get its result

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(status int) {
		for _, dir := range scratch {
			if err := os.RemoveAll(dir); err != nil {
				fmt.Println(err)
			}
		}
		os.Exit(status)
	}))
}

// needQEMU keeps real hypervisors out of short runs.
func needQEMU(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("boots real QEMUs")
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Fatalf("%v: run scripts/setup", err)
	}
}

// open is a driver on root that is closed when the test ends, its VMs removed.
func open(t *testing.T, root string, options Options) *Driver {
	t.Helper()
	options.Root = root
	d, err := New(options)
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	t.Cleanup(func() {
		if d.isClosed() {
			return // by reopen; the newer one cleans up
		}
		for _, ref := range mustRefs(t, d) {
			if err := d.Remove(context.Background(), ref); err != nil {
				t.Errorf("Remove: %v", err)
			}
		}
		if err := d.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return d
}

func (d *Driver) isClosed() bool {
	d.watch.mu.Lock()
	defer d.watch.mu.Unlock()
	return d.watch.closed
}

func mustRefs(t *testing.T, d *Driver) []vmm.Ref {
	t.Helper()
	refs, err := d.refs()
	if err != nil {
		t.Fatal(err)
	}
	return refs
}

func reopen(t *testing.T, d *Driver) *Driver {
	t.Helper()
	if err := d.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	options := d.options
	return open(t, options.Root, options)
}

// longRoot is a root whose sockets have paths far beyond a UNIX address.
func longRoot(t *testing.T) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), strings.Repeat("long, and with spaces/", 8))
	if err := os.MkdirAll(root, 0o700); err != nil {
		t.Fatal(err)
	}
	if probeCache != nil {
		if err := os.WriteFile(filepath.Join(root, "probe.json"), probeCache, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func specOf(code string) func(*testing.T, vmm.Ref) vmm.Spec {
	return func(t *testing.T, ref vmm.Ref) vmm.Spec {
		return vmm.Spec{
			Ref: ref, VCPUs: 1, MemoryMiB: 16, Kernel: guestFile(t, code),
			Network: vmm.Network{Mode: "user", MAC: "52:54:00:00:00:01"},
		}
	}
}

func fresh(t *testing.T) *Driver {
	t.Helper()
	d := open(t, longRoot(t), Options{})
	if probeCache == nil {
		if _, err := d.Capabilities(t.Context()); err != nil {
			t.Fatal(err)
		}
		var err error
		if probeCache, err = os.ReadFile(filepath.Join(d.options.Root, "probe.json")); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

func TestConformance(t *testing.T) {
	needQEMU(t)
	vmmtest.Suite(t, vmmtest.Options{
		New:         func(t *testing.T) vmm.Driver { return fresh(t) },
		Reopen:      func(t *testing.T, d vmm.Driver) vmm.Driver { return reopen(t, d.(*Driver)) },
		Spec:        specOf(idleGuest),
		Polite:      specOf(politeGuest),
		Quits:       specOf(quittingGuest),
		Template:    func(t *testing.T, ref vmm.Ref) vmm.Spec { return callSpec(t, ref) },
		ConsoleText: guestText,
		Kill: func(t *testing.T, _ vmm.Driver, s vmm.Status) {
			if err := syscall.Kill(s.Pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		},
		Leftovers: func(t *testing.T, d vmm.Driver) []string { return leftovers(t, d.(*Driver)) },
	})
}

// leftovers are files below the root that are not the driver's own, children
// that were not reaped, and processes whose working directory is below the root.
func leftovers(t *testing.T, d *Driver) []string {
	t.Helper()
	var left []string
	err := filepath.WalkDir(d.options.Root, func(path string, _ fs.DirEntry, err error) error {
		if name, _ := filepath.Rel(d.options.Root, path); err == nil {
			switch name {
			case ".", "vms", "trash", "lock", "probe.json":
			default:
				left = append(left, name)
			}
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Error(err)
	}
	for _, proc := range procs {
		if cwd, err := os.Readlink(proc + "/cwd"); err == nil && strings.HasPrefix(cwd, d.options.Root) {
			left = append(left, "process "+proc+" in "+cwd)
		}
		pid, err := strconv.Atoi(filepath.Base(proc))
		if err != nil {
			continue
		}
		if stat, err := readStat(pid); err == nil && stat.state == 'Z' && stat.parent == os.Getpid() {
			left = append(left, fmt.Sprintf("zombie %d", pid))
		}
	}
	return left
}

var webapp = vmm.Ref{Instance: "webapp-1", Generation: 1}

func start(t *testing.T, d *Driver, spec vmm.Spec) vmm.Status {
	t.Helper()
	if err := d.Start(t.Context(), spec); err != nil {
		t.Fatalf("Start: %v", err)
	}
	return status(t, d)
}

func status(t *testing.T, d *Driver) vmm.Status {
	t.Helper()
	l, err := d.List(t.Context())
	if err != nil || len(l) != 1 {
		t.Fatalf("List: %+v, %v", l, err)
	}
	return l[0]
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	deadline := time.After(vmmtest.Patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("no %s within %s", what, vmmtest.Patience)
		}
	}
}

// What a crash leaves behind between any two steps is shown and can be removed.
func TestCrashPoints(t *testing.T) {
	needQEMU(t)
	write := func(t *testing.T, d *Driver, name, text string) {
		if err := os.WriteFile(filepath.Join(d.dir(webapp), name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name   string
		leave  func(*testing.T, *Driver)
		phase  vmm.Phase
		reason string
	}{
		{"empty directory", func(*testing.T, *Driver) {}, vmm.Prepared, ""},
		{"torn specification", func(t *testing.T, d *Driver) { write(t, d, fileSpec, `{"Ref":`) }, vmm.Prepared, ""},
		{"specification half written", func(t *testing.T, d *Driver) { write(t, d, fileSpec+".tmp", "{") }, vmm.Prepared, ""},
		{"torn mark", func(t *testing.T, d *Driver) { write(t, d, fileStarted, "") }, vmm.Exited, "the start was interrupted"},
		{"marked, not spawned", func(t *testing.T, d *Driver) {
			write(t, d, fileStarted, `{}`)
			write(t, d, fileLog, "")
		}, vmm.Exited, "the start was interrupted"},
		{"machine restarted", func(t *testing.T, d *Driver) {
			write(t, d, fileStarted, `{}`)
			write(t, d, fileProcess, `{"Pid":1,"StartTicks":1,"BootID":"another"}`)
		}, vmm.Exited, "the machine was restarted while it ran"},
		{"pid of somebody else", func(t *testing.T, d *Driver) {
			stat, err := readStat(os.Getpid())
			if err != nil {
				t.Fatal(err)
			}
			write(t, d, fileStarted, `{}`)
			write(t, d, fileProcess, fmt.Sprintf(`{"Pid":%d,"StartTicks":%d,"BootID":%q}`, os.Getpid(), stat.startTicks, d.boot))
		}, vmm.Exited, "process ended"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := fresh(t)
			if err := os.Mkdir(d.dir(webapp), 0o700); err != nil {
				t.Fatal(err)
			}
			c.leave(t, d)
			d = reopen(t, d)
			if s := status(t, d); s.Phase != c.phase || s.ExitReason != c.reason {
				t.Errorf("found as %+v", s)
			}
			if c.phase == vmm.Prepared {
				start(t, d, specOf(idleGuest)(t, webapp))
			}
			if err := d.Remove(t.Context(), webapp); err != nil {
				t.Errorf("Remove: %v", err)
			}
			if left := leftovers(t, d); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

// The daemon died between the fork and writing down the pid.
func TestFoundWithoutPid(t *testing.T) {
	needQEMU(t)
	d := fresh(t)
	before := start(t, d, specOf(idleGuest)(t, webapp))
	if err := os.Remove(filepath.Join(d.dir(webapp), fileProcess)); err != nil {
		t.Fatal(err)
	}
	d = reopen(t, d)
	if after := status(t, d); after.Pid != before.Pid || after.Phase != vmm.Running {
		t.Errorf("before %+v, after %+v", before, after)
	}
	if err := d.Stop(t.Context(), webapp, 0); err != nil {
		t.Errorf("Stop: %v", err)
	}
	if left := status(t, d); left.Phase != vmm.Exited {
		t.Errorf("%+v", left)
	}
}

// A QEMU that hangs (here: is stopped) is listed, and is killed by Stop.
func TestHungProcess(t *testing.T) {
	needQEMU(t)
	d := fresh(t)
	s := start(t, d, specOf(idleGuest)(t, webapp))
	if err := syscall.Kill(s.Pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if s := status(t, d); s.Phase != vmm.Running {
		t.Errorf("hung: %+v", s)
	}
	if err := d.Stop(t.Context(), webapp, 10*time.Millisecond); err != nil {
		t.Errorf("Stop: %v", err)
	}
	if s := status(t, d); s.Phase != vmm.Exited || !strings.Contains(s.ExitReason, "signal 9") {
		t.Errorf("%+v", s)
	}
}

func TestSecondDriverIsKeptOut(t *testing.T) {
	d := open(t, t.TempDir(), Options{})
	if _, err := New(Options{Root: d.options.Root}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("New: %v", err)
	}
}

func TestConsoleLogRotates(t *testing.T) {
	needQEMU(t)
	d := open(t, longRoot(t), Options{ConsoleLogBytes: 2000})
	s := start(t, d, specOf(chattyGuest)(t, webapp))
	eventually(t, "rotated logs", func() bool {
		status(t, d)
		_, err := os.Stat(s.ConsoleLog + ".3")
		return err == nil
	})
	status(t, d)
	if _, err := os.Stat(s.ConsoleLog + ".4"); err == nil {
		t.Error("a fourth log is kept")
	}
	eventually(t, "fresh output", func() bool {
		text, err := os.ReadFile(s.ConsoleLog)
		return err == nil && strings.Contains(string(text), guestText) && text[0] != 0
	})
	_, err := os.Stat(filepath.Join(filepath.Dir(s.ConsoleLog), sockGuest))
	if err != nil {
		t.Error(err)
	}
}

func TestProbeIsCached(t *testing.T) {
	needQEMU(t)
	d := open(t, t.TempDir(), Options{ForceTCG: true})
	first, err := d.Capabilities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if first.Acceleration != "tcg" || first.Why != "emulation was asked for" || first.Version == "" {
		t.Errorf("%+v", first)
	}
	d = reopen(t, d)
	began := time.Now()
	if second, err := d.Capabilities(t.Context()); err != nil || second != first {
		t.Errorf("again: %+v, %v", second, err)
	}
	if took := time.Since(began); took > 20*time.Millisecond {
		t.Logf("the cached answer took %s", took)
	}
	fs, err := filepath.Glob(filepath.Join(d.options.Root, "trash", "*"))
	if err != nil || len(fs) != 0 {
		t.Errorf("the probe left %q, %v", fs, err)
	}
}

func TestMissingQEMU(t *testing.T) {
	d := open(t, t.TempDir(), Options{Binary: "qemu-system-nonesuch"})
	_, err := d.Capabilities(t.Context())
	if err == nil || !strings.Contains(err.Error(), "scripts/setup") {
		t.Errorf("Capabilities: %v", err)
	}
	if err := d.Start(t.Context(), specOf(idleGuest)(t, webapp)); err == nil {
		t.Error("Start succeeded")
	}
	if refs := mustRefs(t, d); len(refs) != 0 {
		t.Errorf("left %v", refs)
	}
}

// A Start that QEMU refuses says why, and what to do.
func TestStartExplains(t *testing.T) {
	needQEMU(t)
	d := fresh(t)
	spec := specOf(idleGuest)(t, webapp)
	spec.Network.Ports = []vmm.Port{{HostIP: "127.0.0.1", GuestPort: 80}}
	spec.Network.Ports = start(t, d, spec).Ports
	for _, c := range []struct {
		spoil func(*vmm.Spec)
		want  string
	}{
		{func(*vmm.Spec) {}, "the host port is taken"},
		{func(s *vmm.Spec) { s.Network.Ports, s.MemoryMiB = nil, maxMemoryMiB }, "the host has not that much memory"},
		{func(s *vmm.Spec) {
			s.Network = vmm.Network{Mode: "none"}
			s.Disks = []vmm.Disk{{Path: s.Kernel, Format: "qcow2"}}
		}, "qcow2"},
	} {
		spec.Ref.Generation++
		bad := spec
		c.spoil(&bad)
		if err := d.Start(t.Context(), bad); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("got %v, want %q", err, c.want)
		}
	}
}
