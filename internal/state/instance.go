package state

import (
	"fmt"
	"strconv"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/wire"
)

func itoa(n int) string { return strconv.Itoa(n) }

// PlaceInstance makes a new incarnation of a slot on a node. Proposed by the
// leader; everything it was decided upon is checked again here, so that two
// leaders cannot overbook a node or run a slot twice.
type PlaceInstance struct {
	VM          blixard.VMName
	UID         uint64
	Ordinal     int
	Generation  uint64
	SpecVersion uint64
	RestartSeq  uint64
	Restarts    int
	Node        blixard.NodeName
	NodeEpoch   uint64
}

func (m *PlaceInstance) kind() uint8 { return 8 }

func (m *PlaceInstance) code(c *wire.Coder) {
	wire.String(c, &m.VM)
	wire.Uint(c, &m.UID)
	wire.Int(c, &m.Ordinal)
	wire.Uint(c, &m.Generation)
	wire.Uint(c, &m.SpecVersion)
	wire.Uint(c, &m.RestartSeq)
	wire.Int(c, &m.Restarts)
	wire.String(c, &m.Node)
	wire.Uint(c, &m.NodeEpoch)
}

func (m *PlaceInstance) apply(tx *txn) (Outcome, *blixard.Error) {
	refuse := func(format string, args ...any) (Outcome, *blixard.Error) {
		return Outcome{}, blixard.Errorf(blixard.CodeConflict, format, args...)
	}
	vm := tx.t.vm(m.VM)
	switch {
	case vm == nil || vm.UID != m.UID:
		return Outcome{}, tx.noVM(m.VM)
	case vm.Deleting || vm.Desired != blixard.DesiredRunning:
		return refuse("the VM %s is not to run", m.VM)
	case m.Ordinal < 1 || m.Ordinal > vm.Spec.Replicas:
		return refuse("slot %d of %s is not wanted", m.Ordinal, m.VM)
	case m.SpecVersion != vm.SpecVersion || m.RestartSeq != vm.RestartSeq:
		return refuse("the VM %s was changed meanwhile", m.VM)
	case m.Generation < vm.FirstGeneration:
		return refuse("generation %d of %s is used", m.Generation, m.VM)
	}
	id := blixard.SlotID(m.VM, m.Ordinal)
	var clash *blixard.Instance
	tx.t.slot(m.VM, m.Ordinal, func(i *blixard.Instance) bool {
		if !i.State.Terminal() || i.Generation >= m.Generation {
			clash = i
		}
		return clash == nil
	})
	if clash != nil {
		return refuse("%s is taken by generation %d (%s)", id, clash.Generation, clash.State)
	}
	node := tx.t.node(m.Node)
	if node == nil || node.Epoch != m.NodeEpoch {
		return refuse("the node %s was lost or removed meanwhile", m.Node)
	}
	if why := tx.t.admits(node, &vm.Spec); why != nil {
		return refuse("the node %s no longer takes %s: %s", m.Node, id, why.Detail)
	}
	inst := &blixard.Instance{
		ID: id, VM: m.VM, Ordinal: m.Ordinal, Generation: m.Generation, Node: m.Node, NodeEpoch: m.NodeEpoch, SpecVersion: m.SpecVersion,
		RestartSeq: m.RestartSeq, Restarts: m.Restarts, Spec: &vm.Spec, Wanted: blixard.WantRun, Paused: vm.Paused, State: blixard.Pending, CreatedMS: tx.nowMS,
	}
	tx.setInstance(inst)
	tx.event(Event{Kind: "Placed", VM: m.VM, Instance: id, Generation: m.Generation, Node: m.Node, Message: "placed on " + string(m.Node)})
	return Outcome{Version: tx.index, Value: m.Generation}, nil
}

// slot calls yield for each kept incarnation of one slot by generation.
func (t *tables) slot(vm blixard.VMName, ordinal int, yield func(*blixard.Instance) bool) {
	t.instances.Ascend(instanceKey(vm, ordinal, 0), func(_ string, i *blixard.Instance) bool {
		return i.VM == vm && i.Ordinal == ordinal && yield(i)
	})
}

// EndInstance wants an incarnation stopped or removed, or paused or resumed.
// Proposed by the leader.
type EndInstance struct {
	VM         blixard.VMName
	Ordinal    int
	Generation uint64
	Wanted     blixard.Wanted
	Paused     bool
	Reason     string
}

