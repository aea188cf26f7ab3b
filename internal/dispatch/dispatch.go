// Package dispatch runs a node's function instances: it asks package route what
// to do, does it with the hypervisor driver, and passes invocations to guests.
//
// Ownership: the Dispatcher alone uses its driver, whose root it shares with
// nobody, and what is below its directory: templates. Instances live no longer
// than the daemon: what a former one left is killed before anything is started
// or any slot is used. What is remembered of logs and invocations is in memory.
//
// Locks and order: mu guards the route.Node and the tables beside it and is held
// for moments only, never over an effect. Actions are carried out in the order
// they come; those that take time by a goroutine each, one at a time for an
// instance (instance.turn). Run waits for all of them.
//
// A warm invocation takes mu twice and touches neither raft nor disk nor the
// log. It is handed to the guest by the goroutine that called Invoke.
//
// Leases: executions run only under slots that were leased, see package route,
// and only while Options.Lease says so. What runs when it says no is killed.
package dispatch

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/code"
	"github.com/blixard/blixard/internal/image"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/state"
	"github.com/blixard/blixard/internal/vmm"
)

// Cluster is what the dispatcher needs of the replica on its node.
type Cluster interface {
	// View is the newest state here.
	View() *state.View
	// Wait returns when the view is newer than index, or with ctx's error.
	Wait(ctx context.Context, index uint64) error
	// Fresh is a view that shows all that was decided in the cluster before it was
	// asked for.
	Fresh(ctx context.Context) (*state.View, error)
	// Propose has a command committed. The same key changes nothing twice.
	Propose(ctx context.Context, c state.Command, key string) (state.Outcome, error)
}

// Driver is a hypervisor that functions can run on. One that is also a
// vmm.Cloner makes clones, one that is a vmm.Meter tells what they take.
type Driver interface {
	vmm.Driver
	vmm.Channels
}

// Images are the parts that guests of functions boot; *image.Store is one.
type Images interface {
	Function(ctx context.Context) (image.Bundle, error)
	Runtime(ctx context.Context, runtime string) (image.Disk, error)
}

// Peers reaches the other nodes' Handler.
type Peers interface {
	// Get asks a node for what is at a path below Prefix. The caller closes.
	Get(ctx context.Context, node blixard.NodeName, path string) (io.ReadCloser, error)
}

// Options of a Dispatcher. Node, Cluster, Lease, Driver, Code, Images and Dir
// are required.
type Options struct {
	Node    blixard.NodeName
	Cluster Cluster
	// Lease tells whether functions may run here: true while the node's lease
	// lasts, until as long before its end as killing takes. It is asked every
	// few milliseconds.
	Lease  func() bool
	Driver Driver
	Code   code.Store
	Images Images
	Dir    string // for templates
	Peers  Peers  // nil: there is none to fetch templates and code from
	Log    *slog.Logger
	// Registerer takes the metrics; nil for none.
	Registerer prometheus.Registerer
	// Guard, when set, is called before anything is started: so that a watchdog
	// ends what runs here, should the daemon not do so in time.
	Guard func()

	Region    string // of ARNs; "us-east-1"
	AccountID string // of ARNs; "000000000000"
	Limits    Limits
}

// Limits of a Dispatcher. Fields that are 0 have their default.
type Limits struct {
	// Route.Starts is 4 for each processor by default, 8 at least.
	Route route.Limits
	// OvercommitPercent of the memory that is neither reserved nor a VM's may be
	// given to instances, which rarely use all of theirs; 200.
	OvercommitPercent int64
	// KeepFreeMiB of the machine's memory are left free whatever instances are
	// allowed: idle ones end before; 512.
	KeepFreeMiB int64
	// BudgetMiB, when set, is what instances may take in all.
	BudgetMiB   int64
	TemplateMiB int64 // of the disk, for templates; 20,480
	Builds      int   // templates built at once for deployments; 1
	// Boots is how many guests boot and initialise at once, for templates too; one
	// for each two processors, 1 at least. A boot keeps one busy all the time, and
	// the warm guests, the daemon and its lease need the others. Who waits is
	// served in order of arrival.
	Boots        int
	EmulatedTime int64         // initialisation may take so many times as long under emulation; 10
	RecycleCalls int           // an instance ends after so many calls, unless its function says otherwise; 10,000
	CodeKeep     time.Duration // code that no version has is kept so long; 1 h
}

