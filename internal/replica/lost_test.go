package replica

import (
	"testing"

	"github.com/blixard/blixard/internal/state"
)

// TestLostByOwnClock: how long a node has been lost is counted by the leader's
// monotonic clock from when it saw it, whatever a wall clock said; a node that
// is back and lost again is lost anew.
func TestLostByOwnClock(t *testing.T) {
	st := state.New()
	apply := func(wallMS int64, cmd state.Command) {
		st.ApplyAll(st.Index()+1, 1, []state.Envelope{{NowMS: wallMS, Command: cmd}})
	}
	node := state.NodeIdentity{Name: "n1", Address: "n1:7"}
	apply(1, &state.Bootstrap{ClusterID: "c", RaftID: 1, Node: node})
	r := &Replica{st: st, lostMS: map[uint64]int64{}}
	lost := func(monoMS int64) (since int64, is bool) {
		r.nowMonoMS = monoMS
		r.noteLost()
		since, is = r.lostMS[1]
		return since, is
	}
	if _, is := lost(1000); is {
		t.Fatal("a node that is there is lost")
	}
	apply(3_600_000, &state.LoseNode{Name: "n1", RaftID: 1}) // by a clock an hour ahead
	for _, now := range []int64{5000, 65_000} {
		if since, is := lost(now); !is || since != 5000 {
			t.Errorf("at %d: lost %t since %d", now, is, since)
		}
	}
	apply(10, &state.ReviveNode{Name: "n1", RaftID: 1})
	if _, is := lost(70_000); is {
		t.Error("a node that is back is lost")
	}
	apply(20, &state.LoseNode{Name: "n1", RaftID: 1, Epoch: st.View().Node("n1").Epoch})
	if since, is := lost(80_000); !is || since != 80_000 {
		t.Errorf("lost again: %t since %d", is, since)
	}
}
