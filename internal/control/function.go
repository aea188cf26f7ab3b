package control

import (
	"cmp"
	"math"
	"slices"

	"github.com/tidwall/btree"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/schedule"
	"github.com/blixard/blixard/internal/state"
)

// functions is what a leader remembers about functions: where to look, and what
// it has tried. It can be lost at any time.
type functions struct {
	builds bool                        // versions that are to be built, or nodes that build, have changed
	events bool                        // events have no owner, or nodes that own some have changed
	level  bool                        // nodes have changed: the cluster may work at a higher level
	former btree.Set[blixard.NodeName] // nodes that may hold slots from before they were removed or replaced
	build  map[buildKey]*build
	wakeMS int64 // when to look at all of it without a cause
	turn   int   // where among the versions that wait to look first
	next   int   // who of the nodes takes events next
}

type buildKey struct {
	function blixard.FunctionName
	number   int
}

// build is what was tried to have a version built.
type build struct {
	seq      uint64
	node     blixard.NodeName // it was given to; "": to nobody
	epoch    uint64
	sinceMS  int64 // when it was given, or when it was seen first
	tried    []blixard.NodeName
	holdMS   int64 // nothing is proposed before
	proposed int   // how often in a row, without effect
}

// Times of builds.
const (
	buildMS         = 180_000 // what a build may take natively, besides the function's own initialisation
	initStretch     = 10      // initialisation takes so many times as long where it is emulated
	mostBuilders    = 3       // nodes that try to build a version before it has failed
	mostBuilds      = 4       // a node has at once; the rest waits, so that the time it takes is its own
	mostAssigned    = 200     // versions that a pass looks for a builder for
	noBuilderMS     = 60_000  // a version that no node can build has failed after that
	buildBackoffMS  = 1000    // after a node gave a build back; doubled each time
	takeAtOnce      = 200     // events that one node takes from a lost one in one command
	functionSweepMS = 5000
)

func newFunctions(v *state.View) functions {
	f := functions{builds: true, events: true, level: true, build: map[buildKey]*build{}, wakeMS: math.MinInt64}
	v.AllSlots(func(s *blixard.FunctionSlots) bool { f.former.Insert(s.Node); return true })
	return f
}

func (f *functions) seeNode(name blixard.NodeName) {
	f.builds, f.events, f.level = true, true, true
	f.former.Insert(name)
}

// lookAtFunctions does what functions need of the leader: builders for versions,
// owners for events, and the end of slots whose nodes are gone.
func (p *pass) lookAtFunctions() {
	f := &p.functions
	if p.now >= f.wakeMS {
		f.builds, f.events, f.level = true, true, true
	} else if !f.builds && !f.events && !f.level && f.former.Len() == 0 {
		return
	}
	if f.builds || f.events || f.level || p.now >= f.wakeMS {
		f.wakeMS = p.now + functionSweepMS
	}
	if f.level {
		f.level = false
		p.raiseLevel()
	}
	p.endFormerSlots()
	if f.builds {
		f.builds = false
		p.assignBuilds()
	}
	if f.events {
		f.events = false
		p.takeEvents()
	}
}

// wakeFunctions has functions looked at again then, or earlier.
func (p *pass) wakeFunctions(atMS int64) { p.functions.wakeMS = min(p.functions.wakeMS, atMS) }

// raiseLevel lets the cluster use what all of its nodes know.
func (p *pass) raiseLevel() {
	level := blixard.FeatureLevel
	if p.v.Cluster().FeatureLevel >= level {
		return
	}
	p.v.Nodes(func(n *blixard.Node) bool {
		if state.CountsForLevel(n, p.wall) {
			level = min(level, n.FeatureLevel)
		}
		return true
	})
	if level > p.v.Cluster().FeatureLevel {
		p.emit(&state.RaiseLevel{Level: level})
		p.wakeFunctions(p.now + 1000)
	}
}

// endFormerSlots returns what nodes held that were removed or replaced without
// having been declared lost, once their leases are over.
func (p *pass) endFormerSlots() {
	var names []blixard.NodeName
	p.functions.former.Scan(func(name blixard.NodeName) bool { names = append(names, name); return true })
	for _, name := range names {
		n := p.v.Node(name)
		var left []*blixard.FunctionSlots
		p.v.SlotsOn(name, func(s *blixard.FunctionSlots) bool {
			if n == nil || n.Epoch != s.NodeEpoch {
				left = append(left, s)
			}
			return true
		})
		if len(left) == 0 {
			p.functions.former.Delete(name)
			continue
		}
		if at := p.Leases.formerEndMS(p.v, name); p.now < at {
			p.wakeFunctions(at)
			continue
		}
		for _, s := range left {
			p.emit(&state.ReturnSlots{Function: s.Function, Node: s.Node, NodeEpoch: s.NodeEpoch, Count: s.Count})
		}
		p.wakeFunctions(p.now + 1000)
	}
}

// assignBuilds gives each version that is to be built to a node, and to another
// one when that is lost or takes too long.
func (p *pass) assignBuilds() {
	load := map[blixard.NodeName]int{}
	seen := map[buildKey]bool{}
	var waiting []*blixard.FunctionVersion
	p.v.PendingVersions(func(v *blixard.FunctionVersion) bool {
		if f := p.v.Function(v.Function); f == nil || f.Deleting {
			return true
		}
		seen[buildKey{v.Function, v.Number}] = true
		if p.builderWorks(v) {
			load[v.Builder]++
		} else {
			waiting = append(waiting, v)
		}
		return true
	})
	//order:any each is deleted by itself
	for key := range p.functions.build {
		if !seen[key] {
			delete(p.functions.build, key)
		}
	}
	for i := range waiting {
		if p.full() || i >= mostAssigned {
			p.functions.turn += i // those that cannot be built must not keep the rest waiting
			p.wakeFunctions(p.now + 100)
			return
		}
		p.assignBuild(waiting[(p.functions.turn+i)%len(waiting)], load)
	}
}

