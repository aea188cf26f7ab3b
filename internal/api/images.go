package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// Images is what the API needs of this node's image store. Digests are 64
// lower-case hexadecimal digits, without "sha256:". Errors are *blixard.Error.
type Images interface {
	// List returns the images that the store keeps.
	List(ctx context.Context) ([]ImageInfo, error)
	// Has tells whether the store keeps an image.
	Has(ctx context.Context, digest string) (bool, error)
	// Export writes an image's archive to w. CodeNotFound, before anything is
	// written, when the store has no such image.
	Export(ctx context.Context, digest string, w io.Writer) error
	// Import reads an archive and keeps the image. With a digest it refuses
	// (CodeInvalid) content that has another one. Importing what is there is no
	// error.
	Import(ctx context.Context, r io.Reader, digest string) (ImageInfo, error)
	// Remove deletes an image; that it is not there is no error.
	Remove(ctx context.Context, digest string) error
}

// ImageInfo is an image of a store.
type ImageInfo struct {
	Digest      string // 64 lower-case hexadecimal digits
	SizeBytes   int64  // 0 if not known
	Description string
	CreatedMS   int64 // 0 if not known
	Builtin     bool  // made here, as on every node that needs it: nobody copies it
}

const (
	imagePrefix  = "/v1/images/"
	digestPrefix = "sha256:"
	archiveType  = "application/x-tar"
)

// images implements ImageService.
type images struct{ *Handler }

func (h images) ListImages(ctx context.Context, _ *blixardv1.ListImagesRequest) (*blixardv1.ListImagesResponse, error) {
	if h.opt.Images == nil {
		return nil, errNoImages
	}
	list, err := h.opt.Images.List(ctx)
	if err != nil {
		return nil, err
	}
	answer := &blixardv1.ListImagesResponse{}
	for i := range list {
		answer.Images = append(answer.Images, imageMessage(&list[i]))
	}
	return answer, nil
}

var errNoImages = blixard.Errorf(blixard.CodeRefused, "this node keeps no images")

func imageMessage(i *ImageInfo) *blixardv1.Image {
	return &blixardv1.Image{Digest: digestPrefix + i.Digest, SizeBytes: i.SizeBytes, Description: i.Description, CreatedMs: i.CreatedMS}
}

// serveImage serves the content of images: PUT, GET and HEAD
// /v1/images/{digest}, POST /v1/images.
func (h *Handler) serveImage(w http.ResponseWriter, r *http.Request) {
	if err := h.authorize(r.Header.Get("Authorization")); err != nil {
		h.problem(w, err)
		return
	}
	if h.opt.Images == nil {
		h.problem(w, errNoImages)
		return
	}
	digest := strings.TrimPrefix(r.URL.Path, imagePrefix)
	if r.URL.Path == "/v1/images" {
		digest = ""
	} else {
		digest = strings.TrimPrefix(digest, digestPrefix)
		if len(digest) != 64 || strings.Trim(digest, "0123456789abcdef") != "" {
			h.problem(w, blixard.Invalid("digest", "", "%.80q is not sha256:<64 hex digits>", digest))
			return
		}
	}
	switch {
	case r.Method == http.MethodPut && digest != "", r.Method == http.MethodPost && digest == "":
		h.putImage(w, r, digest)
	case r.Method == http.MethodGet && digest != "":
		h.getImage(w, r, digest)
	case r.Method == http.MethodHead && digest != "":
		h.headImage(w, r, digest)
	default:
		h.problem(w, errMethod(r.Method, "GET, HEAD, PUT"))
	}
}

func (h *Handler) putImage(w http.ResponseWriter, r *http.Request, digest string) {
	image, err := h.opt.Images.Import(r.Context(), r.Body, digest)
	if err == nil && r.Header.Get(forwardedHeader) == "" {
		if err = h.keepAgain(r.Context(), image.Digest); err == nil {
			err = h.secondCopy(r.Context(), &image)
		}
	}
	if err != nil {
		h.problem(w, err)
		return
	}
	writeJSON(w, http.StatusOK, blixardv1.AppendJSON(nil, imageMessage(&image)))
}

