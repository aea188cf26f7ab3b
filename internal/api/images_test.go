package api_test

import (
	"bytes"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
	"github.com/blixard/blixard/internal/state"
)

func TestImageWithoutSecondCopy(t *testing.T) {
	s := newSite(t, 2)
	s.servers["node1"].Close()
	_, err := s.client("node2").PutImage(short(t), "", strings.NewReader("bundle"), -1)
	wantCode(t, err, blixard.CodeUnavailable)
	alone := newSite(t, 1)
	if _, err := alone.client("node1").PutImage(short(t), "", strings.NewReader("bundle"), -1); err != nil {
		t.Errorf("on a single node: %v", err)
	}
}

func TestImages(t *testing.T) {
	s := newSite(t, 2)
	content := bytes.Repeat([]byte("bundle"), 1<<20)
	kept, err := s.client("node2").PutImage(short(t), "", bytes.NewReader(content), int64(len(content)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.client("node2").PutImage(short(t), kept.Digest, bytes.NewReader(content), -1); err != nil {
		t.Errorf("again: %v", err)
	}
	wrong := "sha256:" + strings.Repeat("0", 64)
	_, err = s.client("node2").PutImage(short(t), wrong, strings.NewReader("other"), -1)
	wantCode(t, err, blixard.CodeInvalid)

	// An upload is acknowledged when a second node has it.
	if other, err := s.images["node1"].List(t.Context()); err != nil || len(other) != 1 || "sha256:"+other[0].Digest != kept.Digest {
		t.Errorf("the second copy: %v, %v", other, err)
	}
	// A node that does not have it gets it from another.
	s.images["node1"].Forget()
	archive, _, err := s.client("node1").GetImage(short(t), kept.Digest)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(archive)
	if closeErr := archive.Close(); err != nil || closeErr != nil || !bytes.Equal(got, content) {
		t.Errorf("%v, %v, %d bytes", err, closeErr, len(got))
	}
	_, _, err = s.client("node1").GetImage(short(t), wrong)
	wantCode(t, err, blixard.CodeNotFound)
	list, err := s.client("node2").ListImages(short(t), &blixardv1.ListImagesRequest{})
	if err != nil || len(list.Images) != 1 || list.Images[0].Digest != kept.Digest {
		t.Errorf("%v, %v", list, err)
	}
	stranger, err := client.New(client.Options{Addresses: []string{s.urls["node1"]}, Token: "wrong"})
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	_, _, err = stranger.GetImage(short(t), kept.Digest)
	wantCode(t, err, blixard.CodeDenied)
}

func TestHasImage(t *testing.T) {
	s := newSite(t, 3)
	kept, err := s.client("node1").PutImage(short(t), "", strings.NewReader("bundle"), -1)
	if err != nil {
		t.Fatal(err)
	}
	has := func(node, digest string, want bool) {
		t.Helper()
		if got, err := s.client(node).HasImage(short(t), digest); err != nil || got != want {
			t.Errorf("%s has %s: %v, %v", node, digest, got, err)
		}
	}
	for _, node := range []string{"node1", "node2", "node3"} { // some ask others
		has(node, kept.Digest, true)
		has(node, "sha256:"+strings.Repeat("0", 64), false)
	}
	stranger, err := client.New(client.Options{Addresses: []string{s.urls["node1"]}, Token: "wrong", RetryFor: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	if has, err := stranger.HasImage(short(t), kept.Digest); err == nil || has {
		t.Errorf("a stranger is told: %v, %v", has, err)
	}
}

// TestImageOfAVM: what no node keeps is refused, unless one cannot be asked or
// the VM has it already.
func TestImageOfAVM(t *testing.T) {
	s := newSite(t, 2)
	c := s.client("node1")
	kept, err := c.PutImage(short(t), "", strings.NewReader("bundle"), -1)
	if err != nil {
		t.Fatal(err)
	}
	lost := "sha256:" + strings.Repeat("0", 64)
	create := func(name, image string) error {
		_, err := c.CreateVM(short(t), &blixardv1.CreateVMRequest{Name: name, Spec: &blixardv1.VMSpec{Image: image}})
		return err
	}
	if err := create("web", kept.Digest); err != nil {
		t.Error(err)
	}
	if e := wantCode(t, create("nothing", lost), blixard.CodeNotFound); e.Field != "spec.image" || !strings.Contains(e.Hint, "import") {
		t.Errorf("%+v", e)
	}
	_, err = c.UpdateVM(short(t), &blixardv1.UpdateVMRequest{Name: "web", Spec: &blixardv1.VMSpec{Image: lost}})
	wantCode(t, err, blixard.CodeNotFound)
	_, err = c.ApplyVMs(short(t), &blixardv1.ApplyVMsRequest{Vms: []*blixardv1.VMDocument{{Name: "a", Spec: &blixardv1.VMSpec{}}, {Name: "b", Spec: &blixardv1.VMSpec{Image: lost}}}})
	if e := wantCode(t, err, blixard.CodeNotFound); e.Field != "vms[1].spec.image" {
		t.Errorf("%+v", e)
	}

	s.images["node1"].Forget()
	s.images["node2"].Forget()
	if _, err := c.UpdateVM(short(t), &blixardv1.UpdateVMRequest{Name: "web", Spec: &blixardv1.VMSpec{Image: kept.Digest, MemoryMib: 1024}}); err != nil {
		t.Errorf("changing a VM whose image is lost: %v", err)
	}
	wantCode(t, create("new", kept.Digest), blixard.CodeNotFound)
	if err := s.servers["node2"].Close(); err != nil {
		t.Fatal(err)
	}
	if err := create("perhaps", kept.Digest); err != nil {
		t.Errorf("with a node that cannot be asked: %v", err)
	}
}

// TestLostCopyIsMadeAgain: when the node with the second copy is lost for good,
// another one gets one, from the node that is left alone with it and no other.
func TestLostCopyIsMadeAgain(t *testing.T) {
	s := newSite(t, 3)
	kept, err := s.client("node1").PutImage(short(t), "", strings.NewReader("bundle"), -1)
	if err != nil {
		t.Fatal(err)
	}
	digest := strings.TrimPrefix(kept.Digest, "sha256:")
	holders := func() (out []string) {
		for _, node := range []string{"node1", "node2", "node3"} {
			if has, err := s.images[node].Has(t.Context(), digest); err != nil {
				t.Fatal(err)
			} else if has {
				out = append(out, node)
			}
		}
		return out
	}
	look := func(nodes ...string) {
		for _, node := range nodes {
			s.serving[node].CopyImagesTwice(short(t))
		}
	}
	before := holders()
	if len(before) != 2 {
		t.Fatalf("kept by %v", before)
	}
	look("node1", "node2", "node3")
	if got := holders(); !slices.Equal(got, before) {
		t.Errorf("with two copies a third was made: %v", got)
	}

	lost := before[1]
	if err := s.servers[lost].Close(); err != nil {
		t.Fatal(err)
	}
	// As long as the node counts as one in touch, it might have what it does not
	// tell.
	look(before[0])
	if got := holders(); !slices.Equal(got, before) {
		t.Errorf("kept by %v", got)
	}
	s.cluster.Must(&state.LoseNode{Name: blixard.NodeName(lost), Epoch: s.cluster.View().Node(blixard.NodeName(lost)).Epoch})
	s.images[lost].Forget()
	look("node1", "node2", "node3")
	want := slices.DeleteFunc([]string{"node1", "node2", "node3"}, func(n string) bool { return n == lost })
	if got := holders(); !slices.Equal(got, want) {
		t.Errorf("after the loss of %s it is kept by %v", lost, got)
	}
}
