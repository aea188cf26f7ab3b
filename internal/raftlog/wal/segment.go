package wal

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

const (
	lockName   = "LOCK"
	segmentExt = ".wal"
	snapExt    = ".snap"
	recvExt    = ".recv"
	tmpExt     = ".tmp"
)

// segment is one segment file: its number and the index of the last entry
// before it.
type segment struct{ seq, last uint64 }

func (s segment) name() string { return fmt.Sprintf("%010d-%020d%s", s.seq, s.last+1, segmentExt) }

// snapID names a snapshot file.
type snapID struct{ index, term uint64 }

func (s snapID) name(ext string) string { return fmt.Sprintf("%020d-%020d%s", s.index, s.term, ext) }

// parseName splits "<a>-<b><ext>"; other names are not ours and left alone.
func parseName(name, ext string) (a, b uint64, ok bool) {
	stem, ok := strings.CutSuffix(name, ext)
	if !ok {
		return 0, 0, false
	}
	left, right, ok := strings.Cut(stem, "-")
	if !ok {
		return 0, 0, false
	}
	a, errA := strconv.ParseUint(left, 10, 64)
	b, errB := strconv.ParseUint(right, 10, 64)
	return a, b, errA == nil && errB == nil
}

// createSegment makes a segment durable under its name, holding its first
// frame and size bytes, and returns it open.
func createSegment(fsys FS, dir string, start segmentStart, hs hardState, size int64) (_ File, pos int64, chain uint32, err error) {
	name := filepath.Join(dir, segment{start.seq, start.last}.name())
	f, err := fsys.Create(name + tmpExt)
	if err != nil {
		return nil, 0, 0, fmt.Errorf("creating segment: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	if err := f.Preallocate(size); err != nil {
		return nil, 0, 0, fmt.Errorf("preallocating %d bytes for segment %s: %w", size, name, err)
	}
	frame, chain := appendFrame(nil, appendHardState(appendSegmentStart(nil, start), hs), 0)
	if _, err := f.WriteAt(frame, 0); err != nil {
		return nil, 0, 0, fmt.Errorf("writing the start of segment %s: %w", name, err)
	}
	if err := f.Sync(); err != nil {
		return nil, 0, 0, fmt.Errorf("syncing the start of segment %s: %w", name, err)
	}
	if err := fsys.Rename(name+tmpExt, name); err != nil {
		return nil, 0, 0, fmt.Errorf("naming segment: %w", err)
	}
	if err := fsys.SyncDir(dir); err != nil {
		return nil, 0, 0, fmt.Errorf("syncing directory %s: %w", dir, err)
	}
	return f, int64(len(frame)), chain, nil
}

// termRuns tells the term of each index the log holds, as the first index of
// each run of equal terms. It is what the log remembers of its entries.
type termRuns []termRun

type termRun struct{ first, term uint64 }

// at is the term of index, which must not be beyond the log's last.
func (r termRuns) at(index uint64) (term uint64, known bool) {
	for _, v := range slices.Backward(r) {
		if v.first <= index {
			return v.term, true
		}
	}
	return 0, false
}

// put records the term of index and forgets all indexes above it.
func (r termRuns) put(index, term uint64) termRuns {
	for len(r) > 0 && r[len(r)-1].first >= index {
		r = r[:len(r)-1]
	}
	if len(r) == 0 || r[len(r)-1].term != term {
		r = append(r, termRun{index, term})
	}
	return r
}

// forget drops runs that lie wholly below index.
func (r termRuns) forget(index uint64) termRuns {
	for len(r) > 1 && r[1].first <= index {
		r = r[1:]
	}
	return r
}
