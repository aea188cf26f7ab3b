package gateway_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/gateway"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/state"
)

// attempts notes when calls came.
type attempts struct {
	mu    sync.Mutex
	began time.Time
	at    []time.Duration
	ids   []string
}

func (a *attempts) note(inv *blixard.Invocation) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.at = append(a.at, time.Since(a.began).Round(100*time.Millisecond))
	a.ids = append(a.ids, inv.RequestID)
	return len(a.at)
}

func (a *attempts) times() []time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]time.Duration(nil), a.at...)
}

// later runs a test on a fake clock, with a gateway that runs.
func later(t *testing.T, body func(t *testing.T, c *cluster, m *member, a *attempts)) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "n1")
		c.function("f")
		m := c.member("n1")
		m.run(t)
		body(t, c, m, &attempts{began: time.Now()})
	})
}

// pass lets time pass on the fake clock.
func pass(d time.Duration) { <-time.After(d) }

func (m *member) enqueue(t *testing.T, name blixard.FunctionName, payload string) string {
	t.Helper()
	inv := &blixard.Invocation{Function: name, Payload: []byte(payload), TraceID: "Root=1-x"}
	if err := m.Enqueue(t.Context(), inv); err != nil {
		t.Fatal(err)
	}
	return inv.RequestID
}

func (c *cluster) async(name blixard.FunctionName, conf blixard.AsyncConfig) {
	c.t.Helper()
	conf.Qualifier = blixard.Latest
	if conf.MaxAgeMS == 0 {
		conf.MaxAgeMS = blixard.DefaultMaxEventAgeMS
	}
	c.ok(&state.SetFunction{Name: name, Async: &conf})
}

func TestAsyncSuccess(t *testing.T) {
	later(t, func(t *testing.T, c *cluster, m *member, a *attempts) {
		m.stub.set(func(s *stub) {
			s.serve = func(ctx context.Context, inv *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
				a.note(inv)
				return echo(ctx, inv, w)
			}
		})
		id := m.enqueue(t, "f", `{"a":1}`)
		pass(time.Second)
		if got := m.stub.let(); len(got) != 1 || got[0].RequestID != id || string(got[0].Payload) != `{"a":1}` || got[0].TraceID != "Root=1-x" {
			t.Fatalf("%+v", got)
		}
		if c.View().AsyncEvent(id) != nil {
			t.Fatal("the event is still there")
		}
		if at := a.times()[0]; at > 10*time.Millisecond {
			t.Fatalf("the attempt came after %v", at)
		}
	})
}

// TestAsyncFunctionErrors: two retries, after one and two more minutes, under
// one request ID, and then the end.
func TestAsyncFunctionErrors(t *testing.T) {
	later(t, func(t *testing.T, c *cluster, m *member, a *attempts) {
		m.stub.set(func(s *stub) {
			s.serve = func(ctx context.Context, inv *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
				a.note(inv)
				return fails("Boom")(ctx, inv, w)
			}
		})
		id := m.enqueue(t, "f", `{"a":1}`)
		pass(10 * time.Minute)
		want := []time.Duration{0, time.Minute, 3 * time.Minute}
		if got := a.times(); !reflect.DeepEqual(got, want) {
			t.Fatalf("attempts at %v, want %v", got, want)
		}
		for _, got := range a.ids {
			if got != id {
				t.Fatalf("request IDs %v, want all %s", a.ids, id)
			}
		}
		e := c.View().AsyncEvent(id)
		if e == nil || !e.Dead || e.Condition != state.ConditionRetriesExhausted || e.Attempts != 3 || !strings.Contains(e.LastError, "Boom") {
			t.Fatalf("%+v", e)
		}
		// Replay: as if it had been accepted now.
		m.stub.set(func(s *stub) { s.serve = echo })
		c.ok(&state.ReplayEvent{ID: id, Node: "n1", NodeEpoch: c.View().Node("n1").Epoch})
		pass(time.Second)
		if c.View().AsyncEvent(id) != nil {
			t.Fatal("the replayed event is still there")
		}
	})
}

