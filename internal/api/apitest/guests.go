package apitest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"sort"
	"sync"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/api"
	"github.com/blixard/blixard/internal/guest"
)

// Guests are instances that run nowhere. Their log is "<id> line 1\n…"; exec
// knows "cat", "size" (prints each new size), "exit N" and "hang".
type Guests struct {
	// Node is told by what was asked.
	Node string
}

var _ api.Guests = Guests{}

// Logs implements api.Guests.
func (g Guests) Logs(ctx context.Context, id blixard.InstanceID, opt api.LogOptions, w io.Writer) error {
	first := 1
	if opt.TailLines >= 0 {
		first = max(1, 4-opt.TailLines)
	}
	for i := first; i <= 3; i++ {
		if _, err := fmt.Fprintf(w, "%s line %d\n", id, i); err != nil {
			return err
		}
	}
	if opt.Follow {
		<-ctx.Done()
		return ctx.Err()
	}
	return nil
}

// Exec implements api.Guests.
func (g Guests) Exec(ctx context.Context, id blixard.InstanceID, req guest.ExecRequest, stdin io.Reader, stdout, stderr io.Writer, resize <-chan guest.Size) (int, error) {
	switch req.Args[0] {
	case "cat":
		_, err := io.Copy(stdout, stdin)
		return 0, err
	case "size":
		select {
		case s := <-resize:
			_, err := fmt.Fprintf(stdout, "%dx%d", s.Cols, s.Rows)
			return 0, err
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	case "exit":
		code := 0
		if _, err := fmt.Sscan(req.Args[1], &code); err != nil {
			return 0, blixard.Errorf(blixard.CodeInvalid, "%v", err)
		}
		_, err := fmt.Fprintf(stderr, "%s on %s ends with %d, env %v\n", id, g.Node, code, req.Env)
		return code, err
	case "hang":
		<-ctx.Done()
		return 0, ctx.Err()
	}
	return 0, blixard.Errorf(blixard.CodeNotFound, "there is no command %q in the guest", req.Args[0])
}

// Console implements api.Guests: it echoes in capitals.
func (g Guests) Console(ctx context.Context, _ blixard.InstanceID, rw io.ReadWriter) error {
	buf := make([]byte, 1024)
	for {
		n, err := rw.Read(buf)
		if n > 0 {
			if _, err := rw.Write(bytes.ToUpper(buf[:n])); err != nil {
				return err
			}
		}
		if err != nil {
			return ctx.Err()
		}
	}
}

// Images keeps images in memory; an image's digest is that of its archive.
type Images struct {
	mu  sync.Mutex
	all map[string][]byte
}

var _ api.Images = (*Images)(nil)

// Forget loses all images.
func (s *Images) Forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = nil
}

// List implements api.Images.
func (s *Images) List(context.Context) ([]api.ImageInfo, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []api.ImageInfo
	for digest, data := range s.all {
		out = append(out, api.ImageInfo{Digest: digest, SizeBytes: int64(len(data))})
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Digest < out[j].Digest })
	return out, nil
}

// Has implements api.Images.
func (s *Images) Has(_ context.Context, digest string) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all[digest] != nil, nil
}

// Export implements api.Images.
func (s *Images) Export(_ context.Context, digest string, w io.Writer) error {
	s.mu.Lock()
	data, ok := s.all[digest]
	s.mu.Unlock()
	if !ok {
		return blixard.Errorf(blixard.CodeNotFound, "there is no image sha256:%s", digest)
	}
	_, err := w.Write(data)
	return err
}

// Remove implements api.Images.
func (s *Images) Remove(_ context.Context, digest string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.all, digest)
	return nil
}

// Import implements api.Images.
func (s *Images) Import(_ context.Context, r io.Reader, digest string) (api.ImageInfo, error) {
	data, err := io.ReadAll(r)
	if err != nil {
		return api.ImageInfo{}, blixard.Errorf(blixard.CodeInvalid, "reading the image: %v", err)
	}
	sum := sha256.Sum256(data)
	have := hex.EncodeToString(sum[:])
	if digest != "" && digest != have {
		return api.ImageInfo{}, blixard.Invalid("digest", "", "the content has the digest sha256:%s", have)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all == nil {
		s.all = map[string][]byte{}
	}
	s.all[have] = data
	return api.ImageInfo{Digest: have, SizeBytes: int64(len(data))}, nil
}
