package schedule

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// Room is where a request finds a place once some incarnations have ended: all
// on one node, as few as are needed, and of no higher priority than must be.
type Room struct {
	Node    blixard.NodeName
	Epoch   uint64              // of the node's row
	Victims []*blixard.Instance // to be ended, the lowest priority first; none if it is enough to wait
	Ending  []*blixard.Instance // on their way out already, whose room is counted on
	Highest int                 // priority among the victims, 0 if there are none
	Score   int64
}

// Want asks for room that is to be made.
type Want struct {
	Request
	// Own is the slot's incarnation that is to be moved; nil if it has none.
	Own *blixard.Instance
	// Condemned are incarnations that will end although the view does not show
	// it yet.
	Condemned map[*blixard.Instance]bool
}

// Preempt finds the best room for a request that Find finds no place for. Only
// incarnations of VMs with a lower priority are ended, and of none that the
// request depends on; what an index of the
// same view has booked is respected. It asks node after node and what runs
// there until it has looked at enoughRows and found some room, and tells how
// many rows it looked at: it is for the few that fit nowhere.
func (x *Index) Preempt(v *state.View, w Want) (room Room, scanned int, ok bool) {
	key := hopeless{changes: x.changes(), view: v.Index, priority: w.Spec.Priority, class: keyFor(w.Spec)}
	shared := w.Own == nil && len(w.Condemned) == 0 && w.Spec.AntiAffinityGroup == "" && len(w.Spec.AffinityVMs)+len(w.Spec.DependsOn)+len(w.Spec.Publish) == 0
	if shared && x.hopeless == key {
		return Room{}, 0, false
	}
	s := newRoomSearch(v, w)
	inValue := map[string]int64{}
	if w.Spec.SpreadAcross != "" {
		for _, h := range x.held[w.VM] {
			if row := x.nodes[h.node]; row != nil {
				inValue[spreadValue(row, w.Spec.SpreadAcross)]++
			}
		}
	}
	avoid := x.numbers(w.Avoid)
	for n, row := range x.nodes {
		if row == nil {
			continue
		}
		q := question{Case: state.Case{Node: row, Spec: w.Spec, Usage: x.usage[n], Held: x}}
		q.onNode = int64(x.onNode[vmNode{w.VM, int32(n)}])
		q.avoid = slices.Contains(avoid, int32(n))
		if w.Spec.SpreadAcross != "" {
			q.inValue = inValue[spreadValue(row, w.Spec.SpreadAcross)]
		}
		if s.consider(&q); s.found && s.rows >= enoughRows {
			break
		}
	}
	if shared && !s.found {
		x.hopeless = key
	}
	return s.best, s.rows, s.found
}

// enoughRows is when room that was found is good enough: looking at all of a
// large cluster would hold up its leader.
const enoughRows = 20_000

// hopeless is a request for which no room could be made.
type hopeless struct {
	changes, view uint64
	priority      int
	class         classKey
}

// ExplainRoom is Preempt straight from a view, for people and tests; it asks
// every node.
func ExplainRoom(v *state.View, w Want) (Room, bool) {
	s := newRoomSearch(v, w)
	onNode, inValue := replicas(v, w.Request)
	v.Nodes(func(n *blixard.Node) bool {
		q := question{Case: v.Case(n, w.Spec), onNode: onNode[n.Name], avoid: slices.Contains(w.Avoid, n.Name)}
		if w.Spec.SpreadAcross != "" {
			q.inValue = inValue[spreadValue(n, w.Spec.SpreadAcross)]
		}
		s.consider(&q)
		return true
	})
	return s.best, s.found
}

// String says what it takes: "room on n1 by ending low-1, low-2 (priority 100)".
func (r *Room) String() string {
	list := func(all []*blixard.Instance) string {
		var names []string
		for _, i := range all {
			if len(names) == maxParts {
				names = append(names, strconv.Itoa(len(all)-maxParts)+" more")
				break
			}
			names = append(names, string(i.ID))
		}
		return strings.Join(names, ", ")
	}
	if len(r.Victims) == 0 {
		return "room on " + string(r.Node) + " when " + list(r.Ending) + " has ended"
	}
	return "room on " + string(r.Node) + " by ending " + list(r.Victims) + " (priority " + strconv.Itoa(r.Highest) + ")"
}

// roomSearch looks for the best room, node by node.
type roomSearch struct {
	v *state.View
	w Want
	// spared are VMs without which the request could not be placed at all.
	spared map[blixard.VMName]bool

	rows  int
	best  Room
	found bool
}

func newRoomSearch(v *state.View, w Want) roomSearch {
	s := roomSearch{v: v, w: w, spared: map[blixard.VMName]bool{}}
	todo := slices.Concat(w.Spec.AffinityVMs, w.Spec.DependsOn)
	for len(todo) > 0 {
		name := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if s.spared[name] {
			continue
		}
		s.spared[name] = true
		if vm := v.VM(name); vm != nil {
			todo = append(todo, vm.Spec.DependsOn...)
		}
	}
	return s
}

// tenant is an incarnation that could make room.
type tenant struct {
	*blixard.Instance
	priority int
	needs    blixard.Resources
}

