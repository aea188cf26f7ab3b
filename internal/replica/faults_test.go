package replica_test

// faults makes things go wrong, of the kinds that the seed has switched on.
type faults struct {
	w    *world
	on   bool
	over bool
}

// kinds of faults by name.
var faultKinds = []struct {
	name string
	on   func(o *options) bool
	do   func(f *faults, m *machine)
}{
	{"kill", func(o *options) bool { return o.Kill }, (*faults).kill},
	{"power cut", func(o *options) bool { return o.PowerCut }, (*faults).powerCut},
	{"blackout", func(o *options) bool { return o.Blackout }, (*faults).blackout},
	{"disk error", func(o *options) bool { return o.DiskErr }, (*faults).diskError},
	{"partition", func(o *options) bool { return o.Partition }, (*faults).partition},
	{"one-way partition", func(o *options) bool { return o.OneWay }, (*faults).oneWay},
	{"pause", func(o *options) bool { return o.Pause }, (*faults).pause},
	{"slow disk", func(o *options) bool { return o.SlowDisk }, (*faults).slowDisk},
	{"wall clock jump", func(o *options) bool { return o.WallJump }, (*faults).wallJump},
	{"guest crash", func(o *options) bool { return o.GuestCrash }, (*faults).guestCrash},
}

func (f *faults) begin() {
	f.on = true
	f.w.net.lossPct, f.w.net.dupPct, f.w.net.delayMS = f.w.opt.LossPct, f.w.opt.DupPct, f.w.opt.DelayMS
	f.next()
}

func (f *faults) next() {
	f.w.after(f.w.between(1, 2*f.w.opt.FaultEveryMS), func() {
		if f.over {
			return
		}
		f.one()
		f.next()
	})
}

// one picks a fault; half of them meet the leader.
func (f *faults) one() {
	k := f.w.rng.IntN(len(faultKinds))
	m := f.w.machines[f.w.rng.IntN(len(f.w.machines))]
	if r := f.w.ruler(); r != nil && f.w.chance(50) {
		m = r
	}
	if kind := &faultKinds[k]; kind.on(&f.w.opt) {
		f.w.count[kind.name]++
		f.w.say("fault: %s of %s", kind.name, m.name)
		kind.do(f, m)
	}
}

// end mends everything.
func (f *faults) end() {
	w := f.w
	w.say("the faults are over")
	f.over = true
	w.net.lossPct, w.net.dupPct, w.net.delayMS = 0, 0, 2
	w.net.cut = map[link]bool{}
	for _, m := range w.machines {
		m.syncMS = w.opt.SyncMS
		if m.disk != nil {
			m.disk.Fail(nil)
		}
		m.start()
	}
}

// restart starts a machine again, often at once: what it has forgotten shows
// best while the others still remember.
func (f *faults) restart(m *machine) {
	if f.w.chance(40) {
		f.w.after(f.w.between(0, 50), m.start)
		return
	}
	f.w.after(f.w.between(0, 8000), m.start)
}

// voted cuts the power of a machine that has just given its vote, and keeps it
// from hearing of the outcome.
func (f *faults) voted(m *machine, candidate uint64) {
	if !f.w.opt.VoteCrash || !f.on || f.over || !f.w.chance(50) {
		return
	}
	s := m.srv
	f.w.after(0, func() {
		if s.alive() && !f.over {
			f.w.count["vote crash"]++
			m.powerCut()
			f.w.after(f.w.between(0, 50), m.start)
			if c := f.w.byRaftID(candidate); c != nil && f.w.chance(70) {
				f.cut([]link{{c.at, m.at}})
			}
		}
	})
}

func (f *faults) kill(m *machine) {
	m.kill()
	f.restart(m)
}

func (f *faults) powerCut(m *machine) {
	m.powerCut()
	f.restart(m)
}

func (f *faults) blackout(*machine) {
	for _, m := range f.w.machines {
		m.powerCut()
		f.restart(m)
	}
}

func (f *faults) diskError(m *machine) {
	if m.srv == nil {
		return
	}
	m.disk.Fail(errDisk)
	f.w.after(f.w.between(0, 3000), func() { f.kill(m) })
}

// partition cuts a group off from the rest, both ways.
func (f *faults) partition(m *machine) {
	side := map[int]bool{m.at: true}
	for _, x := range f.w.machines {
		if f.w.chance(30) {
			side[x.at] = true
		}
	}
	var links []link
	for a := range f.w.machines {
		for b := range f.w.machines {
			if side[a] != side[b] {
				links = append(links, link{a, b})
			}
		}
	}
	f.cut(links)
}

// oneWay makes a machine deaf or dumb, or cuts a single direction.
func (f *faults) oneWay(m *machine) {
	var links []link
	only, way := f.w.rng.IntN(len(f.w.machines)), f.w.rng.IntN(3)
	for x := range f.w.machines {
		switch {
		case x == m.at:
		case way == 0:
			links = append(links, link{x, m.at})
		case way == 1:
			links = append(links, link{m.at, x})
		case x == only:
			links = append(links, link{m.at, x})
		}
	}
	f.cut(links)
}

func (f *faults) cut(links []link) {
	for _, l := range links {
		f.w.net.cut[l] = true
	}
	f.w.after(f.w.between(200, 10_000), func() {
		for _, l := range links {
			delete(f.w.net.cut, l)
		}
	})
}

func (f *faults) pause(m *machine) { m.pause(f.w.between(20, 9000)) }

func (f *faults) slowDisk(m *machine) {
	m.syncMS = f.w.between(50, 800)
	f.w.after(f.w.between(500, 5000), func() { m.syncMS = f.w.opt.SyncMS })
}

func (f *faults) wallJump(m *machine) { m.skewMS += f.w.between(-3_600_000, 3_600_000) }

func (f *faults) guestCrash(m *machine) {
	if keys := sorted(m.guests); len(keys) > 0 {
		key := keys[f.w.rng.IntN(len(keys))]
		f.w.say("%s crashes on %s", key, m.name)
		m.stopGuest(key)
	}
}
