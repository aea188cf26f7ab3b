package state_test

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

func testSpec(t *rapid.T) blixard.VMSpec {
	s := blixard.VMSpec{Replicas: rapid.IntRange(0, 4).Draw(t, "replicas"), MemoryMiB: int64(rapid.IntRange(1, 4).Draw(t, "gib")) << 10}
	s.AntiAffinityGroup = rapid.SampledFrom([]string{"", "g"}).Draw(t, "group")
	s.Singleton = rapid.Bool().Draw(t, "singleton")
	s.Priority = rapid.SampledFrom([]int{100, 500, 900}).Draw(t, "priority")
	if rapid.Bool().Draw(t, "port") {
		s.Publish = []blixard.Port{{HostPort: 80, GuestPort: 80}}
	}
	if rapid.IntRange(0, 3).Draw(t, "depends") == 0 {
		s.DependsOn = []blixard.VMName{rapid.SampledFrom(vmNames).Draw(t, "on")}
	}
	s.Env = []blixard.Label{{Key: "A", Value: rapid.SampledFrom([]string{"1", "2"}).Draw(t, "env")}}
	s.Defaults()
	return s
}

var (
	vmNames   = []blixard.VMName{"a", "b", "c"}
	nodeNames = []blixard.NodeName{"n1", "n2", "n3"}
)

// drawCommand makes a command, often one that fits the state.
func drawCommand(t *rapid.T, v *state.View, nested bool) state.Command {
	vm, node := rapid.SampledFrom(vmNames).Draw(t, "vm"), rapid.SampledFrom(nodeNames).Draw(t, "node")
	n := v.Node(node)
	raftID, epoch := uint64(0), uint64(0)
	if n != nil {
		raftID, epoch = n.RaftID, n.Epoch
	}
	var rows []*blixard.Instance
	v.Instances(func(i *blixard.Instance) bool { rows = append(rows, i); return true })
	kind := rapid.IntRange(0, 40).Draw(t, "command")
	if kind > 25 {
		return drawFunctionCommand(t, v)
	}
	if len(rows) == 0 && kind >= 17 {
		kind -= 17
	}
	switch kind {
	case 0, 1:
		return &state.CreateVM{Name: vm, Spec: testSpec(t), Start: true}
	case 2:
		return &state.UpdateVM{Name: vm, Spec: testSpec(t)}
	case 3:
		return &state.ScaleVM{Name: vm, Replicas: rapid.IntRange(-1, 5).Draw(t, "to")}
	case 4:
		return &state.SetVM{Name: vm, Verb: rapid.SampledFrom([]state.VMVerb{"start", "stop", "pause", "resume", "sing"}).Draw(t, "verb")}
	case 5:
		return &state.RestartVM{Name: vm}
	case 6:
		return &state.DeleteVM{Name: vm}
	case 7, 8, 9, 10:
		row := v.VM(vm)
		if row == nil {
			return &state.CreateVM{Name: vm, Spec: testSpec(t), Start: true}
		}
		p := &state.PlaceInstance{VM: vm, UID: row.UID, Ordinal: rapid.IntRange(1, 4).Draw(t, "ordinal"), SpecVersion: row.SpecVersion, RestartSeq: row.RestartSeq, Node: node, NodeEpoch: epoch}
		p.Generation = row.FirstGeneration + uint64(rapid.IntRange(0, 6).Draw(t, "later"))
		return p
	case 11:
		if n == nil {
			return &state.JoinNode{Node: state.NodeIdentity{Name: node, Address: string(node)}}
		}
		return &state.ReportNode{Name: node, RaftID: raftID, Address: string(node), Capacity: blixard.Resources{MilliCPU: 8000, MemoryMiB: 8192, DiskMiB: 1}, FeatureLevel: rapid.SampledFrom([]int{2, 2, 1}).Draw(t, "level")}
	case 12:
		return rapid.SampledFrom([]state.Command{
			&state.LoseNode{Name: node, RaftID: raftID, Epoch: epoch}, &state.ReviveNode{Name: node, RaftID: raftID}, &state.RemoveNode{Name: node}, &state.RemoveNode{Name: node, Force: true},
			&state.SetNode{Name: node, Availability: blixard.Draining}, &state.SetNode{Name: node, Availability: blixard.Active}, &state.SetMaintenance{On: true},
			&state.JoinNode{Node: state.NodeIdentity{Name: node, Address: "elsewhere"}, Replace: true}, &state.JoinNode{Node: state.NodeIdentity{Name: node, Address: string(node)}, TokenID: "t", TokenHash: "h"},
		}).Draw(t, "about a node")
	case 13:
		return &state.RefuseVM{Name: vm, UID: 1, Missing: rapid.IntRange(0, 2).Draw(t, "missing"), Summary: "full"}
	case 14:
		return &state.CreateToken{Token: state.Token{ID: "t", Hash: "h", ExpiresMS: 50, UsesLeft: 2}}
	case 15:
		if rapid.Bool().Draw(t, "image") {
			return &state.RemoveImage{Digest: digest(rapid.IntRange(1, 2).Draw(t, "digest")), Back: rapid.Bool().Draw(t, "back")}
		}
		return &state.RevokeToken{ID: "t"}
	case 16:
		if nested {
			return &state.SetMaintenance{}
		}
		b := &state.Batch{}
		for range rapid.IntRange(0, 4).Draw(t, "items") {
			b.Commands = append(b.Commands, drawCommand(t, v, true))
		}
		return b
	case 17:
		i := rapid.SampledFrom(rows).Draw(t, "row")
		return &state.EndInstance{VM: i.VM, Ordinal: i.Ordinal, Generation: i.Generation, Wanted: rapid.SampledFrom([]blixard.Wanted{"run", "stop", "remove", "fly"}).Draw(t, "wanted"), Paused: rapid.Bool().Draw(t, "paused")}
	case 18:
		i := rapid.SampledFrom(rows).Draw(t, "row")
		return &state.DropInstance{VM: i.VM, Ordinal: i.Ordinal, Generation: i.Generation}
	case 19, 20:
		return drawPreemption(t, v, vm, rows)
	case 21:
		return &state.ApplyVM{Name: vm, Spec: testSpec(t), Desired: rapid.SampledFrom([]blixard.Desired{"", "running", "stopped", "flying"}).Draw(t, "desired"), ExpectVersion: rapid.SampledFrom([]uint64{0, 0, 5}).Draw(t, "expect")}
	}
	o := &state.Observe{Node: node, RaftID: raftID}
	for range rapid.IntRange(1, 3).Draw(t, "seen") {
		i := rapid.SampledFrom(rows).Draw(t, "row")
		if rapid.IntRange(0, 3).Draw(t, "right node") > 0 {
			if n := v.Node(i.Node); n != nil {
				o.Node, o.RaftID = n.Name, n.RaftID
			}
		}
		o.Items = append(o.Items, state.Observation{
			VM: i.VM, Ordinal: i.Ordinal, Generation: i.Generation, Message: "m", Removed: rapid.IntRange(0, 4).Draw(t, "removed") == 0,
			State: rapid.SampledFrom([]blixard.InstanceState{blixard.Pending, blixard.Preparing, blixard.Starting, blixard.Running, blixard.Stopping, blixard.Stopped, blixard.Failed, blixard.Lost, "Odd"}).Draw(t, "state"),
		})
	}
	return o
}

