package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/guest"
)

const defaultGrace = 10 * time.Second

// agent answers the host.
type agent struct {
	init     bool // PID 1: the machine is ours to configure and to end
	bootID   string
	children *reaper
	workload *workload
	log      *workloadLog

	mu     sync.Mutex // also held while configuring, so that it happens once
	config *guest.Config

	ending sync.Once
}

func newAgent(init bool, children *reaper, log *workloadLog) *agent {
	return &agent{init: init, bootID: bootID(), children: children, workload: newWorkload(children, log), log: log}
}

// bootID is the kernel's, which is random per boot.
func bootID() string {
	if id, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		return strings.TrimSpace(string(id))
	}
	var id [16]byte
	// crypto/rand does not fail
	rand.Read(id[:])
	return hex.EncodeToString(id[:])
}

// Configure makes the guest the instance it is to be and starts the workload.
func (a *agent) Configure(_ context.Context, config guest.Config) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.config != nil {
		before, now := *a.config, config
		before.ClockUnixNano, now.ClockUnixNano = 0, 0
		if reflect.DeepEqual(before, now) {
			return nil
		}
		return fmt.Errorf("%w: as %s, generation %d", guest.ErrConfigured, before.InstanceID, before.Generation)
	}
	for _, entry := range config.Env {
		if name, _, ok := strings.Cut(entry, "="); !ok || name == "" || strings.ContainsRune(entry, 0) {
			return fmt.Errorf("%w: environment %q is not NAME=value", guest.ErrInvalid, entry)
		}
	}
	if config.ClockUnixNano > 0 {
		if err := setClock(config.ClockUnixNano); err != nil {
			logf("%v", err)
		}
	}
	if a.init {
		if err := configureMachine(config); err != nil {
			return fmt.Errorf("configuring the guest: %w", err)
		}
	}
	a.config = &config
	a.workload.start(config, identity{
		Instance: config.InstanceID, VM: config.VM, Generation: config.Generation, Node: config.Node, BootID: a.bootID,
	}, environmentOf(config))
	logf("this is %s, generation %d, on node %s", config.InstanceID, config.Generation, config.Node)
	return nil
}

// State tells how the guest is.
func (a *agent) State(context.Context) (guest.State, error) {
	state := guest.State{
		BootID: a.bootID, UptimeMS: uptime().Milliseconds(),
		ClockUnixNano: time.Now().UnixNano(), Agent: version,
	}
	a.mu.Lock()
	if a.config != nil {
		state.Configured, state.InstanceID, state.Generation = true, a.config.InstanceID, a.config.Generation
	}
	a.mu.Unlock()
	a.workload.report(&state)
	return state, nil
}

// Exec runs a command beside the workload.
func (a *agent) Exec(ctx context.Context, request guest.ExecRequest, streams guest.Streams) (int, error) {
	return a.exec(ctx, request, streams)
}

// Logs copies from the workload's log.
func (a *agent) Logs(ctx context.Context, request guest.LogRequest, w io.Writer) error {
	return a.log.copyTo(ctx, request, w)
}

// SetClock steps the wall clock.
func (a *agent) SetClock(_ context.Context, unixNano int64) error {
	if unixNano <= 0 {
		return fmt.Errorf("%w: the clock cannot be set to %d", guest.ErrInvalid, unixNano)
	}
	return setClock(unixNano)
}

// Shutdown begins the end; only the first call counts.
func (a *agent) Shutdown(_ context.Context, grace time.Duration) error {
	go func() {
		// The answer has to get out before the machine goes.
		time.Sleep(20 * time.Millisecond)
		a.end(grace)
	}()
	return nil
}

// end stops the workload, then everything else, then the machine.
func (a *agent) end(grace time.Duration) {
	a.ending.Do(func() {
		logf("shutting down")
		a.workload.stop(grace)
		if !a.init {
			a.powerOffCommand()
			return
		}
		for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
			// Everybody but ourselves and the kernel's own.
			if err := syscall.Kill(-1, s); err != nil {
				break
			}
			a.waitAlone(time.Second)
		}
		unmountAll()
		restart()
	})
}

// waitAlone waits until no other process is left.
func (a *agent) waitAlone(limit time.Duration) {
	for end := time.Now().Add(limit); !a.children.reap() && time.Now().Before(end); {
		time.Sleep(5 * time.Millisecond)
	}
}

// powerOffCommand leaves the end of a guest with its own init to that init.
func (a *agent) powerOffCommand() {
	p, err := a.children.start([]string{"poweroff"}, os.Environ(), "/", []uintptr{0, 1, 2}, false)
	if err != nil {
		logf("powering off: %v", err)
		return
	}
	if code := exitCode(<-p.ended); code != 0 {
		logf("powering off: poweroff has failed with code %d", code)
	}
}

// environment is what commands get: PATH and the like, then the configured.
func (a *agent) environment() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.config == nil {
		return os.Environ()
	}
	return environmentOf(*a.config)
}

func environmentOf(config guest.Config) []string {
	return mergeEnv(os.Environ(), append([]string{
		"HOME=/root", "USER=root",
		"BLIXARD_INSTANCE=" + config.InstanceID, "BLIXARD_VM=" + config.VM, "BLIXARD_NODE=" + config.Node,
		fmt.Sprintf("BLIXARD_GENERATION=%d", config.Generation),
	}, config.Env...))
}

// mergeEnv puts entries over others of the same name.
func mergeEnv(base, over []string) []string {
	merged := make([]string, 0, len(base)+len(over))
	at := make(map[string]int)
	for _, list := range [][]string{base, over} {
		for _, entry := range list {
			name, _, _ := strings.Cut(entry, "=")
			if i, ok := at[name]; ok {
				merged[i] = entry
				continue
			}
			at[name] = len(merged)
			merged = append(merged, entry)
		}
	}
	return merged
}

func setClock(unixNano int64) error {
	now := unix.NsecToTimespec(unixNano)
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &now); err != nil {
		return fmt.Errorf("setting the clock: %w", err)
	}
	return nil
}
