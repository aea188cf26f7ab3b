package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/blixard/blixard/internal/image"
)

// tree makes a root file system round busybox, whose command prints a text.
func (u *user) tree(text string) string {
	u.Helper()
	dir := u.TempDir()
	busybox, err := image.Busybox()
	if err != nil {
		u.Fatal(err)
	}
	program, err := os.ReadFile(busybox)
	if err != nil {
		u.Fatal(err)
	}
	for name, content := range map[string]string{
		"etc/blixard/command": `["/bin/sh", "-c", "echo ` + text + `; exec /bin/sleep 100000"]`, "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
		"bin/busybox": string(program),
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			u.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
			u.Fatal(err)
		}
	}
	for _, applet := range []string{"sh", "cat", "echo", "sleep", "grep", "sync", "mount", "touch", "hostname"} {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", applet)); err != nil {
			u.Fatal(err)
		}
	}
	return dir
}

// imageOf is the image of a VM, as sha256:….
func (u *user) imageOf(name string) string {
	u.Helper()
	return decode[struct{ Spec struct{ Image string } }](u.T, u.ok("vm", "status", name, "-o", "json")).Spec.Image
}

// holders are the nodes that keep an image with a text in its manifest.
func (u *user) holders(text string) []string {
	u.Helper()
	var out []string
	for _, n := range u.c.Nodes {
		manifests, err := filepath.Glob(filepath.Join(n.Dir, "images", "*", "manifest.json"))
		if err != nil {
			u.Fatal(err)
		}
		for _, m := range manifests {
			if b, err := os.ReadFile(m); err == nil && strings.Contains(string(b), text) {
				out = append(out, n.Name)
			}
		}
	}
	return out
}

// pack makes a tar of a directory.
func (u *user) pack(dir string, zip bool) string {
	u.Helper()
	f, err := os.CreateTemp(u.TempDir(), "rootfs*")
	if err != nil {
		u.Fatal(err)
	}
	defer f.Close()
	var w io.WriteCloser = f
	if zip {
		w = gzip.NewWriter(f)
	}
	archive := tar.NewWriter(w)
	err = archive.AddFS(os.DirFS(dir))
	if err == nil {
		err = archive.Close()
	}
	if err == nil && zip {
		err = w.Close()
	}
	if err != nil {
		u.Fatal(err)
	}
	return f.Name()
}

// Root file systems: a directory, a tar, a tar.gz. All nodes get what they run.
func testImageTrees(u *user) {
	dir := u.tree("from a directory")
	u.create("tree", "--image", dir, "--replicas", "3")
	for _, id := range []string{"tree-1", "tree-2", "tree-3"} {
		if got := u.exec(id, "hostname; echo x > /written && cat /written"); got != id+"\nx" {
			u.Errorf("in %s: %q", id, got)
		}
	}
	if got := u.holders("from a directory"); len(got) != 3 {
		u.Errorf("the image is on %v", got)
	}
	u.until("the image's command has run", 10*time.Second, func() error {
		if out := u.ok("vm", "logs", "tree-1"); !strings.Contains(out, "from a directory") {
			return errors.New(out)
		}
		return nil
	})
	u.says(strings.TrimPrefix(u.imageOf("tree"), "sha256:")[:12], "get", "images")
	u.ok("vm", "delete", "tree")
	// The tar of it is another image only where owners and modes differ; it runs
	// all the same, with the user's command in place of its own.
	u.create("tar", "--image", u.pack(dir, false), "--", "/bin/sh", "-c", "echo my own; exec sleep 1000")
	u.until("the user's command has run", 10*time.Second, func() error {
		if out := u.ok("vm", "logs", "tar"); !strings.Contains(out, "my own") || strings.Contains(out, "from a directory") {
			return errors.New(out)
		}
		return nil
	})
	u.ok("vm", "delete", "tar")
	u.create("targz", "--image", u.pack(dir, true))
	u.exec("targz", "grep -q root /etc/passwd")
}

// A bundle: a kernel and an initial RAM disk. Those of the builtin image, as
// any user may take them from a node.
func testImageBundle(u *user) {
	u.create("donor", "--no-wait")
	dir := u.TempDir()
	u.until("a node has built the builtin image", 60*time.Second, func() error {
		// A note beside the images tells which one it is.
		found, err := filepath.Glob(filepath.Join(u.c.dir, "node*", "images", "builtin-*"))
		if err != nil || len(found) == 0 {
			return fmt.Errorf("%v, %v", found, err) //nolint:errorlint // nil, as a rule
		}
		digest, err := os.ReadFile(found[0])
		if err != nil {
			return err
		}
		for _, name := range []string{"kernel", "initrd"} {
			b, err := os.ReadFile(filepath.Join(filepath.Dir(found[0]), string(digest), name))
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				return err
			}
		}
		return nil
	})
	u.ok("vm", "delete", "donor")
	text := `{"command": ["/bin/sh", "-c", "echo bundled; exec sleep 100000"], "cmdline": "blixard.test=yes"}`
	if err := os.WriteFile(filepath.Join(dir, "bundle.json"), []byte(text), 0o600); err != nil {
		u.Fatal(err)
	}
	u.create("bundle", "--image", dir)
	if got := u.exec("bundle", "grep -o blixard.test=yes /proc/cmdline"); got != "blixard.test=yes" {
		u.Errorf("the kernel's command line: %q", got)
	}
	u.says("bundled", "vm", "logs", "bundle")
	// Sent again it is there already.
	u.create("bundle2", "--image", dir, "--no-start")
	if a, b := u.imageOf("bundle"), u.imageOf("bundle2"); a != b || !strings.HasPrefix(a, "sha256:") {
		u.Errorf("the same bundle is %s and %s", a, b)
	}
}

