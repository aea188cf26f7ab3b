package sim

import (
	"slices"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/converge"
	"github.com/blixard/blixard/internal/state"
)

// faults carries out what the schedule says.
type faults struct {
	w    *world
	over bool // nothing goes wrong now
	// voteCrash: how often a machine that has just voted loses power.
	voteCrash, voteCut int
	// startPauses: how often a process is stopped, for how long, in the middle of
	// starting what may run under a lease only.
	startPauses  int
	startPauseMS int64
}

// kinds is the table of faults.
var kinds = []kind{
	{mendKind, "", nil, nil}, // see world.run

	{"kill", "process", down, func(_ *world, m *machine, f *Fault) { m.kill(); m.again(f.ForMS) }},
	{"power cut", "power", down, func(_ *world, m *machine, f *Fault) { m.powerCut(); m.again(f.ForMS) }},
	{"power cut, files deleted", "power", down, func(w *world, m *machine, f *Fault) {
		m.powerCut()
		m.hyp.deleted()
		m.again(f.ForMS)
	}},
	{"blackout", "blackout", down, blackout},
	{"crash after a vote", "vote", func(d *drawer, f *Fault) { f.Arg, f.Arg2 = d.between(1, 3), d.between(0, 1) }, func(w *world, _ *machine, f *Fault) { w.faults.voteCrash, w.faults.voteCut = int(f.Arg), int(f.Arg2) }},

	{"machine lost", "loss", func(d *drawer, f *Fault) { f.ForMS, f.Arg = 15_000, d.between(0, 2) }, machineLost},
	{"machine lost in a removal", "loss", func(d *drawer, f *Fault) { f.ForMS, f.Arg = d.between(0, 4000), d.Int64N(9) }, lostInRemoval},

	{"disk error", "disk", forBetween(100, 6000), func(w *world, m *machine, f *Fault) { diskFault(w, m, f, errDisk) }},
	{"fsync error", "disk", forBetween(100, 6000), fsyncFault},
	{"disk full", "disk", forBetween(100, 9000), func(w *world, m *machine, f *Fault) { diskFault(w, m, f, errFull) }},
	{"slow disk", "disk", func(d *drawer, f *Fault) { f.ForMS, f.Arg = d.between(500, 8000), d.between(50, 1000) }, slowDisk},
	{"bit flip", "decay", func(d *drawer, f *Fault) {
		f.ForMS, f.Arg, f.Arg2 = d.between(0, 3000), d.Int64N(1<<40), d.Int64N(1<<40)
	}, bitFlip},
	{"bit rot", "decay", func(d *drawer, f *Fault) {
		f.ForMS, f.Arg, f.Arg2 = d.between(100, 5000), d.Int64N(1<<40), d.Int64N(1<<40)
	}, bitRot},
	{"misdirected write", "decay", func(d *drawer, f *Fault) {
		f.ForMS, f.Arg, f.Arg2 = d.between(0, 3000), d.Int64N(1<<40), d.Int64N(1<<40)
	}, misdirected},
	{"disk lost", "decay", forBetween(0, 5000), diskLost},
	{"old disk", "decay", forBetween(500, 5000), func(w *world, m *machine, f *Fault) { w.operator.revive(m, f.ForMS) }},

	{"partition", "partition", func(d *drawer, f *Fault) { f.ForMS, f.Nodes = d.between(200, 12_000), d.some(30) }, partition},
	{"deaf", "one-way", forBetween(200, 10_000), func(w *world, m *machine, f *Fault) {
		w.net.shut(f.ForMS, func(from, to *machine) bool { return to == m })
	}},
	{"dumb", "one-way", forBetween(200, 10_000), func(w *world, m *machine, f *Fault) {
		w.net.shut(f.ForMS, func(from, to *machine) bool { return from == m })
	}},
	{"one-way cut", "one-way", func(d *drawer, f *Fault) { f.ForMS, f.Nodes = d.between(200, 10_000), []string{d.node()} }, func(w *world, m *machine, f *Fault) {
		w.net.shut(f.ForMS, func(from, to *machine) bool { return from == m && slices.Contains(f.Nodes, string(to.name)) })
	}},
	{"bad network", "messages", func(d *drawer, f *Fault) {
		f.ForMS, f.Arg, f.Arg2 = d.between(1000, 20_000), d.Int64N(30), d.Int64N(40)
	}, badNetwork},
	{"slow network", "messages", func(d *drawer, f *Fault) { f.ForMS, f.Arg = d.between(1000, 20_000), d.between(20, 400) }, slowNetwork},
	{"slow link", "slow link", func(d *drawer, f *Fault) {
		f.ForMS, f.Arg, f.Nodes = d.between(500, 15_000), d.between(50, 3000), d.some(40)
	}, slowLink},

	{"narrow link", "slow link", func(d *drawer, f *Fault) {
		f.ForMS, f.Arg, f.Nodes = d.between(1000, 15_000), []int64{d.between(1, 30), d.between(30, 600)}[d.IntN(2)], d.some(60)
	}, narrowLink},
	{"late answers", "late", func(d *drawer, f *Fault) {
		f.ForMS, f.Arg, f.Arg2 = d.between(8000, 15_000), d.between(2000, 4800), d.between(500, 4000)
	}, lateAnswers},
	{"leader believed", "late", func(d *drawer, f *Fault) {
		f.ForMS, f.Arg, f.Arg2, f.Node = d.between(8000, 16_000), d.between(2000, 5000), d.Int64N(9), "leader"
	}, leaderBelieved},

	{"pause", "pause", func(d *drawer, f *Fault) {
		f.ForMS = []int64{d.between(20, 900), d.between(1000, 4000), d.between(4000, 12_000)}[d.IntN(3)]
	}, func(_ *world, m *machine, f *Fault) { m.pause(f.ForMS) }},
	{"pause in a start", "pause", func(d *drawer, f *Fault) { f.ForMS, f.Arg = d.between(3000, 12_000), d.between(1, 3) }, func(w *world, _ *machine, f *Fault) {
		w.faults.startPauses, w.faults.startPauseMS = int(f.Arg), f.ForMS
	}},
	{"clocks apart", "clock", func(d *drawer, f *Fault) {
		f.ForMS, f.Arg, f.Arg2 = d.between(5000, 12_000), d.between(60, 80), d.between(0, 3000)
	}, clocksApart},
	{"wall clock jump", "clock", func(d *drawer, f *Fault) { f.Arg = d.between(-3_600_000, 3_600_000) }, func(_ *world, m *machine, f *Fault) { m.skewMS += f.Arg }},
	{"clock step", "clock", func(d *drawer, f *Fault) { f.Arg = d.between(-500, 500) }, func(_ *world, m *machine, f *Fault) { m.skewMS += f.Arg }},
	{"clock rate", "clock", func(d *drawer, f *Fault) { f.Arg = d.between(-80, 80) }, func(_ *world, m *machine, f *Fault) { m.setRate(1000 + f.Arg) }},

	{"hypervisor dies", "guest", whichGuest, func(w *world, m *machine, f *Fault) {
		if v := m.hyp.pick(f.Arg); v != nil {
			m.hyp.end(v, "it crashed", false)
		}
	}},
	{"guest shuts down", "guest", whichGuest, func(w *world, m *machine, f *Fault) {
		if v := m.hyp.pick(f.Arg); v != nil {
			m.hyp.end(v, "guest shut down", true)
		}
	}},
	{"guest's command ends", "guest", func(d *drawer, f *Fault) { f.Arg, f.Arg2 = d.Int64N(1<<30), d.Int64N(2) }, commandEnds},
	{"guest clings", "guest", whichGuest, func(w *world, m *machine, f *Fault) {
		if v := m.hyp.pick(f.Arg); v != nil {
			v.clings = true
		}
	}},
	{"starts fail", "hypervisor", times(3), func(_ *world, m *machine, f *Fault) { m.hyp.failStarts += int(f.Arg) }},
	{"starts slow", "hypervisor", times(4), func(_ *world, m *machine, f *Fault) { m.hyp.slowStarts += int(f.Arg) }},
	{"starts die", "hypervisor", times(3), func(_ *world, m *machine, f *Fault) { m.hyp.dieStarts += int(f.Arg) }},
	{"guests never answer", "hypervisor", times(2), func(_ *world, m *machine, f *Fault) { m.hyp.deafGuests += int(f.Arg) }},
	{"stops hang", "hypervisor", times(3), func(_ *world, m *machine, f *Fault) { m.hyp.hangStops += int(f.Arg) }},
	{"kills fail", "hypervisor", times(3), func(_ *world, m *machine, f *Fault) { m.hyp.failKills += int(f.Arg) }},
	{"lists fail", "hypervisor", times(4), func(_ *world, m *machine, f *Fault) { m.hyp.failLists += int(f.Arg) }},
	{"changes late", "hypervisor", forBetween(500, 4000), func(_ *world, m *machine, f *Fault) { m.hyp.lateMS = f.ForMS }},

	{"second scheduler", "scheduler", func(*drawer, *Fault) {}, secondScheduler},

	{"remove and take back", "members", forBetween(0, 4000), func(w *world, m *machine, f *Fault) { w.operator.remove(m, f.ForMS) }},
	{"replace in place", "members", forBetween(0, 1000), diskLost},

	{"upgrade", "upgrade", down, func(_ *world, m *machine, f *Fault) { m.install(blixard.FeatureLevel, f.ForMS) }},
	{"rolling upgrade", "upgrade", forBetween(200, 4000), rollingUpgrade},
	{"downgrade", "upgrade", down, func(_ *world, m *machine, f *Fault) { m.install(oldLevel, f.ForMS) }},
	{"new command", "upgrade", func(d *drawer, f *Fault) { f.Arg = d.Int64N(1 << 40) }, newCommand},

	{"function's guest dies", "function", whichGuest, functionGuestDies},
	{"function starts fail", "function", times(3), func(_ *world, m *machine, f *Fault) { m.guests.failStarts += int(f.Arg) }},
	{"function starts slow", "function", times(3), func(_ *world, m *machine, f *Fault) { m.guests.slowStarts += int(f.Arg) }},
	{"functions hang", "function", times(2), func(_ *world, m *machine, f *Fault) { m.guests.hangs += int(f.Arg) }},
	{"functions die", "function", times(2), func(_ *world, m *machine, f *Fault) { m.guests.deaths += int(f.Arg) }},
	{"function kills fail", "function", times(3), func(_ *world, m *machine, f *Fault) { m.guests.failKills += int(f.Arg) }},
	{"builds fail", "function", times(1), func(_ *world, m *machine, f *Fault) { m.guests.failBuilds += int(f.Arg) }},
	{"function's node cut off", "function", forBetween(3000, 12_000), functionCutOff},
	{"storm of calls", "function", times(30), stormOfCalls},
	{"power cut in a write", "function", down, func(w *world, m *machine, f *Fault) { powerCutInAWrite(w, m, f, 500) }},

	{"drain", "operator", forBetween(2000, 15_000), func(w *world, m *machine, f *Fault) { availability(w, m, f, blixard.Draining) }},
	{"cordon", "operator", forBetween(2000, 15_000), func(w *world, m *machine, f *Fault) { availability(w, m, f, blixard.Cordoned) }},
	{"maintenance", "operator", forBetween(1000, 10_000), func(w *world, _ *machine, f *Fault) {
		w.operator.do(&state.SetMaintenance{On: true}, func(state.Result) {
			w.after(f.ForMS, func() { w.operator.do(&state.SetMaintenance{}, func(state.Result) {}) })
		})
	}},
	{"transfer leader", "operator", func(*drawer, *Fault) {}, func(w *world, m *machine, _ *Fault) {
		if r := w.ruler(); r != nil && m.raftID != 0 {
			r.proc.enter(func() { r.proc.r.TransferLeader(m.raftID) })
		}
	}},
	{"snapshot", "operator", func(*drawer, *Fault) {}, func(_ *world, m *machine, _ *Fault) {
		if m.proc != nil && !m.paused() && !m.proc.loop.Snapshotting() && m.proc.r.View().Index > m.proc.loop.LastSnapshot() {
			m.proc.write()
		}
	}},
}