// drawPreemption makes a preemption, often one that can be.
func drawPreemption(t *rapid.T, v *state.View, name blixard.VMName, rows []*blixard.Instance) state.Command {
	first := rapid.SampledFrom(rows).Draw(t, "victim")
	m := &state.PreemptInstances{VM: name, Ordinal: rapid.IntRange(1, 4).Draw(t, "ordinal"), Node: first.Node}
	if vm := v.VM(name); vm != nil {
		m.UID, m.SpecVersion = vm.UID, vm.SpecVersion
	}
	if n := v.Node(first.Node); n != nil {
		m.NodeEpoch = n.Epoch
	}
	for _, i := range rows {
		if i == first || i.Node == first.Node && i.Counts() && rapid.Bool().Draw(t, "also") {
			m.Victims = append(m.Victims, state.Victim{VM: i.VM, Ordinal: i.Ordinal, Generation: i.Generation})
		}
	}
	return m
}

// drawLog makes entries against a state that grows with them.
func drawLog(t *rapid.T, each func(s *state.State, entry []byte)) (entries [][]byte, s *state.State) {
	s = state.New()
	add := func(commands ...state.Command) {
		var e []state.Envelope
		for _, c := range commands {
			env := state.Envelope{NowMS: int64(len(entries)) + int64(rapid.IntRange(-5, 5).Draw(t, "clock")), Actor: "t", Command: c}
			if rapid.IntRange(0, 2).Draw(t, "keyed") == 0 {
				env.Key = fmt.Sprintf("k%d", rapid.IntRange(0, 20).Draw(t, "key"))
			}
			e = append(e, env)
		}
		entry := state.EncodeEntry(e)
		entries = append(entries, entry)
		if _, _, err := s.Apply(uint64(len(entries)), 1, entry); err != nil {
			t.Fatal(err)
		}
		each(s, entry)
	}
	id := state.NodeIdentity{Name: "n1", Address: "n1"}
	add(&state.Bootstrap{ClusterID: "c", RaftID: 1, Node: id, FeatureLevel: rapid.SampledFrom([]int{2, 2, 2, 1}).Draw(t, "founded at level")})
	add(&state.ReportNode{Name: "n1", RaftID: 1, Address: "n1", Capacity: blixard.Resources{MilliCPU: 8000, MemoryMiB: 8192, DiskMiB: 1}, FeatureLevel: 2})
	for range rapid.IntRange(1, 50).Draw(t, "entries") {
		var commands []state.Command
		for range rapid.IntRange(1, 3).Draw(t, "commands") {
			commands = append(commands, drawCommand(t, s.View(), false))
		}
		add(commands...)
	}
	return entries, s
}

