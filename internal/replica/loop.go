package replica

import (
	"fmt"
	"slices"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/blixard/blixard/internal/state"
)

// Bounds and times of a Loop.
const (
	entryBytes  = 1 << 20 // of proposals packed into one raft entry
	resendMS    = 2000    // a proposal that went to another node is made again after
	rereadTicks = 5       // a read round without an answer is asked again after
)

// Waiter is who waits for an answer. It is given at most one.
type Waiter[T any] interface {
	// Gone tells that nobody waits any more.
	Gone() bool
	// Answer must not call back into the loop.
	Answer(T)
}

// Proposal is a command on its way, and who waits for it.
type Proposal struct {
	Request uint64
	Encoded []byte // by state.AppendEnvelope, with Request in it
	Waiter  Waiter[state.Result]

	sentMS int64
	sent   bool // handed to raft
}

// round is one ReadIndex question and the reads it serves.
type round struct {
	id      uint64
	askedMS int64
	index   uint64 // the answer; 0: none yet
	reads   []Waiter[*state.View]
}

// LoopConfig is what a Loop has to know.
type LoopConfig struct {
	TickMS        int64
	ElectionTicks int
	// SnapshotEntries is how many entries are applied between snapshots.
	SnapshotEntries uint64
	// TrailingEntries are kept in memory behind a snapshot, for followers that
	// are a little behind.
	TrailingEntries uint64
	// FirstRead numbers read rounds: an answer to a former process of this node
	// must not be taken for one to this.
	FirstRead uint64
}

// Loop is the server of one node without its IO: it knows who waits for what,
// packs proposals into entries, makes them again when they may have got lost,
// asks for read indexes, grants leases, and says when a snapshot is due.
//
// The driver tells the time by SetNow, hands in what happens, and then does
//
//	for rd, ok := l.Next(); ok; rd, ok = l.Next() {
//		send rd.Early; persist; send rd.Messages   // see the package
//		l.SetNow(...)
//		out := l.Advance(rd)
//		make l.Replica().View() public
//		l.Answer(out)
//	}
//
// until nothing is left. Ownership is the replica's: one goroutine.
type Loop struct {
	r   *Replica
	cfg LoopConfig

	waiting map[uint64]*Proposal
	fresh   []*Proposal // taken, not yet handed to raft
	handed  int

	round     *round // under way, nil if none
	nextReads []Waiter[*state.View]
	readSeq   uint64

	lastLead, lastTerm uint64
	hurry              hurry
	snapshots          snapshots
}

// NewLoop makes the loop of a replica that has just been made.
func NewLoop(r *Replica, cfg LoopConfig) *Loop {
	return &Loop{r: r, cfg: cfg, waiting: map[uint64]*Proposal{}, readSeq: cfg.FirstRead, snapshots: snapshots{last: r.st.Index()}}
}

// Replica is the core it drives, for what needs no waiting.
func (l *Loop) Replica() *Replica { return l.r }

// SetNow tells the time, see Replica.SetNow.
func (l *Loop) SetNow(monoMS, wallMS int64) { l.r.SetNow(monoMS, wallMS) }

// Begin starts an election if there is nobody to wait for.
func (l *Loop) Begin() error {
	if voters := l.r.conf.GetVoters(); len(voters) == 1 && voters[0] == l.r.cfg.RaftID {
		if err := l.r.Campaign(); err != nil {
			return fmt.Errorf("starting an election: %w", err)
		}
	}
	return nil
}

// Tick is called at every tick.
func (l *Loop) Tick() {
	l.r.Tick()
	l.resend()
	if l.round != nil && l.round.index == 0 && l.r.nowMonoMS-l.round.askedMS > rereadTicks*l.cfg.TickMS {
		l.askAgain()
	}
}

// Propose takes a proposal; Next hands it on, with all that came beside it.
func (l *Loop) Propose(p *Proposal) {
	if p.Waiter.Gone() {
		return // given up before it was taken
	}
	l.waiting[p.Request] = p
	l.fresh = append(l.fresh, p)
}

// Forget stops waiting for a proposal, which may still be carried out.
func (l *Loop) Forget(request uint64) { delete(l.waiting, request) }

// MayHappen tells whether a proposal that was given up, or is not answered yet,
// may be carried out: it was handed on. For the loop's goroutine.
func (p *Proposal) MayHappen() bool { return p.sent }

// Waiting is how many proposals wait for their result.
func (l *Loop) Waiting() int { return len(l.waiting) }

// Handed is how often a proposal was handed to raft since the last call.
func (l *Loop) Handed() int {
	n := l.handed
	l.handed = 0
	return n
}

// Read answers with a linearizable view, as soon as the leader has confirmed
// one that is.
func (l *Loop) Read(w Waiter[*state.View]) { l.nextReads = append(l.nextReads, w) }

