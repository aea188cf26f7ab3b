package wal

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/blixard/blixard/internal/raftlog"
)

const wayOut = "this node's copy is damaged, and nothing was changed; to get a new one from the other nodes, make a token there with " +
	"`blixard cluster token create --node-id NAME`, and run here, with this node's --data-dir and --listen, `blixard cluster join --replace --token TOKEN --join HOST:PORT`; " +
	"if no other node is left, `blixard cluster recover --from SNAPSHOT` goes on with a saved state"

// Open opens the log in dir, making both if there is none, and repairs a torn
// tail. It changes nothing when it returns an error that wraps
// raftlog.ErrCorrupt, but for deleting files that were never finished.
func Open(fsys FS, dir string, opt Options) (raftlog.Opened, error) {
	opened, err := openDir(fsys, dir, opt)
	if err == nil || errors.Is(err, raftlog.ErrCorrupt) {
		return opened, err
	}
	return raftlog.Opened{}, explain(dir, fmt.Errorf("opening: %w", err))
}

func openDir(fsys FS, dir string, opt Options) (opened raftlog.Opened, err error) {
	if err := fsys.MkdirAll(dir); err != nil {
		return opened, err
	}
	lock, err := fsys.Lock(filepath.Join(dir, lockName))
	if err != nil {
		return opened, err
	}
	l := &Log{fsys: fsys, dir: dir, opt: opt, lock: lock}
	defer func() {
		if err != nil {
			err = errors.Join(err, lock.Close())
			if l.file != nil {
				err = errors.Join(err, l.file.Close())
			}
		}
	}()
	found, err := l.list()
	if err != nil {
		return opened, err
	}
	if len(found.segments) == 0 {
		if len(found.snaps)+len(found.recvs) > 0 {
			return opened, corrupt(dir, 0, "there are snapshots but no log segment")
		}
		return l.create()
	}
	r := &replay{log: l, present: found}
	if err := r.run(); err != nil {
		return opened, err
	}
	return r.adopt()
}

// corrupt is the error for damage at an offset of a file.
func corrupt(name string, offset int64, why string) error {
	return fmt.Errorf("%w: %s at offset %d: %s (%s)", raftlog.ErrCorrupt, name, offset, why, wayOut)
}

// present is what the directory holds.
type present struct {
	segments     []segment // ascending; only those that follow each other up to the last
	leftover     []string  // segments before a gap
	snaps, recvs []snapID  // ascending
}

func (l *Log) list() (p present, err error) {
	names, err := l.fsys.ReadDir(l.dir)
	if err != nil {
		return p, err
	}
	for _, name := range names {
		if strings.HasSuffix(name, tmpExt) {
			if err := l.fsys.Remove(l.path(name)); err != nil {
				return p, fmt.Errorf("removing unfinished file: %w", err)
			}
		}
		if seq, next, ok := parseName(name, segmentExt); ok && next > 0 {
			p.segments = append(p.segments, segment{seq, next - 1})
		}
		if index, term, ok := parseName(name, snapExt); ok {
			p.snaps = append(p.snaps, snapID{index, term})
		}
		if index, term, ok := parseName(name, recvExt); ok {
			p.recvs = append(p.recvs, snapID{index, term})
		}
	}
	slices.SortFunc(p.segments, func(a, b segment) int { return compare(a.seq, b.seq) })
	bySnap := func(a, b snapID) int {
		if a.index != b.index {
			return compare(a.index, b.index)
		}
		return compare(a.term, b.term)
	}
	slices.SortFunc(p.snaps, bySnap)
	slices.SortFunc(p.recvs, bySnap)
	for i := len(p.segments) - 1; i > 0; i-- {
		if p.segments[i-1].seq+1 == p.segments[i].seq {
			continue
		}
		for _, s := range p.segments[:i] {
			p.leftover = append(p.leftover, s.name())
		}
		p.segments = p.segments[i:]
		break
	}
	return p, nil
}

