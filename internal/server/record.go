package server

import (
	"context"
	"errors"
	"io"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/record"
	"github.com/blixard/blixard/internal/replica"
	"github.com/blixard/blixard/internal/state"
)

const (
	recordBytes = 1 << 20 // of entries taken from the log at once
	// recordHash is how often a recording that is followed gets a hash of the
	// state: it costs as much as a snapshot.
	recordHash = 10 * time.Second
)

// base is the state at the newest durable snapshot, kept so that a recording
// can begin there: the log in memory reaches back at least so far. Views share
// what did not change, so it costs what was changed since.
type base struct {
	view *state.View
	conf *raftpb.ConfState
}

func (b *base) header(s *Server) record.Header {
	return record.Header{Node: s.opt.Identity.Name, Release: s.opt.Release, AtMS: time.Now().UnixMilli(), Index: b.view.Index, Term: b.view.Term, Conf: b.conf}
}

// Record implements api.Backend.
func (s *Server) Record(ctx context.Context, since uint64, follow bool, w io.Writer) error {
	from := s.base.Load()
	if since > 0 && from.view.Index > since {
		return &blixard.Error{
			Code: blixard.CodeGone, Message: "this node keeps its log since index " + utoa(from.view.Index) + ", not since " + utoa(since),
			Hint: "leave --since out, or ask another node with --addr",
		}
	}
	if since >= s.View().Index {
		var err error
		if from, err = s.present(ctx); err != nil {
			return err
		}
	}
	out, err := record.NewWriter(w, from.header(s))
	if err != nil {
		return err
	}
	if err := out.Snapshot(from.view); err != nil {
		return err
	}
	return s.recordEntries(ctx, out, from.view.Index, follow)
}

// present is the applied state and its raft configuration.
func (s *Server) present(ctx context.Context) (*base, error) {
	result := make(chan *base, 1)
	if !s.call(func() { result <- &base{s.r.View(), s.r.ConfState()} }) {
		return nil, errStopped
	}
	select {
	case b := <-result:
		return b, nil
	case <-s.done:
		return nil, errStopped
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// recordEntries writes what was applied after an index, with a hash whenever
// all of it is written.
func (s *Server) recordEntries(ctx context.Context, out *record.Writer, last uint64, follow bool) error {
	var hashed time.Time
	for {
		goal := s.View()
		if goal.Index < last { // it is published in a moment
			if err := s.WaitApplied(ctx, last-1); err != nil {
				return err
			}
			continue
		}
		for last < goal.Index {
			entries, err := s.applied(ctx, last+1)
			if err != nil {
				return err
			}
			for _, e := range entries {
				if e.GetIndex() > goal.Index {
					break
				}
				if err := out.Entry(e); err != nil {
					return err
				}
				last = e.GetIndex()
			}
		}
		if !follow || time.Since(hashed) >= recordHash {
			hashed = time.Now()
			if err := out.Checkpoint(record.Checkpoint{Index: goal.Index, Hash: goal.Hash()}); err != nil {
				return err
			}
		}
		if !follow {
			return out.End()
		}
		if err := out.Flush(); err != nil {
			return err
		}
		if err := s.WaitApplied(ctx, last); err != nil {
			return err
		}
	}
}

// applied asks the loop for a piece of the log.
func (s *Server) applied(ctx context.Context, first uint64) ([]*raftpb.Entry, error) {
	type answer struct {
		entries []*raftpb.Entry
		err     error
	}
	result := make(chan answer, 1)
	ok := s.call(func() {
		entries, err := s.r.Applied(first, recordBytes)
		result <- answer{entries, err}
	})
	if !ok {
		return nil, errStopped
	}
	select {
	case a := <-result:
		if errors.Is(a.err, replica.ErrCompacted) {
			return nil, &blixard.Error{
				Code: blixard.CodeGone, Message: "the log no longer holds the entries from " + utoa(first) + " on: the recording was too slow, or this node caught up by a snapshot",
				Hint: "record again",
			}
		}
		return a.entries, a.err
	case <-s.done:
		return nil, errStopped
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
