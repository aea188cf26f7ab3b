package api_test

import (
	"bufio"
	"context"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
	"github.com/blixard/blixard/internal/state"
)

// sseEvent is one server-sent event.
type sseEvent struct{ id, event, data string }

// sse opens a stream of events; next returns one after the other.
func (s *site) sse(ctx context.Context, path string, headers ...string) (next func() sseEvent, end func()) {
	s.t.Helper()
	req, err := http.NewRequestWithContext(ctx, "GET", s.urls["node1"]+path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	for i := 0; i+1 < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	if ct := resp.Header.Get("Content-Type"); ct != "text/event-stream" {
		s.t.Fatalf("%s, %s", resp.Status, ct)
	}
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, 1<<20)
	return func() sseEvent {
		s.t.Helper()
		var e sseEvent
		for lines.Scan() {
			name, value, _ := strings.Cut(lines.Text(), ": ")
			switch name {
			case "id":
				e.id = value
			case "event":
				e.event = value
			case "data":
				e.data = value
			case "":
				if e.event != "" {
					return e
				}
			}
		}
		s.t.Fatalf("the stream ended: %v", lines.Err())
		return e
	}, func() { resp.Body.Close() }
}

func TestServerSentEventsResume(t *testing.T) {
	s := newSite(t, 1)
	s.create("old", 1)
	next, end := s.sse(short(t), "/v1/watch?kinds=vm,event")
	if e := next(); e.event != "ready" || e.id == "" {
		t.Fatalf("first came %+v", e)
	}
	s.create("one", 1)
	vm, event := next(), next()
	if vm.event != "changed" || !strings.Contains(vm.data, `"kind":"vm"`) || !strings.Contains(vm.data, `"name":"one"`) {
		t.Errorf("got %+v", vm)
	}
	if vm.id != "" || event.id == "" {
		t.Errorf("only the last change of an index carries its id: %q, %q", vm.id, event.id)
	}
	end()

	// What happened meanwhile comes first, and nothing twice.
	s.create("two", 1)
	s.create("three", 1)
	next, end = s.sse(short(t), "/v1/watch?kinds=vm,event", "Last-Event-ID", event.id)
	defer end()
	if e := next(); e.event != "ready" || e.id != event.id {
		t.Fatalf("first came %+v", e)
	}
	var names []string
	for len(names) < 2 {
		if e := next(); strings.Contains(e.data, `"kind":"vm"`) {
			_, rest, _ := strings.Cut(e.data, `"name":"`)
			name, _, _ := strings.Cut(rest, `"`)
			names = append(names, name)
		}
	}
	if !slices.Equal(names, []string{"two", "three"}) {
		t.Errorf("got %v", names)
	}
}

func TestServerSentEventsThatAreGone(t *testing.T) {
	s := newSite(t, 1)
	s.create("one", 1)
	s.cluster.Forget()
	resp, body := s.do("GET", "/v1/watch?from=1", "")
	if resp.StatusCode != http.StatusGone || !strings.Contains(body, `"code":"gone"`) {
		t.Errorf("%s %s", resp.Status, body)
	}
	// A stream that falls behind is told at its end.
	next, end := s.sse(short(t), "/v1/watch?kinds=vm")
	defer end()
	next()
	s.cluster.Must(&state.SetMaintenance{On: true})
	s.cluster.Must(&state.SetMaintenance{On: false})
	s.cluster.Forget()
	s.create("two", 1)
	for {
		e := next()
		if e.event == "error" && strings.Contains(e.data, `"status":410`) {
			return
		}
		if e.event == "changed" { // it was faster than the forgetting
			return
		}
	}
}

// An index that the cluster has not reached is of another cluster, or of before
// a recovery: whoever waited for it would miss everything until then.
func TestServerSentEventsOfTheFuture(t *testing.T) {
	s := newSite(t, 1)
	s.create("one", 1)
	resp, body := s.do("GET", "/v1/watch?from=999999999", "")
	if resp.StatusCode != http.StatusGone || !strings.Contains(body, "before 999999999") {
		t.Errorf("%s %s", resp.Status, body)
	}
}

