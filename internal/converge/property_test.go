package converge

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/blixard/blixard"
)

// world is a model of a cluster with one node that is looked at: its leader,
// the node's driver and its daemon, with faults. Its checks are the safety
// properties the package promises.
type world struct {
	t   *rapid.T
	log []string
	now int64

	// The cluster.
	index   uint64
	rows    map[Ref]*blixard.Instance
	views   []view           // all views there ever were, by index
	nextGen map[string]int64 // per slot
	lastAck int64
	lost    bool

	// The driver: what survives the daemon.
	found  map[Ref]*Found
	starts map[Ref]int
	// The daemon.
	up     bool
	view   view
	lease  Lease
	locals map[Ref]*Local
	flying map[Ref]Action
}

type view struct {
	index uint64
	rows  []*blixard.Instance
}

const (
	modelLease  = 5000
	modelMargin = 1000
)

func newWorld(t *rapid.T) *world {
	w := &world{
		t: t, rows: map[Ref]*blixard.Instance{}, nextGen: map[string]int64{}, found: map[Ref]*Found{}, starts: map[Ref]int{},
		up: true, locals: map[Ref]*Local{}, flying: map[Ref]Action{}, lastAck: -modelLease - modelMargin,
	}
	w.commit()
	w.view = w.views[0]
	return w
}

func (w *world) note(format string, args ...any) {
	w.log = append(w.log, fmt.Sprintf("%6d ", w.now)+fmt.Sprintf(format, args...))
}

func (w *world) fail(format string, args ...any) {
	for _, line := range w.log[max(0, len(w.log)-60):] {
		w.t.Log(line)
	}
	w.t.Fatalf(format, args...)
}

func sortedRefs[V any](m map[Ref]V) []Ref { return slices.SortedFunc(maps.Keys(m), Ref.Compare) }

// commit makes the present rows a view of their own.
func (w *world) commit() {
	w.index++
	v := view{index: w.index}
	for _, ref := range sortedRefs(w.rows) {
		row := *w.rows[ref]
		v.rows = append(v.rows, &row)
	}
	w.views = append(w.views, v)
}

func (w *world) place(slot string, spec *blixard.VMSpec) {
	for _, ref := range sortedRefs(w.rows) {
		if string(ref.Instance) == slot && !w.rows[ref].State.Terminal() {
			return
		}
	}
	w.nextGen[slot]++
	ref := Ref{blixard.InstanceID(slot), uint64(w.nextGen[slot])}
	w.rows[ref] = &blixard.Instance{ID: ref.Instance, Generation: ref.Generation, Spec: spec, State: blixard.Pending, Wanted: blixard.WantRun}
	w.note("placed %s", ref)
	w.commit()
}

func (w *world) observe(o *Observation, ref Ref) {
	row := w.rows[ref]
	if row == nil {
		return
	}
	switch {
	case o.Removed && row.Wanted == blixard.WantRemove:
		if f := w.found[ref]; f != nil {
			w.fail("%s was reported removed and is %s", ref, f.Phase)
		}
		delete(w.rows, ref)
	case o.Removed || row.State.Terminal() || row.State != o.State && !blixard.CanFollow(row.State, o.State):
		return
	default:
		if o.State.Terminal() && w.found[ref].alive() {
			w.fail("%s was reported %s and runs", ref, o.State)
		}
		row.State, row.StatePaused, row.Message, row.Acceleration = o.State, o.Paused, o.Message, o.Acceleration
	}
	w.note("observed %s %s", ref, o)
	w.commit()
}

// heartbeat is answered at once; its answer carries the leader's index.
func (w *world) heartbeat() {
	w.lastAck, w.lost = w.now, false
	if w.up {
		w.lease = Lease{UntilMS: w.now + modelLease, Index: w.index}
	}
}

