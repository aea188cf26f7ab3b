package state_test

import (
	"testing"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// cluster is a state with helpers for single steps.
type cluster struct {
	t     *testing.T
	s     *state.State
	index uint64
}

func newCluster(t *testing.T) *cluster {
	c := &cluster{t: t, s: state.New()}
	c.ok(&state.Bootstrap{ClusterID: "c", RaftID: 1, Node: state.NodeIdentity{Name: "n1", Address: "n1"}})
	c.ok(&state.JoinNode{Node: state.NodeIdentity{Name: "n2", Address: "n2"}})
	for i, n := range []blixard.NodeName{"n1", "n2"} {
		c.ok(&state.ReportNode{Name: n, RaftID: uint64(i + 1), Address: string(n), Capacity: blixard.Resources{MilliCPU: 4000, MemoryMiB: 4096, DiskMiB: 1}})
	}
	return c
}

func (c *cluster) do(m state.Command) state.Result {
	c.index++
	results, _, err := c.s.Apply(c.index, 1, state.EncodeEntry([]state.Envelope{{NowMS: int64(c.index), Command: m}}))
	if err != nil {
		c.t.Fatal(err)
	}
	return results[0]
}

func (c *cluster) ok(m state.Command) state.Outcome {
	c.t.Helper()
	r := c.do(m)
	if r.Err != nil {
		c.t.Fatalf("%T: %v", m, r.Err)
	}
	return r.Outcome
}

func (c *cluster) refused(m state.Command, code blixard.Code) {
	c.t.Helper()
	if r := c.do(m); r.Err == nil || r.Err.Code != code {
		c.t.Fatalf("%T: %v, want %s", m, r.Err, code)
	}
}

func (c *cluster) place(vm blixard.VMName, ordinal int, generation uint64, node blixard.NodeName) *state.PlaceInstance {
	row, n := c.s.View().VM(vm), c.s.View().Node(node)
	return &state.PlaceInstance{VM: vm, UID: row.UID, Ordinal: ordinal, Generation: generation, SpecVersion: row.SpecVersion, RestartSeq: row.RestartSeq, Node: node, NodeEpoch: n.Epoch}
}

func (c *cluster) observe(node blixard.NodeName, vm blixard.VMName, ordinal int, generation uint64, s blixard.InstanceState) {
	c.t.Helper()
	c.ok(&state.Observe{Node: node, RaftID: c.s.View().Node(node).RaftID, Items: []state.Observation{{VM: vm, Ordinal: ordinal, Generation: generation, State: s}}})
}

func (c *cluster) create(vm blixard.VMName, change func(*blixard.VMSpec)) {
	c.t.Helper()
	s := blixard.VMSpec{Replicas: 2, MemoryMiB: 3072}
	if change != nil {
		change(&s)
	}
	s.Defaults()
	c.ok(&state.CreateVM{Name: vm, Spec: s, Start: true})
}

// TestTwoLeadersCannotOverbook: what was decided on an older view is checked
// again when it is applied.
func TestTwoLeadersCannotOverbook(t *testing.T) {
	c := newCluster(t)
	c.create("a", nil)
	c.create("b", nil)
	first, second := c.place("a", 1, 1, "n1"), c.place("b", 1, 1, "n1")
	c.ok(first)
	c.refused(second, blixard.CodeConflict)
	c.refused(c.place("a", 1, 2, "n2"), blixard.CodeConflict) // the slot is taken
	c.refused(c.place("a", 3, 1, "n2"), blixard.CodeConflict) // not wanted
	stale := c.place("a", 2, 1, "n2")
	c.ok(&state.RestartVM{Name: "a"})
	c.refused(stale, blixard.CodeConflict)
	stale = c.place("a", 2, 1, "n2")
	n2 := c.s.View().Node("n2")
	c.ok(&state.LoseNode{Name: "n2", RaftID: n2.RaftID, Epoch: n2.Epoch})
	c.ok(&state.ReviveNode{Name: "n2", RaftID: n2.RaftID})
	c.refused(stale, blixard.CodeConflict)
}

// TestRemovedNodeLeavesNoEndedRows: no agent would ever report them removed.
func TestRemovedNodeLeavesNoEndedRows(t *testing.T) {
	c := newCluster(t)
	c.create("a", nil)
	c.ok(c.place("a", 1, 1, "n2"))
	c.observe("n2", "a", 1, 1, blixard.Failed)
	c.ok(c.place("a", 1, 2, "n2"))
	c.ok(&state.RemoveNode{Name: "n2", Force: true})
	v := c.s.View()
	if v.Instance("a", 1, 1) != nil || v.Instance("a", 1, 2) == nil || v.Instance("a", 1, 2).State != blixard.Lost {
		t.Errorf("rows: %+v, %+v", v.Instance("a", 1, 1), v.Instance("a", 1, 2))
	}
	c.refused(c.place("a", 1, 1, "n1"), blixard.CodeConflict) // the generation was used
	c.ok(&state.DeleteVM{Name: "a"})
	c.ok(&state.DropInstance{VM: "a", Ordinal: 1, Generation: 2})
	if c.s.View().VM("a") != nil {
		t.Error("the VM is still there")
	}
	c.create("a", nil)
	if got := c.s.View().VM("a").FirstGeneration; got != 3 {
		t.Errorf("the next generation is %d, want 3", got)
	}
}

// TestDropOnlyWhatNobodyReports: an ended row can be dropped when its node is
// lost or joins anew, not while its agent is there.
func TestDropOnlyWhatNobodyReports(t *testing.T) {
	for _, goes := range []state.Command{
		&state.LoseNode{Name: "n2", RaftID: 2},
		&state.JoinNode{Node: state.NodeIdentity{Name: "n2", Address: "n2"}, Replace: true},
	} {
		c := newCluster(t)
		c.create("a", nil)
		c.ok(c.place("a", 1, 1, "n2"))
		drop := &state.DropInstance{VM: "a", Ordinal: 1, Generation: 1}
		c.refused(drop, blixard.CodeConflict)
		c.observe("n2", "a", 1, 1, blixard.Stopped)
		c.refused(drop, blixard.CodeConflict)
		c.ok(goes)
		c.ok(drop)
		if o := c.ok(drop); !o.Noop {
			t.Error("dropping it again is no Noop")
		}
	}
}

// TestJoinUsesTokenOnlyIfItSucceeds: a refusal leaves no trace.
func TestJoinUsesTokenOnlyIfItSucceeds(t *testing.T) {
	c := newCluster(t)
	c.ok(&state.CreateToken{Token: state.Token{ID: "t", Hash: "h", ExpiresMS: 1000, UsesLeft: 1}})
	join := func(name blixard.NodeName, address, hash string) *state.JoinNode {
		return &state.JoinNode{Node: state.NodeIdentity{Name: name, Address: address}, TokenID: "t", TokenHash: hash}
	}
	c.refused(join("n3", "n3", "wrong"), blixard.CodeDenied)
	c.refused(join("n3", "n1", "h"), blixard.CodeExists) // the address is taken
	c.refused(join("n1", "n1", "h"), blixard.CodeExists) // the name is
	c.ok(join("n3", "n3", "h"))
	c.refused(join("n4", "n4", "h"), blixard.CodeDenied)
}

// TestReportThatChangesNothing writes nothing.
func TestReportThatChangesNothing(t *testing.T) {
	c := newCluster(t)
	before := c.s.View().Node("n1").ModifiedIndex
	o := c.ok(&state.ReportNode{Name: "n1", RaftID: 1, Address: "n1", Capacity: blixard.Resources{MilliCPU: 4000, MemoryMiB: 4096, DiskMiB: 1}})
	if !o.Noop || c.s.View().Node("n1").ModifiedIndex != before {
		t.Errorf("%+v, and the row was written at %d", o, c.s.View().Node("n1").ModifiedIndex)
	}
}
