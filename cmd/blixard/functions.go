package main

import (
	"context"
	"crypto/hmac"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/code"
	"github.com/blixard/blixard/internal/dispatch"
	"github.com/blixard/blixard/internal/gateway"
	"github.com/blixard/blixard/internal/lambdaapi"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/state"
	"github.com/blixard/blixard/internal/vmm/qemu"
)

// functionsDir is where instances of functions and their templates are.
func functionsDir(dataDir string) string { return filepath.Join(dataDir, "functions") }

// functions are everything on this node that has to do with functions.
type functions struct {
	n          *node
	codes      *codes
	dispatcher *dispatch.Dispatcher // nil: this node runs none
	peers      *dispatch.HTTPPeers
	gateway    *gateway.Gateway
	lambda     *lambdaapi.Server
	traces     *gateway.Traces // nil: none are sent

	endInstances context.CancelFunc // of the dispatcher; nil until it runs
}

// limits of payloads, as the configuration has them.
func (n *node) payloadLimits() (sync, async, stream int64) {
	f := n.cfg.Functions
	return int64(f.MaxPayloadMB) << 20, int64(f.MaxAsyncKB) << 10, int64(f.MaxStreamMB) << 20
}

func (n *node) propose(ctx context.Context, c state.Command, key string) (state.Outcome, error) {
	return n.srv.Propose(ctx, state.Envelope{Key: key, NowMS: time.Now().UnixMilli(), Actor: "node " + string(n.id.Name), Command: c})
}

func (n *node) openFunctions() error {
	dir := functionsDir(n.cfg.Cluster.DataDir)
	store := code.Store{Root: filepath.Join(n.cfg.Cluster.DataDir, "code")}
	f := &functions{n: n, codes: &codes{store: store, peers: n.client, view: n.srv.View, self: n.id.Name, log: n.log}}
	f.peers = &dispatch.HTTPPeers{URL: f.urlOf, Secret: func() string { return n.id.Secret }, Client: &http.Client{Transport: &http.Transport{
		DialContext: (&net.Dialer{Timeout: 3 * time.Second}).DialContext, MaxIdleConnsPerHost: 8, IdleConnTimeout: time.Minute, DisableCompression: true,
	}}}
	if !n.cfg.Cluster.Witness && n.cfg.MicroVM.SimulatedNodes == 0 {
		if err := f.openDispatcher(dir, store); err != nil {
			return err
		}
	}
	sync, async, stream := n.payloadLimits()
	metrics := gateway.NewMetrics()
	n.reg.MustRegister(metrics)
	c := n.cfg.Functions
	options := gateway.Options{
		Node: n.id.Name, View: n.srv.View, Fresh: n.srv.ReadView, Propose: n.propose, OvercommitPercent: c.MemoryPercent,
		Secret: func() string { return n.id.Secret }, Verify: f.verifier(), Authorize: f.authorize,
		Domain: c.Domain, Region: c.Region, AccountID: c.AccountID, Log: n.log, Metrics: metrics,
		Limits:         gateway.Limits{SyncBytes: sync, AsyncBytes: async, ResponseBytes: sync + 100, StreamBytes: stream, CallerRate: float64(c.CallerRate)},
		TrustForwarded: c.TrustForwarded,
	}
	if m := n.cfg.Monitoring; m.OTLPEndpoint != "" {
		f.traces = gateway.NewTraces(m.OTLPEndpoint, float64(m.TracePercent)/100, n.id.Name, release(), n.log)
		n.reg.MustRegister(f.traces)
		options.Traces = f.traces
	}
	if f.dispatcher != nil {
		options.Local = localCalls{f.dispatcher}
	}
	var err error
	if f.gateway, err = gateway.New(options); err != nil {
		return fmt.Errorf("making the gateway: %w", err)
	}
	f.lambda = lambdaapi.New(lambdaapi.Options{
		Backend: n.srv, Invoker: f.gateway, Code: lambdaCode{f.codes}, Region: c.Region, AccountID: c.AccountID, URLHost: f.gateway.URLHost,
		InsecureNoAuth: c.InsecureNoAuth, Log: n.log, TempDir: n.cfg.Cluster.DataDir, Limits: lambdaapi.Limits{SyncBytes: sync, AsyncBytes: async},
	})
	n.functions = f
	return nil
}

func (f *functions) openDispatcher(dir string, store code.Store) error {
	n := f.n
	vms := filepath.Join(dir, "vms")
	driver, err := qemu.New(qemu.Options{Root: vms, Log: n.log, ForceTCG: n.cfg.MicroVM.ForceEmulation})
	if err != nil {
		return fmt.Errorf("opening the QEMU driver for functions: %w", err)
	}
	n.close = append(n.close, driver.Close)
	c := n.cfg.Functions
	f.dispatcher, err = dispatch.New(dispatch.Options{
		Node: n.id.Name, Cluster: functionCluster{n.local.cluster(functionsOf, n.id.RaftID, n.report), n}, Lease: n.agent.MayRun, Driver: driver, Code: store, Images: n.images(),
		Dir: filepath.Join(dir, "templates"), Peers: f.peers, Log: n.log, Registerer: n.reg, Guard: func() { n.agent.Guard(vms) },
		Region: c.Region, AccountID: c.AccountID,
		Limits: dispatch.Limits{OvercommitPercent: int64(c.MemoryPercent), Route: route.Limits{Pool: poolLimit(c.PoolSize)}},
	})
	if err != nil {
		return fmt.Errorf("making the dispatcher: %w", err)
	}
	return nil
}

