package dispatch_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/dispatch"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/vmm/fake"
)

// crowd calls a function many times at once and waits until all run.
func (w *world) crowd(name blixard.FunctionName, many int) (wait func()) {
	var calls sync.WaitGroup
	for range many {
		calls.Go(func() { w.try(name, "gate") })
	}
	for range many {
		w.enter()
	}
	return calls.Wait
}

// again starts the daemon and waits until it takes calls of a function.
func (w *world) again(name blixard.FunctionName) {
	w.t.Helper()
	w.start()
	w.t.Cleanup(w.stop)
	w.until("touch with the cluster", func() bool {
		var s sink
		_, err := w.d.Invoke(w.t.Context(), dispatch.Request{Invocation: w.invocation(name, "echo")}, &s)
		var r *route.Refused
		return errors.As(err, &r) && r.Why == route.NoWarm
	})
}

func (w *world) inits() (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.notes {
		if strings.HasPrefix(s, "init ") {
			n++
		}
	}
	return n
}

// Calls that all need a start on a node that finds no template anywhere have one
// guest boot, for the template, and are answered by clones.
func TestAStampedeMakesOneTemplate(t *testing.T) {
	const many = 20
	a, b := pair(t)
	a.deploy("f", many, nil)
	a.stop()
	b.stop()
	if err := errors.Join(os.RemoveAll(filepath.Join(a.options.Dir, "templates")), os.RemoveAll(filepath.Join(b.options.Dir, "templates"))); err != nil {
		t.Fatal(err)
	}
	b.set(func() { b.notes = nil })
	b.again("f")
	wait := b.crowd("f", many)
	close(b.gate)
	wait()
	m, _ := b.d.Metrics("f")
	if m.Booted != 0 || m.Cold() != many || b.inits() != 1 {
		t.Errorf("%d cold starts, %d booted, %d times initialised", m.Cold(), m.Booted, b.inits())
	}
}

// Without snapshots no more guests boot at once than the limit, and calls that
// an earlier instance has answered meanwhile boot none.
func TestBootsAtOnceAreFew(t *testing.T) {
	const most = 2
	w := newWorld(t, func(o *dispatch.Options) { o.Limits.Boots = most })
	w.deploy("f", 30, func(s *blixard.FunctionSpec) { s.Snapshot = "off" })
	w.deploy("g", 30, func(s *blixard.FunctionSpec) { s.Snapshot = "off" })
	held := make(chan struct{})
	w.set(func() { w.initHold, w.initMost, w.initNow = held, 0, 0 })
	var calls sync.WaitGroup
	for range 15 {
		calls.Go(func() { w.try("f", "echo") })
		calls.Go(func() { w.try("g", "echo") })
	}
	w.until("as many boots as may be", func() bool { w.mu.Lock(); defer w.mu.Unlock(); return w.initNow == most })
	close(held)
	calls.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.initMost > most {
		t.Errorf("%d guests booted at once, of %d", w.initMost, most)
	}
	if started := w.status("f").Instances + w.status("g").Instances; started > 20 {
		t.Errorf("30 calls have started %d instances", started)
	}
}

// A template that cannot be made is not waited for again and again.
func TestWithoutATemplateInstancesBoot(t *testing.T) {
	w := newWorld(t, nil)
	w.deploy("f", 5, nil)
	w.stop()
	if err := os.RemoveAll(filepath.Join(w.options.Dir, "templates")); err != nil {
		t.Fatal(err)
	}
	w.machine.Inject(fake.SnapshotFails, "", -1)
	w.again("f")
	if r := w.must("f", "echo"); r.Start != blixard.StartBooted {
		t.Errorf("%+v", r)
	}
	wait := w.crowd("f", 3)
	close(w.gate)
	wait()
}

// What cannot initialise here is answered for all who wait, by one attempt.
func TestAStampedeOnABrokenFunction(t *testing.T) {
	const many = 20
	w := newWorld(t, func(o *dispatch.Options) { o.Limits.Route.BackoffMS = 10_000 })
	w.deploy("f", many, nil)
	w.stop()
	if err := os.RemoveAll(filepath.Join(w.options.Dir, "templates")); err != nil {
		t.Fatal(err)
	}
	w.set(func() { w.initFails, w.notes = "no luck", nil })
	w.again("f")
	var calls sync.WaitGroup
	for range many {
		calls.Go(func() {
			_, _, err := w.invoke("f", "echo")
			var r *route.Refused
			if !errors.As(err, &r) || r.Why != route.StartFailed || r.Handed || !strings.Contains(err.Error(), "no luck") {
				t.Errorf("%v", err)
			}
		})
	}
	calls.Wait()
	if n := w.inits(); n > 2 {
		t.Errorf("it was tried %d times", n)
	}
}

// After a call that was not ended by its function nothing in the guest can be
// trusted: children that eat memory or ignore signals may be left.
func TestTimeoutsAndLackOfMemoryEndTheInstance(t *testing.T) {
	w := newWorld(t, nil)
	w.deploy("f", 1, nil)
	for _, kind := range []string{"Sandbox.Timedout", "Runtime.OutOfMemory"} {
		before := w.must("f", "echo")
		report, _, err := w.invoke("f", "error "+kind)
		if err != nil || report.Error == nil || report.Error.Type != kind || report.Instance != before.Instance {
			t.Fatalf("%s: %+v, %v", kind, report, err)
		}
		if after := w.must("f", "echo"); after.Instance == before.Instance || !after.Start.Cold() {
			t.Errorf("after %s: %+v", kind, after)
		}
	}
	before := w.must("f", "echo")
	if _, _, err := w.invoke("f", "error Runtime.ExitError"); err != nil {
		t.Fatal(err)
	}
	if after := w.must("f", "echo"); after.Instance != before.Instance {
		t.Error("the guest starts a runtime again that has ended; it needs no other instance")
	}
	if contains(w.notes, "shutdown spindown") {
		t.Error("a broken guest was asked to end in order")
	}
}
