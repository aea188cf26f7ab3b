package dispatch_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
	"github.com/blixard/blixard/internal/code"
	"github.com/blixard/blixard/internal/dispatch"
	"github.com/blixard/blixard/internal/image"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/state"
	"github.com/blixard/blixard/internal/vmm"
	"github.com/blixard/blixard/internal/vmm/fake"
)

const patience = 10 * time.Second

// cluster is a state without consensus: commands are applied at once.
type cluster struct {
	mu    sync.Mutex
	state *state.State
	news  chan struct{}
	// refuse makes proposals fail.
	refuse error
	leases int
}

func newCluster(t testing.TB, nodes ...blixard.NodeName) *cluster {
	c := &cluster{state: state.New(), news: make(chan struct{})}
	identity := func(name blixard.NodeName) state.NodeIdentity {
		return state.NodeIdentity{Name: name, Address: string(name), Roles: []string{"hypervisor"}}
	}
	c.must(t, &state.Bootstrap{ClusterID: "c", Name: "c", Secret: "s", RaftID: 1, Node: identity(nodes[0]), FeatureLevel: blixard.FeatureLevel})
	for _, name := range nodes[1:] {
		c.must(t, &state.JoinNode{Node: identity(name)})
	}
	for _, name := range nodes {
		c.must(t, &state.ReportNode{
			Name: name, RaftID: c.View().Node(name).RaftID, Address: string(name), Capacity: blixard.Resources{MilliCPU: 8000, MemoryMiB: 8192, DiskMiB: 8192},
			Hypervisors: []string{"fake"}, FeatureLevel: blixard.FeatureLevel,
		})
	}
	return c
}

func (c *cluster) View() *state.View {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state.View()
}

