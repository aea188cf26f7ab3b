// Package raftlogtest checks the contract of package raftlog against an
// adapter.
package raftlogtest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/blixard/blixard/internal/raftlog"
)

// Store is a place for one log that survives crashes.
type Store interface {
	// Open opens the log; at most one is open at a time.
	Open() (raftlog.Opened, error)
	// Crash takes the open log away without closing it. What was not durable
	// may be lost.
	Crash()
	// Fail lets every write fail with err from now on until Crash.
	Fail(err error)
}

// Suite runs the contract, each case against a new store made by empty.
func Suite(t *testing.T, empty func(t *testing.T) Store) {
	for _, c := range []struct {
		name string
		run  func(*testing.T, *log)
	}{
		{"new log is empty", newIsEmpty},
		{"synced saves survive a crash", syncedSurvives},
		{"unsynced saves become durable with the next sync", laterSync},
		{"a conflicting suffix is overwritten", overwrite},
		{"an empty hard state changes nothing", emptyHardState},
		{"all kinds of entries come back", entryKinds},
		{"close makes everything durable", closeSyncs},
		{"refusals change nothing", refusals},
		{"a snapshot keeps the entries behind it", writeSnapshot},
		{"compact needs a snapshot and loses nothing", compact},
		{"install replaces the log", install},
		{"install keeps the entries that continue it", installKeeps},
		{"install lifts the hard state", installLifts},
		{"an aborted snapshot leaves no trace", aborted},
		{"a failure is final", finalFailure},
		{"a log can be open only once", openOnce},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := &log{t: t, store: empty(t)}
			l.open()
			c.run(t, l)
			if err := l.Log.Close(); err != nil && !l.failed {
				t.Errorf("closing: %v", err)
			}
		})
	}
}

// Entries makes entries first..last of a term whose data depends on both.
func Entries(term, first, last uint64) []*raftpb.Entry {
	var out []*raftpb.Entry
	for i := first; i <= last; i++ {
		out = append(out, &raftpb.Entry{
			Index: new(i), Term: new(term),
			Data: fmt.Appendf(nil, "entry %d of term %d", i, term),
		})
	}
	return out
}

// HardState makes one.
func HardState(term, vote, commit uint64) *raftpb.HardState {
	return &raftpb.HardState{Term: &term, Vote: &vote, Commit: &commit}
}

// Meta makes a snapshot's metadata with two voters and a learner.
func Meta(term, index uint64) *raftpb.SnapshotMetadata {
	return &raftpb.SnapshotMetadata{
		Index: &index, Term: &term,
		ConfState: &raftpb.ConfState{Voters: []uint64{1, 2}, Learners: []uint64{3}, AutoLeave: new(false)},
	}
}

// Data is a writer of a snapshot's bytes.
func Data(text string) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := io.WriteString(w, text)
		return err
	}
}

// SameEntries tells whether two lists hold the same entries.
func SameEntries(a, b []*raftpb.Entry) bool {
	return slices.EqualFunc(a, b, func(a, b *raftpb.Entry) bool {
		return a.GetIndex() == b.GetIndex() && a.GetTerm() == b.GetTerm() &&
			a.GetType() == b.GetType() && bytes.Equal(a.GetData(), b.GetData())
	})
}

// Load reads the bytes of the snapshot in opened.
func Load(opened raftlog.Opened) (string, error) {
	var data []byte
	err := opened.LoadSnapshot(func(r io.Reader) (err error) {
		data, err = io.ReadAll(r)
		return err
	})
	return string(data), err
}

// log is an open log with the words the cases are written in.
type log struct {
	raftlog.Opened
	t      *testing.T
	store  Store
	failed bool
}

func (l *log) open() {
	l.t.Helper()
	opened, err := l.store.Open()
	if err != nil {
		l.t.Fatalf("opening: %v", err)
	}
	l.Opened = opened
}

func (l *log) crash() {
	l.t.Helper()
	l.store.Crash()
	l.open()
}

