package api

import (
	"cmp"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/internal/schedule"
	"github.com/blixard/blixard/internal/state"
)

// Conversions between the messages of the API and the types of the root
// package: all of them are in this file.

// specOf reads the spec of a VM, whose name may be empty, and completes it with
// defaults, those of the node first. The error's field is as the API calls it,
// below "spec".
func (h *Handler) specOf(name string, m *blixardv1.VMSpec) (blixard.VMSpec, error) {
	s := blixard.VMSpec{
		Type: m.GetType(), Image: m.GetImage(), Hypervisor: m.GetHypervisor(), Replicas: 1, VCPUs: int(m.GetVcpus()),
		MemoryMiB: m.GetMemoryMib(), DiskMiB: m.GetDiskMib(), Command: m.GetCommand(), Network: m.GetNetwork(),
		AntiAffinityGroup: m.GetAntiAffinityGroup(), SpreadAcross: m.GetSpreadAcross(), Strategy: m.GetStrategy(), Priority: int(m.GetPriority()),
		Singleton: m.GetSingleton(), OnPartition: m.GetOnPartition(), StopGraceMS: m.GetStopGraceMs(),
		Env: labelsOf(m.GetEnv()), Labels: labelsOf(m.GetLabels()),
		AffinityVMs: namesOf[blixard.VMName](m.GetAffinity()), DependsOn: namesOf[blixard.VMName](m.GetDependsOn()),
	}
	if m != nil && m.Replicas != nil {
		s.Replicas = int(*m.Replicas)
	}
	for _, p := range m.GetPublish() {
		s.Publish = append(s.Publish, blixard.Port{Protocol: p.GetProtocol(), HostPort: int(p.GetHostPort()), GuestPort: int(p.GetGuestPort())})
	}
	if r := m.GetRestart(); r != nil {
		s.Restart = blixard.RestartPolicy{Mode: r.Mode, BackoffMS: r.BackoffMs, MaxBackoffMS: r.MaxBackoffMs, MaxRestarts: int(r.MaxRestarts)}
	}
	if h := m.GetHealthCheck(); h != nil {
		s.Health = &blixard.HealthCheck{
			Kind: h.Kind, Port: int(h.Port), Path: h.Path, Command: h.Command, IntervalMS: h.IntervalMs, TimeoutMS: h.TimeoutMs,
			StartPeriodMS: h.StartPeriodMs, FailureThreshold: int(h.FailureThreshold),
		}
	}
	for i, text := range m.GetConstraints() {
		more, err := blixard.ParseConstraints(text)
		if err == nil && len(more) == 0 {
			err = blixard.Invalid("constraint", `write key=value, such as "storage=nvme"`, "the constraint is empty")
		}
		if err != nil {
			return s, inField(err, "spec.constraints["+strconv.Itoa(i)+"]")
		}
		s.Constraints = append(s.Constraints, more...)
	}
	for i, p := range m.GetPreferences() {
		one, err := blixard.ParseConstraints(p.GetConstraint())
		if err == nil && len(one) == 0 {
			err = blixard.Invalid("preferences", `write key=value, such as "storage=nvme"`, "the constraint is empty")
		}
		if err != nil {
			return s, inField(err, "spec.preferences["+strconv.Itoa(i)+"].constraint")
		}
		for _, c := range one {
			s.Preferences = append(s.Preferences, blixard.Preference{Constraint: c, Weight: int(p.GetWeight())})
		}
	}
	d := &h.opt.Defaults
	s.Hypervisor = cmp.Or(s.Hypervisor, d.Hypervisor)
	s.VCPUs, s.MemoryMiB, s.StopGraceMS = cmp.Or(s.VCPUs, d.VCPUs), cmp.Or(s.MemoryMiB, d.MemoryMiB), cmp.Or(s.StopGraceMS, d.StopGraceMS)
	s.Defaults()
	if err := s.CheckNew(blixard.VMName(name)); err != nil {
		return s, inSpec(err)
	}
	if s.Image == blixard.BuiltinImage && s.MemoryMiB < blixard.MinBuiltinMemoryMiB {
		return s, inSpec(blixard.Invalid("memory", "images of your own may get by with less", "memory is %s; the builtin image needs at least %s to boot",
			blixard.FormatMiB(s.MemoryMiB), blixard.FormatMiB(blixard.MinBuiltinMemoryMiB)))
	}
	return s, nil
}

