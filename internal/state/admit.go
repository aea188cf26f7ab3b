package state

import (
	"fmt"

	"github.com/blixard/blixard"
)

// Objection is why a node does not take an instance.
type Objection struct {
	Filter string // which rule: "state", "memory", …
	Short  string // for summaries: "too little memory"
	Detail string // with figures: "needs 512M, 100M free of 2G"
}

// Filter is one rule that a node must pass to take an instance of a spec.
type Filter struct {
	Name  string
	Check func(t *tables, n *blixard.Node, s *blixard.VMSpec) *Objection
}

// filters in the order in which they are asked: the cheapest and most common
// objections first.
var filters = []Filter{
	{"state", checkState},
	{"resources", checkResources},
	{"instances", checkInstances},
	{"hypervisor", checkHypervisor},
	{"constraints", checkConstraints},
	{"ports", checkPorts},
	{"anti-affinity", checkAntiAffinity},
	{"affinity", checkAffinity},
}

// admits returns the first objection of a node against an instance of a spec,
// nil if there is none. Placement asks it when deciding, and applying a
// placement asks it again.
func (t *tables) admits(n *blixard.Node, s *blixard.VMSpec) *Objection {
	for _, f := range filters {
		if o := f.Check(t, n, s); o != nil {
			o.Filter = f.Name
			return o
		}
	}
	return nil
}

// Admits returns the first objection of a node against an instance of a spec,
// nil if there is none.
func (v *View) Admits(n *blixard.Node, s *blixard.VMSpec) *Objection { return v.t.admits(n, s) }

// Objections returns every objection of a node, one at most per filter.
func (v *View) Objections(n *blixard.Node, s *blixard.VMSpec) []Objection {
	var out []Objection
	for _, f := range filters {
		if o := f.Check(&v.t, n, s); o != nil {
			o.Filter = f.Name
			out = append(out, *o)
		}
	}
	return out
}

func checkState(_ *tables, n *blixard.Node, _ *blixard.VMSpec) *Objection {
	switch {
	case !n.RunsInstances():
		return &Objection{Short: "runs no VMs", Detail: "the node does not have the role hypervisor"}
	case n.State == blixard.NodeJoining:
		return &Objection{Short: "joining", Detail: "its agent has not reported yet"}
	case n.State == blixard.NodeLost:
		return &Objection{Short: "lost", Detail: "it is out of touch"}
	case n.Availability == blixard.Cordoned:
		return &Objection{Short: "cordoned", Detail: "it is cordoned: `blixard cluster uncordon " + string(n.Name) + "` ends that"}
	case n.Availability == blixard.Draining:
		return &Objection{Short: "draining", Detail: "it is being drained: `blixard cluster uncordon " + string(n.Name) + "` ends that"}
	}
	return nil
}

func checkResources(t *tables, n *blixard.Node, s *blixard.VMSpec) *Objection {
	u, _ := t.usage.Get(n.Name)
	has, free, need := n.Allocatable(), n.Allocatable().Sub(u.Used), s.Needs()
	switch {
	case need.MemoryMiB > free.MemoryMiB:
		return &Objection{Short: "too little memory", Detail: fmt.Sprintf("needs %s of memory, %s of %s are free", blixard.FormatMiB(need.MemoryMiB), blixard.FormatMiB(free.MemoryMiB), blixard.FormatMiB(has.MemoryMiB))}
	case need.MilliCPU > free.MilliCPU:
		return &Objection{Short: "too few vCPUs", Detail: fmt.Sprintf("needs %s vCPUs, %s of %s are free", cores(need.MilliCPU), cores(free.MilliCPU), cores(has.MilliCPU))}
	case need.DiskMiB > free.DiskMiB:
		return &Objection{Short: "too little disk", Detail: fmt.Sprintf("needs %s of disk, %s of %s are free", blixard.FormatMiB(need.DiskMiB), blixard.FormatMiB(free.DiskMiB), blixard.FormatMiB(has.DiskMiB))}
	}
	return nil
}

func cores(milli int64) string {
	if milli%1000 == 0 {
		return fmt.Sprint(milli / 1000)
	}
	return fmt.Sprintf("%d.%03d", milli/1000, milli%1000)
}

func checkInstances(t *tables, n *blixard.Node, _ *blixard.VMSpec) *Objection {
	if n.MaxInstances == 0 {
		return nil
	}
	if u, _ := t.usage.Get(n.Name); u.Instances >= n.MaxInstances {
		return &Objection{Short: "full", Detail: fmt.Sprintf("it runs %d instances, the most it may (microvm.max_vms_per_node)", u.Instances)}
	}
	return nil
}

func checkHypervisor(_ *tables, n *blixard.Node, s *blixard.VMSpec) *Objection {
	if s.Hypervisor == "" {
		return nil
	}
	for _, h := range n.Hypervisors {
		if h == s.Hypervisor {
			return nil
		}
	}
	return &Objection{Short: "no " + s.Hypervisor, Detail: fmt.Sprintf("the hypervisor %s does not work there; it has %v", s.Hypervisor, n.Hypervisors)}
}

func checkConstraints(_ *tables, n *blixard.Node, s *blixard.VMSpec) *Objection {
	for _, c := range s.Constraints {
		if !c.Holds(n) {
			have, ok := n.Label(c.Key)
			if !ok {
				have = "(not set)"
			}
			return &Objection{Short: "not " + c.String(), Detail: fmt.Sprintf("the constraint %s does not hold: %s is %s", c, c.Key, have)}
		}
	}
	return nil
}

func checkPorts(t *tables, n *blixard.Node, s *blixard.VMSpec) *Objection {
	for _, p := range s.Publish {
		if p.HostPort == 0 {
			continue
		}
		if _, taken := t.ports.Get(portKey(n.Name, p.Protocol, p.HostPort)); taken {
			return &Objection{Short: fmt.Sprintf("port %d taken", p.HostPort), Detail: fmt.Sprintf("port %d/%s is published there by another instance", p.HostPort, p.Protocol)}
		}
	}
	return nil
}

func checkAntiAffinity(t *tables, n *blixard.Node, s *blixard.VMSpec) *Objection {
	if s.AntiAffinityGroup == "" {
		return nil
	}
	if k, _ := t.groups.Get(s.AntiAffinityGroup + "\x00" + string(n.Name)); k > 0 {
		return &Objection{Short: "anti-affinity", Detail: "it runs an instance of the anti-affinity group " + s.AntiAffinityGroup}
	}
	return nil
}

func checkAffinity(t *tables, n *blixard.Node, s *blixard.VMSpec) *Objection {
	for _, name := range s.AffinityVMs {
		found := false
		prefix := string(n.Name) + "\x00" + string(name) + "\x00"
		t.byNode.Ascend(prefix, func(key string, i *blixard.Instance) bool {
			if len(key) < len(prefix) || key[:len(prefix)] != prefix {
				return false
			}
			found = i.Holds()
			return !found
		})
		if !found {
			return &Objection{Short: "affinity", Detail: "it runs no instance of " + string(name) + ", beside which this VM must run"}
		}
	}
	return nil
}
