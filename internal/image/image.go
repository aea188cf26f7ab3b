// Package image turns what a user gives (nothing, a kernel with its disks, a
// root file system) into a bundle a hypervisor can run: a kernel, an initial
// RAM disk, disks, a command line.
//
// Bundles are addressed by content: <root>/<digest>/ holds the files and
// manifest.json, and the digest is the SHA-256 of the manifest, which holds the
// SHA-256 of every file. The same input gives the same digest on every machine.
// A bundle is made in a temporary directory beside the others, written to the
// disk and renamed: what has a digest for a name is complete. Bundles are never
// changed; whoever writes to a disk works on a copy or an overlay.
//
// Trust: root file systems and bundles of other nodes are hostile input. They
// are never unpacked onto this machine: a tar becomes an initial RAM disk entry
// by entry, sizes and counts are bounded, and a fetched bundle is stored only
// when every hash fits.
//
// Ownership: a Store is plain paths and may be used concurrently, also by
// several processes on one root.
package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

var (
	// ErrNotFound: the store holds no such bundle.
	ErrNotFound = errors.New("no such bundle")
	// ErrMissing: this machine lacks something that bundles are made of; the
	// message names it and the command that brings it.
	ErrMissing = errors.New("this machine is not set up (run scripts/setup, or blixard doctor)")
	// ErrInvalid: what was given is no image, or not one that is safe to use.
	ErrInvalid = errors.New("not a usable image")
)

// Bundle is what a hypervisor needs, with absolute paths.
type Bundle struct {
	Digest         string // 64 lower-case hexadecimal digits
	Kernel         string
	Initrd         string // "" when there is none
	Disks          []Disk // in order: vda, vdb, …; to be used read-only or through a copy
	Cmdline        string // to be added to the hypervisor's own
	DefaultCommand []string
}

// Disk is a file of a bundle the guest sees as a block device.
type Disk struct {
	Path   string
	Format string // raw, qcow2
	Digest string // SHA-256 of the file's content, for disks of runtimes; else ""
}

// Store keeps bundles below Root. The zero values of the other fields are the
// places scripts/setup uses.
type Store struct {
	Root   string
	Assets string // kernel and modules; default $BLIXARD_ASSETS, /var/lib/blixard/assets
}

// manifest is the content of manifest.json, in this order of fields.
type manifest struct {
	Version int            `json:"version"`
	Files   []manifestFile `json:"files"`
	Cmdline string         `json:"cmdline,omitempty"`
	Command []string       `json:"command,omitempty"`
}

type manifestFile struct {
	Name   string `json:"name"` // of the file in the bundle's directory
	Role   string `json:"role"` // kernel, initrd, disk
	Format string `json:"format,omitempty"`
	Size   int64  `json:"size"` // bytes
	SHA256 string `json:"sha256"`
}

const (
	manifestName     = "manifest.json"
	manifestVersion  = 1
	maxManifestBytes = 1 << 20
	maxBundleFiles   = 32
	maxFileBytes     = 1 << 40 // of one file of a fetched bundle
	temporaryPrefix  = ".new-"
	temporaryAge     = 24 * time.Hour
)

var (
	digestPattern = regexp.MustCompile(`^[0-9a-f]{64}$`)
	namePattern   = regexp.MustCompile(`^[a-z][a-z0-9._-]{0,63}$`)
)

func (m manifest) encode() ([]byte, string, error) {
	encoded, err := json.Marshal(m)
	if err != nil {
		return nil, "", fmt.Errorf("encoding the manifest: %w", err)
	}
	sum := sha256.Sum256(encoded)
	return encoded, hex.EncodeToString(sum[:]), nil
}

