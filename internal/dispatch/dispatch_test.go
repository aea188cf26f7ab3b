package dispatch_test

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/dispatch"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/state"
	"github.com/blixard/blixard/internal/vmm"
	"github.com/blixard/blixard/internal/vmm/fake"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("net/http.(*persistConn).readLoop"), goleak.IgnoreAnyFunction("net/http.(*persistConn).writeLoop"))
}

func TestColdThenWarm(t *testing.T) {
	w := newWorld(t, nil)
	if fv := w.deploy("f", 10, nil); fv.State != blixard.FunctionActive {
		t.Fatalf("%s: %s", fv.State, fv.StateReason)
	}
	w.until("a clone ahead", func() bool { return w.status("f").Pooled == 1 })
	cold := w.must("f", "echo one")
	if cold.Start != blixard.StartPooled || cold.Parts.Restore == 0 || cold.Parts.Commit == 0 || cold.Parts.Handler != time.Millisecond {
		t.Errorf("the first call: %+v", cold)
	}
	warm := w.must("f", "echo")
	if warm.Start != blixard.StartWarm || warm.Instance != cold.Instance || warm.Parts.Restore != 0 {
		t.Errorf("the second call: %+v", warm)
	}
	if tail := string(warm.Log); !strings.Contains(tail, "START RequestId: "+warm.RequestID+" Version: $LATEST\n") || !strings.Contains(tail, "REPORT RequestId: "+warm.RequestID+"\tDuration: 1.00 ms\tBilled Duration: 1 ms\tMemory Size: 128 MB\tMax Memory Used: 20 MB\n") {
		t.Errorf("the log of a call: %q", tail)
	}
	m, ok := w.d.Metrics("f")
	if !ok || m.Pooled != 1 || m.Warm != 1 || m.Instances != 1 || len(m.Recent) != 2 || m.HourInvocations != 2 {
		t.Errorf("metrics: %+v", m)
	}
}

func TestLimitIsExact(t *testing.T) {
	const limit, callers = 10, 1000
	w := newWorld(t, nil)
	w.deploy("f", limit, nil)
	var calls sync.WaitGroup
	var mu sync.Mutex
	counts := map[route.Refusal]int{}
	for range callers {
		calls.Go(func() {
			_, _, err := w.invoke("f", "gate")
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				counts[""]++
			} else {
				counts[refusal(t, err).Why]++
			}
		})
	}
	for range limit {
		w.enter()
	}
	w.until("refusals", func() bool { mu.Lock(); defer mu.Unlock(); return counts[route.NoSlot] == callers-limit })
	select {
	case <-w.entered:
		t.Error("more calls run than may")
	default:
	}
	close(w.gate)
	calls.Wait()
	if counts[""] != limit || counts[route.NoSlot] != callers-limit {
		t.Errorf("%v", counts)
	}
	if w.cluster.leases > 5 {
		t.Errorf("%d requests for slots", w.cluster.leases)
	}
	w.must("f", "echo")
	if s := w.status("f"); s.Busy != 0 || s.Waiting != 0 {
		t.Errorf("left: %+v", s)
	}
}

func TestScaleToZeroLeavesNothing(t *testing.T) {
	w := newWorld(t, func(o *dispatch.Options) { o.Limits.Route.PoolKeepMS = 1 })
	w.deploy("f", 10, func(s *blixard.FunctionSpec) { s.ScaleDownDelayMS = 0 })
	var calls sync.WaitGroup
	for range 10 {
		calls.Go(func() { w.try("f", "gate") })
	}
	for range 10 {
		w.enter()
	}
	close(w.gate)
	calls.Wait()
	w.until("nothing left", func() bool { return len(w.running()) == 0 && w.cluster.View().SlotsLeased("f") == 0 })
	if w.d.Guarded() {
		t.Error("something is guarded")
	}
	if !contains(w.notes, "shutdown spindown") {
		t.Errorf("guests were not told: %q", w.notes)
	}
}

func TestAWorkingGuestIsKept(t *testing.T) {
	w := newWorld(t, func(o *dispatch.Options) { o.Limits.Route.PoolKeepMS = 1 })
	w.set(func() { w.working = true })
	w.deploy("f", 10, func(s *blixard.FunctionSpec) { s.ScaleDownDelayMS = 0 })
	first := w.must("f", "echo")
	w.until("several looks", func() bool { w.mu.Lock(); defer w.mu.Unlock(); return w.looks > 2 })
	if second := w.must("f", "echo"); second.Instance != first.Instance {
		t.Error("an instance ended while its guest worked")
	}
	w.set(func() { w.working = false })
	w.until("its end", func() bool { return w.status("f").Instances == 0 })
}

