package sim

import (
	"cmp"
	"maps"
	"slices"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/converge"
	"github.com/blixard/blixard/internal/replica"
	"github.com/blixard/blixard/internal/state"
)

// What agents of internal/agent have by default, with less patience.
const (
	bootMS       = 20_000
	resyncMS     = 10_000
	listRestMS   = 200
	reportWaitMS = 10_000
	beatsAtOnce  = 4
	reportAtMost = 512
)

// leaseFile is what the agent writes down for its watchdog, and for itself when
// it comes back. It is void once the machine was off.
type leaseFile struct {
	membership      uint64 // raft ID, 0 for no file
	untilMS, killMS int64  // monotonic
	targets         []string
	under           bool // whatever runs functions
}

// names tells whether there is anything to watch over.
func (f *leaseFile) names() bool { return len(f.targets) > 0 || f.under }

// agent asks converge what to do and does it on the machine's hypervisor, as
// internal/agent does. It is part of the process: what it remembers is forgotten
// with that.
type agent struct {
	p    *process
	book converge.LeaseBook
	// wake counts wakes that were planned; only the newest counts.
	wakes  uint64
	queued bool

	rows   []*blixard.Instance
	index  uint64
	dirty  bool // rows have to be read again
	found  []converge.Found
	stale  bool // found has to be listed again
	locals map[converge.Ref]*local

	pending   map[converge.Ref]*converge.Observation
	reporting int // number of the report under way, 0 for none
	reports   int
	backoffMS int64

	telling bool // of what the machine has
	beats   int
	kept    bool // the lease file names something
	under   bool // functions run here
}

// local is what the agent remembers of an incarnation.
type local struct {
	converge.Local
	effect *effect
	// then is the kill that follows the effect under way.
	then *converge.Action
}

// effect is an action being carried out.
type effect struct {
	act  converge.Action
	over bool
}

func newAgent(p *process) *agent {
	k := p.m.w.k
	a := &agent{
		p: p, book: converge.LeaseBook{LengthMS: k.LeaseMS, FenceMS: k.LeaseMS / 5}, stale: true, dirty: true,
		locals: map[converge.Ref]*local{}, pending: map[converge.Ref]*converge.Observation{},
	}
	return a
}

func (a *agent) limits() converge.Limits {
	return converge.Limits{Starts: 4, Effects: 64, FenceMS: a.book.FenceMS, OrphanGraceMS: 5000, ResendMS: 5000}
}

func (a *agent) nowMS() int64 { return a.p.m.monoMS() }

func (a *agent) begin() {
	m := a.p.m
	if f := m.lease; f.membership != 0 {
		if f.membership != m.raftID {
			// Of a former member: see converge.Void.
			m.w.count["former member's ended"]++
			m.hyp.killAll("ended: of a former member", func(v *vm) bool { return v.stops })
			m.lease = leaseFile{}
		} else {
			a.book.Recall(a.nowMS(), f.untilMS-a.nowMS())
		}
	}
	a.beat()
	a.p.every(m.w.k.HeartbeatMS, a.beat)
	a.tell()
	a.wakeUp()
}

// beat asks the leader to renew the lease.
func (a *agent) beat() {
	p, w := a.p, a.p.m.w
	a.book.Silent(a.nowMS())
	leader := w.byRaftID(p.r.Leader())
	if a.beats >= beatsAtOnce || leader == nil {
		return
	}
	a.beats++
	sent, over := a.nowMS(), false
	end := func(do func()) {
		if !over {
			over = true
			a.beats--
			do()
		}
	}
	p.after(w.k.LeaseMS, func() { end(func() {}) })
	answered := func(g replica.Grant) {
		p.run(func() {
			end(func() {
				if g.OK {
					a.granted(sent, g.Index)
				} else if a.book.Refused(sent) {
					a.tell()
				}
			})
		})
	}
	name, id := p.m.name, p.m.raftID
	if leader == p.m {
		p.enter(func() {
			if !p.loop.GrantLease(name, id, &waiter[replica.Grant]{p: p, done: answered}) {
				end(func() {})
			}
		})
		return
	}
	w.net.carry(p.m, leader, smallBytes, func() {
		to := leader.proc
		if to == nil || !replica.Known(to.r.View(), to.r.ConfState(), id) {
			return
		}
		to.enter(func() {
			to.loop.GrantLease(name, id, &waiter[replica.Grant]{p: to, done: func(g replica.Grant) {
				w.net.carry(leader, p.m, smallBytes, func() { answered(g) }, nil)
			}})
		})
	}, nil)
}

