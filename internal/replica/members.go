package replica

import (
	"slices"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/blixard/blixard/internal/state"
)

// InConf tells whether a raft ID is in a raft configuration.
func InConf(conf *raftpb.ConfState, raftID uint64) bool {
	return slices.Contains(conf.GetVoters(), raftID) || slices.Contains(conf.GetLearners(), raftID) || slices.Contains(conf.GetVotersOutgoing(), raftID)
}

// Known tells whether to listen to a raft ID: a member's, of the nodes or still
// of the raft configuration, which follows them, or one that this node has not
// heard of yet. It may be behind, and who brings it up to date may have joined
// since.
func Known(v *state.View, conf *raftpb.ConfState, raftID uint64) bool {
	return !WasRemoved(v, conf, raftID)
}

// WasRemoved tells whether a raft ID was a member's and will never be again:
// one that this node has not heard of yet is no such.
func WasRemoved(v *state.View, conf *raftpb.ConfState, raftID uint64) bool {
	return raftID < v.Cluster().NextRaftID && v.NodeByRaftID(raftID) == nil && !InConf(conf, raftID)
}
