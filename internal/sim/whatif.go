package sim

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/control"
	"github.com/blixard/blixard/internal/schedule"
	"github.com/blixard/blixard/internal/state"
)

// WhatIfNode is a node of a cluster that somebody describes.
type WhatIfNode struct {
	Name         blixard.NodeName
	Zone         string
	Labels       []blixard.Label
	Roles        []string // empty: hypervisor
	Witness      bool
	Availability blixard.Availability // empty: active
	Capacity     blixard.Resources
	Reserved     blixard.Resources
	MaxInstances int
	Hypervisors  []string // empty: qemu
	Acceleration string
}

// WhatIfVM is a VM of a cluster that somebody describes.
type WhatIfVM struct {
	Name    blixard.VMName
	Spec    blixard.VMSpec // as a user gives it; defaults are filled in
	Stopped bool
}

// WhatIfOptions say what happens to a cluster. Zero times stand for the defaults
// of a server.
type WhatIfOptions struct {
	Lose   []string // names of nodes, or constraints such as zone=a; all at one moment
	Drain  []string // likewise; drained before anything is lost
	Leader blixard.NodeName
	// LeaseMS and MarginMS are a node's lease and what the leader waits beyond
	// it; ElectionMS is how long it takes until another leads when the leader is
	// lost.
	LeaseMS, MarginMS, ElectionMS int64
	StartMS, StopMS               int64 // of an instance; 3,000 and 1,000
	MaxVoters                     int   // of a described cluster; 5
	Detail                        bool  // every decision in Steps
}

func (o WhatIfOptions) withDefaults() WhatIfOptions {
	o.LeaseMS, o.MarginMS, o.ElectionMS = cmp.Or(o.LeaseMS, 5000), cmp.Or(o.MarginMS, 1000), cmp.Or(o.ElectionMS, 2000)
	o.StartMS, o.StopMS, o.MaxVoters = cmp.Or(o.StartMS, 3000), cmp.Or(o.StopMS, 1000), cmp.Or(o.MaxVoters, 5)
	return o
}

// WhatIfReport tells what would become of a cluster. Times are virtual
// milliseconds after the moment at which it happens.
type WhatIfReport struct {
	// OK: in the end every wanted instance runs, and none on a drained node.
	OK        bool               `json:"ok"`
	Lost      []blixard.NodeName `json:"lost"`
	Drained   []blixard.NodeName `json:"drained"`
	Quorum    WhatIfQuorum       `json:"quorum"`
	DeclareMS int64              `json:"declared_lost_ms,omitempty"` // when the leader gives the lost nodes up
	SettledMS int64              `json:"settled_ms"`                 // when the last instance ran
	Moves     []WhatIfMove       `json:"moves"`
	Down      []WhatIfDown       `json:"down"`    // wanted, and not running in the end
	Stays     []WhatIfDown       `json:"stays"`   // on a drained node, since they fit nowhere else
	Refused   []WhatIfRefusal    `json:"refused"` // VMs with instances that have no place
	Nodes     []WhatIfNodeUse    `json:"nodes"`
	Before    WhatIfRoom         `json:"before"`
	After     WhatIfRoom         `json:"after"`
	Notes     []string           `json:"notes"`
	Steps     []WhatIfStep       `json:"steps,omitempty"`
}

// WhatIfQuorum is whether the cluster can still decide anything.
type WhatIfQuorum struct {
	Voters []blixard.NodeName `json:"voters"`
	Left   int                `json:"left"`   // voters that are not lost
	Needed int                `json:"needed"` // a majority
	OK     bool               `json:"ok"`
}

// WhatIfMove is an instance that gets another node.
type WhatIfMove struct {
	Instance  blixard.InstanceID `json:"instance"`
	From      blixard.NodeName   `json:"from"` // empty: it had none
	To        blixard.NodeName   `json:"to"`
	Why       string             `json:"why"`
	EndedMS   int64              `json:"ended_ms"`  // when the old one was over, as far as the cluster knows
	PlacedMS  int64              `json:"placed_ms"` // when the new one was placed
	RunningMS int64              `json:"running_ms"`
	DownMS    int64              `json:"down_ms"` // for how long none ran
}

