package main

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.etcd.io/raft/v3/raftpb"
	"golang.org/x/sync/errgroup"

	"github.com/blixard/blixard"
	peerv1 "github.com/blixard/blixard/api/blixard/peer/v1"
	"github.com/blixard/blixard/api/blixard/peer/v1/peerv1connect"
	"github.com/blixard/blixard/client"
	"github.com/blixard/blixard/internal/agent"
	"github.com/blixard/blixard/internal/api"
	"github.com/blixard/blixard/internal/config"
	"github.com/blixard/blixard/internal/control"
	"github.com/blixard/blixard/internal/converge"
	"github.com/blixard/blixard/internal/image"
	"github.com/blixard/blixard/internal/network/bridge"
	"github.com/blixard/blixard/internal/raftlog/wal"
	"github.com/blixard/blixard/internal/server"
	"github.com/blixard/blixard/internal/state"
	"github.com/blixard/blixard/internal/transport/grpc"
	"github.com/blixard/blixard/internal/vmm"
	"github.com/blixard/blixard/internal/vmm/qemu"
)

// stopWithin bounds how long an orderly end may take.
const stopWithin = 5 * time.Second

// endWithin bounds how long a removed node takes to end its instances.
const endWithin = 30 * time.Second

// node is everything that runs in one `blixard server` process.
type node struct {
	cfg   config.Config
	id    server.Identity
	log   *slog.Logger
	reg   *prometheus.Registry
	srv   *server.Server
	tr    *grpc.Transport
	wires *bridge.Network
	agent *agent.Agent
	local *follower
	http  *http.Server
	api   *api.Handler
	close []func() error

	driver    vmm.Driver
	functions *functions
	removed   atomic.Pointer[string] // why this node is no member any more
	gone      chan struct{}          // closed then
}

// runNode opens what the data directory holds and serves until ctx ends.
func runNode(ctx context.Context, cfg config.Config, id server.Identity, log *slog.Logger) (err error) {
	n := &node{cfg: cfg, id: id, log: log, reg: prometheus.NewRegistry(), gone: make(chan struct{})}
	defer func() {
		for _, v := range slices.Backward(n.close) {
			if cerr := v(); err == nil {
				err = cerr
			}
		}
	}()
	if err := n.open(); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", cfg.Cluster.Listen)
	if err != nil {
		return blixard.Invalid("cluster.listen", "give another --listen, or end what serves there (`ss -ltnp` shows it)", "cannot serve on %s: %v", cfg.Cluster.Listen, err)
	}
	if err := n.writeAdminToken(); err != nil {
		return errors.Join(err, listener.Close())
	}
	err = n.serve(ctx, listener)
	if why := n.removed.Load(); why != nil {
		return n.left(*why)
	}
	return err
}

// leftError ends a server that was removed from its cluster and has cleared its
// machine: all that is left to do is to say so.
type leftError struct{ error }

// left writes down that this node is no member any more and ends its instances.
func (n *node) left(why string) error {
	told := server.MarkRemoved(n.cfg.Cluster.DataDir, n.id, why)
	if err := n.endInstances(); err != nil {
		return errors.Join(told, err)
	}
	if marked, err := server.Removed(n.cfg.Cluster.DataDir, n.id); err != nil || !marked {
		return errors.Join(told, err)
	}
	return leftError{told}
}

// writeAdminToken leaves a file that says the right thing alone: a full disk
// must not cost the operator the token.
func (n *node) writeAdminToken() error {
	path, want := filepath.Join(n.cfg.Cluster.DataDir, "admin.token"), adminToken(n.id.Secret)+"\n"
	if have, err := os.ReadFile(path); err == nil && string(have) == want {
		return nil
	}
	if err := server.WriteDurably(path, []byte(want)); err != nil {
		return fmt.Errorf("keeping the admin token: %w", err)
	}
	return nil
}

// errRemoved ends everything that runs in this process.
var errRemoved = errors.New("this node was removed from its cluster")

// turnedAway hears from a member that this node is none any more. What is
// removed is never taken back, so one member's word is enough.
func (n *node) turnedAway(raftID uint64, by string) {
	if raftID != n.id.RaftID {
		return // a simulated node's
	}
	why := "as the member at " + by + " says"
	if n.removed.CompareAndSwap(nil, &why) {
		n.log.Error("this node was removed from its cluster: it stops", "event", "node_removed", "by", by)
		close(n.gone)
	}
}