func whichGuest(d *drawer, f *Fault) { f.Arg = d.Int64N(1 << 30) }

// times draws how often something is to happen, at most so often.
func times(most int64) func(*drawer, *Fault) {
	return func(d *drawer, f *Fault) { f.Arg = d.between(1, most) }
}

// happen has a fault happen.
func (f *faults) happen(x *Fault) {
	w := f.w
	if f.over {
		return // its time was taken by coming to rest
	}
	m := w.machine(blixard.NodeName(x.Node))
	if x.Node == "leader" {
		if m = w.ruler(); m == nil {
			m = w.machines[int(x.AtMS)%len(w.machines)]
		}
	}
	if m == nil {
		return // shrunk away
	}
	w.pace = 1
	w.count[x.Kind]++
	w.say("fault: %s (%s)", x, m.name)
	kindOf(x.Kind).do(w, m, x)
}

// mend has everything go well again.
func (f *faults) mend() {
	w := f.w
	w.say("nothing goes wrong any more")
	w.net.mend()
	f.voteCrash, f.startPauses = 0, 0
	for _, m := range w.machines {
		m.syncMS = w.k.SyncMS
		m.hyp.mend()
		if m.fs != nil {
			m.fs.Fault = nil
		}
		if m.paused() {
			m.lastPause.ms -= m.pausedUntil - w.now
			m.pausedUntil, m.lastPause.untilMS = w.now, w.now
			m.proc.resumed()
		}
		m.start()
	}
	w.operator.recall()
}

