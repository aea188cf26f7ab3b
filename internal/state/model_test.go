package state_test

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// drawWorld is a state after some random commands.
func drawWorld(t *rapid.T) *state.State {
	_, s := drawLog(t, func(*state.State, []byte) {})
	return s
}

// do applies one command as an entry of its own.
func do(t *rapid.T, s *state.State, e state.Envelope) (state.Result, []state.Change) {
	results, changes, err := s.Apply(s.Index()+1, 1, state.EncodeEntry([]state.Envelope{e}))
	if err != nil {
		t.Fatal(err)
	}
	return results[0], changes
}

// idle is the state's hash after an entry that changes nothing at the same
// index and time: what a command without effect must come to.
func idle(t *rapid.T, s *state.State, nowMS int64) uint64 {
	twin := restore(t, s.View())
	on := s.View().Cluster().Maintenance
	if r, changes := do(t, twin, state.Envelope{NowMS: nowMS, Command: &state.SetMaintenance{On: on}}); !r.Outcome.Noop || len(changes) > 0 {
		t.Fatal("an idle command changed something")
	}
	return twin.View().Hash()
}

// TestRefusedCommandsChangeNothing: neither a row nor what a snapshot holds,
// and nobody is told of a change; nor does a command that says it was a no-op.
// What Try foretells is what happens, and it leaves its view alone.
func TestRefusedCommandsChangeNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawWorld(t)
		for range 10 {
			command := drawCommand(t, s.View(), false)
			now := int64(rapid.IntRange(0, 100).Draw(t, "now"))
			want, before := idle(t, s, now), s.View()
			hash := before.Hash()
			foretold := before.Try(state.Envelope{NowMS: now, Command: command})
			if before.Hash() != hash {
				t.Fatalf("trying %T changed the view", command)
			}
			r, changes := do(t, s, state.Envelope{NowMS: now, Command: command})
			if fmt.Sprint(foretold.Err) != fmt.Sprint(r.Err) || foretold.Outcome != r.Outcome {
				t.Fatalf("%T %+v: foretold %+v, came %+v", command, command, foretold, r)
			}
			if r.Err == nil && !r.Outcome.Noop {
				continue
			}
			if len(changes) > 0 {
				t.Fatalf("%T %+v: %v, yet it reports %d changes", command, command, r, len(changes))
			}
			if s.View().Hash() != want {
				t.Fatalf("%T %+v: %v, yet the state is another one", command, command, r)
			}
		}
	})
}

// TestKeysReplayAnswers: the same command under the same key has the same
// answer ever after, in another replica too, and changes nothing.
func TestKeysReplayAnswers(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawWorld(t)
		e := state.Envelope{Key: "the key", NowMS: 7, Command: drawCommand(t, s.View(), false)}
		first, _ := do(t, s, e)
		for range rapid.IntRange(0, 5).Draw(t, "between") {
			do(t, s, state.Envelope{NowMS: 8, Command: drawCommand(t, s.View(), false)})
		}
		s = restore(t, s.View())
		e.NowMS = 9
		want := idle(t, s, 9)
		again, changes := do(t, s, e)
		if again.Outcome != first.Outcome || fmt.Sprint(again.Err) != fmt.Sprint(first.Err) {
			t.Fatalf("%T was answered %+v %v, then %+v %v", e.Command, first.Outcome, first.Err, again.Outcome, again.Err)
		}
		if len(changes) > 0 || s.View().Hash() != want {
			t.Fatalf("%T changed something twice", e.Command)
		}
		if again, _ := do(t, s, state.Envelope{Key: "the key", NowMS: 9, Command: &state.RevokeToken{ID: "another"}}); blixard.CodeOf(again.Err) != blixard.CodeConflict {
			t.Fatalf("another command under the key: %+v", again)
		}
	})
}

// ledger is an independent account of what a view's instances hold.
type ledger struct {
	used   map[blixard.NodeName]blixard.Resources
	count  map[blixard.NodeName]int
	ports  map[string]int
	groups map[string]int
}

func audit(v *state.View, without ...*blixard.Instance) ledger {
	l := ledger{used: map[blixard.NodeName]blixard.Resources{}, count: map[blixard.NodeName]int{}, ports: map[string]int{}, groups: map[string]int{}}
	v.Instances(func(i *blixard.Instance) bool {
		for _, w := range without {
			if w == i {
				return true
			}
		}
		if i.State == blixard.Stopped || i.State == blixard.Failed || i.State == blixard.Lost {
			return true
		}
		l.used[i.Node] = l.used[i.Node].Add(blixard.Resources{MilliCPU: int64(i.Spec.VCPUs) * 1000, MemoryMiB: i.Spec.MemoryMiB, DiskMiB: i.Spec.DiskMiB})
		l.count[i.Node]++
		for _, p := range i.Spec.Publish {
			l.ports[fmt.Sprint(i.Node, p.Protocol, p.HostPort)]++
		}
		l.groups[fmt.Sprint(i.Node, i.Spec.AntiAffinityGroup)]++
		return true
	})
	return l
}

