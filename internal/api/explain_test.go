package api_test

import (
	"testing"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/internal/state"
)

// TestExplainPreemption: who asks about a VM that fits nowhere is told whose
// room it would get, and by whose end; but not of its equals.
func TestExplainPreemption(t *testing.T) {
	s := newSite(t, 2)
	for k, name := range []blixard.VMName{"low", "mid"} {
		spec := blixard.VMSpec{Replicas: 1, MemoryMiB: 12 << 10, Priority: 100 + 200*k}
		spec.Defaults()
		s.cluster.Must(&state.CreateVM{Name: name, Spec: spec, Start: true})
		s.cluster.Run(name, 1, []blixard.NodeName{"node1", "node2"}[k], blixard.Running)
	}
	for _, c := range []struct {
		priority int32
		want     string
	}{
		{0, "0/2 nodes fit: 2 too little memory; it would get room on node1 by ending low-1 (priority 100)"},
		{100, "0/2 nodes fit: 2 too little memory"},
	} {
		got, err := s.client().ExplainVM(t.Context(), &blixardv1.ExplainVMRequest{Spec: &blixardv1.VMSpec{MemoryMib: 8 << 10, Priority: c.priority}})
		if err != nil {
			t.Fatal(err)
		}
		if got.Summary != c.want {
			t.Errorf("priority %d: %q, want %q", c.priority, got.Summary, c.want)
		}
	}
}
