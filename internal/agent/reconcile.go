package agent

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/assert"
	"github.com/blixard/blixard/internal/converge"
	"github.com/blixard/blixard/internal/vmm"
)

// Labels that incarnations carry in the driver, so that a daemon that comes
// back knows them before it has read a row.
const (
	labelStops   = "on-partition=stop"
	labelNoGuest = "guest=none"
	labelMaybe   = "guest=maybe"
	labelBridge  = "network=bridge"
)

func hasLabel(labels []string, label string) bool { return slices.Contains(labels, label) }

// listRest follows a list that failed.
const listRest = 200 * time.Millisecond

// reconcile plans whenever something may have changed, and begins what was
// planned. effects outlives ctx, see Run.
func (a *Agent) reconcile(ctx, effects context.Context) {
	var changes <-chan struct{} // nil, and so never ready, without a watcher
	if w, ok := a.o.Driver.(vmm.Watcher); ok {
		changes = w.Changes()
	}
	resync := time.NewTicker(a.o.ResyncEvery)
	defer resync.Stop()
	for {
		wakeMS := a.pass(ctx, effects)
		timer := time.NewTimer(a.until(wakeMS))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-a.wake:
		case <-timer.C:
		case <-changes:
			a.mistrust()
		case <-resync.C:
			a.mistrust()
		}
		timer.Stop()
	}
}

// until is the time left to a moment of the agent's clock, bounded both ways.
func (a *Agent) until(ms int64) time.Duration {
	if ms == converge.Never {
		return a.o.ResyncEvery
	}
	// A millisecond late, since the clock is cut to whole ones.
	left := time.Duration(ms-a.clock.nowMS())*time.Millisecond + time.Millisecond
	return min(max(left, time.Millisecond), a.o.ResyncEvery)
}

// mistrust has the driver listed anew.
func (a *Agent) mistrust() {
	a.mu.Lock()
	a.stale = true
	a.mu.Unlock()
}

