package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/client"
	"github.com/blixard/blixard/internal/agent"
	"github.com/blixard/blixard/internal/api"
	"github.com/blixard/blixard/internal/image"
	"github.com/blixard/blixard/internal/state"
	"github.com/blixard/blixard/internal/vmm"
)

// bundles makes images bootable on this node: from its own store, or fetched
// from another node and checked against the digest.
type bundles struct {
	store image.Store
	peers func(address string) (*client.Client, error)
	view  func() *state.View
	self  blixard.NodeName
}

// Bundle implements agent.Images.
func (b *bundles) Bundle(ctx context.Context, ref string) (agent.Bundle, error) {
	if ref == "builtin" {
		bundle, err := b.store.Builtin(ctx)
		if err != nil {
			return agent.Bundle{}, fmt.Errorf("building the builtin image: %w", err)
		}
		return toAgent(bundle, false), nil
	}
	digest, ok := strings.CutPrefix(ref, "sha256:")
	if !ok {
		return agent.Bundle{}, blixard.Errorf(blixard.CodeInvalid, "the image %q is neither builtin nor sha256:<digest>", ref)
	}
	bundle, err := b.store.Get(digest)
	if errors.Is(err, image.ErrNotFound) {
		bundle, err = b.fetch(ctx, digest)
	}
	if err != nil {
		return agent.Bundle{}, err
	}
	return toAgent(bundle, true), nil
}

// fetch asks every other node for the image until one has it.
func (b *bundles) fetch(ctx context.Context, digest string) (image.Bundle, error) {
	var failed []error
	var nodes []*blixard.Node
	b.view().Nodes(func(n *blixard.Node) bool {
		if n.Name != b.self && n.State == blixard.NodeReady {
			nodes = append(nodes, n)
		}
		return true
	})
	for _, n := range nodes {
		bundle, err := b.fetchFrom(ctx, n.Address, digest)
		if err == nil {
			return bundle, nil
		}
		failed = append(failed, fmt.Errorf("%s: %w", n.Name, err))
	}
	return image.Bundle{}, fmt.Errorf("no node could give the image sha256:%.12s…: %w", digest, errors.Join(failed...))
}

func (b *bundles) fetchFrom(ctx context.Context, address, digest string) (bundle image.Bundle, err error) {
	c, err := b.peers(address)
	if err != nil {
		return bundle, err
	}
	defer c.Close()
	stream, _, err := c.GetImage(ctx, "sha256:"+digest)
	if err != nil {
		return bundle, err
	}
	defer func() { err = errors.Join(err, stream.Close()) }()
	return b.store.ImportTar(ctx, stream, digest)
}

// toAgent hands a bundle on. A user's own image may or may not hold
// blixard-guest.
func toAgent(b image.Bundle, users bool) agent.Bundle {
	out := agent.Bundle{Kernel: b.Kernel, Initrd: b.Initrd, Cmdline: b.Cmdline, Command: b.DefaultCommand, MaybeGuest: users}
	for _, d := range b.Disks {
		out.Disks = append(out.Disks, vmm.Disk{Path: d.Path, Format: d.Format, Overlay: true})
	}
	return out
}

// imageStore is the node's image store as the API sees it.
type imageStore struct{ store image.Store }

// List implements api.Images.
func (s imageStore) List(context.Context) ([]api.ImageInfo, error) {
	all, err := s.store.List()
	if err != nil {
		return nil, err
	}
	builtin, err := s.store.Builtins()
	if err != nil {
		return nil, err
	}
	out := make([]api.ImageInfo, len(all))
	for i := range all {
		out[i] = imageInfo(all[i])
		if out[i].Builtin = slices.Contains(builtin, all[i].Digest); out[i].Builtin {
			out[i].Description = "the builtin guest"
		}
	}
	return out, nil
}

// Has implements api.Images.
func (s imageStore) Has(_ context.Context, digest string) (bool, error) {
	_, err := s.store.Get(digest)
	if errors.Is(err, image.ErrNotFound) || errors.Is(err, image.ErrInvalid) {
		return false, nil
	}
	return err == nil, err
}

// Export implements api.Images.
func (s imageStore) Export(ctx context.Context, digest string, w io.Writer) error {
	if _, err := s.store.Get(digest); errors.Is(err, image.ErrNotFound) {
		return &blixard.Error{Code: blixard.CodeNotFound, Message: "this node has no image sha256:" + digest}
	}
	return s.store.Export(ctx, digest, w)
}

// Import implements api.Images. An archive that comes with a digest is one that
// another node exported; one that comes without is what a user has: a root file
// system or a bundle directory, as a tar.
func (s imageStore) Import(ctx context.Context, r io.Reader, digest string) (info api.ImageInfo, err error) {
	if digest != "" {
		b, err := s.store.ImportTar(ctx, r, digest)
		return imageInfo(b), invalidImage(err)
	}
	tmp, err := os.CreateTemp(s.store.Root, "upload-*.tar")
	if errors.Is(err, os.ErrNotExist) {
		if err = os.MkdirAll(s.store.Root, 0o700); err == nil {
			tmp, err = os.CreateTemp(s.store.Root, "upload-*.tar")
		}
	}
	if err != nil {
		return info, fmt.Errorf("receiving an image: %w", err)
	}
	defer func() { err = errors.Join(err, tmp.Close(), os.Remove(tmp.Name())) }()
	if _, err := io.Copy(tmp, r); err != nil {
		return info, fmt.Errorf("receiving an image: %w", err)
	}
	b, err := s.store.Import(ctx, tmp.Name())
	return imageInfo(b), invalidImage(err)
}

// Remove implements api.Images.
func (s imageStore) Remove(_ context.Context, digest string) error { return s.store.Remove(digest) }

func invalidImage(err error) error {
	if errors.Is(err, image.ErrInvalid) {
		return &blixard.Error{Code: blixard.CodeInvalid, Field: "image", Message: err.Error(), Hint: "docs/user-guide/images.md tells what an image can be"}
	}
	return err
}

func imageInfo(b image.Bundle) api.ImageInfo {
	info := api.ImageInfo{Digest: b.Digest, Description: described(b)}
	if st, err := os.Stat(filepath.Dir(b.Kernel)); err == nil && b.Kernel != "" {
		info.CreatedMS = st.ModTime().UnixMilli()
	}
	for _, path := range append([]string{b.Kernel, b.Initrd}, diskPaths(b)...) {
		if st, err := os.Stat(path); err == nil {
			info.SizeBytes += st.Size()
		}
	}
	return info
}

// maxDescribed bounds a description, in bytes.
const maxDescribed = 80

// described tells in a few words what an image is made of.
func described(b image.Bundle) string {
	parts := []string{"kernel"}
	if b.Initrd != "" {
		parts = append(parts, "initrd")
	}
	for _, d := range b.Disks {
		parts = append(parts, d.Format+" disk")
	}
	text := strings.Join(parts, ", ")
	if len(b.DefaultCommand) > 0 {
		text += "; runs " + strings.Join(b.DefaultCommand, " ")
	}
	if len(text) > maxDescribed {
		text = strings.ToValidUTF8(text[:maxDescribed], "") + "…"
	}
	return text
}

func diskPaths(b image.Bundle) []string {
	out := make([]string, len(b.Disks))
	for i := range b.Disks {
		out[i] = b.Disks[i].Path
	}
	return out
}
