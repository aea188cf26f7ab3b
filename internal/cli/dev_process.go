package cli

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard"
)

// process is what /proc tells of one.
type process struct {
	pid   int
	state byte
	ticks uint64 // start time in clock ticks since boot
	exe   string // base name
	args  []string
	cwd   string
}

func readProcess(pid int) (process, error) {
	p := process{pid: pid}
	dir := "/proc/" + strconv.Itoa(pid)
	stat, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return p, err
	}
	// The name may hold anything, also ")": fields begin behind the last one.
	at := bytes.LastIndexByte(stat, ')')
	fields := strings.Fields(string(stat[at+1:]))
	if at < 0 || len(fields) < 20 {
		return p, fmt.Errorf("reading %s/stat: too few fields", dir)
	}
	p.state = fields[0][0]
	if p.ticks, err = strconv.ParseUint(fields[19], 10, 64); err != nil {
		return p, fmt.Errorf("reading %s/stat: %w", dir, err)
	}
	if exe, err := os.Readlink(dir + "/exe"); err == nil {
		p.exe = filepath.Base(strings.TrimSuffix(exe, " (deleted)"))
	}
	if cwd, err := os.Readlink(dir + "/cwd"); err == nil {
		p.cwd = strings.TrimSuffix(cwd, " (deleted)")
	}
	if line, err := os.ReadFile(dir + "/cmdline"); err == nil {
		p.args = strings.Split(strings.TrimRight(string(line), "\x00"), "\x00")
	}
	return p, nil
}

// hypervisors are the beginnings of the names of programs that run VMs.
var hypervisors = []string{"qemu-system-", "qemu-kvm", "firecracker", "cloud-hypervisor"}

// within tells whether path is dir or below it.
func within(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// ours tells whether a process belongs to the data below dir: a hypervisor that
// works in it or has it on its command line, or a program of ours that was told
// to work on it. Anybody else, such as a shell in the directory, is left alone.
func (p process) ours(dir, exe string) bool {
	if p.state == 'Z' || p.state == 'X' || p.pid == os.Getpid() {
		return false
	}
	named := slices.ContainsFunc(p.args, func(arg string) bool {
		at := strings.Index(arg, dir)
		return at >= 0 && (at == 0 || strings.ContainsRune("=,:", rune(arg[at-1]))) && (len(arg) == at+len(dir) || strings.ContainsRune("/,:", rune(arg[at+len(dir)])))
	})
	if slices.ContainsFunc(hypervisors, func(h string) bool { return strings.HasPrefix(p.exe, h) }) {
		return named || within(p.cwd, dir)
	}
	dataDir := slices.Index(p.args, "--data-dir")
	return p.exe == exe && dataDir >= 0 && dataDir+1 < len(p.args) && within(p.args[dataDir+1], dir)
}

// processesOf lists what belongs to the data below dir.
func processesOf(dir, exe string) ([]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("listing processes: %w", err)
	}
	var out []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if p, err := readProcess(pid); err == nil && p.ours(dir, exe) {
			out = append(out, p)
		}
	}
	return out, nil
}

// same tells whether it still is the process that was looked at.
func (p process) same() bool {
	now, err := readProcess(p.pid)
	return err == nil && now.ticks == p.ticks && now.state != 'Z' && now.state != 'X'
}

// signal sends a signal to a process that still is the same.
func (p process) signal(s unix.Signal) error {
	if !p.same() {
		return nil
	}
	if err := unix.Kill(p.pid, s); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("ending process %d (%s): %w", p.pid, p.exe, err)
	}
	return nil
}

// awaitEnd waits until processes are gone; left are those that are not in time.
func awaitEnd(processes []process, limit time.Duration) (left []process) {
	deadline := time.Now().Add(limit)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		left = slices.DeleteFunc(slices.Clone(processes), func(p process) bool { return !p.same() })
		if len(left) == 0 || time.Now().After(deadline) {
			return left
		}
		<-tick.C
	}
}

// endAll ends everything that belongs to the data below dir: servers are asked
// first, so that they do not start what is being ended; then the rest is killed,
// until nothing is found any more.
func endAll(dir, exe string, grace time.Duration) error {
	all, err := processesOf(dir, exe)
	if err != nil {
		return err
	}
	servers := slices.DeleteFunc(slices.Clone(all), func(p process) bool { return p.exe != exe })
	for _, p := range servers {
		if err := p.signal(unix.SIGTERM); err != nil {
			return err
		}
	}
	awaitEnd(servers, grace)
	var taps []string
	for range 20 {
		all, err := processesOf(dir, exe)
		if err != nil {
			return err
		}
		if len(all) == 0 {
			return removeTaps(taps)
		}
		for _, p := range all {
			taps = append(taps, p.taps()...)
			if err := p.signal(unix.SIGKILL); err != nil {
				return err
			}
		}
		awaitEnd(all, 2*time.Second)
	}
	return blixard.Errorf(blixard.CodeUnavailable, "some processes of %s do not end", dir)
}

// taps are the tap devices on a hypervisor's command line.
func (p process) taps() []string {
	var out []string
	for _, arg := range p.args {
		for part := range strings.SplitSeq(arg, ",") {
			if name, is := strings.CutPrefix(part, "ifname="); is && name != "" {
				out = append(out, name)
			}
		}
	}
	return out
}

// removeTaps deletes tap devices that outlived their VMs.
func removeTaps(taps []string) error {
	for _, tap := range taps {
		if _, err := os.Stat("/sys/class/net/" + tap + "/tun_flags"); err != nil {
			continue // gone with its VM, or no tap
		}
		if out, err := exec.Command("ip", "link", "del", tap).CombinedOutput(); err != nil {
			return fmt.Errorf("removing the tap device %s: %w: %s", tap, err, out)
		}
	}
	return nil
}
