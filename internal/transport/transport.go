// Package transport is the port that carries raft messages between the nodes
// of a cluster.
//
// Ordering and loss: messages to one peer arrive in the order they were sent,
// or not at all; any may be lost. Send never blocks: what does not fit into a
// peer's bounded queue is dropped, and raft sends again. Snapshots travel as
// streams beside the messages, so that a large one delays nobody.
package transport

import (
	"context"
	"io"

	"go.etcd.io/raft/v3/raftpb"
)

// Peer is where a member can be reached.
type Peer struct {
	RaftID  uint64
	Address string // host:port
}

// Handler takes what arrives. Its methods may block for a short time, which
// holds back that peer only.
type Handler interface {
	// Deliver takes messages of one peer, in order. The messages belong to it.
	Deliver(ctx context.Context, messages []*raftpb.Message) error
	// DeliverSnapshot takes a snapshot message whose data comes as a stream.
	DeliverSnapshot(ctx context.Context, message *raftpb.Message, data io.Reader) error
	// PeerGone tells that the peer's process has ended: its port refuses.
	PeerGone(raftID uint64)
	// Unreachable tells that a message to the peer was lost.
	Unreachable(raftID uint64)
	// SnapshotSent tells how sending a snapshot to the peer ended.
	SnapshotSent(raftID uint64, err error)
}

// Transport sends.
type Transport interface {
	// SetPeers replaces the peers; connections to those that are no longer among
	// them end.
	SetPeers(peers []Peer)
	// Send queues messages for their receivers (message.To). It never blocks.
	Send(messages []*raftpb.Message)
	// SendSnapshot streams a snapshot to message.To in the background; write
	// produces its data.
	SendSnapshot(message *raftpb.Message, write func(io.Writer) error)
}
