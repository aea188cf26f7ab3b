package schedule_test

import (
	"fmt"
	"math/bits"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/schedule"
	"github.com/blixard/blixard/internal/state"
)

// crowd fills a small cluster with VMs of several priorities, some of which
// are on their way out.
func crowd(t *rapid.T, nodes, vms int) *world {
	w := newWorld()
	for i := range nodes {
		w.addNode(blixard.NodeName(fmt.Sprintf("n%d", i)), drawNode(t))
	}
	x := schedule.NewIndex(w.s.View())
	for i := range vms {
		name := blixard.VMName(fmt.Sprintf("vm-%d", i))
		s := drawSpec(t)
		s.Priority = rapid.SampledFrom([]int{100, 300, 500}).Draw(t, "priority")
		s.Replicas = rapid.IntRange(1, 3).Draw(t, "replicas")
		s.Singleton = rapid.IntRange(0, 3).Draw(t, "singleton") == 0
		s.AffinityVMs = nil
		x.Observe(w.s.View(), w.must(&state.CreateVM{Name: name, Spec: s, Start: true}))
		vm := w.s.View().VM(name)
		for ordinal := 1; ordinal <= s.Replicas; ordinal++ {
			p, ok := x.Find(schedule.Request{VM: name, Spec: &vm.Spec})
			if !ok {
				continue
			}
			changes := w.must(place(vm, ordinal, p))
			if rapid.IntRange(0, 5).Draw(t, "ending") == 0 {
				changes = append(changes, w.must(&state.EndInstance{VM: name, Ordinal: ordinal, Generation: vm.FirstGeneration, Wanted: blixard.WantStop})...)
			}
			x.Observe(w.s.View(), changes)
		}
	}
	if rapid.Bool().Draw(t, "reprioritize") {
		spec := w.s.View().VM("vm-0").Spec
		spec.Priority = rapid.SampledFrom([]int{50, 900}).Draw(t, "new priority")
		w.must(&state.UpdateVM{Name: "vm-0", Spec: spec})
	}
	return w
}

func priorityOf(v *state.View, i *blixard.Instance) int { return v.VM(i.VM).Spec.Priority }

// cheapest finds by trying every set of incarnations on every node what must
// be ended at least: the lowest possible highest priority, 0 if nothing must
// be, and for it the fewest; false if nothing helps.
func cheapest(v *state.View, s *blixard.VMSpec) (highest, fewest int, any bool) {
	v.Nodes(func(n *blixard.Node) bool {
		var fixed, lower []*blixard.Instance
		v.InstancesOn(n.Name, func(i *blixard.Instance) bool {
			switch {
			case !i.Holds():
			case i.Wanted != blixard.WantRun && (priorityOf(v, i) < s.Priority || slices.Contains(s.AffinityVMs, i.VM)):
				fixed = append(fixed, i)
			case i.Wanted == blixard.WantRun && priorityOf(v, i) < s.Priority && !slices.Contains(s.AffinityVMs, i.VM):
				lower = append(lower, i)
			}
			return true
		})
		for set := range 1 << len(lower) {
			gone, top := slices.Clone(fixed), 0
			for k, i := range lower {
				if set&(1<<k) != 0 {
					gone, top = append(gone, i), max(top, priorityOf(v, i))
				}
			}
			q := v.Case(n, s)
			then := q.Without(gone)
			if then.Objection() != nil || len(gone) == 0 {
				continue
			}
			if count := bits.OnesCount(uint(set)); !any || top < highest || top == highest && count < fewest {
				highest, fewest, any = top, count, true
			}
		}
		return true
	})
	return highest, fewest, any
}

// TestPreemptIsMinimal: room is found exactly if ending what has a lower
// priority helps; nothing of an equal or higher priority is ended, the highest
// priority that is ended is the lowest possible, nobody is ended whose room is
// not needed; the index and the view agree; and the state accepts it.
func TestPreemptIsMinimal(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := crowd(t, rapid.IntRange(1, 4).Draw(t, "nodes"), rapid.IntRange(1, 7).Draw(t, "vms"))
		s := drawSpec(t)
		s.Priority = rapid.SampledFrom([]int{100, 300, 500, 700, 700}).Draw(t, "own priority")
		s.MemoryMiB *= 3
		w.must(&state.CreateVM{Name: "asks", Spec: s, Start: true})
		v := w.s.View()
		vm := v.VM("asks")
		want := schedule.Want{Request: schedule.Request{VM: "asks", Spec: &vm.Spec}}
		x := schedule.NewIndex(v)
		if _, fits := x.Find(want.Request); fits {
			return
		}
		highest, fewest, any := cheapest(v, &vm.Spec)
		room, ok := schedule.ExplainRoom(v, want)
		fast, _, found := x.Preempt(v, want)
		if ok != any || found != any {
			t.Fatalf("room is found: %t by view, %t by index; by trying all: %t", ok, found, any)
		}
		if again, _, found := x.Preempt(v, want); found != ok || again.String() != fast.String() {
			t.Fatalf("asked twice: %s, then %s", fast.String(), again.String())
		}
		if !ok {
			return
		}
		if fast.String() != room.String() || fast.Score != room.Score {
			t.Fatalf("the index finds %s (%d), the view %s (%d)", fast.String(), fast.Score, room.String(), room.Score)
		}
		if room.Highest != highest || len(room.Victims) < fewest {
			t.Fatalf("%s; by trying all the highest is %d with %d victims", room.String(), highest, fewest)
		}
		checkRoom(t, v, vm, room)
		if len(room.Victims) == 0 {
			return
		}
		command := &state.PreemptInstances{VM: vm.Name, UID: vm.UID, Ordinal: 1, SpecVersion: vm.SpecVersion, Node: room.Node, NodeEpoch: room.Epoch}
		for _, i := range room.Victims {
			command.Victims = append(command.Victims, state.Victim{VM: i.VM, Ordinal: i.Ordinal, Generation: i.Generation})
		}
		if vm.Spec.Replicas > 0 {
			w.must(command)
		}
	})
}

