package sim

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
)

// Profiles of runs: which faults there are.
const (
	ProfileCalm      = "calm"      // none
	ProfileCrash     = "crash"     // processes, machines and disks
	ProfilePartition = "partition" // the network
	ProfileSwarm     = "swarm"     // each seed switches whole classes on and off
)

// Profiles are all of them.
func Profiles() []string {
	return []string{ProfileCalm, ProfileCrash, ProfilePartition, ProfileSwarm}
}

// Options of a run. What is zero is drawn from the seed, or is the profile's.
type Options struct {
	Seed  uint64
	Nodes int // 1 to 9
	VMs   int // that clients work on, 1 to 2000
	// DurationMS is how long the cluster is played, in virtual time; what it
	// takes to come up and to come to rest in the end is added.
	DurationMS int64
	Profile    string // swarm by default
	// Trace, if not nil, gets one line for each event that matters.
	Trace io.Writer
	// Schedule, if not nil, is played in place of what the seed would draw; the
	// other fields but Trace are its own then.
	Schedule *Schedule
}

// Result is what came of a run.
type Result struct {
	OK        bool   `json:"ok"`
	Seed      uint64 `json:"seed"`
	Profile   string `json:"profile"`
	TraceHash string `json:"trace_hash"`
	Events    uint64 `json:"events"`
	VirtualMS int64  `json:"virtual_ms"`
	// Violation is the first broken invariant, nil if OK.
	Violation *Violation `json:"violation"`
	// Coverage counts what must happen sometimes.
	Coverage map[string]int `json:"coverage,omitempty"`
	// Options are the knobs of the schedule, as text.
	Options string `json:"options"`
}

// Violation is an invariant that did not hold.
type Violation struct { //nolint:errname // it is a finding, which can also be told as an error
	Invariant string   `json:"invariant"`
	Detail    string   `json:"detail"`
	AtMS      int64    `json:"at_ms"`
	Trace     []string `json:"trace"` // the newest lines
}

// Error makes a violation an error.
func (v *Violation) Error() string {
	return fmt.Sprintf("%s, after %d ms: %s", v.Invariant, v.AtMS, v.Detail)
}

// scheduleVersion changes when old schedules cannot be played any more.
const scheduleVersion = 1

// Schedule is all that a run needs: who takes part and what goes wrong when.
type Schedule struct {
	Version    int     `json:"version"`
	Seed       uint64  `json:"seed"`
	Profile    string  `json:"profile"`
	DurationMS int64   `json:"duration_ms"`
	Knobs      Knobs   `json:"knobs"`
	Faults     []Fault `json:"faults"` // by time
}

// Fault is one thing that goes wrong, or that an operator does. What the fields
// mean depends on the kind, see kinds.
type Fault struct {
	AtMS int64  `json:"at_ms"` // after the cluster has come up
	Kind string `json:"kind"`
	// Node is a machine ("n2"), "leader" for the one that leads then, or "".
	Node string `json:"node,omitempty"`
	// Nodes are the other machines it concerns.
	Nodes []string `json:"nodes,omitempty"`
	ForMS int64    `json:"for_ms,omitempty"`
	Arg   int64    `json:"arg,omitempty"`
	Arg2  int64    `json:"arg2,omitempty"`
}

func (f Fault) String() string {
	s := fmt.Sprintf("%d %s", f.AtMS, f.Kind)
	if f.Node != "" {
		s += " of " + f.Node
	}
	if len(f.Nodes) > 0 {
		s += fmt.Sprintf(" with %v", f.Nodes)
	}
	if f.ForMS > 0 {
		s += fmt.Sprintf(" for %d ms", f.ForMS)
	}
	if f.Arg != 0 || f.Arg2 != 0 {
		s += fmt.Sprintf(" (%d, %d)", f.Arg, f.Arg2)
	}
	return s
}

