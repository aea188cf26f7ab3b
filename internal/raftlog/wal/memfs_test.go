package wal_test

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/blixard/blixard/internal/raftlog/wal"
)

// memFS is a file system in memory that knows what of it is durable. Every
// change has a name ("wal.write", "snap.rename", "dir.sync", …) under which it
// can be told to fail, and is announced to hook before it happens.
type memFS struct {
	names   map[string]*inode // what open files and lookups see
	durable map[string]*inode // what the directory's last sync made durable
	dirOps  []dirOp           // since then
	locked  map[string]bool
	hook    func(op string)
	fault   func(op string) error
	space   int64 // bytes all files may have together; 0: no limit
}

// inode is a file: its bytes as read back, its bytes on disk, and the writes
// between the two.
type inode struct {
	data, disk []byte
	pending    []piece
}

// piece is an unsynced write to one sector, or a new size if data is nil.
type piece struct {
	off  int64
	data []byte
	size int64
}

// dirOp binds name to node, or removes it if node is nil.
type dirOp struct {
	name string
	node *inode
	from string // a rename: this name goes at the same moment
}

const sector = 512

func newMemFS() *memFS {
	return &memFS{names: map[string]*inode{}, durable: map[string]*inode{}, locked: map[string]bool{}}
}

// survivors says what of the unsynced changes a crash leaves.
type survivors int

const (
	surviveNone   survivors = iota
	surviveAll              // kill -9, or a lucky loss of power
	survivePrefix           // the first so many sectors and directory changes
	surviveSome             // any of them, in any order
	survivorKinds
)

// crash returns the file system as the machine finds it after a crash now.
func (m *memFS) crash(rng *rand.Rand, kind survivors) *memFS {
	out := newMemFS()
	nodes := map[*inode]*inode{}
	image := func(n *inode) *inode {
		if nodes[n] == nil {
			keep := chooser(rng, kind, len(n.pending))
			disk := slices.Clone(n.disk)
			for i, p := range n.pending {
				if keep(i) {
					disk = p.apply(disk)
				}
			}
			nodes[n] = &inode{data: disk, disk: slices.Clone(disk)}
		}
		return nodes[n]
	}
	names := map[string]*inode{}
	for _, name := range sortedKeys(m.durable) {
		names[name] = m.durable[name]
	}
	keep := chooser(rng, kind, len(m.dirOps))
	for i, op := range m.dirOps {
		if keep(i) {
			op.apply(names)
		}
	}
	for _, name := range sortedKeys(names) {
		out.names[name] = image(names[name])
		out.durable[name] = out.names[name]
	}
	return out
}

func chooser(rng *rand.Rand, kind survivors, n int) func(int) bool {
	prefix := rng.IntN(n + 1)
	return func(i int) bool {
		switch kind {
		case surviveNone:
			return false
		case surviveAll:
			return true
		case survivePrefix:
			return i < prefix
		default:
			return rng.IntN(2) == 0
		}
	}
}

func sortedKeys(m map[string]*inode) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

func (op dirOp) apply(names map[string]*inode) {
	if op.from != "" {
		delete(names, op.from)
	}
	if op.node == nil {
		delete(names, op.name)
	} else {
		names[op.name] = op.node
	}
}

func (p piece) apply(b []byte) []byte {
	end := p.off + int64(len(p.data))
	if p.data == nil {
		end = p.size
	}
	if grow := end - int64(len(b)); grow > 0 {
		b = append(b, make([]byte, grow)...)
	}
	copy(b[p.off:], p.data)
	return b
}

// change announces an operation on a file and answers its fault.
func (m *memFS) change(name, verb string) error {
	kind := "dir"
	switch {
	case strings.Contains(name, ".wal"):
		kind = "wal"
	case strings.Contains(name, ".snap"), strings.Contains(name, ".recv"), strings.HasSuffix(name, ".tmp"):
		kind = "snap"
	case filepath.Base(name) == "LOCK":
		kind = "lock"
	}
	op := kind + "." + verb
	if m.hook != nil {
		m.hook(op)
	}
	if m.fault != nil {
		if err := m.fault(op); err != nil {
			return &os.PathError{Op: op, Path: name, Err: err}
		}
	}
	return nil
}