// WhatIfDown is a wanted instance that does not run in the end.
type WhatIfDown struct {
	Instance blixard.InstanceID `json:"instance"`
	Was      blixard.NodeName   `json:"was"` // where it ran before; empty: nowhere
	Why      string             `json:"why"`
}

// WhatIfRefusal is why instances of a VM have no place in the end.
type WhatIfRefusal struct {
	VM      blixard.VMName `json:"vm"`
	Missing int            `json:"missing"`
	Before  int            `json:"missing_before"`
	Summary string         `json:"summary"`
	// Nodes say why not, node by node; the first of them if there are many.
	Nodes []WhatIfObjection `json:"nodes"`
	More  int               `json:"more_nodes,omitempty"`
}

// WhatIfObjection is why one node does not take an instance.
type WhatIfObjection struct {
	Node blixard.NodeName `json:"node"`
	Why  []string         `json:"why"`
}

// WhatIfNodeUse is what a node holds before and after.
type WhatIfNodeUse struct {
	Name        blixard.NodeName `json:"name"`
	Zone        string           `json:"zone,omitempty"`
	State       string           `json:"state"` // in the end: Ready, Lost, draining, …
	Allocatable WhatIfAmount     `json:"allocatable"`
	Before      WhatIfUse        `json:"before"`
	After       WhatIfUse        `json:"after"`
}

// WhatIfUse is what instances hold.
type WhatIfUse struct {
	Instances int          `json:"instances"`
	Used      WhatIfAmount `json:"used"`
}

// WhatIfAmount is blixard.Resources as the report shows them.
type WhatIfAmount struct {
	MilliCPU  int64 `json:"milli_cpu"`
	MemoryMiB int64 `json:"memory_mib"`
	DiskMiB   int64 `json:"disk_mib"`
}

// WhatIfRoom is what all nodes that take instances offer together.
type WhatIfRoom struct {
	Nodes       int          `json:"nodes"`
	Instances   int          `json:"instances"` // that run
	Wanted      int          `json:"wanted"`
	Allocatable WhatIfAmount `json:"allocatable"`
	Used        WhatIfAmount `json:"used"`
	Free        WhatIfAmount `json:"free"`
	// Largest is the most memory that is free on one node.
	LargestMiB int64 `json:"largest_free_mib"`
}

// WhatIfStep is one decision of the leader.
type WhatIfStep struct {
	AtMS int64  `json:"at_ms"`
	Text string `json:"text"`
}

// Describe makes the state of a described cluster: its nodes are members and
// ready, its VMs wanted, and nothing is placed yet.
func Describe(nodes []WhatIfNode, vms []WhatIfVM, maxVoters int) (*state.State, error) {
	if len(nodes) == 0 {
		return nil, &blixard.Error{Code: blixard.CodeInvalid, Message: "the cluster has no node", Hint: "describe them with documents of kind: Node"}
	}
	s := state.New()
	do := func(c state.Command) (uint64, error) {
		results, _ := s.ApplyAll(s.Index()+1, 1, []state.Envelope{{NowMS: 1, Actor: "the plan", Command: c}})
		if err := results[0].Err; err != nil {
			return 0, err
		}
		return results[0].Outcome.Value, nil
	}
	for i := range nodes {
		n := &nodes[i]
		id := state.NodeIdentity{Name: n.Name, Address: string(n.Name) + ":7400", Zone: n.Zone, Labels: n.Labels, Roles: n.Roles, Witness: n.Witness}
		var join state.Command = &state.JoinNode{Node: id}
		if i == 0 {
			join = &state.Bootstrap{ClusterID: "plan", Name: "plan", RaftID: 1, Node: id, FeatureLevel: blixard.FeatureLevel}
		}
		raftID, err := do(join)
		if err != nil {
			return nil, fmt.Errorf("adding the node %s: %w", n.Name, err)
		}
		report := &state.ReportNode{
			Name: n.Name, RaftID: raftID, Address: id.Address, Zone: n.Zone, Labels: n.Labels, Capacity: n.Capacity, Reserved: n.Reserved, MaxInstances: n.MaxInstances,
			Hypervisors: n.Hypervisors, Acceleration: n.Acceleration, Release: "plan", FeatureLevel: blixard.FeatureLevel,
		}
		if len(report.Hypervisors) == 0 {
			report.Hypervisors = []string{"qemu"}
		}
		if _, err := do(report); err != nil {
			return nil, fmt.Errorf("adding the node %s: %w", n.Name, err)
		}
		if n.Availability != "" && n.Availability != blixard.Active {
			if _, err := do(&state.SetNode{Name: n.Name, Availability: n.Availability}); err != nil {
				return nil, fmt.Errorf("setting the node %s: %w", n.Name, err)
			}
		}
	}
	for i := range vms {
		spec := vms[i].Spec
		spec.Defaults()
		if _, err := do(&state.CreateVM{Name: vms[i].Name, Spec: spec, Start: !vms[i].Stopped}); err != nil {
			return nil, fmt.Errorf("adding the VM %s: %w", vms[i].Name, err)
		}
	}
	vote(s, maxVoters)
	return s, nil
}

