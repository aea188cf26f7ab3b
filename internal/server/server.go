// Package server drives one replica on a real machine: it feeds the sans-IO
// core with ticks, messages and requests, makes its log durable, sends what it
// says and answers whoever waits.
//
// Ownership: one goroutine, the loop, owns the replica and the log. Everything
// else talks to it through bounded channels; a full one answers "overloaded"
// at once. Views are published through an atomic pointer and may be read by
// anybody.
//
// A failed write or fsync ends Run with an error: the process must end, since
// what the disk holds is no longer known. It is never tried again.
package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/control"
	"github.com/blixard/blixard/internal/raftlog"
	"github.com/blixard/blixard/internal/replica"
	"github.com/blixard/blixard/internal/state"
	"github.com/blixard/blixard/internal/transport"
)

// Bounds of the loop's queues.
const (
	maxPending      = 16_384 // proposals that wait for their result
	maxPendingBytes = 256 << 20
	loopBatch       = 512
	trailingEntries = 5_000 // kept in memory behind a snapshot, for followers that are a little behind
)

// Options of a Server.
type Options struct {
	Identity  Identity
	Opened    raftlog.Opened
	Transport transport.Transport
	Control   control.Config
	MaxVoters int
	// Tick is the heartbeat interval of the consensus, ElectionTicks how many of
	// them without a leader start an election.
	Tick          time.Duration
	ElectionTicks int
	// SnapshotEntries is how many entries are applied between snapshots.
	SnapshotEntries uint64
	Release         string
	Log             *slog.Logger
	Metrics         *Metrics
	// Peers asks other nodes; see heartbeat.go.
	Peers PeerCaller
}

// Server runs the replica of this node.
type Server struct {
	opt     Options
	log     *slog.Logger
	r       *replica.Replica
	started time.Time

	messages  chan []*raftpb.Message
	proposals chan *proposal
	reads     chan *wait[*state.View]
	calls     chan func()
	done      chan struct{} // closed when the loop has ended

	view   atomic.Pointer[state.View]
	status atomic.Pointer[raftStatus]
	base   atomic.Pointer[base]
	hub    *hub

	request      atomic.Uint64
	pending      atomic.Int64
	pendingBytes atomic.Int64
	asked        atomic.Uint64 // counts heartbeats to anybody

	// Owned by the loop.
	loop          *replica.Loop
	afterSnapshot []func()          // wait for the one being written
	addresses     map[uint64]string // where members were last known to be
	fatal         error
	wg            sync.WaitGroup
}

// raftStatus is what the loop publishes about the consensus.
type raftStatus struct {
	leader, term       uint64
	leads              bool
	applied, committed uint64
	conf               *raftpb.ConfState
	since              time.Time // when leader became what it is
}

// New makes the server of what the log held.
func New(opt Options) (*Server, error) {
	boot, err := load(opt)
	if err != nil {
		return nil, err
	}
	s := &Server{
		opt: opt, log: opt.Log.With("component", "consensus"), started: time.Now(),
		messages: make(chan []*raftpb.Message, 1024), proposals: make(chan *proposal, maxPending), reads: make(chan *wait[*state.View], maxPending),
		calls: make(chan func(), 1024), done: make(chan struct{}), addresses: map[uint64]string{}, hub: newHub(),
	}
	// Neither numbers nor read rounds of a former process of this node may be
	// taken for this one's.
	s.request.Store(opt.Identity.RaftID<<40 | rand.Uint64N(1<<39))
	s.r, err = replica.New(replica.Config{
		RaftID: opt.Identity.RaftID, ElectionTicks: opt.ElectionTicks, HeartbeatTicks: 1, MaxVoters: opt.MaxVoters, Control: opt.Control, Logger: raftLogger{s.log},
	}, boot)
	if err != nil {
		return nil, err
	}
	s.loop = replica.NewLoop(s.r, replica.LoopConfig{
		TickMS: opt.Tick.Milliseconds(), ElectionTicks: opt.ElectionTicks, SnapshotEntries: opt.SnapshotEntries, TrailingEntries: trailingEntries, FirstRead: rand.Uint64(),
	})
	s.hub.reset(boot.State.Index())
	s.base.Store(&base{boot.State.View(), boot.Conf})
	s.publish(boot.State.Index())
	return s, nil
}

