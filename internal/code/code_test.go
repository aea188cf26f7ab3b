package code_test

import (
	"archive/zip"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/erofs/go-erofs"
	"github.com/google/go-cmp/cmp"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/code"
)

// part is an entry of a zip under construction.
type part struct {
	name    string
	mode    fs.FileMode
	content string
	raw     func(*zip.FileHeader) // changes the header; the content is then written as it is
}

func pack(t testing.TB, parts ...part) []byte {
	t.Helper()
	var out bytes.Buffer
	archive := zip.NewWriter(&out)
	for _, p := range parts {
		header := &zip.FileHeader{Name: p.name, Method: zip.Deflate}
		header.SetMode(p.mode)
		var w io.Writer
		var err error
		if p.raw != nil {
			header.CompressedSize64, header.UncompressedSize64 = uint64(len(p.content)), uint64(len(p.content))
			p.raw(header)
			w, err = archive.CreateRaw(header)
		} else {
			w, err = archive.CreateHeader(header)
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, p.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := archive.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// openErofs reads a disk. The reader, unlike kernels, wants to read a little beyond
// the last inode.
func openErofs(disk []byte) (fs.FS, error) {
	return erofs.Open(bytes.NewReader(append(disk, make([]byte, 4096)...)))
}

func TestPutAndDisk(t *testing.T) {
	ctx := t.Context()
	store := code.Store{Root: filepath.Join(t.TempDir(), "code")}
	long := strings.Repeat("Blixard ", 10_000)
	zipped := pack(t,
		part{name: "lib/deep/data.txt", mode: 0o600, content: long},
		part{name: "lib/", mode: fs.ModeDir | 0o700},
		part{name: "bootstrap", content: "#!/bin/sh\n"},
		part{name: "tool", mode: 0o700, content: "x"},
		part{name: "link", mode: fs.ModeSymlink | 0o777, content: "lib/deep/data.txt"},
		part{name: "empty", mode: 0o644},
	)
	p, err := store.Put(ctx, bytes.NewReader(zipped))
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(zipped)
	want := code.Package{Digest: hex.EncodeToString(sum[:]), Bytes: int64(len(zipped)), UnzippedBytes: int64(len(long)) + 11, Files: 5}
	if p != want {
		t.Fatalf("stored %+v, want %+v", p, want)
	}
	again, err := store.Put(ctx, bytes.NewReader(zipped))
	if err != nil || again != want {
		t.Fatalf("stored again: %+v, %v", again, err)
	}
	list, err := store.List()
	if diff := cmp.Diff([]code.Package{want}, list); diff != "" || err != nil {
		t.Fatalf("listed: %v %s", err, diff)
	}
	r, size, err := store.Open(p.Digest)
	if err != nil || size != want.Bytes {
		t.Fatalf("opened %d bytes, %v", size, err)
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, zipped) {
		t.Fatalf("read other bytes, %v", err)
	}

	disk, err := store.Disk(ctx, p.Digest)
	if err != nil {
		t.Fatal(err)
	}
	first, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	image, err := openErofs(first)
	if err != nil {
		t.Fatal(err)
	}
	err = fs.WalkDir(image, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		stat, ok := info.Sys().(*erofs.Stat)
		if !ok || stat.UID != 0 || stat.GID != 0 || stat.Mtime != 0 {
			t.Errorf("%s: %+v", name, stat)
		}
		got[name] = info.Mode().String()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]string{
		".": "drwxr-xr-x", "lib": "drwxr-xr-x", "lib/deep": "drwxr-xr-x", "lib/deep/data.txt": "-rw-r--r--",
		"bootstrap": "-rwxr-xr-x", "tool": "-rwxr-xr-x", "link": "Lrwxrwxrwx", "empty": "-rw-r--r--",
	}, got); diff != "" {
		t.Error(diff)
	}
	if text, err := fs.ReadFile(image, "link"); err != nil || string(text) != long {
		t.Errorf("read %d bytes through the link, %v", len(text), err)
	}

	// Another node makes the same disk.
	other := code.Store{Root: t.TempDir()}
	if _, err := other.PutDigest(ctx, p.Digest, bytes.NewReader(zipped)); err != nil {
		t.Fatal(err)
	}
	disk, err = other.Disk(ctx, p.Digest)
	if err != nil {
		t.Fatal(err)
	}
	second, err := os.ReadFile(disk)
	if err != nil || !bytes.Equal(first, second) {
		t.Errorf("the disks differ: %d and %d bytes, %v", len(first), len(second), err)
	}

	if err := store.Remove(p.Digest); err != nil {
		t.Fatal(err)
	}
	if err := store.Remove(p.Digest); err != nil {
		t.Errorf("removing what is not there: %v", err)
	}
	left, err := os.ReadDir(store.Root)
	if len(left) != 0 || err != nil {
		t.Errorf("left over: %v, %v", left, err)
	}
	if _, err := store.Disk(ctx, p.Digest); blixard.CodeOf(err) != blixard.CodeNotFound {
		t.Errorf("the disk of what is not there: %v", err)
	}
	if _, err := store.Get("../../etc/passwd"); blixard.CodeOf(err) != blixard.CodeNotFound {
		t.Errorf("a digest that is none: %v", err)
	}
}

// reader gives n zeros.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestHostileZips(t *testing.T) {
	good := part{name: "bootstrap", mode: 0o755, content: "#!/bin/sh\n"}
	raw := func(change func(*zip.FileHeader)) func(*zip.FileHeader) {
		return func(h *zip.FileHeader) { h.Method = zip.Store; change(h) }
	}
	overlapping := func() []byte {
		// Many entries of the directory that share one compressed megabyte.
		one := pack(t, part{name: "a", content: strings.Repeat("\x00", 1<<20)})
		end := bytes.LastIndex(one, []byte("PK\x05\x06"))
		start := int(binary.LittleEndian.Uint32(one[end+16:]))
		entry := one[start:end]
		out := bytes.Clone(one[:start])
		const n = 1000
		for i := range n {
			e := bytes.Clone(entry)
			e[46] = 'a' + byte(i%26)
			e[28] = 3 // longer name
			e = append(e[:47], append([]byte(fmt.Sprintf("%02x", i/26)), e[47:]...)...)
			out = append(out, e...)
		}
		tail := bytes.Clone(one[end:])
		binary.LittleEndian.PutUint16(tail[8:], n)
		binary.LittleEndian.PutUint16(tail[10:], n)
		binary.LittleEndian.PutUint32(tail[12:], uint32(len(out)-start))
		return append(out, tail...)
	}
	var crowd []part
	for i := range 300 {
		crowd = append(crowd, part{name: fmt.Sprintf("f%d", i)})
	}
	var wide []part
	for i := range 150 {
		wide = append(wide, part{name: fmt.Sprintf("%d/a/b/c/d/e/f", i)})
	}
	flip := pack(t, part{name: "bootstrap", raw: raw(func(h *zip.FileHeader) { h.CRC32 = 1 }), content: "#!/bin/sh\n"})
	for _, test := range []struct {
		name   string
		zip    []byte
		reason string
	}{
		{"nothing", nil, "empty"},
		{"no zip", []byte("#!/bin/sh\n"), "not a zip"},
		{"no files", pack(t), "holds no file"},
		{"only directories", pack(t, part{name: "a/", mode: fs.ModeDir}), "holds no file"},
		{"up and out", pack(t, good, part{name: "../evil"}), "leads out"},
		{"up in the middle", pack(t, good, part{name: "a/../../evil"}), "leads out"},
		{"absolute", pack(t, good, part{name: "/etc/passwd"}), "absolute"},
		{"backslash", pack(t, good, part{name: `..\evil`}), "characters"},
		{"NUL", pack(t, good, part{name: "a\x00b"}), "characters"},
		{"double slash", pack(t, good, part{name: "a//b"}), "do not have"},
		{"dot", pack(t, good, part{name: "."}), "without a name"},
		{"long", pack(t, good, part{name: strings.Repeat("a", 300)}), "do not have"},
		{"deep", pack(t, good, part{name: strings.Repeat("a/", 100) + "b"}), "directories"},
		{"twice", pack(t, good, good), "twice"},
		{"twice, hidden", pack(t, good, part{name: "./bootstrap"}), "twice"},
		{"a file and a directory", pack(t, good, part{name: "bootstrap/x"}), "no directory"},
		{"a directory and a file", pack(t, part{name: "a/b"}, part{name: "a"}), "twice"},
		{"below a link", pack(t, part{name: "l", mode: fs.ModeSymlink, content: "."}, part{name: "l/x"}), "no directory"},
		{"absolute link", pack(t, good, part{name: "l", mode: fs.ModeSymlink, content: "/etc"}), "out of the zip"},
		{"link out", pack(t, good, part{name: "a/l", mode: fs.ModeSymlink, content: "../../x"}), "out of the zip"},
		{"link out through links", pack(t, good, part{name: "d", mode: fs.ModeSymlink, content: "."}, part{name: "l", mode: fs.ModeSymlink, content: "d/d/../x"}), "out of the zip"},
		{"circle", pack(t, good, part{name: "a", mode: fs.ModeSymlink, content: "b"}, part{name: "b", mode: fs.ModeSymlink, content: "a"}), "circle"},
		{"empty link", pack(t, good, part{name: "a", mode: fs.ModeSymlink}), "0 bytes"},
		{"device", pack(t, good, part{name: "sda", mode: fs.ModeDevice}), "device"},
		{"character device", pack(t, good, part{name: "null", mode: fs.ModeDevice | fs.ModeCharDevice}), "device"},
		{"pipe", pack(t, good, part{name: "pipe", mode: fs.ModeNamedPipe}), "device"},
		{"socket", pack(t, good, part{name: "socket", mode: fs.ModeSocket}), "device"},
		{"encrypted", pack(t, part{name: "bootstrap", raw: raw(func(h *zip.FileHeader) { h.Flags = 1 })}), "encrypted"},
		{"unknown method", pack(t, part{name: "bootstrap", raw: func(h *zip.FileHeader) { h.Method = 93 }}), "method 93"},
		{"wrong checksum", flip, "checksum"},
		{"declares less", pack(t, part{name: "a", raw: raw(func(h *zip.FileHeader) { h.UncompressedSize64 = 1 }), content: "0123456789"}), "unpack"},
		{"declares more", pack(t, part{name: "a", raw: raw(func(h *zip.FileHeader) { h.UncompressedSize64 = 100 }), content: "0123456789"}), "unpack"},
		{"declares far more", pack(t, part{name: "a", raw: raw(func(h *zip.FileHeader) { h.UncompressedSize64 = 1 << 62 }), content: "0123456789"}), "more than 1 MiB"},
		{"two that overflow together", pack(t, part{name: "a", raw: raw(func(h *zip.FileHeader) { h.UncompressedSize64 = 1<<20 - 1 })}, part{name: "b", raw: raw(func(h *zip.FileHeader) { h.UncompressedSize64 = 2 })}), "more than 1 MiB"},
		{"bomb", pack(t, part{name: "a", content: strings.Repeat("\x00", 2<<20)}), "more than 1 MiB"},
		{"overlapping bomb", overlapping(), "more than 1 MiB"},
		{"many files", pack(t, crowd...), "300 entries"},
		{"many directories", pack(t, wide...), "too many directories"},
		{"cut off", pack(t, good)[:60], "not a zip"},
	} {
		t.Run(test.name, func(t *testing.T) {
			store := code.Store{Root: t.TempDir(), Limits: code.Limits{UnzippedBytes: 1 << 20, Files: 250}}
			if strings.HasPrefix(test.name, "overlapping") {
				store.Limits.Files = 2000
			}
			_, err := store.Put(t.Context(), bytes.NewReader(test.zip))
			if blixard.CodeOf(err) != blixard.CodeInvalid || !strings.Contains(err.Error(), test.reason) {
				t.Errorf("%v, want it to tell of %q", err, test.reason)
			}
			if left, err := os.ReadDir(store.Root); len(left) != 0 || err != nil {
				t.Errorf("left over: %v, %v", left, err)
			}
		})
	}
}

func TestBounds(t *testing.T) {
	store := code.Store{Root: t.TempDir(), Limits: code.Limits{ZipBytes: 1 << 20}}
	_, err := store.Put(t.Context(), zeros{})
	if blixard.CodeOf(err) != blixard.CodeInvalid || !strings.Contains(err.Error(), "more than 1 MiB") {
		t.Errorf("an endless upload: %v", err)
	}
	// Well packed, but little.
	zipped := pack(t, part{name: "bootstrap", content: strings.Repeat("\x00", 10<<20)})
	if _, err := store.Put(t.Context(), bytes.NewReader(zipped)); err != nil {
		t.Errorf("zeros: %v", err)
	}
	zipped = pack(t, part{name: "bootstrap", content: strings.Repeat("\x00", 65<<20)})
	if _, err := store.Put(t.Context(), bytes.NewReader(zipped)); err == nil || !strings.Contains(err.Error(), "times its size") {
		t.Errorf("a bomb below the limit: %v", err)
	}
	// A directory of millions of entries is refused before it is in memory.
	small := code.Store{Root: t.TempDir(), Limits: code.Limits{Files: 10}}
	var crowd []part
	for i := range 20_000 {
		crowd = append(crowd, part{name: fmt.Sprintf("some/longer/name/of/a/file/%d", i), mode: 0o644})
	}
	if _, err := small.Put(t.Context(), bytes.NewReader(pack(t, crowd...))); err == nil || !strings.Contains(err.Error(), "too many entries") {
		t.Errorf("a large directory: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := store.Put(ctx, zeros{}); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled upload: %v", err)
	}
	wrong := strings.Repeat("0", 64)
	if _, err := store.PutDigest(t.Context(), wrong, bytes.NewReader(pack(t, part{name: "a", content: "b"}))); blixard.CodeOf(err) != blixard.CodeInvalid {
		t.Errorf("another zip than asked for: %v", err)
	}
	list, err := store.List()
	if err != nil || len(list) != 1 {
		t.Errorf("stored %v, %v", list, err)
	}
}

func TestZipDir(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{"handler.nix": "{ event }: event", "lib/a.nix": "1", ".git/HEAD": "x"} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755), os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("lib/a.nix", filepath.Join(dir, "b.nix")); err != nil {
		t.Fatal(err)
	}
	one, err := code.ZipDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(filepath.Join(dir, "handler.nix"), time.Unix(5e8, 0), time.Unix(5e8, 0)); err != nil {
		t.Fatal(err)
	}
	two, err := code.ZipPath(dir)
	if err != nil || !bytes.Equal(one, two) {
		t.Errorf("equal files give other bytes, %v", err)
	}
	store := code.Store{Root: t.TempDir()}
	p, err := store.Put(t.Context(), bytes.NewReader(one))
	if err != nil || p.Files != 3 {
		t.Errorf("stored %+v, %v", p, err)
	}
	if err := store.Inspect(t.Context(), p.Digest, blixard.FunctionSpec{Runtime: "nix", Handler: "b.nix"}); err != nil {
		t.Error(err)
	}
	if got := code.Runtime(dir); got != "nix" {
		t.Errorf("guessed the runtime %q", got)
	}
	if _, err := code.ZipDir(t.TempDir()); blixard.CodeOf(err) != blixard.CodeInvalid {
		t.Errorf("an empty directory: %v", err)
	}
}

