package replica_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/blixard/blixard/internal/raftlog"
	"github.com/blixard/blixard/internal/replica"
	"github.com/blixard/blixard/internal/state"
)

// server drives a replica as internal/server does, on the world's clock. A sync
// takes time: until it is over the loop does nothing else, what arrives waits,
// and a crash finds the disk in between.
type server struct {
	m         *machine
	r         *replica.Replica
	log       raftlog.Log
	startedMS int64 // monotonic

	inbox    []func()
	syncing  bool
	settling bool
	ticking  bool // a tick waits in the inbox

	waiting map[uint64]*proposal
	fresh   []*proposal
	request uint64

	round     *round
	nextReads []func(*state.View)
	readSeq   uint64

	lastSnapshot uint64
	snapshotting bool
	lastLead     uint64
	lastTerm     uint64

	agent *agent
}

type proposal struct {
	request uint64
	encoded []byte
	sentMS  int64 // monotonic; 0: not handed to raft
	done    func(state.Result)
}

// round is one question for a read index and who waits for it.
type round struct {
	id, index uint64
	askedMS   int64
	reads     []func(*state.View)
}

const resendMS = 2000

func newServer(m *machine) *server {
	s := &server{m: m, startedMS: m.monoMS(), waiting: map[uint64]*proposal{}}
	opened, err := m.disk.Open()
	if err != nil {
		m.w.violated("%s cannot open its log: %v", m.name, err)
	}
	s.log = opened.Log
	s.request = m.raftID<<40 | uint64(m.lives)<<24
	s.readSeq = m.w.rng.Uint64()
	s.r, err = replica.New(replica.Config{
		RaftID: m.raftID, ElectionTicks: electionT, HeartbeatTicks: 1, MaxVoters: m.w.opt.MaxVoters, Control: controlConfig(), Logger: raftLogger{},
	}, s.load(opened))
	if err != nil {
		m.w.violated("%s cannot start: %v", m.name, err)
	}
	s.lastSnapshot = s.r.View().Index
	s.agent = newAgent(s)
	return s
}

func (s *server) load(opened raftlog.Opened) replica.Boot {
	boot := replica.Joining()
	if opened.Snapshot != nil {
		boot.Conf = opened.Snapshot.GetConfState()
		err := opened.LoadSnapshot(func(r io.Reader) error {
			st, err := state.Read(r)
			boot.State = st
			return err
		})
		if err != nil {
			s.m.w.violated("%s cannot load its snapshot: %v", s.m.name, err)
		}
	}
	boot.HardState, boot.Entries = opened.HardState, opened.Entries
	return boot
}

// begin starts what goes on by itself.
func (s *server) begin() {
	s.setNow()
	if conf := s.r.ConfState(); len(conf.GetVoters()) == 1 && conf.GetVoters()[0] == s.m.raftID {
		if err := s.r.Campaign(); err != nil {
			s.m.w.violated("%s cannot start an election: %v", s.m.name, err)
		}
	}
	s.m.w.check.applied(s, replica.Output{Restored: true})
	s.every(tickMS, func() {
		if s.ticking {
			return // a ticker drops what nobody takes
		}
		s.ticking = true
		s.enter(s.tick)
	})
	s.agent.begin()
	s.settle()
}

func (s *server) alive() bool { return s.m.srv == s }

// after runs something later by the machine's clock, if the process lives.
func (s *server) after(localMS int64, do func()) {
	s.m.w.after(s.m.trueMS(localMS), func() {
		if s.alive() {
			do()
		}
	})
}

func (s *server) every(localMS int64, do func()) {
	s.after(localMS, func() {
		do()
		s.every(localMS, do)
	})
}

// enter has the loop do something as soon as it is free.
func (s *server) enter(do func()) {
	if !s.alive() {
		return
	}
	s.inbox = append(s.inbox, do)
	s.drain()
}

// drain takes all that waits, then settles, as the real loop does.
func (s *server) drain() {
	for len(s.inbox) > 0 && s.alive() && !s.syncing && !s.settling && !s.m.paused() {
		s.setNow()
		all := s.inbox
		s.inbox = nil
		s.settling = true
		for _, do := range all {
			do()
		}
		s.settle()
	}
}

func (s *server) setNow() { s.r.SetNow(s.m.monoMS()-s.startedMS, s.m.wallMS()) }

func (s *server) step(m *raftpb.Message) {
	if err := s.r.Step(m); err != nil {
		s.m.w.say("%s refuses a %s of %d: %v", s.m.name, m.GetType(), m.GetFrom(), err)
	}
}

