package sim

import (
	"cmp"

	"github.com/tidwall/btree"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/control"
	"github.com/blixard/blixard/internal/state"
)

// rehearsal is a cluster on virtual time with one leader: the production state
// and reconcilers, and agents that do what they are told, in the time it is
// said to take. Nothing fails but what is taken away.
type rehearsal struct {
	o    WhatIfOptions
	s    *state.State
	ctl  *control.Controller
	now  int64 // virtual ms, the leader's monotonic clock
	wall int64 // what the wall clock is ahead of it

	wakeMS  int64
	beatMS  int64 // of the next heartbeats
	electMS int64 // when the next leader takes over; 0: there is one
	quietMS int64 // when something last changed
	todo    *btree.BTreeG[deed]
	seq     uint64

	down       map[blixard.NodeName]bool
	leaderless bool
	stuck      bool
	began      int64 // when what is asked about happened; 0: not yet
	moves      map[blixard.InstanceID]*WhatIfMove
	steps      []WhatIfStep
}

// deed is something an agent will have done.
type deed struct {
	atMS int64
	seq  uint64
	row  *blixard.Instance // as it was when the deed began
	item state.Observation
}

func (a deed) less(b deed) bool {
	return cmp.Or(cmp.Compare(a.atMS, b.atMS), cmp.Compare(a.seq, b.seq)) < 0
}

const (
	heartbeatMS = 1000
	// calmMS is for how long nothing may change until a cluster is taken to be at
	// rest: longer than refused VMs wait to be tried again.
	calmMS = 6_000
	// patienceMS bounds how long is waited for it.
	patienceMS = 30 * 60_000
)

func rehearse(s *state.State, o WhatIfOptions) *rehearsal {
	w := &rehearsal{
		o: o, s: s, now: heartbeatMS, down: map[blixard.NodeName]bool{}, moves: map[blixard.InstanceID]*WhatIfMove{},
		todo: btree.NewBTreeGOptions(deed.less, btree.Options{NoLocks: true}),
	}
	v := s.View()
	w.wall = v.Cluster().NowMS
	v.Nodes(func(n *blixard.Node) bool {
		if n.State != blixard.NodeReady { // whoever is not in touch stays so
			w.down[n.Name] = true
		}
		return true
	})
	w.lead()
	v.Instances(func(i *blixard.Instance) bool { w.agent(i); return true })
	return w
}

func (w *rehearsal) view() *state.View { return w.s.View() }

// lead makes a new leader, which knows nothing yet.
func (w *rehearsal) lead() {
	w.ctl = control.New(control.Config{HeartbeatMS: heartbeatMS, LeaseMS: w.o.LeaseMS, MarginMS: w.o.MarginMS})
	w.ctl.Reset(w.view(), w.now)
	w.wakeMS, w.electMS = w.now, 0
}

// elect has the leader gone until another takes over.
func (w *rehearsal) elect() { w.electMS = w.now + w.o.ElectionMS }

// begin marks the moment at which what is asked about happens.
func (w *rehearsal) begin() { w.began = w.now }

// settle lets time pass until nothing changes any more.
func (w *rehearsal) settle() {
	limit := w.now + patienceMS
	w.quietMS = w.now
	for w.todo.Len() > 0 || w.now < w.quietMS+calmMS {
		if w.now > limit {
			w.stuck = true
			return
		}
		w.step(limit + 1)
	}
}

// run lets time pass.
func (w *rehearsal) run(until int64) {
	for w.now < until {
		w.step(until)
	}
}

// step goes to the next moment at which something happens, at most until.
func (w *rehearsal) step(until int64) {
	next := min(until, w.beatMS)
	if d, ok := w.todo.Min(); ok {
		next = min(next, d.atMS)
	}
	if w.electMS > 0 {
		next = min(next, w.electMS)
	} else {
		next = min(next, w.wakeMS)
	}
	w.now = max(w.now, next)
	if w.electMS > 0 && w.now >= w.electMS {
		w.lead()
	}
	w.beat()
	w.act()
	w.decide()
}

// beat has the nodes that are in touch renew their leases.
func (w *rehearsal) beat() {
	if w.now < w.beatMS {
		return
	}
	w.beatMS = w.now + heartbeatMS
	if w.electMS > 0 {
		return
	}
	w.view().Nodes(func(n *blixard.Node) bool {
		if !w.down[n.Name] {
			w.ctl.Leases.Heard(n, w.now)
			if n.State == blixard.NodeReady {
				w.ctl.Leases.Ack(n, w.now)
			}
		}
		return true
	})
}

