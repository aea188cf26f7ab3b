package state

import (
	"fmt"
	"slices"

	"github.com/blixard/blixard"
)

// Objection is why a node does not take an instance.
type Objection struct {
	Filter string // which rule: "state", "memory", …
	Short  string // for summaries: "too little memory"
	Detail string // with figures: "needs 512M, 100M free of 2G"
}

// Held tells what incarnations hold of nodes beyond plain amounts. The tables
// answer it for what is applied, a scheduler's index also for what it has
// decided since.
type Held interface {
	// PortTaken tells whether an incarnation publishes that port of the node.
	PortTaken(node blixard.NodeName, protocol string, port int) bool
	// GroupCount is how many incarnations of an anti-affinity group the node holds.
	GroupCount(group string, node blixard.NodeName) int
	// ReplicaCount is how many incarnations of a VM the node holds.
	ReplicaCount(node blixard.NodeName, vm blixard.VMName) int
}

// Case is one question: may an instance of Spec go to Node, which carries
// Usage, given what is held elsewhere?
type Case struct {
	Node  *blixard.Node
	Spec  *blixard.VMSpec
	Usage Usage
	Held  Held
}

// Scope tells what a filter looks at, so that an index knows what may be
// remembered.
type Scope uint8

// The scopes, from what changes least.
const (
	ScopeNode  Scope = iota + 1 // the node's row and the spec
	ScopeUsage                  // also Case.Usage
	ScopeHeld                   // also Case.Held
)

// Filter is one rule that a node must pass to take an instance of a spec. Fits
// is asked on every decision and allocates nothing; Explain is asked only for
// a case that does not fit.
type Filter struct {
	Name    string
	Scope   Scope
	Fits    func(c *Case) bool
	Explain func(c *Case) (short, detail string)
}

// filters in the order in which they are asked: the cheapest and most common
// objections first.
var filters = []Filter{
	{"state", ScopeNode, fitsState, explainState},
	{"resources", ScopeUsage, fitsResources, explainResources},
	{"instances", ScopeUsage, fitsInstances, explainInstances},
	{"hypervisor", ScopeNode, fitsHypervisor, explainHypervisor},
	{"constraints", ScopeNode, fitsConstraints, explainConstraints},
	{"ports", ScopeHeld, fitsPorts, explainPorts},
	{"anti-affinity", ScopeHeld, fitsAntiAffinity, explainAntiAffinity},
	{"affinity", ScopeHeld, fitsAffinity, explainAffinity},
}

// checks are the filters' tests by scope.
var checks = [...][]func(*Case) bool{ScopeNode: checksOf(ScopeNode), ScopeUsage: checksOf(ScopeUsage), ScopeHeld: checksOf(ScopeHeld)}

func checksOf(scope Scope) (out []func(*Case) bool) {
	for i := range filters {
		if filters[i].Scope == scope {
			out = append(out, filters[i].Fits)
		}
	}
	return out
}

// Fits tells whether the case passes the filters of one scope.
func (c *Case) Fits(scope Scope) bool {
	for _, fits := range checks[scope] {
		if !fits(c) {
			return false
		}
	}
	return true
}

// Objection is the first objection, nil if there is none.
func (c *Case) Objection() *Objection {
	for i := range filters {
		if f := &filters[i]; !f.Fits(c) {
			o := f.objection(c)
			return &o
		}
	}
	return nil
}

// Short is the first objection in few words, "" if there is none.
func (c *Case) Short() string {
	for i := range filters {
		if f := &filters[i]; !f.Fits(c) {
			short, _ := f.Explain(c)
			return short
		}
	}
	return ""
}

// Objections are all objections, one at most per filter.
func (c *Case) Objections() []Objection {
	var out []Objection
	for i := range filters {
		if f := &filters[i]; !f.Fits(c) {
			out = append(out, f.objection(c))
		}
	}
	return out
}

func (f *Filter) objection(c *Case) Objection {
	short, detail := f.Explain(c)
	return Objection{Filter: f.Name, Short: short, Detail: detail}
}

// admits returns the first objection of a node against an instance of a spec,
// nil if there is none. Placement asks it when deciding, and applying a
// placement asks it again.
func (t *tables) admits(n *blixard.Node, s *blixard.VMSpec) *Objection {
	c := t.question(n, s)
	return c.Objection()
}

func (t *tables) question(n *blixard.Node, s *blixard.VMSpec) Case {
	u, _ := t.usage.Get(n.Name)
	return Case{Node: n, Spec: s, Usage: u, Held: t}
}

// Case asks whether an instance of a spec may go to a node of this view.
func (v *View) Case(n *blixard.Node, s *blixard.VMSpec) Case { return v.t.question(n, s) }

// Admits returns the first objection of a node against an instance of a spec,
// nil if there is none.
func (v *View) Admits(n *blixard.Node, s *blixard.VMSpec) *Objection { return v.t.admits(n, s) }

// Objections returns every objection of a node, one at most per filter.
func (v *View) Objections(n *blixard.Node, s *blixard.VMSpec) []Objection {
	c := v.t.question(n, s)
	return c.Objections()
}

// PortTaken implements Held.
func (t *tables) PortTaken(node blixard.NodeName, protocol string, port int) bool {
	_, taken := t.ports.Get(portKey(node, protocol, port))
	return taken
}

// GroupCount implements Held.
func (t *tables) GroupCount(group string, node blixard.NodeName) int {
	n, _ := t.groups.Get(group + "\x00" + string(node))
	return n
}

