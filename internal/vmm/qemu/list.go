package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sync/errgroup"

	"github.com/blixard/blixard/internal/vmm"
)

const consoleLogsKept = 3

// refs are the incarnations that have a directory, in order. Names that are
// none of ours are passed over.
func (d *Driver) refs() ([]vmm.Ref, error) {
	entries, err := os.ReadDir(filepath.Join(d.options.Root, "vms"))
	if err != nil {
		return nil, fmt.Errorf("reading the incarnations: %w", err)
	}
	var refs []vmm.Ref
	for _, entry := range entries {
		if ref, err := vmm.ParseRef(entry.Name()); err == nil && entry.IsDir() {
			refs = append(refs, ref)
		}
	}
	slices.SortFunc(refs, vmm.Ref.Compare)
	return refs, nil
}

// List implements vmm.Driver. It also rotates console logs that have grown.
func (d *Driver) List(ctx context.Context) ([]vmm.Status, error) {
	refs, err := d.refs()
	if err != nil {
		return nil, err
	}
	found := make([]*vmm.Status, len(refs))
	workers, ctx := errgroup.WithContext(ctx)
	workers.SetLimit(statusWorkers)
	for i, ref := range refs {
		workers.Go(func() error {
			status, err := d.status(ctx, ref)
			if errors.Is(err, vmm.ErrNotFound) {
				return nil // removed meanwhile
			}
			found[i] = &status
			return err
		})
	}
	if err := workers.Wait(); err != nil {
		return nil, fmt.Errorf("listing incarnations: %w", err)
	}
	statuses := make([]vmm.Status, 0, len(found))
	for _, status := range found {
		if status != nil {
			statuses = append(statuses, *status)
		}
	}
	return statuses, nil
}

func (d *Driver) status(ctx context.Context, ref vmm.Ref) (vmm.Status, error) {
	inc, err := d.load(ref)
	if err != nil {
		return vmm.Status{}, err
	}
	status := vmm.Status{
		Ref: ref, Phase: vmm.Prepared,
		Labels: inc.spec.Spec.Labels, ConsoleLog: filepath.Join(inc.dir, fileConsole),
		Template: inc.spec.Spec.Template != "",
	}
	if !inc.started {
		return status, nil
	}
	status.StartedAt = inc.startedAt
	status.Ports = inc.spec.Spec.Network.Ports
	if inc.process != nil && inc.process.Ports != nil {
		status.Ports = inc.process.Ports
	}
	p, err := d.find(inc)
	if err != nil {
		return status, err
	}
	if p == nil {
		held, err := logHeld(inc.dir)
		if err != nil {
			return status, err
		}
		if held { // alive, and not yet to be identified
			status.Phase = vmm.Running
			return status, nil
		}
		status.Phase, status.ExitReason = vmm.Exited, d.exitReason(inc)
		return status, nil
	}
	status.Phase, status.Pid = vmm.Running, p.pid
	if d.paused(ctx, p) {
		status.Phase = vmm.Paused
	}
	select {
	case <-p.gone:
		status.Phase, status.Pid, status.ExitReason = vmm.Exited, 0, readReason(inc.dir)
	default:
	}
	if err := rotate(status.ConsoleLog, d.options.ConsoleLogBytes); err != nil {
		d.log.Warn("rotating a console log", "instance", ref.Instance, "generation", ref.Generation, "error", err)
	}
	return status, nil
}

func (d *Driver) exitReason(inc *incarnation) string {
	switch {
	case inc.exit == nil && inc.process == nil:
		return withLines("the start was interrupted", lastLines(tail(filepath.Join(inc.dir, fileLog), logTailBytes)))
	case inc.exit == nil && inc.process.BootID != d.boot:
		return "the machine was restarted while it ran"
	default:
		return readReason(inc.dir)
	}
}

// paused asks QEMU; one that does not answer in time counts as running, since
// its process does.
func (d *Driver) paused(ctx context.Context, p *process) bool {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	var answer struct {
		Running bool   `json:"running"`
		Status  string `json:"status"`
	}
	err := d.control(ctx, p.ref, func(q *qmpConn) error { return q.execute(ctx, "query-status", nil, &answer) })
	return err == nil && !answer.Running && answer.Status != "shutdown"
}

// rotate copies a log that has reached limit to .1, moving older ones to .2 and
// .3, and truncates it: QEMU keeps appending to the same file. What the guest
// writes between the copy and the truncation is lost.
func rotate(path string, limit int64) error {
	info, err := os.Stat(path)
	if err != nil || info.Size() < limit {
		return nil // no log yet is no fault
	}
	for n := consoleLogsKept - 1; n >= 1; n-- {
		err := os.Rename(path+"."+strconv.Itoa(n), path+"."+strconv.Itoa(n+1))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("renaming an older log: %w", err)
		}
	}
	from, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("opening the log: %w", err)
	}
	defer from.Close()
	to, err := os.OpenFile(path+".1", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("creating the rotated log: %w", err)
	}
	// No more than twice the limit, however fast the guest writes.
	_, err = io.Copy(to, io.LimitReader(from, 2*limit))
	if err = errors.Join(err, to.Close()); err != nil {
		return fmt.Errorf("copying the log: %w", err)
	}
	if err := os.Truncate(path, 0); err != nil {
		return fmt.Errorf("truncating the log: %w", err)
	}
	return nil
}