func TestInstanceDiesInACall(t *testing.T) {
	w := newWorld(t, nil)
	w.deploy("f", 1, nil)
	_, _, err := w.invoke("f", "die now")
	if r := refusal(t, err); r.Why != route.Gone || !r.Handed || r.Begun || blixard.CodeOf(err) != blixard.CodeUnavailable {
		t.Errorf("%+v: %v", r, err)
	}
	w.until("the slot", func() bool { _, _, err := w.invoke("f", "echo"); return err == nil })
	if m, _ := w.d.Metrics("f"); m.Lost != 1 {
		t.Errorf("metrics: %+v", m)
	}
}

func TestIdleInstanceDies(t *testing.T) {
	w := newWorld(t, nil)
	w.deploy("f", 1, nil)
	w.must("f", "echo")
	for _, ref := range w.running() {
		w.machine.Kill(ref, "killed by the test")
	}
	w.until("another instance", func() bool { _, _, err := w.invoke("f", "echo"); return err == nil })
}

func TestGuestThatNeverAnswers(t *testing.T) {
	w := newWorld(t, nil)
	w.deploy("f", 1, func(s *blixard.FunctionSpec) { s.TimeoutMS = 100 })
	began := time.Now()
	report, body, err := w.invoke("f", "hang")
	if err != nil || report.Error == nil || report.Error.Type != "Sandbox.Timedout" || !strings.Contains(body, "Task timed out after 0.10 seconds") {
		t.Errorf("%+v, %q, %v", report.Error, body, err)
	}
	if took := time.Since(began); took < 300*time.Millisecond || took > 5*time.Second {
		t.Errorf("it took %s", took)
	}
	if !strings.Contains(string(report.Log), "Status: timeout") {
		t.Errorf("log: %q", report.Log)
	}
	w.until("the slot", func() bool { _, _, err := w.invoke("f", "echo"); return err == nil })
}

func TestFunctionErrorIsAnAnswer(t *testing.T) {
	w := newWorld(t, nil)
	w.deploy("f", 1, nil)
	report, body, err := w.invoke("f", "fail now")
	if err != nil || report.Error == nil || report.Error.Type != "Oops" || body != `{"errorType":"Oops"}` {
		t.Errorf("%+v, %q, %v", report.Error, body, err)
	}
	if again := w.must("f", "echo"); again.Start != blixard.StartWarm {
		t.Errorf("the instance was not kept: %+v", again)
	}
}

func TestRestoreFailsAndItBoots(t *testing.T) {
	w := newWorld(t, nil)
	w.deploy("f", 5, nil)
	w.machine.Inject(fake.CloneFails, "", -1)
	var last blixard.InvocationReport
	var calls sync.WaitGroup
	for range 2 { // more than the pool has
		calls.Go(func() { w.try("f", "gate") })
	}
	for range 2 {
		w.enter()
	}
	close(w.gate)
	calls.Wait()
	last = w.must("f", "echo")
	m, _ := w.d.Metrics("f")
	if m.Booted == 0 || m.RestoreFailures == 0 || last.Error != nil {
		t.Errorf("metrics: %+v", m)
	}
	w.machine.Inject(fake.CloneFails, "", 0)
}

func TestIdentityRefusedIsABoot(t *testing.T) {
	w := newWorld(t, nil)
	w.deploy("f", 5, nil)
	w.until("a clone ahead", func() bool { return w.status("f").Pooled == 1 })
	w.set(func() { w.failRestores = 2 }) // of the pool, and made for the call
	if r := w.must("f", "echo"); r.Start != blixard.StartBooted {
		t.Errorf("%+v", r)
	}
}

func TestStartsThatFailAreAnsweredAndBackOff(t *testing.T) {
	w := newWorld(t, func(o *dispatch.Options) { o.Limits.Route.PoolKeepMS = 1; o.Limits.Route.BackoffMS = 200 })
	w.deploy("f", 5, nil)
	w.machine.Inject(fake.CloneFails, "", -1)
	w.machine.Inject(fake.StartFails, "", -1)
	_, _, err := w.invoke("f", "echo")
	if r := refusal(t, err); r.Why != route.StartFailed || r.Handed || !strings.Contains(err.Error(), "injected fault") {
		t.Errorf("%v", err)
	}
	before, _ := w.d.Metrics("f")
	for range 50 {
		if _, _, err := w.invoke("f", "echo"); err == nil {
			t.Fatal("it started")
		}
	}
	if after, _ := w.d.Metrics("f"); after.StartFailures > before.StartFailures+2 {
		t.Errorf("50 calls caused %d starts", after.StartFailures-before.StartFailures)
	}
	w.machine.Inject(fake.CloneFails, "", 0)
	w.machine.Inject(fake.StartFails, "", 0)
	w.until("recovery", func() bool { _, _, err := w.invoke("f", "echo"); return err == nil })
}