func (s *server) tick() {
	s.ticking = false
	s.r.Tick()
	now := s.m.monoMS()
	if s.r.Leader() != 0 {
		leads := s.r.Leads()
		s.repropose(func(p *proposal) bool { return p.sentMS == 0 || !leads && now-p.sentMS > resendMS })
	}
	if s.round != nil && s.round.index == 0 && now-s.round.askedMS > 5*tickMS {
		s.askAgain()
	}
}

// settle carries out what the replica says until it has nothing more to say or
// a sync has to be waited for.
func (s *server) settle() {
	s.settling = true
	defer func() { s.settling = false }()
	if fresh := s.fresh; len(fresh) > 0 {
		s.fresh = nil
		s.hand(fresh)
	}
	s.startRound()
	for {
		for s.r.HasReady() {
			if !s.ready() {
				return
			}
		}
		s.r.Control()
		if !s.r.HasReady() {
			break
		}
	}
	s.maybeSnapshot()
}

// ready carries out one Ready; false if it is not finished.
func (s *server) ready() bool {
	rd := s.r.Ready()
	for _, m := range rd.Early {
		s.m.w.net.send(s, m)
	}
	if rd.Snapshot != nil {
		s.m.w.count["snapshot installed"]++
		s.m.w.say("%s installs the snapshot of %d", s.m.name, rd.Snapshot.GetIndex())
		if err := s.log.Install(rd.Snapshot, writeView(rd.Restored)); err != nil {
			return s.failed(err)
		}
		s.lastSnapshot = rd.Snapshot.GetIndex()
	}
	if rd.HardState != nil || len(rd.Entries) > 0 {
		s.m.w.check.saved(s, rd.Entries)
		if err := s.log.Save(rd.HardState, rd.Entries, false); err != nil {
			return s.failed(err)
		}
	}
	if rd.MustSync {
		if delay := s.m.w.between(0, s.m.syncMS); delay > 0 {
			s.syncing = true
			s.m.w.after(delay, func() {
				if s.alive() {
					s.syncing = false
					s.synced(rd)
				}
			})
			return false
		}
		if err := s.log.Save(nil, nil, true); err != nil {
			return s.failed(err)
		}
	}
	return s.finish(rd)
}

// synced goes on when a sync is over.
func (s *server) synced(rd replica.Ready) {
	s.setNow()
	if err := s.log.Save(nil, nil, true); err != nil {
		s.failed(err)
		return
	}
	s.settling = true
	ok := s.finish(rd)
	s.settling = false
	if ok {
		s.settle()
		s.drain()
	}
}

// failed ends the process: what the disk holds is not known any more.
func (s *server) failed(err error) bool {
	if !errors.Is(err, errDisk) {
		s.m.w.violated("%s: its log refuses: %v", s.m.name, err)
	}
	s.m.w.say("%s ends: %v", s.m.name, err)
	s.m.end(s.m.w.rng.IntN(s.m.disk.Unsynced() + 1))
	return false
}

func (s *server) finish(rd replica.Ready) bool {
	for _, m := range rd.Messages {
		if m.GetType() != raftpb.MsgSnap {
			s.m.w.net.send(s, m)
			if m.GetType() == raftpb.MsgVoteResp && !m.GetReject() {
				s.m.w.faults.voted(s.m, m.GetTo())
			}
			continue
		}
		if v := s.r.View(); v.Index == m.GetSnapshot().GetMetadata().GetIndex() {
			s.m.w.net.sendSnapshot(s, m, v)
		} else {
			s.r.SnapshotSent(m.GetTo(), false)
		}
	}
	out, err := s.r.Advance(rd)
	if err != nil {
		s.m.w.violated("%s cannot go on: %v", s.m.name, err)
	}
	s.m.w.check.applied(s, out)
	for i := range out.Results {
		res := out.Results[i]
		if p := s.waiting[res.Request]; p != nil {
			delete(s.waiting, res.Request)
			s.m.w.after(0, func() { p.done(res) })
		}
	}
	for _, rr := range out.Reads {
		if s.round != nil && s.round.id == rr.ID {
			s.round.index = max(rr.Index, 1)
		}
	}
	s.serveReads(out.Applied)
	if lead, term := s.r.Leader(), s.r.Term(); lead != s.lastLead || term != s.lastTerm || out.Restored {
		if lead != s.lastLead {
			s.m.w.say("%s sees leader %d of term %d", s.m.name, lead, term)
		}
		s.lastLead, s.lastTerm = lead, term
		if lead != 0 {
			s.repropose(func(*proposal) bool { return true })
			s.askAgain()
		}
	}
	if out.Applied > 0 && len(out.Changes) > 0 || out.Restored {
		s.after(0, s.agent.act)
	}
	return true
}

