package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// bundleFile is bundle.json of a user's directory.
type bundleFile struct {
	Command []string `json:"command"`
	Cmdline string   `json:"cmdline"`
}

const (
	bundleName      = "bundle.json"
	maxSmallFile    = 64 << 10
	maxCmdlineBytes = 1500 // the kernel takes 2,048 with the hypervisor's own
)

// Names under which the parts of a bundle directory are looked for.
var (
	kernelNames = []string{"kernel", "vmlinuz", "bzImage", "vmlinux"}
	initrdNames = []string{"initrd", "initrd.img", "initramfs", "initramfs.img", "initrd.gz"}
	diskNames   = []string{"rootfs.ext4", "rootfs.img", "rootfs.raw", "rootfs.qcow2"}
	treeNames   = []string{"rootfs", "rootfs.tar", "rootfs.tar.gz", "rootfs.tgz"}
)

// Import makes a bundle of what is at path:
//   - a bundle directory: a kernel with an initrd, a rootfs.{ext4,img,raw,qcow2}
//     or both, optionally cmdline and bundle.json. A disk without a kernel gets
//     the builtin kernel and blixard-guest as init;
//   - a directory with bundle.json and rootfs/ or rootfs.tar[.gz];
//   - an ext4 or qcow2 image by itself: as a bundle directory with only that;
//   - a root file system, as a directory, a tar or a tar.gz: it becomes an
//     initial RAM disk with blixard-guest as /init and the builtin kernel. Its
//     /etc/blixard/command names the command to run.
//
// Errors wrap ErrInvalid, ErrMissing, or tell what cannot be read.
func (s Store) Import(ctx context.Context, path string) (b Bundle, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("importing image %s: %w", path, err)
		}
	}()
	info, err := os.Stat(path)
	if err != nil {
		return Bundle{}, err
	}
	if info.Mode().IsRegular() {
		kind, err := sniff(path)
		switch {
		case err != nil:
			return Bundle{}, err
		case kind == fileTar:
			return s.importTree(ctx, path, bundleFile{})
		case kind == fileExt4, kind == fileQcow2:
			return s.importParts(ctx, "", "", []string{path}, bundleFile{})
		}
		return Bundle{}, fmt.Errorf("it is no tar or tar.gz of a root file system, no ext4 or qcow2 disk, and no directory (other compressions have to be unpacked first): %w", ErrInvalid)
	}
	if !info.IsDir() {
		return Bundle{}, fmt.Errorf("it is neither a file nor a directory: %w", ErrInvalid)
	}
	description, err := readDescription(path)
	if err != nil {
		return Bundle{}, err
	}
	kernel, initrd, disks := find(path, kernelNames), find(path, initrdNames), findAll(path, diskNames)
	if kernel != "" || len(disks) > 0 {
		return s.importParts(ctx, kernel, initrd, disks, description)
	}
	for _, name := range treeNames {
		inner := filepath.Join(path, name)
		if _, err := os.Stat(inner); err == nil && hasDescription(path) {
			return s.importTree(ctx, inner, description)
		}
	}
	return s.importTree(ctx, path, description)
}

func find(dir string, names []string) string {
	if all := findAll(dir, names); len(all) > 0 {
		return all[0]
	}
	return ""
}

func findAll(dir string, names []string) []string {
	var found []string
	for _, name := range names {
		if info, err := os.Stat(filepath.Join(dir, name)); err == nil && info.Mode().IsRegular() {
			found = append(found, filepath.Join(dir, name))
		}
	}
	return found
}

func hasDescription(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, bundleName))
	return err == nil
}

func readDescription(dir string) (bundleFile, error) {
	var description bundleFile
	encoded, err := readSmall(filepath.Join(dir, bundleName))
	if err != nil {
		return bundleFile{}, err
	}
	if encoded != nil {
		decoder := json.NewDecoder(bytes.NewReader(encoded))
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(&description); err != nil {
			return bundleFile{}, fmt.Errorf("reading %s (known keys: command, cmdline): %w: %w", bundleName, ErrInvalid, err)
		}
		if len(description.Command) > 0 && description.Command[0] == "" {
			return bundleFile{}, fmt.Errorf("reading %s: the command is empty: %w", bundleName, ErrInvalid)
		}
	}
	cmdline, err := readSmall(filepath.Join(dir, "cmdline"))
	if err != nil {
		return bundleFile{}, err
	}
	if cmdline != nil {
		description.Cmdline = strings.Join(strings.Fields(string(cmdline)), " ")
	}
	if len(description.Cmdline) > maxCmdlineBytes || strings.ContainsAny(description.Cmdline, "\x00\n\r") {
		return bundleFile{}, fmt.Errorf("the kernel command line is longer than %d bytes or has line breaks: %w", maxCmdlineBytes, ErrInvalid)
	}
	return description, nil
}

