package converge

import (
	"fmt"
	"math"
	"slices"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/assert"
)

// Never is a wake time that does not come.
const Never = int64(math.MaxInt64)

// Plan tells what to do now, in order, and when to plan again at the latest if
// nothing happens (Never if there is no such time).
func Plan(in Input) (actions []Action, wakeMS int64) {
	assert.True(in.Limits.Starts > 0 && in.Limits.Effects > 0, "limits %+v leave no room to act", in.Limits)
	p := &planner{in: &in, wake: Never}
	entries := p.join()
	for i := range entries {
		p.count(&entries[i])
	}
	for i := range entries {
		p.fence(&entries[i])
	}
	for i := range entries {
		p.one(&entries[i])
	}
	return p.actions, p.wake
}

// entry is all that is known of one incarnation; any part may be nil.
type entry struct {
	ref   Ref
	row   *blixard.Instance
	found *Found
	local *Local
	// fenced: it is being killed, and nothing else is ordered.
	fenced bool
}

type planner struct {
	in              *Input
	actions         []Action
	wake            int64
	starts, effects int
}

// rowRef is the incarnation of a row.
func rowRef(row *blixard.Instance) Ref { return Ref{row.ID, row.Generation} }

// join merges the three sorted lists.
func (p *planner) join() []entry {
	rows, found, locals := p.in.Rows, p.in.Found, p.in.Locals
	entries := make([]entry, 0, max(len(rows), len(found)))
	for len(rows) > 0 || len(found) > 0 || len(locals) > 0 {
		var heads []Ref
		if len(rows) > 0 {
			heads = append(heads, rowRef(rows[0]))
		}
		if len(found) > 0 {
			heads = append(heads, found[0].Ref)
		}
		if len(locals) > 0 {
			heads = append(heads, locals[0].Ref)
		}
		e := entry{ref: slices.MinFunc(heads, Ref.Compare)}
		if len(rows) > 0 && rowRef(rows[0]) == e.ref {
			e.row, rows = rows[0], rows[1:]
		}
		if len(found) > 0 && found[0].Ref == e.ref {
			e.found, found = &found[0], found[1:]
		}
		if len(locals) > 0 && locals[0].Ref == e.ref {
			e.local, locals = &locals[0], locals[1:]
		}
		if n := len(entries); n > 0 {
			assert.True(entries[n-1].ref.Compare(e.ref) < 0, "%s comes after %s: the input is not sorted", e.ref, entries[n-1].ref)
		}
		entries = append(entries, e)
	}
	return entries
}

func (e *entry) busy() Kind {
	if e.local == nil {
		return None
	}
	return e.local.Busy
}

// stopsOnPartition tells whether e may run under a lease only.
func (e *entry) stopsOnPartition() bool {
	if e.found != nil && e.found.StopsOnPartition || e.local != nil && e.local.StopsOnPartition {
		return true
	}
	return e.row != nil && e.row.Spec.EffectiveOnPartition() == blixard.OnPartitionStop
}

func (p *planner) add(a Action) { p.actions = append(p.actions, a) }

func (p *planner) wakeAt(ms int64) { p.wake = min(p.wake, ms) }

func (p *planner) count(e *entry) {
	switch e.busy() {
	case None, Kill:
	case Prepare, Start:
		p.starts++
		p.effects++
	default:
		p.effects++
	}
}

// rests tells whether an effect that failed is still to be waited for.
func (p *planner) rests(e *entry) bool {
	if e.local == nil || p.in.NowMS >= e.local.NotBeforeMS {
		return false
	}
	p.wakeAt(e.local.NotBeforeMS)
	return true
}

// effect orders an effect unless one is under way, or there is no room.
func (p *planner) effect(a Action, e *entry) {
	if e.busy() != None || p.rests(e) {
		return
	}
	if a.Kind == Kill {
		p.add(a)
		return
	}
	if p.effects >= p.in.Limits.Effects {
		return // the end of an effect is followed by a plan
	}
	if a.Kind == Prepare || a.Kind == Start {
		if p.starts >= p.in.Limits.Starts {
			return
		}
		p.starts++
	}
	p.effects++
	p.add(a)
}

// fenceWhy is told to users.
const fenceWhy = "stopped because this node lost touch with the cluster"