// getImage sends an image that this node has, or that another one has: a node
// that is to run an instance asks for what it lacks.
func (h *Handler) getImage(w http.ResponseWriter, r *http.Request, digest string) {
	w.Header().Set("Content-Type", archiveType)
	out := &countingWriter{w: w}
	err := h.opt.Images.Export(r.Context(), digest, out)
	if err != nil && out.n == 0 && blixard.CodeOf(err) == blixard.CodeNotFound && r.Header.Get(forwardedHeader) == "" {
		err = h.fetchImage(r.Context(), digest, out)
	}
	switch {
	case err == nil:
	case out.n == 0:
		h.problem(w, err)
	default:
		h.opt.Log.Warn("sending an image broke off", "digest", digest, "error", err)
		panic(http.ErrAbortHandler) // the receiver must not take half for the whole
	}
}

// headImage tells whether this node has an image, or, unless another node asks,
// any one.
func (h *Handler) headImage(w http.ResponseWriter, r *http.Request, digest string) {
	ask := h.hasImage
	if r.Header.Get(forwardedHeader) != "" {
		ask = h.opt.Images.Has
	}
	found, err := ask(r.Context(), digest)
	switch {
	case err != nil:
		h.problem(w, err)
	case !found:
		h.problem(w, &blixard.Error{Code: blixard.CodeNotFound, Message: "no node has the image " + digestPrefix + digest})
	default:
		w.Header().Set("Content-Type", archiveType)
		w.WriteHeader(http.StatusOK)
	}
}

// fetchImage copies an image from the first node that has it.
func (h *Handler) fetchImage(ctx context.Context, digest string, w io.Writer) error {
	missing := &blixard.Error{Code: blixard.CodeNotFound, Message: "no node has the image " + digestPrefix + digest, Hint: "import it again with `blixard image import PATH`"}
	if h.opt.Peers == nil {
		return missing
	}
	for _, address := range h.otherNodes() {
		peer, err := h.opt.Peers(address)
		if err != nil {
			return err
		}
		archive, _, err := peer.GetImage(ctx, digestPrefix+digest)
		if err != nil {
			peer.Close()
			h.opt.Log.Debug("a node does not give an image", "address", address, "error", err)
			continue
		}
		_, err = io.Copy(w, archive)
		err = errors.Join(err, archive.Close())
		peer.Close()
		return err
	}
	return missing
}

// otherNodes are the addresses of the ready nodes but this one that can keep
// images: a witness is not made for it.
func (h *Handler) otherNodes() []string {
	view, here := h.opt.Backend.View(), h.opt.Backend.Status().Node
	var others []string
	view.Nodes(func(n *blixard.Node) bool {
		if n.Name != here && n.State == blixard.NodeReady && !n.Witness && !n.Simulated {
			others = append(others, n.Address)
		}
		return true
	})
	return others
}

// secondCopy has one more node keep an image, if there is one, so that what was
// acknowledged survives the loss of this node. Which one is a matter of the
// digest, so that the copies of many images are spread.
func (h *Handler) secondCopy(ctx context.Context, image *ImageInfo) error {
	others := h.otherNodes()
	if h.opt.Peers == nil || len(others) == 0 {
		return nil
	}
	var failed []error
	first := int(image.Digest[0]) % len(others)
	for i := range others {
		address := others[(first+i)%len(others)]
		if err := h.sendImage(ctx, address, image); err != nil {
			h.opt.Log.Warn("a node does not take an image", "address", address, "digest", image.Digest, "error", err)
			failed = append(failed, fmt.Errorf("%s: %w", address, err))
			continue
		}
		return nil
	}
	return &blixard.Error{
		Code:    blixard.CodeUnavailable,
		Message: fmt.Sprintf("the image %s%s is kept on %s only, no other node took a copy: %v", digestPrefix, image.Digest, h.opt.Backend.Status().Node, errors.Join(failed...)),
		Hint:    "send it again: what is there is not sent twice",
	}
}

// sendImage sends an image of this node to another one, which answers before it
// is sent when it has it.
func (h *Handler) sendImage(ctx context.Context, address string, image *ImageInfo) error {
	// A minute, and a second more for each MiB: a node that hangs must not hold
	// up the upload for ever.
	ctx, cancel := context.WithTimeout(ctx, time.Minute+time.Duration(image.SizeBytes>>20)*time.Second)
	defer cancel()
	peer, err := h.opt.Peers(address)
	if err != nil {
		return err
	}
	defer peer.Close()
	archive, into := io.Pipe()
	var sending sync.WaitGroup
	sending.Go(func() { into.CloseWithError(h.opt.Images.Export(ctx, image.Digest, into)) })
	_, err = peer.PutImage(ctx, digestPrefix+image.Digest, archive, -1)
	// What is still being exported, if the node had no need of it, ends here.
	err = errors.Join(err, archive.Close())
	sending.Wait()
	return err
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
