package control

import (
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// functionSim is a cluster of nodes that know functions, without guests.
func functionSim(fail func(string, ...any), names ...blixard.NodeName) *sim {
	m := newSim(fail)
	m.level = blixard.FeatureLevel
	for _, n := range names {
		m.addNode(n, machine{cores: 8, memoryMiB: 8192, zone: "z"})
	}
	m.run(1000)
	return m
}

func (m *sim) must(c state.Command) state.Outcome {
	r := m.apply("user", c)[0]
	if r.Err != nil {
		m.fail("%T: %v", c, r.Err)
	}
	return r.Outcome
}

func (m *sim) createFunction(name blixard.FunctionName, change func(*blixard.FunctionSpec)) {
	spec := blixard.FunctionSpec{}
	if change != nil {
		change(&spec)
	}
	spec.Defaults()
	m.must(&state.CreateFunction{Name: name, Spec: spec, CodeDigest: strings.Repeat("0", 64)})
}

func (m *sim) latest(name blixard.FunctionName) *blixard.FunctionVersion {
	return m.view().FunctionVersion(name, 0)
}

// TestLevelRises: when the last node knows it, not before.
func TestLevelRises(t *testing.T) {
	m := newSim(t.Fatalf)
	m.level = 1
	m.addNode("n1", machine{cores: 1, memoryMiB: 1024})
	m.level = 2
	m.addNode("n2", machine{cores: 1, memoryMiB: 1024})
	m.run(10_000)
	if got := m.view().Cluster().FeatureLevel; got != 1 {
		t.Fatalf("with an old node the level is %d", got)
	}
	m.reportNode(m.agent("n1"))
	m.run(1000)
	if got := m.view().Cluster().FeatureLevel; got != 2 {
		t.Fatalf("with new nodes only the level is %d", got)
	}
}

// TestBuilders: each version gets a builder, those that build least first; a
// builder that is lost or takes too long is replaced, three at most.
func TestBuilders(t *testing.T) {
	m := functionSim(t.Fatalf, "n1", "n2", "n3")
	load := map[blixard.NodeName]int{}
	for i := range 6 {
		name := blixard.FunctionName(fmt.Sprint("f", i))
		m.createFunction(name, nil)
		m.run(200)
		load[m.latest(name).Builder]++
	}
	if load["n1"] != 2 || load["n2"] != 2 || load["n3"] != 2 {
		t.Fatalf("builds are spread as %v", load)
	}
	for i := range 6 {
		v := m.latest(blixard.FunctionName(fmt.Sprint("f", i)))
		m.must(&state.ReportFunction{Function: v.Function, Seq: v.Seq, Node: v.Builder, NodeEpoch: v.BuilderEpoch, State: blixard.FunctionActive})
	}
	// Lost: another one at once.
	m.createFunction("lost", nil)
	m.run(200)
	first := m.latest("lost").Builder
	m.agent(first).cut = true
	m.run(10_000)
	second := m.latest("lost")
	if second.Builder == first || second.Builder == "" {
		t.Fatalf("after %s was lost %q builds", first, second.Builder)
	}
	m.agent(first).cut = false
	m.run(10_000)
	// Given back: after a while, to one that has not tried.
	m.must(&state.ReportFunction{Function: "lost", Seq: second.Seq, Node: second.Builder, NodeEpoch: second.BuilderEpoch, State: blixard.FunctionPending, Reason: "no room"})
	m.run(500)
	if got := m.latest("lost").Builder; got != "" {
		t.Fatalf("%s builds at once", got)
	}
	m.run(10_000)
	third := m.latest("lost").Builder
	if third == "" || third == first || third == second.Builder {
		t.Fatalf("%s and %s have tried, now %q does", first, second.Builder, third)
	}
	// Too long: it has failed, since three have tried.
	m.run(buildMS + initStretch*blixard.DefaultInitMS - 15_000)
	if got := m.latest("lost"); got.State != blixard.FunctionPending {
		t.Fatalf("it is %s already", got.State)
	}
	m.run(30_000)
	if got := m.latest("lost"); got.State != blixard.FunctionFailed || !strings.Contains(got.StateReason, "three nodes") {
		t.Fatalf("it is %s: %s", got.State, got.StateReason)
	}
}

// TestBuildsWait: no node has more than a few builds at once, and none that waits
// fails for it; all are built in the end.
func TestBuildsWait(t *testing.T) {
	m := functionSim(t.Fatalf, "n1", "n2")
	for i := range 300 {
		m.createFunction(blixard.FunctionName(fmt.Sprintf("f%03d", i)), nil)
	}
	for range 300 {
		m.run(1000)
		load := map[blixard.NodeName]int{}
		var built []*blixard.FunctionVersion
		m.view().PendingVersions(func(v *blixard.FunctionVersion) bool {
			if v.Builder != "" {
				load[v.Builder]++
				built = append(built, v)
			}
			return true
		})
		if len(built) == 0 {
			break
		}
		if load["n1"] > mostBuilds || load["n2"] > mostBuilds {
			t.Fatalf("builds are %v", load)
		}
		v := built[len(built)-1]
		m.must(&state.ReportFunction{Function: v.Function, Seq: v.Seq, Node: v.Builder, NodeEpoch: v.BuilderEpoch, State: blixard.FunctionActive})
	}
	m.view().Functions(func(f *blixard.Function) bool {
		if v := m.latest(f.Name); v.State != blixard.FunctionActive {
			t.Errorf("%s is %s: %s", f.Name, v.State, v.StateReason)
		}
		return true
	})
}

// TestNoBuilder: a version that no node can build fails after a while, with the
// reason; one that a node can build later is built then, and a new leader goes
// on.
func TestNoBuilder(t *testing.T) {
	m := functionSim(t.Fatalf, "n1", "n2")
	gpu := func(s *blixard.FunctionSpec) {
		s.Placement.Constraints = []blixard.Constraint{{Key: "gpu", Op: "=", Value: "yes"}}
	}
	m.createFunction("f", gpu)
	m.run(30_000)
	m.elect()
	m.run(50_000)
	if got := m.latest("f"); got.State != blixard.FunctionPending || got.Builder != "" {
		t.Fatalf("it is %s on %q", got.State, got.Builder)
	}
	m.must(&state.SetNode{Name: "n2", SetLabels: []blixard.Label{{Key: "gpu", Value: "yes"}}})
	m.run(500)
	if got := m.latest("f").Builder; got != "n2" {
		t.Fatalf("%q builds", got)
	}
	m.must(&state.SetNode{Name: "n2", DropLabels: []string{"gpu"}})
	m.createFunction("g", gpu)
	m.run(70_000)
	if got := m.latest("g"); got.State != blixard.FunctionFailed || got.StateCode != "Capacity" || !strings.Contains(got.StateReason, "0/2 nodes fit: 2 not gpu=yes") {
		t.Fatalf("it is %s (%s): %s", got.State, got.StateCode, got.StateReason)
	}
	m.must(&state.DeleteFunction{Name: "f"})
	m.run(10_000)
	if len(m.c.functions.build) != 0 {
		t.Fatalf("the leader remembers %v", m.c.functions.build)
	}
}

// TestEventsFindOwners: those of a node that is lost, drained or removed, and
// those of nobody.
func TestEventsFindOwners(t *testing.T) {
	m := functionSim(t.Fatalf, "n1", "n2", "n3")
	m.createFunction("f", nil)
	n := 0
	enqueue := func(owner blixard.NodeName, count int) {
		for range count {
			n++
			epoch := uint64(0)
			if row := m.view().Node(owner); row != nil {
				epoch = row.Epoch
			}
			m.must(&state.EnqueueEvent{ID: fmt.Sprintf("e%04d", n), Function: "f", Owner: owner, OwnerEpoch: epoch})
		}
	}
	owners := func() map[blixard.NodeName]int {
		out := map[blixard.NodeName]int{}
		m.view().AsyncEvents(func(e *blixard.AsyncEvent) bool {
			row := m.view().Node(e.Owner)
			if row == nil || row.Epoch != e.OwnerEpoch {
				t.Fatalf("%s is owned by %q in epoch %d", e.ID, e.Owner, e.OwnerEpoch)
			}
			out[e.Owner]++
			return true
		})
		return out
	}
	enqueue("nobody", 3)
	m.run(500)
	if got := owners(); got["n1"]+got["n2"]+got["n3"] != 3 {
		t.Fatalf("owners are %v", got)
	}
	enqueue("n2", 500)
	m.must(&state.SetNode{Name: "n2", Availability: blixard.Draining})
	m.run(500)
	if got := owners(); got["n2"] != 0 || got["n1"] < 100 || got["n3"] < 100 {
		t.Fatalf("after draining n2 owners are %v", got)
	}
	m.agent("n3").cut = true
	m.run(10_000)
	if got := owners(); got["n1"] != 503 {
		t.Fatalf("after losing n3 owners are %v", got)
	}
	// Back in another epoch, and with nobody else: its former events are its own.
	m.agent("n3").cut = false
	m.run(5000)
	m.must(&state.SetNode{Name: "n1", Availability: blixard.Draining})
	m.must(&state.RemoveNode{Name: "n2"})
	m.run(500)
	if got := owners(); got["n3"] != 503 {
		t.Fatalf("owners are %v", got)
	}
}

// TestFormerSlots: what a node held that was removed by force comes free when its
// lease is over, not before; also under another leader, which does not know when
// that is and waits for a whole lease.
func TestFormerSlots(t *testing.T) {
	for _, elected := range []bool{false, true} {
		m := functionSim(t.Fatalf, "n1", "n2", "n3")
		m.createFunction("f", nil)
		m.must(&state.LeaseSlots{Function: "f", Node: "n3", Want: 600})
		m.must(&state.RemoveNode{Name: "n3", Force: true})
		end := m.agent("n3").leaseEnd
		if elected {
			m.run(500)
			m.elect()
		}
		m.run(end - m.now)
		if got := m.view().SlotsLeased("f"); got != 600 {
			t.Fatalf("%d are leased while n3 may run them", got)
		}
		m.run(8000)
		if got := m.view().SlotsLeased("f"); got != 0 {
			t.Fatalf("%d are leased although n3 is gone", got)
		}
		if m.c.functions.former.Len() > 0 {
			t.Fatal("the leader still looks for slots")
		}
	}
}

// TestNeverMoreThanMayRun: whatever happens to nodes and leaders, machines that
// keep their leases never run more executions at once than there may be.
func TestNeverMoreThanMayRun(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const most = 6
		m := functionSim(t.Fatalf, "n1", "n2", "n3")
		m.createFunction("f", nil)
		m.must(&state.SetFunction{Name: "f", Concurrency: &state.ConcurrencyChange{Max: most}})
		running := map[*agent]int{}
		check := func() {
			sum := 0
			for _, a := range m.agents {
				if m.now >= a.leaseEnd {
					running[a] = 0 // its own clock says so
				}
				sum += running[a]
			}
			if sum > most {
				t.Fatalf("%d run at %d", sum, m.now)
			}
		}
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			a := rapid.SampledFrom(m.agents).Draw(t, "machine")
			row := m.view().Node(a.name)
			member := row != nil && row.RaftID == a.raftID
			switch rapid.IntRange(0, 12).Draw(t, "step") {
			case 0:
				a.cut = true
			case 1:
				a.cut = false
			case 2:
				m.elect()
			case 3:
				if m.view().NodeCount() > 1 {
					m.apply("user", &state.RemoveNode{Name: a.name, Force: true})
				}
			case 4: // another machine takes the name
				r := m.apply("user", &state.JoinNode{Node: state.NodeIdentity{Name: a.name, Address: string(a.name) + ":7"}, Replace: true})[0]
				if r.Err == nil {
					fresh := &agent{name: a.name, raftID: r.Outcome.Value, kind: a.kind, guests: map[string]*guest{}}
					m.agents = append(m.agents, fresh)
					m.reportNode(fresh)
				}
			case 5, 6:
				if !a.cut && member {
					n := rapid.IntRange(0, 3).Draw(t, "fewer")
					running[a] -= min(n, running[a])
					if had := m.view().Slots("f", a.name); had.NodeEpoch == row.Epoch {
						m.must(&state.ReturnSlots{Function: "f", Node: a.name, NodeEpoch: row.Epoch, Count: max(0, had.Count-running[a])})
					}
				}
			default:
				if !a.cut && member && m.now < a.leaseEnd {
					r := m.apply("agent", &state.LeaseSlots{Function: "f", Node: a.name, NodeEpoch: row.Epoch, Want: rapid.IntRange(1, most).Draw(t, "more")})[0]
					if r.Err == nil {
						running[a] += int(r.Outcome.Value)
					}
				}
			}
			check()
			for range rapid.IntRange(0, 40).Draw(t, "tenths") {
				m.run(100)
				check()
			}
		}
		// Once all is well again, nothing stays leased for those who are gone.
		for _, a := range m.agents {
			a.cut = false
		}
		m.run(30_000)
		check()
		m.view().SlotsOf("f", func(s *blixard.FunctionSlots) bool {
			if n := m.view().Node(s.Node); n == nil || n.Epoch != s.NodeEpoch {
				t.Fatalf("%+v stays", *s)
			}
			return true
		})
	})
}

