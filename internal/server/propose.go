package server

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/replica"
	"github.com/blixard/blixard/internal/state"
)

// proposal is a command on its way, and who waits for it.
type proposal struct {
	request uint64
	encoded []byte
	result  chan state.Result // room for one
	sent    time.Time         // zero: not handed to raft
	left    atomic.Bool       // nobody waits any more
}

// read is a wait for a linearizable view.
type read struct {
	result chan *state.View // room for one
	left   atomic.Bool      // nobody waits any more
}

// round is one ReadIndex question and the reads it serves.
type round struct {
	id    uint64
	asked time.Time
	index uint64 // the answer; 0: none yet
	reads []*read
}

var (
	errOverloaded = &blixard.Error{
		Code: blixard.CodeOverloaded, Message: fmt.Sprintf("%d changes are waiting to be committed on this node", maxPending),
		Hint: "try again in a second",
	}
)

func unavailable(ctx context.Context, what string) *blixard.Error {
	return &blixard.Error{
		Code: blixard.CodeUnavailable, Message: fmt.Sprintf("%s: %v", what, context.Cause(ctx)),
		Hint: "`blixard cluster status` tells whether there is a leader",
	}
}

// View implements api.Backend.
func (s *Server) View() *state.View { return s.view.Load() }

// Propose implements api.Backend.
func (s *Server) Propose(ctx context.Context, e state.Envelope) (state.Outcome, error) {
	p := &proposal{request: s.request.Add(1), result: make(chan state.Result, 1)}
	e.Request = p.request
	if e.NowMS == 0 {
		e.NowMS = time.Now().UnixMilli()
	}
	p.encoded = state.AppendEnvelope(make([]byte, 0, 512), &e)
	size := int64(len(p.encoded))
	defer s.release(size)
	if n, bytes := s.pending.Add(1), s.pendingBytes.Add(size); n > maxPending || bytes > maxPendingBytes {
		return state.Outcome{}, errOverloaded
	}
	select {
	case s.proposals <- p:
	case <-s.done:
		return state.Outcome{}, errStopped
	}
	select {
	case res := <-p.result:
		if res.Err != nil {
			return state.Outcome{}, res.Err
		}
		return res.Outcome, nil
	case <-s.done:
		return state.Outcome{}, errStopped
	case <-ctx.Done():
		p.left.Store(true)
		s.call(func() { delete(s.waiting, p.request) })
		return state.Outcome{}, unavailable(ctx, "the change was not confirmed in time, it may still happen")
	}
}

func (s *Server) release(size int64) {
	s.pending.Add(-1)
	s.pendingBytes.Add(-size)
}

// take remembers a proposal; flush hands it to raft.
func (s *Server) take(p *proposal) {
	if p.left.Load() {
		return // given up before it was taken
	}
	s.waiting[p.request] = p
	s.fresh = append(s.fresh, p)
}

// flush packs the proposals that were taken into entries.
func (s *Server) flush() {
	if len(s.fresh) == 0 {
		return
	}
	s.propose(s.fresh)
	s.fresh = s.fresh[:0]
}

func (s *Server) propose(all []*proposal) {
	now := time.Now()
	for len(all) > 0 {
		n, size := 0, 0
		envelopes := make([][]byte, 0, len(all))
		for n < len(all) && (n == 0 || size+len(all[n].encoded) <= entryBytes) {
			size += len(all[n].encoded)
			envelopes = append(envelopes, all[n].encoded)
			n++
		}
		err := s.r.Propose(state.PackEntry(envelopes))
		for _, p := range all[:n] {
			p.sent = now
			if err != nil {
				p.sent = time.Time{} // tried again when there is a leader, or by resend
			}
		}
		s.opt.Metrics.proposed(n)
		all = all[n:]
	}
}

// answer ends a proposal's wait.
func (s *Server) answer(p *proposal, res state.Result, err *blixard.Error) {
	if err != nil {
		res.Err = err
	}
	delete(s.waiting, p.request)
	p.result <- res
}

// leaderChanged proposes everything again that may have got lost with the old
// leader. What was applied after all is answered from the idempotency table.
func (s *Server) leaderChanged() {
	if s.r.Leader() == 0 {
		return
	}
	s.propose(s.sorted(func(*proposal) bool { return true }))
	s.nudgeReads()
}

// resend proposes again what a lost message may have swallowed.
func (s *Server) resend() {
	if len(s.waiting) == 0 || s.r.Leader() == 0 {
		return
	}
	leads, now := s.r.Leads(), time.Now()
	late := s.sorted(func(p *proposal) bool { return p.sent.IsZero() || !leads && now.Sub(p.sent) > resendAfter })
	if len(late) > 0 {
		s.propose(late)
	}
}

func (s *Server) sorted(keep func(*proposal) bool) []*proposal {
	var out []*proposal
	for _, p := range s.waiting {
		if keep(p) {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b *proposal) int {
		if a.request < b.request {
			return -1
		}
		return 1
	})
	return out
}

// failAll ends every wait when the loop ends.
func (s *Server) failAll() {
	for _, p := range s.sorted(func(*proposal) bool { return true }) {
		s.answer(p, state.Result{}, errStopped)
	}
}

// ReadView implements api.Backend.
func (s *Server) ReadView(ctx context.Context) (*state.View, error) {
	rd := &read{result: make(chan *state.View, 1)}
	select {
	case s.reads <- rd:
	case <-s.done:
		return nil, errStopped
	default:
		return nil, errOverloaded
	}
	select {
	case v := <-rd.result:
		return v, nil
	case <-s.done:
		return nil, errStopped
	case <-ctx.Done():
		rd.left.Store(true)
		return nil, unavailable(ctx, "no leader has confirmed in time that this is the newest state")
	}
}

// startRound asks for a read index on behalf of everybody who has come since
// the last question was asked.
func (s *Server) startRound() {
	if s.round != nil {
		return
	}
	s.nextReads = slices.DeleteFunc(s.nextReads, func(rd *read) bool { return rd.left.Load() })
	if len(s.nextReads) == 0 {
		return
	}
	s.readySeq++
	s.round = &round{id: s.readySeq, asked: time.Now(), reads: s.nextReads}
	s.nextReads = nil
	s.r.Read(s.round.id)
}

func (s *Server) readReady(rr replica.ReadReady) {
	if s.round != nil && s.round.id == rr.ID {
		s.round.index = max(rr.Index, 1)
	}
}

// serveReads answers the round whose index is applied.
func (s *Server) serveReads(applied uint64) {
	if s.round == nil || s.round.index == 0 || applied < s.round.index {
		return
	}
	v := s.r.View()
	for _, rd := range s.round.reads {
		rd.result <- v
	}
	s.round = nil
	s.startRound()
}

// rereads asks again when a question got lost.
func (s *Server) rereads() {
	if s.round != nil && s.round.index == 0 && time.Since(s.round.asked) > 5*s.opt.Tick {
		s.nudgeReads()
	}
}

func (s *Server) nudgeReads() {
	if s.round == nil || s.round.index != 0 {
		return
	}
	s.nextReads = append(s.round.reads, s.nextReads...)
	s.round = nil
	s.startRound()
}