// Knobs are who takes part in a run, and how.
type Knobs struct {
	Nodes     int `json:"nodes"`
	MaxVoters int `json:"max_voters"`
	// Old is how many of the machines begin with an older release, the founder's
	// among them.
	Old   int `json:"old,omitempty"`
	Zones int `json:"zones"`
	// Clients own their VMs, so that what they must be is known exactly; sharers
	// work on the same few, whose history is checked to be linearizable.
	Clients int `json:"clients"`
	VMs     int `json:"vms"`
	Sharers int `json:"sharers"`
	// Watchers follow all changes; each node keeps about WatchKeep of them.
	Watchers  int `json:"watchers"`
	WatchKeep int `json:"watch_keep"`
	// Functions are played by a user each.
	Functions int `json:"functions,omitempty"`
	// ThinkMS is the mean pause between two operations of a client.
	ThinkMS int64 `json:"think_ms"`

	TickMS        int64 `json:"tick_ms"`
	ElectionTicks int   `json:"election_ticks"`
	HeartbeatMS   int64 `json:"heartbeat_ms"`
	LeaseMS       int64 `json:"lease_ms"`
	MarginMS      int64 `json:"margin_ms"`

	SnapshotEntries uint64 `json:"snapshot_entries"`
	TrailingEntries uint64 `json:"trailing_entries"`
	SegmentBytes    int64  `json:"segment_bytes"`
	SyncMS          int64  `json:"sync_ms"`  // the longest sync of a sound disk
	DelayMS         int64  `json:"delay_ms"` // the longest way of a message
	DriftPermille   int64  `json:"drift_permille"`
	SkewMS          int64  `json:"skew_ms"`
	// StartMS and BootMS bound how long a hypervisor and a guest take to start.
	StartMS int64 `json:"start_ms"`
	BootMS  int64 `json:"boot_ms"`
	// MilliCPU and MemoryMiB are what every machine has.
	MilliCPU  int64 `json:"milli_cpu"`
	MemoryMiB int64 `json:"memory_mib"`

	// Classes of faults that are switched on, and how often something happens
	// while things go wrong.
	Classes      []string `json:"classes,omitempty"`
	FaultEveryMS int64    `json:"fault_every_ms,omitempty"`
}

// String is the knobs in one line.
func (k Knobs) String() string {
	b, err := json.Marshal(k)
	if err != nil {
		return err.Error() // numbers and strings: it cannot be
	}
	return string(b)
}

// Plan draws the schedule of options, or checks the one they bring.
func Plan(o Options) (Schedule, error) {
	if o.Schedule != nil {
		return *o.Schedule, o.Schedule.check()
	}
	if o.Profile == "" {
		o.Profile = ProfileSwarm
	}
	s := Schedule{Version: scheduleVersion, Seed: o.Seed, Profile: o.Profile, DurationMS: o.DurationMS}
	r := rand.New(rand.NewPCG(o.Seed, 1))
	switch o.Profile {
	case ProfileCalm:
		s.Knobs = calmKnobs()
	case ProfileCrash, ProfilePartition, ProfileSwarm:
		s.Knobs = swarmKnobs(r)
		if o.Profile != ProfileSwarm {
			s.Knobs.Classes = classesOf(o.Profile)
		}
		s.Knobs.drawFunctions(o)
	default:
		return s, fmt.Errorf("there is no profile %q: choose one of %v", o.Profile, Profiles())
	}
	if o.Nodes != 0 {
		s.Knobs.Nodes = o.Nodes
	}
	if o.VMs != 0 {
		s.Knobs.VMs = o.VMs
	}
	if s.DurationMS == 0 {
		s.DurationMS = 60_000
	}
	// The state grows with time, and each snapshot is of all of it.
	s.Knobs.SnapshotEntries *= uint64(min(1+s.DurationMS/120_000, 40))
	s.Knobs.room()
	if err := s.check(); err != nil {
		return s, err
	}
	drawFaults(r, &s)
	return s, nil
}