// TestEventsAreDelivered: whatever happens to nodes and leaders, an event that
// was accepted is attempted at least once and settled in the end.
func TestEventsAreDelivered(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := functionSim(t.Fatalf, "n1", "n2", "n3")
		m.createFunction("f", nil)
		accepted, attempts, n := map[string]bool{}, map[string]int{}, 0
		// work lets a node attempt what it owns as far as it knows; it may die
		// before it has told.
		work := func(a *agent, dies bool) {
			row := m.view().Node(a.name)
			if a.cut || row == nil || row.RaftID != a.raftID {
				return
			}
			var mine []*blixard.AsyncEvent
			m.view().EventsOwnedBy(a.name, row.Epoch, func(e *blixard.AsyncEvent) bool {
				if e.NotBeforeMS <= m.now {
					mine = append(mine, e)
				}
				return true
			})
			for _, e := range mine {
				attempts[e.ID]++
				if dies {
					continue
				}
				m.must(&state.SettleEvent{ID: e.ID, Owner: e.Owner, OwnerEpoch: e.OwnerEpoch, Result: state.SettleSuccess})
			}
		}
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			a := rapid.SampledFrom(m.agents).Draw(t, "machine")
			switch rapid.IntRange(0, 9).Draw(t, "step") {
			case 0:
				a.cut = true
			case 1:
				a.cut = false
			case 2:
				m.elect()
			case 3:
				if m.view().NodeCount() > 1 {
					m.apply("user", &state.RemoveNode{Name: a.name, Force: true})
				}
			case 4:
				m.apply("user", &state.SetNode{Name: a.name, Availability: rapid.SampledFrom([]blixard.Availability{"active", "draining", "cordoned"}).Draw(t, "availability")})
			case 5:
				work(a, rapid.Bool().Draw(t, "dies"))
			default:
				n++
				id := fmt.Sprint("e", n)
				epoch := uint64(0)
				if row := m.view().Node(a.name); row != nil {
					epoch = row.Epoch
				}
				if r := m.apply("gateway", &state.EnqueueEvent{ID: id, Function: "f", Owner: a.name, OwnerEpoch: epoch})[0]; r.Err == nil {
					accepted[id] = true
				}
			}
			m.run(int64(rapid.IntRange(0, 30).Draw(t, "tenths")) * 100)
		}
		m.view().Nodes(func(n *blixard.Node) bool {
			m.apply("user", &state.SetNode{Name: n.Name, Availability: blixard.Active})
			return true
		})
		for range 30 {
			m.run(1000)
			for _, a := range m.agents {
				a.cut = false
				work(a, false)
			}
		}
		for id := range accepted {
			if attempts[id] == 0 {
				t.Fatalf("%s was accepted and never attempted", id)
			}
		}
		if l := m.view().AsyncLoad(); l.Events > 0 {
			t.Fatalf("%+v are not settled", l)
		}
	})
}