// builderWorks tells whether a version's builder is still to be waited for.
func (p *pass) builderWorks(v *blixard.FunctionVersion) bool {
	key := buildKey{v.Function, v.Number}
	b := p.functions.build[key]
	if b == nil || b.seq != v.Seq {
		b = &build{seq: v.Seq, sinceMS: p.now}
		p.functions.build[key] = b
	}
	if b.node != v.Builder || b.epoch != v.BuilderEpoch {
		if v.Builder == "" { // given back
			b.holdMS = p.now + buildBackoffMS<<min(len(b.tried), 6)
		} else {
			b.holdMS = 0
			if !slices.Contains(b.tried, v.Builder) {
				b.tried = append(b.tried, v.Builder)
			}
		}
		b.node, b.epoch, b.sinceMS, b.proposed = v.Builder, v.BuilderEpoch, p.now, 0
	}
	if v.Builder == "" {
		return false
	}
	n := p.v.Node(v.Builder)
	if n == nil || n.Epoch != v.BuilderEpoch || n.State != blixard.NodeReady {
		return false
	}
	end := b.sinceMS + buildMS + initStretch*v.Spec.InitMS
	if p.now < end {
		p.wakeFunctions(end)
		return true
	}
	return false
}

func (p *pass) assignBuild(v *blixard.FunctionVersion, load map[blixard.NodeName]int) {
	b := p.functions.build[buildKey{v.Function, v.Number}]
	if p.now < b.holdMS {
		p.wakeFunctions(b.holdMS)
		return
	}
	hold := func() {
		b.proposed = min(b.proposed+1, 6)
		b.holdMS = p.now + 100<<b.proposed
		p.wakeFunctions(b.holdMS)
	}
	if len(b.tried) >= mostBuilders {
		reason := v.StateReason
		if v.Builder != "" {
			reason = "its node was lost, or it took too long"
		}
		p.emit(&state.ReportFunction{
			Function: v.Function, Number: v.Number, Seq: v.Seq, State: blixard.FunctionFailed, Code: "Internal",
			Reason: "three nodes tried to build it; the last one, " + string(b.tried[len(b.tried)-1]) + ": " + reason,
		})
		hold()
		return
	}
	node, busy := p.builder(v, b, load)
	if busy {
		b.sinceMS = p.now
		return // one of them is ready some time
	}
	if node == nil {
		if p.now < b.sinceMS+noBuilderMS {
			p.wakeFunctions(min(b.sinceMS+noBuilderMS, p.now+functionSweepMS))
			return
		}
		p.emit(&state.ReportFunction{
			Function: v.Function, Number: v.Number, Seq: v.Seq, State: blixard.FunctionFailed, Code: "Capacity",
			Reason: "no node can build it: " + schedule.RefuseFunction(p.v, schedule.FunctionRequest{Spec: &v.Spec}).Summary,
		})
		hold()
		return
	}
	load[node.Name]++
	p.emit(&state.AssignBuild{Function: v.Function, Number: v.Number, Seq: v.Seq, Node: node.Name, NodeEpoch: node.Epoch})
	hold()
}

// builder chooses the node that builds least, one that has not tried before if
// there is one. busy: some could, and build enough already.
func (p *pass) builder(v *blixard.FunctionVersion, b *build, load map[blixard.NodeName]int) (best *blixard.Node, busy bool) {
	again := func(n *blixard.Node) int {
		if slices.Contains(b.tried, n.Name) {
			return 1
		}
		return 0
	}
	p.v.Nodes(func(n *blixard.Node) bool {
		if schedule.FunctionObjection(n, &v.Spec) != nil || n.Name == v.Builder && n.Epoch == v.BuilderEpoch {
			return true
		}
		if load[n.Name] >= mostBuilds {
			busy = true
			return true
		}
		if best == nil || cmp.Or(cmp.Compare(again(n), again(best)), cmp.Compare(load[n.Name], load[best.Name])) < 0 {
			best = n
		}
		return true
	})
	return best, best == nil && busy
}

// takeEvents gives the events of nodes that are lost, drained or gone, and those
// of nobody, to the others in turn.
func (p *pass) takeEvents() {
	var takers []*blixard.Node
	p.v.Nodes(func(n *blixard.Node) bool {
		if n.State == blixard.NodeReady && n.Availability == blixard.Active && n.RunsInstances() && !n.Simulated {
			takers = append(takers, n)
		}
		return true
	})
	if len(takers) == 0 {
		return
	}
	p.v.EventOwners(func(owner blixard.NodeName, epoch uint64) bool {
		n := p.v.Node(owner)
		if n != nil && n.Epoch == epoch && n.State == blixard.NodeReady && n.Availability != blixard.Draining {
			return true
		}
		count := 0
		p.v.EventsOwnedBy(owner, epoch, func(*blixard.AsyncEvent) bool { count++; return true })
		for ; count > 0; count -= takeAtOnce {
			to := takers[p.functions.next%len(takers)]
			p.functions.next++
			if !p.emit(&state.TakeEvents{From: owner, FromEpoch: epoch, Node: to.Name, NodeEpoch: to.Epoch, Most: takeAtOnce}) {
				return false
			}
		}
		p.wakeFunctions(p.now + 1000)
		return true
	})
}