func TestAsyncRetriesConfigured(t *testing.T) {
	later(t, func(t *testing.T, c *cluster, m *member, a *attempts) {
		c.async("f", blixard.AsyncConfig{MaxRetries: 0})
		m.stub.set(func(s *stub) {
			s.serve = func(ctx context.Context, inv *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
				a.note(inv)
				return fails("Boom")(ctx, inv, w)
			}
		})
		m.enqueue(t, "f", "{}")
		pass(time.Hour)
		if n := len(a.times()); n != 1 {
			t.Fatalf("%d attempts", n)
		}
	})
}

// TestAsyncThrottled: back-off from one second to five minutes, not counted as
// retries, until the event is too old.
func TestAsyncThrottled(t *testing.T) {
	later(t, func(t *testing.T, c *cluster, m *member, a *attempts) {
		c.async("f", blixard.AsyncConfig{MaxRetries: 2, MaxAgeMS: 3_600_000})
		m.stub.set(func(s *stub) {
			s.refuse = func(inv *blixard.Invocation, try gateway.Try) *route.Refused {
				if try.MayWait {
					a.note(inv)
				}
				return refused(route.NoMemory)
			}
		})
		id := m.enqueue(t, "f", "{}")
		pass(2 * time.Hour)
		at := a.times()
		want := []time.Duration{1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300}
		for i, d := range want {
			if got := (at[i+1] - at[i]).Round(time.Second); got != d*time.Second {
				t.Fatalf("back-off %d is %v, want %v (%v)", i, got, d*time.Second, at)
			}
		}
		if last := at[len(at)-1]; last > time.Hour || last < 50*time.Minute {
			t.Fatalf("the last attempt was at %v", last)
		}
		e := c.View().AsyncEvent(id)
		if e == nil || !e.Dead || e.Condition != state.ConditionEventAgeExceeded || e.Attempts != 0 {
			t.Fatalf("%+v", e)
		}
	})
}

// TestAsyncZeroConcurrency: straight to the failure destination.
func TestAsyncZeroConcurrency(t *testing.T) {
	later(t, func(t *testing.T, c *cluster, m *member, _ *attempts) {
		c.function("off", limit(0))
		c.function("after")
		c.async("off", blixard.AsyncConfig{OnFailure: "after"})
		id := m.enqueue(t, "off", `{"a":1}`)
		pass(time.Second)
		got := m.stub.let()
		if len(got) != 1 || got[0].Function != "after" || c.View().AsyncEvent(id) != nil {
			t.Fatalf("%+v", got)
		}
		var r struct {
			RequestContext struct {
				Condition              string
				ApproximateInvokeCount int
			}
			ResponseContext *struct{}
		}
		if err := json.Unmarshal(got[0].Payload, &r); err != nil || r.RequestContext.Condition != "ZeroReservedConcurrency" || r.ResponseContext != nil {
			t.Fatalf("%s %v", got[0].Payload, err)
		}
	})
}

// TestDestinations compares the records.
func TestDestinations(t *testing.T) {
	later(t, func(t *testing.T, c *cluster, m *member, _ *attempts) {
		c.function("good")
		c.function("bad")
		c.async("f", blixard.AsyncConfig{MaxRetries: 1, OnSuccess: "arn:aws:lambda:us-east-1:000000000000:function:good", OnFailure: "bad"})
		m.stub.set(func(s *stub) {
			s.serve = func(ctx context.Context, inv *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
				if inv.Function == "f" && strings.Contains(string(inv.Payload), "fail") {
					return fails("Boom")(ctx, inv, w)
				}
				return says(`{"done":true}`)(ctx, inv, w)
			}
		})
		check := func(id, to, condition string, count int, response map[string]any, payload any, request any) {
			t.Helper()
			calls := m.stub.let()
			last := calls[len(calls)-1]
			var got map[string]any
			if err := json.Unmarshal(last.Payload, &got); err != nil {
				t.Fatalf("%v in %s", err, last.Payload)
			}
			if at, err := time.Parse("2006-01-02T15:04:05.000Z", got["timestamp"].(string)); err != nil || time.Since(at) > time.Hour {
				t.Errorf("timestamp %v", got["timestamp"])
			}
			delete(got, "timestamp")
			want := map[string]any{
				"version": "1.0", "requestPayload": request, "responseContext": response, "responsePayload": payload,
				"requestContext": map[string]any{
					"requestId": id, "functionArn": "arn:aws:lambda:us-east-1:000000000000:function:f:$LATEST", "condition": condition, "approximateInvokeCount": float64(count),
				},
			}
			if string(last.Function) != to || last.RequestID == id || !reflect.DeepEqual(got, want) {
				t.Errorf("%s got\n%v\nwant\n%v", last.Function, got, want)
			}
		}
		id := m.enqueue(t, "f", `{"a":1}`)
		pass(time.Minute)
		check(id, "good", "Success", 1, map[string]any{"statusCode": 200.0, "executedVersion": "$LATEST"}, map[string]any{"done": true}, map[string]any{"a": 1.0})
		id = m.enqueue(t, "f", `fail, and no JSON`)
		pass(5 * time.Minute)
		check(id, "bad", "RetriesExhausted", 2, map[string]any{"statusCode": 200.0, "executedVersion": "$LATEST", "functionError": "Unhandled"},
			map[string]any{"errorMessage": "no", "errorType": "Boom"}, "fail, and no JSON")
		if load := c.View().AsyncLoad(); load.Events != 0 || load.Dead != 0 {
			t.Fatalf("left over: %+v", load)
		}
	})
}

