package gateway_test

import (
	"context"
	"testing"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/gateway"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/state"
)

func (c *cluster) revision(name blixard.FunctionName) route.Revision {
	f, v := c.View().Function(name), c.View().FunctionVersion(name, 0)
	return route.Revision{Function: name, UID: f.UID, Number: 0, Seq: v.Seq}
}

// TestAnnouncements: what changes on a node is known on the others soon, and
// where an instance is warm calls go there.
func TestAnnouncements(t *testing.T) {
	c := newCluster(t, "n1", "n2", "n3")
	c.function("f")
	quickly := func(o *gateway.Options) { o.Limits.Announce = 5 * time.Millisecond }
	var all []*member
	for _, n := range []blixard.NodeName{"n1", "n2", "n3"} {
		m := c.member(n, quickly)
		m.stub.refuse = func(_ *blixard.Invocation, try gateway.Try) *route.Refused {
			warm := false
			for _, l := range m.stub.Load().Revisions {
				warm = warm || l.Warm > 0
			}
			if !warm && !try.MayStart {
				return refused(route.NoWarm)
			}
			return nil
		}
		c.serve(m)
		m.run(t)
		all = append(all, m)
	}
	rev := c.revision("f")
	for round, warm := range []*member{all[2], all[1], all[2]} {
		for _, m := range all {
			m.stub.set(func(s *stub) {
				s.load = gateway.NodeLoad{}
				if m == warm {
					s.load = gateway.NodeLoad{MemoryMiB: int64(round) + 1, Revisions: []gateway.Load{{Revision: rev, Warm: 5, SlotsFree: 5, HasTemplate: true}}}
				}
			})
		}
		eventually(t, "all know who is warm", func() bool {
			for _, m := range all {
				for _, other := range all {
					load, _, ok := m.NodeLoad(other.stub.node)
					if !ok || (len(load.Revisions) == 1) != (other == warm) || other == warm && load.MemoryMiB != int64(round)+1 {
						return false
					}
				}
			}
			return true
		})
		for range 20 {
			if _, report, err := all[0].call(t, "f", "", "{}"); err != nil || report.Node != warm.stub.node {
				t.Fatalf("round %d: %+v %v", round, report, err)
			}
		}
	}
	eventually(t, "the way to n2 is measured", func() bool {
		rtt, ok := all[0].RTT("n2")
		return ok && rtt > 0 && rtt < time.Second
	})
	verdicts, err := all[0].Explain("f", "")
	if err != nil || len(verdicts) != 3 {
		t.Fatalf("%+v %v", verdicts, err)
	}
}

// TestStrangersAnnounceNothing: what is no member is not listened to, and what a
// node sends cannot harm.
func TestStrangersAnnounceNothing(t *testing.T) {
	c := newCluster(t, "n1", "n2")
	m := c.member("n1")
	c.serve(m)
	stranger := newCluster(t, "x1", "n1")
	g := stranger.member("x1", func(o *gateway.Options) { o.Limits.Announce = 5 * time.Millisecond })
	n := stranger.View().Node("n1")
	stranger.ok(&state.ReportNode{Name: n.Name, RaftID: n.RaftID, Address: m.server.Listener.Addr().String(), Capacity: n.Capacity, Hypervisors: n.Hypervisors, FeatureLevel: blixard.FeatureLevel})
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := g.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if _, _, ok := m.NodeLoad("x1"); ok {
		t.Fatal("a stranger was listened to")
	}
}

// TestDrainingNodeGetsNothing: a node that drains is not offered starts.
func TestDrainingNodeGetsNothing(t *testing.T) {
	c := newCluster(t, "n1", "n2")
	c.function("f")
	quickly := func(o *gateway.Options) { o.Limits.Announce = 5 * time.Millisecond }
	one, two := c.member("n1", quickly), c.member("n2", quickly)
	c.serve(one)
	c.serve(two)
	one.run(t)
	two.run(t)
	one.stub.refuse = func(*blixard.Invocation, gateway.Try) *route.Refused { return refused(route.NoMemory) }
	if err := two.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "n1 knows that n2 drains", func() bool {
		load, _, ok := one.NodeLoad("n2")
		return ok && load.Draining
	})
	if _, _, err := one.call(t, "f", "", "{}"); err == nil || err.Reason != gateway.ReasonConcurrency || len(two.stub.tried()) != 0 {
		t.Fatalf("%+v, offered %v", err, two.stub.tried())
	}
}
