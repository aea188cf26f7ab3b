// Package route decides what becomes of function calls: Node is one node's
// dispatcher as a state machine, Pick is the gateway's choice among nodes. It
// does nothing itself: inputs come in, actions go out, both as values.
//
// Ownership: a Node owns the books of its instances, of the execution slots
// that the cluster has leased to it, and of the calls that were offered to it.
// Whoever drives it carries actions out, in order, and tells what became of
// them. Settings are the cluster's, slots are changed by both: Granted and Slots
// tell what the cluster says, Return gives back.
//
// Ordering: inputs come one at a time, with times that do not go back. The
// actions that an input returns are valid until the next one.
//
// Slots: a call holds one from the moment it is let in until it has ended, or
// until the instance it ran in is known to be dead. What is returned is given up
// before the action says so; what is granted counts from the input on.
//
// Invariants, whatever is lost, late or repeated:
//   - Calls that run, or may run, are never more than the leased slots, except
//     while what was started under a lost lease is being killed.
//   - An instance never has more calls than its target concurrency, and none
//     before it is ready or after it is to end.
//   - Each call is answered once: it is rejected, aborted, or assigned and then
//     ended by whoever drives the node.
//   - Each instance that was ordered is in the books until it is known to be
//     gone; a Kill is ordered once and the driver's to carry through.
package route

import (
	"cmp"
	"fmt"
	"math"
	"strings"

	"github.com/blixard/blixard"
)

// Never is a wake time that does not come.
const Never = int64(math.MaxInt64)

// Revision is one state of a version's code and configuration: what an instance
// is an instance of.
type Revision struct {
	Function blixard.FunctionName
	UID      uint64 // of the function
	Number   int    // of the version
	Seq      uint64 // of its code and configuration
}

// String writes the revision as "resize:3.17"; $LATEST is number 0.
func (r Revision) String() string { return fmt.Sprintf("%s:%d.%d", r.Function, r.Number, r.Seq) }

// Compare orders by function, then by number, then by age.
func (r Revision) Compare(o Revision) int {
	return cmp.Or(strings.Compare(string(r.Function), string(o.Function)), cmp.Compare(r.UID, o.UID),
		cmp.Compare(r.Number, o.Number), cmp.Compare(r.Seq, o.Seq))
}

// CallID names a call on one node; chosen by whoever drives it, never reused.
type CallID uint64

// InstanceID names an instance on one node; never reused by one Node.
type InstanceID uint64

// Refusal is why a node does not take a call, or has ended it; a word for
// machines.
type Refusal string

// The refusals. After Gone and TimedOut the function may have run.
const (
	NoSlot      Refusal = "concurrency" // no slot is left to lease; other nodes may hold some
	NoMemory    Refusal = "memory"      // no room for another instance here
	NoWarm      Refusal = "no-warm"     // the call may not start an instance, and none is free
	Busy        Refusal = "busy"        // as many starts are under way, or instances there, as may be
	StartFailed Refusal = "init-failed" // instances cannot be started here now
	Superseded  Refusal = "superseded"  // code or configuration have changed: resolve again
	Draining    Refusal = "draining"    // the node takes nothing new
	NoLease     Refusal = "lease"       // the node has lost touch with the leader
	Late        Refusal = "deadline"    // the deadline came while the call waited
	Unknown     Refusal = "unknown"     // the node does not know the revision
	Unreachable Refusal = "unreachable" // the node was not reached; the gateway's word
	Gone        Refusal = "gone"        // the instance died with the call in it
	TimedOut    Refusal = "timeout"     // the guest did not answer and was ended from outside
)

// Elsewhere tells whether another node may take the call: it was not handed to a
// guest here, and the reason is this node's own.
func (r Refusal) Elsewhere() bool {
	switch r {
	case NoSlot, NoMemory, NoWarm, Busy, StartFailed, Draining, NoLease, Unknown, Unreachable:
		return true
	default:
		return false
	}
}

// Settings are what a Node has to know of a function; all of its revisions.
type Settings struct {
	Function blixard.FunctionName
	UID      uint64
	// MaxConcurrent is the cluster's limit of executions.
	MaxConcurrent int
	// Contended: no slot is left to lease in the cluster, so that others may be
	// waiting for idle ones.
	Contended bool
	// Over: more slots are leased in the cluster than MaxConcurrent, which was
	// lowered: free ones go back at once.
	Over      bool
	Revisions []RevisionSettings // in order
}

// RevisionSettings are what a Node has to know of a revision.
type RevisionSettings struct {
	Revision          Revision
	TargetConcurrency int   // calls at once in one instance, 1 at least
	ChargeMiB         int64 // what an instance counts against the budget
	ScaleDownMS       int64 // an idle instance is kept so long
	Min               int   // instances that are kept warm on this node
	// SlotsPerInstance bounds the instances to leased slots divided by it, which
	// keeps their number in the whole cluster; 0: no bound.
	SlotsPerInstance int
	Burst            int   // starts at once on this node; 0: no bound of its own
	RecycleCalls     int   // an instance ends after so many; 0: never
	GrowthMiB        int64 // an instance ends when it uses so much more than after its first call; 0: never
	// TimeoutMS is what a call gets from when it is handed over; 0: its own
	// deadline alone.
	TimeoutMS int64
	// Fresh: it was deployed lately, which counts as a call.
	Fresh bool
	// Clones: instances are made of a template that is here, so that some can be
	// spawned ahead.
	Clones bool
	// Retired: it takes no calls any more.
	Retired bool
}

