package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/blixard/blixard/internal/guest"
)

// commandFile names an image's own command: a JSON list of arguments, or else
// a line for the shell.
const commandFile = "/etc/blixard/command"

// workload is the one thing a guest is there for; it runs once.
type workload struct {
	children *reaper
	log      *workloadLog

	mu      sync.Mutex
	phase   guest.Workload
	process *process
	demo    *demoServer
	code    int
	reason  string
	over    chan struct{} // closed when it is not running any more
}

func newWorkload(children *reaper, log *workloadLog) *workload {
	over := make(chan struct{})
	close(over)
	return &workload{children: children, log: log, phase: guest.WorkloadNone, over: over}
}

// start runs the configured command, else the image's, else the demo server.
// That it fails is the workload's state and not an error of the caller.
func (w *workload) start(config guest.Config, identity identity, env []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	command := config.Command
	if len(command) == 0 {
		command = imageCommand()
	}
	var err error
	if len(command) > 0 {
		err = w.startCommand(command, config.Dir, env)
	} else {
		w.demo, err = startDemo(demoAddress, identity, w.log)
		w.over = make(chan struct{})
	}
	if err != nil {
		w.phase, w.reason = guest.WorkloadFailed, err.Error()
		logf("the workload could not be started: %v", err)
		return
	}
	w.phase = guest.WorkloadRunning
}

func (w *workload) startCommand(command []string, dir string, env []string) error {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer write.Close()
	w.process, err = w.children.start(command, env, dir, []uintptr{null.Fd(), write.Fd(), write.Fd()}, false)
	if err != nil {
		return errors.Join(err, read.Close())
	}
	logf("the workload is %s, pid %d", strings.Join(command, " "), w.process.pid)
	over := make(chan struct{})
	w.over = over
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		defer w.log.end()
		defer read.Close()
		buffer := make([]byte, 32<<10)
		for {
			n, err := read.Read(buffer)
			if _, writeErr := w.log.Write(buffer[:n]); err != nil || writeErr != nil {
				return
			}
		}
	}()
	go func() {
		status := <-w.process.ended
		// Its last words come before the news of its end, unless a child of it
		// holds the pipe open.
		select {
		case <-drained:
		case <-time.After(outputGrace):
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		w.phase, w.code, w.process = guest.WorkloadExited, exitCode(status), nil
		if status.Signaled() {
			w.reason = "killed by signal " + status.Signal().String()
		}
		logf("the workload has exited with code %d", w.code)
		close(over)
	}()
	return nil
}

// stop sends SIGTERM, after grace SIGKILL, and waits for the end.
func (w *workload) stop(grace time.Duration) {
	w.mu.Lock()
	process, demo, over := w.process, w.demo, w.over
	w.mu.Unlock()
	if demo != nil {
		demo.stop()
		w.mu.Lock()
		w.demo, w.phase = nil, guest.WorkloadExited
		close(w.over)
		w.mu.Unlock()
	}
	if process == nil {
		return
	}
	for _, step := range []struct {
		signal syscall.Signal
		wait   time.Duration
	}{{syscall.SIGTERM, grace}, {syscall.SIGKILL, 2 * time.Second}} {
		if err := process.signal(step.signal); err != nil {
			logf("sending %s to the workload: %v", step.signal, err)
		}
		select {
		case <-over:
			return
		case <-time.After(step.wait):
		}
	}
}

// report fills the workload's part of the state.
func (w *workload) report(state *guest.State) {
	w.mu.Lock()
	defer w.mu.Unlock()
	state.Workload, state.ExitCode, state.Reason = w.phase, w.code, w.reason
	switch {
	case w.process != nil:
		state.Pid = w.process.pid
	case w.demo != nil:
		state.Pid = os.Getpid()
	}
}

func imageCommand() []string {
	text, err := os.ReadFile(commandFile)
	if err != nil {
		return nil
	}
	line := strings.TrimSpace(string(text))
	if strings.HasPrefix(line, "[") {
		var command []string
		if err := json.Unmarshal([]byte(line), &command); err != nil {
			return []string{"/bin/sh", "-c", fmt.Sprintf("echo '%s is no JSON list' >&2; exit 126", commandFile)}
		}
		return command
	}
	if line == "" {
		return nil
	}
	return []string{"/bin/sh", "-c", line}
}
