package image_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"
	"go.uber.org/goleak"

	"github.com/blixard/blixard/internal/guest"
	"github.com/blixard/blixard/internal/image"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeParts gives a store a kernel and an agent that are just files.
func fakeParts(t *testing.T) image.Store {
	t.Helper()
	dir := t.TempDir()
	write(t, dir, "vmlinuz", "kernel")
	write(t, dir, "agent", "agent")
	t.Setenv("BLIXARD_KERNEL", filepath.Join(dir, "vmlinuz"))
	t.Setenv("BLIXARD_MODULES", "")
	t.Setenv("BLIXARD_GUEST", filepath.Join(dir, "agent"))
	return image.Store{Root: filepath.Join(t.TempDir(), "images")}
}

func write(t *testing.T, dir, name, content string) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// listInitrd tells an initial RAM disk in the archive's order.
func listInitrd(t *testing.T, path string) []string {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var lines []string
	for r := cpio.NewReader(file); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return lines
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case header.Linkname != "":
			lines = append(lines, header.Name+" -> "+header.Linkname)
		case header.Mode.IsDir():
			lines = append(lines, header.Name+"/")
		default:
			lines = append(lines, fmt.Sprintf("%s %o %q", header.Name, header.Mode.Perm(), content))
		}
	}
}

type tarEntry struct {
	tar.Header
	content string
}

