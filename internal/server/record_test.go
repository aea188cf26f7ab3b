package server_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/record"
	"github.com/blixard/blixard/internal/state"
)

// replayed applies a recording to its own state and compares the hashes it
// holds. It returns the last index, the number of hashes, and whether it ended.
func replayed(t *testing.T, data []byte) (first, last uint64, hashes int, complete bool) {
	t.Helper()
	r, err := record.NewReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	s, err := r.State()
	if err != nil {
		t.Fatal(err)
	}
	conf := false // roles are not followed here
	for {
		f, err := r.Next()
		switch {
		case errors.Is(err, io.EOF):
			return r.Header().Index, s.Index(), hashes, true
		case errors.Is(err, record.ErrCut):
			return r.Header().Index, s.Index(), hashes, false
		case err != nil:
			t.Fatal(err)
		}
		switch f := f.(type) {
		case *record.Entry:
			conf = conf || f.Type != 0
			if f.Type != 0 || len(f.Data) == 0 {
				s.Advance(f.Index, f.Term)
			} else if _, _, err := s.Apply(f.Index, f.Term, f.Data); err != nil {
				t.Fatal(err)
			}
		case *record.Checkpoint:
			hashes++
			if h := s.View().Hash(); h != f.Hash && !conf {
				t.Errorf("the state at %d is %x, recorded was %x", f.Index, h, f.Hash)
			}
		}
	}
}

// TestRecord: any node's log can be recorded from its newest snapshot on, also
// while the log is being shortened, and replaying it gives the same state.
func TestRecord(t *testing.T) {
	c := newCluster(t)
	c.threshold = 25
	a, b, _ := c.three()
	for i := range 120 {
		c.propose(a, &state.CreateVM{Name: blixard.VMName(fmt.Sprintf("vm-%d", i)), Spec: spec(1)})
	}
	for _, m := range []*member{a, b} {
		var out bytes.Buffer
		if err := m.srv.Record(t.Context(), 0, false, &out); err != nil {
			t.Fatalf("%s: %v", m.name, err)
		}
		first, last, hashes, complete := replayed(t, out.Bytes())
		if first < 25 || last <= first || hashes != 1 || !complete {
			t.Errorf("%s: from %d to %d, %d hashes, complete %t", m.name, first, last, hashes, complete)
		}
	}
	err := a.srv.Record(t.Context(), 3, false, io.Discard)
	if blixard.CodeOf(err) != blixard.CodeGone {
		t.Errorf("since an index that is no longer kept: %v", err)
	}
	var now bytes.Buffer
	if err := a.srv.Record(t.Context(), 1<<40, false, &now); err != nil {
		t.Fatal(err)
	}
	if first, last, _, _ := replayed(t, now.Bytes()); first != last || first < 120 {
		t.Errorf("the present: from %d to %d", first, last)
	}
}

// guarded is a buffer that is read while it is written.
type guarded struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (g *guarded) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.b.Write(p)
}

func (g *guarded) copy() []byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	return bytes.Clone(g.b.Bytes())
}

// TestRecordFollows: a recording that is followed gets what is applied, over
// snapshots and compaction, and can be read whenever it is cut off.
func TestRecordFollows(t *testing.T) {
	c := newCluster(t)
	c.threshold = 10
	m := c.found("node1")
	out := new(guarded)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- m.srv.Record(ctx, 0, true, out) }()
	for i := range 60 {
		c.propose(m, &state.CreateVM{Name: blixard.VMName(fmt.Sprintf("vm-%d", i)), Spec: spec(1)})
	}
	goal := m.srv.View().Index
	c.eventually("all that was applied is recorded", func() bool {
		data := out.copy()
		if len(data) == 0 {
			return false
		}
		_, last, hashes, complete := replayed(t, data)
		return last >= goal && hashes > 0 && !complete
	})
	cancel()
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("ended with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the recording does not end")
	}
}
