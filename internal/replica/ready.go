package replica

import (
	"encoding/binary"
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

// Ready is work for the driver, in the order of its fields.
type Ready struct {
	// Early messages are a leader's entries for its followers. They may go out
	// before anything below is durable, so that all disks work at once: the leader
	// counts its own copy only in Advance (Raft thesis, 10.2.1).
	Early []*raftpb.Message
	// Snapshot, if not nil, replaces the log; Restored is the state it holds.
	Snapshot *raftpb.SnapshotMetadata
	Restored *state.View
	// HardState (nil: unchanged) and Entries are appended to the log.
	HardState *raftpb.HardState
	Entries   []*raftpb.Entry
	MustSync  bool
	// Messages are sent once all of the above is durable. A MsgSnap among them
	// goes with the View of its index.
	Messages []*raftpb.Message

	rd raft.Ready
}

// Output is what came of a Ready.
type Output struct {
	Results []state.Result
	Changes []state.Change
	Reads   []ReadReady
	// Applied is the index up to which everything is applied.
	Applied uint64
	// Members tells that the raft configuration or the nodes may have changed.
	Members bool
	// Restored tells that the state was replaced: changes between are not known.
	Restored bool
	// NewLeader and NewTerm tell that Leader and Term differ from those after the
	// last Advance. Set by Loop.
	NewLeader, NewTerm bool
}

// ReadReady answers Read: a view at Index or later is linearizable.
type ReadReady struct {
	ID    uint64
	Index uint64
}

// HasReady tells whether there is work.
func (r *Replica) HasReady() bool { return r.rn.HasReady() }

// Ready returns the work. Advance must follow before the next call.
func (r *Replica) Ready() Ready {
	rd := r.rn.Ready()
	// A member that forgot in a crash that it was made a voter would not stand
	// for election, though the others count on it.
	out := Ready{Entries: rd.Entries, MustSync: rd.MustSync || slices.ContainsFunc(rd.CommittedEntries, isConfChange), rd: rd}
	if !raft.IsEmptyHardState(rd.HardState) {
		out.HardState = rd.HardState
	}
	if out.MustSync && r.settled() && r.ballotKept(rd.HardState) {
		for _, m := range rd.Messages {
			if m.GetType() == raftpb.MsgApp {
				out.Early = append(out.Early, m)
			} else {
				out.Messages = append(out.Messages, m)
			}
		}
	} else {
		out.Messages = rd.Messages
	}
	if !raft.IsEmptySnap(rd.Snapshot) {
		assert.True(r.arrived != nil && r.arrived.Index() == rd.Snapshot.GetMetadata().GetIndex(), "raft installs a snapshot that did not arrive")
		out.Snapshot, out.Restored = rd.Snapshot.GetMetadata(), r.arrived.View()
	}
	return out
}

func isConfChange(e *raftpb.Entry) bool { return e.GetType() != raftpb.EntryNormal }

// settled tells whether this leader has applied every change of the configuration
// that is in its log. What goes out early may be in the log of a follower and not
// in the leader's after a crash. That follower must then be able to stand for
// election, so whoever gets an entry early must know with it, as the leader does,
// who votes: a demoted voter whose log is longer would refuse its vote for ever.
func (r *Replica) settled() bool { return r.ruling && r.confUntil <= r.st.Index() }

// ballotKept tells whether the term and the vote are durable already: a leader
// that forgets them in a crash could vote for another one of its term.
func (r *Replica) ballotKept(hs *raftpb.HardState) bool {
	kept, _, err := r.storage.InitialState()
	assert.True(err == nil, "memory storage fails: %v", err)
	return raft.IsEmptyHardState(hs) || hs.GetTerm() == kept.GetTerm() && hs.GetVote() == kept.GetVote()
}

// Advance applies what is committed. The driver has persisted and sent
// everything in ready. An error means that a committed entry cannot be read, or
// that this release is too old (ErrTooOld): the process must end.
func (r *Replica) Advance(ready Ready) (Output, error) {
	var out Output
	rd := ready.rd
	if ready.Snapshot != nil {
		if err := r.storage.ApplySnapshot(rd.Snapshot); err != nil {
			return out, fmt.Errorf("installing a snapshot: %w", err)
		}
		r.st, r.conf = r.arrived, ready.Snapshot.GetConfState()
		out.Restored, out.Members = true, true
	}
	if err := r.storage.Append(rd.Entries); err != nil {
		return out, fmt.Errorf("keeping entries: %w", err)
	}
	if ready.HardState != nil {
		if err := r.storage.SetHardState(ready.HardState); err != nil {
			return out, fmt.Errorf("keeping the hard state: %w", err)
		}
	}
	for _, s := range rd.ReadStates {
		if len(s.RequestCtx) == 8 {
			out.Reads = append(out.Reads, ReadReady{ID: binary.BigEndian.Uint64(s.RequestCtx), Index: s.Index})
		}
	}
	for _, e := range rd.CommittedEntries {
		if err := r.apply(e, &out); err != nil {
			return out, err
		}
	}
	if err := r.knowsAll(); err != nil {
		return out, err
	}
	r.rn.Advance(rd)
	r.arrived = nil // installed, or raft did not want it
	out.Applied = r.st.Index()
	r.noteStatus()
	return out, nil
}

func (r *Replica) apply(e *raftpb.Entry, out *Output) error {
	index, term := e.GetIndex(), e.GetTerm()
	assert.True(index == r.st.Index()+1, "entry %d follows %d", index, r.st.Index())
	var changes []state.Change
	switch e.GetType() {
	case raftpb.EntryNormal:
		if len(e.Data) == 0 { // a new leader's first
			r.st.Advance(index, term)
			break
		}
		results, ch, err := r.st.Apply(index, term, e.Data)
		if err != nil {
			return err
		}
		changes = ch
		for i := range results {
			if results[i].Request == r.ctlRequest && r.ctlRequest != 0 {
				r.ctlRequest, r.ctlDirty = 0, true
			}
		}
		out.Results = append(out.Results, results...)
	case raftpb.EntryConfChange, raftpb.EntryConfChangeV2:
		cc, err := confChange(e)
		if err != nil {
			return fmt.Errorf("reading the configuration change at %d: %w", index, err)
		}
		r.conf = r.rn.ApplyConfChange(cc)
		r.confUntil = 0
		changes = r.st.SetRaftRoles(index, term, r.conf.GetVoters(), r.conf.GetLearners())
		out.Members = true
	}
	for i := range changes {
		out.Members = out.Members || changes[i].Kind == state.ChangeNode
	}
	if r.ruling && len(changes) > 0 {
		r.ctl.Observe(changes)
		r.ctlDirty = true
	}
	out.Changes = append(out.Changes, changes...)
	return nil
}

func confChange(e *raftpb.Entry) (raftpb.ConfChangeI, error) {
	if e.GetType() == raftpb.EntryConfChange {
		cc := new(raftpb.ConfChange)
		return cc, proto.Unmarshal(e.Data, cc)
	}
	cc := new(raftpb.ConfChangeV2)
	return cc, proto.Unmarshal(e.Data, cc)
}

// Control lets the reconcilers decide, if this node leads and something may
// have to be done, and proposes their commands. It is cheap to call after every
// Advance and every Tick.
func (r *Replica) Control() {
	if !r.ruling || r.ctlRequest != 0 || !r.ctlDirty && r.nowMonoMS < r.ctlWakeMS {
		return
	}
	r.ctlDirty = false
	decided := r.ctl.Step(control.Input{View: r.st.View(), NowMonoMS: r.nowMonoMS, NowWallMS: r.nowWallMS})
	r.ctlWakeMS = decided.NextWakeMonoMS
	if len(decided.Commands) == 0 {
		return
	}
	r.ctlSeq++
	r.ctlRequest = 1<<63 | r.cfg.RaftID<<40 | r.ctlSeq&(1<<40-1)
	envelopes := make([]state.Envelope, len(decided.Commands))
	for i, c := range decided.Commands {
		envelopes[i] = state.Envelope{Request: r.ctlRequest, NowMS: r.nowWallMS, Actor: "leader", Command: c}
	}
	if err := r.Propose(state.EncodeEntry(envelopes)); err != nil {
		// Nothing was done; the same is decided again when there is room.
		r.ctlRequest, r.ctlWakeMS = 0, r.nowMonoMS+50
	}
}

// noteLost notes since when each lost member has been lost, as this leader knows,
// on its monotonic clock: the row's time is some leader's wall clock.
func (r *Replica) noteLost() {
	r.st.View().Nodes(func(n *blixard.Node) bool {
		if _, known := r.lostMS[n.RaftID]; n.State != blixard.NodeLost {
			delete(r.lostMS, n.RaftID)
		} else if !known {
			r.lostMS[n.RaftID] = r.nowMonoMS
		}
		return true
	})
}

// reconcileMembers takes the raft configuration one step towards the nodes of
// the state.
func (r *Replica) reconcileMembers() {
	if r.confUntil > r.st.Index() || len(r.conf.GetVotersOutgoing()) > 0 {
		return
	}
	r.noteLost()
	var progress []control.Progress
	status := r.rn.Status()
	for _, id := range append(append([]uint64(nil), r.conf.GetVoters()...), r.conf.GetLearners()...) {
		p := status.Progress[id]
		at := control.Progress{RaftID: id, Match: p.Match, Active: p.RecentActive || id == r.cfg.RaftID}
		if since, lost := r.lostMS[id]; lost {
			at.LostForMS = r.nowMonoMS - since
		}
		progress = append(progress, at)
	}
	change, _ := control.Members(control.MembersInput{
		View: r.st.View(), Conf: control.ConfState{Voters: r.conf.GetVoters(), Learners: r.conf.GetLearners()}, Progress: progress,
		Committed: status.HardState.GetCommit(), Self: r.cfg.RaftID, MaxVoters: r.cfg.MaxVoters,
	})
	var kind raftpb.ConfChangeType
	switch change.Kind {
	case control.MemberNone:
		return
	case control.MemberTransferLeader:
		r.rn.TransferLeader(change.RaftID)
		return
	case control.MemberAddLearner, control.MemberDemote:
		kind = raftpb.ConfChangeAddLearnerNode
	case control.MemberPromote:
		kind = raftpb.ConfChangeAddNode
	case control.MemberRemove:
		kind = raftpb.ConfChangeRemoveNode
	}
	cc := &raftpb.ConfChangeV2{Changes: []*raftpb.ConfChangeSingle{{Type: kind.Enum(), NodeId: new(change.RaftID)}}}
	if err := r.rn.ProposeConfChange(cc); err == nil {
		r.confUntil = r.LastIndex() + 1
	}
}
