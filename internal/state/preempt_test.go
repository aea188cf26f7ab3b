package state_test

import (
	"strings"
	"testing"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// TestPreemptInstances: what a preemption was decided upon is checked again
// when it is applied, and one that does not hold leaves no trace.
func TestPreemptInstances(t *testing.T) {
	build := func(t *testing.T) *state.State {
		s := state.New()
		var all []state.Envelope
		add := func(c state.Command) { all = append(all, state.Envelope{NowMS: 1, Actor: "t", Command: c}) }
		add(&state.Bootstrap{ClusterID: "c", RaftID: 1, Node: state.NodeIdentity{Name: "n1", Address: "n1"}})
		add(&state.ReportNode{Name: "n1", RaftID: 1, Address: "n1", Capacity: blixard.Resources{MilliCPU: 8000, MemoryMiB: 8192, DiskMiB: 1}})
		add(&state.JoinNode{Node: state.NodeIdentity{Name: "n2", Address: "n2"}})
		add(&state.ReportNode{Name: "n2", RaftID: 2, Address: "n2", Capacity: blixard.Resources{MilliCPU: 8000, MemoryMiB: 6144, DiskMiB: 1}})
		for _, vm := range []struct {
			name     blixard.VMName
			gib      int64
			priority int
			node     blixard.NodeName
		}{{"low", 3, 100, "n1"}, {"mid", 3, 300, "n1"}, {"peer", 2, 900, "n1"}, {"far", 2, 100, "n2"}, {"high", 4, 900, ""}} {
			spec := blixard.VMSpec{Replicas: 1, MemoryMiB: vm.gib << 10, Priority: vm.priority}
			spec.Defaults()
			add(&state.CreateVM{Name: vm.name, Spec: spec, Start: true})
			if vm.node != "" {
				add(&state.PlaceInstance{VM: vm.name, Ordinal: 1, Generation: 1, SpecVersion: 1, Node: vm.node})
			}
		}
		for i := range all { // the UID is known once the VM is created
			if p, ok := all[i].Command.(*state.PlaceInstance); ok {
				p.UID = s.View().VM(p.VM).UID
			}
			results, _, err := s.Apply(uint64(i+1), 1, state.EncodeEntry(all[i:i+1]))
			if err != nil || results[0].Err != nil {
				t.Fatalf("%+v: %v %v", all[i].Command, err, results)
			}
		}
		return s
	}
	victims := func(names ...blixard.VMName) (out []state.Victim) {
		for _, n := range names {
			out = append(out, state.Victim{VM: n, Ordinal: 1, Generation: 1})
		}
		return out
	}
	for _, c := range []struct {
		name   string
		before state.Command
		change func(*state.PreemptInstances)
		want   string // refusal; "" if it is accepted
	}{
		{name: "as decided"},
		{name: "an equal", change: func(m *state.PreemptInstances) { m.Victims = victims("low", "peer") }, want: "priority of peer-1 is not below"},
		{name: "not enough", change: func(m *state.PreemptInstances) { m.Victims = victims("low") }, want: "would not take it all the same"},
		{name: "one twice", change: func(m *state.PreemptInstances) { m.Victims = victims("low", "low") }, want: "does not run on n1 any more"},
		{name: "nobody", change: func(m *state.PreemptInstances) { m.Victims = nil }, want: "0 incarnations to preempt"},
		{name: "one that is elsewhere", change: func(m *state.PreemptInstances) { m.Victims = victims("low", "mid", "far") }, want: "does not run on n1 any more"},
		{name: "a node with room", change: func(m *state.PreemptInstances) { m.Node, m.Victims = "n2", victims("far") }, want: "has room without preempting"},
		{name: "a former epoch", change: func(m *state.PreemptInstances) { m.NodeEpoch = 1 }, want: "was lost or removed"},
		{name: "a former VM", change: func(m *state.PreemptInstances) { m.UID++ }, want: "there is no VM named high"},
		{name: "a slot that is taken", change: func(m *state.PreemptInstances) { m.Succeeds = 7 }, want: "was changed meanwhile"},
		{name: "a slot too many", change: func(m *state.PreemptInstances) { m.Ordinal = 2 }, want: "slot 2 of high is not wanted"},
		{name: "stopped", before: &state.SetVM{Name: "high", Verb: state.VerbStop}, want: "is not to be placed now"},
		{name: "maintenance", before: &state.SetMaintenance{On: true}, want: "is not to be placed now"},
		{name: "a victim that ends", before: &state.EndInstance{VM: "mid", Ordinal: 1, Generation: 1, Wanted: blixard.WantStop}, want: "mid-1#1 does not run"},
		{
			name: "one that ends already", before: &state.EndInstance{VM: "mid", Ordinal: 1, Generation: 1, Wanted: blixard.WantStop},
			change: func(m *state.PreemptInstances) { m.Victims = victims("low") },
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := build(t)
			apply := func(command state.Command) state.Result {
				results, _, err := s.Apply(s.Index()+1, 1, state.EncodeEntry([]state.Envelope{{NowMS: 2, Command: command}}))
				if err != nil {
					t.Fatal(err)
				}
				return results[0]
			}
			if c.before != nil {
				apply(c.before)
			}
			m := &state.PreemptInstances{VM: "high", UID: s.View().VM("high").UID, Ordinal: 1, SpecVersion: 1, Node: "n1", Victims: victims("low", "mid")}
			if c.change != nil {
				c.change(m)
			}
			r := apply(m)
			if c.want != "" {
				if r.Err == nil || !strings.Contains(r.Err.Message, c.want) {
					t.Fatalf("got %v, want a refusal with %q", r.Err, c.want)
				}
				if i := s.View().Instance("low", 1, 1); i.Wanted != blixard.WantRun {
					t.Errorf("a refused preemption wants %s to %s", i.ID, i.Wanted)
				}
				return
			}
			if r.Err != nil {
				t.Fatal(r.Err)
			}
			var events []string
			s.View().Events(func(e *state.Event) bool {
				if strings.HasPrefix(e.Kind, "Preempt") {
					events = append(events, string(e.VM)+": "+e.Message)
				}
				return true
			})
			text := strings.Join(events, "\n")
			for _, want := range []string{"high: makes room on n1: ends low-1", "low: preempted by high-1 (priority 900); its own priority is 100"} {
				if !strings.Contains(text, want) {
					t.Errorf("no event tells %q:\n%s", want, text)
				}
			}
			if i := s.View().Instance("low", 1, 1); i.Wanted != blixard.WantStop || i.WantReason != "preempted by high-1 (priority 900)" {
				t.Errorf("the victim is to %s: %s", i.Wanted, i.WantReason)
			}
		})
	}
}
