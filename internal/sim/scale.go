package sim

import (
	"fmt"
	"hash/fnv"
	"io"
	"math/rand/v2"
	"slices"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/control"
	"github.com/blixard/blixard/internal/schedule"
	"github.com/blixard/blixard/internal/state"
)

// Meter measures what a run costs the process it is in. It is handed in: the
// simulator itself looks at no clock.
type Meter struct {
	NowNS  func() int64              // monotonic
	Memory func() (live, made int64) // bytes that live after a collection; allocations ever made
}

// ScaleSize is one size to measure.
type ScaleSize struct {
	Nodes     int `json:"nodes"`
	Instances int `json:"instances"`
	// Control has the leader's reconcilers decide, agents answer, and nodes be
	// lost and drained; without it the scheduler decides and the state applies.
	Control bool `json:"control"`
}

// ScaleSizes are the sizes of the profile scale: what a large cluster has, with
// all that decides, and the far end of what the tables and the scheduler hold.
func ScaleSizes() []ScaleSize {
	return []ScaleSize{
		{Nodes: 10, Instances: 2_000, Control: true},
		{Nodes: 100, Instances: 20_000, Control: true},
		{Nodes: 1_000, Instances: 100_000, Control: true},
		{Nodes: 1_000, Instances: 200_000},
		{Nodes: 10_000, Instances: 2_000_000},
	}
}

// ScaleCost is what one size cost.
type ScaleCost struct {
	ScaleSize
	VMs         int    `json:"vms"`
	Placed      int    `json:"placed"`         // placements that were applied
	Moved       int    `json:"moved"`          // of those, for instances whose node was lost or drained
	Entries     uint64 `json:"entries"`        // of the log
	DecisionsPS int64  `json:"decisions_ps"`   // placements decided per second of deciding
	AppliedPS   int64  `json:"applied_ps"`     // placements encoded, decoded and applied per second of that
	ElapsedMS   int64  `json:"elapsed_ms"`     // of the whole run, checks included
	IndexMS     int64  `json:"index_ms"`       // to build a new leader's index of the whole
	SnapshotMS  int64  `json:"snapshot_ms"`    // to encode and hash the whole state
	SnapshotMiB int64  `json:"snapshot_mib"`   // its size
	PerInstance int64  `json:"instance_b"`     // bytes of memory per instance, rows, derived tables and index together
	PerPlacing  int64  `json:"allocs"`         // allocations per placement, decided and applied
	LossMS      int64  `json:"loss_ms"`        // to place anew what a lost node held, with Control
	VirtualMS   int64  `json:"virtual_ms"`     // time that passed in the cluster, with Control
	StateHash   string `json:"state_hash"`     // of the state at the end: equal for equal seeds
	Checked     int    `json:"rows_checked"`   // rows of the independent check
	Lost        int    `json:"instances_lost"` // by the lost node
}

// ScaleReport is what the profile scale measured.
type ScaleReport struct {
	OK        bool        `json:"ok"`
	Seed      uint64      `json:"seed"`
	Sizes     []ScaleCost `json:"sizes"`
	TraceHash string      `json:"trace_hash"`
	Violation *Violation  `json:"violation,omitempty"`
}

// Scale places instances on clusters of growing size with the production state
// and scheduler (and reconcilers), and measures what it costs. Equal seeds give
// equal states. At the end of each size every row is counted anew, without the
// tables that the state derives: capacity, anti-affinity, ports, constraints,
// slots and generations. done is told each size as it is ready; it may be nil.
func Scale(seed uint64, sizes []ScaleSize, m Meter, done func(ScaleCost)) ScaleReport {
	report := ScaleReport{OK: true, Seed: seed}
	hash := fnv.New64a()
	for _, size := range sizes {
		cost, broken := scaleOne(seed, size, m)
		report.Sizes = append(report.Sizes, cost)
		io.WriteString(hash, cost.StateHash) //nolint:errcheck // a hash never fails to write
		if done != nil {
			done(cost)
		}
		if broken != nil {
			report.OK, report.Violation = false, broken
			break
		}
	}
	report.TraceHash = hashText(hash.Sum64())
	return report
}

