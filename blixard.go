// Package blixard holds the words of Blixard: VM, Instance, Node, their states
// and the rules that bind them, typed identifiers, quantities, constraints,
// validation and error codes. It knows no technology: no storage, no network,
// no hypervisor, no clock. Every other package speaks in these terms.
//
// All values are plain data. A value that has been stored in the replicated
// state is shared and must not be changed; copy the struct first.
//
// One writer per field: what a user wants (VMSpec, Desired) is written by the
// user's commands, what is decided (node, generation, wanted) by the leader's
// reconcilers, what is seen (state, address, health) by the agent of the node.
package blixard

// FeatureLevel is the newest set of replicated commands this build knows. A
// cluster uses the lowest level of its members.
const FeatureLevel = 2

// Names of things. Each is a DNS label (see CheckName).
type (
	// NodeName names a machine of the cluster.
	NodeName string
	// VMName names a VM.
	VMName string
	// InstanceID names one replica slot of a VM: "<vm>-<ordinal>", ordinals
	// count from 1. Together with a generation it names one incarnation.
	InstanceID string
)

// Label is a key with a value, on nodes and VMs. Lists of labels are sorted by
// key and hold each key once.
type Label struct {
	Key   string
	Value string
}

// Resources are amounts that a node has or an instance needs.
type Resources struct {
	MilliCPU  int64 // thousandths of a vCPU
	MemoryMiB int64
	DiskMiB   int64
}

// Add returns r + o.
func (r Resources) Add(o Resources) Resources {
	return Resources{r.MilliCPU + o.MilliCPU, r.MemoryMiB + o.MemoryMiB, r.DiskMiB + o.DiskMiB}
}

// Sub returns r - o.
func (r Resources) Sub(o Resources) Resources {
	return Resources{r.MilliCPU - o.MilliCPU, r.MemoryMiB - o.MemoryMiB, r.DiskMiB - o.DiskMiB}
}

// Fits tells whether r fits into free.
func (r Resources) Fits(free Resources) bool {
	return r.MilliCPU <= free.MilliCPU && r.MemoryMiB <= free.MemoryMiB && r.DiskMiB <= free.DiskMiB
}
