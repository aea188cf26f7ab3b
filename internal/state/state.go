// Package state is the replicated state of a cluster: tables of nodes, VMs,
// instances, functions with their versions, slots and asynchronous events, join
// tokens, access keys, events and remembered idempotency keys, changed only by
// Apply.
//
// Ownership: a State belongs to one replica's loop, which is the only one to
// call Apply and Restore. A View is an immutable picture of it at one index,
// made in constant time, that any goroutine may read for as long as it likes.
// Records reached through a View are shared and must not be changed.
//
// Invariants:
//   - Apply is a pure function of the state and the entry: equal logs give equal
//     states, equal Hash and equal results on every node. Time, identifiers and
//     chance come in with the command.
//   - Derived tables (usage, ports, groups, byNode) always agree with the
//     instances table; they are not part of a snapshot and are rebuilt.
//   - An instance's state and wanted only move forward, and a slot's generations
//     only grow.
//   - Never are more slots of a function leased to nodes than may run at once,
//     but for those that were leased before that was lowered.
//   - An asynchronous event that was accepted stays until it was settled by
//     success, by its destination's event or by failing for good.
//   - The resources of instances that hold a node never exceed what the node
//     offered when they were placed.
package state

import (
	"encoding/binary"
	"strings"

	"github.com/tidwall/btree"

	"github.com/blixard/blixard"
)

// Bounds of what is remembered.
const (
	maxEvents    = 10_000
	maxKeys      = 200_000 // idempotency keys, the newest; counted, since clocks can be wrong
	maxTokens    = 1_000
	maxMessage   = 1_024 // bytes of any observed text
	maxBatchSize = 20_000
	maxHintNames = 200 // looked at for "did you mean"; every replica does it
)

// tables are the rows. Maps are copied on write: copying a whole table costs
// nothing until it is changed.
type tables struct {
	cluster   Cluster
	nodes     *btree.Map[blixard.NodeName, *blixard.Node]
	vms       *btree.Map[blixard.VMName, *blixard.VM]
	instances *btree.Map[string, *blixard.Instance] // by instanceKey
	tokens    *btree.Map[string, *Token]            // by ID
	events    *btree.Map[uint64, *Event]            // by sequence
	keys      *btree.Map[string, *remembered]       // idempotency keys
	keyOrder  *btree.Map[uint64, string]            // by sequence, oldest first

	// Derived.
	byNode *btree.Map[string, *blixard.Instance] // node \x00 instanceKey
	usage  *btree.Map[blixard.NodeName, Usage]
	ports  *btree.Map[string, string] // node \x00 protocol \x00 port -> instanceKey
	groups *btree.Map[string, int]    // group \x00 node -> instances

	functionTables
}

// Usage is what instances hold of a node.
type Usage struct {
	Used      blixard.Resources
	Instances int
}

// Cluster is what there is once.
type Cluster struct {
	ID   string
	Name string
	// NextRaftID is given to the next node that joins; never reused.
	NextRaftID uint64
	// NextEvent and NextKey number events and remembered keys.
	NextEvent uint64
	NextKey   uint64
	// Watermark is the highest generation of any VM that was deleted.
	Watermark uint64
	// Maintenance: nothing is placed, moved or restarted by itself.
	Maintenance  bool
	FeatureLevel int
	CreatedMS    int64
	// NowMS is the time of the last command, by its proposer's clock.
	NowMS int64
	// Secret authenticates nodes to each other and users to the cluster.
	Secret string
	// RemovedImages are the digests of images that nodes have to delete if they keep
	// them, in the order in which they were removed. Never changed in place.
	RemovedImages []string
}

