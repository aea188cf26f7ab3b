package state_test

import (
	"bytes"
	"testing"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

func seedEntries() [][]byte {
	spec := blixard.VMSpec{Replicas: 2, Constraints: []blixard.Constraint{{Key: "a", Op: "=", Value: "b"}}, Health: &blixard.HealthCheck{Kind: "tcp", Port: 1}}
	spec.Defaults()
	create := &state.CreateVM{Name: "a", Spec: spec, Start: true}
	id := state.NodeIdentity{Name: "n1", Address: "x"}
	return [][]byte{
		state.EncodeEntry(nil),
		state.EncodeEntry([]state.Envelope{{Command: &state.Bootstrap{ClusterID: "c", RaftID: 1, Node: id, FeatureLevel: 2}}, {Key: "k", Command: create}}),
		state.EncodeEntry([]state.Envelope{{Command: &state.Batch{Commands: []state.Command{create, &state.DeleteVM{Name: "a"}}}}}),
		state.EncodeEntry([]state.Envelope{{Command: &state.Observe{Node: "n1", RaftID: 1, Items: []state.Observation{{VM: "a", Ordinal: 1, Generation: 1, State: blixard.Running}}}}}),
		state.EncodeEntry([]state.Envelope{{Command: &state.PreemptInstances{VM: "a", UID: 1, Ordinal: 1, Node: "n1", Victims: []state.Victim{{VM: "a", Ordinal: 2, Generation: 1}}}}}),
		state.EncodeEntry(functionSeeds()),
	}
}

// functionSeeds are commands about functions that can be applied one after
// another.
func functionSeeds() []state.Envelope {
	spec := blixard.FunctionSpec{Placement: blixard.FunctionPlacement{Strategies: []string{"best-fit"}, Constraints: []blixard.Constraint{{Key: "a", Op: "=", Value: "b"}}, Preferences: []blixard.Preference{{Constraint: blixard.Constraint{Key: "gpu", Op: "=", Value: "yes"}, Weight: 5}}}}
	spec.Defaults()
	var out []state.Envelope
	for _, c := range []state.Command{
		&state.CreateFunction{Name: "f", Spec: spec, CodeDigest: digest(1), Publish: true, Tags: []blixard.Label{{Key: "a", Value: "b"}}},
		&state.ReportNode{Name: "n1", RaftID: 1, Address: "x", FeatureLevel: 2},
		&state.ReportFunction{Function: "f", Seq: 3, State: blixard.FunctionActive},
		&state.UpdateFunction{Name: "f", CodeDigest: digest(2)},
		&state.SetAlias{Function: "f", Alias: blixard.FunctionAlias{Name: "live", Number: 1}},
		&state.SetFunction{
			Name: "f", Concurrency: &state.ConcurrencyChange{Max: 3}, Limits: &state.LimitsChange{RateLimit: 1}, Trigger: &blixard.Trigger{ID: "t", Kind: "http", Path: "/a"},
			URL:    &state.URLChange{URL: blixard.FunctionURL{ID: "u", Auth: "NONE", InvokeMode: "BUFFERED", CORS: &blixard.CORS{AllowOrigins: []string{"*"}}}},
			Policy: &blixard.PolicyStatement{ID: "s", JSON: "{}"}, Async: &blixard.AsyncConfig{MaxAgeMS: 60_000}, SetTags: []blixard.Label{{Key: "c", Value: "d"}}, DropTags: []string{"a"},
		},
		&state.LeaseSlots{Function: "f", Node: "n1", Want: 2},
		&state.ReturnSlots{Function: "f", Node: "n1", Count: 1},
		&state.EnqueueEvent{ID: "e", Function: "f", Payload: []byte("{}"), Owner: "n1"},
		&state.SettleEvent{ID: "e", Owner: "n1", Result: state.SettleDead, Condition: "x", Next: &state.EnqueueEvent{ID: "e2", Function: "f"}},
		&state.TakeEvents{Node: "n1", Most: 5},
		&state.SettleEvent{ID: "e2", Owner: "n1", Result: state.SettleDead},
		&state.ReplayEvent{ID: "e2", Node: "n1"},
		&state.CreateAccessKey{Key: blixard.AccessKey{ID: "BLXAAAAAAAAAAAAAAAAA"}},
	} {
		out = append(out, state.Envelope{NowMS: 5, Command: c})
	}
	return out
}

// TestSeedsOfFunctions: the fuzzers begin with commands that do something.
func TestSeedsOfFunctions(t *testing.T) {
	s := state.New()
	for i, e := range [][]byte{seedEntries()[1], state.EncodeEntry(functionSeeds())} {
		results, _, err := s.Apply(uint64(i+1), 1, e)
		if err != nil {
			t.Fatal(err)
		}
		for k, r := range results {
			if r.Err != nil {
				t.Errorf("entry %d, command %d: %v", i, k, r.Err)
			}
		}
	}
	restore(t, s.View())
}

// FuzzDecodeEntry: foreign bytes never panic, neither when decoded nor, if they
// decode, when applied; and applying them twice gives the same state.
func FuzzDecodeEntry(f *testing.F) {
	for _, e := range seedEntries() {
		f.Add(e)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		envelopes, err := state.DecodeEntry(data)
		if err != nil {
			return
		}
		var hashes [2]uint64
		for i := range hashes {
			s := state.New()
			if _, _, err := s.Apply(1, 1, seedEntries()[1]); err != nil {
				t.Fatal(err)
			}
			if _, _, err := s.Apply(2, 1, data); err != nil {
				t.Fatalf("decoded, but not applied: %v", err)
			}
			hashes[i] = s.View().Hash()
		}
		if hashes[0] != hashes[1] {
			t.Fatal("applied twice with two outcomes")
		}
		if again, err := state.DecodeEntry(state.EncodeEntry(envelopes)); err != nil || len(again) != len(envelopes) {
			t.Fatalf("encoded again: %v", err)
		}
	})
}

// FuzzRead: a foreign snapshot never panics; one that is read can be written
// and read again.
func FuzzRead(f *testing.F) {
	s := state.New()
	for i, e := range seedEntries() {
		if _, _, err := s.Apply(uint64(i+1), 1, e); err != nil {
			f.Fatal(err)
		}
	}
	var b bytes.Buffer
	if _, err := s.View().WriteTo(&b); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Add([]byte("BLXSTATE"))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := state.Read(bytes.NewReader(data))
		if err != nil {
			return
		}
		var b bytes.Buffer
		if _, err := s.View().WriteTo(&b); err != nil {
			t.Fatal(err)
		}
		if _, err := state.Read(&b); err != nil {
			t.Fatalf("written, but not read again: %v", err)
		}
	})
}
