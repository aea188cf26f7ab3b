package api

import (
	"context"
	"time"
)

// CopyImagesTwice has a node look for images that are alone, and again when those
// it found are due.
func (h *Handler) CopyImagesTwice(ctx context.Context) {
	var alone aloneImages
	now := time.Now()
	h.copyImages(ctx, &alone, now)
	h.copyImages(ctx, &alone, now.Add(copyAfter))
}

// DropRemoved has a node delete the images that were removed, as it does from
// time to time.
func (h *Handler) DropRemoved(ctx context.Context) { h.dropRemoved(ctx) }
