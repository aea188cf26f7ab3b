package dispatch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"strings"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/state"
)

// Words of FunctionVersion.StateCode.
const (
	codeInvalidCode = "InvalidCode"
	codeInitError   = "InitError"
	codeTimeout     = "Timeout"
	codeOutOfMemory = "OutOfMemory"
	codeInternal    = "Internal"
)

// buildTries is how often a build is tried that fails for no fault of the
// function's.
const buildTries = 3

// build does what the leader has this node build, and finds out which templates
// versions want.
func (d *Dispatcher) build(ctx context.Context) {
	room := make(chan struct{}, d.o.Limits.Builds)
	busy := map[route.Revision]bool{}
	done := make(chan route.Revision, 64)
	index := uint64(0)
	for ctx.Err() == nil {
		d.nameTemplates(ctx)
		view := d.o.Cluster.View()
		d.keepCopies(view, room)
		index = view.Index
		for _, fv := range d.mine(view) {
			v := d.versionOf(view, fv)
			if v == nil || busy[v.rev] {
				continue
			}
			busy[v.rev] = true
			d.chores.do(func(ctx context.Context) {
				room <- struct{}{}
				d.deploy(ctx, v, fv)
				<-room
				done <- v.rev
			})
		}
		// A look now and then as well: what was assigned is then not missed.
		wait, cancel := context.WithTimeout(ctx, time.Second)
		if err := d.o.Cluster.Wait(wait, index); err == nil {
			// Many entries have nothing to do with functions.
			pause(wait, 20*time.Millisecond)
		}
		cancel()
		for more := true; more; {
			select {
			case rev := <-done:
				delete(busy, rev)
			default:
				more = false
			}
		}
	}
}

// mine are the versions that this node is to build.
func (d *Dispatcher) mine(view *state.View) []*blixard.FunctionVersion {
	node := view.Node(d.o.Node)
	if node == nil || !d.o.Lease() {
		return nil
	}
	var mine []*blixard.FunctionVersion
	view.PendingVersions(func(fv *blixard.FunctionVersion) bool {
		if fv.Builder == d.o.Node && fv.BuilderEpoch == node.Epoch {
			mine = append(mine, fv)
		}
		return true
	})
	return mine
}

// deploy makes a version callable, or finds out why it is not.
func (d *Dispatcher) deploy(ctx context.Context, v *version, fv *blixard.FunctionVersion) {
	began := time.Now()
	d.tell(v.rev, "build", "", "begins")
	var err error
	for try := 1; try <= buildTries; try++ {
		if err = d.prepare(ctx, v); err == nil || fault(err) != codeInternal || ctx.Err() != nil {
			break
		}
		d.log.Warn("building a function's template", "event", "build", "function", v.rev.String(), "try", try, "error", err)
		if !pause(ctx, time.Duration(try)*time.Second) {
			return
		}
	}
	if ctx.Err() != nil {
		return
	}
	report := &state.ReportFunction{
		Function: v.rev.Function, Number: v.rev.Number, Seq: v.rev.Seq, Node: d.o.Node, NodeEpoch: fv.BuilderEpoch, State: blixard.FunctionActive,
	}
	if err != nil {
		report.State, report.Code, report.Reason = blixard.FunctionFailed, fault(err), reason(err)
	}
	d.tell(v.rev, "build", "", fmt.Sprintf("ended after %d ms: %s", time.Since(began).Milliseconds(), cmp.Or(report.Reason, string(report.State))))
	// The key is of this build alone: another one may end otherwise.
	if err := d.propose(ctx, report, d.proposalKey("build")); err != nil {
		// The leader assigns it again, to this node or another.
		d.log.Warn("reporting a function's build", "event", "build", "function", v.rev.String(), "error", err)
	}
}

// prepare has everything at hand that instances of a version need, and sees the
// function start.
func (d *Dispatcher) prepare(ctx context.Context, v *version) error {
	if err := d.haveCode(ctx, v); err != nil {
		return err
	}
	if err := d.o.Code.Inspect(ctx, v.code, v.spec); err != nil {
		return err
	}
	if d.cloner == nil || v.spec.Snapshot == "off" {
		return d.probe(ctx, v)
	}
	t, err := d.nameTemplate(ctx, v)
	if err != nil {
		return err
	}
	return d.haveTemplate(ctx, v, t)
}

