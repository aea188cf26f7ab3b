// Package memfs is a file system in memory for the log of package wal that
// knows what of it is durable: crashes, faults and damage can be had at will. It
// is for tests of that log and for the simulator, which runs the real log on it.
//
// Ownership: an FS belongs to one goroutine. It draws lots only from the source
// it is given, and reads no clock.
//
// Order: what Crash leaves of unsynced changes are whole sectors and whole
// directory changes, chosen as asked; what was synced is always there.
package memfs

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

// FS is a file system. Every change has a name ("wal.write", "snap.rename",
// "dir.sync", …) under which it can be told to fail.
type FS struct {
	// Hook is told every change before it happens.
	Hook func(op string)
	// Fault answers the error of a change, nil for none.
	Fault func(op string) error
	// Redirect, if not nil, tells where a write really lands: in which file, and
	// where there. The writer is not told.
	Redirect func(name string, off int64, p []byte) (string, int64)
	// Space is how many bytes all files may have together; 0: no limit.
	Space int64

	names   map[string]*inode // what open files and lookups see
	durable map[string]*inode // what the directory's last sync made durable
	dirOps  []dirOp           // since then
	locked  map[string]bool
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

// Sector is what is written whole or not at all.
const Sector = 512

// New makes an empty file system.
func New() *FS {
	return &FS{names: map[string]*inode{}, durable: map[string]*inode{}, locked: map[string]bool{}}
}

// Survivors says what of the unsynced changes a crash leaves.
type Survivors int

// Kinds of survivors.
const (
	None   Survivors = iota
	All              // kill -9, or a lucky loss of power
	Prefix           // the first so many sectors and directory changes
	Some             // any of them, in any order
	Kinds            // how many kinds there are
)

// Crash returns the file system as the machine finds it after a crash now.
func (m *FS) Crash(rng *rand.Rand, kind Survivors) *FS {
	out := New()
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

func chooser(rng *rand.Rand, kind Survivors, n int) func(int) bool {
	prefix := rng.IntN(n + 1)
	return func(i int) bool {
		switch kind {
		case None:
			return false
		case All:
			return true
		case Prefix:
			return i < prefix
		default:
			return rng.IntN(2) == 0
		}
	}
}

func sortedKeys(m map[string]*inode) []string {
	var keys []string
	for k := range m { //order:any sorted below
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
func (m *FS) change(name, verb string) error {
	if m.Hook == nil && m.Fault == nil {
		return nil
	}
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
	if m.Hook != nil {
		m.Hook(op)
	}
	if m.Fault != nil {
		if err := m.Fault(op); err != nil {
			return &os.PathError{Op: op, Path: name, Err: err}
		}
	}
	return nil
}

func (m *FS) room(grow int64) error {
	if m.Space == 0 {
		return nil
	}
	for _, n := range m.names { //order:any a sum
		grow += int64(len(n.data))
	}
	if grow > m.Space {
		return syscall.ENOSPC
	}
	return nil
}

// MkdirAll implements wal.FS.
func (m *FS) MkdirAll(dir string) error { return m.change(dir, "create") }

// Create implements wal.FS.
func (m *FS) Create(name string) (wal.File, error) {
	if err := m.change(name, "create"); err != nil {
		return nil, err
	}
	op := dirOp{name: name, node: &inode{}}
	op.apply(m.names)
	m.dirOps = append(m.dirOps, op)
	return &file{m, name, op.node}, nil
}

// Open implements wal.FS.
func (m *FS) Open(name string) (wal.File, error) {
	n := m.names[name]
	if n == nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: os.ErrNotExist}
	}
	return &file{m, name, n}, nil
}

// Rename implements wal.FS.
func (m *FS) Rename(from, to string) error {
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

// Remove implements wal.FS.
func (m *FS) Remove(name string) error {
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

// ReadDir implements wal.FS.
func (m *FS) ReadDir(string) ([]string, error) {
	var names []string
	for _, name := range sortedKeys(m.names) {
		names = append(names, filepath.Base(name))
	}
	return names, nil
}

// SyncDir implements wal.FS.
func (m *FS) SyncDir(dir string) error {
	if err := m.change(dir, "sync"); err != nil {
		return err
	}
	for _, op := range m.dirOps {
		op.apply(m.durable)
	}
	m.dirOps = nil
	return nil
}

// Reboot is the end of the process that had the files open; what it wrote is
// there still, synced or not. Faults end.
func (m *FS) Reboot() {
	m.locked, m.Fault, m.Redirect, m.Space = map[string]bool{}, nil, nil, 0
}

// Names are the names of all files, sorted.
func (m *FS) Names() []string { return sortedKeys(m.names) }

// Size is the length of a file.
func (m *FS) Size(name string) int { return len(m.names[name].data) }

// Flip turns over one bit of a file, as read and on disk.
func (m *FS) Flip(name string, bit int) {
	n := m.names[name]
	n.data[bit/8] ^= 1 << (bit % 8)
	if bit/8 < len(n.disk) {
		n.disk[bit/8] ^= 1 << (bit % 8)
	}
}

// Delete takes a file away without a trace.
func (m *FS) Delete(name string) {
	delete(m.names, name)
	delete(m.durable, name)
}

type unlocker func() error

func (u unlocker) Close() error { return u() }

// Lock implements wal.FS.
func (m *FS) Lock(name string) (io.Closer, error) {
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

type file struct {
	fs   *FS
	name string
	node *inode
}

func (f *file) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	if off < int64(len(f.node.data)) {
		n = copy(p, f.node.data[off:])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *file) WriteAt(p []byte, off int64) (int, error) {
	if err := f.fs.change(f.name, "write"); err != nil {
		return f.put(p[:len(p)/2/Sector*Sector], off), err
	}
	if err := f.fs.room(max(0, off+int64(len(p))-int64(len(f.node.data)))); err != nil {
		return 0, &os.PathError{Op: "write", Path: f.name, Err: err}
	}
	if f.fs.Redirect != nil {
		name, at := f.fs.Redirect(f.name, off, p)
		if astray := f.fs.names[name]; astray != nil && (astray != f.node || at != off) {
			return (&file{f.fs, name, astray}).put(p, at), nil
		}
	}
	return f.put(p, off), nil
}

func (f *file) put(p []byte, off int64) int {
	for done := 0; done < len(p); {
		n := min(len(p)-done, int(Sector-(off+int64(done))%Sector))
		w := piece{off: off + int64(done), data: slices.Clone(p[done : done+n])}
		f.node.pending = append(f.node.pending, w)
		f.node.data = w.apply(f.node.data)
		done += n
	}
	return len(p)
}

func (f *file) Sync() error {
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

func (f *file) Preallocate(size int64) error {
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

func (f *file) Size() (int64, error) { return int64(len(f.node.data)), nil }
func (f *file) Close() error         { return nil }
