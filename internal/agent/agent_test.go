package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/converge"
	"github.com/blixard/blixard/internal/guest"
	"github.com/blixard/blixard/internal/vmm"
	"github.com/blixard/blixard/internal/vmm/fake"
)

func TestStartStopRemove(t *testing.T) {
	n := newNode(t, nil)
	ref := n.cluster.place("web", 3, blixard.VMSpec{Publish: []blixard.Port{{GuestPort: 80}}, Env: []blixard.Label{{Key: "A", Value: "b"}}})
	row := n.untilState(ref, blixard.Running)
	if row.Address == "" || len(row.Ports) != 1 || row.Address != row.Ports[0].Address || row.Acceleration != "none" {
		t.Errorf("row %+v", row)
	}
	c := n.guests.of(ref).config
	if c.Hostname != "web-1" || c.Generation != 3 || c.VM != "web" || c.Node != "n1" || c.Address != "10.0.2.15/24" || len(c.Env) != 1 || c.Env[0] != "A=b" {
		t.Errorf("guest configured as %+v", c)
	}
	n.cluster.want(ref, func(r *blixard.Instance) { r.Wanted, r.WantReason = blixard.WantStop, "scaled down" })
	if row = n.untilState(ref, blixard.Stopped); row.Message != "scaled down" {
		t.Errorf("message %q", row.Message)
	}
	if n.phase(ref) != vmm.Exited {
		t.Errorf("it is %q, and its log should be kept", n.phase(ref))
	}
	n.cluster.want(ref, func(r *blixard.Instance) { r.Wanted = blixard.WantRemove })
	n.until("row is gone", func() bool { _, ok := n.cluster.row(ref); return !ok })
	if len(n.found()) != 0 {
		t.Errorf("left over: %+v", n.found())
	}
	n.until("memory is gone", func() bool {
		n.agent.mu.Lock()
		defer n.agent.mu.Unlock()
		return len(n.agent.locals) == 0
	})
	registry := prometheus.NewRegistry()
	registry.MustRegister(n.agent.o.Metrics)
	if families, err := registry.Gather(); err != nil || len(families) < 6 {
		t.Errorf("%d metric families, %v", len(families), err)
	}
}

func TestHypervisorDies(t *testing.T) {
	n := newNode(t, nil)
	ref := n.cluster.place("web", 1, blixard.VMSpec{})
	n.untilState(ref, blixard.Running)
	n.machine.Kill(vmmRef(ref), "QEMU was killed by signal 9 (killed)")
	if row := n.untilState(ref, blixard.Failed); !strings.Contains(row.Message, "signal 9") {
		t.Errorf("message %q", row.Message)
	}
	next := n.cluster.place("web", 2, blixard.VMSpec{})
	n.cluster.want(ref, func(r *blixard.Instance) { r.Wanted = blixard.WantRemove })
	n.untilState(next, blixard.Running)
	n.until("old one is gone", func() bool { return n.phase(ref) == "" })
}

func TestFailuresToStart(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	n := newNode(t, func(o *Options) {
		o.Images = imagesFunc(func(_ context.Context, image string) (Bundle, error) {
			if image != "builtin" {
				return Bundle{}, errors.New("no such bundle")
			}
			return Bundle{Kernel: "/vmlinuz"}, nil
		})
	})
	n.machine.Inject(fake.StartFails, "a-1", 1)
	n.machine.Inject(fake.Dies, "b-1", 1)
	port := taken.Addr().(*net.TCPAddr).Port
	for _, c := range []struct {
		vm, message string
		spec        blixard.VMSpec
	}{
		{"a", "injected fault", blixard.VMSpec{}},
		{"b", "signal 9", blixard.VMSpec{}},
		{"c", "no such bundle", blixard.VMSpec{Image: "sha256:0"}},
		{"d", "is taken", blixard.VMSpec{Publish: []blixard.Port{{HostPort: port, GuestPort: 80}}}},
		{"e", "no bridge network", blixard.VMSpec{Network: "bridge"}},
		{"f", "runs fake, not qemu", blixard.VMSpec{Hypervisor: "qemu"}},
	} {
		ref := n.cluster.place(c.vm, 1, c.spec)
		if row := n.untilState(ref, blixard.Failed); !strings.Contains(row.Message, c.message) {
			t.Errorf("%s: message %q, want %q in it", c.vm, row.Message, c.message)
		}
	}
}

