package gateway_test

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/gateway"
)

// collector is one for traces.
type collector struct {
	mu    sync.Mutex
	spans []traced
	fail  bool
}

type traced struct {
	TraceID, SpanID, ParentSpanID, Name string
	StartTimeUnixNano, EndTimeUnixNano  string
	Kind                                int
	Status                              *struct{ Code int }
	Attributes                          []struct {
		Key   string
		Value struct{ StringValue string }
	}
}

func (c *collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var d struct {
		ResourceSpans []struct {
			ScopeSpans []struct{ Spans []traced }
		}
	}
	b, err := io.ReadAll(r.Body)
	if err == nil {
		err = json.Unmarshal(b, &d)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil || r.URL.Path != "/v1/traces" || r.Header.Get("Content-Type") != "application/json" || c.fail {
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	for _, rs := range d.ResourceSpans {
		for _, ss := range rs.ScopeSpans {
			c.spans = append(c.spans, ss.Spans...)
		}
	}
}

func (c *collector) all() []traced {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]traced(nil), c.spans...)
}

// TestTraces: a call is a span below its caller's, with its parts below it, and
// the function learns of it.
func TestTraces(t *testing.T) {
	to := new(collector)
	s := httptest.NewServer(to)
	defer s.Close()
	c := newCluster(t, "n1")
	c.function("f")
	c.function("web", runtime("http"))
	c.function("off", limit(0))
	m := c.member("n1", func(o *gateway.Options) { o.Traces = gateway.NewTraces(s.URL, 0, "n1", "test", o.Log) })
	m.run(t)
	const trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	ask(t, m, "GET", "/function/f", "", "") // of which nobody asked for a trace
	ask(t, m, "GET", "/function/f", "", "", "Traceparent: 00-"+trace+"-"+parent+"-00")
	ask(t, m, "GET", "/function/f", "", "", "Traceparent: 00-"+trace+"-"+parent+"-01")
	ask(t, m, "GET", "/function/web", "", "", "Traceparent: 00-"+trace+"-"+parent+"-01")
	ask(t, m, "GET", "/function/off", "", "", "X-Amzn-Trace-Id: Root=1-0af76519-16cd43dd8448eb211c80319c;Parent="+parent+";Sampled=1")
	eventually(t, "the spans have come", func() bool { return len(to.all()) == 5 })
	roots := map[string]traced{}
	for _, x := range to.all() {
		if x.TraceID != trace || x.StartTimeUnixNano == "" || x.StartTimeUnixNano > x.EndTimeUnixNano {
			t.Errorf("%+v", x)
		}
		if x.ParentSpanID == parent {
			roots[x.Name] = x
		}
	}
	f, none := roots["invoke f"], roots["invoke off"]
	if len(roots) != 3 || f.Kind != 2 || f.Status != nil || none.Status == nil || none.Status.Code != 2 {
		t.Fatalf("%+v", roots)
	}
	handlers := 0
	for _, x := range to.all() {
		if x.Name == "handler" && (x.ParentSpanID == f.SpanID || x.ParentSpanID == roots["invoke web"].SpanID) {
			handlers++
		}
	}
	if handlers != 2 {
		t.Errorf("%d parts are where they belong: %+v", handlers, to.all())
	}
	calls := m.stub.let()
	if got := calls[2].TraceID; got != "Root=1-0af76519-16cd43dd8448eb211c80319c;Parent="+f.SpanID+";Sampled=1" {
		t.Errorf("the function was told %q", got)
	}
	if !strings.HasPrefix(calls[0].TraceID, "Root=1-") || strings.Contains(calls[0].TraceID, "Sampled=1") {
		t.Errorf("a call that is not traced has %q", calls[0].TraceID)
	}
	found := false
	for _, h := range calls[3].HTTP.Headers {
		found = found || h == [2]string{"Traceparent", "00-" + trace + "-" + roots["invoke web"].SpanID + "-01"}
	}
	if !found {
		t.Errorf("the server in the guest was told %v", calls[3].HTTP.Headers)
	}
}

// TestTracesDoNotHold: a collector that takes nothing costs nothing.
func TestTracesDoNotHold(t *testing.T) {
	to := &collector{fail: true}
	s := httptest.NewServer(to)
	defer s.Close()
	c := newCluster(t, "n1")
	c.function("f")
	m := c.member("n1", func(o *gateway.Options) { o.Traces = gateway.NewTraces(s.URL, 1, "n1", "test", o.Log) })
	for range 10_000 { // more than are kept, and nobody sends them
		if _, err := m.Invoke(t.Context(), &blixard.Invocation{Function: "f"}, nobody{}); err != nil {
			t.Fatal(err)
		}
	}
	m.run(t)
}
