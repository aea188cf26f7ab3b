package schedule_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/schedule"
	"github.com/blixard/blixard/internal/state"
)

func functionSpec(change func(*blixard.FunctionSpec)) *blixard.FunctionSpec {
	s := &blixard.FunctionSpec{MemoryMiB: 1024}
	if change != nil {
		change(s)
	}
	s.Defaults()
	return s
}

// functionWorld has a plain node, one with a GPU and data, and one at the edge in
// the zone of the second.
func functionWorld() *world {
	w := newWorld()
	w.addNode("plain", nodeKind{cores: 8, memoryMiB: 8192, zone: "a"})
	w.addNode("gpu", nodeKind{cores: 16, memoryMiB: 32768, zone: "b", labels: []blixard.Label{{Key: "ceph-pool", Value: "raw-data cooked"}, {Key: "gpu", Value: "available"}, {Key: "gpu.memory", Value: "16GB"}, {Key: "path", Value: "/data"}}})
	w.addNode("edge", nodeKind{cores: 4, memoryMiB: 4096, zone: "b", labels: []blixard.Label{{Key: "ceph-pool/scratch", Value: "yes"}, {Key: "location", Value: "edge"}}})
	return w
}

// TestFunctionPlacement: who is chosen, by what the user asked for.
func TestFunctionPlacement(t *testing.T) {
	v := functionWorld().s.View()
	placement := func(p blixard.FunctionPlacement) *blixard.FunctionSpec {
		return functionSpec(func(s *blixard.FunctionSpec) { s.Placement = p })
	}
	prefer := func(key, value string) []blixard.Preference {
		return []blixard.Preference{{Constraint: blixard.Constraint{Key: key, Op: "=", Value: value}, Weight: 50}}
	}
	hint := func(hints ...string) *blixard.FunctionSpec {
		return placement(blixard.FunctionPlacement{DataHints: hints, Strategies: []string{"data-locality"}})
	}
	for name, c := range map[string]struct {
		spec  *blixard.FunctionSpec
		from  blixard.NodeName
		nodes []schedule.FunctionNode
		want  string
	}{
		"as it is: the freest":        {spec: functionSpec(nil), want: "gpu plain edge"},
		"near the caller":             {spec: functionSpec(nil), from: "plain", want: "plain gpu edge"},
		"best fit":                    {spec: placement(blixard.FunctionPlacement{Strategies: []string{"best-fit"}}), want: "edge plain gpu"},
		"balanced":                    {spec: placement(blixard.FunctionPlacement{Strategies: []string{"load-balanced"}}), want: "gpu plain edge"},
		"balanced, by what runs":      {spec: placement(blixard.FunctionPlacement{Strategies: []string{"load-balanced"}}), nodes: []schedule.FunctionNode{{Node: "gpu", MemoryMiB: 30000, MilliCPU: 15000}}, want: "plain edge gpu"},
		"a GPU is needed":             {spec: placement(blixard.FunctionPlacement{Constraints: []blixard.Constraint{{Key: "gpu.memory", Op: ">=", Value: "8GB"}}}), from: "plain", want: "gpu"},
		"a GPU is better":             {spec: placement(blixard.FunctionPlacement{Preferences: prefer("gpu", "available")}), from: "plain", want: "gpu plain edge"},
		"the edge, with a strategy":   {spec: placement(blixard.FunctionPlacement{Strategies: []string{"network-proximity"}, Preferences: prefer("location", "edge")}), from: "gpu", want: "gpu edge plain"},
		"measured round trips":        {spec: placement(blixard.FunctionPlacement{Strategies: []string{"network-proximity"}}), from: "edge", nodes: []schedule.FunctionNode{{Node: "gpu", RTTMicros: 9000}, {Node: "plain", RTTMicros: 200}}, want: "edge plain gpu"},
		"zones instead":               {spec: placement(blixard.FunctionPlacement{Strategies: []string{"network-proximity"}}), from: "edge", want: "edge gpu plain"},
		"a pool, its zone next":       {spec: hint("ceph-pool:raw-data"), want: "gpu edge plain"},
		"a pool by its own label":     {spec: hint("ceph-pool:scratch"), want: "edge gpu plain"},
		"a directory":                 {spec: hint("path:/data/in.jpg"), want: "gpu edge plain"},
		"not the directory":           {spec: hint("path:/database"), want: "edge gpu plain"},
		"a node":                      {spec: hint("node:plain"), want: "plain edge gpu"},
		"a zone":                      {spec: hint("zone:b"), want: "edge gpu plain"},
		"a label":                     {spec: hint("label:location=edge"), want: "edge gpu plain"},
		"two strategies":              {spec: placement(blixard.FunctionPlacement{Strategies: []string{"best-fit", "data-locality"}, DataHints: []string{"node:plain"}}), want: "plain edge gpu"},
		"where the template is":       {spec: functionSpec(nil), nodes: []schedule.FunctionNode{{Node: "edge", Template: true}}, want: "edge gpu plain"},
		"no room where all are":       {spec: functionSpec(nil), nodes: []schedule.FunctionNode{{Node: "edge", MemoryMiB: 4000}, {Node: "plain", MemoryMiB: 7169}}, want: "gpu"},
		"larger than most nodes are":  {spec: functionSpec(func(s *blixard.FunctionSpec) { s.MemoryMiB = 10240 }), want: "gpu"},
		"unknown hints change little": {spec: hint("ceph-pool:nowhere"), want: "edge gpu plain"},
	} {
		r := schedule.FunctionRequest{Spec: c.spec, From: c.from, Nodes: c.nodes}
		if err := c.spec.CheckNew(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		var got []string
		for _, p := range schedule.RankFunction(v, r) {
			got = append(got, string(p.Node))
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: %s, want %s\n%+v", name, strings.Join(got, " "), c.want, schedule.ExplainFunction(v, r))
		}
	}
}

// TestFunctionOvercommit: functions are promised more than there is, but never of
// what VMs have reserved.
func TestFunctionOvercommit(t *testing.T) {
	w := newWorld()
	w.addNode("n1", nodeKind{cores: 8, memoryMiB: 8192})
	s := spec(func(s *blixard.VMSpec) { s.Replicas, s.MemoryMiB = 1, 6144 })
	w.must(&state.CreateVM{Name: "db", Spec: s, Start: true})
	w.must(place(w.s.View().VM("db"), 1, schedule.Placement{Node: "n1"}))
	v := w.s.View()
	for _, c := range []struct {
		overcommit int
		held       int64
		fits       bool
	}{{0, 1024, true}, {100, 1025, false}, {200, 1025, true}, {200, 3072, true}, {200, 3073, false}} {
		r := schedule.FunctionRequest{Spec: functionSpec(nil), OvercommitPercent: c.overcommit, Nodes: []schedule.FunctionNode{{Node: "n1", MemoryMiB: c.held}}}
		if got := len(schedule.RankFunction(v, r)) == 1; got != c.fits {
			t.Errorf("%d%% with %d MiB held: fits=%t", c.overcommit, c.held, got)
		}
	}
}

// TestFunctionRefusals: each node says why not, and one line counts.
func TestFunctionRefusals(t *testing.T) {
	w := functionWorld()
	w.must(&state.SetNode{Name: "edge", Availability: blixard.Draining})
	w.must(&state.JoinNode{Node: state.NodeIdentity{Name: "new", Address: "new:1"}})
	w.must(&state.JoinNode{Node: state.NodeIdentity{Name: "bare", Address: "bare:1"}})
	w.must(&state.ReportNode{Name: "bare", RaftID: w.s.View().Node("bare").RaftID, Address: "bare:1", Capacity: blixard.Resources{MilliCPU: 1000, MemoryMiB: 4096}})
	v := w.s.View()
	s := functionSpec(func(s *blixard.FunctionSpec) {
		s.MemoryMiB = 10240
		s.Placement.Constraints = []blixard.Constraint{{Key: "gpu", Op: "=", Value: "none"}}
	})
	r := schedule.FunctionRequest{Spec: s}
	got := schedule.RefuseFunction(v, r)
	if want := "0/5 nodes fit: 3 not gpu=none, 1 draining, 1 joining"; got.Summary != want {
		t.Errorf("%s, want %s", got.Summary, want)
	}
	reasons := map[blixard.NodeName]string{}
	for _, d := range schedule.ExplainFunction(v, r) {
		for _, o := range d.Objections {
			reasons[d.Node] += o.Filter + ": " + o.Detail + "; "
		}
		if d.Chosen || d.Fits {
			t.Errorf("%s fits", d.Node)
		}
	}
	for node, says := range map[blixard.NodeName]string{
		"plain": "memory: an instance has 10G of memory, more than the whole node: 8G", "edge": "state: it is being drained", "new": "its agent has not reported", "bare": "no hypervisor works there",
		"gpu": "the constraint gpu=none does not hold: gpu is available",
	} {
		if !strings.Contains(reasons[node], says) {
			t.Errorf("%s says %s, want %s", node, reasons[node], says)
		}
	}
	held := schedule.FunctionRequest{Spec: functionSpec(nil), OvercommitPercent: 150, Nodes: []schedule.FunctionNode{{Node: "plain", MemoryMiB: 12000}}}
	for _, d := range schedule.ExplainFunction(v, held) {
		if d.Node == "plain" && (len(d.Objections) != 1 || !strings.Contains(d.Objections[0].Detail, "functions hold 12000M of the 12G")) {
			t.Errorf("plain says %+v", d.Objections)
		}
	}
}

// TestFunctionRankIsExplained: what is ranked are the nodes that nothing speaks
// against, in the order of the scores that are explained, which are sums of their
// parts; the same question has the same answer.
func TestFunctionRankIsExplained(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld()
		var known []schedule.FunctionNode
		var names []blixard.NodeName
		for i := range rapid.IntRange(1, 5).Draw(t, "nodes") {
			name := blixard.NodeName(fmt.Sprint("n", i))
			names = append(names, name)
			k := nodeKind{cores: int64(rapid.IntRange(0, 8).Draw(t, "cores")), memoryMiB: int64(rapid.IntRange(0, 4).Draw(t, "gib")) << 10, zone: rapid.SampledFrom([]string{"", "a", "b"}).Draw(t, "zone")}
			if rapid.Bool().Draw(t, "labelled") {
				k.labels = []blixard.Label{{Key: "gpu", Value: "yes"}, {Key: "path", Value: "/d"}}
			}
			w.addNode(name, k)
			if rapid.Bool().Draw(t, "known") {
				known = append(known, schedule.FunctionNode{Node: name, MemoryMiB: int64(rapid.IntRange(0, 4096).Draw(t, "held")), MilliCPU: rapid.Int64Range(0, 1<<50).Draw(t, "milli"), RTTMicros: rapid.Int64().Draw(t, "rtt"), Template: rapid.Bool().Draw(t, "template")})
			}
			if rapid.IntRange(0, 4).Draw(t, "drains") == 0 {
				w.must(&state.SetNode{Name: name, Availability: blixard.Draining})
			}
		}
		s := functionSpec(func(s *blixard.FunctionSpec) {
			s.MemoryMiB = int64(rapid.IntRange(64, 4096).Draw(t, "memory"))
			s.Placement.Strategies = rapid.SliceOfNDistinct(rapid.SampledFrom(blixard.PlacementStrategies()), 0, 4, rapid.ID).Draw(t, "strategies")
			s.Placement.DataHints = rapid.SliceOfN(rapid.SampledFrom([]string{"node:n1", "zone:a", "path:/d/x", "label:gpu=yes", "odd", ":"}), 0, 3).Draw(t, "hints")
			if rapid.Bool().Draw(t, "prefers") {
				s.Placement.Preferences = []blixard.Preference{{Constraint: blixard.Constraint{Key: "gpu", Op: "=", Value: "yes"}, Weight: 10}}
			}
			if rapid.IntRange(0, 3).Draw(t, "constrained") == 0 {
				s.Placement.Constraints = []blixard.Constraint{{Key: "gpu", Op: "=", Value: "yes"}}
			}
		})
		r := schedule.FunctionRequest{Spec: s, From: rapid.SampledFrom(append(names, "", "away")).Draw(t, "from"), Nodes: known, OvercommitPercent: rapid.IntRange(-5, 300).Draw(t, "overcommit")}
		if rapid.IntRange(0, 3).Draw(t, "avoids") == 0 {
			r.Avoid = []blixard.NodeName{"n0"}
		}
		v := w.s.View()
		rank, explained := schedule.RankFunction(v, r), schedule.ExplainFunction(v, r)
		if !slices.Equal(rank, schedule.RankFunction(v, r)) {
			t.Fatal("asked twice, answered in two ways")
		}
		fits := 0
		for _, d := range explained {
			sum := int64(0)
			for _, p := range d.Points {
				if sum += p.Points; p.Name != "avoid" && (p.Points < 0 || p.Points > 1_000_000) {
					t.Fatalf("%s has %+v", d.Node, d.Points)
				}
			}
			at := slices.IndexFunc(rank, func(p schedule.Placement) bool { return p.Node == d.Node })
			if d.Fits != (at >= 0) || sum != d.Score || d.Fits && rank[at].Score != sum || d.Chosen != (at == 0) || d.Fits != (len(d.Objections) == 0) {
				t.Fatalf("%+v is number %d of %+v", d, at, rank)
			}
			if d.Fits {
				fits++
			}
			n := v.Node(d.Node)
			if static := schedule.FunctionObjection(n, s); d.Fits && static != nil {
				t.Fatalf("%s fits, and %+v", d.Node, static)
			}
		}
		if !slices.IsSortedFunc(rank, func(a, b schedule.Placement) int { return int(b.Score - a.Score) }) {
			t.Fatalf("%+v", rank)
		}
		if !strings.HasPrefix(schedule.RefuseFunction(v, r).Summary, fmt.Sprintf("%d/%d", fits, len(names))) {
			t.Fatalf("%d fit: %s", fits, schedule.RefuseFunction(v, r).Summary)
		}
	})
}

func BenchmarkRankFunction(b *testing.B) {
	w := newWorld()
	for i := range 20 {
		w.addNode(blixard.NodeName(fmt.Sprintf("n%02d", i)), nodeKind{cores: 8, memoryMiB: 8192, zone: "a"})
	}
	v := w.s.View()
	r := schedule.FunctionRequest{Spec: functionSpec(nil), From: "n03"}
	b.ReportAllocs()
	for range b.N {
		schedule.RankFunction(v, r)
	}
}