// vote gives a described cluster the voters that the leader would choose.
func vote(s *state.State, maxVoters int) {
	v := s.View()
	conf := control.ConfState{Voters: []uint64{1}}
	var progress []control.Progress
	v.Nodes(func(n *blixard.Node) bool {
		progress = append(progress, control.Progress{RaftID: n.RaftID, Match: s.Index(), Active: true})
		if n.RaftID != 1 {
			conf.Learners = append(conf.Learners, n.RaftID)
		}
		return true
	})
	for {
		change, _ := control.Members(control.MembersInput{View: v, Conf: conf, Progress: progress, Committed: s.Index(), Self: 1, MaxVoters: maxVoters})
		if change.Kind != control.MemberPromote {
			break
		}
		conf.Voters = append(conf.Voters, change.RaftID)
		conf.Learners = slices.DeleteFunc(conf.Learners, func(id uint64) bool { return id == change.RaftID })
	}
	s.SetRaftRoles(s.Index()+1, 1, conf.Voters, conf.Learners)
}

// WhatIf lets a cluster come to rest, has nodes drained and lost, and tells what
// becomes of it, as the production scheduler and reconcilers decide it on
// virtual time. The state is used up.
func WhatIf(s *state.State, o WhatIfOptions) (WhatIfReport, error) {
	o = o.withDefaults()
	w := rehearse(s, o)
	lose, err := pick(w.view(), o.Lose)
	if err != nil {
		return WhatIfReport{}, fmt.Errorf("choosing what is lost: %w", err)
	}
	drain, err := pick(w.view(), o.Drain)
	if err != nil {
		return WhatIfReport{}, fmt.Errorf("choosing what is drained: %w", err)
	}
	if o.Leader != "" && w.view().Node(o.Leader) == nil {
		return WhatIfReport{}, noNode(w.view(), string(o.Leader))
	}
	w.settle()
	before := w.view()
	w.begin()
	if len(drain) > 0 {
		for _, name := range drain {
			w.apply("operator", &state.SetNode{Name: name, Availability: blixard.Draining})
		}
		if len(lose) > 0 { // what is lost is lost while the drain is under way
			w.run(w.now + 1)
		} else {
			w.settle()
		}
	}
	r := WhatIfReport{Lost: lose, Drained: drain, Quorum: quorum(before, lose)}
	w.lose(lose, &r)
	w.report(before, &r)
	return r, nil
}

// pick returns the nodes that names and constraints stand for, by name.
func pick(v *state.View, words []string) ([]blixard.NodeName, error) {
	out := map[blixard.NodeName]bool{}
	for _, word := range words {
		if !strings.ContainsAny(word, "=<>!") {
			if v.Node(blixard.NodeName(word)) == nil {
				return nil, noNode(v, word)
			}
			out[blixard.NodeName(word)] = true
			continue
		}
		constraints, err := blixard.ParseConstraints(word)
		if err != nil {
			return nil, err
		}
		found := false
		v.Nodes(func(n *blixard.Node) bool {
			for i := range constraints {
				if !constraints[i].Holds(n) {
					return true
				}
			}
			out[n.Name], found = true, true
			return true
		})
		if !found {
			return nil, &blixard.Error{Code: blixard.CodeInvalid, Message: "no node is " + word, Hint: "name nodes, or give a label as KEY=VALUE, such as zone=a"}
		}
	}
	return slices.Sorted(maps.Keys(out)), nil
}