// checkRoom: the room is enough, and not if any of the victims stays.
func checkRoom(t *rapid.T, v *state.View, vm *blixard.VM, room schedule.Room) {
	q := v.Case(v.Node(room.Node), &vm.Spec)
	for k := -1; k < len(room.Victims); k++ {
		gone := slices.Clone(room.Ending)
		for n, i := range room.Victims {
			if priorityOf(v, i) >= vm.Spec.Priority {
				t.Fatalf("%s of priority %d makes room for one of %d", i.ID, priorityOf(v, i), vm.Spec.Priority)
			}
			if n != k {
				gone = append(gone, i)
			}
		}
		then := q.Without(gone)
		if fits := then.Objection() == nil; fits != (k < 0) {
			t.Fatalf("%s: without victim %d it fits: %t", room.String(), k, fits)
		}
	}
}

// TestPreemptSparesWhatCostsMore puts the rules of choice into one picture.
func TestPreemptSparesWhatCostsMore(t *testing.T) {
	type tenant struct {
		name      blixard.VMName
		node      string
		gib       int64
		priority  int
		singleton bool
	}
	for _, c := range []struct {
		name    string
		tenants []tenant
		gib     int64
		depends []blixard.VMName
		want    string
	}{
		{"lowest priority", []tenant{{"a", "n1", 4, 300, false}, {"b", "n2", 4, 100, false}}, 4, nil, "room on n2 by ending b-1 (priority 100)"},
		{"fewest", []tenant{{"a", "n1", 2, 100, false}, {"b", "n1", 2, 100, false}, {"c", "n2", 4, 100, false}}, 4, nil, "room on n2 by ending c-1 (priority 100)"},
		{"many low before one high", []tenant{{"a", "n1", 2, 100, false}, {"b", "n1", 2, 100, false}, {"c", "n2", 4, 300, false}}, 4, nil, "room on n1 by ending a-1, b-1 (priority 100)"},
		{"the small one", []tenant{{"a", "n1", 3, 100, false}, {"b", "n1", 1, 100, false}, {"c", "n2", 4, 900, false}}, 1, nil, "room on n1 by ending b-1 (priority 100)"},
		{"not the exclusive one", []tenant{{"a", "n1", 4, 100, true}, {"b", "n2", 4, 100, false}}, 4, nil, "room on n2 by ending b-1 (priority 100)"},
		{"not an equal", []tenant{{"a", "n1", 4, 500, false}, {"b", "n2", 4, 500, false}}, 4, nil, ""},
		{"not what it depends on", []tenant{{"a", "n1", 4, 100, false}, {"b", "n2", 4, 300, false}}, 4, []blixard.VMName{"a"}, "room on n2 by ending b-1 (priority 300)"},
		{"too large for any node", []tenant{{"a", "n1", 4, 100, false}}, 8, nil, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld()
			w.addNode("n1", nodeKind{cores: 8, memoryMiB: 4096})
			w.addNode("n2", nodeKind{cores: 8, memoryMiB: 4096})
			for _, tenant := range c.tenants {
				w.must(&state.CreateVM{Name: tenant.name, Start: true, Spec: spec(func(s *blixard.VMSpec) {
					s.Replicas, s.MemoryMiB, s.Priority, s.Singleton = 1, tenant.gib<<10, tenant.priority, tenant.singleton
				})})
				w.must(place(w.s.View().VM(tenant.name), 1, schedule.Placement{Node: blixard.NodeName(tenant.node)}))
			}
			s := spec(func(s *blixard.VMSpec) { s.MemoryMiB, s.DependsOn = c.gib<<10, c.depends })
			room, ok := schedule.ExplainRoom(w.s.View(), schedule.Want{Request: schedule.Request{VM: "asks", Spec: &s}})
			got := room.String()
			if !ok {
				got = ""
			}
			if got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

// TestStrategies: spreading keeps replicas apart, packing fills a node before
// it takes another, unless a label to spread over says otherwise.
func TestStrategies(t *testing.T) {
	for _, c := range []struct {
		strategy, across, want string
	}{
		{"spread", "", "n1 n2 n3 n1"}, {"binpack", "", "n1 n1 n1 n1"}, {"binpack", "node", "n1 n2 n3 n1"}, {"binpack", "zone", "n1 n3 n1 n3"},
	} {
		w := newWorld()
		for k, zone := range []string{"a", "a", "b"} {
			w.addNode(blixard.NodeName(fmt.Sprintf("n%d", k+1)), nodeKind{cores: 8, memoryMiB: 8192, zone: zone})
		}
		x := schedule.NewIndex(w.s.View())
		s := spec(func(s *blixard.VMSpec) { s.Strategy, s.SpreadAcross = c.strategy, c.across })
		var got []string
		for ordinal := 1; ordinal <= 4; ordinal++ {
			p, _ := x.Place(schedule.Request{VM: "a", Spec: &s}, ordinal, 1)
			got = append(got, string(p.Node))
		}
		if text := strings.Join(got, " "); text != c.want {
			t.Errorf("%s across %q goes to %s, want %s", c.strategy, c.across, text, c.want)
		}
	}
}
