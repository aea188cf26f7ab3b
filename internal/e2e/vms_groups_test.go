package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Control groups need a kernel that has them, which the machine that runs the
// tests may not be. A guest is one: the driver's own test runs in it, as root.
func testGroups(u *user) {
	dir := u.tree("in a guest")
	build := exec.Command("go", "test", "-c", "-tags", "inguest", "-o", filepath.Join(dir, "groups.test"), "github.com/blixard/blixard/internal/vmm/qemu")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		u.Fatalf("building the test: %v\n%s", err, out)
	}
	if err := os.Symlink("busybox", filepath.Join(dir, "bin", "tail")); err != nil {
		u.Fatal(err)
	}
	// The test has something killed at 400 MiB.
	u.create("groups", "--image", dir, "--memory", "768M")
	out := u.exec("groups", "mount -t cgroup2 none /sys/fs/cgroup && exec /groups.test -test.v -test.run '^TestGroupsOfTheKernel$'")
	if !strings.Contains(out, "--- PASS: TestGroupsOfTheKernel") {
		u.Errorf("in the guest:\n%s", out)
	}
}
