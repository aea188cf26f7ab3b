package vmmtest

import (
	stdcontext "context"
	"errors"
	"testing"
	"time"

	"github.com/blixard/blixard/internal/vmm"
)

func context(t *testing.T) stdcontext.Context {
	t.Helper()
	ctx, _ := contextWithCancel(t)
	return ctx
}

func contextWithCancel(t *testing.T) (stdcontext.Context, stdcontext.CancelFunc) {
	t.Helper()
	ctx, cancel := stdcontext.WithTimeout(t.Context(), Patience)
	t.Cleanup(cancel)
	return ctx, cancel
}

func check(t *testing.T, err error, what string) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func wantError(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got error %v, want %v", err, want)
	}
}

func start(t *testing.T, d vmm.Driver, spec vmm.Spec) {
	t.Helper()
	check(t, d.Start(context(t), spec), "Start")
}

func list(t *testing.T, d vmm.Driver) []vmm.Status {
	t.Helper()
	statuses, err := d.List(context(t))
	check(t, err, "List")
	return statuses
}

func one(t *testing.T, d vmm.Driver) vmm.Status {
	t.Helper()
	statuses := list(t, d)
	if len(statuses) != 1 {
		t.Fatalf("listed %+v, want one", statuses)
	}
	return statuses[0]
}

// exited waits until the only incarnation is seen as exited.
func exited(t *testing.T, d vmm.Driver) vmm.Status {
	t.Helper()
	eventually(t, "exit", func() bool { return one(t, d).Phase == vmm.Exited })
	return one(t, d)
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	deadline := time.After(Patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("no %s within %s", what, Patience)
		}
	}
}

func nothingLeft(t *testing.T, o Options, d vmm.Driver) {
	t.Helper()
	if l := list(t, d); len(l) != 0 {
		t.Errorf("still listed: %+v", l)
	}
	if o.Leftovers != nil {
		for _, left := range o.Leftovers(t, d) {
			t.Errorf("left behind: %s", left)
		}
	}
}