func (a *agent) granted(sentMS int64, index uint64) {
	m := a.p.m
	_, plan := a.book.Granted(sentMS, a.nowMS(), index, a.index)
	m.w.mix(uint64(m.at), uint64(a.book.Lease().UntilMS), index)
	if a.kept || a.guarded() {
		a.keepLease()
	}
	if d := a.p.dispatcher; d != nil {
		d.keepTime()
	}
	if plan {
		a.wakeUp()
	}
}

// guarded tells whether anything here may run under a lease only.
func (a *agent) guarded() bool {
	if a.under || slices.ContainsFunc(a.found, func(f converge.Found) bool { return f.StopsOnPartition && alive(f.Phase) }) {
		return true
	}
	for _, l := range a.locals { //order:any a question of existence
		if l.StopsOnPartition && l.Busy != converge.None {
			return true
		}
	}
	return false
}

func alive(p converge.Phase) bool { return p == converge.Running || p == converge.Paused }

// keepLease writes the lease down, with what may not outlast it.
func (a *agent) keepLease() {
	m := a.p.m
	f := leaseFile{membership: m.raftID, untilMS: a.book.Lease().SureMS, killMS: a.book.KillMS()}
	for i := range a.found {
		if x := &a.found[i]; x.StopsOnPartition && alive(x.Phase) {
			f.targets = append(f.targets, x.Ref.String())
		}
	}
	for _, ref := range sortedRefs(a.locals) {
		if l := a.locals[ref]; l.StopsOnPartition && l.Busy == converge.Start {
			f.targets = append(f.targets, ref.String())
		}
	}
	f.under = a.under
	a.kept = f.names()
	m.lease = f
	if a.kept {
		m.w.after(m.trueMS(f.killMS-m.monoMS())+m.w.between(0, 100), m.watchdog)
	}
}

// guard has the watchdog end whatever runs functions, from now on.
func (a *agent) guard() {
	a.under = true
	a.keepLease()
}

// watchdog is a process of its own, which neither waits for the agent nor ends
// with it.
func (m *machine) watchdog() {
	const lingerMS = 10_000
	now := m.monoMS()
	if f := m.lease; now >= f.killMS && now <= f.untilMS+lingerMS {
		m.hyp.killAll("killed by the watchdog", func(v *vm) bool {
			if !slices.Contains(f.targets, v.ref.String()) {
				return false
			}
			m.w.count["watchdog kill"]++
			return true
		})
		if f.under {
			m.guests.endAll("killed by the watchdog")
		}
	}
}

// tell reports what the machine has.
func (a *agent) tell() {
	p, m := a.p, a.p.m
	if a.telling {
		return
	}
	a.telling = true
	over := false
	end := func(ok bool) {
		if over {
			return
		}
		over, a.telling = true, false
		if ok {
			a.book.Reported(a.nowMS())
			a.beat()
		} else {
			p.after(1000, a.tell)
		}
	}
	p.after(reportWaitMS, func() { end(false) })
	p.enter(func() {
		p.propose(state.Envelope{Actor: "agent of " + string(m.name), Command: &state.ReportNode{
			Name: m.name, RaftID: m.raftID, Address: address(m), Zone: m.zone, Hypervisors: []string{"qemu"}, Acceleration: "tcg", Release: "sim", FeatureLevel: m.level,
			Capacity: m.capacity(),
		}}, func(res state.Result) { p.run(func() { end(res.Err == nil) }) }, func() bool { return over })
	})
}

func address(m *machine) string { return string(m.name) + ":7" }

// capacity is what every machine has: some VMs are refused.
func (m *machine) capacity() blixard.Resources {
	return blixard.Resources{MilliCPU: m.w.k.MilliCPU, MemoryMiB: m.w.k.MemoryMiB, DiskMiB: 1 << 20}
}

// applied looks whether what was applied concerns this node.
func (a *agent) applied(out replica.Output) {
	a.index = a.p.r.View().Index
	name := a.p.m.name
	more := a.book.Seen(a.index)
	if more && a.kept {
		a.keepLease()
	}
	if d := a.p.dispatcher; more && d != nil {
		d.keepTime()
	}
	touched := out.Restored || more
	for i := 0; !touched && i < len(out.Changes); i++ {
		inst, ok := out.Changes[i].Object.(*blixard.Instance)
		touched = ok && inst.Node == name
	}
	if touched {
		a.dirty = true
		a.wakeUp()
	}
}

// wakeUp has the agent plan soon.
func (a *agent) wakeUp() {
	if !a.queued {
		a.queued = true
		a.p.after(1, a.pass)
	}
}

// mistrust has the hypervisor listed anew, and plans.
func (a *agent) mistrust() {
	a.stale = true
	a.wakeUp()
}

