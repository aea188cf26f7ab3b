package qemu

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/blixard/blixard/internal/vmm"
)

// callModules are the drivers of the guest's kernel that its call port needs, in
// an order in which each finds what it needs.
var callModules = []string{
	"virtio_ring.ko", "virtio.ko", "virtio_pci_modern_dev.ko", "virtio_pci_legacy_dev.ko", "virtio_pci.ko", "virtio_console.ko",
	"failover.ko", "net_failover.ko", "virtio_net.ko",
}

// callInitrd is the initial RAM disk of the guest of testdata/callguest, made
// once for all tests; its directory goes when they end.
var callInitrd = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "callguest-")
	if err != nil {
		return "", err
	}
	scratch = append(scratch, dir)
	program := filepath.Join(dir, "init")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, "./testdata/callguest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building the guest: %w: %s", err, out)
	}
	var archive cpio
	archive.add("dev", 0o40755, nil)
	archive.device("dev/console", 5, 1)
	if err := archive.file("init", program); err != nil {
		return "", err
	}
	archive.add("modules", 0o40755, nil)
	for _, name := range callModules {
		if err := archive.file("modules/"+name, filepath.Join(assets(), "modules", name)); err != nil {
			return "", fmt.Errorf("run scripts/setup: %w", err)
		}
	}
	archive.add("modules/list", 0o100644, []byte(strings.Join(callModules, "\n")))
	archive.add("TRAILER!!!", 0, nil)
	path := filepath.Join(dir, "initrd")
	return path, os.WriteFile(path, archive.Bytes(), 0o600)
})

// scratch are directories that go when all tests have ended.
var scratch []string

func assets() string {
	if dir := os.Getenv("BLIXARD_ASSETS"); dir != "" {
		return dir
	}
	return "/var/lib/blixard/assets"
}

// callSpec is the guest of testdata/callguest.
func callSpec(t testing.TB, ref vmm.Ref) vmm.Spec {
	t.Helper()
	initrd, err := callInitrd()
	if err != nil {
		t.Fatal(err)
	}
	return vmm.Spec{
		Ref: ref, VCPUs: 1, MemoryMiB: 128, Kernel: filepath.Join(assets(), "vmlinuz"), Initrd: initrd,
		Network: vmm.Network{Mode: "none"}, CallPort: true,
	}
}

// cpio is an archive as Linux unpacks it from an initial RAM disk.
type cpio struct {
	bytes.Buffer
	inodes int
}

func (c *cpio) add(name string, mode int, data []byte) { c.entry(name, mode, data, 0, 0) }
func (c *cpio) device(name string, major, minor int)   { c.entry(name, 0o20600, nil, major, minor) }
func (c *cpio) pad()                                   { c.Write(make([]byte, -c.Len()&3)) }
func (c *cpio) file(name, path string) error {
	data, err := os.ReadFile(path)
	c.add(name, 0o100755, data)
	return err
}

func (c *cpio) entry(name string, mode int, data []byte, major, minor int) {
	c.inodes++
	c.WriteString("070701")
	for _, field := range []int{c.inodes, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name) + 1, 0} {
		fmt.Fprintf(c, "%08x", field)
	}
	c.WriteString(name + "\x00")
	c.pad()
	c.Write(data)
	c.pad()
}
