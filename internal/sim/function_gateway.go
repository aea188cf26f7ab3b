package sim

import (
	"fmt"
	"slices"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/replica"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/schedule"
	"github.com/blixard/blixard/internal/state"
)

// Times of internal/gateway, some with less patience.
const (
	gatewayStartMS    = 8000 // beyond a function's timeout, for a start
	gatewayTries      = 6
	announceMS        = 500
	keepAliveMS       = 1000
	unknownAgeMS      = 3_600_000
	downMS            = 1000
	dialMS            = 1000
	mostSuperseded    = 3
	asyncLookMS       = 500
	asyncAtOnce       = 4
	settlePatienceMS  = 60_000
	settleAgainMS     = 1000
	callBytes         = 1000
	announcementBytes = 300
)

// gateway offers calls to nodes as internal/gateway does, and attempts the events
// that its node owns. It is part of the process.
type gateway struct {
	p     *process
	f     *functions
	d     *dispatcher
	peers map[blixard.NodeName]*peerLoad
	told  string // what was announced last
	at    int64  // when
	busy  map[string]bool
}

// peerLoad is what another node has told.
type peerLoad struct {
	epoch       uint64
	sentMS      int64 // by its clock
	heardMS     int64
	downUntilMS int64
	load        []revisionLoad
	draining    bool
}

type revisionLoad struct {
	rev                     route.Revision
	warm, pooled, slotsFree int
	template                bool
}

func newGateway(p *process, d *dispatcher) *gateway {
	return &gateway{p: p, f: p.m.w.functions, d: d, peers: map[blixard.NodeName]*peerLoad{}, busy: map[string]bool{}}
}

func (g *gateway) begin() {
	g.p.every(announceMS, g.announce)
	g.p.every(asyncLookMS, g.attempts)
}

func (g *gateway) load() (out []revisionLoad) {
	for _, f := range g.d.node.Report() {
		free := max(0, f.Leased-f.Used)
		for _, r := range f.Revisions {
			out = append(out, revisionLoad{r.Revision, min(r.Free, free), r.Pooled, free, g.p.m.guests.templates[r.Revision]})
		}
	}
	return out
}

// announce tells the other nodes what there is here, when it has changed or was
// not told for a while.
func (g *gateway) announce() {
	view := g.p.r.View()
	self := view.Node(g.p.m.name)
	if self == nil || view.FunctionCount() == 0 {
		return
	}
	load, draining := g.load(), self.Availability == blixard.Draining
	now := g.p.m.monoMS()
	if text := fmt.Sprint(load, draining); text == g.told && now-g.at < keepAliveMS {
		return
	} else {
		g.told, g.at = text, now
	}
	for _, m := range g.f.w.machines {
		if m == g.p.m {
			continue
		}
		g.f.w.net.carry(g.p.m, m, announcementBytes, func() {
			if p := m.proc; p != nil && p.gateway != nil {
				p.run(func() { p.gateway.hear(self, now, load, draining) })
			}
		}, nil)
	}
}

func (g *gateway) hear(from *blixard.Node, sentMS int64, load []revisionLoad, draining bool) {
	x := g.peer(from.Name)
	if x.epoch == from.Epoch && sentMS < x.sentMS {
		return
	}
	*x = peerLoad{epoch: from.Epoch, sentMS: sentMS, heardMS: g.p.m.monoMS(), load: load, draining: draining}
}

func (g *gateway) peer(name blixard.NodeName) *peerLoad {
	x := g.peers[name]
	if x == nil {
		x = &peerLoad{}
		g.peers[name] = x
	}
	return x
}

// candidates are the nodes that may answer a call of a version.
func (g *gateway) candidates(view *state.View, rev route.Revision, fv *blixard.FunctionVersion) (out []route.Candidate, known []schedule.FunctionNode) {
	now := g.p.m.monoMS()
	view.Nodes(func(n *blixard.Node) bool {
		if !n.RunsInstances() || n.State != blixard.NodeReady {
			return true
		}
		c := route.Candidate{
			Node: n.Name, Local: n.Name == g.p.m.name, HasSlots: view.Slots(rev.Function, n.Name).Count > 0,
			Fits: schedule.FunctionObjection(n, &fv.Spec) == nil, AgeMS: unknownAgeMS,
		}
		x := g.peer(n.Name)
		load, draining := x.load, x.draining
		switch {
		case c.Local:
			load, draining, c.AgeMS = g.load(), false, 0
		case x.epoch == n.Epoch:
			c.AgeMS = max(0, now-x.heardMS-keepAliveMS)
		default:
			load, draining = nil, false
		}
		if i := slices.IndexFunc(load, func(l revisionLoad) bool { return l.rev == rev }); i >= 0 {
			c.Warm, c.SlotsFree, c.Pooled, c.HasTemplate = load[i].warm, load[i].slotsFree, load[i].pooled, load[i].template
		}
		c.Fits = c.Fits && !draining
		known = append(known, schedule.FunctionNode{Node: n.Name, Template: c.HasTemplate})
		if c.Local || now >= x.downUntilMS {
			out = append(out, c)
		}
		return true
	})
	return out, known
}

