package gateway_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/gateway"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/state"
)

func TestInvokeHere(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	m := c.member("n1")
	body, report, err := m.call(t, "f", "", `{"a":1}`)
	if err != nil || body != `{"a":1}` || report.Node != "n1" || report.RequestID == "" || report.Parts.Total <= 0 {
		t.Fatalf("%q %+v %v", body, report, err)
	}
	inv := m.stub.let()[0]
	v := c.View().FunctionVersion("f", 0)
	if inv.Seq != v.Seq || inv.Number != 0 || inv.Deadline.Sub(inv.Received) != time.Duration(v.Spec.TimeoutMS)*time.Millisecond+30*time.Second {
		t.Fatalf("the dispatcher got %+v", inv)
	}
	if tries := m.stub.tried(); len(tries) != 1 || tries[0] != (gateway.Try{}) {
		t.Fatalf("a warm call was offered as %+v", tries)
	}
}

func TestUnknownNames(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	m := c.member("n1")
	for _, x := range []struct{ name, qualifier, field string }{{"g", "", "function"}, {"f", "7", "qualifier"}, {"f", "prod", "qualifier"}} {
		_, _, err := m.call(t, blixard.FunctionName(x.name), x.qualifier, "{}")
		if err == nil || err.Status != http.StatusNotFound || err.Err.Field != x.field || err.Handed {
			t.Errorf("%s:%s: %+v", x.name, x.qualifier, err)
		}
	}
}

func TestFreshNames(t *testing.T) {
	c := newCluster(t, "n1")
	old := c.View()
	c.function("f")
	m := c.member("n1", func(o *gateway.Options) {
		o.View = func() *state.View { return old }
		o.Fresh = func(context.Context) (*state.View, error) { return c.View(), nil }
	})
	if _, _, err := m.call(t, "f", "", "{}"); err != nil {
		t.Fatalf("a function that was just made: %v", err)
	}
}

func TestAliasWeights(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	one := int(c.ok(&state.PublishVersion{Name: "f"}).Value)
	c.built("f", one)
	spec := c.View().FunctionVersion("f", 0).Spec
	spec.MemoryMiB *= 2
	c.ok(&state.UpdateFunction{Name: "f", Spec: &spec})
	c.built("f", 0)
	two := int(c.ok(&state.PublishVersion{Name: "f"}).Value)
	c.built("f", two)
	c.ok(&state.SetAlias{Function: "f", Alias: blixard.FunctionAlias{Name: "live", Number: one, Second: two, SecondShare: 250_000}})
	m := c.member("n1")
	seen := map[int]int{}
	for range 2000 {
		_, report, err := m.call(t, "f", "live", "{}")
		if err != nil {
			t.Fatal(err)
		}
		seen[report.Number]++
	}
	if seen[two] < 400 || seen[two] > 600 || seen[one]+seen[two] != 2000 {
		t.Fatalf("of 2000 calls a quarter should go to version %d: %v", two, seen)
	}
}

func TestNotActive(t *testing.T) {
	c := newCluster(t, "n1")
	c.ok(&state.CreateFunction{Name: "f", Spec: spec(), CodeDigest: strings.Repeat("a", 64)})
	m := c.member("n1")
	_, _, err := m.call(t, "f", "", "{}")
	if err == nil || err.Status != http.StatusServiceUnavailable || err.Reason != gateway.ReasonNotActive || err.RetryAfter == 0 {
		t.Fatalf("pending: %+v", err)
	}
	v := c.View().FunctionVersion("f", 0)
	c.ok(&state.ReportFunction{Function: "f", Seq: v.Seq, State: blixard.FunctionFailed, Code: "InvalidCode", Reason: "no bootstrap"})
	_, _, err = m.call(t, "f", "", "{}")
	if err == nil || err.Status != http.StatusBadGateway || !strings.Contains(err.Error(), "no bootstrap") {
		t.Fatalf("failed: %+v", err)
	}
}

