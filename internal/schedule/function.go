package schedule

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// FunctionRequest asks for a node for one more instance of a function's version.
type FunctionRequest struct {
	Spec *blixard.FunctionSpec
	// From is the node that the call came in at; "": none is near.
	From blixard.NodeName
	// Nodes is what the caller knows of nodes beyond the view, sorted by name.
	// Nothing is known of a node that is not in it.
	Nodes []FunctionNode
	// OvercommitPercent says how much memory functions may be promised of what
	// VMs leave, in percent; below 100 it is 100.
	OvercommitPercent int
	// Avoid are nodes that are taken only when no other fits.
	Avoid []blixard.NodeName
}

// FunctionNode is what a caller knows of a node.
type FunctionNode struct {
	Node blixard.NodeName
	// What instances of functions hold there.
	MemoryMiB int64
	MilliCPU  int64
	// RTTMicros is the round trip from FunctionRequest.From, below 0 or 0 for
	// another node if unknown.
	RTTMicros int64
	// Template: the version's template is there, so that a start is quick.
	Template bool
}

// weights of the parts, when the user chose no strategy.
const (
	weightResources      = 30
	weightLocality       = 30
	weightProximity      = 20
	weightSpecialisation = 20
	// What the user's preferences weigh beside strategies.
	weightPreferred = 20
)

// What is assumed of nodes that were never measured.
const (
	sameZoneMicros  = 500
	otherZoneMicros = 5000
	halfwayMicros   = 1000 // a round trip this long gives half of the points
)

// functionQuestion is one node asked about one request.
type functionQuestion struct {
	v     *state.View
	n     *blixard.Node
	r     *FunctionRequest
	known FunctionNode
	vms   state.Usage
	zones []string // of nodes with the data of each hint: see hintZones
}

// FunctionObjection is why a node can never run or build a function, whatever it
// holds; nil if it can.
func FunctionObjection(n *blixard.Node, s *blixard.FunctionSpec) *state.Objection {
	if n.State == blixard.NodeReady && n.Availability == blixard.Active && n.RunsInstances() && !n.Simulated && len(n.Hypervisors) > 0 {
		ok := s.MemoryMiB <= n.Allocatable().MemoryMiB
		for i := range s.Placement.Constraints {
			ok = ok && s.Placement.Constraints[i].Holds(n)
		}
		if ok {
			return nil
		}
	}
	all := functionObjections(n, s)
	return &all[0]
}

// functionObjections are all of them, in the order in which they are asked.
func functionObjections(n *blixard.Node, s *blixard.FunctionSpec) (out []state.Objection) {
	probe := blixard.VMSpec{Constraints: s.Placement.Constraints}
	c := state.Case{Node: n, Spec: &probe, Held: nothingHeld{}}
	for _, o := range c.Objections() {
		if o.Filter == "state" || o.Filter == "constraints" {
			out = append(out, o)
		}
	}
	if n.Simulated || len(n.Hypervisors) == 0 {
		out = append(out, state.Objection{Filter: "hypervisor", Short: "no hypervisor", Detail: "no hypervisor works there: `blixard doctor` on it says why"})
	}
	if has := n.Allocatable().MemoryMiB; s.MemoryMiB > has {
		out = append(out, state.Objection{
			Filter: "memory", Short: "too little memory",
			Detail: fmt.Sprintf("an instance has %s of memory, more than the whole node: %s", blixard.FormatMiB(s.MemoryMiB), blixard.FormatMiB(max(has, 0))),
		})
	}
	return out
}

type nothingHeld struct{}

func (nothingHeld) PortTaken(blixard.NodeName, string, int) bool      { return false }
func (nothingHeld) GroupCount(string, blixard.NodeName) int           { return 0 }
func (nothingHeld) ReplicaCount(blixard.NodeName, blixard.VMName) int { return 0 }

// promised is how much memory functions may have on the node in all: what
// reserved VMs leave, times the overcommitment.
func (q *functionQuestion) promised() int64 {
	left := max(q.n.Allocatable().MemoryMiB-q.vms.Used.MemoryMiB, 0)
	const most = 1 << 40
	return min(left, most) * int64(min(max(q.r.OvercommitPercent, 100), 100_000)) / 100
}

func (q *functionQuestion) fits() bool {
	return q.hasRoom() && FunctionObjection(q.n, q.r.Spec) == nil
}

