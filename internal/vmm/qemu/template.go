package qemu

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/blixard/blixard/internal/vmm"
)

// Files of a template's directory. The last to be written is fileTemplate.
const (
	fileTemplate = "template.json"
	// templateLayout changes with everything about a template that no other part
	// of its key tells: devices and their order, how it is saved.
	templateLayout = 1
)

// templateRecord is what a clone has to agree with.
type templateRecord struct {
	Key          string
	VCPUs        int
	MemoryMiB    int
	Disks        []string `json:",omitempty"` // formats
	Network      string   // mode
	CallPort     bool
	DevicesBytes int64
}

func newTemplateRecord(spec vmm.Spec, key string) templateRecord {
	t := templateRecord{Key: key, VCPUs: spec.VCPUs, MemoryMiB: spec.MemoryMiB, Network: spec.Network.Mode, CallPort: spec.CallPort}
	for _, disk := range spec.Disks {
		t.Disks = append(t.Disks, disk.Format)
	}
	return t
}

// differs names the first thing of spec that the template has differently; ""
// if there is none.
func (t templateRecord) differs(spec vmm.Spec) string {
	other := newTemplateRecord(spec, t.Key)
	switch {
	case t.VCPUs != other.VCPUs:
		return fmt.Sprintf("%d vCPUs, the template has %d", other.VCPUs, t.VCPUs)
	case t.MemoryMiB != other.MemoryMiB:
		return fmt.Sprintf("%d MiB of memory, the template has %d", other.MemoryMiB, t.MemoryMiB)
	case t.Network != other.Network:
		return fmt.Sprintf("network mode %q, the template has %q", other.Network, t.Network)
	case t.CallPort != other.CallPort:
		return fmt.Sprintf("a call port is %t, of the template %t", other.CallPort, t.CallPort)
	case !slices.Equal(t.Disks, other.Disks):
		return fmt.Sprintf("disks %q, the template has %q", other.Disks, t.Disks)
	}
	return ""
}

// TemplateKey implements vmm.Cloner.
func (d *Driver) TemplateKey(ctx context.Context) (string, error) {
	probed, err := d.probe(ctx)
	if err != nil {
		return "", err
	}
	return d.templateKey(probed)
}

func (d *Driver) templateKey(probed *probeRecord) (string, error) {
	d.probing.Lock()
	defer d.probing.Unlock()
	if d.cpu == "" {
		text, err := os.ReadFile("/proc/cpuinfo")
		if err != nil {
			return "", fmt.Errorf("looking at the CPU: %w", err)
		}
		d.cpu = cpuBaseline(string(text))
	}
	cpu := d.cpu
	if probed.Features.Acceleration != "kvm" {
		const step = 20_000 // kHz: no measurement is that wrong
		cpu += fmt.Sprintf("; counter at %d MHz", (hostTSCKHz()+step/2)/step*step/1000)
	}
	return fmt.Sprintf("qemu %s; %s; %s; %s; layout %d", probed.Version, templateMachine, probed.Features.Acceleration, cpu, templateLayout), nil
}

// cpuBaseline is what of a CPU a saved guest relies on: its features, which the
// guest has looked at, and its model, which stands for the rate of its counter,
// by which the guest measures time (under emulation, too).
func cpuBaseline(cpuinfo string) string {
	first, _, _ := strings.Cut(cpuinfo, "\n\n")
	var words []string
	for line := range strings.Lines(first) {
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch strings.TrimSpace(name) {
		case "vendor_id", "cpu family", "model", "model name", "stepping":
			words = append(words, value)
		case "flags":
			flags := strings.Fields(value)
			slices.Sort(flags)
			sum := sha256.Sum256([]byte(strings.Join(flags, " ")))
			words = append(words, "flags "+hex.EncodeToString(sum[:6]))
		}
	}
	return strings.Join(words, " ")
}

// openTemplate looks whether the template of a clone can be used, and opens the
// state of its devices.
func (d *Driver) openTemplate(spec vmm.Spec, probed *probeRecord) (*os.File, error) {
	if spec.Template == "" {
		return nil, fmt.Errorf("cloning %s: no template is named: %w", spec.Ref, vmm.ErrInvalid)
	}
	var t templateRecord
	if ok, err := readJSON(filepath.Join(spec.Template, fileTemplate), &t); err != nil {
		return nil, fmt.Errorf("cloning %s: %w", spec.Ref, err)
	} else if !ok {
		return nil, fmt.Errorf("cloning %s: %w: %s holds none", spec.Ref, vmm.ErrTemplate, spec.Template)
	}
	key, err := d.templateKey(probed)
	if err != nil {
		return nil, fmt.Errorf("cloning %s: %w", spec.Ref, err)
	}
	if t.Key != key {
		return nil, fmt.Errorf("cloning %s: %w: it is of %q, this machine is %q", spec.Ref, vmm.ErrTemplate, t.Key, key)
	}
	if what := t.differs(spec); what != "" {
		return nil, fmt.Errorf("cloning %s: %s: %w", spec.Ref, what, vmm.ErrInvalid)
	}
	// A hypervisor that meets too small a memory file makes it larger.
	info, err := os.Stat(filepath.Join(spec.Template, fileMemory))
	if err == nil && info.Size() != int64(t.MemoryMiB)<<20 {
		err = fmt.Errorf("its memory is of %d bytes", info.Size())
	}
	var devices *os.File
	if err == nil {
		devices, err = os.Open(filepath.Join(spec.Template, fileDevices))
	}
	if err == nil {
		if info, err = devices.Stat(); err == nil && info.Size() != t.DevicesBytes {
			err = fmt.Errorf("the state of its devices is of %d bytes, not %d", info.Size(), t.DevicesBytes)
		}
		if err != nil {
			err = errors.Join(err, devices.Close())
		}
	}
	if err != nil {
		return nil, fmt.Errorf("cloning %s: %w: %w", spec.Ref, vmm.ErrTemplate, err)
	}
	return devices, nil
}
