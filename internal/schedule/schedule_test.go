package schedule_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/schedule"
	"github.com/blixard/blixard/internal/state"
)

// world is a real state that tests change by commands.
type world struct {
	s     *state.State
	index uint64
}

func newWorld() *world { return &world{s: state.New()} }

func (w *world) do(commands ...state.Command) ([]state.Result, []state.Change) {
	w.index++
	var e []state.Envelope
	for _, c := range commands {
		e = append(e, state.Envelope{NowMS: int64(w.index), Command: c})
	}
	results, changes, err := w.s.Apply(w.index, 1, state.EncodeEntry(e))
	if err != nil {
		panic(err)
	}
	return results, changes
}

// must is do for commands that cannot be refused.
func (w *world) must(commands ...state.Command) []state.Change {
	results, changes := w.do(commands...)
	for i, r := range results {
		if r.Err != nil {
			panic(fmt.Sprintf("command %d %+v: %v", i, commands[i], r.Err))
		}
	}
	return changes
}

type nodeKind struct {
	cores, memoryMiB int64
	zone             string
	labels           []blixard.Label
	max              int
}

// addNode joins a node and has its agent report.
func (w *world) addNode(name blixard.NodeName, k nodeKind) {
	id := state.NodeIdentity{Name: name, Address: string(name) + ":1", Zone: k.zone}
	raftID := uint64(0)
	if w.s.View().NodeCount() == 0 {
		w.must(&state.Bootstrap{ClusterID: "c", RaftID: 1, Node: id})
		raftID = 1
	} else {
		results, _ := w.do(&state.JoinNode{Node: id})
		raftID = results[0].Outcome.Value
	}
	w.must(&state.ReportNode{
		Name: name, RaftID: raftID, Address: id.Address, Zone: k.zone, Labels: k.labels, MaxInstances: k.max, Hypervisors: []string{"qemu"},
		Capacity: blixard.Resources{MilliCPU: k.cores * 1000, MemoryMiB: k.memoryMiB, DiskMiB: 1 << 20},
	})
}

func spec(change func(*blixard.VMSpec)) blixard.VMSpec {
	s := blixard.VMSpec{Replicas: 3}
	if change != nil {
		change(&s)
	}
	s.Defaults()
	return s
}

// place makes a PlaceInstance of a decision.
func place(vm *blixard.VM, ordinal int, p schedule.Placement) *state.PlaceInstance {
	return &state.PlaceInstance{
		VM: vm.Name, UID: vm.UID, Ordinal: ordinal, Generation: vm.FirstGeneration, SpecVersion: vm.SpecVersion, RestartSeq: vm.RestartSeq, Node: p.Node, NodeEpoch: p.Epoch,
	}
}

func best(t interface{ Fatalf(string, ...any) }, v *state.View, r schedule.Request) (schedule.NodeVerdict, bool) {
	for _, d := range schedule.Explain(v, r) {
		if d.Fits != (v.Admits(v.Node(d.Node), r.Spec) == nil) {
			t.Fatalf("Explain says fits=%t of %s, Admits differs", d.Fits, d.Node)
		}
		if d.Chosen {
			return d, true
		}
	}
	return schedule.NodeVerdict{}, false
}

func drawSpec(t *rapid.T) blixard.VMSpec {
	return spec(func(s *blixard.VMSpec) {
		s.Replicas = rapid.IntRange(1, 6).Draw(t, "replicas")
		s.VCPUs = rapid.IntRange(1, 4).Draw(t, "vcpus")
		s.MemoryMiB = int64(rapid.IntRange(1, 8).Draw(t, "gib")) << 9
		s.Strategy = rapid.SampledFrom([]string{"spread", "binpack"}).Draw(t, "strategy")
		s.SpreadAcross = rapid.SampledFrom([]string{"", "", "zone", "rack", "nowhere", "node"}).Draw(t, "across")
		s.AntiAffinityGroup = rapid.SampledFrom([]string{"", "", "g1", "g2"}).Draw(t, "group")
		if rapid.IntRange(0, 3).Draw(t, "port") == 0 {
			s.Publish = []blixard.Port{{HostPort: 80, GuestPort: 80, Protocol: "tcp"}}
		}
		if rapid.IntRange(0, 4).Draw(t, "beside") == 0 {
			s.AffinityVMs = []blixard.VMName{"vm-0"}
		}
		if rapid.IntRange(0, 3).Draw(t, "constrained") == 0 {
			s.Constraints = []blixard.Constraint{{Key: rapid.SampledFrom([]string{"rack", "node", "zone"}).Draw(t, "key"), Op: rapid.SampledFrom([]string{"=", "!="}).Draw(t, "op"), Value: rapid.SampledFrom([]string{"r0", "n1", "a"}).Draw(t, "value")}}
		}
		if rapid.IntRange(0, 2).Draw(t, "preferring") == 0 {
			s.Preferences = []blixard.Preference{{Constraint: blixard.Constraint{Key: "rack", Op: "=", Value: "r1"}, Weight: rapid.IntRange(1, 100).Draw(t, "weight")}}
		}
	})
}

