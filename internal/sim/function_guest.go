package sim

import (
	"fmt"
	"slices"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/route"
)

// guests are the microVMs of functions on a machine, with what is needed to make
// them. They outlive the process that started them, and a call that was handed to
// one runs on whoever still wants its answer.
type guests struct {
	m    *machine
	next int
	all  []*guest // that run, oldest first
	// templates are on the disk.
	templates map[route.Revision]bool

	// What goes wrong at the next occasions: how often.
	failStarts, slowStarts, failKills, hangs, deaths, failBuilds int
}

// guest is one microVM of a function.
type guest struct {
	m      *machine
	key    string
	rev    route.Revision
	target int // calls at once
	alive  bool
	ready  bool     // it can take calls; else it is of the pool, or starting
	owner  *process // that started it
	calls  []*execution
	lost   func() // tells the owner that it is gone
}

// execution is a call while a guest runs it.
type execution struct {
	g    *guest
	call *functionCall
}

func newGuests(m *machine) *guests { return &guests{m: m, templates: map[route.Revision]bool{}} }

func (h *guests) spawn(p *process, rev route.Revision, target int, lost func()) *guest {
	h.next++
	g := &guest{m: h.m, key: fmt.Sprintf("%s/fn%d", h.m.name, h.next), rev: rev, target: target, alive: true, owner: p, lost: lost}
	h.all = append(h.all, g)
	h.m.w.count["function guest"]++
	return g
}

// end ends a guest and whatever it runs.
func (g *guest) end(why string) {
	if !g.alive {
		return
	}
	g.alive = false
	h := g.m.guests
	h.all = slices.DeleteFunc(h.all, func(x *guest) bool { return x == g })
	if len(g.calls) > 0 {
		g.m.w.count["execution cut short"]++
		g.m.w.say("%s ends in the middle of %d calls: %s", g.key, len(g.calls), why)
	}
	for _, e := range g.calls {
		g.m.w.functions.ran(g, e.call, -1)
	}
	g.calls = nil
	if p := g.owner; p.alive() {
		p.after(g.m.w.functions.between(0, 5), g.lost)
	}
}

// endAll ends all guests here.
func (h *guests) endAll(why string) {
	for _, g := range slices.Clone(h.all) {
		g.end(why)
	}
}

// mend has nothing go wrong any more.
func (h *guests) mend() {
	h.failStarts, h.slowStarts, h.failKills, h.hangs, h.deaths, h.failBuilds = 0, 0, 0, 0, 0, 0
}

// pick is some guest that runs here, one with a call if there is any; nil if none
// does.
func (h *guests) pick(n int64) *guest {
	if len(h.all) == 0 {
		return nil
	}
	at := int(uint64(n) % uint64(len(h.all)))
	for i := range h.all {
		if g := h.all[(at+i)%len(h.all)]; len(g.calls) > 0 {
			return g
		}
	}
	return h.all[at]
}

// run has a guest run a call; ended is called when the guest has ended it, and
// never if the guest ends first. It tells what the function said.
func (g *guest) run(c *functionCall, ended func(failed bool)) {
	f, h := g.m.w.functions, g.m.guests
	e := &execution{g, c}
	g.calls = append(g.calls, e)
	if len(g.calls) > g.target || !g.ready {
		g.m.w.violated("S10 an instance has no more calls than it takes", "%s of %s has %d, and takes %d (ready: %t)", g.key, g.rev, len(g.calls), g.target, g.ready)
	}
	f.ran(g, c, 1)
	ms := f.between(1, f.handlerMS)
	switch {
	case strikes(&h.hangs):
		f.w.count["function hangs"]++
		return
	case strikes(&h.deaths):
		f.w.count["function guest dies in a call"]++
		f.w.after(ms, func() { g.end("it died") })
		return
	}
	failed := !f.quiet && f.chance(5)
	f.w.after(ms, func() {
		if !slices.Contains(g.calls, e) {
			return // it is gone
		}
		g.calls = slices.DeleteFunc(g.calls, func(x *execution) bool { return x == e })
		f.ran(g, c, -1)
		if !failed {
			c.succeeded++
		}
		ended(failed)
	})
}

// functionCall is what a caller wants done: one sync call, or one event with all
// its attempts. The world knows of it what no node can.
type functionCall struct {
	id        string
	name      blixard.FunctionName
	async     bool
	began     int // executions
	succeeded int
	failed    int // attempts that ended in the function's error
	// untouched: the caller was told that no guest had it.
	untouched bool
	answers   int
}
