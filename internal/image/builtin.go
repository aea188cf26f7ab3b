package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// builderVersion changes when the same parts make a different bundle.
const builderVersion = "1"

// ownCmdline makes our kernel start faster, which under emulation saves half a
// second: no self-tests of its cryptography and timer, one serial port looked
// for, no grace periods to wait for.
const ownCmdline = "cryptomgr.notests no_timer_check rcupdate.rcu_expedited=1 8250.nr_uarts=1 audit=0"

// parts are what every initial RAM disk of ours has.
type parts struct {
	assets assets
	agent  []byte
	early  []module
	vsock  []module
}

func (s Store) parts(ctx context.Context) (parts, error) {
	return s.partsWith(ctx, guestModules, vsockModules)
}

func (s Store) partsWith(ctx context.Context, early, vsock []string) (parts, error) {
	a, err := s.assets()
	if err != nil {
		return parts{}, err
	}
	guest, err := GuestBinary()
	if err != nil {
		return parts{}, err
	}
	agent, err := os.ReadFile(guest)
	if err != nil {
		return parts{}, fmt.Errorf("reading the guest agent: %w", err)
	}
	index, err := indexModules(a.modules)
	if err != nil {
		return parts{}, err
	}
	p := parts{assets: a, agent: agent}
	if p.early, err = resolve(ctx, index, early); err != nil {
		return parts{}, err
	}
	if p.vsock, err = resolve(ctx, index, vsock); err != nil {
		return parts{}, err
	}
	return p, nil
}

// Builtin gives the bundle of the builtin guest: kernel, busybox, blixard-guest
// with its demo server. It is built when one of its parts has changed, and
// otherwise found. Errors wrap ErrMissing when this machine lacks a part.
func (s Store) Builtin(ctx context.Context) (Bundle, error) {
	b, err := s.builtin(ctx)
	if err != nil {
		return Bundle{}, fmt.Errorf("making the builtin image: %w", err)
	}
	return b, nil
}

func (s Store) builtin(ctx context.Context) (b Bundle, err error) {
	p, err := s.parts(ctx)
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
	d, err := s.draft()
	if err != nil {
		return Bundle{}, err
	}
	defer d.discard(&err)
	d.manifest.Cmdline = ownCmdline
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

// noteName is the file that remembers which bundle these parts make, so that
// they need not be packed to know.
func (p parts) noteName(root, busybox string) (string, error) {
	hash := sha256.New()
	for _, path := range []string{p.assets.kernel, busybox} {
		sum, err := hashFile(path)
		if err != nil {
			return "", fmt.Errorf("reading %s: %w", path, err)
		}
		hash.Write(sum[:])
	}
	sum := sha256.Sum256(p.agent)
	hash.Write(sum[:])
	for _, m := range slices.Concat(p.early, p.vsock) {
		sum := sha256.Sum256(m.content)
		hash.Write(sum[:])
	}
	hash.Write([]byte(builderVersion + " " + ownCmdline))
	return filepath.Join(root, "builtin-"+hex.EncodeToString(hash.Sum(nil))), nil
}

// Builtins are the digests of the builtin images that were built here, of former
// parts too.
func (s Store) Builtins() ([]string, error) {
	notes, err := filepath.Glob(filepath.Join(s.Root, "builtin-*"))
	if err != nil {
		return nil, fmt.Errorf("listing the builtin images: %w", err)
	}
	var digests []string
	for _, note := range notes {
		digest, err := os.ReadFile(note)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("listing the builtin images: %w", err)
		}
		digests = append(digests, string(digest))
	}
	return digests, nil
}

// writeNote replaces the note as a whole; a lost one only costs a build.
func (s Store) writeNote(note, digest string) error {
	temporary := fmt.Sprintf("%s%d", filepath.Join(s.Root, temporaryPrefix+"note-"), time.Now().UnixNano())
	if err := writeFile(temporary, []byte(digest)); err != nil {
		return fmt.Errorf("remembering the builtin image: %w", err)
	}
	if err := os.Rename(temporary, note); err != nil {
		return errors.Join(fmt.Errorf("remembering the builtin image: %w", err), os.Remove(temporary))
	}
	return nil
}

// builtinTree is a small system round busybox.
func builtinTree(ctx context.Context, busybox string) (*tree, error) {
	program, err := os.ReadFile(busybox)
	if err != nil {
		return nil, fmt.Errorf("reading busybox: %w", err)
	}
	applets, err := listApplets(ctx, busybox)
	if err != nil {
		return nil, err
	}
	t := newTree()
	steps := []error{
		t.file("bin/busybox", 0o755, program),
		t.symlink("sbin", "bin"),
		t.symlink("usr/bin", "../bin"),
		t.symlink("usr/sbin", "../bin"),
		t.file("etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")),
		t.file("etc/group", 0o644, []byte("root:x:0:\nnogroup:x:65534:\n")),
		t.file("etc/os-release", 0o644, []byte("NAME=\"Blixard builtin guest\"\nID=blixard\nPRETTY_NAME=\"Blixard builtin guest\"\n")),
		t.mkdir("root"), t.mkdir("var/log"), t.mkdir("mnt"),
	}
	for _, applet := range applets {
		if applet != "busybox" && applet != "init" {
			steps = append(steps, t.symlink("bin/"+applet, "busybox"))
		}
	}
	return t, errors.Join(steps...)
}

func listApplets(ctx context.Context, busybox string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, busybox, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("asking %s for its applets: %w", busybox, err)
	}
	var applets []string
	for name := range strings.FieldsSeq(string(out)) {
		if !strings.ContainsAny(name, "/\x00") && len(name) < 64 {
			applets = append(applets, name)
		}
	}
	if !slices.Contains(applets, "sh") {
		return nil, fmt.Errorf("%s has no shell: %w", busybox, ErrMissing)
	}
	return applets, nil
}
