package state

import (
	"encoding/binary"

	"github.com/blixard/blixard"
)

// Function returns the named function, nil if there is none. One that is being
// deleted is still there.
func (v *View) Function(name blixard.FunctionName) *blixard.Function { return v.t.function(name) }

// Functions calls yield for each function by name.
func (v *View) Functions(yield func(*blixard.Function) bool) { v.FunctionsFrom("", yield) }

// FunctionsFrom is Functions, beginning with the first name that is not less
// than from.
func (v *View) FunctionsFrom(from blixard.FunctionName, yield func(*blixard.Function) bool) {
	v.t.functions.Ascend(from, func(_ blixard.FunctionName, f *blixard.Function) bool { return yield(f) })
}

// FunctionCount is the number of functions.
func (v *View) FunctionCount() int { return v.t.functions.Len() }

// FunctionsIndex is the index of the entry that changed a function's row last:
// what was made of all functions (a table of triggers) holds while it stays.
func (v *View) FunctionsIndex() uint64 { return v.t.triggersAt }

// FunctionVersion returns a version, 0 for $LATEST; nil if there is none.
func (v *View) FunctionVersion(name blixard.FunctionName, number int) *blixard.FunctionVersion {
	return v.t.version(name, number)
}

// FunctionVersions calls yield for each version of a function, $LATEST first,
// then by number.
func (v *View) FunctionVersions(name blixard.FunctionName, yield func(*blixard.FunctionVersion) bool) {
	under(v.t.versions, string(name)+"\x00", yield)
}

// NewestVersion is the version of a function that was published last, nil if
// none is there.
func (v *View) NewestVersion(name blixard.FunctionName) *blixard.FunctionVersion {
	return v.t.newestVersion(name)
}

func (t *functionTables) newestVersion(name blixard.FunctionName) (newest *blixard.FunctionVersion) {
	t.versions.Descend(versionKey(name, int(^uint32(0))), func(_ string, v *blixard.FunctionVersion) bool {
		if v.Function == name && v.Number > 0 {
			newest = v
		}
		return false
	})
	return newest
}

// PendingVersions calls yield for each version that is to be built, by function
// and number.
func (v *View) PendingVersions(yield func(*blixard.FunctionVersion) bool) {
	v.t.pending.Scan(func(_ string, fv *blixard.FunctionVersion) bool { return yield(fv) })
}

// FunctionByURL returns the function with the URL of that ID and the URL, nil if
// there is none.
func (v *View) FunctionByURL(id string) (*blixard.Function, *blixard.FunctionURL) {
	name, ok := v.t.urls.Get(id)
	if !ok {
		return nil, nil
	}
	f := v.t.function(name)
	for i := range f.URLs {
		if f.URLs[i].ID == id {
			return f, &f.URLs[i]
		}
	}
	return nil, nil
}

// Triggers calls yield for each trigger of each function that is not being
// deleted. It costs a look at all functions; FunctionsIndex tells when what was
// made of it has to be made again.
func (v *View) Triggers(yield func(*blixard.Function, *blixard.Trigger) bool) {
	v.t.functions.Scan(func(_ blixard.FunctionName, f *blixard.Function) bool {
		for i := range f.Triggers {
			if !f.Deleting && !yield(f, &f.Triggers[i]) {
				return false
			}
		}
		return true
	})
}

// Resolve tells which version a qualifier means: "" and "$LATEST", a number or
// an alias, whose weights draw (0..999,999) decides. The version may not be
// callable: see blixard.FunctionVersion.Callable.
func (v *View) Resolve(name blixard.FunctionName, qualifier string, draw int) (*blixard.FunctionVersion, *blixard.Error) {
	f := v.t.function(name)
	if f == nil {
		return nil, v.t.noFunction(name)
	}
	number, ok := blixard.ParseVersion(qualifier)
	if !ok {
		a := f.Alias(qualifier)
		if a == nil {
			return nil, noAlias(f, qualifier)
		}
		number = a.Number
		if draw < a.SecondShare {
			number = a.Second
		}
	}
	fv := v.t.version(name, number)
	if fv == nil {
		return nil, noVersion(f, number)
	}
	return fv, nil
}

// Slots is what a node has leased of a function; zero for nothing. It is the
// node's own only if NodeEpoch is the node's: else it belongs to a machine that
// it replaced.
func (v *View) Slots(name blixard.FunctionName, node blixard.NodeName) blixard.FunctionSlots {
	if s, ok := v.t.slots.Get(slotsKey(name, node)); ok {
		return *s
	}
	return blixard.FunctionSlots{Function: name, Node: node}
}