func (q *functionQuestion) hasRoom() bool {
	return q.known.MemoryMiB+q.r.Spec.MemoryMiB <= q.promised()
}

func (q *functionQuestion) objections() []state.Objection {
	out := functionObjections(q.n, q.r.Spec)
	if !q.hasRoom() && !slices.ContainsFunc(out, func(o state.Objection) bool { return o.Filter == "memory" }) {
		out = append(out, state.Objection{
			Filter: "memory", Short: "too little memory",
			Detail: fmt.Sprintf("needs %s of memory; functions hold %s of the %s that VMs leave them", blixard.FormatMiB(q.r.Spec.MemoryMiB), blixard.FormatMiB(q.known.MemoryMiB), blixard.FormatMiB(q.promised())),
		})
	}
	return out
}

// free is the share of the node that nothing holds with the instance on it: the
// mean of memory and vCPUs.
func (q *functionQuestion) free() int64 {
	has, held := q.n.Allocatable(), q.vms.Used
	memory := held.MemoryMiB + q.known.MemoryMiB + q.r.Spec.MemoryMiB
	cpu := held.MilliCPU + q.known.MilliCPU + int64(q.r.Spec.VCPUs)*1000
	return wholeLoad - min((share(memory, has.MemoryMiB)+share(cpu, has.MilliCPU))/2, wholeLoad)
}

// locality is how many of the data hints point to the node, half for those that
// point to its zone; without hints, whether the function's template is there.
func (q *functionQuestion) locality() int64 {
	hints := q.r.Spec.Placement.DataHints
	if len(hints) == 0 {
		if q.known.Template {
			return wholeLoad
		}
		return 0
	}
	sum := int64(0)
	for i, h := range hints {
		switch {
		case holdsData(q.n, h):
			sum += wholeLoad
		case q.n.Zone != "" && strings.Contains(q.zones[i], "\x00"+q.n.Zone+"\x00"):
			sum += wholeLoad / 2
		}
	}
	return sum / int64(len(hints))
}

// holdsData tells whether a node has what a data hint names: "node:NAME",
// "zone:NAME", "label:KEY=VALUE" (any constraint), or, for "ceph-pool:NAME" and
// "path:/DIR", a label of that key that lists it (separated by spaces, ';' or
// '+'), or a label "ceph-pool/NAME" that is not "false".
func holdsData(n *blixard.Node, hint string) bool {
	kind, value, ok := blixard.ParseDataHint(hint)
	if !ok {
		return false
	}
	switch kind {
	case "node":
		return string(n.Name) == value
	case "zone":
		return n.Zone == value
	case "label":
		constraints, err := blixard.ParseConstraints(value)
		return err == nil && !slices.ContainsFunc(constraints, func(c blixard.Constraint) bool { return !c.Holds(n) })
	}
	if v, ok := n.Label(kind + "/" + value); ok && v != "false" {
		return true
	}
	list, _ := n.Label(kind)
	for part := range strings.FieldsFuncSeq(list, func(r rune) bool { return r == ' ' || r == ';' || r == '+' }) {
		if part == value || kind == "path" && strings.HasPrefix(value, strings.TrimSuffix(part, "/")+"/") {
			return true
		}
	}
	return false
}

// hintZones are, for each data hint, the zones of the nodes that have the data.
func hintZones(v *state.View, hints []string) []string {
	zones := make([]string, len(hints))
	if len(hints) == 0 {
		return nil
	}
	v.Nodes(func(n *blixard.Node) bool {
		for i, h := range hints {
			if n.Zone != "" && holdsData(n, h) {
				zones[i] += "\x00" + n.Zone + "\x00"
			}
		}
		return true
	})
	return zones
}

// proximity falls with the round trip from the node where the call came in.
func (q *functionQuestion) proximity() int64 {
	from := q.v.Node(q.r.From)
	rtt := q.known.RTTMicros
	switch {
	case from == nil:
		return 0
	case from == q.n:
		rtt = 0
	case rtt <= 0 && from.Zone == q.n.Zone:
		rtt = sameZoneMicros
	case rtt <= 0:
		rtt = otherZoneMicros
	}
	return wholeLoad * halfwayMicros / (halfwayMicros + min(rtt, 1<<40))
}

