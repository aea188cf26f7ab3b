package api_test

import (
	"strings"
	"testing"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// TestBuiltinNeedsMemory: what the builtin image cannot boot with is refused where
// it is asked for; an image of one's own may be smaller.
func TestBuiltinNeedsMemory(t *testing.T) {
	s := newSite(t, 1)
	for memory, refused := range map[int64]bool{blixard.MinBuiltinMemoryMiB - 1: true, blixard.MinBuiltinMemoryMiB: false} {
		_, err := s.client().CreateVM(t.Context(), &blixardv1.CreateVMRequest{Name: "web", Spec: &blixardv1.VMSpec{MemoryMib: memory}, DryRun: true})
		if (err != nil) != refused || refused && (blixard.CodeOf(err) != blixard.CodeInvalid || !strings.Contains(err.Error(), "memory is 95M; the builtin image needs at least 96M to boot")) {
			t.Errorf("%d MiB: %v", memory, err)
		}
	}
}
