package server_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/server"
	"github.com/blixard/blixard/internal/state"
)

// refused tells how a read and a change fail while there is no leader, soon and
// with the reason.
func (c *cluster) refused(m *member) (read, change string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	began := time.Now()
	_, readErr := m.srv.ReadView(ctx)
	if took := time.Since(began); took > 8*time.Second {
		c.t.Errorf("a read without a leader took %s to fail", took)
	}
	began = time.Now()
	_, changeErr := m.srv.Propose(ctx, state.Envelope{Key: "k", Actor: "test", Command: &state.SetMaintenance{On: true}})
	if took := time.Since(began); took > time.Second {
		c.t.Errorf("a change took %s to be refused, though the leader is long gone", took)
	}
	for _, err := range []error{readErr, changeErr} {
		if blixard.CodeOf(err) != blixard.CodeUnavailable || strings.Contains(err.Error(), "deadline") {
			c.t.Fatalf("without a leader: %v", err)
		}
	}
	return readErr.Error(), changeErr.Error()
}

// TestLearnerNoticesSilence: a learner does not stand for election, so that raft
// never takes the leader from it.
func TestLearnerNoticesSilence(t *testing.T) {
	c := newCluster(t)
	c.maxVoters = 1
	voter := c.found("node1")
	learner := c.join("node2", voter)
	status := func() server.Status {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		return learner.srv.Status(ctx)
	}
	c.eventually("the learner is ready", func() bool { return learner.srv.Ready() && status().Role == "learner" })
	if err := voter.stop(); err != nil {
		t.Fatal(err)
	}
	c.eventually("the learner knows that it has no leader", func() bool { return !learner.srv.Ready() && status().Leader == "" && !status().Ready })
	read, change := c.refused(learner)
	if !strings.Contains(read, "no leader: node2, no voter itself, has heard of none for") {
		t.Errorf("the read says %q", read)
	}
	if !strings.Contains(change, "nothing was changed") {
		t.Errorf("the change says %q", change)
	}
	c.start(voter)
	c.eventually("the learner is ready again", func() bool { return learner.srv.Ready() && status().Leader == "node1" })
	c.propose(learner, &state.SetMaintenance{On: true})
}

// TestNoMajority: what is left of a cluster says who is missing.
func TestNoMajority(t *testing.T) {
	c := newCluster(t)
	a, b, left := c.three()
	for _, m := range []*member{a, b} {
		if err := m.stop(); err != nil {
			t.Fatal(err)
		}
	}
	c.eventually("no leader", func() bool { return !left.srv.Ready() })
	read, _ := c.refused(left)
	if !strings.Contains(read, "no leader: 1 of 3 voters answers and 2 are needed (silent: node1, node2)") {
		t.Errorf("the read says %q", read)
	}
}

// TestOrphanAsksAnybody: a node that has lost its leader asks whoever is left for
// its lease. If it was removed meanwhile, with the leader it knew, nobody else
// would ever tell it.
func TestOrphanAsksAnybody(t *testing.T) {
	c := newCluster(t)
	c.maxVoters = 1
	founder := c.found("node1")
	other := c.join("node2", founder)
	orphan := c.join("node3", founder)
	c.eventually("all are members", func() bool { return other.srv.Ready() && orphan.srv.View().NodeCount() == 3 })
	if err := founder.stop(); err != nil {
		t.Fatal(err)
	}
	c.eventually("the leader is out of touch", func() bool { return !orphan.srv.Ready() })
	asked := map[bool]bool{}
	c.eventually("it asks every other member", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_, err := orphan.srv.Heartbeat(ctx)
		if err == nil {
			t.Fatal("a lease without a leader")
		}
		asked[strings.Contains(err.Error(), "connection refused")] = true // the dead one's; the other answers that it does not lead
		return len(asked) == 2
	})
}