func decodeManifest(encoded []byte) (manifest, error) {
	var m manifest
	if err := json.Unmarshal(encoded, &m); err != nil {
		return manifest{}, fmt.Errorf("decoding the manifest: %w: %w", ErrInvalid, err)
	}
	if m.Version != manifestVersion {
		return manifest{}, fmt.Errorf("manifest of version %d, this blixard knows %d: %w", m.Version, manifestVersion, ErrInvalid)
	}
	if len(m.Files) == 0 || len(m.Files) > maxBundleFiles {
		return manifest{}, fmt.Errorf("manifest with %d files: %w", len(m.Files), ErrInvalid)
	}
	kernels := 0
	seen := make(map[string]bool)
	for _, f := range m.Files {
		ok := namePattern.MatchString(f.Name) && f.Name != manifestName && !seen[f.Name] &&
			digestPattern.MatchString(f.SHA256) && f.Size >= 0 && f.Size <= maxFileBytes
		switch f.Role {
		case "kernel":
			kernels++
		case "initrd":
		case "disk":
			ok = ok && (f.Format == "raw" || f.Format == "qcow2")
		default:
			ok = false
		}
		if !ok {
			return manifest{}, fmt.Errorf("manifest with the file %q: %w", f.Name, ErrInvalid)
		}
		seen[f.Name] = true
	}
	if kernels != 1 {
		return manifest{}, fmt.Errorf("manifest with %d kernels: %w", kernels, ErrInvalid)
	}
	return m, nil
}

func (m manifest) bundle(digest, dir string) Bundle {
	b := Bundle{Digest: digest, Cmdline: m.Cmdline, DefaultCommand: m.Command}
	for _, f := range m.Files {
		path := filepath.Join(dir, f.Name)
		switch f.Role {
		case "kernel":
			b.Kernel = path
		case "initrd":
			b.Initrd = path
		case "disk":
			b.Disks = append(b.Disks, Disk{Path: path, Format: f.Format})
		}
	}
	return b
}

// Get finds a bundle. It checks the manifest and the files' sizes, not their
// contents. Errors wrap ErrNotFound when there is none.
func (s Store) Get(digest string) (Bundle, error) {
	m, dir, err := s.manifest(digest)
	if err != nil {
		return Bundle{}, err
	}
	for _, f := range m.Files {
		info, err := os.Lstat(filepath.Join(dir, f.Name))
		if err != nil {
			return Bundle{}, fmt.Errorf("reading bundle %s: %w", digest, err)
		}
		if !info.Mode().IsRegular() || info.Size() != f.Size {
			return Bundle{}, fmt.Errorf("reading bundle %s: %s was changed (%d bytes instead of %d); delete %s: %w", digest, f.Name, info.Size(), f.Size, dir, ErrInvalid)
		}
	}
	return m.bundle(digest, dir), nil
}

func (s Store) manifest(digest string) (manifest, string, error) {
	if !digestPattern.MatchString(digest) {
		return manifest{}, "", fmt.Errorf("%q is no digest: %w", digest, ErrNotFound)
	}
	root, err := filepath.Abs(s.Root)
	if err != nil {
		return manifest{}, "", fmt.Errorf("reading bundle %s: %w", digest, err)
	}
	dir := filepath.Join(root, digest)
	encoded, err := os.ReadFile(filepath.Join(dir, manifestName))
	if errors.Is(err, fs.ErrNotExist) {
		return manifest{}, "", fmt.Errorf("reading bundle %s: %w", digest, ErrNotFound)
	}
	if err != nil {
		return manifest{}, "", fmt.Errorf("reading bundle %s: %w", digest, err)
	}
	if sum := sha256.Sum256(encoded); hex.EncodeToString(sum[:]) != digest {
		return manifest{}, "", fmt.Errorf("reading bundle %s: its manifest was changed; delete %s: %w", digest, dir, ErrInvalid)
	}
	m, err := decodeManifest(encoded)
	if err != nil {
		return manifest{}, "", fmt.Errorf("reading bundle %s: %w", digest, err)
	}
	return m, dir, nil
}

// List tells all bundles in order of their digests; damaged ones are left out.
func (s Store) List() ([]Bundle, error) {
	entries, err := os.ReadDir(s.Root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing bundles: %w", err)
	}
	var bundles []Bundle
	for _, entry := range entries {
		if !digestPattern.MatchString(entry.Name()) {
			continue
		}
		b, err := s.Get(entry.Name())
		if err == nil {
			bundles = append(bundles, b)
		} else if !errors.Is(err, ErrInvalid) && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, ErrNotFound) {
			return nil, err
		}
	}
	return bundles, nil
}