// Next is the next work, false if there is none. Advance must follow it.
func (l *Loop) Next() (Ready, bool) {
	if len(l.fresh) > 0 {
		l.hand(l.fresh)
		clear(l.fresh)
		l.fresh = l.fresh[:0]
	}
	l.startRound()
	if !l.r.HasReady() {
		l.r.Control()
		if !l.r.HasReady() {
			return Ready{}, false
		}
	}
	return l.r.Ready(), true
}

// Advance applies what is committed, when rd is carried out. An error means
// that the process must end.
func (l *Loop) Advance(rd Ready) (Output, error) {
	if rd.Snapshot != nil {
		l.snapshots.last, l.snapshots.sinceBytes = rd.Snapshot.GetIndex(), 0
	}
	for _, e := range rd.Entries {
		l.snapshots.sinceBytes += len(e.Data)
	}
	out, err := l.r.Advance(rd)
	if err != nil {
		return out, err
	}
	lead, term := l.r.lead, l.r.term
	out.NewLeader, out.NewTerm = lead != l.lastLead, term != l.lastTerm
	l.lastLead, l.lastTerm = lead, term
	return out, nil
}

// Answer answers whoever waited for what was applied.
func (l *Loop) Answer(out Output) {
	for i := range out.Results {
		res := &out.Results[i]
		if p := l.waiting[res.Request]; p != nil {
			delete(l.waiting, res.Request)
			p.Waiter.Answer(*res)
		}
	}
	for _, rr := range out.Reads {
		if l.round != nil && l.round.id == rr.ID {
			l.round.index = max(rr.Index, 1)
		}
	}
	l.serveReads(out.Applied)
	if (out.NewLeader || out.NewTerm || out.Restored) && l.r.lead != 0 {
		// Everything may have got lost with the old leader. What was applied after
		// all is answered from the idempotency table.
		l.hand(l.late(func(*Proposal) bool { return true }))
		l.askAgain()
	}
}

// hand packs proposals into entries.
func (l *Loop) hand(all []*Proposal) {
	for len(all) > 0 {
		n, size := 0, 0
		envelopes := make([][]byte, 0, len(all))
		for n < len(all) && (n == 0 || size+len(all[n].Encoded) <= entryBytes) {
			size += len(all[n].Encoded)
			envelopes = append(envelopes, all[n].Encoded)
			n++
		}
		err := l.r.Propose(state.PackEntry(envelopes))
		for _, p := range all[:n] {
			// What was dropped is tried again when there is a leader, or by resend.
			p.sentMS, p.sent = l.r.nowMonoMS, err == nil
		}
		l.handed += n
		all = all[n:]
	}
}

// resend proposes again what a lost message may have swallowed.
func (l *Loop) resend() {
	if len(l.waiting) == 0 || l.r.lead == 0 {
		return
	}
	leads, now := l.r.ruling, l.r.nowMonoMS
	l.hand(l.late(func(p *Proposal) bool { return !p.sent || !leads && now-p.sentMS > resendMS }))
}

// late are the waiting proposals to be made again, in the order they came.
func (l *Loop) late(again func(*Proposal) bool) []*Proposal {
	var out []*Proposal
	//order:any sorted below
	for _, p := range l.waiting {
		if again(p) {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b *Proposal) int {
		if a.Request < b.Request {
			return -1
		}
		return 1
	})
	return out
}

// Abandon answers every proposal alike, when the loop ends.
func (l *Loop) Abandon(res state.Result) {
	for _, p := range l.late(func(*Proposal) bool { return true }) {
		res.Request = p.Request
		delete(l.waiting, p.Request)
		p.Waiter.Answer(res)
	}
}

// startRound asks for a read index on behalf of everybody who has come since
// the last question was asked.
func (l *Loop) startRound() {
	if l.round != nil || len(l.nextReads) == 0 {
		return
	}
	l.nextReads = slices.DeleteFunc(l.nextReads, Waiter[*state.View].Gone)
	if len(l.nextReads) == 0 {
		return
	}
	l.readSeq++
	l.round = &round{id: l.readSeq, askedMS: l.r.nowMonoMS, reads: l.nextReads}
	l.nextReads = nil
	l.r.Read(l.round.id)
}

// serveReads answers the round whose index is applied.
func (l *Loop) serveReads(applied uint64) {
	if l.round == nil || l.round.index == 0 || applied < l.round.index {
		return
	}
	v := l.r.View()
	for _, w := range l.round.reads {
		w.Answer(v)
	}
	l.round = nil
	l.startRound()
}

// askAgain asks again when a question may have got lost.
func (l *Loop) askAgain() {
	if l.round == nil || l.round.index != 0 {
		return
	}
	l.nextReads = append(l.round.reads, l.nextReads...)
	l.round = nil
	l.startRound()
}

// Step takes a message of a peer, see Replica.Step.
func (l *Loop) Step(m *raftpb.Message) error { return l.r.Step(m) }
