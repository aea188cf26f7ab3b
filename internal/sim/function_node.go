package sim

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/replica"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/state"
)

// Times of internal/dispatch, some with less patience.
const (
	functionLookMS   = 1000   // settings are looked at so often
	leasePatienceMS  = 10_000 // for an answer to a request for slots
	startLimitMS     = 5000   // a start that takes longer has failed
	functionsMiB     = 1024   // what instances may take of each machine
	findPatienceMS   = 1000   // for a revision that a gateway knows and this node does not yet
	functionOnceMS   = 5      // changes are taken together
	functionRetryMS  = 1000
	readPatienceMS   = 1000
	minFunctionStart = 2
)

// dispatcher drives a route.Node as internal/dispatch does: what a node does for
// functions. It is part of the process.
type dispatcher struct {
	p    *process
	f    *functions
	node *route.Node
	book route.SlotBook

	cleared  bool // what a former process left has ended
	looking  bool // a look at the view is planned
	wakes    int
	proposal int
	names    []blixard.FunctionName // with slots or calls here, ever; in order

	nextCall  route.CallID
	calls     map[route.CallID]*offer
	instances map[route.InstanceID]*functionInstance
	building  map[route.Revision]bool
	targets   map[route.Revision]int // calls at once in an instance
}

// offer is a call that was offered to this node.
type offer struct {
	call *functionCall
	// done gets the answer once: nil for the function's, with failed.
	done func(r *route.Refused, failed bool)
	in   *functionInstance
	why  route.Refusal // it was aborted
	over bool
}

// functionInstance is one guest, from when it was ordered until nothing is left.
type functionInstance struct {
	id     route.InstanceID
	rev    route.Revision
	target int
	g      *guest // nil: there is no process
	killed bool
	aborts []*offer // whose callers hear when it is gone
}

func newDispatcher(p *process) *dispatcher {
	return &dispatcher{
		p: p, f: p.m.w.functions, node: route.NewNode(route.Limits{Starts: 4, Pool: 2, IdleSlotsMS: 20_000}), book: route.NewSlotBook(),
		calls: map[route.CallID]*offer{}, instances: map[route.InstanceID]*functionInstance{}, building: map[route.Revision]bool{}, targets: map[route.Revision]int{},
	}
}

func (d *dispatcher) nowMS() int64 { return d.p.m.monoMS() }

func (d *dispatcher) begin() { d.clear() }

// clear ends what a former process has left, before any slot is used.
func (d *dispatcher) clear() {
	h := d.p.m.guests
	for _, g := range slices.Clone(h.all) {
		d.f.w.count["function left over"]++
		if strikes(&h.failKills) {
			d.p.after(functionRetryMS, d.clear)
			return
		}
		g.end("its process is gone")
	}
	d.p.after(d.f.between(1, 50), func() {
		d.cleared = true
		d.p.agent.guard()
		d.look()
		d.p.every(functionLookMS, d.look)
		d.keepTime()
	})
}

// keepTime keeps the node's lease and deadlines: it is called when either may have
// changed.
func (d *dispatcher) keepTime() {
	if !d.cleared {
		return
	}
	now := d.nowMS()
	by := d.p.agent.book.StartByMS()
	holds := now < by
	ticket := d.book.Lease(holds)
	d.perform(d.node.SetLease(now, holds))
	if ticket != 0 {
		d.refresh(ticket)
	}
	if now >= d.node.WakeMS() {
		d.perform(d.node.Tick(now))
	}
	d.wake()
}

// wake plans the next look at the time.
func (d *dispatcher) wake() {
	at := d.node.WakeMS()
	if by := d.p.agent.book.StartByMS(); d.book.Holds() {
		at = min(at, by)
	}
	d.wakes++
	n := d.wakes
	if at == route.Never {
		return
	}
	d.p.after(max(at-d.nowMS(), 1)+d.f.between(0, 20), func() {
		if n == d.wakes {
			d.keepTime()
		}
	})
}

