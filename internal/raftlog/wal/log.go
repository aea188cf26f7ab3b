package wal

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"sync"
	"syscall"

	"go.etcd.io/raft/v3/raftpb"
)

const (
	defaultSegmentBytes = 16 << 20
	minSegmentBytes     = 4 * sectorBytes
	maxSegmentBytes     = maxFileBytes / 2
	zeroAheadBytes      = 256 << 10 // zeroed beyond the log at a time
	maxPendingBytes     = 1 << 20   // unsynced Saves kept in memory before they are synced after all
	keepBufferBytes     = 4 << 20   // buffers above this are let go after use
)

// zeroBlock is only ever read.
var zeroBlock [zeroAheadBytes]byte

// ErrClosed: the log was closed.
var ErrClosed = errors.New("raft log is closed")

// Options of Open; the zero value is what production uses.
type Options struct {
	// SegmentBytes is the size of a segment, rounded up to a sector. 0 means
	// 16 MiB. A frame larger than that gets a segment of its own size.
	SegmentBytes int64
}

func (o Options) segmentBytes() int64 {
	if o.SegmentBytes == 0 {
		return defaultSegmentBytes
	}
	size := min(max(o.SegmentBytes, minSegmentBytes), maxSegmentBytes)
	return (size + sectorBytes - 1) / sectorBytes * sectorBytes
}

// Log is the open log. All methods hold mu, so WriteSnapshot, which lets go of
// it while it streams, may run beside the others.
type Log struct {
	fsys FS
	dir  string
	opt  Options

	mu   sync.Mutex
	err  error // final: set once, returned by all that follows
	lock io.Closer

	segments  []segment // oldest first; the last one is open
	file      File
	size      int64  // of the open segment
	pos       int64  // end of its last frame, where the next one goes
	zeroed    int64  // up to here its blocks were written, not just reserved
	chain     uint32 // checksum of its last frame
	payload   []byte // items of Saves not yet written
	frame     []byte // the frame being written
	hs        hardState
	hsPending bool // hs is newer than what is written and in payload
	last      uint64
	terms     termRuns
	snaps     []snapID // oldest first

	// What the frames written so far hold; a new segment starts from this, as
	// what is still pending goes behind its start.
	saved struct {
		hs             hardState
		last, lastTerm uint64
	}
}

// Save implements raftlog.Log. It refuses a gap, entries that are committed or
// in a snapshot, and a hard state that goes back or commits what is not there;
// nothing is written then.
func (l *Log) Save(hs *raftpb.HardState, entries []*raftpb.Entry, sync bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return l.err
	}
	next, last, err := l.check(hs, entries)
	if err != nil {
		return err
	}
	if len(entries) > 0 {
		for _, e := range entries {
			l.terms = l.terms.put(e.GetIndex(), e.GetTerm())
		}
		l.payload = appendEntries(l.payload, entries)
		l.last = last
	}
	if next != l.hs {
		l.hs, l.hsPending = next, true
	}
	if sync || len(l.payload) > maxPendingBytes {
		return l.flush()
	}
	return nil
}

// check answers what Save would make of the log.
func (l *Log) check(hs *raftpb.HardState, entries []*raftpb.Entry) (next hardState, last uint64, err error) {
	next, last = l.hs, l.last
	if len(entries) > 0 {
		first := entries[0].GetIndex()
		if first > last+1 || first == 0 {
			return next, last, fmt.Errorf("saving entries from %d after %d: there is a gap", first, last)
		}
		if first <= max(l.hs.commit, l.newest().index) {
			return next, last, fmt.Errorf("saving entries from %d: entries up to %d are committed", first, max(l.hs.commit, l.newest().index))
		}
		total := len(l.payload)
		for i, e := range entries {
			if e.GetIndex() != first+uint64(i) {
				return next, last, fmt.Errorf("saving entries: index %d follows %d", e.GetIndex(), first+uint64(i)-1)
			}
			total += len(e.GetData()) + 32
		}
		if total > maxPayload {
			return next, last, fmt.Errorf("saving entries from %d: %d bytes in one record, at most %d", first, total, maxPayload)
		}
		last = first + uint64(len(entries)) - 1
	}
	if hs != nil && (hs.GetTerm() != 0 || hs.GetVote() != 0 || hs.GetCommit() != 0) {
		next = hardState{hs.GetTerm(), hs.GetVote(), hs.GetCommit()}
		if next.term < l.hs.term || next.commit < l.hs.commit {
			return next, last, fmt.Errorf("saving hard state: term %d, commit %d go back from %d, %d", next.term, next.commit, l.hs.term, l.hs.commit)
		}
	}
	if next.commit > last {
		return next, last, fmt.Errorf("saving hard state: commit %d is beyond the last entry %d", next.commit, last)
	}
	return next, last, nil
}

// Compact implements raftlog.Log. Entries go by whole segments.
func (l *Log) Compact(index uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return l.err
	}
	newest := l.newest()
	if index > newest.index {
		return fmt.Errorf("compacting up to %d: the newest snapshot is of %d", index, newest.index)
	}
	l.terms = l.terms.forget(newest.index)
	var names []string
	for len(l.snaps) > 1 {
		names = append(names, l.snaps[0].name(snapExt))
		l.snaps = l.snaps[1:]
	}
	// A segment can go when a later one started at or below index: all that
	// is above index was written after that start.
	keep := 0
	for i, s := range l.segments {
		if s.last <= index {
			keep = i
		}
	}
	for _, s := range l.segments[:keep] {
		names = append(names, s.name())
	}
	l.segments = l.segments[keep:]
	if len(names) == 0 {
		return nil
	}
	for _, name := range names {
		if err := l.fsys.Remove(filepath.Join(l.dir, name)); err != nil {
			return l.fail(fmt.Errorf("compacting: %w", err))
		}
	}
	if err := l.fsys.SyncDir(l.dir); err != nil {
		return l.fail(fmt.Errorf("syncing directory %s: %w", l.dir, err))
	}
	return nil
}

