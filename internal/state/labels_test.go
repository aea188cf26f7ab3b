package state_test

import (
	"slices"
	"testing"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// TestLabelsOfConfigurationAndOperator: a label that the node's configuration no
// longer has goes, one that the operator set stays.
func TestLabelsOfConfigurationAndOperator(t *testing.T) {
	c := newCluster(t)
	report := func(labels ...blixard.Label) {
		t.Helper()
		c.ok(&state.ReportNode{Name: "n1", RaftID: 1, Address: "n1", Labels: labels})
	}
	label := func(set []blixard.Label, drop ...string) {
		t.Helper()
		c.ok(&state.SetNode{Name: "n1", SetLabels: set, DropLabels: drop})
	}
	want := func(labels ...blixard.Label) {
		t.Helper()
		if got := c.s.View().Node("n1").Labels; !slices.Equal(got, labels) {
			t.Fatalf("labels %v, want %v", got, labels)
		}
	}
	disk, gpu, rack := blixard.Label{Key: "disk", Value: "nvme"}, blixard.Label{Key: "gpu", Value: "a100"}, blixard.Label{Key: "rack", Value: "7"}

	report(gpu, disk)
	label([]blixard.Label{rack})
	want(disk, gpu, rack)
	report(disk) // gpu was taken out of the configuration
	want(disk, rack)
	report()
	want(rack)
	if n := c.s.View().Node("n1"); n.ConfigLabels != nil {
		t.Errorf("labels of the configuration are left: %v", n.ConfigLabels)
	}

	// What the operator set last is the operator's.
	report(disk)
	hdd := blixard.Label{Key: "disk", Value: "hdd"}
	label([]blixard.Label{hdd})
	report()
	want(hdd, rack)
	label(nil, "disk", "rack")
	want()

	// A node that joins with a token has its labels of its configuration.
	c.ok(&state.CreateToken{Token: state.Token{ID: "id", Hash: "hash", ExpiresMS: 1 << 40, UsesLeft: 1}})
	c.ok(&state.JoinNode{Node: state.NodeIdentity{Name: "n3", Address: "n3", Labels: []blixard.Label{gpu}}, TokenID: "id", TokenHash: "hash"})
	joined := c.s.View().Node("n3")
	c.ok(&state.ReportNode{Name: "n3", RaftID: joined.RaftID, Address: "n3"})
	if n := c.s.View().Node("n3"); len(n.Labels) != 0 {
		t.Errorf("after a join and a report without labels: %v", n.Labels)
	}
	// One that an operator adds has what the operator wrote.
	c.ok(&state.JoinNode{Node: state.NodeIdentity{Name: "n4", Address: "n4", Labels: []blixard.Label{gpu}}})
	added := c.s.View().Node("n4")
	c.ok(&state.ReportNode{Name: "n4", RaftID: added.RaftID, Address: "n4"})
	if n := c.s.View().Node("n4"); !slices.Equal(n.Labels, []blixard.Label{gpu}) {
		t.Errorf("labels of an operator after a report: %v", n.Labels)
	}
	if again := c.do(&state.ReportNode{Name: "n3", RaftID: joined.RaftID, Address: "n3"}); again.Err != nil || !again.Outcome.Noop {
		t.Errorf("the same report again: %+v", again)
	}
}
