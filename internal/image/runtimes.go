package image

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
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

	"github.com/erofs/go-erofs"
)

// runtimesVersion changes when the same parts make another disk.
const runtimesVersion = "1"

// nixExpressions are what the evaluator is started with.
//
//go:embed nix
var nixExpressions embed.FS

// Runtime gives the disk that guests need for a function's runtime beside the
// disk with its code; none, with an empty path, for runtimes that need none.
func (s Store) Runtime(ctx context.Context, runtime string) (Disk, error) {
	switch runtime {
	case "nix":
		return s.NixRuntime(ctx)
	case "wasm":
		return s.WasmRuntime(ctx)
	}
	return Disk{}, nil
}

// NixRuntime gives a read-only EROFS disk with the Nix evaluator of this machine,
// the libraries it is linked with, and the expressions that call functions:
//
//	bin/nix-instantiate, lib/*, lib/ld.so   started as lib/ld.so --library-path lib bin/nix-instantiate
//	nix/call.nix, nix/lib.nix
//
// It is made when one of its parts has changed, and otherwise found. The same
// packages give the same disk on every node. Errors wrap ErrMissing when this
// machine has no Nix.
func (s Store) NixRuntime(ctx context.Context) (Disk, error) {
	disk, err := s.nixRuntime(ctx)
	if err != nil {
		return Disk{}, fmt.Errorf("making the disk of the nix runtime: %w", err)
	}
	return disk, nil
}

// NixEvaluator finds nix-instantiate: $BLIXARD_NIX, PATH, where NixOS and
// single-user installations have it.
func NixEvaluator() (string, error) {
	if path := os.Getenv("BLIXARD_NIX"); path != "" {
		return firstFile("the Nix evaluator", "BLIXARD_NIX has to name nix-instantiate", []string{path})
	}
	candidates := []string{"/run/current-system/sw/bin/nix-instantiate", "/nix/var/nix/profiles/default/bin/nix-instantiate", "/usr/bin/nix-instantiate"}
	if path, err := exec.LookPath("nix-instantiate"); err == nil {
		candidates = append([]string{path}, candidates...)
	}
	return firstFile("the Nix evaluator", "scripts/setup, or set BLIXARD_NIX", candidates)
}

func (s Store) nixRuntime(ctx context.Context) (Disk, error) {
	evaluator, err := NixEvaluator()
	if err != nil {
		return Disk{}, err
	}
	libraries, err := closure(ctx, evaluator)
	if err != nil {
		return Disk{}, err
	}
	parts := []part{{name: "bin/nix-instantiate", mode: 0o755, path: evaluator}}
	for name, path := range libraries { //order:any sorted by makeDisk
		parts = append(parts, part{name: "lib/" + name, mode: 0o755, path: path})
	}
	err = fs.WalkDir(nixExpressions, "nix", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := nixExpressions.ReadFile(name)
		parts = append(parts, part{name: name, mode: 0o644, content: content})
		return err
	})
	if err != nil {
		return Disk{}, err
	}
	return s.makeDisk(ctx, "nix", parts)
}

// WasmRuntime gives a read-only EROFS disk with bin/blixard-guest-wasm, which runs
// WebAssembly in guests. It is a program of its own so that other functions'
// guests need not hold it in memory. Errors wrap ErrMissing when it is not there.
func (s Store) WasmRuntime(ctx context.Context) (Disk, error) {
	program, err := WasmBinary()
	if err != nil {
		return Disk{}, fmt.Errorf("making the disk of the wasm runtime: %w", err)
	}
	disk, err := s.makeDisk(ctx, "wasm", []part{{name: "bin/blixard-guest-wasm", mode: 0o755, path: program}})
	if err != nil {
		return Disk{}, fmt.Errorf("making the disk of the wasm runtime: %w", err)
	}
	return disk, nil
}

// WasmBinary finds the blixard-guest-wasm program for x86-64 Linux guests:
// $BLIXARD_GUEST_WASM, beside the running program, /usr/lib/blixard.
func WasmBinary() (string, error) {
	if path := os.Getenv("BLIXARD_GUEST_WASM"); path != "" {
		return firstFile("the WebAssembly runtime blixard-guest-wasm", "make build, or set BLIXARD_GUEST_WASM", []string{path})
	}
	var candidates []string
	if self, err := os.Executable(); err == nil {
		candidates = append(candidates, filepath.Join(filepath.Dir(self), "blixard-guest-wasm"))
	}
	candidates = append(candidates, "/usr/lib/blixard/blixard-guest-wasm")
	return firstFile("the WebAssembly runtime blixard-guest-wasm", "make build, or set BLIXARD_GUEST_WASM", candidates)
}

