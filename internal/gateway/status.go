package gateway

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/wire"
)

// Load is what there is of one revision on a node.
type Load struct {
	Revision    route.Revision
	Warm        int // calls it would take at once
	Busy        int // calls that run
	Pooled      int // clones spawned ahead
	SlotsFree   int // of the function: leased and unused
	HasTemplate bool
}

func codeLoad(c *wire.Coder, l *Load) {
	c.Record(func(c *wire.Coder) {
		wire.String(c, &l.Revision.Function)
		wire.Uint(c, &l.Revision.UID)
		wire.Int(c, &l.Revision.Number)
		wire.Uint(c, &l.Revision.Seq)
		wire.Int(c, &l.Warm)
		wire.Int(c, &l.Busy)
		wire.Int(c, &l.Pooled)
		wire.Int(c, &l.SlotsFree)
		wire.Bool(c, &l.HasTemplate)
	})
}

// NodeLoad is what functions hold of a node.
type NodeLoad struct {
	MemoryMiB int64 // what could not be given back at once
	MilliCPU  int64
	Draining  bool // it takes nothing new
	Revisions []Load
}

// Demand is how many calls of a function with a rate limit come to a node, in
// thousandths of a call per second.
type Demand struct {
	Function blixard.FunctionName
	Milli    int64
}

func codeDemand(c *wire.Coder, d *Demand) {
	c.Record(func(c *wire.Coder) {
		wire.String(c, &d.Function)
		wire.Int(c, &d.Milli)
	})
}

// Bounds of the exchange between nodes.
const (
	maxStatusBytes = 4 << 20
	statusWithin   = time.Second
	statusAtOnce   = 8
	// keepAlive is how often nodes speak when nothing changes; in large clusters
	// less often, so that what each has to do does not grow with their number.
	keepAlive     = time.Second
	keepAliveEach = 10 * time.Millisecond // for each node, if that is more
	announceEach  = 2 * time.Millisecond  // between announcements, the same
	// forgetAfter is when what a silent node has told counts as nothing.
	forgetAfter = 10 * time.Second
	// downFor is how long a node that could not be reached is left alone.
	downFor = time.Second
)

// announcement is what nodes tell each other.
type announcement struct {
	node    blixard.NodeName
	epoch   uint64
	load    NodeLoad
	demands []Demand
	// at orders a node's announcements: they may overtake each other. It is the
	// node's clock when it was made.
	at int64
}

func (a *announcement) code(c *wire.Coder) {
	wire.String(c, &a.node)
	wire.Uint(c, &a.epoch)
	wire.List(c, &a.load.Revisions, codeLoad)
	wire.List(c, &a.demands, codeDemand)
	wire.Int(c, &a.load.MemoryMiB)
	wire.Int(c, &a.load.MilliCPU)
	wire.Bool(c, &a.load.Draining)
	wire.Int(c, &a.at)
}

// table is what other nodes have told.
type table struct {
	mu    sync.RWMutex
	nodes map[blixard.NodeName]*peer
	quiet time.Duration // between two messages to a node when nothing changes
}

// peer is one other node.
type peer struct {
	epoch     uint64
	load      NodeLoad // by revision
	demands   map[blixard.FunctionName]int64
	at        int64 // of what was heard
	heard     time.Time
	downUntil time.Time
	rtt       time.Duration // of announcements; 0: not measured

	told   [sha256.Size]byte // the sum of what it knows of this node
	toldAt time.Time         // when it was tried last
	busy   bool              // it is being told
}

func newTable() *table { return &table{nodes: map[blixard.NodeName]*peer{}, quiet: keepAlive} }

func (t *table) peer(name blixard.NodeName) *peer { // with t.mu
	p := t.nodes[name]
	if p == nil {
		p = new(peer)
		t.nodes[name] = p
	}
	return p
}