// fence kills what may not outlast the lease when there is just time for it.
func (p *planner) fence(e *entry) {
	mayRun := e.found.alive() || e.busy() == Start
	if !mayRun || !e.stopsOnPartition() {
		return
	}
	at := p.in.fenceMS()
	if p.in.NowMS < at {
		p.wakeAt(at)
		return
	}
	e.fenced = true
	if e.busy() == Kill || p.rests(e) && e.local.FailedStops > 0 {
		return
	}
	p.add(Action{Kind: Kill, Ref: e.ref, Why: fenceWhy, Blame: true})
}

// one plans for one incarnation.
func (p *planner) one(e *entry) {
	switch {
	case e.fenced:
	case e.row == nil, e.row.State == blixard.Lost:
		p.orphan(e)
	case e.row.State.Terminal():
		p.ended(e)
	case e.row.Wanted == blixard.WantRun:
		p.run(e)
	default:
		p.end(e)
	}
}

// orphan removes what nobody knows or wants any more: an incarnation of a node
// that was lost, or of a slot that was forgotten meanwhile.
func (p *planner) orphan(e *entry) {
	const why = "it does not belong to this node any more"
	if busy := e.busy(); busy == Prepare || busy == Start {
		// Its row was there and rows only go forward: it must not come up.
		p.add(Action{Kind: Kill, Ref: e.ref, Why: why})
		return
	}
	if e.found == nil || !p.in.Fresh() {
		return
	}
	switch {
	case !e.found.alive():
		p.effect(Action{Kind: Remove, Ref: e.ref, Why: why}, e)
	case e.stopsOnPartition(), p.in.Limits.OrphanGraceMS == 0:
		p.effect(Action{Kind: Kill, Ref: e.ref, Why: why}, e)
	default:
		p.stop(e, p.in.Limits.OrphanGraceMS, why, false)
	}
}

// ended makes sure that what has ended for the cluster has ended here, and
// removes it when that is wanted.
func (p *planner) ended(e *entry) {
	switch {
	case e.found.alive():
		p.effect(Action{Kind: Kill, Ref: e.ref, Why: "it is " + string(e.row.State)}, e)
	case e.row.Wanted == blixard.WantRemove:
		p.remove(e)
	}
}

// end carries out that an incarnation is to stop, or to be removed.
func (p *planner) end(e *entry) {
	switch {
	case e.found.alive():
		why := e.row.WantReason
		p.report(e, p.observe(e, blixard.Stopping, why))
		p.stop(e, e.row.Spec.StopGraceMS, why, false)
	case e.busy() == Start || e.busy() == Stop || e.busy() == Kill:
		// What the driver found may be older than what is under way.
	case e.row.Wanted == blixard.WantRemove:
		p.remove(e)
	default:
		p.report(e, p.observe(e, blixard.Stopped, e.row.WantReason))
	}
}

func (p *planner) remove(e *entry) {
	switch {
	case e.found != nil:
		p.effect(Action{Kind: Remove, Ref: e.ref}, e)
	case e.busy() == None:
		o := known(e.row)
		o.Removed = true
		p.report(e, o)
	}
}

// stop asks politely, and kills when that failed.
func (p *planner) stop(e *entry, graceMS int64, why string, blame bool) {
	if e.local != nil && e.local.FailedStops > 0 || graceMS <= 0 {
		p.effect(Action{Kind: Kill, Ref: e.ref, Why: why, Blame: blame}, e)
		return
	}
	p.effect(Action{Kind: Stop, Ref: e.ref, GraceMS: graceMS, Why: why, Blame: blame}, e)
}

// run brings an incarnation up, or finds out that it is beyond that.
func (p *planner) run(e *entry) {
	switch {
	case e.found.alive():
		p.running(e)
	case e.busy() == Prepare:
		p.report(e, p.observe(e, blixard.Preparing, ""))
	case e.busy() == Start:
		p.report(e, p.observe(e, blixard.Starting, ""))
	case e.busy() != None:
		// What the driver found may be older than what is under way.
	case e.found != nil && e.found.Phase == Exited:
		p.exited(e)
	case e.local != nil && e.local.Failure != "":
		p.report(e, p.observe(e, blixard.Failed, e.local.Failure))
	case e.row.State == blixard.Pending || e.row.State == blixard.Preparing || e.found != nil && e.row.State == blixard.Starting:
		p.start(e)
	default:
		p.report(e, p.observe(e, blixard.Failed, "it was started and nothing of it is left on the node"))
	}
}

