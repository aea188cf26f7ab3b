package schedule

import (
	"cmp"
	"slices"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/assert"
	"github.com/blixard/blixard/internal/state"
)

// Index answers requests fast. Make one with NewIndex, tell it of changed rows
// with SyncNode and SyncVM (or Observe), and of decisions with Assume.
type Index struct {
	names  []blixard.NodeName // by node number; numbers are never used twice
	nodes  []*blixard.Node    // nil: no member
	usage  []state.Usage
	number map[blixard.NodeName]int32
	dead   int // numbers without a member

	held   map[blixard.VMName][]holding // by ordinal, generation
	onNode map[vmNode]int32             // instances of a VM a node holds
	groups map[groupNode]int32          // instances of an anti-affinity group a node holds
	ports  map[nodePort]int32

	// journal holds the numbers of changed nodes in order: n for a change of
	// usage, ^n for one of the row. Its first element is change number trimmed.
	journal []int32
	trimmed uint64

	classes map[classKey]*class
	clock   uint64 // for the least recently used class
	builds  uint64 // of classes

	memoStamp []uint32
	memoTotal []int64
	stamp     uint32

	spread spreadCount
	q      question // the one being asked, here to spare an allocation

	hopeless hopeless // what Preempt was asked in vain last
}

// holding is an incarnation that holds resources of a node.
type holding struct {
	ordinal    int
	generation uint64
	node       int32
	spec       *blixard.VMSpec
}

type vmNode struct {
	vm   blixard.VMName
	node int32
}

type groupNode struct {
	group string
	node  int32
}

type nodePort struct {
	protocol string
	port     int
	node     int32
}

// NewIndex builds an index of a view.
func NewIndex(v *state.View) *Index {
	x := &Index{
		number: make(map[blixard.NodeName]int32, v.NodeCount()), held: make(map[blixard.VMName][]holding, v.VMCount()),
		onNode: make(map[vmNode]int32, v.InstanceCount()), groups: map[groupNode]int32{}, ports: map[nodePort]int32{}, classes: map[classKey]*class{},
	}
	v.Nodes(func(n *blixard.Node) bool { x.setNode(n.Name, n); return true })
	v.Instances(func(i *blixard.Instance) bool {
		if i.Holds() {
			list := x.held[i.VM]
			h := holding{i.Ordinal, i.Generation, x.numberOf(i.Node), i.Spec}
			x.held[i.VM] = append(list, h) // instances come in order
			x.book(i.VM, &h, 1)
		}
		return true
	})
	return x
}

// Observe brings the index in line with the rows of a view that changed.
func (x *Index) Observe(v *state.View, changes []state.Change) {
	for i := range changes {
		switch o := changes[i].Object.(type) {
		case *blixard.Node:
			x.SyncNode(v, o.Name)
		case *blixard.Instance:
			x.SyncVM(v, o.VM)
		}
	}
}

// SyncNode brings one node's row in line with a view.
func (x *Index) SyncNode(v *state.View, name blixard.NodeName) { x.setNode(name, v.Node(name)) }

func (x *Index) setNode(name blixard.NodeName, row *blixard.Node) {
	n := x.numberOf(name)
	if x.nodes[n] == row {
		return
	}
	switch {
	case row == nil:
		x.dead++
	case x.nodes[n] == nil:
		x.dead--
	}
	x.nodes[n] = row
	x.note(^n)
}

// numberOf gives a name its number; a name that is no member has no row.
func (x *Index) numberOf(name blixard.NodeName) int32 {
	n, ok := x.number[name]
	if !ok {
		n = int32(len(x.names))
		x.number[name] = n
		x.names = append(x.names, name)
		x.nodes = append(x.nodes, nil)
		x.usage = append(x.usage, state.Usage{})
		x.memoStamp = append(x.memoStamp, 0)
		x.memoTotal = append(x.memoTotal, 0)
		x.dead++
	}
	return n
}

// Wasteful tells whether so many nodes were removed that a new index is better.
func (x *Index) Wasteful() bool { return x.dead > 64 && x.dead > len(x.names)/2 }

// Node is the row of a member as the index knows it, nil if it is none.
func (x *Index) Node(name blixard.NodeName) *blixard.Node {
	if n, ok := x.number[name]; ok {
		return x.nodes[n]
	}
	return nil
}

// Usage is what is held of a node, assumed placements included.
func (x *Index) Usage(name blixard.NodeName) state.Usage {
	if n, ok := x.number[name]; ok {
		return x.usage[n]
	}
	return state.Usage{}
}

