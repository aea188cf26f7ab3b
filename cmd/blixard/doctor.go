package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/agent"
	"github.com/blixard/blixard/internal/cli"
	"github.com/blixard/blixard/internal/image"
	"github.com/blixard/blixard/internal/vmm/qemu"
)

// doctorChecks are the checks that ask a driver: acceleration by really
// booting something, whether guests can be limited, what memory they get, and whether the builtin image can be built.
func doctorChecks() []cli.Check {
	return []cli.Check{checkAcceleration, checkLimits, checkMemory, checkImage}
}

func checkAcceleration(ctx context.Context) (f cli.Finding) {
	f = cli.Finding{Check: "acceleration", Status: "fail"}
	dir, err := os.MkdirTemp("", "blixard-doctor-")
	if err != nil {
		f.Detail = err.Error()
		return f
	}
	defer func() {
		if err := os.RemoveAll(dir); err != nil && f.Status == "ok" {
			f.Status, f.Detail = "warn", err.Error()
		}
	}()
	driver, err := qemu.New(qemu.Options{Root: dir})
	if err != nil {
		f.Detail, f.Mend = err.Error(), "scripts/setup"
		return f
	}
	defer func() {
		if err := driver.Close(); err != nil && f.Status == "ok" {
			f.Status, f.Detail = "warn", err.Error()
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	c, err := driver.Capabilities(ctx)
	switch {
	case err != nil:
		f.Detail, f.Mend = err.Error(), "scripts/setup"
	case c.Acceleration == "kvm":
		f.Status, f.Detail = "ok", fmt.Sprintf("QEMU %s with KVM: a guest booted", c.Version)
	default:
		f.Status, f.Detail = "warn", fmt.Sprintf("QEMU %s by emulation, slower: %s", c.Version, c.Why)
	}
	return f
}

func checkLimits(context.Context) cli.Finding {
	if err := qemu.CanLimit(); err != nil {
		return cli.Finding{
			Check: "limits", Status: "warn", Detail: "processes of guests are not held to their memory and CPU: " + err.Error(),
			Mend: "run the server as root on a machine with cgroup v2 (systemd.unified_cgroup_hierarchy=1)",
		}
	}
	return cli.Finding{Check: "limits", Status: "ok", Detail: "control groups hold guests to their memory and CPU"}
}

// checkMemory tells how much of the machine's memory a server offers to
// instances, by its configuration here.
func checkMemory(context.Context) cli.Finding {
	f := cli.Finding{Check: "memory", Status: "fail"}
	machine, err := agent.MachineCapacity(os.TempDir())
	if err != nil {
		f.Detail = err.Error()
		return f
	}
	cfg, err := new(serverFlags).load()
	if err != nil {
		f.Detail = err.Error()
		return f
	}
	offered, reserved, why := machine.MemoryMiB, cfg.MicroVM.ReservedMemoryMB, "microvm.reserved_memory_mb"
	if reserved < 0 {
		reserved, why = agent.DefaultReservedMiB(machine.MemoryMiB), "the default"
		if cfg.MicroVM.CapacityMemoryMB > 0 {
			reserved = 0
		}
	}
	if c := cfg.MicroVM.CapacityMemoryMB; c > 0 {
		offered = c
	}
	f.Status = "ok"
	f.Detail = fmt.Sprintf("a server here offers %s of the machine's %s to instances; %s is kept for the machine (%s)",
		blixard.FormatMiB(max(offered-reserved, 0)), blixard.FormatMiB(machine.MemoryMiB), blixard.FormatMiB(reserved), why)
	if offered-reserved > machine.MemoryMiB-agent.DefaultReservedMiB(machine.MemoryMiB) {
		f.Status, f.Mend = "warn", "set microvm.capacity_memory_mb lower, or leave it out"
		f.Detail += ": the kernel may have to kill guests when they use what they were promised"
	}
	return f
}

func checkImage(ctx context.Context) cli.Finding {
	f := cli.Finding{Check: "builtin image", Status: "fail"}
	dir, err := os.MkdirTemp("", "blixard-doctor-")
	if err != nil {
		f.Detail = err.Error()
		return f
	}
	b, err := image.Store{Root: dir}.Builtin(ctx)
	switch {
	case errors.Is(err, image.ErrMissing):
		f.Detail, f.Mend = err.Error(), "scripts/setup"
	case err != nil:
		f.Detail = err.Error()
	default:
		f.Status, f.Detail = "ok", "sha256:"+b.Digest[:12]+" can be built"
	}
	if err := os.RemoveAll(dir); err != nil && f.Status == "ok" {
		f.Status, f.Detail = "warn", err.Error()
	}
	return f
}

// packImage turns what --image names on this machine into a bundle's archive.
func packImage(ctx context.Context, path string) (cli.PackedImage, error) {
	dir, err := os.MkdirTemp("", "blixard-image-")
	if err != nil {
		return cli.PackedImage{}, fmt.Errorf("packing the image: %w", err)
	}
	store := image.Store{Root: dir}
	b, err := store.Import(ctx, path)
	if err != nil {
		return cli.PackedImage{}, errors.Join(invalidImage(err), os.RemoveAll(dir))
	}
	archive, err := os.Create(filepath.Join(dir, "archive.tar"))
	if err == nil {
		err = store.Export(ctx, b.Digest, archive)
	}
	var size int64
	if err == nil {
		size, err = archive.Seek(0, io.SeekCurrent)
	}
	if err == nil {
		_, err = archive.Seek(0, io.SeekStart)
	}
	if err != nil {
		return cli.PackedImage{}, errors.Join(fmt.Errorf("packing the image: %w", err), os.RemoveAll(dir))
	}
	return cli.PackedImage{Digest: "sha256:" + b.Digest, Size: size, ReadCloser: &packed{archive, dir}}, nil
}

// packed is an archive whose directory goes when it is closed.
type packed struct {
	*os.File
	dir string
}

func (p *packed) Close() error { return errors.Join(p.File.Close(), os.RemoveAll(p.dir)) }