func noNode(v *state.View, name string) error {
	var names []string
	v.Nodes(func(n *blixard.Node) bool { names = append(names, string(n.Name)); return true })
	e := &blixard.Error{Code: blixard.CodeInvalid, Message: "there is no node named " + name}
	if near := blixard.Nearest(name, names); near != "" {
		e.Hint = "did you mean " + near + "?"
	} else {
		e.Hint = "nodes: " + few(len(names), func(i int) string { return names[i] })
	}
	return e
}

// quorum tells whether a majority of the voters is left.
func quorum(v *state.View, lose []blixard.NodeName) WhatIfQuorum {
	q := WhatIfQuorum{Voters: []blixard.NodeName{}}
	v.Nodes(func(n *blixard.Node) bool {
		if n.Raft == blixard.RoleVoter {
			q.Voters = append(q.Voters, n.Name)
			if n.State != blixard.NodeLost && !slices.Contains(lose, n.Name) {
				q.Left++
			}
		}
		return true
	})
	q.Needed = len(q.Voters)/2 + 1
	q.OK = q.Left >= q.Needed
	return q
}

// lose takes nodes away, and lets what is left come to rest.
func (w *rehearsal) lose(lose []blixard.NodeName, r *WhatIfReport) {
	if len(lose) == 0 {
		return
	}
	for _, name := range lose {
		w.down[name] = true
	}
	switch {
	case !r.Quorum.OK:
		w.leaderless = true
		r.Notes = append(r.Notes, fmt.Sprintf("No majority: %d of %d voters are left, %d are needed. Nothing is decided until enough of them are back, or one goes on alone with `blixard cluster recover`. "+
			"What runs on the nodes that are left runs on, but for singletons: they stop within their lease.", r.Quorum.Left, len(r.Quorum.Voters), r.Quorum.Needed))
		return
	case w.down[w.o.Leader]:
		w.elect()
		r.Notes = append(r.Notes, fmt.Sprintf("%s leads: another takes over within %.1f s, and waits a whole lease for every node.", w.o.Leader, float64(w.o.ElectionMS)/1000))
	case w.o.Leader == "" && slices.ContainsFunc(r.Quorum.Voters, func(n blixard.NodeName) bool { return w.down[n] }):
		r.Notes = append(r.Notes, fmt.Sprintf("Should one of the lost nodes lead, all is later by the election, about %.1f s (--leader NAME).", float64(w.o.ElectionMS)/1000))
	}
	w.run(w.now + w.o.LeaseMS + w.o.MarginMS)
	w.settle()
	w.noteVoters(r)
	v := w.view()
	for _, name := range lose {
		if n := v.Node(name); n.State == blixard.NodeLost && n.LostMS > 0 {
			r.DeclareMS = max(r.DeclareMS, n.LostMS-w.wall-w.began)
		}
	}
}

// noteVoters tells who will vote in place of the lost voters.
func (w *rehearsal) noteVoters(r *WhatIfReport) {
	v := w.view()
	in := control.MembersInput{View: v, MaxVoters: w.o.MaxVoters, Committed: v.Index}
	v.Nodes(func(n *blixard.Node) bool {
		active := !w.down[n.Name]
		switch n.Raft {
		case blixard.RoleVoter:
			in.Conf.Voters = append(in.Conf.Voters, n.RaftID)
			if active {
				in.Self = n.RaftID
			}
		case blixard.RoleLearner:
			in.Conf.Learners = append(in.Conf.Learners, n.RaftID)
		case blixard.RoleNone:
		}
		at := control.Progress{RaftID: n.RaftID, Match: v.Index, Active: active}
		if !active {
			at.LostForMS = lostVoterMS
		}
		in.Progress = append(in.Progress, at)
		return true
	})
	if change, _ := control.Members(in); change.Kind == control.MemberPromote {
		r.Notes = append(r.Notes, fmt.Sprintf("If they stay away for a minute, %s gets a vote in their place.", v.NodeByRaftID(change.RaftID).Name))
	}
}

