package code

import (
	"archive/zip"
	"bytes"
	"compress/flate"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/blixard/blixard"
)

// epoch is the time of all files in a canonical zip: the first that zips know.
var epoch = time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC)

// Zip packs one file. Equal arguments give equal bytes with the same version of
// Blixard.
func Zip(name string, mode fs.FileMode, content []byte) ([]byte, error) {
	var out bytes.Buffer
	p := newPacker(&out)
	if err := p.file(name, mode, bytes.NewReader(content)); err != nil {
		return nil, fmt.Errorf("packing %s: %w", name, err)
	}
	if err := p.archive.Close(); err != nil {
		return nil, fmt.Errorf("packing %s: %w", name, err)
	}
	return out.Bytes(), nil
}

// ZipDir packs what is in a directory, in order of names and without times, so
// that equal files give equal bytes. Of modes only whether a file can be executed
// is kept, links are kept as they are. Directories named .git are left out, and so
// is editors' and systems' litter; devices and the like are refused.
func ZipDir(dir string) (zipped []byte, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("packing %s: %w", dir, err)
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	var out bytes.Buffer
	p := newPacker(&out)
	err = fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == "." {
			return err
		}
		if slices.Contains([]string{".git", ".DS_Store", "__MACOSX"}, d.Name()) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		p.bytes += info.Size()
		if p.bytes > defaultUnzippedBytes {
			return blixard.Invalid("code", "large data does not belong into a function's code", "%s has more than %d MiB", dir, defaultUnzippedBytes>>20)
		}
		return p.take(root, name, info)
	})
	if err == nil {
		err = p.archive.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("packing %s: %w", dir, err)
	}
	if p.entries == 0 {
		return nil, blixard.Invalid("code", "", "there is no file in %s", dir)
	}
	return out.Bytes(), nil
}

type packer struct {
	archive *zip.Writer
	entries int
	bytes   int64
}

func newPacker(w io.Writer) *packer {
	p := &packer{archive: zip.NewWriter(w)}
	p.archive.RegisterCompressor(zip.Deflate, func(w io.Writer) (io.WriteCloser, error) { return flate.NewWriter(w, flate.BestSpeed) })
	return p
}

func (p *packer) take(root *os.Root, name string, info fs.FileInfo) error {
	switch mode := info.Mode(); {
	case mode.IsRegular():
		file, err := root.Open(name)
		if err != nil {
			return err
		}
		return errors.Join(p.file(name, info.Mode(), file), file.Close())
	case mode.Type() == fs.ModeSymlink:
		target, err := root.Readlink(name)
		if err != nil {
			return err
		}
		return p.entry(name, fs.ModeSymlink|0o777, strings.NewReader(target))
	case mode.IsDir():
		p.entries++
		_, err := p.archive.CreateHeader(header(name+"/", fs.ModeDir|0o755))
		return err
	}
	return blixard.Invalid("code", "", "%s is a device, pipe or socket", name)
}

func (p *packer) file(name string, mode fs.FileMode, content io.Reader) error {
	permissions := fs.FileMode(0o644)
	if mode&0o111 != 0 {
		permissions = 0o755
	}
	return p.entry(name, permissions, content)
}

func (p *packer) entry(name string, mode fs.FileMode, content io.Reader) error {
	p.entries++
	w, err := p.archive.CreateHeader(header(name, mode))
	if err != nil {
		return err
	}
	_, err = io.Copy(w, content)
	return err
}

func header(name string, mode fs.FileMode) *zip.FileHeader {
	h := &zip.FileHeader{Name: name, Method: zip.Deflate, Modified: epoch}
	if mode.IsDir() {
		h.Method = zip.Store
	}
	h.SetMode(mode)
	return h
}

// ZipPath packs what a user names for a function's code: a zip as it is, a
// directory, or one file. Programs and scripts are packed as bootstrap, others
// (.nix, .wasm) keep their name. With a .nix file goes the pkgs.nix beside it, if
// there is one: guests have no other pkgs.
func ZipPath(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("reading the code: %w", err)
	}
	if info.IsDir() {
		return ZipDir(path)
	}
	if !info.Mode().IsRegular() {
		return nil, blixard.Invalid("code", "", "%s is neither a file nor a directory", path)
	}
	if limit := int64(defaultZipBytes); info.Size() > limit {
		return nil, blixard.Invalid("code", "large data does not belong into a function's code", "%s has more than %d MiB", path, limit>>20)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading the code: %w", err)
	}
	name, mode := filepath.Base(path), info.Mode()
	switch {
	case bytes.HasPrefix(content, []byte("PK\x03\x04")) || bytes.HasPrefix(content, []byte("PK\x05\x06")):
		return content, nil
	case bytes.HasPrefix(content, []byte("\x7fELF")) || bytes.HasPrefix(content, []byte("#!")):
		name, mode = blixard.BootstrapFile, 0o755
	case filepath.Ext(name) == ".nix" && name != blixard.PkgsFile:
		return zipNix(path, content)
	}
	return Zip(name, mode, content)
}

// zipNix packs a .nix file and the pkgs.nix beside it.
func zipNix(path string, content []byte) ([]byte, error) {
	name := filepath.Base(path)
	pkgs, err := os.ReadFile(filepath.Join(filepath.Dir(path), blixard.PkgsFile))
	if errors.Is(err, fs.ErrNotExist) {
		return Zip(name, 0o644, content)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the code: %w", err)
	}
	files := []struct {
		name    string
		content []byte
	}{{name, content}, {blixard.PkgsFile, pkgs}}
	if blixard.PkgsFile < name {
		slices.Reverse(files) // as a directory would be packed
	}
	var out bytes.Buffer
	p := newPacker(&out)
	for _, f := range files {
		if err := p.file(f.name, 0o644, bytes.NewReader(f.content)); err != nil {
			return nil, fmt.Errorf("packing %s: %w", f.name, err)
		}
	}
	if err := p.archive.Close(); err != nil {
		return nil, fmt.Errorf("packing %s: %w", name, err)
	}
	return out.Bytes(), nil
}
