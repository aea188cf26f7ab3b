// Package vmmtest is the conformance suite of the port vmm. Every adapter
// passes it, the fake included; else what is tested with the fake is a fairy
// tale.
package vmmtest

import (
	"errors"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/blixard/blixard/internal/vmm"
)

// Patience bounds every single step of the suite.
const Patience = 30 * time.Second

// Options tell the suite about an adapter. New, Reopen, Spec and Kill are
// required.
type Options struct {
	// New opens a driver on an empty root; it is closed, and what runs is
	// removed, when the test ends.
	New func(t *testing.T) vmm.Driver
	// Reopen ends the driver without ceremony, as a dying daemon would, and
	// opens another on the same root.
	Reopen func(t *testing.T, d vmm.Driver) vmm.Driver
	// Spec is a guest that runs until it is stopped, with a network of mode
	// user and no published ports.
	Spec func(t *testing.T, ref vmm.Ref) vmm.Spec
	// Kill ends the hypervisor process of a running incarnation, as a crash
	// would.
	Kill func(t *testing.T, d vmm.Driver, status vmm.Status)
	// Polite is a guest that shuts down when it is asked to; nil if there is
	// none.
	Polite func(t *testing.T, ref vmm.Ref) vmm.Spec
	// Quits is a guest that shuts down by itself; nil if there is none.
	Quits func(t *testing.T, ref vmm.Ref) vmm.Spec
	// Template is a guest that can be saved, for a driver that is a vmm.Cloner; nil
	// if it is none. On its call port it takes lines: "set <text>" is answered "ok",
	// "get" with the text that was set last, first "".
	Template func(t *testing.T, ref vmm.Ref) vmm.Spec
	// ConsoleText is what the guest of Spec writes to its console; "" leaves
	// consoles out.
	ConsoleText string
	// Leftovers names what the adapter holds on this machine (processes, files,
	// sockets, listeners) when no incarnation is left; nil leaves that out.
	Leftovers func(t *testing.T, d vmm.Driver) []string
}

// Suite checks the contract of vmm.Driver.
func Suite(t *testing.T, o Options) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, Options)
	}{
		{"Capabilities", capabilities},
		{"Life", life},
		{"StartsOnce", startsOnce},
		{"StartsOnceAcrossReopen", startsOnceAcrossReopen},
		{"Idempotence", idempotence},
		{"Unknown", unknown},
		{"HostileNames", hostileNames},
		{"InvalidSpecs", invalidSpecs},
		{"ListOrder", listOrder},
		{"Pause", pause},
		{"PublishedPorts", publishedPorts},
		{"PortConflict", portConflict},
		{"Crash", crash},
		{"CrashWhileClosed", crashWhileClosed},
		{"Adoption", adoption},
		{"RemoveRunning", removeRunning},
		{"GracefulStop", gracefulStop},
		{"GuestShutsDown", guestShutsDown},
		{"Console", console},
		{"CanceledStart", canceledStart},
		{"Clones", clones},
		{"ClonesAcrossReopen", clonesAcrossReopen},
		{"TemplatesTravel", templatesTravel},
		{"WrongClones", wrongClones},
		{"WrongSnapshots", wrongSnapshots},
		{"AbandonedTemplate", abandonedTemplate},
		{"CanceledClone", canceledClone},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, o) })
	}
}

var webapp = vmm.Ref{Instance: "webapp-1", Generation: 1}

func capabilities(t *testing.T, o Options) {
	d := o.New(t)
	c, err := d.Capabilities(context(t))
	check(t, err, "Capabilities")
	if c.Driver == "" || c.Version == "" || c.Acceleration == "" {
		t.Errorf("capabilities are incomplete: %+v", c)
	}
	if c.Acceleration != "kvm" && c.Why == "" {
		t.Errorf("no reason for acceleration %q", c.Acceleration)
	}
	_, pauses := d.(vmm.Pauser)
	if c.Pause != pauses {
		t.Errorf("Pause is %t, being a Pauser %t", c.Pause, pauses)
	}
	_, clones := d.(vmm.Cloner)
	if c.Snapshot != clones {
		t.Errorf("Snapshot is %t, being a Cloner %t", c.Snapshot, clones)
	}
}

