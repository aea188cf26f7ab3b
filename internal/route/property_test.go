package route_test

import (
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/route"
)

// safety drives a node through anything that can happen, and then lets
// everything succeed: no invariant may break on the way, and in the end each call
// has its answer and nothing is left.
func safety(t *rapid.T) {
	w := newWorld(t, route.Limits{Starts: rapid.IntRange(1, 4).Draw(t, "starts"), Pool: rapid.IntRange(1, 4).Draw(t, "pool")})
	for i := range rapid.IntRange(1, 3).Draw(t, "functions") {
		w.deploy(name(i), 1)
	}
	w.lease = true
	w.do(w.n.SetLease(w.now, true))
	w.do(w.n.SetBudget(w.now, rapid.Int64Range(0, 1000).Draw(t, "budget")))
	t.Repeat(map[string]func(*rapid.T){
		"time":     func(t *rapid.T) { w.t = t; w.pass(rapid.Int64Range(0, 5000).Draw(t, "ms")) },
		"call":     func(t *rapid.T) { w.t = t; w.call() },
		"effect":   func(t *rapid.T) { w.t = t; w.step(func(n int) int { return rapid.IntRange(0, n-1).Draw(t, "which") }) },
		"death":    func(t *rapid.T) { w.t = t; w.death() },
		"lost":     func(t *rapid.T) { w.t = t; w.lost() },
		"broken":   func(t *rapid.T) { w.t = t; w.broken() },
		"leave":    func(t *rapid.T) { w.t = t; w.callerLeaves() },
		"refused":  func(t *rapid.T) { w.t = t; w.leaseFails() },
		"deploy":   func(t *rapid.T) { w.t = t; w.redeploy() },
		"delete":   func(t *rapid.T) { w.t = t; w.remove() },
		"budget":   func(t *rapid.T) { w.t = t; w.do(w.n.SetBudget(w.now, rapid.Int64Range(0, 1000).Draw(t, "budget"))) },
		"drain":    func(t *rapid.T) { w.t = t; w.do(w.n.SetDraining(w.now, rapid.Bool().Draw(t, "draining"))) },
		"lease":    func(t *rapid.T) { w.t = t; w.flipLease() },
		"taken":    func(t *rapid.T) { w.t = t; w.taken() },
		"neighbor": func(t *rapid.T) { w.t = t; w.neighbour() },
	})
	w.t = t
	w.rest()
}

// rest lets everything succeed and checks what is left.
func (w *world) rest() {
	if !w.lease {
		w.flipLease()
	}
	w.do(w.n.SetDraining(w.now, false))
	w.sync()
	for _, f := range w.names() {
		for i := range w.settings[f].Revisions {
			w.settings[f].Revisions[i].Min = 0
		}
	}
	w.settle()
	first := func(int) int { return 0 }
	until := w.now + 4_000_000 // more than the pool is kept
	for w.now < until {
		for range 10_000 {
			if !w.step(first) {
				break
			}
		}
		wake := w.n.WakeMS()
		if wake == route.Never {
			break
		}
		w.pass(max(1, wake-w.now))
	}
	for id, c := range w.calls {
		w.check(c.answered, "call %d has no answer", id)
	}
	w.check(len(w.vms) == 0, "instances are left: %v", w.instances(""))
	for _, f := range w.names() {
		w.check(w.granted[f] == 0, "%s keeps %d slots", f, w.granted[f])
	}
	used, _ := w.n.Memory()
	w.check(used == 0, "%d MiB are used by nothing", used)
}

func (w *world) pass(ms int64) {
	w.now += ms
	if w.now >= w.n.WakeMS() {
		w.do(w.n.Tick(w.now))
	}
}

