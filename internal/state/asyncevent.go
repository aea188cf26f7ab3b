package state

import (
	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/wire"
)

// Bounds of asynchronous events in the whole cluster.
const (
	MaxAsyncEvents    = 10_000   // accepted and not done
	MaxAsyncBytes     = 64 << 20 // of those
	MaxEventPayload   = 2 << 20
	MaxDeadEvents     = 1000 // failed for good and kept; the oldest go
	MaxDeadBytes      = 16 << 20
	maxContextBytes   = 8 << 10
	maxNotBeforeMS    = 600_000
	maxTakenAtOnce    = 1000
	maxEventIDBytes   = 64
	maxConditionBytes = 64
)

// The times of the attempts at an asynchronous event.
const (
	firstRetryMS   = 60_000  // after the first function error
	laterRetryMS   = 120_000 // after the next
	leastBackoffMS = 1000    // after a throttle or an error of Blixard's
	mostBackoffMS  = 300_000
)

// Conditions of events that have ended, as destinations are told.
const (
	ConditionSuccess          = "Success"
	ConditionRetriesExhausted = "RetriesExhausted"
	ConditionEventAgeExceeded = "EventAgeExceeded"
	ConditionZeroConcurrency  = "ZeroReservedConcurrency"
)

// NextAttempt tells what comes after an attempt at an event has failed at nowMS:
// another one at notBeforeMS, or, if condition is set, the end. functionError:
// the function failed, which counts as a retry; else it was throttled or Blixard
// failed, which does not.
func NextAttempt(e *blixard.AsyncEvent, functionError bool, nowMS int64) (notBeforeMS int64, condition string) {
	wait := int64(leastBackoffMS)
	if functionError {
		if e.Attempts >= e.MaxRetries { // this was the first attempt or a retry: all are used up
			return 0, ConditionRetriesExhausted
		}
		if wait = firstRetryMS; e.Attempts > 0 {
			wait = laterRetryMS
		}
	} else {
		wait <<= min(max(e.Tries-e.Attempts, 0), 20)
		wait = min(wait, mostBackoffMS)
	}
	notBeforeMS = nowMS + wait
	if notBeforeMS > e.AcceptedMS+e.MaxAgeMS {
		return 0, ConditionEventAgeExceeded
	}
	return notBeforeMS, ""
}

// EnqueueEvent accepts an asynchronous invocation: once it is applied, the event
// is attempted until it succeeds or has failed for good, whatever node dies,
// unless its function is deleted. A repeat with the same ID changes nothing.
type EnqueueEvent struct {
	ID        string // the request ID
	Function  blixard.FunctionName
	Qualifier string
	Payload   []byte
	Context   string
	// Owner makes the attempts. Unless it is ready in that epoch, the leader
	// chooses one.
	Owner      blixard.NodeName
	OwnerEpoch uint64
	Hops       int // 0 for a user's
}

func (m *EnqueueEvent) kind() uint8 { return 52 }

func (m *EnqueueEvent) code(c *wire.Coder) {
	wire.String(c, &m.ID)
	wire.String(c, &m.Function)
	wire.String(c, &m.Qualifier)
	c.Blob(&m.Payload)
	wire.String(c, &m.Context)
	wire.String(c, &m.Owner)
	wire.Uint(c, &m.OwnerEpoch)
	wire.Int(c, &m.Hops)
}

func (m *EnqueueEvent) apply(tx *txn) (Outcome, *blixard.Error) {
	if old, ok := tx.t.asyncs.Get(m.ID); ok && old.Function == m.Function {
		return Outcome{Noop: true}, nil
	}
	e, err := tx.newAsync(m, 0)
	if err != nil {
		return Outcome{}, err
	}
	tx.setAsync(e)
	return Outcome{Version: tx.index}, nil
}