// A guest that never answers is given up.
func TestMuteGuest(t *testing.T) {
	n := newNode(t, func(o *Options) { o.BootTimeout = 200 * time.Millisecond })
	n.guests.mu.Lock()
	n.guests.mute = true
	n.guests.mu.Unlock()
	ref := n.cluster.place("web", 1, blixard.VMSpec{})
	if row := n.untilState(ref, blixard.Failed); !strings.Contains(row.Message, "did not answer in time") {
		t.Errorf("message %q", row.Message)
	}
	if n.phase(ref) != vmm.Exited {
		t.Errorf("it is %q", n.phase(ref))
	}
}

func TestGuestWithoutAgent(t *testing.T) {
	n := newNode(t, func(o *Options) {
		o.Images = imagesFunc(func(context.Context, string) (Bundle, error) { return Bundle{Kernel: "/k", NoGuest: true}, nil })
	})
	ref := n.cluster.place("web", 1, blixard.VMSpec{})
	n.untilState(ref, blixard.Running)
	_, err := n.agent.Exec(t.Context(), "web-1", guest.ExecRequest{Args: []string{"ls"}}, nil, nil, nil, nil)
	if blixard.CodeOf(err) != blixard.CodeRefused {
		t.Errorf("exec: %v", err)
	}
}

func TestWorkloadExit(t *testing.T) {
	n := newNode(t, nil)
	for code, want := range map[int]blixard.InstanceState{0: blixard.Stopped, 3: blixard.Failed} {
		ref := n.cluster.place(fmt.Sprintf("web%d", code), 1, blixard.VMSpec{})
		n.untilState(ref, blixard.Running)
		p := n.guests.of(ref)
		p.mu.Lock()
		p.exit = &code
		p.mu.Unlock()
		row := n.untilState(ref, want)
		if n.phase(ref) != vmm.Exited {
			t.Errorf("%s is %q: %q", ref, n.phase(ref), row.Message)
		}
	}
}

// A command that cannot be started fails its instance before it ever ran.
func TestCommandNotStarted(t *testing.T) {
	n := newNode(t, nil)
	ref := n.cluster.place("web", 1, blixard.VMSpec{Command: []string{"/nosuch"}})
	row := n.untilState(ref, blixard.Failed)
	if want := blixard.CommandNotStarted + " (exit code 126): starting /nosuch: no such file or directory"; row.Message != want {
		t.Errorf("it failed of %q, want %q", row.Message, want)
	}
	n.cluster.mu.Lock()
	seen := slices.Clone(n.cluster.history[ref])
	n.cluster.mu.Unlock()
	if slices.Contains(seen, blixard.Running) {
		t.Errorf("it went through %v", seen)
	}
	if n.phase(ref) != vmm.Exited {
		t.Errorf("%s is %q", ref, n.phase(ref))
	}
}

