package cli

import (
	"testing"

	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// TestStale: --stale reaches every request that can be answered without a leader,
// and harms none that cannot.
func TestStale(t *testing.T) {
	a := &app{stale: true}
	vms, node, status := &blixardv1.ListVMsRequest{}, &blixardv1.GetNodeRequest{}, &blixardv1.GetStatusRequest{}
	for _, req := range []any{vms, node, status} {
		a.withFreshness(req)
	}
	if stale := blixardv1.Consistency_CONSISTENCY_STALE; vms.Consistency != stale || node.Consistency != stale {
		t.Errorf("with --stale: %v, %v", vms, node)
	}
	a.stale = false
	fresh := &blixardv1.ListVMsRequest{}
	if a.withFreshness(fresh); fresh.Consistency != blixardv1.Consistency_CONSISTENCY_LINEARIZABLE {
		t.Errorf("without: %v", fresh)
	}
}
