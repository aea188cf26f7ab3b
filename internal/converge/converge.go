// Package converge decides what a node has to do next: Plan compares what the
// cluster wants of the node with what its hypervisor driver found and with what
// its agent remembers, and answers with actions as values. It does nothing.
//
// Ownership: Plan keeps nothing and changes nothing of its Input. The rows are
// the cluster's, the findings the driver's, the Locals the agent's; a Local may
// be forgotten at any time, as it is when the daemon is killed, without making
// any plan unsafe.
//
// Ordering: actions come sorted by incarnation, fences before everything else,
// and for one incarnation a report before an effect. An incarnation has at most
// one effect under way; only Kill may be ordered over one that is.
//
// Invariants, whatever is lost, late or repeated:
//   - No incarnation is started twice. A start needs a row that was never
//     reported to have started, a driver that holds no started trace of it, and
//     a view at least as new as the last answer of the leader: an older one
//     might show an incarnation that has been here and was removed.
//   - An incarnation that stops on partition is started only while the lease
//     has time left, and is killed FenceMS before the lease ends, whether its
//     row is known or not. A lease counts for it only once the view is as new as
//     that lease: it may have been given up before.
//   - What has no row is removed only on a view at least as new as the last
//     answer of the leader, while the lease lasts. What the driver does not
//     list is never touched.
//   - Nothing is removed that the cluster has not let go of: logs of ended
//     incarnations stay until they are wanted removed.
package converge

import (
	"cmp"
	"fmt"
	"strings"

	"github.com/blixard/blixard"
)

// Ref names one incarnation.
type Ref struct {
	Instance   blixard.InstanceID
	Generation uint64
}

// String writes the incarnation as "webapp-1#3".
func (r Ref) String() string { return fmt.Sprintf("%s#%d", r.Instance, r.Generation) }

// Compare orders by instance, then by generation.
func (r Ref) Compare(o Ref) int {
	return cmp.Or(strings.Compare(string(r.Instance), string(o.Instance)), cmp.Compare(r.Generation, o.Generation))
}

// Phase is what the driver sees of an incarnation.
type Phase string

// The phases; they mean what they mean in the port vmm.
const (
	Absent   Phase = "" // the driver holds nothing of it
	Prepared Phase = "prepared"
	Running  Phase = "running"
	Paused   Phase = "paused"
	Exited   Phase = "exited"
)

// Found is one incarnation as the driver found it.
type Found struct {
	Ref   Ref
	Phase Phase
	// Reason tells in words why it exited.
	Reason string
	// Orderly: its guest shut itself down, or was shut down.
	Orderly bool
	// StopsOnPartition: what it was started with says so. It is kept with the
	// incarnation, so that it is fenced even before its row is known.
	StopsOnPartition bool
	// Ports that are really published.
	Ports []blixard.PublishedPort
	// Address of the guest itself, if it can be reached by one.
	Address string
}

func (f *Found) alive() bool { return f != nil && (f.Phase == Running || f.Phase == Paused) }

// Exit tells how a guest's workload ended.
type Exit struct {
	Code   int
	Reason string
	// NotStarted: it never ran, since it could not be started.
	NotStarted bool
}

// Local is what the agent knows of an incarnation beside the driver. It is lost
// when the daemon ends.
type Local struct {
	Ref Ref
	// Busy is the effect under way, None if there is none.
	Busy Kind
	// NotBeforeMS: after an effect failed, none is ordered before.
	NotBeforeMS int64
	// FailedStops counts attempts to stop it that failed.
	FailedStops int
	// StopsOnPartition is set with the start: the row may be gone before the
	// driver lists it.
	StopsOnPartition bool
	// Prepared: its image is at hand.
	Prepared bool
	// Failure: it could not be prepared or started, and why.
	Failure string
	// Killed: the agent ended it against what was wanted, and why.
	Killed string
	// Attached: a session with its guest is open, or being opened.
	Attached bool
	// Ready: its guest answered, or has no agent that could.
	Ready bool
	// BootDeadlineMS: a guest that has not answered by then is given up; 0 for
	// never.
	BootDeadlineMS int64
	// Exit is set once the guest's workload has ended.
	Exit *Exit
	// Health is the outcome of its health check, unknown until there is one.
	Health blixard.Health
	// Note is told with a running instance, such as why it is unhealthy.
	Note string

	// Sent is the last report on it, SentIndex the index at which it was
	// applied (the maximum while that is not known), SentMS when it was sent.
	Sent      *Observation
	SentIndex uint64
	SentMS    int64
}