func (c *cluster) Wait(ctx context.Context, index uint64) error {
	for {
		c.mu.Lock()
		news, now := c.news, c.state.Index()
		c.mu.Unlock()
		if now > index {
			return nil
		}
		select {
		case <-news:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (c *cluster) Fresh(context.Context) (*state.View, error) { return c.View(), nil }

func (c *cluster) Propose(_ context.Context, command state.Command, key string) (state.Outcome, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.refuse != nil {
		return state.Outcome{}, c.refuse
	}
	if _, ok := command.(*state.LeaseSlots); ok {
		c.leases++
	}
	return c.apply(command, key)
}

func (c *cluster) apply(command state.Command, key string) (state.Outcome, error) {
	index := c.state.Index() + 1
	results, _ := c.state.ApplyAll(index, 1, []state.Envelope{{Key: key, NowMS: time.Now().UnixMilli(), Command: command}})
	close(c.news)
	c.news = make(chan struct{})
	out := results[0].Outcome
	out.Index = index
	if results[0].Err != nil {
		return out, results[0].Err
	}
	return out, nil
}

func (c *cluster) must(t testing.TB, command state.Command) state.Outcome {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	out, err := c.apply(command, "")
	if err != nil {
		t.Fatalf("%T: %v", command, err)
	}
	return out
}

// images are files that nobody reads.
type images struct{}

func (images) Function(context.Context) (image.Bundle, error) {
	return image.Bundle{Digest: "image", Kernel: "/kernel", Initrd: "/initrd", Cmdline: call.RoleWord}, nil
}

func (images) Runtime(context.Context, string) (image.Disk, error) { return image.Disk{}, nil }

// guest is a pretend guest: payloads tell it what to do.
type guest struct {
	w    *world
	spec vmm.Spec
	conn *call.Guest
	work sync.WaitGroup

	restores int
}

func (g *guest) Init(init *call.Init) (call.Ready, error) {
	g.w.note("init", init.Function)
	g.w.initialising()
	if why := g.w.initError(); why != "" {
		return call.Ready{}, &call.InitError{Type: "Runtime.ExitError", Message: why, Body: []byte("{}")}
	}
	return call.Ready{Init: 3 * time.Millisecond}, nil
}

func (g *guest) Restore(id *call.Identity) (call.Ack, error) {
	g.w.seen(id)
	if g.w.takes(&g.w.failRestores) {
		return call.Ack{}, errors.New("restoring failed on purpose")
	}
	g.restores++
	if g.w.hooks && g.restores == 1 {
		return call.Ack{Hook: time.Millisecond}, nil
	}
	return call.Ack{}, nil
}

func (g *guest) Invoke(q *call.Request, w call.ResponseWriter) {
	command, rest, _ := strings.Cut(string(q.Payload), " ")
	if command == "echo" && rest == "" { // answered by the thread that reads, as a lean guest does
		g.answer(w, q.Payload)
		return
	}
	g.work.Go(func() { g.run(q, w, command, rest) })
}

func (g *guest) answer(w call.ResponseWriter, payload []byte) {
	if _, err := w.Write(payload); err != nil {
		return // nobody waits
	}
	if err := w.Finish(call.Outcome{Handler: time.Millisecond, UsedMiB: 20}); err != nil {
		return
	}
}

func (g *guest) run(q *call.Request, w call.ResponseWriter, command, rest string) {
	switch command {
	case "gate":
		g.w.entered <- g.spec.Ref
		<-g.w.gate
		g.answer(w, q.Payload)
	case "log":
		if err := g.conn.Log([]byte(rest + "\n")); err != nil {
			return
		}
		g.answer(w, q.Payload)
	case "fail":
		if err := w.Finish(call.Outcome{Error: &blixard.FunctionError{Kind: "Unhandled", Type: "Oops"}, Body: []byte(`{"errorType":"Oops"}`)}); err != nil {
			return
		}
	case "error":
		if err := w.Finish(call.Outcome{Error: &blixard.FunctionError{Kind: "Unhandled", Type: rest}, Body: []byte("{}")}); err != nil {
			return
		}
	case "die":
		g.w.machine.Kill(g.spec.Ref, "killed by the test")
	case "hang":
		g.w.entered <- g.spec.Ref
	default:
		g.answer(w, q.Payload)
	}
}

func (g *guest) Cancel(*call.Request) {}

func (g *guest) Stat() (call.Stat, error) {
	g.w.mu.Lock()
	defer g.w.mu.Unlock()
	g.w.looks++
	return call.Stat{Busy: g.w.working}, nil
}

func (g *guest) Shutdown(reason string, _ time.Duration) { g.w.note("shutdown", reason) }

// world is a dispatcher with everything round it.
type world struct {
	t       testing.TB
	cluster *cluster
	machine *fake.Machine
	node    blixard.NodeName
	d       *dispatch.Dispatcher
	store   code.Store
	options dispatch.Options
	gate    chan struct{}
	entered chan vmm.Ref
	stop    func()

	mu           sync.Mutex
	holds        bool
	working      bool
	initFails    string
	failRestores int
	hooks        bool          // functions have hooks for their restore
	initHold     chan struct{} // initialising lasts until it is closed
	initNow      int
	initMost     int
	notes        []string
	looks        int
	identities   []call.Identity
}

func (w *world) note(words ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.notes = append(w.notes, strings.Join(words, " "))
}

// initialising counts guests that initialise at once.
func (w *world) initialising() {
	w.mu.Lock()
	hold := w.initHold
	w.initNow++
	w.initMost = max(w.initMost, w.initNow)
	w.mu.Unlock()
	if hold != nil {
		<-hold
	}
	w.mu.Lock()
	w.initNow--
	w.mu.Unlock()
}

func (w *world) seen(id *call.Identity) {
	w.mu.Lock()
	defer w.mu.Unlock()
	one := *id
	one.Entropy = bytes.Clone(id.Entropy)
	w.identities = append(w.identities, one)
}

func (w *world) takes(n *int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if *n == 0 {
		return false
	}
	*n--
	return true
}

func (w *world) initError() string { w.mu.Lock(); defer w.mu.Unlock(); return w.initFails }
func (w *world) lease() bool       { w.mu.Lock(); defer w.mu.Unlock(); return w.holds }
func (w *world) set(f func())      { w.mu.Lock(); defer w.mu.Unlock(); f() }

func newWorld(t testing.TB, change func(*dispatch.Options)) *world {
	return newNode(t, newCluster(t, "n1"), "n1", change)
}

func newNode(t testing.TB, c *cluster, name blixard.NodeName, change func(*dispatch.Options)) *world {
	w := &world{t: t, cluster: c, node: name, holds: true, gate: make(chan struct{}), entered: make(chan vmm.Ref, 2000)}
	w.machine = fake.NewMachine(fake.Options{Now: time.Now, Call: w.serve})
	w.store = code.Store{Root: t.TempDir()}
	w.options = dispatch.Options{
		Node: name, Cluster: c, Lease: w.lease, Driver: w.machine.Open(), Code: w.store, Images: images{}, Dir: t.TempDir(),
		Limits: dispatch.Limits{BudgetMiB: 100_000, Route: route.Limits{PoolDelayMS: 1, ContendedMS: 50, DryMS: 20, BackoffMS: 50, GraceMS: 300}},
	}
	if change != nil {
		change(&w.options)
	}
	w.start()
	t.Cleanup(func() { w.stop() })
	return w
}

// start is a daemon's life.
func (w *world) start() {
	d, err := dispatch.New(w.options)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	w.d = d
	w.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				w.t.Error(err)
			}
		case <-time.After(patience):
			w.t.Error("Run has not returned")
		}
	})
}