// A singleton is dead before the lease ends, anything else runs on, and the
// singleton is reported once there is contact again.
func TestFenceOnSilence(t *testing.T) {
	n := newNode(t, longerLease)
	exclusive := n.cluster.place("db", 1, blixard.VMSpec{Singleton: true})
	stateless := n.cluster.place("web", 1, blixard.VMSpec{})
	n.untilState(exclusive, blixard.Running)
	n.untilState(stateless, blixard.Running)
	n.cluster.setCut(true)
	cut := time.Now()
	n.until("the singleton is fenced", func() bool { return n.phase(exclusive) == vmm.Exited })
	if took := time.Since(cut); took > n.options.Lease {
		t.Errorf("fenced after %s; the lease is %s", took, n.options.Lease)
	}
	if n.phase(stateless) != vmm.Running {
		t.Errorf("the stateless one is %q", n.phase(stateless))
	}
	n.until("the lease is over", func() bool { return time.Since(cut) > n.options.Lease })
	late := n.cluster.place("late", 1, blixard.VMSpec{})
	n.until("it was seen and passed over", func() bool { return time.Since(cut) > 2*n.options.Lease })
	if n.phase(late) != "" {
		t.Error("something was started without a lease")
	}
	n.cluster.setCut(false)
	if row := n.untilState(exclusive, blixard.Failed); !strings.Contains(row.Message, "lost touch") {
		t.Errorf("message %q", row.Message)
	}
	n.untilState(late, blixard.Running)
}

// longerLease leaves a busy machine time to kill.
func longerLease(o *Options) { o.Lease = 1500 * time.Millisecond }

// A driver that does not tell what runs does not keep it running.
func TestFenceBlindly(t *testing.T) {
	n := newNode(t, longerLease)
	ref := n.cluster.place("db", 1, blixard.VMSpec{Singleton: true})
	n.untilState(ref, blixard.Running)
	n.machine.Inject(fake.ListFails, "", -1)
	n.cluster.setCut(true)
	cut := time.Now()
	n.until("the singleton is fenced", func() bool {
		n.agent.mu.Lock()
		defer n.agent.mu.Unlock()
		return n.agent.locals[ref].Killed != ""
	})
	if took := time.Since(cut); took > n.options.Lease {
		t.Errorf("fenced after %s; the lease is %s", took, n.options.Lease)
	}
	n.machine.Inject(fake.ListFails, "", 0)
	if n.phase(ref) != vmm.Exited {
		t.Errorf("it is %q", n.phase(ref))
	}
	n.cluster.setCut(false)
	n.untilState(ref, blixard.Failed)
}

// A start that hangs is fenced too.
func TestFenceDuringStart(t *testing.T) {
	n := newNode(t, longerLease)
	n.machine.Inject(fake.Slow, "db-1", 1)
	ref := n.cluster.place("db", 1, blixard.VMSpec{Singleton: true})
	n.until("it is starting", func() bool { return n.phase(ref) == vmm.Running })
	n.cluster.setCut(true)
	cut := time.Now()
	n.until("the singleton is fenced", func() bool { return n.phase(ref) == vmm.Exited })
	if took := time.Since(cut); took > n.options.Lease {
		t.Errorf("fenced after %s; the lease is %s", took, n.options.Lease)
	}
	n.cluster.setCut(false)
	n.untilState(ref, blixard.Failed)
}

// A daemon that comes back touches nothing that runs, also nothing that runs
// under the lease of the former one.
func TestRestartAdopts(t *testing.T) {
	n := newNode(t, func(o *Options) { o.Lease = 5 * time.Second })
	web := n.cluster.place("web", 1, blixard.VMSpec{})
	db := n.cluster.place("db", 1, blixard.VMSpec{Singleton: true})
	n.untilState(web, blixard.Running)
	n.untilState(db, blixard.Running)
	// The lease file is written with the next heartbeat at the latest.
	n.until("the lease is kept", func() bool { r, err := readLease(n.options.DataDir); return err == nil && r.UntilMS > 0 })
	before := n.found()
	n.stop()
	n.machine.Kill(vmm.Ref{Instance: "none", Generation: 1}, "")
	n.start()
	n.until("guests are talked to again", func() bool {
		return n.agent.clientOf(web) != nil && n.agent.clientOf(db) != nil
	})
	after := n.found()
	for i := range before {
		if before[i].Pid != after[i].Pid || after[i].Phase != vmm.Running {
			t.Errorf("before %+v, after %+v", before[i], after[i])
		}
	}
	for _, ref := range []converge.Ref{web, db} {
		if row, _ := n.cluster.row(ref); row.State != blixard.Running {
			t.Errorf("%s is %s", ref, row.State)
		}
	}
}

