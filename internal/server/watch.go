package server

import (
	"context"
	"sort"
	"sync"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// ringChanges is how many changes are kept for watchers that lag or resume.
const ringChanges = 1 << 16

// hub keeps the newest changes and wakes who waits for more.
type hub struct {
	mu      sync.Mutex
	floor   uint64         // every change after this index is kept
	index   uint64         // applied
	changes []state.Change // ordered by index
	dropped uint64         // changes ever taken off the front
	wake    chan struct{}  // closed by the next addition
}

func newHub() *hub { return &hub{wake: make(chan struct{})} }

// add keeps what one Ready applied.
func (h *hub) add(applied uint64, changes []state.Change) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if applied <= h.index && len(changes) == 0 {
		return
	}
	h.index = max(h.index, applied)
	h.changes = append(h.changes, changes...)
	if over := len(h.changes) - ringChanges; over > ringChanges/4 {
		h.floor = h.changes[over-1].Index
		for over < len(h.changes) && h.changes[over].Index == h.floor {
			over++ // an index is kept whole or not at all
		}
		h.dropped += uint64(over)
		h.changes = append([]state.Change(nil), h.changes[over:]...)
	}
	close(h.wake)
	h.wake = make(chan struct{})
}

// reset forgets everything: changes up to index are not known.
func (h *hub) reset(index uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.dropped += uint64(len(h.changes)) + 1 // who stood in the middle is told
	h.changes, h.floor, h.index = nil, index, index
	close(h.wake)
	h.wake = make(chan struct{})
}

func (h *hub) gone(from uint64) *blixard.Error {
	return &blixard.Error{
		Code: blixard.CodeGone, Message: "changes after index " + utoa(from) + " are no longer kept; the oldest kept is " + utoa(h.floor+1),
		Hint: "list again and watch from the index of the answer",
	}
}

// Watch implements api.Backend.
func (s *Server) Watch(ctx context.Context, from uint64) (func() ([]state.Change, error), error) {
	h := s.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	if from < h.floor {
		return nil, h.gone(from)
	}
	at := h.dropped + uint64(sort.Search(len(h.changes), func(i int) bool { return h.changes[i].Index > from }))
	return func() ([]state.Change, error) {
		for {
			if err := s.WaitApplied(ctx, from); err != nil { // from may be ahead of this node
				return nil, err
			}
			h.mu.Lock()
			if at < h.dropped {
				err := h.gone(from)
				h.mu.Unlock()
				return nil, err
			}
			for at-h.dropped < uint64(len(h.changes)) && h.changes[at-h.dropped].Index <= from {
				at++
			}
			if rest := h.changes[at-h.dropped:]; len(rest) > 0 {
				n := min(len(rest), 1024)
				for n < len(rest) && rest[n].Index == rest[n-1].Index {
					n++ // an index is handed over whole, so that it can be resumed from
				}
				out := append([]state.Change(nil), rest[:n]...)
				at += uint64(len(out))
				from = out[len(out)-1].Index
				h.mu.Unlock()
				return out, nil
			}
			wake := h.wake
			h.mu.Unlock()
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
		applied, wake := s.hub.index, s.hub.wake
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
