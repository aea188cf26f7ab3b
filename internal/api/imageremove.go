package api

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
	"github.com/blixard/blixard/internal/state"
)

// tellRemovedFor bounds the word to one node that an image was removed. One that
// does not take it finds out by itself.
const tellRemovedFor = 5 * time.Second

// DeleteImage implements ImageService. That the image was removed is part of the
// state, so a node that is away deletes it when it is back (dropRemoved); the
// others are told to do it at once.
func (h images) DeleteImage(ctx context.Context, req *blixardv1.DeleteImageRequest) (*blixardv1.Change, error) {
	digest, ok := strings.CutPrefix(req.Digest, digestPrefix)
	if !ok || len(digest) != 64 || strings.Trim(digest, "0123456789abcdef") != "" {
		return nil, blixard.Invalid("digest", "`blixard image list` shows them", "%.80q is not sha256:<64 hex digits>", req.Digest)
	}
	if h.opt.Images == nil {
		return nil, errNoImages
	}
	if forwarded(ctx) != "" {
		if _, err := h.opt.Backend.ReadView(ctx); err != nil { // what was decided is here from now on
			return nil, err
		}
		h.dropRemoved(ctx)
		return &blixardv1.Change{}, nil
	}
	if err := h.checkRemovable(ctx, digest); err != nil {
		return nil, err
	}
	answer, err := h.change(ctx, req.IdempotencyKey, req.DryRun, &state.RemoveImage{Digest: digest})
	if err != nil || req.DryRun {
		return answer, err
	}
	h.dropRemoved(ctx)
	h.tellRemoved(ctx, req.Digest)
	return answer, nil
}

// checkRemovable refuses to remove what no node keeps, and what nodes make by
// themselves.
func (h images) checkRemovable(ctx context.Context, digest string) error {
	list, err := h.opt.Images.List(ctx)
	if err != nil {
		return err
	}
	for i := range list {
		if list[i].Digest == digest && list[i].Builtin {
			return &blixard.Error{Code: blixard.CodeRefused, Field: "digest", Message: "the image " + digestPrefix + digest + " is the builtin one", Hint: "nodes make it when they need it; imported images can be removed"}
		}
	}
	if h.opt.Backend.View().ImageRemoved(digest) {
		return nil // again: nodes that were away then are told once more
	}
	found, err := h.hasImage(ctx, digest)
	if err == nil && !found {
		err = &blixard.Error{Code: blixard.CodeNotFound, Field: "digest", Message: "no node keeps the image " + digestPrefix + digest, Hint: "`blixard image list` lists those that the answering node keeps"}
	}
	return err
}

// tellRemoved has the other nodes delete what was removed.
func (h images) tellRemoved(ctx context.Context, digest string) {
	if h.opt.Peers == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, tellRemovedFor)
	defer cancel()
	var telling sync.WaitGroup
	defer telling.Wait()
	for _, address := range h.otherNodes() {
		telling.Go(func() {
			peer, err := h.opt.Peers(address)
			if err == nil {
				defer peer.Close()
				_, err = peer.DeleteImage(ctx, &blixardv1.DeleteImageRequest{Digest: digest})
			}
			if err != nil {
				h.opt.Log.Warn("a node was not told that an image was removed; it finds out by itself", "address", address, "digest", digest, "error", err)
			}
		})
	}
}

// dropRemoved deletes the images of this node that were removed from the cluster.
func (h *Handler) dropRemoved(ctx context.Context) {
	if h.opt.Images == nil {
		return
	}
	list, err := h.opt.Images.List(ctx)
	if err != nil {
		h.opt.Log.Warn("looking for removed images", "error", err) // it is looked again soon
		return
	}
	for i := range list {
		// The view is asked for each: an image may be imported anew meanwhile.
		if digest := list[i].Digest; !list[i].Builtin && h.opt.Backend.View().ImageRemoved(digest) {
			if err := h.opt.Images.Remove(ctx, digest); err != nil {
				h.opt.Log.Warn("deleting a removed image", "digest", digest, "error", err)
				continue
			}
			h.opt.Log.Info("a removed image was deleted", "event", "image_deleted", "digest", digest)
		}
	}
}

// keepAgain ends the removal of an image that has been imported anew.
func (h *Handler) keepAgain(ctx context.Context, digest string) error {
	view, err := h.opt.Backend.ReadView(ctx)
	if err != nil || !view.ImageRemoved(digest) {
		return err
	}
	e := state.Envelope{Key: client.NewKey(), NowMS: time.Now().UnixMilli(), Actor: "operator", Command: &state.RemoveImage{Digest: digest, Back: true}}
	if _, err := h.opt.Backend.Propose(ctx, e); err != nil {
		return err
	}
	found, err := h.opt.Images.Has(ctx, digest)
	if err == nil && !found {
		err = &blixard.Error{Code: blixard.CodeUnavailable, Message: "the image was removed while it was imported", Hint: "import it again"}
	}
	return err
}