func (m *memFS) room(grow int64) error {
	for _, n := range m.names {
		grow += int64(len(n.data))
	}
	if m.space > 0 && grow > m.space {
		return syscall.ENOSPC
	}
	return nil
}

func (m *memFS) MkdirAll(dir string) error { return m.change(dir, "create") }

func (m *memFS) Create(name string) (wal.File, error) {
	if err := m.change(name, "create"); err != nil {
		return nil, err
	}
	op := dirOp{name: name, node: &inode{}}
	op.apply(m.names)
	m.dirOps = append(m.dirOps, op)
	return &memFile{m, name, op.node}, nil
}

func (m *memFS) Open(name string) (wal.File, error) {
	n := m.names[name]
	if n == nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: os.ErrNotExist}
	}
	return &memFile{m, name, n}, nil
}

func (m *memFS) Rename(from, to string) error {
	if err := m.change(from, "rename"); err != nil {
		return err
	}
	if m.names[from] == nil {
		return &os.PathError{Op: "rename", Path: from, Err: os.ErrNotExist}
	}
	op := dirOp{name: to, node: m.names[from], from: from}
	op.apply(m.names)
	m.dirOps = append(m.dirOps, op)
	return nil
}

func (m *memFS) Remove(name string) error {
	if err := m.change(name, "remove"); err != nil {
		return err
	}
	if m.names[name] == nil {
		return &os.PathError{Op: "remove", Path: name, Err: os.ErrNotExist}
	}
	op := dirOp{name: name}
	op.apply(m.names)
	m.dirOps = append(m.dirOps, op)
	return nil
}

func (m *memFS) ReadDir(string) ([]string, error) {
	var names []string
	for _, name := range sortedKeys(m.names) {
		names = append(names, filepath.Base(name))
	}
	return names, nil
}

func (m *memFS) SyncDir(dir string) error {
	if err := m.change(dir, "sync"); err != nil {
		return err
	}
	for _, op := range m.dirOps {
		op.apply(m.durable)
	}
	m.dirOps = nil
	return nil
}

type unlocker func() error

func (u unlocker) Close() error { return u() }

func (m *memFS) Lock(name string) (io.Closer, error) {
	if err := m.change(name, "create"); err != nil {
		return nil, err
	}
	if m.locked[name] {
		return nil, fmt.Errorf("locking %s: %w", name, wal.ErrLocked)
	}
	m.locked[name] = true
	return unlocker(func() error {
		m.locked[name] = false
		return nil
	}), nil
}

type memFile struct {
	fs   *memFS
	name string
	node *inode
}

func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	if off < int64(len(f.node.data)) {
		n = copy(p, f.node.data[off:])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.fs.change(f.name, "write"); err != nil {
		return f.put(p[:len(p)/2/sector*sector], off), err
	}
	if err := f.fs.room(max(0, off+int64(len(p))-int64(len(f.node.data)))); err != nil {
		return 0, &os.PathError{Op: "write", Path: f.name, Err: err}
	}
	return f.put(p, off), nil
}

func (f *memFile) put(p []byte, off int64) int {
	for done := 0; done < len(p); {
		n := min(len(p)-done, int(sector-(off+int64(done))%sector))
		w := piece{off: off + int64(done), data: slices.Clone(p[done : done+n])}
		f.node.pending = append(f.node.pending, w)
		f.node.data = w.apply(f.node.data)
		done += n
	}
	return len(p)
}

func (f *memFile) Sync() error {
	if err := f.fs.change(f.name, "sync"); err != nil {
		// As Linux does it: the pages count as clean, yet are not on disk.
		f.node.pending = nil
		return err
	}
	for _, p := range f.node.pending {
		f.node.disk = p.apply(f.node.disk)
	}
	f.node.pending = nil
	return nil
}

func (f *memFile) Preallocate(size int64) error {
	if err := f.fs.change(f.name, "allocate"); err != nil {
		return err
	}
	if err := f.fs.room(max(0, size-int64(len(f.node.data)))); err != nil {
		return &os.PathError{Op: "fallocate", Path: f.name, Err: err}
	}
	p := piece{size: size}
	f.node.pending = append(f.node.pending, p)
	f.node.data = p.apply(f.node.data)
	return nil
}

func (f *memFile) Size() (int64, error) { return int64(len(f.node.data)), nil }
func (f *memFile) Close() error         { return nil }
