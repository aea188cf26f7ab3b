package sim

import (
	"fmt"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/schedule"
	"github.com/blixard/blixard/internal/state"
)

// leaderless tells what keeps the cluster from having a leader that all follow.
func (c *checker) leaderless() string {
	r := c.w.ruler()
	if r == nil {
		return "nobody rules: " + c.standing()
	}
	for _, m := range c.w.machines {
		if m.proc != nil && c.w.operator.member(m) && m.proc.r.Leader() != r.raftID {
			return fmt.Sprintf("%s follows %d, not %d", m.name, m.proc.r.Leader(), r.raftID)
		}
	}
	return ""
}

// standing tells what each replica knows.
func (c *checker) standing() string {
	var out []string
	for _, m := range c.w.machines {
		if m.proc == nil {
			out = append(out, string(m.name)+" is down")
			continue
		}
		r := m.proc.r
		out = append(out, fmt.Sprintf("%s is member %d in term %d, log to %d, committed to %d, voters %v, learners %v",
			m.name, m.raftID, r.Term(), r.LastIndex(), r.Committed(), r.ConfState().GetVoters(), r.ConfState().GetLearners()))
	}
	return strings.Join(out, "; ")
}

// unsettled tells what still differs from what is wanted, "" if nothing does.
func (c *checker) unsettled() string {
	w := c.w
	if why := c.leaderless(); why != "" {
		return why
	}
	for _, cl := range w.clients {
		if cl.op != nil {
			return cl.name + " waits for an answer to " + cl.op.key
		}
	}
	for i := range w.k.Sharers {
		if w.sharers.busy[i] {
			return fmt.Sprintf("sharer %d waits for an answer", i)
		}
	}
	if w.operator.open > 0 || w.operator.leaving != 0 {
		return fmt.Sprintf("the operator waits for %d answers, and for member %d to be out", w.operator.open, w.operator.leaving)
	}
	r := w.ruler()
	v := r.proc.r.View()
	for _, m := range w.machines {
		unsettled := c.machineUnsettled
		if m.dead {
			unsettled = c.deadUnsettled
		}
		if why := unsettled(m, v); why != "" {
			return why
		}
	}
	voters := c.voters
	if w.anyDead() {
		voters = c.votersUnsettled
	}
	if why := voters(r); why != "" {
		return why
	}
	if why := c.levelUnsettled(v); why != "" {
		return why
	}
	if why := w.watchers.unsettled(v); why != "" {
		return why
	}
	if why := w.functions.unsettled(v); why != "" {
		return why
	}
	return c.vmsUnsettled(v)
}

func (c *checker) machineUnsettled(m *machine, v *state.View) string {
	if m.proc == nil || !c.w.operator.member(m) {
		return string(m.name) + " is not in"
	}
	n := v.Node(m.name)
	if n.State != blixard.NodeReady || n.Raft == blixard.RoleNone || n.Availability != blixard.Active {
		return fmt.Sprintf("%s is %s, %s, %s", m.name, n.State, n.Raft, n.Availability)
	}
	r := m.proc.r
	if at := r.View().Index; at != v.Index {
		return fmt.Sprintf("%s is at entry %d of %d", m.name, at, v.Index)
	}
	if n := m.proc.loop.Waiting(); n > 0 {
		return fmt.Sprintf("%s has %d proposals without an answer", m.name, n)
	}
	k := c.w.k
	if length, most := r.LastIndex()+1-r.FirstIndex(), 2*k.SnapshotEntries+k.TrailingEntries+1000; length > most {
		return fmt.Sprintf("%s keeps %d entries in memory, at most %d should be", m.name, length, most)
	}
	for _, key := range sorted(m.hyp.vms) {
		x := m.hyp.vms[key]
		row := rowOf(v, m, key)
		if row == nil || alive(x.phase) && row.State.Terminal() {
			return fmt.Sprintf("%s is left on %s (%s)", key, m.name, x.phase)
		}
	}
	return ""
}

func rowOf(v *state.View, m *machine, key string) *blixard.Instance {
	var found *blixard.Instance
	v.InstancesOn(m.name, func(i *blixard.Instance) bool {
		if i.Incarnation() == key {
			found = i
		}
		return found == nil
	})
	return found
}

// voters: as many as there should be.
func (c *checker) voters(r *machine) string {
	members := r.proc.r.View().NodeCount()
	want := min(members, c.w.k.MaxVoters)
	if want%2 == 0 {
		want--
	}
	conf := r.proc.r.ConfState()
	if len(conf.GetVoters()) != want || len(conf.GetVoters())+len(conf.GetLearners()) != members {
		return fmt.Sprintf("voters %v, learners %v; %d nodes, want %d voters", conf.GetVoters(), conf.GetLearners(), members, want)
	}
	return ""
}

func (c *checker) vmsUnsettled(v *state.View) string {
	var out []string
	v.VMs(func(vm *blixard.VM) bool {
		if why := c.vmUnsettled(v, vm); why != "" {
			out = append(out, why)
		}
		return len(out) < 10
	})
	return strings.Join(out, "; ")
}

func (c *checker) vmUnsettled(v *state.View, vm *blixard.VM) string {
	up, live, missing, done := 0, 0, 0, map[blixard.InstanceID]bool{}
	v.InstancesOf(vm.Name, func(i *blixard.Instance) bool {
		if !i.State.Terminal() {
			live++
		}
		done[i.ID] = i.State == blixard.Stopped && vm.Spec.Restart.Mode == "on-failure" // the newest of a slot comes last
		if i.Counts() && i.State == blixard.Running && c.runsHere(i) && i.SpecVersion == vm.SpecVersion && i.RestartSeq == vm.RestartSeq && i.StatePaused == vm.Paused {
			up++
		}
		return true
	})
	for _, over := range done { //order:any a count
		if over {
			up++
		}
	}
	if vm.Refusal != nil {
		missing = vm.Refusal.Missing
	}
	switch {
	case vm.Deleting:
		return string(vm.Name) + " is not deleted:" + rowsLeft(v, vm.Name)
	case vm.Desired == blixard.DesiredStopped && live > 0:
		return string(vm.Name) + " is not stopped"
	case vm.Desired == blixard.DesiredRunning && up+missing < vm.Spec.Replicas:
		return fmt.Sprintf("%s has %d of %d up, %d refused", vm.Name, up, vm.Spec.Replicas, missing)
	case missing > 0 && !strings.HasPrefix(schedule.Refuse(v, &vm.Spec).Summary, "0/") && strings.HasPrefix(vm.Refusal.Summary, "0/"):
		return fmt.Sprintf("%s is refused (%s) but a node fits", vm.Name, vm.Refusal.Summary)
	}
	return ""
}

// rowsLeft tells what is left of a VM.
func rowsLeft(v *state.View, name blixard.VMName) string {
	out := ""
	v.InstancesOf(name, func(i *blixard.Instance) bool {
		out += fmt.Sprintf(" %s is %s on %s, wanted %s", i.Incarnation(), i.State, i.Node, i.Wanted)
		return true
	})
	return out
}

func (c *checker) runsHere(i *blixard.Instance) bool {
	m := c.w.machine(i.Node)
	if m == nil {
		return false
	}
	x := m.hyp.vms[i.Incarnation()]
	return x != nil && alive(x.phase)
}
