// Package agent runs a node's instances: it asks converge what to do next and
// does it through the drivers, keeps the node's lease alive and tells the
// cluster what it sees.
//
// Ownership: the agent alone calls its driver and its network. What it remembers
// of an incarnation is in memory and may be lost with the process; what it needs
// to find again is with those two (files, labels) and in the cluster's rows.
//
// Goroutines: Run starts a loop each for heartbeats, the node's report, the
// cluster's changes, reports and reconciling, one goroutine per effect under way
// (bounded by Limits) and one per guest session; it returns when all have ended.
// Only the reconcile loop plans and begins effects. Ending the daemon ends no
// virtual machine.
//
// Ordering: a plan is made of what the agent remembers, taken first, and of what
// the driver lists, taken later and never before the end of an effect that is
// no longer remembered as under way. So a plan may repeat what is harmless and
// never what is not.
//
// Lease: it counts from the moment a heartbeat was sent, on a clock that goes on
// while the machine sleeps. It is kept in a file, so that a daemon that comes
// back knows how long what stops on partition may still run, and a watchdog
// process (see Watchdog) knows it when no daemon comes back.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/assert"
	"github.com/blixard/blixard/internal/converge"
	"github.com/blixard/blixard/internal/network"
	"github.com/blixard/blixard/internal/vmm"
)

// Cluster is what the agent needs of the replica on its node.
type Cluster interface {
	// Assigned is this node's rows in the local view, by instance (as text) and
	// generation, and the view's index. The rows are shared: not to be changed.
	Assigned() (rows []*blixard.Instance, index uint64)
	// Wait returns when the view is newer than index, or with ctx's error.
	Wait(ctx context.Context, index uint64) error
	// Report has observations committed and returns the index at which they
	// were applied. What contradicts the state is left out by the state.
	Report(ctx context.Context, items []converge.Observation) (index uint64, err error)
	// ReportNode tells the cluster what the machine is.
	ReportNode(ctx context.Context, report NodeReport) error
	// Heartbeat asks the leader for the lease.
	Heartbeat(ctx context.Context) (Ack, error)
}

// Ack is the leader's answer to a heartbeat.
type Ack struct {
	// Index of the leader's state when it answered: everything it had decided
	// by then is in a view that is as new.
	Index uint64
	// OK: the lease is granted from the time the heartbeat was sent. Otherwise
	// the leader wants the node to report first.
	OK bool
}

// NodeReport is what the machine is and has.
type NodeReport struct {
	Capacity     blixard.Resources
	Reserved     blixard.Resources // kept for the machine itself
	MaxInstances int
	Hypervisors  []string // drivers that work here
	Acceleration string
	Release      string
	FeatureLevel int
}

// Bundle is a bootable image on this machine.
type Bundle struct {
	Kernel  string // path
	Initrd  string // path, "" for none
	Cmdline string
	Disks   []vmm.Disk
	// Command is what the guest runs when the VM's spec has none.
	Command []string
	// NoGuest: nothing in the guest speaks our protocol.
	NoGuest bool
	// MaybeGuest: it is not known whether anything does; a guest that does not
	// answer for a while counts as running all the same.
	MaybeGuest bool
}

// Images makes images bootable.
type Images interface {
	// Bundle has the image ("builtin" or "sha256:<hex>") on this machine when it
	// returns. Idempotent; it may take minutes the first time.
	Bundle(ctx context.Context, image string) (Bundle, error)
}

