package image

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// DefaultAssets is where scripts/setup puts the guests' kernel and modules.
const DefaultAssets = "/var/lib/blixard/assets"

// assets are the parts bundles are made of, as found on this machine.
type assets struct {
	kernel  string
	modules string // directory; "" when the kernel has everything built in
}

// The drivers the builtin guest loads, by what they are for. Dependencies come
// by themselves, ahead of them.
var (
	guestModules = []string{"virtio_ring", "virtio", "virtio_pci", "virtio_mmio", "virtio_console", "virtio_net", "virtio_blk", "virtio_rng"}
	vsockModules = []string{"vmw_vsock_virtio_transport"}
)

// GuestBinary finds the blixard-guest program for x86-64 Linux guests:
// $BLIXARD_GUEST, beside the running program, /usr/lib/blixard.
func GuestBinary() (string, error) {
	candidates := []string{}
	if path := os.Getenv("BLIXARD_GUEST"); path != "" {
		candidates = append(candidates, path)
	} else {
		if self, err := os.Executable(); err == nil {
			candidates = append(candidates, filepath.Join(filepath.Dir(self), "blixard-guest"))
		}
		candidates = append(candidates, "/usr/lib/blixard/blixard-guest")
	}
	return firstFile("the guest agent blixard-guest", "make build, or set BLIXARD_GUEST", candidates)
}

// Busybox finds a static busybox: $BLIXARD_BUSYBOX, then where Debian puts it.
func Busybox() (string, error) {
	candidates := []string{"/bin/busybox", "/usr/bin/busybox", "/usr/lib/busybox/busybox-static"}
	if path := os.Getenv("BLIXARD_BUSYBOX"); path != "" {
		candidates = []string{path}
	}
	static := candidates[:0:0]
	for _, path := range candidates {
		if isStatic(path) {
			static = append(static, path)
		}
	}
	if len(static) == 0 {
		return "", missing("a static busybox", "scripts/setup, or set BLIXARD_BUSYBOX", candidates)
	}
	return static[0], nil
}

func isStatic(path string) bool {
	file, err := elf.Open(path)
	if err != nil {
		return false
	}
	defer file.Close()
	return !slices.ContainsFunc(file.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP })
}

// interpreterOf is the program that the kernel starts instead of a dynamically
// linked one.
func interpreterOf(path string) (string, error) {
	file, err := elf.Open(path)
	if err != nil {
		return "", fmt.Errorf("reading the program %s: %w", path, err)
	}
	defer file.Close()
	for _, p := range file.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		name, err := io.ReadAll(io.LimitReader(p.Open(), 4096))
		if err != nil {
			return "", fmt.Errorf("reading the program %s: %w", path, err)
		}
		return string(bytes.TrimRight(name, "\x00")), nil
	}
	return "", fmt.Errorf("the program %s is not linked dynamically: %w", path, ErrInvalid)
}

func firstFile(what, how string, candidates []string) (string, error) {
	for _, path := range candidates {
		if readable(path) {
			return path, nil
		}
	}
	return "", missing(what, how, candidates)
}

func readable(path string) bool {
	file, err := os.Open(path)
	if err != nil {
		return false
	}
	defer file.Close()
	info, err := file.Stat()
	return err == nil && info.Mode().IsRegular()
}

func missing(what, how string, candidates []string) error {
	return fmt.Errorf("%s is not in %s; %s: %w", what, strings.Join(candidates, ", "), how, ErrMissing)
}

// assets finds a kernel and its modules: $BLIXARD_KERNEL with $BLIXARD_MODULES,
// the assets directory of scripts/setup, a kernel of this machine.
func (s Store) assets() (assets, error) {
	if kernel := os.Getenv("BLIXARD_KERNEL"); kernel != "" {
		path, err := firstFile("a kernel for guests", "BLIXARD_KERNEL has to name a kernel image", []string{kernel})
		return assets{kernel: path, modules: os.Getenv("BLIXARD_MODULES")}, err
	}
	var tried []string
	for _, dir := range s.assetDirs() {
		tried = append(tried, filepath.Join(dir, "vmlinuz"))
		// The release file is the last that setup writes.
		if readable(filepath.Join(dir, "vmlinuz")) && readable(filepath.Join(dir, "release")) {
			return assets{kernel: filepath.Join(dir, "vmlinuz"), modules: filepath.Join(dir, "modules")}, nil
		}
	}
	kernels, err := filepath.Glob("/boot/vmlinuz-*")
	if err != nil {
		return assets{}, err
	}
	slices.Sort(kernels)
	slices.Reverse(kernels)
	for _, kernel := range kernels {
		tried = append(tried, kernel)
		modules := filepath.Join("/lib/modules", strings.TrimPrefix(filepath.Base(kernel), "vmlinuz-"))
		if readable(kernel) && hasConsole(modules) {
			return assets{kernel: kernel, modules: modules}, nil
		}
	}
	return assets{}, missing("a kernel for guests", "scripts/setup, or set BLIXARD_KERNEL and BLIXARD_MODULES", tried)
}