func TestLostLeaseEndsEverything(t *testing.T) {
	w := newWorld(t, nil)
	w.deploy("f", 5, nil)
	done := make(chan error, 1)
	go func() {
		_, _, err := w.invoke("f", "gate")
		done <- err
	}()
	w.enter()
	w.set(func() { w.holds = false })
	r := refusal(t, <-done)
	if r.Why != route.NoLease || !r.Handed {
		t.Errorf("%+v", r)
	}
	w.until("the end of all instances", func() bool { return len(w.running()) == 0 })
	if _, _, err := w.invoke("f", "echo"); refusal(t, err).Why != route.NoLease {
		t.Errorf("%v", err)
	}
	w.set(func() { w.holds = true })
	w.until("calls again", func() bool { _, _, err := w.invoke("f", "echo"); return err == nil })
	close(w.gate)
}

func TestLostNodeHasNoSlotsLeft(t *testing.T) {
	w := newWorld(t, nil)
	w.deploy("f", 2, nil)
	w.must("f", "echo")
	w.set(func() { w.holds = false })
	w.until("the end of all instances", func() bool { return len(w.running()) == 0 })
	node := w.cluster.View().Node("n1")
	w.cluster.must(t, &state.LoseNode{Name: "n1", Epoch: node.Epoch})
	if n := w.cluster.View().SlotsLeased("f"); n != 0 {
		t.Fatalf("%d slots", n)
	}
	w.cluster.must(t, &state.ReviveNode{Name: "n1"})
	w.set(func() { w.holds = true })
	w.until("calls again", func() bool { _, _, err := w.invoke("f", "echo"); return err == nil })
	if s := w.status("f"); s.SlotsLeased != w.cluster.View().SlotsLeased("f") || s.SlotsLeased > 2 {
		t.Errorf("%+v", s)
	}
}

func TestRestartClearsAndAdoptsSlots(t *testing.T) {
	w := newWorld(t, nil)
	w.deploy("f", 3, nil)
	w.must("f", "echo")
	leased := w.cluster.View().SlotsLeased("f")
	// A daemon that was killed leaves its guests.
	driver := w.machine.Open()
	w.stop()
	left := vmm.Ref{Instance: "fn-left", Generation: 1}
	if err := driver.Start(t.Context(), vmm.Spec{Ref: left, VCPUs: 1, MemoryMiB: 64, Kernel: "/k", Network: vmm.Network{Mode: "none"}}); err != nil {
		t.Fatal(err)
	}
	w.start()
	t.Cleanup(w.stop)
	w.until("slots", func() bool { return w.status("f").SlotsLeased == leased })
	for _, ref := range w.running() {
		if ref == left {
			t.Error("a left-over runs")
		}
	}
	r := w.must("f", "echo")
	if r.Start == blixard.StartBooted {
		t.Errorf("the template was not found again: %+v", r)
	}
}

func TestNewCodeReplacesOld(t *testing.T) {
	w := newWorld(t, nil)
	w.deploy("f", 5, nil)
	old := w.invocation("f", "echo")
	first := w.must("f", "echo")
	spec := w.version("f").Spec
	spec.Env = []blixard.Label{{Key: "A", Value: "1"}}
	w.cluster.must(t, &state.UpdateFunction{Name: "f", Spec: &spec})
	// The former code answers until the new one is ready.
	var s sink
	if _, err := w.d.Invoke(t.Context(), dispatch.Request{Invocation: old, MayStart: true}, &s); err != nil {
		t.Fatal(err)
	}
	w.build("f")
	var second blixard.InvocationReport
	w.until("the new code", func() bool {
		r, _, err := w.invoke("f", "echo")
		second = r
		return err == nil
	})
	if second.Instance == first.Instance {
		t.Error("the old instance has answered")
	}
	w.until("the old instance's end", func() bool { return w.status("f").Instances == 1 })
	_, err := w.d.Invoke(t.Context(), dispatch.Request{Invocation: old, MayStart: true}, &s)
	if why := refusal(t, err).Why; why != route.Superseded && why != route.Unknown {
		t.Errorf("%v", err)
	}
}