// newAsync makes an event of what was asked for, if there is room for it once
// freed bytes are.
func (tx *txn) newAsync(m *EnqueueEvent, freed int64) (*blixard.AsyncEvent, *blixard.Error) {
	if m.ID == "" || len(m.ID) > maxEventIDBytes || len(m.Context) > maxContextBytes {
		return nil, blixard.Invalid("event", "", "the event's ID or context is not usable")
	}
	if len(m.Payload) > MaxEventPayload {
		return nil, blixard.Invalid("payload", "store it elsewhere and send its address", "the payload has %d bytes; at most %d are allowed", len(m.Payload), MaxEventPayload)
	}
	f, err := tx.findFunction(m.Function, 0)
	if err != nil {
		return nil, err
	}
	q, err := tx.qualifier(f, m.Qualifier)
	if err != nil {
		return nil, err
	}
	if _, taken := tx.t.asyncs.Get(m.ID); taken {
		return nil, blixard.Errorf(blixard.CodeConflict, "the event's ID %s is taken", clip(m.ID))
	}
	conf := f.AsyncFor(q)
	e := &blixard.AsyncEvent{
		ID: m.ID, Function: m.Function, Qualifier: q, Payload: tidyList(m.Payload), Context: m.Context, AcceptedMS: tx.nowMS, NotBeforeMS: tx.nowMS,
		MaxRetries: conf.MaxRetries, MaxAgeMS: conf.MaxAgeMS, Hops: max(m.Hops, 0),
	}
	if err := tx.roomForAsync(eventSize(e), freed); err != nil {
		return nil, err
	}
	tx.giveAsync(e, m.Owner, m.OwnerEpoch)
	return e, nil
}

// giveAsync makes a node the owner, or nobody if it takes no work.
func (tx *txn) giveAsync(e *blixard.AsyncEvent, owner blixard.NodeName, epoch uint64) {
	e.Owner, e.OwnerEpoch = "", 0
	if n := tx.t.node(owner); n != nil && n.Epoch == epoch && n.State == blixard.NodeReady {
		e.Owner, e.OwnerEpoch = owner, epoch
	}
}

func (tx *txn) roomForAsync(size, freed int64) *blixard.Error {
	const hint = "try again later: functions work them off as fast as their concurrency allows"
	live := tx.t.asyncs.Len() - tx.t.dead.Len()
	if freed == 0 && live >= MaxAsyncEvents {
		return &blixard.Error{Code: blixard.CodeOverloaded, Message: itoa(live) + " asynchronous invocations wait, the most a cluster keeps", Hint: hint}
	}
	if tx.t.liveBytes+size-freed > MaxAsyncBytes {
		return &blixard.Error{Code: blixard.CodeOverloaded, Message: "the asynchronous invocations that wait fill " + itoa(MaxAsyncBytes>>20) + " MiB, the most a cluster keeps", Hint: hint}
	}
	return nil
}

func (tx *txn) setAsync(e *blixard.AsyncEvent) {
	tx.t.putAsync(e)
	tx.changed(ChangeAsyncEvent, withoutPayload(e), false)
}

func (tx *txn) dropAsync(e *blixard.AsyncEvent) {
	tx.t.dropAsync(e)
	tx.changed(ChangeAsyncEvent, withoutPayload(e), true)
}

// withoutPayload is what is told of an event: changes are kept long after their
// rows are gone, and payloads are large.
func withoutPayload(e *blixard.AsyncEvent) *blixard.AsyncEvent {
	told := *e
	told.Payload = nil
	return &told
}

// TakeEvents gives live events of one owner to another node, the lowest IDs
// first. Proposed by the leader when the owner is lost, drained or gone, or when
// nobody owns them (an empty From). Outcome.Value is how many it gave.
type TakeEvents struct {
	From      blixard.NodeName
	FromEpoch uint64
	Node      blixard.NodeName
	NodeEpoch uint64
	Most      int // at most 1,000
}

func (m *TakeEvents) kind() uint8 { return 53 }

func (m *TakeEvents) code(c *wire.Coder) {
	wire.String(c, &m.From)
	wire.Uint(c, &m.FromEpoch)
	wire.String(c, &m.Node)
	wire.Uint(c, &m.NodeEpoch)
	wire.Int(c, &m.Most)
}

func (m *TakeEvents) apply(tx *txn) (Outcome, *blixard.Error) {
	if m.Most < 1 || m.Most > maxTakenAtOnce {
		return Outcome{}, blixard.Invalid("most", "", "%d events are to be taken; 1 to %d may be", m.Most, maxTakenAtOnce)
	}
	if err := tx.takesWork(m.Node, m.NodeEpoch); err != nil {
		return Outcome{}, err
	}
	if m.From == m.Node && m.FromEpoch == m.NodeEpoch {
		return Outcome{Noop: true}, nil
	}
	var taken []*blixard.AsyncEvent
	under(tx.t.owned, ownerKey(m.From, m.FromEpoch), func(e *blixard.AsyncEvent) bool {
		taken = append(taken, e)
		return len(taken) < m.Most
	})
	for _, old := range taken {
		e := *old
		e.Owner, e.OwnerEpoch = m.Node, m.NodeEpoch
		tx.setAsync(&e)
	}
	return Outcome{Version: tx.index, Value: uint64(len(taken)), Noop: len(taken) == 0}, nil
}

