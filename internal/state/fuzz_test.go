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
		state.EncodeEntry([]state.Envelope{{Command: &state.Bootstrap{ClusterID: "c", RaftID: 1, Node: id}}, {Key: "k", Command: create}}),
		state.EncodeEntry([]state.Envelope{{Command: &state.Batch{Commands: []state.Command{create, &state.DeleteVM{Name: "a"}}}}}),
		state.EncodeEntry([]state.Envelope{{Command: &state.Observe{Node: "n1", RaftID: 1, Items: []state.Observation{{VM: "a", Ordinal: 1, Generation: 1, State: blixard.Running}}}}}),
		state.EncodeEntry([]state.Envelope{{Command: &state.PreemptInstances{VM: "a", UID: 1, Ordinal: 1, Node: "n1", Victims: []state.Victim{{VM: "a", Ordinal: 2, Generation: 1}}}}}),
	}
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