func newTables() tables {
	return tables{
		nodes: new(btree.Map[blixard.NodeName, *blixard.Node]), vms: new(btree.Map[blixard.VMName, *blixard.VM]),
		instances: new(btree.Map[string, *blixard.Instance]), tokens: new(btree.Map[string, *Token]), events: new(btree.Map[uint64, *Event]),
		keys: new(btree.Map[string, *remembered]), keyOrder: new(btree.Map[uint64, string]),
		byNode: new(btree.Map[string, *blixard.Instance]), usage: new(btree.Map[blixard.NodeName, Usage]),
		ports: new(btree.Map[string, string]), groups: new(btree.Map[string, int]),
		functionTables: newFunctionTables(),
	}
}

func (t *tables) copy() tables {
	return tables{
		cluster: t.cluster, nodes: t.nodes.Copy(), vms: t.vms.Copy(), instances: t.instances.Copy(), tokens: t.tokens.Copy(),
		events: t.events.Copy(), keys: t.keys.Copy(), keyOrder: t.keyOrder.Copy(),
		byNode: t.byNode.Copy(), usage: t.usage.Copy(), ports: t.ports.Copy(), groups: t.groups.Copy(),
		functionTables: t.functionTables.copy(),
	}
}

// copyForTry is copy for tables that others may be reading: copying a map
// renews its write mark, so each map is first copied as a value.
func (t *tables) copyForTry() tables {
	own := tables{
		cluster: t.cluster, nodes: own(t.nodes), vms: own(t.vms), instances: own(t.instances), tokens: own(t.tokens),
		events: own(t.events), keys: own(t.keys), keyOrder: own(t.keyOrder),
		byNode: own(t.byNode), usage: own(t.usage), ports: own(t.ports), groups: own(t.groups),
		functionTables: t.functionTables.own(),
	}
	return own.copy()
}

func own[T any](p *T) *T {
	v := *p
	return &v
}

// State is the changing state of one replica.
type State struct {
	t     tables
	index uint64 // of the last applied entry
	term  uint64
	view  *View // made on demand, dropped by each change
}

// New returns an empty state, as before any entry.
func New() *State { return &State{t: newTables()} }

// Index is the index of the last entry that was applied.
func (s *State) Index() uint64 { return s.index }

// Term is the term of the last entry that was applied.
func (s *State) Term() uint64 { return s.term }

// View returns the state as it is now, for anybody to keep.
func (s *State) View() *View {
	if s.view == nil {
		s.view = &View{t: s.t.copy(), Index: s.index, Term: s.term}
	}
	return s.view
}

// Advance notes an entry that changes no table (a raft no-op).
func (s *State) Advance(index, term uint64) {
	s.index, s.term, s.view = index, term, nil
}

// View is the state at one index. It never changes.
type View struct {
	t     tables
	Index uint64
	Term  uint64
}

// Cluster returns what there is once.
func (v *View) Cluster() Cluster { return v.t.cluster }

// Node returns the named node, nil if there is none.
func (v *View) Node(name blixard.NodeName) *blixard.Node { return v.t.node(name) }

// NodeByRaftID returns the node with the raft ID, nil if there is none.
func (v *View) NodeByRaftID(id uint64) *blixard.Node {
	var found *blixard.Node
	v.t.nodes.Scan(func(_ blixard.NodeName, n *blixard.Node) bool {
		if n.RaftID == id {
			found = n
		}
		return found == nil
	})
	return found
}

// Nodes calls yield for each node by name.
func (v *View) Nodes(yield func(*blixard.Node) bool) {
	v.t.nodes.Scan(func(_ blixard.NodeName, n *blixard.Node) bool { return yield(n) })
}

// NodeCount is the number of nodes.
func (v *View) NodeCount() int { return v.t.nodes.Len() }

// VM returns the named VM, nil if there is none.
func (v *View) VM(name blixard.VMName) *blixard.VM { return v.t.vm(name) }

// VMs calls yield for each VM by name.
func (v *View) VMs(yield func(*blixard.VM) bool) {
	v.t.vms.Scan(func(_ blixard.VMName, vm *blixard.VM) bool { return yield(vm) })
}