// poolLimit is functions.pool_size as route has it, where 0 stands for the
// default.
func poolLimit(size int) int {
	if size == 0 {
		return -1
	}
	return size
}

// functionCluster is the replica as the dispatcher sees it.
type functionCluster struct {
	*localCluster
	n *node
}

// View implements dispatch.Cluster.
func (c functionCluster) View() *state.View { return c.n.srv.View() }

// Fresh implements dispatch.Cluster.
func (c functionCluster) Fresh(ctx context.Context) (*state.View, error) {
	return c.n.srv.ReadView(ctx)
}

// Propose implements dispatch.Cluster.
func (c functionCluster) Propose(ctx context.Context, cmd state.Command, key string) (state.Outcome, error) {
	return c.n.propose(ctx, cmd, key)
}

// urlOf is where another node serves.
func (f *functions) urlOf(name blixard.NodeName) string {
	if n := f.n.srv.View().Node(name); n != nil {
		return "http://" + n.Address
	}
	return ""
}

// localCalls is the dispatcher as the gateway sees it.
type localCalls struct{ d *dispatch.Dispatcher }

// Invoke implements gateway.Local.
func (l localCalls) Invoke(ctx context.Context, inv *blixard.Invocation, try gateway.Try, w blixard.ResponseSink) (blixard.InvocationReport, error) {
	return l.d.Invoke(ctx, dispatch.Request{Invocation: inv, MayStart: try.MayStart, MayWait: try.MayWait}, w)
}

// Load implements gateway.Local.
func (l localCalls) Load() gateway.NodeLoad {
	s := l.d.Status()
	out := gateway.NodeLoad{MemoryMiB: s.UsedMiB, Revisions: make([]gateway.Load, len(s.Functions))}
	for i := range s.Functions {
		v := &s.Functions[i]
		out.Revisions[i] = gateway.Load{
			Revision: route.Revision{Function: v.Function, UID: v.UID, Number: v.Number, Seq: v.Seq},
			Warm:     v.Warm, Busy: v.Busy, Pooled: v.Pooled, SlotsFree: v.SlotsFree, HasTemplate: v.HasTemplate(),
		}
	}
	return out
}

// authorize lets those call a function by name who have the token, and on a
// server that asks nobody for signatures, all.
func (f *functions) authorize(r *http.Request) error {
	want := []byte("Bearer " + adminToken(f.n.id.Secret))
	if f.n.cfg.Functions.InsecureNoAuth || hmac.Equal([]byte(r.Header.Get("Authorization")), want) {
		return nil
	}
	return &blixard.Error{Code: blixard.CodeDenied, Message: "calling a function by its name needs the API token", Hint: "send Authorization: Bearer TOKEN, or make a trigger or a URL for it"}
}

// lambdaCode is the code store as the Lambda API sees it.
type lambdaCode struct{ c *codes }

// Put implements lambdaapi.Code.
func (l lambdaCode) Put(ctx context.Context, r io.Reader) (code.Package, error) {
	put, err := l.c.Put(ctx, r)
	if err != nil {
		return code.Package{}, err
	}
	return l.c.store.Get(put.Digest)
}

// Open implements lambdaapi.Code.
func (l lambdaCode) Open(digest string) (io.ReadCloser, int64, error) {
	ctx, cancel := context.WithTimeout(context.Background(), codeCopyTime)
	defer cancel()
	return l.c.Open(ctx, digest, false)
}

// Inspect implements lambdaapi.Code.
func (l lambdaCode) Inspect(ctx context.Context, digest string, spec blixard.FunctionSpec) error {
	_, err := l.c.Inspect(ctx, digest, spec)
	return err
}

// drainWithin is how long calls under way may take when the server ends.
const drainWithin = 3 * time.Second

// run runs this node's part until ctx ends.
func (f *functions) run(ctx context.Context, group *errgroup.Group) error {
	group.Go(func() error { return f.gateway.Run(ctx) })
	if f.dispatcher != nil {
		instances, end := context.WithCancel(context.WithoutCancel(ctx))
		f.endInstances = end
		group.Go(func() error { return f.dispatcher.Run(instances) })
	}
	group.Go(func() error { return f.codes.run(ctx) })
	if address := f.n.cfg.Functions.GatewayListen; address != "" {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return blixard.Invalid("functions.gateway_listen", "give another --gateway-listen, or end what serves there (`ss -ltnp` shows it)", "cannot serve on %s: %v", address, err)
		}
		f.n.log.Info("serving calls of functions", "event", "gateway_started", "address", l.Addr().String())
		group.Go(func() error { return f.gateway.Serve(ctx, l) })
	}
	return nil
}

// drain refuses calls, waits for those under way, and ends the instances. It is
// called once, when the server ends.
func (f *functions) drain() {
	ctx, cancel := context.WithTimeout(context.Background(), drainWithin)
	defer cancel()
	if err := f.gateway.Drain(ctx); err != nil {
		f.n.log.Warn("calls of functions are cut off", "event", "calls_cut", "calls", f.gateway.Calls())
	}
	if f.endInstances != nil {
		f.endInstances()
	}
}

// peerHandler serves other nodes: their gateways and dispatchers.
func (f *functions) peerHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/peer/v1/gateway/", f.gateway.PeerHandler())
	if f.dispatcher != nil {
		mux.Handle(dispatch.Prefix, f.dispatcher.Handler())
	}
	return mux
}

// edge serves what is no path of the API: the Lambda API, and calls.
func (f *functions) edge() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if lambdaapi.Serves(r) {
			f.lambda.ServeHTTP(w, r)
			return
		}
		f.gateway.ServeHTTP(w, r)
	})
}
