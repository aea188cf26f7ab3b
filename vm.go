package blixard

import "strconv"

// VMSpec is what a user wants of a VM. Written by the user only.
type VMSpec struct {
	Type       string // "long-lived" (the only type of a VM; functions are their own kind)
	Image      string // "builtin" or "sha256:<digest>" of an imported image
	Hypervisor string // driver name; "" lets the node choose
	Replicas   int
	VCPUs      int
	MemoryMiB  int64
	DiskMiB    int64
	Command    []string // empty: what the image says
	Env        []Label
	Labels     []Label
	Publish    []Port
	Network    string // "user" or "bridge"; "" lets the node choose

	Constraints       []Constraint // all must hold on the node
	Preferences       []Preference // better when they hold
	AffinityVMs       []VMName     // only on nodes that run an instance of each
	AntiAffinityGroup string       // no two instances of one group share a node
	SpreadAcross      string       // node label whose values instances are spread over; "zone" for the node's zone
	Strategy          string       // "spread" (default) or "binpack"
	Priority          int          // 0..1000, higher places first; default 500

	Singleton   bool   // exclusive: at no instant do two incarnations of one slot run
	OnPartition string // "", "stop", "continue"; see EffectiveOnPartition
	Restart     RestartPolicy
	Health      *HealthCheck
	DependsOn   []VMName // started only when those run
	StopGraceMS int64    // time the guest gets to shut down
}

// Port publishes a guest's port on its node.
type Port struct {
	Protocol  string // tcp, udp
	HostPort  int    // 0: the node chooses a free one
	GuestPort int
}

// RestartPolicy says what happens when an instance ends by itself.
type RestartPolicy struct {
	Mode         string // "always" (default), "on-failure", "never"
	BackoffMS    int64  // before the first restart; doubled each time
	MaxBackoffMS int64
	MaxRestarts  int // 0: no limit; counted since it last ran for ten minutes
}

// HealthCheck is a probe made by the agent from the node or inside the guest.
type HealthCheck struct {
	Kind             string // tcp, http, exec
	Port             int    // guest port, for tcp and http
	Path             string // for http
	Command          []string
	IntervalMS       int64
	TimeoutMS        int64
	StartPeriodMS    int64 // failures before this has passed do not count
	FailureThreshold int   // failures in a row before the instance is unhealthy and restarted
}

// Desired is what a user wants a VM to be.
type Desired string

// What a user can want of a VM.
const (
	DesiredRunning Desired = "running"
	DesiredStopped Desired = "stopped"
)

// VM is the user's intent and what the leader remembers of it.
type VM struct {
	Name    VMName
	Spec    VMSpec
	Desired Desired
	// Paused: the user wants the instances' vCPUs stopped.
	Paused bool
	// Deleting: the VM goes once the last of its instances is gone.
	Deleting bool
	// RestartSeq counts the user's restarts; instances of a lower one are replaced.
	RestartSeq uint64
	// SpecVersion counts changes of the spec that need new instances.
	SpecVersion uint64
	// UID is the version the VM was created with: never reused.
	UID uint64
	// Version grows with each change of the user's part.
	Version   uint64
	CreatedMS int64
	UpdatedMS int64
	// FirstGeneration is the lowest generation a new instance may have. It rises
	// above every generation that was forgotten, also of a former VM of the same
	// name, so that none is ever repeated.
	FirstGeneration uint64
	// Refusal says why instances are not placed; nil when all are. Written by
	// the leader.
	Refusal *Refusal
}

// Refusal explains why something cannot be placed.
type Refusal struct {
	Missing int    // instances that have no place
	Summary string // one line: "0/3 nodes fit: 2 too little memory, 1 draining"
	SinceMS int64
}

// OnPartition behaviours.
const (
	OnPartitionStop     = "stop"
	OnPartitionContinue = "continue"
)

// EffectiveOnPartition is what a node that lost its lease does with an
// instance of this VM: a singleton stops, anything else runs on, unless the
// user said otherwise. A singleton that continues is not started elsewhere
// until its node comes back or is removed.
func (s *VMSpec) EffectiveOnPartition() string {
	if s.OnPartition != "" {
		return s.OnPartition
	}
	if s.Singleton {
		return OnPartitionStop
	}
	return OnPartitionContinue
}

// Needs are the resources one instance reserves on its node.
func (s *VMSpec) Needs() Resources {
	return Resources{MilliCPU: int64(s.VCPUs) * 1000, MemoryMiB: s.MemoryMiB, DiskMiB: s.DiskMiB}
}

// SlotID is the instance ID of a VM's slot; ordinals count from 1.
func SlotID(vm VMName, ordinal int) InstanceID {
	return InstanceID(string(vm) + "-" + strconv.Itoa(ordinal))
}
