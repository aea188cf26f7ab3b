package route_test

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/route"
)

// world is what drives a Node in these tests: it keeps its own books of what the
// node ordered and holds them against the invariants.
type world struct {
	t     *rapid.T
	n     *route.Node
	now   int64
	lease bool

	settings map[blixard.FunctionName]*route.Settings
	leased   map[blixard.FunctionName]int // as the cluster has it
	asked    map[blixard.FunctionName]int
	granted  map[blixard.FunctionName]int // as the node was told
	limit    map[blixard.FunctionName]int

	nextCall route.CallID
	calls    map[route.CallID]*modelCall
	vms      map[route.InstanceID]*modelVM
	answers  int
	taking   bool
	dead     *modelVM // died just now
}

type modelCall struct {
	rev      route.Revision
	deadline int64
	in       route.InstanceID // 0 until assigned
	answered bool
}

type modelVM struct {
	rev     route.Revision
	state   string // spawning, pooled, starting, ready, looked at; dying
	calls   []route.CallID
	lost    int // calls that were aborted in it
	looking bool
}

func newWorld(t *rapid.T, limits route.Limits) *world {
	return &world{
		t: t, n: route.NewNode(limits), now: 1,
		settings: map[blixard.FunctionName]*route.Settings{}, leased: map[blixard.FunctionName]int{},
		asked: map[blixard.FunctionName]int{}, granted: map[blixard.FunctionName]int{}, limit: map[blixard.FunctionName]int{},
		calls: map[route.CallID]*modelCall{}, vms: map[route.InstanceID]*modelVM{},
	}
}

// do carries out what can be done at once and keeps the rest as under way.
func (w *world) do(actions []route.Action) {
	for _, a := range slices.Clone(actions) {
		switch a.Kind {
		case route.Assign:
			w.assigned(a)
		case route.Reject:
			c := w.open(a.Call)
			w.check(c.in == 0, "call %d is rejected though instance %d has it", a.Call, c.in)
			w.answer(a.Call)
		case route.Abort:
			c := w.open(a.Call)
			vm := w.vms[a.Instance]
			if vm == nil {
				vm = w.dead
			}
			w.check(c.in == a.Instance && vm != nil, "%s, which has it not", a)
			vm.calls = slices.DeleteFunc(vm.calls, func(id route.CallID) bool { return id == a.Call })
			if !w.taking { // what was taken away may run until it is killed
				vm.lost++
			}
			w.answer(a.Call)
		case route.Spawn, route.Start:
			w.ordered(a)
		case route.Kill:
			vm := w.vms[a.Instance]
			w.check(vm != nil && vm.state != "dying", "%s: it is not there or is being killed", a)
			w.check(len(vm.calls) == 0, "%s while calls %v in it have no answer", a, vm.calls)
			vm.state = "dying"
		case route.Look:
			w.check(w.vms[a.Instance].state == "ready", "%s: it is %s", a, w.vms[a.Instance].state)
			w.vms[a.Instance].looking = true
		case route.Lease:
			f := a.Revision.Function
			w.check(w.asked[f] == 0, "%s while %d are asked for", a, w.asked[f])
			w.asked[f] = a.N
		case route.Return:
			f := a.Revision.Function
			w.granted[f] -= a.N
			w.check(w.granted[f] >= 0, "%s: more than it has", a)
			w.leased[f] -= a.N
		}
	}
	w.invariants()
}

func (w *world) check(ok bool, format string, args ...any) {
	w.t.Helper()
	if !ok {
		w.t.Fatalf("at %d: "+format, append([]any{w.now}, args...)...)
	}
}

func (w *world) open(id route.CallID) *modelCall {
	c := w.calls[id]
	w.check(c != nil && !c.answered, "call %d is answered twice", id)
	return c
}

func (w *world) answer(id route.CallID) {
	w.open(id).answered = true
	w.answers++
}

func (w *world) assigned(a route.Action) {
	c, vm := w.open(a.Call), w.vms[a.Instance]
	w.check(c.in == 0, "call %d is assigned twice", a.Call)
	w.check(vm != nil && vm.state == "ready", "%s: the instance is not ready", a)
	w.check(vm.rev == c.rev, "%s: the call is for %s", a, c.rev)
	w.check(w.lease, "%s without the lease", a)
	c.in = a.Instance
	vm.calls = append(vm.calls, a.Call)
}

