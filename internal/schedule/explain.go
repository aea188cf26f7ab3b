package schedule

import (
	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// NodeVerdict is what a node says to one more instance of a VM.
type NodeVerdict struct {
	Node       blixard.NodeName
	Fits       bool
	Objections []state.Objection // one at most per filter; none if it fits
	Score      int64             // the sum of Points
	Points     []Points          // line by line of the table of scores
	Chosen     bool              // the best of those that fit
}

// Explain asks every node of a view, by name, about one more instance of a VM.
// It is the exhaustive search that an Index shortens.
func Explain(v *state.View, r Request) []NodeVerdict {
	var out []NodeVerdict
	chosen := -1
	onNode, inValue := replicas(v, r)
	v.Nodes(func(n *blixard.Node) bool {
		q := question{Case: v.Case(n, r.Spec), onNode: onNode[n.Name]}
		if r.Spec.SpreadAcross != "" {
			q.inValue = inValue[spreadValue(n, r.Spec.SpreadAcross)]
		}
		for _, a := range r.Avoid {
			q.avoid = q.avoid || a == n.Name
		}
		d := NodeVerdict{Node: n.Name, Objections: q.Objections()}
		d.Fits = len(d.Objections) == 0
		for i := range scores {
			p := scores[i].points(&q)
			d.Points = append(d.Points, Points{scores[i].name, p})
			d.Score += p
		}
		if d.Fits && (chosen < 0 || d.Score > out[chosen].Score) {
			chosen = len(out)
		}
		out = append(out, d)
		return true
	})
	if chosen >= 0 {
		out[chosen].Chosen = true
	}
	return out
}

// replicas counts the instances of the VM that hold a node, by node and by
// value of the label to spread over.
func replicas(v *state.View, r Request) (onNode map[blixard.NodeName]int64, inValue map[string]int64) {
	onNode, inValue = map[blixard.NodeName]int64{}, map[string]int64{}
	v.InstancesOf(r.VM, func(i *blixard.Instance) bool {
		if i.Holds() {
			onNode[i.Node]++
			if n := v.Node(i.Node); n != nil && r.Spec.SpreadAcross != "" {
				inValue[spreadValue(n, r.Spec.SpreadAcross)]++
			}
		}
		return true
	})
	return onNode, inValue
}

// Refuse is the refusal of a request by every node of a view; its summary
// counts the nodes that fit, if any.
func Refuse(v *state.View, s *blixard.VMSpec) Refusal {
	by := map[string]*Reason{}
	var reasons []*Reason
	v.Nodes(func(n *blixard.Node) bool {
		c := v.Case(n, s)
		short := c.Short()
		if by[short] == nil {
			by[short] = &Reason{Short: short, Example: n.Name}
			reasons = append(reasons, by[short])
		}
		by[short].Nodes++
		return true
	})
	return summarize(v.NodeCount(), reasons)
}