// Lease is what the last acknowledged heartbeat gave. The zero Lease is none.
type Lease struct {
	// UntilMS is when it ends: when the heartbeat was sent, plus its length.
	UntilMS int64
	// Index of the leader's state when it answered: a view that is as new shows
	// everything the leader had decided by then.
	Index uint64
	// SureMS is when that lease ended, or ends, that was the newest of which the
	// node has seen what the leader had decided by then. What the node runs may
	// have been given up before a newer lease was given, so that is none for it.
	SureMS int64
}

// Limits of a node.
type Limits struct {
	Starts        int   // prepares and starts at once
	Effects       int   // effects at once; kills are not counted
	FenceMS       int64 // time set apart to kill before a lease ends
	OrphanGraceMS int64 // what an incarnation without a row gets to shut down
	ResendMS      int64 // a report that changed nothing is sent again after
}

// Input is all that a plan is made of. Times are milliseconds on the node's
// monotonic clock.
type Input struct {
	NowMS     int64
	ViewIndex uint64              // how new the rows are
	Lease     Lease               //
	Rows      []*blixard.Instance // this node's, sorted by Ref
	Found     []Found             // sorted by Ref
	Locals    []Local             // sorted by Ref
	Limits    Limits
	// Pauses: the driver can pause.
	Pauses bool
	// Acceleration of the node's hypervisor, for reports; "" if not known yet.
	Acceleration string
}

// Fresh tells whether the rows are known to show all that the leader had
// decided a lease ago at most.
func (in *Input) Fresh() bool { return in.NowMS < in.Lease.UntilMS && in.ViewIndex >= in.Lease.Index }

// fenceMS is when what stops on partition has to be killed.
func (in *Input) fenceMS() int64 {
	if in.ViewIndex >= in.Lease.Index {
		return in.Lease.UntilMS - in.Limits.FenceMS
	}
	return in.Lease.SureMS - in.Limits.FenceMS
}

// Kind says what an Action does.
type Kind string

// The kinds of actions. All but Report and Configure are effects: they take
// time, and an incarnation has one at a time.
const (
	None      Kind = ""
	Prepare   Kind = "prepare"   // have the image at hand
	Start     Kind = "start"     // start the hypervisor, once
	Configure Kind = "configure" // open a session with the guest and tell it who it is
	Stop      Kind = "stop"      // have the guest shut down, kill it after GraceMS
	Kill      Kind = "kill"      // end it now; ends an effect under way
	Pause     Kind = "pause"
	Resume    Kind = "resume"
	Remove    Kind = "remove" // leave nothing of it behind
	Report    Kind = "report" // tell the cluster
)

// Action is one thing to do for one incarnation.
type Action struct {
	Kind    Kind
	Ref     Ref
	GraceMS int64  // of Stop
	Why     string // in words
	// Blame: Why is against what is wanted, and is what the incarnation failed of.
	Blame bool
	// Observation of Report.
	Observation *Observation
}

// String writes the action in one line.
func (a Action) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s", a.Kind, a.Ref)
	if a.Kind == Stop {
		fmt.Fprintf(&b, " grace=%dms", a.GraceMS)
	}
	if a.Observation != nil {
		fmt.Fprintf(&b, " %s", a.Observation)
	}
	if a.Why != "" {
		fmt.Fprintf(&b, " (%s)", a.Why)
	}
	return b.String()
}