// Limits of a Node. Fields that are 0 get their default from NewNode.
type Limits struct {
	Starts int // starts at once; 32
	// Boots is how many starts of a revision that has no template here may be under
	// way at once: each of them boots a guest, or waits for the template that the
	// first makes; as Starts.
	Boots     int
	Pool      int   // clones spawned ahead, of all functions; 16
	PooledMiB int64 // what one of them counts against the budget; 24
	// PoolKeepMS: of a function that was not called for so long no clone is
	// kept; 1 h. PoolHalfMS: the demand of a burst halves in so long; 1 min.
	PoolKeepMS, PoolHalfMS int64
	Spawns                 int   // clones spawned ahead at once; 2
	PoolDelayMS            int64 // after a start none is spawned ahead for so long; 50
	LeaseAhead             int   // most slots leased without a call that needs them; 16
	DryMS                  int64 // after a grant that fell short none is asked for; 250
	ContendedMS            int64 // idle slots of a function at its limit go back after; 1,000
	IdleSlotsMS            int64 // idle slots go back after this at the latest; 300,000
	BackoffMS, BackoffMax  int64 // after a start failed; 250 doubling up to 30,000
	GraceMS                int64 // what a guest gets after the deadline of a call; 2,000
	WorkMS                 int64 // an idle instance whose guest works is kept so long; 900,000
	TickMS                 int64 // how often deadlines are looked at; 100
}

func (l *Limits) defaults() {
	l.Starts, l.Pool = cmp.Or(l.Starts, 32), cmp.Or(l.Pool, 16)
	l.Boots = cmp.Or(l.Boots, l.Starts)
	l.PooledMiB = cmp.Or(l.PooledMiB, 24)
	l.PoolKeepMS, l.PoolHalfMS = cmp.Or(l.PoolKeepMS, 3_600_000), cmp.Or(l.PoolHalfMS, 60_000)
	l.Spawns = cmp.Or(l.Spawns, 2)
	l.PoolDelayMS = cmp.Or(l.PoolDelayMS, 50)
	l.LeaseAhead, l.DryMS = cmp.Or(l.LeaseAhead, 16), cmp.Or(l.DryMS, 250)
	l.ContendedMS, l.IdleSlotsMS = cmp.Or(l.ContendedMS, 1000), cmp.Or(l.IdleSlotsMS, 300_000)
	l.BackoffMS, l.BackoffMax = cmp.Or(l.BackoffMS, 250), cmp.Or(l.BackoffMax, 30_000)
	l.GraceMS, l.WorkMS = cmp.Or(l.GraceMS, 2000), cmp.Or(l.WorkMS, 900_000)
	l.TickMS = cmp.Or(l.TickMS, 100)
}

// Kind says what an Action does.
type Kind string

// The kinds of actions.
const (
	Assign Kind = "assign" // hand Call to Instance; Start tells how that came to be
	Reject Kind = "reject" // answer Call: it was not handed to a guest
	Abort  Kind = "abort"  // answer Call: the instance it was handed to is dead or being killed
	Spawn  Kind = "spawn"  // make Instance ahead of calls: a clone that does not run yet; answered by Spawned or Died
	Start  Kind = "start"  // make Instance ready; Pooled: it was spawned; answered by Started or Died
	Look   Kind = "look"   // ask whether the guest of Instance works on something; answered by Looked
	Kill   Kind = "kill"   // end Instance and leave nothing of it; answered by Died, at last
	Lease  Kind = "lease"  // ask the cluster for N slots of Function; answered by Granted
	Return Kind = "return" // give N slots of Function back to the cluster
)

// Action is one thing to do.
type Action struct {
	Kind     Kind
	Revision Revision
	Call     CallID
	Instance InstanceID
	Start    blixard.StartKind // Assign
	Pooled   bool              // Start
	N        int               // Lease, Return
	Refusal  Refusal           // Reject, Abort
	Why      string            // in words: Kill
}

// String writes the action in one line.
func (a Action) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s", a.Kind, a.Revision)
	if a.Call != 0 {
		fmt.Fprintf(&b, " call=%d", a.Call)
	}
	if a.Instance != 0 {
		fmt.Fprintf(&b, " instance=%d", a.Instance)
	}
	if a.N != 0 {
		fmt.Fprintf(&b, " n=%d", a.N)
	}
	if a.Start != "" {
		fmt.Fprintf(&b, " %s", a.Start)
	}
	if a.Pooled {
		b.WriteString(" pooled")
	}
	if a.Refusal != "" {
		fmt.Fprintf(&b, " (%s)", a.Refusal)
	}
	if a.Why != "" {
		fmt.Fprintf(&b, " (%s)", a.Why)
	}
	return b.String()
}
