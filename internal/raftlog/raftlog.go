// Package raftlog is the port to a node's durable raft log: entries, hard
// state and snapshots of the replicated state.
//
// Ownership: one Log belongs to one replica's loop. Save and Compact are
// called from that loop only; WriteSnapshot may run beside them on another
// goroutine, one at a time.
//
// The contract every adapter keeps, checked by raftlogtest.Suite:
//   - What Save with sync has returned nil for is there after any crash.
//   - A failed write or sync is final: the log refuses every later call with
//     the same error, and the process must end (a page cache that has dropped
//     a dirty page reports success the second time).
//   - Arguments that cannot be (a gap, overwriting what is committed, a hard
//     state that goes back or commits what is not there, an older snapshot) are
//     refused with nothing written; that is not final, nor is an error of the
//     caller's own snapshot writer.
//   - A torn tail (the last, never acknowledged write cut short) is cut off at
//     Open and reported; damage anywhere before it refuses to open with an
//     error that names file, offset and the way out.
package raftlog

import (
	"errors"
	"io"

	"go.etcd.io/raft/v3/raftpb"
)

// ErrCorrupt is wrapped by every Open error that means "this directory holds
// damaged data that may have been acknowledged".
var ErrCorrupt = errors.New("raft log is corrupt")

// Log is a durable raft log.
type Log interface {
	// Save appends the hard state (nil or empty: unchanged) and entries
	// (possibly overwriting a conflicting suffix). With sync it returns after
	// everything saved so far is durable.
	Save(hs *raftpb.HardState, entries []*raftpb.Entry, sync bool) error
	// WriteSnapshot stores a snapshot durably; write produces its bytes as a
	// stream. It may run beside Save. The log before it stays until Compact.
	// The log must hold the entry it is of; saved entries become durable with
	// it. If a newer one is there, or comes meanwhile, it is dropped, without error.
	WriteSnapshot(meta *raftpb.SnapshotMetadata, write func(io.Writer) error) error
	// Install is WriteSnapshot for a snapshot received from the leader: it
	// replaces the log, whose entries up to meta.Index (and any beyond that do
	// not continue it) are dropped. It comes before the Save of the same Ready:
	// the hard state is lifted to at least the snapshot's term and index.
	Install(meta *raftpb.SnapshotMetadata, write func(io.Writer) error) error
	// Compact lets go of entries up to index and of all snapshots but the
	// newest; an index above the newest snapshot's is an error.
	Compact(index uint64) error
	// Close syncs and releases the directory.
	Close() error
}

// Opened is what a directory held when its log was opened.
type Opened struct {
	Log       Log
	HardState *raftpb.HardState        // never nil; empty on a new log
	Snapshot  *raftpb.SnapshotMetadata // newest valid one, nil if none
	Entries   []*raftpb.Entry          // contiguous, directly after Snapshot
	// LoadSnapshot hands the newest snapshot's bytes to read, and fails if
	// they do not match their checksum. Nil if Snapshot is nil.
	LoadSnapshot func(read func(io.Reader) error) error
	// Repaired says in a sentence what a torn tail's repair cut off; empty if
	// nothing was torn. Also if a damaged snapshot was passed over for an older
	// one that the log reaches back to.
	Repaired string
}