// endInstances ends what ran here, after the agent: it counts as lost, and runs
// elsewhere by now or soon.
func (n *node) endInstances() error {
	ctx, cancel := context.WithTimeout(context.Background(), endWithin)
	defer cancel()
	found, err := n.driver.List(ctx)
	if err != nil {
		return fmt.Errorf("ending the instances of a removed node: %w", err)
	}
	var group errgroup.Group
	group.SetLimit(8)
	for _, s := range found {
		group.Go(func() error {
			n.log.Warn("ending an instance of a removed node", "event", "instance_ended", "instance", s.Ref.String())
			return n.driver.Remove(ctx, s.Ref)
		})
	}
	return errors.Join(group.Wait(), n.detachAll(ctx))
}

// open makes the parts, from the log up.
func (n *node) open() error {
	dir := n.cfg.Cluster.DataDir
	opened, err := wal.Open(wal.OS, server.LogDir(dir), wal.Options{})
	if err != nil {
		return err
	}
	if opened.Repaired != "" {
		n.log.Warn("the log was repaired", "event", "log_repaired", "what", opened.Repaired)
	}
	err = server.Prepare(n.id, &opened)
	if err == nil {
		err = server.MarkLog(dir, n.id)
	}
	if err != nil {
		return errors.Join(err, opened.Log.Close())
	}
	n.reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	n.tr = grpc.New(grpc.Options{
		RaftID: n.id.RaftID, Address: advertise(n.cfg), Secret: n.id.Secret, Handler: (*peers)(n), Heartbeat: n.heartbeat, TurnedAway: n.turnedAway,
		Known: func(id uint64) bool { return n.srv.Known(id) }, Removed: func(id uint64) bool { return n.srv.WasRemoved(id) }, // made after the transport
	})
	tick := time.Duration(n.cfg.Consensus.HeartbeatInterval)
	n.srv, err = server.New(server.Options{
		Identity: n.id, Opened: opened, Transport: n.tr, Peers: caller{n.tr}, MaxVoters: n.cfg.Consensus.MaxVoters, Tick: tick,
		ElectionTicks: int(time.Duration(n.cfg.Consensus.ElectionTimeout) / tick), SnapshotEntries: n.cfg.Consensus.SnapshotThreshold,
		Control: control.Config{HeartbeatMS: ms(n.cfg.Liveness.HeartbeatInterval), LeaseMS: ms(n.cfg.Liveness.Lease), MarginMS: ms(n.cfg.Liveness.Margin)},
		Release: release(), Log: n.log, Metrics: server.NewMetrics(n.reg),
	})
	if err != nil {
		return errors.Join(err, opened.Log.Close())
	}
	n.close = append(n.close, n.srv.Close)
	n.local = newFollower(n.srv)
	if err := n.openAgent(); err != nil {
		return err
	}
	if err := n.openFunctions(); err != nil {
		return err
	}
	n.http = api.NewServer(n.handler())
	n.http.ErrorLog = slog.NewLogLogger(n.log.Handler(), slog.LevelDebug)
	return nil
}

func (n *node) openAgent() error {
	dir := n.cfg.Cluster.DataDir
	store := n.images()
	driver, err := qemu.New(qemu.Options{Root: vmsDir(dir), Log: n.log, ForceTCG: n.cfg.MicroVM.ForceEmulation})
	if err != nil {
		return fmt.Errorf("opening the QEMU driver: %w", err)
	}
	n.close, n.driver = append(n.close, driver.Close), driver
	if err := n.openNetwork(); err != nil {
		return err
	}
	metrics := agent.NewMetrics()
	n.reg.MustRegister(metrics)
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("finding this program: %w", err)
	}
	n.agent, err = agent.New(agent.Options{
		Node: n.id.Name, Membership: fmt.Sprintf("%s/%d", n.id.ClusterID, n.id.RaftID), Cluster: n.local.cluster(n.id.Name, n.id.RaftID, n.report), Driver: driver, Images: &bundles{store: store, peers: n.client, view: n.srv.View, self: n.id.Name},
		DataDir: dir, Log: n.log, Metrics: metrics, Release: release(), PublishAddress: n.publishAddress(), Capacity: n.capacity(),
		Reserved:     blixard.Resources{MilliCPU: int64(n.cfg.MicroVM.ReservedVCPUs) * 1000, MemoryMiB: n.cfg.MicroVM.ReservedMemoryMB},
		MaxInstances: n.cfg.MicroVM.MaxVMsPerNode, HeartbeatEvery: time.Duration(n.cfg.Liveness.HeartbeatInterval), Lease: time.Duration(n.cfg.Liveness.Lease),
		Network: n.wires, DefaultNetwork: n.cfg.Network.Mode,
		Limits:   converge.Limits{Starts: n.cfg.MicroVM.StartLimit},
		Watchdog: []string{self, "watchdog", "--data-dir", dir}, WorkDir: func(r vmm.Ref) string { return filepath.Join(dir, "vms", "vms", r.String()) },
	})
	if err != nil {
		return fmt.Errorf("making the agent: %w", err)
	}
	return nil
}

