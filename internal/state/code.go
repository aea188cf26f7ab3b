package state

import (
	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/wire"
)

// The encodings of rows and their parts. Fields are only ever appended.

func codeLabel(c *wire.Coder, l *blixard.Label) {
	wire.String(c, &l.Key)
	wire.String(c, &l.Value)
}

func codeResources(c *wire.Coder, r *blixard.Resources) {
	wire.Int(c, &r.MilliCPU)
	wire.Int(c, &r.MemoryMiB)
	wire.Int(c, &r.DiskMiB)
}

func codeConstraint(c *wire.Coder, x *blixard.Constraint) {
	wire.String(c, &x.Key)
	wire.String(c, &x.Op)
	wire.String(c, &x.Value)
}

func codePort(c *wire.Coder, p *blixard.Port) {
	wire.String(c, &p.Protocol)
	wire.Int(c, &p.HostPort)
	wire.Int(c, &p.GuestPort)
}

func codePublished(c *wire.Coder, p *blixard.PublishedPort) {
	wire.String(c, &p.Protocol)
	wire.String(c, &p.Address)
	wire.Int(c, &p.GuestPort)
}

func codeHealth(c *wire.Coder, h *blixard.HealthCheck) {
	wire.String(c, &h.Kind)
	wire.Int(c, &h.Port)
	wire.String(c, &h.Path)
	wire.Strings(c, &h.Command)
	wire.Int(c, &h.IntervalMS)
	wire.Int(c, &h.TimeoutMS)
	wire.Int(c, &h.StartPeriodMS)
	wire.Int(c, &h.FailureThreshold)
}

func codeSpec(c *wire.Coder, s *blixard.VMSpec) {
	c.Record(func(c *wire.Coder) {
		wire.String(c, &s.Type)
		wire.String(c, &s.Image)
		wire.String(c, &s.Hypervisor)
		wire.Int(c, &s.Replicas)
		wire.Int(c, &s.VCPUs)
		wire.Int(c, &s.MemoryMiB)
		wire.Int(c, &s.DiskMiB)
		wire.Strings(c, &s.Command)
		wire.List(c, &s.Env, codeLabel)
		wire.List(c, &s.Labels, codeLabel)
		wire.List(c, &s.Publish, codePort)
		wire.String(c, &s.Network)
		wire.List(c, &s.Constraints, codeConstraint)
		wire.List(c, &s.Preferences, func(c *wire.Coder, p *blixard.Preference) {
			codeConstraint(c, &p.Constraint)
			wire.Int(c, &p.Weight)
		})
		wire.Strings(c, &s.AffinityVMs)
		wire.String(c, &s.AntiAffinityGroup)
		wire.String(c, &s.SpreadAcross)
		wire.String(c, &s.Strategy)
		wire.Int(c, &s.Priority)
		wire.Bool(c, &s.Singleton)
		wire.String(c, &s.OnPartition)
		wire.String(c, &s.Restart.Mode)
		wire.Int(c, &s.Restart.BackoffMS)
		wire.Int(c, &s.Restart.MaxBackoffMS)
		wire.Int(c, &s.Restart.MaxRestarts)
		wire.Optional(c, &s.Health, codeHealth)
		wire.Strings(c, &s.DependsOn)
		wire.Int(c, &s.StopGraceMS)
	})
}

func codeVM(c *wire.Coder, vm *blixard.VM) {
	wire.String(c, &vm.Name)
	codeSpec(c, &vm.Spec)
	wire.String(c, &vm.Desired)
	wire.Bool(c, &vm.Paused)
	wire.Bool(c, &vm.Deleting)
	wire.Uint(c, &vm.RestartSeq)
	wire.Uint(c, &vm.SpecVersion)
	wire.Uint(c, &vm.UID)
	wire.Uint(c, &vm.Version)
	wire.Int(c, &vm.CreatedMS)
	wire.Int(c, &vm.UpdatedMS)
	wire.Uint(c, &vm.FirstGeneration)
	wire.Optional(c, &vm.Refusal, func(c *wire.Coder, r *blixard.Refusal) {
		wire.Int(c, &r.Missing)
		wire.String(c, &r.Summary)
		wire.Int(c, &r.SinceMS)
	})
}

