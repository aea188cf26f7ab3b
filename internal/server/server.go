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
	"google.golang.org/protobuf/proto"

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
	entryBytes      = 1 << 20 // of proposals packed into one raft entry
	loopBatch       = 512
	trailingEntries = 5_000 // kept in memory behind a snapshot, for followers that are a little behind
	snapshotBytes   = 64 << 20
	cheapSnapshot   = 4 << 20 // a state this small may be written as often as configured
	resendAfter     = 2 * time.Second
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
	reads     chan *read
	calls     chan func()
	done      chan struct{} // closed when the loop has ended

	view   atomic.Pointer[state.View]
	status atomic.Pointer[raftStatus]
	hub    *hub

	request      atomic.Uint64
	pending      atomic.Int64
	pendingBytes atomic.Int64

	// Owned by the loop.
	waiting       map[uint64]*proposal
	fresh         []*proposal // taken, not yet handed to raft
	round         *round      // the read round under way, nil if none
	nextReads     []*read
	readySeq      uint64
	lastSnapshot  uint64
	sinceBytes    int
	stateBytes    int // of the newest snapshot written here
	snapshotting  bool
	afterSnapshot []func() // wait for the one being written
	lastLead      uint64
	lastTerm      uint64
	hurryUntil    time.Time
	hurryFrom     time.Time // the timer is to be set to this; zero: it is
	hurryLeader   uint64
	hurryTicks    int
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
}

// New makes the server of what the log held.
func New(opt Options) (*Server, error) {
	boot, err := load(opt)
	if err != nil {
		return nil, err
	}
	s := &Server{
		opt: opt, log: opt.Log.With("component", "consensus"), started: time.Now(),
		messages: make(chan []*raftpb.Message, 1024), proposals: make(chan *proposal, maxPending), reads: make(chan *read, maxPending),
		calls: make(chan func(), 1024), done: make(chan struct{}), waiting: map[uint64]*proposal{}, addresses: map[uint64]string{}, hub: newHub(),
	}
	// Neither numbers nor read rounds of a former process of this node may be
	// taken for this one's.
	s.request.Store(opt.Identity.RaftID<<40 | rand.Uint64N(1<<39))
	s.readySeq = rand.Uint64()
	s.r, err = replica.New(replica.Config{
		RaftID: opt.Identity.RaftID, ElectionTicks: opt.ElectionTicks, HeartbeatTicks: 1, MaxVoters: opt.MaxVoters, Control: opt.Control, Logger: raftLogger{s.log},
	}, boot)
	if err != nil {
		return nil, err
	}
	s.lastSnapshot = boot.State.Index()
	s.hub.reset(boot.State.Index())
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
	s.now()
	s.peersChanged()
	if conf := s.r.ConfState(); len(conf.GetVoters()) == 1 && conf.GetVoters()[0] == s.opt.Identity.RaftID {
		if err := s.r.Campaign(); err != nil { // alone: nobody to wait for
			return fmt.Errorf("starting an election: %w", err)
		}
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
			s.r.Tick()
			s.resend()
			s.rereads()
		case <-hurry.C:
			s.now()
			s.hurryTick(hurry)
		case m := <-s.messages:
			s.now()
			s.step(m)
		case p := <-s.proposals:
			s.now()
			s.take(p)
		case rd := <-s.reads:
			s.now()
			s.nextReads = append(s.nextReads, rd)
		case f := <-s.calls:
			s.now()
			f()
		}
		s.drain()
		if err := s.settle(); err != nil {
			s.failAll()
			return err
		}
		if !s.hurryFrom.IsZero() {
			hurry.Reset(time.Until(s.hurryFrom))
			s.hurryFrom = time.Time{}
		}
	}
}

// now tells the replica the time.
func (s *Server) now() {
	t := time.Now()
	s.r.SetNow(t.Sub(s.started).Milliseconds(), t.UnixMilli())
}

// drain takes along what else has arrived, so that one write and one fsync
// serve all of it.
func (s *Server) drain() {
	for range loopBatch {
		select {
		case m := <-s.messages:
			s.step(m)
		case p := <-s.proposals:
			s.take(p)
		case rd := <-s.reads:
			s.nextReads = append(s.nextReads, rd)
		case f := <-s.calls:
			f()
		default:
			return
		}
	}
}

func (s *Server) step(messages []*raftpb.Message) {
	for _, m := range messages {
		if err := s.r.Step(m); err != nil {
			s.log.Warn("raft refuses a message", "event", "message_refused", "type", m.GetType().String(), "from", m.GetFrom(), "error", err)
		}
	}
}

// settle proposes what was taken, and carries out what the replica says until
// it has nothing more to say.
func (s *Server) settle() error {
	s.flush()
	s.startRound()
	for {
		for s.r.HasReady() {
			if err := s.ready(); err != nil {
				return err
			}
		}
		s.r.Control()
		if !s.r.HasReady() {
			break
		}
	}
	s.maybeSnapshot()
	return s.fatal
}

