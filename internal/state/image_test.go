package state_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

func digest(n int) string { return fmt.Sprintf("%064x", n) }

// TestRemoveImage: an image in use stays, one that was removed cannot be used
// until it is back, and the state remembers a bounded number of them.
func TestRemoveImage(t *testing.T) {
	s := state.New()
	apply := func(c state.Command) (state.Outcome, error) {
		t.Helper()
		results, _, err := s.Apply(s.Index()+1, 1, state.EncodeEntry([]state.Envelope{{NowMS: 1, Actor: "me", Command: c}}))
		if err != nil {
			t.Fatal(err)
		}
		if results[0].Err != nil {
			return results[0].Outcome, results[0].Err
		}
		return results[0].Outcome, nil
	}
	must := func(c state.Command) state.Outcome {
		t.Helper()
		out, err := apply(c)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	spec := blixard.VMSpec{Image: "sha256:" + digest(1)}
	spec.Defaults()
	must(&state.CreateVM{Name: "web", Spec: spec})
	if _, err := apply(&state.RemoveImage{Digest: digest(1)}); blixard.CodeOf(err) != blixard.CodeRefused || !strings.Contains(err.Error(), "VM web") {
		t.Fatalf("in use: %v", err)
	}
	if _, err := apply(&state.RemoveImage{Digest: "mine"}); blixard.CodeOf(err) != blixard.CodeInvalid {
		t.Fatalf("no digest: %v", err)
	}
	must(&state.DeleteVM{Name: "web"})
	before := s.View()
	if out := must(&state.RemoveImage{Digest: digest(1)}); out.Noop {
		t.Fatal("it was removed already")
	}
	if before.ImageRemoved(digest(1)) || !s.View().ImageRemoved(digest(1)) {
		t.Fatal("an old view changed, or the new one did not")
	}
	if _, err := apply(&state.CreateVM{Name: "web", Spec: spec}); blixard.CodeOf(err) != blixard.CodeNotFound {
		t.Fatalf("removed: %v", err)
	}
	if _, err := apply(&state.ApplyVM{Name: "web", Spec: spec}); blixard.CodeOf(err) != blixard.CodeNotFound {
		t.Fatalf("removed: %v", err)
	}
	must(&state.RemoveImage{Digest: digest(1), Back: true})
	must(&state.CreateVM{Name: "web", Spec: spec})
	for n := 2; n < 2000; n++ {
		must(&state.RemoveImage{Digest: digest(n)})
	}
	if !s.View().ImageRemoved(digest(1999)) || s.View().ImageRemoved(digest(2)) || len(s.View().Cluster().RemovedImages) != 1024 {
		t.Fatalf("%d are remembered", len(s.View().Cluster().RemovedImages))
	}
	var snapshot bytes.Buffer
	if _, err := s.View().WriteTo(&snapshot); err != nil {
		t.Fatal(err)
	}
	read, err := state.Read(&snapshot)
	if err != nil || !read.View().ImageRemoved(digest(1999)) {
		t.Fatalf("after a snapshot: %v", err)
	}
}

// TestApplyVMExpects: a document that is about another version changes nothing,
// unless it has nothing to change.
func TestApplyVMExpects(t *testing.T) {
	s := state.New()
	apply := func(replicas int, expect uint64) (state.Outcome, error) {
		t.Helper()
		spec := blixard.VMSpec{Replicas: replicas}
		spec.Defaults()
		c := &state.ApplyVM{Name: "web", Spec: spec, ExpectVersion: expect}
		results, _, err := s.Apply(s.Index()+1, 1, state.EncodeEntry([]state.Envelope{{NowMS: 1, Command: c}}))
		if err != nil {
			t.Fatal(err)
		}
		if results[0].Err != nil {
			return results[0].Outcome, results[0].Err
		}
		return results[0].Outcome, nil
	}
	if _, err := apply(1, 7); blixard.CodeOf(err) != blixard.CodeConflict {
		t.Fatalf("a VM that is gone: %v", err)
	}
	first, err := apply(1, 0)
	if err != nil {
		t.Fatal(err)
	}
	second, err := apply(2, first.Version)
	if err != nil || second.Text != "updated" {
		t.Fatalf("%+v, %v", second, err)
	}
	_, err = apply(3, first.Version)
	if e, ok := err.(*blixard.Error); !ok || e.Code != blixard.CodeConflict || e.Version != second.Version { //nolint:errorlint // as it is returned
		t.Fatalf("stale: %v", err)
	}
	if out, err := apply(2, first.Version); err != nil || out.Text != "unchanged" {
		t.Fatalf("stale, with nothing to change: %+v, %v", out, err)
	}
	if got := s.View().VM("web").Spec.Replicas; got != 2 {
		t.Errorf("there are %d replicas", got)
	}
}