func (w *world) serve(spec vmm.Spec, memory *fake.Memory, port net.Conn) {
	g := &guest{w: w, spec: spec}
	g.conn = call.NewGuest(port, g)
	go func() {
		if err := g.conn.Serve(); err == nil {
			w.t.Error("Serve returned without a reason")
		}
	}()
}

func (w *world) until(what string, ok func() bool) {
	w.t.Helper()
	w.within(patience, what, ok)
}

// untilLong is until for what real guests do, which may be emulated.
func (w *world) untilLong(what string, ok func() bool) {
	w.t.Helper()
	w.within(3*time.Minute, what, ok)
}

func (w *world) within(limit time.Duration, what string, ok func() bool) {
	w.t.Helper()
	late := time.After(limit)
	for !ok() {
		select {
		case <-late:
			w.t.Fatalf("%s did not come about; status %+v", what, w.d.Status())
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// put stores a file as code.
func (w *world) put(name string, content []byte) code.Package {
	w.t.Helper()
	zip, err := code.Zip(name, 0o755, content)
	if err != nil {
		w.t.Fatal(err)
	}
	p, err := w.store.Put(w.t.Context(), bytes.NewReader(zip))
	if err != nil {
		w.t.Fatal(err)
	}
	return p
}

// deploy creates a function and builds it on this node.
func (w *world) deploy(name blixard.FunctionName, limit int, change func(*blixard.FunctionSpec)) *blixard.FunctionVersion {
	w.t.Helper()
	p := w.put("bootstrap", []byte("#!/bin/sh\n# "+name+"\n"))
	spec := blixard.FunctionSpec{Runtime: "bootstrap", MemoryMiB: 128}
	spec.Defaults()
	spec.ScaleDownDelayMS = 60_000
	if change != nil {
		change(&spec)
	}
	w.cluster.must(w.t, &state.CreateFunction{Name: name, Spec: spec, CodeDigest: p.Digest, CodeBytes: p.Bytes, MaxConcurrent: limit, Reserved: true})
	w.build(name)
	return w.version(name)
}

// build has the node build $LATEST and waits until it is known what came of it.
func (w *world) build(name blixard.FunctionName) {
	w.t.Helper()
	view := w.cluster.View()
	fv := view.FunctionVersion(name, 0)
	w.cluster.must(w.t, &state.AssignBuild{Function: name, Seq: fv.Seq, Node: w.node, NodeEpoch: view.Node(w.node).Epoch})
	w.until("the build", func() bool { return w.version(name).State != blixard.FunctionPending })
}

func (w *world) version(name blixard.FunctionName) *blixard.FunctionVersion {
	return w.cluster.View().FunctionVersion(name, 0)
}

type sink struct {
	head blixard.ResponseHead
	body bytes.Buffer
}

func (s *sink) Begin(head blixard.ResponseHead) error { s.head = head; return nil }
func (s *sink) Write(p []byte) (int, error)           { return s.body.Write(p) }

func (w *world) invocation(name blixard.FunctionName, payload string) *blixard.Invocation {
	fv := w.version(name)
	return &blixard.Invocation{
		RequestID: fmt.Sprintf("r-%d", time.Now().UnixNano()), Function: name, Number: fv.Number, Seq: fv.Seq, Payload: []byte(payload),
		Deadline: time.Now().Add(patience), LogTail: true,
	}
}

func (w *world) invoke(name blixard.FunctionName, payload string) (blixard.InvocationReport, string, error) {
	var s sink
	report, err := w.d.Invoke(w.t.Context(), dispatch.Request{Invocation: w.invocation(name, payload), MayStart: true, MayWait: true}, &s)
	return report, s.body.String(), err
}

func (w *world) must(name blixard.FunctionName, payload string) blixard.InvocationReport {
	w.t.Helper()
	report, body, err := w.invoke(name, payload)
	if err != nil || body != payload || report.Error != nil {
		w.t.Fatalf("%s(%s) = %q, %+v, %v", name, payload, body, report.Error, err)
	}
	return report
}

// try is must for other goroutines than the test's.
func (w *world) try(name blixard.FunctionName, payload string) {
	if _, body, err := w.invoke(name, payload); err != nil || body != payload {
		w.t.Errorf("%s(%s) = %q, %v", name, payload, body, err)
	}
}

// enter waits for a guest to have a call.
func (w *world) enter() {
	w.t.Helper()
	select {
	case <-w.entered:
	case <-time.After(patience):
		w.t.Fatal("no guest has got a call")
	}
}

func (w *world) status(name blixard.FunctionName) dispatch.VersionStatus {
	for _, s := range w.d.Status().Functions {
		if s.Function == name && !s.Retired {
			return s
		}
	}
	return dispatch.VersionStatus{}
}

// refusal of a call that was refused.
func refusal(t testing.TB, err error) *route.Refused {
	t.Helper()
	var r *route.Refused
	if !errors.As(err, &r) {
		t.Fatalf("%v is no refusal", err)
	}
	if r.Err == nil || r.Err.Message == "" {
		t.Fatalf("the refusal %s has no words", r.Why)
	}
	return r
}

func (w *world) running() []vmm.Ref {
	found, err := w.machine.Open().List(context.Background())
	if err != nil {
		w.t.Fatal(err)
	}
	var refs []vmm.Ref
	for _, s := range found {
		refs = append(refs, s.Ref)
	}
	return refs
}

// peers lets nodes ask each other over HTTP.
func peers(t testing.TB, nodes ...*world) *dispatch.HTTPPeers {
	urls := map[blixard.NodeName]string{}
	for _, n := range nodes {
		srv := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Authorization") != "Bearer secret" {
				http.Error(rw, "no", http.StatusUnauthorized)
				return
			}
			n.d.Handler().ServeHTTP(rw, r)
		}))
		t.Cleanup(srv.Close)
		urls[n.node] = srv.URL
	}
	return &dispatch.HTTPPeers{URL: func(n blixard.NodeName) string { return urls[n] }, Secret: func() string { return "secret" }}
}

// later reaches peers that are made after the nodes.
type later struct{ dispatch.Peers }

func (l *later) Get(ctx context.Context, node blixard.NodeName, path string) (io.ReadCloser, error) {
	return l.Peers.Get(ctx, node, path)
}

func contains(list []string, part string) bool {
	return slices.ContainsFunc(list, func(s string) bool { return strings.Contains(s, part) })
}
