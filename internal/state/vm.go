package state

import (
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/wire"
)

// CreateVM registers a VM, and wants it running if Start. Outcome.Version is
// the new VM's version.
type CreateVM struct {
	Name  blixard.VMName
	Spec  blixard.VMSpec
	Start bool
}

func (m *CreateVM) kind() uint8 { return 1 }

func (m *CreateVM) code(c *wire.Coder) {
	wire.String(c, &m.Name)
	codeSpec(c, &m.Spec)
	wire.Bool(c, &m.Start)
}

func (m *CreateVM) apply(tx *txn) (Outcome, *blixard.Error) {
	if err := checkVM(m.Name, &m.Spec); err != nil {
		return Outcome{}, err
	}
	if old := tx.t.vm(m.Name); old != nil {
		e := blixard.Errorf(blixard.CodeExists, "a VM named %q exists at version %d", m.Name, old.Version)
		e.Version, e.Hint = old.Version, "choose another name, or change it with `blixard apply -f`"
		if old.Deleting {
			e.Message, e.Hint = "the VM "+string(m.Name)+" is still being deleted", "wait until `blixard vm list` no longer shows it"
		}
		return Outcome{}, e
	}
	if err := tx.checkCycle(m.Name, m.Spec.DependsOn); err != nil {
		return Outcome{}, err
	}
	if err := tx.checkImage(m.Spec.Image); err != nil {
		return Outcome{}, err
	}
	vm := &blixard.VM{
		Name: m.Name, Spec: m.Spec, Desired: blixard.DesiredStopped, SpecVersion: 1, UID: tx.serial(), Version: tx.serial(),
		CreatedMS: tx.nowMS, UpdatedMS: tx.nowMS, FirstGeneration: tx.t.cluster.Watermark + 1,
	}
	if m.Start {
		vm.Desired = blixard.DesiredRunning
	}
	tx.setVM(vm)
	tx.event(Event{Kind: "VMCreated", VM: m.Name, Message: "created by " + tx.who()})
	return Outcome{Version: vm.Version}, nil
}

// serial numbers changes that users make: each of them leaves an event, so it
// grows with each, also when one entry holds many.
func (tx *txn) serial() uint64 { return tx.t.cluster.NextEvent + 1 }

func (tx *txn) who() string {
	if tx.actor == "" {
		return "unknown"
	}
	return tx.actor
}

func checkVM(name blixard.VMName, spec *blixard.VMSpec) *blixard.Error {
	if err := blixard.CheckName(string(name)); err != nil {
		return asError(err)
	}
	return asError(spec.Check())
}

// asError gives a validation error its type back.
func asError(err error) *blixard.Error {
	if err == nil {
		return nil
	}
	if e, ok := err.(*blixard.Error); ok { //nolint:errorlint // validation returns it unwrapped
		return e
	}
	return blixard.Errorf(blixard.CodeInvalid, "%v", err)
}

// checkCycle refuses dependencies that lead back to name.
func (tx *txn) checkCycle(name blixard.VMName, deps []blixard.VMName) *blixard.Error {
	seen := map[blixard.VMName]bool{}
	todo := slices.Clone(deps)
	for len(todo) > 0 {
		d := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if d == name {
			return &blixard.Error{Code: blixard.CodeInvalid, Field: "dependsOn", Message: "the VM " + string(name) + " would wait for itself: its dependencies form a circle"}
		}
		if seen[d] {
			continue
		}
		seen[d] = true
		if vm := tx.t.vm(d); vm != nil {
			todo = append(todo, vm.Spec.DependsOn...)
		}
	}
	return nil
}

