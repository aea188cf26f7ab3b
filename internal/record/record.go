// Package record is the file of a recorded incident: the state of a cluster at
// one index, the entries of its log that were applied after it, and hashes of
// the states they led to. `blixard cluster record` writes it, `blixard sim
// replay` plays it back.
//
// A recording is a stream of frames, each with its own checksum:
//
//	"BLXRECRD" version
//	header · snapshot… · snapshot end · (entry | checkpoint)… · end
//
// Ownership: a Writer or Reader belongs to one goroutine; it never closes what
// it writes to or reads from.
//
// Ordering: entries follow each other without a gap, from the index after the
// snapshot's on. A checkpoint stands behind the entry whose state it hashes.
//
// Invariants: a Writer hands on whole frames only, so a recording that was cut
// off between two writes ends between two frames and can be read up to there
// (ErrCut). Anything else that is missing or changed is ErrDamaged, with the
// offset of the frame. A Reader never holds more than one frame.
//
// A recording holds what the state holds, the cluster's secret included.
package record

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
	"github.com/blixard/blixard/internal/wire"
)

// Magic begins every recording.
const Magic = "BLXRECRD"

const (
	version    = 1
	chunkBytes = 64 << 10
	// maxFrameBytes bounds what a length found in a file can make a Reader hold.
	maxFrameBytes = 128 << 20
)

// Kinds of frames; never reused.
const (
	frameHeader uint8 = iota + 1
	frameSnapshot
	frameSnapshotEnd
	frameEntry
	frameCheckpoint
	frameEnd
)

var (
	// ErrDamaged is wrapped by every error about a recording's contents.
	ErrDamaged = errors.New("the recording is damaged")
	// ErrCut: the recording ends between two frames, without its end. One that
	// was followed until somebody stopped it ends so.
	ErrCut = errors.New("the recording was cut off")
)

var table = crc32.MakeTable(crc32.Castagnoli)

// Header says what a recording is of.
type Header struct {
	Node    blixard.NodeName // whose log it is
	Release string           // of that node
	AtMS    int64            // when the recording began, by that node's clock
	Index   uint64           // of the snapshot
	Term    uint64
	// Conf is the raft configuration at Index.
	Conf *raftpb.ConfState
}

func codeHeader(c *wire.Coder, h *Header, conf *[]byte) {
	wire.String(c, &h.Node)
	wire.String(c, &h.Release)
	wire.Int(c, &h.AtMS)
	wire.Uint(c, &h.Index)
	wire.Uint(c, &h.Term)
	c.Blob(conf)
}

// Entry is one entry of the log as it was applied.
type Entry struct {
	Index, Term uint64
	Type        raftpb.EntryType
	Data        []byte // of the entry; empty for a new leader's first
}

func codeEntry(c *wire.Coder, e *Entry) {
	wire.Uint(c, &e.Index)
	wire.Uint(c, &e.Term)
	wire.Int(c, &e.Type)
	c.Blob(&e.Data)
}

// Checkpoint is the hash of the state after the entry at Index.
type Checkpoint struct {
	Index, Hash uint64
}

func codeCheckpoint(c *wire.Coder, k *Checkpoint) {
	wire.Uint(c, &k.Index)
	wire.Uint(c, &k.Hash)
}

// Writer writes a recording. Frames are gathered; each Write of the writer
// below is of whole frames.
type Writer struct {
	w   io.Writer
	buf []byte
	err error
}

// NewWriter begins a recording.
func NewWriter(w io.Writer, h Header) (*Writer, error) {
	conf, err := proto.MarshalOptions{Deterministic: true}.Marshal(h.Conf)
	if err != nil {
		return nil, fmt.Errorf("encoding the raft configuration: %w", err)
	}
	out := &Writer{w: w, buf: append([]byte(Magic), version)}
	out.frame(frameHeader, func(c *wire.Coder) { codeHeader(c, &h, &conf) })
	return out, out.err
}

// Snapshot writes the state that the entries follow: once, first.
func (w *Writer) Snapshot(v *state.View) error {
	chunks := bufio.NewWriterSize(snapshotFrames{w}, chunkBytes)
	if _, err := v.WriteTo(chunks); err != nil {
		return err
	}
	if err := chunks.Flush(); err != nil {
		return err
	}
	w.frame(frameSnapshotEnd, func(*wire.Coder) {})
	return w.err
}