func (w *world) deploy(f blixard.FunctionName, seq uint64) {
	t := w.t
	r := route.RevisionSettings{
		Revision: route.Revision{Function: f, UID: 1, Seq: seq}, ChargeMiB: rapid.Int64Range(17, 300).Draw(t, "charge"),
		TargetConcurrency: rapid.IntRange(1, 3).Draw(t, "concurrency"), ScaleDownMS: rapid.SampledFrom([]int64{0, 100, 10_000}).Draw(t, "scale down"),
		Min: rapid.IntRange(0, 1).Draw(t, "min"), Burst: rapid.IntRange(0, 3).Draw(t, "burst"), RecycleCalls: rapid.IntRange(0, 4).Draw(t, "recycle"),
		TimeoutMS: rapid.SampledFrom([]int64{0, 500}).Draw(t, "timeout"), Fresh: true,
		Clones: rapid.Bool().Draw(t, "clones"), SlotsPerInstance: rapid.SampledFrom([]int{0, 0, 2}).Draw(t, "slots per instance"),
	}
	s := w.settings[f]
	if s == nil {
		w.limit[f] = rapid.IntRange(0, 6).Draw(t, "limit")
		s = &route.Settings{Function: f, UID: 1, MaxConcurrent: w.limit[f]}
		w.settings[f] = s
	}
	for i := range s.Revisions {
		s.Revisions[i].Retired, s.Revisions[i].Min = true, 0
	}
	s.Revisions = append(s.Revisions, r)
	w.settle()
}

// settle tells the node the settings.
func (w *world) settle() {
	for f, s := range w.settings {
		s.Contended = w.leased[f] >= w.limit[f]
	}
	w.do(w.n.SetSettings(w.now, w.list()))
}

func (w *world) redeploy() {
	f := rapid.SampledFrom(w.names()).Draw(w.t, "function")
	s := w.settings[f]
	if len(s.Revisions) > 3 {
		s.Revisions = s.Revisions[1:]
	}
	seq := uint64(1)
	if n := len(s.Revisions); n > 0 {
		seq = s.Revisions[n-1].Revision.Seq + 1
	}
	w.deploy(f, seq)
}

func (w *world) remove() {
	f := rapid.SampledFrom(w.names()).Draw(w.t, "function")
	if n := len(w.settings[f].Revisions); n > 1 { // the numbers go on
		w.settings[f].Revisions = w.settings[f].Revisions[1:]
		w.settle()
	}
}

func (w *world) call() {
	t := w.t
	f := rapid.SampledFrom(w.names()).Draw(t, "function")
	rev := rapid.SampledFrom(w.settings[f].Revisions).Draw(t, "revision").Revision
	w.nextCall++
	c := &modelCall{rev: rev, deadline: w.now + rapid.Int64Range(1, 20_000).Draw(t, "timeout")}
	w.calls[w.nextCall] = c
	w.do(w.n.Call(w.now, route.Call{
		ID: w.nextCall, Revision: rev, DeadlineMS: c.deadline,
		MayStart: rapid.IntRange(0, 3).Draw(t, "may start") > 0, MayWait: rapid.Bool().Draw(t, "may wait"),
	}))
}

func (w *world) death() {
	ids := w.instances("")
	if len(ids) == 0 {
		return
	}
	id := rapid.SampledFrom(ids).Draw(w.t, "instance")
	w.dead = w.vms[id]
	delete(w.vms, id)
	w.do(w.n.Died(w.now, id))
	w.dead = nil
}

func (w *world) lost() {
	if ids := w.instances(""); len(ids) > 0 {
		w.do(w.n.Lost(w.now, rapid.SampledFrom(ids).Draw(w.t, "instance")))
	}
}

func (w *world) broken() {
	for _, id := range w.instances("ready") {
		if vm := w.vms[id]; len(vm.calls) > 0 {
			w.end(vm.calls[0], route.Ended{Broken: true, UsedMiB: 10})
			return
		}
	}
}

func (w *world) callerLeaves() {
	for id := route.CallID(1); id <= w.nextCall; id++ {
		if c := w.calls[id]; !c.answered && c.in == 0 {
			w.answer(id)
			w.do(w.n.CallEnded(w.now, id, route.Ended{}))
			return
		}
	}
}

func (w *world) leaseFails() {
	for _, f := range w.names() {
		if w.asked[f] > 0 {
			// The answer is lost; the cluster may have granted them.
			if rapid.Bool().Draw(w.t, "applied") {
				w.leased[f] += max(0, min(w.asked[f], w.limit[f]-w.leased[f]))
			}
			w.asked[f] = 0
			w.do(w.n.LeaseFailed(w.now, f))
			return
		}
	}
}

