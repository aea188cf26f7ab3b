// Package control holds the leader's reconcilers: what to propose so that the
// state comes to what is wanted.
//
// A Controller looks at a View and its own record of leases and returns
// commands; it is told what changed only to know where to look. Its decisions
// are made again until the state shows their effect, so nothing it forgets (on
// a change of leader it forgets all) is ever lost. It is deterministic: equal
// calls give equal commands.
//
// Ownership: a Controller belongs to one replica's loop. The caller
//   - calls Reset when the replica becomes leader,
//   - passes the changes of every applied entry to Observe, in order,
//   - calls Step when something changed or NextWakeMonoMS has come, proposes
//     what it returns as one entry, and calls Step again only when that entry
//     was applied (or leadership was lost and won again: Reset),
//   - tells Leases of every heartbeat.
//
// A pass costs what has not converged: VMs whose rows changed, whose time has
// come or that wait for something; a slow sweep over all VMs makes up for
// whatever was missed.
//
// Invariants kept by what it proposes (and again by state.Apply, except the
// last, which only a leader can know): a slot has at most one incarnation that
// has not ended; generations grow; no node is overbooked; nothing is ended for
// the sake of a VM whose priority is not higher; an exclusive incarnation is
// replaced only when it ended or when the lease under which it ran is over for
// certain.
package control

import (
	"cmp"

	"github.com/tidwall/btree"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/assert"
	"github.com/blixard/blixard/internal/schedule"
	"github.com/blixard/blixard/internal/state"
)

// Config holds the times and bounds of a Controller; zero values stand for the
// defaults.
type Config struct {
	HeartbeatMS int64 // 1,000
	LeaseMS     int64 // 5,000
	MarginMS    int64 // 1,000: bound of how far clocks run apart in one lease
	// RetryMS is how often a VM that was refused is tried again without a cause.
	RetryMS int64 // 5,000
	// SweepMS is how long looking at every VM once takes.
	SweepMS int64 // 30,000
	// StableMS is how long an instance runs until its former failures are
	// forgotten.
	StableMS int64 // 600,000
	// MaxCommands and MaxRows bound a pass.
	MaxCommands int // 2,000
	MaxRows     int // 20,000 instance rows looked at
}

func (c Config) withDefaults() Config {
	set := func(v *int64, d int64) {
		if *v == 0 {
			*v = d
		}
	}
	set(&c.HeartbeatMS, 1000)
	set(&c.LeaseMS, 5000)
	set(&c.MarginMS, 1000)
	set(&c.RetryMS, 5000)
	set(&c.SweepMS, 30_000)
	set(&c.StableMS, 600_000)
	c.MaxCommands, c.MaxRows = cmp.Or(c.MaxCommands, 2000), cmp.Or(c.MaxRows, 20_000)
	return c
}

// Input is what a pass looks at.
type Input struct {
	View      *state.View
	NowMonoMS int64 // never goes back while the process lives
	NowWallMS int64 // as in the envelopes
}

// Output is what a pass decided.
type Output struct {
	Commands []state.Command // in order, for one entry; none when all is well
	// NextWakeMonoMS is when the next pass is due if nothing changes before.
	NextWakeMonoMS int64
}

// Controller decides what a leader proposes.
type Controller struct {
	// Leases is the record of the leases given to nodes.
	Leases *Leases

	config Config
	index  *schedule.Index
	nodes  map[blixard.NodeName]nodeMark

	changedVMs btree.Set[blixard.VMName]   // with rows the index does not know
	freshVMs   btree.Set[blixard.VMName]   // to look at, not ranked yet
	freshNodes btree.Set[blixard.NodeName] // to look at
	queue      *btree.BTreeG[ranked]       // VMs to look at, most important first
	queued     map[blixard.VMName]bool
	timers     *btree.BTreeG[timer]

	books       map[blixard.VMName]*book
	refused     btree.Set[blixard.VMName]           // wait for room
	waiters     map[blixard.VMName][]blixard.VMName // wait for another VM
	lost        btree.Set[blixard.NodeName]         // members that are lost
	freed       bool                                // room may have been made since the last retry
	retriedMS   int64                               // when refused VMs were tried last
	maintenance bool
	sweepFrom   blixard.VMName
	sweptMS     int64
	steppedMS   int64 // when the last pass was
	preempting  preempting
	functions   functions
}

// maxPauseMS is how late a pass may be, at most, for the record of leases to be
// believed: a process that was stopped for longer has not heard the heartbeats
// that wait in its sockets.
const maxPauseMS = 2000

