package replica

import (
	"errors"
	"strings"
	"testing"

	"github.com/blixard/blixard/internal/state"
)

// TestTooOld: a release that does not know what its cluster uses refuses to
// start, and says what to do; one that knows it, or more, starts.
func TestTooOld(t *testing.T) {
	for _, known := range []int{1, 2, 3} {
		boot := NewCluster(1)
		boot.State.ApplyAll(2, 1, []state.Envelope{{NowMS: 1, Command: &state.Bootstrap{
			ClusterID: "c", RaftID: 1, Node: state.NodeIdentity{Name: "n1", Address: "n1:7"}, FeatureLevel: 2,
		}}})
		boot.HardState.Commit = new(uint64(2))
		_, err := New(Config{RaftID: 1, ElectionTicks: 10, HeartbeatTicks: 1, FeatureLevel: known}, boot)
		if tooOld := known < 2; errors.Is(err, ErrTooOld) != tooOld || !tooOld && err != nil {
			t.Errorf("a release of level %d in a cluster of level 2: %v", known, err)
		} else if tooOld && !strings.Contains(err.Error(), "install the release") {
			t.Errorf("no way out: %v", err)
		}
	}
}
