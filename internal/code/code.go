// Package code keeps the code of functions: zips, addressed by their content.
//
// <root>/<digest>.zip is a zip that was checked when it was stored, and
// <digest>-<n>.erofs the disk that guests see its files on, made when it is first
// asked for and again when it is missing. The digest is the SHA-256 of the zip,
// so a node may fetch it from any other and check what it got.
//
// Trust: zips are hostile input. They are never unpacked onto this machine: a
// zip becomes a disk image file by file, with bounds on everything, and only the
// guest ever looks at the files by their names.
//
// Files are written beside their place, made durable and renamed: what has a
// digest for a name is complete. They are never changed afterwards.
//
// Ownership: a Store is plain paths and may be used concurrently, also by several
// processes on one root.
package code

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/blixard/blixard"
)

// Limits bound what is taken for code. Zero fields have their defaults.
type Limits struct {
	ZipBytes      int64 // of the zip; 256 MiB
	UnzippedBytes int64 // of all files; 512 MiB
	Files         int   // files, links and directories; 20,000
}

// The defaults of Limits.
const (
	defaultZipBytes      = 256 << 20
	defaultUnzippedBytes = 512 << 20
	defaultFiles         = 20_000
)

func (l Limits) filled() Limits {
	if l.ZipBytes == 0 {
		l.ZipBytes = defaultZipBytes
	}
	if l.UnzippedBytes == 0 {
		l.UnzippedBytes = defaultUnzippedBytes
	}
	if l.Files == 0 {
		l.Files = defaultFiles
	}
	return l
}

// Store keeps the code of functions below Root.
type Store struct {
	Root   string
	Limits Limits
}

// Package is a zip in the store.
type Package struct {
	Digest        string // SHA-256 of the zip, 64 lower-case hexadecimal digits
	Bytes         int64  // of the zip
	UnzippedBytes int64  // of all its files
	Files         int    // without directories
}

const (
	temporaryPrefix = ".new-"
	temporaryAge    = 24 * time.Hour
	zipSuffix       = ".zip"
	diskSuffix      = ".erofs"
)

var digestPattern = regexp.MustCompile(`^[0-9a-f]{64}$`)

// invalid is the error of a zip that cannot be a function's code.
func invalid(format string, args ...any) error {
	return blixard.Invalid("code", "", format, args...)
}

func notFound(digest string) error {
	return blixard.Errorf(blixard.CodeNotFound, "there is no code %.64q on this node", digest)
}

// Put stores a zip. That it is there already is no error. A zip that is broken,
// hostile or too large gives a *blixard.Error with CodeInvalid.
func (s Store) Put(ctx context.Context, r io.Reader) (Package, error) {
	return s.put(ctx, "", r)
}

// PutDigest stores a zip that another node has given, if it is the one that was
// asked for.
func (s Store) PutDigest(ctx context.Context, digest string, r io.Reader) (Package, error) {
	if !digestPattern.MatchString(digest) {
		return Package{}, notFound(digest)
	}
	return s.put(ctx, digest, r)
}

func (s Store) put(ctx context.Context, wanted string, r io.Reader) (p Package, err error) {
	if err := os.MkdirAll(s.Root, 0o755); err != nil {
		return Package{}, fmt.Errorf("making the code store: %w", err)
	}
	s.sweep()
	file, err := os.CreateTemp(s.Root, temporaryPrefix)
	if err != nil {
		return Package{}, fmt.Errorf("storing code: %w", err)
	}
	temporary := file.Name()
	kept := false
	defer func() {
		err = errors.Join(err, file.Close())
		if !kept {
			err = errors.Join(err, os.Remove(temporary))
		}
	}()
	limits := s.Limits.filled()
	hash := sha256.New()
	n, err := io.Copy(io.MultiWriter(file, hash), io.LimitReader(contextReader{ctx, r}, limits.ZipBytes+1))
	if err != nil {
		return Package{}, fmt.Errorf("storing code: %w", err)
	}
	if n > limits.ZipBytes {
		return Package{}, blixard.Invalid("code", "large data does not belong into a function's code", "the zip has more than %d MiB", limits.ZipBytes>>20)
	}
	p = Package{Digest: hex.EncodeToString(hash.Sum(nil)), Bytes: n}
	if wanted != "" && p.Digest != wanted {
		return Package{}, invalid("the code that was sent has the digest %s instead of %s", p.Digest, wanted)
	}
	t, err := readTree(file, n, limits)
	if err != nil {
		return Package{}, err
	}
	if err := t.check(ctx); err != nil {
		return Package{}, err
	}
	p.UnzippedBytes, p.Files = t.bytes, t.files
	if err := errors.Join(file.Chmod(0o444), file.Sync()); err != nil {
		return Package{}, fmt.Errorf("storing code: %w", err)
	}
	// Whoever has stored the same bytes before is replaced by them.
	if err := os.Rename(temporary, s.zipPath(p.Digest)); err != nil {
		return Package{}, fmt.Errorf("storing code: %w", err)
	}
	kept = true
	if err := syncDir(s.Root); err != nil {
		return Package{}, fmt.Errorf("storing code: %w", err)
	}
	return p, nil
}

