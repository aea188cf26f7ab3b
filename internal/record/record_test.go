package record_test

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/record"
	"github.com/blixard/blixard/internal/state"
)

// recording is a small recording and where its whole writes end.
type recording struct {
	bytes.Buffer
	ends []int
}

func (r *recording) Write(b []byte) (int, error) {
	n, err := r.Buffer.Write(b)
	r.ends = append(r.ends, r.Len())
	return n, err
}

func entry(index uint64, data []byte) *raftpb.Entry {
	return &raftpb.Entry{Index: new(index), Term: new(uint64(2)), Type: raftpb.EntryNormal.Enum(), Data: data}
}

func make2(t testing.TB, end bool) *recording {
	t.Helper()
	s := state.New()
	s.ApplyAll(7, 2, []state.Envelope{{Command: &state.Bootstrap{ClusterID: "c", RaftID: 1, Node: state.NodeIdentity{Name: "node1", Address: "a:1"}}}})
	out := new(recording)
	v := s.View()
	w, err := record.NewWriter(out, record.Header{Node: "node1", Release: "r", AtMS: 5, Index: v.Index, Term: v.Term, Conf: &raftpb.ConfState{Voters: []uint64{1, 2}, Learners: []uint64{9}}})
	if err != nil {
		t.Fatal(err)
	}
	steps := []func() error{
		func() error { return w.Snapshot(v) },
		func() error { return w.Entry(entry(8, []byte("first"))) },
		func() error { return w.Entry(entry(9, nil)) },
		func() error { return w.Checkpoint(record.Checkpoint{Index: 9, Hash: 42}) },
		func() error { return w.Entry(entry(10, bytes.Repeat([]byte("x"), 70_000))) },
	}
	for _, step := range steps {
		if err := errors.Join(step(), w.Flush()); err != nil {
			t.Fatal(err)
		}
	}
	if end {
		if err := w.End(); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

// read reads a whole recording: the frames, and what ended it.
func read(data []byte) (frames []any, h record.Header, err error) {
	r, err := record.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, h, err
	}
	if _, err := r.State(); err != nil {
		return nil, h, err
	}
	for {
		f, err := r.Next()
		if err != nil {
			return frames, r.Header(), err
		}
		frames = append(frames, f)
	}
}

func TestWhatIsWrittenIsRead(t *testing.T) {
	frames, h, err := read(make2(t, true).Bytes())
	if !errors.Is(err, io.EOF) || len(frames) != 4 {
		t.Fatalf("%d frames, %v", len(frames), err)
	}
	if h.Node != "node1" || h.Release != "r" || h.AtMS != 5 || h.Index != 7 || h.Term != 2 || len(h.Conf.GetVoters()) != 2 || len(h.Conf.GetLearners()) != 1 {
		t.Errorf("header %+v", h)
	}
	if e, ok := frames[0].(*record.Entry); !ok || e.Index != 8 || e.Term != 2 || string(e.Data) != "first" {
		t.Errorf("first frame %+v", frames[0])
	}
	if k, ok := frames[2].(*record.Checkpoint); !ok || *k != (record.Checkpoint{Index: 9, Hash: 42}) {
		t.Errorf("third frame %+v", frames[2])
	}
	if e, ok := frames[3].(*record.Entry); !ok || len(e.Data) != 70_000 {
		t.Errorf("last frame %T", frames[3])
	}
}

// TestCut: a recording that ends with any of its writes is whole up to there;
// anywhere else it is damaged.
func TestCut(t *testing.T) {
	all := make2(t, false)
	whole := map[int]bool{}
	for _, at := range all.ends {
		whole[at] = true
	}
	for at := 0; at <= all.Len(); at += step(at, all.ends) {
		_, _, err := read(all.Bytes()[:at])
		switch {
		case whole[at] && at >= all.ends[0] && !errors.Is(err, record.ErrCut):
			t.Errorf("cut behind a write, at %d: %v", at, err)
		case !whole[at] && !errors.Is(err, record.ErrDamaged) && !errors.Is(err, record.ErrCut):
			t.Errorf("cut at %d: %v", at, err)
		}
	}
}

// step looks at every byte near the ends of writes, and at few between them.
func step(at int, ends []int) int {
	for _, e := range ends {
		if at > e-20 && at < e+20 {
			return 1
		}
	}
	return 97
}

// TestBitFlips: no changed bit goes unnoticed.
func TestBitFlips(t *testing.T) {
	all := make2(t, true).Bytes()
	for at := 0; at < len(all); at += 1 + at/300 {
		changed := bytes.Clone(all)
		changed[at] ^= 1 << (at % 8)
		if _, _, err := read(changed); err == nil || errors.Is(err, io.EOF) || errors.Is(err, record.ErrCut) {
			t.Fatalf("a changed bit at %d: %v", at, err)
		}
	}
}

func TestWhatFollowsTheEndIsRefused(t *testing.T) {
	if _, _, err := read(append(make2(t, true).Bytes(), 0)); !errors.Is(err, record.ErrDamaged) {
		t.Error(err)
	}
	if _, err := record.NewReader(bytes.NewReader([]byte("BLXSTATE…"))); !errors.Is(err, record.ErrDamaged) {
		t.Error(err)
	}
	if _, err := record.NewReader(bytes.NewReader([]byte("BLXRECRD\x09"))); !errors.Is(err, record.ErrDamaged) {
		t.Error(err)
	}
}

// TestGap: entries must follow each other.
func TestGap(t *testing.T) {
	var b bytes.Buffer
	w, err := record.NewWriter(&b, record.Header{Node: "n"})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Snapshot(state.New().View()), w.Entry(entry(1, nil)), w.Entry(entry(3, nil)), w.End()); err != nil {
		t.Fatal(err)
	}
	if _, _, err := read(b.Bytes()); !errors.Is(err, record.ErrDamaged) {
		t.Error(err)
	}
}

// TestWriterKeepsItsError: once a write has failed, all do.
func TestWriterKeepsItsError(t *testing.T) {
	full := errors.New("disk full")
	w, err := record.NewWriter(failing{full}, record.Header{Node: blixard.NodeName("n")})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(); !errors.Is(err, full) {
		t.Fatal(err)
	}
	if err := w.Entry(entry(1, nil)); !errors.Is(err, full) {
		t.Error(err)
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

func FuzzReader(f *testing.F) {
	f.Add(make2(f, true).Bytes()[:2000])
	f.Add([]byte("BLXRECRD\x01"))
	f.Fuzz(func(_ *testing.T, data []byte) {
		_, _, err := read(data) // neither panics nor holds more than it was given
		if err == nil {
			panic("a recording without an end")
		}
	})
}
