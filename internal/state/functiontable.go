package state

import (
	"encoding/binary"
	"strings"

	"github.com/tidwall/btree"

	"github.com/blixard/blixard"
)

// functionTables are the rows about functions. They are part of tables, and are
// copied as those are.
type functionTables struct {
	functions  *btree.Map[blixard.FunctionName, *blixard.Function]
	versions   *btree.Map[string, *blixard.FunctionVersion] // by versionKey
	slots      *btree.Map[string, *blixard.FunctionSlots]   // function \x00 node
	asyncs     *btree.Map[string, *blixard.AsyncEvent]      // by ID
	accessKeys *btree.Map[string, *blixard.AccessKey]       // by ID

	// Derived.
	leased     *btree.Map[blixard.FunctionName, int]        // slots leased to all nodes
	slotsOn    *btree.Map[string, *blixard.FunctionSlots]   // node \x00 function
	urls       *btree.Map[string, blixard.FunctionName]     // URL's ID -> function
	pending    *btree.Map[string, *blixard.FunctionVersion] // versions that are to be built, by versionKey
	asyncsOf   *btree.Map[string, *blixard.AsyncEvent]      // function \x00 ID
	owned      *btree.Map[string, *blixard.AsyncEvent]      // live ones: owner \x00 epoch, 8 bytes \x00 ID
	dead       *btree.Map[string, string]                   // time, 8 bytes \x00 ID -> ID: the oldest first
	liveBytes  int64                                        // of events that are not dead
	deadBytes  int64
	triggersAt uint64 // index of the last change of any function's row
}

func newFunctionTables() functionTables {
	return functionTables{
		functions: new(btree.Map[blixard.FunctionName, *blixard.Function]), versions: new(btree.Map[string, *blixard.FunctionVersion]),
		slots: new(btree.Map[string, *blixard.FunctionSlots]), asyncs: new(btree.Map[string, *blixard.AsyncEvent]), accessKeys: new(btree.Map[string, *blixard.AccessKey]),
		leased: new(btree.Map[blixard.FunctionName, int]), slotsOn: new(btree.Map[string, *blixard.FunctionSlots]), urls: new(btree.Map[string, blixard.FunctionName]),
		pending: new(btree.Map[string, *blixard.FunctionVersion]), asyncsOf: new(btree.Map[string, *blixard.AsyncEvent]), owned: new(btree.Map[string, *blixard.AsyncEvent]),
		dead: new(btree.Map[string, string]),
	}
}

func (t *functionTables) copy() functionTables {
	out := *t // with the sums
	out.functions, out.versions, out.slots, out.asyncs, out.accessKeys = t.functions.Copy(), t.versions.Copy(), t.slots.Copy(), t.asyncs.Copy(), t.accessKeys.Copy()
	out.leased, out.slotsOn, out.urls, out.pending = t.leased.Copy(), t.slotsOn.Copy(), t.urls.Copy(), t.pending.Copy()
	out.asyncsOf, out.owned, out.dead = t.asyncsOf.Copy(), t.owned.Copy(), t.dead.Copy()
	return out
}

// own copies the maps as values, so that copying them leaves those of a view be.
func (t *functionTables) own() functionTables {
	out := *t
	out.functions, out.versions, out.slots, out.asyncs, out.accessKeys = own(t.functions), own(t.versions), own(t.slots), own(t.asyncs), own(t.accessKeys)
	out.leased, out.slotsOn, out.urls, out.pending = own(t.leased), own(t.slotsOn), own(t.urls), own(t.pending)
	out.asyncsOf, out.owned, out.dead = own(t.asyncsOf), own(t.owned), own(t.dead)
	return out
}

// versionKey orders versions by function and number.
func versionKey(name blixard.FunctionName, number int) string {
	b := make([]byte, 0, len(name)+5)
	b = append(b, name...)
	b = append(b, 0)
	return string(binary.BigEndian.AppendUint32(b, uint32(number)))
}

func slotsKey(name blixard.FunctionName, node blixard.NodeName) string {
	return string(name) + "\x00" + string(node)
}

func ownedKey(e *blixard.AsyncEvent) string {
	return ownerKey(e.Owner, e.OwnerEpoch) + e.ID
}

