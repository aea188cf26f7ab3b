package sim

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/blixard/blixard/internal/raftlog"
	"github.com/blixard/blixard/internal/raftlog/wal"
	"github.com/blixard/blixard/internal/replica"
	"github.com/blixard/blixard/internal/state"
)

const logDir = "/raft"

// process drives a replica.Loop as internal/server does, on the world's clock,
// and is the home of the agent. Making things durable takes time: until it is
// over the loop does nothing else, what arrives waits, and a crash finds the disk
// in between.
type process struct {
	m         *machine
	r         *replica.Replica
	loop      *replica.Loop
	log       raftlog.Log
	startedMS int64 // monotonic

	inbox    []func()
	syncing  bool
	under    replica.Ready // what is being made durable while syncing
	settling bool
	ticking  bool     // a tick waits in the inbox
	wakeMS   int64    // the loop's next wake, 0 for none
	later    []func() // what a pause holds up
	request  uint64
	// heard are who has told where it is, beside what the view knows.
	heard map[uint64]bool

	feed  replica.Feed // for those that watch
	agent *agent

	dispatcher *dispatcher // nil: nothing is played of functions
	gateway    *gateway
}

// waiter gets the loop's answers as events of the world.
type waiter[T any] struct {
	p    *process
	done func(T)
	gone func() bool // nil: never
}

func (w *waiter[T]) Gone() bool { return w.gone != nil && w.gone() }

func (w *waiter[T]) Answer(v T) { w.p.m.w.after(0, func() { w.done(v) }) }

// newProcess starts a process. An error is the log's refusal to open.
func newProcess(m *machine) (*process, error) {
	p := &process{m: m, startedMS: m.monoMS(), heard: map[uint64]bool{}}
	opened, err := wal.Open(m.fs, logDir, wal.Options{SegmentBytes: m.w.k.SegmentBytes})
	if err != nil {
		return nil, err
	}
	if opened.Repaired != "" {
		m.w.count["log repaired"]++
	}
	boot, err := p.load(opened)
	if err != nil {
		return nil, err
	}
	p.log = opened.Log
	p.request = m.raftID<<40 | uint64(m.lives)<<24
	p.r, err = replica.New(replica.Config{
		RaftID: m.raftID, ElectionTicks: m.w.k.ElectionTicks, HeartbeatTicks: 1, MaxVoters: m.w.k.MaxVoters, Control: m.w.controlConfig(), Logger: raftLogger{}, FeatureLevel: m.level,
	}, boot)
	if errors.Is(err, replica.ErrTooOld) {
		return nil, errors.Join(err, p.log.Close())
	} else if err != nil {
		m.w.violated("a node starts on what its log holds", "%s: %v", m.name, err)
	}
	p.feed = replica.Feed{Keep: m.w.k.WatchKeep}
	p.feed.Reset(boot.State.Index())
	p.loop = replica.NewLoop(p.r, replica.LoopConfig{
		TickMS: m.w.k.TickMS, ElectionTicks: m.w.k.ElectionTicks, SnapshotEntries: m.w.k.SnapshotEntries, TrailingEntries: m.w.k.TrailingEntries, FirstRead: m.w.rng.Uint64(),
	})
	p.agent = newAgent(p)
	p.newFunctions()
	return p, nil
}

func (p *process) load(opened raftlog.Opened) (replica.Boot, error) {
	boot := replica.Joining()
	if opened.Snapshot != nil {
		boot.Conf = opened.Snapshot.GetConfState()
		err := opened.LoadSnapshot(func(r io.Reader) error {
			st, err := state.Read(r)
			boot.State = st
			return err
		})
		if err != nil {
			return boot, fmt.Errorf("loading the snapshot: %w", err)
		}
	}
	boot.HardState, boot.Entries = opened.HardState, opened.Entries
	return boot, nil
}

// begin starts what goes on by itself.
func (p *process) begin() {
	p.setNow()
	if err := p.loop.Begin(); err != nil {
		p.m.w.violated("a node starts on what its log holds", "%s: %v", p.m.name, err)
	}
	p.m.w.check.applied(p, replica.Output{Restored: true})
	p.m.w.functions.applied(p, replica.Output{Restored: true})
	p.every(p.m.w.k.TickMS, p.tick)
	p.agent.begin()
	p.beginFunctions()
	p.settle()
}

func (p *process) tick() {
	if p.ticking {
		return // a ticker drops what nobody takes
	}
	p.ticking = true
	p.enter(func() {
		p.ticking = false
		p.loop.Tick()
	})
}