// snapshotFrames makes frames of the bytes of a snapshot.
type snapshotFrames struct{ w *Writer }

func (s snapshotFrames) Write(b []byte) (int, error) {
	s.w.frame(frameSnapshot, func(c *wire.Coder) { c.Blob(&b) })
	return len(b), s.w.err
}

// Entry writes the next entry.
func (w *Writer) Entry(e *raftpb.Entry) error {
	out := Entry{Index: e.GetIndex(), Term: e.GetTerm(), Type: e.GetType(), Data: e.GetData()}
	w.frame(frameEntry, func(c *wire.Coder) { codeEntry(c, &out) })
	return w.err
}

// Checkpoint writes the hash of the state after the last entry.
func (w *Writer) Checkpoint(k Checkpoint) error {
	w.frame(frameCheckpoint, func(c *wire.Coder) { codeCheckpoint(c, &k) })
	return w.err
}

// End marks the recording as complete and hands everything on.
func (w *Writer) End() error {
	w.frame(frameEnd, func(*wire.Coder) {})
	return w.Flush()
}

// Flush hands on what was gathered.
func (w *Writer) Flush() error {
	if w.err == nil && len(w.buf) > 0 {
		if _, err := w.w.Write(w.buf); err != nil {
			w.err = fmt.Errorf("writing a recording: %w", err)
		}
		w.buf = w.buf[:0]
	}
	return w.err
}

func (w *Writer) frame(kind uint8, code func(*wire.Coder)) {
	if w.err != nil {
		return
	}
	at := len(w.buf)
	w.buf = append(w.buf, kind, 0, 0, 0, 0)
	c := wire.Writer(w.buf)
	code(c)
	w.buf = c.Bytes()
	binary.LittleEndian.PutUint32(w.buf[at+1:], uint32(len(w.buf)-at-5))
	w.buf = binary.LittleEndian.AppendUint32(w.buf, crc32.Checksum(w.buf[at:], table))
	if len(w.buf) >= chunkBytes {
		w.err = w.Flush()
	}
}

// Reader reads a recording.
type Reader struct {
	in     *bufio.Reader
	offset int64 // of the next frame
	header Header
	last   uint64 // index of the last entry, the snapshot's before the first
	buf    []byte
	ended  bool
}

// Is tells whether the first bytes of a file are those of a recording.
func Is(head []byte) bool { return bytes.HasPrefix(head, []byte(Magic)) }

// NewReader reads the head of a recording.
func NewReader(r io.Reader) (*Reader, error) {
	in := &Reader{in: bufio.NewReaderSize(r, 256<<10)}
	head := make([]byte, len(Magic)+1)
	n, err := io.ReadFull(in.in, head)
	if err != nil && n < len(Magic) || !Is(head) {
		return nil, fmt.Errorf("%w: it does not begin with %s", ErrDamaged, Magic)
	}
	if err != nil || head[len(Magic)] != version {
		return nil, fmt.Errorf("%w: it is of version %d, this release knows %d", ErrDamaged, head[len(Magic)], version)
	}
	in.offset = int64(len(head))
	kind, data, err := in.frame()
	if err != nil {
		return nil, cut(err)
	}
	var conf []byte
	if kind != frameHeader {
		return nil, in.damaged("it has no header")
	}
	if err := in.decode(data, func(c *wire.Coder) { codeHeader(c, &in.header, &conf) }); err != nil {
		return nil, err
	}
	in.header.Conf = new(raftpb.ConfState)
	if err := proto.Unmarshal(conf, in.header.Conf); err != nil {
		return nil, in.damaged("its raft configuration cannot be read: %v", err)
	}
	in.last = in.header.Index
	return in, nil
}

// cut is the error of a recording that ends where it must not.
func cut(err error) error {
	if errors.Is(err, ErrCut) {
		return fmt.Errorf("%w: it ends before its first entry", ErrDamaged)
	}
	return err
}

// Header says what the recording is of.
func (r *Reader) Header() Header { return r.header }