// start starts what was never started, see the package's invariants.
func (p *planner) start(e *entry) {
	if !p.in.Fresh() || e.stopsOnPartition() && p.in.NowMS >= p.in.fenceMS() {
		return // the next heartbeat is followed by a plan
	}
	if e.local == nil || !e.local.Prepared {
		p.effect(Action{Kind: Prepare, Ref: e.ref}, e)
		return
	}
	if e.stopsOnPartition() {
		p.wakeAt(p.in.fenceMS())
	}
	p.effect(Action{Kind: Start, Ref: e.ref}, e)
}

// exited tells how an incarnation ended that was to run.
func (p *planner) exited(e *entry) {
	state, message := outcome(e)
	p.report(e, p.observe(e, state, message))
}

func outcome(e *entry) (blixard.InstanceState, string) {
	l := e.local
	switch {
	case l != nil && l.Exit != nil:
		return exitOutcome(l.Exit)
	case l != nil && l.Killed != "":
		return blixard.Failed, l.Killed
	case l != nil && l.Failure != "":
		return blixard.Failed, l.Failure
	case e.found.Orderly:
		return blixard.Stopped, "the guest shut down"
	case e.found.Reason != "":
		return blixard.Failed, e.found.Reason
	default:
		return blixard.Failed, "the hypervisor ended"
	}
}

func exitOutcome(x *Exit) (blixard.InstanceState, string) {
	switch {
	case x.NotStarted:
		return blixard.Failed, fmt.Sprintf("%s (exit code %d): %s", blixard.CommandNotStarted, x.Code, x.Reason)
	case x.Code == 0 && x.Reason == "":
		return blixard.Stopped, "the command ended"
	case x.Code == 0:
		return blixard.Stopped, "the command ended: " + x.Reason
	case x.Reason == "":
		return blixard.Failed, fmt.Sprintf("the command failed with exit code %d", x.Code)
	default:
		return blixard.Failed, fmt.Sprintf("the command failed with exit code %d: %s", x.Code, x.Reason)
	}
}

// running looks after an incarnation whose hypervisor runs, as is wanted.
func (p *planner) running(e *entry) {
	l := e.local
	ready := l != nil && l.Ready
	switch {
	case l != nil && l.Failure != "":
		p.effect(Action{Kind: Kill, Ref: e.ref, Why: l.Failure, Blame: true}, e)
		return
	case l != nil && l.Exit != nil:
		_, why := exitOutcome(l.Exit)
		grace := e.row.Spec.StopGraceMS
		if l.Exit.NotStarted {
			grace = 0 // there is nobody to say farewell to
		}
		p.stop(e, grace, why, false)
		return
	case ready || e.row.State == blixard.Running:
		note := ""
		if l != nil {
			note = l.Note
		}
		p.report(e, p.observe(e, blixard.Running, note))
	default:
		p.report(e, p.observe(e, blixard.Starting, ""))
	}
	paused := e.found.Phase == Paused
	switch {
	case paused && !e.row.Paused && p.in.Pauses:
		p.effect(Action{Kind: Resume, Ref: e.ref}, e)
	case !paused && e.row.Paused && p.in.Pauses && e.row.State == blixard.Running:
		p.effect(Action{Kind: Pause, Ref: e.ref}, e)
	case !ready && !paused:
		p.boot(e)
	}
}

// boot opens a session with the guest and waits for its answer, but not for
// ever. A guest that has answered before is not given up: its health check
// judges it, if it has one.
func (p *planner) boot(e *entry) {
	if l := e.local; l != nil && l.BootDeadlineMS > 0 && e.row.State != blixard.Running {
		if p.in.NowMS >= l.BootDeadlineMS {
			p.effect(Action{Kind: Kill, Ref: e.ref, Why: "its guest did not answer in time", Blame: true}, e)
			return
		}
		p.wakeAt(l.BootDeadlineMS)
	}
	if (e.local == nil || !e.local.Attached) && e.busy() == None {
		p.add(Action{Kind: Configure, Ref: e.ref})
	}
}
