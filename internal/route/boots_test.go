package route_test

import (
	"testing"

	"github.com/blixard/blixard/internal/route"
)

// Without a template few start at once; those who wait go on when one is ready,
// or all when there is a template.
func TestFewStartWithoutATemplate(t *testing.T) {
	s := tell(t, route.Limits{Boots: 1, Pool: -1}, nil)
	for id := range route.CallID(5) {
		s.did(s.n.Call(s.now, route.Call{ID: id + 1, Revision: rev, DeadlineMS: s.now + 100_000, MayStart: true, MayWait: true}))
	}
	s.granted(3).wants("start f:0.1 instance=1", "lease f:0.0 n=5")
	s.granted(5).wants()
	// The first that is ready serves one who waits, and then the next.
	s.started(1).wants("assign f:0.1 call=1 instance=1 booted", "start f:0.1 instance=2")
	s.ends(1).wants("assign f:0.1 call=2 instance=1 warm")
	s.settings(func(set *route.Settings) { set.Revisions[0].Clones = true })
	s.wants("start f:0.1 instance=3", "start f:0.1 instance=4")
}

// Who may go elsewhere is told at once.
func TestBusyWithoutATemplate(t *testing.T) {
	s := tell(t, route.Limits{Boots: 1}, nil)
	s.call(1)
	s.granted(3).wants("start f:0.1 instance=1")
	s.call(2).wants("reject f:0.1 call=2 (busy)")
}

// A broken instance is not asked to end in order, a used up one is.
func TestBrokenIsNotRecycled(t *testing.T) {
	s := tell(t, route.Limits{}, nil)
	s.call(1)
	s.granted(3)
	s.started(1)
	s.did(s.n.CallEnded(s.now, 1, route.Ended{Broken: true})).wants("kill f:0.1 instance=1 (broken)")
	s = tell(t, route.Limits{}, func(set *route.Settings) { set.Revisions[0].RecycleCalls = 1 })
	s.call(1)
	s.granted(3)
	s.started(1)
	s.ends(1).wants("kill f:0.1 instance=1 (recycled)")
}

// A node rests when there is nothing that could have to end.
func TestRests(t *testing.T) {
	s := tell(t, route.Limits{}, nil)
	rests := func(want bool) {
		t.Helper()
		if s.n.Rests() != want {
			t.Errorf("at %d: rests %t", s.now, !want)
		}
	}
	rests(true)
	s.call(1)
	rests(false)
	s.granted(3)
	s.started(1)
	s.ends(1)
	rests(false)
	s.tick(60_000)
	s.did(s.n.Looked(s.now, 1, false))
	s.died(1)
	rests(false) // there are slots
	for range 10 {
		s.tick(60_000)
	}
	rests(true)
}