// reaches tells whether the address of a member is known: of the view's nodes,
// of those who joined before this one, and of who has called.
func (p *process) reaches(raftID uint64) bool {
	return raftID < p.m.raftID || p.heard[raftID] || p.r.View().NodeByRaftID(raftID) != nil
}

func (p *process) alive() bool { return p.m.proc == p }

// after runs something of this process later by the machine's clock, if it
// lives, and not while it is paused.
func (p *process) after(localMS int64, do func()) {
	p.m.w.after(p.m.trueMS(localMS), func() { p.run(do) })
}

// run runs something of this process, once it is not paused.
func (p *process) run(do func()) {
	switch {
	case !p.alive():
	case p.m.paused():
		p.later = append(p.later, do)
	default:
		do()
	}
}

func (p *process) every(localMS int64, do func()) {
	p.after(localMS, func() {
		do()
		p.every(localMS, do)
	})
}

// resumed does what a pause held up.
func (p *process) resumed() {
	later := p.later
	p.later = nil
	for _, do := range later {
		p.run(do)
	}
	p.drain()
}

// enter has the loop do something as soon as it is free.
func (p *process) enter(do func()) {
	if !p.alive() {
		return
	}
	p.inbox = append(p.inbox, do)
	p.drain()
}

// drain takes all that waits, then settles, as the real loop does.
func (p *process) drain() {
	for len(p.inbox) > 0 && p.alive() && !p.syncing && !p.settling && !p.m.paused() {
		p.setNow()
		all := p.inbox
		p.inbox = nil
		p.settling = true
		for _, do := range all {
			do()
		}
		p.settle()
	}
}

func (p *process) setNow() { p.loop.SetNow(p.m.monoMS()-p.startedMS, p.m.wallMS()) }

func (p *process) step(m *raftpb.Message) {
	if err := p.loop.Step(m); err != nil {
		p.m.w.say("%s refuses a %s of %d: %v", p.m.name, m.GetType(), m.GetFrom(), err)
	}
}

// settle carries out what the replica says until it has nothing more to say or
// a sync has to be waited for.
func (p *process) settle() {
	p.settling = true
	defer func() { p.settling = false }()
	for rd, ok := p.loop.Next(); ok; rd, ok = p.loop.Next() {
		if !p.ready(rd) {
			return
		}
	}
	p.snapshot()
	if at := p.loop.WakeMS(); at != 0 && at != p.wakeMS {
		p.wakeMS = at
		p.after(at-(p.m.monoMS()-p.startedMS), func() {
			p.wakeMS = 0
			p.enter(p.loop.Wake)
		})
	}
}

// ready carries out one Ready; false if it is not finished.
func (p *process) ready(rd replica.Ready) bool {
	w := p.m.w
	for _, m := range rd.Early {
		w.net.send(p, m)
	}
	delay := int64(0)
	if rd.MustSync {
		delay = w.between(0, p.m.syncMS)
	}
	if delay == 0 {
		if err := p.persist(rd); err != nil {
			return p.failed(err)
		}
		return p.carried(rd)
	}
	p.syncing, p.under = true, rd
	w.after(delay, func() { p.run(p.synced) })
	return false
}

// interrupted is the end of the process while the disk is at work: it has come
// as far as some operation.
func (p *process) interrupted() {
	if !p.syncing {
		return
	}
	p.syncing = false
	fs, left, err := p.m.fs, p.m.w.rng.IntN(6), errors.New("the process has ended")
	before := fs.Fault
	fs.Fault = func(op string) error {
		left--
		if left < 0 {
			return err
		}
		if before != nil {
			return before(op)
		}
		return nil
	}
	if p.persist(p.under) != nil {
		p.m.w.count["write interrupted"]++
	}
	fs.Fault = before
}

func (p *process) persist(rd replica.Ready) error {
	w := p.m.w
	if rd.Snapshot != nil {
		w.count["snapshot installed"]++
		w.say("%s installs the snapshot of %d", p.m.name, rd.Snapshot.GetIndex())
		if err := p.log.Install(rd.Snapshot, writeView(rd.Restored)); err != nil {
			return err
		}
	}
	if rd.HardState == nil && len(rd.Entries) == 0 && !rd.MustSync {
		return nil
	}
	w.check.saved(p, rd.Entries)
	return p.log.Save(rd.HardState, rd.Entries, rd.MustSync)
}