// load turns what the log held into a replica's start.
func load(opt Options) (replica.Boot, error) {
	boot := replica.Joining()
	if opt.Opened.Snapshot != nil {
		boot.Conf = opt.Opened.Snapshot.GetConfState()
		err := opt.Opened.LoadSnapshot(snapshotInto(&boot))
		if err != nil {
			return boot, fmt.Errorf("loading the snapshot at %d: %w", opt.Opened.Snapshot.GetIndex(), err)
		}
		if boot.State.Index() != opt.Opened.Snapshot.GetIndex() {
			return boot, fmt.Errorf("the snapshot at %d holds the state at %d: %w", opt.Opened.Snapshot.GetIndex(), boot.State.Index(), raftlog.ErrCorrupt)
		}
	}
	boot.HardState, boot.Entries = opt.Opened.HardState, opt.Opened.Entries
	return boot, nil
}

// Run drives the replica until ctx ends or the disk fails.
func (s *Server) Run(ctx context.Context) error {
	defer s.wg.Wait()
	defer close(s.done) // first: who calls in from outside must not wait for us
	tick := time.NewTicker(s.opt.Tick)
	defer tick.Stop()
	hurry := time.NewTimer(time.Hour)
	defer hurry.Stop()
	hurryAt := int64(0) // what the timer is set to
	s.now()
	s.peersChanged()
	if err := s.loop.Begin(); err != nil {
		return err
	}
	if err := s.settle(); err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			s.failAll()
			return s.fatal
		case <-tick.C:
			s.now()
			s.loop.Tick()
		case <-hurry.C:
			s.now()
			s.loop.Wake()
			hurryAt = 0
		case m := <-s.messages:
			s.now()
			s.step(m)
		case p := <-s.proposals:
			s.now()
			s.loop.Propose(&p.Proposal)
		case rd := <-s.reads:
			s.now()
			s.loop.Read(rd)
		case f := <-s.calls:
			s.now()
			f()
		}
		s.drain()
		if err := s.settle(); err != nil {
			s.failAll()
			return err
		}
		if at := s.loop.WakeMS(); at != hurryAt {
			hurryAt = at
			if at != 0 {
				hurry.Reset(time.Until(s.started.Add(time.Duration(at) * time.Millisecond)))
			}
		}
	}
}

// now tells the replica the time.
func (s *Server) now() {
	t := time.Now()
	s.loop.SetNow(t.Sub(s.started).Milliseconds(), t.UnixMilli())
}

// drain takes along what else has arrived, so that one write and one fsync
// serve all of it.
func (s *Server) drain() {
	for range loopBatch {
		select {
		case m := <-s.messages:
			s.step(m)
		case p := <-s.proposals:
			s.loop.Propose(&p.Proposal)
		case rd := <-s.reads:
			s.loop.Read(rd)
		case f := <-s.calls:
			f()
		default:
			return
		}
	}
}

func (s *Server) step(messages []*raftpb.Message) {
	for _, m := range messages {
		if err := s.loop.Step(m); err != nil {
			s.log.Warn("raft refuses a message", "event", "message_refused", "type", m.GetType().String(), "from", m.GetFrom(), "error", err)
		}
	}
}

// settle proposes what was taken, and carries out what the replica says until
// it has nothing more to say.
func (s *Server) settle() error {
	for rd, ok := s.loop.Next(); ok; rd, ok = s.loop.Next() {
		if err := s.ready(rd); err != nil {
			return err
		}
	}
	if st := s.status.Load(); st.leader != s.r.Leader() { // known from silence, not by a word of raft's
		s.log.Info("the leader is out of touch", "event", "leader_silent", "leader", s.nameOf(st.leader), "raft_term", st.term)
		s.publish(st.applied)
	}
	s.opt.Metrics.proposed(s.loop.Handed())
	if s.loop.SnapshotDue() {
		s.snapshot(nil)
	}
	return s.fatal
}