// Close implements raftlog.Log. After a failure it only lets go of the
// directory and returns that failure.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if errors.Is(l.err, ErrClosed) {
		return nil
	}
	err := l.err
	if err == nil {
		err = l.flush()
	}
	l.err = ErrClosed
	return errors.Join(err, l.file.Close(), l.lock.Close())
}

// flush makes everything saved so far durable.
func (l *Log) flush() error {
	if l.hsPending {
		l.payload = appendHardState(l.payload, l.hs)
	}
	if len(l.payload) == 0 {
		return nil
	}
	if err := l.write(l.payload); err != nil {
		return l.fail(err)
	}
	l.payload, l.hsPending = reuse(l.payload), false
	l.frame = reuse(l.frame)
	l.markSaved()
	return nil
}

func (l *Log) markSaved() {
	l.saved.hs, l.saved.last = l.hs, l.last
	l.saved.lastTerm, _ = l.terms.at(l.last)
}

// write appends payload as one frame and syncs it.
func (l *Log) write(payload []byte) error {
	need := int64(frameBytes(len(payload)))
	if l.pos+need+sectorBytes > l.size { // the last sector is kept for the seal
		if err := l.rotate(need); err != nil {
			return err
		}
	}
	frame, chain := appendFrame(l.frame, payload, l.chain)
	l.frame = frame
	if _, err := l.file.WriteAt(frame, l.pos); err != nil {
		return fmt.Errorf("writing at offset %d of %s: %w", l.pos, l.openName(), err)
	}
	if err := l.zeroAhead(l.pos + need); err != nil {
		return err
	}
	if err := l.file.Sync(); err != nil {
		return fmt.Errorf("syncing %s: %w", l.openName(), err)
	}
	l.pos, l.chain = l.pos+need, chain
	return nil
}

// zeroAhead writes zeros behind the frame that ends at end once the log has
// come to the limit of what is written, so most syncs find written blocks.
func (l *Log) zeroAhead(end int64) error {
	if end < l.zeroed || end >= l.size {
		return nil
	}
	to := min(l.size, end+zeroAheadBytes)
	if _, err := l.file.WriteAt(zeroBlock[:to-end], end); err != nil {
		return fmt.Errorf("zeroing %s from offset %d: %w", l.openName(), end, err)
	}
	l.zeroed = to
	return nil
}

// rotate goes on in a new segment that has room for a frame of need bytes.
func (l *Log) rotate(need int64) error {
	start := segmentStart{
		seq:  l.segments[len(l.segments)-1].seq + 1,
		last: l.saved.last, lastTerm: l.saved.lastTerm,
		chain: uint64(l.chain), end: uint64(l.pos),
	}
	size := max(l.opt.segmentBytes(), need+2*sectorBytes)
	file, pos, chain, err := createSegment(l.fsys, l.dir, start, l.saved.hs, size)
	if err != nil {
		return err
	}
	old := l.file
	seal, _ := appendFrame(nil, appendNumbers(nil, itemSeal, start.seq), l.chain)
	_, err = old.WriteAt(seal, l.pos)
	if err == nil {
		err = old.Sync()
	}
	err = errors.Join(err, old.Close())
	oldName := l.openName()
	l.file, l.size, l.pos, l.zeroed, l.chain = file, size, pos, pos, chain
	l.segments = append(l.segments, segment{start.seq, start.last})
	if err != nil {
		return fmt.Errorf("sealing %s: %w", oldName, err)
	}
	return nil
}

func (l *Log) openName() string {
	return filepath.Join(l.dir, l.segments[len(l.segments)-1].name())
}

func (l *Log) newest() snapID {
	if len(l.snaps) == 0 {
		return snapID{}
	}
	return l.snaps[len(l.snaps)-1]
}

// fail makes err final.
func (l *Log) fail(err error) error {
	l.err = explain(l.dir, err)
	return l.err
}

// explain adds what to do to the errors that people can mend.
func explain(dir string, err error) error {
	hint := ""
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		hint = "the disk that holds " + dir + " is full: free space there and start again; nothing that was acknowledged is lost"
	case errors.Is(err, syscall.EROFS), errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		hint = "the raft log needs to write to " + dir + ": mount it read-write and give it to the user who runs blixard"
	case errors.Is(err, syscall.EIO):
		hint = "the disk that holds " + dir + " reports a fault: look at the kernel's log, and start again only when the disk is sound"
	case errors.Is(err, ErrLocked):
		hint = "another blixard server runs on " + dir + ": stop it, or choose another data directory"
	default:
		return fmt.Errorf("raft log in %s: %w", dir, err)
	}
	return fmt.Errorf("raft log in %s: %w (%s)", dir, err, hint)
}

func reuse(b []byte) []byte {
	if cap(b) > keepBufferBytes {
		return nil
	}
	return b[:0]
}