// propose hands in a command; done may never be called.
func (s *server) propose(e state.Envelope, done func(state.Result)) {
	s.request++
	e.Request, e.NowMS = s.request, s.m.wallMS()
	p := &proposal{request: e.Request, encoded: state.AppendEnvelope(nil, &e), done: done}
	s.waiting[p.request] = p
	s.fresh = append(s.fresh, p)
}

func (s *server) hand(all []*proposal) {
	encoded := make([][]byte, len(all))
	for i, p := range all {
		encoded[i] = p.encoded
	}
	err := s.r.Propose(state.PackEntry(encoded))
	for _, p := range all {
		p.sentMS = s.m.monoMS()
		if err != nil {
			p.sentMS = 0
		}
	}
}

func (s *server) repropose(keep func(*proposal) bool) {
	var all []*proposal
	for _, id := range sorted(s.waiting) {
		if p := s.waiting[id]; keep(p) {
			all = append(all, p)
		}
	}
	if len(all) > 0 {
		s.hand(all)
	}
}

// read calls done with a linearizable view, perhaps never.
func (s *server) read(done func(*state.View)) { s.nextReads = append(s.nextReads, done) }

func (s *server) startRound() {
	if s.round != nil || len(s.nextReads) == 0 {
		return
	}
	s.readSeq++
	s.round = &round{id: s.readSeq, askedMS: s.m.monoMS(), reads: s.nextReads}
	s.nextReads = nil
	s.r.Read(s.round.id)
}

func (s *server) serveReads(applied uint64) {
	if s.round == nil || s.round.index == 0 || applied < s.round.index {
		return
	}
	v := s.r.View()
	for _, done := range s.round.reads {
		s.m.w.after(0, func() { done(v) })
	}
	s.round = nil
	s.startRound()
}

func (s *server) askAgain() {
	if s.round == nil || s.round.index != 0 {
		return
	}
	s.nextReads = slices.Concat(s.round.reads, s.nextReads)
	s.round = nil
	s.startRound()
}

// maybeSnapshot writes a snapshot beside the loop when the log has grown.
func (s *server) maybeSnapshot() {
	v := s.r.View()
	if s.snapshotting || v.Index-s.lastSnapshot < s.m.w.opt.SnapshotEntries {
		return
	}
	meta := &raftpb.SnapshotMetadata{ConfState: s.r.ConfState(), Index: proto.Uint64(v.Index), Term: proto.Uint64(v.Term)}
	s.snapshotting = true
	s.m.w.count["snapshot written"]++
	s.after(s.m.w.between(1, 50), func() {
		dropped := s.lastSnapshot > v.Index // a newer one was installed meanwhile
		if dropped {
			s.m.w.count["snapshot outdated"]++
		}
		if !dropped {
			if err := s.log.WriteSnapshot(meta, writeView(v)); err != nil {
				s.failed(err)
				return
			}
		}
		s.enter(func() {
			s.snapshotting = false
			if dropped {
				return
			}
			s.lastSnapshot = max(s.lastSnapshot, v.Index)
			err := s.log.Compact(v.Index)
			if keep := s.m.w.opt.TrailingEntries; err == nil && v.Index > keep {
				err = s.r.Compact(v.Index - keep)
			}
			if err != nil {
				s.m.w.violated("%s cannot compact: %v", s.m.name, err)
			}
		})
	})
}

func writeView(v *state.View) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := v.WriteTo(w)
		return err
	}
}

// copyView makes a state of its own of a view.
func copyView(v *state.View) (*state.State, error) {
	var b bytes.Buffer
	if _, err := v.WriteTo(&b); err != nil {
		return nil, err
	}
	return state.Read(&b)
}

// raftLogger keeps quiet, and ends the run when raft gives up.
type raftLogger struct{}

func (raftLogger) Debug(...any)              {}
func (raftLogger) Debugf(string, ...any)     {}
func (raftLogger) Error(...any)              {}
func (raftLogger) Errorf(string, ...any)     {}
func (raftLogger) Info(...any)               {}
func (raftLogger) Infof(string, ...any)      {}
func (raftLogger) Warning(...any)            {}
func (raftLogger) Warningf(string, ...any)   {}
func (raftLogger) Fatal(v ...any)            { panic(fmt.Sprint(v...)) }
func (raftLogger) Fatalf(f string, v ...any) { panic(fmt.Sprintf(f, v...)) }
func (raftLogger) Panic(v ...any)            { panic(fmt.Sprint(v...)) }
func (raftLogger) Panicf(f string, v ...any) { panic(fmt.Sprintf(f, v...)) }