// nodeMark is what was seen of a node's row.
type nodeMark struct {
	raftID, epoch uint64
	state         blixard.NodeState
	availability  blixard.Availability
}

// ranked orders VMs: higher priority first, then the older one.
type ranked struct {
	priority int
	uid      uint64
	name     blixard.VMName
}

func (a ranked) less(b ranked) bool {
	return cmp.Or(cmp.Compare(b.priority, a.priority), cmp.Compare(a.uid, b.uid), cmp.Compare(a.name, b.name)) < 0
}

// timer makes a VM or a node be looked at.
type timer struct {
	atMS int64
	node blixard.NodeName
	vm   blixard.VMName
}

func (a timer) less(b timer) bool {
	return cmp.Or(cmp.Compare(a.atMS, b.atMS), cmp.Compare(a.node, b.node), cmp.Compare(a.vm, b.vm)) < 0
}

// New returns a Controller; call Reset before the first Step.
func New(config Config) *Controller {
	c := &Controller{config: config.withDefaults()}
	c.Leases = &Leases{config: c.config}
	c.Leases.Reset(0)
	return c
}

// Reset forgets everything on becoming leader: all is to be looked at, and
// every lease is assumed to have been given now.
func (c *Controller) Reset(v *state.View, nowMonoMS int64) {
	*c = Controller{Leases: c.Leases, config: c.config}
	c.Leases.Reset(nowMonoMS)
	c.index = schedule.NewIndex(v)
	c.nodes, c.queued = map[blixard.NodeName]nodeMark{}, map[blixard.VMName]bool{}
	c.books, c.waiters = map[blixard.VMName]*book{}, map[blixard.VMName][]blixard.VMName{}
	c.queue = btree.NewBTreeGOptions(ranked.less, btree.Options{NoLocks: true})
	c.timers = btree.NewBTreeGOptions(timer.less, btree.Options{NoLocks: true})
	c.sweptMS, c.retriedMS, c.steppedMS = nowMonoMS, nowMonoMS, nowMonoMS
	c.maintenance = v.Cluster().Maintenance
	v.Nodes(func(n *blixard.Node) bool { c.freshNodes.Insert(n.Name); return true })
	v.VMs(func(vm *blixard.VM) bool { c.freshVMs.Insert(vm.Name); return true })
	c.preempting = newPreempting(v, nowMonoMS)
	c.functions = newFunctions(v)
}

// Resign forgets everything on losing leadership; Reset begins again.
func (c *Controller) Resign() { *c = Controller{Leases: c.Leases, config: c.config} }

// Observe takes the changes of an applied entry. Before Reset it does nothing.
func (c *Controller) Observe(changes []state.Change) {
	if c.index == nil {
		return
	}
	for i := range changes {
		switch o := changes[i].Object.(type) {
		case *blixard.Node:
			c.freshNodes.Insert(o.Name)
			c.functions.seeNode(o.Name)
		case *blixard.VM:
			c.touched(o.Name)
			c.preempting.see(o)
		case *blixard.Instance:
			c.touched(o.VM)
			c.freed = c.freed || changes[i].Deleted || !o.Holds()
		case *blixard.FunctionVersion:
			c.functions.builds = true
		case *blixard.AsyncEvent:
			c.functions.events = c.functions.events || o.Owner == ""
		}
	}
}

// touched marks a VM and those that wait for it.
func (c *Controller) touched(name blixard.VMName) {
	c.changedVMs.Insert(name)
	c.freshVMs.Insert(name)
	if waiting := c.waiters[name]; len(waiting) > 0 {
		delete(c.waiters, name)
		for _, w := range waiting {
			c.freshVMs.Insert(w)
		}
	}
}

// pass is one Step.
type pass struct {
	*Controller
	v    *state.View
	now  int64 // monotonic
	wall int64 // as in rows; never before the state's own time
	out  []state.Command
	rows int
}

// Step makes one pass.
func (c *Controller) Step(in Input) Output {
	assert.True(c.index != nil, "a controller steps before Reset")
	p := &pass{Controller: c, v: in.View, now: in.NowMonoMS, wall: max(in.NowWallMS, in.View.Cluster().NowMS)}
	if on := p.v.Cluster().Maintenance; on != c.maintenance {
		c.maintenance = on
		p.v.VMs(func(vm *blixard.VM) bool { c.freshVMs.Insert(vm.Name); return true })
	}
	if p.now-c.steppedMS > sweepTickMS+maxPauseMS {
		c.Leases.assumeAll(p.now)
	}
	c.steppedMS = p.now
	c.preempting.condemned = nil // what was proposed is applied, or refused
	p.fire()
	p.lookAtNodes()
	p.takeIn()
	p.lookAtFunctions()
	p.sweep()
	p.retry()
	p.rank()
	for !p.full() && p.rows < c.config.MaxRows {
		r, ok := c.queue.PopMin()
		if !ok {
			break
		}
		delete(c.queued, r.name)
		p.lookAtVM(r.name)
	}
	return Output{Commands: p.out, NextWakeMonoMS: p.nextWake()}
}