// ready carries out one Ready: persist, send, apply, answer.
func (s *Server) ready(rd replica.Ready) error {
	if len(rd.Early) > 0 {
		s.opt.Transport.Send(rd.Early)
	}
	if rd.Snapshot != nil {
		s.log.Info("installing a snapshot", "event", "snapshot_installed", "index", rd.Snapshot.GetIndex())
		if err := s.opt.Opened.Log.Install(rd.Snapshot, writeView(rd.Restored)); err != nil {
			return fmt.Errorf("making a received snapshot durable: %w", err)
		}
		s.base.Store(&base{rd.Restored, rd.Snapshot.GetConfState()})
	}
	if rd.HardState != nil || len(rd.Entries) > 0 || rd.MustSync {
		start := time.Now()
		if err := s.opt.Opened.Log.Save(rd.HardState, rd.Entries, rd.MustSync); err != nil {
			return fmt.Errorf("making log entries durable: %w", err)
		}
		s.opt.Metrics.saved(time.Since(start), len(rd.Entries))
		s.now() // a slow disk must not make leases look older than they are
	}
	s.send(rd.Messages)
	start := time.Now()
	out, err := s.loop.Advance(rd)
	if err != nil {
		return err
	}
	if len(out.Results) > 0 {
		s.opt.Metrics.applied(time.Since(start), len(out.Results))
	}
	s.finish(out)
	return nil
}

// send hands messages to the transport; snapshots go with the view they are of.
func (s *Server) send(messages []*raftpb.Message) {
	plain := messages[:0:0]
	for _, m := range messages {
		if m.GetType() != raftpb.MsgSnap {
			plain = append(plain, m)
			continue
		}
		view := s.r.View()
		if view.Index != m.GetSnapshot().GetMetadata().GetIndex() {
			s.r.SnapshotSent(m.GetTo(), false) // raft asks again
			continue
		}
		s.log.Info("sending a snapshot", "event", "snapshot_sent", "to", m.GetTo(), "index", view.Index)
		s.opt.Transport.SendSnapshot(m, writeView(view))
	}
	if len(plain) > 0 {
		s.opt.Transport.Send(plain)
	}
}

// finish answers whoever waited for what was just applied.
func (s *Server) finish(out replica.Output) {
	s.publish(out.Applied)
	if out.Restored {
		s.hub.reset(out.Applied)
	} else {
		s.hub.add(out.Applied, out.Changes)
	}
	s.loop.Answer(out)
	if out.Members {
		s.peersChanged()
	}
	if out.NewLeader || out.NewTerm {
		lead, term := s.r.Leader(), s.r.Term()
		if out.NewLeader {
			s.log.Info("leader changed", "event", "leader_changed", "leader", s.nameOf(lead), "raft_term", term)
		}
		s.opt.Metrics.leader(lead == s.opt.Identity.RaftID, term)
	}
}

func (s *Server) publish(applied uint64) {
	v := s.r.View()
	s.view.Store(v)
	now := &raftStatus{leader: s.r.Leader(), term: s.r.Term(), leads: s.r.Leads(), applied: max(applied, v.Index), committed: s.r.Committed(), conf: s.r.ConfState()}
	if was := s.status.Load(); was != nil && was.leader == now.leader {
		now.since = was.since
	} else {
		now.since = time.Now()
	}
	s.status.Store(now)
	s.opt.Metrics.progress(v, s.loop.Waiting())
}

func (s *Server) nameOf(raftID uint64) string {
	if n := s.r.View().NodeByRaftID(raftID); n != nil {
		return string(n.Name)
	}
	return ""
}

