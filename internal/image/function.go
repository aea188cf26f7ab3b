package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// functionModules are the drivers of a guest that runs a function. It has one
// disk with its code, and speaks with the host through a virtio-serial port.
var functionModules = []string{"virtio_ring", "virtio", "virtio_pci", "virtio_mmio", "virtio_console", "virtio_net", "virtio_blk", "virtio_rng", "erofs"}

// functionCmdline tells the guest agent its role, and leaves out what a clone's
// first call would only pay for: accounting of pressure and of the kernel's own
// memory, a watchdog of a clock that has stood still, second looks at copies and
// permissions in a machine that one function has for itself. GODEBUG is for the
// agent: its scheduler would interrupt code that an emulator is still translating.
const functionCmdline = ownCmdline + " blixard.role=function psi=0 nowatchdog lsm=capability hardened_usercopy=off" +
	" cgroup.memory=nokmem,nosocket cgroup_disable=io GODEBUG=asyncpreemptoff=1"

// Function gives the bundle of the guests that run functions: kernel,
// blixard-guest in the role of a function's guest, and busybox for scripts. Code
// and runtimes come as disks. It is built when one of its parts has changed, and
// otherwise found; its digest names it in keys of templates. Errors wrap
// ErrMissing when this machine lacks a part.
func (s Store) Function(ctx context.Context) (Bundle, error) {
	b, err := s.function(ctx)
	if err != nil {
		return Bundle{}, fmt.Errorf("making the image of functions: %w", err)
	}
	return b, nil
}

func (s Store) function(ctx context.Context) (b Bundle, err error) {
	p, err := s.partsWith(ctx, functionModules, nil)
	if err != nil {
		return Bundle{}, err
	}
	busybox, err := Busybox()
	if err != nil {
		return Bundle{}, err
	}
	note, err := p.noteName(s.Root, busybox)
	if err != nil {
		return Bundle{}, err
	}
	// Beside the builtin guest's, since it is as much in use as that one.
	sum := sha256.Sum256([]byte(filepath.Base(note) + " " + functionCmdline))
	note = filepath.Join(s.Root, "builtin-function-"+hex.EncodeToString(sum[:]))
	if digest, err := os.ReadFile(note); err == nil {
		if b, err := s.Get(string(digest)); err == nil {
			return b, nil
		}
	}
	t, err := builtinTree(ctx, busybox)
	if err != nil {
		return Bundle{}, err
	}
	if err := t.addGuest(p.agent, p.early, p.vsock); err != nil {
		return Bundle{}, err
	}
	for _, dir := range []string{"var/task", "opt/blixard"} {
		if err := t.mkdir(dir); err != nil {
			return Bundle{}, err
		}
	}
	d, err := s.draft()
	if err != nil {
		return Bundle{}, err
	}
	defer d.discard(&err)
	d.manifest.Cmdline = functionCmdline
	if err := d.addCopy(ctx, manifestFile{Name: "kernel", Role: "kernel"}, p.assets.kernel); err != nil {
		return Bundle{}, err
	}
	err = d.add(ctx, manifestFile{Name: "initrd", Role: "initrd"}, func(w io.Writer) error { return t.write(w, newTree()) })
	if err != nil {
		return Bundle{}, err
	}
	if b, err = d.commit(ctx); err != nil {
		return Bundle{}, err
	}
	return b, s.writeNote(note, b.Digest)
}
