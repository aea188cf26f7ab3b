package main

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// functionLogBudget is what one invocation may log before only the newest
	// output is kept for its end.
	functionLogBudget = 1 << 20
	functionLogTail   = 4 << 10 // kept of what comes later
	// functionLogDrain bounds what is looked for when an invocation ends: a process
	// in the background may write for ever.
	functionLogDrain = 256 << 10
)

// functionLog takes the output of the function's processes from one pipe and
// sends it to the host. It never makes a process wait for long and never holds
// much: who writes too much loses the middle.
//
// One thread waits for output and for the next deadline, in one system call that
// the Go scheduler does not see: under emulation its own ways of waiting would cost
// a first call some milliseconds.
type functionLog struct {
	pipe  [2]int // read end (does not block), write end
	timer int    // timerfd
	send  func([]byte)

	mu      sync.Mutex
	buffer  []byte
	budget  int
	tail    []byte
	dropped int64
	total   int64 // dropped in this invocation

	armed time.Time // when the timer fires; zero: not at all
	ended bool
	done  chan struct{} // closed when watch has returned
}

func newFunctionLog(owner int, send func([]byte)) (*functionLog, error) {
	l := &functionLog{send: send, buffer: make([]byte, 16<<10), budget: functionLogBudget, done: make(chan struct{})}
	if err := unix.Pipe2(l.pipe[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("making the log's pipe: %w", err)
	}
	if err := unix.SetNonblock(l.pipe[0], true); err != nil {
		return nil, fmt.Errorf("making the log's pipe: %w", err)
	}
	// So that the function may open /dev/stderr, which is this pipe.
	if err := unix.Fchown(l.pipe[1], owner, owner); err != nil {
		return nil, fmt.Errorf("giving the log's pipe away: %w", err)
	}
	timer, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("making a timer: %w", err)
	}
	l.timer = timer
	return l, nil
}

// watch sends output as it comes, and calls expired when the timer has fired, until
// close.
func (l *functionLog) watch(expired func()) {
	defer close(l.done)
	fds := []unix.PollFd{{Fd: int32(l.pipe[0]), Events: unix.POLLIN}, {Fd: int32(l.timer), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(fds, -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			logf("waiting for the function's output: %v", err)
			return
		}
		if fds[1].Revents != 0 {
			var count [8]byte
			if _, err := unix.Read(l.timer, count[:]); err == nil {
				l.mu.Lock()
				l.armed = time.Time{}
				ended := l.ended
				l.mu.Unlock()
				if ended {
					return
				}
				expired()
			}
		}
		if fds[0].Revents != 0 {
			l.drain()
		}
	}
}

// arm has expired called at that time, or before.
func (l *functionLog) arm(at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.armed.IsZero() && !at.Before(l.armed) {
		return // it is found then that this one is not due
	}
	l.armed = at
	if err := setTimer(l.timer, int64(time.Until(at))); err != nil {
		logf("setting a deadline: %v", err)
	}
}

// drain sends what is in the pipe.
func (l *functionLog) drain() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for total := 0; total < functionLogDrain; {
		n, err := readNow(l.pipe[0], l.buffer)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n <= 0 {
			return
		}
		total += n
		l.take(l.buffer[:n])
	}
}

// Write adds output that does not come from a process.
func (l *functionLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.take(p)
	return len(p), nil
}

// take is called with mu held.
func (l *functionLog) take(p []byte) {
	if n := min(len(p), l.budget); n > 0 {
		l.send(p[:n])
		l.budget -= n
		p = p[n:]
	}
	if len(p) == 0 {
		return
	}
	l.dropped += int64(len(p))
	l.total += int64(len(p))
	l.tail = append(l.tail, p...)
	if len(l.tail) > 2*functionLogTail {
		l.tail = append(l.tail[:0], l.tail[len(l.tail)-functionLogTail:]...)
	}
}

// settle ends the log of an invocation: what is in the pipe is sent, and of what
// was too much the newest. It tells how many bytes were dropped.
func (l *functionLog) settle() int64 {
	l.drain()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dropped > 0 {
		kept := l.tail[max(0, len(l.tail)-functionLogTail):]
		l.send(fmt.Appendf(nil, "\n[blixard: %d bytes of output are not kept]\n%s", l.dropped-int64(len(kept)), kept))
	}
	dropped := l.total
	l.budget, l.tail, l.dropped, l.total = functionLogBudget, l.tail[:0], 0, 0
	return dropped
}

// close ends watch, which must have been called, and waits for it.
func (l *functionLog) close() {
	l.mu.Lock()
	l.ended, l.armed = true, time.Time{}
	l.mu.Unlock()
	l.arm(time.Now())
	<-l.done
	for _, fd := range []int{l.pipe[1], l.pipe[0], l.timer} {
		if err := unix.Close(fd); err != nil {
			logf("closing the log: %v", err)
		}
	}
}
