package state

import (
	"slices"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/wire"
)

// maxVictims bounds what one preemption ends.
const maxVictims = 4096

// Victim names an incarnation that is to give its room to another.
type Victim struct {
	VM         blixard.VMName
	Ordinal    int
	Generation uint64
}

// PreemptInstances stops incarnations of lower priority on a node, so that a
// slot that fits nowhere gets a place there. Proposed by the leader; all it was
// decided upon is checked again here, and it ends all of the victims or none.
// It places nothing: the slot asks for its place when they have ended.
type PreemptInstances struct {
	VM          blixard.VMName
	UID         uint64
	Ordinal     int
	SpecVersion uint64
	// Succeeds is the generation of the slot's incarnation that waits to be
	// moved; 0 if the slot is empty.
	Succeeds  uint64
	Node      blixard.NodeName
	NodeEpoch uint64
	Victims   []Victim
}

func (m *PreemptInstances) kind() uint8 { return 14 }

func (m *PreemptInstances) code(c *wire.Coder) {
	wire.String(c, &m.VM)
	wire.Uint(c, &m.UID)
	wire.Int(c, &m.Ordinal)
	wire.Uint(c, &m.SpecVersion)
	wire.Uint(c, &m.Succeeds)
	wire.String(c, &m.Node)
	wire.Uint(c, &m.NodeEpoch)
	wire.List(c, &m.Victims, func(c *wire.Coder, v *Victim) {
		wire.String(c, &v.VM)
		wire.Int(c, &v.Ordinal)
		wire.Uint(c, &v.Generation)
	})
}

func (m *PreemptInstances) apply(tx *txn) (Outcome, *blixard.Error) {
	vm := tx.t.vm(m.VM)
	if vm == nil || vm.UID != m.UID {
		return Outcome{}, tx.noVM(m.VM)
	}
	own, err := m.checkSlot(tx, vm)
	if err != nil {
		return Outcome{}, err
	}
	victims, err := m.checkVictims(tx, vm)
	if err != nil {
		return Outcome{}, err
	}
	if err := m.checkRoom(tx, vm, own, victims); err != nil {
		return Outcome{}, err
	}
	id := blixard.SlotID(m.VM, m.Ordinal)
	by := "preempted by " + string(id) + " (priority " + itoa(vm.Spec.Priority) + ")"
	var names []string
	for _, old := range victims {
		inst := *old
		inst.Wanted, inst.WantReason = blixard.WantStop, clip(by)
		tx.setInstance(&inst)
		tx.event(Event{
			Kind: "Preempted", VM: inst.VM, Instance: inst.ID, Generation: inst.Generation, Node: inst.Node, Warning: true,
			Message: by + "; its own priority is " + itoa(tx.priority(&inst)) + ", it is placed again when there is room",
		})
		names = append(names, string(inst.ID))
	}
	tx.event(Event{Kind: "Preempting", VM: m.VM, Instance: id, Node: m.Node, Message: "makes room on " + string(m.Node) + ": ends " + strings.Join(names, ", ")})
	return Outcome{Version: tx.index, Value: uint64(len(victims))}, nil
}

// checkSlot refuses for a slot that no longer waits for room; own is its
// incarnation that is to be moved, nil if there is none.
func (m *PreemptInstances) checkSlot(tx *txn, vm *blixard.VM) (own *blixard.Instance, err *blixard.Error) {
	tx.t.slot(m.VM, m.Ordinal, func(i *blixard.Instance) bool {
		if !i.State.Terminal() {
			own = i
		}
		return true
	})
	live := uint64(0)
	if own != nil {
		live = own.Generation
	}
	switch {
	case vm.Deleting || vm.Desired != blixard.DesiredRunning || tx.t.cluster.Maintenance:
		return nil, blixard.Errorf(blixard.CodeConflict, "the VM %s is not to be placed now", m.VM)
	case m.Ordinal < 1 || m.Ordinal > vm.Spec.Replicas:
		return nil, blixard.Errorf(blixard.CodeConflict, "slot %d of %s is not wanted", m.Ordinal, m.VM)
	case m.SpecVersion != vm.SpecVersion || m.Succeeds != live:
		return nil, blixard.Errorf(blixard.CodeConflict, "the slot %s was changed meanwhile", blixard.SlotID(m.VM, m.Ordinal))
	}
	return own, nil
}