// fault is the word for why a version cannot be called.
func fault(err error) string {
	if init, ok := errors.AsType[*call.InitError](err); ok {
		switch {
		case strings.Contains(init.Type, "Timedout"):
			return codeTimeout
		case strings.Contains(init.Type, "OutOfMemory"):
			return codeOutOfMemory
		default:
			return codeInitError
		}
	}
	if e, ok := errors.AsType[*blixard.Error](err); ok && e.Code == blixard.CodeInvalid {
		return codeInvalidCode
	}
	return codeInternal
}

// reason is what the user is told: the error and the end of the log.
func reason(err error) string {
	const most = 2000
	text := err.Error()
	if init, ok := errors.AsType[*call.InitError](err); ok {
		text = init.Type + ": " + init.Message
		if tail := strings.TrimSpace(string(init.Log)); tail != "" {
			text += "\n" + tail[max(0, len(tail)-most/2):]
		}
	}
	text = strings.ToValidUTF8(text, "?")
	return strings.ToValidUTF8(text[:min(len(text), most)], "")
}

// nameTemplates finds the keys of the templates that versions want.
func (d *Dispatcher) nameTemplates(ctx context.Context) {
	if d.cloner == nil {
		return
	}
	d.mu.Lock()
	var unnamed []*version
	for _, v := range d.versions { //order:any each by itself
		if v.template == nil && v.spec.Snapshot != "off" {
			unnamed = append(unnamed, v)
		}
	}
	d.mu.Unlock()
	for _, v := range unnamed {
		if _, err := d.nameTemplate(ctx, v); err != nil {
			d.log.Warn("naming a function's template", "event", "template", "function", v.rev.String(), "error", err)
			return
		}
		poke(d.look)
	}
}

// nameTemplate finds the template that instances of a version are clones of.
func (d *Dispatcher) nameTemplate(ctx context.Context, v *version) (*template, error) {
	if t := d.wanted(v); t != nil {
		return t, nil
	}
	key, err := d.templateKey(ctx, v)
	if err != nil {
		return nil, err
	}
	t := d.templates.get(key)
	d.mu.Lock()
	defer d.mu.Unlock()
	v.template = t
	return t, nil
}

// rebuild makes a template again that is wanted and not here: nobody has it.
func (d *Dispatcher) rebuild(v *version, t *template) {
	if _, err := d.join(v, t); err != nil {
		d.log.Debug("building a function's template", "event", "template", "function", v.rev.String(), "error", err)
	}
}

// propose has a command committed, trying again for a while when there is no
// leader.
func (d *Dispatcher) propose(ctx context.Context, c state.Command, key string) error {
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 2*time.Second) {
		_, err := d.o.Cluster.Propose(ctx, c, key)
		if err == nil || blixard.CodeOf(err) != blixard.CodeUnavailable && blixard.CodeOf(err) != blixard.CodeOverloaded {
			return err
		}
		if !pause(ctx, wait) {
			return err
		}
	}
}

// tidy removes templates and code that nothing needs any more.
func (d *Dispatcher) tidy(ctx context.Context) {
	unused := map[string]time.Time{} // code that no version has, since when
	for pause(ctx, 30*time.Second) {
		d.tidyNow(unused)
	}
}

