// Package replica is one node's consensus core without any IO: etcd's raft
// RawNode, the replicated state, and on the leader the reconcilers. Whoever
// drives it (internal/server on a real machine, the simulator on a virtual
// one) feeds it ticks, messages and proposals, and carries out what Ready says.
//
// The order that keeps promises, which the driver must follow:
//
//	for r.HasReady() {
//		rd := r.Ready()
//		send rd.Early
//		persist rd.Snapshot, rd.HardState, rd.Entries   // fsync if rd.MustSync
//		send rd.Messages                                // never before
//		out := r.Advance(rd)                            // applies what is committed
//		answer out.Results, out.Reads
//	}
//
// Ownership: a Replica belongs to one goroutine. Views it hands out are
// immutable and anybody's.
//
// Time comes in by SetNow: a monotonic clock for leases, a wall clock for
// timestamps. The replica never looks at one itself. Election jitter is raft's
// own and reads crypto/rand.
package replica

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/assert"
	"github.com/blixard/blixard/internal/control"
	"github.com/blixard/blixard/internal/state"
)

// Limits of raft's own queues.
const (
	maxMessageBytes     = 1 << 20
	maxInflightMessages = 256
	maxUncommittedBytes = 64 << 20
	maxApplyBytes       = 16 << 20
	membershipTicks     = 5
)

// ErrDropped: the proposal was not taken; there is no leader, or it is
// overloaded. Nothing happened, it can be made again.
var ErrDropped = errors.New("proposal dropped")

// ErrTooOld: the cluster works at a feature level that this release does not
// know. It would refuse what the others accept, so it must not go on.
var ErrTooOld = errors.New("this release is too old for its cluster")

// Config of a replica.
type Config struct {
	RaftID         uint64
	ElectionTicks  int // ticks without a leader before an election
	HeartbeatTicks int
	MaxVoters      int
	Control        control.Config
	Logger         raft.Logger
	// FeatureLevel is the newest set of commands that this release knows; 0 stands
	// for blixard.FeatureLevel.
	FeatureLevel int
}

// Boot is what a replica starts from: its newest snapshot and the log after.
type Boot struct {
	State     *state.State
	Conf      *raftpb.ConfState
	HardState *raftpb.HardState
	Entries   []*raftpb.Entry
}

// NewCluster is the Boot of the first node of a new cluster.
func NewCluster(raftID uint64) Boot {
	s := state.New()
	s.Advance(1, 1)
	return Boot{State: s, Conf: &raftpb.ConfState{Voters: []uint64{raftID}}, HardState: &raftpb.HardState{Term: proto.Uint64(1), Commit: proto.Uint64(1)}}
}

// Joining is the Boot of a node that has joined and knows nothing yet.
func Joining() Boot {
	return Boot{State: state.New(), Conf: &raftpb.ConfState{}, HardState: &raftpb.HardState{}}
}

// Replica is the consensus core of one node.
type Replica struct {
	cfg     Config
	rn      *raft.RawNode
	storage *storage
	st      *state.State
	conf    *raftpb.ConfState
	arrived *state.State // of a snapshot message that raft has not answered yet

	nowMonoMS, nowWallMS int64

	leader bool // raft says so
	ruling bool // and an entry of this term is applied: the view is complete
	term   uint64
	lead   uint64
	early  []uint64 // reads that wait until this leader rules

	ctl        *control.Controller
	ctlDirty   bool
	ctlRequest uint64 // of the outstanding proposal, 0 if none
	ctlSeq     uint64
	ctlWakeMS  int64
	ticks      int
	confUntil  uint64           // a configuration change may be pending up to this index
	lostMS     map[uint64]int64 // since when each lost member is, as this leader knows

	raftLead    uint64           // whom raft takes for the leader
	silentTicks int              // since it was heard
	heardMS     map[uint64]int64 // when each member was heard last
}

// New makes a replica of what its log held.
func New(cfg Config, boot Boot) (*Replica, error) {
	r := &Replica{cfg: cfg, st: boot.State, conf: boot.Conf, ctl: control.New(cfg.Control), heardMS: map[uint64]int64{}}
	r.storage = &storage{MemoryStorage: raft.NewMemoryStorage(), r: r}
	if boot.State.Index() > 0 {
		meta := &raftpb.SnapshotMetadata{ConfState: boot.Conf, Index: new(boot.State.Index()), Term: new(boot.State.Term())}
		if err := r.storage.ApplySnapshot(&raftpb.Snapshot{Metadata: meta}); err != nil {
			return nil, fmt.Errorf("restoring the snapshot at %d: %w", boot.State.Index(), err)
		}
	}
	if err := r.storage.Append(boot.Entries); err != nil {
		return nil, fmt.Errorf("restoring the log: %w", err)
	}
	if hs := boot.HardState; !raft.IsEmptyHardState(hs) {
		if err := r.storage.SetHardState(hs); err != nil {
			return nil, fmt.Errorf("restoring the hard state: %w", err)
		}
	}
	if err := r.knowsAll(); err != nil {
		return nil, err
	}
	rn, err := raft.NewRawNode(&raft.Config{
		ID: cfg.RaftID, ElectionTick: cfg.ElectionTicks, HeartbeatTick: cfg.HeartbeatTicks, Storage: r.storage, Applied: boot.State.Index(),
		MaxSizePerMsg: maxMessageBytes, MaxCommittedSizePerReady: maxApplyBytes, MaxInflightMsgs: maxInflightMessages, MaxUncommittedEntriesSize: maxUncommittedBytes,
		PreVote: true, CheckQuorum: true, StepDownOnRemoval: true, Logger: cfg.Logger,
	})
	if err != nil {
		return nil, fmt.Errorf("starting raft: %w", err)
	}
	r.rn = rn
	r.noteStatus()
	return r, nil
}