func compare(a, b uint64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// create makes the first segment of a new log.
func (l *Log) create() (raftlog.Opened, error) {
	size := l.opt.segmentBytes()
	f, pos, chain, err := createSegment(l.fsys, l.dir, segmentStart{seq: 1}, hardState{}, size)
	if err != nil {
		return raftlog.Opened{}, err
	}
	l.segments = []segment{{seq: 1}}
	l.file, l.size, l.pos, l.zeroed, l.chain = f, size, pos, pos, chain
	l.terms = termRuns{{0, 0}}
	return raftlog.Opened{Log: l, HardState: hardState{}.proto()}, nil
}

// replay reads the segments into what they say.
type replay struct {
	log     *Log
	present present

	// entries are those of floor+1 to last; what is at or below floor must be
	// in a snapshot. The term of floor itself is known at the start and after
	// an install, not when entries below the first segment were overwritten.
	floor, floorTerm uint64
	floorKnown       bool
	last             uint64
	entries          []*raftpb.Entry
	hs               hardState
	installed        map[snapID]bool

	chain    uint32
	pos      int64  // end of the last valid frame
	lastAt   int64  // its beginning
	tornTo   int64  // end of a torn frame at pos; 0 if there is none
	tail     []byte // the last frame's bytes
	fileSize int64
	buf      []byte
	payload  []byte
	repaired []string
}

func (r *replay) run() error {
	r.installed = map[snapID]bool{}
	segments := r.present.segments
	// Where a segment ends is said by the one after it.
	starts := make([]segmentStart, len(segments))
	states := make([]hardState, len(segments))
	for i, s := range segments {
		var err error
		if starts[i], states[i], err = r.readStart(s); err != nil {
			return err
		}
	}
	r.floor, r.floorTerm, r.floorKnown, r.last = starts[0].last, starts[0].lastTerm, true, starts[0].last
	r.hs = states[0]
	for i, s := range segments {
		var next *segmentStart
		if i+1 < len(segments) {
			next = &starts[i+1]
		}
		if i > 0 && (starts[i].last != r.last || uint64(r.chain) != starts[i].chain) {
			return corrupt(r.log.path(s.name()), 0, "this segment does not continue the one before it")
		}
		if err := r.readSegment(s, next); err != nil {
			return err
		}
	}
	if r.hs.commit > r.last {
		return corrupt(r.lastName(), r.pos, fmt.Sprintf("the log ends at entry %d but %d are committed", r.last, r.hs.commit))
	}
	return nil
}

func (r *replay) lastName() string {
	return r.log.path(r.present.segments[len(r.present.segments)-1].name())
}

// load reads up to limit bytes of a segment (all if 0) into buf.
func (r *replay) load(name string, limit int64) (size int64, err error) {
	f, err := r.log.fsys.Open(name)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if size, err = f.Size(); err != nil {
		return 0, err
	}
	if size > maxFileBytes {
		return 0, corrupt(name, maxFileBytes, "the file is larger than any segment")
	}
	want := size
	if limit > 0 {
		want = min(size, limit)
	}
	if int64(cap(r.buf)) < want {
		r.buf = make([]byte, want)
	}
	r.buf = r.buf[:want]
	if n, err := f.ReadAt(r.buf, 0); err != nil && (!errors.Is(err, io.EOF) || int64(n) < want) {
		return 0, fmt.Errorf("reading segment: %w", err)
	}
	return size, nil
}

// readStart reads a segment's first frame, which is one sector.
func (r *replay) readStart(s segment) (start segmentStart, hs hardState, err error) {
	name := r.log.path(s.name())
	if _, err := r.load(name, sectorBytes); err != nil {
		return start, hs, err
	}
	f := readFrame(r.buf, 0, 0, r.payload)
	if f.verdict != frameValid {
		return start, hs, corrupt(name, 0, "the start of the segment is missing or does not match its checksum")
	}
	r.payload = f.payload
	d := decoder{b: f.payload}
	if d.kind() != itemSegment {
		return start, hs, corrupt(name, 0, errPayload.Error())
	}
	start = d.segmentStart()
	if d.kind() != itemHardState {
		return start, hs, corrupt(name, 0, errPayload.Error())
	}
	hs = d.hardState()
	if d.bad || len(d.b) > 0 || start.last+1 == 0 {
		return start, hs, corrupt(name, 0, errPayload.Error())
	}
	if start.seq != s.seq || start.last != s.last {
		return start, hs, corrupt(name, 0, fmt.Sprintf("this is segment %s under a wrong name", segment{start.seq, start.last}.name()))
	}
	return start, hs, nil
}

// readSegment replays a segment's frames up to where next says it ended, or to
// the end of the log if it is the last.
func (r *replay) readSegment(s segment, next *segmentStart) error {
	name := r.log.path(s.name())
	size, err := r.load(name, 0)
	if err != nil {
		return err
	}
	if len(r.buf) < sectorBytes {
		return corrupt(name, 0, "the file ends within its first record")
	}
	r.fileSize = size
	first := readFrame(r.buf, 0, 0, r.payload)
	if first.verdict != frameValid {
		return corrupt(name, 0, "the start of the segment changed while it was being read")
	}
	r.pos, r.lastAt, r.chain = int64(first.size), 0, first.chain
	for next == nil || uint64(r.pos) < next.end {
		f := readFrame(r.buf, int(r.pos), r.chain, r.payload)
		switch {
		case f.verdict == frameDamaged:
			return corrupt(name, r.pos, f.why)
		case f.verdict == frameNone && next == nil:
			r.keepTail()
			return nil
		case f.verdict == frameTorn && next == nil:
			r.tornTo = r.pos + int64(f.size)
			r.repaired = append(r.repaired, fmt.Sprintf("cut off an incomplete last write at offset %d of %s, which was never acknowledged", r.pos, name))
			r.keepTail()
			return nil
		case f.verdict != frameValid:
			return corrupt(name, r.pos, "records are missing before the next segment")
		}
		r.payload = f.payload
		if err := r.apply(f.payload); err != nil {
			return corrupt(name, r.pos, err.Error())
		}
		r.lastAt, r.pos, r.chain = r.pos, r.pos+int64(f.size), f.chain
	}
	if uint64(r.pos) != next.end {
		return corrupt(name, r.pos, "the next segment does not begin where this one ends")
	}
	return nil
}

func (r *replay) keepTail() { r.tail = slices.Clone(r.buf[r.lastAt:r.pos]) }

// apply replays one frame.
func (r *replay) apply(payload []byte) error {
	d := decoder{b: payload}
	for len(d.b) > 0 {
		switch d.kind() {
		case itemHardState:
			hs := d.hardState()
			if !d.bad && (hs.term < r.hs.term || hs.commit < r.hs.commit) {
				return errors.New("the hard state goes back")
			}
			r.hs = hs
		case itemEntries:
			if entries := d.entries(); entries != nil {
				if err := r.append(entries); err != nil {
					return err
				}
			}
		case itemInstall:
			id, keep := snapID{d.number(), d.number()}, d.number() != 0
			if d.bad {
				return errPayload
			}
			if err := r.install(id, keep); err != nil {
				return err
			}
		case itemSeal:
			return fmt.Errorf("segment %d, which continues this one, is missing", d.number())
		default:
			return errPayload
		}
		if d.bad {
			return errPayload
		}
	}
	return nil
}

// append replays entries, which may overwrite a suffix.
func (r *replay) append(entries []*raftpb.Entry) error {
	first := entries[0].GetIndex()
	switch {
	case first > r.last+1:
		return fmt.Errorf("entry %d follows entry %d", first, r.last)
	case first <= r.floor:
		r.floor, r.floorKnown, r.entries = first-1, false, nil
	default:
		r.entries = r.entries[:first-r.floor-1]
	}
	r.entries = append(r.entries, entries...)
	r.last = first + uint64(len(entries)) - 1
	return nil
}

// install replays the marker of an installed snapshot. With keep the entries
// beyond it stay.
func (r *replay) install(id snapID, keep bool) error {
	switch {
	case !keep:
		r.entries, r.last = nil, id.index
	case id.index > r.last:
		return fmt.Errorf("the log ends at %d before the snapshot of %d it continues", r.last, id.index)
	case id.index > r.floor:
		r.entries = r.entries[id.index-r.floor:]
	}
	if !keep || id.index > r.floor {
		r.floor, r.floorTerm, r.floorKnown = id.index, id.term, true
	}
	r.hs = r.hs.raise(id.index, id.term)
	r.installed[id] = true
	return nil
}

// contradicts tells whether the log's entry at id.index has another term.
func (r *replay) contradicts(id snapID) bool {
	if id.index > r.floor {
		return r.entries[id.index-r.floor-1].GetTerm() != id.term
	}
	return r.floorKnown && r.floorTerm != id.term
}

// choice is the snapshot the log continues.
type choice struct {
	meta *raftpb.SnapshotMetadata
	id   snapID
	ext  string
}

// choose finds the newest sound snapshot that the log reaches back to.
// Unacknowledged and damaged ones are returned for removal.
func (r *replay) choose() (c choice, remove []string, err error) {
	type candidate struct {
		id  snapID
		ext string
	}
	var all []candidate
	for _, id := range r.present.snaps {
		all = append(all, candidate{id, snapExt})
	}
	for _, id := range r.present.recvs {
		if r.installed[id] {
			all = append(all, candidate{id, recvExt})
		} else {
			remove = append(remove, id.name(recvExt))
		}
	}
	slices.SortStableFunc(all, func(a, b candidate) int { return compare(b.id.index, a.id.index) })
	why := fmt.Sprintf("no snapshot reaches up to entry %d, where the log begins", r.floor+1)
	for _, s := range all {
		name := r.log.path(s.id.name(s.ext))
		switch {
		case s.id.index > r.last:
			return c, nil, corrupt(r.lastName(), r.pos, fmt.Sprintf("the log ends at entry %d before snapshot %s", r.last, name))
		case s.id.index < r.floor:
			continue // the log does not reach back to it; Compact was cut short
		case r.contradicts(s.id):
			return c, nil, corrupt(name, 0, fmt.Sprintf("the log has another term at entry %d", s.id.index))
		}
		meta, err := readSnapshot(r.log.fsys, name, s.id, func(io.Reader) error { return nil })
		if err == nil {
			return choice{meta, s.id, s.ext}, remove, nil
		}
		if !errors.Is(err, errSnapshot) && !errors.Is(err, errPayload) {
			return c, nil, err
		}
		why = err.Error() + ", and the log does not reach back to an older sound one"
		if r.floor > 0 {
			why += fmt.Sprintf(" (%s)", name)
		}
		remove = append(remove, s.id.name(s.ext))
		r.repaired = append(r.repaired, fmt.Sprintf("dropped the damaged snapshot %s, since the log reaches back behind it", name))
	}
	if r.floor > 0 {
		return c, nil, corrupt(r.log.dir, 0, why)
	}
	return c, remove, nil
}

// adopt makes the log writable again after the replay.
func (r *replay) adopt() (opened raftlog.Opened, err error) {
	l := r.log
	chosen, remove, err := r.choose()
	if err != nil {
		return opened, err
	}
	if l.file, err = l.fsys.Open(r.lastName()); err != nil {
		return opened, err
	}
	if err := r.mendTail(); err != nil {
		return opened, err
	}
	if chosen.ext == recvExt {
		if err := l.rename(l.path(chosen.id.name(recvExt)), l.path(chosen.id.name(snapExt))); err != nil {
			return opened, err
		}
	}
	for _, name := range append(remove, r.present.leftover...) {
		if err := l.fsys.Remove(l.path(name)); err != nil {
			return opened, fmt.Errorf("removing what the log no longer needs: %w", err)
		}
	}
	if err := l.fsys.SyncDir(l.dir); err != nil {
		return opened, fmt.Errorf("syncing directory: %w", err)
	}
	r.fill(chosen)
	opened = raftlog.Opened{
		Log: l, HardState: l.hs.proto(), Entries: r.entries[chosen.id.index-min(r.floor, chosen.id.index):],
		Repaired: strings.Join(r.repaired, "; "),
	}
	if chosen.meta != nil {
		opened.Snapshot = chosen.meta
		opened.LoadSnapshot = func(read func(io.Reader) error) error {
			_, err := readSnapshot(l.fsys, l.path(chosen.id.name(snapExt)), chosen.id, read)
			return err
		}
	}
	return opened, nil
}

// mendTail zeroes a torn frame and writes the last frame again (see the
// package comment), both synced. A file that someone has shortened stays so:
// what does not fit goes to a new segment.
func (r *replay) mendTail() error {
	f := r.log.file
	if r.tornTo > r.pos {
		if _, err := f.WriteAt(make([]byte, r.tornTo-r.pos), r.pos); err != nil {
			return fmt.Errorf("cutting off a torn record: %w", err)
		}
	}
	if _, err := f.WriteAt(r.tail, r.lastAt); err != nil {
		return fmt.Errorf("writing the last record again: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("syncing segment: %w", err)
	}
	return nil
}

// fill sets the Log's fields.
func (r *replay) fill(chosen choice) {
	l := r.log
	l.segments = r.present.segments
	l.size = r.fileSize
	l.pos, l.zeroed, l.chain = r.pos, r.pos, r.chain
	l.last = r.last
	l.hs = r.hs.raise(chosen.id.index, chosen.id.term)
	for _, id := range r.present.snaps {
		if id.index < chosen.id.index {
			l.snaps = append(l.snaps, id)
		}
	}
	if chosen.meta != nil {
		l.snaps = append(l.snaps, chosen.id)
	}
	l.terms = termRuns{{chosen.id.index, chosen.id.term}}
	for _, e := range r.entries {
		if e.GetIndex() > chosen.id.index {
			l.terms = l.terms.put(e.GetIndex(), e.GetTerm())
		}
	}
	l.markSaved()
}
