package control

import (
	"math"
	"slices"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/schedule"
	"github.com/blixard/blixard/internal/state"
)

// Preemption: a slot that fits nowhere ends incarnations of lower priority, as
// few as are needed, and has their room kept for it until they are gone. Then
// it is placed as any other. What was ended waits for room as any other, too.

const (
	// maxPreemptRestarts: a slot that failed more often in a row ends nothing
	// any more, or a guest that cannot run would push out others each time.
	maxPreemptRestarts = 5
	// searchRowsPerMS and searchBurstRows bound what looking for victims costs:
	// a search asks every node and what runs there.
	searchRowsPerMS = 100
	searchBurstRows = 20_000
	// preemptPauseMS is until a slot tries again whose preemption came to nothing.
	preemptPauseMS = 1000
	// noFloor is above every priority.
	noFloor = math.MaxInt
)

// nomination keeps the room for a slot that incarnations of lower priority are
// giving up.
type nomination struct {
	ordinal    int
	generation uint64 // the room is booked for
	node       blixard.NodeName
	leaving    []state.Victim // who must be gone
	why        string
	used       bool // in this look
}

// preempting is what a leader remembers of its preemptions.
type preempting struct {
	// floor is not above the priority of any VM: who is not above the floor
	// need not look for victims. nextFloor is that of the sweep that is going on.
	floor, nextFloor int
	searchDebt       int64 // rows that were looked at and not yet waited for
	searchedMS       int64
	condemned        map[*blixard.Instance]bool // by proposals of this pass
}

func newPreempting(v *state.View, nowMS int64) preempting {
	s := preempting{floor: noFloor, nextFloor: noFloor, searchedMS: nowMS}
	v.VMs(func(vm *blixard.VM) bool { s.see(vm); return true })
	s.nextFloor = noFloor
	return s
}

func (s *preempting) see(vm *blixard.VM) {
	s.floor, s.nextFloor = min(s.floor, vm.Spec.Priority), min(s.nextFloor, vm.Spec.Priority)
}

// swept is called when every VM was seen once more.
func (s *preempting) swept() { s.floor, s.nextFloor = s.nextFloor, noFloor }

// searchAtMS is when the next search is due, nowMS if it is.
func (s *preempting) searchAtMS(nowMS int64) int64 {
	s.searchDebt = max(0, s.searchDebt-searchRowsPerMS*(nowMS-s.searchedMS))
	s.searchedMS = nowMS
	return nowMS + max(0, s.searchDebt-searchBurstRows)/searchRowsPerMS
}

// nominated takes a slot's nomination out of the book, so that the slot can be
// asked for again; nil if it has none.
func (l *life) nominated(ordinal int) *nomination {
	for k := range l.book.nominations {
		if n := l.book.nominations[k]; n.ordinal == ordinal {
			l.book.nominations = slices.Delete(l.book.nominations, k, k+1)
			l.index.Release(l.vm.Name, n.ordinal, n.generation)
			return &n
		}
	}
	return nil
}

// nominate books the room a nomination keeps.
func (l *life) nominate(n nomination) {
	n.used = true
	l.book.nominations = append(l.book.nominations, n)
	l.index.Assume(l.vm.Name, &l.vm.Spec, n.ordinal, n.generation, n.node)
	for _, v := range n.leaving {
		l.waitFor(v.VM)
	}
}

// resettle gives up nominations that no slot used in this look.
func (l *life) resettle() {
	l.book.nominations = slices.DeleteFunc(l.book.nominations, func(n nomination) bool {
		if !n.used {
			l.index.Release(l.vm.Name, n.ordinal, n.generation)
		}
		return !n.used
	})
}

// nominations books kept room again after the index was told of the rows of a
// VM, or of any.
func (p *pass) nominations(name blixard.VMName, b *book) {
	vm := p.v.VM(name)
	b.nominations = slices.DeleteFunc(b.nominations, func(n nomination) bool {
		if vm == nil || vm.Deleting || vm.Desired != blixard.DesiredRunning || n.ordinal > vm.Spec.Replicas || p.index.Node(n.node) == nil {
			return true
		}
		taken := false
		p.v.InstancesOf(name, func(i *blixard.Instance) bool {
			taken = taken || i.Ordinal == n.ordinal && i.Generation >= n.generation
			return !taken
		})
		return taken
	})
	for k := range b.nominations {
		n := &b.nominations[k]
		n.used = false
		p.index.Assume(name, &vm.Spec, n.ordinal, n.generation, n.node)
	}
}

// makeRoom is asked for a slot for which no node has room: it waits for the
// room that is kept for it, or has incarnations of lower priority end. was is
// what the slot was nominated for before. It tells what the slot waits for, ""
// if there is no help.
func (l *life) makeRoom(r schedule.Request, s *slot, generation uint64, was *nomination, restarts int) string {
	if was != nil {
		switch l.leaving(was) {
		case leavingGoes:
			l.nominate(*was)
			return was.why
		case leavingRefused, leavingGone: // the room was not to be had, or went to another
			l.book.preemptAtMS = l.now + preemptPauseMS
		}
	}
	if l.vm.Spec.Priority <= l.preempting.floor || restarts > maxPreemptRestarts {
		return ""
	}
	if at := max(l.book.preemptAtMS, l.preempting.searchAtMS(l.now)); at > l.now {
		l.wakeAt(l.vm.Name, at)
		return ""
	}
	room, rows, ok := l.index.Preempt(l.v, schedule.Want{Request: r, Own: s.live, Condemned: l.preempting.condemned})
	l.rows += rows
	l.preempting.searchDebt += int64(rows)
	if !ok {
		return ""
	}
	n := nomination{ordinal: s.ordinal, generation: generation, node: room.Node, why: "waits for " + room.String()}
	for _, i := range room.Ending {
		n.leaving = append(n.leaving, state.Victim{VM: i.VM, Ordinal: i.Ordinal, Generation: i.Generation})
	}
	if len(room.Victims) > 0 {
		command := &state.PreemptInstances{VM: l.vm.Name, UID: l.vm.UID, Ordinal: s.ordinal, SpecVersion: l.vm.SpecVersion, Node: room.Node, NodeEpoch: room.Epoch}
		if s.live != nil {
			command.Succeeds = s.live.Generation
		}
		for _, i := range room.Victims {
			command.Victims = append(command.Victims, state.Victim{VM: i.VM, Ordinal: i.Ordinal, Generation: i.Generation})
		}
		if !l.emit(command) {
			return n.why
		}
		l.preempted++
		n.leaving = append(n.leaving, command.Victims...)
		if l.preempting.condemned == nil {
			l.preempting.condemned = map[*blixard.Instance]bool{}
		}
		for _, i := range room.Victims {
			l.preempting.condemned[i] = true
		}
	}
	l.nominate(n)
	return n.why
}

// What became of those who leave.
type leaving uint8

const (
	leavingGone    leaving = iota // all of them
	leavingGoes                   // some are on their way
	leavingRefused                // the proposal was refused: some are to run on
)

func (l *life) leaving(n *nomination) leaving {
	out := leavingGone
	for _, v := range n.leaving {
		i := l.v.Instance(v.VM, v.Ordinal, v.Generation)
		switch {
		case i == nil || !i.Holds():
		case i.Wanted == blixard.WantRun:
			return leavingRefused
		default:
			out = leavingGoes
		}
	}
	return out
}
