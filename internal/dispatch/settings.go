package dispatch

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/state"
)

// watch takes what the cluster wants over to the node, as often as it changes
// and every second at least, since memory and neighbours change without it.
func (d *Dispatcher) watch(ctx context.Context) {
	for ctx.Err() == nil {
		began := time.Now()
		view := d.o.Cluster.View()
		d.take(view)
		took := time.Since(began)
		wait, cancel := context.WithTimeout(ctx, time.Second)
		looked := make(chan struct{})
		d.chores.do(func(context.Context) {
			defer close(looked)
			select {
			case <-d.look:
				cancel()
			case <-wait.Done():
			}
		})
		if err := d.o.Cluster.Wait(wait, view.Index); err == nil {
			// Entries come in crowds, and most have nothing to do with functions.
			pause(wait, max(5*time.Millisecond, 10*took))
		}
		cancel()
		<-looked
	}
}

// take tells the node what a view says.
func (d *Dispatcher) take(view *state.View) {
	nowMS := time.Now().UnixMilli()
	self := view.Node(d.o.Node)
	budget := d.budget(view, self)
	d.mu.Lock()
	defer d.mu.Unlock()
	if self == nil {
		return // not a member yet
	}
	d.raftID = self.RaftID
	settings, seen := d.settings(view, nowMS)
	now := d.nowMS()
	d.perform(d.node.SetSettings(now, settings))
	d.perform(d.node.SetBudget(now, budget))
	d.perform(d.node.SetDraining(now, self.Availability == blixard.Draining))
	d.takeSlots(view, self)
	for rev, v := range d.versions { //order:any each by itself
		if !seen[rev] && v.index < view.Index && !d.inUse(rev) {
			delete(d.versions, rev)
		}
	}
	d.forget(settings)
}

// inUse tells whether there is an instance of a revision. Callers hold mu.
func (d *Dispatcher) inUse(rev route.Revision) bool {
	for _, in := range d.instances { //order:any a question of existence
		if in.v.rev == rev {
			return true
		}
	}
	return false
}

// forget drops what is remembered of functions that are gone for a while.
func (d *Dispatcher) forget(settings []route.Settings) {
	const keep = 5 * time.Minute
	for name, f := range d.functions { //order:any each by itself
		_, here := slices.BinarySearchFunc(settings, name, func(s route.Settings, name blixard.FunctionName) int { return cmp.Compare(s.Function, name) })
		switch {
		case here:
			f.gone = time.Time{}
		case f.gone.IsZero():
			f.gone = time.Now()
		case time.Since(f.gone) > keep && d.book.Forget(name):
			delete(d.functions, name)
			d.metrics.drop(name)
		}
	}
}

// takeSlots tells the node of slots that the cluster has for it, once no answer
// is outstanding that the view may not have. Callers hold mu.
func (d *Dispatcher) takeSlots(view *state.View, self *blixard.Node) {
	if !d.book.Current(view.Index) {
		return
	}
	counts := map[blixard.FunctionName]int{}
	view.SlotsOn(d.o.Node, func(s *blixard.FunctionSlots) bool {
		if s.NodeEpoch == self.Epoch && s.Count > 0 {
			counts[s.Function] = s.Count
			d.function(s.Function)
		}
		return true
	})
	names := make([]blixard.FunctionName, 0, len(d.functions))
	for name := range d.functions { //order:any sorted below
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if d.book.Believes(name, view.Index) && !d.node.Asking(name) {
			d.perform(d.node.Slots(d.nowMS(), name, counts[name]))
		}
	}
}

// refresh finds out how new a view has to be to tell which slots this node has.
func (d *Dispatcher) refresh(ticket uint64) {
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		view, err := d.o.Cluster.Fresh(d.talk)
		d.mu.Lock()
		if err == nil {
			d.book.Fresh(ticket, view.Index)
		}
		done := !d.book.Asks(ticket)
		d.mu.Unlock()
		if done {
			poke(d.look)
			return
		}
		if !pause(d.talk, wait) {
			return
		}
	}
}

// settings are the functions as the node has to know them, and the revisions
// that are known. Callers hold mu.
func (d *Dispatcher) settings(view *state.View, wallMS int64) (all []route.Settings, seen map[route.Revision]bool) {
	seen = map[route.Revision]bool{}
	site := route.Site{Node: d.o.Node, Workers: workers(view), WallMS: wallMS, FreshMS: d.o.Limits.Route.PoolKeepMS, RecycleCalls: d.o.Limits.RecycleCalls}
	view.Functions(func(f *blixard.Function) bool {
		if f.Deleting {
			return true
		}
		s := route.Settings{
			Function: f.Name, UID: f.UID, MaxConcurrent: f.MaxConcurrent,
			Contended: view.SlotsShort(f.Name, d.o.Node, wallMS) > 0, Over: view.SlotsLeased(f.Name) > f.MaxConcurrent,
		}
		view.FunctionVersions(f.Name, func(fv *blixard.FunctionVersion) bool {
			v := d.versionLocked(view, fv)
			seen[v.rev] = true
			if callable := fv.Callable(); callable != nil {
				if callable != fv {
					v = d.versionLocked(view, callable)
					seen[v.rev] = true
				}
				s.Revisions = append(s.Revisions, site.SettingsOf(f, callable, v.template != nil && d.templates.ready(v.template)))
			}
			return true
		})
		slices.SortFunc(s.Revisions, func(a, b route.RevisionSettings) int { return a.Revision.Compare(b.Revision) })
		all = append(all, s)
		return true
	})
	slices.SortFunc(all, func(a, b route.Settings) int { return cmp.Compare(a.Function, b.Function) })
	return all, seen
}

