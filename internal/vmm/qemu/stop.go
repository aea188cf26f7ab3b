package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/vmm"
)

// Stop implements vmm.Driver. It presses the power button, which a guest
// without an ACPI driver ignores: whoever has a better way of asking uses it
// first. An unknown ref is vmm.ErrNotFound, one that does not run is fine.
func (d *Driver) Stop(ctx context.Context, ref vmm.Ref, grace time.Duration) error {
	p, err := d.running(ref)
	if errors.Is(err, vmm.ErrNotRunning) {
		return nil
	}
	if err != nil {
		return err
	}
	if grace > 0 {
		if stopped, err := d.askToStop(ctx, p, grace); stopped || err != nil {
			return err
		}
	}
	if d.tell(ctx, p, "quit") == nil && await(ctx, p, quitTimeout) {
		return nil
	}
	return d.kill(ctx, p)
}

// askToStop presses the power button and waits; an error is the context's.
func (d *Driver) askToStop(ctx context.Context, p *process, grace time.Duration) (bool, error) {
	start := time.Now()
	// A paused guest cannot obey. What QEMU refuses or does not hear is settled
	// by force when the grace has passed.
	limited, cancel := context.WithTimeout(ctx, grace)
	asked := errors.Join(d.tell(limited, p, "cont"), d.tell(limited, p, "system_powerdown"))
	cancel()
	if asked != nil {
		d.log.Warn("asking a vm to shut down", "instance", p.ref.Instance, "generation", p.ref.Generation, "error", asked)
	}
	stopped := await(ctx, p, grace-time.Since(start))
	if !stopped && ctx.Err() != nil {
		return false, fmt.Errorf("waiting for %s to shut down: %w", p.ref, context.Cause(ctx))
	}
	return stopped, nil
}

// tell runs one command without arguments, within the time a healthy QEMU needs.
func (d *Driver) tell(ctx context.Context, p *process, command string) error {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	return d.control(ctx, p.ref, func(q *qmpConn) error { return q.execute(ctx, command, nil, nil) })
}

// await tells whether p was gone within limit.
func await(ctx context.Context, p *process, limit time.Duration) bool {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-p.gone:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	return false
}

// kill ends p by force and waits until it is gone.
func (d *Driver) kill(ctx context.Context, p *process) error {
	if err := d.watch.signal(p, unix.SIGKILL); err != nil {
		return err
	}
	if await(ctx, p, killTimeout) {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("waiting for the killed process %d: %w", p.pid, context.Cause(ctx))
	}
	return fmt.Errorf("process %d is still there %s after it was killed", p.pid, killTimeout)
}