func (o *Options) defaults() {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	o.Region, o.AccountID = cmp.Or(o.Region, "us-east-1"), cmp.Or(o.AccountID, "000000000000")
	l := &o.Limits
	// More at once only make each of them slower.
	l.Route.Starts = cmp.Or(l.Route.Starts, max(8, 4*runtime.NumCPU()))
	l.Boots = cmp.Or(l.Boots, max(1, runtime.NumCPU()/2))
	l.Route.Boots = cmp.Or(l.Route.Boots, l.Boots)
	l.OvercommitPercent, l.KeepFreeMiB = cmp.Or(l.OvercommitPercent, 200), cmp.Or(l.KeepFreeMiB, 512)
	l.TemplateMiB, l.Builds = cmp.Or(l.TemplateMiB, 20<<10), cmp.Or(l.Builds, 1)
	l.EmulatedTime, l.RecycleCalls = cmp.Or(l.EmulatedTime, 10), cmp.Or(l.RecycleCalls, 10_000)
	l.CodeKeep = cmp.Or(l.CodeKeep, time.Hour)
}

// Dispatcher is this node's part of all functions.
type Dispatcher struct {
	o      Options
	log    *slog.Logger
	cloner vmm.Cloner         // nil: instances are booted
	base   time.Time          // times in milliseconds count from here
	nonce  string             // of this daemon, in names of instances
	chores chores             // goroutines of effects
	talk   context.Context    //nolint:containedctx // of proposals, which nobody waits for in the end
	hush   context.CancelFunc // ends talk
	look   chan struct{}      // the settings have to be looked at
	stir   chan struct{}      // the lease and deadlines have to be looked at
	boots  chan struct{}      // holds one for each guest that boots

	events    events
	templates templates
	metrics   *metrics

	mu        sync.Mutex
	node      *route.Node
	closed    bool
	rests     bool // keepTime looks seldom
	nextCall  route.CallID
	nextRef   uint64
	raftID    uint64          // of this node; 0 while it is no member
	nextHost  uint32          // the newest guest's
	places    map[uint32]bool // hosts of guests that there are
	calls     map[route.CallID]*pending
	instances map[route.InstanceID]*instance
	versions  map[route.Revision]*version
	functions map[blixard.FunctionName]*function
	book      route.SlotBook // which views tell which slots this node has
}

// function is what is kept of a function, of all its versions.
type function struct {
	name    blixard.FunctionName
	log     *logRing
	stats   *functionStats
	granted time.Time // when slots were leased last
	gone    time.Time // when the cluster was found to have forgotten it
}

// New makes a Dispatcher. Nothing happens before Run.
func New(o Options) (*Dispatcher, error) {
	o.defaults()
	var nonce [6]byte
	if _, err := rand.Read(nonce[:]); err != nil {
		return nil, fmt.Errorf("naming instances: %w", err)
	}
	d := &Dispatcher{
		o: o, log: o.Log.With("component", "dispatch"), base: time.Now().Add(-time.Second), nonce: hex.EncodeToString(nonce[:]),
		look: make(chan struct{}, 1), stir: make(chan struct{}, 1), boots: make(chan struct{}, o.Limits.Boots), node: route.NewNode(o.Limits.Route),
		calls: map[route.CallID]*pending{}, instances: map[route.InstanceID]*instance{}, places: map[uint32]bool{},
		versions: map[route.Revision]*version{}, functions: map[blixard.FunctionName]*function{}, book: route.NewSlotBook(),
	}
	d.talk, d.hush = context.WithCancel(context.Background())
	d.cloner, _ = o.Driver.(vmm.Cloner)
	d.metrics = newMetrics(d)
	if o.Registerer != nil {
		if err := o.Registerer.Register(d.metrics); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
	}
	if err := d.openTemplates(); err != nil {
		return nil, err
	}
	return d, nil
}

// Run does the dispatcher's work until ctx ends; then it ends all instances and
// returns. An error means that left-overs of a former daemon could not be ended.
func (d *Dispatcher) Run(ctx context.Context) error {
	if err := d.clear(ctx); err != nil {
		return err
	}
	if d.o.Guard != nil {
		d.o.Guard()
	}
	effects, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	if !d.chores.open(effects) {
		return errors.New("the dispatcher was run before")
	}
	var loops sync.WaitGroup
	loops.Go(func() { d.watch(ctx) })
	loops.Go(func() { d.keepTime(ctx) })
	loops.Go(func() { d.build(ctx) })
	loops.Go(func() { d.tidy(ctx) })
	loops.Wait()
	d.mu.Lock()
	d.closed = true
	d.perform(d.node.SetLease(d.nowMS(), false))
	d.mu.Unlock()
	d.hush()
	d.chores.close(cancel)
	return nil
}

// nowMS is the dispatcher's monotonic clock.
func (d *Dispatcher) nowMS() int64 { return time.Since(d.base).Milliseconds() }