// synced goes on when the disk is done.
func (p *process) synced() {
	rd := p.under
	p.syncing, p.under = false, replica.Ready{}
	if err := p.persist(rd); err != nil {
		p.failed(err)
		return
	}
	p.setNow()
	p.settling = true
	ok := p.carried(rd)
	p.settling = false
	if ok {
		p.settle()
		p.drain()
	}
}

// failed ends the process: what the disk holds is not known any more.
func (p *process) failed(err error) bool {
	m := p.m
	if !errors.Is(err, errDisk) && !errors.Is(err, errFull) {
		m.w.violated("the log takes what the replica saves", "%s: %v", m.name, err)
	}
	m.w.count["process ended by its disk"]++
	m.w.say("%s ends: %v", m.name, err)
	fault, space := m.fs.Fault, m.fs.Space
	m.kill()
	m.fs.Fault, m.fs.Space = fault, space
	m.again(m.w.between(500, 3000))
	return false
}

// carried sends, applies and answers.
func (p *process) carried(rd replica.Ready) bool {
	w := p.m.w
	for _, m := range rd.Messages {
		if m.GetType() != raftpb.MsgSnap {
			w.net.send(p, m)
			if m.GetType() == raftpb.MsgVoteResp && !m.GetReject() {
				w.faults.voted(p.m, m.GetTo())
			}
			continue
		}
		if v := p.r.View(); v.Index == m.GetSnapshot().GetMetadata().GetIndex() {
			w.net.sendSnapshot(p, m, v)
		} else {
			p.r.SnapshotSent(m.GetTo(), false)
		}
	}
	out, err := p.loop.Advance(rd)
	w.check.raised(p.r.View())
	if err != nil && p.m.tooOld(err) {
		return false
	} else if err != nil {
		w.violated("committed entries can be applied", "%s: %v", p.m.name, err)
	}
	w.check.levels(p, out.Applied)
	w.check.applied(p, out)
	w.functions.applied(p, out)
	if out.Restored {
		p.feed.Reset(out.Applied)
	} else {
		p.feed.Add(out.Applied, out.Changes)
	}
	p.loop.Answer(out)
	if out.NewLeader {
		w.say("%s sees leader %d of term %d", p.m.name, p.r.Leader(), p.r.Term())
	}
	p.agent.applied(out)
	p.functionsApplied(out)
	return true
}

// propose hands in a command; done may never be called.
func (p *process) propose(e state.Envelope, done func(state.Result), gone func() bool) {
	if err := p.allowed(e.Command); err != nil {
		p.m.w.after(0, func() { done(state.Result{Err: err}) })
		return
	}
	p.request++
	e.Request = p.request
	if e.NowMS == 0 {
		e.NowMS = p.m.wallMS()
	}
	p.loop.Propose(&replica.Proposal{Request: e.Request, Encoded: state.AppendEnvelope(nil, &e), Waiter: &waiter[state.Result]{p, done, gone}})
}

// read calls done with a linearizable view, perhaps never.
func (p *process) read(done func(*state.View)) {
	p.loop.Read(&waiter[*state.View]{p: p, done: done})
}

// snapshot writes a snapshot when one is due.
func (p *process) snapshot() {
	if p.loop.SnapshotDue() {
		p.write()
	}
}

// write writes a snapshot beside the loop.
func (p *process) write() {
	meta, v := p.loop.BeginSnapshot()
	var write func()
	write = func() {
		if p.syncing { // the disk has one thing to do at a time
			p.after(1, write)
			return
		}
		size := 0
		err := p.log.WriteSnapshot(meta, func(out io.Writer) error {
			n, err := v.WriteTo(out)
			size = int(n)
			return err
		})
		if err == nil {
			p.m.w.count["snapshot written"]++
			err = p.log.Compact(v.Index)
		}
		if err != nil {
			p.failed(err)
			return
		}
		p.enter(func() {
			if err := p.loop.SnapshotEnded(v.Index, size, true); err != nil {
				p.m.w.violated("the log can be compacted", "%s: %v", p.m.name, err)
			}
		})
	}
	p.after(p.m.w.between(1, 50), write)
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

// found begins the log of a new cluster on a disk.
func beginLog(m *machine) error {
	opened, err := wal.Open(m.fs, logDir, wal.Options{SegmentBytes: m.w.k.SegmentBytes})
	if err != nil {
		return err
	}
	boot := replica.NewCluster(m.raftID)
	v := boot.State.View()
	meta := &raftpb.SnapshotMetadata{ConfState: boot.Conf, Index: new(v.Index), Term: new(v.Term)}
	return errors.Join(opened.Log.Install(meta, writeView(v)), opened.Log.Save(boot.HardState, nil, true), opened.Log.Close())
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
