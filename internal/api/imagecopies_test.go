package api

import (
	"testing"
	"time"
)

// TestAloneImages: an image is copied when it was alone for long enough without a
// break.
func TestAloneImages(t *testing.T) {
	var alone aloneImages
	start := time.Unix(1000, 0)
	look := func(after time.Duration, images ...string) (due string) {
		var infos []ImageInfo
		for _, digest := range images {
			infos = append(infos, ImageInfo{Digest: digest})
		}
		for _, image := range alone.due(start.Add(after), infos) {
			due += image.Digest
		}
		return due
	}
	for _, step := range []struct {
		after  time.Duration
		images []string
		want   string
	}{
		{0, []string{"a", "b"}, ""},
		{copyAfter / 2, []string{"a", "b"}, ""},
		{copyAfter - 1, []string{"a"}, ""}, // the node with b is back for a moment
		{copyAfter, []string{"a", "b"}, "a"},
		{copyAfter + 1, []string{"a", "b"}, "a"}, // nobody took it: tried again
		{2 * copyAfter, []string{"b"}, "b"},
	} {
		if got := look(step.after, step.images...); got != step.want {
			t.Errorf("after %s with %v alone: %q is due, want %q", step.after, step.images, got, step.want)
		}
	}
}