func restore(t interface{ Fatal(...any) }, v *state.View) *state.State {
	var b bytes.Buffer
	if _, err := v.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	s, err := state.Read(&b)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// derived is what is not part of a snapshot and must agree all the same.
func derived(v *state.View) string {
	out := ""
	for _, n := range nodeNames {
		out += fmt.Sprintf("%s %+v g=%d", n, v.Usage(n), v.GroupCount("g", n))
		if row := v.Node(n); row != nil {
			s := blixard.VMSpec{Publish: []blixard.Port{{Protocol: "tcp", HostPort: 80}}, AffinityVMs: vmNames}
			out += fmt.Sprint(v.Objections(row, &s))
		}
		v.InstancesOn(n, func(i *blixard.Instance) bool { out += " " + i.Incarnation() + string(i.State); return true })
		out += "\n"
	}
	return out + derivedOfFunctions(v)
}

// TestApplyIsDeterministic: a log applied twice, and one applied on top of a
// snapshot made in its middle, give the same state and the same derived tables.
func TestApplyIsDeterministic(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		entries, s := drawLog(t, func(*state.State, []byte) {})
		middle := rapid.IntRange(0, len(entries)).Draw(t, "middle")
		twin := state.New()
		for i, e := range entries {
			if i == middle {
				twin = restore(t, twin.View())
			}
			if _, _, err := twin.Apply(uint64(i+1), 1, e); err != nil {
				t.Fatal(err)
			}
		}
		again := restore(t, s.View())
		for _, other := range []*state.State{twin, again} {
			if other.View().Hash() != s.View().Hash() {
				t.Fatalf("hashes differ: %x, %x", other.View().Hash(), s.View().Hash())
			}
			if derived(other.View()) != derived(s.View()) {
				t.Fatalf("derived tables differ:\n%s\n%s", derived(other.View()), derived(s.View()))
			}
		}
	})
}

// TestInvariantsOfApply: whatever is proposed, states and wishes go forward,
// a slot has one incarnation that has not ended, generations are never used
// again, no node that did not shrink is overbooked, and a view never changes.
func TestInvariantsOfApply(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		highest := map[blixard.InstanceID]uint64{}
		states := map[string]*blixard.Instance{}
		rank := map[blixard.Wanted]int{blixard.WantRun: 1, blixard.WantStop: 2, blixard.WantRemove: 3}
		var kept *state.View
		var keptHash uint64
		drawLog(t, func(s *state.State, _ []byte) {
			v := s.View()
			if kept != nil && kept.Hash() != keptHash {
				t.Fatal("a view changed")
			}
			kept, keptHash = v, v.Hash()
			live := map[blixard.InstanceID]int{}
			v.Instances(func(i *blixard.Instance) bool {
				key := i.Incarnation()
				if old := states[key]; old != nil {
					if old.State != i.State && !reaches(old.State, i.State) || rank[i.Wanted] < rank[old.Wanted] || old.Node != i.Node {
						t.Fatalf("%s went from %s/%s on %s to %s/%s on %s", key, old.State, old.Wanted, old.Node, i.State, i.Wanted, i.Node)
					}
				} else {
					if i.Generation <= highest[i.ID] {
						t.Fatalf("%s appears after generation %d", key, highest[i.ID])
					}
					highest[i.ID] = i.Generation
				}
				states[key] = i
				if !i.State.Terminal() {
					live[i.ID]++
				}
				if live[i.ID] > 1 {
					t.Fatalf("%s has two live incarnations", i.ID)
				}
				if v.VM(i.VM) == nil {
					t.Fatalf("%s has no VM", key)
				}
				if n := v.Node(i.Node); n == nil && i.State != blixard.Lost {
					t.Fatalf("%s is %s on a node that is no member", key, i.State)
				}
				return true
			})
			v.Nodes(func(n *blixard.Node) bool {
				if n.State != blixard.NodeJoining && !v.Usage(n.Name).Used.Fits(n.Allocatable()) {
					t.Fatalf("%s is overbooked", n.Name)
				}
				if v.GroupCount("g", n.Name) > 1 {
					t.Fatalf("%s holds two of an anti-affinity group", n.Name)
				}
				return true
			})
		})
	})
}