// Options of an Agent. Node, Cluster, Driver, Images and DataDir are required.
type Options struct {
	Node    blixard.NodeName
	Cluster Cluster
	Driver  vmm.Driver // also a vmm.Pauser, vmm.Channels, vmm.Watcher if it can
	Images  Images
	// Network connects guests in network mode bridge; nil: the node has none.
	Network network.Network
	// DefaultNetwork is the mode for VMs that name none: "user" (the default) or "bridge".
	DefaultNetwork string
	DataDir        string // for the lease file; its file system is the node's disk
	Log            *slog.Logger
	Metrics        *Metrics

	Release        string
	PublishAddress string             // IP that ports are published on; 127.0.0.1 by default
	Capacity       *blixard.Resources // in place of what the machine has; zeros are asked of the machine
	Reserved       blixard.Resources  // kept for the machine; MemoryMiB -1: see DefaultReservedMiB
	MaxInstances   int

	HeartbeatEvery time.Duration // 1 s by default
	Lease          time.Duration // 5 s by default; the same on all nodes
	ResyncEvery    time.Duration // the driver is listed at least so often; 10 s by default
	PollEvery      time.Duration // guests are asked for their state; 2 s by default
	BootTimeout    time.Duration // a guest that has not answered is given up; 3 min by default
	Limits         converge.Limits
	// Membership names this membership of the node in its cluster; a lease given
	// to another one is void.
	Membership string
	// Watchdog is the command that runs Watchdog for DataDir, spawned as long as
	// there is something that stops on partition; none when empty.
	Watchdog []string
	// WorkDir is the working directory of an incarnation's hypervisor process,
	// by which the watchdog finds one that the daemon had no time to write down.
	WorkDir func(vmm.Ref) string
}

func (o *Options) defaults() {
	set := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	set(&o.HeartbeatEvery, time.Second)
	set(&o.Lease, 5*time.Second)
	set(&o.ResyncEvery, 10*time.Second)
	set(&o.PollEvery, 2*time.Second)
	set(&o.BootTimeout, 3*time.Minute)
	l := &o.Limits
	if l.Starts <= 0 {
		l.Starts = max(4, runtime.NumCPU())
	}
	if l.Effects <= 0 {
		l.Effects = 64
	}
	if l.FenceMS <= 0 {
		l.FenceMS = o.Lease.Milliseconds() / 5
	}
	if l.OrphanGraceMS <= 0 {
		l.OrphanGraceMS = 5000
	}
	if l.ResendMS <= 0 {
		l.ResendMS = 5000
	}
	if o.PublishAddress == "" {
		o.PublishAddress = "127.0.0.1"
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Metrics == nil {
		o.Metrics = NewMetrics()
	}
}

// Agent runs one node's instances. Its methods may be called concurrently.
type Agent struct {
	o        Options
	log      *slog.Logger
	clock    clock
	pauser   vmm.Pauser   // nil if the driver cannot
	channels vmm.Channels // nil if the driver cannot

	wake       chan struct{} // of the reconcile loop
	reportWake chan struct{} // of the reporter
	nodeWake   chan struct{} // of the node's report
	beatWake   chan struct{} // of the heartbeat
	running    sync.WaitGroup

	mu           sync.Mutex
	capabilities vmm.Capabilities
	rows         []*blixard.Instance
	index        uint64
	found        []vmm.Status
	stale        bool // found has to be listed again
	locals       map[converge.Ref]*local
	attached     map[converge.Ref]network.Attachment
	lease        converge.LeaseBook
	leaseKept    bool     // the lease file names something
	under        []string // directories that Guard was called with; replaced, never changed
	pending      map[converge.Ref]*converge.Observation
	ending       bool // no more effects begin

	watchdogTurn sync.Mutex
	watchdogPid  int // of the one spawned by this daemon
}

// local is what the agent remembers of an incarnation.
type local struct {
	converge.Local
	bundle *Bundle
	// cancel ends the effect under way.
	cancel context.CancelCauseFunc
	// then is the kill that follows it.
	then    *converge.Action
	session *session
}

// New makes an agent; Run runs it.
func New(o Options) (*Agent, error) {
	assert.True(o.Cluster != nil && o.Driver != nil && o.Images != nil, "an agent needs a cluster, a driver and images")
	if o.Node == "" || o.DataDir == "" {
		return nil, errors.New("an agent needs the name of its node and a data directory")
	}
	o.defaults()
	if l := o.Limits.FenceMS; l >= o.Lease.Milliseconds() {
		return nil, fmt.Errorf("the lease of %s leaves no time beside the %d ms set apart for killing", o.Lease, l)
	}
	a := &Agent{
		o: o, log: o.Log.With("component", "agent"), clock: newClock(),
		wake: make(chan struct{}, 1), reportWake: make(chan struct{}, 1), nodeWake: make(chan struct{}, 1), beatWake: make(chan struct{}, 1),
		lease: converge.LeaseBook{LengthMS: o.Lease.Milliseconds(), FenceMS: o.Limits.FenceMS}, stale: true, locals: map[converge.Ref]*local{}, attached: map[converge.Ref]network.Attachment{}, pending: map[converge.Ref]*converge.Observation{},
	}
	a.pauser, _ = o.Driver.(vmm.Pauser)
	a.channels, _ = o.Driver.(vmm.Channels)
	return a, nil
}

// Run works until ctx ends and leaves the virtual machines running. It returns
// nil after an ordinary end.
func (a *Agent) Run(ctx context.Context) error {
	if err := a.recallLease(ctx); err != nil {
		return err
	}
	// Loops that only ask and tell end with ctx; effects are ended below.
	effects, endEffects := context.WithCancelCause(context.WithoutCancel(ctx))
	defer endEffects(nil)
	var loops sync.WaitGroup
	loops.Go(func() { a.heartbeats(ctx) })
	loops.Go(func() { a.nodeReports(ctx) })
	loops.Go(func() { a.follow(ctx) })
	loops.Go(func() { a.report(ctx) })
	loops.Go(func() { a.reconcile(ctx, effects) })
	<-ctx.Done()
	a.drain()
	loops.Wait()
	a.await(drainTimeout)
	endEffects(errEnding)
	a.running.Wait()
	return nil
}

// drainTimeout is how long starts and kills under way may take to end well when
// the daemon ends.
const drainTimeout = 5 * time.Second

var errEnding = errors.New("the daemon ends")

// drain lets no more effects begin, and ends those whose interruption costs
// nothing: they are begun anew when the daemon is back.
func (a *Agent) drain() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ending = true
	for _, l := range a.locals {
		if l.session != nil {
			l.session.cancel()
		}
		if l.Busy == converge.Stop || l.Busy == converge.Prepare {
			l.cancel(errEnding)
		}
	}
}