// voted cuts the power of a machine that has just given its vote, and may keep
// it from hearing of the outcome.
func (f *faults) voted(m *machine, candidate uint64) {
	if f.voteCrash <= 0 || f.over {
		return
	}
	f.voteCrash--
	p := m.proc
	f.w.after(0, func() {
		if !p.alive() || f.over {
			return
		}
		f.w.count["vote crash"]++
		m.powerCut()
		m.again(f.w.between(0, 50))
		if c := f.w.byRaftID(candidate); c != nil && f.voteCut > 0 {
			f.w.net.shut(f.w.between(200, 6000), func(from, to *machine) bool { return from == c && to == m })
		}
	})
}

// starting stops a process that has begun a start.
func (f *faults) starting(m *machine) {
	if f.startPauses > 0 && !f.over && f.w.chance(30) {
		f.startPauses--
		f.w.count["paused in a start"]++
		m.pause(f.startPauseMS)
	}
}

func blackout(w *world, _ *machine, f *Fault) {
	for _, m := range w.machines {
		m.powerCut()
		m.again(w.between(0, f.ForMS))
	}
}

// diskFault has every write fail for a while.
func diskFault(w *world, m *machine, f *Fault, cause error) {
	fs := m.fs
	if fs == nil {
		return
	}
	fs.Fault = func(string) error { return cause }
	w.after(f.ForMS, func() {
		if m.fs != nil {
			m.fs.Fault = nil
		}
	})
}