// refresh finds out how new a view has to be to tell which slots this node has.
func (d *dispatcher) refresh(ticket uint64) {
	d.p.enter(func() {
		d.p.read(func(v *state.View) {
			d.p.run(func() {
				d.book.Fresh(ticket, v.Index)
				d.lookSoon()
			})
		})
	})
	d.p.after(readPatienceMS, func() {
		if d.book.Asks(ticket) {
			d.refresh(ticket)
		}
	})
}

// applied looks whether what was applied concerns functions.
func (d *dispatcher) applied(out replica.Output) {
	for i := range out.Changes {
		switch out.Changes[i].Kind {
		case state.ChangeFunction, state.ChangeFunctionVersion, state.ChangeSlots, state.ChangeNode:
			d.lookSoon()
			return
		}
	}
	if out.Restored {
		d.lookSoon()
	}
}

func (d *dispatcher) lookSoon() {
	if !d.looking && d.cleared {
		d.looking = true
		d.p.after(functionOnceMS, d.look)
	}
}

// look tells the node what the view says.
func (d *dispatcher) look() {
	d.looking = false
	view := d.p.r.View()
	self := view.Node(d.p.m.name)
	if self == nil || self.RaftID != d.p.m.raftID {
		return
	}
	now := d.nowMS()
	settings := d.settings(view)
	for i := range settings {
		for _, r := range settings[i].Revisions {
			d.targets[r.Revision] = r.TargetConcurrency
		}
	}
	d.perform(d.node.SetSettings(now, settings))
	d.perform(d.node.SetBudget(now, functionsMiB))
	d.perform(d.node.SetDraining(now, self.Availability == blixard.Draining))
	d.takeSlots(view, self)
	d.build(view, self)
	d.wake()
}

// takeSlots tells the node of the slots that the cluster has for it.
func (d *dispatcher) takeSlots(view *state.View, self *blixard.Node) {
	view.SlotsOn(self.Name, func(s *blixard.FunctionSlots) bool {
		d.know(s.Function)
		return true
	})
	for _, name := range d.names {
		if !d.book.Believes(name, view.Index) || d.node.Asking(name) {
			continue
		}
		count := 0
		if s := view.Slots(name, self.Name); s.NodeEpoch == self.Epoch {
			count = s.Count
		}
		d.perform(d.node.Slots(d.nowMS(), name, count))
	}
}

func (d *dispatcher) know(name blixard.FunctionName) {
	if at, ok := slices.BinarySearch(d.names, name); !ok {
		d.names = slices.Insert(d.names, at, name)
	}
}

// settings are the functions as the node has to know them.
func (d *dispatcher) settings(view *state.View) (all []route.Settings) {
	wall := d.p.m.wallMS()
	site := route.Site{Node: d.p.m.name, Workers: workers(view), WallMS: wall}
	view.Functions(func(f *blixard.Function) bool {
		if f.Deleting {
			return true
		}
		s := route.Settings{
			Function: f.Name, UID: f.UID, MaxConcurrent: f.MaxConcurrent,
			Contended: view.SlotsShort(f.Name, site.Node, wall) > 0, Over: view.SlotsLeased(f.Name) > f.MaxConcurrent,
		}
		view.FunctionVersions(f.Name, func(fv *blixard.FunctionVersion) bool {
			if c := fv.Callable(); c != nil {
				s.Revisions = append(s.Revisions, site.SettingsOf(f, c, d.p.m.guests.templates[route.RevisionOf(f, c)]))
			}
			return true
		})
		slices.SortFunc(s.Revisions, func(a, b route.RevisionSettings) int { return a.Revision.Compare(b.Revision) })
		all = append(all, s)
		return true
	})
	slices.SortFunc(all, func(a, b route.Settings) int { return cmp.Compare(a.Function, b.Function) })
	return all
}

func workers(view *state.View) (names []blixard.NodeName) {
	view.Nodes(func(n *blixard.Node) bool {
		if n.State == blixard.NodeReady && n.Availability == blixard.Active && n.RunsInstances() {
			names = append(names, n.Name)
		}
		return true
	})
	slices.Sort(names)
	return names
}

