package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Watchdog ends what stops on partition when the lease in dataDir is about to
// run out and the daemon has not done so: it was killed, or hangs. It runs in a
// process of its own and returns when there is nothing left to watch over, or
// at once when another one watches over dataDir already.
//
// It kills by pid and start time, as the daemon wrote them down, and what works
// in the directory of an incarnation whose start the daemon had begun.
// What it does it tells on standard error, which the agent keeps in a file.
func Watchdog(ctx context.Context, dataDir string) error {
	log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	lock, free, err := lockWatchdog(dataDir, unix.LOCK_EX)
	if err != nil || !free {
		return err
	}
	defer lock.Close()
	const (
		look   = 100 * time.Millisecond
		linger = 10 * time.Second // after the lease: a daemon may still come back and renew it
	)
	for ctx.Err() == nil {
		r, err := readLease(dataDir)
		if err != nil {
			return err // it is replaced in one step, so this is damage
		}
		now := bootTime().Milliseconds()
		if r.empty() || now > r.UntilMS+linger.Milliseconds() {
			return nil
		}
		if now >= r.KillMS {
			for _, v := range r.victims() {
				log.Warn("killing a vm whose lease runs out", "component", "watchdog", "event", "fence", "pid", v.pid)
				if err := v.kill(); err != nil {
					log.Error("killing a vm whose lease runs out", "component", "watchdog", "event", "fence", "pid", v.pid, "error", err)
				}
			}
		}
		wait := min(max(time.Duration(r.KillMS-now)*time.Millisecond, 10*time.Millisecond), look)
		if !pause(ctx, wait) {
			return nil
		}
	}
	return nil
}

// victim is a process that has to end, and how to tell that it is still it.
type victim struct {
	pid  int
	same func() bool
}

// kill ends the process and no other that has got its pid: the descriptor
// stands for the process that is looked at after it was opened.
func (v victim) kill() error {
	fd, err := unix.PidfdOpen(v.pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("opening process %d: %w", v.pid, err)
	}
	if v.same() {
		err = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	}
	if errors.Is(err, unix.ESRCH) {
		err = nil
	}
	return errors.Join(err, unix.Close(fd))
}

// victims are the processes that are alive and must not be.
func (r leaseRecord) victims() []victim {
	var all []victim
	add := func(pid int, same func() bool) {
		if same() {
			all = append(all, victim{pid, same})
		}
	}
	for _, t := range r.Targets {
		add(t.Pid, func() bool { ticks, err := startTicks(t.Pid); return err == nil && ticks == t.StartTicks })
	}
	if len(r.Pending) == 0 && len(r.Under) == 0 {
		return all
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return all
	}
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && pid != os.Getpid() {
			add(pid, func() bool {
				dir, err := os.Readlink(filepath.Join("/proc", e.Name(), "cwd"))
				return err == nil && (slices.Contains(r.Pending, dir) || slices.ContainsFunc(r.Under, func(top string) bool { return strings.HasPrefix(dir, top+"/") }))
			})
		}
	}
	return all
}

// lockWatchdog takes the lock that a watchdog holds as long as it lives.
func lockWatchdog(dataDir string, how int) (f *os.File, free bool, err error) {
	f, err = os.OpenFile(filepath.Join(dataDir, "watchdog.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, false, fmt.Errorf("opening the watchdog's lock: %w", err)
	}
	err = unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
	if err == nil {
		return f, true, nil
	}
	if closeErr := f.Close(); closeErr != nil || !errors.Is(err, unix.EWOULDBLOCK) {
		return nil, false, fmt.Errorf("taking the watchdog's lock: %w", errors.Join(err, closeErr))
	}
	return nil, false, nil
}

// startTicks is when a process began, in the kernel's ticks: with the pid it
// names the process for good.
func startTicks(pid int) (uint64, error) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0, err
	}
	// The name in parentheses may hold anything; the 20th field after it counts.
	_, rest, _ := strings.Cut(string(data[strings.LastIndexByte(string(data), ')'):]), " ")
	fields := strings.Fields(rest)
	const state, started = 0, 19
	if len(fields) <= started {
		return 0, fmt.Errorf("/proc/%d/stat is not understood", pid)
	}
	if fields[state] == "Z" {
		return 0, fs.ErrNotExist // dead, only not waited for
	}
	return strconv.ParseUint(fields[started], 10, 64)
}

// tendWatchdog sees to it that a watchdog runs. It outlives the daemon.
func (a *Agent) tendWatchdog() {
	if len(a.o.Watchdog) == 0 {
		return
	}
	a.watchdogTurn.Lock()
	defer a.watchdogTurn.Unlock()
	if a.watchdogPid != 0 {
		// Reaped here, since nobody waits for it.
		if pid, err := unix.Wait4(a.watchdogPid, nil, unix.WNOHANG, nil); pid == 0 && err == nil {
			return
		}
		a.watchdogPid = 0
	}
	lock, free, err := lockWatchdog(a.o.DataDir, unix.LOCK_SH)
	if err == nil && free {
		if err = lock.Close(); err == nil {
			err = a.spawnWatchdog()
		}
	}
	if err != nil {
		a.log.Error("starting the watchdog", "event", "watchdog", "error", err)
	}
}

func (a *Agent) spawnWatchdog() error {
	out, err := os.OpenFile(filepath.Join(a.o.DataDir, "watchdog.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("opening the watchdog's log: %w", err)
	}
	defer out.Close() // the watchdog has its own descriptor
	cmd := exec.Command(a.o.Watchdog[0], a.o.Watchdog[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = a.o.DataDir, out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("running %s: %w", a.o.Watchdog[0], err)
	}
	a.watchdogPid = cmd.Process.Pid
	return nil
}
