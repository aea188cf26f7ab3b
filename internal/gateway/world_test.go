package gateway_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/gateway"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/state"
)

// cluster is the replicated state in memory, as all nodes see it at once.
type cluster struct {
	t     testing.TB
	mu    sync.Mutex
	s     *state.State
	view  *state.View
	index uint64
	keys  map[string]state.Result
	// refuse, if set, is asked before a command is applied.
	refuse func(state.Command) error
}

func newCluster(t testing.TB, nodes ...blixard.NodeName) *cluster {
	t.Helper()
	c := &cluster{t: t, s: state.New(), keys: map[string]state.Result{}}
	for i, n := range nodes {
		id := state.NodeIdentity{Name: n, Address: string(n) + ":1", Roles: []string{"hypervisor"}}
		if i == 0 {
			c.ok(&state.Bootstrap{ClusterID: "c", RaftID: 1, Node: id, FeatureLevel: blixard.FeatureLevel})
		} else {
			c.ok(&state.JoinNode{Node: id})
		}
		c.ok(&state.ReportNode{
			Name: n, RaftID: uint64(i + 1), Address: id.Address, Capacity: blixard.Resources{MilliCPU: 4000, MemoryMiB: 8192, DiskMiB: 1024},
			Hypervisors: []string{"qemu"}, FeatureLevel: blixard.FeatureLevel,
		})
	}
	return c
}

func (c *cluster) propose(_ context.Context, m state.Command, key string) (state.Outcome, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.refuse != nil {
		if err := c.refuse(m); err != nil {
			return state.Outcome{}, err
		}
	}
	c.index++
	results, _, err := c.s.Apply(c.index, 1, state.EncodeEntry([]state.Envelope{{NowMS: time.Now().UnixMilli(), Key: key, Command: m}}))
	if err != nil {
		c.t.Fatal(err)
	}
	c.view = c.s.View()
	if results[0].Err != nil {
		return state.Outcome{}, results[0].Err
	}
	return results[0].Outcome, nil
}

func (c *cluster) ok(m state.Command) state.Outcome {
	c.t.Helper()
	out, err := c.propose(context.Background(), m, "")
	if err != nil {
		c.t.Fatalf("%T: %v", m, err)
	}
	return out
}

func (c *cluster) View() *state.View {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.view
}

func (c *cluster) setRefuse(f func(state.Command) error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refuse = f
}

// function makes a function that is active.
func (c *cluster) function(name blixard.FunctionName, change ...func(*state.CreateFunction)) {
	c.t.Helper()
	m := &state.CreateFunction{
		Name: name, Spec: blixard.FunctionSpec{Runtime: "bootstrap", Handler: "h"}, CodeDigest: strings.Repeat("a", 64), CodeBytes: 1,
	}
	for _, f := range change {
		f(m)
	}
	m.Spec.Defaults()
	c.ok(m)
	c.built(name, 0)
}

// built has a version's template built.
func (c *cluster) built(name blixard.FunctionName, number int) {
	c.t.Helper()
	v := c.View().FunctionVersion(name, number)
	if v.State == blixard.FunctionActive {
		return
	}
	c.ok(&state.ReportFunction{Function: name, Number: number, Seq: v.Seq, State: blixard.FunctionActive})
}

func limit(n int) func(*state.CreateFunction) {
	return func(m *state.CreateFunction) { m.MaxConcurrent, m.Reserved = n, true }
}

func runtime(name string) func(*state.CreateFunction) {
	return func(m *state.CreateFunction) { m.Spec.Runtime = name }
}

// stub is a dispatcher whose instances are a function of this process.
type stub struct {
	node blixard.NodeName
	mu   sync.Mutex
	load gateway.NodeLoad
	// serve answers calls that are let in.
	serve func(ctx context.Context, inv *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error)
	// refuse, if set, is asked first.
	refuse func(inv *blixard.Invocation, try gateway.Try) *route.Refused
	calls  []blixard.Invocation // that were let in
	tries  []gateway.Try        // all
}

func (s *stub) Invoke(ctx context.Context, inv *blixard.Invocation, try gateway.Try, w blixard.ResponseSink) (blixard.InvocationReport, error) {
	s.mu.Lock()
	s.tries = append(s.tries, try)
	refuse := s.refuse
	s.mu.Unlock()
	if refuse != nil {
		if r := refuse(inv, try); r != nil {
			return blixard.InvocationReport{}, r
		}
	}
	s.mu.Lock()
	kept := *inv
	kept.Payload = append([]byte(nil), inv.Payload...)
	if inv.HTTP != nil {
		head := *inv.HTTP
		head.Headers = append([][2]string(nil), head.Headers...)
		kept.HTTP = &head
	}
	s.calls = append(s.calls, kept)
	serve := s.serve
	s.mu.Unlock()
	report, err := serve(ctx, inv, w)
	report.Node, report.Number = s.node, inv.Number
	if report.Start == "" {
		report.Start = blixard.StartWarm
	}
	return report, err
}

