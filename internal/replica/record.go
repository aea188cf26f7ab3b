package replica

import (
	"errors"
	"fmt"
	"slices"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

	"github.com/blixard/blixard/internal/assert"
)

// ErrCompacted: the entries asked for are no longer in memory.
var ErrCompacted = errors.New("the log no longer holds those entries")

// Applied returns applied entries from index first on, as many as maxBytes
// hold but at least one; none when first is not applied yet. Their data is
// shared and must not be changed.
func (r *Replica) Applied(first uint64, maxBytes uint64) ([]*raftpb.Entry, error) {
	end := r.st.Index() + 1
	if first >= end {
		return nil, nil
	}
	entries, err := r.storage.Entries(first, end, maxBytes)
	if errors.Is(err, raft.ErrCompacted) {
		return nil, fmt.Errorf("reading entries from %d on: %w", first, ErrCompacted)
	}
	assert.True(err == nil, "memory storage fails: %v", err)
	return slices.Clone(entries), nil
}