func life(t *testing.T, o Options) {
	d := o.New(t)
	if l := list(t, d); len(l) != 0 {
		t.Fatalf("an empty driver lists %+v", l)
	}
	before := time.Now().Add(-time.Minute)
	spec := o.Spec(t, webapp)
	spec.Labels = []string{"vm=webapp", "tier=a,b c"}
	start(t, d, spec)
	s := one(t, d)
	if s.Ref != webapp || s.Phase != vmm.Running || s.Pid == 0 || s.ExitReason != "" {
		t.Errorf("running: %+v", s)
	}
	if s.StartedAt.IsZero() || (o.ConsoleText != "" && s.StartedAt.Before(before)) {
		t.Errorf("started at %s", s.StartedAt)
	}
	if strings.Join(s.Labels, "|") != "vm=webapp|tier=a,b c" {
		t.Errorf("labels %q", s.Labels)
	}
	check(t, d.Stop(context(t), webapp, 0), "Stop")
	s = one(t, d)
	if s.Phase != vmm.Exited || s.Pid != 0 || s.ExitReason == "" || s.StartedAt.IsZero() {
		t.Errorf("stopped: %+v", s)
	}
	check(t, d.Remove(context(t), webapp), "Remove")
	nothingLeft(t, o, d)
}

func startsOnce(t *testing.T, o Options) {
	d := o.New(t)
	spec := o.Spec(t, webapp)
	start(t, d, spec)
	pid := one(t, d).Pid
	wantError(t, d.Start(context(t), spec), vmm.ErrStarted)
	if s := one(t, d); s.Phase != vmm.Running || s.Pid != pid {
		t.Errorf("a second Start changed it to %+v", s)
	}
	check(t, d.Stop(context(t), webapp, 0), "Stop")
	wantError(t, d.Start(context(t), spec), vmm.ErrStarted)
	if s := one(t, d); s.Phase != vmm.Exited {
		t.Errorf("a Start after the end made it %+v", s)
	}
	spec.Ref.Generation++
	start(t, d, spec)
}

func startsOnceAcrossReopen(t *testing.T, o Options) {
	d := o.New(t)
	spec := o.Spec(t, webapp)
	start(t, d, spec)
	check(t, d.Stop(context(t), webapp, 0), "Stop")
	d = o.Reopen(t, d)
	wantError(t, d.Start(context(t), spec), vmm.ErrStarted)
	if s := one(t, d); s.Phase != vmm.Exited || s.ExitReason == "" {
		t.Errorf("after reopening: %+v", s)
	}
}

func idempotence(t *testing.T, o Options) {
	d := o.New(t)
	start(t, d, o.Spec(t, webapp))
	for range 2 {
		check(t, d.Stop(context(t), webapp, 0), "Stop")
	}
	reason := one(t, d).ExitReason
	check(t, d.Stop(context(t), webapp, time.Second), "Stop with grace")
	if now := one(t, d).ExitReason; now != reason {
		t.Errorf("stopping again changed the reason from %q to %q", reason, now)
	}
	for range 2 {
		check(t, d.Remove(context(t), webapp), "Remove")
	}
	nothingLeft(t, o, d)
}

func unknown(t *testing.T, o Options) {
	d := o.New(t)
	wantError(t, d.Stop(context(t), webapp, 0), vmm.ErrNotFound)
	check(t, d.Remove(context(t), webapp), "Remove")
	if p, ok := d.(vmm.Pauser); ok {
		wantError(t, p.Pause(context(t), webapp), vmm.ErrNotFound)
		wantError(t, p.Resume(context(t), webapp), vmm.ErrNotFound)
	}
	if c, ok := d.(vmm.Channels); ok {
		_, err := c.DialGuest(context(t), webapp)
		wantError(t, err, vmm.ErrNotFound)
		_, err = c.DialConsole(context(t), webapp)
		wantError(t, err, vmm.ErrNotFound)
	}
	start(t, d, o.Spec(t, webapp))
	check(t, d.Stop(context(t), webapp, 0), "Stop")
	if p, ok := d.(vmm.Pauser); ok {
		wantError(t, p.Pause(context(t), webapp), vmm.ErrNotRunning)
	}
	if c, ok := d.(vmm.Channels); ok {
		_, err := c.DialGuest(context(t), webapp)
		wantError(t, err, vmm.ErrNotRunning)
	}
}