// pass plans once.
func (a *agent) pass() {
	a.queued = false
	now := a.nowMS()
	locals := make([]converge.Local, 0, len(a.locals))
	for _, ref := range sortedRefs(a.locals) {
		locals = append(locals, a.locals[ref].Local)
	}
	blind := false
	if a.stale {
		if found, ok := a.p.m.hyp.list(); ok {
			a.stale = false
			a.take(found)
		} else {
			a.p.m.w.count["list failed"]++
			blind = true
		}
	}
	if a.dirty {
		a.read()
	}
	actions, wakeMS := converge.Plan(converge.Input{
		NowMS: now, ViewIndex: a.index, Lease: a.book.Lease(), Rows: a.rows, Found: a.found, Locals: locals, Limits: a.limits(), Pauses: true, Acceleration: "tcg",
	})
	if blind {
		actions = slices.DeleteFunc(actions, func(act converge.Action) bool { return act.Kind != converge.Kill })
		wakeMS = min(wakeMS, now+listRestMS)
	}
	for _, act := range actions {
		a.order(act)
	}
	a.forget()
	if len(a.pending) > 0 {
		a.report()
	}
	a.wakes++
	n := a.wakes
	resync := wakeMS > now+resyncMS
	a.p.after(min(wakeMS, now+resyncMS)-now+1, func() {
		if n == a.wakes {
			if resync {
				a.stale = true
			}
			a.wakeUp()
		}
	})
}

// read takes this node's rows from the view.
func (a *agent) read() {
	v := a.p.r.View()
	a.dirty, a.index, a.rows = false, v.Index, nil
	v.InstancesOn(a.p.m.name, func(i *blixard.Instance) bool {
		a.rows = append(a.rows, i)
		return true
	})
	slices.SortFunc(a.rows, func(x, y *blixard.Instance) int {
		return converge.Ref{Instance: x.ID, Generation: x.Generation}.Compare(converge.Ref{Instance: y.ID, Generation: y.Generation})
	})
}

// take makes found what the agent goes by, and ends sessions of what has ended.
func (a *agent) take(found []converge.Found) {
	a.found = found
	up := map[converge.Ref]bool{}
	for i := range found {
		up[found[i].Ref] = alive(found[i].Phase)
	}
	for ref, l := range a.locals { //order:any each stands alone
		if l.Attached && !up[ref] {
			l.Attached = false
		}
	}
}

func (a *agent) memory(ref converge.Ref) *local {
	l := a.locals[ref]
	if l == nil {
		l = &local{Local: converge.Local{Ref: ref}}
		a.locals[ref] = l
	}
	return l
}

// row is the row of ref, nil without one.
func (a *agent) row(ref converge.Ref) *blixard.Instance {
	i, ok := slices.BinarySearchFunc(a.rows, ref, func(r *blixard.Instance, ref converge.Ref) int {
		return converge.Ref{Instance: r.ID, Generation: r.Generation}.Compare(ref)
	})
	if !ok {
		return nil
	}
	return a.rows[i]
}

// order begins what was planned.
func (a *agent) order(act converge.Action) {
	l, w := a.memory(act.Ref), a.p.m.w
	switch act.Kind {
	case converge.Report:
		l.Tell(act.Observation, a.nowMS())
		a.pending[act.Ref] = act.Observation
		return
	case converge.Configure:
		a.attach(l)
		return
	case converge.None, converge.Prepare, converge.Start, converge.Stop, converge.Kill, converge.Pause, converge.Resume, converge.Remove:
	}
	if act.Kind == converge.Kill && act.Blame {
		w.count["fence"]++
	}
	if l.Busy != converge.None {
		if act.Kind != converge.Kill {
			w.violated("an incarnation has one effect at a time", "%s while %s is under way", act, l.Busy)
		}
		l.Busy, l.then = converge.Kill, &act
		e := l.effect
		a.p.after(1, func() { a.ended(l, e, "it is killed: "+act.Why) })
		return
	}
	row := a.row(act.Ref)
	l.Begin(act.Kind, row != nil && row.Spec.EffectiveOnPartition() == blixard.OnPartitionStop)
	a.carryOut(l, act, row)
}

func (a *agent) carryOut(l *local, act converge.Action, row *blixard.Instance) {
	e := &effect{act: act}
	l.effect = e
	if act.Kind == converge.Start && l.StopsOnPartition {
		a.keepLease()
		a.p.m.w.after(1, func() { a.p.m.w.faults.starting(a.p.m) })
	}
	a.p.m.w.say("%s: %s", a.p.m.name, act)
	a.p.m.hyp.do(a.p, e, row, func(failure string) { a.ended(l, e, failure) })
}

