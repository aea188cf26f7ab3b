package sim

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/replica"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/state"
)

// functions are the users of functions, each with one of its own, and what must
// hold of all functions whatever goes wrong:
//
//	S10 what guests of a function run on a node, at any instant of true time, is
//	    no more than the slots that the newest state has leased to the node
//	S10 slots are leased up to the function's limit, and no further
//	S10 an instance has no more calls than it takes, and none before it is ready
//	S10 a sync call is answered once, runs once at most, and has run if a function
//	    has answered it, and not if the caller was told that no guest had it
//	S10 an event that was accepted leaves the state when an attempt has succeeded,
//	    when its function is deleted, or never: dead ones are kept
//	L4 calls succeed, events are attempted, and slots and instances that nobody
//	    needs are given back, once nothing goes wrong any more
type functions struct {
	w         *world
	rng       *rand.Rand
	users     []*functionUser
	quiet     bool
	startMS   int64 // how long an instance takes to start at most
	handlerMS int64 // and a call
	serial    int

	view    *state.View // the newest that any node has
	index   uint64
	running map[functionAt]int // executions in guests
	leased  map[functionAt]int
	limits  map[blixard.FunctionName]int
	gone    map[blixard.FunctionName]bool // being deleted, or deleted
	events  map[string]*functionCall
	known   map[string]bool // events that were seen in the state: whether they are in it still
	jumped  bool            // some changes were not seen one by one
	open    map[*functionCall]bool
}

type functionAt struct {
	name blixard.FunctionName
	node blixard.NodeName
}

// functionUser deploys a function, calls it, changes it, deletes it.
type functionUser struct {
	f      *functions
	name   blixard.FunctionName
	exists bool
	busy   bool  // waits for an answer to a change
	asleep bool  // next is planned
	digest int   // of the code, as a number
	proved int64 // when a call last succeeded while all was well, 0 for not yet
	asked  int64 // when that was tried last
}

func newFunctions(w *world) *functions {
	f := &functions{
		w: w, rng: rand.New(rand.NewPCG(w.s.Seed, 97)), running: map[functionAt]int{}, leased: map[functionAt]int{}, limits: map[blixard.FunctionName]int{},
		gone: map[blixard.FunctionName]bool{}, events: map[string]*functionCall{}, known: map[string]bool{}, open: map[*functionCall]bool{},
	}
	f.startMS, f.handlerMS = []int64{20, 300, 1500}[f.rng.IntN(3)], []int64{5, 100, 900}[f.rng.IntN(3)]
	for i := range w.k.Functions {
		f.users = append(f.users, &functionUser{f: f, name: blixard.FunctionName(fmt.Sprintf("f%d", i+1))})
	}
	return f
}

func (f *functions) chance(pct int) bool { return f.rng.IntN(100) < pct }

func (f *functions) between(lo, hi int64) int64 {
	if hi <= lo {
		return lo
	}
	return lo + f.rng.Int64N(hi-lo+1)
}

func (f *functions) begin() {
	for _, u := range f.users {
		u.next()
	}
}

// setQuiet has users begin nothing, or go on.
func (f *functions) setQuiet(on bool) {
	f.quiet = on
	for _, m := range f.w.machines {
		if on {
			m.guests.mend()
		}
	}
	for _, u := range f.users {
		u.proved, u.asked = 0, 0
		if !on {
			u.next()
		}
	}
}

// next has a user do the next thing after a while.
func (u *functionUser) next() {
	f := u.f
	if u.asleep {
		return
	}
	u.asleep = true
	f.w.after(f.between(1, f.w.k.ThinkMS)*f.w.pace, func() {
		u.asleep = false
		if f.quiet {
			return
		}
		u.act()
		u.next()
	})
}

func (u *functionUser) act() {
	f := u.f
	switch {
	case u.busy:
	case !u.exists:
		u.digest++
		u.change(&state.CreateFunction{Name: u.name, Spec: u.spec(), CodeDigest: u.code(), MaxConcurrent: 1 + f.rng.IntN(6), Reserved: true}, func() { u.exists = true })
		return
	case f.chance(2):
		u.change(&state.DeleteFunction{Name: u.name}, func() { u.exists = false })
	case f.chance(4):
		u.digest++
		spec := u.spec()
		u.change(&state.UpdateFunction{Name: u.name, Spec: &spec, CodeDigest: u.code()}, func() {})
	case f.chance(8):
		most := f.rng.IntN(7)
		u.change(&state.SetFunction{Name: u.name, Concurrency: &state.ConcurrencyChange{Max: most}}, func() { f.w.count["function limit set"]++ })
	}
	if f.chance(25) {
		u.enqueue()
	}
	for range f.between(0, 5) {
		u.call(func(bool) {})
	}
}

func (u *functionUser) code() string { return fmt.Sprintf("%064x", u.digest) }

