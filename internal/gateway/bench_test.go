package gateway_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/gateway"
)

// quick is a dispatcher that answers at once.
type quick struct{ load gateway.NodeLoad }

var hello = []byte(`{"statusCode":200,"headers":{"Content-Type":"text/plain"},"body":"hello"}`)

func (quick) Invoke(_ context.Context, inv *blixard.Invocation, _ gateway.Try, w blixard.ResponseSink) (blixard.InvocationReport, error) {
	r := blixard.InvocationReport{Node: "n1", Number: inv.Number, Start: blixard.StartWarm, Parts: blixard.Breakdown{Handler: time.Microsecond, Transfer: time.Microsecond}}
	if err := w.Begin(blixard.ResponseHead{}); err != nil {
		return r, err
	}
	_, err := w.Write(hello)
	return r, err
}

func (q quick) Load() gateway.NodeLoad { return q.load }

// BenchmarkWarm is what the gateway adds to a call that is answered at once, with
// clients on the same machine. "direct" is net/http alone with the same answer.
func BenchmarkWarm(b *testing.B) {
	c := newCluster(b, "n1")
	c.function("f")
	c.trigger("f", "t", "/api/{proxy+}", "")
	g := c.member("n1", func(o *gateway.Options) { o.Local = quick{} })
	direct := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return
		}
		w.Header().Set("Content-Type", "text/plain")
		if _, err := w.Write([]byte("hello")); err != nil {
			return
		}
	})
	for _, x := range []struct {
		name string
		h    http.Handler
	}{{"direct", direct}, {"gateway", g}} {
		for _, conns := range []int{1, 16} {
			b.Run(fmt.Sprintf("%s/conns=%d", x.name, conns), func(b *testing.B) { hammer(b, x.h, conns) })
		}
	}
}

// hammer sends b.N requests over so many connections, with a client that costs
// little, and reports the median and the 99th percentile.
func hammer(b *testing.B, h http.Handler, conns int) {
	s := httptest.NewServer(h)
	defer s.Close()
	b.ReportAllocs()
	var left atomic.Int64
	left.Store(int64(b.N))
	times := make([][]time.Duration, conns)
	var group sync.WaitGroup
	b.ResetTimer()
	began := time.Now()
	for i := range conns {
		group.Go(func() {
			conn, err := net.Dial("tcp", strings.TrimPrefix(s.URL, "http://"))
			if err != nil {
				b.Error(err)
				return
			}
			defer conn.Close()
			r := bufio.NewReader(conn)
			req := []byte("POST /api/x?y=1 HTTP/1.1\r\nHost: localhost:8080\r\nUser-Agent: bench\r\nAccept: */*\r\nContent-Type: application/json\r\nContent-Length: 11\r\n\r\n{\"name\":\"\"}")
			for left.Add(-1) >= 0 {
				at := time.Now()
				if _, err := conn.Write(req); err != nil {
					b.Error(err)
					return
				}
				if err := skipAnswer(r); err != nil {
					b.Error(err)
					return
				}
				times[i] = append(times[i], time.Since(at))
			}
		})
	}
	group.Wait()
	took := time.Since(began)
	b.StopTimer()
	all := slices.Concat(times...)
	slices.Sort(all)
	if len(all) > 0 {
		b.ReportMetric(float64(all[len(all)/2].Nanoseconds())/1e3, "p50-µs")
		b.ReportMetric(float64(all[len(all)*99/100].Nanoseconds())/1e3, "p99-µs")
		b.ReportMetric(float64(len(all))/took.Seconds(), "calls/s")
	}
}

// skipAnswer reads a 200 whose body is "hello".
func skipAnswer(r *bufio.Reader) error {
	line, err := r.ReadSlice('\n')
	if err != nil {
		return err
	}
	if !strings.HasPrefix(string(line), "HTTP/1.1 200") {
		return fmt.Errorf("the answer is %q", line)
	}
	for len(line) > 2 {
		if line, err = r.ReadSlice('\n'); err != nil {
			return err
		}
	}
	_, err = r.Discard(5)
	return err
}

// nobody takes an answer.
type nobody struct{}

func (nobody) Begin(blixard.ResponseHead) error { return nil }

func (nobody) Write(p []byte) (int, error) { return len(p), nil }

// BenchmarkInvoke is the gateway without HTTP.
func BenchmarkInvoke(b *testing.B) {
	c := newCluster(b, "n1")
	c.function("f")
	g := c.member("n1", func(o *gateway.Options) { o.Local = quick{} })
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			inv := blixard.Invocation{Function: "f"}
			if _, err := g.Invoke(context.Background(), &inv, nobody{}); err != nil {
				b.Fatal(err)
			}
		}
	})
}
