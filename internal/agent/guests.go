package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/converge"
	"github.com/blixard/blixard/internal/guest"
	"github.com/blixard/blixard/internal/vmm"
)

// here finds the newest incarnation of an instance that the driver holds.
func (a *Agent) here(id blixard.InstanceID) (vmm.Status, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, s := range slices.Backward(a.found) {
		if s.Ref.Instance == string(id) {
			return s, nil
		}
	}
	for _, r := range a.rows {
		if r.ID == id {
			e := blixard.Errorf(blixard.CodeUnavailable, "%s has not been started on the node %s yet: it is %s", id, a.o.Node, r.State)
			if r.State.Terminal() {
				e = blixard.Errorf(blixard.CodeNotFound, "nothing of %s is kept on the node %s: it is %s", id, a.o.Node, r.State)
			}
			e.Hint = "see `blixard vm describe " + string(r.VM) + "`"
			return vmm.Status{}, e
		}
	}
	return vmm.Status{}, blixard.Errorf(blixard.CodeNotFound, "the instance %s is not on the node %s", id, a.o.Node)
}

// Logs copies the console log of the newest incarnation to w, also of one that
// has ended; with Follow until ctx ends, or the incarnation has.
func (a *Agent) Logs(ctx context.Context, id blixard.InstanceID, o guest.LogOptions, w io.Writer) error {
	s, err := a.here(id)
	if err != nil {
		return err
	}
	if s.ConsoleLog == "" {
		return blixard.Errorf(blixard.CodeNotFound, "the hypervisor keeps no console log of %s", id)
	}
	// A moment passes between the last words and the news of the end.
	gone := func() bool {
		now, err := a.here(id)
		return err != nil || now.Ref != s.Ref || now.Phase == vmm.Exited
	}
	if err := copyLog(ctx, s.ConsoleLog, o, gone, w); err != nil {
		if errors.Is(err, fs.ErrPermission) || errors.Is(err, os.ErrInvalid) {
			return blixard.Errorf(blixard.CodeInternal, "the log of %s cannot be read: %v", id, err)
		}
		return blixard.Errorf(blixard.CodeUnavailable, "%v", err)
	}
	return nil
}

// runningHere is the incarnation of an instance that runs here.
func (a *Agent) runningHere(id blixard.InstanceID) (vmm.Status, error) {
	s, err := a.here(id)
	switch {
	case err != nil:
		return s, err
	case s.Phase == vmm.Paused:
		return s, &blixard.Error{Code: blixard.CodeConflict, Message: fmt.Sprintf("%s is paused", id), Hint: "resume it first with `blixard vm resume`"}
	case s.Phase != vmm.Running:
		return s, blixard.Errorf(blixard.CodeConflict, "%s does not run (%s)", id, s.Phase)
	}
	return s, nil
}

// Exec runs a command in the guest; the exit code is the command's.
func (a *Agent) Exec(ctx context.Context, id blixard.InstanceID, request guest.ExecRequest, stdin io.Reader, stdout, stderr io.Writer, resize <-chan guest.Size) (int, error) {
	s, err := a.runningHere(id)
	if err != nil {
		return -1, err
	}
	client := a.clientOf(refOf(s.Ref))
	if client == nil {
		if hasLabel(s.Labels, labelNoGuest) {
			return -1, blixard.Errorf(blixard.CodeRefused, "the image of %s has no blixard-guest in it, so nothing can be run there", id)
		}
		return -1, &blixard.Error{Code: blixard.CodeUnavailable, Message: fmt.Sprintf("the guest of %s does not answer yet", id), Hint: "try again once it is Running"}
	}
	code, err := client.Exec(ctx, request, stdin, stdout, stderr, resize)
	var late *blixard.Error
	switch {
	case err == nil:
		return code, nil
	case ctx.Err() != nil && errors.As(context.Cause(ctx), &late):
		return -1, late // the caller's limit, in its own words
	case errors.Is(err, guest.ErrCommand), errors.Is(err, guest.ErrInvalid):
		return -1, blixard.Errorf(blixard.CodeInvalid, "%v", err)
	default:
		return -1, blixard.Errorf(blixard.CodeUnavailable, "running a command in %s: %v", id, err)
	}
}

func (a *Agent) clientOf(ref converge.Ref) *guest.Client {
	a.mu.Lock()
	defer a.mu.Unlock()
	if l := a.locals[ref]; l != nil && l.session != nil {
		return l.session.current()
	}
	return nil
}

// Console attaches rw to the guest's serial console until ctx or either side
// ends. A Read of rw that blocks is not waited for: it must end with ctx.
func (a *Agent) Console(ctx context.Context, id blixard.InstanceID, rw io.ReadWriter) error {
	s, err := a.runningHere(id)
	if err != nil {
		return err
	}
	if a.channels == nil {
		return blixard.Errorf(blixard.CodeRefused, "the hypervisor of the node %s has no consoles", a.o.Node)
	}
	conn, err := a.channels.DialConsole(ctx, s.Ref)
	if err != nil {
		return blixard.Errorf(blixard.CodeUnavailable, "opening the console of %s: %v", id, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var copying errgroup.Group
	copying.Go(func() error {
		<-ctx.Done()
		return conn.Close() // ends both copies
	})
	go func() { // ends when the caller's Read does, see above
		defer cancel()
		//nolint:errcheck // the end of either side is the end of the session
		io.Copy(conn, rw)
	}()
	_, err = io.Copy(rw, conn)
	over := ctx.Err() != nil
	cancel()
	if closeErr := copying.Wait(); err == nil {
		err = closeErr
	}
	if err != nil && !over {
		return blixard.Errorf(blixard.CodeUnavailable, "the console of %s ended: %v", id, err)
	}
	return nil
}
