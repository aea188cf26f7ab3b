package wal_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/blixard/blixard/internal/raftlog"
	"github.com/blixard/blixard/internal/raftlog/raftlogtest"
	"github.com/blixard/blixard/internal/raftlog/wal"
	"github.com/blixard/blixard/internal/raftlog/wal/memfs"
)

const dir = "/raft"

// state is what a log should hold: entries directly follow the snapshot.
type state struct {
	term, vote, commit  uint64
	snapIndex, snapTerm uint64
	entries             []*raftpb.Entry
}

func (s state) last() uint64 { return s.snapIndex + uint64(len(s.entries)) }

func (s state) String() string {
	return fmt.Sprintf("{term %d vote %d commit %d, snapshot %d/%d, last %d}", s.term, s.vote, s.commit, s.snapIndex, s.snapTerm, s.last())
}

// model drives a log through a random history and knows what must survive.
type model struct {
	rng *rand.Rand
	fs  *memfs.FS
	log raftlog.Log
	now state
	// possible are the states a crash may lead to: the last acknowledged one
	// first, then those after each Save not synced, then the call under way.
	possible []state
	terms    map[uint64]uint64 // of every entry of the log, also compacted ones
	data     map[uint64][]byte // of every entry
	trace    []string
}

func newModel(seed uint64) *model {
	return &model{
		rng: rand.New(rand.NewPCG(seed, 1)), fs: memfs.New(),
		terms: map[uint64]uint64{}, data: map[uint64][]byte{}, possible: []state{{}},
	}
}

func options() wal.Options { return wal.Options{SegmentBytes: 12 * memfs.Sector} }

func (m *model) open() error {
	opened, err := wal.Open(m.fs, dir, options())
	if err != nil {
		return err
	}
	m.log = opened.Log
	return nil
}

func snapData(index, term uint64) []byte {
	return bytes.Repeat(fmt.Appendf(nil, "state at %d of term %d;", index, term), int(index%5)*20)
}

func snapMeta(index, term uint64) *raftpb.SnapshotMetadata { return raftlogtest.Meta(term, index) }

func writeData(index, term uint64) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := w.Write(snapData(index, term))
		return err
	}
}

// step makes one random call.
func (m *model) step() error {
	next := m.now
	next.entries = slices.Clone(m.now.entries)
	switch dice := m.rng.IntN(20); {
	case dice < 13:
		return m.save(next)
	case dice < 16:
		if next.commit <= next.snapIndex {
			return nil
		}
		index := next.snapIndex + 1 + m.rng.Uint64N(next.commit-next.snapIndex)
		term := next.entries[index-next.snapIndex-1].GetTerm()
		next.entries = next.entries[index-next.snapIndex:]
		next.snapIndex, next.snapTerm = index, term
		return m.call(next, true, fmt.Sprintf("snapshot %d", index), func() error {
			return m.log.WriteSnapshot(snapMeta(index, term), writeData(index, term))
		})
	case dice < 18:
		if next.snapIndex == 0 {
			return nil
		}
		index := m.rng.Uint64N(next.snapIndex + 1)
		return m.call(next, false, fmt.Sprintf("compact %d", index), func() error { return m.log.Compact(index) })
	case dice < 19:
		return m.install(next)
	default:
		if err := m.call(next, true, "reopen", m.log.Close); err != nil {
			return err
		}
		return m.open()
	}
}

func (m *model) save(next state) error {
	var entries []*raftpb.Entry
	var hs *raftpb.HardState
	if m.rng.IntN(4) == 0 {
		next.term++
		next.vote = m.rng.Uint64N(3)
	}
	if n := m.rng.IntN(4); n > 0 {
		from := next.last() + 1
		if m.rng.IntN(4) == 0 { // a conflict
			low := max(next.commit, next.snapIndex) + 1
			from = low + m.rng.Uint64N(from-low+1)
		}
		next.term = max(next.term, 1)
		next.entries = next.entries[:from-next.snapIndex-1]
		for i := range uint64(n) {
			entries = append(entries, &raftpb.Entry{
				Index: new(from + i), Term: new(next.term), Data: m.bytes(),
			})
		}
		next.entries = append(next.entries, entries...)
	}
	if low := max(next.commit, next.snapIndex); m.rng.IntN(2) == 0 && next.last() > low {
		next.commit = low + m.rng.Uint64N(next.last()-low+1)
	}
	hs = raftlogtest.HardState(next.term, next.vote, next.commit)
	sync := m.rng.IntN(10) < 7
	err := m.call(next, sync, fmt.Sprintf("save %d entries to %d, commit %d, sync %v", len(entries), next.last(), next.commit, sync), func() error {
		return m.log.Save(hs, entries, sync)
	})
	for _, e := range entries {
		m.terms[e.GetIndex()], m.data[e.GetIndex()] = e.GetTerm(), e.GetData()
	}
	return err
}