// scaleBatch is how many placements go into one entry, as the controller's
// passes do.
const scaleBatch = 1_000

// scale is one cluster of a size.
type scale struct {
	size ScaleSize
	m    Meter
	rng  *rand.Rand
	s    *state.State
	now  int64 // virtual ms
	cost ScaleCost

	ctl    *control.Controller
	wakeMS int64

	decideNS, applyNS int64
	failed            *Violation
	fresh             []*blixard.Instance // placed, to be reported Running, with Control
	ending            []*blixard.Instance // to be stopped or removed
	down              blixard.NodeName    // out of touch
}

func scaleOne(seed uint64, size ScaleSize, m Meter) (ScaleCost, *Violation) {
	w := &scale{size: size, m: m, rng: rand.New(rand.NewPCG(seed, uint64(size.Nodes))), s: state.New(), now: 1_000}
	w.cost.ScaleSize = size
	began := m.NowNS()
	empty, _ := m.Memory()
	w.found()
	w.createVMs()
	_, madeBefore := m.Memory()
	if size.Control {
		w.converge()
	} else {
		w.place()
	}
	placed := w.cost.Placed
	live, made := m.Memory()
	if w.failed == nil && placed > 0 {
		w.cost.PerInstance, w.cost.PerPlacing = (live-empty)/int64(placed), (made-madeBefore)/int64(placed)
		w.cost.DecisionsPS = perSecond(placed, w.decideNS)
		w.cost.AppliedPS = perSecond(placed, w.applyNS)
	}
	if size.Control && w.failed == nil {
		w.disturb()
	}
	w.finish(began)
	return w.cost, w.failed
}

func perSecond(n int, ns int64) int64 {
	if ns <= 0 {
		return 0
	}
	return int64(n) * 1_000_000_000 / ns
}

// apply has one entry encoded, decoded and applied, as the log does it.
func (w *scale) apply(actor string, commands ...state.Command) []state.Result {
	began := w.m.NowNS()
	envelopes := make([]state.Envelope, len(commands))
	for i, c := range commands {
		envelopes[i] = state.Envelope{NowMS: w.now, Actor: actor, Command: c}
	}
	results, changes, err := w.s.Apply(w.s.Index()+1, 1, state.EncodeEntry(envelopes))
	if err != nil {
		w.fail("S13", "an entry cannot be read: %v", err)
	}
	w.applyNS += w.m.NowNS() - began
	w.cost.Entries++
	for i := range results {
		if results[i].Err != nil && w.failed == nil {
			w.fail("refusal", "%s: %v", describe(commands[i]), results[i].Err)
		}
	}
	w.observe(changes)
	return results
}

// observe takes what an entry changed to those whom it concerns.
func (w *scale) observe(changes []state.Change) {
	if w.ctl == nil {
		return
	}
	w.ctl.Observe(changes)
	if len(changes) > 0 {
		w.wakeMS = w.now
	}
	for i := range changes {
		inst, ok := changes[i].Object.(*blixard.Instance)
		switch {
		case !ok || changes[i].Deleted || inst.Node == w.down:
		case inst.Wanted != blixard.WantRun && (!inst.State.Terminal() || inst.Wanted == blixard.WantRemove && inst.State != blixard.Lost):
			w.ending = append(w.ending, inst)
		case inst.State == blixard.Pending:
			w.fresh = append(w.fresh, inst)
			w.cost.Placed++
		}
	}
}

func (w *scale) fail(invariant, format string, args ...any) {
	if w.failed == nil {
		w.failed = &Violation{Invariant: invariant, Detail: fmt.Sprintf("%d nodes, %d instances: ", w.size.Nodes, w.size.Instances) + fmt.Sprintf(format, args...), AtMS: w.now}
	}
}

