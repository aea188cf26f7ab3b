package state

import "github.com/blixard/blixard"

// DivergeBy is how many numbers Diverge leaves out.
const DivergeBy = 1000

// Diverge makes a state that is taken up again from a copy leave out the numbers
// that the cluster may have given away after the copy was made: raft IDs,
// generations of instances, versions of functions, and what numbers changes. Otherwise a node or a guest that is left over from
// then could be taken for a new one. The caller makes the next entry of it.
func (s *State) Diverge(index, term uint64) []Change {
	tx := &txn{t: &s.t, index: index, nowMS: s.t.cluster.NowMS}
	c := &s.t.cluster
	c.NextRaftID += DivergeBy
	c.Watermark += DivergeBy
	c.NextEvent += DivergeBy // numbers changes, and by that UIDs, sequences of versions and revisions
	var raised []*blixard.VM
	s.t.vms.Scan(func(_ blixard.VMName, old *blixard.VM) bool {
		vm := *old
		newest := vm.FirstGeneration
		s.t.instancesOf(vm.Name, func(i *blixard.Instance) bool {
			newest = max(newest, i.Generation)
			return true
		})
		vm.FirstGeneration = newest + DivergeBy
		raised = append(raised, &vm)
		return true
	})
	for _, vm := range raised {
		tx.setVM(vm)
	}
	tx.divergeFunctions()
	s.Advance(index, term)
	return tx.changes
}
