package server_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"

	"github.com/blixard/blixard"
	peerv1 "github.com/blixard/blixard/api/blixard/peer/v1"
	"github.com/blixard/blixard/api/blixard/peer/v1/peerv1connect"
	"github.com/blixard/blixard/internal/control"
	"github.com/blixard/blixard/internal/raftlog/wal"
	"github.com/blixard/blixard/internal/server"
	"github.com/blixard/blixard/internal/state"
	"github.com/blixard/blixard/internal/transport/grpc"
)

// member is one node of a test cluster: a real log, a real port, no agent.
type member struct {
	name    blixard.NodeName
	dir     string
	address string
	id      server.Identity
	srv     *server.Server
	stop    func() error
}

// cluster is a set of members in one process.
type cluster struct {
	t         testing.TB
	dir       string
	made      int
	members   map[blixard.NodeName]*member
	threshold uint64
	maxVoters int
}

type caller struct{ t *grpc.Transport }

func (c caller) Heartbeat(ctx context.Context, address string, node blixard.NodeName, raftID uint64) (server.Grant, error) {
	res, err := peerv1connect.NewPeerServiceClient(c.t.Client(address)).Heartbeat(ctx, &peerv1.HeartbeatRequest{Node: string(node), RaftId: raftID})
	if err != nil {
		return server.Grant{}, err
	}
	return server.Grant{OK: res.GetGranted(), Index: res.GetIndex()}, nil
}

func newCluster(t testing.TB) *cluster {
	// The directory is made first, so that it is removed after the members ended.
	c := &cluster{t: t, dir: t.TempDir(), members: map[blixard.NodeName]*member{}, threshold: 1000, maxVoters: 5}
	t.Cleanup(func() {
		for _, m := range c.members {
			if m.stop != nil {
				if err := m.stop(); err != nil {
					t.Errorf("stopping %s: %v", m.name, err)
				}
			}
		}
	})
	return c
}

// found starts the first node.
func (c *cluster) found(name blixard.NodeName) *member {
	c.t.Helper()
	m := c.add(name)
	id, err := server.Found(m.dir, name)
	if err != nil {
		c.t.Fatal(err)
	}
	m.id = id
	c.start(m)
	c.propose(m, &state.Bootstrap{ClusterID: id.ClusterID, Name: "test", Secret: id.Secret, RaftID: id.RaftID, Node: state.NodeIdentity{Name: name, Address: m.address, Zone: "z-" + string(name)}})
	return m
}

// join adds a node by a token of via.
func (c *cluster) join(name blixard.NodeName, via *member) *member {
	c.t.Helper()
	m := c.add(name)
	hash := sha256.Sum256([]byte("secret of " + name))
	token := state.Token{ID: "t-" + string(name), Hash: hex.EncodeToString(hash[:]), ExpiresMS: time.Now().Add(time.Hour).UnixMilli(), UsesLeft: 1}
	c.propose(via, &state.CreateToken{Token: token})
	out := c.propose(via, &state.JoinNode{Node: state.NodeIdentity{Name: name, Address: m.address, Zone: "z-" + string(name)}, TokenID: token.ID, TokenHash: token.Hash})
	m.id = server.Identity{ClusterID: via.id.ClusterID, Name: name, RaftID: out.Value, Secret: via.id.Secret, Peers: []server.Member{{RaftID: via.id.RaftID, Address: via.address}}}
	if err := server.WriteIdentity(m.dir, m.id); err != nil {
		c.t.Fatal(err)
	}
	c.start(m)
	return m
}

func (c *cluster) add(name blixard.NodeName) *member {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		c.t.Fatal(err)
	}
	defer l.Close()
	c.made++
	m := &member{name: name, dir: filepath.Join(c.dir, fmt.Sprintf("%s-%d", name, c.made)), address: l.Addr().String()}
	c.members[name] = m
	return m
}