// fsyncFault has writes succeed and nothing become durable for a while.
func fsyncFault(w *world, m *machine, f *Fault) {
	diskFault(w, m, f, errDisk)
	if fs := m.fs; fs != nil {
		every := fs.Fault
		fs.Fault = func(op string) error {
			if strings.HasSuffix(op, ".sync") {
				return every(op)
			}
			return nil
		}
	}
}

func slowDisk(w *world, m *machine, f *Fault) {
	m.syncMS = f.Arg
	w.after(f.ForMS, func() { m.syncMS = w.k.SyncMS })
}

// refused is a machine whose log refuses to open.
func (m *machine) refused(err error) {
	w := m.w
	w.say("%s refuses to start: %v", m.name, err)
	if m.fs.Fault != nil {
		m.again(w.between(500, 3000))
		return
	}
	w.count["damaged log refused"]++
	w.operator.replace(m, w.between(0, 4000))
}

// diskLost takes the log away; the machine joins again.
func diskLost(w *world, m *machine, f *Fault) {
	if !w.operator.settled() {
		return
	}
	if f.Kind == "disk lost" { // with the whole machine
		m.powerCut()
		m.hyp.wiped()
	} else {
		m.kill()
	}
	w.operator.replace(m, f.ForMS)
}

// partition cuts a group off from the rest, both ways.
func partition(w *world, m *machine, f *Fault) {
	side := func(x *machine) bool { return x == m || slices.Contains(f.Nodes, string(x.name)) }
	w.net.shut(f.ForMS, func(from, to *machine) bool { return side(from) != side(to) })
}