// VMsFrom is VMs, beginning with the first name that is not less than from.
func (v *View) VMsFrom(from blixard.VMName, yield func(*blixard.VM) bool) {
	v.t.vms.Ascend(from, func(_ blixard.VMName, vm *blixard.VM) bool { return yield(vm) })
}

// VMCount is the number of VMs.
func (v *View) VMCount() int { return v.t.vms.Len() }

// Instances calls yield for each instance by VM, ordinal and generation.
func (v *View) Instances(yield func(*blixard.Instance) bool) {
	v.t.instances.Scan(func(_ string, i *blixard.Instance) bool { return yield(i) })
}

// InstanceCount is the number of instances, ended ones that are kept included.
func (v *View) InstanceCount() int { return v.t.instances.Len() }

// InstancesOf calls yield for each instance of a VM by ordinal and generation.
func (v *View) InstancesOf(vm blixard.VMName, yield func(*blixard.Instance) bool) {
	v.t.instancesOf(vm, yield)
}

// InstancesOn calls yield for each instance of a node by VM, ordinal and
// generation.
func (v *View) InstancesOn(node blixard.NodeName, yield func(*blixard.Instance) bool) {
	v.t.instancesOn(node, yield)
}

// Instance returns one incarnation, nil if there is none.
func (v *View) Instance(vm blixard.VMName, ordinal int, generation uint64) *blixard.Instance {
	i, _ := v.t.instances.Get(instanceKey(vm, ordinal, generation))
	return i
}

// Latest returns the newest incarnation of the slot with that instance ID, nil
// if there is none.
func (v *View) Latest(id blixard.InstanceID) *blixard.Instance {
	var found *blixard.Instance
	if at := strings.LastIndexByte(string(id), '-'); at > 0 {
		v.t.instancesOf(blixard.VMName(id[:at]), func(i *blixard.Instance) bool {
			if i.ID == id {
				found = i
			}
			return true
		})
	}
	return found
}

// Usage is what instances hold of a node.
func (v *View) Usage(node blixard.NodeName) Usage {
	u, _ := v.t.usage.Get(node)
	return u
}

// GroupCount is how many instances of an anti-affinity group a node holds.
func (v *View) GroupCount(group string, node blixard.NodeName) int {
	n, _ := v.t.groups.Get(group + "\x00" + string(node))
	return n
}

func (t *tables) node(name blixard.NodeName) *blixard.Node {
	n, _ := t.nodes.Get(name)
	return n
}

func (t *tables) vm(name blixard.VMName) *blixard.VM {
	vm, _ := t.vms.Get(name)
	return vm
}

func (t *tables) instancesOf(vm blixard.VMName, yield func(*blixard.Instance) bool) {
	prefix := string(vm) + "\x00"
	t.instances.Ascend(prefix, func(key string, i *blixard.Instance) bool {
		return strings.HasPrefix(key, prefix) && yield(i)
	})
}

func (t *tables) instancesOn(node blixard.NodeName, yield func(*blixard.Instance) bool) {
	prefix := string(node) + "\x00"
	t.byNode.Ascend(prefix, func(key string, i *blixard.Instance) bool {
		return strings.HasPrefix(key, prefix) && yield(i)
	})
}

// instanceKey orders instances by VM, ordinal and generation.
func instanceKey(vm blixard.VMName, ordinal int, generation uint64) string {
	b := make([]byte, 0, len(vm)+13)
	b = append(b, vm...)
	b = append(b, 0)
	b = binary.BigEndian.AppendUint32(b, uint32(ordinal))
	b = binary.BigEndian.AppendUint64(b, generation)
	return string(b)
}

func keyOf(i *blixard.Instance) string { return instanceKey(i.VM, i.Ordinal, i.Generation) }

func portKey(node blixard.NodeName, protocol string, port int) string {
	b := make([]byte, 0, len(node)+len(protocol)+4)
	b = append(b, node...)
	b = append(b, 0)
	b = append(b, protocol...)
	b = append(b, 0)
	return string(binary.BigEndian.AppendUint16(b, uint16(port)))
}