func hostileNames(t *testing.T, o Options) {
	d := o.New(t)
	for _, name := range []string{
		"", ".", "..", "../evil", "a/b", "/etc", "a b", "A", "-a", "a-", "a.b", "a\x00b", "a\nb", "$(reboot)", "a,b", "ä",
		strings.Repeat("a", 64),
	} {
		ref := vmm.Ref{Instance: name, Generation: 1}
		spec := o.Spec(t, webapp)
		spec.Ref = ref
		wantError(t, d.Start(context(t), spec), vmm.ErrInvalid)
		wantError(t, d.Stop(context(t), ref, 0), vmm.ErrInvalid)
		wantError(t, d.Remove(context(t), ref), vmm.ErrInvalid)
		if p, ok := d.(vmm.Pauser); ok {
			wantError(t, p.Pause(context(t), ref), vmm.ErrInvalid)
		}
		if c, ok := d.(vmm.Channels); ok {
			_, err := c.DialGuest(context(t), ref)
			wantError(t, err, vmm.ErrInvalid)
		}
	}
	nothingLeft(t, o, d)
}

func invalidSpecs(t *testing.T, o Options) {
	d := o.New(t)
	for name, spoil := range map[string]func(*vmm.Spec){
		"no vcpus":        func(s *vmm.Spec) { s.VCPUs = 0 },
		"negative vcpus":  func(s *vmm.Spec) { s.VCPUs = -1 },
		"no memory":       func(s *vmm.Spec) { s.MemoryMiB = 0 },
		"unknown network": func(s *vmm.Spec) { s.Network.Mode = "carrier-pigeon" },
		"host port": func(s *vmm.Spec) {
			s.Network = vmm.Network{Mode: "user", Ports: []vmm.Port{{HostPort: 65536, GuestPort: 80}}}
		},
		"guest port": func(s *vmm.Spec) { s.Network = vmm.Network{Mode: "user", Ports: []vmm.Port{{GuestPort: 0}}} },
	} {
		spec := o.Spec(t, webapp)
		spoil(&spec)
		if err := d.Start(context(t), spec); !errors.Is(err, vmm.ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", name, err)
		}
	}
	nothingLeft(t, o, d)
}

func listOrder(t *testing.T, o Options) {
	d := o.New(t)
	for _, ref := range []vmm.Ref{{Instance: "b", Generation: 1}, {Instance: "a", Generation: 10}, {Instance: "a", Generation: 9}} {
		start(t, d, o.Spec(t, ref))
	}
	var got []string
	for _, s := range list(t, d) {
		got = append(got, s.Ref.String())
	}
	if strings.Join(got, " ") != "a.9 a.10 b.1" {
		t.Errorf("listed as %v", got)
	}
}

func pause(t *testing.T, o Options) {
	d := o.New(t)
	p, ok := d.(vmm.Pauser)
	if !ok {
		return // told by Capabilities, which has its own test
	}
	start(t, d, o.Spec(t, webapp))
	for range 2 {
		check(t, p.Pause(context(t), webapp), "Pause")
		if s := one(t, d); s.Phase != vmm.Paused || s.Pid == 0 {
			t.Errorf("paused: %+v", s)
		}
	}
	d = o.Reopen(t, d)
	p = d.(vmm.Pauser)
	if s := one(t, d); s.Phase != vmm.Paused {
		t.Errorf("paused, after reopening: %+v", s)
	}
	for range 2 {
		check(t, p.Resume(context(t), webapp), "Resume")
		if s := one(t, d); s.Phase != vmm.Running {
			t.Errorf("resumed: %+v", s)
		}
	}
	check(t, p.Pause(context(t), webapp), "Pause")
	check(t, d.Stop(context(t), webapp, 0), "Stop of a paused one")
}