// lostVoterMS is how long a voter is lost until another takes its place.
const lostVoterMS = 60_000

// report compares the cluster with what it was.
func (w *rehearsal) report(before *state.View, r *WhatIfReport) {
	after := w.view()
	r.Moves, r.Down, r.Refused, r.Nodes = []WhatIfMove{}, []WhatIfDown{}, []WhatIfRefusal{}, []WhatIfNodeUse{}
	r.Lost, r.Drained, r.Notes = orEmpty(r.Lost), orEmpty(r.Drained), orEmpty(r.Notes)
	r.Before, r.After = w.room(before, nil), w.room(after, w.down)
	before.Nodes(func(n *blixard.Node) bool {
		use := WhatIfNodeUse{Name: n.Name, Zone: n.Zone, State: string(n.State), Allocatable: WhatIfAmount(n.Allocatable()), Before: useOf(before, n.Name), After: useOf(after, n.Name)}
		if now := after.Node(n.Name); now != nil {
			use.State = string(now.State)
			if now.State == blixard.NodeReady && now.Availability != blixard.Active {
				use.State = string(now.Availability)
			}
		}
		if w.down[n.Name] {
			use.State, use.After = string(blixard.NodeLost), WhatIfUse{}
		}
		r.Nodes = append(r.Nodes, use)
		return true
	})
	for _, id := range slices.Sorted(maps.Keys(w.moves)) {
		if m := w.moves[id]; m.To != "" && m.To != m.From {
			r.Moves = append(r.Moves, *m)
			r.SettledMS = max(r.SettledMS, m.RunningMS)
		}
	}
	slices.SortStableFunc(r.Moves, func(a, b WhatIfMove) int { return cmp.Compare(a.PlacedMS, b.PlacedMS) })
	after.VMs(func(vm *blixard.VM) bool {
		w.reportVM(before, after, vm, r)
		return true
	})
	w.reportDrained(after, r)
	if w.stuck {
		r.Notes = append(r.Notes, "The cluster did not come to rest within half an hour.")
	}
	r.OK, r.Steps = len(r.Down)+len(r.Stays) == 0 && !w.stuck, w.steps
}

// reportDrained tells what drained nodes still hold, and why.
func (w *rehearsal) reportDrained(after *state.View, r *WhatIfReport) {
	r.Stays = []WhatIfDown{}
	for _, name := range r.Drained {
		if w.down[name] {
			continue
		}
		after.InstancesOn(name, func(i *blixard.Instance) bool {
			if !i.Holds() {
				return true
			}
			d := WhatIfDown{Instance: i.ID, Was: name, Why: "nothing was decided about it"}
			if vm := after.VM(i.VM); vm != nil && vm.Refusal != nil {
				d.Why = vm.Refusal.Summary
			}
			r.Stays = append(r.Stays, d)
			return true
		})
	}
}

