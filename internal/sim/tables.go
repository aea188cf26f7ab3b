package sim

import (
	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// sameState tells whether two views hold the same. The hash is made by the code
// that writes snapshots, so rows it leaves out are missing from both: they are
// counted beside it.
func sameState(a, b *state.View) bool { return a.Hash() == b.Hash() && rowsOf(a) == rowsOf(b) }

// tableSizes are how many rows a state has, by table.
type tableSizes struct {
	vms, instances, nodes, events, tokens   int
	functions, versions, slots, asyncEvents int
	asyncBytes                              int64
}

func rowsOf(v *state.View) tableSizes {
	n := tableSizes{vms: v.VMCount(), instances: v.InstanceCount(), nodes: v.NodeCount()}
	v.Events(func(*state.Event) bool { n.events++; return true })
	v.Tokens(func(*state.Token) bool { n.tokens++; return true })
	n.functions = v.FunctionCount()
	v.Functions(func(f *blixard.Function) bool {
		v.FunctionVersions(f.Name, func(*blixard.FunctionVersion) bool { n.versions++; return true })
		n.slots += v.SlotsLeased(f.Name)
		return true
	})
	load := v.AsyncLoad()
	n.asyncEvents, n.asyncBytes = load.Events+load.Dead, load.Bytes+load.DeadBytes
	return n
}