// consider finds the room on one node and keeps it if it is the best so far.
func (s *roomSearch) consider(q *question) {
	s.rows++
	if !q.Fits(state.ScopeNode) || !q.Spec.Needs().Fits(q.Node.Allocatable()) {
		return
	}
	var lower []tenant
	var ending, gone []*blixard.Instance
	s.v.InstancesOn(q.Node.Name, func(i *blixard.Instance) bool {
		s.rows++
		switch t := s.tenant(i); {
		case !i.Holds() || i == s.w.Own:
		case t.leaves:
			ending = append(ending, i)
		case t.priority < s.w.Spec.Priority && i.Wanted == blixard.WantRun && !s.spared[i.VM]:
			lower = append(lower, t.tenant)
		}
		return true
	})
	gone = append(gone, ending...)
	if s.w.Own != nil && s.w.Own.Node == q.Node.Name {
		gone = append(gone, s.w.Own)
	}
	if len(gone)+len(lower) == 0 {
		return
	}
	s.rows += len(lower) * len(lower) / 8 // what finding out who can stay costs
	k := keeper{c: q.Case, gone: gone}
	victims, ok := k.victims(lower)
	if !ok {
		return
	}
	r := Room{Node: q.Node.Name, Epoch: q.Node.Epoch, Ending: ending}
	slices.SortFunc(victims, func(a, b tenant) int {
		return cmp.Or(cmp.Compare(a.priority, b.priority), cmp.Compare(a.VM, b.VM), cmp.Compare(a.Ordinal, b.Ordinal))
	})
	for _, t := range victims {
		r.Victims = append(r.Victims, t.Instance)
		r.Highest = max(r.Highest, t.priority)
	}
	then := q.Without(append(gone, r.Victims...))
	q.Case = then
	r.Score = q.points(state.ScopeNode) + q.points(state.ScopeUsage) + q.points(state.ScopeHeld)
	if !s.found || r.compare(&s.best) < 0 {
		s.best, s.found = r, true
	}
}

// judged is a tenant and whether it leaves by itself, for good as far as
// requests of this priority go.
type judged struct {
	tenant
	leaves bool
}

func (s *roomSearch) tenant(i *blixard.Instance) judged {
	j := judged{tenant: tenant{Instance: i, priority: i.Spec.Priority, needs: i.Spec.Needs()}}
	stays := true
	if vm := s.v.VM(i.VM); vm != nil {
		j.priority = vm.Spec.Priority
		stays = !vm.Deleting && vm.Desired == blixard.DesiredRunning && i.Ordinal <= vm.Spec.Replicas
	}
	// Its successor may want the room back, unless it must stand behind this
	// request; one to run beside is no company once it goes.
	yields := !stays || j.priority < s.w.Spec.Priority || slices.Contains(s.w.Spec.AffinityVMs, i.VM)
	j.leaves = yields && (i.Wanted != blixard.WantRun || s.w.Condemned[i])
	return j
}

// compare orders rooms, the better one first: whom it costs least, then the
// best node.
func (r *Room) compare(o *Room) int {
	return cmp.Or(
		cmp.Compare(r.Highest, o.Highest), cmp.Compare(len(r.Victims), len(o.Victims)), cmp.Compare(r.singletons(), o.singletons()),
		cmp.Compare(o.Score, r.Score), cmp.Compare(r.Node, o.Node),
	)
}

func (r *Room) singletons() int {
	n := 0
	for _, i := range r.Victims {
		if i.Spec.Singleton {
			n++
		}
	}
	return n
}

// keeper finds out who can stay on a node.
type keeper struct {
	c    state.Case
	gone []*blixard.Instance // end in any case
}

// fits tells whether the request fits when these have ended.
func (k *keeper) fits(victims []tenant) bool {
	gone := k.gone[:len(k.gone):len(k.gone)]
	for i := range victims {
		gone = append(gone, victims[i].Instance)
	}
	c := k.c.Without(gone)
	return c.Fits(state.ScopeUsage) && c.Fits(state.ScopeHeld)
}

// victims are who of the tenants cannot stay; false if the node does not take
// the request even without all of them. Who has the highest priority may stay
// first; of equals first exclusive ones, whose restart costs most, then small
// ones, so that few have to go.
func (k *keeper) victims(lower []tenant) ([]tenant, bool) {
	if !k.fits(lower) {
		return nil, false
	}
	slices.SortFunc(lower, func(a, b tenant) int {
		exclusive := 0
		if a.Spec.Singleton != b.Spec.Singleton {
			exclusive = 1
			if a.Spec.Singleton {
				exclusive = -1
			}
		}
		return cmp.Or(
			cmp.Compare(b.priority, a.priority), exclusive, cmp.Compare(a.needs.MemoryMiB, b.needs.MemoryMiB), cmp.Compare(a.needs.MilliCPU, b.needs.MilliCPU),
			cmp.Compare(a.VM, b.VM), cmp.Compare(a.Ordinal, b.Ordinal),
		)
	})
	var leave, stay []tenant
	for i, t := range lower {
		if rest := append(leave[:len(leave):len(leave)], lower[i+1:]...); k.fits(rest) {
			stay = append(stay, t)
		} else {
			leave = append(leave, t)
		}
	}
	return k.exchange(leave, stay), true
}

// exchange spares large victims where a smaller tenant of the same standing
// makes as much room as is needed.
func (k *keeper) exchange(victims, stay []tenant) []tenant {
	for v := range victims {
		for s := range stay { // the small ones come first
			a, b := victims[v], stay[s]
			if b.priority != a.priority || b.Spec.Singleton != a.Spec.Singleton || b.needs == a.needs || !b.needs.Fits(a.needs) {
				continue
			}
			victims[v] = b
			if k.fits(victims) {
				stay[s] = a
				break
			}
			victims[v] = a
		}
	}
	return victims
}