func (s Store) assetDirs() []string {
	if s.Assets != "" {
		return []string{s.Assets}
	}
	if dir := os.Getenv("BLIXARD_ASSETS"); dir != "" {
		return []string{dir}
	}
	dirs := []string{DefaultAssets}
	if home, err := os.UserHomeDir(); err == nil {
		dirs = append(dirs, filepath.Join(home, ".local/share/blixard/assets"))
	}
	return dirs
}

// hasConsole tells whether a kernel of this machine can have the guest channel.
func hasConsole(modules string) bool {
	if builtin, err := os.ReadFile(filepath.Join(modules, "modules.builtin")); err == nil && bytes.Contains(builtin, []byte("/virtio_console.ko")) {
		return true
	}
	index, err := indexModules(modules)
	return err == nil && index["virtio_console"] != ""
}

// indexModules finds module files below a directory by their names, in which
// "-" and "_" are the same.
func indexModules(dir string) (map[string]string, error) {
	index := make(map[string]string)
	if dir == "" {
		return index, nil
	}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, compression, ok := strings.Cut(entry.Name(), ".ko")
		if ok && entry.Type().IsRegular() && slices.Contains([]string{"", ".gz", ".xz", ".zst"}, compression) {
			index[moduleName(name)] = path
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("looking for kernel modules: %w", err)
	}
	return index, nil
}

func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// module is one driver, uncompressed.
type module struct {
	name    string // file name
	content []byte
}

// resolve reads the wanted modules and what they depend on, in the order they
// have to be loaded. What is not there is built in, or not needed.
func resolve(ctx context.Context, index map[string]string, wanted []string) ([]module, error) {
	var modules []module
	done := make(map[string]bool)
	var visit func(name string) error
	visit = func(name string) error {
		path := index[name]
		if done[name] || path == "" {
			return nil
		}
		done[name] = true
		content, err := readModule(ctx, path)
		if err != nil {
			return fmt.Errorf("reading kernel module %s: %w", path, err)
		}
		dependencies, err := dependencies(content)
		if err != nil {
			return fmt.Errorf("reading kernel module %s: %w", path, err)
		}
		for _, dependency := range dependencies {
			if err := visit(dependency); err != nil {
				return err
			}
		}
		modules = append(modules, module{name: name + ".ko", content: content})
		return nil
	}
	for _, name := range wanted {
		if err := visit(name); err != nil {
			return nil, err
		}
	}
	return modules, nil
}

func readModule(ctx context.Context, path string) ([]byte, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	switch filepath.Ext(path) {
	case ".gz":
		r, err := gzip.NewReader(bytes.NewReader(content))
		if err != nil {
			return nil, err
		}
		return io.ReadAll(io.LimitReader(r, 64<<20))
	case ".xz":
		return filter(ctx, content, "xz", "-dc")
	case ".zst":
		return filter(ctx, content, "zstd", "-qdc")
	}
	return content, nil
}

func filter(ctx context.Context, in []byte, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	command := exec.CommandContext(ctx, name, args...)
	command.Stdin = bytes.NewReader(in)
	out, err := command.Output()
	if errors.Is(err, exec.ErrNotFound) {
		return nil, fmt.Errorf("the program %s is not installed: %w", name, ErrMissing)
	}
	return out, err
}

// dependencies reads "depends=" of a module's .modinfo section.
func dependencies(content []byte) ([]string, error) {
	file, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return nil, err
	}
	section := file.Section(".modinfo")
	if section == nil {
		return nil, errors.New("no .modinfo section")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	var names []string
	for field := range bytes.SplitSeq(info, []byte{0}) {
		if list, ok := bytes.CutPrefix(field, []byte("depends=")); ok && len(list) > 0 {
			for name := range strings.SplitSeq(string(list), ",") {
				names = append(names, moduleName(name))
			}
		}
	}
	return names, nil
}
