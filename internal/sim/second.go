package sim

import (
	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// maxSecond bounds what a second scheduler decides at once.
const maxSecond = 6

// secondScheduler decides as a leader might that knows an old state and looks at
// nothing: instances of any VM, wherever it likes. Placements are checked again
// when they are applied, so none of it may overbook a node, bring two of an
// anti-affinity group together or give a slot a second incarnation.
//
// What became of a lost singleton's lease only a leader can know, so it keeps its
// hands off those.
func secondScheduler(w *world, m *machine, _ *Fault) {
	p := m.proc
	if p == nil || m.paused() || p.r.View().NodeCount() == 0 {
		return
	}
	v := p.r.View()
	var nodes []*blixard.Node
	v.Nodes(func(n *blixard.Node) bool { nodes = append(nodes, n); return true })
	var vms []*blixard.VM
	v.VMs(func(vm *blixard.VM) bool {
		if !vm.Deleting && vm.Desired == blixard.DesiredRunning && vm.Spec.Replicas > 0 {
			vms = append(vms, vm)
		}
		return true
	})
	for range min(maxSecond, len(vms)) {
		vm, n := vms[w.rng.IntN(len(vms))], nodes[w.rng.IntN(len(nodes))]
		place := &state.PlaceInstance{
			VM: vm.Name, UID: vm.UID, Ordinal: int(w.between(1, int64(vm.Spec.Replicas))), Generation: vm.FirstGeneration,
			SpecVersion: vm.SpecVersion, RestartSeq: vm.RestartSeq, Node: n.Name, NodeEpoch: n.Epoch,
		}
		lost := false
		v.InstancesOf(vm.Name, func(i *blixard.Instance) bool {
			if i.Ordinal == place.Ordinal {
				place.Generation = max(place.Generation, i.Generation+1)
				lost = lost || !i.State.Terminal() || i.State == blixard.Lost
			}
			return true
		})
		if lost && vm.Spec.Singleton {
			continue
		}
		p.enter(func() {
			p.propose(state.Envelope{Actor: "leader", Command: place}, func(res state.Result) {
				outcome := "refused"
				if res.Err == nil {
					outcome = "taken"
				}
				w.count["second scheduler "+outcome]++
				w.say("a second scheduler's %s-%d#%d on %s is %s: %v", place.VM, place.Ordinal, place.Generation, place.Node, outcome, res.Err)
			}, func() bool { return false })
		})
	}
}