func (u *functionUser) spec() blixard.FunctionSpec {
	f := u.f
	s := blixard.FunctionSpec{MemoryMiB: 64, TimeoutMS: f.between(1000, 3000), ScaleDownDelayMS: f.between(200, 4000), TargetConcurrency: int(f.between(0, 2))}
	if f.chance(15) {
		s.MinInstances = 1
	}
	if f.chance(15) {
		s.MaxInstances = 2
	}
	if f.chance(15) {
		s.RecycleCalls = 3
	}
	s.Defaults()
	return s
}

// change proposes a change again and again, through any node, until it is
// answered.
func (u *functionUser) change(cmd state.Command, done func()) {
	f := u.f
	f.serial++
	e := state.Envelope{Key: fmt.Sprintf("function/%d", f.serial), Actor: "user", Command: cmd}
	u.busy = true
	answered := false
	var try func()
	try = func() {
		if answered {
			return
		}
		if p := f.w.anyProcess(f.rng); p != nil {
			p.enter(func() {
				p.propose(e, func(res state.Result) {
					if answered {
						return
					}
					if again(res.Err) {
						return
					}
					answered, u.busy = true, false
					f.w.say("the user of %s is answered by %s: %T %v", u.name, p.m.name, cmd, res.Err)
					if res.Err == nil {
						f.w.count[strings.TrimPrefix(fmt.Sprintf("%T", cmd), "*state.")]++
						done()
					}
				}, func() bool { return answered })
			})
		}
		f.w.after(f.between(1000, 3000), try)
	}
	try()
}

// call makes a sync call through any node's gateway; ended gets whether it
// succeeded, unless the node goes down.
func (u *functionUser) call(ended func(ok bool)) {
	f := u.f
	p := f.w.anyProcess(f.rng)
	if p == nil || p.gateway == nil {
		return
	}
	f.serial++
	c := &functionCall{id: fmt.Sprintf("call%d", f.serial), name: u.name}
	f.w.count["function call"]++
	f.open[c] = true
	p.run(func() {
		p.gateway.invoke(c, func(r *route.Refused, failed bool) {
			f.answered(c, r, failed)
			ended(r == nil && !failed)
		})
	})
	// Long after every deadline it must have been answered, if its node lives.
	p.after(60_000, func() {
		if c.answers == 0 {
			f.w.violated("S10 a call is answered once", "%s of %s on %s has no answer", c.id, c.name, p.m.name)
		}
	})
}

// answered is a sync call with its answer.
func (f *functions) answered(c *functionCall, r *route.Refused, failed bool) {
	delete(f.open, c)
	c.answers++
	switch {
	case c.answers > 1:
		f.w.violated("S10 a call is answered once", "%s of %s has %d answers", c.id, c.name, c.answers)
	case r == nil && !failed && c.succeeded != 1:
		f.w.violated("S10 an answer is of an execution", "%s of %s has succeeded, and ran %d times, %d of them well", c.id, c.name, c.began, c.succeeded)
	case r == nil:
		f.w.count["function call answered"]++
	case r.Handed:
		f.w.count["function call in doubt"]++
	case c.began > 0:
		f.w.violated("S10 what no guest had has not run", "%s of %s was refused (%s) and has run", c.id, c.name, r.Why)
	default:
		c.untouched = true
		f.w.count["function call refused: "+string(r.Why)]++
	}
}

// enqueue has an event accepted.
func (u *functionUser) enqueue() {
	f := u.f
	f.serial++
	id := fmt.Sprintf("event%d", f.serial)
	owner := f.w.anyProcess(f.rng)
	if owner == nil {
		return
	}
	cmd := &state.EnqueueEvent{ID: id, Function: u.name, Payload: []byte("{}")}
	if n := owner.r.View().Node(owner.m.name); n != nil {
		cmd.Owner, cmd.OwnerEpoch = n.Name, n.Epoch
	}
	e := state.Envelope{Key: "enqueue-" + id, Actor: "user", Command: cmd}
	answered := false
	tries := 0
	var try func()
	try = func() {
		if answered || tries == 4 {
			return
		}
		tries++
		if p := f.w.anyProcess(f.rng); p != nil {
			p.enter(func() {
				p.propose(e, func(res state.Result) {
					if answered || again(res.Err) {
						return
					}
					answered = true
					if res.Err == nil {
						f.w.count["event accepted"]++
						if _, seen := f.known[id]; !seen && !f.jumped {
							f.w.violated("S10 an accepted event is not lost", "%s of %s was acknowledged by %s, and no state has it", id, u.name, p.m.name)
						}
					}
				}, func() bool { return answered })
			})
		}
		f.w.after(f.between(1000, 3000), try)
	}
	try()
}