// codeInstance codes an instance. A spec that equals its VM's is not written
// again: share tells the VM's, and is given it back when reading.
func codeInstance(c *wire.Coder, i *blixard.Instance, share func(blixard.VMName) *blixard.VMSpec) {
	wire.String(c, &i.VM)
	wire.Int(c, &i.Ordinal)
	wire.Uint(c, &i.Generation)
	wire.String(c, &i.Node)
	wire.Uint(c, &i.NodeEpoch)
	wire.Uint(c, &i.SpecVersion)
	wire.Uint(c, &i.RestartSeq)
	wire.Int(c, &i.Restarts)
	shared := i.Spec != nil && share(i.VM) != nil && specEqual(i.Spec, share(i.VM))
	wire.Bool(c, &shared)
	if !shared {
		if c.Reading() {
			i.Spec = new(blixard.VMSpec)
		}
		codeSpec(c, i.Spec)
	} else if c.Reading() {
		i.Spec = share(i.VM)
	}
	wire.String(c, &i.Wanted)
	wire.String(c, &i.WantReason)
	wire.Bool(c, &i.Paused)
	wire.Int(c, &i.CreatedMS)
	wire.String(c, &i.State)
	wire.Bool(c, &i.StatePaused)
	wire.String(c, &i.Message)
	wire.String(c, &i.Address)
	wire.List(c, &i.Ports, codePublished)
	wire.String(c, &i.Health)
	wire.Int(c, &i.StartedMS)
	wire.Int(c, &i.EndedMS)
	wire.String(c, &i.Acceleration)
	wire.Uint(c, &i.Version)
	if c.Reading() {
		i.ID = blixard.SlotID(i.VM, i.Ordinal)
	}
}

// specEqual compares by encoding unless the pointers are the same, so that the
// bytes of a snapshot depend on values only.
func specEqual(a, b *blixard.VMSpec) bool {
	if a == b {
		return true
	}
	x, y := wire.Writer(nil), wire.Writer(nil)
	codeSpec(x, a)
	codeSpec(y, b)
	return string(x.Bytes()) == string(y.Bytes())
}

func codeNode(c *wire.Coder, n *blixard.Node) {
	wire.String(c, &n.Name)
	wire.Uint(c, &n.RaftID)
	wire.String(c, &n.Address)
	wire.String(c, &n.PublishAddress)
	wire.String(c, &n.Zone)
	wire.List(c, &n.Labels, codeLabel)
	wire.Strings(c, &n.Roles)
	wire.String(c, &n.Availability)
	wire.Bool(c, &n.Witness)
	wire.String(c, &n.State)
	wire.Uint(c, &n.Epoch)
	wire.Int(c, &n.JoinedMS)
	wire.Int(c, &n.LostMS)
	codeResources(c, &n.Capacity)
	codeResources(c, &n.Reserved)
	wire.Int(c, &n.MaxInstances)
	wire.Strings(c, &n.Hypervisors)
	wire.String(c, &n.Acceleration)
	wire.String(c, &n.Version)
	wire.Int(c, &n.FeatureLevel)
	wire.String(c, &n.Raft)
	wire.Uint(c, &n.ModifiedIndex)
	wire.Bool(c, &n.Simulated)
	wire.Strings(c, &n.ConfigLabels)
}

func codeCluster(c *wire.Coder, x *Cluster) {
	wire.String(c, &x.ID)
	wire.String(c, &x.Name)
	wire.Uint(c, &x.NextRaftID)
	wire.Uint(c, &x.NextEvent)
	wire.Uint(c, &x.NextKey)
	wire.Uint(c, &x.Watermark)
	wire.Bool(c, &x.Maintenance)
	wire.Int(c, &x.FeatureLevel)
	wire.Int(c, &x.CreatedMS)
	wire.Int(c, &x.NowMS)
	wire.String(c, &x.Secret)
	wire.Strings(c, &x.RemovedImages)
}

func codeError(c *wire.Coder, e *blixard.Error) {
	wire.String(c, &e.Code)
	wire.String(c, &e.Message)
	wire.String(c, &e.Hint)
	wire.String(c, &e.Field)
	wire.Uint(c, &e.Version)
}

func codeRemembered(c *wire.Coder, r *remembered) {
	wire.Uint(c, &r.Print)
	wire.Int(c, &r.AtMS)
	wire.Uint(c, &r.Outcome.Version)
	wire.Uint(c, &r.Outcome.Value)
	wire.String(c, &r.Outcome.Text)
	wire.Bool(c, &r.Outcome.Noop)
	wire.Optional(c, &r.Err, codeError)
	wire.Uint(c, &r.Outcome.Index)
}
