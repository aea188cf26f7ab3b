package blixard_test

import (
	"testing"

	"github.com/blixard/blixard"
)

// TestStatesGoForward: no state can be left and reached again.
func TestStatesGoForward(t *testing.T) {
	all := []blixard.InstanceState{blixard.Pending, blixard.Preparing, blixard.Starting, blixard.Running, blixard.Stopping, blixard.Stopped, blixard.Failed, blixard.Lost}
	var reaches func(from, to blixard.InstanceState) bool
	reaches = func(from, to blixard.InstanceState) bool {
		for _, s := range all {
			if blixard.CanFollow(from, s) && (s == to || reaches(s, to)) {
				return true
			}
		}
		return false
	}
	for _, s := range all {
		if !s.Known() || reaches(s, s) {
			t.Errorf("%s is not known or can be reached from itself", s)
		}
		if s.Terminal() != !reaches(s, blixard.Stopped) {
			t.Errorf("%s is terminal=%t, and reaches Stopped=%t", s, s.Terminal(), reaches(s, blixard.Stopped))
		}
	}
	if blixard.InstanceState("Odd").Known() {
		t.Error("Odd is known")
	}
}