// ended notes how an effect has ended.
func (a *agent) ended(l *local, e *effect, failure string) {
	if e.over {
		return
	}
	e.over = true
	l.End(e.act, failure, false, a.nowMS(), bootMS)
	if failure != "" {
		a.p.m.w.count[string(e.act.Kind)+" failed"]++
	}
	a.stale = true
	if e.act.Kind == converge.Start && l.StopsOnPartition {
		if found, ok := a.p.m.hyp.list(); ok {
			a.take(found)
		}
		a.keepLease()
	}
	if then := l.then; then != nil {
		l.then = nil
		l.Begin(then.Kind, false)
		a.carryOut(l, *then, nil)
		return
	}
	a.wakeUp()
}

// attach opens a session with a guest, which answers when it has booted.
func (a *agent) attach(l *local) {
	v := a.p.m.hyp.vms[l.Ref.String()]
	if row := a.row(l.Ref); l.Attached || row == nil || v == nil {
		return
	} else if l.BootDeadlineMS == 0 && row.State != blixard.Running {
		l.BootDeadlineMS = a.nowMS() + bootMS
	}
	l.Attached = true
	a.listen(l, v)
}

func (a *agent) listen(l *local, v *vm) {
	w := a.p.m.w
	a.p.m.w.after(max(v.bootedAt-w.now, 1), func() {
		a.p.run(func() {
			switch {
			case !l.Attached || !alive(v.phase) || v.deaf:
			case v.exit != nil:
				l.Exit = v.exit
				a.mistrust()
			case !l.Ready:
				l.Ready = true
				a.wakeUp()
			}
		})
	})
}

// heard takes a word of a guest that a session is open with.
func (a *agent) heard(v *vm) {
	if l := a.locals[v.ref]; l != nil && l.Attached {
		a.listen(l, v)
	}
}

// forget drops the memory of what neither the cluster nor the hypervisor knows.
func (a *agent) forget() {
	if a.stale || len(a.locals) <= len(a.rows) && len(a.locals) <= len(a.found) {
		return
	}
	for ref, l := range a.locals { //order:any each stands alone
		if l.Busy != converge.None || a.row(ref) != nil {
			continue
		}
		if _, ok := slices.BinarySearchFunc(a.found, ref, func(f converge.Found, ref converge.Ref) int { return f.Ref.Compare(ref) }); !ok {
			delete(a.locals, ref)
			delete(a.pending, ref)
		}
	}
}

// report sends observations, one report at a time.
func (a *agent) report() {
	if a.reporting != 0 || len(a.pending) == 0 {
		return
	}
	a.reports++
	n := a.reports
	a.reporting = n
	p := a.p
	var refs []converge.Ref
	var told []*converge.Observation
	cmd := &state.Observe{Node: p.m.name, RaftID: p.m.raftID}
	for _, ref := range sortedRefs(a.pending) {
		if len(refs) == reportAtMost {
			break
		}
		o := a.pending[ref]
		delete(a.pending, ref)
		if v := p.m.hyp.vms[ref.String()]; o.Removed && v != nil {
			p.m.w.violated("S11 what is told to be removed is gone", "%s is on %s still (%s)", ref, p.m.name, v.phase)
		}
		refs, told = append(refs, ref), append(told, o)
		cmd.Items = append(cmd.Items, state.Observation{
			VM: o.VM, Ordinal: o.Ordinal, Generation: o.Generation, State: o.State, Paused: o.Paused, Message: o.Message, Address: o.Address,
			Ports: o.Ports, Health: o.Health, Acceleration: o.Acceleration, Removed: o.Removed,
		})
	}
	end := func(res state.Result, late bool) {
		if a.reporting != n {
			return
		}
		a.reporting = 0
		failed := late || res.Err != nil
		for i, ref := range refs {
			if l := a.locals[ref]; l != nil {
				l.Told(told[i], res.Outcome.Version, failed)
			}
		}
		if !failed {
			a.backoffMS = 0
			a.wakeUp()
			return
		}
		a.backoffMS = min(max(2*a.backoffMS, 100), 2000)
		a.reporting = -1
		p.after(a.backoffMS, func() {
			a.reporting = 0
			a.wakeUp()
		})
	}
	p.after(reportWaitMS, func() { end(state.Result{}, true) })
	p.enter(func() {
		p.propose(state.Envelope{Actor: "agent of " + string(p.m.name), Command: cmd}, func(res state.Result) { p.run(func() { end(res, false) }) }, func() bool { return a.reporting != n })
	})
}

func sortedRefs[V any](m map[converge.Ref]V) []converge.Ref {
	return slices.SortedFunc(maps.Keys(m), converge.Ref.Compare)
}

// sorted are the keys of a map in order.
func sorted[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