// perform carries actions out, or begins to. Nothing comes back before it has
// returned.
func (d *dispatcher) perform(actions []route.Action) {
	for _, a := range actions {
		d.f.w.mix(uint64(d.p.m.at), uint64(a.Call), uint64(a.Instance), uint64(a.N), uint64(len(a.Kind)))
		switch a.Kind {
		case route.Assign:
			d.assign(d.calls[a.Call], a)
		case route.Reject:
			d.answer(a.Call, a.Refusal)
		case route.Abort:
			if o := d.calls[a.Call]; o != nil {
				delete(d.calls, a.Call)
				o.why = a.Refusal
				d.instances[a.Instance].aborts = append(d.instances[a.Instance].aborts, o)
			}
		case route.Spawn, route.Start:
			d.order(a)
		case route.Look:
			id := a.Instance
			working := !d.f.quiet && d.f.chance(10)
			d.p.after(d.f.between(1, 30), func() { d.in(func(now int64) []route.Action { return d.node.Looked(now, id, working) }) })
		case route.Kill:
			d.kill(d.instances[a.Instance], a.Why)
		case route.Lease:
			d.lease(a.Revision.Function, a.N)
		case route.Return:
			d.giveBack(a.Revision.Function, a.N)
		}
	}
}

// in runs an input of the node.
func (d *dispatcher) in(input func(nowMS int64) []route.Action) {
	d.perform(input(d.nowMS()))
	d.wake()
}

// answer tells a caller that no guest has had its call.
func (d *dispatcher) answer(id route.CallID, why route.Refusal) {
	if o := d.calls[id]; o != nil {
		delete(d.calls, id)
		d.finish(o, &route.Refused{Why: why, Err: blixard.Errorf(blixard.CodeUnavailable, "%s", why)}, false)
	}
}

func (d *dispatcher) finish(o *offer, r *route.Refused, failed bool) {
	if o.over {
		return
	}
	o.over = true
	d.p.after(0, func() { o.done(r, failed) })
}

func refused(why route.Refusal, handed bool) *route.Refused {
	return &route.Refused{Why: why, Handed: handed, Err: blixard.Errorf(blixard.CodeUnavailable, "%s", why)}
}

// offer offers a call to this node.
func (d *dispatcher) offer(c *functionCall, rev route.Revision, deadlineMS int64, ch route.Choice, done func(*route.Refused, bool)) {
	d.find(c, rev, d.nowMS()+findPatienceMS, func(why route.Refusal) {
		if why != "" {
			done(refused(why, false), false)
			return
		}
		d.know(rev.Function)
		d.nextCall++
		id := d.nextCall
		d.calls[id] = &offer{call: c, done: done}
		d.in(func(now int64) []route.Action {
			return d.node.Call(now, route.Call{ID: id, Revision: rev, DeadlineMS: max(deadlineMS, 1), MayStart: ch.MayStart, MayWait: ch.MayWait})
		})
	})
}

// find waits a little for a revision that the gateway knows and this node does
// not yet.
func (d *dispatcher) find(c *functionCall, rev route.Revision, untilMS int64, then func(route.Refusal)) {
	view := d.p.r.View()
	f := view.Function(rev.Function)
	fv := view.FunctionVersion(rev.Function, rev.Number)
	switch {
	case d.node.Knows(rev):
		then("")
		return
	case f != nil && fv != nil && fv.Callable() != nil && fv.Callable().Seq > rev.Seq:
		then(route.Superseded)
		return
	case !d.cleared || d.nowMS() >= untilMS:
		then(route.Unknown)
		return
	}
	d.lookSoon()
	d.p.after(50, func() { d.find(c, rev, untilMS, then) })
}

// assign hands a call to its instance, which takes a moment: the process may stand
// still meanwhile, and the guest be gone.
func (d *dispatcher) assign(o *offer, a route.Action) {
	in, id := d.instances[a.Instance], a.Call
	o.in = in
	d.p.after(d.f.between(0, 3), func() {
		if in.g == nil || !in.g.alive { // nothing reaches it
			delete(d.calls, id)
			d.in(func(now int64) []route.Action { return d.node.CallEnded(now, id, route.Ended{Broken: true}) })
			if o.why == "" {
				d.finish(o, refused(route.Gone, false), false)
			}
			return
		}
		in.g.run(o.call, func(failed bool) {
			d.p.run(func() {
				delete(d.calls, id)
				d.in(func(now int64) []route.Action { return d.node.CallEnded(now, id, route.Ended{UsedMiB: 1}) })
				if o.why == "" {
					d.f.w.count["function answered"]++
					d.finish(o, nil, failed)
				}
			})
		})
	})
}