func ownerKey(node blixard.NodeName, epoch uint64) string {
	b := make([]byte, 0, len(node)+10)
	b = append(b, node...)
	b = append(b, 0)
	b = binary.BigEndian.AppendUint64(b, epoch)
	return string(append(b, 0))
}

func deadKey(e *blixard.AsyncEvent) string {
	b := binary.BigEndian.AppendUint64(make([]byte, 0, 9+len(e.ID)), uint64(max(e.DeadMS, 0)))
	b = append(b, 0)
	return string(append(b, e.ID...))
}

// eventSize is what an asynchronous event counts as.
func eventSize(e *blixard.AsyncEvent) int64 {
	return int64(len(e.Payload) + len(e.Context) + len(e.ID) + len(e.LastError))
}

func (t *functionTables) function(name blixard.FunctionName) *blixard.Function {
	f, _ := t.functions.Get(name)
	return f
}

func (t *functionTables) version(name blixard.FunctionName, number int) *blixard.FunctionVersion {
	v, _ := t.versions.Get(versionKey(name, number))
	return v
}

// under calls yield for the rows whose keys begin with prefix.
func under[T any](m *btree.Map[string, T], prefix string, yield func(T) bool) {
	m.Ascend(prefix, func(key string, row T) bool { return strings.HasPrefix(key, prefix) && yield(row) })
}

// putFunction stores a row with what is derived of it.
func (t *functionTables) putFunction(f *blixard.Function, index uint64) {
	if old, had := t.functions.Set(f.Name, f); had {
		for i := range old.URLs {
			t.urls.Delete(old.URLs[i].ID)
		}
	}
	for i := range f.URLs {
		t.urls.Set(f.URLs[i].ID, f.Name)
	}
	t.triggersAt = index
}

func (t *functionTables) dropFunction(f *blixard.Function, index uint64) {
	t.functions.Delete(f.Name)
	for i := range f.URLs {
		t.urls.Delete(f.URLs[i].ID)
	}
	t.triggersAt = index
}

func (t *functionTables) putVersion(v *blixard.FunctionVersion) {
	key := versionKey(v.Function, v.Number)
	t.versions.Set(key, v)
	if v.State == blixard.FunctionPending {
		t.pending.Set(key, v)
	} else {
		t.pending.Delete(key)
	}
}

func (t *functionTables) dropVersion(v *blixard.FunctionVersion) {
	key := versionKey(v.Function, v.Number)
	t.versions.Delete(key)
	t.pending.Delete(key)
}

// putSlots stores what a node has leased; a row that says nothing goes.
func (t *functionTables) putSlots(s *blixard.FunctionSlots) {
	key, on := slotsKey(s.Function, s.Node), string(s.Node)+"\x00"+string(s.Function)
	var old *blixard.FunctionSlots
	if s.Count == 0 && s.Short == 0 {
		old, _ = t.slots.Delete(key)
		t.slotsOn.Delete(on)
	} else {
		old, _ = t.slots.Set(key, s)
		t.slotsOn.Set(on, s)
	}
	sum, _ := t.leased.Get(s.Function)
	sum += s.Count
	if old != nil {
		sum -= old.Count
	}
	if sum == 0 {
		t.leased.Delete(s.Function)
	} else {
		t.leased.Set(s.Function, sum)
	}
}

// putAsync stores an event with what is derived of it; old is its former row.
func (t *functionTables) putAsync(e *blixard.AsyncEvent) {
	if old, ok := t.asyncs.Get(e.ID); ok {
		t.dropAsync(old)
	}
	t.asyncs.Set(e.ID, e)
	t.asyncsOf.Set(string(e.Function)+"\x00"+e.ID, e)
	if e.Dead {
		t.dead.Set(deadKey(e), e.ID)
		t.deadBytes += eventSize(e)
	} else {
		t.owned.Set(ownedKey(e), e)
		t.liveBytes += eventSize(e)
	}
}

func (t *functionTables) dropAsync(e *blixard.AsyncEvent) {
	t.asyncs.Delete(e.ID)
	t.asyncsOf.Delete(string(e.Function) + "\x00" + e.ID)
	if e.Dead {
		t.dead.Delete(deadKey(e))
		t.deadBytes -= eventSize(e)
	} else {
		t.owned.Delete(ownedKey(e))
		t.liveBytes -= eventSize(e)
	}
}
