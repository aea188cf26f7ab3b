package api

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

const (
	// askImageFor bounds the question to one node whether it has an image.
	askImageFor = 3 * time.Second
	// listImagesFor bounds the question to one node what images it has.
	listImagesFor = 10 * time.Second
	// maxImageAsks is how many nodes are asked at once.
	maxImageAsks = 16
	// copyEvery is how often a node looks whether its images are kept elsewhere.
	copyEvery = 30 * time.Second
	// copyAfter is how long an image has to be alone before another node gets it:
	// a machine that restarts is back by then.
	copyAfter = 2 * time.Minute
)

// newImage tells whether a VM would get an imported image that it does not have.
// One that has it already can be changed while the image's nodes are away.
func (h *Handler) newImage(name blixard.VMName, image string) bool {
	if !strings.HasPrefix(image, digestPrefix) {
		return false
	}
	vm := h.opt.Backend.View().VM(name)
	return vm == nil || vm.Spec.Image != image
}

// checkImage refuses an image that no node keeps, when it is asked for and not
// by instances that fail one after the other. A node that does not answer might
// have it.
func (h *Handler) checkImage(ctx context.Context, name blixard.VMName, image string) error {
	if h.opt.Images == nil || !h.newImage(name, image) {
		return nil
	}
	found, err := h.hasImage(ctx, strings.TrimPrefix(image, digestPrefix))
	if err == nil && !found {
		err = &blixard.Error{
			Code: blixard.CodeNotFound, Field: "spec.image", Message: "no node keeps the image " + image,
			Hint: "`blixard image list` lists those that the answering node keeps; `blixard image import PATH` imports one",
		}
	}
	return err
}

// hasImage tells whether this node or another one keeps an image, or might.
func (h *Handler) hasImage(ctx context.Context, digest string) (bool, error) {
	found, err := h.opt.Images.Has(ctx, digest)
	if found || err != nil || h.opt.Peers == nil {
		return found, err
	}
	var mu sync.Mutex
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(maxImageAsks)
	for _, address := range h.otherNodes() {
		group.Go(func() error {
			has, err := h.peerHasImage(ctx, address, digest)
			if err != nil && ctx.Err() == nil {
				h.opt.Log.Warn("a node does not say whether it has an image", "address", address, "digest", digest, "error", err)
			}
			mu.Lock()
			defer mu.Unlock()
			found = found || has || err != nil
			return nil
		})
	}
	err = group.Wait()
	return found, err
}

func (h *Handler) peerHasImage(ctx context.Context, address, digest string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, askImageFor)
	defer cancel()
	peer, err := h.opt.Peers(address)
	if err != nil {
		return false, err
	}
	defer peer.Close()
	return peer.HasImage(ctx, digestPrefix+digest)
}

// KeepImageCopies deletes images of this node that were removed from the
// cluster, and gives those that remain a second copy when the node that had it is
// lost, until ctx ends. A node acts for the images that no other node
// has: there is one such node for each image, so that nobody has to agree.
func (h *Handler) KeepImageCopies(ctx context.Context) error {
	tick := time.NewTicker(copyEvery)
	defer tick.Stop()
	var alone aloneImages
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			h.dropRemoved(ctx)
			h.copyImages(ctx, &alone, now)
		}
	}
}

// aloneImages remembers since when each image has no copy elsewhere.
type aloneImages map[string]time.Time

// due tells which of the images that are alone now have been so for long
// enough, and forgets the others.
func (a *aloneImages) due(now time.Time, alone []ImageInfo) []ImageInfo {
	next := make(aloneImages, len(alone))
	var due []ImageInfo
	for _, image := range alone {
		since, before := (*a)[image.Digest]
		if !before {
			since = now
		}
		next[image.Digest] = since
		if now.Sub(since) >= copyAfter {
			due = append(due, image)
		}
	}
	*a = next
	return due
}

// copyImages looks once, and copies what is due.
func (h *Handler) copyImages(ctx context.Context, alone *aloneImages, now time.Time) {
	if h.opt.Images == nil || h.opt.Peers == nil || len(h.otherNodes()) == 0 {
		return
	}
	single, err := h.imagesHereOnly(ctx)
	if err != nil {
		h.opt.Log.Debug("looking for copies of images", "error", err) // it is looked again soon
		return
	}
	for _, image := range alone.due(now, single) {
		if err := h.secondCopy(ctx, &image); err != nil {
			h.opt.Log.Warn("an image has no second copy", "event", "image_alone", "digest", image.Digest, "error", err)
			continue
		}
		h.opt.Log.Info("an image has a second copy again", "event", "image_copied", "digest", image.Digest)
	}
}

// imagesHereOnly are the imported images that no other node in touch keeps. It
// is an error when one of them does not say.
func (h *Handler) imagesHereOnly(ctx context.Context) ([]ImageInfo, error) {
	here, err := h.opt.Images.List(ctx)
	if err != nil {
		return nil, err
	}
	imported := here[:0]
	for _, image := range here {
		if !image.Builtin {
			imported = append(imported, image)
		}
	}
	if len(imported) == 0 {
		return nil, nil
	}
	elsewhere := map[string]bool{}
	for _, address := range h.otherNodes() {
		list, err := h.peerImages(ctx, address)
		if err != nil {
			return nil, fmt.Errorf("asking %s for its images: %w", address, err)
		}
		for _, image := range list {
			elsewhere[strings.TrimPrefix(image.GetDigest(), digestPrefix)] = true
		}
	}
	single := imported[:0]
	for _, image := range imported {
		if !elsewhere[image.Digest] {
			single = append(single, image)
		}
	}
	return single, nil
}

func (h *Handler) peerImages(ctx context.Context, address string) ([]*blixardv1.Image, error) {
	ctx, cancel := context.WithTimeout(ctx, listImagesFor)
	defer cancel()
	peer, err := h.opt.Peers(address)
	if err != nil {
		return nil, err
	}
	defer peer.Close()
	list, err := peer.ListImages(ctx, &blixardv1.ListImagesRequest{})
	return list.GetImages(), err
}