// bytes is an entry's data, often with long runs of zeros.
func (m *model) bytes() []byte {
	b := make([]byte, m.rng.IntN(8)*m.rng.IntN(300))
	for i := range b {
		if m.rng.IntN(len(b)) < 40 {
			b[i] = byte(m.rng.Uint32())
		}
	}
	return b
}

func (m *model) install(next state) error {
	index := next.commit + 1 + m.rng.Uint64N(20)
	next.term = max(next.term, 1)
	var term uint64
	if keep := index <= next.last() && index > next.snapIndex; keep && m.rng.IntN(2) == 0 {
		term = next.entries[index-next.snapIndex-1].GetTerm()
		next.entries = next.entries[index-next.snapIndex:]
	} else {
		next.term++
		next.vote, term = 0, next.term
		next.entries = nil
	}
	next.snapIndex, next.snapTerm, next.commit = index, term, index
	return m.call(next, true, fmt.Sprintf("install %d/%d", index, term), func() error {
		return m.log.Install(snapMeta(index, term), writeData(index, term))
	})
}

// call runs one call that leads to next, durably if sync.
func (m *model) call(next state, sync bool, what string, run func() error) error {
	m.trace = append(m.trace, what)
	m.possible = append(m.possible, next)
	if err := run(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	m.now = next
	if sync {
		m.possible = []state{next}
	}
	return nil
}

// check opens what a crash left and compares it with the possible states.
func (m *model) check(fsys *memfs.FS) (raftlog.Opened, error) {
	opened, err := wal.Open(fsys, dir, options())
	if err != nil {
		return opened, err
	}
	if err := checkSnapshot(opened); err != nil {
		return opened, err
	}
	for _, s := range m.possible {
		if same(opened, s) {
			return opened, nil
		}
	}
	return opened, fmt.Errorf("found {term %d vote %d commit %d, snapshot %d, %d entries} (%s), which is none of %v",
		opened.HardState.GetTerm(), opened.HardState.GetVote(), opened.HardState.GetCommit(),
		opened.Snapshot.GetIndex(), len(opened.Entries), opened.Repaired, m.possible)
}

func same(opened raftlog.Opened, s state) bool {
	hs := opened.HardState
	return hs.GetTerm() == s.term && hs.GetVote() == s.vote && hs.GetCommit() == max(s.commit, s.snapIndex) &&
		opened.Snapshot.GetIndex() == s.snapIndex && opened.Snapshot.GetTerm() == s.snapTerm &&
		raftlogtest.SameEntries(opened.Entries, s.entries)
}

func checkSnapshot(opened raftlog.Opened) error {
	if opened.Snapshot == nil {
		return nil
	}
	index, term := opened.Snapshot.GetIndex(), opened.Snapshot.GetTerm()
	if !proto.Equal(opened.Snapshot, snapMeta(index, term)) {
		return fmt.Errorf("snapshot's metadata is %v", opened.Snapshot)
	}
	got, err := raftlogtest.Load(opened)
	if err != nil {
		return err
	}
	if got != string(snapData(index, term)) {
		return errors.New("snapshot's data differs")
	}
	return nil
}

// covers tells whether what was opened, perhaps from an older snapshot, leads
// to the same log as the model's present state.
func (m *model) covers(opened raftlog.Opened) error {
	if err := checkSnapshot(opened); err != nil {
		return err
	}
	hs, s := opened.HardState, m.now
	if hs.GetTerm() != s.term || hs.GetVote() != s.vote || hs.GetCommit() != s.commit {
		return fmt.Errorf("hard state is %v, want %v", hs, s)
	}
	from := opened.Snapshot.GetIndex()
	if from > s.snapIndex || from+uint64(len(opened.Entries)) != s.last() {
		return fmt.Errorf("snapshot %d and %d entries, want %v", from, len(opened.Entries), s)
	}
	for i, e := range opened.Entries {
		index := from + 1 + uint64(i)
		if e.GetIndex() != index || e.GetTerm() != m.terms[index] || !bytes.Equal(e.GetData(), m.data[index]) {
			return fmt.Errorf("entry %d differs", index)
		}
	}
	return nil
}
