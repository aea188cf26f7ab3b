package gateway

import (
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/schedule"
)

// unknownAgeMS is the age of what a node has never told.
const unknownAgeMS = 3_600_000

// choose ranks the nodes for a call that found no free instance here.
func (g *Gateway) choose(t target, chance uint64) []route.Choice {
	now := time.Now()
	candidates, known := g.candidates(t, now)
	// Who is not ranked has no room by what is known here: it is asked after the
	// others, as it may make room.
	for _, p := range schedule.RankFunction(t.view, g.request(t, known)) {
		for i := range candidates {
			if c := &candidates[i]; c.Node == p.Node && c.Fits {
				c.Score = 1 + int(max(p.Score, 0)/1000) // of a million
			}
		}
	}
	return route.Pick(candidates, t.view.SlotsLeased(t.function.Name) >= t.function.MaxConcurrent, chance)
}

func (g *Gateway) request(t target, known []schedule.FunctionNode) schedule.FunctionRequest {
	return schedule.FunctionRequest{Spec: &t.version.Spec, From: g.opt.Node, Nodes: known, OvercommitPercent: g.opt.OvercommitPercent}
}

// candidates are the nodes that may answer a call, and what is known of all, by
// name.
func (g *Gateway) candidates(t target, now time.Time) (out []route.Candidate, known []schedule.FunctionNode) {
	held := map[blixard.NodeName]bool{}
	t.view.SlotsOf(t.function.Name, func(s *blixard.FunctionSlots) bool {
		held[s.Node] = s.Count > 0
		return true
	})
	rev := t.revision()
	t.view.Nodes(func(n *blixard.Node) bool {
		if !n.RunsInstances() || n.Simulated || n.State != blixard.NodeReady {
			return true
		}
		c := route.Candidate{Node: n.Name, Local: n.Name == g.opt.Node, HasSlots: held[n.Name], Fits: schedule.FunctionObjection(n, &t.version.Spec) == nil}
		k := schedule.FunctionNode{Node: n.Name}
		load, age, rtt, ok := g.table.load(n.Name, n.Epoch, now)
		if c.Local {
			load, age, ok = g.localLoad(), 0, true
		}
		c.AgeMS, k.RTTMicros = age.Milliseconds(), rtt.Microseconds()
		if !ok {
			c.AgeMS = unknownAgeMS
		}
		k.MemoryMiB, k.MilliCPU = load.MemoryMiB, load.MilliCPU
		if l := load.of(rev); l != nil {
			c.Warm, c.SlotsFree, c.Pooled, c.HasTemplate = l.Warm, l.SlotsFree, l.Pooled, l.HasTemplate
			k.Template = l.HasTemplate
		}
		c.Fits = c.Fits && !load.Draining
		known = append(known, k)
		if (!c.Local || g.opt.Local != nil) && !g.table.isDown(n.Name, now) {
			out = append(out, c)
		}
		return true
	})
	return out, known
}

// Explain tells why an instance of what a qualifier stands for would start on
// one node and not on others, as this gateway sees it now.
func (g *Gateway) Explain(name blixard.FunctionName, qualifier string) ([]schedule.NodeVerdict, error) {
	t, err := find(g.opt.View(), name, qualifier)
	if err != nil {
		return nil, err
	}
	_, known := g.candidates(t, time.Now())
	return schedule.ExplainFunction(t.view, g.request(t, known)), nil
}
