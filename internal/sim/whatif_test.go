package sim

import (
	"bytes"
	"strings"
	"testing"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

func threeNodes() []WhatIfNode {
	var out []WhatIfNode
	for i, name := range []blixard.NodeName{"node1", "node2", "node3"} {
		out = append(out, WhatIfNode{Name: name, Zone: []string{"a", "a", "b"}[i], Capacity: blixard.Resources{MilliCPU: 8000, MemoryMiB: 4096, DiskMiB: 1 << 20}})
	}
	return out
}

func whatIf(t *testing.T, vms []WhatIfVM, o WhatIfOptions) WhatIfReport {
	t.Helper()
	s, err := Describe(threeNodes(), vms, 5)
	if err != nil {
		t.Fatal(err)
	}
	r, err := WhatIf(s, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestWhatIfANodeIsLost: what ran there runs elsewhere after the lease and the
// margin, and what has no room is told with the reason of every node.
func TestWhatIfANodeIsLost(t *testing.T) {
	r := whatIf(t, []WhatIfVM{
		{Name: "web", Spec: blixard.VMSpec{Replicas: 3, MemoryMiB: 512}},
		{Name: "apart", Spec: blixard.VMSpec{Replicas: 3, MemoryMiB: 64, AntiAffinityGroup: "x"}},
	}, WhatIfOptions{Lose: []string{"node2"}})
	if r.OK || r.DeclareMS != 6000 || r.SettledMS != 9000 || !r.Quorum.OK || r.Quorum.Left != 2 || len(r.Quorum.Voters) != 3 {
		t.Errorf("%+v", r)
	}
	if len(r.Moves) != 1 || r.Moves[0].From != "node2" || r.Moves[0].PlacedMS != 6000 || r.Moves[0].RunningMS != 9000 || r.Moves[0].DownMS != 9000 || !strings.Contains(r.Moves[0].Why, "lost") {
		t.Errorf("moves %+v", r.Moves)
	}
	if len(r.Down) != 1 || !strings.HasPrefix(string(r.Down[0].Instance), "apart-") || r.Down[0].Was != "node2" {
		t.Errorf("down %+v", r.Down)
	}
	if len(r.Refused) != 1 || r.Refused[0].VM != "apart" || r.Refused[0].Missing != 1 || r.Refused[0].Before != 0 || len(r.Refused[0].Nodes) != 3 {
		t.Errorf("refused %+v", r.Refused)
	}
	if r.Before.Instances != 6 || r.After.Instances != 5 || r.After.Nodes != 2 || r.After.Wanted != 6 {
		t.Errorf("before %+v, after %+v", r.Before, r.After)
	}
}

// TestWhatIfTheLeaderIsLost: the next leader takes its election for the last
// answer to every node.
func TestWhatIfTheLeaderIsLost(t *testing.T) {
	r := whatIf(t, []WhatIfVM{{Name: "web", Spec: blixard.VMSpec{Replicas: 3, MemoryMiB: 64, Singleton: true}}}, WhatIfOptions{Lose: []string{"node1"}, Leader: "node1", ElectionMS: 1500})
	if !r.OK || r.DeclareMS != 7500 || len(r.Moves) != 1 || r.Moves[0].PlacedMS < 7500 {
		t.Errorf("%+v", r)
	}
}

// TestWhatIfTheMajorityIsLost: nothing is decided, and singletons stop.
func TestWhatIfTheMajorityIsLost(t *testing.T) {
	r := whatIf(t, []WhatIfVM{
		{Name: "web", Spec: blixard.VMSpec{Replicas: 3, MemoryMiB: 64}},
		{Name: "one", Spec: blixard.VMSpec{Replicas: 1, MemoryMiB: 64, Singleton: true, Constraints: []blixard.Constraint{{Key: "zone", Op: "=", Value: "b"}}}},
		{Name: "goes-on", Spec: blixard.VMSpec{Replicas: 1, MemoryMiB: 64, Singleton: true, OnPartition: "continue", Constraints: []blixard.Constraint{{Key: "zone", Op: "=", Value: "b"}}}},
	}, WhatIfOptions{Lose: []string{"zone=a"}})
	if r.OK || r.Quorum.OK || len(r.Lost) != 2 || len(r.Moves) != 0 || len(r.Notes) != 1 || !strings.Contains(r.Notes[0], "No majority: 1 of 3") {
		t.Errorf("%+v", r)
	}
	down := map[blixard.InstanceID]bool{}
	for _, d := range r.Down {
		down[d.Instance] = true
	}
	if len(down) != 3 || !down["one-1"] || down["goes-on-1"] {
		t.Errorf("down %+v", r.Down)
	}
}

// TestWhatIfANodeIsDrained: instances move one after another, and those that
// cannot stay where they are.
func TestWhatIfANodeIsDrained(t *testing.T) {
	r := whatIf(t, []WhatIfVM{
		{Name: "web", Spec: blixard.VMSpec{Replicas: 6, MemoryMiB: 64}},
		{Name: "apart", Spec: blixard.VMSpec{Replicas: 3, MemoryMiB: 64, AntiAffinityGroup: "x"}},
	}, WhatIfOptions{Drain: []string{"node3"}, Detail: true})
	if r.OK || len(r.Moves) != 2 || len(r.Down) != 0 || len(r.Steps) == 0 {
		t.Errorf("%+v", r)
	}
	for _, m := range r.Moves {
		if m.From != "node3" || m.DownMS != 3000 || m.PlacedMS != m.EndedMS {
			t.Errorf("%+v", m)
		}
	}
	if r.Moves[0].RunningMS > r.Moves[1].EndedMS {
		t.Errorf("both replicas move at once: %+v", r.Moves)
	}
	if len(r.Stays) != 1 || !strings.Contains(r.Stays[0].Why, "cannot move") {
		t.Errorf("stays %+v", r.Stays)
	}
}

// TestWhatIfWithASnapshot: a cluster that runs already is taken as it is.
func TestWhatIfWithASnapshot(t *testing.T) {
	s, err := Describe(threeNodes(), []WhatIfVM{{Name: "web", Spec: blixard.VMSpec{Replicas: 3, MemoryMiB: 64}}}, 5)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := WhatIf(s, WhatIfOptions{}); err != nil { // comes to rest
		t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := s.View().WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	again, err := state.Read(&b)
	if err != nil {
		t.Fatal(err)
	}
	r, err := WhatIf(again, WhatIfOptions{Lose: []string{"node1"}})
	if err != nil || !r.OK || len(r.Moves) != 1 || r.Before.Instances != 3 {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestWhatIfAVoterIsLost: a learner gets its vote after a while.
func TestWhatIfAVoterIsLost(t *testing.T) {
	nodes := append(threeNodes(), WhatIfNode{Name: "node4", Capacity: blixard.Resources{MilliCPU: 1000, MemoryMiB: 1024}})
	s, err := Describe(nodes, nil, 3)
	if err != nil {
		t.Fatal(err)
	}
	var learner blixard.NodeName
	s.View().Nodes(func(n *blixard.Node) bool {
		if n.Raft == blixard.RoleLearner {
			learner = n.Name
		}
		return true
	})
	r, err := WhatIf(s, WhatIfOptions{Lose: []string{"node3"}, Leader: "node1", MaxVoters: 3})
	if err != nil || !r.OK || len(r.Notes) != 1 || !strings.Contains(r.Notes[0], string(learner)+" gets a vote") {
		t.Errorf("learner %s: %+v, %v", learner, r, err)
	}
}

func TestWhatIfRefuses(t *testing.T) {
	s, err := Describe(threeNodes(), nil, 5)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range []WhatIfOptions{{Lose: []string{"node4"}}, {Lose: []string{"zone=c"}}, {Drain: []string{"nod1"}}, {Lose: []string{"=x"}}, {Leader: "x"}} {
		if _, err := WhatIf(s, o); blixard.CodeOf(err) != blixard.CodeInvalid {
			t.Errorf("%+v: %v", o, err)
		}
	}
	if _, err := Describe(nil, nil, 5); blixard.CodeOf(err) != blixard.CodeInvalid {
		t.Error(err)
	}
}