func (n *node) images() image.Store {
	root := n.cfg.MicroVM.ImageDir
	if root == "" {
		root = filepath.Join(n.cfg.Cluster.DataDir, "images")
	}
	return image.Store{Root: root}
}

// capacity is what the configuration says in place of what the machine has.
func (n *node) capacity() *blixard.Resources {
	m := n.cfg.MicroVM
	if m.CapacityVCPUs == 0 && m.CapacityMemoryMB == 0 {
		return nil
	}
	return &blixard.Resources{MilliCPU: int64(m.CapacityVCPUs) * 1000, MemoryMiB: m.CapacityMemoryMB}
}

func (n *node) publishAddress() string {
	if n.cfg.Network.PublishAddress != "" {
		return n.cfg.Network.PublishAddress
	}
	host, _, err := net.SplitHostPort(advertise(n.cfg))
	if err != nil || net.ParseIP(host) == nil {
		return "127.0.0.1"
	}
	return host
}

// handler is what the one port serves: the API, the nodes' own service, and
// metrics.
func (n *node) handler() http.Handler {
	token := adminToken(n.id.Secret)
	n.api = api.New(api.Options{
		Backend: backend{n.srv}, Guests: n.agent, Images: imageStore{n.images()}, Peers: n.client, Release: release(), Log: n.log,
		Token: func() string { return token }, Defaults: n.cfg.MicroVM.SpecDefaults(),
		Functions: functionAPI{n.functions}, Code: n.functions.codes, Keys: accessKeys{backend{n.srv}}, Edge: n.functions.edge(),
	})
	rpc := connect.NewServer()
	n.tr.Register(rpc)
	inner := http.NewServeMux()
	connecthttp.Mount(inner, rpc, connecthttp.WithReadMaxBytes(64<<20))
	peerAuth := []byte("Bearer " + n.id.Secret)
	mux := http.NewServeMux()
	mux.HandleFunc("/blixard.peer.v1.PeerService/", func(w http.ResponseWriter, r *http.Request) {
		if !hmac.Equal([]byte(r.Header.Get("Authorization")), peerAuth) {
			http.Error(w, "this is for members of the cluster only", http.StatusUnauthorized)
			return
		}
		inner.ServeHTTP(w, r)
	})
	peerFunctions := n.functions.peerHandler()
	mux.HandleFunc("/peer/v1/", func(w http.ResponseWriter, r *http.Request) {
		if !hmac.Equal([]byte(r.Header.Get("Authorization")), peerAuth) {
			http.Error(w, "this is for members of the cluster only", http.StatusUnauthorized)
			return
		}
		peerFunctions.ServeHTTP(w, r)
	})
	if n.cfg.Monitoring.MetricsEnabled {
		mux.Handle("GET /metrics", promhttp.HandlerFor(n.reg, promhttp.HandlerOpts{}))
	}
	mux.Handle("/", n.api)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n.functions.gateway.OwnsHost(r.Host) { // a function's URL: all paths are the function's
			n.functions.gateway.ServeHTTP(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// client reaches another node on behalf of a user or of this node's agent.
func (n *node) client(address string) (*client.Client, error) {
	return client.New(client.Options{Addresses: []string{address}, Token: adminToken(n.id.Secret), UserAgent: "blixard-node", ForwardedBy: string(n.id.Name)})
}

// serve runs everything until ctx ends or a part fails.
func (n *node) serve(ctx context.Context, listener net.Listener) error {
	// The replica outlives the rest by a moment, to hand over leadership.
	core, stopCore := context.WithCancel(context.WithoutCancel(ctx))
	defer stopCore()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return n.srv.Run(core) })
	group.Go(func() error { return n.tr.Run(core) })
	group.Go(func() error {
		if err := n.http.Serve(n.api.Listen(listener)); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serving on %s: %w", listener.Addr(), err)
		}
		return nil
	})
	group.Go(func() error { return n.local.run(ctx) })
	group.Go(func() error { return n.begin(ctx) })
	group.Go(func() error { return paceGC(ctx) })
	group.Go(func() error { return n.api.KeepImageCopies(ctx) })
	if !n.cfg.Cluster.Witness {
		group.Go(func() error { return n.agent.Run(ctx) })
	}
	if n.cfg.MicroVM.SimulatedNodes > 0 {
		group.Go(func() error { return n.simulate(ctx, n.cfg.MicroVM.SimulatedNodes) })
	}
	if err := n.functions.run(ctx, group); err != nil {
		group.Go(func() error { return err })
	}
	n.debugServer(ctx, group)
	group.Go(func() error {
		select {
		case <-n.gone:
			return errRemoved
		case <-ctx.Done():
			return nil
		}
	})
	group.Go(func() error {
		<-ctx.Done()
		n.stop()
		stopCore()
		return nil
	})
	n.log.Info("serving", "event", "server_started", "address", listener.Addr().String(), "cluster", n.id.ClusterID)
	err := group.Wait()
	if err == nil || errors.Is(err, context.Canceled) {
		n.log.Info("stopped", "event", "server_stopped")
		return nil
	}
	return err
}

