package fake

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/blixard/blixard/internal/vmm"
)

// Memory is what a pretend guest remembers: a template keeps it, and every clone
// has a copy of its own. It may be used concurrently.
type Memory struct {
	mu   sync.Mutex
	text []byte
}

// Load is a copy of what was stored last.
func (m *Memory) Load() []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.text)
}

// Store replaces what is remembered.
func (m *Memory) Store(text []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.text = slices.Clone(text)
}

// template is the file template.json. The others are there so that whoever
// copies templates copies the same files as of a real one.
type template struct {
	Key              string
	VCPUs, MemoryMiB int
	Disks            []string // formats
	Network          string   // mode
	CallPort         bool
	memory           []byte
}

func templateOf(spec vmm.Spec, key string) template {
	t := template{Key: key, VCPUs: spec.VCPUs, MemoryMiB: spec.MemoryMiB, Network: spec.Network.Mode, CallPort: spec.CallPort}
	for _, disk := range spec.Disks {
		t.Disks = append(t.Disks, disk.Format)
	}
	return t
}

// callPort is the connection that a clone's call port has from the beginning.
type callPort struct {
	host, guest net.Conn // nil when it was dialled, or served
}

func (vm *incarnation) restore(t *template) {
	vm.status.Phase = vmm.Paused
	vm.memory.Store(t.memory)
	if vm.spec.CallPort {
		host, guest := net.Pipe()
		vm.pipes = append(vm.pipes, guest)
		vm.call = &callPort{host, guest}
	}
}

// serveCall lets the guest of a clone have its call port.
func (d *Driver) serveCall(ref vmm.Ref) {
	m := d.m
	m.mu.Lock()
	vm := m.vms[ref]
	if vm == nil || vm.call == nil || vm.call.guest == nil || m.options.Call == nil {
		m.mu.Unlock()
		return
	}
	guest, spec, memory := vm.call.guest, vm.spec, vm.memory
	vm.call.guest = nil
	m.mu.Unlock()
	m.options.Call(spec, memory, guest)
}

// DialCall implements vmm.Channels.
func (d *Driver) DialCall(ctx context.Context, ref vmm.Ref) (net.Conn, error) {
	m := d.m
	m.mu.Lock()
	vm, err := m.findRunning(ref)
	if err == nil && !vm.spec.CallPort {
		err = fmt.Errorf("%s has no call port: %w", ref, vmm.ErrInvalid)
	}
	if err == nil && m.options.Call == nil {
		err = fmt.Errorf("%s has no pretend guest: %w", ref, errors.ErrUnsupported)
	}
	if err := cmp.Or(err, ctx.Err()); err != nil {
		m.mu.Unlock()
		return nil, err
	}
	if vm.call != nil && vm.call.host != nil {
		host := vm.call.host
		vm.call.host = nil
		m.mu.Unlock()
		return host, nil
	}
	host, guest := net.Pipe()
	vm.pipes = append(vm.pipes, guest)
	spec, memory := vm.spec, vm.memory
	m.mu.Unlock()
	m.options.Call(spec, memory, guest)
	return host, nil
}

// TemplateKey implements vmm.Cloner.
func (d *Driver) TemplateKey(ctx context.Context) (string, error) {
	return d.m.options.TemplateKey, ctx.Err()
}

// MemoryUse implements vmm.Meter: half of the memory is private, the other half
// shared if it is a clone's.
func (d *Driver) MemoryUse(_ context.Context, ref vmm.Ref) (private, shared int64, err error) {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	vm, err := d.m.findRunning(ref)
	if err != nil {
		return 0, 0, err
	}
	half := int64(vm.spec.MemoryMiB) << 19
	if vm.status.Template {
		return half, half, nil
	}
	return 2 * half, 0, nil
}