// A disk image: shared between instances and nodes, and written to by each.
func testImageDisk(u *user) {
	mkfs := "/sbin/mkfs.ext4"
	disk := filepath.Join(u.TempDir(), "disk.img")
	if out, err := exec.Command(mkfs, "-q", "-d", u.tree("from a disk"), disk, "24M").CombinedOutput(); err != nil {
		u.Fatalf("making a disk (scripts/setup installs what is missing): %v\n%s", err, out)
	}
	u.create("disk", "--image", disk, "--replicas", "2", "--constraint", "zone=zone-node1")
	for _, id := range []string{"disk-1", "disk-2"} {
		if got := u.exec(id, "mount | grep -c '^/dev/vda on / type ext4 (rw'; test ! -e /mine && echo "+id+" > /mine && sync && cat /mine"); got != "1\n"+id {
			u.Errorf("in %s: %q", id, got)
		}
	}
	if got := u.exec("disk-1", "cat /mine"); got != "disk-1" {
		u.Errorf("the disk of disk-1 holds %q", got)
	}
	// What was written goes with the incarnation, and the image is as it was.
	u.ok("vm", "restart", "disk")
	if got := u.exec("disk-1", "cat /mine || echo new"); !strings.HasSuffix(got, "new") {
		u.Errorf("after a restart the disk holds %q", got)
	}
	before, err := os.ReadFile(disk)
	if err != nil {
		u.Fatal(err)
	}
	kept, err := os.ReadFile(filepath.Join(u.c.Nodes[0].Dir, "images", strings.TrimPrefix(u.imageOf("disk"), "sha256:"), "rootfs.img"))
	if err != nil || !bytes.Equal(before, kept) {
		u.Errorf("the image was changed: %v", err)
	}
	// No overlay has a name, so none can be left.
	err = filepath.WalkDir(filepath.Join(u.c.Nodes[0].Dir, "vms"), func(path string, _ fs.DirEntry, err error) error {
		if strings.Contains(filepath.Base(path), "vl.") {
			u.Errorf("a temporary file of QEMU: %s", path)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		u.Error(err)
	}
}

// What is no image, or no safe one, is refused before anything is changed.
func testImageRefused(u *user) {
	hostile := filepath.Join(u.TempDir(), "hostile.tar")
	f, err := os.Create(hostile)
	if err != nil {
		u.Fatal(err)
	}
	w := tar.NewWriter(f)
	for _, name := range []string{"etc/passwd", "../../../../tmp/blixard-e2e-escaped"} {
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Size: 1, Mode: 0o644}); err != nil {
			u.Fatal(err)
		}
		if _, err := w.Write([]byte("x")); err != nil {
			u.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), f.Close()); err != nil {
		u.Fatal(err)
	}
	text := filepath.Join(u.TempDir(), "notes.txt")
	if err := os.WriteFile(text, []byte("hello"), 0o600); err != nil {
		u.Fatal(err)
	}
	empty := u.TempDir()
	for _, c := range []struct{ image, want string }{
		{hostile, "leads out of it"}, {text, "no tar"}, {empty, "no root file system"}, {filepath.Join(empty, "nothing"), "there is no file"}, {"sha256:12", "neither builtin nor sha256"},
	} {
		u.fails(2, []string{c.want}, "vm", "create", "refused", "--image", c.image)
	}
	u.fails(3, nil, "vm", "status", "refused")
	if _, err := os.Stat("/tmp/blixard-e2e-escaped"); err == nil {
		u.Error("the hostile archive was unpacked")
	}
	// The nodes check by themselves: whatever the digest says, it has to be true.
	digest := "sha256:" + strings.Repeat("ab", 32)
	if status, problem := u.rest("PUT", "/v1/images/"+digest, "hello"); status != 400 {
		u.Errorf("a corrupt upload: %d %v", status, problem)
	}
	b, err := os.ReadFile(hostile)
	if err != nil {
		u.Fatal(err)
	}
	if status, problem := u.rest("POST", "/v1/images", string(b)); status != 400 || !strings.Contains(fmt.Sprint(problem), "leads out of it") {
		u.Errorf("a hostile upload: %d %v", status, problem)
	}
	// An image that nobody has is refused when it is asked for.
	u.fails(3, []string{"no node keeps the image " + digest}, "vm", "create", "unknown", "--image", digest)
	u.fails(3, nil, "vm", "status", "unknown")
}