// event is what is known of an event and its attempts.
func (f *functions) event(id string, name blixard.FunctionName) *functionCall {
	c := f.events[id]
	if c == nil {
		c = &functionCall{id: id, name: name, async: true}
		f.events[id] = c
	}
	return c
}

// ran counts executions that begin (1) and end (-1) in a guest.
func (f *functions) ran(g *guest, c *functionCall, by int) {
	at := functionAt{c.name, g.m.name}
	f.running[at] += by
	f.w.mix(uint64(f.w.now), uint64(g.m.at), uint64(f.running[at]))
	if by < 0 {
		return
	}
	c.began++
	f.w.count["execution"]++
	if c.untouched {
		f.w.violated("S10 what no guest had has not run", "%s of %s was refused, and runs on %s", c.id, c.name, g.key)
	}
	if c.began > 1 && !c.async {
		f.w.violated("S10 a sync call runs once at most", "%s of %s runs again, on %s", c.id, c.name, g.key)
	}
	f.slots(at)
}

// slots: what runs has slots.
func (f *functions) slots(at functionAt) {
	if n := f.running[at]; n > 0 && f.view != nil {
		if s := f.view.Slots(at.name, at.node); n > s.Count {
			f.w.violated("S10 executions have slots", "%s runs %d times on %s, which has %d slots (of epoch %d) at entry %d", at.name, n, at.node, s.Count, s.NodeEpoch, f.view.Index)
		}
	}
}

// applied takes in the newest state.
func (f *functions) applied(p *process, out replica.Output) {
	if len(f.users) == 0 || p.r.View().Index <= f.index {
		return
	}
	before := f.index
	f.view, f.index = p.r.View(), p.r.View().Index
	if out.Restored {
		f.recount()
		return
	}
	for i := range out.Changes {
		if ch := &out.Changes[i]; ch.Index > before {
			f.changed(ch)
		}
	}
}

func (f *functions) changed(ch *state.Change) {
	switch x := ch.Object.(type) {
	case *blixard.Function:
		f.gone[x.Name], f.limits[x.Name] = x.Deleting || ch.Deleted, x.MaxConcurrent
	case *blixard.FunctionSlots:
		at := functionAt{x.Function, x.Node}
		more := x.Count > f.leased[at]
		f.leased[at] = x.Count
		if more {
			f.limit(x.Function, ch.Index)
		}
		f.slots(at)
	case *blixard.AsyncEvent:
		f.known[x.ID] = !ch.Deleted
		c := f.event(x.ID, x.Function)
		switch {
		case ch.Deleted && c.succeeded == 0 && !f.gone[x.Function]:
			f.w.violated("S10 an accepted event is not lost", "%s of %s goes at entry %d and has not succeeded in %d executions", x.ID, x.Function, ch.Index, c.began)
		case x.Dead:
			f.w.count["event dead"]++
			if x.Condition == state.ConditionRetriesExhausted && c.failed <= x.MaxRetries {
				f.w.violated("S10 an event is attempted before it is dead", "%s of %s is dead (%s) after %d function errors", x.ID, x.Function, x.Condition, c.failed)
			}
		}
	}
}

// limit: no more slots are leased than may be.
func (f *functions) limit(name blixard.FunctionName, index uint64) {
	sum := 0
	for at, n := range f.leased { //order:any a sum
		if at.name == name {
			sum += n
		}
	}
	if sum > f.limits[name] {
		f.w.violated("S10 slots are leased up to the limit", "%d of %s are leased at entry %d, and %d may be", sum, name, index, f.limits[name])
	}
}

// recount takes in a state whose changes are not known.
func (f *functions) recount() {
	v := f.view
	f.jumped = f.jumped || len(f.known) > 0
	clear(f.leased)
	clear(f.limits)
	v.AllSlots(func(s *blixard.FunctionSlots) bool {
		f.leased[functionAt{s.Function, s.Node}] = s.Count
		return true
	})
	for _, u := range f.users {
		f.gone[u.name] = true
	}
	v.Functions(func(x *blixard.Function) bool {
		f.gone[x.Name], f.limits[x.Name] = x.Deleting, x.MaxConcurrent
		return true
	})
	for at := range f.running { //order:any one violation is as good as another, and none depends on another
		f.slots(at)
	}
	for _, id := range slices.Sorted(maps.Keys(f.known)) {
		// A function may have been deleted and made again meanwhile: then its events
		// are gone, and nobody can tell here.
		if f.known[id] && v.AsyncEvent(id) == nil {
			f.known[id] = false
		}
	}
	v.AsyncEvents(func(e *blixard.AsyncEvent) bool {
		f.known[e.ID] = true
		f.event(e.ID, e.Function)
		return true
	})
}