func drawNode(t *rapid.T) nodeKind {
	k := nodeKind{cores: int64(rapid.IntRange(1, 8).Draw(t, "cores")), memoryMiB: int64(rapid.IntRange(1, 16).Draw(t, "memory")) << 10, zone: rapid.SampledFrom([]string{"", "a", "b", "c"}).Draw(t, "zone")}
	if rapid.Bool().Draw(t, "racked") {
		k.labels = []blixard.Label{{Key: "rack", Value: rapid.SampledFrom([]string{"r0", "r1"}).Draw(t, "rack")}}
	}
	k.max = rapid.SampledFrom([]int{0, 0, 3}).Draw(t, "max")
	return k
}

// TestFindIsExhaustive: over any history, an index that was told of the changes
// finds a node of the same score as an exhaustive search, refuses only what
// fits nowhere, and never takes a node that objects; what it decides is
// accepted when applied, in one entry or in several.
func TestFindIsExhaustive(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld()
		for i := range rapid.IntRange(1, 9).Draw(t, "nodes") {
			w.addNode(blixard.NodeName(fmt.Sprintf("n%d", i)), drawNode(t))
		}
		x := schedule.NewIndex(w.s.View())
		vms := 0
		for range rapid.IntRange(1, 25).Draw(t, "steps") {
			var changes []state.Change
			switch rapid.IntRange(0, 5).Draw(t, "step") {
			case 0: // a node comes, changes or is lost
				name := blixard.NodeName(fmt.Sprintf("n%d", rapid.IntRange(0, 12).Draw(t, "node")))
				if n := w.s.View().Node(name); n == nil {
					before := w.s.View()
					w.addNode(name, drawNode(t))
					if before.NodeCount() > 0 {
						x.SyncNode(w.s.View(), name)
					}
				} else {
					command := rapid.SampledFrom([]state.Command{
						&state.SetNode{Name: name, Availability: blixard.Cordoned}, &state.SetNode{Name: name, Availability: blixard.Active},
						&state.SetNode{Name: name, SetLabels: []blixard.Label{{Key: "rack", Value: "r1"}}}, &state.SetNode{Name: name, SetLabels: []blixard.Label{{Key: "rack", Value: "r0"}}},
						&state.LoseNode{Name: name, RaftID: n.RaftID, Epoch: n.Epoch}, &state.ReviveNode{Name: name, RaftID: n.RaftID}, &state.RemoveNode{Name: name, Force: true},
					}).Draw(t, "change")
					_, changes = w.do(command)
				}
			case 1: // an instance ends
				v := w.s.View()
				var all []*blixard.Instance
				v.Instances(func(i *blixard.Instance) bool { all = append(all, i); return true })
				if len(all) > 0 {
					i := all[rapid.IntRange(0, len(all)-1).Draw(t, "instance")]
					if n := v.Node(i.Node); n != nil {
						_, changes = w.do(&state.Observe{Node: i.Node, RaftID: n.RaftID, Items: []state.Observation{{VM: i.VM, Ordinal: i.Ordinal, Generation: i.Generation, State: blixard.Failed}}})
					}
				}
			default:
				name := blixard.VMName(fmt.Sprintf("vm-%d", vms))
				vms++
				changes = w.must(&state.CreateVM{Name: name, Spec: drawSpec(t), Start: true})
				x.Observe(w.s.View(), changes)
				changes = placeAll(t, w, x, name, rapid.Bool().Draw(t, "together"))
			}
			x.Observe(w.s.View(), changes)
			w.s.View().Nodes(func(n *blixard.Node) bool {
				if got, want := x.Usage(n.Name), w.s.View().Usage(n.Name); got != want {
					t.Fatalf("the index has %+v held of %s, the state %+v", got, n.Name, want)
				}
				return true
			})
		}
	})
}