func (s Store) zipPath(digest string) string { return filepath.Join(s.Root, digest+zipSuffix) }

// Has tells whether the zip is here.
func (s Store) Has(digest string) bool {
	if !digestPattern.MatchString(digest) {
		return false
	}
	info, err := os.Lstat(s.zipPath(digest))
	return err == nil && info.Mode().IsRegular()
}

// Get tells about a zip. CodeNotFound when it is not here.
func (s Store) Get(digest string) (Package, error) {
	file, size, err := s.open(digest)
	if err != nil {
		return Package{}, err
	}
	defer file.Close()
	t, err := readTree(file, size, s.Limits.filled())
	if err != nil {
		return Package{}, err
	}
	return Package{Digest: digest, Bytes: size, UnzippedBytes: t.bytes, Files: t.files}, nil
}

// Open gives the zip and its size in bytes. CodeNotFound when it is not here.
func (s Store) Open(digest string) (io.ReadCloser, int64, error) {
	file, size, err := s.open(digest)
	if err != nil {
		return nil, 0, err
	}
	return file, size, nil
}

func (s Store) open(digest string) (*os.File, int64, error) {
	if !digestPattern.MatchString(digest) {
		return nil, 0, notFound(digest)
	}
	file, err := os.Open(s.zipPath(digest))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, notFound(digest)
	}
	if err != nil {
		return nil, 0, fmt.Errorf("reading code %s: %w", digest, err)
	}
	info, err := file.Stat()
	if err != nil {
		return nil, 0, errors.Join(fmt.Errorf("reading code %s: %w", digest, err), file.Close())
	}
	return file, info.Size(), nil
}

// Remove deletes a zip and its disk; that they are not there is no error. A guest
// that has the disk open keeps it until it ends.
func (s Store) Remove(digest string) error {
	if !digestPattern.MatchString(digest) {
		return notFound(digest)
	}
	disks, err := filepath.Glob(filepath.Join(s.Root, digest+"-*"+diskSuffix))
	if err != nil {
		return fmt.Errorf("removing code %s: %w", digest, err)
	}
	for _, path := range append(disks, s.zipPath(digest)) {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("removing code %s: %w", digest, err)
		}
	}
	return nil
}

// List tells all zips in order of their digests; damaged ones are left out.
func (s Store) List() ([]Package, error) {
	entries, err := os.ReadDir(s.Root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing code: %w", err)
	}
	var packages []Package
	for _, entry := range entries {
		digest, ok := strings.CutSuffix(entry.Name(), zipSuffix)
		if !ok || !digestPattern.MatchString(digest) {
			continue
		}
		p, err := s.Get(digest)
		if err == nil {
			packages = append(packages, p)
		} else if code := blixard.CodeOf(err); code != blixard.CodeInvalid && code != blixard.CodeNotFound {
			return nil, err
		}
	}
	slices.SortFunc(packages, func(a, b Package) int { return strings.Compare(a.Digest, b.Digest) })
	return packages, nil
}

// sweep deletes what crashes have left behind. It is tried again by the next
// caller, so errors are of no interest here.
func (s Store) sweep() {
	entries, err := os.ReadDir(s.Root)
	if err != nil {
		return
	}
	for _, entry := range entries {
		if !strings.HasPrefix(entry.Name(), temporaryPrefix) {
			continue
		}
		info, err := entry.Info()
		if err == nil && time.Since(info.ModTime()) > temporaryAge {
			//nolint:errcheck // as said above
			os.Remove(filepath.Join(s.Root, entry.Name()))
		}
	}
}

// contextReader stops a long copy when its context ends.
type contextReader struct {
	ctx context.Context //nolint:containedctx // of the one copy it is made for
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
