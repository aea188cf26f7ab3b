// Package grpc carries raft messages over gRPC streams: one long stream per
// peer for messages, one short stream per snapshot, all on the node's one port.
//
// Ownership: a Transport owns one goroutine per peer and per snapshot under
// way; Run waits for them. The peers' bounded queues are the only buffers: a
// full queue drops, and raft sends again.
package grpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	peerv1 "github.com/blixard/blixard/api/blixard/peer/v1"
	"github.com/blixard/blixard/api/blixard/peer/v1/peerv1connect"
	"github.com/blixard/blixard/internal/transport"
)

const (
	queueMessages  = 4096
	batchBytes     = 1 << 20
	chunkBytes     = 256 << 10
	maxFrameBytes  = 64 << 20
	dialTimeout    = 2 * time.Second
	minBackoff     = 20 * time.Millisecond
	maxBackoff     = 500 * time.Millisecond
	snapshotWithin = 10 * time.Minute
	maxSnapshots   = 2 // under way at once, sending
	maxTold        = 64

	addressHeader = "Blixard-Address"
)

// Options of a Transport.
type Options struct {
	RaftID uint64
	// Address is where this node can be reached; it is told with every stream, so
	// that a peer that is behind and has not heard of this node can answer.
	Address string
	// Secret is sent as bearer token with every call, and expected of callers by
	// whoever mounts the handler.
	Secret  string
	Handler transport.Handler
	// Heartbeat answers a peer's agent; see server.
	Heartbeat func(ctx context.Context, req *peerv1.HeartbeatRequest) (*peerv1.HeartbeatResponse, error)
	// Known tells whether a raft ID is a member's; others are turned away.
	Known func(raftID uint64) bool
	// Removed tells whether a raft ID was a member's and never will be again;
	// who has it is told so.
	Removed func(raftID uint64) bool
	// TurnedAway hears that the member at an address says so of raftID, this
	// node's or one it speaks for. It may be called more than once.
	TurnedAway func(raftID uint64, by string)
}

// Transport sends to peers and serves what they send.
type Transport struct {
	opt  Options
	http *http.Client

	mu    sync.Mutex
	peers map[uint64]*peer
	told  map[uint64]string // addresses of callers that SetPeers did not name
	ctx   context.Context   //nolint:containedctx // the life of the peers' goroutines, set by Run
	wg    sync.WaitGroup
	snaps chan struct{}
}

// New makes a Transport. It sends once Run was called.
func New(opt Options) *Transport {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	return &Transport{
		opt: opt, peers: map[uint64]*peer{}, told: map[uint64]string{}, snaps: make(chan struct{}, maxSnapshots),
		http: &http.Client{Transport: &http.Transport{
			Protocols: protocols, DialContext: (&net.Dialer{Timeout: dialTimeout, KeepAlive: 5 * time.Second}).DialContext,
			HTTP2: &http.HTTP2Config{SendPingTimeout: 3 * time.Second, PingTimeout: 3 * time.Second, MaxReadFrameSize: 1 << 20},
		}},
	}
}

// Run lets the transport work until ctx ends, and waits for its goroutines.
func (t *Transport) Run(ctx context.Context) error {
	t.mu.Lock()
	t.ctx = ctx
	for _, p := range t.peers {
		t.start(p)
	}
	t.mu.Unlock()
	<-ctx.Done()
	t.mu.Lock()
	for id, p := range t.peers {
		p.stop()
		delete(t.peers, id)
	}
	t.mu.Unlock()
	t.wg.Wait()
	t.http.CloseIdleConnections()
	return nil
}

// SetPeers implements transport.Transport.
func (t *Transport) SetPeers(peers []transport.Peer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ctx != nil && t.ctx.Err() != nil {
		return
	}
	want := map[uint64]string{}
	for _, p := range peers {
		if p.RaftID != t.opt.RaftID {
			want[p.RaftID] = p.Address
		}
	}
	for id, address := range t.told {
		if _, named := want[id]; named || t.opt.Removed != nil && t.opt.Removed(id) {
			delete(t.told, id)
		} else {
			want[id] = address
		}
	}
	for id, p := range t.peers {
		if want[id] != p.address {
			p.stop()
			delete(t.peers, id)
		}
	}
	for id, address := range want {
		if t.peers[id] == nil {
			t.add(id, address)
		}
	}
}