// find returns the VM for a change, or the refusal.
func (tx *txn) find(name blixard.VMName, expect uint64) (*blixard.VM, *blixard.Error) {
	vm := tx.t.vm(name)
	if vm == nil {
		return nil, tx.noVM(name)
	}
	if expect != 0 && expect != vm.Version {
		return nil, &blixard.Error{
			Code: blixard.CodeConflict, Version: vm.Version, Message: "the VM " + string(name) + " was changed since it was read",
			Hint: "read it again and repeat the change",
		}
	}
	if vm.Deleting {
		return nil, &blixard.Error{Code: blixard.CodeConflict, Version: vm.Version, Message: "the VM " + string(name) + " is being deleted"}
	}
	return vm, nil
}

func (tx *txn) noVM(name blixard.VMName) *blixard.Error {
	e := &blixard.Error{Code: blixard.CodeNotFound, Message: "there is no VM named " + clip(string(name)), Hint: "`blixard vm list` shows them"}
	if vm := tx.vmOfSlot(string(name)); vm != "" {
		e.Message += "; it is an instance of the VM " + vm
		e.Hint = "VMs are started, stopped, restarted and changed as a whole: name " + vm + "; what an instance runs is replaced by itself when it fails"
		return e
	}
	var names []string
	tx.t.vms.Scan(func(n blixard.VMName, _ *blixard.VM) bool {
		names = append(names, string(n))
		return len(names) < maxHintNames
	})
	if near := blixard.Nearest(string(name), names); near != "" {
		e.Hint = "did you mean " + near + "?"
	}
	return e
}

// vmOfSlot is the VM that has a slot of that name, "" if none has.
func (tx *txn) vmOfSlot(slot string) string {
	at := strings.LastIndexByte(slot, '-')
	if at <= 0 {
		return ""
	}
	vm := tx.t.vm(blixard.VMName(slot[:at]))
	if n, err := strconv.Atoi(slot[at+1:]); err != nil || vm == nil || n < 1 || n > vm.Spec.Replicas || string(blixard.SlotID(vm.Name, n)) != slot {
		return ""
	}
	return slot[:at]
}

// UpdateVM replaces a VM's spec. Parts that a running instance cannot take over
// make the leader replace the instances one after another.
type UpdateVM struct {
	Name          blixard.VMName
	Spec          blixard.VMSpec
	ExpectVersion uint64 // 0: any
}

func (m *UpdateVM) kind() uint8 { return 2 }

func (m *UpdateVM) code(c *wire.Coder) {
	wire.String(c, &m.Name)
	codeSpec(c, &m.Spec)
	wire.Uint(c, &m.ExpectVersion)
}

func (m *UpdateVM) apply(tx *txn) (Outcome, *blixard.Error) {
	if err := checkVM(m.Name, &m.Spec); err != nil {
		return Outcome{}, err
	}
	old, err := tx.find(m.Name, m.ExpectVersion)
	if err != nil {
		return Outcome{}, err
	}
	if err := tx.checkCycle(m.Name, m.Spec.DependsOn); err != nil {
		return Outcome{}, err
	}
	if err := tx.checkImage(m.Spec.Image); err != nil {
		return Outcome{}, err
	}
	if reflect.DeepEqual(old.Spec, m.Spec) {
		return Outcome{Version: old.Version, Noop: true}, nil
	}
	vm := *old
	vm.Spec = m.Spec
	if needsNewInstances(&old.Spec, &m.Spec) {
		vm.SpecVersion++
	}
	return tx.userChanged(&vm, "VMUpdated", "changed by "+tx.who()), nil
}

// needsNewInstances tells whether instances of the old spec are outdated.
func needsNewInstances(old, now *blixard.VMSpec) bool {
	// What only the leader reads can change under a running instance.
	a, b := *old, *now
	for _, s := range []*blixard.VMSpec{&a, &b} {
		s.Replicas, s.Priority, s.Restart, s.Labels = 0, 0, blixard.RestartPolicy{}, nil
		s.Preferences, s.SpreadAcross, s.Strategy, s.DependsOn = nil, "", "", nil
		s.Constraints, s.AffinityVMs = nil, nil
	}
	return !reflect.DeepEqual(a, b)
}

