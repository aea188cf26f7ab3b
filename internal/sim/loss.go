package sim

import (
	"fmt"
	"slices"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/replica"
	"github.com/blixard/blixard/internal/state"
)

// machineLost ends a machine for good: neither its disk nor what ran on it comes
// back before all must have come to rest without it, if ever. The cluster has to
// declare it lost, replace what ran there and give its vote to another one.
func machineLost(w *world, m *machine, f *Fault) {
	w.whenBorne(m, w.now+f.ForMS, func() { w.lose(m, f.Arg > 0) })
}

// whenBorne does something to a machine as soon as the cluster can do without it.
func (w *world) whenBorne(m *machine, untilMS int64, do func()) {
	switch {
	case w.faults.over || w.now > untilMS:
	case w.operator.bears(m):
		do()
	default:
		w.after(250, func() { w.whenBorne(m, untilMS, do) })
	}
}

// lose takes a machine away; it comes back after the next rest, or never.
func (w *world) lose(m *machine, returns bool) {
	w.count["machine dead"]++
	w.say("%s is lost for good (returns later: %t)", m.name, returns)
	m.powerCut()
	m.dead, m.returns = true, returns
}

// lostInRemoval loses a voter while another one is on its way out of the
// configuration: that one has to stay until the lost one was replaced.
func lostInRemoval(w *world, m *machine, f *Fault) {
	o := w.operator
	if !o.settled() {
		return
	}
	o.removing(m, f.ForMS, func() {
		for i := range w.machines {
			x := w.machines[(int(f.Arg)+i)%len(w.machines)]
			if x != m && votes(w.ruler(), x) && x != w.ruler() && o.bears(x) {
				w.count["voter lost in a removal"]++
				w.lose(x, true)
				return
			}
		}
	})
}

// votes tells whether a machine is a voter by what another one knows.
func votes(by, m *machine) bool {
	return by != nil && slices.Contains(by.proc.r.ConfState().GetVoters(), m.raftID)
}

// bears tells whether the cluster can do without a machine for ever: those that
// will come back, and know who votes, are a majority of the voters without it.
// While a member is on its way out somebody must be left to vote in its place, and
// who may be about to take the place of a voter cannot be spared.
func (o *operator) bears(m *machine) bool {
	r := o.w.ruler()
	if r == nil || m.dead || o.leaving != 0 && !o.goes {
		return false
	}
	conf := r.proc.r.ConfState()
	v := r.proc.r.View()
	voters, learners := 0, 0
	complete := o.w.check.voters
	if o.w.anyDead() {
		complete = o.w.check.votersUnsettled
	}
	votes := func(x *machine) bool { return slices.Contains(conf.GetVoters(), x.raftID) }
	for _, x := range o.w.machines {
		if x.dead || x == m {
			continue
		}
		if x.raftID == 0 || x.damaged || x.suspect || x.proc == nil || !replica.InConf(conf, x.raftID) || !slices.Equal(x.proc.r.ConfState().GetVoters(), conf.GetVoters()) {
			return false
		}
		if votes(x) {
			voters++
		} else if n := v.Node(x.name); n != nil && n.RaftID == x.raftID && n.State == blixard.NodeReady {
			learners++
		}
	}
	return m.raftID != 0 && (votes(m) || complete(r) == "") && voters > len(conf.GetVoters())/2 && (!o.goes || learners > 0 && votes(m))
}

// resurrect brings back machines that were not lost for ever.
func (w *world) resurrect() {
	for _, m := range w.machines {
		if m.dead && m.returns {
			w.count["machine back from the dead"]++
			m.dead = false
			m.again(w.between(0, 20_000))
		}
	}
}

// anyDead tells whether a machine is lost for good.
func (w *world) anyDead() bool {
	return slices.ContainsFunc(w.machines, func(m *machine) bool { return m.dead })
}

// deadUnsettled tells what is left to do about a machine that is lost for good:
// the cluster knows, and counts on nothing that ran there.
func (c *checker) deadUnsettled(m *machine, v *state.View) string {
	n := v.Node(m.name)
	if n == nil || n.RaftID != m.raftID {
		return ""
	}
	if n.State == blixard.NodeReady { // who has never reported is joining for ever, and holds nothing
		return fmt.Sprintf("%s is dead and %s", m.name, n.State)
	}
	why := ""
	v.InstancesOn(m.name, func(i *blixard.Instance) bool {
		if !i.State.Terminal() {
			why = fmt.Sprintf("%s is %s on %s, which is dead", i.Incarnation(), i.State, m.name)
		}
		return why == ""
	})
	return why
}

// votersUnsettled tells what is wrong with the configuration where machines are
// dead: their votes went to whoever is left to take them.
func (c *checker) votersUnsettled(r *machine) string {
	conf := r.proc.r.ConfState()
	dead, live, learners := 0, 0, 0
	for _, m := range c.w.machines {
		switch votes := slices.Contains(conf.GetVoters(), m.raftID); {
		case m.dead && votes:
			dead++
		case m.dead:
		case votes:
			live++
		default:
			learners++
		}
	}
	n := len(conf.GetVoters())
	if n != dead+live || n%2 == 0 || n > c.w.k.MaxVoters || dead > 0 && learners > 0 || live < min(c.w.k.MaxVoters, 3) && learners > 1 {
		return fmt.Sprintf("voters %v, learners %v: %d voters are dead, %d alive, %d learners alive", conf.GetVoters(), conf.GetLearners(), dead, live, learners)
	}
	return ""
}
