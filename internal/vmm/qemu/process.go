package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/vmm"
)

// procStat is the part of /proc/<pid>/stat that identifies a process.
type procStat struct {
	state      byte
	parent     int
	startTicks uint64
}

func readStat(pid int) (procStat, error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return procStat{}, fmt.Errorf("reading the state of process %d: %w", pid, err)
	}
	return parseStat(text)
}

// parseStat reads past the last ')', as a process may put anything in its name.
func parseStat(text []byte) (procStat, error) {
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 20 || len(fields[0]) != 1 {
		return procStat{}, errors.New("process state is malformed")
	}
	parent, err1 := strconv.Atoi(fields[1])
	start, err2 := strconv.ParseUint(fields[19], 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		return procStat{}, fmt.Errorf("parsing process state: %w", err)
	}
	return procStat{state: fields[0][0], parent: parent, startTicks: start}, nil
}

func bootID() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("reading the boot id: %w", err)
	}
	return strings.TrimSpace(string(text)), nil
}

// carries tells whether pid's command line has "-uuid <uuid>".
func carries(pid int, uuid string) bool {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	return err == nil && uuid != "" && bytes.Contains(text, []byte("\x00-uuid\x00"+uuid+"\x00"))
}

// scan looks for the process of uuid among all; 0 when there is none.
func scan(uuid string) int {
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline") // fails only on a bad pattern
	if err != nil {
		return 0
	}
	for _, path := range paths {
		pid, err := strconv.Atoi(strings.Split(path, "/")[2])
		if err == nil && carries(pid, uuid) {
			return pid
		}
	}
	return 0
}

// process is one live hypervisor process, pinned by a pidfd: whatever is done
// through it reaches that process or nobody.
type process struct {
	ref   vmm.Ref
	dir   string
	pid   int
	pidfd int
	child bool          // of this daemon: it must be reaped and tells its status
	gone  chan struct{} // closed when it has ended and that was written down
}

// identify pins pid if it provably is the process of inc; nil if it is not.
func identify(inc *incarnation, pid int, startTicks uint64) (*process, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("opening process %d: %w", pid, err)
	}
	// Only what is read after pinning is about the pinned process.
	stat, err := readStat(pid)
	child := err == nil && stat.parent == os.Getpid()
	ours := err == nil && (startTicks == 0 || stat.startTicks == startTicks)
	if stat.state == 'Z' {
		ours = ours && child // a zombie has no command line left
	} else {
		ours = ours && carries(pid, inc.spec.UUID)
	}
	if !ours {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			err = nil
		}
		return nil, errors.Join(err, unix.Close(pidfd))
	}
	return &process{ref: inc.ref, dir: inc.dir, pid: pid, pidfd: pidfd, child: child, gone: make(chan struct{})}, nil
}

// ended tells how a process ended: by wait status when it was our child.
type ended struct {
	process *process
	known   bool
	status  unix.WaitStatus
}

// watch waits for all live processes in one goroutine, reaps those that are our
// children, and hands each end to record before it closes process.gone.
type watch struct {
	record func(ended)
	mu     sync.Mutex
	live   map[vmm.Ref]*process
	wake   int // eventfd
	closed bool
	done   chan struct{}
}

func newWatch(record func(ended)) (*watch, error) {
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("creating an eventfd: %w", err)
	}
	w := &watch{record: record, live: map[vmm.Ref]*process{}, wake: wake, done: make(chan struct{})}
	go w.run()
	return w, nil
}

// close ends the goroutine and leaves the processes alone.
func (w *watch) close() error {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.poke()
	<-w.done
	var errs []error
	for _, p := range w.live { //order:any each is only closed
		errs = append(errs, unix.Close(p.pidfd))
	}
	return errors.Join(append(errs, unix.Close(w.wake))...)
}

func (w *watch) poke() {
	// An eventfd that is full wakes just as well.
	_, _ = unix.Write(w.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
}

// get is the live process of ref, or nil.
func (w *watch) get(ref vmm.Ref) *process {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.live[ref]
}

// add watches p and owns its pidfd; if ref is watched already, that one is kept
// and returned.
func (w *watch) add(p *process) (*process, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return nil, errors.Join(os.ErrClosed, unix.Close(p.pidfd))
	}
	if was := w.live[p.ref]; was != nil {
		return was, unix.Close(p.pidfd)
	}
	w.live[p.ref] = p
	w.poke()
	return p, nil
}

// signal reaches p or, when it is gone, nobody.
func (w *watch) signal(p *process, sig unix.Signal) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed || w.live[p.ref] != p {
		return nil
	}
	if err := unix.PidfdSendSignal(p.pidfd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signalling process %d: %w", p.pid, err)
	}
	return nil
}

func (w *watch) run() {
	defer close(w.done)
	for {
		w.mu.Lock()
		closed := w.closed
		fds := []unix.PollFd{{Fd: int32(w.wake), Events: unix.POLLIN}}
		var procs []*process
		for _, p := range w.live { //order:any the kernel looks at all of them
			fds = append(fds, unix.PollFd{Fd: int32(p.pidfd), Events: unix.POLLIN})
			procs = append(procs, p)
		}
		w.mu.Unlock()
		if closed {
			return
		}
		if _, err := unix.Poll(fds, -1); err != nil {
			continue // EINTR; every other error is a bug that ENOMEM aside cannot be
		}
		if fds[0].Revents != 0 {
			var counter [8]byte
			_, _ = unix.Read(w.wake, counter[:]) // it only resets the counter
		}
		for i, p := range procs {
			if fds[i+1].Revents != 0 {
				w.end(p)
			}
		}
	}
}

func (w *watch) end(p *process) {
	e := ended{process: p}
	if p.child {
		pid, err := unix.Wait4(p.pid, &e.status, unix.WNOHANG, nil)
		e.known = err == nil && pid == p.pid
	}
	w.record(e)
	w.mu.Lock()
	delete(w.live, p.ref)
	_ = unix.Close(p.pidfd) // nothing was written to it
	w.mu.Unlock()
	close(p.gone)
}
