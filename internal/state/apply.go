package state

import (
	"fmt"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/assert"
)

// Change is one row that an entry changed. Object is the new row (*blixard.VM,
// *blixard.Instance, *blixard.Node, *Event), the last one if Deleted.
type Change struct {
	Index   uint64
	Kind    ChangeKind
	Object  any
	Deleted bool
}

// ChangeKind is the table a change is in.
type ChangeKind uint8

// The tables that can be watched.
const (
	ChangeVM ChangeKind = iota + 1
	ChangeInstance
	ChangeNode
	ChangeEvent
	ChangeFunction        // *blixard.Function
	ChangeFunctionVersion // *blixard.FunctionVersion
	ChangeSlots           // *blixard.FunctionSlots
	ChangeAsyncEvent      // *blixard.AsyncEvent, without its payload
	ChangeAccessKey       // *blixard.AccessKey
)

// txn is the state while one entry is applied.
type txn struct {
	t       *tables
	index   uint64
	nowMS   int64
	actor   string
	changes []Change
}

func (tx *txn) undo(saved tables, changes int, err *blixard.Error) (Outcome, *blixard.Error) {
	*tx.t = saved
	tx.changes = tx.changes[:changes]
	return Outcome{}, err
}

// Apply applies the entry at index, the one after the last. It returns a result
// for each envelope, in order, and the rows that changed. An error means the
// entry cannot be read: the replica must not go on.
func (s *State) Apply(index, term uint64, data []byte) ([]Result, []Change, error) {
	envelopes, err := DecodeEntry(data)
	if err != nil {
		return nil, nil, fmt.Errorf("applying entry %d: %w", index, err)
	}
	results, changes := s.ApplyAll(index, term, envelopes)
	return results, changes, nil
}

// ApplyAll is Apply for decoded envelopes.
func (s *State) ApplyAll(index, term uint64, envelopes []Envelope) ([]Result, []Change) {
	assert.True(index > s.index, "applying entry %d after %d", index, s.index)
	s.index, s.term, s.view = index, term, nil
	tx := &txn{t: &s.t, index: index}
	results := make([]Result, len(envelopes))
	for i := range envelopes {
		results[i] = tx.applyOne(&envelopes[i])
	}
	return results, tx.changes
}

// Try tells what a command would do to the state of this view, without doing
// it.
func (v *View) Try(e Envelope) Result {
	t := v.t.copyForTry()
	tx := &txn{t: &t, index: v.Index + 1}
	return tx.applyOne(&e)
}

func (tx *txn) applyOne(e *Envelope) Result {
	tx.nowMS = e.NowMS
	tx.t.cluster.NowMS = tx.nowMS
	tx.actor = e.Actor
	r := Result{Request: e.Request}
	var print uint64
	if e.Key != "" {
		print = fingerprint(e.Command)
		if old, ok := tx.t.keys.Get(e.Key); ok {
			if old.Print != print {
				r.Err = blixard.Errorf(blixard.CodeConflict, "the idempotency key %q was used for another request", e.Key)
				return r
			}
			r.Outcome, r.Err = old.Outcome, old.Err
			return r
		}
	}
	if r.Err = tx.t.allows(e.Command); r.Err == nil {
		r.Outcome, r.Err = e.Command.apply(tx)
	}
	if r.Err == nil {
		r.Outcome.Index = tx.index
	}
	if e.Key != "" {
		tx.remember(e.Key, &remembered{Print: print, AtMS: tx.nowMS, Outcome: r.Outcome, Err: r.Err})
	}
	return r
}

// remembered is what became of a command with an idempotency key.
type remembered struct {
	Print   uint64
	AtMS    int64
	Outcome Outcome
	Err     *blixard.Error
}

func (tx *txn) remember(key string, r *remembered) {
	c := &tx.t.cluster
	tx.t.keys.Set(key, r)
	tx.t.keyOrder.Set(c.NextKey, key)
	c.NextKey++
	for tx.t.keyOrder.Len() > maxKeys {
		_, oldest, _ := tx.t.keyOrder.PopMin()
		tx.t.keys.Delete(oldest)
	}
}

func (tx *txn) changed(kind ChangeKind, object any, deleted bool) {
	tx.changes = append(tx.changes, Change{Index: tx.index, Kind: kind, Object: object, Deleted: deleted})
}

func (tx *txn) setNode(n *blixard.Node) {
	n.ModifiedIndex = tx.index
	tx.t.nodes.Set(n.Name, n)
	tx.changed(ChangeNode, n, false)
}

func (tx *txn) setVM(vm *blixard.VM) {
	tx.t.vms.Set(vm.Name, vm)
	tx.changed(ChangeVM, vm, false)
}

// setInstance stores an incarnation and keeps the derived tables.
func (tx *txn) setInstance(i *blixard.Instance) {
	i.Version = tx.index
	key := keyOf(i)
	old, had := tx.t.instances.Set(key, i)
	if had {
		assert.True(old.State == i.State || blixard.CanFollow(old.State, i.State), "%s goes from %s to %s", i.Incarnation(), old.State, i.State)
		assert.True(old.Node == i.Node, "%s moves from %s to %s", i.Incarnation(), old.Node, i.Node)
	}
	tx.t.byNode.Set(string(i.Node)+"\x00"+key, i)
	switch wasHolding := had && old.Holds(); {
	case i.Holds() && !wasHolding:
		tx.t.hold(i, key, 1)
	case !i.Holds() && wasHolding:
		tx.t.hold(i, key, -1)
	}
	tx.changed(ChangeInstance, i, false)
}

func (tx *txn) dropInstance(i *blixard.Instance) {
	key := keyOf(i)
	tx.t.instances.Delete(key)
	tx.t.byNode.Delete(string(i.Node) + "\x00" + key)
	if i.Holds() {
		tx.t.hold(i, key, -1)
	}
	tx.changed(ChangeInstance, i, true)
}

// hold books (sign 1) or releases (-1) what an incarnation holds of its node.
func (t *tables) hold(i *blixard.Instance, key string, sign int) {
	u, _ := t.usage.Get(i.Node)
	if need := i.Spec.Needs(); sign > 0 {
		u.Used = u.Used.Add(need)
	} else {
		u.Used = u.Used.Sub(need)
	}
	u.Instances += sign
	if u.Instances == 0 {
		t.usage.Delete(i.Node)
	} else {
		t.usage.Set(i.Node, u)
	}
	for _, p := range i.Spec.Publish {
		if p.HostPort == 0 {
			continue
		}
		if k := portKey(i.Node, p.Protocol, p.HostPort); sign > 0 {
			t.ports.Set(k, key)
		} else {
			t.ports.Delete(k)
		}
	}
	if i.Spec.AntiAffinityGroup != "" {
		k := i.Spec.AntiAffinityGroup + "\x00" + string(i.Node)
		n, _ := t.groups.Get(k)
		if n += sign; n == 0 {
			t.groups.Delete(k)
		} else {
			t.groups.Set(k, n)
		}
	}
}

// clip bounds a text that came from outside.
func clip(s string) string {
	if len(s) > maxMessage {
		s = s[:maxMessage-3] + "..."
	}
	return strings.ToValidUTF8(s, "?")
}