// found makes the cluster: nodes of three sizes in ten zones, with room for
// half as much again as is to be placed: one is lost and one drained, of ten.
func (w *scale) found() {
	perNode := int64(w.size.Instances/w.size.Nodes) * 3 / 2
	if w.size.Nodes < 50 { // two of few are many
		perNode = perNode * 5 / 3
	}
	for i := range w.size.Nodes {
		name := blixard.NodeName(fmt.Sprintf("n%05d", i))
		id := state.NodeIdentity{Name: name, Address: string(name) + ":7400", Zone: fmt.Sprintf("z%d", i%10), Labels: []blixard.Label{{Key: "storage", Value: []string{"nvme", "ssd"}[i%2]}}}
		raftID := uint64(1)
		if i == 0 {
			w.apply("operator", &state.Bootstrap{ClusterID: "scale", Name: "scale", RaftID: 1, Node: id, FeatureLevel: blixard.FeatureLevel})
		} else {
			raftID = w.apply("operator", &state.JoinNode{Node: id})[0].Outcome.Value
		}
		part := []int64{2, 3, 4}[i%3] // thirds of the mean
		w.apply("agent", &state.ReportNode{
			Name: name, RaftID: raftID, Address: id.Address, Zone: id.Zone, Labels: id.Labels, Hypervisors: []string{"qemu"}, Release: "scale", FeatureLevel: blixard.FeatureLevel,
			Capacity: blixard.Resources{MilliCPU: perNode * part / 3 * 2_500, MemoryMiB: perNode * part / 3 * 4 << 10, DiskMiB: 1 << 40},
		})
	}
}

// createVMs makes VMs of 1 to 40 replicas until they are as many instances as
// wanted: most are plain, some spread over zones, some keep apart from each
// other, some want a label.
func (w *scale) createVMs() {
	var commands []state.Command
	for left := w.size.Instances; left > 0; {
		spec := blixard.VMSpec{Type: "long-lived", Image: "builtin", VCPUs: 1 + w.rng.IntN(4), MemoryMiB: int64(1+w.rng.IntN(7)) << 10, Replicas: min(1+w.rng.IntN(40), left)}
		switch k := w.cost.VMs % 20; {
		case k == 0 && w.size.Nodes >= 50:
			spec.AntiAffinityGroup = fmt.Sprintf("g%d", w.cost.VMs)
		case k < 4:
			spec.SpreadAcross = "zone"
		case k == 4:
			spec.Constraints = []blixard.Constraint{{Key: "storage", Op: "=", Value: "nvme"}}
		case k == 5:
			spec.Strategy = "binpack"
		}
		spec.Defaults()
		left -= spec.Replicas
		w.cost.VMs++
		commands = append(commands, &state.CreateVM{Name: blixard.VMName(fmt.Sprintf("vm-%d", w.cost.VMs)), Spec: spec, Start: true})
		if len(commands) == scaleBatch || left == 0 {
			w.apply("user", commands...)
			commands = nil
		}
	}
	w.applyNS = 0 // what follows is placements
}

// place has the scheduler decide for every slot, and the state apply it.
func (w *scale) place() {
	v := w.s.View()
	x := schedule.NewIndex(v)
	var commands []state.Command
	flush := func() {
		w.apply("leader", commands...)
		commands = commands[:0]
	}
	v.VMs(func(vm *blixard.VM) bool {
		began := w.m.NowNS()
		for ordinal := 1; ordinal <= vm.Spec.Replicas; ordinal++ {
			at, ok := x.Place(schedule.Request{VM: vm.Name, Spec: &vm.Spec}, ordinal, vm.FirstGeneration)
			if !ok {
				w.fail("capacity", "no node takes %s-%d", vm.Name, ordinal)
				return false
			}
			commands = append(commands, &state.PlaceInstance{
				VM: vm.Name, UID: vm.UID, Ordinal: ordinal, Generation: vm.FirstGeneration, SpecVersion: vm.SpecVersion, Node: at.Node, NodeEpoch: at.Epoch,
			})
			w.cost.Placed++
		}
		w.decideNS += w.m.NowNS() - began
		if len(commands) >= scaleBatch {
			flush()
		}
		return w.failed == nil
	})
	flush()
}

