package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// process is a server that was started here and ends with us.
type process struct {
	name string
	args []string
	env  []string
	log  string // path

	mu     sync.Mutex
	cmd    *exec.Cmd
	exited chan struct{}
}

// start starts it, or starts it again.
func (p *process) start() error {
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("opening the log of %s: %w", p.name, err)
	}
	cmd := exec.Command(p.args[0], p.args[1:]...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Env = append(os.Environ(), p.env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = errors.Join(cmd.Start(), out.Close())
	if err != nil {
		return fmt.Errorf("starting %s: %w", p.name, err)
	}
	exited := make(chan struct{})
	p.mu.Lock()
	p.cmd, p.exited = cmd, exited
	p.mu.Unlock()
	go func() { // ends with the process
		err := cmd.Wait()
		p.mu.Lock()
		unasked := p.cmd == cmd
		p.mu.Unlock()
		if unasked {
			say("%s has ended by itself: %v", p.name, err)
		}
		close(exited)
	}()
	return nil
}

// pid is 0 when it does not run.
func (p *process) pid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return 0
	}
	return p.cmd.Process.Pid
}

// kill is kill -9 of the process and its children.
func (p *process) kill() {
	p.mu.Lock()
	cmd, exited := p.cmd, p.exited
	p.cmd = nil
	p.mu.Unlock()
	if cmd == nil {
		return
	}
	if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		say("killing %s: %v", p.name, err)
	}
	<-exited
}

// dead tells that it has ended by itself.
func (p *process) dead() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.exited:
		return true
	default:
		return p.cmd == nil
	}
}

// tail is the end of its log, for errors.
func (p *process) tail() string {
	b, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-5):], "\n")
}

// usage is the resident memory in bytes and the CPU time used so far.
func (p *process) usage() (rss int64, cpu time.Duration, err error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(p.pid()) + "/stat")
	if err != nil {
		return 0, 0, fmt.Errorf("reading the usage of %s: %w", p.name, err)
	}
	// Fields after the command, which may hold spaces: state is the first.
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	var n [3]int64
	for i, at := range []int{11, 12, 21} { // utime, stime, rss
		if n[i], err = strconv.ParseInt(f[at], 10, 64); err != nil {
			return 0, 0, fmt.Errorf("reading the usage of %s: %w", p.name, err)
		}
	}
	const tick = 10 * time.Millisecond // USER_HZ is 100 on every Linux
	return n[2] * int64(os.Getpagesize()), time.Duration(n[0]+n[1]) * tick, nil
}

// freePorts finds TCP ports on loopback that nobody uses.
func freePorts(n int) ([]int, error) {
	var ports []int
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, fmt.Errorf("looking for a free port: %w", err)
		}
		defer l.Close() //nolint:errcheck // it was never used
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}

// until tries again until f succeeds or the time is up.
func until(ctx context.Context, within time.Duration, what string, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting %v for %s: %w", within, what, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