// sync tells the node its slots as the cluster has them.
func (w *world) sync() {
	for _, f := range w.names() {
		if w.asked[f] == 0 && w.lease {
			w.granted[f] = w.leased[f]
			w.do(w.n.Slots(w.now, f, w.leased[f]))
		}
	}
}

func (w *world) flipLease() {
	w.lease = !w.lease
	if !w.lease {
		w.do(w.n.SetLease(w.now, false))
		for _, f := range w.names() {
			w.granted[f], w.asked[f] = 0, 0
			if rapid.Bool().Draw(w.t, "given up") {
				w.leased[f] = 0
			}
		}
		for _, vm := range w.vms { // they count no more: the cluster waits for the lease's end
			vm.lost = 0
			w.check(vm.state == "dying", "an instance outlasts the lease")
		}
		return
	}
	w.do(w.n.SetLease(w.now, true))
	w.sync()
}

// taken: the cluster has given slots of this node up.
func (w *world) taken() {
	f := rapid.SampledFrom(w.names()).Draw(w.t, "function")
	if w.leased[f] == 0 || w.asked[f] > 0 || !w.lease {
		return
	}
	w.leased[f] = rapid.IntRange(0, w.leased[f]-1).Draw(w.t, "left")
	for _, vm := range w.vms {
		vm.lost = 0
	}
	w.taking = true
	w.sync()
	w.taking = false
}

func (w *world) neighbour() {
	w.sync()
	w.settle()
}

func TestPickOffersWarmFirst(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var all []route.Candidate
		for i := range rapid.IntRange(0, 6).Draw(t, "nodes") {
			all = append(all, route.Candidate{
				Node: blixard.NodeName(rune('a' + i)), Local: i == 0, Warm: rapid.IntRange(0, 3).Draw(t, "warm"), SlotsFree: rapid.IntRange(0, 3).Draw(t, "slots"),
				Fits: rapid.Bool().Draw(t, "fits"), Score: rapid.IntRange(0, 1000).Draw(t, "score"), HasSlots: rapid.Bool().Draw(t, "has slots"),
				AgeMS: rapid.SampledFrom([]int64{0, 100, 10_000}).Draw(t, "age"), HasTemplate: rapid.Bool().Draw(t, "template"),
			})
		}
		exhausted := rapid.Bool().Draw(t, "exhausted")
		choices := route.Pick(all, exhausted, rapid.Uint64().Draw(t, "chance"))
		start := false
		for i, c := range choices {
			at := slices.IndexFunc(all, func(o route.Candidate) bool { return o.Node == c.Node })
			if start && !c.MayStart {
				t.Fatalf("a warm offer comes after a start: %+v", choices)
			}
			start = start || c.MayStart
			if c.MayStart && !all[at].Fits {
				t.Fatalf("%s does not fit", c.Node)
			}
			if !c.MayStart && all[at].Warm == 0 {
				t.Fatalf("%s has nothing warm", c.Node)
			}
			if c.MayWait && i != len(choices)-1 {
				t.Fatalf("a call is to wait while a node fits: %+v", choices)
			}
			if slices.Contains(choices[:i], c) {
				t.Fatalf("%s is asked twice for the same", c.Node)
			}
		}
		for _, o := range all {
			offered := slices.ContainsFunc(choices, func(c route.Choice) bool { return c.Node == o.Node && c.MayStart })
			if o.Fits && !exhausted && !offered {
				t.Fatalf("%s fits and is not asked", o.Node)
			}
		}
	})
}

func TestPickNumberKeepsTheShare(t *testing.T) {
	a := &blixard.FunctionAlias{Number: 1, Second: 2, SecondShare: 250_000}
	second := 0
	for chance := range uint64(1_000_000) {
		if route.PickNumber(a, chance*7919) == 2 {
			second++
		}
	}
	if second != 250_000 {
		t.Fatalf("%d of 1,000,000 calls went to the second version", second)
	}
}
