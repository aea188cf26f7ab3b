package server

import (
	"context"
	"sync"

	"github.com/blixard/blixard/internal/replica"
	"github.com/blixard/blixard/internal/state"
)

// ringChanges is how many changes are kept for watchers that lag or resume.
const ringChanges = 1 << 16

// hub keeps the newest changes and wakes who waits for more.
type hub struct {
	mu   sync.Mutex
	feed replica.Feed
	wake chan struct{} // closed by the next addition
}

func newHub() *hub { return &hub{feed: replica.Feed{Keep: ringChanges}, wake: make(chan struct{})} }

// add keeps what one Ready applied.
func (h *hub) add(applied uint64, changes []state.Change) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.feed.Add(applied, changes) {
		h.rouse()
	}
}

// reset forgets everything: changes up to index are not known.
func (h *hub) reset(index uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.feed.Reset(index)
	h.rouse()
}

func (h *hub) rouse() {
	close(h.wake)
	h.wake = make(chan struct{})
}

// next is what a watcher has not seen, or what to wait for.
func (h *hub) next(c *replica.Cursor) ([]state.Change, <-chan struct{}, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	out, err := h.feed.Next(c)
	if err != nil {
		return nil, nil, err
	}
	return out, h.wake, nil
}

// Watch implements api.Backend.
func (s *Server) Watch(ctx context.Context, from uint64) (func() ([]state.Change, error), error) {
	s.hub.mu.Lock()
	at, err := s.hub.feed.Watch(from)
	s.hub.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return func() ([]state.Change, error) {
		for {
			out, wake, err := s.hub.next(&at)
			if err != nil || len(out) > 0 {
				return out, err
			}
			select {
			case <-wake:
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-s.done:
				return nil, errStopped
			}
		}
	}, nil
}

// WaitApplied returns when something was applied after index, or ctx ended.
func (s *Server) WaitApplied(ctx context.Context, index uint64) error {
	for {
		s.hub.mu.Lock()
		applied, wake := s.hub.feed.Applied(), s.hub.wake
		s.hub.mu.Unlock()
		if applied > index {
			return nil
		}
		select {
		case <-wake:
		case <-ctx.Done():
			return ctx.Err()
		case <-s.done:
			return errStopped
		}
	}
}
