package server

import (
	"fmt"
	"io"
	"slices"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/assert"
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
	join *state.JoinNode // nil: this node is a member already
}

// Identity is who this node is after the recovery.
func (r *Recovery) Identity() Identity { return r.id }

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

// RecoverElsewhere plans to go on with a state that was copied to a file, on a
// machine that is no node of that cluster: it becomes its only one, under a raft
// ID that no other ever had. The caller makes its Identity durable.
func RecoverElsewhere(node state.NodeIdentity, from io.Reader) (*Recovery, error) {
	st, err := state.Read(from)
	if err != nil {
		return nil, fmt.Errorf("reading the snapshot: %w", err)
	}
	v := st.View()
	c := v.Cluster()
	if c.ID == "" {
		return nil, &blixard.Error{Code: blixard.CodeRefused, Message: "that is the state of no cluster: it was saved before the cluster was founded"}
	}
	r := &Recovery{
		id: Identity{ClusterID: c.ID, Name: node.Name, RaftID: c.NextRaftID + state.DivergeBy, Secret: c.Secret},
		st: st, term: st.Term(), Index: v.Index, Changed: c.NowMS, VMs: v.VMCount(),
		join: &state.JoinNode{Node: node, Replace: true},
	}
	v.Nodes(func(n *blixard.Node) bool {
		if n.Name != node.Name && n.Address == node.Address && v.NodeCount() == 1 {
			err = &blixard.Error{
				Code: blixard.CodeExists, Message: fmt.Sprintf("the address %s belongs to the cluster's only node, %s", n.Address, n.Name),
				Hint: "take its place with --node-id " + string(n.Name) + ", or give another --advertise",
			}
		}
		r.Others = append(r.Others, n.Name)
		return true
	})
	return r, err
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
	r.st.Diverge(r.st.Index()+1, term) // the others may have gone on from here
	if err := r.apply(term); err != nil {
		return err
	}
	r.st.SetRaftRoles(r.st.Index()+1, term, []uint64{r.id.RaftID}, nil)
	view := r.st.View()
	meta := &raftpb.SnapshotMetadata{ConfState: &raftpb.ConfState{Voters: []uint64{r.id.RaftID}}, Index: new(view.Index), Term: new(term)}
	if err := log.Install(meta, writeView(view)); err != nil {
		return fmt.Errorf("making the recovered state durable: %w", err)
	}
	return nil
}

// apply removes the others and, if it is to become a member, adds this node.
func (r *Recovery) apply(term uint64) error {
	var commands []state.Command
	others := r.Others
	if r.join != nil {
		// Its address may have been another's, who has to go first. The last node
		// cannot be removed.
		v := r.st.View()
		others = slices.DeleteFunc(slices.Clone(others), func(name blixard.NodeName) bool {
			first := name != r.join.Node.Name && v.Node(name).Address == r.join.Node.Address
			if first {
				commands = append(commands, &state.RemoveNode{Name: name, Force: true})
			}
			return first || name == r.join.Node.Name // which is replaced
		})
		commands = append(commands, r.join)
	}
	for _, name := range others {
		commands = append(commands, &state.RemoveNode{Name: name, Force: true})
	}
	envelopes := make([]state.Envelope, len(commands))
	for i, c := range commands {
		envelopes[i] = state.Envelope{NowMS: r.Changed, Actor: "cluster recover", Command: c}
	}
	results, _ := r.st.ApplyAll(r.st.Index()+1, term, envelopes)
	for i := range results {
		if results[i].Err != nil {
			return fmt.Errorf("taking the cluster over: %w", results[i].Err)
		}
		if commands[i] == r.join {
			assert.True(results[i].Outcome.Value == r.id.RaftID, "the node became raft ID %d, not %d", results[i].Outcome.Value, r.id.RaftID)
		}
	}
	return nil
}