// ready carries out one Ready: persist, send, apply, answer.
func (s *Server) ready() error {
	rd := s.r.Ready()
	if len(rd.Early) > 0 {
		s.opt.Transport.Send(rd.Early)
	}
	if rd.Snapshot != nil {
		s.log.Info("installing a snapshot", "event", "snapshot_installed", "index", rd.Snapshot.GetIndex())
		if err := s.opt.Opened.Log.Install(rd.Snapshot, writeView(rd.Restored)); err != nil {
			return fmt.Errorf("making a received snapshot durable: %w", err)
		}
		s.lastSnapshot, s.sinceBytes = rd.Snapshot.GetIndex(), 0
	}
	if rd.HardState != nil || len(rd.Entries) > 0 {
		start := time.Now()
		if err := s.opt.Opened.Log.Save(rd.HardState, rd.Entries, rd.MustSync); err != nil {
			return fmt.Errorf("making log entries durable: %w", err)
		}
		s.opt.Metrics.saved(time.Since(start), len(rd.Entries))
		for _, e := range rd.Entries {
			s.sinceBytes += len(e.Data)
		}
	}
	s.send(rd.Messages)
	start := time.Now()
	out, err := s.r.Advance(rd)
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
	for i := range out.Results {
		res := &out.Results[i]
		if p := s.waiting[res.Request]; p != nil {
			s.answer(p, *res, nil)
		}
	}
	for _, rr := range out.Reads {
		s.readReady(rr)
	}
	s.serveReads(out.Applied)
	if out.Members {
		s.peersChanged()
	}
	lead, term := s.r.Leader(), s.r.Term()
	if lead != s.lastLead || term != s.lastTerm {
		if lead != s.lastLead {
			s.log.Info("leader changed", "event", "leader_changed", "leader", s.nameOf(lead), "raft_term", term)
		}
		s.lastLead, s.lastTerm = lead, term
		s.opt.Metrics.leader(lead == s.opt.Identity.RaftID, term)
		s.leaderChanged()
	} else if out.Restored {
		s.leaderChanged()
	}
}

func (s *Server) publish(applied uint64) {
	v := s.r.View()
	s.view.Store(v)
	s.status.Store(&raftStatus{leader: s.r.Leader(), term: s.r.Term(), leads: s.r.Leads(), applied: max(applied, v.Index), committed: s.r.Committed(), conf: s.r.ConfState()})
	s.opt.Metrics.progress(v, len(s.waiting))
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

// InConf tells whether a raft ID is in the raft configuration in force here.
func (s *Server) InConf(raftID uint64) bool {
	conf := s.status.Load().conf
	return slices.Contains(conf.GetVoters(), raftID) || slices.Contains(conf.GetLearners(), raftID) || slices.Contains(conf.GetVotersOutgoing(), raftID)
}

// maybeSnapshot writes a snapshot in the background when the log has grown: by
// as many entries as configured, and by twice as much as the last snapshot was
// long, so that writing a large state stays a small part of all that is written.
func (s *Server) maybeSnapshot() {
	applied := s.r.View().Index
	grown := applied-s.lastSnapshot >= s.opt.SnapshotEntries && (s.stateBytes < cheapSnapshot || s.sinceBytes >= 2*s.stateBytes)
	if s.snapshotting || !grown && s.sinceBytes < snapshotBytes || applied == s.lastSnapshot {
		return
	}
	s.snapshot(nil)
}

// snapshot writes one of the applied state; done gets its index or the error.
func (s *Server) snapshot(done func(uint64, error)) {
	view := s.r.View()
	meta := &raftpb.SnapshotMetadata{ConfState: s.r.ConfState(), Index: proto.Uint64(view.Index), Term: proto.Uint64(view.Term)}
	s.snapshotting, s.sinceBytes = true, 0
	s.wg.Go(func() {
		start := time.Now()
		size := 0
		write := writeView(view)
		err := s.opt.Opened.Log.WriteSnapshot(meta, func(w io.Writer) error { return write(&counting{w: w, n: &size}) })
		s.opt.Metrics.snapshot(time.Since(start))
		s.call(func() {
			s.snapshotting = false
			if err == nil {
				s.stateBytes = size
				s.lastSnapshot = max(s.lastSnapshot, view.Index) // one may have been installed meanwhile
				err = s.compact(view.Index)
			}
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

func (s *Server) compact(index uint64) error {
	if err := s.opt.Opened.Log.Compact(index); err != nil {
		return err
	}
	if index > trailingEntries && index-trailingEntries >= s.r.FirstIndex() {
		return s.r.Compact(index - trailingEntries)
	}
	return nil
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
func (s *Server) PeerGone(raftID uint64) { s.call(func() { s.peerGone(raftID) }) }

// Unreachable implements transport.Handler.
func (s *Server) Unreachable(raftID uint64) { s.call(func() { s.r.Unreachable(raftID) }) }

// SnapshotSent implements transport.Handler.
func (s *Server) SnapshotSent(raftID uint64, err error) {
	if err != nil && !errors.Is(err, context.Canceled) {
		s.log.Warn("sending a snapshot failed", "event", "snapshot_failed", "to", raftID, "error", err)
	}
	s.call(func() { s.r.SnapshotSent(raftID, err == nil) })
}
