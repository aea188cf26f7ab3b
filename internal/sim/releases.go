package sim

import (
	"errors"
	"fmt"
	"math"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/replica"
	"github.com/blixard/blixard/internal/state"
)

// Machines may run an older release: one that reports a lower feature level and
// has to end when the cluster works at a higher one. They are upgraded, and taken
// back to the old release, one by one at any moment. What an old release does not
// know must never reach it.
//
// The old release is this program told to know less. That it encodes and decides
// as that release did is not played; recordings of real ones are for that.
const oldLevel = 1

// install changes the release of a machine and starts it again.
func (m *machine) install(level int, afterMS int64) {
	m.w.say("%s gets the release of level %d", m.name, level)
	m.level = level
	m.kill()
	m.again(afterMS)
}

// rollingUpgrade upgrades one machine after another, from some machine on.
func rollingUpgrade(w *world, m *machine, f *Fault) {
	for i := range w.machines {
		x := w.machines[(m.at+i)%len(w.machines)]
		w.soon(int64(i)*(f.ForMS+1000), func() {
			if x.fs != nil && x.level < blixard.FeatureLevel {
				x.install(blixard.FeatureLevel, f.ForMS)
			}
		})
	}
}

// tooOld is a process whose release has to be replaced before it can go on.
func (m *machine) tooOld(err error) bool {
	if !errors.Is(err, replica.ErrTooOld) {
		return false
	}
	if m.level >= blixard.FeatureLevel {
		m.w.violated("the newest release knows the cluster", "%s: %v", m.name, err)
	}
	m.w.count["release too old"]++
	m.w.say("%s ends: %v", m.name, err)
	if m.proc != nil {
		m.kill()
	}
	m.level = blixard.FeatureLevel
	m.again(m.w.between(500, 3000))
	return true
}

// newCommand has somebody do what only the newest release knows.
func newCommand(w *world, _ *machine, f *Fault) {
	id := fmt.Sprintf("BLXA%016d", f.Arg)
	w.operator.do(&state.CreateAccessKey{Key: blixard.AccessKey{ID: id, Name: "k"}}, func(res state.Result) {
		switch {
		case res.Err == nil:
			w.count["new command taken"]++
			w.check.newer = min(w.check.newer, res.Outcome.Index)
		case res.Err.Code == blixard.CodeRefused:
			w.count["new command refused"]++
		}
	})
}

// allowed is the gate of internal/server: what not all nodes know is refused
// before it gets into the log. What was refused there for that has passed a gate.
func (p *process) allowed(cmd state.Command) *blixard.Error { return p.r.View().Allows(cmd) }

// raised: a cluster comes to use only what all its nodes have told to know that
// were not lost for long.
func (c *checker) raised(v *state.View) {
	if v.Cluster().FeatureLevel <= c.level {
		return
	}
	founded := c.level == 0
	c.level = v.Cluster().FeatureLevel
	v.Nodes(func(n *blixard.Node) bool {
		if n.FeatureLevel < c.level && !founded && state.CountsForLevel(n, v.Cluster().NowMS) {
			c.w.violated("S2 what a cluster uses all its nodes know", "the feature level is %d at entry %d, and %s knows %d", c.level, v.Index, n.Name, n.FeatureLevel)
		}
		return true
	})
}

// levels: what only the newest release knows was applied by nobody else.
func (c *checker) levels(p *process, applied uint64) {
	if p.m.level < blixard.FeatureLevel && applied >= c.newer {
		c.w.violated("S2 an old release applies what it knows", "%s, of level %d, applies entry %d, and %d holds what it does not know", p.m.name, p.m.level, applied, c.newer)
	}
}

// levelUnsettled tells whether the cluster does not use yet what all know.
func (c *checker) levelUnsettled(v *state.View) string {
	lowest := math.MaxInt
	v.Nodes(func(n *blixard.Node) bool { lowest = min(lowest, n.FeatureLevel); return true })
	if used := v.Cluster().FeatureLevel; lowest != used && !c.w.anyDead() {
		return fmt.Sprintf("the cluster works at feature level %d, and all know %d", used, lowest)
	}
	return ""
}