// take remembers what a node has told, unless something newer was heard already.
// A node whose clock was set back is believed again when it was silent.
func (t *table) take(a *announcement, now time.Time) {
	slices.SortFunc(a.load.Revisions, byRevision)
	demands := make(map[blixard.FunctionName]int64, len(a.demands))
	for _, d := range a.demands {
		demands[d.Function] = d.Milli
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.peer(a.node)
	if p.epoch == a.epoch && a.at < p.at && now.Sub(p.heard) < 3*t.quiet {
		return
	}
	p.at = a.at
	p.epoch, p.load, p.demands, p.heard, p.downUntil = a.epoch, a.load, demands, now, time.Time{}
}

// load is what a node has told in that epoch, how old that is, and how long the
// way to it is; ok is false if it has told nothing.
func (t *table) load(node blixard.NodeName, epoch uint64, now time.Time) (load NodeLoad, age, rtt time.Duration, ok bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	p := t.nodes[node]
	if p == nil || p.heard.IsZero() || p.epoch != epoch {
		return load, 0, 0, false
	}
	// What does not change is not repeated for a while: so old it is as good as new.
	return p.load, max(0, now.Sub(p.heard)-t.quiet), p.rtt, true
}

// demand is how many calls a second other nodes see of a function.
func (t *table) demand(name blixard.FunctionName, now time.Time) float64 {
	t.mu.RLock()
	defer t.mu.RUnlock()
	sum := int64(0)
	for _, p := range t.nodes { //order:any a sum
		if now.Sub(p.heard) < max(forgetAfter, 3*t.quiet) {
			sum += p.demands[name]
		}
	}
	return float64(sum) / 1000
}

// down leaves a node alone for a moment.
func (t *table) down(node blixard.NodeName, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.peer(node).downUntil = now.Add(downFor)
}

func (t *table) isDown(node blixard.NodeName, now time.Time) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	p := t.nodes[node]
	return p != nil && now.Before(p.downUntil)
}

// RTT is how long a message to another node and its answer take, by the newest
// announcements; ok is false when that was not measured.
func (g *Gateway) RTT(node blixard.NodeName) (rtt time.Duration, ok bool) {
	g.table.mu.RLock()
	defer g.table.mu.RUnlock()
	p := g.table.nodes[node]
	if p == nil || p.rtt == 0 {
		return 0, false
	}
	return p.rtt, true
}

// NodeLoad is what a node has told of its functions, and how long ago; ok is
// false if it has told nothing. Of this node it is what there is now.
func (g *Gateway) NodeLoad(node blixard.NodeName) (load NodeLoad, age time.Duration, ok bool) {
	if node == g.opt.Node {
		return g.localLoad(), 0, true
	}
	g.table.mu.RLock()
	defer g.table.mu.RUnlock()
	p := g.table.nodes[node]
	if p == nil || p.heard.IsZero() {
		return load, 0, false
	}
	return p.load, time.Since(p.heard), true
}

// localLoad is what there is here, by revision.
func (g *Gateway) localLoad() NodeLoad {
	if g.opt.Local == nil {
		return NodeLoad{Draining: true}
	}
	l := g.opt.Local.Load()
	if !slices.IsSortedFunc(l.Revisions, byRevision) {
		l.Revisions = slices.SortedFunc(slices.Values(l.Revisions), byRevision)
	}
	l.Draining = l.Draining || g.draining.Load()
	return l
}

func byRevision(a, b Load) int { return a.Revision.Compare(b.Revision) }

// of is what there is of a revision, nil if nothing.
func (l *NodeLoad) of(rev route.Revision) *Load {
	if i, found := slices.BinarySearchFunc(l.Revisions, rev, func(l Load, r route.Revision) int { return l.Revision.Compare(r) }); found {
		return &l.Revisions[i]
	}
	return nil
}

// announcement encodes what this node tells now; what is equal but for its time
// has the same sum.
func (g *Gateway) announcement(now time.Time) (encoded []byte, sum [sha256.Size]byte) {
	a := announcement{node: g.opt.Node}
	if n := g.opt.View().Node(g.opt.Node); n != nil {
		a.epoch = n.Epoch
	}
	a.load = g.localLoad()
	a.demands = g.rates.demands(now)
	slices.SortFunc(a.demands, func(x, y Demand) int { return cmp.Compare(x.Function, y.Function) })
	c := wire.Writer(nil)
	c.Record(a.code)
	sum = sha256.Sum256(c.Bytes())
	a.at = now.UnixNano()
	c = wire.Writer(nil)
	c.Record(a.code)
	return c.Bytes(), sum
}