// knowsAll tells whether this release knows all that the cluster uses.
func (r *Replica) knowsAll() error {
	known, used := cmp.Or(r.cfg.FeatureLevel, blixard.FeatureLevel), r.st.View().Cluster().FeatureLevel
	if used <= known {
		return nil
	}
	return fmt.Errorf("%w: it knows feature level %d, and the cluster works at %d; nothing is lost: install the release here that the other nodes have, and start it again", ErrTooOld, known, used)
}

// SetNow tells the time before any other call that depends on it: monotonic
// and wall clock in milliseconds.
func (r *Replica) SetNow(monoMS, wallMS int64) { r.nowMonoMS, r.nowWallMS = monoMS, wallMS }

// Tick advances raft's logical clock and looks after membership.
func (r *Replica) Tick() {
	r.rn.Tick()
	r.ticks++
	r.silentTicks++
	r.noteStatus()
	if r.ruling && r.ticks%membershipTicks == 0 {
		r.reconcileMembers()
	}
}

// Campaign starts an election now, for a cluster of one node.
func (r *Replica) Campaign() error { return r.rn.Campaign() }

// Step takes a message of a peer. One of a node that was removed is ignored.
func (r *Replica) Step(m *raftpb.Message) error {
	switch {
	case m.GetType() == raftpb.MsgSnap:
		return fmt.Errorf("a snapshot message needs its data: %w", ErrDropped)
	case m.GetType() == raftpb.MsgReadIndex && r.leader && !r.ruling:
		return nil // too early to tell, see Read; who asks asks again
	}
	err := r.rn.Step(m)
	r.noteHeard(m)
	return ignorable(err)
}

// StepSnapshot takes a snapshot message with the state that came along.
func (r *Replica) StepSnapshot(m *raftpb.Message, s *state.State) error {
	if m.GetType() != raftpb.MsgSnap || m.GetSnapshot().GetMetadata().GetIndex() != s.Index() {
		return fmt.Errorf("a snapshot of index %d came with a message for %d", s.Index(), m.GetSnapshot().GetMetadata().GetIndex())
	}
	if r.arrived != nil && r.rn.HasReady() {
		return fmt.Errorf("another snapshot is about to be installed: %w", ErrDropped)
	}
	r.arrived = s
	err := r.rn.Step(m)
	r.noteHeard(m)
	return ignorable(err)
}

// ignorable drops what says only that a peer is not (or no longer) a member or
// that there is no leader now: raft's protocol repeats what matters.
func ignorable(err error) error {
	if errors.Is(err, raft.ErrStepPeerNotFound) || errors.Is(err, raft.ErrProposalDropped) {
		return nil
	}
	return err
}

// Propose hands an entry (state.PackEntry) to the leader, wherever it is. An
// entry on its way to another node may get lost without a word.
func (r *Replica) Propose(entry []byte) error {
	if r.lead == 0 && r.raftLead != 0 {
		return fmt.Errorf("%w: the leader is silent", ErrDropped)
	}
	if err := r.rn.Propose(entry); err != nil {
		return fmt.Errorf("%w: %w", ErrDropped, err)
	}
	return nil
}

// Read asks for the index that a linearizable read must have applied. The
// answer comes in some Output.Reads under the same id, or never.
//
// A leader that does not rule yet asks when it does: raft's own answer of a
// leader that is the only voter is the commit index as it was last made durable,
// which may be older than what was acknowledged before a crash.
func (r *Replica) Read(id uint64) {
	if r.leader && !r.ruling {
		r.early = append(r.early, id)
		return
	}
	r.rn.ReadIndex(binary.BigEndian.AppendUint64(nil, id))
}

// Unreachable notes that messages to a peer get lost.
func (r *Replica) Unreachable(raftID uint64) { r.rn.ReportUnreachable(raftID) }

// SnapshotSent notes how sending a snapshot ended.
func (r *Replica) SnapshotSent(raftID uint64, ok bool) {
	status := raft.SnapshotFinish
	if !ok {
		status = raft.SnapshotFailure
	}
	r.rn.ReportSnapshot(raftID, status)
}

// TransferLeader asks the leader (this node) to hand over to a voter.
func (r *Replica) TransferLeader(raftID uint64) { r.rn.TransferLeader(raftID) }