// unsettled tells what functions still lack once nothing goes wrong any more.
func (f *functions) unsettled(v *state.View) string {
	for _, u := range f.users {
		if u.busy {
			return fmt.Sprintf("the user of %s waits for an answer", u.name)
		}
	}
	for _, u := range f.users {
		if why := u.unproved(v); why != "" {
			return why
		}
	}
	if len(f.open) > 0 {
		for _, m := range f.w.machines { // those of nodes that went down have no answer
			if d := m.proc; d != nil && d.dispatcher != nil && len(d.dispatcher.calls) > 0 {
				return fmt.Sprintf("%d calls are under way on %s", len(d.dispatcher.calls), m.name)
			}
		}
	}
	why := ""
	v.AllSlots(func(s *blixard.FunctionSlots) bool {
		if want := f.slotsKept(v, s.Function, s.Node); s.Count > want {
			why = fmt.Sprintf("%s has %d slots of %s and needs %d", s.Node, s.Count, s.Function, want)
		}
		return why == ""
	})
	if why != "" {
		return why
	}
	v.AsyncEvents(func(e *blixard.AsyncEvent) bool {
		why = f.eventUnsettled(v, e)
		return why == ""
	})
	if why != "" {
		return why
	}
	return f.instancesUnsettled(v)
}

// slotsKept is how many slots a node may keep of a function that nobody calls.
func (f *functions) slotsKept(v *state.View, name blixard.FunctionName, node blixard.NodeName) int {
	m := f.w.machine(node)
	x := v.Function(name)
	if m == nil || m.proc == nil || m.proc.dispatcher == nil || x == nil || x.Deleting {
		return 0
	}
	keep := 0
	for _, s := range m.proc.dispatcher.settings(v) {
		for _, r := range s.Revisions {
			if s.Function == name {
				keep = max(keep, r.Min*r.SlotsPerInstance)
			}
		}
	}
	return keep
}

func (f *functions) eventUnsettled(v *state.View, e *blixard.AsyncEvent) string {
	if e.Dead || f.limits[e.Function] == 0 {
		return ""
	}
	n, m := v.Node(e.Owner), f.w.machine(e.Owner)
	if n == nil || m == nil || n.Epoch != e.OwnerEpoch || n.State != blixard.NodeReady || m.proc == nil {
		return fmt.Sprintf("nobody attempts %s of %s, which is %q's", e.ID, e.Function, e.Owner)
	}
	if fv := v.FunctionVersion(e.Function, 0); fv != nil && fv.Callable() != nil && e.NotBeforeMS <= m.wallMS() {
		return fmt.Sprintf("%s of %s is due on %s", e.ID, e.Function, e.Owner)
	}
	return ""
}

// instancesUnsettled: what nobody needs is not there, but for clones of the pool.
func (f *functions) instancesUnsettled(v *state.View) string {
	for _, m := range f.w.machines {
		if m.proc == nil || m.proc.dispatcher == nil {
			continue
		}
		want := map[route.Revision]int{}
		for _, s := range m.proc.dispatcher.settings(v) {
			for _, r := range s.Revisions {
				want[r.Revision] = r.Min
				if s.MaxConcurrent == 0 || r.SlotsPerInstance > s.MaxConcurrent {
					want[r.Revision] = -1 // it need not have any, and may
				}
			}
		}
		have, pooled := map[route.Revision]int{}, 0
		for _, g := range m.guests.all {
			if g.ready {
				have[g.rev]++
			} else {
				pooled++
			}
			if _, known := want[g.rev]; !known {
				return fmt.Sprintf("%s of %s runs, which is no version any more", g.key, g.rev)
			}
		}
		for _, rev := range slices.SortedFunc(maps.Keys(want), route.Revision.Compare) {
			if n := want[rev]; n >= 0 && have[rev] != n {
				return fmt.Sprintf("%s has %d instances of %s and needs %d", m.name, have[rev], rev, n)
			}
		}
		if most := 2; pooled > most {
			return fmt.Sprintf("%s has %d spawned instances, more than %d", m.name, pooled, most)
		}
	}
	return ""
}

// unproved tells whether calls of the function do not succeed yet.
func (u *functionUser) unproved(v *state.View) string {
	f, w := u.f, u.f.w
	x := v.Function(u.name)
	if x == nil {
		return ""
	}
	fv := v.FunctionVersion(u.name, 0)
	switch {
	case x.Deleting:
		return fmt.Sprintf("%s is being deleted", u.name)
	case fv.State == blixard.FunctionPending:
		return fmt.Sprintf("%s is being built by %q", u.name, fv.Builder)
	case u.proved != 0 || x.MaxConcurrent == 0 || fv.Callable() == nil:
		return ""
	}
	if u.asked == 0 || w.now-u.asked > 500 {
		u.asked = w.now
		u.call(func(ok bool) {
			if ok && f.quiet {
				u.proved = w.now
			}
		})
	}
	return fmt.Sprintf("calls of %s do not succeed", u.name)
}
