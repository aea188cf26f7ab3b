package replica

import (
	"go.etcd.io/raft/v3/raftpb"

	"github.com/blixard/blixard/internal/state"
)

const (
	snapshotBytes = 64 << 20 // of entries that make a snapshot due whatever their number
	cheapSnapshot = 4 << 20  // a state this small may be written as often as configured
)

// snapshots is what is known of the snapshots written here.
type snapshots struct {
	last       uint64 // index of the newest one
	sinceBytes int    // of entries since one was begun
	stateBytes int    // of the newest one
	writing    bool
}

// SnapshotDue tells that the log has grown: by as many entries as configured,
// and by twice as much as the last snapshot was long, so that writing a large
// state stays a small part of all that is written.
func (l *Loop) SnapshotDue() bool {
	s, applied := &l.snapshots, l.r.st.Index()
	grown := applied-s.last >= l.cfg.SnapshotEntries && (s.stateBytes < cheapSnapshot || s.sinceBytes >= 2*s.stateBytes)
	return !s.writing && (grown || s.sinceBytes >= snapshotBytes) && applied != s.last
}

// Snapshotting tells that one is being written.
func (l *Loop) Snapshotting() bool { return l.snapshots.writing }

// LastSnapshot is the index of the newest snapshot.
func (l *Loop) LastSnapshot() uint64 { return l.snapshots.last }

// BeginSnapshot says what to write: the driver makes it durable beside its
// other work and calls SnapshotEnded. One is written at a time.
func (l *Loop) BeginSnapshot() (*raftpb.SnapshotMetadata, *state.View) {
	view := l.r.View()
	l.snapshots.writing, l.snapshots.sinceBytes = true, 0
	return &raftpb.SnapshotMetadata{ConfState: l.r.conf, Index: new(view.Index), Term: new(view.Term)}, view
}

// SnapshotEnded notes that the snapshot of index is durable, with its size, or
// that it could not be written. The log in memory before it is let go of; the
// driver does the same with that on disk.
func (l *Loop) SnapshotEnded(index uint64, size int, written bool) error {
	s := &l.snapshots
	s.writing = false
	if !written {
		return nil
	}
	s.stateBytes = size
	s.last = max(s.last, index) // one may have been installed meanwhile
	if keep := l.cfg.TrailingEntries; index > keep && index-keep >= l.r.FirstIndex() {
		return l.r.Compact(index - keep)
	}
	return nil
}
