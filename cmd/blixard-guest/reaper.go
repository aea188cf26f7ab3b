package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
)

// reaper starts and reaps all children. One place waits for any child, looks
// up whose it is and tells the owner; orphans that PID 1 inherits are just
// reaped. Nothing else in this program waits for a process.
type reaper struct {
	mu       sync.Mutex // held over fork and registration, so that no child is reaped unknown
	children map[int]chan syscall.WaitStatus
}

func newReaper() *reaper {
	return &reaper{children: make(map[int]chan syscall.WaitStatus)}
}

// run reaps until ctx ends. Whoever still waits for a child then waits no more.
func (r *reaper) run(ctx context.Context) {
	defer r.leave()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGCHLD)
	defer signal.Stop(signals)
	for {
		r.reap()
		select {
		case <-ctx.Done():
			return
		case <-signals:
		}
	}
}

// leave lets go of the children that have not ended.
func (r *reaper) leave() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for pid, ended := range r.children { //order:any each by itself
		delete(r.children, pid)
		close(ended)
	}
}

// reap takes all children that have ended, and tells whether none is left. For
// PID 1 that means that no other process is: each has an ancestor among its
// children, but the kernel's own.
func (r *reaper) reap() (alone bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			return errors.Is(err, syscall.ECHILD)
		}
		if owner, ok := r.children[pid]; ok {
			delete(r.children, pid)
			owner <- status
		}
	}
}

// process is a child; its pid stays its own until ended was received.
type process struct {
	pid   int
	ended <-chan syscall.WaitStatus // one value

	reaper *reaper
}

// start runs a command in a session of its own.
func (r *reaper) start(args, env []string, dir string, files []uintptr, tty bool) (*process, error) {
	if dir == "" {
		dir = "/"
	}
	path, err := lookPath(args[0], env)
	if err != nil {
		return nil, err
	}
	return r.spawn(path, args, &syscall.ProcAttr{
		Dir: dir, Env: env, Files: files,
		Sys: &syscall.SysProcAttr{Setsid: true, Setctty: tty},
	})
}

// spawn runs a program; attributes should give it a session of its own.
func (r *reaper) spawn(path string, args []string, attributes *syscall.ProcAttr) (*process, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := syscall.ForkExec(path, args, attributes)
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", args[0], err)
	}
	ended := make(chan syscall.WaitStatus, 1)
	r.children[pid] = ended
	return &process{pid: pid, ended: ended, reaper: r}, nil
}

// signal goes to the command and all it has started in its session's group. A
// process already reaped is left alone: its number may be another's.
func (p *process) signal(s syscall.Signal) error {
	p.reaper.mu.Lock()
	defer p.reaper.mu.Unlock()
	if _, running := p.reaper.children[p.pid]; !running {
		return nil
	}
	return syscall.Kill(-p.pid, s)
}

// exitCode is as shells tell it.
func exitCode(status syscall.WaitStatus) int {
	if status.Signaled() {
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}

func lookPath(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	path := "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
	for _, entry := range env {
		if value, ok := strings.CutPrefix(entry, "PATH="); ok {
			path = value
		}
	}
	for _, dir := range filepath.SplitList(path) {
		candidate := filepath.Join("/", dir, name)
		info, err := os.Stat(candidate)
		if err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return candidate, nil
		}
	}
	return "", fmt.Errorf("%s is not in PATH (%s): %w", name, path, os.ErrNotExist)
}
