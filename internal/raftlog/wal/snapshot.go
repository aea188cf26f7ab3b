package wal

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"path/filepath"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// A snapshot file is a frame with one itemSnapshot, the data, and a trailer:
// magic[4], data length u64, crc32c of the data u32, crc of the frame u32,
// crc32c of all that u32.
const (
	trailerBytes     = 24
	snapBufferBytes  = 256 << 10
	snapSyncBytes    = 8 << 20 // synced in portions, so the log's syncs beside it stay short
	maxSnapHeadBytes = 1 << 20
)

var trailerMagic = [4]byte{0xa5, 'B', 'X', 'S'}

// WriteSnapshot implements raftlog.Log. A snapshot older than the newest one is
// dropped and that is success: a newer one was installed before or while it was
// being written.
func (l *Log) WriteSnapshot(meta *raftpb.SnapshotMetadata, write func(io.Writer) error) error {
	id := snapID{meta.GetIndex(), meta.GetTerm()}
	if err := l.checkSnapshot(id, false); errors.Is(err, errOvertaken) {
		return nil
	} else if err != nil {
		return err
	}
	tmp, err := l.stream(id, ".write"+tmpExt, meta, write)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return l.err
	}
	if id.index < l.newest().index {
		if err := l.fsys.Remove(tmp); err != nil {
			return l.fail(fmt.Errorf("removing an outdated snapshot: %w", err))
		}
		return nil
	}
	if err := l.flush(); err != nil { // the log must reach it before it counts
		return err
	}
	if err := l.rename(tmp, l.path(id.name(snapExt))); err != nil {
		return l.fail(err)
	}
	l.addSnapshot(id)
	return nil
}

// Install implements raftlog.Log. Entries beyond meta.Index stay if the log
// holds the entry at meta.Index with meta.Term.
func (l *Log) Install(meta *raftpb.SnapshotMetadata, write func(io.Writer) error) error {
	id := snapID{meta.GetIndex(), meta.GetTerm()}
	if err := l.checkSnapshot(id, true); err != nil {
		return err
	}
	tmp, err := l.stream(id, ".install"+tmpExt, meta, write)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return l.err
	}
	if err := l.flush(); err != nil {
		return err
	}
	recv := l.path(id.name(recvExt))
	if err := l.rename(tmp, recv); err != nil {
		return l.fail(err)
	}
	keep := l.holds(id)
	if err := l.write(appendNumbers(nil, itemInstall, id.index, id.term, boolNumber(keep))); err != nil {
		return l.fail(err)
	}
	if !keep {
		l.last, l.terms = id.index, termRuns{{id.index, id.term}}
	}
	l.hs = l.hs.raise(id.index, id.term)
	l.markSaved()
	if err := l.rename(recv, l.path(id.name(snapExt))); err != nil {
		return l.fail(err)
	}
	l.addSnapshot(id)
	return nil
}

// errOvertaken: a newer snapshot is there, so an older one is of no use.
var errOvertaken = errors.New("there is a newer snapshot")

// checkSnapshot refuses what cannot be a snapshot of this log.
func (l *Log) checkSnapshot(id snapID, install bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.err != nil:
		return l.err
	case id.index == 0 || id.term == 0:
		return fmt.Errorf("storing snapshot of index %d, term %d: it is empty", id.index, id.term)
	case id.index < l.newest().index && !install:
		return errOvertaken
	case id.index < l.newest().index:
		return fmt.Errorf("storing snapshot of index %d: there is one of %d", id.index, l.newest().index)
	case install && !l.holds(id) && id.index < l.hs.commit:
		return fmt.Errorf("installing snapshot of index %d, term %d: it contradicts the log, which is committed up to %d", id.index, id.term, l.hs.commit)
	case !install && !l.holds(id):
		return fmt.Errorf("storing snapshot of index %d, term %d: the log, which ends at %d, holds no such entry", id.index, id.term, l.last)
	}
	return nil
}

func (l *Log) holds(id snapID) bool {
	term, known := l.terms.at(id.index)
	return known && id.index <= l.last && term == id.term
}

func (l *Log) addSnapshot(id snapID) {
	if l.newest() != id {
		l.snaps = append(l.snaps, id)
	}
}

// stream writes the snapshot's file under a temporary name, synced.
func (l *Log) stream(id snapID, ext string, meta *raftpb.SnapshotMetadata, write func(io.Writer) error) (string, error) {
	conf, err := proto.MarshalOptions{Deterministic: true}.Marshal(meta.GetConfState())
	if err != nil {
		return "", fmt.Errorf("encoding snapshot's configuration: %w", err)
	}
	if len(conf) > maxSnapHeadBytes/2 {
		return "", fmt.Errorf("storing snapshot: its configuration has %d bytes, at most %d", len(conf), maxSnapHeadBytes/2)
	}
	head := appendNumbers(nil, itemSnapshot, id.index, id.term, uint64(len(conf)))
	frame, chain := appendFrame(nil, append(head, conf...), 0)
	tmp := l.path(id.name(ext))
	f, err := l.fsys.Create(tmp)
	if err != nil {
		return "", l.failLocked(fmt.Errorf("creating snapshot: %w", err))
	}
	w := &snapWriter{file: f}
	out := bufio.NewWriterSize(w, snapBufferBytes)
	if _, err := w.Write(frame); err != nil {
		return "", l.failLocked(fmt.Errorf("writing snapshot %s: %w", tmp, errors.Join(err, f.Close())))
	}
	sum := &summer{w: out}
	callerErr := write(sum)
	flushErr := out.Flush()
	if callerErr != nil && w.err == nil {
		// The caller gave up: nothing failed here.
		if err := errors.Join(f.Close(), l.fsys.Remove(tmp)); err != nil {
			return "", l.failLocked(fmt.Errorf("removing unfinished snapshot: %w", err))
		}
		return "", fmt.Errorf("producing snapshot of index %d: %w", id.index, callerErr)
	}
	err = flushErr
	if err == nil {
		_, err = w.Write(appendTrailer(nil, sum.bytes, sum.crc, chain))
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return "", l.failLocked(fmt.Errorf("writing snapshot %s: %w", tmp, err))
	}
	return tmp, nil
}