// A daemon that comes back without a lease ends what needs one, and nothing else.
func TestRestartWithoutLease(t *testing.T) {
	n := newNode(t, nil)
	web := n.cluster.place("web", 1, blixard.VMSpec{})
	db := n.cluster.place("db", 1, blixard.VMSpec{Singleton: true})
	n.untilState(web, blixard.Running)
	n.untilState(db, blixard.Running)
	n.stop()
	n.cluster.setCut(true)
	if err := os.Remove(leasePath(n.options.DataDir)); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	n.start()
	n.until("the singleton is fenced", func() bool { return n.phase(db) == vmm.Exited })
	if n.phase(web) != vmm.Running {
		t.Errorf("the stateless one is %q", n.phase(web))
	}
}

// A machine that was removed and joined again ends what it ran exclusively as
// the former member, although the new one is given leases.
func TestFormerMembersSingletonsEnd(t *testing.T) {
	n := newNode(t, func(o *Options) { o.Membership = "blx/3" })
	web := n.cluster.place("web", 1, blixard.VMSpec{})
	db := n.cluster.place("db", 1, blixard.VMSpec{Singleton: true})
	n.untilState(web, blixard.Running)
	n.untilState(db, blixard.Running)
	n.until("the lease is kept", func() bool { r, err := readLease(n.options.DataDir); return err == nil && r.UntilMS > 0 })
	n.stop()
	n.options.Membership = "blx/7"
	n.start()
	n.until("the singleton is ended", func() bool { return n.phase(db) != vmm.Running })
	if n.phase(web) != vmm.Running {
		t.Errorf("the stateless one is %q", n.phase(web))
	}
}

// TestGuardOutlivesTheDaemon: what works below a guarded directory is watched
// over by the next daemon, too, and ended when that is another member.
func TestGuardOutlivesTheDaemon(t *testing.T) {
	top := t.TempDir()
	left := exec.Command("sleep", "1000")
	left.Dir = filepath.Join(top, "one")
	if err := os.Mkdir(left.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	n := newNode(t, func(o *Options) { o.Membership = "blx/3" })
	n.until("there is a lease", n.agent.MayRun)
	n.agent.Guard(top)
	if err := left.Start(); err != nil {
		t.Fatal(err)
	}
	n.stop()
	n.start()
	n.until("there is a lease again", n.agent.MayRun)
	n.until("it is in the new daemon's record", func() bool {
		r, err := readLease(n.options.DataDir)
		return err == nil && len(r.Under) == 1 && r.Under[0] == top
	})
	if _, err := startTicks(left.Process.Pid); err != nil {
		t.Errorf("what a former daemon has left was killed under a lease: %v", err)
	}
	n.stop()
	n.options.Membership = "blx/7"
	n.start()
	if err := left.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("a former member's process ended with %v", err)
	}
}

func TestOrphansAreRemoved(t *testing.T) {
	n := newNode(t, nil)
	web := n.cluster.place("web", 1, blixard.VMSpec{})
	n.untilState(web, blixard.Running)
	n.stop()
	err := n.machine.Open().Start(t.Context(), vmm.Spec{Ref: vmm.Ref{Instance: "old-1", Generation: 9}, VCPUs: 1, MemoryMiB: 64, Network: vmm.Network{Mode: "user"}})
	if err != nil {
		t.Fatal(err)
	}
	orphan := converge.Ref{Instance: "old-1", Generation: 9}
	n.cluster.setCut(true)
	n.start()
	n.until("some passes went by", func() bool { return n.agent.clientOf(web) != nil })
	if n.phase(orphan) != vmm.Running {
		t.Fatalf("the orphan was touched without contact: %q", n.phase(orphan))
	}
	n.cluster.setCut(false)
	n.until("the orphan is gone", func() bool { return n.phase(orphan) == "" })
	// A row that was lost is an orphan too.
	n.cluster.want(web, func(r *blixard.Instance) { r.State = blixard.Lost })
	n.until("the lost one is gone", func() bool { return n.phase(web) == "" })
}