// clear ends what a former daemon has left, before slots are used: it may still
// run calls.
func (d *Dispatcher) clear(ctx context.Context) error {
	for {
		found, err := d.o.Driver.List(ctx)
		for _, s := range found {
			d.log.Info("ending an instance of a former daemon", "event", "clear", "instance", s.Ref.String())
			err = errors.Join(err, d.o.Driver.Stop(ctx, s.Ref, 0), d.o.Driver.Remove(ctx, s.Ref))
		}
		if err == nil {
			return nil
		}
		d.log.Error("ending instances of a former daemon", "event", "clear", "error", err)
		if !pause(ctx, time.Second) {
			return fmt.Errorf("ending instances of a former daemon: %w", err)
		}
	}
}

// keepTime keeps the node's lease and deadlines: often while there is something
// here that would have to end with the lease, else as seldom as will do. A call
// that comes to an idle node wakes it.
func (d *Dispatcher) keepTime(ctx context.Context) {
	const often, seldom = 20 * time.Millisecond, 250 * time.Millisecond
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-d.stir:
		}
		holds := d.o.Lease()
		d.mu.Lock()
		now := d.nowMS()
		d.perform(d.node.SetLease(now, holds))
		if ticket := d.book.Lease(holds); ticket != 0 {
			d.chores.do(func(context.Context) { d.refresh(ticket) })
		}
		if now >= d.node.WakeMS() {
			d.perform(d.node.Tick(now))
		}
		wait := often
		if d.rests = holds && d.node.Rests(); d.rests {
			due := min(max(d.node.WakeMS()-now, often.Milliseconds()), seldom.Milliseconds())
			wait = time.Duration(due) * time.Millisecond
		}
		d.mu.Unlock()
		timer.Reset(wait)
	}
}

// wakeTime has keepTime look at the lease now, should it look seldom. Callers
// hold mu.
func (d *Dispatcher) wakeTime() {
	if d.rests {
		d.rests = false
		poke(d.stir)
	}
}

// perform carries actions out, or begins to. Callers hold mu.
func (d *Dispatcher) perform(actions []route.Action) {
	if len(actions) > 0 {
		d.wakeTime()
	}
	for i := range actions {
		a := &actions[i]
		switch a.Kind {
		case route.Assign:
			d.assign(a)
		case route.Reject:
			d.answer(a.Call, a.Refusal, false)
		case route.Abort:
			d.answer(a.Call, a.Refusal, true)
		case route.Spawn, route.Start:
			d.order(a)
		case route.Look:
			in := d.instances[a.Instance]
			d.chores.do(func(context.Context) { d.lookAt(in) })
		case route.Kill:
			in, why := d.instances[a.Instance], a.Why
			d.tell(in.v.rev, "kill", in.name, why)
			in.cancel()
			d.chores.do(func(ctx context.Context) { d.kill(ctx, in, why) })
		case route.Lease:
			name, n := a.Revision.Function, a.N
			d.book.Began(name)
			d.chores.do(func(context.Context) { d.lease(name, n) })
		case route.Return:
			name, n := a.Revision.Function, a.N
			d.book.Began(name)
			d.chores.do(func(context.Context) { d.giveBack(name, n) })
		}
	}
}

// in runs an input of the node and carries out what it orders.
func (d *Dispatcher) in(input func(nowMS int64) []route.Action) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.perform(input(d.nowMS()))
}

func (d *Dispatcher) function(name blixard.FunctionName) *function {
	f := d.functions[name]
	if f == nil {
		f = &function{name: name, log: newLogRing(name), stats: d.metrics.stats(name)}
		d.functions[name] = f
	}
	return f
}

// version is what instances of a revision are made of.
type version struct {
	rev     route.Revision
	spec    blixard.FunctionSpec
	code    string // digest
	builder blixard.NodeName
	arn     string
	f       *function

	hooked atomic.Bool // it has hooks of its own for a restore

	// Guarded by the dispatcher's mu.
	index    uint64    // of the newest view that has it
	changed  time.Time // when it was deployed
	template *template // nil: none is wanted, or it is not known yet
	failure  string    // why the last start failed
}

// chores are the goroutines of effects: begun while there is a context for them,
// waited for at the end.
type chores struct {
	mu  sync.Mutex
	ctx context.Context //nolint:containedctx // it is that of the goroutines begun here
	all sync.WaitGroup
}

func (c *chores) open(ctx context.Context) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx != nil {
		return false
	}
	c.ctx = ctx
	return true
}

// do begins a goroutine. Before Run there are no actions, so none is lost.
func (c *chores) do(f func(context.Context)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx != nil {
		ctx := c.ctx
		c.all.Go(func() { f(ctx) })
	}
}

// close lets kills end, then everything else.
func (c *chores) close(cancel context.CancelFunc) {
	done := make(chan struct{})
	var wait sync.WaitGroup
	wait.Go(func() {
		c.all.Wait()
		close(done)
	})
	select {
	case <-done:
	case <-time.After(10 * time.Second):
	}
	cancel()
	wait.Wait()
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// pause waits; false when ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