// SlotsOf calls yield for each node that has leased slots of a function, or was
// refused some, by node.
func (v *View) SlotsOf(name blixard.FunctionName, yield func(*blixard.FunctionSlots) bool) {
	under(v.t.slots, string(name)+"\x00", yield)
}

// SlotsOn calls yield for what a node has leased, or was refused, by function.
func (v *View) SlotsOn(node blixard.NodeName, yield func(*blixard.FunctionSlots) bool) {
	under(v.t.slotsOn, string(node)+"\x00", yield)
}

// AllSlots calls yield for what each node has leased of each function, or was
// refused, by function and node.
func (v *View) AllSlots(yield func(*blixard.FunctionSlots) bool) {
	v.t.slots.Scan(func(_ string, s *blixard.FunctionSlots) bool { return yield(s) })
}

// SlotsLeased is how many slots of a function all nodes have leased.
func (v *View) SlotsLeased(name blixard.FunctionName) int {
	n, _ := v.t.leased.Get(name)
	return n
}

// shortForMS is how long a refused request for slots is a reason for others to
// give back idle ones.
const shortForMS = 5000

// SlotsShort is how many slots of a function nodes other than one asked for
// lately and did not get, or, if more was leased than may be, how many are too
// many: so many that are idle should be returned. nowMS is the wall clock.
func (v *View) SlotsShort(name blixard.FunctionName, node blixard.NodeName, nowMS int64) int {
	short := 0
	v.SlotsOf(name, func(s *blixard.FunctionSlots) bool {
		if s.Node != node && s.Short > 0 && nowMS-s.ShortMS < shortForMS {
			short += s.Short
		}
		return true
	})
	f := v.t.function(name)
	if f == nil || f.Deleting {
		return v.SlotsLeased(name)
	}
	return max(short, v.SlotsLeased(name)-f.MaxConcurrent)
}

// AsyncEvent returns an asynchronous event, nil if there is none.
func (v *View) AsyncEvent(id string) *blixard.AsyncEvent {
	e, _ := v.t.asyncs.Get(id)
	return e
}

// AsyncEvents calls yield for each event, dead ones included, by ID.
func (v *View) AsyncEvents(yield func(*blixard.AsyncEvent) bool) {
	v.t.asyncs.Scan(func(_ string, e *blixard.AsyncEvent) bool { return yield(e) })
}

// AsyncEventsOf calls yield for each event of a function, dead ones included, by
// ID.
func (v *View) AsyncEventsOf(name blixard.FunctionName, yield func(*blixard.AsyncEvent) bool) {
	under(v.t.asyncsOf, string(name)+"\x00", yield)
}

// EventsOwnedBy calls yield for each live event that a node is to make the
// attempts of, in the epoch given, by ID.
func (v *View) EventsOwnedBy(node blixard.NodeName, epoch uint64, yield func(*blixard.AsyncEvent) bool) {
	under(v.t.owned, ownerKey(node, epoch), yield)
}

// EventOwners calls yield for each pair of node and epoch that owns live events;
// the node need not be a member any more. It costs little: one look per owner.
func (v *View) EventOwners(yield func(node blixard.NodeName, epoch uint64) bool) {
	from := ""
	for {
		next, found := "", false
		v.t.owned.Ascend(from, func(key string, e *blixard.AsyncEvent) bool {
			next, found = ownerKey(e.Owner, e.OwnerEpoch), true
			return false
		})
		if !found {
			return
		}
		n := len(next)
		if !yield(blixard.NodeName(next[:n-10]), binary.BigEndian.Uint64([]byte(next[n-9:n-1]))) {
			return
		}
		from = next[:n-1] + "\x01" // past all IDs of this owner
	}
}

// AsyncLoad is how much is accepted and not done, and how much has failed for
// good and is kept; Max* are the bounds.
func (v *View) AsyncLoad() AsyncLoad {
	dead := v.t.dead.Len()
	return AsyncLoad{Events: v.t.asyncs.Len() - dead, Bytes: v.t.liveBytes, Dead: dead, DeadBytes: v.t.deadBytes}
}

// AsyncLoad counts asynchronous events.
type AsyncLoad struct {
	Events    int
	Bytes     int64 // of payloads and what goes with them
	Dead      int
	DeadBytes int64
}

// AccessKey returns an access key, nil if there is none. It may be revoked or
// expired.
func (v *View) AccessKey(id string) *blixard.AccessKey {
	k, _ := v.t.accessKeys.Get(id)
	return k
}

// AccessKeys calls yield for each access key by ID.
func (v *View) AccessKeys(yield func(*blixard.AccessKey) bool) {
	v.t.accessKeys.Scan(func(_ string, k *blixard.AccessKey) bool { return yield(k) })
}