func TestReportsAreBatched(t *testing.T) {
	n := newNode(t, func(o *Options) { o.Limits.Starts = 50 })
	n.cluster.setCut(true)
	var refs []converge.Ref
	for i := range 50 {
		refs = append(refs, n.cluster.place(fmt.Sprintf("vm%d", i), 1, blixard.VMSpec{}))
	}
	n.cluster.setCut(false)
	for _, ref := range refs {
		n.untilState(ref, blixard.Running)
	}
	n.cluster.mu.Lock()
	reports, items := n.cluster.reports, n.cluster.items
	n.cluster.mu.Unlock()
	if items < 50 || items > 200 || reports >= items {
		t.Errorf("%d reports with %d observations", reports, items)
	}
	// Nothing changes, so nothing is said.
	n.until("some passes", func() bool { n.cluster.mu.Lock(); defer n.cluster.mu.Unlock(); return n.cluster.items == items })
	n.agent.mistrust()
	poke(n.agent.wake)
	n.until("a pass", func() bool { n.agent.mu.Lock(); defer n.agent.mu.Unlock(); return !n.agent.stale })
	n.cluster.mu.Lock()
	defer n.cluster.mu.Unlock()
	if n.cluster.items != items {
		t.Errorf("%d observations more though nothing changed", n.cluster.items-items)
	}
}

func TestReportsAreRepeated(t *testing.T) {
	n := newNode(t, nil)
	ref := n.cluster.place("web", 1, blixard.VMSpec{})
	n.untilState(ref, blixard.Running)
	n.cluster.setCut(true)
	n.machine.Kill(vmmRef(ref), "it died")
	n.until("the report failed", func() bool {
		n.agent.mu.Lock()
		defer n.agent.mu.Unlock()
		l := n.agent.locals[ref]
		return l != nil && l.Sent != nil && l.Sent.State == blixard.Failed
	})
	n.cluster.setCut(false)
	n.untilState(ref, blixard.Failed)
}

func TestHealth(t *testing.T) {
	n := newNode(t, nil)
	ref := n.cluster.place("web", 1, blixard.VMSpec{Health: &blixard.HealthCheck{Kind: "exec", Command: []string{"true"}, IntervalMS: 10, TimeoutMS: 1000, FailureThreshold: 3}})
	health := func(want blixard.Health) func() bool {
		return func() bool { r, _ := n.cluster.row(ref); return r.Health == want }
	}
	n.until("healthy", health(blixard.HealthHealthy))
	set := func(unhealthy bool) {
		p := n.guests.of(ref)
		p.mu.Lock()
		p.unhealthy = unhealthy
		p.mu.Unlock()
	}
	set(true)
	n.until("unhealthy", health(blixard.HealthUnhealthy))
	if row, _ := n.cluster.row(ref); !strings.Contains(row.Message, "3 times") {
		t.Errorf("message %q", row.Message)
	}
	set(false)
	n.until("healthy again", func() bool { r, _ := n.cluster.row(ref); return r.Health == blixard.HealthHealthy && r.Message == "" })
}

func TestVerdict(t *testing.T) {
	began := time.Unix(100, 0)
	v := verdict{check: blixard.HealthCheck{StartPeriodMS: 10_000, FailureThreshold: 2}, began: began}
	bad := errors.New("refused")
	for _, c := range []struct {
		afterS int
		err    error
		want   blixard.Health
	}{
		{1, bad, blixard.HealthUnknown},
		{9, bad, blixard.HealthUnknown},
		{11, bad, blixard.HealthUnknown},
		{12, errUnknown, blixard.HealthUnknown},
		{13, bad, blixard.HealthUnhealthy},
		{14, nil, blixard.HealthHealthy},
		{15, bad, blixard.HealthHealthy},
		{16, nil, blixard.HealthHealthy},
		{17, bad, blixard.HealthHealthy},
		{18, bad, blixard.HealthUnhealthy},
	} {
		v.take(c.err, began.Add(time.Duration(c.afterS)*time.Second))
		if v.health != c.want {
			t.Errorf("after %d s: %q, want %q", c.afterS, v.health, c.want)
		}
	}
}