// State reads the state that the entries follow: once, first.
func (r *Reader) State() (*state.State, error) {
	s, err := state.Read(&snapshotReader{r: r})
	if err != nil {
		if errors.Is(err, ErrDamaged) {
			return nil, err
		}
		return nil, r.damaged("its state at %d cannot be read: %v", r.header.Index, err)
	}
	if s.Index() != r.header.Index || s.Term() != r.header.Term {
		return nil, r.damaged("its header says index %d, its state %d", r.header.Index, s.Index())
	}
	kind, _, err := r.frame()
	if err == nil && kind != frameSnapshotEnd {
		err = r.damaged("its state does not end")
	}
	if err != nil {
		return nil, cut(err)
	}
	return s, nil
}

// snapshotReader gives the bytes of a snapshot.
type snapshotReader struct {
	r    *Reader
	left []byte
	end  bool
}

func (s *snapshotReader) Read(b []byte) (int, error) {
	for len(s.left) == 0 {
		if s.end {
			return 0, io.EOF
		}
		next, err := s.r.in.Peek(1)
		if err != nil || next[0] != frameSnapshot {
			s.end = true
			continue
		}
		_, data, err := s.r.frame()
		if err != nil {
			return 0, cut(err)
		}
		if err := s.r.decode(data, func(c *wire.Coder) { c.Blob(&s.left) }); err != nil {
			return 0, err
		}
	}
	n := copy(b, s.left)
	s.left = s.left[n:]
	return n, nil
}

// Next returns the next *Entry or *Checkpoint, io.EOF after the recording's
// end, ErrCut when it has none.
func (r *Reader) Next() (any, error) {
	if r.ended {
		return nil, io.EOF
	}
	kind, data, err := r.frame()
	if err != nil {
		return nil, err
	}
	switch kind {
	case frameEntry:
		e := new(Entry)
		if err := r.decode(data, func(c *wire.Coder) { codeEntry(c, e) }); err != nil {
			return nil, err
		}
		if e.Index != r.last+1 {
			return nil, r.damaged("entry %d follows %d", e.Index, r.last)
		}
		r.last = e.Index
		return e, nil
	case frameCheckpoint:
		k := new(Checkpoint)
		if err := r.decode(data, func(c *wire.Coder) { codeCheckpoint(c, k) }); err != nil {
			return nil, err
		}
		if k.Index != r.last {
			return nil, r.damaged("a hash of the state at %d stands behind entry %d", k.Index, r.last)
		}
		return k, nil
	case frameEnd:
		r.ended = true
		if _, err := r.in.ReadByte(); !errors.Is(err, io.EOF) {
			return nil, r.damaged("something follows its end")
		}
		return nil, io.EOF
	}
	return nil, r.damaged("a frame of kind %d, which this release does not know, or not here", kind)
}

// frame reads one frame. Its bytes are valid until the next.
func (r *Reader) frame() (kind uint8, data []byte, err error) {
	head := make([]byte, 5)
	switch n, err := io.ReadFull(r.in, head); {
	case n == 0 && errors.Is(err, io.EOF):
		return 0, nil, ErrCut
	case err != nil:
		return 0, nil, r.damaged("it ends within a frame")
	}
	size := int(binary.LittleEndian.Uint32(head[1:]))
	if size > maxFrameBytes {
		return 0, nil, r.damaged("a frame of %d bytes", size)
	}
	r.buf = r.buf[:0]
	for want := size + 4; len(r.buf) < want; { // grows as bytes arrive: the length may be anything
		at := len(r.buf)
		r.buf = append(r.buf, make([]byte, min(want-at, 2*chunkBytes))...)
		if _, err := io.ReadFull(r.in, r.buf[at:]); err != nil {
			return 0, nil, r.damaged("it ends within a frame")
		}
	}
	sum := crc32.Update(crc32.Checksum(head, table), table, r.buf[:size])
	if sum != binary.LittleEndian.Uint32(r.buf[size:]) {
		return 0, nil, r.damaged("a checksum does not match")
	}
	r.offset += int64(size) + 9
	return head[0], r.buf[:size], nil
}

func (r *Reader) decode(data []byte, code func(*wire.Coder)) error {
	c := wire.Reader(data)
	code(c)
	if err := c.Err(); err != nil {
		return r.damaged("%v", err)
	}
	return nil
}

func (r *Reader) damaged(format string, args ...any) error {
	return fmt.Errorf("%w at byte %d: %s", ErrDamaged, r.offset, fmt.Sprintf(format, args...))
}