// inField gives an error another field.
func inField(err error, field string) error {
	e := *blixardv1.AsError(err)
	e.Field = field
	return &e
}

// specFields are the fields of a spec that the API calls otherwise.
var specFields = map[string]string{
	"memory": "memoryMib", "disk": "diskMib", "restart.backoff": "restart.backoffMs", "restart.maxBackoff": "restart.maxBackoffMs",
	"stopGrace": "stopGraceMs", "constraint": "constraints",
}

// inSpec gives an error about a spec the path to the field in a request.
func inSpec(err error) error {
	e := *blixardv1.AsError(err)
	switch name, renamed := specFields[e.Field]; {
	case e.Field == "name" || strings.HasPrefix(e.Field, "spec"):
	case e.Field == "":
		e.Field = "spec"
	case renamed:
		e.Field = "spec." + name
	default:
		e.Field = "spec." + e.Field
	}
	return &e
}

// labelsOf makes a sorted list of a map, so that equal requests give equal
// commands.
func labelsOf(m map[string]string) []blixard.Label {
	if len(m) == 0 {
		return nil
	}
	out := make([]blixard.Label, 0, len(m))
	for k, v := range m {
		out = append(out, blixard.Label{Key: k, Value: v})
	}
	slices.SortFunc(out, func(a, b blixard.Label) int { return strings.Compare(a.Key, b.Key) })
	return out
}

func labelMap(labels []blixard.Label) map[string]string {
	if len(labels) == 0 {
		return nil
	}
	out := make(map[string]string, len(labels))
	for _, l := range labels {
		out[l.Key] = l.Value
	}
	return out
}

func namesOf[T ~string](names []string) []T {
	if len(names) == 0 {
		return nil
	}
	out := make([]T, len(names))
	for i, n := range names {
		out[i] = T(n)
	}
	return out
}

func specMessage(s *blixard.VMSpec) *blixardv1.VMSpec {
	replicas := int32(s.Replicas)
	m := &blixardv1.VMSpec{
		Type: s.Type, Image: s.Image, Hypervisor: s.Hypervisor, Replicas: &replicas, Vcpus: int32(s.VCPUs), MemoryMib: s.MemoryMiB, DiskMib: s.DiskMiB,
		Command: s.Command, Env: labelMap(s.Env), Labels: labelMap(s.Labels), Network: s.Network,
		Affinity: namesOf[string](texts(s.AffinityVMs)), AntiAffinityGroup: s.AntiAffinityGroup, SpreadAcross: s.SpreadAcross, Strategy: s.Strategy,
		Priority: int32(s.Priority), Singleton: s.Singleton, OnPartition: s.OnPartition,
		Restart: &blixardv1.RestartPolicy{
			Mode: s.Restart.Mode, BackoffMs: s.Restart.BackoffMS, MaxBackoffMs: s.Restart.MaxBackoffMS, MaxRestarts: int32(s.Restart.MaxRestarts),
		},
		DependsOn: texts(s.DependsOn), StopGraceMs: s.StopGraceMS,
	}
	for _, p := range s.Publish {
		m.Publish = append(m.Publish, &blixardv1.Port{Protocol: p.Protocol, HostPort: int32(p.HostPort), GuestPort: int32(p.GuestPort)})
	}
	for _, c := range s.Constraints {
		m.Constraints = append(m.Constraints, c.String())
	}
	for _, p := range s.Preferences {
		m.Preferences = append(m.Preferences, &blixardv1.Preference{Constraint: p.Constraint.String(), Weight: int32(p.Weight)})
	}
	if h := s.Health; h != nil {
		m.HealthCheck = &blixardv1.HealthCheck{
			Kind: h.Kind, Port: int32(h.Port), Path: h.Path, Command: h.Command, IntervalMs: h.IntervalMS, TimeoutMs: h.TimeoutMS,
			StartPeriodMs: h.StartPeriodMS, FailureThreshold: int32(h.FailureThreshold),
		}
	}
	return m
}