// placeAll places every replica of a VM and compares each decision with an
// exhaustive search of a state to which the former ones are applied.
func placeAll(t *rapid.T, w *world, x *schedule.Index, name blixard.VMName, together bool) []state.Change {
	vm := w.s.View().VM(name)
	shadow := newWorld()
	var b strings.Builder
	if _, err := w.s.View().WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	restored, err := state.Read(strings.NewReader(b.String()))
	if err != nil {
		t.Fatal(err)
	}
	shadow.s, shadow.index = restored, w.index
	var commands []state.Command
	var changes []state.Change
	for ordinal := 1; ordinal <= vm.Spec.Replicas; ordinal++ {
		r := schedule.Request{VM: name, Spec: &vm.Spec}
		if rapid.IntRange(0, 3).Draw(t, "avoiding") == 0 {
			r.Avoid = []blixard.NodeName{"n0", "n2"}
		}
		want, any := best(t, shadow.s.View(), r)
		got, ok := x.Place(r, ordinal, vm.FirstGeneration)
		if ok != any {
			t.Fatalf("%s-%d: the index finds %t, the exhaustive search %t", name, ordinal, ok, any)
		}
		if !ok {
			refusal := x.Refuse(r)
			if !strings.HasPrefix(refusal.Summary, "0/") || refusal.Summary != schedule.Refuse(shadow.s.View(), r.Spec).Summary {
				t.Fatalf("refusals differ: %q, %q", refusal.Summary, schedule.Refuse(shadow.s.View(), r.Spec).Summary)
			}
			continue
		}
		if got.Score != want.Score || got.Node != want.Node {
			t.Fatalf("%s-%d: the index takes %+v, the exhaustive search %+v", name, ordinal, got, want)
		}
		command := place(vm, ordinal, got)
		shadow.must(command)
		if together {
			commands = append(commands, command)
		} else {
			changes = append(changes, w.must(command)...)
			x.Observe(w.s.View(), changes)
		}
	}
	return append(changes, w.must(commands...)...)
}

// TestAssumptionsAreGivenUp: what was decided and not applied is forgotten when
// the VM is brought in line with a view.
func TestAssumptionsAreGivenUp(t *testing.T) {
	w := newWorld()
	w.addNode("n1", nodeKind{cores: 2, memoryMiB: 4096})
	x := schedule.NewIndex(w.s.View())
	s := spec(func(s *blixard.VMSpec) { s.MemoryMiB = 4096 })
	r := schedule.Request{VM: "a", Spec: &s}
	if _, ok := x.Place(r, 1, 1); !ok {
		t.Fatal("an empty node refuses")
	}
	if p, ok := x.Find(r); ok {
		t.Fatalf("a full node takes %+v", p)
	}
	if _, ok := x.FindWithout(r, 1, 1); !ok {
		t.Fatal("the node refuses without what fills it")
	}
	x.SyncVM(w.s.View(), "a")
	if _, ok := x.Find(r); !ok {
		t.Fatal("a node that is empty again refuses")
	}
}

// TestOrderOfNodesDoesNotMatter: an index learns of the nodes in any order.
func TestOrderOfNodesDoesNotMatter(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(2, 8).Draw(t, "nodes")
		kinds := make([]nodeKind, n)
		for i := range kinds {
			kinds[i] = drawNode(t)
		}
		s := drawSpec(t)
		s.AffinityVMs = nil
		var got [2][]blixard.NodeName
		for k, order := range [][]int{identity(n), rapid.Permutation(identity(n)).Draw(t, "order")} {
			w := newWorld()
			empty := w.s.View()
			for _, i := range order {
				w.addNode(blixard.NodeName(fmt.Sprintf("n%d", i)), kinds[i])
			}
			x := schedule.NewIndex(empty)
			for _, i := range order {
				x.SyncNode(w.s.View(), blixard.NodeName(fmt.Sprintf("n%d", i)))
			}
			for ordinal := 1; ordinal <= 10; ordinal++ {
				p, _ := x.Place(schedule.Request{VM: "a", Spec: &s}, ordinal, 1)
				got[k] = append(got[k], p.Node)
				if p.Node == "" {
					break
				}
			}
		}
		if fmt.Sprint(got[0]) != fmt.Sprint(got[1]) {
			t.Fatalf("placed on %v and on %v", got[0], got[1])
		}
	})
}

