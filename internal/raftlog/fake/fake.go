// Package fake is a raft log in memory with the contract of a real one, for
// the simulator and for tests of what uses a log.
//
// A Disk outlives the logs opened on it. It keeps two images: current, what
// the open log would answer, and durable, what a crash leaves. Save with sync,
// snapshots and Close bring durable up to current; Crash throws the rest away.
//
// Ownership: a Disk and its Log belong to one goroutine; nothing here locks,
// waits, draws lots or reads a clock.
package fake

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/blixard/blixard/internal/raftlog"
)

var (
	// ErrLocked: the disk's log is open already.
	ErrLocked = errors.New("in use by another log")
	// ErrGone: the log was closed, or its machine crashed.
	ErrGone = errors.New("raft log is gone")
)

// Disk is what survives. The zero value is an empty one.
type Disk struct {
	durable, current image
	unsynced         []save
	open             *Log
	fault            error
}

// save is what one Save changed.
type save struct {
	hs      hardState
	entries []*raftpb.Entry
}

type hardState struct{ term, vote, commit uint64 }

type snapshot struct {
	meta *raftpb.SnapshotMetadata
	data []byte
}

// image is one state of the log: entries directly follow the snapshot, if any.
type image struct {
	hs       hardState
	snapshot snapshot
	entries  []*raftpb.Entry
}

func (m *image) base() uint64 { return m.snapshot.meta.GetIndex() }
func (m *image) last() uint64 { return m.base() + uint64(len(m.entries)) }

// term is the term of the entry at index, if the image knows it.
func (m *image) term(index uint64) (uint64, bool) {
	switch {
	case index == m.base():
		return m.snapshot.meta.GetTerm(), true
	case index < m.base() || index > m.last():
		return 0, false
	}
	return m.entries[index-m.base()-1].GetTerm(), true
}

func (m *image) apply(s save) {
	m.hs = s.hs
	if len(s.entries) > 0 {
		m.entries = append(m.entries[:s.entries[0].GetIndex()-m.base()-1], s.entries...)
	}
}

// take puts a snapshot in front of the entries that continue it.
func (m *image) take(s snapshot) {
	index, term := s.meta.GetIndex(), s.meta.GetTerm()
	if have, known := m.term(index); known && have == term {
		m.entries = slices.Clone(m.entries[index-m.base():])
	} else {
		m.entries = nil
	}
	m.snapshot = s
	if m.hs.term < term {
		m.hs = hardState{term: term, commit: m.hs.commit}
	}
	m.hs.commit = max(m.hs.commit, index)
}

// Fail lets the next write fail for good with err, as a broken disk would. The
// fault goes with the open log: after a Crash the disk works again.
func (d *Disk) Fail(err error) { d.fault = err }

// Unsynced is how many Saves a crash may lose now.
func (d *Disk) Unsynced() int { return len(d.unsynced) }

// Crash is a loss of power: the open log is gone, and of the Saves that were
// not synced only the first keep survive.
func (d *Disk) Crash(keep int) {
	for _, s := range d.unsynced[:min(keep, len(d.unsynced))] {
		d.durable.apply(s)
	}
	d.current = d.durable
	d.current.entries = slices.Clone(d.durable.entries)
	d.unsynced, d.open, d.fault = nil, nil, nil
}

// Open opens the disk's log.
func (d *Disk) Open() (raftlog.Opened, error) {
	if d.open != nil {
		return raftlog.Opened{}, fmt.Errorf("opening raft log: %w", ErrLocked)
	}
	d.open = &Log{disk: d}
	m := d.current
	opened := raftlog.Opened{
		Log:       d.open,
		HardState: &raftpb.HardState{Term: &m.hs.term, Vote: &m.hs.vote, Commit: &m.hs.commit},
		Entries:   copyEntries(m.entries),
	}
	if m.snapshot.meta != nil {
		opened.Snapshot = proto.Clone(m.snapshot.meta).(*raftpb.SnapshotMetadata) //nolint:errcheck // a clone has its original's type
		opened.LoadSnapshot = func(read func(io.Reader) error) error {
			return read(bytes.NewReader(m.snapshot.data))
		}
	}
	return opened, nil
}

// Log is the open log of a Disk.
type Log struct {
	disk *Disk
	err  error
}

// ready refuses a log that failed before or is gone.
func (l *Log) ready() error {
	if l.err == nil && l.disk.open != l {
		l.err = ErrGone
	}
	return l.err
}

// write meets a planned fault.
func (l *Log) write() error {
	if l.disk.fault != nil {
		l.err = fmt.Errorf("writing raft log: %w", l.disk.fault)
	}
	return l.err
}