// choose orders the nodes for a call that found no free instance here.
func (g *gateway) choose(view *state.View, f *blixard.Function, fv *blixard.FunctionVersion) []route.Choice {
	candidates, known := g.candidates(view, route.RevisionOf(f, fv), fv)
	for _, p := range schedule.RankFunction(view, schedule.FunctionRequest{Spec: &fv.Spec, From: g.p.m.name, Nodes: known, OvercommitPercent: 200}) {
		for i := range candidates {
			if c := &candidates[i]; c.Node == p.Node && c.Fits {
				c.Score = 1 + int(max(p.Score, 0)/1000)
			}
		}
	}
	choices := route.Pick(candidates, view.SlotsLeased(f.Name) >= f.MaxConcurrent, g.f.rng.Uint64())
	if len(choices) > gatewayTries {
		choices = append(choices[:gatewayTries-1], choices[len(choices)-1])
	}
	return choices
}

// routed is a call on its way to a node.
type routed struct {
	g          *gateway
	call       *functionCall
	view       *state.View
	f          *blixard.Function
	fv         *blixard.FunctionVersion
	deadlineMS int64 // monotonic, here
	refusals   []route.Refusal
	superseded int
	over       bool
	done       func(r *route.Refused, failed bool)
}

// invoke has a call answered, once: with what the function said, or why no
// function has.
func (g *gateway) invoke(c *functionCall, done func(r *route.Refused, failed bool)) {
	x := &routed{g: g, call: c, done: done}
	if why := x.resolve(); why != "" {
		x.answer(refused(why, false), false)
		return
	}
	limit := x.fv.Spec.TimeoutMS + gatewayStartMS
	x.deadlineMS = g.p.m.monoMS() + limit
	g.p.after(limit, func() { x.answer(refused(route.Late, true), false) })
	x.once()
}

// resolve finds the version that a call is for.
func (x *routed) resolve() route.Refusal {
	x.view = x.g.p.r.View()
	x.f = x.view.Function(x.call.name)
	fv, err := x.view.Resolve(x.call.name, "", 0)
	if err != nil || x.f.Deleting {
		return route.Unknown
	}
	if x.fv = fv.Callable(); x.fv == nil {
		return route.Unknown
	}
	if x.f.MaxConcurrent == 0 {
		return route.NoSlot
	}
	return ""
}

func (x *routed) answer(r *route.Refused, failed bool) {
	if x.over {
		return
	}
	x.over = true
	x.g.f.w.after(0, func() { x.done(r, failed) })
}

// once offers the call to nodes until one has taken it: to this one first, if an
// instance is free.
func (x *routed) once() {
	choices := []route.Choice{{Node: x.g.p.m.name}}
	at, chosen := 0, false
	var next func()
	next = func() {
		if at == len(choices) && !chosen {
			choices, chosen, at = x.g.choose(x.view, x.f, x.fv), true, 0
		}
		if at == len(choices) || x.over {
			x.answer(refused(route.Worst(x.refusals), false), false)
			return
		}
		ch := choices[at]
		at++
		x.offer(ch, func(r *route.Refused, failed bool) {
			switch {
			case x.over:
			case r == nil:
				x.answer(nil, failed)
			case r.Why == route.Superseded && !r.Handed && x.superseded < mostSuperseded:
				x.superseded++
				if why := x.resolve(); why != "" {
					x.answer(refused(why, false), false)
					return
				}
				x.once()
			case r.Again():
				x.refusals = append(x.refusals, r.Why)
				next()
			default:
				x.answer(r, failed)
			}
		})
	}
	next()
}

// offer offers the call to one node, here or elsewhere.
func (x *routed) offer(ch route.Choice, done func(r *route.Refused, failed bool)) {
	g := x.g
	rev, left := route.RevisionOf(x.f, x.fv), x.deadlineMS-g.p.m.monoMS()
	if ch.Node == g.p.m.name {
		g.d.offer(x.call, rev, x.deadlineMS, ch, done)
		return
	}
	g.forward(ch, x.call, rev, left, done)
}