// stop ends the serving parts in order: leadership is handed over first, so
// that the others need no election.
func (n *node) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), stopWithin)
	defer cancel()
	if st := n.srv.Status(ctx); st.Role == "leader" && len(st.Peers) > 1 {
		handover, done := context.WithTimeout(ctx, 2*time.Second)
		if err := n.srv.TransferLeader(handover, ""); err != nil {
			n.log.Info("leadership was not handed over", "event", "handover_failed", "error", err)
		}
		done()
	}
	n.functions.drain()
	if err := n.http.Close(); err != nil {
		n.log.Debug("closing connections", "error", err)
	}
}

// begin makes a new cluster's first entries, once.
func (n *node) begin(ctx context.Context) error {
	if !n.id.Founder {
		return nil
	}
	for ctx.Err() == nil {
		v, err := n.srv.ReadView(ctx)
		if err == nil && v.Cluster().ID != "" {
			return nil
		}
		if err == nil {
			_, err = n.srv.Propose(ctx, state.Envelope{Actor: "blixard", Command: &state.Batch{Commands: []state.Command{
				&state.Bootstrap{ClusterID: n.id.ClusterID, Name: n.cfg.Cluster.Name, Secret: n.id.Secret, RaftID: n.id.RaftID, Node: identityOf(n.cfg), FeatureLevel: blixard.FeatureLevel},
				&state.CreateToken{Token: firstToken(n.id)},
			}}})
		}
		if err == nil {
			n.log.Warn("founded a new cluster, since this node belonged to none", "event", "cluster_founded", "cluster", n.id.ClusterID)
			return nil
		}
		if ctx.Err() == nil {
			n.log.Warn("founding the cluster", "event", "cluster_founding", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
	return nil
}

// debugServer serves profiles on loopback, if asked for.
func (n *node) debugServer(ctx context.Context, group *errgroup.Group) {
	address := n.cfg.Monitoring.PprofAddress
	if address == "" {
		return
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	s := &http.Server{Addr: address, Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	group.Go(func() error {
		if err := s.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serving profiles on %s: %w", address, err)
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		return s.Close()
	})
}

// heartbeat answers another node's agent.
func (n *node) heartbeat(ctx context.Context, r *peerv1.HeartbeatRequest) (*peerv1.HeartbeatResponse, error) {
	g, err := n.srv.GrantLease(ctx, blixard.NodeName(r.GetNode()), r.GetRaftId())
	if err != nil {
		return nil, connect.NewError(connect.CodeUnavailable, err.Error())
	}
	return &peerv1.HeartbeatResponse{Granted: g.OK, Index: g.Index}, nil
}

// peers hands what arrives to the server, which is made after the transport.
type peers node

func (p *peers) Deliver(ctx context.Context, m []*raftpb.Message) error { return p.srv.Deliver(ctx, m) }

func (p *peers) DeliverSnapshot(ctx context.Context, m *raftpb.Message, r io.Reader) error {
	return p.srv.DeliverSnapshot(ctx, m, r)
}
func (p *peers) PeerGone(id uint64)                { p.srv.PeerGone(id) }
func (p *peers) Unreachable(id uint64)             { p.srv.Unreachable(id) }
func (p *peers) SnapshotSent(id uint64, err error) { p.srv.SnapshotSent(id, err) }

// caller asks other nodes.
type caller struct{ tr *grpc.Transport }

func (c caller) Heartbeat(ctx context.Context, address string, name blixard.NodeName, raftID uint64) (server.Grant, error) {
	res, err := peerv1connect.NewPeerServiceClient(c.tr.Client(address)).Heartbeat(ctx, &peerv1.HeartbeatRequest{Node: string(name), RaftId: raftID})
	if err != nil {
		c.tr.NoteRemoval(err, raftID, address)
		return server.Grant{}, fmt.Errorf("sending a heartbeat to %s: %w", address, err)
	}
	return server.Grant{OK: res.GetGranted(), Index: res.GetIndex()}, nil
}

// adminToken is what the API asks of operators. Every member can derive it, and
// it gives no way back to the secret.
func adminToken(secret string) string {
	m := hmac.New(sha256.New, []byte(secret))
	m.Write([]byte("blixard admin token 1")) // a hash never fails to write
	return "blxa_" + hex.EncodeToString(m.Sum(nil))
}