func TestPauseAndClock(t *testing.T) {
	n := newNode(t, nil)
	ref := n.cluster.place("web", 1, blixard.VMSpec{})
	n.untilState(ref, blixard.Running)
	n.cluster.want(ref, func(r *blixard.Instance) { r.Paused = true })
	n.until("paused", func() bool { r, _ := n.cluster.row(ref); return r.StatePaused })
	p := n.guests.of(ref)
	p.mu.Lock()
	p.clock = -time.Hour
	p.mu.Unlock()
	n.cluster.want(ref, func(r *blixard.Instance) { r.Paused = false })
	n.until("resumed", func() bool { r, _ := n.cluster.row(ref); return !r.StatePaused })
	n.until("clock is set", func() bool { p.mu.Lock(); defer p.mu.Unlock(); return p.set > 0 })
}

func TestExec(t *testing.T) {
	n := newNode(t, nil)
	if _, err := n.agent.Exec(t.Context(), "web-1", guest.ExecRequest{}, nil, nil, nil, nil); blixard.CodeOf(err) != blixard.CodeNotFound {
		t.Errorf("exec of nothing: %v", err)
	}
	ref := n.cluster.place("web", 1, blixard.VMSpec{})
	n.untilState(ref, blixard.Running)
	var out bytes.Buffer
	code, err := n.agent.Exec(t.Context(), "web-1", guest.ExecRequest{Args: []string{"ls"}}, nil, &out, nil, nil)
	if err != nil || code != 7 || out.String() != "ran [ls]\n" {
		t.Errorf("code %d, %v, output %q", code, err, out.String())
	}
}

func TestNodeReport(t *testing.T) {
	n := newNode(t, func(o *Options) { o.Release, o.Reserved.MemoryMiB = "1.2.3", 100 })
	n.until("the node is reported", func() bool { n.cluster.mu.Lock(); defer n.cluster.mu.Unlock(); return len(n.cluster.node) > 0 })
	r := n.cluster.node[0]
	if r.Capacity.MilliCPU < 1000 || r.Capacity.MemoryMiB < 100 || r.Capacity.DiskMiB < 1 || r.Release != "1.2.3" || r.Reserved.MemoryMiB != 100 || len(r.Hypervisors) != 1 {
		t.Errorf("%+v", r)
	}
}

// A machine keeps memory for itself, unless it is said how much it offers.
func TestReservedByDefault(t *testing.T) {
	for machine, want := range map[int64]int64{1024: 256, 4096: 512, 16 << 10: 819, 64 << 10: 3276, 512 << 10: 8192} {
		if got := DefaultReservedMiB(machine); got != want {
			t.Errorf("of %d MiB it keeps %d, want %d", machine, got, want)
		}
	}
	report := func(edit func(*Options)) NodeReport {
		n := newNode(t, edit)
		n.until("the node is reported", func() bool { n.cluster.mu.Lock(); defer n.cluster.mu.Unlock(); return len(n.cluster.node) > 0 })
		return n.cluster.node[0]
	}
	if r := report(func(o *Options) { o.Reserved.MemoryMiB = -1 }); r.Reserved.MemoryMiB != DefaultReservedMiB(r.Capacity.MemoryMiB) {
		t.Errorf("by default: %+v", r)
	}
	offered := &blixard.Resources{MemoryMiB: 4096}
	if r := report(func(o *Options) { o.Reserved.MemoryMiB, o.Capacity = -1, offered }); r.Reserved.MemoryMiB != 0 || r.Capacity.MemoryMiB != 4096 {
		t.Errorf("with a capacity: %+v", r)
	}
}