// order begins a Spawn or a Start.
func (d *dispatcher) order(a route.Action) {
	in := d.instances[a.Instance]
	if in == nil {
		in = &functionInstance{id: a.Instance, rev: a.Revision, target: d.targets[a.Revision]}
		d.instances[a.Instance] = in
	}
	h := d.p.m.guests
	ms, fails := d.f.between(minFunctionStart, d.f.startMS), strikes(&h.failStarts)
	if strikes(&h.slowStarts) {
		d.f.w.count["function start slow"]++
		ms += d.f.between(500, 2*startLimitMS)
	}
	failed := func() {
		d.f.w.count["function start fails"]++
		d.f.w.say("%s cannot start an instance of %s", d.p.m.name, in.rev)
		d.remove(in)
	}
	d.p.after(min(ms, startLimitMS)/2, func() {
		if in.killed {
			return
		}
		if in.g == nil {
			in.g = h.spawn(d.p, in.rev, in.target, func() { d.lost(in) })
		}
		d.p.after(min(ms, startLimitMS)/2, func() {
			switch {
			case in.killed:
			case fails || ms >= startLimitMS || !in.g.alive:
				failed()
			case a.Kind == route.Spawn:
				d.in(func(now int64) []route.Action { return d.node.Spawned(now, in.id) })
			default:
				d.f.w.count["function started"]++
				h.templates[in.rev] = true // fetched, by now
				in.g.ready = true
				d.in(func(now int64) []route.Action { return d.node.Started(now, in.id, "") })
			}
		})
	})
}

// lost is a guest that has ended by itself.
func (d *dispatcher) lost(in *functionInstance) {
	if !in.killed && d.instances[in.id] == in {
		d.in(func(now int64) []route.Action { return d.node.Lost(now, in.id) })
	}
}

// kill ends an instance, however long that takes.
func (d *dispatcher) kill(in *functionInstance, why string) {
	if in.killed {
		return
	}
	in.killed = true
	d.ending(in, why)
}

// remove ends what could not be started.
func (d *dispatcher) remove(in *functionInstance) {
	in.killed = true
	d.ending(in, "it could not be started")
}

func (d *dispatcher) ending(in *functionInstance, why string) {
	h := d.p.m.guests
	d.p.after(d.f.between(1, 60), func() {
		if in.g != nil && in.g.alive {
			if strikes(&h.failKills) {
				d.f.w.count["function kill fails"]++
				d.p.after(d.f.between(50, 2000), func() { d.ending(in, why) })
				return
			}
			in.g.end(why)
		}
		d.p.after(1, func() {
			delete(d.instances, in.id)
			d.in(func(now int64) []route.Action { return d.node.Died(now, in.id) })
			for _, o := range in.aborts {
				if o.why == route.TimedOut {
					d.f.w.count["function timed out"]++
					d.finish(o, nil, true) // the function's own error, as callers see it
				} else {
					d.finish(o, refused(o.why, true), false)
				}
			}
			in.aborts = nil
		})
	})
}

func (d *dispatcher) key(what string) string {
	d.proposal++
	return fmt.Sprintf("fn-%s/%s/%d/%d/%d", what, d.p.m.name, d.p.m.raftID, d.p.m.lives, d.proposal)
}

// propose proposes a command; ended gets its outcome, or an error when none comes
// in time.
func (d *dispatcher) propose(c state.Command, key string, patienceMS int64, ended func(state.Outcome, *blixard.Error)) {
	over := false
	end := func(o state.Outcome, err *blixard.Error) {
		if !over {
			over = true
			ended(o, err)
		}
	}
	d.p.after(patienceMS, func() { end(state.Outcome{}, blixard.Errorf(blixard.CodeUnavailable, "it took too long")) })
	d.p.enter(func() {
		d.p.propose(state.Envelope{Key: key, Actor: "dispatcher of " + string(d.p.m.name), Command: c}, func(res state.Result) {
			d.p.run(func() { end(res.Outcome, res.Err) })
		}, func() bool { return over })
	})
}

