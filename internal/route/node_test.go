package route_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/route"
)

// story drives a node and keeps what it ordered, as text.
type story struct {
	t    *testing.T
	n    *route.Node
	now  int64
	last []string
}

var rev = route.Revision{Function: "f", UID: 1, Seq: 1}

func tell(t *testing.T, limits route.Limits, change func(*route.Settings)) *story {
	s := &story{t: t, n: route.NewNode(limits), now: 1000}
	s.n.SetLease(s.now, true)
	s.n.SetBudget(s.now, 1000)
	s.settings(change)
	return s
}

func (s *story) settings(change func(*route.Settings)) *story {
	set := route.Settings{Function: "f", UID: 1, MaxConcurrent: 10, Revisions: []route.RevisionSettings{{
		Revision: rev, TargetConcurrency: 1, ChargeMiB: 100, ScaleDownMS: 60_000,
	}}}
	if change != nil {
		change(&set)
	}
	return s.did(s.n.SetSettings(s.now, []route.Settings{set}))
}

func (s *story) did(actions []route.Action) *story {
	s.last = nil
	for _, a := range actions {
		s.last = append(s.last, a.String())
	}
	return s
}

// wants checks what was ordered last, one action in each argument.
func (s *story) wants(want ...string) *story {
	s.t.Helper()
	if !slices.Equal(s.last, want) {
		s.t.Errorf("at %d:\n%s\nwant\n%s", s.now, strings.Join(s.last, "\n"), strings.Join(want, "\n"))
	}
	return s
}

func (s *story) call(id route.CallID) *story {
	return s.did(s.n.Call(s.now, route.Call{ID: id, Revision: rev, DeadlineMS: s.now + 100_000, MayStart: true}))
}

func (s *story) ends(id route.CallID) *story {
	return s.did(s.n.CallEnded(s.now, id, route.Ended{}))
}
func (s *story) granted(n int) *story { return s.did(s.n.Granted(s.now, "f", n)) }
func (s *story) started(id route.InstanceID) *story {
	return s.did(s.n.Started(s.now, id, ""))
}
func (s *story) died(id route.InstanceID) *story { return s.did(s.n.Died(s.now, id)) }
func (s *story) tick(ms int64) *story {
	s.now += ms
	return s.did(s.n.Tick(s.now))
}

func TestFirstCallLeasesStartsAndRuns(t *testing.T) {
	s := tell(t, route.Limits{}, nil).wants()
	s.call(1).wants("lease f:0.0 n=3")
	s.granted(3).wants("start f:0.1 instance=1")
	s.started(1).wants("assign f:0.1 call=1 instance=1 booted")
	s.ends(1).wants()
	s.call(2).wants("assign f:0.1 call=2 instance=1 warm")
}

func TestAFreedInstanceServesWhoWaits(t *testing.T) {
	s := tell(t, route.Limits{}, nil)
	s.call(1)
	s.granted(3)
	s.started(1)
	s.call(2).wants("start f:0.1 instance=2")
	s.ends(1).wants("assign f:0.1 call=2 instance=1 warm") // it is sooner than its start
	s.started(2).wants()
	s.call(3).wants("assign f:0.1 call=3 instance=2 warm")
	s.call(4).wants("start f:0.1 instance=3", "lease f:0.0 n=3") // the last slot: more are asked for ahead
}

func TestMostRecentlyUsedFirst(t *testing.T) {
	s := tell(t, route.Limits{}, nil)
	s.call(1)
	s.granted(3)
	s.call(2)
	s.started(1)
	s.started(2)
	s.ends(2)
	s.ends(1)
	s.call(3).wants("assign f:0.1 call=3 instance=1 warm")
	s.tick(60_000).wants("look f:0.1 instance=2", "return f:0.0 n=1")
}

func TestNoSlotLeft(t *testing.T) {
	s := tell(t, route.Limits{}, func(set *route.Settings) { set.MaxConcurrent = 2 })
	s.call(1).wants("lease f:0.0 n=2")
	s.call(2).wants()
	s.call(3).wants("reject f:0.1 call=3 (concurrency)") // more cannot be granted
	s.granted(1).wants("start f:0.1 instance=1", "reject f:0.1 call=2 (concurrency)")
	s.call(4).wants("reject f:0.1 call=4 (concurrency)") // none was left a moment ago
	s.now += 250
	s.call(5).wants("lease f:0.0 n=1")
}

func TestAFailedStartIsAnswered(t *testing.T) {
	s := tell(t, route.Limits{}, nil)
	s.call(1)
	s.granted(3)
	s.call(2)
	s.died(1).wants("reject f:0.1 call=1 (init-failed)")
	s.call(3).wants("reject f:0.1 call=3 (init-failed)") // it backs off
	s.now += 250
	s.call(4).wants("start f:0.1 instance=3")
	s.started(2).wants("assign f:0.1 call=2 instance=2 booted")
}