func texts[T ~string](names []T) []string {
	if len(names) == 0 {
		return nil
	}
	out := make([]string, len(names))
	for i, n := range names {
		out[i] = string(n)
	}
	return out
}

// vmMessage is a VM with what the view has of its instances; they are listed
// only if withInstances.
func vmMessage(v *state.View, vm *blixard.VM, withInstances bool) *blixardv1.VM {
	m := &blixardv1.VM{
		Name: string(vm.Name), Spec: specMessage(&vm.Spec), Desired: string(vm.Desired), Paused: vm.Paused, Deleting: vm.Deleting,
		RestartSeq: vm.RestartSeq, SpecVersion: vm.SpecVersion, Uid: vm.UID, Version: vm.Version, CreatedMs: vm.CreatedMS, UpdatedMs: vm.UpdatedMS,
		Refusal: refusalMessage(vm.Refusal),
	}
	var t tally
	v.InstancesOf(vm.Name, func(i *blixard.Instance) bool {
		t.add(vm, i)
		if withInstances {
			m.Instances = append(m.Instances, instanceMessage(i))
		}
		return true
	})
	m.Phase, m.Ready = t.phase(vm), int32(t.ready)
	return m
}

func refusalMessage(r *blixard.Refusal) *blixardv1.Refusal {
	if r == nil {
		return nil
	}
	return &blixardv1.Refusal{Missing: int32(r.Missing), Summary: r.Summary, SinceMs: r.SinceMS}
}

func instanceMessage(i *blixard.Instance) *blixardv1.Instance {
	m := &blixardv1.Instance{
		Id: string(i.ID), Vm: string(i.VM), Ordinal: int32(i.Ordinal), Generation: i.Generation, Node: string(i.Node), State: string(i.State),
		Address: i.Address, Health: string(i.Health), Message: i.Message, Acceleration: i.Acceleration, Restarts: int32(i.Restarts),
		Paused: i.StatePaused, Wanted: string(i.Wanted), WantReason: i.WantReason, CreatedMs: i.CreatedMS, StartedMs: i.StartedMS, EndedMs: i.EndedMS,
		Version: i.Version, SpecVersion: i.SpecVersion, RestartSeq: i.RestartSeq, NodeEpoch: i.NodeEpoch,
	}
	for _, p := range i.Ports {
		m.Ports = append(m.Ports, &blixardv1.PublishedPort{Protocol: p.Protocol, Address: p.Address, GuestPort: int32(p.GuestPort)})
	}
	return m
}

func resourcesMessage(r blixard.Resources) *blixardv1.Resources {
	return &blixardv1.Resources{MilliCpu: r.MilliCPU, MemoryMib: r.MemoryMiB, DiskMib: r.DiskMiB}
}

// nodeMessage is a node with what instances hold of it, and its part as this
// node knows the leader.
func nodeMessage(v *state.View, n *blixard.Node, st *Status) *blixardv1.Node {
	u := v.Usage(n.Name)
	m := &blixardv1.Node{
		Id: string(n.Name), State: string(n.State), Role: string(n.Raft), Address: n.Address, PublishAddress: n.PublishAddress, Zone: n.Zone,
		Labels: labelMap(n.Labels), Roles: n.Roles, Availability: string(n.Availability), Witness: n.Witness, RaftId: n.RaftID, Epoch: n.Epoch,
		JoinedMs: n.JoinedMS, LostMs: n.LostMS, Capacity: resourcesMessage(n.Capacity), Reserved: resourcesMessage(n.Reserved),
		Allocatable: resourcesMessage(n.Allocatable()), Used: resourcesMessage(u.Used), Instances: int32(u.Instances), MaxInstances: int32(n.MaxInstances),
		Hypervisors: n.Hypervisors, Acceleration: n.Acceleration, Version: n.Version, FeatureLevel: int32(n.FeatureLevel), ModifiedIndex: n.ModifiedIndex,
	}
	if st.Leader == n.Name && n.Raft != blixard.RoleNone {
		m.Role = "leader"
	}
	for _, p := range st.Peers {
		if p.RaftID == n.RaftID {
			m.Progress = &blixardv1.Progress{Match: p.Match, Active: p.Active, State: p.State}
		}
	}
	return m
}