// Remove implements vmm.Driver. Removing what is not there is fine.
func (d *Driver) Remove(ctx context.Context, ref vmm.Ref) error {
	if err := ref.Check(); err != nil {
		return err
	}
	release, err := d.takeTurn(ctx, ref, changing)
	if err != nil {
		return err
	}
	defer release()
	defer d.dropHeld(ref)
	inc, err := d.load(ref)
	if errors.Is(err, vmm.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := d.killAll(ctx, inc); err != nil {
		return fmt.Errorf("removing %s: %w", ref, err)
	}
	if d.limits {
		if err := d.groups.remove(ref); err != nil {
			return fmt.Errorf("removing %s: %w", ref, err)
		}
	}
	uuid, err := newUUID()
	if err != nil {
		return err
	}
	trash := filepath.Join(d.options.Root, "trash", ref.String()+"."+uuid)
	if err := os.Rename(inc.dir, trash); err != nil {
		return fmt.Errorf("removing %s: %w", ref, err)
	}
	if !inc.spec.Clone { // which is nothing after a restart of the machine, there or not
		if err := syncDir(filepath.Dir(inc.dir)); err != nil {
			return fmt.Errorf("removing %s: %w", ref, err)
		}
	}
	if err := os.RemoveAll(trash); err != nil {
		return fmt.Errorf("removing %s: %w", ref, err)
	}
	return nil
}

// killAll returns when nothing of inc runs any more. A daemon that died between
// the fork and the first words of its child leaves a process that only the lock
// on the log knows of; it is found as soon as it has become QEMU.
func (d *Driver) killAll(ctx context.Context, inc *incarnation) error {
	deadline := time.Now().Add(killTimeout)
	for {
		p, err := d.find(inc)
		if err != nil {
			return err
		}
		if p != nil {
			return d.kill(ctx, p)
		}
		held, err := logHeld(inc.dir)
		if err != nil || !held {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("a process that cannot be identified holds %s", filepath.Join(inc.dir, fileLog))
		}
		inc.process, inc.exit = nil, nil // search by what QEMU's command line tells
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// running is the live process of ref; vmm.ErrNotRunning when there is none.
func (d *Driver) running(ref vmm.Ref) (*process, error) {
	inc, err := d.load(ref)
	if err != nil {
		return nil, err
	}
	p, err := d.find(inc)
	if err == nil && p == nil {
		err = fmt.Errorf("%s: %w", ref, vmm.ErrNotRunning)
	}
	return p, err
}

// Pause implements vmm.Pauser.
func (d *Driver) Pause(ctx context.Context, ref vmm.Ref) error { return d.command(ctx, ref, "stop") }

// Resume implements vmm.Pauser.
func (d *Driver) Resume(ctx context.Context, ref vmm.Ref) error {
	if err := d.command(ctx, ref, "cont"); err != nil {
		return err
	}
	// From now on the guest can make QEMU tell things that nobody reads.
	release, err := d.takeTurn(ctx, ref, controlling)
	if err != nil {
		return err
	}
	defer release()
	return d.dropControl(ref)
}

func (d *Driver) command(ctx context.Context, ref vmm.Ref, command string) error {
	if _, err := d.running(ref); err != nil {
		return err
	}
	err := d.control(ctx, ref, func(q *qmpConn) error { return q.execute(ctx, command, nil, nil) })
	if err != nil {
		return fmt.Errorf("sending %s to %s: %w", command, ref, err)
	}
	return nil
}

// control opens a session with QEMU for as long as use takes.
func (d *Driver) control(ctx context.Context, ref vmm.Ref, use func(*qmpConn) error) error {
	release, err := d.takeTurn(ctx, ref, controlling)
	if err != nil {
		return err
	}
	defer release()
	if q := d.heldControl(ref); q != nil {
		err := use(q)
		if q.broken != nil {
			err = errors.Join(err, d.dropControl(ref))
		}
		return err
	}
	conn, err := dial(ctx, d.dir(ref), sockQMP)
	if err != nil {
		return err
	}
	q, err := newQMP(ctx, conn)
	if err != nil {
		return err
	}
	return errors.Join(use(q), q.Close())
}

// DialGuest implements vmm.Channels. A second connection waits, silent, until
// the first is closed.
func (d *Driver) DialGuest(ctx context.Context, ref vmm.Ref) (net.Conn, error) {
	return d.dialSocket(ctx, ref, sockGuest)
}

// DialConsole implements vmm.Channels. A second connection waits, silent, until
// the first is closed.
func (d *Driver) DialConsole(ctx context.Context, ref vmm.Ref) (net.Conn, error) {
	return d.dialSocket(ctx, ref, sockConsole)
}

// DialCall implements vmm.Channels. A second connection waits, silent, until the
// first is closed.
func (d *Driver) DialCall(ctx context.Context, ref vmm.Ref) (net.Conn, error) {
	inc, err := d.load(ref)
	if err != nil {
		return nil, err
	}
	if !inc.spec.Spec.CallPort {
		return nil, fmt.Errorf("%s has no call port: %w", ref, vmm.ErrInvalid)
	}
	if _, err := d.running(ref); err != nil {
		return nil, err
	}
	if conn := d.takeCall(ref); conn != nil {
		return conn, nil
	}
	return dial(ctx, inc.dir, sockCall)
}

func (d *Driver) dialSocket(ctx context.Context, ref vmm.Ref, socket string) (net.Conn, error) {
	if _, err := d.running(ref); err != nil {
		return nil, err
	}
	if inc, err := d.load(ref); err != nil {
		return nil, err
	} else if inc.spec.Spec.Template != "" {
		return nil, fmt.Errorf("%s is of a template and has only its call port: %w", ref, vmm.ErrInvalid)
	}
	return dial(ctx, d.dir(ref), socket)
}