// lease asks the cluster for slots.
func (d *dispatcher) lease(name blixard.FunctionName, n int) {
	self := d.p.r.View().Node(d.p.m.name)
	d.know(name)
	d.book.Began(name)
	if self == nil { // it is no member any more
		d.p.after(0, func() {
			d.landed(name, state.Outcome{}, nil)
			d.in(func(now int64) []route.Action { return d.node.Granted(now, name, 0) })
		})
		return
	}
	c := &state.LeaseSlots{Function: name, Node: self.Name, NodeEpoch: self.Epoch, Want: n}
	d.propose(c, d.key("lease"), leasePatienceMS, func(o state.Outcome, err *blixard.Error) {
		granted := min(int(o.Value), n)
		d.landed(name, o, err)
		if err != nil {
			granted = 0
		}
		if granted > 0 {
			d.f.w.count["slots leased"]++
		}
		if granted < n {
			d.f.w.count["slots short"]++
		}
		d.f.w.say("%s gets %d of %d slots of %s: %v", d.p.m.name, granted, n, name, err)
		d.in(func(now int64) []route.Action { return d.node.Granted(now, name, granted) })
		d.lookSoon()
	})
}

// giveBack returns slots, however long that takes: they are not used any more.
func (d *dispatcher) giveBack(name blixard.FunctionName, n int) {
	self := d.p.r.View().Node(d.p.m.name)
	d.book.Began(name)
	if self == nil {
		return // it is no member any more
	}
	c, key := &state.ReturnSlots{Function: name, Node: self.Name, NodeEpoch: self.Epoch, Count: n}, d.key("return")
	var try func()
	try = func() {
		d.propose(c, key, leasePatienceMS, func(o state.Outcome, err *blixard.Error) {
			if again(err) {
				d.p.after(functionRetryMS, try)
				return
			}
			d.f.w.count["slots returned"]++
			d.f.w.say("%s gives back %d slots of %s: %v", d.p.m.name, n, name, err)
			d.landed(name, o, err)
			d.lookSoon()
		})
	}
	try()
}

// again tells whether a proposal may succeed if it is made once more.
func again(err *blixard.Error) bool {
	return err != nil && (err.Code == blixard.CodeUnavailable || err.Code == blixard.CodeOverloaded)
}

func (d *dispatcher) landed(name blixard.FunctionName, o state.Outcome, err *blixard.Error) {
	index := o.Index
	if err != nil {
		index = d.p.r.View().Index + 1
	}
	d.book.Landed(name, index)
}

// build makes the templates that the leader has this node make.
func (d *dispatcher) build(view *state.View, self *blixard.Node) {
	if !d.book.Holds() {
		return
	}
	view.PendingVersions(func(fv *blixard.FunctionVersion) bool {
		f := view.Function(fv.Function)
		if f == nil || fv.Builder != self.Name || fv.BuilderEpoch != self.Epoch {
			return true
		}
		rev := route.RevisionOf(f, fv)
		if d.building[rev] {
			return true
		}
		d.building[rev] = true
		c := &state.ReportFunction{Function: fv.Function, Number: fv.Number, Seq: fv.Seq, Node: self.Name, NodeEpoch: self.Epoch, State: blixard.FunctionActive}
		if h := d.p.m.guests; strikes(&h.failBuilds) {
			c.State, c.Code, c.Reason = blixard.FunctionFailed, "InitError", "it fails"
		}
		key := fmt.Sprintf("fn-build/%s/%s/%d", self.Name, rev, self.Epoch)
		d.p.after(d.f.between(20, 4*d.f.startMS), func() {
			if c.State == blixard.FunctionActive {
				d.p.m.guests.templates[rev] = true
			}
			d.f.w.count["function built"]++
			d.report(c, key, func() { delete(d.building, rev) })
		})
		return true
	})
}

func (d *dispatcher) report(c state.Command, key string, done func()) {
	d.propose(c, key, leasePatienceMS, func(_ state.Outcome, err *blixard.Error) {
		if again(err) {
			d.p.after(functionRetryMS, func() { d.report(c, key, done) })
			return
		}
		done()
	})
}
