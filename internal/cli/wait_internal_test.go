package cli

import (
	"strings"
	"testing"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// TestNeverStarts: a command that cannot be started is no matter of patience,
// unless it was of an older spec or restart.
func TestNeverStarts(t *testing.T) {
	failed := &blixardv1.Instance{Id: "web-1", Ordinal: 1, Generation: 1, SpecVersion: 5, Node: "node1", State: "Failed", Message: blixard.CommandNotStarted + " (exit code 126): starting /nosuch: no such file"}
	again := &blixardv1.Instance{Id: "web-1", Ordinal: 1, Generation: 2, SpecVersion: 5, Node: "node2", State: "Starting", Wanted: "run"}
	vm := &blixardv1.VM{Name: "web", Desired: "running", SpecVersion: 5, Spec: &blixardv1.VMSpec{}, Instances: []*blixardv1.Instance{failed, again}}
	err := running().hopeless(vm)
	if blixard.CodeOf(err) != blixard.CodeRefused || !strings.Contains(err.Error(), "web-1 has failed on node1: the command could not be started (exit code 126): starting /nosuch: no such file") {
		t.Errorf("got %v", err)
	}
	vm.SpecVersion = 6
	if err := running().hopeless(vm); err != nil {
		t.Errorf("of an older spec: %v", err)
	}
	vm.SpecVersion, failed.Message = 5, "the hypervisor ended"
	if err := running().hopeless(vm); err != nil {
		t.Errorf("of what may get better: %v", err)
	}
}
