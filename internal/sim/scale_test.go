package sim

import (
	"testing"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// still is a meter of a machine that takes no time.
func still() Meter {
	return Meter{NowNS: func() int64 { return 0 }, Memory: func() (int64, int64) { return 0, 0 }}
}

// TestScale: the profile comes to rest, holds what it checks, and comes out
// alike for equal seeds.
func TestScale(t *testing.T) {
	sizes := []ScaleSize{{Nodes: 10, Instances: 500, Control: true}, {Nodes: 60, Instances: 3000, Control: true}, {Nodes: 60, Instances: 3000}}
	first, second, other := Scale(7, sizes, still(), nil), Scale(7, sizes, still(), nil), Scale(8, sizes, still(), nil)
	if !first.OK || !other.OK {
		t.Fatalf("%+v, %+v", first.Violation, other.Violation)
	}
	if first.TraceHash != second.TraceHash || first.TraceHash == other.TraceHash {
		t.Errorf("hashes %s, %s and, of another seed, %s", first.TraceHash, second.TraceHash, other.TraceHash)
	}
	for _, c := range first.Sizes {
		if c.Placed != c.Instances+c.Moved || c.Control && (c.Moved == 0 || c.Lost == 0) || c.Checked < c.Instances {
			t.Errorf("%+v", c)
		}
	}
}

// TestRecountFinds: the independent check finds what the state would not let
// happen, here by a row whose node offers less than it holds.
func TestRecountFinds(t *testing.T) {
	s, err := Describe(threeNodes(), []WhatIfVM{{Name: "web", Spec: blixard.VMSpec{Replicas: 3, MemoryMiB: 512}}}, 3)
	if err != nil {
		t.Fatal(err)
	}
	w := rehearse(s, WhatIfOptions{}.withDefaults())
	w.settle()
	if _, broken := recount(s.View(), 3); len(broken) > 0 {
		t.Fatalf("%+v", broken)
	}
	if _, broken := recount(s.View(), 4); len(broken) != 1 || broken[0].Invariant != "liveness" {
		t.Errorf("one that is missing: %+v", broken)
	}
	s.ApplyAll(s.Index()+1, 2, []state.Envelope{{Command: &state.ReportNode{Name: "node1", RaftID: 1, Address: "a:1", Capacity: blixard.Resources{MemoryMiB: 1}, FeatureLevel: blixard.FeatureLevel}}})
	if _, broken := recount(s.View(), 3); len(broken) != 1 || broken[0].Invariant != "S5" {
		t.Errorf("an overbooked node: %+v", broken)
	}
}