// readSmall gives nil for a file that is not there.
func readSmall(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxSmallFile {
		return nil, fmt.Errorf("%s is no file of at most %d KiB: %w", path, maxSmallFile>>10, ErrInvalid)
	}
	return os.ReadFile(path)
}

// importParts stores a kernel and disks as they are.
func (s Store) importParts(ctx context.Context, kernel, initrd string, disks []string, description bundleFile) (b Bundle, err error) {
	if initrd == "" && len(disks) == 0 {
		return Bundle{}, fmt.Errorf("there is a kernel, but neither %s nor %s: %w", strings.Join(initrdNames, ", "), strings.Join(diskNames, ", "), ErrInvalid)
	}
	if len(disks) > 1 {
		return Bundle{}, fmt.Errorf("there is more than one root disk (%s): %w", strings.Join(disks, ", "), ErrInvalid)
	}
	d, err := s.draft()
	if err != nil {
		return Bundle{}, err
	}
	defer d.discard(&err)
	d.manifest.Cmdline, d.manifest.Command = description.Cmdline, description.Command
	switch {
	case kernel == "":
		if err := d.addOwnBoot(ctx); err != nil {
			return Bundle{}, err
		}
		d.manifest.Cmdline = strings.TrimSpace(ownCmdline + " blixard.root=/dev/vda " + d.manifest.Cmdline)
	case initrd == "" && !strings.Contains(" "+d.manifest.Cmdline, " root="):
		d.manifest.Cmdline = strings.TrimSpace("root=/dev/vda rw " + d.manifest.Cmdline)
	}
	for _, part := range []struct{ role, path string }{{"kernel", kernel}, {"initrd", initrd}} {
		if part.path == "" || (part.role == "initrd" && kernel == "") {
			continue
		}
		if err := d.addCopy(ctx, manifestFile{Name: part.role, Role: part.role}, part.path); err != nil {
			return Bundle{}, err
		}
	}
	for _, disk := range disks {
		f := manifestFile{Name: "rootfs.img", Role: "disk", Format: "raw"}
		kind, err := sniff(disk)
		if err != nil {
			return Bundle{}, err
		}
		if strings.HasSuffix(disk, ".qcow2") || kind == fileQcow2 && !slices.Contains(diskNames, filepath.Base(disk)) {
			f.Name, f.Format = "rootfs.qcow2", "qcow2"
		}
		if err := checkDisk(disk, f.Format); err != nil {
			return Bundle{}, err
		}
		if err := d.addCopy(ctx, f, disk); err != nil {
			return Bundle{}, err
		}
	}
	return d.commit(ctx)
}

// checkDisk refuses a qcow2 that is none, or that makes the hypervisor open
// other files of this machine (a backing or an external data file).
func checkDisk(path, format string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	head := make([]byte, 104)
	n, err := io.ReadFull(file, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return err
	}
	isQcow := n >= 4 && string(head[:4]) == "QFI\xfb"
	switch {
	case format == "qcow2" && !isQcow:
		return fmt.Errorf("%s is no qcow2 image: %w", path, ErrInvalid)
	case format == "raw" && isQcow:
		return fmt.Errorf("%s is a qcow2 image, name it rootfs.qcow2: %w", path, ErrInvalid)
	case format == "raw":
		return nil
	case !bytes.Equal(head[8:20], make([]byte, 12)):
		return fmt.Errorf("%s refers to a backing file; flatten it with: qemu-img convert -O qcow2: %w", path, ErrInvalid)
	case head[7] >= 3 && head[79]&4 != 0:
		return fmt.Errorf("%s keeps its data in another file; flatten it with: qemu-img convert -O qcow2: %w", path, ErrInvalid)
	}
	return nil
}

// addOwnBoot adds the builtin kernel, and blixard-guest as an initial RAM disk.
func (d *draft) addOwnBoot(ctx context.Context) error {
	p, err := d.store.parts(ctx)
	if err != nil {
		return err
	}
	t := newTree()
	if err := t.addGuest(p.agent, p.early, p.vsock); err != nil {
		return err
	}
	if err := d.addCopy(ctx, manifestFile{Name: "kernel", Role: "kernel"}, p.assets.kernel); err != nil {
		return err
	}
	return d.add(ctx, manifestFile{Name: "initrd", Role: "initrd"}, func(w io.Writer) error { return t.write(w, newTree()) })
}

