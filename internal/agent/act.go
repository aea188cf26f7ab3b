package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"syscall"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/converge"
	"github.com/blixard/blixard/internal/vmm"
)

// Bounds of effects. A driver has its own, tighter ones; these keep one that
// hangs from being waited for for ever.
const (
	prepareTimeout = 15 * time.Minute
	startTimeout   = 90 * time.Second
	endTimeout     = 60 * time.Second // beside the grace
)

// job is an effect with all it needs of the agent's memory.
type job struct {
	action  converge.Action
	row     *blixard.Instance // nil for orphans
	bundle  *Bundle
	session *session
	guarded bool // stops on partition
}

// work carries an effect out, and the kill that was ordered meanwhile.
func (a *Agent) work(ctx, effects context.Context, j job) {
	for {
		began := time.Now()
		bundle, err := a.do(ctx, j)
		a.o.Metrics.seconds.WithLabelValues(string(j.action.Kind)).Observe(time.Since(began).Seconds())
		then := a.done(effects, &ctx, j, bundle, err)
		if then == nil {
			return
		}
		j.action = *then
	}
}

// done remembers the outcome of an effect and tells what follows it at once.
func (a *Agent) done(effects context.Context, ctx *context.Context, j job, bundle *Bundle, err error) (then *converge.Action) {
	kind, ref := j.action.Kind, j.action.Ref
	a.logDone(j, err)
	a.mu.Lock()
	defer a.mu.Unlock()
	l := a.locals[ref]
	l.cancel(nil)
	a.stale = true
	failure := ""
	if err != nil {
		failure = cmp.Or(err.Error(), "it failed")
	}
	if kind == converge.Prepare {
		l.bundle = bundle
	}
	l.End(j.action, failure, errors.Is(err, errEnding), a.clock.nowMS(), a.o.BootTimeout.Milliseconds())
	if l.then != nil {
		then, l.then = l.then, nil
		l.Begin(then.Kind, false)
		*ctx, l.cancel = context.WithCancelCause(effects)
		return then
	}
	poke(a.wake)
	return nil
}

func (a *Agent) logDone(j job, err error) {
	result, level := "ok", slog.LevelInfo
	args := []any{}
	if j.action.Why != "" {
		args = append(args, "why", j.action.Why)
	}
	if err != nil {
		result, level = "failed", slog.LevelWarn
		args = append(args, "error", err)
	}
	a.o.Metrics.actions.WithLabelValues(string(j.action.Kind), result).Inc()
	a.event(level, j.action.Ref, string(j.action.Kind), string(j.action.Kind)+" "+result, args...)
}

// do carries out one effect.
func (a *Agent) do(ctx context.Context, j job) (*Bundle, error) {
	ref := vmmRef(j.action.Ref)
	limited := func(d time.Duration) (context.Context, context.CancelFunc) {
		return context.WithTimeoutCause(ctx, d, fmt.Errorf("it took longer than %s", d))
	}
	switch j.action.Kind {
	case converge.Prepare:
		ctx, cancel := limited(prepareTimeout)
		defer cancel()
		bundle, err := a.o.Images.Bundle(ctx, j.row.Spec.Image)
		if err != nil {
			return nil, fmt.Errorf("preparing the image %s: %w", j.row.Spec.Image, errors.Join(err, context.Cause(ctx)))
		}
		return &bundle, nil
	case converge.Start:
		ctx, cancel := limited(startTimeout)
		defer cancel()
		return nil, a.start(ctx, j)
	case converge.Stop:
		grace := time.Duration(j.action.GraceMS) * time.Millisecond
		ctx, cancel := limited(grace + endTimeout)
		defer cancel()
		err := a.stop(ctx, j, grace)
		if err == nil {
			a.release(ctx, j.action.Ref)
		}
		return nil, err
	case converge.Kill:
		ctx, cancel := limited(endTimeout)
		defer cancel()
		err := ended(a.o.Driver.Stop(ctx, ref, 0))
		if err == nil {
			a.release(ctx, j.action.Ref)
		}
		return nil, err
	case converge.Pause:
		ctx, cancel := limited(endTimeout)
		defer cancel()
		if j.session != nil {
			j.session.setPaused(true)
		}
		return nil, a.pauser.Pause(ctx, ref)
	case converge.Resume:
		ctx, cancel := limited(endTimeout)
		defer cancel()
		if err := a.pauser.Resume(ctx, ref); err != nil {
			return nil, err
		}
		if j.session != nil {
			j.session.setPaused(false)
		}
		return nil, nil
	case converge.Remove:
		ctx, cancel := limited(endTimeout)
		defer cancel()
		// Last of all the driver forgets it, see network.go.
		if err := a.detach(ctx, j.action.Ref); err != nil {
			return nil, err
		}
		return nil, ended(a.o.Driver.Remove(ctx, ref))
	default:
		panic("no such effect: " + string(j.action.Kind))
	}
}