// advance passes time, up to the next moment at which someone must act.
func (w *world) advance(ms int64) {
	w.now += ms
	fence := w.lease.UntilMS - testLimits.FenceMS
	if !w.up && w.now >= fence {
		// What watches over the daemon's lease in its place.
		for _, ref := range sortedRefs(w.found) {
			if f := w.found[ref]; f.alive() && f.StopsOnPartition {
				f.Phase = Exited
				w.note("watchdog killed %s", ref)
			}
		}
	}
	if w.now >= w.lastAck+modelLease+modelMargin && !w.lost {
		w.lost = true
		w.note("node lost")
		for _, ref := range sortedRefs(w.rows) {
			row := w.rows[ref]
			if row.State.Terminal() {
				continue
			}
			row.State = blixard.Lost
			if f := w.found[ref]; f.alive() && row.Spec.EffectiveOnPartition() == blixard.OnPartitionStop {
				w.fail("%s runs here and is about to be started elsewhere", ref)
			}
		}
		w.commit()
	}
}

// plan plans and begins what was planned.
func (w *world) plan() (wake int64, acted bool) {
	in := Input{
		NowMS: w.now, ViewIndex: w.view.index, Lease: w.lease, Rows: w.view.rows, Pauses: true, Limits: testLimits, Acceleration: "tcg",
	}
	for _, ref := range sortedRefs(w.found) {
		in.Found = append(in.Found, *w.found[ref])
	}
	for _, ref := range sortedRefs(w.locals) {
		in.Locals = append(in.Locals, *w.locals[ref])
	}
	actions, wake := Plan(in)
	again, _ := Plan(in)
	if fmt.Sprint(actions) != fmt.Sprint(again) {
		w.fail("two plans of one input differ:\n%v\n%v", actions, again)
	}
	seen := map[Ref]Action{}
	for _, a := range actions {
		w.note("plan %s", a)
		if a.Kind == Report {
			w.local(a.Ref).Sent, w.local(a.Ref).SentMS, w.local(a.Ref).SentIndex = a.Observation, w.now, math.MaxUint64
			w.flying[Ref{a.Ref.Instance + "/report", a.Ref.Generation}] = a
			continue
		}
		if a.Kind == Configure {
			w.local(a.Ref).Attached = true
			continue
		}
		if other, twice := seen[a.Ref]; twice {
			w.fail("%s and %s at once", other, a)
		}
		seen[a.Ref] = a
		if busy := w.local(a.Ref).Busy; busy != None && a.Kind != Kill {
			w.fail("%s while %s is under way", a, busy)
		}
		if a.Kind != Start && a.Kind != Prepare && w.found[a.Ref] == nil && w.local(a.Ref).Busy == None {
			w.fail("%s, which the driver does not list", a)
		}
		w.local(a.Ref).Busy = a.Kind
		if a.Kind == Start {
			w.local(a.Ref).StopsOnPartition = w.stopsOnPartition(a.Ref)
		}
		w.flying[a.Ref] = a
	}
	return wake, len(actions) > 0
}

func (w *world) local(ref Ref) *Local {
	if w.locals[ref] == nil {
		w.locals[ref] = &Local{Ref: ref}
	}
	return w.locals[ref]
}

// land ends an effect that is under way, well or badly.
func (w *world) land(key Ref, bad bool) {
	a := w.flying[key]
	delete(w.flying, key)
	l, f := w.local(a.Ref), w.found[a.Ref]
	if a.Kind == Report {
		if bad {
			l.Sent, l.SentIndex = nil, 0
			return
		}
		w.observe(a.Observation, a.Ref)
		l.SentIndex = w.index
		return
	}
	l.Busy = None
	w.note("landed %s bad=%v", a, bad)
	if bad {
		l.NotBeforeMS = w.now + 200
	}
	switch a.Kind {
	case Prepare:
		if l.Prepared = !bad; bad {
			l.Failure = "bad image"
		}
	case Start:
		if l.Failure = ""; bad {
			l.Failure = "bad start"
		}
		w.start(a.Ref, bad)
	case Stop, Kill:
		if bad && a.Kind == Stop {
			l.FailedStops++
			return
		}
		if a.Blame {
			l.Killed = a.Why
		}
		if f.alive() {
			f.Phase, f.Orderly = Exited, a.Kind == Stop
		}
	case Pause, Resume:
		if f.alive() && !bad {
			f.Phase = map[Kind]Phase{Pause: Paused, Resume: Running}[a.Kind]
		}
	case Remove:
		if !bad {
			delete(w.found, a.Ref)
		}
	default:
		w.fail("unknown %s", a)
	}
}

