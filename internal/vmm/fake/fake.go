// Package fake is a hypervisor in memory for tests, simulated nodes and the
// simulator. It keeps the contract of the port vmm, is deterministic, starts no
// goroutine and reads no clock but the one it is given.
//
// A Machine stands for what survives the daemon: the disk and the processes. A
// Driver stands for the daemon's part; any number may be opened on a Machine,
// one after the other. Everything is guarded by the Machine's lock; calls out
// (Sleep, Guest, Console) are made without it.
package fake

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/blixard/blixard/internal/vmm"
)

// Fault is something that can be made to go wrong, by name.
type Fault string

const (
	// StartFails: Start marks the incarnation and returns an error.
	StartFails Fault = "start fails"
	// StartCrashes: as StartFails, with the daemon dead before the mark: the
	// incarnation stays Prepared.
	StartCrashes Fault = "start crashes"
	// Dies: Start succeeds and the process is gone at once.
	Dies Fault = "dies"
	// StopHangs: Stop waits until its context ends, the VM runs on.
	StopHangs Fault = "stop hangs"
	// Deaf: the guest ignores a polite request; Stop uses up the grace.
	Deaf Fault = "deaf"
	// RemoveFails: Remove returns an error and removes nothing.
	RemoveFails Fault = "remove fails"
	// ListFails: List returns an error.
	ListFails Fault = "list fails"
	// Slow: Start takes SlowFor longer.
	Slow Fault = "slow"
	// CloneFails: Clone marks the incarnation and returns an error.
	CloneFails Fault = "clone fails"
	// SnapshotFails: Snapshot ends the incarnation, leaves no template and returns
	// an error.
	SnapshotFails Fault = "snapshot fails"
)

// ErrInjected is what an injected fault returns.
var ErrInjected = errors.New("injected fault")

// Options of a Machine. All fields are optional.
type Options struct {
	// Now tells the time; a fixed instant by default.
	Now func() time.Time
	// Sleep passes time, until the context ends; returning at once by default.
	Sleep func(context.Context, time.Duration) error
	// SlowFor is what the fault Slow adds; 5 s by default.
	SlowFor time.Duration
	// Guest gets the guest's end of every DialGuest. It must not block: whoever
	// wants to serve starts a goroutine and ends it when the pipe closes.
	Guest func(spec vmm.Spec, channel net.Conn)
	// Console likewise gets the guest's end of every DialConsole.
	Console func(spec vmm.Spec, console net.Conn)
	// Call gets the guest's end of every DialCall, and the guest's memory, which a
	// template keeps and clones get a copy of. It must not block, as Guest. For a
	// clone it is called by the first Resume, so that no guest answers before.
	Call func(spec vmm.Spec, memory *Memory, port net.Conn)
	// TemplateKey of the machine; "fake" by default.
	TemplateKey string
	// Capabilities replaces what is told by default.
	Capabilities *vmm.Capabilities
}

// Machine is the world a Driver acts on.
type Machine struct {
	options Options

	mu      sync.Mutex
	vms     map[vmm.Ref]*incarnation
	faults  map[faultKey]int
	nextPid int
	next    int // host port
	changes chan struct{}
}

type faultKey struct {
	fault    Fault
	instance string
}

type incarnation struct {
	spec   vmm.Spec
	status vmm.Status
	pipes  []net.Conn
	memory *Memory
	call   *callPort // of a clone that was not resumed, or not dialled yet
}

const firstHostPort, lastHostPort = 40_000, 59_999

// NewMachine makes an empty machine.
func NewMachine(options Options) *Machine {
	if options.Now == nil {
		options.Now = func() time.Time { return time.Unix(1_000_000_000, 0) }
	}
	if options.Sleep == nil {
		options.Sleep = func(ctx context.Context, _ time.Duration) error { return ctx.Err() }
	}
	options.SlowFor = cmp.Or(options.SlowFor, 5*time.Second)
	options.TemplateKey = cmp.Or(options.TemplateKey, "fake")
	return &Machine{
		options: options, vms: map[vmm.Ref]*incarnation{}, faults: map[faultKey]int{},
		nextPid: 1000, next: firstHostPort, changes: make(chan struct{}, 1),
	}
}

// Open is a daemon's driver on the machine.
func (m *Machine) Open() *Driver { return &Driver{m} }

