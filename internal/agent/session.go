package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/converge"
	"github.com/blixard/blixard/internal/guest"
)

const (
	dialAgain   = 500 * time.Millisecond
	helloLimit  = 60 * time.Second // then the channel is opened anew
	stateLimit  = 10 * time.Second
	stateMisses = 3 // answers that fail in a row before the channel is opened anew
	maybeWait   = 30 * time.Second
	clockDrift  = 2 * time.Second // the guest's clock is set when it is off by more
)

// session is the agent's connection with one guest, for as long as it runs: it
// is opened again whenever it breaks.
type session struct {
	ref    converge.Ref
	cancel context.CancelFunc

	mu      sync.Mutex
	client  *guest.Client // nil while there is no connection
	paused  bool
	resumed chan struct{} // holds one
}

// current is the client, nil while there is none.
func (s *session) current() *guest.Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.client
}

func (s *session) set(c *guest.Client) {
	s.mu.Lock()
	s.client = c
	s.mu.Unlock()
}

func (s *session) isPaused() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.paused
}

// setPaused tells the session that its guest cannot answer, or can again.
func (s *session) setPaused(paused bool) {
	s.mu.Lock()
	was := s.paused
	s.paused = paused
	s.mu.Unlock()
	if was && !paused {
		poke(s.resumed)
	}
}

// attach opens a session with a guest. Callers hold mu.
func (a *Agent) attach(effects context.Context, l *local) {
	row := a.row(l.Ref)
	if a.ending || l.session != nil || row == nil || a.capabilities.Driver == "" {
		return // planned again when the driver has told what it can do
	}
	ctx, cancel := context.WithCancel(effects)
	s := &session{ref: l.Ref, cancel: cancel, resumed: make(chan struct{}, 1)}
	l.session, l.Attached = s, true
	if l.BootDeadlineMS == 0 && row.State != blixard.Running {
		l.BootDeadlineMS = a.clock.nowMS() + a.o.BootTimeout.Milliseconds()
	}
	talks := a.channels != nil && a.capabilities.GuestChannel
	maybe := false
	for i := range a.found {
		if refOf(a.found[i].Ref) == l.Ref {
			talks = talks && !hasLabel(a.found[i].Labels, labelNoGuest)
			maybe = hasLabel(a.found[i].Labels, labelMaybe)
		}
	}
	bundle := l.bundle
	a.running.Go(func() {
		defer cancel()
		var parts sync.WaitGroup
		ready := make(chan struct{})
		parts.Go(func() { a.checkHealth(ctx, s, row, ready) })
		if talks {
			readyOnce := sync.OnceFunc(func() { close(ready) })
			if maybe {
				parts.Go(func() {
					if pause(ctx, min(maybeWait, a.o.BootTimeout/2)) {
						a.setReady(s.ref)
						readyOnce()
					}
				})
			}
			a.converse(ctx, s, row, bundle, readyOnce)
		} else {
			a.setReady(s.ref)
			close(ready)
			<-ctx.Done()
		}
		parts.Wait()
		a.detached(s)
	})
}

// detached forgets a session that has ended.
func (a *Agent) detached(s *session) {
	a.mu.Lock()
	if l := a.locals[s.ref]; l != nil && l.session == s {
		l.session, l.Attached = nil, false
	}
	a.stale = true
	a.mu.Unlock()
	poke(a.wake)
}

func (a *Agent) setReady(ref converge.Ref) {
	a.mu.Lock()
	l := a.memory(ref)
	first := !l.Ready
	l.Ready = true
	a.mu.Unlock()
	if first {
		a.event(slog.LevelInfo, ref, "ready", "the guest is ready")
		poke(a.wake)
	}
}

// converse keeps talking to the guest until ctx ends.
func (a *Agent) converse(ctx context.Context, s *session, row *blixard.Instance, bundle *Bundle, ready func()) {
	for ctx.Err() == nil {
		err := a.talk(ctx, s, row, bundle, ready)
		if ctx.Err() != nil {
			return
		}
		a.event(slog.LevelDebug, s.ref, "channel", "the channel to the guest ended and is opened again", "error", err)
		poke(a.wake)
		if !pause(ctx, dialAgain) {
			return
		}
	}
}