// SyncVM brings what a VM's instances hold in line with a view. Placements that
// were assumed and are not in the view are given up.
func (x *Index) SyncVM(v *state.View, vm blixard.VMName) {
	old := x.held[vm]
	at, same := 0, true
	v.InstancesOf(vm, func(i *blixard.Instance) bool {
		if i.Holds() {
			same = at < len(old) && old[at].is(i.Ordinal, i.Generation) && x.names[old[at].node] == i.Node
			at++
		}
		return same
	})
	if same && at == len(old) {
		return
	}
	for k := range old {
		x.book(vm, &old[k], -1)
	}
	now := old[:0]
	v.InstancesOf(vm, func(i *blixard.Instance) bool {
		if i.Holds() {
			now = append(now, holding{i.Ordinal, i.Generation, x.numberOf(i.Node), i.Spec})
		}
		return true
	})
	for k := range now {
		x.book(vm, &now[k], 1)
	}
	x.keep(vm, now)
}

func (h *holding) is(ordinal int, generation uint64) bool {
	return h.ordinal == ordinal && h.generation == generation
}

func (x *Index) keep(vm blixard.VMName, list []holding) {
	if len(list) == 0 {
		delete(x.held, vm)
		return
	}
	x.held[vm] = list
}

// Release gives up a placement that was assumed.
func (x *Index) Release(vm blixard.VMName, ordinal int, generation uint64) {
	x.release(vm, ordinal, generation)
}

// Assume books a placement that was decided and is not applied yet.
func (x *Index) Assume(vm blixard.VMName, spec *blixard.VMSpec, ordinal int, generation uint64, node blixard.NodeName) {
	h := holding{ordinal, generation, x.numberOf(node), spec}
	list := x.held[vm]
	at, found := slices.BinarySearchFunc(list, h, compareHoldings)
	assert.True(!found, "%s-%d#%d is placed twice", vm, ordinal, generation)
	x.held[vm] = slices.Insert(list, at, h)
	x.book(vm, &h, 1)
}

// release gives back what an incarnation holds and returns it; nil if the
// index does not know it.
func (x *Index) release(vm blixard.VMName, ordinal int, generation uint64) *holding {
	list := x.held[vm]
	at, found := slices.BinarySearchFunc(list, holding{ordinal: ordinal, generation: generation}, compareHoldings)
	if !found {
		return nil
	}
	h := list[at]
	x.keep(vm, slices.Delete(list, at, at+1))
	x.book(vm, &h, -1)
	return &h
}

func compareHoldings(a, b holding) int {
	return cmp.Or(cmp.Compare(a.ordinal, b.ordinal), cmp.Compare(a.generation, b.generation))
}

// book adds (sign 1) or takes away (-1) what an incarnation holds.
func (x *Index) book(vm blixard.VMName, h *holding, sign int32) {
	u := &x.usage[h.node]
	if need := h.spec.Needs(); sign > 0 {
		u.Used = u.Used.Add(need)
	} else {
		u.Used = u.Used.Sub(need)
	}
	u.Instances += int(sign)
	assert.True(u.Instances >= 0, "node %s holds %d instances", x.names[h.node], u.Instances)
	add(x.onNode, vmNode{vm, h.node}, sign)
	if g := h.spec.AntiAffinityGroup; g != "" {
		add(x.groups, groupNode{g, h.node}, sign)
	}
	for i := range h.spec.Publish {
		if p := &h.spec.Publish[i]; p.HostPort != 0 {
			add(x.ports, nodePort{p.Protocol, p.HostPort, h.node}, sign)
		}
	}
	x.spread.booked(vm, h.node, sign)
	x.note(h.node)
}

func add[K comparable](m map[K]int32, k K, sign int32) {
	if n := m[k] + sign; n == 0 {
		delete(m, k)
	} else {
		m[k] = n
	}
}

// note writes a change into the journal; classes that lag too far behind are
// built anew, so the oldest changes can go.
func (x *Index) note(change int32) {
	x.journal = append(x.journal, change)
	if limit := 2*len(x.names) + 1024; len(x.journal) > 2*limit {
		drop := len(x.journal) - limit
		x.trimmed += uint64(drop)
		x.journal = append(x.journal[:0], x.journal[drop:]...)
	}
}

func (x *Index) changes() uint64 { return x.trimmed + uint64(len(x.journal)) }

// PortTaken implements state.Held.
func (x *Index) PortTaken(node blixard.NodeName, protocol string, port int) bool {
	n, ok := x.number[node]
	return ok && x.ports[nodePort{protocol, port, n}] > 0
}

// GroupCount implements state.Held.
func (x *Index) GroupCount(group string, node blixard.NodeName) int {
	n, ok := x.number[node]
	if !ok {
		return 0
	}
	return int(x.groups[groupNode{group, n}])
}

// ReplicaCount implements state.Held.
func (x *Index) ReplicaCount(node blixard.NodeName, vm blixard.VMName) int {
	n, ok := x.number[node]
	if !ok {
		return 0
	}
	return int(x.onNode[vmNode{vm, n}])
}
