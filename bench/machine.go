package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// machine is where and how the figures came about.
type machine struct {
	Date      string  `json:"date"`
	CPUs      int     `json:"cpus"`
	CPU       string  `json:"cpu"`
	MemoryMiB uint64  `json:"memoryMiB"`
	Kernel    string  `json:"kernel"`
	Go        string  `json:"go"`
	Blixard   string  `json:"blixard"`
	Peer      string  `json:"peer,omitempty"`
	FsyncMS   float64 `json:"fdatasyncP50MS"` // of 512 bytes, where the data is kept
	LoadAvg   string  `json:"loadAverage"`    // before anything was measured
	Method    string  `json:"method"`
}

const method = "Servers and load generator share this machine's cores. Both sides of a comparison run in one invocation and take turns; " +
	"each client is closed-loop (the next request follows the answer) with a connection of its own to one node, clients spread evenly over the 3 nodes beginning with the leader; " +
	"no TLS; every acknowledged write is fsynced by a majority on both sides; figures are medians over the rounds."

// look gathers what is known about the machine and refuses one that would give
// worthless figures.
func look(s settings) (machine, error) {
	m := machine{Date: time.Now().UTC().Format(time.RFC3339), CPUs: runtime.NumCPU(), Go: runtime.Version(), Method: method}
	var fs unix.Statfs_t
	if err := unix.Statfs(s.dir, &fs); err != nil {
		return m, fmt.Errorf("looking at %s: %w", s.dir, err)
	}
	if fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC {
		return m, fmt.Errorf("%s is in memory, where an fsync costs nothing; name a directory on a disk with --dir or TMPDIR", s.dir)
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return m, fmt.Errorf("asking for the kernel: %w", err)
	}
	m.Kernel = unix.ByteSliceToString(uts.Release[:])
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return m, fmt.Errorf("asking for the memory: %w", err)
	}
	m.MemoryMiB = info.Totalram * uint64(info.Unit) >> 20
	m.CPU = cpuModel()
	if load, err := os.ReadFile("/proc/loadavg"); err == nil {
		m.LoadAvg = strings.Join(strings.Fields(string(load))[:3], " ")
	}
	out, err := exec.Command(s.blixard, "version", "-o", "name").Output()
	if err != nil {
		out, err = exec.Command(s.blixard, "version").Output()
	}
	if err != nil {
		return m, fmt.Errorf("asking %s for its version (make build makes it): %w", s.blixard, err)
	}
	m.Blixard = strings.TrimSpace(string(out))
	if m.Peer, err = etcdVersion(s.etcd); err != nil {
		say("%v; comparisons are left out", err)
	}
	m.FsyncMS, err = fsyncMS(s.dir)
	return m, err
}

func cpuModel() string {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// fsyncMS is the median time to make 512 appended bytes durable.
func fsyncMS(dir string) (ms float64, err error) {
	f, err := os.Create(filepath.Join(dir, "fsync-probe"))
	if err != nil {
		return 0, fmt.Errorf("trying the disk: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	block := make([]byte, 512)
	var took []float64
	for range 200 {
		start := time.Now()
		if _, err := f.Write(block); err != nil {
			return 0, fmt.Errorf("trying the disk: %w", err)
		}
		if err := syscall.Fdatasync(int(f.Fd())); err != nil {
			return 0, fmt.Errorf("trying the disk: %w", err)
		}
		took = append(took, float64(time.Since(start).Microseconds())/1000)
	}
	slices.Sort(took)
	return short(median(took)), nil
}