// TestDestinationTooLarge: the record leaves out what makes it too large.
func TestDestinationTooLarge(t *testing.T) {
	later(t, func(t *testing.T, c *cluster, m *member, _ *attempts) {
		c.function("good")
		c.async("f", blixard.AsyncConfig{OnSuccess: "good"})
		m.stub.set(func(s *stub) {
			s.serve = func(ctx context.Context, inv *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
				return says(`"`+strings.Repeat("x", 2_100_000)+`"`)(ctx, inv, w)
			}
		})
		m.enqueue(t, "f", `"kept"`)
		pass(time.Second)
		calls := m.stub.let()
		var r map[string]any
		if err := json.Unmarshal(calls[len(calls)-1].Payload, &r); err != nil || len(calls) != 2 || r["requestPayload"] != "kept" || r["responsePayload"] != nil {
			t.Fatalf("%d calls, %v", len(calls), r)
		}
	})
}

// TestAsyncRestart: what was accepted is attempted by the gateway that comes
// after, also what was under way.
func TestAsyncRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "n1")
		c.function("f")
		first := c.member("n1")
		begun := make(chan struct{})
		first.stub.serve = func(ctx context.Context, _ *blixard.Invocation, _ blixard.ResponseSink) (blixard.InvocationReport, error) {
			close(begun)
			<-ctx.Done()
			return blixard.InvocationReport{}, fmt.Errorf("the daemon ends: %w", ctx.Err())
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- first.Run(ctx) }()
		inv := &blixard.Invocation{Function: "f", Payload: []byte("{}")}
		if err := first.Enqueue(t.Context(), inv); err != nil {
			t.Fatal(err)
		}
		<-begun
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if e := c.View().AsyncEvent(inv.RequestID); e == nil || e.Dead || e.Tries != 0 {
			t.Fatalf("%+v", e)
		}
		second := c.member("n1")
		second.run(t)
		pass(time.Second)
		if got := second.stub.let(); len(got) != 1 || got[0].RequestID != inv.RequestID || c.View().AsyncEvent(inv.RequestID) != nil {
			t.Fatalf("%+v", got)
		}
	})
}

// TestAsyncNoLeader: an attempt is not repeated because its settlement has to
// wait.
func TestAsyncNoLeader(t *testing.T) {
	later(t, func(t *testing.T, c *cluster, m *member, a *attempts) {
		m.stub.set(func(s *stub) {
			s.serve = func(ctx context.Context, inv *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
				a.note(inv)
				return echo(ctx, inv, w)
			}
		})
		c.setRefuse(func(cmd state.Command) error {
			if _, ok := cmd.(*state.SettleEvent); ok {
				return blixard.Errorf(blixard.CodeUnavailable, "there is no leader")
			}
			return nil
		})
		id := m.enqueue(t, "f", "{}")
		pass(time.Minute)
		if c.View().AsyncEvent(id) == nil {
			t.Fatal("the event is gone")
		}
		c.setRefuse(nil)
		pass(2 * time.Second)
		if n := len(a.times()); n != 1 || c.View().AsyncEvent(id) != nil {
			t.Fatalf("%d attempts", n)
		}
	})
}

