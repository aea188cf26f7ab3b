package server

import (
	"fmt"
	"io"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/raftlog"
	"github.com/blixard/blixard/internal/state"
)

// Recovery is what a node can go on with alone, after the majority is gone for
// good.
type Recovery struct {
	Index   uint64 // of the newest entry that is here
	Changed int64  // when that was made, in Unix milliseconds
	VMs     int
	Others  []blixard.NodeName // who loses the membership

	id   Identity
	st   *state.State
	term uint64
}

// RecoverLog plans to go on with what a log holds, entries whose commit was not
// seen included: the lost majority may have acknowledged them. Nothing is
// changed before Carry.
func RecoverLog(id Identity, opened raftlog.Opened) (*Recovery, error) {
	boot, err := load(Options{Opened: opened})
	if err != nil {
		return nil, err
	}
	for _, e := range boot.Entries {
		if e.GetType() != raftpb.EntryNormal || len(e.Data) == 0 {
			boot.State.Advance(e.GetIndex(), e.GetTerm()) // roles are set by Carry
			continue
		}
		if _, _, err := boot.State.Apply(e.GetIndex(), e.GetTerm(), e.Data); err != nil {
			return nil, fmt.Errorf("applying entry %d: %w", e.GetIndex(), err)
		}
	}
	return planRecovery(id, boot.State, boot.HardState.GetTerm())
}

// RecoverSnapshot plans to go on with a state that was copied to a file.
func RecoverSnapshot(id Identity, from io.Reader) (*Recovery, error) {
	st, err := state.Read(from)
	if err != nil {
		return nil, fmt.Errorf("reading the snapshot: %w", err)
	}
	return planRecovery(id, st, st.Term())
}

func planRecovery(id Identity, st *state.State, term uint64) (*Recovery, error) {
	v := st.View()
	if c := v.Cluster().ID; c != "" && c != id.ClusterID {
		return nil, &blixard.Error{Code: blixard.CodeRefused, Message: fmt.Sprintf("that is the state of the cluster %s, not of %s, which this node belongs to", c, id.ClusterID)}
	}
	if v.NodeByRaftID(id.RaftID) == nil {
		return nil, &blixard.Error{
			Code: blixard.CodeRefused, Message: fmt.Sprintf("the state at entry %d does not know this node (%s, raft ID %d), so it cannot go on with it", v.Index, id.Name, id.RaftID),
			Hint: "recover on a node that has come further",
		}
	}
	r := &Recovery{id: id, st: st, term: max(term, st.Term()), Index: v.Index, Changed: v.Cluster().NowMS, VMs: v.VMCount()}
	v.Nodes(func(n *blixard.Node) bool {
		if n.RaftID != id.RaftID {
			r.Others = append(r.Others, n.Name)
		}
		return true
	})
	return r, nil
}

// Carry makes this node the only member in log, the one that was planned from
// or a new one: a single durable step, after which it is done, and before which
// nothing is.
func (r *Recovery) Carry(log raftlog.Log) error {
	term := r.term + 1
	envelopes := make([]state.Envelope, len(r.Others))
	for i, name := range r.Others {
		envelopes[i] = state.Envelope{NowMS: r.Changed, Actor: "cluster recover", Command: &state.RemoveNode{Name: name, Force: true}}
	}
	results, _ := r.st.ApplyAll(r.st.Index()+1, term, envelopes)
	for i := range results {
		if results[i].Err != nil {
			return fmt.Errorf("removing the node %s: %w", r.Others[i], results[i].Err)
		}
	}
	r.st.SetRaftRoles(r.st.Index()+1, term, []uint64{r.id.RaftID}, nil)
	view := r.st.View()
	meta := &raftpb.SnapshotMetadata{ConfState: &raftpb.ConfState{Voters: []uint64{r.id.RaftID}}, Index: new(view.Index), Term: new(term)}
	if err := log.Install(meta, writeView(view)); err != nil {
		return fmt.Errorf("making the recovered state durable: %w", err)
	}
	return nil
}