// collector watches in a goroutine and hands messages on.
func collect(ctx context.Context, c *client.Client, req *blixardv1.WatchRequest) <-chan *blixardv1.WatchResponse {
	out := make(chan *blixardv1.WatchResponse, 1000)
	go func() {
		defer close(out)
		for m, err := range c.Watch(ctx, req) {
			if err != nil {
				return
			}
			out <- m
		}
	}()
	return out
}

func await(t *testing.T, in <-chan *blixardv1.WatchResponse, what string, until func(*blixardv1.WatchResponse) bool) []*blixardv1.WatchResponse {
	t.Helper()
	var seen []*blixardv1.WatchResponse
	ctx := short(t)
	for {
		select {
		case m, ok := <-in:
			if !ok {
				t.Fatalf("the watch ended before %s; saw %v", what, seen)
			}
			seen = append(seen, m)
			if until(m) {
				return seen
			}
		case <-ctx.Done():
			t.Fatalf("no %s; saw %v", what, seen)
		}
	}
}

func isType(kind string) func(*blixardv1.WatchResponse) bool {
	return func(m *blixardv1.WatchResponse) bool { return m.Type == kind }
}

func isVM(name string) func(*blixardv1.WatchResponse) bool {
	return func(m *blixardv1.WatchResponse) bool { return m.GetVm().GetName() == name }
}

func TestWatchSnapshotThenChanges(t *testing.T) {
	s := newSite(t, 1)
	s.create("a", 1)
	s.create("b", 1)
	s.cluster.Run("a", 1, "node1", blixard.Running)
	ctx, cancel := context.WithCancel(t.Context())
	in := collect(ctx, s.client(), &blixardv1.WatchRequest{Kinds: []string{"vm", "instance"}, Snapshot: true})
	seen := await(t, in, "ready", isType("ready"))
	if len(seen) != 4 || seen[0].GetVm().GetName() != "a" || seen[2].GetInstance().GetId() != "a-1" {
		t.Errorf("got %v", seen)
	}
	s.cluster.Must(&state.DeleteVM{Name: "b"})
	deleted := await(t, in, "deletion", isType("deleted"))
	if last := deleted[len(deleted)-1]; last.GetVm().GetName() != "b" {
		t.Errorf("got %v", deleted)
	}
	cancel()
	for range in { // until it is closed
	}
}

// TestWatchOfAll: who watches all kinds is told of what there are messages for.
func TestWatchOfAll(t *testing.T) {
	s := newSite(t, 1)
	in := collect(t.Context(), s.client(), &blixardv1.WatchRequest{})
	await(t, in, "ready", isType("ready"))
	var f blixard.FunctionSpec
	f.Defaults()
	s.cluster.Must(&state.CreateFunction{Name: "f", Spec: f, CodeDigest: strings.Repeat("0", 64)})
	s.create("a", 1)
	created := false
	for _, m := range await(t, in, "a", isVM("a")) {
		created = created || m.GetEvent().GetKind() == "FunctionCreated"
		if m.Object == nil {
			t.Errorf("a message without an object: %v", m)
		}
	}
	if !created {
		t.Error("nobody was told of the function")
	}
}