// pass plans once and tells when to plan again.
func (a *Agent) pass(ctx, effects context.Context) (wakeMS int64) {
	a.mu.Lock()
	stale := a.stale
	a.stale = false
	// Before the list, see the package's ordering.
	locals := a.remembered()
	a.mu.Unlock()
	blind := false
	if stale {
		found, err := a.list(ctx)
		if err != nil {
			if ctx.Err() == nil {
				a.log.Error("listing what runs here failed and is tried again", "event", "list", "error", err)
			}
			a.mistrust()
			blind = true
		} else {
			a.take(found)
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.o.Metrics.plans.Inc()
	in := converge.Input{
		NowMS: a.clock.nowMS(), ViewIndex: a.index, Lease: a.lease.Lease(), Rows: a.rows, Locals: locals, Limits: a.o.Limits,
		Pauses: a.pauser != nil && a.capabilities.Pause, Acceleration: a.capabilities.Acceleration,
	}
	in.Found = make([]converge.Found, len(a.found))
	for i := range a.found {
		in.Found[i] = finding(&a.found[i])
		a.publish(&in.Found[i])
	}
	actions, wakeMS := converge.Plan(in)
	if blind {
		// What is known may be older than an effect's end: nothing can be begun
		// or told on that ground, but what must die must die.
		actions = slices.DeleteFunc(actions, func(act converge.Action) bool { return act.Kind != converge.Kill })
		wakeMS = min(wakeMS, in.NowMS+listRest.Milliseconds())
	}
	a.begin(effects, actions)
	a.forget()
	return wakeMS
}

// remembered is a sorted copy of the locals. Callers hold mu.
func (a *Agent) remembered() []converge.Local {
	out := make([]converge.Local, 0, len(a.locals))
	for _, ref := range slices.SortedFunc(maps.Keys(a.locals), converge.Ref.Compare) {
		out = append(out, a.locals[ref].Local)
	}
	return out
}

func (a *Agent) list(ctx context.Context) (listing, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	found, err := a.o.Driver.List(ctx)
	if err != nil {
		return listing{}, fmt.Errorf("listing incarnations: %w", err)
	}
	// Ref orders by text, as converge does, and the contract says in order.
	assert.True(slices.IsSortedFunc(found, func(x, y vmm.Status) int { return x.Ref.Compare(y.Ref) }), "the driver's list is not in order")
	return a.withAttachments(ctx, found), nil
}

// take makes found what the agent goes by, and ends sessions of what has ended.
func (a *Agent) take(now listing) {
	found := now.statuses
	phases := map[vmm.Phase]int{}
	a.mu.Lock()
	a.found, a.attached = found, now.attached
	alive := map[converge.Ref]vmm.Phase{}
	for _, s := range found {
		phases[s.Phase]++
		alive[refOf(s.Ref)] = s.Phase
	}
	for ref, l := range a.locals { //order:any each stands alone
		if l.session == nil {
			continue
		}
		switch alive[ref] {
		case vmm.Running:
			l.session.setPaused(false)
		case vmm.Paused:
			l.session.setPaused(true)
		default:
			l.session.cancel()
		}
	}
	a.mu.Unlock()
	for _, p := range []vmm.Phase{vmm.Prepared, vmm.Running, vmm.Paused, vmm.Exited} {
		a.o.Metrics.instances.WithLabelValues(string(p)).Set(float64(phases[p]))
	}
}

func refOf(r vmm.Ref) converge.Ref {
	return converge.Ref{Instance: blixard.InstanceID(r.Instance), Generation: r.Generation}
}

func vmmRef(r converge.Ref) vmm.Ref {
	return vmm.Ref{Instance: string(r.Instance), Generation: r.Generation}
}

// splitInstance is the inverse of blixard.SlotID; the ordinal is 0 for what is
// no instance ID.
func splitInstance(id blixard.InstanceID) (blixard.VMName, int) {
	i := strings.LastIndexByte(string(id), '-')
	if i < 0 {
		return "", 0
	}
	n, err := strconv.Atoi(string(id[i+1:]))
	if err != nil {
		return "", 0
	}
	return blixard.VMName(id[:i]), n
}

func finding(s *vmm.Status) converge.Found {
	f := converge.Found{
		Ref: refOf(s.Ref), Phase: converge.Phase(s.Phase), Reason: s.ExitReason,
		// The drivers' word for a guest that switched its machine off.
		Orderly: strings.HasPrefix(s.ExitReason, "guest shut down"), StopsOnPartition: hasLabel(s.Labels, labelStops),
	}
	for _, p := range s.Ports {
		f.Ports = append(f.Ports, blixard.PublishedPort{
			Protocol: p.Protocol, Address: net.JoinHostPort(p.HostIP, strconv.Itoa(p.HostPort)), GuestPort: p.GuestPort,
		})
	}
	return f
}

// begin begins what was planned. Callers hold mu.
func (a *Agent) begin(effects context.Context, actions []converge.Action) {
	reports := false
	for _, act := range actions {
		l := a.memory(act.Ref)
		switch act.Kind {
		case converge.Report:
			l.Tell(act.Observation, a.clock.nowMS())
			a.pending[act.Ref] = act.Observation
			reports = true
		case converge.Configure:
			a.attach(effects, l)
		default:
			a.beginEffect(effects, l, act)
		}
	}
	if reports {
		poke(a.reportWake)
	}
}

func (a *Agent) beginEffect(effects context.Context, l *local, act converge.Action) {
	if a.ending && act.Kind != converge.Kill {
		return
	}
	if l.Busy != converge.None {
		assert.True(act.Kind == converge.Kill, "%s while %s is under way", act, l.Busy)
		l.Busy, l.then = converge.Kill, &act
		l.cancel(fmt.Errorf("it is killed: %s", act.Why))
		return
	}
	row := a.row(act.Ref)
	if act.Kind == converge.Start {
		assert.True(row != nil && l.bundle != nil, "%s without a row or an image", act)
	}
	ctx, cancel := context.WithCancelCause(effects)
	l.Begin(act.Kind, row != nil && row.Spec.EffectiveOnPartition() == blixard.OnPartitionStop)
	l.cancel = cancel
	job := job{action: act, row: row, bundle: l.bundle, session: l.session, guarded: l.StopsOnPartition}
	a.running.Go(func() { a.work(ctx, effects, job) })
}

// row is the row of ref, nil without one. Callers hold mu.
func (a *Agent) row(ref converge.Ref) *blixard.Instance {
	for _, r := range a.rows {
		if r.ID == ref.Instance && r.Generation == ref.Generation {
			return r
		}
	}
	return nil
}

// forget drops the memory of what neither the cluster nor the driver knows any
// more. Callers hold mu.
func (a *Agent) forget() {
	if len(a.locals) <= len(a.rows) && len(a.locals) <= len(a.found) {
		return
	}
	known := map[converge.Ref]bool{}
	for _, r := range a.rows {
		known[converge.Ref{Instance: r.ID, Generation: r.Generation}] = true
	}
	for _, s := range a.found {
		known[refOf(s.Ref)] = true
	}
	for ref, l := range a.locals { //order:any each stands alone
		if !known[ref] && l.Busy == converge.None && l.session == nil && !a.stale {
			delete(a.locals, ref)
			delete(a.pending, ref)
		}
	}
}

// report sends observations, many at once: those that come while a report is
// under way go with the next.
func (a *Agent) report(ctx context.Context) {
	const (
		atMost  = 512
		timeout = 10 * time.Second
	)
	backoff := 100 * time.Millisecond
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.reportWake:
		}
		refs, items := a.due(atMost)
		if len(items) == 0 {
			continue
		}
		call, cancel := context.WithTimeout(ctx, timeout)
		index, err := a.o.Cluster.Report(call, items)
		cancel()
		a.reported(refs, items, index, err)
		if err == nil {
			backoff = 100 * time.Millisecond
			a.o.Metrics.reports.WithLabelValues("ok").Inc()
			a.o.Metrics.observed.Add(float64(len(items)))
			poke(a.wake)
			continue
		}
		if ctx.Err() != nil {
			return
		}
		a.o.Metrics.reports.WithLabelValues("failed").Inc()
		a.log.Log(ctx, slog.LevelWarn, "reporting to the cluster failed and is tried again", "event", "report", "observations", len(items), "error", err)
		if !pause(ctx, backoff) {
			return
		}
		backoff = min(2*backoff, 2*time.Second)
		poke(a.wake) // plans them again, as they are by then
	}
}

// due takes up to n observations that wait.
func (a *Agent) due(n int) (refs []converge.Ref, items []converge.Observation) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, ref := range slices.SortedFunc(maps.Keys(a.pending), converge.Ref.Compare) {
		if len(items) == n {
			poke(a.reportWake)
			break
		}
		refs, items = append(refs, ref), append(items, *a.pending[ref])
		delete(a.pending, ref)
	}
	return refs, items
}

// reported remembers what became of a report, unless there is a newer one.
func (a *Agent) reported(refs []converge.Ref, items []converge.Observation, index uint64, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i, ref := range refs {
		if l := a.locals[ref]; l != nil {
			l.Told(&items[i], index, err != nil)
		}
	}
}
