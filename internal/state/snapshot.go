package state

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/wire"
)

// A snapshot is a stream of chunks, each with its length in four bytes, ended
// by a zero length and the FNV-1a hash of all chunks in eight. A chunk holds
// rows: a kind and a record. Kinds a release does not know are an error: the
// feature level keeps them out.
const (
	snapshotMagic = "BLXSTATE"
	chunkBytes    = 64 << 10
	maxChunkBytes = 64 << 20
)

// Row kinds in a snapshot, in the order they are written.
const (
	rowPosition uint8 = iota + 1
	rowCluster
	rowNode
	rowVM
	rowInstance
	rowToken
	rowEvent
	rowKey
	rowFunction
	rowFunctionVersion
	rowSlots
	rowAsyncEvent
	rowAccessKey
)

// ErrSnapshot is wrapped by every error about a snapshot's contents.
var ErrSnapshot = errors.New("snapshot is damaged")

// WriteTo writes the whole state as a stream. It takes no lock and disturbs
// nobody: a view never changes.
func (v *View) WriteTo(w io.Writer) (int64, error) {
	out := &chunkWriter{w: bufio.NewWriterSize(w, 256<<10), hash: fnv.New64a()}
	out.raw([]byte(snapshotMagic))
	v.rows(out.row)
	return out.finish()
}

// Hash is equal for equal states, whatever process or machine they are on.
func (v *View) Hash() uint64 {
	out := &chunkWriter{w: bufio.NewWriter(io.Discard), hash: fnv.New64a()}
	v.rows(out.row)
	out.flush()
	return out.hash.Sum64()
}

// rows emits every row that is not derived, in order.
func (v *View) rows(row func(kind uint8, code func(*wire.Coder))) {
	t := v.t
	row(rowPosition, func(c *wire.Coder) { wire.Uint(c, &v.Index); wire.Uint(c, &v.Term) })
	row(rowCluster, func(c *wire.Coder) { codeCluster(c, &t.cluster) })
	t.nodes.Scan(func(_ blixard.NodeName, n *blixard.Node) bool {
		row(rowNode, func(c *wire.Coder) { codeNode(c, n) })
		return true
	})
	t.vms.Scan(func(_ blixard.VMName, vm *blixard.VM) bool {
		row(rowVM, func(c *wire.Coder) { codeVM(c, vm) })
		return true
	})
	share := t.sharedSpec
	t.instances.Scan(func(_ string, i *blixard.Instance) bool {
		row(rowInstance, func(c *wire.Coder) { codeInstance(c, i, share) })
		return true
	})
	t.tokens.Scan(func(_ string, tok *Token) bool {
		row(rowToken, func(c *wire.Coder) { codeToken(c, tok) })
		return true
	})
	t.events.Scan(func(_ uint64, e *Event) bool {
		row(rowEvent, func(c *wire.Coder) { codeEvent(c, e) })
		return true
	})
	t.keyOrder.Scan(func(seq uint64, key string) bool {
		r, _ := t.keys.Get(key)
		row(rowKey, func(c *wire.Coder) { wire.Uint(c, &seq); wire.String(c, &key); codeRemembered(c, r) })
		return true
	})
	t.functionRows(row)
}

func (t *tables) sharedSpec(name blixard.VMName) *blixard.VMSpec {
	if vm := t.vm(name); vm != nil {
		return &vm.Spec
	}
	return nil
}

type chunkWriter struct {
	w     *bufio.Writer
	chunk []byte
	hash  interface {
		io.Writer
		Sum64() uint64
	}
	n   int64
	err error
}

func (c *chunkWriter) raw(b []byte) {
	if c.err == nil {
		var n int
		n, c.err = c.w.Write(b)
		c.n += int64(n)
	}
}

func (c *chunkWriter) row(kind uint8, code func(*wire.Coder)) {
	out := wire.Writer(append(c.chunk, kind))
	out.Record(code)
	c.chunk = out.Bytes()
	if len(c.chunk) >= chunkBytes {
		c.flush()
	}
}

func (c *chunkWriter) flush() {
	if len(c.chunk) == 0 {
		return
	}
	c.raw(binary.LittleEndian.AppendUint32(nil, uint32(len(c.chunk))))
	c.raw(c.chunk)
	if _, err := c.hash.Write(c.chunk); err != nil && c.err == nil {
		c.err = err
	}
	c.chunk = c.chunk[:0]
}

func (c *chunkWriter) finish() (int64, error) {
	c.flush()
	c.raw(make([]byte, 4))
	c.raw(binary.LittleEndian.AppendUint64(nil, c.hash.Sum64()))
	if c.err == nil {
		c.err = c.w.Flush()
	}
	if c.err != nil {
		return c.n, fmt.Errorf("writing a snapshot: %w", c.err)
	}
	return c.n, nil
}