// versionLocked is what is remembered of a revision, made when it is not there.
// Callers hold mu.
func (d *Dispatcher) versionLocked(view *state.View, fv *blixard.FunctionVersion) *version {
	uid := uint64(0)
	if f := view.Function(fv.Function); f != nil {
		uid = f.UID
	}
	rev := route.Revision{Function: fv.Function, UID: uid, Number: fv.Number, Seq: fv.Seq}
	v := d.versions[rev]
	if v == nil {
		v = &version{rev: rev, spec: fv.Spec, code: fv.CodeDigest, f: d.function(fv.Function), changed: time.UnixMilli(fv.ModifiedMS)}
		v.arn = fmt.Sprintf("arn:aws:lambda:%s:%s:function:%s", d.o.Region, d.o.AccountID, fv.Function)
		d.versions[rev] = v
	}
	v.index = max(v.index, view.Index)
	v.builder = cmp.Or(fv.Builder, v.builder)
	return v
}

// workers are the nodes that instances may run on, in order.
func workers(view *state.View) []blixard.NodeName {
	var names []blixard.NodeName
	view.Nodes(func(n *blixard.Node) bool {
		if n.State == blixard.NodeReady && n.Availability == blixard.Active && n.RunsInstances() && !n.Simulated {
			names = append(names, n.Name)
		}
		return true
	})
	slices.Sort(names)
	return names
}

// budget is what instances may take of the machine's memory: what is neither
// reserved nor a VM's, overcommitted, and less when the machine really runs out.
func (d *Dispatcher) budget(view *state.View, self *blixard.Node) int64 {
	l := &d.o.Limits
	if l.BudgetMiB > 0 {
		return l.BudgetMiB
	}
	if self == nil {
		return 0
	}
	free := self.Allocatable().MemoryMiB - view.Usage(d.o.Node).Used.MemoryMiB
	budget := max(free, 0) * l.OvercommitPercent / 100
	if available, ok := availableMiB(); ok && available < l.KeepFreeMiB {
		d.mu.Lock()
		used, _ := d.node.Memory()
		d.mu.Unlock()
		budget = min(budget, max(0, used-(l.KeepFreeMiB-available)))
	}
	return budget
}

// availableMiB is what the kernel says can be used without swapping.
func availableMiB() (mib int64, ok bool) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, false
	}
	defer f.Close()
	lines := bufio.NewScanner(io.LimitReader(f, 8<<10))
	for lines.Scan() {
		if rest, ok := bytes.CutPrefix(lines.Bytes(), []byte("MemAvailable:")); ok {
			kib, err := strconv.ParseInt(string(bytes.TrimSpace(bytes.TrimSuffix(rest, []byte(" kB")))), 10, 64)
			return kib >> 10, err == nil
		}
	}
	return 0, false
}

// lease asks the cluster for slots.
func (d *Dispatcher) lease(name blixard.FunctionName, n int) {
	const patience = 10 * time.Second
	ctx, cancel := context.WithTimeout(d.talk, patience)
	defer cancel()
	self := d.o.Cluster.View().Node(d.o.Node)
	granted, index := 0, uint64(0)
	err := error(blixard.Errorf(blixard.CodeUnavailable, "this node is not a member of the cluster yet"))
	if self != nil {
		var out state.Outcome
		out, err = d.o.Cluster.Propose(ctx, &state.LeaseSlots{Function: name, Node: d.o.Node, NodeEpoch: self.Epoch, Want: n}, d.proposalKey("lease"))
		granted, index = int(out.Value), out.Index
	}
	if err != nil {
		d.log.Warn("leasing execution slots", "event", "lease", "function", string(name), "want", n, "error", err)
		// Should they have been leased all the same, a newer view will tell.
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.landed(name, index, err)
	f := d.function(name)
	f.granted = time.Now()
	if err != nil {
		d.tell(route.Revision{Function: name}, "lease", "", err.Error())
		d.perform(d.node.LeaseFailed(d.nowMS(), name))
		return
	}
	d.tell(route.Revision{Function: name}, "lease", "", fmt.Sprintf("%d of %d slots", granted, n))
	d.perform(d.node.Granted(d.nowMS(), name, granted))
}

// giveBack returns slots, however long that takes: they are not used any more.
func (d *Dispatcher) giveBack(name blixard.FunctionName, n int) {
	ctx := d.talk
	self := d.o.Cluster.View().Node(d.o.Node)
	if self == nil {
		return
	}
	c := &state.ReturnSlots{Function: name, Node: d.o.Node, NodeEpoch: self.Epoch, Count: n}
	key := d.proposalKey("return")
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		out, err := d.o.Cluster.Propose(ctx, c, key)
		final := err == nil || blixard.CodeOf(err) != blixard.CodeUnavailable && blixard.CodeOf(err) != blixard.CodeOverloaded
		if final || ctx.Err() != nil {
			d.mu.Lock()
			d.landed(name, out.Index, err)
			d.mu.Unlock()
			d.tell(route.Revision{Function: name}, "return", "", fmt.Sprintf("%d slots", n))
			return
		}
		if !pause(ctx, wait) {
			return
		}
	}
}

// landed notes the end of a proposal about slots. When its outcome is not known
// the slots are not looked at before the state shows it for certain: the node
// has the lower number until then, which is safe. Callers hold mu.
func (d *Dispatcher) landed(name blixard.FunctionName, index uint64, err error) {
	if err != nil {
		index = d.o.Cluster.View().Index + 1
	}
	d.book.Landed(name, index)
}

func (d *Dispatcher) proposalKey(what string) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.nextRef++
	return fmt.Sprintf("fn-%s/%s/%d", what, d.nonce, d.nextRef)
}