// peersChanged tells the transport where everybody is: all nodes, and those
// that were removed as long as the consensus still counts on their answers.
func (s *Server) peersChanged() {
	var peers []transport.Peer
	s.r.View().Nodes(func(n *blixard.Node) bool {
		if !n.Simulated {
			peers = append(peers, transport.Peer{RaftID: n.RaftID, Address: n.Address})
			s.addresses[n.RaftID] = n.Address
		}
		return true
	})
	if len(peers) == 0 { // just joined: the identity says whom to listen to
		for _, p := range s.opt.Identity.Peers {
			peers = append(peers, transport.Peer{RaftID: p.RaftID, Address: p.Address})
		}
	} else {
		conf := s.r.ConfState()
		for _, id := range slices.Concat(conf.GetVoters(), conf.GetLearners(), conf.GetVotersOutgoing()) {
			if address := s.addresses[id]; address != "" && s.r.View().NodeByRaftID(id) == nil {
				peers = append(peers, transport.Peer{RaftID: id, Address: address})
			}
		}
	}
	s.opt.Transport.SetPeers(peers)
}

// Known tells whether a raft ID is a member's, see replica.Known.
func (s *Server) Known(raftID uint64) bool {
	return replica.Known(s.View(), s.status.Load().conf, raftID)
}

// WasRemoved tells whether a raft ID was a member's and will never be again.
func (s *Server) WasRemoved(raftID uint64) bool {
	return replica.WasRemoved(s.View(), s.status.Load().conf, raftID)
}

// snapshot writes one of the applied state in the background; done gets its
// index or the error.
func (s *Server) snapshot(done func(uint64, error)) {
	meta, view := s.loop.BeginSnapshot()
	s.wg.Go(func() {
		start := time.Now()
		size := 0
		write := writeView(view)
		err := s.opt.Opened.Log.WriteSnapshot(meta, func(w io.Writer) error { return write(&counting{w: w, n: &size}) })
		s.opt.Metrics.snapshot(time.Since(start))
		s.call(func() {
			if err == nil {
				err = s.opt.Opened.Log.Compact(view.Index)
			}
			if err == nil && view.Index > s.base.Load().view.Index { // one may have been installed meanwhile
				s.base.Store(&base{view, meta.GetConfState()})
			}
			err = errors.Join(err, s.loop.SnapshotEnded(view.Index, size, err == nil))
			if err != nil {
				s.fatal = fmt.Errorf("writing a snapshot at %d: %w", view.Index, err)
			}
			if done != nil {
				done(view.Index, err)
			}
			after := s.afterSnapshot
			s.afterSnapshot = nil
			for _, f := range after {
				f()
			}
		})
	})
}

// counting counts what is written through it.
type counting struct {
	w io.Writer
	n *int
}

func (c *counting) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	*c.n += n
	return n, err
}

// call runs f in the loop; false if the loop has ended.
func (s *Server) call(f func()) bool {
	select {
	case s.calls <- f:
		return true
	case <-s.done:
		return false
	}
}

// Close releases the log after Run has ended.
func (s *Server) Close() error {
	if err := s.opt.Opened.Log.Close(); err != nil && s.fatal == nil {
		return fmt.Errorf("closing the log: %w", err)
	}
	return nil
}

var errStopped = &blixard.Error{Code: blixard.CodeUnavailable, Message: "this server is stopping", Hint: "ask another node"}

// Deliver implements transport.Handler.
func (s *Server) Deliver(ctx context.Context, messages []*raftpb.Message) error {
	select {
	case s.messages <- messages:
		return nil
	case <-s.done:
		return errStopped
	case <-ctx.Done():
		return ctx.Err()
	}
}

// PeerGone implements transport.Handler.
func (s *Server) PeerGone(raftID uint64) {
	s.call(func() {
		if s.loop.PeerGone(raftID) {
			s.log.Info("the leader's process is gone", "event", "leader_gone", "leader", s.nameOf(raftID))
		}
	})
}

// Unreachable implements transport.Handler.
func (s *Server) Unreachable(raftID uint64) { s.call(func() { s.r.Unreachable(raftID) }) }

// SnapshotSent implements transport.Handler.
func (s *Server) SnapshotSent(raftID uint64, err error) {
	if err != nil && !errors.Is(err, context.Canceled) {
		s.log.Warn("sending a snapshot failed", "event", "snapshot_failed", "to", raftID, "error", err)
	}
	s.call(func() { s.r.SnapshotSent(raftID, err == nil) })
}