func (l *Log) failLocked(err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return l.err
	}
	return l.fail(err)
}

func (l *Log) rename(from, to string) error {
	if err := l.fsys.Rename(from, to); err != nil {
		return fmt.Errorf("naming snapshot: %w", err)
	}
	if err := l.fsys.SyncDir(l.dir); err != nil {
		return fmt.Errorf("syncing directory %s: %w", l.dir, err)
	}
	return nil
}

func (l *Log) path(name string) string { return filepath.Join(l.dir, name) }

// snapWriter appends to a file, syncs now and then and remembers its failure.
type snapWriter struct {
	file       File
	at, synced int64
	err        error
}

func (w *snapWriter) Write(p []byte) (int, error) {
	if w.err != nil {
		return 0, w.err
	}
	n, err := w.file.WriteAt(p, w.at)
	w.at += int64(n)
	if err == nil && w.at-w.synced >= snapSyncBytes {
		w.synced = w.at
		err = w.file.Sync()
	}
	w.err = err
	return n, err
}

// summer sums up what passes through it.
type summer struct {
	w     io.Writer
	bytes uint64
	crc   uint32
}

func (s *summer) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	s.bytes += uint64(n)
	s.crc = crc32.Update(s.crc, castagnoli, p[:n])
	return n, err
}

func appendTrailer(b []byte, length uint64, crc, chain uint32) []byte {
	b = append(b, trailerMagic[:]...)
	b = binary.LittleEndian.AppendUint64(b, length)
	b = binary.LittleEndian.AppendUint32(b, crc)
	b = binary.LittleEndian.AppendUint32(b, chain)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b[len(b)-20:], castagnoli))
}

var errSnapshot = errors.New("snapshot does not match its checksum")

// readSnapshot checks a snapshot's file and hands its data to read.
func readSnapshot(fsys FS, name string, id snapID, read func(io.Reader) error) (meta *raftpb.SnapshotMetadata, err error) {
	f, err := fsys.Open(name)
	if err != nil {
		return nil, fmt.Errorf("opening snapshot: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	size, err := f.Size()
	if err != nil {
		return nil, fmt.Errorf("reading snapshot: %w", err)
	}
	head := make([]byte, min(size, maxSnapHeadBytes))
	if _, err := f.ReadAt(head, 0); err != nil {
		return nil, fmt.Errorf("reading snapshot: %w", err)
	}
	if len(head) < sectorBytes {
		return nil, fmt.Errorf("%w: it has only %d bytes", errSnapshot, size)
	}
	frame := readFrame(head, 0, 0, nil)
	if frame.verdict != frameValid {
		return nil, fmt.Errorf("%w: its head is damaged", errSnapshot)
	}
	meta, err = decodeSnapshotMeta(frame.payload, id)
	if err != nil {
		return nil, err
	}
	length := size - int64(frame.size) - trailerBytes
	if length < 0 {
		return nil, fmt.Errorf("%w: it has only %d bytes", errSnapshot, size)
	}
	data := &sumReader{r: bufio.NewReaderSize(io.NewSectionReader(f, int64(frame.size), length), int(min(length+1, snapBufferBytes)))}
	if err := read(data); err != nil {
		return nil, fmt.Errorf("reading snapshot of index %d: %w", id.index, err)
	}
	if _, err := io.Copy(io.Discard, data); err != nil {
		return nil, fmt.Errorf("reading snapshot: %w", err)
	}
	trailer := make([]byte, trailerBytes)
	if _, err := f.ReadAt(trailer, size-trailerBytes); err != nil {
		return nil, fmt.Errorf("reading snapshot: %w", err)
	}
	if !bytes.Equal(trailer, appendTrailer(nil, uint64(length), data.crc, frame.chain)) {
		return nil, errSnapshot
	}
	return meta, nil
}

func decodeSnapshotMeta(payload []byte, id snapID) (*raftpb.SnapshotMetadata, error) {
	d := decoder{b: payload}
	kind, index, term, conf := d.kind(), d.number(), d.number(), d.bytes()
	if d.bad || kind != itemSnapshot {
		return nil, errPayload
	}
	if index != id.index || term != id.term {
		return nil, fmt.Errorf("%w: it is of index %d, term %d, not what its name says", errSnapshot, index, term)
	}
	state := &raftpb.ConfState{}
	if err := proto.Unmarshal(conf, state); err != nil {
		return nil, fmt.Errorf("%w: %w", errPayload, err)
	}
	return &raftpb.SnapshotMetadata{ConfState: state, Index: &index, Term: &term}, nil
}

type sumReader struct {
	r   io.Reader
	crc uint32
}

func (s *sumReader) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.crc = crc32.Update(s.crc, castagnoli, p[:n])
	return n, err
}

func boolNumber(b bool) uint64 {
	if b {
		return 1
	}
	return 0
}