// takes is the model's own answer whether a node takes an instance.
func (l *ledger) takes(n *blixard.Node, s *blixard.VMSpec) bool {
	after := l.used[n.Name].Add(blixard.Resources{MilliCPU: int64(s.VCPUs) * 1000, MemoryMiB: s.MemoryMiB, DiskMiB: s.DiskMiB})
	ok := n.State == blixard.NodeReady && n.Availability == blixard.Active && !n.Witness
	ok = ok && after.MilliCPU <= n.Capacity.MilliCPU-n.Reserved.MilliCPU && after.MemoryMiB <= n.Capacity.MemoryMiB-n.Reserved.MemoryMiB && after.DiskMiB <= n.Capacity.DiskMiB-n.Reserved.DiskMiB
	for _, p := range s.Publish {
		ok = ok && (p.HostPort == 0 || l.ports[fmt.Sprint(n.Name, p.Protocol, p.HostPort)] == 0)
	}
	return ok && (s.AntiAffinityGroup == "" || l.groups[fmt.Sprint(n.Name, s.AntiAffinityGroup)] == 0)
}

// TestCapacityModel: beside an account of its own the state books what
// instances hold exactly, a placement is accepted exactly if the node has what
// it takes, and a preemption ends only what is lower, where it is needed and
// helps.
func TestCapacityModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawWorld(t)
		for range 20 {
			before := s.View()
			command := drawCommand(t, before, false)
			r, _ := do(t, s, state.Envelope{NowMS: 1, Command: command})
			l := audit(before)
			switch m := command.(type) {
			case *state.PlaceInstance:
				vm, n := before.VM(m.VM), before.Node(m.Node)
				if r.Err == nil && !l.takes(n, &vm.Spec) {
					t.Fatalf("%+v is accepted, by the model %s does not take it", m, n.Name)
				}
				if r.Err != nil && slotFree(before, m) && n != nil && n.Epoch == m.NodeEpoch && l.takes(n, &vm.Spec) {
					t.Fatalf("%+v is refused (%v), by the model %s takes it", m, r.Err, n.Name)
				}
			case *state.PreemptInstances:
				if r.Err == nil {
					checkPreempted(t, before, s.View(), m)
				}
			}
			now := audit(s.View())
			s.View().Nodes(func(n *blixard.Node) bool {
				if u := s.View().Usage(n.Name); u.Used != now.used[n.Name] || u.Instances != now.count[n.Name] {
					t.Fatalf("after %T %s holds %+v, by the model %+v in %d", command, n.Name, u, now.used[n.Name], now.count[n.Name])
				}
				return true
			})
			for key, n := range now.ports {
				if n > 1 {
					t.Fatalf("after %T the port %s is published %d times", command, key, n)
				}
			}
		}
	})
}

// slotFree tells whether nothing but the node can speak against a placement.
func slotFree(v *state.View, m *state.PlaceInstance) bool {
	vm := v.VM(m.VM)
	if vm == nil || vm.UID != m.UID || vm.Deleting || vm.Desired != blixard.DesiredRunning || m.Ordinal < 1 || m.Ordinal > vm.Spec.Replicas ||
		m.SpecVersion != vm.SpecVersion || m.RestartSeq != vm.RestartSeq || m.Generation < vm.FirstGeneration {
		return false
	}
	free := true
	v.InstancesOf(m.VM, func(i *blixard.Instance) bool {
		free = free && (i.Ordinal != m.Ordinal || i.State.Terminal() && i.Generation < m.Generation)
		return true
	})
	return free
}

func checkPreempted(t *rapid.T, before, after *state.View, m *state.PreemptInstances) {
	vm, n := before.VM(m.VM), before.Node(m.Node)
	var gone []*blixard.Instance
	before.InstancesOn(m.Node, func(i *blixard.Instance) bool {
		if i.Wanted != blixard.WantRun {
			gone = append(gone, i)
		}
		return true
	})
	for _, v := range m.Victims {
		old, now := before.Instance(v.VM, v.Ordinal, v.Generation), after.Instance(v.VM, v.Ordinal, v.Generation)
		if old.Node != m.Node || before.VM(v.VM).Spec.Priority >= vm.Spec.Priority || !old.Counts() || now.Wanted != blixard.WantStop || now.State != old.State {
			t.Fatalf("%s of priority %d on %s (to %s) is preempted on %s by priority %d; now it is to %s", old.Incarnation(), before.VM(v.VM).Spec.Priority, old.Node, old.Wanted, m.Node, vm.Spec.Priority, now.Wanted)
		}
		gone = append(gone, old)
	}
	present, then := audit(before), audit(before, gone...)
	if present.takes(n, &vm.Spec) || !then.takes(n, &vm.Spec) {
		t.Fatalf("%+v is accepted; the node takes it now: %t, then: %t", m, present.takes(n, &vm.Spec), then.takes(n, &vm.Spec))
	}
}
