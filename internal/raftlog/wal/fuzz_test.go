package wal

import (
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/blixard/blixard/internal/raftlog"
)

// unsyncedFS makes fuzzing fast.
type unsyncedFS struct{ FS }

func (u unsyncedFS) SyncDir(string) error { return nil }

func (u unsyncedFS) Create(name string) (File, error) { return unsynced(u.FS.Create(name)) }
func (u unsyncedFS) Open(name string) (File, error)   { return unsynced(u.FS.Open(name)) }

func unsynced(f File, err error) (File, error) { return unsyncedFile{f}, err }

type unsyncedFile struct{ File }

func (unsyncedFile) Sync() error { return nil }

// FuzzOpen puts arbitrary bytes behind a sound segment start, as they are or
// as the payload of a sound frame, and opens that. It never panics, and what
// it accepts can be gone on with.
func FuzzOpen(f *testing.F) {
	entry := &raftpb.Entry{Index: proto.Uint64(1), Term: proto.Uint64(1), Data: make([]byte, 700)}
	start := appendHardState(appendSegmentStart(nil, segmentStart{seq: 1}), hardState{})
	head, chain := appendFrame(nil, start, 0)
	payload := appendEntries(appendHardState(nil, hardState{1, 1, 1}), []*raftpb.Entry{entry})
	frame, _ := appendFrame(nil, payload, chain)
	f.Add([]byte{}, byte(0))
	f.Add(frame, byte(0))
	f.Add(append(frame[:sectorBytes:sectorBytes], make([]byte, 2*sectorBytes)...), byte(0))
	f.Add(append(make([]byte, sectorBytes), frame[sectorBytes:]...), byte(0))
	f.Add(payload, byte(1))
	f.Add(appendNumbers(nil, itemInstall, 9, 2, 0), byte(1))
	f.Add(appendNumbers(nil, itemSeal, 2), byte(1))
	f.Add(appendNumbers(nil, itemEntries, 1<<60, 1), byte(1))
	f.Add(start, byte(2))
	f.Fuzz(func(t *testing.T, data []byte, mode byte) {
		if len(data) > 1<<16 {
			return
		}
		b := head
		switch mode % 3 {
		case 0:
			b = append(slices.Clip(b), data...)
		case 1:
			framed, _ := appendFrame(nil, data, chain)
			b = append(slices.Clip(b), framed...)
		default: // a start of any content
			b, _ = appendFrame(nil, data, 0)
		}
		dir := t.TempDir()
		file, err := OS.Create(filepath.Join(dir, segment{seq: 1}.name()))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := file.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
		opened, err := Open(unsyncedFS{OS}, dir, Options{SegmentBytes: minSegmentBytes})
		if err != nil {
			if !errors.Is(err, raftlog.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		next := opened.Snapshot.GetIndex() + uint64(len(opened.Entries)) + 1
		again := &raftpb.Entry{Index: &next, Term: proto.Uint64(1)}
		if err := opened.Log.Save(nil, []*raftpb.Entry{again}, true); err != nil {
			t.Fatal(err)
		}
		if err := opened.Log.Close(); err != nil {
			t.Fatal(err)
		}
		if opened, err = Open(unsyncedFS{OS}, dir, Options{}); err != nil {
			t.Fatal(err)
		}
		if err := opened.Log.Close(); err != nil {
			t.Fatal(err)
		}
	})
}
