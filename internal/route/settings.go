package route

import (
	"cmp"
	"slices"

	"github.com/blixard/blixard"
)

// Site is what a node knows of itself when it works out its settings.
type Site struct {
	Node blixard.NodeName
	// Workers are the nodes that instances may run on, in order.
	Workers []blixard.NodeName
	WallMS  int64
	// FreshMS is how long a deployment counts as a call; 1 h.
	FreshMS int64
	// RecycleCalls is for functions that say nothing of it.
	RecycleCalls int
}

// RevisionOf names the revision that a version of a function is now.
func RevisionOf(f *blixard.Function, v *blixard.FunctionVersion) Revision {
	return Revision{Function: v.Function, UID: f.UID, Number: v.Number, Seq: v.Seq}
}

// SettingsOf is what a node has to know of a callable version. clones: instances
// are made of a template that is here.
func (s *Site) SettingsOf(f *blixard.Function, v *blixard.FunctionVersion, clones bool) RevisionSettings {
	spec := &v.Spec
	r := RevisionSettings{
		Revision: RevisionOf(f, v), TargetConcurrency: max(spec.TargetConcurrency, 1), ChargeMiB: spec.MemoryMiB, ScaleDownMS: spec.ScaleDownDelayMS,
		Min: share(spec.MinInstances, s.Workers, s.Node, string(f.Name)), Burst: burst(spec.Burst, len(s.Workers)),
		RecycleCalls: cmp.Or(spec.RecycleCalls, s.RecycleCalls), GrowthMiB: spec.MemoryMiB / 2, TimeoutMS: spec.TimeoutMS,
		Fresh: s.WallMS-v.ModifiedMS < cmp.Or(s.FreshMS, 3_600_000), Clones: clones,
	}
	if spec.MaxInstances > 0 {
		r.SlotsPerInstance = (f.MaxConcurrent + spec.MaxInstances - 1) / spec.MaxInstances
	}
	return r
}

// share is how many of so many instances a node keeps: all nodes together keep
// all. Which nodes have one more depends on the function's name.
func share(count int, nodes []blixard.NodeName, self blixard.NodeName, salt string) int {
	at := slices.Index(nodes, self)
	if at < 0 || count <= 0 {
		return 0
	}
	first := 0
	for _, c := range []byte(salt) {
		first = (first*31 + int(c)) % len(nodes)
	}
	place := (at - first + len(nodes)) % len(nodes)
	mine := count / len(nodes)
	if place < count%len(nodes) {
		mine++
	}
	return mine
}

// burst is a node's part of what may be starting at once, 1 at least; 0 for no
// limit.
func burst(count, nodes int) int {
	if count <= 0 {
		return 0
	}
	return max(1, count/max(nodes, 1))
}
