package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

// Outcomes of a check.
const (
	CheckOK   = "ok"
	CheckWarn = "warn" // works without it, less well
	CheckFail = "fail" // VMs do not run without it
)

// Finding is the outcome of a check of this machine.
type Finding struct {
	Check  string `json:"check"`
	Status string `json:"status"` // ok, warn or fail
	Detail string `json:"detail"`
	Mend   string `json:"mend,omitempty"` // the command that mends it
}

// Check looks at one thing of this machine and changes nothing.
type Check func(context.Context) Finding

func (a *app) doctor() *cobra.Command {
	var flags listFlags
	cmd := &cobra.Command{
		Use: "doctor", Short: "What this machine lacks to be a node, and the command that mends it", Args: takes(),
		Long: `Check whether this machine can be a node. Each line says ok, warn (works without
it, less well) or fail (VMs do not run), and the command that mends it. Nothing is
changed. Ends with 1 if anything fails.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			checks := append(a.machineChecks(), a.env.Doctor...)
			l := &listing{key: "checks", columns: []column{{name: "CHECK"}, {name: "STATUS"}, {name: "DETAIL"}, {name: "MEND"}}}
			failed := 0
			for _, check := range checks {
				f := check(cmd.Context())
				if f.Status == CheckFail {
					failed++
				}
				l.rows = append(l.rows, row{name: "check/" + f.Check, object: f, cells: []cell{str(f.Check), str(f.Status), str(f.Detail), str(f.Mend)}})
			}
			if err := a.printChecks(l, flags); err != nil {
				return err
			}
			if failed > 0 {
				a.note("%d checks failed", failed)
				return silentError(1)
			}
			return nil
		},
	}
	flags.add(cmd, false)
	return cmd
}

// printChecks prints the commands on lines of their own, so that they can be
// copied.
func (a *app) printChecks(l *listing, flags listFlags) error {
	if a.output != formatTable {
		return a.print(a.env.Stdout, l, flags)
	}
	if err := l.narrow(flags); err != nil {
		return err
	}
	for _, r := range l.rows {
		status := r.cells[1].text
		pad := strings.Repeat(" ", max(0, 5-len(status)))
		if a.colours(a.env.Stdout) {
			status = coloured(status)
		}
		fmt.Fprintf(a.env.Stdout, "%s%s%-13s  %s\n", status, pad, r.cells[0].text, visible(r.cells[2].text))
		if mend := r.cells[3].text; mend != "" {
			fmt.Fprintf(a.env.Stdout, "     %-13s  $ %s\n", "", visible(mend))
		}
	}
	return nil
}

// machineChecks are those that need no driver. Whether guests boot with KVM and
// whether the builtin image can be built, drivers tell: see Env.Doctor.
func (a *app) machineChecks() []Check {
	return []Check{
		checkKVM,
		program("qemu", CheckFail, "runs the VMs", "sudo apt-get install -y qemu-system-x86", "qemu-system-x86_64", "qemu-system-aarch64"),
		program("ip", CheckWarn, "makes taps and bridges; without it VMs use user-mode networking", "sudo apt-get install -y iproute2", "ip"),
		checkRoot, checkFiles, a.checkDisk, a.checkPort, checkCgroups,
	}
}

func checkKVM(context.Context) Finding {
	f := Finding{Check: "kvm-device"}
	dev, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	switch {
	case errors.Is(err, os.ErrNotExist):
		f.Status, f.Detail, f.Mend = CheckWarn, "there is no /dev/kvm: VMs run emulated, which is slow", "sudo modprobe kvm_intel || sudo modprobe kvm_amd"
	case err != nil:
		f.Status, f.Detail, f.Mend = CheckWarn, fmt.Sprintf("/dev/kvm cannot be opened: %v", err), "sudo usermod -aG kvm $USER   # then log in again"
	default:
		f.Status, f.Detail = CheckOK, "/dev/kvm can be opened; whether guests boot with it is probed by booting one"
		if err := dev.Close(); err != nil {
			f.Status, f.Detail = CheckWarn, err.Error()
		}
	}
	return f
}

// program checks that one of several programs is there.
func program(check, without, what, mend string, names ...string) Check {
	return func(context.Context) Finding {
		for _, n := range names {
			if path, err := exec.LookPath(n); err == nil {
				return Finding{Check: check, Status: CheckOK, Detail: path}
			}
		}
		return Finding{Check: check, Status: without, Detail: names[0] + " is not installed; it " + what, Mend: mend}
	}
}

func checkRoot(context.Context) Finding {
	if os.Geteuid() == 0 {
		return Finding{Check: "root", Status: CheckOK, Detail: "runs as root: bridges and taps can be made"}
	}
	return Finding{Check: "root", Status: CheckWarn, Detail: "does not run as root: VMs use user-mode networking", Mend: "sudo blixard server …"}
}

func checkFiles(context.Context) Finding {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return Finding{Check: "open-files", Status: CheckWarn, Detail: err.Error()}
	}
	f := Finding{Check: "open-files", Status: CheckOK, Detail: fmt.Sprintf("%d may be open", limit.Max)}
	if limit.Max < 16384 {
		f.Status, f.Mend = CheckWarn, "ulimit -Hn 65536   # or LimitNOFILE=65536 in the unit"
	}
	return f
}

func (a *app) checkDisk(context.Context) Finding {
	dir := firstOf(a.env.Getenv("BLIXARD_DATA_DIR"), "/var/lib/blixard")
	for at := dir; ; at = filepath.Dir(at) {
		var fs unix.Statfs_t
		err := unix.Statfs(at, &fs)
		if errors.Is(err, unix.ENOENT) && at != filepath.Dir(at) {
			continue
		}
		if err != nil {
			return Finding{Check: "disk", Status: CheckWarn, Detail: err.Error()}
		}
		freeMiB := int64(fs.Bavail) * fs.Bsize >> 20
		f := Finding{Check: "disk", Status: CheckOK, Detail: fmt.Sprintf("%.1fG free for %s", float64(freeMiB)/1024, dir)}
		switch {
		case freeMiB < 512:
			f.Status, f.Mend = CheckFail, "df -h "+at+"   # make room, or give --data-dir elsewhere"
		case freeMiB < 5<<10:
			f.Status, f.Mend = CheckWarn, "df -h "+at+"   # make room, or give --data-dir elsewhere"
		}
		return f
	}
}

func (a *app) checkPort(ctx context.Context) Finding {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", net.JoinHostPort("", defaultPort))
	if err != nil {
		if a.answers(ctx) {
			return Finding{Check: "port", Status: CheckOK, Detail: "a Blixard server answers at " + a.addresses()[0]}
		}
		return Finding{Check: "port", Status: CheckWarn, Detail: "port " + defaultPort + " is in use by something else", Mend: "ss -ltnp 'sport = :" + defaultPort + "'   # or give --listen HOST:PORT"}
	}
	if err := l.Close(); err != nil {
		return Finding{Check: "port", Status: CheckWarn, Detail: err.Error()}
	}
	return Finding{Check: "port", Status: CheckOK, Detail: "port " + defaultPort + " is free"}
}

func checkCgroups(context.Context) Finding {
	data, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
	if err != nil {
		return Finding{Check: "cgroups", Status: CheckWarn, Detail: "there is no cgroup v2 hierarchy: CPU and memory of VMs are limited by the hypervisor only", Mend: "sudo mount -t cgroup2 none /sys/fs/cgroup"}
	}
	have := strings.Fields(string(data))
	for _, need := range []string{"cpu", "memory"} {
		if slices.Contains(have, need) {
			continue
		}
		return Finding{Check: "cgroups", Status: CheckWarn, Detail: "cgroup v2 has no " + need + " controller here", Mend: "echo +" + need + " | sudo tee /sys/fs/cgroup/cgroup.subtree_control"}
	}
	return Finding{Check: "cgroups", Status: CheckOK, Detail: "cgroup v2 with " + strings.Join(have, " ")}
}

// answers tells whether a server answers, within a moment.
func (a *app) answers(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	c, err := client.New(client.Options{Addresses: a.addresses(), Token: a.credentials(), RetryFor: -1})
	if err != nil {
		return false
	}
	defer c.Close()
	_, err = c.GetVersion(ctx, &blixardv1.GetVersionRequest{})
	return err == nil
}