func (m *EndInstance) kind() uint8 { return 9 }

func (m *EndInstance) code(c *wire.Coder) {
	wire.String(c, &m.VM)
	wire.Int(c, &m.Ordinal)
	wire.Uint(c, &m.Generation)
	wire.String(c, &m.Wanted)
	wire.Bool(c, &m.Paused)
	wire.String(c, &m.Reason)
}

// wantRank orders what can be wanted: it only grows.
func wantRank(w blixard.Wanted) int {
	switch w {
	case blixard.WantRun:
		return 1
	case blixard.WantStop:
		return 2
	case blixard.WantRemove:
		return 3
	}
	return 0
}

func (m *EndInstance) apply(tx *txn) (Outcome, *blixard.Error) {
	old, ok := tx.t.instances.Get(instanceKey(m.VM, m.Ordinal, m.Generation))
	if !ok {
		return Outcome{}, blixard.Errorf(blixard.CodeNotFound, "there is no %s#%d", blixard.SlotID(m.VM, m.Ordinal), m.Generation)
	}
	if wantRank(m.Wanted) < wantRank(old.Wanted) {
		return Outcome{}, blixard.Errorf(blixard.CodeConflict, "%s is to %s already", old.Incarnation(), old.Wanted)
	}
	if m.Wanted == old.Wanted && m.Paused == old.Paused {
		return Outcome{Version: old.Version, Noop: true}, nil
	}
	inst := *old
	inst.Wanted, inst.Paused, inst.WantReason = m.Wanted, m.Paused, clip(m.Reason)
	tx.setInstance(&inst)
	if m.Wanted == blixard.WantStop && old.Wanted == blixard.WantRun {
		tx.event(Event{Kind: "Stopping", VM: m.VM, Instance: inst.ID, Generation: inst.Generation, Node: inst.Node, Message: inst.WantReason})
	}
	return Outcome{Version: tx.index}, nil
}

// DropInstance forgets an incarnation that ended and that no agent will report
// on: it was lost, or its node is. A node that returns removes what is not in
// its view. Proposed by the leader.
type DropInstance struct {
	VM         blixard.VMName
	Ordinal    int
	Generation uint64
}

func (m *DropInstance) kind() uint8 { return 12 }

func (m *DropInstance) code(c *wire.Coder) {
	wire.String(c, &m.VM)
	wire.Int(c, &m.Ordinal)
	wire.Uint(c, &m.Generation)
}

func (m *DropInstance) apply(tx *txn) (Outcome, *blixard.Error) {
	i, ok := tx.t.instances.Get(instanceKey(m.VM, m.Ordinal, m.Generation))
	switch {
	case !ok:
		return Outcome{Noop: true}, nil
	case !i.State.Terminal() || i.State != blixard.Lost && !tx.t.gone(i.Node):
		return Outcome{}, blixard.Errorf(blixard.CodeConflict, "%s is %s on %s; only a lost incarnation can be dropped", i.Incarnation(), i.State, i.Node)
	}
	tx.forget(i)
	return Outcome{Version: tx.index}, nil
}

// gone tells whether nobody will report what ended on a node: it is lost, no
// member, or joins anew, so that what ended there was the former member's.
func (t *tables) gone(name blixard.NodeName) bool {
	n := t.node(name)
	return n == nil || n.State != blixard.NodeReady
}

// forget deletes an incarnation's row for good, and keeps its generation from
// being used again.
func (tx *txn) forget(i *blixard.Instance) {
	tx.dropInstance(i)
	vm := tx.t.vm(i.VM)
	switch {
	case vm == nil || vm.Deleting:
		tx.t.cluster.Watermark = max(tx.t.cluster.Watermark, i.Generation)
		tx.reap(i.VM)
	case i.Generation >= vm.FirstGeneration:
		raised := *vm
		raised.FirstGeneration = i.Generation + 1
		tx.setVM(&raised)
	}
}

// Observation is what an agent sees of one incarnation.
type Observation struct {
	VM           blixard.VMName
	Ordinal      int
	Generation   uint64
	State        blixard.InstanceState
	Paused       bool
	Message      string
	Address      string
	Ports        []blixard.PublishedPort
	Health       blixard.Health
	Acceleration string
	// Removed: nothing of it is left on the node.
	Removed bool
}

// Observe reports what the agent of a node sees. What contradicts the state
// (an unknown incarnation, a step back) is left out, since reports may be late.
type Observe struct {
	Node   blixard.NodeName
	RaftID uint64
	Items  []Observation
}