func (d *Dispatcher) tidyNow(unused map[string]time.Time) {
	wanted := map[string]bool{}
	view := d.o.Cluster.View()
	d.mu.Lock()
	if !d.book.Current(view.Index) {
		d.mu.Unlock()
		return // what looks unwanted may only be unknown yet
	}
	for _, v := range d.versions { //order:any a set
		if v.template != nil {
			wanted[v.template.key] = true
		}
	}
	d.mu.Unlock()
	for _, key := range d.templates.sweep(wanted, d.o.Limits.TemplateMiB<<20) {
		d.log.Info("removed a template", "event", "template", "key", key)
	}
	needed := map[string]bool{}
	view.Functions(func(f *blixard.Function) bool {
		view.FunctionVersions(f.Name, func(fv *blixard.FunctionVersion) bool {
			for ; fv != nil; fv = fv.Previous {
				needed[fv.CodeDigest] = true
			}
			return true
		})
		return true
	})
	packages, err := d.o.Code.List()
	if err != nil {
		d.log.Warn("listing the code of functions", "event", "tidy", "error", err)
		return
	}
	for _, p := range packages {
		since, known := unused[p.Digest]
		switch {
		case needed[p.Digest]:
			delete(unused, p.Digest)
		case !known:
			unused[p.Digest] = time.Now()
		case time.Since(since) > d.o.Limits.CodeKeep:
			if err := d.o.Code.Remove(p.Digest); err != nil {
				d.log.Warn("removing the code of a function", "event", "tidy", "digest", p.Digest, "error", err)
			}
			delete(unused, p.Digest)
		}
	}
}

// others are the nodes that may have something of a version, likeliest first.
func (d *Dispatcher) others(v *version) []blixard.NodeName {
	const most = 8
	var names []blixard.NodeName
	d.o.Cluster.View().Nodes(func(n *blixard.Node) bool {
		if n.Name != d.o.Node && n.State == blixard.NodeReady && n.RunsInstances() && !n.Simulated {
			names = append(names, n.Name)
		}
		return true
	})
	slices.SortStableFunc(names, func(a, b blixard.NodeName) int {
		return cmp.Compare(rank(a == v.builder), rank(b == v.builder))
	})
	return names[:min(len(names), most)]
}

func rank(first bool) int {
	if first {
		return 0
	}
	return 1
}

// copies of a template are on so many nodes beside the builder: so many nodes
// can be lost until it has to be made again.
const copies = 2

// copyAfter is how long after a deployment copies are made: not while the first
// calls come.
const copyAfter = 5 * time.Second

// keepCopies fetches a template that this node is to have a copy of, or builds
// one that it is the builder of, one at a time.
func (d *Dispatcher) keepCopies(view *state.View, room chan struct{}) {
	if d.cloner == nil {
		return
	}
	nodes := workers(view)
	var v *version
	var t *template
	build := false
	d.mu.Lock()
	for _, one := range d.versions { //order:any another one is next
		if one.template == nil || !d.node.Knows(one.rev) || time.Since(one.changed) < copyAfter {
			continue
		}
		// The builder's may be missing since the key has changed with a release.
		build = one.builder == d.o.Node && d.templates.tryAgain(one.template)
		if build || d.o.Peers != nil && keeps(nodes, d.o.Node, one) && d.templates.fetchable(one.template) {
			v, t = one, one.template
			break
		}
	}
	d.mu.Unlock()
	if v == nil {
		return
	}
	select {
	case room <- struct{}{}:
	default:
		return
	}
	d.chores.do(func(ctx context.Context) {
		if build {
			if err := d.haveTemplate(ctx, v, t); err != nil {
				d.log.Warn("building a function's template", "event", "template", "function", v.rev.String(), "error", err)
			}
		} else {
			d.fetchTemplate(ctx, v, t)
		}
		<-room
	})
}

// keeps tells whether a node is one of those that keep a copy: which ones
// depends on the key, so that all do their part.
func keeps(nodes []blixard.NodeName, self blixard.NodeName, v *version) bool {
	weight := func(n blixard.NodeName) uint64 {
		h := fnv.New64a()
		h.Write([]byte(v.template.key + string(n)))
		return h.Sum64()
	}
	if self == v.builder || !slices.Contains(nodes, self) {
		return false
	}
	before := 0
	for _, n := range nodes {
		if n != self && n != v.builder && weight(n) > weight(self) {
			before++
		}
	}
	return before < copies
}

// versionOf is what is remembered of a version.
func (d *Dispatcher) versionOf(view *state.View, fv *blixard.FunctionVersion) *version {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.versionLocked(view, fv)
}