func identity(n int) []int {
	out := make([]int, n)
	for i := range out {
		out[i] = i
	}
	return out
}

func TestExplain(t *testing.T) {
	w := newWorld()
	w.addNode("n1", nodeKind{cores: 4, memoryMiB: 1024, zone: "a"})
	w.addNode("n2", nodeKind{cores: 4, memoryMiB: 8192, zone: "b", labels: []blixard.Label{{Key: "storage", Value: "nvme"}}})
	w.addNode("n3", nodeKind{cores: 4, memoryMiB: 8192, zone: "c"})
	w.must(&state.SetNode{Name: "n3", Availability: blixard.Draining})
	s := spec(func(s *blixard.VMSpec) {
		s.MemoryMiB = 4096
		s.Preferences = []blixard.Preference{{Constraint: blixard.Constraint{Key: "storage", Op: "=", Value: "nvme"}}}
	})
	var b strings.Builder
	for _, d := range schedule.Explain(w.s.View(), schedule.Request{VM: "db", Spec: &s}) {
		fmt.Fprintf(&b, "%s fits=%t chosen=%t score=%d %v %v\n", d.Node, d.Fits, d.Chosen, d.Score, d.Points, d.Objections)
	}
	const want = `n1 fits=false chosen=false score=-125000 [{load -125000} {preferences 0} {replicas 0} {spread 0} {avoid 0}] [{resources too little memory needs 4G of memory, 1G of 1G are free}]
n2 fits=true chosen=true score=1125000 [{load 625000} {preferences 500000} {replicas 0} {spread 0} {avoid 0}] []
n3 fits=false chosen=false score=625000 [{load 625000} {preferences 0} {replicas 0} {spread 0} {avoid 0}] [{state draining it is being drained: ` + "`blixard cluster uncordon n3`" + ` ends that}]
`
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
	s.MemoryMiB = 16384
	if got, want := schedule.Refuse(w.s.View(), &s).Summary, "0/3 nodes fit: 2 too little memory, 1 draining"; got != want {
		t.Errorf("summary %q, want %q", got, want)
	}
}

// TestManyClasses asks more classes than are remembered, in turn.
func TestManyClasses(t *testing.T) {
	w := newWorld()
	for i := range 5 {
		w.addNode(blixard.NodeName(fmt.Sprintf("n%d", i)), nodeKind{cores: 1000, memoryMiB: 64 << 20})
	}
	x := schedule.NewIndex(w.s.View())
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 10_000 {
		s := spec(func(s *blixard.VMSpec) { s.MemoryMiB = 32 + r.Int64N(5000); s.VCPUs = 1 })
		name := blixard.VMName(fmt.Sprintf("vm-%d", i%1000))
		if _, ok := x.Place(schedule.Request{VM: name, Spec: &s}, 1+i/1000, 1); !ok {
			if i < 4990 {
				t.Fatalf("decision %d refused: %s", i, x.Refuse(schedule.Request{VM: name, Spec: &s}).Summary)
			}
		}
	}
}

// TestChangesInTurn: an index that has answered before takes in a changed row
// of its first node, and a node that goes with what it held.
func TestChangesInTurn(t *testing.T) {
	w := newWorld()
	w.addNode("n1", nodeKind{cores: 2, memoryMiB: 4096})
	w.addNode("n2", nodeKind{cores: 2, memoryMiB: 2048})
	w.must(&state.SetNode{Name: "n1", Availability: blixard.Cordoned})
	w.must(&state.CreateVM{Name: "a", Spec: spec(func(s *blixard.VMSpec) { s.MemoryMiB = 1024 }), Start: true})
	vm := w.s.View().VM("a")
	r := schedule.Request{VM: "a", Spec: &vm.Spec}
	x := schedule.NewIndex(w.s.View())
	expect := func(want blixard.NodeName) schedule.Placement {
		t.Helper()
		p, _ := x.Find(r)
		if p.Node != want {
			t.Fatalf("found %q, want %q", p.Node, want)
		}
		return p
	}
	do := func(c state.Command) {
		changes := w.must(c)
		x.Observe(w.s.View(), changes)
	}
	expect("n2")
	do(&state.SetNode{Name: "n1", Availability: blixard.Active})
	p := expect("n1")
	do(place(vm, 1, p))
	expect("n2")
	do(&state.RemoveNode{Name: "n1", Force: true})
	expect("n2")
}
