package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/converge"
	"github.com/blixard/blixard/internal/guest"
	"github.com/blixard/blixard/internal/vmm"
	"github.com/blixard/blixard/internal/vmm/fake"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// cluster is a small leader: it keeps rows as the replicated state does, and
// can be out of reach.
type cluster struct {
	mu      sync.Mutex
	rows    map[converge.Ref]*blixard.Instance
	index   uint64
	changed chan struct{}
	cut     bool // nothing gets through
	reports int
	items   int
	node    []NodeReport
	history map[converge.Ref][]blixard.InstanceState
}

func newCluster() *cluster {
	return &cluster{rows: map[converge.Ref]*blixard.Instance{}, index: 1, changed: make(chan struct{}), history: map[converge.Ref][]blixard.InstanceState{}}
}

var errCut = errors.New("the network is cut")

// change edits the rows under the lock, as one committed command does.
func (c *cluster) change(edit func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	edit()
	c.index++
	close(c.changed)
	c.changed = make(chan struct{})
}

func (c *cluster) place(vm string, generation uint64, spec blixard.VMSpec) converge.Ref {
	spec.Defaults()
	id := blixard.SlotID(blixard.VMName(vm), 1)
	ref := converge.Ref{Instance: id, Generation: generation}
	c.change(func() {
		c.rows[ref] = &blixard.Instance{
			ID: id, VM: blixard.VMName(vm), Ordinal: 1, Generation: generation, Node: "n1", Spec: &spec, Wanted: blixard.WantRun, State: blixard.Pending,
		}
	})
	return ref
}

// want edits a copy of a row.
func (c *cluster) want(ref converge.Ref, edit func(*blixard.Instance)) {
	c.change(func() {
		row := *c.rows[ref]
		edit(&row)
		c.rows[ref] = &row
	})
}

func (c *cluster) row(ref converge.Ref) (blixard.Instance, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.rows[ref]
	if r == nil {
		return blixard.Instance{}, false
	}
	return *r, true
}

func (c *cluster) setCut(cut bool) {
	c.mu.Lock()
	c.cut = cut
	c.mu.Unlock()
}

func (c *cluster) Assigned() ([]*blixard.Instance, uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var rows []*blixard.Instance
	for _, ref := range slices.SortedFunc(maps.Keys(c.rows), converge.Ref.Compare) {
		rows = append(rows, c.rows[ref])
	}
	return rows, c.index
}

func (c *cluster) Wait(ctx context.Context, index uint64) error {
	c.mu.Lock()
	changed, newer := c.changed, c.index > index
	c.mu.Unlock()
	if newer {
		return nil
	}
	select {
	case <-changed:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *cluster) Report(_ context.Context, items []converge.Observation) (uint64, error) {
	c.mu.Lock()
	cut := c.cut
	c.mu.Unlock()
	if cut {
		return 0, errCut
	}
	c.change(func() {
		c.reports++
		c.items += len(items)
		for i := range items {
			c.observe(&items[i])
		}
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.index, nil
}

func (c *cluster) observe(o *converge.Observation) {
	ref := converge.Ref{Instance: blixard.SlotID(o.VM, o.Ordinal), Generation: o.Generation}
	old := c.rows[ref]
	switch {
	case old == nil:
	case o.Removed && old.Wanted == blixard.WantRemove:
		delete(c.rows, ref)
	case o.Removed || old.State.Terminal() || o.State != old.State && !blixard.CanFollow(old.State, o.State):
	default:
		row := *old
		if row.State != o.State {
			c.history[ref] = append(c.history[ref], o.State)
		}
		row.State, row.StatePaused, row.Message, row.Address = o.State, o.Paused, o.Message, o.Address
		row.Health, row.Acceleration = o.Health, o.Acceleration
		if len(o.Ports) > 0 {
			row.Ports = o.Ports
		}
		c.rows[ref] = &row
	}
}

func (c *cluster) ReportNode(_ context.Context, r NodeReport) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cut {
		return errCut
	}
	c.node = append(c.node, r)
	return nil
}

func (c *cluster) Heartbeat(context.Context) (Ack, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cut {
		return Ack{}, errCut
	}
	return Ack{Index: c.index, OK: len(c.node) > 0}, nil
}

// guests answers the channels of the fake's virtual machines.
type guests struct {
	ctx  context.Context //nolint:containedctx // of the test
	wg   sync.WaitGroup
	mu   sync.Mutex
	byVM map[vmm.Ref]*pretend
	mute bool // guests that do not answer
}

// pretend is one guest.
type pretend struct {
	mu        sync.Mutex
	machine   *fake.Machine
	ref       vmm.Ref
	config    *guest.Config
	exit      *int
	unhealthy bool
	clock     time.Duration // off
	set       int           // times the clock was set
}

func (g *guests) serve(machine func() *fake.Machine) func(vmm.Spec, net.Conn) {
	return func(spec vmm.Spec, conn net.Conn) {
		g.mu.Lock()
		defer g.mu.Unlock()
		p := g.byVM[spec.Ref]
		if p == nil {
			p = &pretend{machine: machine(), ref: spec.Ref}
			g.byVM[spec.Ref] = p
		}
		if g.mute {
			g.wg.Go(func() { io.Copy(io.Discard, conn) }) // until it closes
			return
		}
		ctx, cancel := context.WithCancel(g.ctx)
		var once sync.Once
		g.wg.Go(func() {
			defer cancel()
			guest.Serve(ctx, func(ctx context.Context) (io.ReadWriteCloser, error) {
				var c io.ReadWriteCloser
				once.Do(func() { c = conn })
				if c == nil {
					cancel()
					return nil, errors.New("the pipe is closed")
				}
				return c, nil
			}, p)
		})
	}
}

func (g *guests) of(ref converge.Ref) *pretend {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.byVM[vmmRef(ref)]
}

func (p *pretend) Configure(_ context.Context, c guest.Config) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.config != nil {
		return guest.ErrConfigured
	}
	p.config = &c
	return nil
}

func (p *pretend) State(context.Context) (guest.State, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := guest.State{Workload: guest.WorkloadNone, ClockUnixNano: time.Now().Add(p.clock).UnixNano()}
	if p.config != nil {
		s.Configured, s.InstanceID, s.Generation, s.Workload = true, p.config.InstanceID, p.config.Generation, guest.WorkloadRunning
	}
	if p.config != nil && len(p.config.Command) > 0 && p.config.Command[0] == "/nosuch" {
		s.Workload, s.Reason = guest.WorkloadFailed, "starting /nosuch: no such file or directory"
	}
	if p.exit != nil {
		s.Workload, s.ExitCode = guest.WorkloadExited, *p.exit
	}
	return s, nil
}

func (p *pretend) Exec(_ context.Context, r guest.ExecRequest, s guest.Streams) (int, error) {
	_, err := fmt.Fprintf(s.Stdout, "ran %v\n", r.Args)
	return 7, err
}

func (p *pretend) Logs(context.Context, guest.LogRequest, io.Writer) error { return nil }

func (p *pretend) Check(context.Context, guest.Check) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.unhealthy {
		return guest.ErrUnhealthy
	}
	return nil
}