func (w *world) stopsOnPartition(ref Ref) bool {
	stops := false
	for _, v := range w.views {
		for _, row := range v.rows {
			if rowRef(row) == ref {
				stops = row.Spec.EffectiveOnPartition() == blixard.OnPartitionStop
			}
		}
	}
	return stops
}

// start is the driver's: it refuses what it still knows as started. Safety is
// counted apart, so that it does not rest on the driver's memory.
func (w *world) start(ref Ref, bad bool) {
	if w.starts[ref]++; w.starts[ref] > 1 {
		w.fail("%s is started a second time", ref)
	}
	stops := w.stopsOnPartition(ref)
	if stops && w.now >= w.lease.UntilMS {
		w.fail("%s is started without a lease", ref)
	}
	w.found[ref] = &Found{Ref: ref, Phase: Running, StopsOnPartition: stops}
	if bad {
		w.found[ref].Phase = Exited
	}
}

// crash is kill -9 of the daemon; effects under way end at any point.
func (w *world) crash() {
	w.note("crash")
	for _, key := range sortedRefs(w.flying) {
		a := w.flying[key]
		if a.Kind == Start && w.starts[a.Ref] == 0 {
			switch rapid.IntRange(0, 2).Draw(w.t, "crash in start") {
			case 0:
				if w.found[a.Ref] == nil {
					w.found[a.Ref] = &Found{Ref: a.Ref, Phase: Prepared}
				}
			case 1:
				w.start(a.Ref, false)
			}
			continue
		}
		if rapid.Bool().Draw(w.t, "done") {
			w.land(key, false)
		}
	}
	clear(w.flying)
	clear(w.locals)
	w.up = false
	w.lease.Index = math.MaxUint64
}

func (w *world) restart() {
	w.note("daemon is back")
	w.up = true
	// The log of a replica may be replayed to an older index.
	w.view = w.views[rapid.IntRange(0, len(w.views)-1).Draw(w.t, "old view")]
}

// runDue plans at the times at which a plan is due, and lands kills before
// their time is up, as the daemon does.
func (w *world) pass(ms int64) {
	for end := w.now + ms; w.now < end; {
		if !w.up {
			w.advance(end - w.now)
			return
		}
		wake, _ := w.plan()
		for _, key := range sortedRefs(w.flying) {
			if w.flying[key].Kind == Kill {
				w.land(key, false)
			}
		}
		w.advance(max(1, min(end, wake)-w.now))
	}
}

var modelSpecs = []*blixard.VMSpec{
	{StopGraceMS: 1000},
	{StopGraceMS: 1000, Singleton: true},
	{StopGraceMS: 0, OnPartition: blixard.OnPartitionStop},
	{StopGraceMS: 1000, Singleton: true, OnPartition: blixard.OnPartitionContinue},
}

