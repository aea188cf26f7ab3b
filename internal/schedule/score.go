package schedule

import "github.com/blixard/blixard/internal/state"

// The scale of points: how free a node is (or how full, when packing) is worth
// up to wholeLoad, a preference of weight w as much as w percent of the load.
// Spreading the replicas of a VM over nodes, unless it packs, comes before
// both, spreading them over a label's values before that, and a node to be
// avoided is the last resort.
const (
	wholeLoad      = 1_000_000
	perWeight      = wholeLoad / 100
	perReplica     = -2 * wholeLoad
	perSpreadValue = -1_000 * wholeLoad
	avoided        = -1_000_000_000 * wholeLoad
)

// question is what scores look at.
type question struct {
	state.Case
	onNode  int64 // instances of the VM the node holds
	inValue int64 // instances of the VM that nodes with the same value of SpreadAcross hold
	avoid   bool
}

// score is one line of the table. Points of a scope below ScopeHeld are
// remembered per class of request, so they may look at Node, Spec and (for
// ScopeUsage) Usage only. Points of ScopeHeld look at the rest and are never
// positive: the search relies on it.
type score struct {
	name   string
	scope  state.Scope
	points func(q *question) int64
}

// scores are summed up.
var scores = []score{
	{"load", state.ScopeUsage, scoreLoad},
	{"preferences", state.ScopeNode, scorePreferences},
	{"replicas", state.ScopeHeld, scoreReplicas},
	{"spread", state.ScopeHeld, scoreSpread},
	{"avoid", state.ScopeHeld, scoreAvoid},
}

// lines are the table's functions by scope.
var lines = [...][]func(*question) int64{state.ScopeNode: linesOf(state.ScopeNode), state.ScopeUsage: linesOf(state.ScopeUsage), state.ScopeHeld: linesOf(state.ScopeHeld)}

func linesOf(scope state.Scope) (out []func(*question) int64) {
	for i := range scores {
		if scores[i].scope == scope {
			out = append(out, scores[i].points)
		}
	}
	return out
}

func (q *question) points(scope state.Scope) int64 {
	sum := int64(0)
	for _, points := range lines[scope] {
		sum += points(q)
	}
	return sum
}

// scoreLoad is the share of the node that is free with the instance on it, or
// taken when packing: the mean of vCPUs and memory.
func scoreLoad(q *question) int64 {
	has, after := q.Node.Allocatable(), q.Usage.Used.Add(q.Spec.Needs())
	taken := (share(after.MilliCPU, has.MilliCPU) + share(after.MemoryMiB, has.MemoryMiB)) / 2
	if q.Spec.Strategy == "binpack" {
		return taken
	}
	return wholeLoad - taken
}

// share is part of whole in parts of wholeLoad, bounded so that no absurd
// amount overflows.
func share(part, whole int64) int64 {
	const most = 1 << 40
	part, whole = min(max(part, 0), most), min(max(whole, 1), most)
	return min(part*wholeLoad/whole, 2*wholeLoad)
}

func scorePreferences(q *question) int64 {
	sum := int64(0)
	for i := range q.Spec.Preferences {
		if p := &q.Spec.Preferences[i]; p.Holds(q.Node) {
			sum += int64(p.Weight) * perWeight
		}
	}
	return sum
}

// scoreReplicas keeps a VM's replicas apart, unless its user wants it packed:
// then only a group or a label to spread over does.
func scoreReplicas(q *question) int64 {
	if q.Spec.Strategy == "binpack" {
		return 0
	}
	return q.onNode * perReplica
}

func scoreSpread(q *question) int64 {
	if q.Spec.SpreadAcross == "" {
		return 0
	}
	return q.inValue * perSpreadValue
}

func scoreAvoid(q *question) int64 {
	if q.avoid {
		return avoided
	}
	return 0
}