// Many things go wrong at random; afterwards all is as wanted and nothing is
// left over.
func TestFaultsConverge(t *testing.T) {
	n := newNode(t, nil)
	for _, f := range []fake.Fault{fake.StartFails, fake.Dies, fake.RemoveFails, fake.ListFails, fake.StartCrashes} {
		n.machine.Inject(f, "", 2)
	}
	var kept, gone []converge.Ref
	for i := range 12 {
		ref := n.cluster.place(fmt.Sprintf("vm%d", i), 1, blixard.VMSpec{Singleton: i%3 == 0, StopGraceMS: 50})
		if i%2 == 0 {
			gone = append(gone, ref)
		} else {
			kept = append(kept, ref)
		}
	}
	n.stop()
	n.start()
	for _, ref := range gone {
		n.cluster.want(ref, func(r *blixard.Instance) { r.Wanted = blixard.WantRemove })
	}
	n.stop()
	n.start()
	for _, ref := range kept {
		n.until(ref.String()+" has come to something", func() bool {
			r, _ := n.cluster.row(ref)
			return r.State == blixard.Running || r.State.Terminal()
		})
	}
	for _, ref := range gone {
		n.until(ref.String()+" is gone", func() bool { _, ok := n.cluster.row(ref); return !ok && n.phase(ref) == "" })
	}
	for _, ref := range kept {
		row, _ := n.cluster.row(ref)
		if alive := n.phase(ref) == vmm.Running; alive != (row.State == blixard.Running) {
			t.Errorf("%s is %s and %q", ref, row.State, n.phase(ref))
		}
	}
}

// The watchdog kills what the daemon can no longer kill, and spares what only
// looks like it.
func TestWatchdog(t *testing.T) {
	victim, spared := exec.Command("sleep", "1000"), exec.Command("sleep", "1000")
	hidden := exec.Command("sleep", "1000")
	hidden.Dir = t.TempDir()
	below, beside := exec.Command("sleep", "1000"), exec.Command("sleep", "1000")
	top := filepath.Join(t.TempDir(), "functions")
	below.Dir, beside.Dir = filepath.Join(top, "one"), top+"-not"
	for _, dir := range []string{below.Dir, beside.Dir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []*exec.Cmd{victim, spared, hidden, below, beside} {
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
	}
	defer func() {
		for _, c := range []*exec.Cmd{spared, beside} {
			if err := c.Process.Kill(); err != nil {
				t.Error(err) // another process was killed
			}
			c.Wait() // it was killed
		}
	}()
	ticks, err := startTicks(victim.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	other, err := startTicks(spared.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	n := newNode(t, nil)
	n.stop()
	now := bootTime().Milliseconds()
	record := fmt.Sprintf(`{"boot_id":%q,"until_ms":%d,"kill_ms":%d,"targets":[{"pid":%d,"start_ticks":%d},{"pid":%d,"start_ticks":%d}],"pending":[%q],"under":[%q]}`,
		bootID(), now+2000, now+1000, victim.Process.Pid, ticks, spared.Process.Pid, other+1, hidden.Dir, top)
	if err := replaceFile(leasePath(n.options.DataDir), []byte(record)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Watchdog(ctx, n.options.DataDir) }()
	for _, c := range []*exec.Cmd{victim, hidden, below} {
		if err := c.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Errorf("%v", err)
		}
	}
	if late := bootTime().Milliseconds() - now; late < 1000 || late > 2000 {
		t.Errorf("killed after %d ms of a lease of 2,000 ms", late)
	}
	for _, c := range []*exec.Cmd{spared, beside} {
		if _, err := startTicks(c.Process.Pid); err != nil {
			t.Errorf("another process was killed: %v", err)
		}
	}
	// A second watchdog leaves at once; the first with its work.
	if err := Watchdog(ctx, n.options.DataDir); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