// Read reads a snapshot and returns the state it was made of.
func Read(r io.Reader) (*State, error) {
	in := bufio.NewReaderSize(r, 256<<10)
	head := make([]byte, len(snapshotMagic))
	if _, err := io.ReadFull(in, head); err != nil {
		return nil, fmt.Errorf("%w: reading its head: %w", ErrSnapshot, err)
	}
	if string(head) != snapshotMagic {
		return nil, fmt.Errorf("%w: it does not begin with %s", ErrSnapshot, snapshotMagic)
	}
	s, hash := New(), fnv.New64a()
	var size [4]byte
	var chunk []byte
	for {
		if _, err := io.ReadFull(in, size[:]); err != nil {
			return nil, fmt.Errorf("%w: it ends early: %w", ErrSnapshot, err)
		}
		n := binary.LittleEndian.Uint32(size[:])
		if n == 0 {
			break
		}
		if n > maxChunkBytes {
			return nil, fmt.Errorf("%w: a chunk of %d bytes", ErrSnapshot, n)
		}
		var err error
		if chunk, err = readChunk(in, chunk, int(n)); err != nil {
			return nil, fmt.Errorf("%w: it ends early: %w", ErrSnapshot, err)
		}
		if _, err := hash.Write(chunk); err != nil {
			return nil, err
		}
		if err := s.restoreRows(chunk); err != nil {
			return nil, err
		}
	}
	var sum [8]byte
	if _, err := io.ReadFull(in, sum[:]); err != nil {
		return nil, fmt.Errorf("%w: it ends early: %w", ErrSnapshot, err)
	}
	if binary.LittleEndian.Uint64(sum[:]) != hash.Sum64() {
		return nil, fmt.Errorf("%w: its hash does not match", ErrSnapshot)
	}
	return s, nil
}

// readChunk grows the buffer as bytes arrive, so that a foreign length cannot
// make it large.
func readChunk(in io.Reader, buf []byte, n int) ([]byte, error) {
	buf = buf[:0]
	for len(buf) < n {
		step := min(n-len(buf), chunkBytes*2)
		at := len(buf)
		buf = append(buf, make([]byte, step)...)
		if _, err := io.ReadFull(in, buf[at:]); err != nil {
			return nil, err
		}
	}
	return buf, nil
}

func (s *State) restoreRows(chunk []byte) error {
	c := wire.Reader(chunk)
	for c.Err() == nil && c.Left() > 0 {
		var kind uint8
		wire.Uint(c, &kind)
		var err error
		c.Record(func(c *wire.Coder) { err = s.restoreRow(kind, c) })
		if err != nil {
			return err
		}
	}
	if err := c.Err(); err != nil {
		return fmt.Errorf("%w: %w", ErrSnapshot, err)
	}
	return nil
}

func (s *State) restoreRow(kind uint8, c *wire.Coder) error {
	t := &s.t
	switch kind {
	case rowPosition:
		wire.Uint(c, &s.index)
		wire.Uint(c, &s.term)
	case rowCluster:
		codeCluster(c, &t.cluster)
	case rowNode:
		n := new(blixard.Node)
		codeNode(c, n)
		t.nodes.Set(n.Name, n)
	case rowVM:
		vm := new(blixard.VM)
		codeVM(c, vm)
		t.vms.Set(vm.Name, vm)
	case rowInstance:
		i := new(blixard.Instance)
		codeInstance(c, i, t.sharedSpec)
		if i.Spec == nil || !i.State.Known() {
			return fmt.Errorf("%w: an instance without spec or with the state %q", ErrSnapshot, i.State)
		}
		key := keyOf(i)
		t.instances.Set(key, i)
		t.byNode.Set(string(i.Node)+"\x00"+key, i)
		if i.Holds() {
			t.hold(i, key, 1)
		}
	case rowToken:
		tok := new(Token)
		codeToken(c, tok)
		t.tokens.Set(tok.ID, tok)
	case rowEvent:
		e := new(Event)
		codeEvent(c, e)
		t.events.Set(e.Seq, e)
	case rowKey:
		var seq uint64
		var key string
		r := new(remembered)
		wire.Uint(c, &seq)
		wire.String(c, &key)
		codeRemembered(c, r)
		t.keys.Set(key, r)
		t.keyOrder.Set(seq, key)
	case rowFunction, rowFunctionVersion, rowSlots, rowAsyncEvent, rowAccessKey:
		t.restoreFunctionRow(kind, c, s.index)
	default:
		return fmt.Errorf("%w: row kind %d is not known to this release", ErrSnapshot, kind)
	}
	return nil
}