// Snapshot implements vmm.Cloner.
func (d *Driver) Snapshot(ctx context.Context, ref vmm.Ref) error {
	m := d.m
	m.mu.Lock()
	defer m.mu.Unlock()
	vm, err := m.findRunning(ref)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if vm.spec.Template == "" || checkNoTemplate(vm.spec) != nil {
		return fmt.Errorf("%s was not started to become a template: %w", ref, vmm.ErrInvalid)
	}
	defer m.end(vm, "saved as a template")
	if m.strikes(SnapshotFails, ref.Instance) {
		return fmt.Errorf("saving %s: %w", ref, ErrInjected)
	}
	text, err := json.Marshal(templateOf(vm.spec, m.options.TemplateKey))
	if err != nil {
		return fmt.Errorf("saving %s: %w", ref, err)
	}
	if err := os.MkdirAll(vm.spec.Template, 0o700); err != nil {
		return fmt.Errorf("saving %s: %w", ref, err)
	}
	for _, file := range []struct {
		name string
		text []byte
	}{{"memory", vm.memory.Load()}, {"devices", []byte("devices\n")}, {"template.json", text}} {
		if err := os.WriteFile(filepath.Join(vm.spec.Template, file.name), file.text, 0o600); err != nil {
			return fmt.Errorf("saving %s: %w", ref, err)
		}
	}
	return nil
}

// Clone implements vmm.Cloner.
func (d *Driver) Clone(ctx context.Context, spec vmm.Spec) error {
	if err := check(spec); err != nil {
		return err
	}
	if err := d.checkFirst(spec.Ref); err != nil {
		return err
	}
	t, err := d.template(spec)
	if err != nil {
		return err
	}
	return d.run(ctx, spec, t)
}

func (d *Driver) template(spec vmm.Spec) (*template, error) {
	if !filepath.IsAbs(spec.Template) {
		return nil, fmt.Errorf("cloning %s: template %q is not an absolute path: %w", spec.Ref, spec.Template, vmm.ErrInvalid)
	}
	text, err := os.ReadFile(filepath.Join(spec.Template, "template.json"))
	var t template
	if err == nil {
		err = json.Unmarshal(text, &t)
	}
	if err == nil {
		t.memory, err = os.ReadFile(filepath.Join(spec.Template, "memory"))
	}
	if err == nil {
		_, err = os.Lstat(filepath.Join(spec.Template, "devices"))
	}
	if err != nil {
		return nil, fmt.Errorf("cloning %s: %w: %w", spec.Ref, vmm.ErrTemplate, err)
	}
	if key := d.m.options.TemplateKey; t.Key != key {
		return nil, fmt.Errorf("cloning %s: %w: it is of %q, this machine is %q", spec.Ref, vmm.ErrTemplate, t.Key, key)
	}
	want := templateOf(spec, t.Key)
	if want.VCPUs != t.VCPUs || want.MemoryMiB != t.MemoryMiB || want.Network != t.Network || want.CallPort != t.CallPort || !slices.Equal(want.Disks, t.Disks) {
		return nil, fmt.Errorf("cloning %s: it is not what the template is of: %w", spec.Ref, vmm.ErrInvalid)
	}
	return &t, nil
}

// checkFirst refuses to start what was started: that comes before all else that
// may be wrong by now.
func (d *Driver) checkFirst(ref vmm.Ref) error {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	if vm := d.m.vms[ref]; vm != nil && vm.status.Phase != vmm.Prepared {
		return fmt.Errorf("starting %s: %w", ref, vmm.ErrStarted)
	}
	return nil
}

// checkNoTemplate refuses to build where a template is complete.
func checkNoTemplate(spec vmm.Spec) error {
	if spec.Template == "" {
		return nil
	}
	if !filepath.IsAbs(spec.Template) {
		return fmt.Errorf("vm %s: template %q is not an absolute path: %w", spec.Ref, spec.Template, vmm.ErrInvalid)
	}
	if _, err := os.Lstat(filepath.Join(spec.Template, "template.json")); err == nil {
		return fmt.Errorf("vm %s: %s holds a template already: %w", spec.Ref, spec.Template, vmm.ErrInvalid)
	}
	return nil
}