// act has the agents report what is done by now.
func (w *rehearsal) act() {
	for {
		d, ok := w.todo.Min()
		if !ok || d.atMS > w.now {
			return
		}
		w.todo.PopMin()
		now := w.view().Instance(d.row.VM, d.row.Ordinal, d.row.Generation)
		node := w.view().Node(d.row.Node)
		if now == nil || now.Version != d.row.Version || node == nil || w.down[d.row.Node] {
			continue // it is wanted otherwise by now, or nobody is there to report
		}
		w.apply("agent of "+string(d.row.Node), &state.Observe{Node: d.row.Node, RaftID: node.RaftID, Items: []state.Observation{d.item}})
	}
}

// decide has the leader make its passes.
func (w *rehearsal) decide() {
	for w.electMS == 0 && w.now >= w.wakeMS {
		out := w.ctl.Step(control.Input{View: w.view(), NowMonoMS: w.now, NowWallMS: w.now + w.wall})
		w.wakeMS = out.NextWakeMonoMS
		if len(out.Commands) > 0 {
			w.apply("leader", out.Commands...)
		}
	}
}

// apply applies commands as one entry.
func (w *rehearsal) apply(actor string, commands ...state.Command) {
	envelopes := make([]state.Envelope, len(commands))
	for i, c := range commands {
		envelopes[i] = state.Envelope{NowMS: w.now + w.wall, Actor: actor, Command: c}
	}
	before := w.view()
	results, changes := w.s.ApplyAll(w.s.Index()+1, w.s.Term(), envelopes)
	for i := range results {
		if w.began > 0 && w.o.Detail && results[i].Err == nil && !results[i].Outcome.Noop {
			w.steps = append(w.steps, WhatIfStep{AtMS: w.now - w.began, Text: actor + ": " + describe(commands[i])})
		}
	}
	if len(changes) > 0 {
		w.quietMS, w.wakeMS = w.now, min(w.wakeMS, w.now)
	}
	w.ctl.Observe(changes)
	for i := range changes {
		if inst, ok := changes[i].Object.(*blixard.Instance); ok && !changes[i].Deleted {
			w.note(before, inst)
			w.agent(inst)
		}
	}
}

// agent has the agent of an instance's node begin what the row asks for.
func (w *rehearsal) agent(i *blixard.Instance) {
	if w.down[i.Node] {
		return
	}
	d := deed{row: i, item: state.Observation{VM: i.VM, Ordinal: i.Ordinal, Generation: i.Generation, State: i.State, Paused: i.Paused, Health: i.Health}}
	ended := i.State.Terminal()
	switch {
	case i.Wanted == blixard.WantRemove && ended:
		d.item.Removed = true
	case ended, i.State == blixard.Running && i.Wanted == blixard.WantRun && i.Paused == i.StatePaused:
		return
	case i.Wanted != blixard.WantRun:
		d.item.State, d.atMS = blixard.Stopped, w.o.StopMS
	default:
		d.item.State = blixard.Running
		if i.State != blixard.Running {
			d.atMS = w.o.StartMS
		}
		if i.Spec.Health != nil {
			d.item.Health = blixard.HealthHealthy
		}
	}
	w.seq++
	d.atMS, d.seq = d.atMS+w.now, w.seq
	w.todo.Set(d)
}

// note keeps where instances go once it has begun.
func (w *rehearsal) note(before *state.View, i *blixard.Instance) {
	if w.began == 0 {
		return
	}
	at := w.now - w.began
	m := w.moves[i.ID]
	if m == nil {
		m = &WhatIfMove{Instance: i.ID}
		w.moves[i.ID] = m
		if last := before.Latest(i.ID); last != nil && last.Holds() {
			m.From = last.Node
		}
	}
	old := before.Instance(i.VM, i.Ordinal, i.Generation)
	switch {
	case old == nil:
		m.To, m.PlacedMS = i.Node, at
	case old.Holds() && !i.Holds():
		m.EndedMS, m.Why = at, i.WantReason
		if i.State == blixard.Lost {
			m.EndedMS, m.Why = at, i.Message
		}
	case old.State != blixard.Running && i.State == blixard.Running:
		m.RunningMS = at
		m.DownMS = at
		if m.From != "" && !w.down[m.From] {
			m.DownMS = at - m.EndedMS // it served until it was stopped
		}
	}
}
