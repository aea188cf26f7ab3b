package state_test

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
	"github.com/blixard/blixard/internal/wire"
)

// founded is a cluster of one ready node.
func founded(t *testing.T, level int) (*state.State, func(state.Command) state.Result) {
	t.Helper()
	s := state.New()
	apply := func(c state.Command) state.Result {
		t.Helper()
		results, _, err := s.Apply(s.Index()+1, 1, state.EncodeEntry([]state.Envelope{{NowMS: 1000, Command: c}}))
		if err != nil {
			t.Fatal(err)
		}
		return results[0]
	}
	for _, c := range []state.Command{
		&state.Bootstrap{ClusterID: "c", RaftID: 1, Node: state.NodeIdentity{Name: "n1", Address: "n1"}, FeatureLevel: level},
		&state.ReportNode{Name: "n1", RaftID: 1, Address: "n1", Hypervisors: []string{"qemu"}, FeatureLevel: level},
	} {
		if r := apply(c); r.Err != nil {
			t.Fatal(r.Err)
		}
	}
	return s, apply
}

func createF(t *testing.T, apply func(state.Command) state.Result) {
	t.Helper()
	spec := blixard.FunctionSpec{}
	spec.Defaults()
	if r := apply(&state.CreateFunction{Name: "f", Spec: spec, CodeDigest: digest(1)}); r.Err != nil {
		t.Fatal(r.Err)
	}
}

// TestAsyncEventsAreBounded: in number, in bytes, and those that failed for good
// in both, the oldest going first.
func TestAsyncEventsAreBounded(t *testing.T) {
	s, apply := founded(t, 2)
	createF(t, apply)
	n := 0
	enqueue := func(payload []byte) *blixard.Error {
		n++
		return apply(&state.EnqueueEvent{ID: fmt.Sprint("e", n), Function: "f", Payload: payload, Owner: "n1"}).Err
	}
	large := bytes.Repeat([]byte("x"), state.MaxEventPayload)
	if err := enqueue(append(large, 'x')); blixard.CodeOf(err) != blixard.CodeInvalid {
		t.Errorf("a payload that is too large: %v", err)
	}
	for err := (*blixard.Error)(nil); err == nil; {
		if err = enqueue(large); err != nil && err.Code != blixard.CodeOverloaded {
			t.Fatal(err)
		}
	}
	if l := s.View().AsyncLoad(); l.Bytes > state.MaxAsyncBytes || l.Bytes < state.MaxAsyncBytes-state.MaxEventPayload {
		t.Errorf("%+v are accepted", l)
	}
	// A destination's event takes the place of the one that led to it.
	if r := apply(&state.SettleEvent{ID: "e2", Owner: "n1", Result: state.SettleSuccess, Next: &state.EnqueueEvent{ID: "d", Function: "f", Payload: large, Owner: "n1"}}); r.Err != nil {
		t.Errorf("the destination of an event of the same size: %v", r.Err)
	}
	var ids []string
	s.View().AsyncEvents(func(e *blixard.AsyncEvent) bool { ids = append(ids, e.ID); return true })
	for _, id := range ids {
		if r := apply(&state.SettleEvent{ID: id, Owner: "n1", Result: state.SettleDead}); r.Err != nil {
			t.Fatal(r.Err)
		}
	}
	if l := s.View().AsyncLoad(); l.Events != 0 || l.Bytes != 0 || l.DeadBytes > state.MaxDeadBytes || l.Dead < 7 {
		t.Errorf("after all have failed: %+v", l)
	}
	if r := apply(&state.PurgeEvent{Function: "f"}); r.Err != nil || s.View().AsyncLoad() != (state.AsyncLoad{}) {
		t.Errorf("purged: %+v, %+v", r, s.View().AsyncLoad())
	}
	for err := (*blixard.Error)(nil); err == nil; {
		err = enqueue(nil)
	}
	if l := s.View().AsyncLoad(); l.Events != state.MaxAsyncEvents {
		t.Errorf("%+v are accepted", l)
	}
	for i := range state.MaxDeadEvents + 5 {
		apply(&state.SettleEvent{ID: fmt.Sprint("e", n-1-i), Owner: "n1", Result: state.SettleDead})
	}
	if l := s.View().AsyncLoad(); l.Dead != state.MaxDeadEvents {
		t.Errorf("%+v are kept", l)
	}
	if again := restore(t, s.View()); again.View().AsyncLoad() != s.View().AsyncLoad() {
		t.Errorf("restored %+v of %+v", again.View().AsyncLoad(), s.View().AsyncLoad())
	}
}

