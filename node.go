package blixard

import "slices"

// NodeState is whether a node is in touch with the leader.
type NodeState string

// States of a node.
const (
	// NodeJoining: registered, its agent has not reported yet.
	NodeJoining NodeState = "Joining"
	// NodeReady: its agent reports.
	NodeReady NodeState = "Ready"
	// NodeLost: its lease has run out; its instances run elsewhere.
	NodeLost NodeState = "Lost"
)

// Availability is what an operator allows a node to do.
type Availability string

// Availabilities of a node.
const (
	Active Availability = "active"
	// Cordoned: keeps what it has, gets nothing new.
	Cordoned Availability = "cordoned"
	// Draining: everything is moved away.
	Draining Availability = "draining"
)

// RaftRole is a node's part in the consensus.
type RaftRole string

// Parts a node can have.
const (
	RoleNone    RaftRole = "none"
	RoleVoter   RaftRole = "voter"
	RoleLearner RaftRole = "learner"
)

// Node is a machine of the cluster.
type Node struct {
	Name NodeName
	// RaftID is never reused: a node that joins again gets a new one.
	RaftID uint64
	// Address is "host:port" where the node serves other nodes and users.
	Address string
	// PublishAddress is the IP that published ports are bound to.
	PublishAddress string

	// By the operator.
	Zone         string
	Labels       []Label
	Roles        []string // "hypervisor", "control", …; no "hypervisor": no instances
	Availability Availability
	// Witness: votes, runs nothing.
	Witness bool
	// Simulated: an agent that pretends to run instances, for load tests; no
	// machine and no replica.
	Simulated bool

	// By the leader.
	State NodeState
	// Epoch counts how often the node was lost; what belongs to an older epoch
	// is void.
	Epoch    uint64
	JoinedMS int64
	LostMS   int64

	// By its agent.
	Capacity     Resources
	Reserved     Resources // kept for the machine itself
	MaxInstances int       // 0: no limit
	Hypervisors  []string  // drivers that work here
	Acceleration string
	Version      string // release of its software
	FeatureLevel int

	// From the raft configuration.
	Raft RaftRole

	// ConfigLabels are the keys of those Labels that the node's configuration
	// set, sorted: a label that the configuration no longer has goes with the
	// agent's next report. The others are the operator's.
	ConfigLabels []string

	ModifiedIndex uint64
}

// Allocatable is what instances may use.
func (n *Node) Allocatable() Resources { return n.Capacity.Sub(n.Reserved) }

// RunsInstances tells whether the node is meant to run instances at all.
func (n *Node) RunsInstances() bool {
	if n.Witness {
		return false
	}
	return slices.Contains(n.Roles, "hypervisor")
}

// Label returns the value of a label, also of the built-in ones: "zone",
// "node", "hypervisor" (any that works here) and "arch"-like agent labels.
func (n *Node) Label(key string) (string, bool) {
	switch key {
	case "zone":
		return n.Zone, n.Zone != ""
	case "node", "name":
		return string(n.Name), true
	case "acceleration":
		return n.Acceleration, n.Acceleration != ""
	}
	for _, l := range n.Labels {
		if l.Key == key {
			return l.Value, true
		}
	}
	return "", false
}
