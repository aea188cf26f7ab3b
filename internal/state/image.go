package state

import (
	"slices"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/wire"
)

// maxRemovedImages bounds the images that are remembered as removed; the oldest
// are forgotten.
const maxRemovedImages = 1024

// RemoveImage has every node delete an imported image, or with Back keep it
// again since it was imported anew. Nodes that are away learn of it when they
// are back, since the state remembers it. An image that a VM or an incarnation
// uses cannot be removed, and no VM can use one that was.
type RemoveImage struct {
	Digest string // 64 lower-case hexadecimal digits
	Back   bool
}

func (m *RemoveImage) kind() uint8 { return 30 }

func (m *RemoveImage) code(c *wire.Coder) {
	wire.String(c, &m.Digest)
	wire.Bool(c, &m.Back)
}

func (m *RemoveImage) apply(tx *txn) (Outcome, *blixard.Error) {
	image := imagePrefix + m.Digest
	if len(m.Digest) != 64 || strings.Trim(m.Digest, "0123456789abcdef") != "" {
		return Outcome{}, blixard.Invalid("digest", "", "%q is not sha256:<64 hex digits>", clip(image))
	}
	c := &tx.t.cluster
	at := slices.Index(c.RemovedImages, m.Digest)
	if (at >= 0) != m.Back {
		return Outcome{Version: tx.index, Noop: true}, nil
	}
	if m.Back {
		c.RemovedImages = slices.Delete(slices.Clone(c.RemovedImages), at, at+1) // views share the old one
		return Outcome{Version: tx.index}, nil
	}
	if user := tx.t.imageUser(image); user != "" {
		return Outcome{}, &blixard.Error{
			Code: blixard.CodeRefused, Field: "digest", Message: user + " uses the image " + image,
			Hint: "delete the VM first, or give it another image with `blixard apply`",
		}
	}
	keep := c.RemovedImages[max(0, len(c.RemovedImages)+1-maxRemovedImages):]
	c.RemovedImages = append(slices.Clone(keep), m.Digest)
	tx.event(Event{Kind: "ImageRemoved", Message: image + " removed by " + tx.who()})
	return Outcome{Version: tx.index}, nil
}

const imagePrefix = "sha256:"

// imageUser names a VM or an incarnation that uses an image, "" if there is none.
func (t *tables) imageUser(image string) string {
	user := ""
	t.vms.Scan(func(name blixard.VMName, vm *blixard.VM) bool {
		if vm.Spec.Image == image {
			user = "the VM " + string(name)
		}
		return user == ""
	})
	if user != "" {
		return user
	}
	t.instances.Scan(func(_ string, i *blixard.Instance) bool {
		if i.Spec.Image == image && i.Holds() {
			user = "the instance " + string(i.ID) + " on " + string(i.Node)
		}
		return user == ""
	})
	return user
}

// checkImage refuses an image that was removed.
func (tx *txn) checkImage(image string) *blixard.Error {
	if len(image) <= len(imagePrefix) || !slices.Contains(tx.t.cluster.RemovedImages, image[len(imagePrefix):]) {
		return nil
	}
	return &blixard.Error{
		Code: blixard.CodeNotFound, Field: "image", Message: "the image " + image + " was removed",
		Hint: "import it again with `blixard image import PATH`",
	}
}

// ImageRemoved tells whether an imported image, by its 64 hexadecimal digits, was
// removed and not imported again.
func (v *View) ImageRemoved(digest string) bool {
	return slices.Contains(v.t.cluster.RemovedImages, digest)
}
