package blixard

import (
	"fmt"
	"slices"
)

// InstanceState is where an incarnation is in its life. It moves forward only.
type InstanceState string

// The states of an incarnation.
const (
	// Pending: placed on a node whose agent has not taken it up.
	Pending InstanceState = "Pending"
	// Preparing: the agent fetches the image and makes the directory.
	Preparing InstanceState = "Preparing"
	// Starting: the hypervisor was told to start; the guest has not answered.
	Starting InstanceState = "Starting"
	// Running: the guest has answered.
	Running InstanceState = "Running"
	// Stopping: the guest was asked to shut down.
	Stopping InstanceState = "Stopping"
	// Stopped: ended as wanted.
	Stopped InstanceState = "Stopped"
	// Failed: ended, or never began, against what was wanted.
	Failed InstanceState = "Failed"
	// Lost: its node is gone; whether it still runs is not known, and it is
	// never counted again.
	Lost InstanceState = "Lost"
)

// next is the one transition table: the states that may directly follow.
var next = map[InstanceState][]InstanceState{
	Pending:   {Preparing, Starting, Running, Stopping, Stopped, Failed, Lost},
	Preparing: {Starting, Running, Stopping, Stopped, Failed, Lost},
	Starting:  {Running, Stopping, Stopped, Failed, Lost},
	Running:   {Stopping, Stopped, Failed, Lost},
	Stopping:  {Stopped, Failed, Lost},
	Stopped:   {},
	Failed:    {},
	Lost:      {},
}

// CanFollow tells whether an incarnation in state from may go to state to.
func CanFollow(from, to InstanceState) bool {
	return slices.Contains(next[from], to)
}

// CommandNotStarted begins the message of an instance whose workload could not
// be started at all, which trying again alone does not mend.
const CommandNotStarted = "the command could not be started"

// Terminal tells whether s is an end.
func (s InstanceState) Terminal() bool { return s == Stopped || s == Failed || s == Lost }

// Known tells whether s is one of the states.
func (s InstanceState) Known() bool { _, ok := next[s]; return ok }

// Wanted is what the leader wants of an incarnation. It moves forward only:
// run, stop, remove.
type Wanted string

// What the leader can want of an incarnation.
const (
	WantRun    Wanted = "run"
	WantStop   Wanted = "stop"
	WantRemove Wanted = "remove" // stop it and leave nothing behind
)

// Health is the outcome of an instance's health check.
type Health string

// Outcomes of health checks.
const (
	HealthUnknown   Health = ""
	HealthHealthy   Health = "healthy"
	HealthUnhealthy Health = "unhealthy"
)

// Instance is one incarnation of a VM's slot: it has one node for life and a
// generation that is never used again.
type Instance struct {
	ID         InstanceID
	VM         VMName
	Ordinal    int
	Generation uint64

	// Decided by the leader.
	Node        NodeName
	NodeEpoch   uint64 // the node's epoch when it was placed
	SpecVersion uint64
	RestartSeq  uint64
	Restarts    int // how often this slot was restarted in a row before this incarnation
	Spec        *VMSpec
	Wanted      Wanted
	WantReason  string // why it is to stop
	Paused      bool   // wanted paused
	CreatedMS   int64

	// Observed by the agent.
	State        InstanceState
	StatePaused  bool // observed paused
	Message      string
	Address      string // "host:port" of the first published port, else the guest's address
	Ports        []PublishedPort
	Health       Health
	StartedMS    int64 // when the guest first answered
	EndedMS      int64
	Acceleration string // kvm, tcg

	Version uint64 // index of the last command that changed it
}

// PublishedPort is a guest port and where it can be reached.
type PublishedPort struct {
	Protocol  string
	Address   string // "host:port"
	GuestPort int
}

// Incarnation names an instance with its generation.
func (i *Instance) Incarnation() string { return fmt.Sprintf("%s#%d", i.ID, i.Generation) }

// Holds tells whether the instance holds resources of its node: until it is
// known to have ended.
func (i *Instance) Holds() bool { return !i.State.Terminal() }

// Counts tells whether the instance counts as one of its VM's replicas.
func (i *Instance) Counts() bool { return !i.State.Terminal() && i.Wanted == WantRun }
