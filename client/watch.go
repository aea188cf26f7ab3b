package client

import (
	"context"
	"errors"
	"io"
	"iter"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// Types of watch messages.
const (
	WatchExisting = "existing" // an object that is there already
	WatchReady    = "ready"    // nothing after Index is left out from here on
	WatchChanged  = "changed"
	WatchDeleted  = "deleted"
	WatchReset    = "reset"    // forget what was seen: existing objects follow, then ready
	WatchProgress = "progress" // never seen by users of Watch
)

// Watch yields changes until ctx ends or the loop is left. When the connection
// breaks it goes on from where it was, at another node if need be, and nothing
// is left out or repeated. Only when it was away for so long that the changes
// are no longer kept does it yield WatchReset, followed by every object as
// WatchExisting and WatchReady, so that a mirror of the state can be rebuilt.
//
// An error ends the iteration; it is yielded once, with a nil message.
func (c *Client) Watch(ctx context.Context, req *blixardv1.WatchRequest) iter.Seq2[*blixardv1.WatchResponse, error] {
	return func(yield func(*blixardv1.WatchResponse, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		w := &watcher{c: c, req: proto.CloneOf(req), yield: yield}
		if err := w.run(ctx); err != nil && !errors.Is(err, errLeft) {
			yield(nil, err)
		}
	}
}

// errLeft says that the user has left the loop.
var errLeft = errors.New("left")

// watcher is one Watch over all its connections.
type watcher struct {
	c     *Client
	req   *blixardv1.WatchRequest // of the next connection
	yield func(*blixardv1.WatchResponse, error) bool

	ready   bool // WatchReady was yielded, and nothing was missed since
	partial bool // WatchExisting was yielded, and WatchReady was not
	same    int  // messages of the index after req.From that were yielded
}

func (w *watcher) run(ctx context.Context) error {
	w.c.settle(ctx)
	retries := retries{c: w.c, at: int(w.c.preferred.Load())}
	for {
		got, err := w.once(ctx, w.c.endpoints[retries.at])
		switch {
		case errors.Is(err, errLeft):
			return err
		case ctx.Err() != nil:
			return context.Cause(ctx)
		}
		if got {
			retries = fresh(retries)
		}
		if e, _, ok := blixardv1.FromRPC(err); ok && e.Code == blixard.CodeGone {
			if err := w.reset(); err != nil {
				return err
			}
			continue
		}
		if err := w.again(ctx, &retries, err); err != nil {
			return err
		}
	}
}

// fresh starts counting anew after a connection that worked.
func fresh(r retries) retries { return retries{c: r.c, at: r.at} }

// again waits for the next connection. A watch that has worked goes on for as
// long as it takes.
func (w *watcher) again(ctx context.Context, r *retries, err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		err = &blixard.Error{Code: blixard.CodeUnavailable, Message: "the node ended the watch"}
	}
	failed := r.next(ctx, err)
	if failed == nil || ctx.Err() != nil || !w.ready || blixard.CodeOf(failed) != blixard.CodeUnavailable && blixard.CodeOf(failed) != blixard.CodeOverloaded {
		return failed
	}
	r.at = (r.at + 1) % len(w.c.endpoints)
	timer := time.NewTimer(maxBackoff)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// reset makes the next connection begin with every object.
func (w *watcher) reset() error {
	w.req.From, w.req.Snapshot, w.ready, w.partial, w.same = 0, true, false, false, 0
	if !w.yield(&blixardv1.WatchResponse{Type: WatchReset}, nil) {
		return errLeft
	}
	return nil
}

// once is one connection; got tells whether anything came.
func (w *watcher) once(ctx context.Context, e *endpoint) (got bool, err error) {
	if w.partial { // half of the objects are worth nothing
		if err := w.reset(); err != nil {
			return false, err
		}
	}
	stream, err := e.watch.Watch(ctx, w.req)
	if err != nil {
		return false, err
	}
	defer stream.Close() // nothing depends on how a read-only stream ends
	skip := w.same
	for {
		m, err := stream.Receive()
		if err != nil {
			return got, err
		}
		got = true
		if err := w.take(m, &skip); err != nil {
			return got, err
		}
	}
}

// take hands on one message and notes from where to resume. skip is how many
// messages were seen before the connection broke.
func (w *watcher) take(m *blixardv1.WatchResponse, skip *int) error {
	switch m.Type {
	case WatchExisting:
		w.partial = true
	case WatchReady:
		w.req.From, w.req.Snapshot, w.partial = m.Index, false, false
		if w.ready {
			return nil
		}
		w.ready = true
	case WatchProgress:
		w.req.From, w.same, *skip = m.Index, 0, 0
		return nil
	default:
		seen := *skip > 0
		if seen {
			*skip--
		} else {
			w.same++
		}
		if !m.More {
			w.req.From, w.same, *skip = m.Index, 0, 0
		}
		if seen {
			return nil
		}
	}
	if !w.yield(m, nil) {
		return errLeft
	}
	return nil
}