// importTree makes an initial RAM disk of a root file system.
func (s Store) importTree(ctx context.Context, path string, description bundleFile) (b Bundle, err error) {
	p, err := s.parts(ctx)
	if err != nil {
		return Bundle{}, err
	}
	d, err := s.draft()
	if err != nil {
		return Bundle{}, err
	}
	defer d.discard(&err)
	t, done, err := d.readTree(path)
	defer func() { err = errors.Join(err, done()) }()
	if err != nil {
		return Bundle{}, err
	}
	if err := t.settle(&description); err != nil {
		return Bundle{}, err
	}
	d.manifest.Cmdline = strings.TrimSpace(ownCmdline + " " + description.Cmdline)
	d.manifest.Command = description.Command
	ours, err := t.split(p)
	if err != nil {
		return Bundle{}, err
	}
	if err := d.addCopy(ctx, manifestFile{Name: "kernel", Role: "kernel"}, p.assets.kernel); err != nil {
		return Bundle{}, err
	}
	err = d.add(ctx, manifestFile{Name: "initrd", Role: "initrd"}, func(w io.Writer) error { return t.write(w, ours) })
	if err != nil {
		return Bundle{}, err
	}
	return d.commit(ctx)
}

// split makes the tree with what blixard adds to t, and takes from t what that
// replaces. Directories of t are kept: only files are replaced.
func (t *tree) split(p parts) (*tree, error) {
	all := newTree()
	all.entries = maps.Clone(t.entries)
	if err := all.addGuest(p.agent, p.early, p.vsock); err != nil {
		return nil, err
	}
	ours := newTree()
	//order:any moved between maps
	for name, e := range all.entries {
		_, theirs := t.entries[name]
		if !theirs || name == "init" || strings.HasPrefix(name, "lib/blixard/modules/") {
			ours.entries[name] = e
			delete(t.entries, name)
		}
	}
	return ours, nil
}

// readTree reads a directory or a tar; done gives up what its entries read from.
func (d *draft) readTree(path string) (t *tree, done func() error, err error) {
	t = newTree()
	info, err := os.Stat(path)
	if err != nil {
		return nil, func() error { return nil }, err
	}
	if info.IsDir() {
		root, err := os.OpenRoot(path)
		if err != nil {
			return nil, func() error { return nil }, err
		}
		return t, root.Close, readDirectory(t, root)
	}
	spool, err := os.CreateTemp(d.dir, "spool")
	if err != nil {
		return nil, func() error { return nil }, err
	}
	// Without a name it is gone with the last descriptor, and not in the bundle.
	if err := os.Remove(spool.Name()); err != nil {
		return nil, spool.Close, err
	}
	return t, spool.Close, readTar(t, path, spool)
}

// settle makes the description and the tree agree on the command, and refuses
// what is no root file system.
func (t *tree) settle(description *bundleFile) error {
	for _, name := range []string{bundleName, "cmdline"} {
		delete(t.entries, name)
	}
	if len(description.Command) > 0 {
		encoded, err := json.Marshal(description.Command)
		if err != nil {
			return err
		}
		return t.file(commandName, 0o644, append(encoded, '\n'))
	}
	if e, ok := t.entries[commandName]; ok && e.open != nil {
		if e.size > maxSmallFile {
			return fmt.Errorf("/%s is larger than %d KiB: %w", commandName, maxSmallFile>>10, ErrInvalid)
		}
		content, err := e.open()
		if err != nil {
			return err
		}
		text, err := io.ReadAll(io.LimitReader(content, maxSmallFile))
		if err := errors.Join(err, content.Close()); err != nil {
			return err
		}
		description.Command, err = parseCommand(text)
		return err
	}
	isRoot := slices.ContainsFunc([]string{"bin", "usr", "sbin", "etc"}, func(name string) bool {
		_, ok := t.entries[name]
		return ok
	})
	if !isRoot {
		return fmt.Errorf("it is no bundle (no %s, no %s) and no root file system (no bin, usr, sbin or etc): %w",
			strings.Join(kernelNames, ", "), strings.Join(diskNames, ", "), ErrInvalid)
	}
	return nil
}