func (s *stub) Load() gateway.NodeLoad {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.load
}

func (s *stub) set(f func(*stub)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(s)
}

func (s *stub) let() []blixard.Invocation {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]blixard.Invocation(nil), s.calls...)
}

func (s *stub) tried() []gateway.Try {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]gateway.Try(nil), s.tries...)
}

// says answers with a payload.
func says(payload string) func(context.Context, *blixard.Invocation, blixard.ResponseSink) (blixard.InvocationReport, error) {
	return func(_ context.Context, _ *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
		return blixard.InvocationReport{}, answer(w, blixard.ResponseHead{}, payload)
	}
}

// echo answers with the payload it got.
func echo(_ context.Context, inv *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
	return blixard.InvocationReport{Parts: blixard.Breakdown{Handler: time.Millisecond}}, answer(w, blixard.ResponseHead{}, string(inv.Payload))
}

// fails answers with a function's error.
func fails(kind string) func(context.Context, *blixard.Invocation, blixard.ResponseSink) (blixard.InvocationReport, error) {
	return func(_ context.Context, _ *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
		err := answer(w, blixard.ResponseHead{}, `{"errorMessage":"no","errorType":"`+kind+`"}`)
		return blixard.InvocationReport{Error: &blixard.FunctionError{Kind: "Unhandled", Type: kind}}, err
	}
}

func answer(w blixard.ResponseSink, h blixard.ResponseHead, parts ...string) error {
	if err := w.Begin(h); err != nil {
		return err
	}
	for _, p := range parts {
		if _, err := w.Write([]byte(p)); err != nil {
			return err
		}
	}
	return nil
}

func refused(why route.Refusal) *route.Refused {
	code := blixard.CodeOverloaded
	if why == route.Unreachable || why == route.Gone {
		code = blixard.CodeUnavailable
	}
	return &route.Refused{Why: why, Err: blixard.Errorf(code, "the stub says %s", why)}
}

// sink keeps an answer.
type sink struct {
	head blixard.ResponseHead
	body []byte
}

func (s *sink) Begin(h blixard.ResponseHead) error {
	s.head = h
	return nil
}

func (s *sink) Write(p []byte) (int, error) {
	s.body = append(s.body, p...)
	return len(p), nil
}

// member is a gateway with its dispatcher and, if it was asked for, a server.
type member struct {
	*gateway.Gateway
	stub   *stub
	server *httptest.Server
}

func (c *cluster) member(node blixard.NodeName, change ...func(*gateway.Options)) *member {
	c.t.Helper()
	m := &member{stub: &stub{node: node, serve: echo}}
	o := gateway.Options{Node: node, View: c.View, Propose: c.propose, Local: m.stub, Domain: "example.test", Region: "us-east-1"}
	for _, f := range change {
		f(&o)
	}
	g, err := gateway.New(o)
	if err != nil {
		c.t.Fatal(err)
	}
	m.Gateway = g
	return m
}

// serve lets other nodes and clients reach the member.
func (c *cluster) serve(m *member) {
	c.t.Helper()
	mux := http.NewServeMux()
	mux.Handle("/peer/v1/gateway/", m.PeerHandler())
	mux.Handle("/", m)
	m.server = httptest.NewServer(mux)
	c.t.Cleanup(m.server.Close)
	n := c.View().Node(m.stub.node)
	c.ok(&state.ReportNode{
		Name: n.Name, RaftID: n.RaftID, Address: strings.TrimPrefix(m.server.URL, "http://"), Capacity: n.Capacity, Hypervisors: n.Hypervisors, FeatureLevel: blixard.FeatureLevel,
	})
}

// run lets the gateway run until the test ends.
func (m *member) run(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// call invokes by name and returns the answer.
func (m *member) call(t testing.TB, name blixard.FunctionName, qualifier, payload string) (string, blixard.InvocationReport, *gateway.Error) {
	t.Helper()
	var s sink
	report, err := m.Invoke(context.Background(), &blixard.Invocation{Function: name, Qualifier: qualifier, Payload: []byte(payload)}, &s)
	if err == nil {
		return string(s.body), report, nil
	}
	e, ok := errors.AsType[*gateway.Error](err)
	if !ok {
		t.Fatalf("the error is no *gateway.Error: %v", err)
	}
	return string(s.body), report, e
}

// eventually waits for what has to become true.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("it did not come to be: %s", what)
		}
		<-tick.C
	}
}