// Heartbeat notes that the agent of a node was heard, and tells whether it is
// granted its lease. Only the ruling leader grants; the driver must have
// confirmed its leadership (Read) after the heartbeat was sent.
func (r *Replica) Heartbeat(name blixard.NodeName, raftID uint64) (granted bool) {
	if !r.ruling {
		return false
	}
	n := r.st.View().Node(name)
	if n == nil || n.RaftID != raftID {
		return false
	}
	r.ctl.Leases.Heard(n, r.nowMonoMS)
	switch n.State {
	case blixard.NodeReady:
		r.ctl.Leases.Ack(n, r.nowMonoMS)
		return true
	case blixard.NodeLost:
		r.ctlDirty = true // it may be taken back
	case blixard.NodeJoining: // it has to report first
	}
	return false
}

// View is the applied state.
func (r *Replica) View() *state.View { return r.st.View() }

// ConfState is the raft configuration as applied.
func (r *Replica) ConfState() *raftpb.ConfState { return r.conf }

// Leads tells whether this node leads and its view is complete.
func (r *Replica) Leads() bool { return r.ruling }

// Status is raft's own, with the followers' progress on the leader.
func (r *Replica) Status() raft.Status { return r.rn.Status() }

// Committed is the index up to which the log is known to be committed.
func (r *Replica) Committed() uint64 { return r.rn.BasicStatus().HardState.GetCommit() }

// Leader is the raft ID of the leader, 0 if unknown.
func (r *Replica) Leader() uint64 { return r.lead }

// Term is the current term.
func (r *Replica) Term() uint64 { return r.term }

// Compact forgets the log in memory up to index, which a durable snapshot
// covers.
func (r *Replica) Compact(index uint64) error {
	if err := r.storage.Compact(index); err != nil && !errors.Is(err, raft.ErrCompacted) {
		return fmt.Errorf("compacting the log to %d: %w", index, err)
	}
	return nil
}

// LastIndex is the index of the newest entry in the log.
func (r *Replica) LastIndex() uint64 {
	last, err := r.storage.LastIndex()
	assert.True(err == nil, "memory storage fails: %v", err)
	return last
}

// FirstIndex is the index of the oldest entry in memory.
func (r *Replica) FirstIndex() uint64 {
	first, err := r.storage.FirstIndex()
	assert.True(err == nil, "memory storage fails: %v", err)
	return first
}

// noteHeard notes who is there, and follows leadership.
func (r *Replica) noteHeard(m *raftpb.Message) {
	from := m.GetFrom()
	if InConf(r.conf, from) {
		r.heardMS[from] = r.nowMonoMS
	}
	r.noteStatus()
	t := m.GetType()
	leads := t == raftpb.MsgApp || t == raftpb.MsgHeartbeat || t == raftpb.MsgSnap
	if leads && from == r.raftLead && m.GetTerm() == r.term && r.silentTicks > 0 {
		r.silentTicks, r.lead = 0, r.raftLead
	}
}

// Heard tells whether a member was heard within the last withinMS milliseconds;
// of itself that is true. Who is no voter hears only leaders.
func (r *Replica) Heard(raftID uint64, withinMS int64) bool {
	at, ok := r.heardMS[raftID]
	return raftID == r.cfg.RaftID || ok && r.nowMonoMS-at <= withinMS
}

// noteStatus follows leadership.
func (r *Replica) noteStatus() {
	s := r.rn.BasicStatus()
	wasLeader, was := r.leader, r.term
	r.leader, r.term, r.lead, r.raftLead = s.RaftState == raft.StateLeader, s.HardState.GetTerm(), s.Lead, s.Lead
	if !r.leader && r.silentTicks >= r.cfg.ElectionTicks && !slices.Contains(r.conf.GetVoters(), r.cfg.RaftID) {
		r.lead = 0 // a voter would stand for election; who is none keeps raft's leader for ever
	}
	if r.leader != wasLeader || r.term != was {
		if r.ruling {
			r.ctl.Resign()
		}
		r.ruling, r.ctlRequest, r.confUntil, r.early = false, 0, 0, nil
	}
	if r.leader && !r.ruling && r.st.Term() == r.term {
		r.ruling, r.ctlDirty, r.ctlWakeMS = true, true, 0
		r.ctl.Reset(r.st.View(), r.nowMonoMS)
		r.lostMS = map[uint64]int64{}
		for _, id := range r.early {
			r.Read(id)
		}
		r.early = nil
	}
}

// storage is raft's view of the log: entries in memory, and a snapshot of the
// applied state whenever one is asked for.
type storage struct {
	*raft.MemoryStorage
	r *Replica
}

// Snapshot describes the applied state; its data is sent as a stream beside
// the message, from the view at the same index.
func (s *storage) Snapshot() (*raftpb.Snapshot, error) {
	return &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{
		ConfState: s.r.conf, Index: new(s.r.st.Index()), Term: new(s.r.st.Term()),
	}}, nil
}
