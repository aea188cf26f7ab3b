package sim

import (
	"path"
	"strings"

	"github.com/blixard/blixard/internal/raftlog/wal/memfs"
)

// bitFlip turns a bit over in some file of a machine that is off.
func bitFlip(w *world, m *machine, f *Fault) {
	if !w.operator.settled() {
		return
	}
	m.powerCut()
	m.suspected()
	m.rot(f)
	m.again(f.ForMS)
}

// bitRot turns a bit over in some file of a machine that runs, and goes on
// running; what it reads when it starts again is not what it wrote.
func bitRot(w *world, m *machine, f *Fault) {
	if !w.operator.settled() {
		return
	}
	m.suspected()
	m.rot(f)
	w.after(f.ForMS, func() {
		if m.suspect { // not started since
			m.powerCut()
			m.again(w.between(0, 3000))
		}
	})
}

// suspected notes that a machine's disk may be damaged, until it has started. No
// other one is taken away meanwhile.
func (m *machine) suspected() { m.w.operator.leaving, m.suspect = m.raftID, true }

// rot turns a bit over.
func (m *machine) rot(f *Fault) {
	var files []string
	for _, name := range m.fs.Names() {
		if m.fs.Size(name) > 0 && path.Base(name) != "LOCK" {
			files = append(files, name)
		}
	}
	if len(files) > 0 {
		name := files[f.Arg%int64(len(files))]
		bit := int(f.Arg2 % int64(8*m.fs.Size(name)))
		m.w.say("%s: bit %d of %s is turned over", m.name, bit, name)
		m.fs.Flip(name, bit)
	}
}

// misdirected has a write to the log land at another place of it. The process goes
// on, since nobody tells it, and ends after it has written something else; then
// the log has a hole, or a part of it was overwritten, and must refuse to open.
//
// That the very last write went astray leaves nothing that a checksum could show:
// whoever ends before the next write is replaced as if its disk were lost.
func misdirected(w *world, m *machine, f *Fault) {
	if !w.operator.settled() {
		return
	}
	m.suspected()
	fs, p := m.fs, m.proc
	fs.Redirect = func(name string, off int64, b []byte) (string, int64) {
		if !isLog(name) || m.proc != p || b[0] == 0 || m.astray == followed { // zeros are written ahead
			return name, off
		}
		if m.astray == gone {
			m.astray = followed
			w.after(0, func() { m.astrayNoticed(p) }) // with the sync that is under way
			return name, off
		}
		to, at := m.elsewhere(name, off, len(b), f)
		if to == name && at == off {
			return name, off
		}
		w.count["write astray"]++
		w.say("%s: a write of %d bytes at %d of %s lands at %d of %s", m.name, len(b), off, name, at, to)
		m.astray = gone
		return to, at
	}
	w.after(f.ForMS+2000, func() { m.astrayNoticed(p) })
}

// astray is what became of a write to a machine's log.
type astray uint8

const (
	home     astray = iota
	gone            // it landed elsewhere, and was the last one
	followed        // others came after it
)

func isLog(name string) bool { return strings.HasSuffix(name, ".wal") }

// elsewhere is some other place of the log, on the border of a sector.
func (m *machine) elsewhere(name string, off int64, bytes int, f *Fault) (string, int64) {
	var logs []string
	for _, other := range m.fs.Names() {
		if isLog(other) && m.fs.Size(other) >= bytes {
			logs = append(logs, other)
		}
	}
	if len(logs) == 0 {
		return name, off
	}
	to := logs[f.Arg%int64(len(logs))]
	return to, f.Arg2 % int64((m.fs.Size(to)-bytes)/memfs.Sector+1) * memfs.Sector
}

// astrayNoticed ends a process that wrote on after a write went astray.
func (m *machine) astrayNoticed(p *process) {
	if m.proc != p || !m.suspect {
		return
	}
	m.kill()
	m.again(m.w.between(0, 2000))
}