// Settlement is what became of an attempt at an event.
type Settlement string

// What can become of an attempt.
const (
	SettleSuccess Settlement = "success"
	SettleRetry   Settlement = "retry"
	SettleDead    Settlement = "dead"
)

// SettleEvent tells what became of an attempt. Success ends the event, whoever
// says so; the rest only its owner may say. NextAttempt tells what is right.
//
// With Next the event's destination is invoked by the same command: either both
// are known or neither. An event that is dead and has no Next is kept for a look
// or a replay.
type SettleEvent struct {
	ID         string
	Owner      blixard.NodeName
	OwnerEpoch uint64
	Result     Settlement
	// FunctionError: the attempt counts as one of the function's.
	FunctionError bool
	NotBeforeMS   int64  // of a retry
	Condition     string // of a dead one
	Error         string // in words
	// Next is the destination's event; its hops are counted here.
	Next *EnqueueEvent
}

func (m *SettleEvent) kind() uint8 { return 54 }

func (m *SettleEvent) code(c *wire.Coder) {
	wire.String(c, &m.ID)
	wire.String(c, &m.Owner)
	wire.Uint(c, &m.OwnerEpoch)
	wire.String(c, &m.Result)
	wire.Bool(c, &m.FunctionError)
	wire.Int(c, &m.NotBeforeMS)
	wire.String(c, &m.Condition)
	wire.String(c, &m.Error)
	wire.Optional(c, &m.Next, func(c *wire.Coder, e *EnqueueEvent) { e.code(c) })
}

func (m *SettleEvent) apply(tx *txn) (Outcome, *blixard.Error) {
	old, ok := tx.t.asyncs.Get(m.ID)
	if !ok || old.Dead {
		return Outcome{Noop: true}, nil // it is over already
	}
	if m.Result != SettleSuccess && (old.Owner != m.Owner || old.OwnerEpoch != m.OwnerEpoch) {
		return Outcome{}, blixard.Errorf(blixard.CodeConflict, "the event %s was given to another node meanwhile", clip(m.ID))
	}
	e := *old
	e.LastError, e.Tries = clip(m.Error), old.Tries+1
	if m.FunctionError {
		e.Attempts++
	}
	switch m.Result {
	case SettleSuccess, SettleDead:
	case SettleRetry:
		e.NotBeforeMS = min(max(m.NotBeforeMS, tx.nowMS), tx.nowMS+maxNotBeforeMS)
		tx.setAsync(&e)
		return Outcome{Version: tx.index}, nil
	default:
		return Outcome{}, blixard.Invalid("result", "known: success, retry, dead", "the settlement %.40q is not known", string(m.Result))
	}
	var next *blixard.AsyncEvent
	lost := ""
	if m.Next != nil {
		want := *m.Next
		want.Hops = old.Hops + 1
		var err *blixard.Error
		switch next, err = tx.newAsync(&want, eventSize(old)); {
		case err != nil && err.Code == blixard.CodeOverloaded:
			return Outcome{}, err // the attempt is not repeated, its settlement is
		case err != nil:
			next, lost = nil, err.Message
		case want.Hops > blixard.MaxEventHops:
			next, lost = nil, "functions call each other in a circle: "+itoa(old.Hops)+" destinations one after another"
		}
	}
	if lost != "" {
		e.LastError = clip(lost + "; before that: " + e.LastError)
		tx.event(Event{Kind: "DestinationLost", Function: e.Function, Warning: true, Message: "the destination of the event " + e.ID + " cannot be invoked: " + lost})
	}
	if m.Result == SettleDead && next == nil {
		e.Dead, e.Condition, e.DeadMS, e.NotBeforeMS = true, clipTo(m.Condition, maxConditionBytes), tx.nowMS, 0
		tx.setAsync(&e)
		tx.event(Event{Kind: "EventDead", Function: e.Function, Warning: true, Message: "the event " + e.ID + " failed for good (" + e.Condition + "): " + e.LastError})
		tx.trimDead()
	} else {
		tx.dropAsync(old)
	}
	if next != nil {
		tx.setAsync(next)
	}
	return Outcome{Version: tx.index}, nil
}