// start starts (or restarts) a member on what its directory holds.
func (c *cluster) start(m *member) {
	c.t.Helper()
	id, err := server.ReadIdentity(m.dir)
	if err != nil {
		c.t.Fatal(err)
	}
	opened, err := wal.Open(wal.OS, filepath.Join(m.dir, "raft"), wal.Options{SegmentBytes: 1 << 20})
	if err != nil {
		c.t.Fatal(err)
	}
	if err := server.Prepare(id, &opened); err != nil {
		c.t.Fatal(err)
	}
	var srv *server.Server
	tr := grpc.New(grpc.Options{
		RaftID: id.RaftID, Secret: id.Secret, Handler: late{&srv},
		Heartbeat: func(ctx context.Context, r *peerv1.HeartbeatRequest) (*peerv1.HeartbeatResponse, error) {
			g, err := srv.GrantLease(ctx, blixard.NodeName(r.GetNode()), r.GetRaftId())
			return &peerv1.HeartbeatResponse{Granted: g.OK, Index: g.Index}, err
		},
	})
	srv, err = server.New(server.Options{
		Identity: id, Opened: opened, Transport: tr, Peers: caller{tr}, MaxVoters: c.maxVoters, Tick: 20 * time.Millisecond, ElectionTicks: 10, SnapshotEntries: c.threshold,
		Control: control.Config{}, Log: slog.New(slog.NewTextHandler(logs(c.t), &slog.HandlerOptions{Level: slog.LevelInfo})),
	})
	if err != nil {
		c.t.Fatal(err)
	}
	m.srv = srv
	mux := http.NewServeMux()
	rpc := connect.NewServer()
	tr.Register(rpc)
	connecthttp.Mount(mux, rpc)
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	hs := &http.Server{Handler: mux, Protocols: protocols}
	l, err := net.Listen("tcp", m.address)
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 3)
	go func() { ended <- srv.Run(ctx) }()
	go func() { ended <- tr.Run(ctx) }()
	go func() {
		if err := hs.Serve(l); err != http.ErrServerClosed {
			ended <- err
			return
		}
		ended <- nil
	}()
	beating := make(chan struct{})
	go func() {
		defer close(beating)
		beat(ctx, m)
	}()
	m.stop = func() error {
		m.stop = nil
		if err := hs.Close(); err != nil {
			return err
		}
		cancel()
		<-beating
		var first error
		for range 3 {
			if err := <-ended; err != nil && first == nil {
				first = err
			}
		}
		if err := srv.Close(); err != nil && first == nil {
			first = err
		}
		return first
	}
}

// beat does what an agent does for its node: it reports and renews the lease.
func beat(ctx context.Context, m *member) {
	reported := false
	for ctx.Err() == nil {
		short, cancel := context.WithTimeout(ctx, 2*time.Second)
		if g, err := m.srv.Heartbeat(short); err == nil && !g.OK && !reported {
			_, err := m.srv.Propose(short, state.Envelope{Actor: "test", Command: &state.ReportNode{
				Name: m.name, RaftID: m.id.RaftID, Address: m.address, Zone: "z-" + string(m.name), Capacity: blixard.Resources{MilliCPU: 64_000, MemoryMiB: 64 << 10},
			}})
			reported = err == nil
		}
		cancel()
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// late hands on to a server that is made after its transport.
type late struct{ s **server.Server }

func (c *cluster) propose(m *member, cmd state.Command) state.Outcome {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	out, err := m.srv.Propose(ctx, state.Envelope{Key: fmt.Sprintf("%T-%d", cmd, time.Now().UnixNano()), Actor: "test", Command: cmd})
	if err != nil {
		c.t.Fatalf("%s: proposing %T: %v", m.name, cmd, err)
	}
	return out
}

// eventually polls until ok, for at most 20 s.
func (c *cluster) eventually(what string, ok func() bool) {
	c.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			c.t.Fatalf("not in time: %s", what)
		}
		<-time.After(5 * time.Millisecond)
	}
}

func (c *cluster) leader() *member {
	c.t.Helper()
	var found *member
	c.eventually("a leader", func() bool {
		for _, m := range c.members {
			if m.stop != nil {
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				st := m.srv.Status(ctx)
				cancel()
				if st.Role == "leader" && st.Ready {
					found = m
					return true
				}
			}
		}
		return false
	})
	return found
}

func (c *cluster) three() (a, b, d *member) {
	c.t.Helper()
	a = c.found("node1")
	b = c.join("node2", a)
	d = c.join("node3", a)
	c.eventually("three voters", func() bool {
		voters := 0
		a.srv.View().Nodes(func(n *blixard.Node) bool {
			if n.Raft == blixard.RoleVoter {
				voters++
			}
			return true
		})
		return voters == 3
	})
	return a, b, d
}

func spec(replicas int) blixard.VMSpec {
	s := blixard.VMSpec{Replicas: replicas, MemoryMiB: 64}
	s.Defaults()
	return s
}

// logs shows a server's log with -v only.
func logs(t testing.TB) io.Writer {
	if _, bench := t.(*testing.B); testing.Verbose() && !bench {
		return t.Output()
	}
	return io.Discard
}