// await waits for what runs, at most so long.
func (a *Agent) await(limit time.Duration) {
	done := make(chan struct{})
	go func() { // ends with the effects, which Run waits for in any case
		a.running.Wait()
		close(done)
	}()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
	}
}

// poke fills a wake channel, which holds one.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// pause waits, and tells whether ctx is still on.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// follow keeps the rows up to date.
func (a *Agent) follow(ctx context.Context) {
	// The view may change thousands of times a second for others.
	const atMostEvery = 5 * time.Millisecond
	for ctx.Err() == nil {
		rows, index := a.o.Cluster.Assigned()
		a.mu.Lock()
		more := a.lease.Seen(index)
		changed := !slices.Equal(rows, a.rows) || more
		a.rows, a.index = rows, index
		keep := more && a.leaseKept
		a.mu.Unlock()
		if keep {
			a.keepLease()
		}
		if changed {
			poke(a.wake)
		} else if !pause(ctx, atMostEvery) {
			return
		}
		if err := a.o.Cluster.Wait(ctx, index); err != nil && !pause(ctx, time.Second) {
			return
		}
	}
}

// memory is the local of ref, made if need be. Callers hold mu.
func (a *Agent) memory(ref converge.Ref) *local {
	l := a.locals[ref]
	if l == nil {
		l = &local{Local: converge.Local{Ref: ref}}
		a.locals[ref] = l
	}
	return l
}

// event logs something that happened to an incarnation.
func (a *Agent) event(level slog.Level, ref converge.Ref, event, message string, args ...any) {
	vm, _ := splitInstance(ref.Instance)
	a.log.Log(context.Background(), level, message, append([]any{"event", event, "vm", vm, "instance", ref.Instance, "generation", ref.Generation}, args...)...)
}