// Save implements raftlog.Log.
func (l *Log) Save(hs *raftpb.HardState, entries []*raftpb.Entry, sync bool) error {
	if err := l.ready(); err != nil {
		return err
	}
	d := l.disk
	next, err := d.current.check(hs, entries)
	if err != nil {
		return err
	}
	if err := l.write(); err != nil {
		return err
	}
	s := save{next, copyEntries(entries)}
	d.current.apply(s)
	d.unsynced = append(d.unsynced, s)
	if sync {
		d.sync()
	}
	return nil
}

func (m *image) check(hs *raftpb.HardState, entries []*raftpb.Entry) (hardState, error) {
	next, last := m.hs, m.last()
	if len(entries) > 0 {
		first := entries[0].GetIndex()
		if first > last+1 || first <= max(m.base(), m.hs.commit) {
			return next, fmt.Errorf("saving entries from %d: the log is committed up to %d and ends at %d", first, max(m.base(), m.hs.commit), last)
		}
		for i, e := range entries {
			if e.GetIndex() != first+uint64(i) {
				return next, fmt.Errorf("saving entries: index %d follows %d", e.GetIndex(), first+uint64(i)-1)
			}
		}
		last = first + uint64(len(entries)) - 1
	}
	if hs.GetTerm() != 0 || hs.GetVote() != 0 || hs.GetCommit() != 0 {
		next = hardState{hs.GetTerm(), hs.GetVote(), hs.GetCommit()}
		if next.term < m.hs.term || next.commit < m.hs.commit {
			return next, fmt.Errorf("saving hard state: term %d, commit %d go back from %d, %d", next.term, next.commit, m.hs.term, m.hs.commit)
		}
	}
	if next.commit > last {
		return next, fmt.Errorf("saving hard state: commit %d is beyond the last entry %d", next.commit, last)
	}
	return next, nil
}

func (d *Disk) sync() {
	for _, s := range d.unsynced {
		d.durable.apply(s)
	}
	d.unsynced = nil
}

// WriteSnapshot implements raftlog.Log.
func (l *Log) WriteSnapshot(meta *raftpb.SnapshotMetadata, write func(io.Writer) error) error {
	return l.store(meta, write, false)
}

// Install implements raftlog.Log.
func (l *Log) Install(meta *raftpb.SnapshotMetadata, write func(io.Writer) error) error {
	return l.store(meta, write, true)
}

func (l *Log) store(meta *raftpb.SnapshotMetadata, write func(io.Writer) error, install bool) error {
	if err := l.ready(); err != nil {
		return err
	}
	d := l.disk
	index, term := meta.GetIndex(), meta.GetTerm()
	have, known := d.current.term(index)
	held := known && have == term
	switch {
	case index == 0 || term == 0:
		return fmt.Errorf("storing snapshot of index %d, term %d: it is empty", index, term)
	case index < d.current.base() && !install:
		return nil // overtaken by one that was installed
	case index < d.current.base():
		return fmt.Errorf("storing snapshot of index %d: there is one of %d", index, d.current.base())
	case !held && !install:
		return fmt.Errorf("storing snapshot of index %d, term %d: the log, which ends at %d, holds no such entry", index, term, d.current.last())
	case !held && index < d.current.hs.commit:
		return fmt.Errorf("installing snapshot of index %d, term %d: it contradicts the log, which is committed up to %d", index, term, d.current.hs.commit)
	}
	var data bytes.Buffer
	if err := write(&data); err != nil {
		return fmt.Errorf("producing snapshot of index %d: %w", index, err)
	}
	if err := l.write(); err != nil {
		return err
	}
	d.sync()
	s := snapshot{proto.Clone(meta).(*raftpb.SnapshotMetadata), data.Bytes()} //nolint:errcheck // as above
	d.current.take(s)
	d.durable.take(s)
	return nil
}

// Compact implements raftlog.Log. A snapshot has let go of its entries at
// once, as nothing here is ever damaged; only the argument is checked.
func (l *Log) Compact(index uint64) error {
	if err := l.ready(); err != nil {
		return err
	}
	if newest := l.disk.current.base(); index > newest {
		return fmt.Errorf("compacting up to %d: the newest snapshot is of %d", index, newest)
	}
	return nil
}

// Close implements raftlog.Log.
func (l *Log) Close() error {
	if l.disk.open != l {
		return nil
	}
	if l.err == nil {
		l.disk.sync()
	}
	err := l.err
	l.disk.open = nil
	l.err = ErrGone
	return err
}

func copyEntries(entries []*raftpb.Entry) []*raftpb.Entry {
	out := make([]*raftpb.Entry, len(entries))
	for i, e := range entries {
		index, term, kind := e.GetIndex(), e.GetTerm(), e.GetType()
		out[i] = &raftpb.Entry{Index: &index, Term: &term, Type: &kind, Data: bytes.Clone(e.GetData())}
	}
	return out
}
