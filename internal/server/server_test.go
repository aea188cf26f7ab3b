package server_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

func (l late) Deliver(ctx context.Context, m []*raftpb.Message) error { return (*l.s).Deliver(ctx, m) }

func (l late) DeliverSnapshot(ctx context.Context, m *raftpb.Message, r io.Reader) error {
	return (*l.s).DeliverSnapshot(ctx, m, r)
}
func (l late) PeerGone(id uint64)                { (*l.s).PeerGone(id) }
func (l late) Unreachable(id uint64)             { (*l.s).Unreachable(id) }
func (l late) SnapshotSent(id uint64, err error) { (*l.s).SnapshotSent(id, err) }

func TestOneNodeServesAtOnceAndRemembers(t *testing.T) {
	c := newCluster(t)
	a := c.found("node1")
	out := c.propose(a, &state.CreateVM{Name: "webapp", Spec: spec(1)})
	_, err := a.srv.Propose(t.Context(), state.Envelope{Command: &state.CreateVM{Name: "webapp", Spec: spec(1)}})
	if !errors.Is(err, &blixard.Error{Code: blixard.CodeExists}) {
		t.Fatalf("a second create answered %v", err)
	}
	if err := a.stop(); err != nil {
		t.Fatal(err)
	}
	c.start(a)
	v, err := a.srv.ReadView(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if vm := v.VM("webapp"); vm == nil || vm.Version != out.Version {
		t.Fatalf("after a restart the VM is %+v", vm)
	}
}

func TestAnyNodeAnswersAndReplicasAgree(t *testing.T) {
	c := newCluster(t)
	a, b, d := c.three()
	for i, m := range []*member{a, b, d} {
		c.propose(m, &state.CreateVM{Name: blixard.VMName(fmt.Sprintf("vm%d", i)), Spec: spec(0)})
	}
	for _, m := range []*member{a, b, d} {
		v, err := m.srv.ReadView(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if v.VMCount() != 3 {
			t.Errorf("%s sees %d VMs right after they were acknowledged", m.name, v.VMCount())
		}
	}
	c.agree(a, b, d)
}

// agree waits until members are at one index and compares their states.
func (c *cluster) agree(members ...*member) {
	c.t.Helper()
	c.eventually("equal states", func() bool {
		v := members[0].srv.View()
		for _, m := range members[1:] {
			w := m.srv.View()
			if w.Index != v.Index {
				return false
			}
			if w.Hash() != v.Hash() {
				c.t.Fatalf("%s and %s differ at index %d", members[0].name, m.name, v.Index)
			}
		}
		return true
	})
}

func TestLeaderLostAndBack(t *testing.T) {
	c := newCluster(t)
	c.three()
	for round := range 3 {
		old := c.leader()
		if err := old.stop(); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		for _, m := range c.members {
			if m.stop != nil {
				c.propose(m, &state.CreateVM{Name: blixard.VMName(fmt.Sprintf("r%d-%s", round, m.name)), Spec: spec(0)})
			}
		}
		t.Logf("writes succeeded again after %v", time.Since(start))
		c.start(old)
		c.eventually("the old leader catches up", func() bool { return old.srv.View().VMCount() == 2*(round+1) })
	}
}

// A restart, also with a join token at hand, keeps term, vote and membership:
// the prototype zeroed them (spec/legacy.md, bug 1).
func TestRestartKeepsTermAndIdentity(t *testing.T) {
	c := newCluster(t)
	_, b, _ := c.three()
	before := b.srv.Status(t.Context())
	if err := b.stop(); err != nil {
		t.Fatal(err)
	}
	c.start(b)
	after := b.srv.Status(t.Context())
	if after.Term < before.Term || after.RaftID != before.RaftID || after.Committed < before.Committed && after.Applied == 0 {
		t.Fatalf("before %+v, after %+v", before, after)
	}
}

func TestSnapshotReachesANewNode(t *testing.T) {
	c := newCluster(t)
	c.threshold = 20
	a := c.found("node1")
	for i := range 200 {
		c.propose(a, &state.CreateVM{Name: blixard.VMName(fmt.Sprintf("vm%d", i)), Spec: spec(0)})
	}
	if _, err := a.srv.Snapshot(t.Context()); err != nil {
		t.Fatal(err)
	}
	b := c.join("node2", a)
	c.eventually("the new node has everything", func() bool { return b.srv.View().VMCount() == 200 })
	c.agree(a, b)
	if err := b.stop(); err != nil {
		t.Fatal(err)
	}
	c.start(b)
	c.eventually("it has everything after a restart", func() bool { return b.srv.View().VMCount() == 200 })
}

// A node that is removed and joins again gets a new raft ID, and the cluster
// goes back to the voters it should have (spec/legacy.md, bugs 2 and 3).
func TestRemoveAndAddAgain(t *testing.T) {
	c := newCluster(t)
	a, _, d := c.three()
	old := d.id.RaftID
	if err := d.stop(); err != nil {
		t.Fatal(err)
	}
	c.propose(a, &state.RemoveNode{Name: "node3", Force: true})
	c.eventually("the configuration follows", func() bool {
		return len(c.leader().srv.Status(t.Context()).Peers) == 2
	})
	delete(c.members, "node3")
	e := c.join("node3", c.leader())
	if e.id.RaftID == old {
		t.Fatalf("raft ID %d was used again", old)
	}
	c.eventually("it votes", func() bool {
		n := c.leader().srv.View().Node("node3")
		return n != nil && n.Raft == blixard.RoleVoter
	})
}

func TestWatchResumesAndTellsWhenItCannot(t *testing.T) {
	c := newCluster(t)
	a := c.found("node1")
	first := c.propose(a, &state.CreateVM{Name: "one", Spec: spec(0)})
	c.propose(a, &state.CreateVM{Name: "two", Spec: spec(0)})
	next, err := a.srv.Watch(t.Context(), first.Index)
	if err != nil {
		t.Fatal(err)
	}
	changes, err := next()
	if err != nil {
		t.Fatal(err)
	}
	vm, ok := changes[0].Object.(*blixard.VM)
	if !ok || vm.Name != "two" {
		t.Fatalf("the first change after %d is %+v", first.Index, changes[0])
	}
	if err := a.stop(); err != nil {
		t.Fatal(err)
	}
	c.threshold = 10
	c.start(a)
	if _, err := a.srv.ReadView(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := a.srv.Snapshot(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := a.stop(); err != nil {
		t.Fatal(err)
	}
	c.start(a)
	if _, err := a.srv.Watch(t.Context(), first.Index); !errors.Is(err, &blixard.Error{Code: blixard.CodeGone}) {
		t.Fatalf("watching from before the snapshot answered %v", err)
	}
}

func TestLeasesOnlyFromTheRulingLeader(t *testing.T) {
	c := newCluster(t)
	_, b, d := c.three()
	lead := c.leader()
	for _, m := range []*member{b, d} {
		if m == lead {
			continue
		}
		if _, err := m.srv.GrantLease(t.Context(), "node1", 1); err == nil {
			t.Errorf("%s grants a lease without leading", m.name)
		}
		c.eventually("the leader grants "+string(m.name)+" its lease", func() bool {
			g, err := m.srv.Heartbeat(t.Context())
			return err == nil && g.OK
		})
		if g, err := lead.srv.GrantLease(t.Context(), m.name, 999); err != nil || g.OK {
			t.Errorf("a stranger's heartbeat was answered %+v, %v", g, err)
		}
	}
}

func TestIdempotencyKeyAcrossNodes(t *testing.T) {
	c := newCluster(t)
	a, b, _ := c.three()
	e := state.Envelope{Key: "one-key", Command: &state.CreateVM{Name: "webapp", Spec: spec(0)}}
	first, err := a.srv.Propose(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	again, err := b.srv.Propose(t.Context(), e)
	if err != nil || again.Version != first.Version {
		t.Fatalf("the same key answered %+v and %+v, %v", first, again, err)
	}
}