// ReplicaCount implements Held.
func (t *tables) ReplicaCount(node blixard.NodeName, vm blixard.VMName) int {
	n := 0
	prefix := string(node) + "\x00" + string(vm) + "\x00"
	t.byNode.Ascend(prefix, func(key string, i *blixard.Instance) bool {
		if len(key) < len(prefix) || key[:len(prefix)] != prefix {
			return false
		}
		if i.Holds() {
			n++
		}
		return true
	})
	return n
}

func fitsState(c *Case) bool {
	return c.Node.RunsInstances() && c.Node.State == blixard.NodeReady && c.Node.Availability == blixard.Active
}

func explainState(c *Case) (short, detail string) {
	n := c.Node
	switch {
	case !n.RunsInstances():
		return "runs no VMs", "the node does not have the role hypervisor"
	case n.State == blixard.NodeJoining:
		return "joining", "its agent has not reported yet"
	case n.State == blixard.NodeLost:
		return "lost", "it is out of touch"
	case n.Availability == blixard.Draining:
		return "draining", "it is being drained: `blixard cluster uncordon " + string(n.Name) + "` ends that"
	}
	return "cordoned", "it is cordoned: `blixard cluster uncordon " + string(n.Name) + "` ends that"
}

func fitsResources(c *Case) bool {
	return c.Spec.Needs().Fits(c.Node.Allocatable().Sub(c.Usage.Used))
}

func explainResources(c *Case) (short, detail string) {
	has, need := c.Node.Allocatable(), c.Spec.Needs()
	free := has.Sub(c.Usage.Used)
	switch {
	case need.MemoryMiB > free.MemoryMiB:
		return "too little memory", fmt.Sprintf("needs %s of memory, %s of %s are free", blixard.FormatMiB(need.MemoryMiB), blixard.FormatMiB(free.MemoryMiB), blixard.FormatMiB(has.MemoryMiB))
	case need.MilliCPU > free.MilliCPU:
		return "too few vCPUs", fmt.Sprintf("needs %s vCPUs, %s of %s are free", cores(need.MilliCPU), cores(free.MilliCPU), cores(has.MilliCPU))
	}
	return "too little disk", fmt.Sprintf("needs %s of disk, %s of %s are free", blixard.FormatMiB(need.DiskMiB), blixard.FormatMiB(free.DiskMiB), blixard.FormatMiB(has.DiskMiB))
}

func cores(milli int64) string {
	if milli%1000 == 0 {
		return fmt.Sprint(milli / 1000)
	}
	return fmt.Sprintf("%d.%03d", milli/1000, milli%1000)
}

func fitsInstances(c *Case) bool {
	return c.Node.MaxInstances == 0 || c.Usage.Instances < c.Node.MaxInstances
}

func explainInstances(c *Case) (short, detail string) {
	return "full", fmt.Sprintf("it runs %d instances, the most it may (microvm.max_vms_per_node)", c.Usage.Instances)
}

func fitsHypervisor(c *Case) bool {
	if c.Spec.Hypervisor == "" {
		return true
	}
	return slices.Contains(c.Node.Hypervisors, c.Spec.Hypervisor)
}

func explainHypervisor(c *Case) (short, detail string) {
	return "no " + c.Spec.Hypervisor, fmt.Sprintf("the hypervisor %s does not work there; it has %v", c.Spec.Hypervisor, c.Node.Hypervisors)
}

func fitsConstraints(c *Case) bool {
	for i := range c.Spec.Constraints {
		if !c.Spec.Constraints[i].Holds(c.Node) {
			return false
		}
	}
	return true
}

func explainConstraints(c *Case) (short, detail string) {
	for _, x := range c.Spec.Constraints {
		if !x.Holds(c.Node) {
			have, ok := c.Node.Label(x.Key)
			if !ok {
				have = "(not set)"
			}
			return "not " + x.String(), fmt.Sprintf("the constraint %s does not hold: %s is %s", x, x.Key, have)
		}
	}
	return "", ""
}

func fitsPorts(c *Case) bool {
	for i := range c.Spec.Publish {
		if p := &c.Spec.Publish[i]; p.HostPort != 0 && c.Held.PortTaken(c.Node.Name, p.Protocol, p.HostPort) {
			return false
		}
	}
	return true
}

func explainPorts(c *Case) (short, detail string) {
	for _, p := range c.Spec.Publish {
		if p.HostPort != 0 && c.Held.PortTaken(c.Node.Name, p.Protocol, p.HostPort) {
			return fmt.Sprintf("port %d taken", p.HostPort), fmt.Sprintf("port %d/%s is published there by another instance", p.HostPort, p.Protocol)
		}
	}
	return "", ""
}

func fitsAntiAffinity(c *Case) bool {
	return c.Spec.AntiAffinityGroup == "" || c.Held.GroupCount(c.Spec.AntiAffinityGroup, c.Node.Name) == 0
}

func explainAntiAffinity(c *Case) (short, detail string) {
	return "anti-affinity", "it runs an instance of the anti-affinity group " + c.Spec.AntiAffinityGroup
}

func fitsAffinity(c *Case) bool {
	for _, name := range c.Spec.AffinityVMs {
		if c.Held.ReplicaCount(c.Node.Name, name) == 0 {
			return false
		}
	}
	return true
}

func explainAffinity(c *Case) (short, detail string) {
	for _, name := range c.Spec.AffinityVMs {
		if c.Held.ReplicaCount(c.Node.Name, name) == 0 {
			return "affinity", "it runs no instance of " + string(name) + ", beside which this VM must run"
		}
	}
	return "", ""
}