// Remove deletes a bundle; that it is not there is no error.
func (s Store) Remove(digest string) error {
	if !digestPattern.MatchString(digest) {
		return fmt.Errorf("%q is no digest: %w", digest, ErrNotFound)
	}
	// Out of the way first: a half deleted bundle must not have its name.
	doomed := filepath.Join(s.Root, fmt.Sprintf("%sgone-%s-%d", temporaryPrefix, digest, time.Now().UnixNano()))
	err := os.Rename(filepath.Join(s.Root, digest), doomed)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = os.RemoveAll(doomed)
	}
	if err != nil {
		return fmt.Errorf("removing bundle %s: %w", digest, err)
	}
	return nil
}

// draft is a bundle being made in a temporary directory.
type draft struct {
	store    Store
	dir      string
	manifest manifest
}

func (s Store) draft() (*draft, error) {
	if s.Root == "" {
		return nil, errors.New("the bundle store has no directory")
	}
	if err := os.MkdirAll(s.Root, 0o755); err != nil {
		return nil, fmt.Errorf("making the bundle store: %w", err)
	}
	s.sweep()
	dir, err := os.MkdirTemp(s.Root, temporaryPrefix)
	if err != nil {
		return nil, fmt.Errorf("making a bundle: %w", err)
	}
	return &draft{store: s, dir: dir, manifest: manifest{Version: manifestVersion}}, nil
}

// sweep deletes what crashes have left behind. It is tried again by the next
// caller, so errors are of no interest here.
func (s Store) sweep() {
	entries, err := os.ReadDir(s.Root)
	if err != nil {
		return
	}
	for _, entry := range entries {
		info, err := entry.Info()
		if err == nil && strings.HasPrefix(entry.Name(), temporaryPrefix) && time.Since(info.ModTime()) > temporaryAge {
			//nolint:errcheck // as said above
			os.RemoveAll(filepath.Join(s.Root, entry.Name()))
		}
	}
}

// discard removes the draft's directory; after commit there is nothing to remove.
func (d *draft) discard(err *error) {
	*err = errors.Join(*err, os.RemoveAll(d.dir))
}

// commit gives the draft its digest for a name.
func (d *draft) commit(ctx context.Context) (Bundle, error) {
	if err := ctx.Err(); err != nil {
		return Bundle{}, err
	}
	encoded, digest, err := d.manifest.encode()
	if err != nil {
		return Bundle{}, err
	}
	if _, err := decodeManifest(encoded); err != nil {
		return Bundle{}, err
	}
	if err := writeFile(filepath.Join(d.dir, manifestName), encoded); err != nil {
		return Bundle{}, fmt.Errorf("writing the manifest: %w", err)
	}
	if err := errors.Join(os.Chmod(d.dir, 0o755), syncDir(d.dir)); err != nil {
		return Bundle{}, fmt.Errorf("writing bundle %s: %w", digest, err)
	}
	err = os.Rename(d.dir, filepath.Join(d.store.Root, digest))
	if err != nil {
		// Somebody made the same bundle before; it is as good as this one,
		// unless it is damaged.
		b, getErr := d.store.Get(digest)
		if getErr == nil {
			return b, nil
		}
		if !errors.Is(getErr, ErrInvalid) && !errors.Is(getErr, fs.ErrNotExist) && !errors.Is(getErr, ErrNotFound) {
			return Bundle{}, fmt.Errorf("writing bundle %s: %w", digest, errors.Join(err, getErr))
		}
		if err := d.store.Remove(digest); err != nil {
			return Bundle{}, err
		}
		if err := os.Rename(d.dir, filepath.Join(d.store.Root, digest)); err != nil {
			return Bundle{}, fmt.Errorf("writing bundle %s: %w", digest, err)
		}
	}
	if err := syncDir(d.store.Root); err != nil {
		return Bundle{}, fmt.Errorf("writing bundle %s: %w", digest, err)
	}
	return d.store.Get(digest)
}