func FuzzPut(f *testing.F) {
	f.Add(pack(f, part{name: "bootstrap", mode: 0o755, content: "#!/bin/sh\n"}, part{name: "a/l", mode: fs.ModeSymlink, content: "../bootstrap"}))
	f.Add(pack(f, part{name: "a/", mode: fs.ModeDir}, part{name: "a/b", content: strings.Repeat("x", 5000)}))
	f.Fuzz(func(t *testing.T, zipped []byte) {
		store := code.Store{Root: t.TempDir(), Limits: code.Limits{UnzippedBytes: 1 << 20, Files: 100}}
		p, err := store.Put(t.Context(), bytes.NewReader(zipped))
		if err != nil {
			if blixard.CodeOf(err) != blixard.CodeInvalid {
				t.Errorf("an error of ours: %v", err)
			}
			return
		}
		for _, runtime := range []string{"nix", "bootstrap", "http", "wasm"} {
			if err := store.Inspect(t.Context(), p.Digest, blixard.FunctionSpec{Runtime: runtime}); err != nil && blixard.CodeOf(err) != blixard.CodeInvalid {
				t.Errorf("an error of ours: %v", err)
			}
		}
		// What was taken makes a disk that can be read.
		path, err := store.Disk(t.Context(), p.Digest)
		if err != nil {
			t.Fatal(err)
		}
		disk, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		image, err := openErofs(disk)
		if err != nil {
			t.Fatal(err)
		}
		var bytes int64
		err = fs.WalkDir(image, ".", func(_ string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				info, err := d.Info()
				if err != nil {
					return err
				}
				bytes += info.Size()
			}
			return err
		})
		if err != nil || bytes != p.UnzippedBytes {
			t.Errorf("the disk has %d bytes instead of %d, %v", bytes, p.UnzippedBytes, err)
		}
	})
}

// TestZipPathTakesPkgs: a nix function that is one file gets the pkgs beside it.
func TestZipPathTakesPkgs(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{"image-processor.nix": "{ pkgs, ... }: { }", "pkgs.nix": "{ }", "notes.txt": "x"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	zipped, err := code.ZipPath(filepath.Join(dir, "image-processor.nix"))
	if err != nil {
		t.Fatal(err)
	}
	store := code.Store{Root: t.TempDir()}
	p, err := store.Put(t.Context(), bytes.NewReader(zipped))
	if err != nil || p.Files != 2 {
		t.Errorf("stored %+v, %v", p, err)
	}
	if err := store.Inspect(t.Context(), p.Digest, blixard.FunctionSpec{Runtime: "nix"}); err != nil {
		t.Error(err)
	}
}
