package grpc_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"go.etcd.io/raft/v3/raftpb"

	"github.com/blixard/blixard/internal/transport"
	"github.com/blixard/blixard/internal/transport/grpc"
)

// inbox is a handler that keeps what arrives.
type inbox chan *raftpb.Message

func (i inbox) Deliver(_ context.Context, messages []*raftpb.Message) error {
	for _, m := range messages {
		i <- m
	}
	return nil
}

func (inbox) DeliverSnapshot(context.Context, *raftpb.Message, io.Reader) error { return nil }
func (inbox) PeerGone(uint64)                                                   {}
func (inbox) Unreachable(uint64)                                                {}
func (inbox) SnapshotSent(uint64, error)                                        {}

func serve(t *testing.T, id uint64) (*grpc.Transport, inbox, string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	in := make(inbox, 100)
	tr := grpc.New(grpc.Options{RaftID: id, Address: l.Addr().String(), Secret: "s", Handler: in})
	mux, rpc, protocols := http.NewServeMux(), connect.NewServer(), new(http.Protocols)
	tr.Register(rpc)
	connecthttp.Mount(mux, rpc)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	hs := &http.Server{Handler: mux, Protocols: protocols}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 2)
	go func() { ended <- hs.Serve(l) }()
	go func() { ended <- tr.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := hs.Close(); err != nil {
			t.Error(err)
		}
		<-ended
		<-ended
	})
	return tr, in, l.Addr().String()
}

// TestAnswersTheUnknown: a node that has never heard of the one that calls can
// answer it, or it could not be brought up to date by a newcomer that leads.
func TestAnswersTheUnknown(t *testing.T) {
	knows, back, _ := serve(t, 1)
	behind, in, address := serve(t, 2)
	knows.SetPeers([]transport.Peer{{RaftID: 2, Address: address}})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	exchange := func(tr *grpc.Transport, from, to uint64, in inbox) {
		t.Helper()
		again := time.NewTicker(20 * time.Millisecond) // what is sent before the stream is up may get lost
		defer again.Stop()
		for {
			tr.Send([]*raftpb.Message{{Type: raftpb.MsgHeartbeat.Enum(), From: new(from), To: new(to)}})
			select {
			case m := <-in:
				if m.GetFrom() == from {
					return
				}
			case <-again.C:
			case <-ctx.Done():
				t.Fatalf("nothing of %d arrives at %d", from, to)
			}
		}
	}
	exchange(knows, 1, 2, in)
	exchange(behind, 2, 1, back)
	behind.SetPeers(nil) // its state does not know of node 1 yet, either
	exchange(behind, 2, 1, back)
}