// specialisation is the share of the user's preferences that hold.
func (q *functionQuestion) specialisation() int64 {
	met, all := int64(0), int64(0)
	for i := range q.r.Spec.Placement.Preferences {
		p := &q.r.Spec.Placement.Preferences[i]
		all += int64(p.Weight)
		if p.Holds(q.n) {
			met += int64(p.Weight)
		}
	}
	if all == 0 {
		return 0
	}
	return met * wholeLoad / all
}

// points are the parts of the score; their sum is the score.
func (q *functionQuestion) points() []Points {
	s := &q.r.Spec.Placement
	var out []Points
	if len(s.Strategies) == 0 {
		out = []Points{
			{"resources", q.free() * weightResources / 100},
			{"data locality", q.locality() * weightLocality / 100},
			{"network proximity", q.proximity() * weightProximity / 100},
			{"specialisation", q.specialisation() * weightSpecialisation / 100},
		}
	} else {
		rest := int64(100)
		if len(s.Preferences) > 0 {
			rest -= weightPreferred
		}
		for _, name := range s.Strategies {
			out = append(out, Points{name, q.strategy(name) * rest / 100 / int64(len(s.Strategies))})
		}
		if len(s.Preferences) > 0 {
			out = append(out, Points{"specialisation", q.specialisation() * weightPreferred / 100})
		}
	}
	if slices.Contains(q.r.Avoid, q.n.Name) {
		out = append(out, Points{"avoid", avoided})
	}
	return out
}

func (q *functionQuestion) strategy(name string) int64 {
	switch name {
	case "best-fit":
		return wholeLoad - q.free()
	case "load-balanced":
		return q.free()
	case "data-locality":
		return q.locality()
	case "network-proximity":
		return q.proximity()
	}
	return 0
}

// eachNode calls yield with the question for each node, by name.
func (r *FunctionRequest) eachNode(v *state.View, yield func(q *functionQuestion)) {
	zones := hintZones(v, r.Spec.Placement.DataHints)
	v.Nodes(func(n *blixard.Node) bool {
		q := functionQuestion{v: v, n: n, r: r, vms: v.Usage(n.Name), zones: zones}
		if at, ok := slices.BinarySearchFunc(r.Nodes, n.Name, func(k FunctionNode, name blixard.NodeName) int { return cmp.Compare(k.Node, name) }); ok {
			q.known = r.Nodes[at]
		}
		yield(&q)
		return true
	})
}

// RankFunction returns the nodes that take an instance, the best first, equal
// ones by name. None: RefuseFunction and ExplainFunction say why.
func RankFunction(v *state.View, r FunctionRequest) []Placement {
	var out []Placement
	r.eachNode(v, func(q *functionQuestion) {
		if !q.fits() {
			return
		}
		p := Placement{Node: q.n.Name, Epoch: q.n.Epoch}
		for _, part := range q.points() {
			p.Score += part.Points
		}
		out = append(out, p)
	})
	slices.SortStableFunc(out, func(a, b Placement) int { return cmp.Compare(b.Score, a.Score) })
	return out
}

// ExplainFunction asks every node of a view, by name, about one more instance.
// What it chooses is the first that RankFunction returns.
func ExplainFunction(v *state.View, r FunctionRequest) []NodeVerdict {
	var out []NodeVerdict
	chosen := -1
	r.eachNode(v, func(q *functionQuestion) {
		d := NodeVerdict{Node: q.n.Name, Objections: q.objections(), Points: q.points()}
		d.Fits = len(d.Objections) == 0
		for _, p := range d.Points {
			d.Score += p.Points
		}
		if d.Fits && (chosen < 0 || d.Score > out[chosen].Score) {
			chosen = len(out)
		}
		out = append(out, d)
	})
	if chosen >= 0 {
		out[chosen].Chosen = true
	}
	return out
}

// RefuseFunction explains in one line why no node takes an instance:
// "0/3 nodes fit: 2 too little memory, 1 draining".
func RefuseFunction(v *state.View, r FunctionRequest) Refusal {
	by := map[string]*Reason{}
	var reasons []*Reason
	r.eachNode(v, func(q *functionQuestion) {
		short := ""
		if all := q.objections(); len(all) > 0 {
			short = all[0].Short
		}
		if by[short] == nil {
			by[short] = &Reason{Short: short, Example: q.n.Name}
			reasons = append(reasons, by[short])
		}
		by[short].Nodes++
	})
	return summarize(v.NodeCount(), reasons)
}