// converge has the leader's reconcilers come to rest.
func (w *scale) converge() {
	w.ctl = control.New(control.Config{})
	w.ctl.Reset(w.s.View(), w.now)
	w.settle()
}

// settle lets time pass until the leader proposes nothing and all has been
// reported; w.now is then when that was so.
func (w *scale) settle() {
	const tickMS, restMS, limitMS = 100, 500, 600_000
	for begun, rest := w.now, 0; rest < restMS && w.failed == nil; w.now += tickMS {
		if w.now-begun > limitMS {
			w.fail("liveness", "the cluster does not come to rest within %d virtual ms", int64(limitMS))
			return
		}
		w.beat()
		busy := w.report()
		for w.now >= w.wakeMS && w.failed == nil {
			began := w.m.NowNS()
			out := w.ctl.Step(control.Input{View: w.s.View(), NowMonoMS: w.now, NowWallMS: w.now})
			w.decideNS += w.m.NowNS() - began
			w.wakeMS = out.NextWakeMonoMS
			if len(out.Commands) > 0 {
				busy = true
				w.apply("leader", out.Commands...)
			}
		}
		if rest += tickMS; busy {
			rest = 0
		}
	}
}

// beat has every node that is in touch renew its lease, each second.
func (w *scale) beat() {
	if w.now%1000 != 0 {
		return
	}
	w.s.View().Nodes(func(n *blixard.Node) bool {
		if n.Name != w.down {
			w.ctl.Leases.Heard(n, w.now)
			if n.State == blixard.NodeReady {
				w.ctl.Leases.Ack(n, w.now)
			}
		}
		return true
	})
}

// report has the agents say that what was placed runs and what was ended is
// gone.
func (w *scale) report() bool {
	fresh, ending := w.fresh, w.ending
	w.fresh, w.ending = nil, nil
	items := map[blixard.NodeName][]state.Observation{}
	v := w.s.View()
	add := func(i *blixard.Instance, o state.Observation) {
		now := v.Instance(i.VM, i.Ordinal, i.Generation)
		if now == nil || now.Version != i.Version {
			return // it has changed since, and is on the list again
		}
		o.VM, o.Ordinal, o.Generation = i.VM, i.Ordinal, i.Generation
		items[i.Node] = append(items[i.Node], o)
	}
	for _, i := range fresh {
		add(i, state.Observation{State: blixard.Running})
	}
	for _, i := range ending {
		add(i, state.Observation{State: blixard.Stopped, Removed: i.Wanted == blixard.WantRemove})
	}
	busy := false
	v.Nodes(func(n *blixard.Node) bool {
		if list := items[n.Name]; len(list) > 0 && n.Name != w.down {
			busy = true
			w.apply("agent of "+string(n.Name), &state.Observe{Node: n.Name, RaftID: n.RaftID, Items: list})
		}
		return true
	})
	return busy
}

// disturb loses one node for good and drains another.
func (w *scale) disturb() {
	before := w.cost.Placed
	w.down = "n00001"
	w.s.View().InstancesOn(w.down, func(*blixard.Instance) bool { w.cost.Lost++; return true })
	decided, applied := w.decideNS, w.applyNS
	began := w.now
	for w.s.View().Node(w.down).State != blixard.NodeLost && w.now-began < 60_000 && w.failed == nil {
		w.settle()
		w.now += 1000 - w.now%1000
	}
	w.settle()
	w.cost.LossMS = (w.decideNS - decided + w.applyNS - applied) / 1_000_000
	w.apply("operator", &state.SetNode{Name: "n00002", Availability: blixard.Draining})
	w.settle()
	w.cost.Moved = w.cost.Placed - before
	w.s.View().InstancesOn("n00002", func(i *blixard.Instance) bool {
		if i.Holds() {
			w.fail("liveness", "%s is still on the drained node", i.Incarnation())
		}
		return w.failed == nil
	})
}