// talk opens the channel, makes sure that the guest knows who it is, and
// watches it until the channel breaks.
func (a *Agent) talk(ctx context.Context, s *session, row *blixard.Instance, bundle *Bundle, ready func()) error {
	opening, cancel := context.WithTimeout(ctx, helloLimit)
	defer cancel()
	conn, err := a.channels.DialGuest(opening, vmmRef(s.ref))
	if err != nil {
		return fmt.Errorf("opening the guest's channel: %w", err)
	}
	client, err := guest.Dial(opening, conn)
	if err != nil {
		return fmt.Errorf("greeting the guest: %w", err)
	}
	defer client.Close() // what ended it is known already
	if err := a.configure(opening, client, row, bundle); err != nil {
		if errors.Is(err, guest.ErrInvalid) || errors.Is(err, guest.ErrCommand) || errors.Is(err, guest.ErrConfigured) {
			a.workloadEnded(s.ref, converge.Exit{Code: 126, Reason: err.Error(), NotStarted: true}) // it would refuse for ever
			<-ctx.Done()
		}
		return fmt.Errorf("configuring the guest: %w", err)
	}
	// A guest whose workload could not be started was never ready.
	state, err := client.State(opening)
	if err != nil {
		return fmt.Errorf("asking the guest whether its workload was started: %w", err)
	}
	a.noteWorkload(s.ref, &state)
	if state.Workload == guest.WorkloadFailed {
		<-ctx.Done() // it is stopped
		return ctx.Err()
	}
	s.set(client)
	defer s.set(nil)
	a.setReady(s.ref)
	ready()
	return a.watch(ctx, s, client)
}

// configure tells the guest who it is, unless it knows.
func (a *Agent) configure(ctx context.Context, client *guest.Client, row *blixard.Instance, bundle *Bundle) error {
	knows := func() (bool, error) {
		state, err := client.State(ctx)
		return err == nil && state.Configured && state.InstanceID == string(row.ID) && state.Generation == row.Generation, err
	}
	if known, err := knows(); known || err != nil {
		return err
	}
	config := guest.Config{
		InstanceID: string(row.ID), VM: string(row.VM), Node: string(a.o.Node), Generation: row.Generation,
		Hostname: string(row.ID), Command: row.Spec.Command, ClockUnixNano: time.Now().UnixNano(),
	}
	if err := a.address(&config, converge.Ref{Instance: row.ID, Generation: row.Generation}); err != nil {
		return err
	}
	if len(config.Command) == 0 && bundle != nil {
		config.Command = bundle.Command
	}
	for _, e := range row.Spec.Env {
		config.Env = append(config.Env, e.Key+"="+e.Value)
	}
	err := client.Configure(ctx, config)
	if errors.Is(err, guest.ErrConfigured) {
		if known, stateErr := knows(); known && stateErr == nil { // by a former daemon, in other words
			return nil
		}
	}
	return err
}

// watch asks the guest for its state, sets its clock and notices the end of its
// workload.
func (a *Agent) watch(ctx context.Context, s *session, client *guest.Client) error {
	tick := time.NewTicker(a.o.PollEvery)
	defer tick.Stop()
	for misses := 0; ; {
		var err error
		if !s.isPaused() {
			if err = a.ask(ctx, s, client); err == nil {
				misses = 0
			} else if misses++; misses >= stateMisses {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-client.Done():
			return errors.Join(guest.ErrClosed, err)
		case <-tick.C:
		case <-s.resumed:
		}
	}
}

func (a *Agent) ask(ctx context.Context, s *session, client *guest.Client) error {
	ctx, cancel := context.WithTimeout(ctx, stateLimit)
	defer cancel()
	state, err := client.State(ctx)
	if err != nil {
		return fmt.Errorf("asking the guest for its state: %w", err)
	}
	now := time.Now()
	if off := now.Sub(time.Unix(0, state.ClockUnixNano)); off > clockDrift || off < -clockDrift {
		if err := client.SetClock(ctx, now.UnixNano()); err != nil {
			return fmt.Errorf("setting the guest's clock: %w", err)
		}
		a.event(slog.LevelDebug, s.ref, "clock", "set the guest's clock", "off", off)
	}
	a.noteWorkload(s.ref, &state)
	return nil
}

// noteWorkload notices that a workload has ended, or never began.
func (a *Agent) noteWorkload(ref converge.Ref, state *guest.State) {
	switch state.Workload {
	case guest.WorkloadExited:
		a.workloadEnded(ref, converge.Exit{Code: state.ExitCode, Reason: state.Reason})
	case guest.WorkloadFailed:
		a.workloadEnded(ref, converge.Exit{Code: max(state.ExitCode, 126), Reason: state.Reason, NotStarted: true})
	case guest.WorkloadNone, guest.WorkloadRunning:
	}
}

// workloadEnded remembers how it ended; what follows is planned.
func (a *Agent) workloadEnded(ref converge.Ref, exit converge.Exit) {
	a.mu.Lock()
	l := a.memory(ref)
	first := l.Exit == nil
	if first {
		l.Exit = &exit
	}
	a.mu.Unlock()
	if first {
		a.event(slog.LevelInfo, ref, "exit", "the workload ended", "exit_code", exit.Code, "reason", exit.Reason, "not_started", exit.NotStarted)
		poke(a.wake)
	}
}