func (w *world) step() {
	t := w.t
	slot := fmt.Sprintf("vm%d-1", rapid.IntRange(0, len(modelSpecs)-1).Draw(t, "slot"))
	pick := func(refs []Ref) (Ref, bool) {
		if len(refs) == 0 {
			return Ref{}, false
		}
		return rapid.SampledFrom(refs).Draw(t, "which"), true
	}
	switch rapid.IntRange(0, 15).Draw(t, "step") {
	case 0:
		if !w.lost {
			w.place(slot, modelSpecs[slot[2]-'0'])
		}
	case 1:
		if ref, ok := pick(sortedRefs(w.rows)); ok {
			row := w.rows[ref]
			row.Wanted = map[blixard.Wanted]blixard.Wanted{blixard.WantRun: blixard.WantStop, blixard.WantStop: blixard.WantRemove, blixard.WantRemove: blixard.WantRemove}[row.Wanted]
			w.note("%s is to %s", ref, row.Wanted)
			w.commit()
		}
	case 2:
		if ref, ok := pick(sortedRefs(w.rows)); ok {
			w.rows[ref].Paused = !w.rows[ref].Paused
			w.commit()
		}
	case 3:
		if ref, ok := pick(sortedRefs(w.rows)); ok && w.rows[ref].State == blixard.Lost {
			delete(w.rows, ref)
			w.commit()
		}
	case 4, 5:
		w.heartbeat()
	case 6:
		w.view = w.views[rapid.IntRange(int(w.view.index)-1, len(w.views)-1).Draw(t, "view")]
	case 7:
		w.pass(rapid.Int64Range(1, 9000).Draw(t, "ms"))
	case 8:
		if w.up {
			w.plan()
		}
	case 9:
		if ref, ok := pick(sortedRefs(w.flying)); ok && w.up {
			w.land(ref, rapid.IntRange(0, 4).Draw(t, "bad") == 0)
		}
	case 10:
		if ref, ok := pick(sortedRefs(w.found)); ok && w.found[ref].alive() {
			w.found[ref].Phase, w.found[ref].Reason = Exited, "killed"
			w.note("%s dies", ref)
		}
		if ref, ok := pick(sortedRefs(w.locals)); ok && w.up && w.locals[ref].Attached {
			w.locals[ref].Ready = true
		}
	case 11, 12, 13, 14: // things go well for a while
		if w.up {
			w.heartbeat()
			w.view = w.views[len(w.views)-1]
			w.plan()
			for _, key := range sortedRefs(w.flying) {
				w.land(key, false)
			}
		}
	case 15:
		if w.up {
			w.crash()
		} else {
			w.restart()
		}
	}
}

// settle lets the faults end and drives the node until nothing is left to do.
func (w *world) settle() {
	if !w.up {
		w.restart()
	}
	for range 200 {
		w.heartbeat()
		w.view = w.views[len(w.views)-1]
		for _, l := range w.locals {
			l.Ready = l.Attached
		}
		_, acted := w.plan()
		busy := len(w.flying) > 0
		for _, key := range sortedRefs(w.flying) {
			w.land(key, false)
		}
		rests := slices.ContainsFunc(sortedRefs(w.locals), func(r Ref) bool { return w.locals[r].NotBeforeMS > w.now })
		if !acted && !busy && !rests {
			w.checkSettled()
			return
		}
		w.advance(100)
	}
	w.fail("it does not come to rest")
}

func (w *world) checkSettled() {
	for _, ref := range sortedRefs(w.found) {
		f, row := w.found[ref], w.rows[ref]
		switch {
		case row == nil || row.State == blixard.Lost:
			w.fail("%s is left over (%s)", ref, f.Phase)
		case f.alive() != (row.State == blixard.Running):
			w.fail("%s is %s and its row %s", ref, f.Phase, row.State)
		}
	}
	for _, ref := range sortedRefs(w.rows) {
		row := w.rows[ref]
		switch {
		case row.State.Terminal():
		case row.Wanted != blixard.WantRun:
			w.fail("%s is to %s and is %s", ref, row.Wanted, row.State)
		case row.State != blixard.Running || cmp.Or(w.found[ref] == nil, !w.found[ref].alive()):
			w.fail("%s is to run and is %s", ref, row.State)
		case row.Paused != row.StatePaused:
			w.fail("%s is paused=%v, wanted %v", ref, row.StatePaused, row.Paused)
		}
	}
}

// TestSafetyUnderFaults: whatever is lost, late or killed, no incarnation starts
// twice; what stops on partition does not run once its node may have been
// declared lost; nothing is touched that the driver does not list; nothing is
// reported ended or removed that runs or is there. And once the faults end, the
// node comes to what is wanted in a bounded number of plans.
func TestSafetyUnderFaults(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		w.heartbeat()
		for range rapid.IntRange(1, 120).Draw(t, "steps") {
			w.step()
		}
		w.settle()
	})
}