func (l *log) do(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

func (l *log) refused(what string, err error) {
	l.t.Helper()
	if err == nil {
		l.t.Fatalf("%s was accepted", what)
	}
}

// holds compares what the last open found. A snapshot of index 0 means none.
func (l *log) holds(hs *raftpb.HardState, snapshot *raftpb.SnapshotMetadata, data string, entries []*raftpb.Entry) {
	l.t.Helper()
	if got := l.HardState; got.GetTerm() != hs.GetTerm() || got.GetVote() != hs.GetVote() || got.GetCommit() != hs.GetCommit() {
		l.t.Errorf("hard state is %v, want %v", got, hs)
	}
	if !SameEntries(l.Opened.Entries, entries) {
		l.t.Errorf("entries are %v, want %v", l.Opened.Entries, entries)
	}
	if l.Repaired != "" {
		l.t.Errorf("unexpected repair: %s", l.Repaired)
	}
	if snapshot == nil {
		if l.Snapshot != nil || l.LoadSnapshot != nil {
			l.t.Errorf("snapshot is %v, want none", l.Snapshot)
		}
		return
	}
	if !proto.Equal(l.Snapshot, snapshot) {
		l.t.Fatalf("snapshot is %v, want %v", l.Snapshot, snapshot)
	}
	if got, err := Load(l.Opened); err != nil || got != data {
		l.t.Errorf("snapshot's data is %q (%v), want %q", got, err, data)
	}
}

func newIsEmpty(_ *testing.T, l *log) {
	l.holds(nil, nil, "", nil)
	l.crash()
	l.holds(nil, nil, "", nil)
}

func syncedSurvives(_ *testing.T, l *log) {
	l.do(l.Log.Save(HardState(1, 2, 0), Entries(1, 1, 3), true))
	l.do(l.Log.Save(HardState(1, 2, 3), Entries(1, 4, 4), true))
	l.crash()
	l.holds(HardState(1, 2, 3), nil, "", Entries(1, 1, 4))
	l.do(l.Log.Save(nil, Entries(1, 5, 5), true))
	l.crash()
	l.holds(HardState(1, 2, 3), nil, "", Entries(1, 1, 5))
}

func laterSync(_ *testing.T, l *log) {
	l.do(l.Log.Save(HardState(1, 1, 0), Entries(1, 1, 2), false))
	l.do(l.Log.Save(HardState(1, 1, 1), nil, false))
	l.do(l.Log.Save(nil, nil, true))
	l.crash()
	l.holds(HardState(1, 1, 1), nil, "", Entries(1, 1, 2))
}

func overwrite(_ *testing.T, l *log) {
	l.do(l.Log.Save(HardState(1, 1, 2), Entries(1, 1, 9), true))
	l.do(l.Log.Save(HardState(2, 0, 2), Entries(2, 4, 5), true))
	l.crash()
	l.holds(HardState(2, 0, 2), nil, "", append(Entries(1, 1, 3), Entries(2, 4, 5)...))
}

func emptyHardState(_ *testing.T, l *log) {
	l.do(l.Log.Save(HardState(3, 2, 0), nil, true))
	l.do(l.Log.Save(&raftpb.HardState{}, nil, true))
	l.do(l.Log.Save(nil, nil, true))
	l.crash()
	l.holds(HardState(3, 2, 0), nil, "", nil)
}

func entryKinds(_ *testing.T, l *log) {
	kind := raftpb.EntryConfChangeV2
	entries := []*raftpb.Entry{
		{Index: proto.Uint64(1), Term: proto.Uint64(1)},
		{Index: proto.Uint64(2), Term: proto.Uint64(1), Type: &kind, Data: make([]byte, 3000)},
		{Index: proto.Uint64(3), Term: proto.Uint64(1 << 62), Data: bytes.Repeat([]byte{0xff}, 100_000)},
	}
	l.do(l.Log.Save(nil, entries, true))
	l.crash()
	l.holds(nil, nil, "", entries)
}

func closeSyncs(_ *testing.T, l *log) {
	l.do(l.Log.Save(HardState(1, 1, 1), Entries(1, 1, 2), false))
	old := l.Log
	l.do(old.Close())
	l.do(old.Close())
	l.refused("a Save after Close", old.Save(nil, Entries(1, 3, 3), true))
	l.crash()
	l.holds(HardState(1, 1, 1), nil, "", Entries(1, 1, 2))
}

func refusals(_ *testing.T, l *log) {
	l.do(l.Log.Save(HardState(2, 1, 3), Entries(2, 1, 5), true))
	l.refused("a gap", l.Log.Save(nil, Entries(2, 7, 8), true))
	l.refused("a gap within", l.Log.Save(nil, append(Entries(2, 6, 6), Entries(2, 8, 8)...), true))
	l.refused("entry 0", l.Log.Save(nil, Entries(2, 0, 0), true))
	l.refused("overwriting a committed entry", l.Log.Save(nil, Entries(3, 3, 4), true))
	l.refused("a term that goes back", l.Log.Save(HardState(1, 1, 3), nil, true))
	l.refused("a commit that goes back", l.Log.Save(HardState(2, 1, 2), nil, true))
	l.refused("a commit beyond the log", l.Log.Save(HardState(2, 1, 6), nil, true))
	l.refused("a snapshot beyond the log", l.Log.WriteSnapshot(Meta(2, 6), Data("x")))
	l.refused("a snapshot of another term", l.Log.WriteSnapshot(Meta(1, 3), Data("x")))
	l.refused("an empty snapshot", l.Log.WriteSnapshot(Meta(0, 0), Data("x")))
	l.refused("installing what contradicts committed entries", l.Log.Install(Meta(3, 2), Data("x")))
	l.do(l.Log.Save(nil, Entries(2, 6, 6), true))
	l.crash()
	l.holds(HardState(2, 1, 3), nil, "", Entries(2, 1, 6))
}

func writeSnapshot(_ *testing.T, l *log) {
	l.do(l.Log.Save(HardState(1, 1, 4), Entries(1, 1, 6), false))
	l.do(l.Log.WriteSnapshot(Meta(1, 4), Data("four")))
	l.crash()
	l.holds(HardState(1, 1, 4), Meta(1, 4), "four", Entries(1, 5, 6))
	l.do(l.Log.Save(HardState(1, 1, 7), Entries(1, 7, 7), true))
	l.do(l.Log.WriteSnapshot(Meta(1, 7), Data("")))
	l.do(l.Log.WriteSnapshot(Meta(1, 5), Data("five"))) // overtaken: dropped, the newer one stays
	l.crash()
	l.holds(HardState(1, 1, 7), Meta(1, 7), "", nil)
	l.do(l.Log.Save(nil, Entries(2, 8, 8), true))
	l.crash()
	l.holds(HardState(1, 1, 7), Meta(1, 7), "", Entries(2, 8, 8))
}

func compact(_ *testing.T, l *log) {
	l.refused("compacting without a snapshot", l.Log.Compact(1))
	want := Entries(1, 1, 200)
	for i := range want {
		l.do(l.Log.Save(HardState(1, 1, uint64(i)), want[i:i+1], true))
	}
	l.do(l.Log.WriteSnapshot(Meta(1, 100), Data("hundred")))
	l.refused("compacting beyond the snapshot", l.Log.Compact(101))
	l.do(l.Log.Compact(100))
	l.do(l.Log.Compact(100))
	l.crash()
	l.holds(HardState(1, 1, 199), Meta(1, 100), "hundred", want[100:])
	l.do(l.Log.WriteSnapshot(Meta(1, 150), Data("more")))
	l.do(l.Log.Compact(120))
	l.crash()
	l.holds(HardState(1, 1, 199), Meta(1, 150), "more", want[150:])
}

func install(_ *testing.T, l *log) {
	l.do(l.Log.Save(HardState(1, 1, 2), Entries(1, 1, 30), false))
	l.do(l.Log.Install(Meta(2, 10), Data("ten")))
	l.refused("an entry before the snapshot", l.Log.Save(nil, Entries(2, 10, 10), true))
	l.refused("an entry after a gap", l.Log.Save(nil, Entries(2, 12, 12), true))
	l.crash()
	l.holds(HardState(2, 0, 10), Meta(2, 10), "ten", nil)
	l.do(l.Log.Save(HardState(2, 0, 11), Entries(2, 11, 12), true))
	l.do(l.Log.Install(Meta(2, 50), Data("fifty")))
	l.do(l.Log.Save(HardState(3, 1, 51), Entries(3, 51, 51), true))
	l.do(l.Log.Compact(50))
	l.crash()
	l.holds(HardState(3, 1, 51), Meta(2, 50), "fifty", Entries(3, 51, 51))
}

func installKeeps(_ *testing.T, l *log) {
	l.do(l.Log.Save(HardState(1, 1, 2), Entries(1, 1, 6), true))
	l.do(l.Log.Install(Meta(1, 4), Data("four")))
	l.do(l.Log.Save(HardState(1, 1, 7), Entries(1, 7, 7), true))
	l.crash()
	l.holds(HardState(1, 1, 7), Meta(1, 4), "four", Entries(1, 5, 7))
}

func installLifts(_ *testing.T, l *log) {
	l.do(l.Log.Save(HardState(1, 3, 0), nil, true))
	l.do(l.Log.Install(Meta(4, 9), Data("nine")))
	l.crash()
	l.holds(HardState(4, 0, 9), Meta(4, 9), "nine", nil)
}

func aborted(t *testing.T, l *log) {
	l.do(l.Log.Save(HardState(1, 1, 3), Entries(1, 1, 3), true))
	broken := errors.New("the leader went away")
	write := func(w io.Writer) error {
		if _, err := w.Write(make([]byte, 1<<20)); err != nil {
			return err
		}
		return broken
	}
	for name, err := range map[string]error{
		"WriteSnapshot": l.Log.WriteSnapshot(Meta(1, 2), write), "Install": l.Log.Install(Meta(2, 20), write),
	} {
		if !errors.Is(err, broken) {
			t.Errorf("%s answers %v, want the writer's error", name, err)
		}
	}
	l.do(l.Log.Save(nil, Entries(1, 4, 4), true))
	l.crash()
	l.holds(HardState(1, 1, 3), nil, "", Entries(1, 1, 4))
}

func finalFailure(t *testing.T, l *log) {
	l.do(l.Log.Save(HardState(1, 1, 1), Entries(1, 1, 2), true))
	l.failed = true
	broken := errors.New("the disk broke")
	l.store.Fail(broken)
	err := l.Log.Save(nil, Entries(1, 3, 3), true)
	if !errors.Is(err, broken) {
		t.Fatalf("a failing write answers %v", err)
	}
	l.store.Fail(nil)
	for name, again := range map[string]error{
		"Save":          l.Log.Save(nil, Entries(1, 3, 3), true),
		"WriteSnapshot": l.Log.WriteSnapshot(Meta(1, 1), Data("one")),
		"Install":       l.Log.Install(Meta(1, 1), Data("one")),
		"Compact":       l.Log.Compact(0),
		"Close":         l.Log.Close(),
	} {
		if again == nil || !errors.Is(again, broken) {
			t.Errorf("%s after a failure answers %v, want %v", name, again, err)
		}
	}
	l.crash()
	l.failed = false
	entries := l.Opened.Entries
	if len(entries) == 3 { // it was not acknowledged, yet may have arrived
		entries = entries[:2]
	}
	if !SameEntries(entries, Entries(1, 1, 2)) {
		t.Errorf("entries are %v", l.Opened.Entries)
	}
}

func openOnce(_ *testing.T, l *log) {
	_, err := l.store.Open()
	l.refused("a second Open", err)
	l.do(l.Log.Save(nil, Entries(1, 1, 1), true))
}