// TestAsyncManyOfOne: of a function of limit 3 no more than 3 are attempted at
// once, none is throttled, and all get their turn.
func TestAsyncManyOfOne(t *testing.T) {
	later(t, func(t *testing.T, c *cluster, m *member, a *attempts) {
		c.function("slow", limit(3))
		var mu sync.Mutex
		now, most := 0, 0
		m.stub.set(func(s *stub) {
			s.serve = func(ctx context.Context, inv *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
				mu.Lock()
				now++
				most = max(most, now)
				mu.Unlock()
				pass(time.Second)
				mu.Lock()
				now--
				mu.Unlock()
				a.note(inv)
				return echo(ctx, inv, w)
			}
		})
		for range 30 {
			m.enqueue(t, "slow", "{}")
		}
		pass(11 * time.Second)
		if n := len(a.times()); n != 30 || most != 3 || c.View().AsyncLoad().Events != 0 {
			t.Fatalf("%d of 30 were attempted, %d at once, %+v left", n, most, c.View().AsyncLoad())
		}
	})
}

func TestEnqueueRefuses(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	m := c.member("n1")
	for _, x := range []struct {
		name    blixard.FunctionName
		payload int
		status  int
	}{{"none", 2, http.StatusNotFound}, {"f", 1<<20 + 1, http.StatusRequestEntityTooLarge}} {
		err := m.Enqueue(t.Context(), &blixard.Invocation{Function: x.name, Payload: make([]byte, x.payload)})
		if e, ok := errors.AsType[*gateway.Error](err); !ok || e.Status != x.status {
			t.Errorf("%s: %v", x.name, err)
		}
	}
	c.setRefuse(func(state.Command) error { return blixard.Errorf(blixard.CodeUnavailable, "there is no leader") })
	err := m.Enqueue(t.Context(), &blixard.Invocation{Function: "f"})
	if e, ok := errors.AsType[*gateway.Error](err); !ok || e.Status != http.StatusServiceUnavailable {
		t.Fatalf("accepted though it was not committed: %v", err)
	}
}

// TestEnqueueOverHTTP: 202 after it is committed, and the http runtime gets its
// request later as it was.
func TestEnqueueOverHTTP(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("web", runtime("http"))
	m := c.member("n1")
	got := ask(t, m, "PUT", "/function/web/x?y=1", "", "body", "X-Amz-Invocation-Type: Event", "X-A: 1")
	id := got.header.Get("X-Amzn-Requestid")
	if got.status != http.StatusAccepted || c.View().AsyncEvent(id) == nil || len(m.stub.let()) != 0 {
		t.Fatalf("%+v", got)
	}
	m.run(t)
	eventually(t, "the call is made", func() bool { return len(m.stub.let()) == 1 })
	inv := m.stub.let()[0]
	if inv.RequestID != id || string(inv.Payload) != "body" || inv.HTTP == nil || inv.HTTP.Method != "PUT" || inv.HTTP.Target != "/x?y=1" {
		t.Fatalf("%+v", inv)
	}
}

// TestAsyncOwnersDisagree: an owner that no longer is one says that its attempt
// failed and is refused; that must not keep the next owner's success, with as many
// tries before it, from being recorded.
func TestAsyncOwnersDisagree(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "n1", "n2")
		c.function("f")
		m1, m2 := c.member("n1"), c.member("n2")
		epoch := func(n blixard.NodeName) uint64 { return c.View().Node(n).Epoch }
		m1.stub.set(func(s *stub) {
			s.serve = func(ctx context.Context, inv *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
				c.ok(&state.TakeEvents{From: "n1", FromEpoch: epoch("n1"), Node: "n2", NodeEpoch: epoch("n2"), Most: 1})
				return fails("Boom")(ctx, inv, w)
			}
		})
		a := &attempts{began: time.Now()}
		m2.stub.set(func(s *stub) {
			s.serve = func(ctx context.Context, inv *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
				a.note(inv)
				pass(100 * time.Millisecond) // the former owner's settlement comes first
				return echo(ctx, inv, w)
			}
		})
		m1.run(t)
		m2.run(t)
		id := m1.enqueue(t, "f", "{}")
		pass(10 * time.Second)
		if e := c.View().AsyncEvent(id); e != nil || len(a.times()) != 1 {
			t.Fatalf("the event is %+v after %d attempts of its new owner", e, len(a.times()))
		}
	})
}