// finish measures the whole and counts every row anew.
func (w *scale) finish(began int64) {
	v := w.s.View()
	start := w.m.NowNS()
	schedule.NewIndex(v)
	w.cost.IndexMS = (w.m.NowNS() - start) / 1_000_000
	start = w.m.NowNS()
	n := counter(0)
	if _, err := v.WriteTo(&n); err != nil {
		w.fail("S13", "the state cannot be written: %v", err)
	}
	w.cost.SnapshotMS, w.cost.SnapshotMiB = (w.m.NowNS()-start)/1_000_000, int64(n)>>20
	w.cost.StateHash = hashText(v.Hash())
	w.cost.VirtualMS = w.now
	rows, broken := recount(v, w.size.Instances)
	w.cost.Checked = rows
	for _, b := range broken {
		w.fail(b.Invariant, "%s", b.Detail)
	}
	w.cost.ElapsedMS = (w.m.NowNS() - began) / 1_000_000
}

// counter counts bytes.
type counter int64

func (c *counter) Write(b []byte) (int, error) {
	*c += counter(len(b))
	return len(b), nil
}

// recount checks a whole state from its instances alone, without the tables it
// derives: running must be as many as wanted.
func recount(v *state.View, wanted int) (rows int, broken []Violation) {
	bad := func(invariant, format string, args ...any) {
		if len(broken) < 10 {
			broken = append(broken, Violation{Invariant: invariant, Detail: fmt.Sprintf(format, args...)})
		}
	}
	used := map[blixard.NodeName]blixard.Resources{}
	type place struct{ node, what string }
	taken := map[place]blixard.InstanceID{}
	live := 0
	var last *blixard.Instance // rows come by VM, ordinal and generation
	var lastLive blixard.InstanceID
	v.Instances(func(i *blixard.Instance) bool {
		rows++
		if last != nil && last.ID == i.ID && last.Generation >= i.Generation {
			bad("generations", "%s follows %s", i.Incarnation(), last.Incarnation())
		}
		last = i
		if !i.Holds() {
			return true
		}
		if lastLive == i.ID {
			bad("S4", "%s has two live incarnations", i.ID)
		}
		lastLive = i.ID
		live++
		n := v.Node(i.Node)
		if n == nil {
			bad("S5", "%s is on %s, which is no member", i.Incarnation(), i.Node)
			return true
		}
		used[i.Node] = used[i.Node].Add(i.Spec.Needs())
		for _, c := range i.Spec.Constraints {
			if !c.Holds(n) {
				bad("S6", "%s is on %s, where %s does not hold", i.Incarnation(), i.Node, c)
			}
		}
		var whats []string
		if g := i.Spec.AntiAffinityGroup; g != "" {
			whats = append(whats, "the group "+g)
		}
		for _, port := range i.Spec.Publish {
			if port.HostPort != 0 {
				whats = append(whats, fmt.Sprintf("port %d/%s", port.HostPort, port.Protocol))
			}
		}
		for _, what := range whats {
			if other := taken[place{string(i.Node), what}]; other != "" {
				bad("S6", "%s and %s share %s on %s", other, i.ID, what, i.Node)
			}
			taken[place{string(i.Node), what}] = i.ID
		}
		return true
	})
	v.Nodes(func(n *blixard.Node) bool {
		if u := used[n.Name]; !u.Fits(n.Allocatable()) {
			bad("S5", "%s holds %+v of %+v", n.Name, u, n.Allocatable())
		}
		if u := used[n.Name]; u != v.Usage(n.Name).Used {
			bad("S5", "the table of usage says %+v for %s, its rows %+v", v.Usage(n.Name).Used, n.Name, u)
		}
		return true
	})
	if live != wanted {
		bad("liveness", "%d instances are live, %d are wanted", live, wanted)
	}
	return rows, slices.Clip(broken)
}