func orEmpty[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

func useOf(v *state.View, name blixard.NodeName) WhatIfUse {
	u := v.Usage(name)
	return WhatIfUse{Instances: u.Instances, Used: WhatIfAmount(u.Used)}
}

// room sums up what the nodes that take instances offer.
func (w *rehearsal) room(v *state.View, down map[blixard.NodeName]bool) WhatIfRoom {
	var r WhatIfRoom
	var all, used blixard.Resources
	v.Nodes(func(n *blixard.Node) bool {
		if !n.RunsInstances() || n.State != blixard.NodeReady || n.Availability != blixard.Active || down[n.Name] {
			return true
		}
		r.Nodes++
		held := v.Usage(n.Name).Used
		all, used = all.Add(n.Allocatable()), used.Add(held)
		r.LargestMiB = max(r.LargestMiB, n.Allocatable().Sub(held).MemoryMiB)
		return true
	})
	r.Allocatable, r.Used, r.Free = WhatIfAmount(all), WhatIfAmount(used), WhatIfAmount(all.Sub(used))
	v.VMs(func(vm *blixard.VM) bool {
		if vm.Desired == blixard.DesiredRunning && !vm.Deleting {
			r.Wanted += vm.Spec.Replicas
		}
		return true
	})
	v.Instances(func(i *blixard.Instance) bool {
		if w.runs(v, i, down) {
			r.Instances++
		}
		return true
	})
	return r
}

// runs tells whether an instance serves.
func (w *rehearsal) runs(v *state.View, i *blixard.Instance, down map[blixard.NodeName]bool) bool {
	if i.State != blixard.Running || down[i.Node] {
		return false
	}
	if n := v.Node(i.Node); n == nil || n.State == blixard.NodeLost {
		return false
	}
	return len(down) == 0 || !w.leaderless || !i.Spec.Singleton || i.Spec.EffectiveOnPartition() != blixard.OnPartitionStop
}

// maxWhatIfNodes bounds the nodes that are listed for one VM.
const maxWhatIfNodes = 50

// reportVM tells which wanted instances of a VM do not run in the end, and why.
func (w *rehearsal) reportVM(before, after *state.View, vm *blixard.VM, r *WhatIfReport) {
	if vm.Desired != blixard.DesiredRunning || vm.Deleting {
		return
	}
	up, was := map[blixard.InstanceID]*blixard.Instance{}, map[blixard.InstanceID]*blixard.Instance{}
	after.InstancesOf(vm.Name, func(i *blixard.Instance) bool {
		if w.runs(after, i, w.down) {
			up[i.ID] = i
		}
		return true
	})
	before.InstancesOf(vm.Name, func(i *blixard.Instance) bool {
		if i.State == blixard.Running {
			was[i.ID] = i
		}
		return true
	})
	missing := 0
	for ordinal := 1; ordinal <= vm.Spec.Replicas; ordinal++ {
		id := blixard.SlotID(vm.Name, ordinal)
		if up[id] != nil {
			continue
		}
		missing++
		d := WhatIfDown{Instance: id, Why: w.why(after, vm, id)}
		if i := was[id]; i != nil {
			d.Was = i.Node
		}
		r.Down = append(r.Down, d)
	}
	if missing == 0 || vm.Refusal == nil || w.leaderless {
		return
	}
	refusal := WhatIfRefusal{VM: vm.Name, Missing: vm.Refusal.Missing, Summary: vm.Refusal.Summary, Nodes: []WhatIfObjection{}}
	if old := before.VM(vm.Name); old != nil && old.Refusal != nil {
		refusal.Before = old.Refusal.Missing
	}
	for _, verdict := range schedule.Explain(after, schedule.Request{VM: vm.Name, Spec: &vm.Spec}) {
		if len(verdict.Objections) == 0 {
			continue
		}
		if len(refusal.Nodes) == maxWhatIfNodes {
			refusal.More++
			continue
		}
		o := WhatIfObjection{Node: verdict.Node}
		for _, objection := range verdict.Objections {
			o.Why = append(o.Why, objection.Detail)
		}
		refusal.Nodes = append(refusal.Nodes, o)
	}
	r.Refused = append(r.Refused, refusal)
}

// why tells why a wanted instance does not run.
func (w *rehearsal) why(v *state.View, vm *blixard.VM, id blixard.InstanceID) string {
	last := v.Latest(id)
	switch {
	case w.leaderless && last != nil && w.down[last.Node]:
		return "its node is lost, and without a majority nothing is placed anew"
	case w.leaderless && last != nil && last.State == blixard.Running:
		return "a singleton: its node stops it when it cannot renew its lease"
	case last != nil && last.Holds() && w.down[last.Node]:
		return "a singleton that is to run on in a partition keeps its place until " + string(last.Node) + " is back or removed"
	case vm.Refusal != nil:
		return vm.Refusal.Summary
	case last != nil && last.State == blixard.Failed:
		return "it failed, and its restart policy leaves it so"
	}
	return "it was not running, and nothing was decided about it"
}