// TestUpdateKeepsAnswering: while an update is built the former code answers.
func TestUpdateKeepsAnswering(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	before := c.View().FunctionVersion("f", 0).Seq
	c.ok(&state.UpdateFunction{Name: "f", CodeDigest: strings.Repeat("b", 64), CodeBytes: 2})
	m := c.member("n1")
	if _, _, err := m.call(t, "f", "", "{}"); err != nil {
		t.Fatal(err)
	}
	c.built("f", 0)
	if _, _, err := m.call(t, "f", "", "{}"); err != nil {
		t.Fatal(err)
	}
	calls := m.stub.let()
	if calls[0].Seq != before || calls[1].Seq == before {
		t.Fatalf("sequences %d and %d; the first code is %d", calls[0].Seq, calls[1].Seq, before)
	}
}

func spec() blixard.FunctionSpec {
	s := blixard.FunctionSpec{Runtime: "bootstrap", Handler: "h"}
	s.Defaults()
	return s
}

func TestLimits(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	c.function("zero", limit(0))
	m := c.member("n1", func(o *gateway.Options) { o.Limits.SyncBytes = 100 })
	if _, _, err := m.call(t, "f", "", strings.Repeat("x", 100)); err != nil {
		t.Fatal(err)
	}
	_, _, err := m.call(t, "f", "", strings.Repeat("x", 101))
	if err == nil || err.Status != http.StatusRequestEntityTooLarge {
		t.Fatalf("too large: %+v", err)
	}
	_, _, err = m.call(t, "zero", "", "{}")
	if err == nil || err.Status != http.StatusTooManyRequests || err.Reason != gateway.ReasonReservedConcurrency {
		t.Fatalf("no concurrency: %+v", err)
	}
}

// TestWhatNodesRefuse: each refusal of the one node there is has its answer.
func TestWhatNodesRefuse(t *testing.T) {
	for why, want := range map[route.Refusal]struct {
		status int
		reason string
	}{
		route.NoSlot: {429, gateway.ReasonReservedConcurrency}, route.NoMemory: {429, gateway.ReasonConcurrency}, route.Busy: {429, gateway.ReasonConcurrency},
		route.StartFailed: {502, gateway.ReasonUnavailable}, route.NoLease: {503, gateway.ReasonUnavailable}, route.Draining: {503, gateway.ReasonUnavailable},
		route.Late: {504, gateway.ReasonTimeout},
	} {
		c := newCluster(t, "n1")
		c.function("f")
		m := c.member("n1")
		m.stub.refuse = func(_ *blixard.Invocation, try gateway.Try) *route.Refused {
			if !try.MayStart {
				return refused(route.NoWarm)
			}
			return refused(why)
		}
		_, _, err := m.call(t, "f", "", "{}")
		if err == nil || err.Status != want.status || err.Reason != want.reason || err.Handed {
			t.Errorf("%s: %+v, want %+v", why, err, want)
		}
		if err != nil && err.RetryAfter == 0 {
			t.Errorf("%s does not say when to try again", why)
		}
	}
}

// TestHandedIsNotRepeated: once a guest has the call nobody else gets it.
func TestHandedIsNotRepeated(t *testing.T) {
	c := newCluster(t, "n1", "n2")
	c.function("f")
	one, two := c.member("n1"), c.member("n2")
	c.serve(one)
	c.serve(two)
	one.stub.refuse = func(_ *blixard.Invocation, try gateway.Try) *route.Refused {
		if !try.MayStart {
			return refused(route.NoWarm)
		}
		r := refused(route.Gone)
		r.Handed = true
		return r
	}
	two.stub.refuse = func(*blixard.Invocation, gateway.Try) *route.Refused {
		r := refused(route.Gone)
		r.Handed = true
		return r
	}
	_, _, err := one.call(t, "f", "", "{}")
	if err == nil || err.Status != http.StatusBadGateway || err.Reason != gateway.ReasonNodeLost || !err.Handed {
		t.Fatalf("%+v", err)
	}
	starts := 0
	for _, try := range append(one.stub.tried(), two.stub.tried()...) {
		if try.MayStart {
			starts++
		}
	}
	if starts != 1 {
		t.Fatalf("the call was handed over %d times", starts)
	}
}