func (p *pretend) SetClock(_ context.Context, unixNano int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clock = time.Until(time.Unix(0, unixNano))
	p.set++
	return nil
}

func (p *pretend) Shutdown(context.Context, time.Duration) error {
	p.machine.Kill(p.ref, "guest shut down")
	return nil
}

// node is a machine with a daemon that can be ended and begun again.
type node struct {
	t       *testing.T
	cluster *cluster
	machine *fake.Machine
	guests  *guests
	options Options
	agent   *Agent
	end     func()
}

type imagesFunc func(context.Context, string) (Bundle, error)

func (f imagesFunc) Bundle(ctx context.Context, image string) (Bundle, error) { return f(ctx, image) }

func newNode(t *testing.T, edit func(*Options)) *node {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	n := &node{t: t, cluster: newCluster(), guests: &guests{ctx: ctx, byVM: map[vmm.Ref]*pretend{}}}
	n.machine = fake.NewMachine(fake.Options{
		Now: time.Now, Guest: n.guests.serve(func() *fake.Machine { return n.machine }),
		Sleep: func(ctx context.Context, d time.Duration) error {
			if !pause(ctx, d) {
				return ctx.Err()
			}
			return nil
		},
	})
	n.options = Options{
		Node: "n1", Cluster: n.cluster, DataDir: t.TempDir(), Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
		Images:         imagesFunc(func(context.Context, string) (Bundle, error) { return Bundle{Kernel: "/vmlinuz"}, nil }),
		HeartbeatEvery: 20 * time.Millisecond, Lease: 500 * time.Millisecond, ResyncEvery: 200 * time.Millisecond, PollEvery: 20 * time.Millisecond,
	}
	if edit != nil {
		edit(&n.options)
	}
	n.start()
	t.Cleanup(func() {
		n.stop()
		for _, s := range n.found() {
			n.machine.Kill(s.Ref, "the test ends")
		}
		cancel()
		n.guests.wg.Wait()
	})
	return n
}

func (n *node) start() {
	n.t.Helper()
	n.options.Driver = n.machine.Open()
	agent, err := New(n.options)
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- agent.Run(ctx) }()
	n.agent = agent
	n.end = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				n.t.Errorf("Run: %v", err)
			}
		case <-time.After(20 * time.Second):
			n.t.Error("Run does not return")
		}
	})
}

func (n *node) stop() { n.end() }

func (n *node) found() []vmm.Status {
	n.t.Helper()
	found, err := n.machine.Open().List(context.Background())
	if err != nil {
		n.t.Fatal(err)
	}
	return found
}

func (n *node) phase(ref converge.Ref) vmm.Phase {
	for _, s := range n.found() {
		if refOf(s.Ref) == ref {
			return s.Phase
		}
	}
	return ""
}

// until polls, with a bound that only a broken program meets.
func (n *node) until(what string, ok func() bool) {
	n.t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			n.t.Fatalf("not in time: %s\nrows %s\nfound %+v", what, n.describe(), n.found())
		}
		<-tick.C
	}
}

func (n *node) describe() string {
	text := ""
	rows, _ := n.cluster.Assigned()
	for _, r := range rows {
		text += fmt.Sprintf("%s %s want %s %q %s; ", r.Incarnation(), r.State, r.Wanted, r.Message, cmp.Or(string(r.Health), "-"))
	}
	return text
}

func (n *node) untilState(ref converge.Ref, state blixard.InstanceState) blixard.Instance {
	n.t.Helper()
	var row blixard.Instance
	n.until(fmt.Sprintf("%s is %s", ref, state), func() bool {
		r, ok := n.cluster.row(ref)
		row = r
		return ok && r.State == state
	})
	return row
}
