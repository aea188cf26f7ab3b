package grpc

import (
	"context"
	"errors"
	"fmt"
	"io"

	"connectrpc.com/connect/v2"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	peerv1 "github.com/blixard/blixard/api/blixard/peer/v1"
	"github.com/blixard/blixard/api/blixard/peer/v1/peerv1connect"
)

// Register adds the service that peers call to a server, whose authentication
// has checked the cluster's secret.
func (t *Transport) Register(s *connect.Server) {
	peerv1connect.RegisterPeerServiceHandler(s, &service{t: t})
}

type service struct {
	peerv1connect.UnimplementedPeerServiceHandler
	t *Transport
}

// codeRemoved tells a peer that it is no member any more; nothing else that
// this service answers has it.
const codeRemoved = connect.CodeFailedPrecondition

func (s *service) check(from uint64) error {
	if s.t.opt.Removed != nil && s.t.opt.Removed(from) {
		return connect.NewError(codeRemoved, fmt.Sprintf("the node with raft ID %d was removed from this cluster", from))
	}
	if s.t.opt.Known != nil && !s.t.opt.Known(from) {
		return connect.NewError(connect.CodePermissionDenied, fmt.Sprintf("node with raft ID %d is not a member of this cluster (any more)", from))
	}
	return nil
}

// Raft takes one peer's messages until its stream ends.
func (s *service) Raft(ctx context.Context, stream peerv1connect.PeerServiceRaftServerStream) error {
	from, learned := uint64(0), false
	for {
		req, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if from == 0 {
			if from = req.GetFrom(); from == 0 {
				return connect.NewError(connect.CodeInvalidArgument, "a raft stream begins by telling who sends")
			}
		}
		if err := s.check(from); err != nil {
			return err
		}
		if !learned {
			learned = true
			if info, ok := connect.CallInfoForServerContext(ctx); ok {
				s.t.learn(from, info.RequestHeader().Get(addressHeader))
			}
		}
		messages := make([]*raftpb.Message, 0, len(req.GetMessages()))
		for _, b := range req.GetMessages() {
			m := new(raftpb.Message)
			if err := proto.Unmarshal(b, m); err != nil {
				return connect.NewError(connect.CodeInvalidArgument, fmt.Sprintf("reading a raft message: %v", err))
			}
			// A peer speaks for itself only, and to us only. Forwarded proposals and
			// read requests keep their sender; raft fills it in.
			if m.GetFrom() != from || m.GetTo() != s.t.opt.RaftID {
				continue
			}
			messages = append(messages, m)
		}
		if len(messages) == 0 {
			continue
		}
		if err := s.t.opt.Handler.Deliver(ctx, messages); err != nil {
			return err
		}
	}
}

// Snapshot takes one snapshot.
func (s *service) Snapshot(ctx context.Context, stream peerv1connect.PeerServiceSnapshotServerStream) (*peerv1.SnapshotResponse, error) {
	req, err := stream.Receive()
	if err != nil {
		return nil, err
	}
	m := new(raftpb.Message)
	if err := proto.Unmarshal(req.GetMessage(), m); err != nil || m.GetType() != raftpb.MsgSnap || m.GetTo() != s.t.opt.RaftID {
		return nil, connect.NewError(connect.CodeInvalidArgument, "a snapshot stream begins with its raft message")
	}
	if err := s.check(m.GetFrom()); err != nil {
		return nil, err
	}
	if err := s.t.opt.Handler.DeliverSnapshot(ctx, m, &chunks{stream: stream, buf: req.GetChunk()}); err != nil {
		return nil, err
	}
	return &peerv1.SnapshotResponse{}, nil
}

// Heartbeat renews a lease.
func (s *service) Heartbeat(ctx context.Context, req *peerv1.HeartbeatRequest) (*peerv1.HeartbeatResponse, error) {
	if err := s.check(req.GetRaftId()); err != nil {
		return nil, err
	}
	return s.t.opt.Heartbeat(ctx, req)
}

// chunks reads a snapshot's stream as bytes.
type chunks struct {
	stream peerv1connect.PeerServiceSnapshotServerStream
	buf    []byte
}

func (c *chunks) Read(p []byte) (int, error) {
	for len(c.buf) == 0 {
		req, err := c.stream.Receive()
		if err != nil {
			return 0, err
		}
		c.buf = req.GetChunk()
	}
	n := copy(p, c.buf)
	c.buf = c.buf[n:]
	return n, nil
}