func publishedPorts(t *testing.T, o Options) {
	d := o.New(t)
	wanted := []vmm.Port{
		{Protocol: "tcp", HostIP: "127.0.0.1", GuestPort: 80},
		{Protocol: "tcp", HostIP: "127.0.0.1", GuestPort: 80},
		{Protocol: "udp", HostIP: "127.0.0.1", GuestPort: 53},
		{Protocol: "tcp", GuestPort: 443},
	}
	spec := o.Spec(t, webapp)
	spec.Network = vmm.Network{Mode: "user", Ports: wanted}
	start(t, d, spec)
	ports := one(t, d).Ports
	seen := map[string]bool{}
	for i, p := range ports {
		key := p.Protocol + strconv.Itoa(p.HostPort)
		if p.HostPort == 0 || seen[key] {
			t.Errorf("port %d: host port %d", i, p.HostPort)
		}
		seen[key] = true
		p.HostPort = 0
		if p != wanted[i] {
			t.Errorf("port %d is %+v, want %+v", i, p, wanted[i])
		}
	}
	if len(ports) != len(wanted) {
		t.Fatalf("%d ports, want %d", len(ports), len(wanted))
	}
	d = o.Reopen(t, d)
	for i, p := range one(t, d).Ports {
		if p != ports[i] {
			t.Errorf("after reopening port %d is %+v, was %+v", i, p, ports[i])
		}
	}
	check(t, d.Remove(context(t), webapp), "Remove")
	// A freed port can be had again, now by number.
	spec.Ref.Generation++
	spec.Network.Ports = ports[:1]
	start(t, d, spec)
	if got := one(t, d).Ports; len(got) != 1 || got[0] != ports[0] {
		t.Errorf("asked for %+v, got %+v", ports[0], got)
	}
	check(t, d.Remove(context(t), spec.Ref), "Remove")
	nothingLeft(t, o, d)
}

func portConflict(t *testing.T, o Options) {
	d := o.New(t)
	first := o.Spec(t, webapp)
	first.Network = vmm.Network{Mode: "user", Ports: []vmm.Port{{Protocol: "tcp", HostIP: "127.0.0.1", GuestPort: 80}}}
	start(t, d, first)
	second := o.Spec(t, vmm.Ref{Instance: "webapp-2", Generation: 1})
	second.Network = vmm.Network{Mode: "user", Ports: one(t, d).Ports}
	if d.Start(context(t), second) == nil {
		t.Fatal("two VMs were given one port")
	}
	l := list(t, d)
	if len(l) != 2 || l[0].Phase != vmm.Running || l[1].Phase != vmm.Exited || l[1].ExitReason == "" {
		t.Errorf("after the conflict: %+v", l)
	}
	wantError(t, d.Start(context(t), second), vmm.ErrStarted)
}

func crash(t *testing.T, o Options) {
	d := o.New(t)
	start(t, d, o.Spec(t, webapp))
	var changes <-chan struct{}
	if w, ok := d.(vmm.Watcher); ok {
		changes = w.Changes()
	}
	o.Kill(t, d, one(t, d))
	if changes != nil {
		select {
		case <-changes:
		case <-time.After(Patience):
			t.Error("the watcher did not tell of the crash")
		}
	}
	s := exited(t, d)
	if !strings.Contains(s.ExitReason, "signal 9") {
		t.Errorf("killed, but the reason is %q", s.ExitReason)
	}
	wantError(t, d.Start(context(t), o.Spec(t, webapp)), vmm.ErrStarted)
	check(t, d.Remove(context(t), webapp), "Remove")
	nothingLeft(t, o, d)
}