// TestOtherNodes: what has no room here is answered elsewhere, with the answer
// and the report as they are, streamed or not.
func TestOtherNodes(t *testing.T) {
	c := newCluster(t, "n1", "n2")
	c.function("f")
	one, two := c.member("n1"), c.member("n2")
	c.serve(one)
	c.serve(two)
	one.stub.refuse = func(*blixard.Invocation, gateway.Try) *route.Refused { return refused(route.NoMemory) }
	two.stub.refuse = func(_ *blixard.Invocation, try gateway.Try) *route.Refused {
		if !try.MayStart {
			return refused(route.NoWarm)
		}
		return nil
	}
	body, report, err := one.call(t, "f", "", `{"far":true}`)
	if err != nil || body != `{"far":true}` || report.Node != "n2" || report.Parts.Handler != time.Millisecond || report.Parts.Transfer <= 0 {
		t.Fatalf("%q %+v %v", body, report, err)
	}
	got, sent := two.stub.let()[0], one.stub.tried()
	if got.RequestID != report.RequestID || time.Until(got.Deadline) <= 0 || len(sent) == 0 {
		t.Fatalf("%+v", got)
	}
	big := strings.Repeat("0123456789abcdef", 400_000)
	body, _, err = one.call(t, "f", "", big[:6<<20])
	if err != nil || body != big[:6<<20] {
		t.Fatalf("6 MiB came back as %d bytes: %v", len(body), err)
	}
	two.stub.set(func(s *stub) { s.serve = fails("Boom") })
	body, report, err = one.call(t, "f", "", "{}")
	if err != nil || report.Error == nil || report.Error.Type != "Boom" || !strings.Contains(body, "Boom") {
		t.Fatalf("%q %+v %v", body, report, err)
	}
}

// TestStreamsAcrossNodes: bytes arrive while the function still writes.
func TestStreamsAcrossNodes(t *testing.T) {
	c := newCluster(t, "n1", "n2")
	c.function("f")
	one, two := c.member("n1"), c.member("n2")
	c.serve(one)
	c.serve(two)
	one.stub.refuse = func(*blixard.Invocation, gateway.Try) *route.Refused { return refused(route.NoMemory) }
	goOn := make(chan struct{})
	two.stub.serve = func(_ context.Context, _ *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
		if err := answer(w, blixard.ResponseHead{Streaming: true, ContentType: "text/plain"}, "one "); err != nil {
			return blixard.InvocationReport{}, err
		}
		<-goOn
		_, err := w.Write([]byte("two"))
		return blixard.InvocationReport{Log: []byte("log")}, err
	}
	seen := make(chan string, 4)
	report, err := one.Invoke(context.Background(), &blixard.Invocation{Function: "f"}, sinkFunc(func(p []byte) {
		seen <- string(p)
		if string(p) == "one " {
			close(goOn) // only now the rest is written
		}
	}))
	if err != nil || string(report.Log) != "log" {
		t.Fatalf("%+v %v", report, err)
	}
	if a, b := <-seen, <-seen; a != "one " || b != "two" {
		t.Fatalf("%q %q", a, b)
	}
}

type sinkFunc func([]byte)

func (f sinkFunc) Begin(blixard.ResponseHead) error { return nil }

func (f sinkFunc) Write(p []byte) (int, error) {
	f(p)
	return len(p), nil
}

// TestNodeDies: a node that is not there is passed over, one that dies with the
// call in hand is said to have died.
func TestNodeDies(t *testing.T) {
	c := newCluster(t, "n1", "n2", "n3")
	c.function("f")
	one, two, three := c.member("n1"), c.member("n2"), c.member("n3")
	c.serve(one)
	c.serve(two)
	c.serve(three)
	one.stub.refuse = func(*blixard.Invocation, gateway.Try) *route.Refused { return refused(route.NoMemory) }
	two.server.Close()
	for range 8 {
		if _, report, err := one.call(t, "f", "", "{}"); err != nil || report.Node != "n3" {
			t.Fatalf("%+v %v", report, err)
		}
	}
	three.stub.set(func(s *stub) {
		s.serve = func(context.Context, *blixard.Invocation, blixard.ResponseSink) (blixard.InvocationReport, error) {
			three.server.CloseClientConnections()
			return blixard.InvocationReport{}, nil
		}
	})
	_, _, err := one.call(t, "f", "", "{}")
	if err == nil || err.Status != http.StatusBadGateway || !err.Handed || err.Reason != gateway.ReasonNodeLost {
		t.Fatalf("%+v", err)
	}
}