func (s *Schedule) check() error {
	k := &s.Knobs
	switch {
	case s.Version != scheduleVersion:
		return fmt.Errorf("this schedule is of version %d; this program plays version %d", s.Version, scheduleVersion)
	case k.Nodes < 1 || k.Nodes > 9:
		return fmt.Errorf("%d nodes: from 1 to 9 can be simulated", k.Nodes)
	case k.VMs < 1 || k.VMs > 2000 || k.Clients < 1 || k.Clients > k.VMs:
		return fmt.Errorf("%d VMs of %d clients: from 1 to 2000 VMs can be simulated, with at most as many clients", k.VMs, k.Clients)
	case s.DurationMS < 1000 || s.DurationMS > 400*24*3600*1000:
		return fmt.Errorf("a duration of %d ms: from a second to 400 days can be simulated", s.DurationMS)
	case k.TickMS < 1 || k.ElectionTicks < 3 || k.HeartbeatMS < 1 || k.LeaseMS < 5*k.HeartbeatMS/2 || k.MarginMS < 1 || k.ThinkMS < 1:
		return fmt.Errorf("knobs %s: times must be positive, and a lease longer than two heartbeats", k)
	}
	for _, f := range s.Faults {
		if kindOf(f.Kind) == nil {
			return fmt.Errorf("there is no fault %q", f.Kind)
		}
	}
	return nil
}

func calmKnobs() Knobs {
	return Knobs{
		Nodes: 5, MaxVoters: 5, Zones: 3, Clients: 10, VMs: 200, Sharers: 2, ThinkMS: 10_000, Watchers: 1, WatchKeep: 1 << 12,
		TickMS: 100, ElectionTicks: 10, HeartbeatMS: 1000, LeaseMS: 5000, MarginMS: 1000,
		SnapshotEntries: 1000, TrailingEntries: 500, SegmentBytes: 1 << 18, SyncMS: 2, DelayMS: 2, DriftPermille: 0, SkewMS: 50,
		StartMS: 300, BootMS: 2000,
	}
}

// swarmKnobs switches whole classes of faults on or off, so that a rare one is
// not always drowned by the others.
func swarmKnobs(r *rand.Rand) Knobs {
	pick := func(all ...int64) int64 { return all[r.IntN(len(all))] }
	k := Knobs{
		Nodes: int(pick(1, 3, 3, 3, 5)), MaxVoters: int(pick(3, 5, 5)), Zones: int(pick(1, 2, 3)), Clients: 3, VMs: int(pick(6, 9, 9, 24)), Sharers: int(pick(0, 2, 3)),
		Watchers: int(pick(0, 2)), WatchKeep: int(pick(10, 300, 1<<12)),
		ThinkMS: pick(400, 800, 3000),
		TickMS:  100, ElectionTicks: 10, HeartbeatMS: 1000, LeaseMS: 5000, MarginMS: 1000,
		SnapshotEntries: uint64(pick(15, 60, 1000)), TrailingEntries: uint64(pick(0, 5, 40)), SegmentBytes: pick(1<<13, 1<<16), SyncMS: pick(0, 2, 10),
		DelayMS: pick(2, 10, 60), DriftPermille: pick(0, 30, 80), SkewMS: pick(0, 2000), StartMS: pick(10, 300, 2000), BootMS: pick(10, 1000, 5000),
		FaultEveryMS: pick(300, 1000, 3000),
	}
	for _, c := range classes {
		if r.IntN(100) < c.pct {
			k.Classes = append(k.Classes, c.name)
		}
	}
	if slices.Contains(k.Classes, "loss") { // there must be enough to lose
		k.Nodes, k.MaxVoters = int(pick(3, 4, 5, 5)), int(pick(3, 3, 5))
	}
	if slices.Contains(k.Classes, "upgrade") {
		k.Old = 1 + r.IntN(k.Nodes)
	}
	return k
}

// room gives the machines enough for most of what clients want: some VMs are
// refused.
func (k *Knobs) room() {
	k.Clients = min(k.Clients, max(k.VMs, 1))
	perNode := int64(k.VMs/max(k.Nodes, 1)) + 2
	k.MilliCPU, k.MemoryMiB = max(4000, perNode*2000), max(2048, perNode*900)
}