// ended takes it for success that there is nothing to end.
func ended(err error) error {
	if errors.Is(err, vmm.ErrNotFound) || errors.Is(err, vmm.ErrNotRunning) {
		return nil
	}
	return err
}

// start starts a hypervisor. A guarded one is in the lease file before and
// after, so that it is never without someone who ends it.
func (a *Agent) start(ctx context.Context, j job) error {
	spec, err := a.machineSpec(j)
	if err != nil {
		return err
	}
	if err := a.connect(ctx, j, &spec); err != nil {
		return err
	}
	if j.guarded {
		a.keepLease()
		if a.tooLate() {
			return errors.New(converge.TooLate)
		}
	}
	if err := a.o.Driver.Start(ctx, spec); err != nil {
		if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
			err = fmt.Errorf("%w: %w", cause, err)
		}
		return err
	}
	if j.guarded {
		if found, err := a.list(ctx); err == nil {
			a.take(found)
		}
		a.keepLease()
	}
	return nil
}

// tooLate tells whether what may not outlast the lease must not be started any
// more, by the lease as it is now.
func (a *Agent) tooLate() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.clock.nowMS() >= a.lease.StartByMS()
}

// machineSpec is what the driver is to run, but for its network.
func (a *Agent) machineSpec(j job) (vmm.Spec, error) {
	s, b := j.row.Spec, j.bundle
	spec := vmm.Spec{
		Ref: vmmRef(j.action.Ref), VCPUs: s.VCPUs, MemoryMiB: int(s.MemoryMiB), Kernel: b.Kernel, Initrd: b.Initrd, Cmdline: b.Cmdline, Disks: b.Disks,
		Labels: []string{"vm=" + string(j.row.VM), "node=" + string(a.o.Node)},
	}
	if j.guarded {
		spec.Labels = append(spec.Labels, labelStops)
	}
	switch {
	case b.NoGuest:
		spec.Labels = append(spec.Labels, labelNoGuest)
	case b.MaybeGuest:
		spec.Labels = append(spec.Labels, labelMaybe)
	}
	a.mu.Lock()
	driver := a.capabilities.Driver
	a.mu.Unlock()
	if s.Hypervisor != "" && driver != "" && s.Hypervisor != driver {
		return spec, fmt.Errorf("the node %s runs %s, not %s", a.o.Node, driver, s.Hypervisor)
	}
	return spec, nil
}

// portsFree tells in plain words that a port is taken, before anything is
// marked as started. Whoever takes it later meets the driver's own error.
func portsFree(ctx context.Context, ports []vmm.Port, node blixard.NodeName) error {
	for _, p := range ports {
		if p.HostPort == 0 {
			continue
		}
		var listen net.ListenConfig
		address := net.JoinHostPort(p.HostIP, strconv.Itoa(p.HostPort))
		var err error
		if p.Protocol == "udp" {
			var c net.PacketConn
			if c, err = listen.ListenPacket(ctx, "udp", address); err == nil {
				err = c.Close()
			}
		} else {
			var l net.Listener
			if l, err = listen.Listen(ctx, "tcp", address); err == nil {
				err = l.Close()
			}
		}
		switch {
		case errors.Is(err, syscall.EADDRINUSE):
			return fmt.Errorf("the port %d/%s of the node %s is taken: publish another one, or leave the host port out to have a free one chosen", p.HostPort, p.Protocol, node)
		case err != nil:
			return fmt.Errorf("publishing port %d/%s on %s: %w", p.HostPort, p.Protocol, p.HostIP, err)
		}
	}
	return nil
}

// stop has the guest shut down through its channel, which it obeys better than
// the power button, and the driver see to it that it does.
func (a *Agent) stop(ctx context.Context, j job, grace time.Duration) error {
	began := time.Now()
	ref := vmmRef(j.action.Ref)
	if s := j.session; s != nil {
		if s.isPaused() && a.pauser != nil {
			// A paused guest hears nothing; the driver goes on where this fails.
			if err := a.pauser.Resume(ctx, ref); err != nil {
				a.event(slog.LevelWarn, j.action.Ref, "stop", "resuming a paused guest to stop it failed", "error", err)
			}
		}
		if client := s.current(); client != nil {
			ask, cancel := context.WithTimeout(ctx, min(grace, 3*time.Second))
			err := client.Shutdown(ask, grace.Milliseconds())
			cancel()
			if err != nil && ctx.Err() == nil {
				a.event(slog.LevelWarn, j.action.Ref, "stop", "asking the guest to shut down failed; its power button is pressed", "error", err)
			}
		}
	}
	err := ended(a.o.Driver.Stop(ctx, ref, max(grace-time.Since(began), time.Millisecond)))
	if cause := context.Cause(ctx); err != nil && cause != nil && !errors.Is(err, cause) {
		err = fmt.Errorf("%w: %w", cause, err)
	}
	return err
}