// TestChangesHoldNoPayloads: those who keep changes do not keep payloads that
// were worked off long ago.
func TestChangesHoldNoPayloads(t *testing.T) {
	s, apply := founded(t, 2)
	createF(t, apply)
	for _, c := range []state.Command{
		&state.EnqueueEvent{ID: "e", Function: "f", Payload: []byte("{}")},
		&state.SettleEvent{ID: "e", Result: state.SettleSuccess},
	} {
		_, changes := s.ApplyAll(s.Index()+1, 1, []state.Envelope{{Command: c}})
		e, ok := changes[0].Object.(*blixard.AsyncEvent)
		if !ok || len(changes) != 1 || e.ID != "e" || e.Payload != nil {
			t.Errorf("%T tells %+v", c, changes)
		}
		if row := s.View().AsyncEvent("e"); row != nil && string(row.Payload) != "{}" {
			t.Errorf("the row is %+v", row)
		}
	}
}

// TestFeatureLevel: what not all nodes know is refused until the leader has
// raised the level, and a release that is too old is not let in.
func TestFeatureLevel(t *testing.T) {
	s, apply := founded(t, 1)
	enqueue := &state.EnqueueEvent{ID: "e", Function: "f"}
	for _, c := range []state.Command{enqueue, &state.Batch{Commands: []state.Command{&state.SetMaintenance{}, enqueue}}} {
		if err := s.View().Allows(c); blixard.CodeOf(err) != blixard.CodeRefused {
			t.Errorf("%T may be proposed: %v", c, err)
		}
		if r := apply(c); blixard.CodeOf(r.Err) != blixard.CodeRefused {
			t.Errorf("%T was applied: %+v", c, r)
		}
	}
	if err := s.View().Allows(&state.SetMaintenance{}); err != nil {
		t.Error(err)
	}
	if r := apply(&state.RaiseLevel{Level: 2}); blixard.CodeOf(r.Err) != blixard.CodeConflict {
		t.Errorf("raised although n1 knows level 1: %+v", r)
	}
	apply(&state.ReportNode{Name: "n1", RaftID: 1, Address: "n1", FeatureLevel: 2})
	if r := apply(&state.RaiseLevel{Level: 2}); r.Err != nil || s.View().Cluster().FeatureLevel != 2 {
		t.Errorf("not raised: %+v", r)
	}
	if r := apply(&state.RaiseLevel{Level: 1}); !r.Outcome.Noop {
		t.Errorf("lowered: %+v", r)
	}
	createF(t, apply)
	if r := apply(enqueue); r.Err != nil {
		t.Error(r.Err)
	}
	if r := apply(&state.JoinNode{Node: state.NodeIdentity{Name: "n2", Address: "n2"}}); r.Err != nil {
		t.Fatal(r.Err)
	}
	if r := apply(&state.ReportNode{Name: "n2", RaftID: 2, Address: "n2", FeatureLevel: 1}); blixard.CodeOf(r.Err) != blixard.CodeRefused {
		t.Errorf("a node of an old release became ready: %+v", r)
	}
}

// TestOldFoundation: an entry that an older release founded a cluster with has no
// level, which is 1 on every replica, whatever its release.
func TestOldFoundation(t *testing.T) {
	now := state.EncodeEntry([]state.Envelope{{Command: &state.Bootstrap{ClusterID: "c", RaftID: 1, Node: state.NodeIdentity{Name: "n1", Address: "n1"}}}})
	envelopes, err := state.DecodeEntry(now)
	if err != nil {
		t.Fatal(err)
	}
	s := state.New()
	s.ApplyAll(1, 1, envelopes)
	if got := s.View().Cluster().FeatureLevel; got != 1 {
		t.Errorf("level %d", got)
	}
	c := wire.Writer(nil) // what an event of level 1 looks like has not changed
	e := state.Event{Seq: 1, Kind: "VMCreated", VM: "a"}
	state.CodeEvent(c, &e)
	if got := fmt.Sprintf("%x", c.Bytes()); got != "010000"+"09"+fmt.Sprintf("%x", "VMCreated")+"0161"+"0000000000" {
		t.Errorf("an event is %s", got)
	}
}