func identityOf(m *blixardv1.NodeIdentity) state.NodeIdentity {
	return state.NodeIdentity{
		Name: blixard.NodeName(m.GetName()), Address: m.GetAddress(), PublishAddress: m.GetPublishAddress(), Zone: m.GetZone(),
		Labels: labelsOf(m.GetLabels()), Roles: m.GetRoles(), Witness: m.GetWitness(),
	}
}

func eventMessage(e *state.Event) *blixardv1.Event {
	return &blixardv1.Event{
		Seq: e.Seq, Index: e.Index, AtMs: e.AtMS, Kind: e.Kind, Vm: string(e.VM), Instance: string(e.Instance), Generation: e.Generation,
		Node: string(e.Node), Warning: e.Warning, Message: e.Message,
	}
}

func tokenMessage(t *state.Token) *blixardv1.Token {
	return &blixardv1.Token{Id: t.ID, ExpiresMs: t.ExpiresMS, UsesLeft: int32(t.UsesLeft), Node: string(t.Node)}
}

// tally counts a VM's instances for its phase.
type tally struct {
	wanted    int // count as replicas
	ready     int
	paused    int
	unhealthy int
	extra     int // still there, no longer wanted or outdated
	failed    int
}

func (t *tally) add(vm *blixard.VM, i *blixard.Instance) {
	current := i.SpecVersion == vm.SpecVersion && i.RestartSeq == vm.RestartSeq && i.Ordinal <= vm.Spec.Replicas
	switch {
	case i.State == blixard.Failed && current:
		t.failed++
	case i.State.Terminal():
	case !i.Counts() || !current:
		t.extra++
	default:
		t.wanted++
		switch {
		case i.Health == blixard.HealthUnhealthy:
			t.unhealthy++
		case i.State == blixard.Running && (vm.Spec.Health == nil || i.Health == blixard.HealthHealthy):
			t.ready++
		}
		if i.StatePaused {
			t.paused++
		}
	}
}

// phase is a VM in one word.
func (t *tally) phase(vm *blixard.VM) string {
	replicas := vm.Spec.Replicas
	switch {
	case vm.Deleting:
		return "Deleting"
	case vm.Desired != blixard.DesiredRunning:
		if t.wanted+t.extra > 0 {
			return "Stopping"
		}
		return "Stopped"
	case t.extra > 0:
		return "Updating"
	case t.wanted == replicas && t.paused == replicas && replicas > 0:
		return "Paused"
	case t.ready == replicas:
		return "Running"
	case t.wanted == replicas && t.unhealthy == 0 && t.failed == 0:
		return "Starting"
	case t.ready > 0 || t.unhealthy > 0:
		return "Degraded"
	case t.failed > 0:
		return "Failed"
	case t.wanted > 0:
		return "Starting"
	}
	return "Pending"
}

// nearestNames is the hint for a name that is not there.
func nearestNames(name, what string, all func(yield func(string) bool)) *blixard.Error {
	var names []string
	all(func(n string) bool {
		names = append(names, n)
		return len(names) < 1000
	})
	sort.Strings(names)
	short := name
	if len(short) > 80 {
		short = short[:80] + "…"
	}
	e := blixard.Errorf(blixard.CodeNotFound, "there is no %s named %q", what, short)
	if near := blixard.Nearest(name, names); near != "" {
		e.Hint = "did you mean " + near + "?"
	}
	return e
}

// verdictMessage is what a node says to one more instance of a VM.
func verdictMessage(view *state.View, vm blixard.VMName, d *schedule.NodeVerdict) *blixardv1.NodeVerdict {
	m := &blixardv1.NodeVerdict{Node: string(d.Node), Fits: d.Fits, Score: d.Score, Chosen: d.Chosen, Points: make(map[string]int64, len(d.Points))}
	for _, p := range d.Points {
		m.Points[p.Name] = p.Points
	}
	for _, o := range d.Objections {
		m.Objections = append(m.Objections, &blixardv1.Objection{Filter: o.Filter, Short: o.Short, Detail: o.Detail})
	}
	view.InstancesOf(vm, func(i *blixard.Instance) bool {
		if i.Node == d.Node && i.Holds() {
			m.Instances++
		}
		return true
	})
	return m
}