// userChanged stores a changed VM as a new version.
func (tx *txn) userChanged(vm *blixard.VM, kind, message string) Outcome {
	vm.Version, vm.UpdatedMS = tx.serial(), tx.nowMS
	vm.Refusal = nil
	tx.setVM(vm)
	tx.event(Event{Kind: kind, VM: vm.Name, Message: message})
	return Outcome{Version: vm.Version}
}

// ScaleVM changes the number of replicas. Scaling down ends the highest
// ordinals first.
type ScaleVM struct {
	Name          blixard.VMName
	Replicas      int
	ExpectVersion uint64
}

func (m *ScaleVM) kind() uint8 { return 3 }

func (m *ScaleVM) code(c *wire.Coder) {
	wire.String(c, &m.Name)
	wire.Int(c, &m.Replicas)
	wire.Uint(c, &m.ExpectVersion)
}

func (m *ScaleVM) apply(tx *txn) (Outcome, *blixard.Error) {
	old, err := tx.find(m.Name, m.ExpectVersion)
	if err != nil {
		return Outcome{}, err
	}
	vm := *old
	vm.Spec.Replicas = m.Replicas
	if err := asError(vm.Spec.Check()); err != nil {
		return Outcome{}, err
	}
	if old.Spec.Replicas == m.Replicas {
		return Outcome{Version: old.Version, Noop: true}, nil
	}
	return tx.userChanged(&vm, "VMScaled", "scaled from "+itoa(old.Spec.Replicas)+" to "+itoa(m.Replicas)+" replicas by "+tx.who()), nil
}

// VMVerb is a simple wish about a VM.
type VMVerb string

// The wishes of SetVM.
const (
	VerbStart  VMVerb = "start"
	VerbStop   VMVerb = "stop"
	VerbPause  VMVerb = "pause"
	VerbResume VMVerb = "resume"
)

// SetVM starts, stops, pauses or resumes a VM. A VM that is as wanted already
// answers with Noop.
type SetVM struct {
	Name blixard.VMName
	Verb VMVerb
}

func (m *SetVM) kind() uint8 { return 4 }

func (m *SetVM) code(c *wire.Coder) {
	wire.String(c, &m.Name)
	wire.String(c, &m.Verb)
}

func (m *SetVM) apply(tx *txn) (Outcome, *blixard.Error) {
	old, err := tx.find(m.Name, 0)
	if err != nil {
		return Outcome{}, err
	}
	vm := *old
	kind := ""
	switch m.Verb {
	case VerbStart:
		vm.Desired, kind = blixard.DesiredRunning, "VMStarted"
	case VerbStop:
		vm.Desired, vm.Paused, kind = blixard.DesiredStopped, false, "VMStopped"
	case VerbPause, VerbResume:
		if vm.Desired != blixard.DesiredRunning {
			return Outcome{}, &blixard.Error{
				Code: blixard.CodeConflict, Version: vm.Version, Message: "the VM " + string(vm.Name) + " is stopped, so it cannot " + string(m.Verb),
				Hint: "start it with `blixard vm start " + string(vm.Name) + "`",
			}
		}
		vm.Paused, kind = m.Verb == VerbPause, "VMPaused"
		if !vm.Paused {
			kind = "VMResumed"
		}
	default:
		return Outcome{}, blixard.Errorf(blixard.CodeInvalid, "the verb %q is not known", clip(string(m.Verb)))
	}
	if vm.Desired == old.Desired && vm.Paused == old.Paused {
		return Outcome{Version: old.Version, Noop: true}, nil
	}
	return tx.userChanged(&vm, kind, string(m.Verb)+" wanted by "+tx.who()), nil
}

// RestartVM has every instance replaced by a new incarnation, one after
// another. A stopped VM refuses.
type RestartVM struct {
	Name blixard.VMName
}

func (m *RestartVM) kind() uint8 { return 5 }

func (m *RestartVM) code(c *wire.Coder) { wire.String(c, &m.Name) }

