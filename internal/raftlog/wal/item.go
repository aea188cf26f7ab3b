package wal

import (
	"encoding/binary"
	"errors"

	"go.etcd.io/raft/v3/raftpb"
)

// Items of a frame's payload. Numbers are uvarints unless said otherwise.
const (
	itemHardState = 1 // term, vote, commit
	itemEntries   = 2 // count, first index, then per entry: term, type, length, data
	itemSegment   = 3 // seq, last, last term, chain, end: see segmentStart
	itemInstall   = 4 // index, term, keep: see replay.install
	itemSeal      = 5 // seq of the next segment
	itemSnapshot  = 6 // index, term, length, raftpb.ConfState as protobuf
)

// errPayload: a payload whose checksum is right does not decode. Only a bug or
// a file of a later release can do that.
var errPayload = errors.New("a record's checksum is right but its content is not understood")

type hardState struct{ term, vote, commit uint64 }

func (h hardState) proto() *raftpb.HardState {
	return &raftpb.HardState{Term: &h.term, Vote: &h.vote, Commit: &h.commit}
}

// raise lifts a hard state to what holding a committed snapshot implies. It
// is older when the process died between Install and the Save after it. That
// its term existed is known from the snapshot itself; a vote in it cannot have
// been cast, or a hard state of that term would be there.
func (h hardState) raise(index, term uint64) hardState {
	if h.term < term {
		h.term, h.vote = term, 0
	}
	h.commit = max(h.commit, index)
	return h
}

// segmentStart is the first item of each segment: where the log stood when the
// segment was made. Followed by the hard state.
type segmentStart struct {
	seq      uint64
	last     uint64 // index of the last entry before
	lastTerm uint64
	chain    uint64 // checksum of the last frame in the segment before, without seal
	end      uint64 // where that frame ends
}

func appendNumbers(b []byte, kind byte, numbers ...uint64) []byte {
	b = append(b, kind)
	for _, n := range numbers {
		b = binary.AppendUvarint(b, n)
	}
	return b
}

func appendHardState(b []byte, h hardState) []byte {
	return appendNumbers(b, itemHardState, h.term, h.vote, h.commit)
}

func appendSegmentStart(b []byte, s segmentStart) []byte {
	return appendNumbers(b, itemSegment, s.seq, s.last, s.lastTerm, s.chain, s.end)
}

func appendEntries(b []byte, entries []*raftpb.Entry) []byte {
	b = appendNumbers(b, itemEntries, uint64(len(entries)), entries[0].GetIndex())
	for _, e := range entries {
		b = binary.AppendUvarint(b, e.GetTerm())
		b = binary.AppendUvarint(b, uint64(e.GetType()))
		b = binary.AppendUvarint(b, uint64(len(e.GetData())))
		b = append(b, e.GetData()...)
	}
	return b
}

// decoder reads items; after a failure bad is set and all it returns is zero.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) kind() byte {
	if d.bad || len(d.b) == 0 {
		d.bad = true
		return 0
	}
	k := d.b[0]
	d.b = d.b[1:]
	return k
}

func (d *decoder) number() uint64 {
	n, size := binary.Uvarint(d.b)
	if d.bad || size <= 0 {
		d.bad = true
		return 0
	}
	d.b = d.b[size:]
	return n
}

// bytes returns a slice of the payload: copy what is kept.
func (d *decoder) bytes() []byte {
	n := d.number()
	if d.bad || n > uint64(len(d.b)) {
		d.bad = true
		return nil
	}
	p := d.b[:n]
	d.b = d.b[n:]
	return p
}

func (d *decoder) hardState() hardState {
	return hardState{term: d.number(), vote: d.number(), commit: d.number()}
}

func (d *decoder) segmentStart() segmentStart {
	return segmentStart{
		seq: d.number(), last: d.number(), lastTerm: d.number(),
		chain: d.number(), end: d.number(),
	}
}

// entries copies the entries out of the payload, into few allocations.
func (d *decoder) entries() []*raftpb.Entry {
	const leastBytes = 3 // of an entry
	count, first := d.number(), d.number()
	if d.bad || count == 0 || count > uint64(len(d.b))/leastBytes || first == 0 || first+count < first {
		d.bad = true
		return nil
	}
	type slot struct {
		entry       raftpb.Entry
		index, term uint64
		kind        raftpb.EntryType
	}
	slots := make([]slot, count)
	data := make([]byte, 0, len(d.b))
	out := make([]*raftpb.Entry, count)
	for i := range slots {
		s := &slots[i]
		s.index, s.term = first+uint64(i), d.number()
		kind := d.number()
		if kind > uint64(raftpb.EntryConfChangeV2) {
			d.bad = true
		}
		s.kind = raftpb.EntryType(kind)
		if p := d.bytes(); len(p) > 0 {
			from := len(data)
			data = append(data, p...)
			s.entry.Data = data[from:len(data):len(data)]
		}
		s.entry.Index, s.entry.Term, s.entry.Type = &s.index, &s.term, &s.kind
		out[i] = &s.entry
	}
	if d.bad {
		return nil
	}
	return out
}
