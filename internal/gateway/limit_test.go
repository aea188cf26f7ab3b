package gateway_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/gateway"
	"github.com/blixard/blixard/internal/state"
)

// at invokes as if the request had come at a time, and tells why not.
func (m *member) at(t *testing.T, name blixard.FunctionName, caller string, now time.Time) string {
	t.Helper()
	_, err := m.Invoke(context.Background(), &blixard.Invocation{Function: name, Caller: caller, Received: now}, nobody{})
	if err == nil {
		return ""
	}
	e, ok := errors.AsType[*gateway.Error](err)
	if !ok || e.Status != http.StatusTooManyRequests || e.Handed {
		t.Fatalf("%+v", err)
	}
	return e.Reason
}

func TestFunctionRate(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	c.ok(&state.SetFunction{Name: "f", Limits: &state.LimitsChange{RateLimit: 50}})
	m := c.member("n1")
	now := time.Now()
	let := func(n int) (in int) {
		for range n {
			if why := m.at(t, "f", "", now); why == "" {
				in++
			} else if why != gateway.ReasonRate {
				t.Fatal(why)
			}
		}
		return in
	}
	if in := let(100); in != 50 {
		t.Fatalf("%d of a burst were let in", in)
	}
	now = now.Add(200 * time.Millisecond)
	if in := let(100); in != 10 {
		t.Fatalf("%d were let in after 200 ms", in)
	}
	// A limit that is changed holds at once.
	c.ok(&state.SetFunction{Name: "f", Limits: &state.LimitsChange{}})
	if in := let(100); in != 100 {
		t.Fatalf("%d were let in without a limit", in)
	}
}

func TestCallerRates(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	c.function("g")
	c.ok(&state.SetFunction{Name: "f", Limits: &state.LimitsChange{CallerLimit: 5}})
	m := c.member("n1", func(o *gateway.Options) { o.Limits.CallerRate = 8 })
	now := time.Now()
	count := func(name blixard.FunctionName, caller string) (in int) {
		for range 20 {
			if why := m.at(t, name, caller, now); why == "" {
				in++
			} else if why != gateway.ReasonCallerRate {
				t.Fatal(why)
			}
		}
		return in
	}
	if a, b := count("f", "a"), count("f", "b"); a != 5 || b != 5 {
		t.Fatalf("callers a and b were let in %d and %d times", a, b)
	}
	if n := count("g", "c"); n != 8 {
		t.Fatalf("a caller was let in %d times to a function without limit", n)
	}
	// Who is forgotten for others' sake begins anew; memory is bounded.
	for i := range 50_000 {
		m.at(t, "g", fmt.Sprint("x", i), now)
	}
}

// TestRateIsTheClusters: two nodes that are both called let in what the limit
// says, together.
func TestRateIsTheClusters(t *testing.T) {
	c := newCluster(t, "n1", "n2")
	c.function("f")
	c.ok(&state.SetFunction{Name: "f", Limits: &state.LimitsChange{RateLimit: 200}})
	short := func(o *gateway.Options) { o.Limits.Announce = 20 * time.Millisecond }
	one, two := c.member("n1", short), c.member("n2", short)
	c.serve(one)
	c.serve(two)
	one.run(t)
	two.run(t)
	var mu sync.Mutex
	tried, let := 0, 0
	began := time.Now()
	// The first second has bursts and what nodes do not know of each other yet.
	const from, to = 1500 * time.Millisecond, 3500 * time.Millisecond
	var group sync.WaitGroup
	for _, m := range []*member{one, two} {
		group.Go(func() {
			tick := time.NewTicker(2 * time.Millisecond)
			defer tick.Stop()
			for now := range tick.C {
				if now.Sub(began) > to {
					return
				}
				why := m.at(t, "f", "", now)
				if now.Sub(began) < from {
					continue
				}
				mu.Lock()
				tried++
				if why == "" {
					let++
				}
				mu.Unlock()
			}
		})
	}
	group.Wait()
	want := min(200*int((to-from)/time.Second), tried) // a slow machine makes fewer calls
	if let > want*5/4 || let < want*3/4 {
		t.Errorf("of %d calls %d were let in, want about %d", tried, let, want)
	}
}
