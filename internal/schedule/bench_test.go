package schedule_test

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/schedule"
	"github.com/blixard/blixard/internal/state"
)

// A benchmark's cluster: nodes of three sizes in ten zones with about ten
// instances each.
const (
	benchNodes     = 10_000
	benchInstances = 100_000
)

func benchSize(b *testing.B) (nodes, instances int) {
	if testing.Short() {
		return benchNodes / 20, benchInstances / 20
	}
	return benchNodes, benchInstances
}

var benchWorlds = map[int]*world{}

func benchWorld(b *testing.B) *world {
	nodes, instances := benchSize(b)
	if w := benchWorlds[nodes]; w != nil {
		return w
	}
	w := newWorld()
	for i := range nodes {
		k := nodeKind{cores: []int64{32, 64, 128}[i%3], memoryMiB: []int64{128, 256, 512}[i%3] << 10, zone: fmt.Sprintf("z%d", i%10)}
		k.labels = []blixard.Label{{Key: "storage", Value: []string{"nvme", "ssd"}[i%2]}}
		w.addNode(blixard.NodeName(fmt.Sprintf("n%05d", i)), k)
	}
	r := rand.New(rand.NewPCG(3, 4))
	x := schedule.NewIndex(w.s.View())
	for left := instances; left > 0; {
		name := blixard.VMName(fmt.Sprintf("old-%d", left))
		s := benchSpec(r)
		s.Replicas = min(1+r.IntN(20), left)
		left -= s.Replicas
		w.must(&state.CreateVM{Name: name, Spec: s, Start: true})
		vm := w.s.View().VM(name)
		var commands []state.Command
		for ordinal := 1; ordinal <= s.Replicas; ordinal++ {
			p, ok := x.Place(schedule.Request{VM: name, Spec: &vm.Spec}, ordinal, vm.FirstGeneration)
			if !ok {
				b.Fatal("the cluster is too small")
			}
			commands = append(commands, place(vm, ordinal, p))
		}
		w.must(commands...)
	}
	benchWorlds[nodes] = w
	return w
}

func benchSpec(r *rand.Rand) blixard.VMSpec {
	return spec(func(s *blixard.VMSpec) {
		s.VCPUs = 1 + r.IntN(4)
		s.MemoryMiB = int64(1+r.IntN(8)) << 10
	})
}

// benchPlace measures decisions of single requests that a spec is made for,
// each booked, and every thousandth compared with an exhaustive search. The
// oldest decision is given up again after 20,000, so that the cluster stays as
// full as it was.
func benchPlace(b *testing.B, replicas int, makeSpec func(r *rand.Rand, vm int) blixard.VMSpec) {
	w := benchWorld(b)
	v := w.s.View()
	x := schedule.NewIndex(v)
	r := rand.New(rand.NewPCG(5, 6))
	var s blixard.VMSpec
	var name blixard.VMName
	var got, want int64
	refused := 0
	b.ResetTimer()
	for i := range b.N {
		if i%replicas == 0 {
			s, name = makeSpec(r, i/replicas), blixard.VMName(fmt.Sprintf("new-%d", i/replicas))
			if old := i/replicas - 20_000/replicas; old >= 0 {
				x.SyncVM(v, blixard.VMName(fmt.Sprintf("new-%d", old)))
			}
		}
		req := schedule.Request{VM: name, Spec: &s}
		if i%5000 == 4999 {
			b.StopTimer()
			best, found := exhaustive(x, v, req)
			b.StartTimer()
			p, ok := x.Place(req, 1+i%replicas, 1)
			if ok != found {
				b.Fatalf("decision %d: found %t, exhaustively %t", i, ok, found)
			}
			got, want = got+p.Score, want+best
			continue
		}
		if _, ok := x.Place(req, 1+i%replicas, 1); !ok {
			refused++
		}
	}
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "decisions/s")
	b.ReportMetric(float64(refused)/float64(b.N), "refused/op")
	if want != 0 {
		b.ReportMetric(float64(got)/float64(want), "score/best")
	}
}

// exhaustive asks every node by itself, through a request pinned to it.
func exhaustive(x *schedule.Index, v *state.View, r schedule.Request) (score int64, found bool) {
	v.Nodes(func(n *blixard.Node) bool {
		one := *r.Spec
		one.Constraints = append(one.Constraints[:len(one.Constraints):len(one.Constraints)], blixard.Constraint{Key: "node", Op: "=", Value: string(n.Name)})
		if p, ok := x.Find(schedule.Request{VM: r.VM, Spec: &one, Avoid: r.Avoid}); ok && (!found || p.Score > score) {
			score, found = p.Score, true
		}
		return true
	})
	return score, found
}

func BenchmarkPlace(b *testing.B) {
	b.Run("plain", func(b *testing.B) {
		benchPlace(b, 1, func(*rand.Rand, int) blixard.VMSpec { return spec(nil) })
	})
	b.Run("binpack", func(b *testing.B) {
		benchPlace(b, 1, func(*rand.Rand, int) blixard.VMSpec {
			return spec(func(s *blixard.VMSpec) { s.Strategy = "binpack" })
		})
	})
	b.Run("spread+anti-affinity", func(b *testing.B) {
		benchPlace(b, 20, func(_ *rand.Rand, vm int) blixard.VMSpec {
			return spec(func(s *blixard.VMSpec) {
				s.SpreadAcross, s.AntiAffinityGroup = "zone", fmt.Sprintf("g%d", vm)
				s.Preferences = []blixard.Preference{{Constraint: blixard.Constraint{Key: "storage", Op: "=", Value: "nvme"}, Weight: 50}}
			})
		})
	})
	b.Run("spread+anti-affinity,binpack,1000-replicas", func(b *testing.B) {
		benchPlace(b, 1000, func(_ *rand.Rand, vm int) blixard.VMSpec {
			return spec(func(s *blixard.VMSpec) {
				s.SpreadAcross, s.AntiAffinityGroup, s.Strategy = "zone", fmt.Sprintf("g%d", vm), "binpack"
			})
		})
	})
	for _, classes := range []int{100, 1000} {
		b.Run(fmt.Sprintf("classes=%d", classes), func(b *testing.B) {
			benchPlace(b, 1, func(r *rand.Rand, _ int) blixard.VMSpec {
				return spec(func(s *blixard.VMSpec) { s.MemoryMiB = 512 + int64(r.IntN(classes)) })
			})
		})
	}
	b.Run("nowhere", func(b *testing.B) {
		benchPlace(b, 1, func(*rand.Rand, int) blixard.VMSpec {
			return spec(func(s *blixard.VMSpec) { s.MemoryMiB = 4 << 20 })
		})
	})
}

// BenchmarkNewIndex is what a new leader pays.
func BenchmarkNewIndex(b *testing.B) {
	v := benchWorld(b).s.View()
	for b.Loop() {
		schedule.NewIndex(v)
	}
}

// BenchmarkPreempt is a search for room in a full cluster: it is made for the
// few that fit nowhere, and the leader bounds how many it makes.
func BenchmarkPreempt(b *testing.B) {
	v := benchWorld(b).s.View()
	x := schedule.NewIndex(v)
	rows := 0
	for i := range b.N {
		s := spec(func(s *blixard.VMSpec) { s.MemoryMiB, s.Priority = 511<<10, 501+i%400 })
		room, scanned, ok := x.Preempt(v, schedule.Want{Request: schedule.Request{VM: "asks", Spec: &s}})
		if !ok || len(room.Victims) == 0 {
			b.Fatalf("no room: %s", room.String())
		}
		rows += scanned
	}
	b.ReportMetric(float64(rows)/float64(b.N), "rows/op")
}
