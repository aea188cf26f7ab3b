package sim

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/raftlog/wal/memfs"
)

// machine is what a node is made of: clocks, a disk, hypervisors, and perhaps a
// running process of the server with its agent. Hypervisors outlive the process,
// the disk outlives a loss of power.
type machine struct {
	w    *world
	at   int // among the world's machines
	name blixard.NodeName
	zone string

	// Its clocks: the monotonic one runs at ratePermille of true time, and read
	// monoBase at trueBase.
	ratePermille       int64
	monoBase, trueBase int64
	skewMS             int64 // of the wall clock

	raftID uint64    // of its present membership, 0 before it joined
	fs     *memfs.FS // nil before it joined
	proc   *process  // nil while it is down
	lives  int       // how often the process was started
	level  int       // the newest set of commands that its release knows
	// damaged: the disk refuses to open. It is up to the operator.
	damaged bool
	suspect bool // it may turn out to be
	astray  astray
	// powered tells a machine whose process is down from one that is off.
	powered bool
	// dead: it is lost for good; returns: until all has come to rest without it.
	dead, returns bool

	syncMS      int64 // how long a sync takes at most
	pausedUntil int64 // true time
	lastPause   pause

	hyp    *hypervisor
	guests *guests // of functions
	lease  leaseFile
}

// pause is a time that a process stood still.
type pause struct {
	ms, untilMS int64
	ledTerm     uint64 // in which it led when it began, 0: it did not
	skewMS      int64  // of the wall clock at its end
}

var (
	errDisk = errors.New("input/output error")
	errFull = syscall.ENOSPC
)

func newMachine(w *world, at int) *machine {
	m := &machine{w: w, at: at, name: blixard.NodeName(fmt.Sprintf("n%d", at+1)), zone: fmt.Sprintf("z%d", at%w.k.Zones+1), powered: true}
	m.level = blixard.FeatureLevel
	if at < w.k.Old {
		m.level = oldLevel
	}
	m.monoBase = 1_000_000 * int64(at+1)
	m.ratePermille = 1000 + w.between(-w.k.DriftPermille, w.k.DriftPermille)
	m.skewMS, m.syncMS = w.between(-w.k.SkewMS, w.k.SkewMS), w.k.SyncMS
	m.hyp = &hypervisor{m: m, vms: map[string]*vm{}}
	m.guests = newGuests(m)
	return m
}

// monoMS is the machine's monotonic clock.
func (m *machine) monoMS() int64 { return m.monoBase + (m.w.now-m.trueBase)*m.ratePermille/1000 }

// wallMS is the machine's wall clock.
func (m *machine) wallMS() int64 { return wallBaseMS + m.w.now + m.skewMS }

const wallBaseMS = 1_700_000_000_000

// trueMS is how long a time of this machine's clock takes at most.
func (m *machine) trueMS(localMS int64) int64 {
	if localMS <= 0 {
		return 0
	}
	return (localMS*1000 + m.ratePermille - 1) / m.ratePermille
}

// setRate has the monotonic clock run at another rate from now on.
func (m *machine) setRate(permille int64) {
	m.monoBase, m.trueBase = m.monoMS(), m.w.now
	m.ratePermille = permille
	if left := m.lease.killMS - m.monoMS(); m.lease.names() && left > 0 {
		m.w.after(m.trueMS(left)+m.w.between(0, 100), m.watchdog) // which looks at the clock all the time
	}
}

// member makes the machine a new member, with an empty disk.
func (m *machine) member(raftID uint64) {
	m.w.say("%s becomes member %d", m.name, raftID)
	m.raftID, m.fs, m.damaged, m.suspect, m.astray = raftID, memfs.New(), false, false, home
}

// start starts the process on what the disk holds.
func (m *machine) start() {
	if m.proc != nil || m.fs == nil || m.damaged || m.dead {
		return
	}
	m.powered = true
	if m.astray == gone {
		m.w.operator.replace(m, m.w.between(0, 4000))
		return
	}
	m.lives++
	p, err := newProcess(m)
	if err != nil {
		if m.tooOld(err) {
			return
		}
		m.refused(err)
		return
	}
	if m.astray == followed {
		m.w.violated("a log with a hole refuses to open", "that of %s does not", m.name)
	}
	m.proc = p
	if m.suspect {
		m.suspect, m.w.operator.leaving = false, 0
	}
	m.w.say("%s starts at entry %d, log to %d, term %d", m.name, p.r.View().Index, p.r.LastIndex(), p.r.Term())
	p.begin()
}

// again starts the process later, as the machine's supervisor does.
func (m *machine) again(delayMS int64) {
	lives := m.lives
	m.w.after(delayMS, func() {
		if m.lives == lives {
			m.start()
		}
	})
}

// kill ends the process; the machine goes on, so what was written reaches the
// disk.
func (m *machine) kill() {
	if m.proc == nil {
		return
	}
	m.w.say("%s is killed", m.name)
	m.end()
	m.fs.Reboot()
	for _, other := range m.w.machines {
		if other != m && other.proc != nil {
			m.w.net.refusing(other, m)
		}
	}
}

// powerCut ends everything on the machine. Of what was not synced, some may
// have reached the disk.
func (m *machine) powerCut() {
	if m.fs == nil || !m.powered {
		return
	}
	kind := memfs.Survivors(m.w.rng.IntN(int(memfs.Kinds)))
	m.w.say("%s loses power (survivors %d)", m.name, kind)
	m.end()
	m.fs = m.fs.Crash(m.w.rng, kind)
	if m.astray == followed {
		m.astray = gone // what came after it may be gone too
	}
	m.powered = false
	m.hyp.powerCut()
	m.guests.endAll("the machine was off")
	m.lease = leaseFile{}
}

func (m *machine) end() {
	if m.proc != nil {
		m.proc.interrupted()
	}
	m.proc, m.pausedUntil = nil, 0
}

// wipe takes the machine's log away; its hypervisors run on.
func (m *machine) wipe() {
	m.w.say("%s is wiped", m.name)
	m.end()
	m.fs, m.raftID = nil, 0
}

// pause stops the process for a while.
func (m *machine) pause(ms int64) {
	if m.proc == nil {
		return
	}
	m.w.say("%s pauses for %d ms", m.name, ms)
	p, began := m.proc, m.w.now
	if m.paused() {
		began = m.lastPause.untilMS - m.lastPause.ms
	} else {
		m.lastPause.ledTerm = 0
		if p.r.Leads() {
			m.lastPause.ledTerm = p.r.Term()
		}
	}
	m.pausedUntil = max(m.pausedUntil, m.w.now+ms)
	m.lastPause.ms, m.lastPause.untilMS, m.lastPause.skewMS = m.pausedUntil-began, m.pausedUntil, m.skewMS
	m.w.after(ms, func() {
		if m.proc == p && !m.paused() {
			p.resumed()
		}
	})
}

func (m *machine) paused() bool { return m.w.now < m.pausedUntil }
