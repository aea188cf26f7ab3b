package server_test

import (
	"bytes"
	"context"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/raftlog/wal"
	"github.com/blixard/blixard/internal/server"
	"github.com/blixard/blixard/internal/state"
)

// TestRecoverElsewhere: with every machine gone, a saved state goes on where
// there never was a node, and nothing is named as something of before may be.
func TestRecoverElsewhere(t *testing.T) {
	for _, name := range []blixard.NodeName{"node2", "fresh"} {
		t.Run(string(name), func(t *testing.T) {
			c := newCluster(t)
			a, b, d := c.three()
			c.propose(a, &state.CreateVM{Name: "web", Spec: spec(3), Start: true})
			placed := func(m *member, node blixard.NodeName) (out []*blixard.Instance) {
				m.srv.View().InstancesOf("web", func(i *blixard.Instance) bool {
					if i.Counts() && (node == "" || i.Node == node) {
						out = append(out, i)
					}
					return true
				})
				return out
			}
			c.eventually("three placed", func() bool { return len(placed(a, "")) == 3 })
			var saved bytes.Buffer
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			if _, err := a.srv.WriteSnapshot(ctx, &saved); err != nil {
				t.Fatal(err)
			}
			before := a.srv.View()
			for _, m := range []*member{a, b, d} {
				if err := m.stop(); err != nil {
					t.Fatal(err)
				}
			}
			m := c.add(name)
			m.address = b.address // the new machine has got an old one's
			plan, err := server.RecoverElsewhere(state.NodeIdentity{Name: name, Address: m.address}, &saved)
			if err != nil {
				t.Fatal(err)
			}
			if want := []blixard.NodeName{"node1", "node2", "node3"}; !slices.Equal(plan.Others, want) || plan.VMs != 1 {
				t.Errorf("others %v, %d VMs", plan.Others, plan.VMs)
			}
			opened, err := wal.Open(wal.OS, filepath.Join(m.dir, "raft"), wal.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if err := plan.Carry(opened.Log); err != nil {
				t.Fatal(err)
			}
			if err := opened.Log.Close(); err != nil {
				t.Fatal(err)
			}
			m.id = plan.Identity()
			if err := server.TakeIdentity(m.dir, m.id); err != nil {
				t.Fatal(err)
			}
			if m.id.ClusterID != a.id.ClusterID || m.id.Secret != a.id.Secret || m.id.RaftID < before.Cluster().NextRaftID+state.DivergeBy {
				t.Errorf("identity %+v", m.id)
			}
			c.start(m)
			c.eventually("all runs anew", func() bool { return m.srv.Ready() && len(placed(m, name)) == 3 })
			newest := uint64(0)
			before.InstancesOf("web", func(i *blixard.Instance) bool { newest = max(newest, i.Generation); return true })
			for _, i := range placed(m, name) {
				if i.Generation < newest+state.DivergeBy {
					t.Errorf("%s may have run before: the copy knows of generation %d", i.Incarnation(), newest)
				}
			}
			if v := m.srv.View(); v.NodeCount() != 1 || v.Node(name).Raft != blixard.RoleVoter {
				t.Errorf("%d nodes, this one is %+v", v.NodeCount(), v.Node(name))
			}
			// A former node that comes back is told that it is none any more.
			if !m.srv.WasRemoved(d.id.RaftID) {
				t.Errorf("raft ID %d is not known as removed", d.id.RaftID)
			}
			more := c.join("more", m)
			c.eventually("another one joins", func() bool { return more.srv.Ready() })
		})
	}
}