func crashWhileClosed(t *testing.T, o Options) {
	d := o.New(t)
	start(t, d, o.Spec(t, webapp))
	d = o.Reopen(t, d)
	o.Kill(t, d, one(t, d))
	d = o.Reopen(t, d)
	if s := exited(t, d); s.ExitReason == "" {
		t.Errorf("no reason: %+v", s)
	}
	check(t, d.Remove(context(t), webapp), "Remove")
	nothingLeft(t, o, d)
}

func adoption(t *testing.T, o Options) {
	d := o.New(t)
	spec := o.Spec(t, webapp)
	spec.Labels = []string{"vm=webapp"}
	start(t, d, spec)
	before := one(t, d)
	d = o.Reopen(t, d)
	after := one(t, d)
	if after.Pid != before.Pid || after.Phase != vmm.Running || !after.StartedAt.Equal(before.StartedAt) ||
		strings.Join(after.Labels, "|") != "vm=webapp" {
		t.Errorf("before reopening %+v, after %+v", before, after)
	}
	wantError(t, d.Start(context(t), spec), vmm.ErrStarted)
	check(t, d.Stop(context(t), webapp, 0), "Stop")
	exited(t, d)
	check(t, d.Remove(context(t), webapp), "Remove")
	nothingLeft(t, o, d)
}

func removeRunning(t *testing.T, o Options) {
	d := o.New(t)
	start(t, d, o.Spec(t, webapp))
	check(t, d.Remove(context(t), webapp), "Remove")
	nothingLeft(t, o, d)
}

func gracefulStop(t *testing.T, o Options) {
	if o.Polite == nil {
		return
	}
	d := o.New(t)
	start(t, d, o.Polite(t, webapp))
	if o.ConsoleText != "" {
		awaitConsole(t, one(t, d).ConsoleLog, o.ConsoleText)
	}
	began := time.Now()
	check(t, d.Stop(context(t), webapp, Patience), "Stop")
	if s := one(t, d); s.Phase != vmm.Exited || !strings.Contains(s.ExitReason, "guest shut down") {
		t.Errorf("after %s: %+v", time.Since(began), s)
	}
}

func guestShutsDown(t *testing.T, o Options) {
	if o.Quits == nil {
		return
	}
	d := o.New(t)
	// It may be gone before Start has talked to the hypervisor; Start may tell.
	if err := d.Start(context(t), o.Quits(t, webapp)); err != nil {
		t.Logf("Start: %v", err)
	}
	if s := exited(t, d); !strings.Contains(s.ExitReason, "guest shut down") {
		t.Errorf("%+v", s)
	}
}

func console(t *testing.T, o Options) {
	d := o.New(t)
	channels, ok := d.(vmm.Channels)
	if o.ConsoleText == "" || !ok {
		return
	}
	start(t, d, o.Spec(t, webapp))
	awaitConsole(t, one(t, d).ConsoleLog, o.ConsoleText)
	conn, err := channels.DialConsole(context(t), webapp)
	check(t, err, "DialConsole")
	guest, err := channels.DialGuest(context(t), webapp)
	check(t, err, "DialGuest")
	check(t, d.Stop(context(t), webapp, 0), "Stop")
	for _, c := range []io.ReadCloser{conn, guest} { // both end with the VM
		if _, err := io.Copy(io.Discard, c); err != nil {
			t.Logf("reading to the end: %v", err)
		}
		check(t, c.Close(), "closing")
	}
}

func canceledStart(t *testing.T, o Options) {
	d := o.New(t)
	ctx, cancel := contextWithCancel(t)
	cancel()
	if d.Start(ctx, o.Spec(t, webapp)) == nil {
		t.Fatal("Start succeeded without a context")
	}
	for _, s := range list(t, d) {
		if s.Phase == vmm.Running || s.Phase == vmm.Paused {
			t.Errorf("it runs unnoticed: %+v", s)
		}
	}
	check(t, d.Remove(context(t), webapp), "Remove")
	nothingLeft(t, o, d)
}

func awaitConsole(t *testing.T, path, want string) {
	t.Helper()
	eventually(t, "console output", func() bool {
		text, err := os.ReadFile(path)
		return err == nil && strings.Contains(string(text), want)
	})
}