func (t *Transport) add(id uint64, address string) { // with t.mu
	p := &peer{t: t, id: id, address: address, queue: make(chan *raftpb.Message, queueMessages), done: make(chan struct{})}
	t.peers[id] = p
	if t.ctx != nil {
		t.start(p)
	}
}

// learn takes the address of a caller that was not named yet.
func (t *Transport) learn(id uint64, address string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.peers[id]
	if _, _, err := net.SplitHostPort(address); err != nil || id == t.opt.RaftID || len(t.told) >= maxTold || t.ctx == nil || t.ctx.Err() != nil {
		return
	}
	if p != nil {
		if t.told[id] == "" || p.address == address {
			return // SetPeers knows better
		}
		p.stop()
	}
	t.told[id] = address
	t.add(id, address)
}

func (t *Transport) start(p *peer) { // with t.mu
	ctx, cancel := context.WithCancel(t.ctx)
	t.wg.Go(func() {
		defer cancel()
		p.run(ctx)
	})
	t.wg.Go(func() {
		select {
		case <-p.done:
		case <-ctx.Done():
		}
		cancel()
	})
}

// Send implements transport.Transport.
func (t *Transport) Send(messages []*raftpb.Message) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, m := range messages {
		p := t.peers[m.GetTo()]
		if p == nil {
			continue
		}
		select {
		case p.queue <- m:
		default: // raft sends again
		}
	}
}

// SendSnapshot implements transport.Transport.
func (t *Transport) SendSnapshot(m *raftpb.Message, write func(io.Writer) error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.peers[m.GetTo()]
	if p == nil || t.ctx == nil || t.ctx.Err() != nil {
		return
	}
	ctx := t.ctx
	t.wg.Go(func() {
		err := p.sendSnapshot(ctx, m, write)
		t.opt.Handler.SnapshotSent(p.id, err)
	})
}

// Client returns a client of a peer's services, authenticated as this node.
func (t *Transport) Client(address string) *connect.Client {
	return connect.NewClient(connecthttp.NewTransport(t.http, "http://"+address, connecthttp.WithGRPC(), connecthttp.WithReadMaxBytes(maxFrameBytes)), t.authorize)
}

// authorize adds the cluster's secret to a call.
func (t *Transport) authorize(next connect.ClientFunc) connect.ClientFunc {
	return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
		info, ok := connect.CallInfoForClientContext(ctx)
		if !ok {
			ctx, info = connect.NewClientContext(ctx)
		}
		info.RequestHeader().Set("Authorization", "Bearer "+t.opt.Secret)
		if t.opt.Address != "" {
			info.RequestHeader().Set(addressHeader, t.opt.Address)
		}
		return next(ctx, spec)
	}
}

// peer is one member and the queue towards it.
type peer struct {
	t       *Transport
	id      uint64
	address string
	queue   chan *raftpb.Message
	done    chan struct{}
	once    sync.Once
}

func (p *peer) stop() { p.once.Do(func() { close(p.done) }) }

// run keeps a stream to the peer for as long as ctx lives.
func (p *peer) run(ctx context.Context) {
	backoff := minBackoff
	for ctx.Err() == nil {
		started := time.Now()
		err := p.stream(ctx)
		if ctx.Err() != nil {
			return
		}
		p.t.NoteRemoval(err, p.t.opt.RaftID, p.address)
		p.t.opt.Handler.Unreachable(p.id)
		if errors.Is(err, syscall.ECONNREFUSED) {
			p.t.opt.Handler.PeerGone(p.id)
		}
		if time.Since(started) > time.Second {
			backoff = 0 // it worked for a while: look at once whether the port still answers
		}
		select {
		case <-ctx.Done():
		case <-time.After(backoff):
		}
		backoff = min(max(2*backoff, minBackoff), maxBackoff)
	}
}