// takeIn tells the index of all changes before anything is decided: what a VM
// of low priority gave back must be there for one of high priority.
func (p *pass) takeIn() {
	p.changedVMs.Scan(func(name blixard.VMName) bool { p.sync(name); return true })
	p.changedVMs = btree.Set[blixard.VMName]{}
}

// fire marks what timers were set for.
func (p *pass) fire() {
	for {
		t, ok := p.timers.Min()
		if !ok || t.atMS > p.now {
			return
		}
		p.timers.PopMin()
		if t.node != "" {
			p.freshNodes.Insert(t.node)
			continue
		}
		p.freshVMs.Insert(t.vm)
		if b := p.books[t.vm]; b != nil && b.wakeMS == t.atMS {
			b.wakeMS = 0
		}
	}
}

// sweepTickMS is how often a pass is made at least.
const sweepTickMS = 1000

// sweep marks the VMs whose turn it is.
func (p *pass) sweep() {
	elapsed := p.now - p.sweptMS
	n := int(int64(p.v.VMCount()) * elapsed / p.config.SweepMS)
	if elapsed < sweepTickMS && n == 0 {
		return
	}
	p.sweptMS = p.now
	n = min(max(n, 1), p.config.MaxRows)
	last := false
	p.v.VMsFrom(p.sweepFrom, func(vm *blixard.VM) bool {
		if n == 0 {
			p.sweepFrom, last = vm.Name, true
			return false
		}
		p.freshVMs.Insert(vm.Name)
		p.preempting.nextFloor = min(p.preempting.nextFloor, vm.Spec.Priority)
		n--
		return true
	})
	if !last {
		p.sweepFrom = ""
		p.preempting.swept()
		if p.index.Wasteful() {
			p.index = schedule.NewIndex(p.v)
		}
	}
}

// minRetryMS keeps a stream of changes from trying many refused VMs each time.
// Few are tried at once: who comes later must not take what they wait for.
func (p *pass) minRetryMS() int64 { return min(int64(p.refused.Len())/100, 200) }

// retry marks refused VMs when room may have been made, or after a while.
func (p *pass) retry() {
	since := p.now - p.retriedMS
	if p.refused.Len() == 0 {
		p.freed = false
		return
	}
	if p.freed && since >= p.minRetryMS() || since >= p.config.RetryMS {
		p.freed, p.retriedMS = false, p.now
		p.refused.Scan(func(name blixard.VMName) bool { p.freshVMs.Insert(name); return true })
	}
}

// rank moves the marked VMs into the queue.
func (p *pass) rank() {
	p.freshVMs.Scan(func(name blixard.VMName) bool {
		if p.queued[name] {
			return true
		}
		r := ranked{name: name}
		if vm := p.v.VM(name); vm != nil {
			r.priority, r.uid = vm.Spec.Priority, vm.UID
		}
		p.queued[name] = true
		p.queue.Set(r)
		return true
	})
	p.freshVMs = btree.Set[blixard.VMName]{}
}

// nextWake is when the next pass is due.
func (p *pass) nextWake() int64 {
	if len(p.out) > 0 || p.queue.Len() > 0 || p.freshVMs.Len() > 0 || p.freshNodes.Len() > 0 {
		return p.now
	}
	at := min(p.sweptMS+sweepTickMS, p.functions.wakeMS)
	if t, ok := p.timers.Min(); ok {
		at = min(at, t.atMS)
	}
	if p.lost.Len() > 0 {
		at = min(at, p.now+p.config.HeartbeatMS/2)
	}
	if p.refused.Len() > 0 {
		at = min(at, p.retriedMS+p.config.RetryMS)
		if p.freed {
			at = min(at, p.retriedMS+p.minRetryMS())
		}
	}
	return max(at, p.now+1)
}

// emit proposes a command unless the pass is full; what is left out is decided
// again in the next one.
func (p *pass) emit(c state.Command) bool {
	if p.full() {
		return false
	}
	p.out = append(p.out, c)
	return true
}

func (p *pass) full() bool { return len(p.out) >= p.config.MaxCommands }