func TestDeadline(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f", func(m *state.CreateFunction) { m.Spec.TimeoutMS = 10 })
	m := c.member("n1", func(o *gateway.Options) { o.Limits.Start = time.Millisecond })
	m.stub.serve = func(ctx context.Context, _ *blixard.Invocation, _ blixard.ResponseSink) (blixard.InvocationReport, error) {
		<-ctx.Done()
		return blixard.InvocationReport{}, fmt.Errorf("waiting for a guest: %w", ctx.Err())
	}
	_, _, err := m.call(t, "f", "", "{}")
	if err == nil || err.Status != http.StatusGatewayTimeout || err.Reason != gateway.ReasonTimeout || !err.Handed {
		t.Fatalf("%+v", err)
	}
}

// TestSuperseded: a call follows the code that changes under it.
func TestSuperseded(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	m := c.member("n1")
	old := c.View().FunctionVersion("f", 0).Seq
	var once sync.Once
	m.stub.refuse = func(inv *blixard.Invocation, _ gateway.Try) *route.Refused {
		once.Do(func() {
			c.ok(&state.UpdateFunction{Name: "f", CodeDigest: strings.Repeat("b", 64), CodeBytes: 2})
			c.built("f", 0)
		})
		if inv.Seq == old {
			return refused(route.Superseded)
		}
		return nil
	}
	if _, _, err := m.call(t, "f", "", "{}"); err != nil {
		t.Fatal(err)
	}
}

// TestThousandAtOnce: the limit holds, every caller is answered, nothing is left
// and the next call works.
func TestThousandAtOnce(t *testing.T) {
	c := newCluster(t, "n1", "n2")
	c.function("f", limit(10))
	one, two := c.member("n1"), c.member("n2")
	c.serve(one)
	c.serve(two)
	var mu sync.Mutex
	slots, most := 0, 0
	refuse := func(_ *blixard.Invocation, _ gateway.Try) *route.Refused {
		mu.Lock()
		defer mu.Unlock()
		if slots == 10 {
			return refused(route.NoSlot)
		}
		slots++
		most = max(most, slots)
		return nil
	}
	free := func() {
		mu.Lock()
		defer mu.Unlock()
		slots--
	}
	hold := make(chan struct{})
	serve := func(_ context.Context, inv *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
		defer free()
		<-hold
		return echo(context.Background(), inv, w)
	}
	for _, m := range []*member{one, two} {
		m.stub.set(func(s *stub) { s.refuse, s.serve = refuse, serve })
	}
	var group sync.WaitGroup
	var answered, throttled, else_ int
	for i := range 1000 {
		group.Go(func() {
			m := []*member{one, two}[i%2]
			_, _, err := m.call(t, "f", "", "{}")
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				answered++
			case err.Status == http.StatusTooManyRequests && err.Reason == gateway.ReasonReservedConcurrency && !err.Handed:
				if throttled++; throttled == 990 {
					close(hold)
				}
			default:
				else_++
				t.Errorf("%+v", err)
			}
		})
	}
	group.Wait()
	if answered != 10 || throttled != 990 || most != 10 || slots != 0 {
		t.Fatalf("answered %d, throttled %d, else %d, most %d, left %d", answered, throttled, else_, most, slots)
	}
	if one.Calls()+two.Calls() != 0 {
		t.Fatal("calls are still counted as under way")
	}
	if _, _, err := one.call(t, "f", "", "{}"); err != nil {
		t.Fatal(err)
	}
}

func TestDrain(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	m := c.member("n1")
	begun, hold := make(chan struct{}), make(chan struct{})
	m.stub.serve = func(_ context.Context, inv *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
		close(begun)
		<-hold
		return echo(context.Background(), inv, w)
	}
	first := make(chan *gateway.Error, 1)
	go func() {
		_, _, err := m.call(t, "f", "", "{}")
		first <- err
	}()
	<-begun
	short, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if err := m.Drain(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("it did not wait: %v", err)
	}
	_, _, err := m.call(t, "f", "", "{}")
	if err == nil || err.Reason != gateway.ReasonDraining {
		t.Fatalf("%+v", err)
	}
	drained := make(chan error, 1)
	go func() { drained <- m.Drain(context.Background()) }()
	close(hold)
	if err := <-first; err != nil {
		t.Fatal(err)
	}
	if err := <-drained; err != nil {
		t.Fatal(err)
	}
}