func TestWatchGoesOnAtAnotherNode(t *testing.T) {
	s := newSite(t, 3)
	in := collect(t.Context(), s.client("node1", "node2", "node3"), &blixardv1.WatchRequest{Kinds: []string{"vm"}})
	await(t, in, "ready", isType("ready"))
	s.create("one", 1)
	await(t, in, "one", isVM("one"))
	if err := s.servers["node1"].Close(); err != nil {
		t.Fatal(err)
	}
	// Changes while nobody is connected, several to an index.
	for _, name := range []string{"two", "three", "four"} {
		s.cluster.Must(&state.Batch{Commands: []state.Command{
			&state.CreateVM{Name: blixard.VMName(name), Spec: spec()}, &state.CreateVM{Name: blixard.VMName(name + "-b"), Spec: spec()},
		}})
	}
	var names []string
	for _, m := range await(t, in, "four-b", isVM("four-b")) {
		if m.Type != "changed" {
			t.Errorf("an unasked %s", m.Type)
		}
		names = append(names, m.GetVm().GetName())
	}
	if want := []string{"two", "two-b", "three", "three-b", "four", "four-b"}; !slices.Equal(names, want) {
		t.Errorf("got %v, want %v", names, want)
	}
}

func spec() blixard.VMSpec {
	var s blixard.VMSpec
	s.Replicas = 1
	s.Defaults()
	return s
}

func TestWatchTellsWhenItHadToListAgain(t *testing.T) {
	s := newSite(t, 2)
	in := collect(t.Context(), s.client("node1", "node2"), &blixardv1.WatchRequest{Kinds: []string{"vm"}})
	await(t, in, "ready", isType("ready"))
	s.create("kept", 1)
	await(t, in, "kept", isVM("kept"))
	if err := s.servers["node1"].Close(); err != nil {
		t.Fatal(err)
	}
	s.cluster.Must(&state.CreateVM{Name: "missed", Spec: spec()})
	s.cluster.Forget()
	seen := await(t, in, "ready again", isType("ready"))
	var types []string
	for _, m := range seen {
		types = append(types, m.Type+m.GetVm().GetName())
	}
	// It may have been fast enough to see the change itself.
	if want := []string{"reset", "existingkept", "existingmissed", "ready"}; !slices.Equal(types, want) && !slices.Contains(types, "changedmissed") {
		t.Errorf("got %v, want %v", types, want)
	}
}

func TestWatchOfAnOldIndexThroughTheClient(t *testing.T) {
	s := newSite(t, 1)
	var from uint64
	for i := range 5 {
		s.create("vm"+strconv.Itoa(i), 1)
		if i == 2 {
			from = s.cluster.View().Index
		}
	}
	in := collect(t.Context(), s.client(), &blixardv1.WatchRequest{Kinds: []string{"vms"}, From: from})
	seen := await(t, in, "vm4", isVM("vm4"))
	if len(seen) != 3 || seen[1].GetVm().GetName() != "vm3" {
		t.Errorf("got %v", seen)
	}
	for _, err := range s.client().Watch(short(t), &blixardv1.WatchRequest{Kinds: []string{"cow"}}) {
		wantCode(t, err, blixard.CodeInvalid)
	}
}

func TestWaitVM(t *testing.T) {
	s := newSite(t, 2)
	s.create("web", 2)
	progress := make(chan string, 100)
	done := make(chan error, 1)
	go func() {
		vm, err := s.client("node2").WaitVM(short(t), "web", client.Running, func(vm *blixardv1.VM) { progress <- vm.GetPhase() })
		if err == nil && len(vm.Instances) != 2 {
			err = blixard.Errorf(blixard.CodeInternal, "%d instances", len(vm.Instances))
		}
		done <- err
	}()
	if p := <-progress; p != "Pending" {
		t.Errorf("first it is %s", p)
	}
	s.cluster.Run("web", 1, "node1", blixard.Running)
	s.cluster.Run("web", 2, "node2", blixard.Running)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	vm, err := s.client().WaitVM(ctx, "web", client.Gone, nil)
	if err == nil {
		t.Errorf("it is gone: %v", vm)
	}
	go s.cluster.Must(&state.DeleteVM{Name: "web"})
	vm, err = s.client().WaitVM(short(t), "web", func(vm *blixardv1.VM) bool { return vm == nil || vm.Deleting }, nil)
	if err != nil || vm != nil && vm.Phase != "Deleting" {
		t.Errorf("%v, %v", vm, err)
	}
}