// announce tells the other nodes what changes, and asks what they have, until
// ctx ends.
func (g *Gateway) announce(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, statusAtOnce)
	tick := time.NewTimer(0)
	defer tick.Stop()
	for {
		now := time.Now()
		mine, sum := g.announcement(now)
		for _, n := range g.due(sum, now) {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return
			}
			wg.Go(func() {
				defer func() { <-slots }()
				err := g.tell(ctx, n, mine, sum)
				if err != nil && ctx.Err() == nil {
					g.log.Debug("a node was not told this node's load", "node", string(n.Name), "error", err)
				}
			})
		}
		tick.Reset(max(g.limits.Announce, time.Duration(g.opt.View().NodeCount())*announceEach))
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// due are the nodes that do not know what this node tells, or have not heard of
// it for a while. They count as being told. Nodes that are gone are forgotten.
func (g *Gateway) due(sum [sha256.Size]byte, now time.Time) []*blixard.Node {
	t := g.table
	t.mu.Lock()
	defer t.mu.Unlock()
	view := g.opt.View()
	t.quiet = max(keepAlive, time.Duration(view.NodeCount())*keepAliveEach)
	var out []*blixard.Node
	view.Nodes(func(n *blixard.Node) bool {
		if n.Name == g.opt.Node || n.Witness || n.Simulated || n.State != blixard.NodeReady {
			return true
		}
		p := t.peer(n.Name)
		if !p.busy && (now.Sub(p.toldAt) >= t.quiet || now.After(p.downUntil) && p.told != sum) {
			p.busy, p.toldAt = true, now
			out = append(out, n)
		}
		return true
	})
	for name := range t.nodes { //order:any each by itself
		if view.Node(name) == nil {
			delete(t.nodes, name)
		}
	}
	return out
}

// tell sends a node what this one has, and takes what it answers.
func (g *Gateway) tell(ctx context.Context, n *blixard.Node, mine []byte, sum [sha256.Size]byte) error {
	ctx, cancel := context.WithTimeout(ctx, statusWithin)
	defer cancel()
	began := time.Now()
	theirs, err := g.swap(ctx, n, mine)
	took, now := time.Since(began), time.Now()
	if err == nil && theirs.node != n.Name {
		err = fmt.Errorf("at %s is %q", n.Address, theirs.node)
	}
	if err == nil {
		g.table.take(&theirs, now)
	}
	t := g.table
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.peer(n.Name)
	p.busy = false
	if err != nil {
		if p.told = [sha256.Size]byte{}; p.heard.Before(began) { // else it lives, and may have moved
			p.downUntil = now.Add(downFor)
		}
		return err
	}
	p.told = sum
	if p.rtt == 0 || took < p.rtt {
		p.rtt = took
	} else {
		p.rtt += (took - p.rtt) / 8
	}
	return nil
}

func (g *Gateway) swap(ctx context.Context, n *blixard.Node, mine []byte) (theirs announcement, err error) {
	res, err := g.peers.post(ctx, n.Address, statusPath, bytes.NewReader(mine), int64(len(mine)))
	if err != nil {
		return theirs, fmt.Errorf("telling %s: %w", n.Name, err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return theirs, fmt.Errorf("telling %s: it answers %s", n.Name, res.Status)
	}
	return readAnnouncement(res.Body)
}

func readAnnouncement(r io.Reader) (a announcement, err error) {
	b, err := io.ReadAll(io.LimitReader(r, maxStatusBytes+1))
	if err != nil {
		return a, fmt.Errorf("reading a node's load: %w", err)
	}
	if len(b) > maxStatusBytes {
		return a, errors.New("reading a node's load: it is too long")
	}
	if err := decode(b, a.code); err != nil {
		return a, fmt.Errorf("reading a node's load: %w", err)
	}
	return a, nil
}

// serveStatus takes what another node tells, and tells it what there is here.
func (g *Gateway) serveStatus(w http.ResponseWriter, r *http.Request) {
	a, err := readAnnouncement(r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if n := g.opt.View().Node(a.node); n == nil || a.node == g.opt.Node {
		http.Error(w, "no such node", http.StatusForbidden)
		return
	}
	now := time.Now()
	g.table.take(&a, now)
	mine, _ := g.announcement(now)
	if _, err := w.Write(mine); err != nil {
		g.log.Debug("a node has left before it was answered", "node", string(a.node), "error", err)
	}
}