func TestBuildFailures(t *testing.T) {
	w := newWorld(t, nil)
	w.set(func() { w.initFails = "exit status 1" })
	if fv := w.deploy("f", 5, nil); fv.State != blixard.FunctionFailed || fv.StateCode != "InitError" || !strings.Contains(fv.StateReason, "exit status 1") {
		t.Errorf("%+v", fv)
	}
	if left := w.running(); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	if fv := w.deploy("g", 5, func(s *blixard.FunctionSpec) { s.Snapshot = "off" }); fv.State != blixard.FunctionFailed || fv.StateCode != "InitError" {
		t.Errorf("%+v", fv)
	}
}

func TestWithoutSnapshots(t *testing.T) {
	w := newWorld(t, nil)
	w.deploy("f", 5, func(s *blixard.FunctionSpec) { s.Snapshot = "off" })
	if r := w.must("f", "echo"); r.Start != blixard.StartBooted {
		t.Errorf("%+v", r)
	}
}

func TestCallerLeaves(t *testing.T) {
	w := newWorld(t, nil)
	w.deploy("f", 1, nil)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		var s sink
		_, err := w.d.Invoke(ctx, dispatch.Request{Invocation: w.invocation("f", "gate"), MayStart: true}, &s)
		done <- err
	}()
	w.enter()
	cancel()
	if err := <-done; err == nil {
		t.Error("no error")
	}
	close(w.gate)
	w.until("the next call", func() bool { _, _, err := w.invoke("f", "echo"); return err == nil })
}

func TestClonesAreNobodyElse(t *testing.T) {
	const many = 200
	w := newWorld(t, func(o *dispatch.Options) { o.Limits.Route.Starts = many })
	w.deploy("f", many, nil)
	var calls sync.WaitGroup
	for range many {
		calls.Go(func() { w.try("f", "gate") })
	}
	for range many {
		w.enter()
	}
	close(w.gate)
	calls.Wait()
	seen := map[string]string{} // a clone of the pool is told twice who it is
	for _, id := range w.identities {
		for _, s := range []string{"entropy " + string(id.Entropy), "machine " + id.MachineID, "boot " + id.BootID, "host " + id.Hostname, "mac " + id.MAC, "ip " + id.Address, "epoch " + string(rune(id.Epoch)) + time.Duration(id.Epoch).String()} {
			if other, ok := seen[s]; ok && other != id.Instance {
				t.Errorf("two clones share %q", s)
			}
			seen[s] = id.Instance
		}
		if len(id.Entropy) != 64 || len(id.MachineID) != 32 || id.UnixNano == 0 {
			t.Errorf("%+v", id)
		}
	}
	if len(w.identities) < many {
		t.Errorf("%d identities", len(w.identities))
	}
}

// TestHooksRunWhenUsed: a function with hooks for its restore has them when a
// clone is used, not when it is pooled.
func TestHooksRunWhenUsed(t *testing.T) {
	w := newWorld(t, nil)
	w.hooks = true
	w.deploy("f", 5, nil)
	w.until("a clone ahead", func() bool { return w.status("f").Pooled == 1 })
	told := func() map[string]int {
		w.mu.Lock()
		defer w.mu.Unlock()
		times := map[string]int{}
		for _, id := range w.identities {
			times[id.Instance]++
		}
		return times
	}
	before := told() // the one that was tried, whose hooks have run
	r := w.must("f", "echo")
	if r.Start != blixard.StartPooled || before[r.Instance] != 0 || told()[r.Instance] != 1 {
		t.Errorf("%s was told %d times before its call and %d in all: %+v", r.Instance, before[r.Instance], told()[r.Instance], r)
	}
}

func TestPooledCloneDies(t *testing.T) {
	w := newWorld(t, nil)
	w.deploy("f", 5, nil)
	w.until("a clone ahead", func() bool { return w.status("f").Pooled == 1 })
	old := w.running()
	for _, ref := range old {
		w.machine.Kill(ref, "killed by the test")
	}
	w.until("another clone ahead", func() bool {
		now := w.running()
		return w.status("f").Pooled == 1 && len(now) == 1 && now[0] != old[0]
	})
	if r := w.must("f", "echo"); r.Start != blixard.StartPooled {
		t.Errorf("%+v", r)
	}
}