func (w *world) ordered(a route.Action) {
	w.check(w.lease, "%s without the lease", a)
	vm := w.vms[a.Instance]
	if a.Pooled {
		w.check(vm != nil && vm.state == "pooled", "%s: it is not in the pool", a)
		vm.state = "starting"
		return
	}
	w.check(vm == nil, "%s: it was ordered before", a)
	state := "starting"
	if a.Kind == route.Spawn {
		state = "spawning"
	}
	w.vms[a.Instance] = &modelVM{rev: a.Revision, state: state}
}

// invariants of the books.
func (w *world) invariants() {
	running := map[blixard.FunctionName]int{}
	var ids []route.InstanceID
	for id, vm := range w.vms {
		ids = append(ids, id)
		if vm.state != "dying" {
			running[vm.rev.Function] += len(vm.calls)
		}
		running[vm.rev.Function] += vm.lost * btoi(w.lease)
		w.check(len(vm.calls) <= w.concurrency(vm.rev), "instance %d has %d calls", id, len(vm.calls))
	}
	slices.Sort(ids)
	w.check(slices.Equal(ids, w.n.Instances()), "the node knows the instances %v, there are %v", w.n.Instances(), ids)
	for f, count := range running {
		w.check(count == 0 || !w.lease || count <= w.granted[f] || w.granted[f] < 0, "%s runs %d calls on %d slots", f, count, w.granted[f])
		w.check(w.leased[f] <= w.limit[f], "%s has %d slots leased of %d", f, w.leased[f], w.limit[f])
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (w *world) concurrency(rev route.Revision) int {
	for _, r := range w.settings[rev.Function].Revisions {
		if r.Revision == rev {
			return r.TargetConcurrency
		}
	}
	return 1 << 30 // gone
}

func (w *world) list() []route.Settings {
	var all []route.Settings
	for _, s := range w.settings {
		all = append(all, *s)
	}
	slices.SortFunc(all, func(a, b route.Settings) int {
		if a.Function < b.Function {
			return -1
		}
		return 1
	})
	return all
}

func (w *world) instances(state string) []route.InstanceID {
	var ids []route.InstanceID
	for id, vm := range w.vms {
		if vm.state == state || state == "" {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// step lets one effect end; false when none is under way.
func (w *world) step(pick func(n int) int) bool {
	type effect func()
	var effects []effect
	for _, id := range w.instances("") {
		vm := w.vms[id]
		switch vm.state {
		case "spawning":
			effects = append(effects, func() {
				vm.state = "pooled"
				w.do(w.n.Spawned(w.now, id))
			})
		case "starting":
			effects = append(effects, func() {
				vm.state = "ready"
				w.do(w.n.Started(w.now, id, ""))
			})
		case "dying":
			effects = append(effects, func() {
				delete(w.vms, id)
				w.do(w.n.Died(w.now, id))
			})
		case "ready":
			if vm.looking {
				effects = append(effects, func() {
					vm.looking = false
					w.do(w.n.Looked(w.now, id, false))
				})
			}
			for _, c := range vm.calls {
				effects = append(effects, func() { w.end(c, route.Ended{}) })
			}
		}
	}
	for _, f := range w.names() {
		if w.asked[f] > 0 {
			effects = append(effects, func() { w.grant(f) })
		}
	}
	if len(effects) == 0 {
		return false
	}
	effects[pick(len(effects))]()
	return true
}

func (w *world) names() []blixard.FunctionName {
	var names []blixard.FunctionName
	for f := range w.settings {
		names = append(names, f)
	}
	slices.Sort(names)
	return names
}

func (w *world) grant(f blixard.FunctionName) {
	got := max(0, min(w.asked[f], w.limit[f]-w.leased[f]))
	w.asked[f] = 0
	w.leased[f] += got
	w.granted[f] += got
	w.do(w.n.Granted(w.now, f, got))
}

func (w *world) end(id route.CallID, e route.Ended) {
	c := w.calls[id]
	vm := w.vms[c.in]
	vm.calls = slices.DeleteFunc(vm.calls, func(o route.CallID) bool { return o == id })
	w.answer(id)
	w.do(w.n.CallEnded(w.now, id, e))
}

func name(i int) blixard.FunctionName { return blixard.FunctionName(fmt.Sprintf("f%d", i)) }

func TestSafetyAndLiveness(t *testing.T) { rapid.Check(t, safety) }
