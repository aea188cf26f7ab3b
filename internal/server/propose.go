package server

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/replica"
	"github.com/blixard/blixard/internal/state"
)

// proposal is a command on its way, and who waits for it.
type proposal struct {
	replica.Proposal
	result chan state.Result // room for one
	left   atomic.Bool       // nobody waits any more
}

// Gone implements replica.Waiter.
func (p *proposal) Gone() bool { return p.left.Load() }

// Answer implements replica.Waiter.
func (p *proposal) Answer(res state.Result) { p.result <- res }

// wait is a wait for anything else that the loop answers.
type wait[T any] struct {
	result chan T      // room for one
	left   atomic.Bool // nobody waits any more
}

func newWait[T any]() *wait[T] { return &wait[T]{result: make(chan T, 1)} }

// Gone implements replica.Waiter.
func (w *wait[T]) Gone() bool { return w.left.Load() }

// Answer implements replica.Waiter.
func (w *wait[T]) Answer(v T) { w.result <- v }

var errOverloaded = &blixard.Error{
	Code: blixard.CodeOverloaded, Message: fmt.Sprintf("%d changes are waiting to be committed on this node", maxPending),
	Hint: "try again in a second",
}

func unavailable(ctx context.Context, what string) *blixard.Error {
	if cause := context.Cause(ctx); !errors.Is(cause, context.DeadlineExceeded) { // "in time" says that
		what += ": " + cause.Error()
	}
	return &blixard.Error{
		Code: blixard.CodeUnavailable, Message: what,
		Hint: "`blixard cluster status` tells whether there is a leader",
	}
}

// View implements api.Backend.
func (s *Server) View() *state.View { return s.view.Load() }

// Propose implements api.Backend.
func (s *Server) Propose(ctx context.Context, e state.Envelope) (state.Outcome, error) {
	if v := s.View(); v != nil {
		if err := v.Allows(e.Command); err != nil { // must not be in the log of a mixed cluster
			return state.Outcome{}, err
		}
	}
	p := &proposal{Proposal: replica.Proposal{Request: s.request.Add(1)}, result: make(chan state.Result, 1)}
	p.Waiter = p
	e.Request = p.Request
	if e.NowMS == 0 {
		e.NowMS = time.Now().UnixMilli()
	}
	p.Encoded = state.AppendEnvelope(make([]byte, 0, 512), &e)
	size := int64(len(p.Encoded))
	defer s.release(size)
	if n, bytes := s.pending.Add(1), s.pendingBytes.Add(size); n > maxPending || bytes > maxPendingBytes {
		return state.Outcome{}, errOverloaded
	}
	select {
	case s.proposals <- p:
	case <-s.done:
		return state.Outcome{}, errStopped
	}
	patience := s.newPatience()
	defer patience.Stop()
	for {
		select {
		case res := <-p.result:
			if res.Err != nil {
				return state.Outcome{}, res.Err
			}
			return res.Outcome, nil
		case <-s.done:
			return state.Outcome{}, errStopped
		case <-patience.C:
			if patience.on() {
				continue
			}
			p.left.Store(true)
			return state.Outcome{}, s.noLeader(func() string {
				s.loop.Forget(p.Request)
				if p.MayHappen() {
					return "the change was not confirmed, it may still happen"
				}
				return "nothing was changed"
			})
		case <-ctx.Done():
			p.left.Store(true)
			s.call(func() { s.loop.Forget(p.Request) })
			return state.Outcome{}, unavailable(ctx, "the change was not confirmed in time, it may still happen")
		}
	}
}

func (s *Server) release(size int64) {
	s.pending.Add(-1)
	s.pendingBytes.Add(-size)
}

// failAll ends every wait when the loop ends.
func (s *Server) failAll() { s.loop.Abandon(state.Result{Err: errStopped}) }

// ReadView implements api.Backend.
func (s *Server) ReadView(ctx context.Context) (*state.View, error) {
	rd := newWait[*state.View]()
	select {
	case s.reads <- rd:
	case <-s.done:
		return nil, errStopped
	default:
		return nil, errOverloaded
	}
	patience := s.newPatience()
	defer patience.Stop()
	for {
		select {
		case v := <-rd.result:
			return v, nil
		case <-s.done:
			return nil, errStopped
		case <-patience.C:
			if patience.on() {
				continue
			}
			rd.left.Store(true)
			return nil, s.noLeader(func() string { return "what is the newest state cannot be told" })
		case <-ctx.Done():
			rd.left.Store(true)
			return nil, unavailable(ctx, "no leader has confirmed in time that this is the newest state")
		}
	}
}