// stream opens one stream and sends on it until it breaks.
func (p *peer) stream(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// A refused port shows at once with a bare connection; the HTTP client hides
	// it in layers of its own.
	if err := p.probe(ctx); err != nil {
		return err
	}
	s, err := peerv1connect.NewPeerServiceClient(p.t.Client(p.address)).Raft(ctx)
	if err != nil {
		return fmt.Errorf("opening a stream to %s: %w", p.address, err)
	}
	if err := s.Send(&peerv1.RaftRequest{From: p.t.opt.RaftID}); err != nil {
		return fmt.Errorf("opening a stream to %s: %w", p.address, err)
	}
	broken := make(chan error, 1)
	p.t.wg.Go(func() {
		_, err := s.Receive()
		broken <- err
		cancel()
	})
	for {
		batch, err := p.batch(ctx, broken)
		if err != nil {
			return err
		}
		if err := s.Send(batch); err != nil {
			select {
			case why := <-broken: // says more than that nobody listens
				err = errors.Join(why, err)
			case <-ctx.Done():
			}
			return fmt.Errorf("sending to %s: %w", p.address, err)
		}
	}
}

// NoteRemoval looks whether a call of a peer failed because raftID is no member
// any more.
func (t *Transport) NoteRemoval(err error, raftID uint64, address string) {
	if connect.CodeOf(err) == codeRemoved && t.opt.TurnedAway != nil {
		t.opt.TurnedAway(raftID, address)
	}
}

func (p *peer) probe(ctx context.Context) error {
	c, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", p.address)
	if err != nil {
		return err
	}
	return c.Close()
}

// batch waits for a message and takes along what else is queued.
func (p *peer) batch(ctx context.Context, broken <-chan error) (*peerv1.RaftRequest, error) {
	req := &peerv1.RaftRequest{From: p.t.opt.RaftID}
	size := 0
	add := func(m *raftpb.Message) error {
		b, err := proto.Marshal(m)
		if err != nil {
			return fmt.Errorf("encoding a raft message: %w", err)
		}
		req.Messages = append(req.Messages, b)
		size += len(b)
		return nil
	}
	select {
	case <-ctx.Done():
		select {
		case err := <-broken: // which is why ctx ended
			return nil, fmt.Errorf("the stream to %s ended: %w", p.address, err)
		default:
			return nil, ctx.Err()
		}
	case err := <-broken:
		return nil, fmt.Errorf("the stream to %s ended: %w", p.address, err)
	case m := <-p.queue:
		if err := add(m); err != nil {
			return nil, err
		}
	}
	for size < batchBytes {
		select {
		case m := <-p.queue:
			if err := add(m); err != nil {
				return nil, err
			}
		default:
			return req, nil
		}
	}
	return req, nil
}

func (p *peer) sendSnapshot(ctx context.Context, m *raftpb.Message, write func(io.Writer) error) error {
	select {
	case p.t.snaps <- struct{}{}:
		defer func() { <-p.t.snaps }()
	case <-ctx.Done():
		return ctx.Err()
	}
	ctx, cancel := context.WithTimeout(ctx, snapshotWithin)
	defer cancel()
	s, err := peerv1connect.NewPeerServiceClient(p.t.Client(p.address)).Snapshot(ctx)
	if err != nil {
		return fmt.Errorf("opening a snapshot stream to %s: %w", p.address, err)
	}
	head, err := proto.Marshal(m)
	if err != nil {
		return fmt.Errorf("encoding a snapshot message: %w", err)
	}
	if err := s.Send(&peerv1.SnapshotRequest{Message: head}); err != nil {
		return fmt.Errorf("sending a snapshot to %s: %w", p.address, err)
	}
	if err := write(chunker{s}); err != nil {
		return fmt.Errorf("sending a snapshot to %s: %w", p.address, err)
	}
	if _, err := s.CloseAndReceive(); err != nil {
		return fmt.Errorf("sending a snapshot to %s: %w", p.address, err)
	}
	return nil
}

type chunker struct {
	s peerv1connect.PeerServiceSnapshotClientStream
}

func (c chunker) Write(b []byte) (int, error) {
	n := 0
	for len(b) > 0 {
		part := b[:min(len(b), chunkBytes)]
		if err := c.s.Send(&peerv1.SnapshotRequest{Chunk: part}); err != nil {
			return n, err
		}
		n += len(part)
		b = b[len(part):]
	}
	return n, nil
}