// checkVictims refuses unless all of them run on the node with a lower priority.
func (m *PreemptInstances) checkVictims(tx *txn, vm *blixard.VM) ([]*blixard.Instance, *blixard.Error) {
	if len(m.Victims) == 0 || len(m.Victims) > maxVictims {
		return nil, blixard.Errorf(blixard.CodeInvalid, "%d incarnations to preempt; 1 to %d are allowed", len(m.Victims), maxVictims)
	}
	var out []*blixard.Instance
	for _, v := range m.Victims {
		i, ok := tx.t.instances.Get(instanceKey(v.VM, v.Ordinal, v.Generation))
		if !ok || i.Node != m.Node || i.State.Terminal() || i.Wanted != blixard.WantRun || slices.Contains(out, i) {
			return nil, blixard.Errorf(blixard.CodeConflict, "%s#%d does not run on %s any more", blixard.SlotID(v.VM, v.Ordinal), v.Generation, m.Node)
		}
		if tx.priority(i) >= vm.Spec.Priority {
			return nil, blixard.Errorf(blixard.CodeConflict, "the priority of %s is not below that of %s", i.ID, m.VM)
		}
		out = append(out, i)
	}
	return out, nil
}

// checkRoom refuses if the node has room already, or has none even then.
func (m *PreemptInstances) checkRoom(tx *txn, vm *blixard.VM, own *blixard.Instance, victims []*blixard.Instance) *blixard.Error {
	node := tx.t.node(m.Node)
	if node == nil || node.Epoch != m.NodeEpoch {
		return blixard.Errorf(blixard.CodeConflict, "the node %s was lost or removed meanwhile", m.Node)
	}
	var gone []*blixard.Instance
	if own != nil && own.Node == m.Node {
		gone = append(gone, own)
	}
	c := tx.t.question(node, &vm.Spec)
	if now := c.Without(gone); now.Objection() == nil {
		return blixard.Errorf(blixard.CodeConflict, "the node %s has room without preempting anything", m.Node)
	}
	tx.t.instancesOn(m.Node, func(i *blixard.Instance) bool {
		if i != own && i.Holds() && i.Wanted != blixard.WantRun {
			gone = append(gone, i)
		}
		return true
	})
	then := c.Without(append(gone, victims...))
	if why := then.Objection(); why != nil {
		return blixard.Errorf(blixard.CodeConflict, "the node %s would not take it all the same: %s", m.Node, why.Detail)
	}
	return nil
}

// priority is what the VM of an incarnation has now: it can be changed while
// the incarnation runs.
func (tx *txn) priority(i *blixard.Instance) int {
	if vm := tx.t.vm(i.VM); vm != nil {
		return vm.Spec.Priority
	}
	return i.Spec.Priority
}

// Without is the case as if some incarnations that the node holds had ended.
func (c *Case) Without(gone []*blixard.Instance) Case {
	out := *c
	for _, i := range gone {
		out.Usage.Used = out.Usage.Used.Sub(i.Spec.Needs())
		out.Usage.Instances--
	}
	out.Held = &Without{Held: c.Held, Node: c.Node.Name, Gone: gone}
	return out
}

// Without is what is held as if some incarnations on one node had ended.
type Without struct {
	Held
	Node blixard.NodeName
	Gone []*blixard.Instance
}

// PortTaken implements Held. A port of a node is held by one incarnation only.
func (w *Without) PortTaken(node blixard.NodeName, protocol string, port int) bool {
	if node == w.Node {
		for _, i := range w.Gone {
			for k := range i.Spec.Publish {
				if p := &i.Spec.Publish[k]; p.HostPort == port && p.Protocol == protocol {
					return false
				}
			}
		}
	}
	return w.Held.PortTaken(node, protocol, port)
}

// GroupCount implements Held.
func (w *Without) GroupCount(group string, node blixard.NodeName) int {
	n := w.Held.GroupCount(group, node)
	if node == w.Node {
		for _, i := range w.Gone {
			if i.Spec.AntiAffinityGroup == group {
				n--
			}
		}
	}
	return n
}

// ReplicaCount implements Held.
func (w *Without) ReplicaCount(node blixard.NodeName, vm blixard.VMName) int {
	n := w.Held.ReplicaCount(node, vm)
	if node == w.Node {
		for _, i := range w.Gone {
			if i.VM == vm {
				n--
			}
		}
	}
	return n
}