// Inject makes a fault happen the next times that it can for an instance;
// instance "" is any. A negative number of times is for ever, 0 takes it back.
func (m *Machine) Inject(fault Fault, instance string, times int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.faults[faultKey{fault, instance}] = times
}

// Kill ends the hypervisor process of ref, as a crash would; false when it does
// not run.
func (m *Machine) Kill(ref vmm.Ref, reason string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	vm := m.vms[ref]
	if vm == nil || !vm.alive() {
		return false
	}
	m.end(vm, reason)
	return true
}

// Restart is a loss of power: what ran has exited, what is on disk stays.
func (m *Machine) Restart() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, vm := range m.sorted() {
		if vm.alive() {
			m.end(vm, "the machine was restarted while it ran")
		}
	}
}

func (m *Machine) sorted() []*incarnation {
	vms := make([]*incarnation, 0, len(m.vms))
	for _, vm := range m.vms { //order:any sorted below
		vms = append(vms, vm)
	}
	slices.SortFunc(vms, func(a, b *incarnation) int { return a.spec.Ref.Compare(b.spec.Ref) })
	return vms
}

func (m *Machine) end(vm *incarnation, reason string) {
	vm.status.Phase, vm.status.Pid, vm.status.ExitReason = vmm.Exited, 0, reason
	for _, pipe := range vm.pipes {
		_ = pipe.Close() // closing a pipe cannot fail
	}
	vm.pipes, vm.call = nil, nil
	select {
	case m.changes <- struct{}{}:
	default:
	}
}

// strikes tells whether the fault happens now, and uses it up.
func (m *Machine) strikes(fault Fault, instance string) bool {
	for _, key := range []faultKey{{fault, instance}, {fault, ""}} {
		if left := m.faults[key]; left != 0 {
			if left > 0 {
				m.faults[key] = left - 1
			}
			return true
		}
	}
	return false
}

func (vm *incarnation) alive() bool {
	return vm.status.Phase == vmm.Running || vm.status.Phase == vmm.Paused
}

// Driver implements vmm.Driver, vmm.Cloner, vmm.Channels, vmm.Meter and
// vmm.Watcher.
type Driver struct{ m *Machine }

var (
	_ vmm.Driver   = (*Driver)(nil)
	_ vmm.Cloner   = (*Driver)(nil)
	_ vmm.Meter    = (*Driver)(nil)
	_ vmm.Channels = (*Driver)(nil)
	_ vmm.Watcher  = (*Driver)(nil)
)

// Close does nothing; it is there so that all drivers close alike.
func (d *Driver) Close() error { return nil }

// Changes implements vmm.Watcher.
func (d *Driver) Changes() <-chan struct{} { return d.m.changes }

// Capabilities implements vmm.Driver.
func (d *Driver) Capabilities(ctx context.Context) (vmm.Capabilities, error) {
	if d.m.options.Capabilities != nil {
		return *d.m.options.Capabilities, ctx.Err()
	}
	return vmm.Capabilities{
		Driver: "fake", Version: "1", Acceleration: "none", Why: "nothing is really run",
		Pause: true, GuestChannel: d.m.options.Guest != nil, TapNetworking: true, Snapshot: true,
	}, ctx.Err()
}

// Start implements vmm.Driver.
func (d *Driver) Start(ctx context.Context, spec vmm.Spec) error {
	if err := check(spec); err != nil {
		return err
	}
	if err := d.checkFirst(spec.Ref); err != nil {
		return err
	}
	if err := checkNoTemplate(spec); err != nil {
		return err
	}
	return d.run(ctx, spec, nil)
}

// run starts an incarnation, a clone if there is a template.
func (d *Driver) run(ctx context.Context, spec vmm.Spec, template *template) error {
	if err := d.begin(ctx, spec, template); err != nil {
		return fmt.Errorf("starting %s: %w", spec.Ref, err)
	}
	m := d.m
	m.mu.Lock()
	slow := m.strikes(Slow, spec.Ref.Instance)
	m.mu.Unlock()
	if slow {
		if err := m.options.Sleep(ctx, m.options.SlowFor); err != nil {
			m.Kill(spec.Ref, "the start was interrupted")
			return fmt.Errorf("starting %s: %w", spec.Ref, err)
		}
	}
	return nil
}