func (m *RestartVM) apply(tx *txn) (Outcome, *blixard.Error) {
	old, err := tx.find(m.Name, 0)
	if err != nil {
		return Outcome{}, err
	}
	if old.Desired != blixard.DesiredRunning {
		return Outcome{}, &blixard.Error{
			Code: blixard.CodeConflict, Version: old.Version, Message: "the VM " + string(old.Name) + " is stopped, so it cannot restart",
			Hint: "start it with `blixard vm start " + string(old.Name) + "`",
		}
	}
	vm := *old
	vm.RestartSeq++
	return tx.userChanged(&vm, "VMRestarted", "restart wanted by "+tx.who()), nil
}

// DeleteVM marks a VM for deletion; it is gone when the last instance is.
// Deleting it again is a Noop.
type DeleteVM struct {
	Name          blixard.VMName
	ExpectVersion uint64
	IfExists      bool // a VM that is not there is a Noop
}

func (m *DeleteVM) kind() uint8 { return 6 }

func (m *DeleteVM) code(c *wire.Coder) {
	wire.String(c, &m.Name)
	wire.Uint(c, &m.ExpectVersion)
	wire.Bool(c, &m.IfExists)
}

func (m *DeleteVM) apply(tx *txn) (Outcome, *blixard.Error) {
	switch old := tx.t.vm(m.Name); {
	case old != nil && old.Deleting:
		return Outcome{Version: old.Version, Noop: true}, nil
	case old == nil && m.IfExists:
		return Outcome{Noop: true}, nil
	}
	old, err := tx.find(m.Name, m.ExpectVersion)
	if err != nil {
		return Outcome{}, err
	}
	vm := *old
	vm.Deleting = true
	out := tx.userChanged(&vm, "VMDeleting", "deletion wanted by "+tx.who())
	tx.reap(vm.Name)
	return out, nil
}

// reap removes a VM that is being deleted and has no instance left.
func (tx *txn) reap(name blixard.VMName) {
	vm := tx.t.vm(name)
	if vm == nil || !vm.Deleting {
		return
	}
	left := false
	tx.t.instancesOf(name, func(*blixard.Instance) bool { left = true; return false })
	if left {
		return
	}
	tx.t.vms.Delete(name)
	tx.t.cluster.Watermark = max(tx.t.cluster.Watermark, vm.FirstGeneration-1)
	tx.changed(ChangeVM, vm, true)
	tx.event(Event{Kind: "VMDeleted", VM: name, Message: "the last of it is gone"})
}

// RefuseVM notes why instances of a VM have no place, or (Missing 0) that all
// have one. Proposed by the leader.
type RefuseVM struct {
	Name    blixard.VMName
	UID     uint64
	Missing int
	Summary string
}

func (m *RefuseVM) kind() uint8 { return 10 }

func (m *RefuseVM) code(c *wire.Coder) {
	wire.String(c, &m.Name)
	wire.Uint(c, &m.UID)
	wire.Int(c, &m.Missing)
	wire.String(c, &m.Summary)
}

func (m *RefuseVM) apply(tx *txn) (Outcome, *blixard.Error) {
	old := tx.t.vm(m.Name)
	if old == nil || old.UID != m.UID {
		return Outcome{}, tx.noVM(m.Name)
	}
	vm := *old
	vm.Refusal = nil
	if m.Missing > 0 {
		vm.Refusal = &blixard.Refusal{Missing: m.Missing, Summary: clip(m.Summary), SinceMS: tx.nowMS}
		if old.Refusal != nil {
			vm.Refusal.SinceMS = old.Refusal.SinceMS
		}
		if old.Refusal == nil || old.Refusal.Summary != vm.Refusal.Summary {
			tx.event(Event{Kind: "NotPlaced", VM: m.Name, Warning: true, Message: itoa(m.Missing) + " instances not placed: " + vm.Refusal.Summary})
		}
	}
	tx.setVM(&vm)
	return Outcome{Version: vm.Version}, nil
}
