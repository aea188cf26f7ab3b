package api_test

import (
	"context"
	"strings"
	"testing"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// keeps tells whether a node keeps an image.
func (s *site) keeps(node, digest string) bool {
	s.t.Helper()
	has, err := s.images[node].Has(s.t.Context(), strings.TrimPrefix(digest, "sha256:"))
	if err != nil {
		s.t.Fatal(err)
	}
	return has
}

// TestDeleteImage: an image goes from all nodes, from one that was away when it
// is back, and stays as long as it is used.
func TestDeleteImage(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3)
	c := s.client("node1")
	kept, err := c.PutImage(short(t), "", strings.NewReader("bundle"), -1)
	if err != nil {
		t.Fatal(err)
	}
	for _, node := range []string{"node1", "node2", "node3"} {
		if _, err := s.images[node].Import(t.Context(), strings.NewReader("bundle"), ""); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.CreateVM(short(t), &blixardv1.CreateVMRequest{Name: "web", Spec: &blixardv1.VMSpec{Image: kept.Digest}}); err != nil {
		t.Fatal(err)
	}
	remove := &blixardv1.DeleteImageRequest{Digest: kept.Digest}
	_, err = c.DeleteImage(short(t), remove)
	if e := wantCode(t, err, blixard.CodeRefused); !strings.Contains(e.Message, "VM web uses the image") || e.Hint == "" {
		t.Errorf("%+v", e)
	}
	if _, err := c.DeleteVM(short(t), &blixardv1.DeleteVMRequest{Name: "web"}); err != nil {
		t.Fatal(err)
	}
	if s.cluster.View().VM("web") != nil {
		t.Fatal("a VM without instances does not go at once")
	}
	if change, err := c.DeleteImage(short(t), &blixardv1.DeleteImageRequest{Digest: kept.Digest, DryRun: true}); err != nil || change.Noop || !s.keeps("node1", kept.Digest) {
		t.Errorf("dry run: %v, %v", change, err)
	}
	if err := s.servers["node3"].Close(); err != nil { // it is away
		t.Fatal(err)
	}
	if change, err := c.DeleteImage(short(t), remove); err != nil || change.Noop {
		t.Fatalf("%v, %v", change, err)
	}
	if s.keeps("node1", kept.Digest) || s.keeps("node2", kept.Digest) || !s.keeps("node3", kept.Digest) {
		t.Error("it is not gone from where it can be, or from where it cannot")
	}
	if change, err := c.DeleteImage(short(t), remove); err != nil || !change.Noop {
		t.Errorf("again: %v, %v", change, err)
	}
	// What was removed cannot be used, though one node still keeps it.
	_, err = c.CreateVM(short(t), &blixardv1.CreateVMRequest{Name: "late", Spec: &blixardv1.VMSpec{Image: kept.Digest}})
	wantCode(t, err, blixard.CodeNotFound)
	s.serving["node3"].DropRemoved(t.Context())
	if s.keeps("node3", kept.Digest) {
		t.Error("the node that was away keeps it")
	}
	// Imported again it is an image like any other.
	if _, err := c.PutImage(short(t), kept.Digest, strings.NewReader("bundle"), -1); err != nil && blixard.CodeOf(err) != blixard.CodeUnavailable {
		t.Fatal(err)
	}
	for _, node := range []string{"node1", "node2"} {
		s.serving[node].DropRemoved(t.Context())
	}
	if _, err := c.CreateVM(short(t), &blixardv1.CreateVMRequest{Name: "late", Spec: &blixardv1.VMSpec{Image: kept.Digest}}); err != nil {
		t.Errorf("after importing it again: %v", err)
	}
}

func TestDeleteImageRefuses(t *testing.T) {
	s := newSite(t, 1)
	for digest, code := range map[string]blixard.Code{
		"mine": blixard.CodeInvalid, "": blixard.CodeInvalid, "sha256:" + strings.Repeat("A", 64): blixard.CodeInvalid, "sha256:" + strings.Repeat("a", 64): blixard.CodeNotFound,
	} {
		_, err := s.client().DeleteImage(context.WithoutCancel(short(t)), &blixardv1.DeleteImageRequest{Digest: digest})
		wantCode(t, err, code)
	}
}