// shut cuts directions for a while.
func (n *network) shut(ms int64, which func(from, to *machine) bool) {
	n.change(n.cut, 1, ms, which)
}

func (n *network) change(table [][]int64, by, ms int64, which func(from, to *machine) bool) {
	type at struct{ from, to int }
	var links []at
	for _, from := range n.w.machines {
		for _, to := range n.w.machines {
			if from != to && which(from, to) {
				links = append(links, at{from.at, to.at})
				table[from.at][to.at] += by
			}
		}
	}
	mended := n.mended
	n.w.after(ms, func() {
		if n.mended == mended {
			for _, l := range links {
				table[l.from][l.to] -= by
			}
		}
	})
}

func badNetwork(w *world, _ *machine, f *Fault) {
	w.net.lossPct, w.net.dupPct = int(f.Arg), int(f.Arg2)
	w.after(f.ForMS, func() { w.net.lossPct, w.net.dupPct = 0, 0 })
}

func slowNetwork(w *world, _ *machine, f *Fault) {
	w.net.delayMS = f.Arg
	w.after(f.ForMS, func() { w.net.delayMS = w.k.DelayMS })
}

func slowLink(w *world, m *machine, f *Fault) {
	w.net.change(w.net.slow, f.Arg, f.ForMS, func(from, to *machine) bool {
		return from == m && slices.Contains(f.Nodes, string(to.name)) || to == m && slices.Contains(f.Nodes, string(from.name))
	})
}

// narrowLink has what goes between a machine and some others pass one after
// another, slowly.
func narrowLink(w *world, m *machine, f *Fault) {
	w.net.change(w.net.cost, f.Arg, f.ForMS, func(from, to *machine) bool {
		return from == m && slices.Contains(f.Nodes, string(to.name)) || to == m && slices.Contains(f.Nodes, string(from.name))
	})
}

func commandEnds(w *world, m *machine, f *Fault) {
	v := m.hyp.pick(f.Arg)
	if v == nil || v.phase != converge.Running {
		return
	}
	v.exit = &converge.Exit{Code: int(f.Arg2)}
	if m.proc != nil {
		m.proc.agent.heard(v)
	}
}

// availability changes what a node may do, and back once that was answered.
func availability(w *world, m *machine, f *Fault, a blixard.Availability) {
	w.operator.do(&state.SetNode{Name: m.name, Availability: a}, func(state.Result) {
		w.after(f.ForMS, func() {
			w.operator.do(&state.SetNode{Name: m.name, Availability: blixard.Active}, func(state.Result) {})
		})
	})
}