// forward has another node run a call. A connection is made first; once the
// request has gone out, an answer that does not come means that it may have run.
func (g *gateway) forward(ch route.Choice, c *functionCall, rev route.Revision, leftMS int64, done func(*route.Refused, bool)) {
	w, to := g.f.w, g.f.w.machine(ch.Node)
	w.count["forward"]++
	arrived, over := false, false
	end := func(r *route.Refused, failed bool) {
		g.p.run(func() {
			if over {
				return
			}
			over = true
			if r != nil && r.Why == route.Unreachable && !r.Handed {
				g.peer(ch.Node).downUntilMS = g.p.m.monoMS() + downMS
			}
			done(r, failed)
		})
	}
	unreachable := func() { end(refused(route.Unreachable, false), false) }
	w.net.carry(g.p.m, to, callBytes, func() {
		if arrived {
			return // a connection repeats nothing
		}
		arrived = true
		p := to.proc
		if p == nil || p.gateway == nil {
			w.net.carry(to, g.p.m, smallBytes, unreachable, nil)
			return
		}
		p.run(func() {
			p.dispatcher.offer(c, rev, p.dispatcher.nowMS()+leftMS, ch, func(r *route.Refused, failed bool) {
				back := false
				w.net.carry(to, g.p.m, callBytes, func() {
					if !back {
						back = true
						end(r, failed)
					}
				}, func() {
					w.count["forward's answer lost"]++
					end(refused(route.Gone, true), false)
				})
			})
		})
	}, func() { g.p.after(g.f.between(1, dialMS), unreachable) })
}

// attempts attempts the events that this node owns and that are due.
func (g *gateway) attempts() {
	view := g.p.r.View()
	self := view.Node(g.p.m.name)
	if self == nil || self.RaftID != g.p.m.raftID {
		return
	}
	now := g.p.m.wallMS()
	view.EventsOwnedBy(self.Name, self.Epoch, func(e *blixard.AsyncEvent) bool {
		if len(g.busy) >= asyncAtOnce {
			return false
		}
		if !g.busy[e.ID] && e.NotBeforeMS <= now {
			g.busy[e.ID] = true
			g.attempt(e)
		}
		return true
	})
}

func (g *gateway) attempt(e *blixard.AsyncEvent) {
	if state.TooOld(e, g.p.m.wallMS()) {
		g.settle(e, state.Attempt{})
		return
	}
	c := g.f.event(e.ID, e.Function)
	g.f.w.count["event attempt"]++
	g.invoke(c, func(r *route.Refused, failed bool) {
		g.p.run(func() {
			a := state.Attempt{Made: true, FunctionError: failed}
			if failed {
				c.failed++
			}
			if r != nil {
				a.Failure = r.Error()
			} else if failed {
				a.Failure = "Unhandled"
			}
			g.settle(e, a)
		})
	})
}

// settle records what became of an attempt, trying as long as that can help.
func (g *gateway) settle(e *blixard.AsyncEvent, a state.Attempt) {
	s := a.Settlement(e, g.p.r.View().Function(e.Function), g.p.m.wallMS())
	key := g.d.key("settle-" + e.ID)
	g.f.w.count["event settled: "+string(s.Result)]++
	g.f.w.say("%s settles %s: %s %s", g.p.m.name, e.ID, s.Result, s.Error)
	var try func()
	try = func() {
		g.d.propose(s, key, settlePatienceMS/10, func(_ state.Outcome, err *blixard.Error) {
			if again(err) {
				g.p.after(settleAgainMS, try)
				return
			}
			delete(g.busy, e.ID)
		})
	}
	try()
}

// applied is for what follows the state.
func (p *process) functionsApplied(out replica.Output) {
	if p.dispatcher != nil {
		p.dispatcher.applied(out)
	}
}

// newFunctions gives a process what is played of functions. An older release
// knows nothing of them.
func (p *process) newFunctions() {
	if p.m.w.k.Functions > 0 && p.m.level >= blixard.FeatureLevel {
		p.dispatcher = newDispatcher(p)
		p.gateway = newGateway(p, p.dispatcher)
	}
}

func (p *process) beginFunctions() {
	if p.dispatcher != nil {
		p.dispatcher.begin()
		p.gateway.begin()
	}
}