func TestMemoryIsTakenFromTheIdle(t *testing.T) {
	s := tell(t, route.Limits{}, nil)
	s.did(s.n.SetBudget(s.now, 200))
	s.call(1)
	s.granted(3)
	s.started(1)
	s.call(2).wants("start f:0.1 instance=2")
	s.started(2)
	s.call(3).wants("reject f:0.1 call=3 (memory)")
	s.ends(1)
	other := route.Revision{Function: "g", UID: 2, Seq: 1}
	s.did(s.n.SetSettings(s.now, []route.Settings{
		{Function: "f", UID: 1, MaxConcurrent: 10, Revisions: []route.RevisionSettings{{Revision: rev, TargetConcurrency: 1, ChargeMiB: 100, ScaleDownMS: 60_000}}},
		{Function: "g", UID: 2, MaxConcurrent: 10, Revisions: []route.RevisionSettings{{Revision: other, TargetConcurrency: 1, ChargeMiB: 100}}},
	}))
	s.did(s.n.Call(s.now, route.Call{ID: 4, Revision: other, DeadlineMS: s.now + 1000, MayStart: true}))
	s.did(s.n.Granted(s.now, "g", 3)).wants("kill f:0.1 instance=1 (its memory is needed)", "start g:0.1 instance=3")
}

func TestThePoolFollowsDemand(t *testing.T) {
	s := tell(t, route.Limits{Pool: 8, PoolKeepMS: 600_000, PoolHalfMS: 60_000}, func(set *route.Settings) {
		set.Revisions[0].Clones, set.Revisions[0].Fresh, set.Revisions[0].ScaleDownMS = true, true, 1
	})
	s.wants("spawn f:0.1 instance=1")
	s.did(s.n.Spawned(s.now, 1)).wants()
	for id := range route.CallID(4) {
		s.call(id + 1)
	}
	s.granted(3).wants("start f:0.1 instance=1 pooled", "start f:0.1 instance=2", "start f:0.1 instance=3", "lease f:0.0 n=4")
	s.granted(4).wants("start f:0.1 instance=4")
	for id := range route.InstanceID(4) {
		s.started(id + 1)
	}
	s.tick(50)
	spawned := s.last
	for id := range route.InstanceID(4) { // two at a time
		spawned = append(spawned, s.did(s.n.Spawned(s.now, id+5)).last...)
	}
	if got := slices.DeleteFunc(spawned, func(a string) bool { return !strings.HasPrefix(a, "spawn") }); len(got) != 4 {
		t.Errorf("after 4 starts at once: %q", got)
	}
	s.tick(130_000)
	if got := slices.DeleteFunc(s.last, func(a string) bool { return !strings.HasSuffix(a, "(no demand)") }); len(got) != 3 {
		t.Errorf("two half-lives later: %q", got)
	}
}

func TestNewCodeDrainsOld(t *testing.T) {
	s := tell(t, route.Limits{}, nil)
	s.call(1)
	s.granted(3)
	s.call(2)
	s.started(1)
	s.started(2)
	s.ends(2)
	next := rev
	next.Seq = 2
	s.settings(func(set *route.Settings) { set.Revisions[0].Revision = next }).wants("kill f:0.1 instance=2 (superseded)")
	s.call(3).wants("reject f:0.1 call=3 (superseded)")
	s.ends(1).wants("kill f:0.1 instance=1 (superseded)")
}

func TestDeadlineFromOutside(t *testing.T) {
	s := tell(t, route.Limits{GraceMS: 500}, func(set *route.Settings) { set.Revisions[0].TimeoutMS = 3000 })
	s.call(1)
	s.granted(1)
	s.started(1)
	s.tick(3400).wants()
	s.tick(100).wants("abort f:0.1 call=1 instance=1 (timeout)", "kill f:0.1 instance=1 (its guest did not answer in time)")
	s.call(2).wants("lease f:0.0 n=3") // the slot is held until the guest is dead
	s.died(1).wants("start f:0.1 instance=2")
}

func TestRefusalsAreTold(t *testing.T) {
	if got := route.Worst([]route.Refusal{route.NoWarm, route.NoMemory, route.NoSlot, route.Unreachable}); got != route.NoSlot {
		t.Errorf("told %q", got)
	}
	if route.Worst(nil) != "" || route.Gone.Elsewhere() || !route.NoMemory.Elsewhere() {
		t.Error("a refusal is taken for another")
	}
	var err error = &route.Refused{Why: route.NoSlot, Err: blixard.Errorf(blixard.CodeOverloaded, "full")}
	if err.Error() != "full" || blixard.CodeOf(err) != blixard.CodeOverloaded {
		t.Errorf("%v", err)
	}
}
