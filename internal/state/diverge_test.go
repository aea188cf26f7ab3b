package state_test

import (
	"strings"
	"testing"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// TestDiverge: a copy of a state that is taken up again gives away no number
// that its original may have given away since.
func TestDiverge(t *testing.T) {
	st := state.New()
	apply := func(c state.Command) state.Outcome {
		t.Helper()
		v := st.View()
		results, _ := st.ApplyAll(v.Index+1, 1, []state.Envelope{{NowMS: 1000, Command: c}})
		if results[0].Err != nil {
			t.Fatalf("%T: %v", c, results[0].Err)
		}
		return results[0].Outcome
	}
	spec := blixard.VMSpec{}
	spec.Defaults()
	apply(&state.Bootstrap{ClusterID: "c", Name: "c", Secret: "s", RaftID: 1, Node: state.NodeIdentity{Name: "n1", Address: "n1"}})
	apply(&state.CreateVM{Name: "web", Spec: spec, Start: true})
	before := st.View()
	st.Diverge(before.Index+1, 2)
	now := st.View()
	if now.Index != before.Index+1 {
		t.Errorf("index %d follows %d", now.Index, before.Index)
	}
	if got, least := apply(&state.JoinNode{Node: state.NodeIdentity{Name: "n2", Address: "n2"}}).Value, before.Cluster().NextRaftID+state.DivergeBy; got < least {
		t.Errorf("the next node is raft ID %d, want %d at least", got, least)
	}
	if got, least := now.VM("web").FirstGeneration, before.VM("web").FirstGeneration+state.DivergeBy; got < least {
		t.Errorf("web goes on with generation %d, want %d at least", got, least)
	}
	if apply(&state.CreateVM{Name: "more", Spec: spec}); st.View().VM("more").FirstGeneration < state.DivergeBy {
		t.Errorf("a new VM, which may be a deleted one, begins with generation %d", st.View().VM("more").FirstGeneration)
	}
	if before.VM("web").FirstGeneration == now.VM("web").FirstGeneration {
		t.Error("a view that was handed out has changed")
	}
}

// TestInstancesAreNoVMs: who names an instance where a VM is meant is told so.
func TestInstancesAreNoVMs(t *testing.T) {
	st := state.New()
	spec := blixard.VMSpec{Replicas: 2}
	spec.Defaults()
	for i, c := range []struct {
		command state.Command
		says    string
	}{
		{&state.Bootstrap{ClusterID: "c", Name: "c", Secret: "s", RaftID: 1, Node: state.NodeIdentity{Name: "n1", Address: "n1"}}, ""},
		{&state.CreateVM{Name: "web", Spec: spec}, ""},
		{&state.RestartVM{Name: "web-2"}, "it is an instance of the VM web"},
		{&state.RestartVM{Name: "web-3"}, "there is no VM named web-3 (did you mean web?)"},
		{&state.RestartVM{Name: "web-02"}, "there is no VM named web-02 (did"},
	} {
		results, _ := st.ApplyAll(uint64(i+1), 1, []state.Envelope{{NowMS: 1000, Command: c.command}})
		if err := results[0].Err; (err != nil) != (c.says != "") || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%T: %v, want %q", c.command, err, c.says)
		}
	}
}
