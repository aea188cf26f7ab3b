package server

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/blixard/blixard/internal/replica"
	"github.com/blixard/blixard/internal/state"
)

func writeView(v *state.View) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := v.WriteTo(w)
		return err
	}
}

func snapshotInto(boot *replica.Boot) func(io.Reader) error {
	return func(r io.Reader) error {
		s, err := state.Read(r)
		if err != nil {
			return err
		}
		boot.State = s
		return nil
	}
}

// DeliverSnapshot implements transport.Handler: it reads the whole state before
// raft hears of it, so that a broken stream changes nothing.
func (s *Server) DeliverSnapshot(ctx context.Context, m *raftpb.Message, data io.Reader) error {
	st, err := state.Read(data)
	if err != nil {
		return fmt.Errorf("receiving a snapshot: %w", err)
	}
	result := make(chan error, 1)
	if !s.call(func() { result <- s.r.StepSnapshot(m, st) }) {
		return errStopped
	}
	select {
	case err := <-result:
		return err
	case <-s.done:
		return errStopped
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Snapshot implements api.Backend.
func (s *Server) Snapshot(ctx context.Context) (uint64, error) {
	type outcome struct {
		index uint64
		err   error
	}
	result := make(chan outcome, 1)
	var write func()
	write = func() {
		if s.loop.Snapshotting() { // one that was begun earlier may be older than what the caller has seen
			s.afterSnapshot = append(s.afterSnapshot, write)
			return
		}
		if at := s.r.View().Index; at == s.loop.LastSnapshot() {
			result <- outcome{index: at}
			return
		}
		s.snapshot(func(index uint64, err error) { result <- outcome{index, err} })
	}
	if !s.call(write) {
		return 0, errStopped
	}
	select {
	case o := <-result:
		return o.index, o.err
	case <-s.done:
		return 0, errStopped
	case <-ctx.Done():
		return 0, unavailable(ctx, "the snapshot is still being written")
	}
}

// WriteSnapshot implements api.Backend.
func (s *Server) WriteSnapshot(_ context.Context, w io.Writer) (uint64, error) {
	v := s.View()
	_, err := v.WriteTo(w)
	return v.Index, err
}

// loadView reads a view back as LoadSnapshot of a log does.
func loadView(v *state.View) func(func(io.Reader) error) error {
	return func(read func(io.Reader) error) error {
		var b bytes.Buffer
		if _, err := v.WriteTo(&b); err != nil {
			return err
		}
		return read(&b)
	}
}