func makeTar(t *testing.T, compress bool, entries ...tarEntry) string {
	t.Helper()
	var b bytes.Buffer
	var w io.Writer = &b
	if compress {
		w = gzip.NewWriter(&b)
	}
	out := tar.NewWriter(w)
	for _, e := range entries {
		if e.Typeflag == 0 {
			e.Typeflag = tar.TypeReg
		}
		e.Mode |= 0o644
		e.Size = int64(len(e.content))
		if err := out.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(out, e.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	if c, ok := w.(io.Closer); ok {
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(t.TempDir(), "root.tar")
	if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func file(name, content string) tarEntry {
	return tarEntry{tar.Header{Name: name}, content}
}

func link(kind byte, name, target string) tarEntry {
	return tarEntry{tar.Header{Name: name, Typeflag: kind, Linkname: target}, ""}
}

func TestImportTarOfRootFileSystem(t *testing.T) {
	s := fakeParts(t)
	entries := []tarEntry{
		file("usr/lib/os-release", "ID=x\n"),
		link(tar.TypeSymlink, "lib", "/usr/lib"),
		link(tar.TypeLink, "usr/lib/hard", "usr/lib/os-release"),
		file("./etc/blixard/command", `["/bin/app","--serve"]`),
		file("init", "their own"),
		{tar.Header{Name: "dev/null", Typeflag: tar.TypeChar}, ""},
	}
	b, err := s.Import(t.Context(), makeTar(t, false, entries...))
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"/bin/app", "--serve"}; !slices.Equal(b.DefaultCommand, want) {
		t.Errorf("command %q", b.DefaultCommand)
	}
	want := []string{
		"dev/", "etc/", "etc/blixard/", `etc/blixard/command 644 "[\"/bin/app\",\"--serve\"]"`,
		"lib -> /usr/lib", "usr/", "usr/lib/", `usr/lib/hard 644 "ID=x\n"`, `usr/lib/os-release 644 "ID=x\n"`,
		// Ours, behind what it needs; lib and etc are theirs.
		`init 755 "agent"`, "lib/blixard/", "lib/blixard/modules/", `lib/blixard/modules/list 644 ""`, `lib/blixard/modules/vsock 644 ""`,
		"proc/", "run/", "sys/", "tmp/",
	}
	if got := listInitrd(t, b.Initrd); !slices.Equal(got, want) {
		t.Errorf("initial RAM disk:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	again, err := image.Store{Root: t.TempDir()}.Import(t.Context(), makeTar(t, true, entries...))
	if err != nil {
		t.Fatal(err)
	}
	if again.Digest != b.Digest {
		t.Errorf("the same root gave %s and %s", b.Digest, again.Digest)
	}
}

func TestImportRefusesHostileInput(t *testing.T) {
	s := fakeParts(t)
	root := file("etc/passwd", "root\n")
	directory := func(files ...string) string {
		dir := t.TempDir()
		for i := 0; i < len(files); i += 2 {
			write(t, dir, files[i], files[i+1])
		}
		return dir
	}
	qcow := "QFI\xfb\x00\x00\x00\x03" + "\x00\x00\x00\x00\x00\x00\x02\x00" + "\x00\x00\x00\x09" + strings.Repeat("\x00", 200)
	external := "QFI\xfb\x00\x00\x00\x03" + strings.Repeat("\x00", 71) + "\x04" + strings.Repeat("\x00", 200)
	big := makeTar(t, false, root)
	if err := os.WriteFile(big, hugeTar(t), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ name, path, want string }{
		{"parent", makeTar(t, false, root, file("a/../../etc/passwd", "x")), "leads out of it"},
		{"absolute", makeTar(t, false, root, file("/etc/shadow", "x")), "not relative"},
		{"hard link out", makeTar(t, false, root, link(tar.TypeLink, "x", "../../etc/shadow")), "leads out of it"},
		{"hard link absolute", makeTar(t, false, root, link(tar.TypeLink, "x", "/etc/shadow")), "not relative"},
		{"hard link nowhere", makeTar(t, false, root, link(tar.TypeLink, "x", "y")), "no file before it"},
		{"device", makeTar(t, false, root, tarEntry{tar.Header{Name: "etc/disk", Typeflag: tar.TypeBlock}, ""}), "a device"},
		{"pipe", makeTar(t, false, root, link(tar.TypeFifo, "pipe", "")), "a device or pipe"},
		{"size", big, "larger than 2048 MiB"},
		{"empty tar", makeTar(t, true), "empty"},
		{"cut off", cutOff(t, makeTar(t, true, root, file("x", strings.Repeat("x", 5000)))), "reading"},
		{"cut off in a file", cutOff(t, makeTar(t, false, root, file("x", strings.Repeat("x", 50_000)))), "reading x"},
		{"cut off in a packed file", cutOff(t, makeTar(t, true, root, file("x", incompressible(50_000)))), "reading x"},
		{"no tar", filepath.Join(directory("x", "hello"), "x"), "no tar"},
		{"backing file alone", filepath.Join(directory("disk", qcow), "disk"), "backing file"},
		{"no root", directory("hello", "x"), "no root file system"},
		{"kernel alone", directory("kernel", "x"), "neither"},
		{"two disks", directory("kernel", "x", "rootfs.img", "x", "rootfs.ext4", "y"), "more than one"},
		{"backing file", directory("kernel", "x", "rootfs.qcow2", qcow), "backing file"},
		{"external data", directory("kernel", "x", "rootfs.qcow2", external), "another file"},
		{"no qcow2", directory("kernel", "x", "rootfs.qcow2", "x"), "no qcow2"},
		{"qcow2 as raw", directory("kernel", "x", "rootfs.img", qcow), "is a qcow2"},
		{"unknown key", directory("kernel", "x", "initrd", "x", "bundle.json", `{"comand":["x"]}`), "known keys: command, cmdline"},
		{"long command line", directory("kernel", "x", "initrd", "x", "cmdline", strings.Repeat("x ", 2000)), "command line"},
		{"bad command", directory("etc/blixard/command", `["x"`), "no JSON list"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := s.Import(t.Context(), tc.path)
			if !errors.Is(err, image.ErrInvalid) || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("error %v, want ErrInvalid with %q", err, tc.want)
			}
		})
	}
	if _, err := s.Import(t.Context(), "/does/not/exist"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing path: %v", err)
	}
	left, err := os.ReadDir(s.Root)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// hugeTar claims a file larger than any root may be.
func hugeTar(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := tar.NewWriter(&b).WriteHeader(&tar.Header{Name: "etc/huge", Typeflag: tar.TypeReg, Size: 1 << 40, Mode: 0o644}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// incompressible makes a text that gzip cannot make much shorter.
func incompressible(n int) string {
	random := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(random.Uint32())
	}
	return string(b)
}

func cutOff(t *testing.T, path string) string {
	t.Helper()
	info, err := os.Stat(path)
	if err == nil {
		err = os.Truncate(path, info.Size()/2)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func TestImportBundleDirectory(t *testing.T) {
	s := fakeParts(t)
	dir := t.TempDir()
	write(t, dir, "vmlinuz", "their kernel")
	write(t, dir, "rootfs.ext4", "disk")
	write(t, dir, "cmdline", "ro\nquiet\n")
	write(t, dir, "bundle.json", `{"command":["/app"]}`)
	b, err := s.Import(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if b.Cmdline != "root=/dev/vda rw ro quiet" || b.Initrd != "" || len(b.Disks) != 1 || b.Disks[0].Format != "raw" || !slices.Equal(b.DefaultCommand, []string{"/app"}) {
		t.Errorf("bundle %+v", b)
	}
	if err := os.Remove(filepath.Join(dir, "vmlinuz")); err != nil {
		t.Fatal(err)
	}
	own, err := s.Import(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(own.Cmdline, "blixard.root=/dev/vda ro quiet") || own.Initrd == "" || own.Digest == b.Digest {
		t.Errorf("bundle %+v", own)
	}
	all, err := s.List()
	if err != nil || len(all) != 2 {
		t.Errorf("list: %v, %v", all, err)
	}
}

func TestBundlesTravelBetweenStores(t *testing.T) {
	s := fakeParts(t)
	dir := t.TempDir()
	write(t, dir, "kernel", "kernel")
	write(t, dir, "initrd", strings.Repeat("initrd", 1000))
	b, err := s.Import(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	var stream bytes.Buffer
	if err := s.Export(t.Context(), b.Digest, &stream); err != nil {
		t.Fatal(err)
	}
	other := image.Store{Root: t.TempDir()}
	if _, err := other.Get(b.Digest); !errors.Is(err, image.ErrNotFound) {
		t.Fatalf("get of what is not there: %v", err)
	}
	for i := range stream.Len() {
		if i%97 != 0 { // a bit of every block is enough
			continue
		}
		damaged := bytes.Clone(stream.Bytes())
		damaged[i] ^= 4
		got, err := other.ImportTar(t.Context(), bytes.NewReader(damaged), b.Digest)
		if err == nil && !sameFiles(t, got, b) {
			t.Fatalf("a stream damaged at byte %d was stored", i)
		}
		if err == nil {
			if err := other.Remove(b.Digest); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := other.ImportTar(t.Context(), bytes.NewReader(stream.Bytes()), strings.Repeat("0", 64)); !errors.Is(err, image.ErrInvalid) {
		t.Fatalf("another bundle than wanted: %v", err)
	}
	for range 2 {
		got, err := other.ImportTar(t.Context(), bytes.NewReader(stream.Bytes()), b.Digest)
		if err != nil || got.Digest != b.Digest || !sameFiles(t, got, b) {
			t.Fatalf("import: %+v, %v", got, err)
		}
	}
	entries, err := os.ReadDir(other.Root)
	if err != nil || len(entries) != 1 {
		t.Errorf("store holds %v, %v", entries, err)
	}
	damageStored(t, other, b)
}

func sameFiles(t *testing.T, a, b image.Bundle) bool {
	t.Helper()
	sum := func(path string) string {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(content)
		return hex.EncodeToString(sum[:])
	}
	return sum(a.Kernel) == sum(b.Kernel) && sum(a.Initrd) == sum(b.Initrd)
}

func damageStored(t *testing.T, s image.Store, b image.Bundle) {
	t.Helper()
	stored, err := s.Get(b.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(stored.Initrd, 10); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(b.Digest); !errors.Is(err, image.ErrInvalid) {
		t.Errorf("a damaged bundle: %v", err)
	}
}

func TestMissingPartsNameTheCommand(t *testing.T) {
	s := fakeParts(t)
	t.Setenv("BLIXARD_GUEST", "/does/not/exist")
	if _, err := s.Builtin(t.Context()); !errors.Is(err, image.ErrMissing) || !strings.Contains(err.Error(), "make build") {
		t.Errorf("no agent: %v", err)
	}
	s.Assets = t.TempDir()
	t.Setenv("BLIXARD_KERNEL", "/does/not/exist")
	if _, err := s.Builtin(t.Context()); !errors.Is(err, image.ErrMissing) || !strings.Contains(err.Error(), "scripts/setup") {
		t.Errorf("no kernel: %v", err)
	}
}

func TestBuiltinIsTheSameTwice(t *testing.T) {
	fakeParts(t)
	a, err := image.Store{Root: t.TempDir()}.Builtin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s := image.Store{Root: t.TempDir()}
	for range 2 {
		b, err := s.Builtin(t.Context())
		if err != nil || b.Digest != a.Digest {
			t.Fatalf("digests %s and %s, %v", a.Digest, b.Digest, err)
		}
	}
}

// A root file system of somebody else, with its own command and merged /usr.
func TestBootImportedRootFileSystem(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a microVM")
	}
	buildGuest(t)
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	path, err := image.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	busybox, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	program := file("usr/bin/busybox", string(busybox))
	program.Mode = 0o755
	root := makeTar(t, true, program,
		link(tar.TypeSymlink, "bin", "usr/bin"), link(tar.TypeSymlink, "lib", "usr/lib"), file("usr/lib/x", ""),
		link(tar.TypeSymlink, "usr/bin/sh", "busybox"),
		file("etc/blixard/command", `echo "I am $BLIXARD_INSTANCE"; trap 'echo bye; exit 3' TERM; while :; do busybox sleep 0.1; done`))
	b, err := image.Store{Root: t.TempDir()}.Import(ctx, root)
	if err != nil {
		t.Fatal(err)
	}
	v := startVM(t, "microvm", b, 128)
	c := v.dial(ctx)
	if err := c.Configure(ctx, webConfig()); err != nil {
		t.Fatal(err)
	}
	following, stop := context.WithCancel(ctx)
	r, w := io.Pipe()
	logs := make(chan error, 1)
	go func() { logs <- c.Logs(following, guest.LogRequest{Follow: true}, w) }()
	line := make([]byte, len("I am webapp-1\n"))
	if _, err := io.ReadFull(r, line); err != nil || string(line) != "I am webapp-1\n" {
		t.Errorf("log %q, %v", line, err)
	}
	stop()
	if err := <-logs; !errors.Is(err, context.Canceled) {
		t.Errorf("logs: %v", err)
	}
	state, err := c.State(ctx)
	if err != nil || state.Workload != guest.WorkloadRunning || state.Pid <= 1 {
		t.Errorf("state %+v, %v", state, err)
	}
	if _, err := c.Exec(ctx, guest.ExecRequest{Args: []string{"sh", "-c", fmt.Sprintf("kill -TERM %d", state.Pid)}}, nil, nil, nil, nil); err != nil {
		t.Error(err)
	}
	for state.Workload == guest.WorkloadRunning && ctx.Err() == nil {
		if state, err = c.State(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if state.Workload != guest.WorkloadExited || state.ExitCode != 3 {
		t.Errorf("state %+v", state)
	}
	if err := c.Shutdown(ctx, 1000); err != nil {
		t.Error(err)
	}
	v.waitExit(ctx)
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if !bytes.Contains(v.console(), []byte("bye")) {
		t.Error("the workload's last words are not on the console")
	}
}