func (d *Driver) begin(ctx context.Context, spec vmm.Spec, template *template) error {
	m := d.m
	m.mu.Lock()
	defer m.mu.Unlock()
	vm := m.vms[spec.Ref]
	if vm != nil && vm.status.Phase != vmm.Prepared {
		return vmm.ErrStarted
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	spec.Disks, spec.Labels = slices.Clone(spec.Disks), slices.Clone(spec.Labels)
	spec.Network.Ports = slices.Clone(spec.Network.Ports)
	vm = &incarnation{spec: spec, status: vmm.Status{Ref: spec.Ref, Phase: vmm.Prepared, Labels: spec.Labels, Template: spec.Template != ""}, memory: &Memory{}}
	m.vms[spec.Ref] = vm
	if m.strikes(StartCrashes, spec.Ref.Instance) {
		return ErrInjected
	}
	vm.status.Phase, vm.status.StartedAt, vm.status.Ports = vmm.Exited, m.options.Now(), spec.Network.Ports
	if m.strikes(StartFails, spec.Ref.Instance) {
		vm.status.ExitReason = "the start failed: " + ErrInjected.Error()
		return ErrInjected
	}
	ports, err := m.bind(spec.Network.Ports)
	if err != nil {
		vm.status.ExitReason = err.Error()
		return err
	}
	if template != nil && m.strikes(CloneFails, spec.Ref.Instance) {
		vm.status.ExitReason = "the clone failed: " + ErrInjected.Error()
		return ErrInjected
	}
	m.nextPid++
	vm.status.Phase, vm.status.Pid, vm.status.Ports = vmm.Running, m.nextPid, ports
	if template != nil {
		vm.restore(template)
	}
	if m.strikes(Dies, spec.Ref.Instance) {
		m.end(vm, "QEMU was killed by signal 9 (killed)")
	}
	return nil
}

// bind gives every port its host port, as long as no live VM has it. Addresses
// are not told apart, which is stricter than a real machine.
func (m *Machine) bind(wanted []vmm.Port) ([]vmm.Port, error) {
	type socket struct {
		protocol string
		port     int
	}
	used := map[socket]bool{}
	for _, vm := range m.vms { //order:any collected into a set
		if vm.alive() {
			for _, p := range vm.status.Ports {
				used[socket{p.Protocol, p.HostPort}] = true
			}
		}
	}
	ports := slices.Clone(wanted)
	for i := range ports {
		p := &ports[i]
		p.Protocol = cmp.Or(p.Protocol, "tcp")
		if p.HostPort != 0 && used[socket{p.Protocol, p.HostPort}] {
			return nil, fmt.Errorf("host port %d is taken", p.HostPort)
		}
		for tries := 0; p.HostPort == 0; tries++ {
			if tries > lastHostPort-firstHostPort {
				return nil, errors.New("no host port is free")
			}
			if !used[socket{p.Protocol, m.next}] {
				p.HostPort = m.next
			}
			if m.next++; m.next > lastHostPort {
				m.next = firstHostPort
			}
		}
		used[socket{p.Protocol, p.HostPort}] = true
	}
	return ports, nil
}

// Stop implements vmm.Driver.
func (d *Driver) Stop(ctx context.Context, ref vmm.Ref, grace time.Duration) error {
	m := d.m
	m.mu.Lock()
	vm, err := m.find(ref)
	if err != nil || !vm.alive() {
		m.mu.Unlock()
		return err
	}
	hangs, deaf := m.strikes(StopHangs, ref.Instance), m.strikes(Deaf, ref.Instance)
	if !hangs && !deaf {
		reason := "stopped by request"
		if grace > 0 {
			reason = "guest shut down"
		}
		m.end(vm, reason)
		m.mu.Unlock()
		return nil
	}
	m.mu.Unlock()
	if hangs {
		// As long as a real hypervisor could take, and no longer.
		return fmt.Errorf("stopping %s: %w", ref, cmp.Or(m.options.Sleep(ctx, 24*time.Hour), ErrInjected))
	}
	if err := m.options.Sleep(ctx, grace); err != nil {
		return fmt.Errorf("stopping %s: %w", ref, err)
	}
	m.Kill(ref, "stopped by request")
	return nil
}

// Remove implements vmm.Driver.
func (d *Driver) Remove(_ context.Context, ref vmm.Ref) error {
	m := d.m
	m.mu.Lock()
	defer m.mu.Unlock()
	vm, err := m.find(ref)
	if errors.Is(err, vmm.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if m.strikes(RemoveFails, ref.Instance) {
		return fmt.Errorf("removing %s: %w", ref, ErrInjected)
	}
	if vm.alive() {
		m.end(vm, "removed")
	}
	delete(m.vms, ref)
	return nil
}

// List implements vmm.Driver.
func (d *Driver) List(ctx context.Context) ([]vmm.Status, error) {
	m := d.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.strikes(ListFails, "") {
		return nil, fmt.Errorf("listing incarnations: %w", ErrInjected)
	}
	statuses := make([]vmm.Status, 0, len(m.vms))
	for _, vm := range m.sorted() {
		status := vm.status
		status.Ports, status.Labels = slices.Clone(status.Ports), slices.Clone(status.Labels)
		statuses = append(statuses, status)
	}
	return statuses, ctx.Err()
}

// Pause implements vmm.Pauser.
func (d *Driver) Pause(_ context.Context, ref vmm.Ref) error { return d.turn(ref, vmm.Paused) }

// Resume implements vmm.Pauser.
func (d *Driver) Resume(_ context.Context, ref vmm.Ref) error {
	if err := d.turn(ref, vmm.Running); err != nil {
		return err
	}
	d.serveCall(ref)
	return nil
}

func (d *Driver) turn(ref vmm.Ref, phase vmm.Phase) error {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	vm, err := d.m.findRunning(ref)
	if err != nil {
		return err
	}
	vm.status.Phase = phase
	return nil
}

// DialGuest implements vmm.Channels.
func (d *Driver) DialGuest(ctx context.Context, ref vmm.Ref) (net.Conn, error) {
	return d.dial(ctx, ref, d.m.options.Guest)
}

// DialConsole implements vmm.Channels.
func (d *Driver) DialConsole(ctx context.Context, ref vmm.Ref) (net.Conn, error) {
	return d.dial(ctx, ref, d.m.options.Console)
}

func (d *Driver) dial(ctx context.Context, ref vmm.Ref, serve func(vmm.Spec, net.Conn)) (net.Conn, error) {
	d.m.mu.Lock()
	vm, err := d.m.findRunning(ref)
	if err == nil && serve == nil {
		err = fmt.Errorf("%s has no pretend guest: %w", ref, errors.ErrUnsupported)
	}
	if err := cmp.Or(err, ctx.Err()); err != nil {
		d.m.mu.Unlock()
		return nil, err
	}
	host, guest := net.Pipe()
	vm.pipes = append(vm.pipes, guest)
	spec := vm.spec
	d.m.mu.Unlock()
	serve(spec, guest)
	return host, nil
}

func (m *Machine) find(ref vmm.Ref) (*incarnation, error) {
	if err := ref.Check(); err != nil {
		return nil, err
	}
	vm := m.vms[ref]
	if vm == nil {
		return nil, fmt.Errorf("%s: %w", ref, vmm.ErrNotFound)
	}
	return vm, nil
}

func (m *Machine) findRunning(ref vmm.Ref) (*incarnation, error) {
	vm, err := m.find(ref)
	if err == nil && !vm.alive() {
		err = fmt.Errorf("%s: %w", ref, vmm.ErrNotRunning)
	}
	return vm, err
}

// check refuses what every driver refuses.
func check(spec vmm.Spec) error {
	if err := spec.Ref.Check(); err != nil {
		return err
	}
	if spec.VCPUs < 1 || spec.MemoryMiB < 1 {
		return fmt.Errorf("vm %s: %d vCPUs and %d MiB of memory: %w", spec.Ref, spec.VCPUs, spec.MemoryMiB, vmm.ErrInvalid)
	}
	if err := spec.Network.CheckSubnet(); err != nil {
		return fmt.Errorf("vm %s: %w", spec.Ref, err)
	}
	switch n := spec.Network; n.Mode {
	case "user":
		for _, p := range n.Ports {
			if p.HostPort < 0 || p.HostPort > 65535 || p.GuestPort < 1 || p.GuestPort > 65535 {
				return fmt.Errorf("vm %s: published port %d:%d is out of range: %w", spec.Ref, p.HostPort, p.GuestPort, vmm.ErrInvalid)
			}
		}
	case "tap", "none":
	default:
		return fmt.Errorf("vm %s: network mode %q: %w", spec.Ref, n.Mode, vmm.ErrInvalid)
	}
	return nil
}