// closure gives the libraries a program is linked with, by file name, and its
// program interpreter as "ld.so". The interpreter itself is asked.
func closure(ctx context.Context, program string) (map[string]string, error) {
	interpreter, err := interpreterOf(program)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, interpreter, "--list", program).Output()
	if err != nil {
		return nil, fmt.Errorf("asking %s for the libraries of %s: %w", interpreter, program, err)
	}
	libraries := map[string]string{"ld.so": interpreter}
	for line := range strings.Lines(string(out)) {
		// "	libgc.so.1 => /lib/x86_64-linux-gnu/libgc.so.1 (0x00007f…)"
		name, rest, ok := strings.Cut(strings.TrimSpace(line), " => ")
		if !ok || strings.HasPrefix(name, "/") {
			continue // the interpreter, or what the kernel provides
		}
		path, _, _ := strings.Cut(rest, " (0x")
		if !strings.HasPrefix(path, "/") || strings.Contains(name, "/") {
			return nil, fmt.Errorf("the library %s of %s is %s: %w", name, program, rest, ErrMissing)
		}
		libraries[name] = path
	}
	// Nix loads it when it starts, and complains in every function's log without it.
	if path := filepath.Join(filepath.Dir(libraries["libc.so.6"]), "libnss_dns.so.2"); readable(path) {
		libraries["libnss_dns.so.2"] = path
	}
	return libraries, nil
}

// part is a file of a runtime's disk: a file of this machine or a content.
type part struct {
	name    string // relative
	mode    fs.FileMode
	path    string
	content []byte
}

// makeDisk writes an EROFS disk, or finds the one that these parts have made.
func (s Store) makeDisk(ctx context.Context, kind string, parts []part) (disk Disk, err error) {
	slices.SortFunc(parts, func(a, b part) int { return strings.Compare(a.name, b.name) })
	note, err := s.partsNote(kind, parts)
	if err != nil {
		return Disk{}, err
	}
	if digest, err := os.ReadFile(note); err == nil && digestPattern.MatchString(string(digest)) {
		if path, err := s.diskPath(string(digest)); err == nil && readable(path) {
			return Disk{Path: path, Format: "raw", Digest: string(digest)}, nil
		}
	}
	if s.Root == "" {
		return Disk{}, errors.New("the bundle store has no directory")
	}
	if err := os.MkdirAll(s.Root, 0o755); err != nil {
		return Disk{}, fmt.Errorf("making the bundle store: %w", err)
	}
	s.sweep()
	out, err := os.CreateTemp(s.Root, temporaryPrefix)
	if err != nil {
		return Disk{}, err
	}
	kept := false
	defer func() {
		err = errors.Join(err, out.Close())
		if !kept {
			err = errors.Join(err, os.Remove(out.Name()))
		}
	}()
	if err := writeDisk(ctx, out, s.Root, parts); err != nil {
		return Disk{}, err
	}
	if err := errors.Join(out.Chmod(0o444), out.Sync()); err != nil {
		return Disk{}, err
	}
	sum, err := hashFile(out.Name())
	if err != nil {
		return Disk{}, err
	}
	digest := hex.EncodeToString(sum[:])
	path, err := s.diskPath(digest)
	if err != nil {
		return Disk{}, err
	}
	if err := os.Rename(out.Name(), path); err != nil {
		return Disk{}, err
	}
	kept = true
	if err := syncDir(s.Root); err != nil {
		return Disk{}, err
	}
	return Disk{Path: path, Format: "raw", Digest: digest}, s.writeNote(note, digest)
}

func (s Store) diskPath(digest string) (string, error) {
	return filepath.Abs(filepath.Join(s.Root, "runtime-"+digest+".erofs"))
}

// partsNote is the file that remembers which disk these parts make. Files are
// known by their place, size and time, since reading 70 MB takes its time.
func (s Store) partsNote(kind string, parts []part) (string, error) {
	hash := sha256.New()
	for _, p := range parts {
		if p.path == "" {
			sum := sha256.Sum256(p.content)
			fmt.Fprintf(hash, "%q %x\n", p.name, sum)
			continue
		}
		info, err := os.Stat(p.path)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(hash, "%q %q %d %d\n", p.name, p.path, info.Size(), info.ModTime().UnixNano())
	}
	fmt.Fprint(hash, runtimesVersion)
	return filepath.Join(s.Root, "runtime-"+kind+"-"+hex.EncodeToString(hash.Sum(nil))), nil
}

func writeDisk(ctx context.Context, out *os.File, spool string, parts []part) error {
	disk := erofs.Create(out, erofs.WithBuildTime(0, 0), erofs.WithTempDir(spool))
	made := map[string]bool{".": true}
	if err := disk.Mkdir("/", 0o755); err != nil {
		return err
	}
	for _, p := range parts {
		// Disks of runtimes are one level deep.
		if dir := filepath.Dir(p.name); !made[dir] {
			made[dir] = true
			if err := disk.Mkdir("/"+dir, 0o755); err != nil {
				return fmt.Errorf("packing %s: %w", dir, err)
			}
		}
		if err := p.write(ctx, disk); err != nil {
			return fmt.Errorf("packing %s: %w", p.name, err)
		}
	}
	return disk.Close()
}

func (p part) write(ctx context.Context, disk *erofs.Writer) (err error) {
	file, err := disk.Create("/" + p.name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	if err := file.Chmod(p.mode); err != nil {
		return err
	}
	counter := &countingWriter{ctx: ctx, w: file}
	if p.path == "" {
		_, err := counter.Write(p.content)
		return err
	}
	content, err := os.Open(p.path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, content.Close()) }()
	_, err = io.Copy(counter, content)
	return err
}