// TestDivergeFunctions: a copy that is taken up again gives away no version's
// number, and no sequence, that its original may have given away since.
func TestDivergeFunctions(t *testing.T) {
	s, apply := founded(t, 2)
	createF(t, apply)
	before := s.View()
	s.Diverge(s.Index()+1, 2)
	if got := s.View().Function("f").NextNumber; got < 1+state.DivergeBy {
		t.Errorf("the next version is %d", got)
	}
	spec := blixard.FunctionSpec{}
	spec.Defaults()
	if r := apply(&state.CreateFunction{Name: "g", Spec: spec, CodeDigest: digest(1)}); r.Err != nil {
		t.Fatal(r.Err)
	}
	if got, least := s.View().Function("g").UID, before.Function("f").UID+state.DivergeBy; got < least {
		t.Errorf("the next function is %d, want %d at least", got, least)
	}
}

// TestEventOwners: each owner is seen once, in each of its epochs, whatever its
// name and its events' IDs are.
func TestEventOwners(t *testing.T) {
	s, apply := founded(t, 2)
	createF(t, apply)
	for i, owner := range []blixard.NodeName{"n1", "n1", "", "n1"} {
		if r := apply(&state.EnqueueEvent{ID: fmt.Sprint("\xff", i), Function: "f", Owner: owner}); r.Err != nil {
			t.Fatal(r.Err)
		}
	}
	n := s.View().Node("n1")
	apply(&state.LoseNode{Name: "n1", RaftID: n.RaftID, Epoch: n.Epoch})
	apply(&state.ReviveNode{Name: "n1", RaftID: n.RaftID})
	apply(&state.EnqueueEvent{ID: "later", Function: "f", Owner: "n1", OwnerEpoch: 1})
	got := ""
	v := s.View()
	v.EventOwners(func(n blixard.NodeName, epoch uint64) bool {
		count := 0
		v.EventsOwnedBy(n, epoch, func(*blixard.AsyncEvent) bool { count++; return true })
		got += fmt.Sprintf("%q@%d:%d ", n, epoch, count)
		return true
	})
	if want := `""@0:1 "n1"@0:3 "n1"@1:1 `; got != want {
		t.Errorf("owners are %s, want %s", got, want)
	}
}

func BenchmarkLeaseSlots(b *testing.B) {
	s := state.New()
	spec := blixard.FunctionSpec{}
	spec.Defaults()
	s.ApplyAll(1, 1, []state.Envelope{
		{Command: &state.Bootstrap{ClusterID: "c", RaftID: 1, Node: state.NodeIdentity{Name: "n1", Address: "n1"}, FeatureLevel: 2}},
		{Command: &state.ReportNode{Name: "n1", RaftID: 1, Address: "n1", FeatureLevel: 2}},
		{Command: &state.CreateFunction{Name: "f", Spec: spec, CodeDigest: digest(1)}},
	})
	b.ReportAllocs()
	for i := range b.N {
		var c state.Command = &state.LeaseSlots{Function: "f", Node: "n1", Want: 5}
		if i%2 == 1 {
			c = &state.ReturnSlots{Function: "f", Node: "n1", Count: 5}
		}
		s.ApplyAll(uint64(i+2), 1, []state.Envelope{{Command: c}})
		s.View()
	}
}

// TestLostNodeHoldsNoUpgradeUp: a node that was lost for long does not count for
// the feature level.
func TestLostNodeHoldsNoUpgradeUp(t *testing.T) {
	s := state.New()
	apply := func(nowMS int64, c state.Command) state.Result {
		results, _ := s.ApplyAll(s.Index()+1, 1, []state.Envelope{{NowMS: nowMS, Command: c}})
		return results[0]
	}
	for _, c := range []state.Command{
		&state.Bootstrap{ClusterID: "c", RaftID: 1, Node: state.NodeIdentity{Name: "n1", Address: "n1"}, FeatureLevel: 1},
		&state.JoinNode{Node: state.NodeIdentity{Name: "n2", Address: "n2"}},
		&state.ReportNode{Name: "n1", RaftID: 1, Address: "n1", FeatureLevel: 2},
		&state.ReportNode{Name: "n2", RaftID: 2, Address: "n2", FeatureLevel: 1},
		&state.LoseNode{Name: "n2", RaftID: 2},
	} {
		if r := apply(1000, c); r.Err != nil {
			t.Fatalf("%T: %v", c, r.Err)
		}
	}
	if r := apply(1000+state.LevelGraceMS-1, &state.RaiseLevel{Level: 2}); blixard.CodeOf(r.Err) != blixard.CodeConflict {
		t.Errorf("raised although n2 may only be restarting: %+v", r)
	}
	if r := apply(1000+state.LevelGraceMS, &state.RaiseLevel{Level: 2}); r.Err != nil || s.View().Cluster().FeatureLevel != 2 {
		t.Errorf("not raised: %+v", r)
	}
}
