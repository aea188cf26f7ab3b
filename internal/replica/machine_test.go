package replica_test

import (
	"errors"
	"fmt"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/raftlog/fake"
)

// machine is what a node is made of: clocks, a disk, hypervisor processes, and
// perhaps a running server. Guests outlive the server's process, the disk
// outlives a loss of power.
type machine struct {
	w    *world
	at   int // among the world's machines
	name blixard.NodeName

	// Its clocks: the monotonic one runs at ratePermille of true time.
	ratePermille int64
	skewMS       int64 // of the wall clock

	raftID uint64 // of its present membership, 0 before it joined
	disk   *fake.Disk
	srv    *server // nil while it is down
	lives  int     // how often the server was started

	syncMS      int64 // how long a sync takes
	pausedUntil int64 // true time

	guests  map[string]*guest
	started map[string]bool // traces that starts leave on disk, until removed
	lease   *lease          // of the present membership; the watchdog keeps it
}

var errDisk = errors.New("the disk is broken")

func newMachine(w *world, at int) *machine {
	m := &machine{w: w, at: at, name: blixard.NodeName(fmt.Sprintf("n%d", at+1)), guests: map[string]*guest{}, started: map[string]bool{}}
	m.ratePermille = 1000 + w.between(-w.opt.DriftPermille, w.opt.DriftPermille)
	m.skewMS, m.syncMS = w.between(-2000, 2000), w.opt.SyncMS
	return m
}

// monoMS is the machine's monotonic clock.
func (m *machine) monoMS() int64 { return 1_000_000*int64(m.at+1) + m.w.now*m.ratePermille/1000 }

// wallMS is the machine's wall clock.
func (m *machine) wallMS() int64 { return 1_700_000_000_000 + m.w.now + m.skewMS }

// trueMS is how long a time of this machine's clock takes.
func (m *machine) trueMS(localMS int64) int64 {
	return (localMS*1000 + m.ratePermille - 1) / m.ratePermille
}

// join makes the machine a new member, with an empty disk.
func (m *machine) join(raftID uint64) {
	m.w.say("%s becomes member %d", m.name, raftID)
	m.raftID, m.disk, m.lease = raftID, &fake.Disk{}, &lease{}
}

// start starts the server on what the disk holds.
func (m *machine) start() {
	if m.srv != nil || m.disk == nil {
		return
	}
	m.lives++
	m.srv = newServer(m)
	m.w.say("%s starts at entry %d, log to %d, term %d", m.name, m.srv.r.View().Index, m.srv.r.LastIndex(), m.srv.r.Term())
	m.srv.begin()
}

// kill ends the server's process; the machine goes on, so what was written
// reaches the disk.
func (m *machine) kill() {
	if m.srv != nil {
		m.w.say("%s is killed", m.name)
		m.end(m.disk.Unsynced())
	}
}

// powerCut ends everything on the machine. Of what was not synced, a part may
// have reached the disk.
func (m *machine) powerCut() {
	if m.disk == nil {
		return
	}
	keep := m.w.rng.IntN(m.disk.Unsynced() + 1)
	m.w.say("%s loses power, %d of %d writes survive", m.name, keep, m.disk.Unsynced())
	m.end(keep)
	for _, key := range sorted(m.guests) {
		m.w.check.stopped(m, m.guests[key])
	}
	m.guests = map[string]*guest{}
	*m.lease = lease{}
}

func (m *machine) end(keep int) {
	m.disk.Crash(keep)
	m.srv, m.pausedUntil = nil, 0
}

// wipe takes the machine out of the cluster; its guests run on.
func (m *machine) wipe() {
	m.w.say("%s is wiped", m.name)
	if m.srv != nil {
		m.end(0)
	}
	m.disk, m.raftID = nil, 0
}

// pause stops the server's process for a while.
func (m *machine) pause(ms int64) {
	if m.srv == nil {
		return
	}
	m.w.say("%s pauses for %d ms", m.name, ms)
	m.pausedUntil = m.w.now + ms
	s := m.srv
	m.w.after(ms, func() {
		if m.srv == s {
			s.drain()
		}
	})
}

func (m *machine) paused() bool { return m.w.now < m.pausedUntil }