func (m *Observe) kind() uint8 { return 11 }

func (m *Observe) code(c *wire.Coder) {
	wire.String(c, &m.Node)
	wire.Uint(c, &m.RaftID)
	wire.List(c, &m.Items, func(c *wire.Coder, o *Observation) {
		c.Record(func(c *wire.Coder) { codeObservation(c, o) })
	})
}

func codeObservation(c *wire.Coder, o *Observation) {
	wire.String(c, &o.VM)
	wire.Int(c, &o.Ordinal)
	wire.Uint(c, &o.Generation)
	wire.String(c, &o.State)
	wire.Bool(c, &o.Paused)
	wire.String(c, &o.Message)
	wire.String(c, &o.Address)
	wire.List(c, &o.Ports, codePublished)
	wire.String(c, &o.Health)
	wire.String(c, &o.Acceleration)
	wire.Bool(c, &o.Removed)
}

func (m *Observe) apply(tx *txn) (Outcome, *blixard.Error) {
	node := tx.t.node(m.Node)
	if node == nil || node.RaftID != m.RaftID {
		return Outcome{}, blixard.Errorf(blixard.CodeDenied, "%s (%d) is not a member of this cluster", clip(string(m.Node)), m.RaftID)
	}
	if len(m.Items) > maxBatchSize {
		return Outcome{}, blixard.Errorf(blixard.CodeInvalid, "%d observations in one report; at most %d are allowed", len(m.Items), maxBatchSize)
	}
	taken := uint64(0)
	for i := range m.Items {
		if tx.observe(node, &m.Items[i]) {
			taken++
		}
	}
	return Outcome{Version: tx.index, Value: taken}, nil
}

func (tx *txn) observe(node *blixard.Node, o *Observation) bool {
	old, ok := tx.t.instances.Get(instanceKey(o.VM, o.Ordinal, o.Generation))
	if !ok || old.Node != node.Name {
		return false
	}
	if o.Removed {
		return tx.observeRemoved(old)
	}
	if !o.State.Known() || o.State == blixard.Lost || old.State.Terminal() || o.State != old.State && !blixard.CanFollow(old.State, o.State) {
		return false
	}
	inst := *old
	inst.State, inst.StatePaused, inst.Message, inst.Address = o.State, o.Paused, clip(o.Message), clip(o.Address)
	inst.Health, inst.Acceleration = blixard.Health(clip(string(o.Health))), clip(o.Acceleration)
	if len(o.Ports) > 0 && len(o.Ports) <= 1024 {
		inst.Ports = o.Ports
	}
	if inst.State == blixard.Running && old.State != blixard.Running {
		inst.StartedMS = tx.nowMS
	}
	if inst.State.Terminal() {
		inst.EndedMS = tx.nowMS
	}
	tx.setInstance(&inst)
	if inst.State != old.State && (inst.State != blixard.Stopping || old.Wanted == blixard.WantRun) { // else EndInstance told of it
		message := inst.Message
		if message == "" {
			message = "on " + string(node.Name)
		}
		tx.event(Event{Kind: string(inst.State), VM: inst.VM, Instance: inst.ID, Generation: inst.Generation, Node: inst.Node, Warning: inst.State == blixard.Failed, Message: message})
	}
	if inst.Health != old.Health && inst.Health != blixard.HealthUnknown {
		tx.event(Event{Kind: "Health", VM: inst.VM, Instance: inst.ID, Generation: inst.Generation, Node: inst.Node, Warning: inst.Health == blixard.HealthUnhealthy, Message: "now " + string(inst.Health)})
	}
	return true
}

// observeRemoved takes the report that nothing of an incarnation is left.
func (tx *txn) observeRemoved(old *blixard.Instance) bool {
	if old.Wanted == blixard.WantRemove {
		tx.forget(old)
		return true
	}
	if old.State.Terminal() {
		return false
	}
	inst := *old
	inst.State, inst.EndedMS, inst.Message = blixard.Failed, tx.nowMS, "its files are gone from the node"
	tx.setInstance(&inst)
	tx.event(Event{Kind: string(blixard.Failed), VM: inst.VM, Instance: inst.ID, Generation: inst.Generation, Node: inst.Node, Warning: true, Message: fmt.Sprintf("its files are gone from %s", inst.Node)})
	return true
}