func reaches(from, to blixard.InstanceState) bool {
	for _, mid := range []blixard.InstanceState{blixard.Preparing, blixard.Starting, blixard.Running, blixard.Stopping, blixard.Stopped, blixard.Failed, blixard.Lost} {
		if blixard.CanFollow(from, to) || blixard.CanFollow(from, mid) && reaches(mid, to) {
			return true
		}
	}
	return false
}

// TestIdempotencyKeys: the same entry again changes nothing and answers the
// same; another command under the key is refused.
func TestIdempotencyKeys(t *testing.T) {
	s := state.New()
	index := uint64(0)
	do := func(c state.Command, key string) state.Result {
		index++
		results, _, err := s.Apply(index, 1, state.EncodeEntry([]state.Envelope{{Key: key, NowMS: int64(index), Command: c}}))
		if err != nil {
			t.Fatal(err)
		}
		return results[0]
	}
	spec := blixard.VMSpec{Replicas: 1}
	spec.Defaults()
	create := &state.CreateVM{Name: "a", Spec: spec}
	first := do(create, "k1")
	if again := do(create, "k1"); first.Err != nil || again.Err != nil || again.Outcome != first.Outcome {
		t.Errorf("first %+v, again %+v", first, again)
	}
	if s.View().VM("a").Version != first.Outcome.Version {
		t.Error("the second request changed the VM")
	}
	if r := do(create, "k2"); !errors.Is(r.Err, &blixard.Error{Code: blixard.CodeExists}) || r.Err.Version != first.Outcome.Version {
		t.Errorf("another request to create it: %+v", r)
	}
	if r, again := do(create, "k2"), do(create, "k2"); r.Err == nil || again.Err == nil || *r.Err != *again.Err {
		t.Errorf("a refusal is not remembered: %v, %v", r.Err, again.Err)
	}
	if r := do(&state.DeleteVM{Name: "a"}, "k1"); !errors.Is(r.Err, &blixard.Error{Code: blixard.CodeConflict}) {
		t.Errorf("another command under the same key: %+v", r)
	}
	s = restore(t, s.View())
	if again := do(create, "k1"); again.Err != nil || again.Outcome != first.Outcome {
		t.Errorf("after a restore: %+v", again)
	}
}

// TestBatch: all or nothing, and the refusal names the item.
func TestBatch(t *testing.T) {
	spec := blixard.VMSpec{Replicas: 1}
	spec.Defaults()
	create := func(name blixard.VMName) state.Command { return &state.CreateVM{Name: name, Spec: spec} }
	for _, c := range []struct {
		name     string
		commands []state.Command
		message  string
		vms      int
	}{
		{"all", []state.Command{create("a"), create("b")}, "", 2},
		{"none", []state.Command{create("a"), create("b"), create("a")}, `item 3: a VM named "a" exists at version 1`, 0},
		{"nested", []state.Command{create("a"), &state.Batch{Commands: []state.Command{create("b")}}}, "item 2: a batch cannot hold a batch", 0},
		{"empty", nil, "", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := state.New()
			results, changes, err := s.Apply(1, 1, state.EncodeEntry([]state.Envelope{{Command: &state.Batch{Commands: c.commands}}}))
			if err != nil {
				t.Fatal(err)
			}
			message := ""
			if results[0].Err != nil {
				message = results[0].Err.Message
			}
			if message != c.message || s.View().VMCount() != c.vms {
				t.Errorf("%q and %d VMs, want %q and %d", message, s.View().VMCount(), c.message, c.vms)
			}
			if c.vms == 0 && len(changes) > 0 {
				t.Errorf("changes of a refused batch: %v", changes)
			}
		})
	}
}
