package replica

import (
	"fmt"
	"sort"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// Feed keeps the newest changes of the state for those that watch it, lag or
// resume. A watcher is known by the index up to which it has seen everything:
// that is enough to go on at any node that has not forgotten what came after.
//
// Order: changes are handed out by index, each index whole or not at all, none
// twice. What can no longer be handed out without a gap is refused with
// blixard.CodeGone, and the watcher has to list anew.
type Feed struct {
	// Keep is how many changes are kept at least.
	Keep int

	floor   uint64         // every change after this index is kept
	index   uint64         // applied
	changes []state.Change // ordered by index
	dropped uint64         // changes ever taken off the front
}

// Cursor is where a watcher stands in a Feed.
type Cursor struct {
	from uint64 // it has seen everything up to this index
	at   uint64 // number of its next change, counted since the feed began
}

// watchBatch is about how many changes are handed out at once.
const watchBatch = 1024

// Applied is the index up to which the feed is complete.
func (f *Feed) Applied() uint64 { return f.index }

// Add takes what one Ready applied. It tells whether there is anything new.
func (f *Feed) Add(applied uint64, changes []state.Change) bool {
	if applied <= f.index && len(changes) == 0 {
		return false
	}
	f.index = max(f.index, applied)
	f.changes = append(f.changes, changes...)
	if over := len(f.changes) - f.Keep; over > f.Keep/4 {
		f.floor = f.changes[over-1].Index
		for over < len(f.changes) && f.changes[over].Index == f.floor {
			over++ // an index is kept whole or not at all
		}
		f.dropped += uint64(over)
		f.changes = append([]state.Change(nil), f.changes[over:]...)
	}
	return true
}

// Reset forgets everything: changes up to index are not known.
func (f *Feed) Reset(index uint64) {
	f.dropped += uint64(len(f.changes)) + 1 // who stood in the middle is told
	f.changes, f.floor, f.index = nil, index, index
}

// Watch begins after an index, which may be ahead of this node. It refuses what
// is no longer kept.
func (f *Feed) Watch(from uint64) (Cursor, *blixard.Error) {
	if from < f.floor {
		return Cursor{}, f.gone(from)
	}
	return Cursor{from, f.dropped + uint64(sort.Search(len(f.changes), func(i int) bool { return f.changes[i].Index > from }))}, nil
}

// Next hands out what a watcher has not seen, none if there is nothing yet. The
// cursor moves on; an error means that the watcher fell too far behind.
func (f *Feed) Next(c *Cursor) ([]state.Change, *blixard.Error) {
	if c.at < f.dropped { // what it would have been given next is gone, unless it has seen that
		again, err := f.Watch(c.from)
		if err != nil {
			return nil, err
		}
		*c = again
	}
	for c.at-f.dropped < uint64(len(f.changes)) && f.changes[c.at-f.dropped].Index <= c.from {
		c.at++ // this node was behind the watcher
	}
	rest := f.changes[c.at-f.dropped:]
	if len(rest) == 0 {
		return nil, nil
	}
	n := min(len(rest), watchBatch)
	for n < len(rest) && rest[n].Index == rest[n-1].Index {
		n++ // an index is handed over whole, so that it can be resumed from
	}
	out := append([]state.Change(nil), rest[:n]...)
	c.at += uint64(len(out))
	c.from = out[len(out)-1].Index
	return out, nil
}

// From is the index after which the watcher goes on, here or at another node.
func (c *Cursor) From() uint64 { return c.from }

func (f *Feed) gone(from uint64) *blixard.Error {
	return &blixard.Error{
		Code: blixard.CodeGone, Message: fmt.Sprintf("changes after index %d are no longer kept; the oldest kept is %d", from, f.floor+1),
		Hint: "list again and watch from the index of the answer",
	}
}