// trimDead forgets the oldest events that failed for good.
func (tx *txn) trimDead() {
	for tx.t.dead.Len() > MaxDeadEvents || tx.t.deadBytes > MaxDeadBytes {
		_, id, _ := tx.t.dead.Min()
		e, _ := tx.t.asyncs.Get(id)
		tx.dropAsync(e)
	}
}

// ReplayEvent has an event that failed for good attempted again, as if it had
// been accepted now.
type ReplayEvent struct {
	ID        string
	Node      blixard.NodeName // its owner; see EnqueueEvent
	NodeEpoch uint64
}

func (m *ReplayEvent) kind() uint8 { return 58 }

func (m *ReplayEvent) code(c *wire.Coder) {
	wire.String(c, &m.ID)
	wire.String(c, &m.Node)
	wire.Uint(c, &m.NodeEpoch)
}

func (m *ReplayEvent) apply(tx *txn) (Outcome, *blixard.Error) {
	old, ok := tx.t.asyncs.Get(m.ID)
	if !ok {
		return Outcome{}, noEvent(m.ID)
	}
	if !old.Dead {
		return Outcome{Noop: true}, nil
	}
	f, err := tx.findFunction(old.Function, 0)
	if err != nil {
		return Outcome{}, err
	}
	if _, err := tx.qualifier(f, old.Qualifier); err != nil {
		return Outcome{}, err
	}
	if err := tx.roomForAsync(eventSize(old), 0); err != nil {
		return Outcome{}, err
	}
	conf := f.AsyncFor(old.Qualifier)
	e := *old
	e.Dead, e.Condition, e.DeadMS, e.Attempts, e.Tries, e.LastError = false, "", 0, 0, 0, ""
	e.AcceptedMS, e.NotBeforeMS, e.MaxRetries, e.MaxAgeMS = tx.nowMS, tx.nowMS, conf.MaxRetries, conf.MaxAgeMS
	tx.giveAsync(&e, m.Node, m.NodeEpoch)
	tx.setAsync(&e)
	tx.event(Event{Kind: "EventReplayed", Function: e.Function, Message: "the event " + e.ID + " is tried again by " + tx.who()})
	return Outcome{Version: tx.index}, nil
}

func noEvent(id string) *blixard.Error {
	return &blixard.Error{Code: blixard.CodeNotFound, Field: "event", Message: "there is no event " + clip(id), Hint: "`blixard function events FUNCTION` shows them"}
}

// PurgeEvent forgets an event, whatever state it is in, or all events of a
// function that failed for good. Outcome.Value is how many.
type PurgeEvent struct {
	ID       string               // "": by function
	Function blixard.FunctionName // "": by ID
}

func (m *PurgeEvent) kind() uint8 { return 59 }

func (m *PurgeEvent) code(c *wire.Coder) {
	wire.String(c, &m.ID)
	wire.String(c, &m.Function)
}

func (m *PurgeEvent) apply(tx *txn) (Outcome, *blixard.Error) {
	var gone []*blixard.AsyncEvent
	of := m.Function
	if m.ID != "" {
		e, ok := tx.t.asyncs.Get(m.ID)
		if !ok || m.Function != "" && e.Function != m.Function {
			return Outcome{}, noEvent(m.ID)
		}
		gone, of = append(gone, e), e.Function
	} else {
		if _, err := tx.findFunction(m.Function, 0); err != nil {
			return Outcome{}, err
		}
		under(tx.t.asyncsOf, string(m.Function)+"\x00", func(e *blixard.AsyncEvent) bool {
			if e.Dead {
				gone = append(gone, e)
			}
			return true
		})
	}
	if len(gone) == 0 {
		return Outcome{Noop: true}, nil
	}
	for _, e := range gone {
		tx.dropAsync(e)
	}
	tx.event(Event{Kind: "EventsPurged", Function: of, Message: itoa(len(gone)) + " events purged by " + tx.who()})
	return Outcome{Version: tx.index, Value: uint64(len(gone))}, nil
}
