package converge

import "math"

const maxUnseen = 16

// LeaseBook is what a node knows of its lease: when it ends, how new a view has
// to be, whether the leader is in touch. Times are milliseconds on the node's
// monotonic clock. Make it with LengthMS and FenceMS set.
//
// Invariant: a lease never lasts longer than LengthMS from when the heartbeat
// that gave it was sent.
type LeaseBook struct {
	LengthMS int64 // of a lease; the same on all nodes
	FenceMS  int64 // set apart for killing, see Limits

	lease      Lease
	unseen     []Lease // given, but the view is older; in order
	inTouch    bool
	reported   bool  // the leader has had the node's report
	reportedMS int64 // last
}

// Lease is the lease as it is now, for Input.
func (b *LeaseBook) Lease() Lease { return b.lease }

// Granted takes a lease that began when its heartbeat was sent. index is the
// leader's when it answered, viewIndex that of the node's rows. It tells whether
// the leader is in touch again after a silence, and whether a plan may now order
// what it could not before.
func (b *LeaseBook) Granted(sentMS, nowMS int64, index, viewIndex uint64) (back, plan bool) {
	fresh := viewIndex >= b.lease.Index && nowMS < b.lease.UntilMS
	until := sentMS + b.LengthMS
	b.lease.UntilMS = max(b.lease.UntilMS, until)
	// The index of a lease that was recalled is not known, and is no measure.
	if b.lease.Index == math.MaxUint64 || index > b.lease.Index {
		b.lease.Index = index
	}
	if len(b.unseen) < maxUnseen { // one that is left out ends nothing later
		b.unseen = append(b.unseen, Lease{UntilMS: until, Index: index})
	}
	b.Seen(viewIndex)
	back = !b.inTouch
	b.inTouch = true
	return back, back || !fresh
}

// Refused takes the answer that there is no lease, to a heartbeat sent at
// sentMS. It tells whether the leader wants the node's report again: an answer
// that is older than the last report does not mean that.
func (b *LeaseBook) Refused(sentMS int64) (report bool) { return b.reported && sentMS > b.reportedMS }

// Reported notes that the leader has the node's report.
func (b *LeaseBook) Reported(nowMS int64) { b.reported, b.reportedMS = true, nowMS }

// Silent tells, once, that the lease has run out.
func (b *LeaseBook) Silent(nowMS int64) bool {
	lost := b.inTouch && nowMS >= b.lease.UntilMS
	if lost {
		b.inTouch = false
	}
	return lost
}

// Seen notes how new the node's rows are. It tells whether a lease counts for
// what runs that did not before.
func (b *LeaseBook) Seen(viewIndex uint64) (more bool) {
	rest := b.unseen[:0]
	for _, l := range b.unseen {
		switch {
		case l.Index > viewIndex:
			rest = append(rest, l)
		case l.UntilMS > b.lease.SureMS:
			b.lease.SureMS, more = l.UntilMS, true
		}
	}
	b.unseen = rest
	return more
}

// Recall takes up the lease of a former daemon, of which leftMS are left by what
// it wrote down: enough to keep running what runs, never to start anything.
func (b *LeaseBook) Recall(nowMS, leftMS int64) {
	until := nowMS + min(leftMS, b.LengthMS)
	b.lease = Lease{UntilMS: until, Index: math.MaxUint64, SureMS: until}
}

// StartByMS is until when what may not outlast the lease can be started. It is
// asked again right before: the daemon may have stood still since the plan, and
// the watchdog only sees what runs already.
func (b *LeaseBook) StartByMS() int64 { return b.lease.SureMS - b.FenceMS }

// TooLate is why a start was given up.
const TooLate = "the lease ran out before it could be started"

// KillMS is when the watchdog kills what may not outlast the lease. The daemon
// is given the first half of the time set apart.
func (b *LeaseBook) KillMS() int64 { return b.lease.SureMS - b.FenceMS/2 }

// Void tells whether a lease that was written down is not this member's. A
// machine that was removed and has joined again is another member: what it ran
// as the former one may run elsewhere by now, and no lease of the new one covers
// it. It is ended before the first heartbeat.
func Void(recorded, membership string) bool { return recorded != "" && recorded != membership }
