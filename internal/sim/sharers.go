package sim

import (
	"fmt"
	"math/rand/v2"
	"slices"

	"github.com/anishathalye/porcupine"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// sharers are users who change the same few VMs, and of whom some give up
// before they are answered. What they saw is kept, and must
// be linearizable: one by one, each VM is a register whose value is its number of
// replicas. The VMs are stopped, so that any number will do.
type sharers struct {
	w       *world
	rng     *rand.Rand
	stopped bool
	made    bool
	value   int          // written last; each value is written once
	busy    map[int]bool // waits for an answer
	asleep  map[int]bool // its next operation is planned
	history map[blixard.VMName][]porcupine.Operation
	unknown map[blixard.VMName]int // of the history
	initial map[blixard.VMName]int // at its beginning
}

// Bounds that keep the check fast: an operation whose outcome is not known can
// be anywhere after it began.
const (
	sharedVMs       = 2
	historyMost     = 600
	unknownMost     = 10
	sharedReplicas  = 900
	sharedPatience  = 4000
	neverMS         = int64(1) << 60
	unknownReplicas = -1
	unknownForMS    = 30_000
	stampBits       = 20
)

func newSharers(w *world) *sharers {
	return &sharers{
		w: w, rng: rand.New(rand.NewPCG(w.s.Seed, 99)), busy: map[int]bool{}, asleep: map[int]bool{}, history: map[blixard.VMName][]porcupine.Operation{},
		unknown: map[blixard.VMName]int{}, initial: map[blixard.VMName]int{},
	}
}

// stamp is true time, in an order.
func (s *sharers) stamp() int64 { return s.w.now<<stampBits | int64(s.w.events&(1<<stampBits-1)) }

func sharedVM(i int) blixard.VMName { return blixard.VMName(fmt.Sprintf("shared-v%d", i)) }

// begin has all sharers go on; the VMs are made first.
func (s *sharers) begin() {
	if s.w.k.Sharers == 0 {
		return
	}
	if !s.made {
		s.made = true
		for i := range sharedVMs {
			spec := blixard.VMSpec{Replicas: 0}
			spec.Defaults()
			s.w.operator.do(&state.CreateVM{Name: sharedVM(i), Spec: spec}, func(res state.Result) {
				if res.Err != nil {
					s.w.violated("a VM can be created", "%v", res.Err)
				}
				s.initial[sharedVM(i)] = 0
			})
		}
	}
	for i := range s.w.k.Sharers {
		s.next(i)
	}
}

func (s *sharers) next(i int) {
	if s.busy[i] || s.asleep[i] {
		return
	}
	s.asleep[i] = true
	s.w.after((1+s.rng.Int64N(2*s.w.k.ThinkMS))*s.w.pace, func() {
		s.asleep[i] = false
		if !s.stopped {
			s.one(i)
		}
	})
}

// one does one operation.
func (s *sharers) one(i int) {
	w := s.w
	vm := sharedVM(s.rng.IntN(sharedVMs))
	_, made := s.initial[vm]
	p := w.anyProcess(s.rng)
	if p == nil || !made || len(s.history[vm]) >= historyMost || s.unknown[vm] >= unknownMost {
		s.next(i)
		return
	}
	op := porcupine.Operation{ClientId: i, Call: s.stamp(), Input: unknownReplicas}
	s.busy[i] = true
	over := false
	end := func(output int, known bool) {
		if over {
			return
		}
		over = true
		op.Output, op.Return = output, s.stamp()
		switch {
		case known:
			s.history[vm] = append(s.history[vm], op)
		case op.Input != unknownReplicas:
			w.count["gave up"]++
			op.Return = neverMS
			s.unknown[vm]++
			s.history[vm] = append(s.history[vm], op)
		}
		s.busy[i] = false
		s.next(i)
	}
	w.after(s.rng.Int64N(sharedPatience)+500, func() { end(unknownReplicas, false) })
	if s.rng.IntN(2) == 0 {
		p.enter(func() {
			p.read(func(v *state.View) {
				if x := v.VM(vm); x != nil {
					end(x.Spec.Replicas, true)
				}
			})
		})
		return
	}
	s.value = s.value%sharedReplicas + 1
	value := s.value
	op.Input = value
	p.enter(func() {
		p.propose(state.Envelope{Key: fmt.Sprintf("s%d/%d", i, w.events), Actor: fmt.Sprintf("s%d", i), Command: &state.ScaleVM{Name: vm, Replicas: value}}, func(res state.Result) {
			if res.Err != nil {
				w.violated("a stopped VM can be scaled", "%v", res.Err)
			}
			end(value, true)
		}, func() bool { return over })
	})
}

// linearizable checks the history so far, and begins a new one where it ends.
// Nothing may be under way.
func (s *sharers) linearizable() {
	r := s.w.ruler()
	if s.w.k.Sharers == 0 || r == nil {
		return
	}
	for i := range sharedVMs {
		vm := sharedVM(i)
		x := r.proc.r.View().VM(vm)
		first, made := s.initial[vm]
		if x == nil || !made {
			continue
		}
		last := porcupine.Operation{ClientId: 99, Input: unknownReplicas, Output: x.Spec.Replicas, Call: s.stamp(), Return: s.stamp() + 1}
		model := porcupine.Model{
			Init: func() any { return first },
			Step: func(now, input, output any) (bool, any) {
				if input == unknownReplicas {
					return now == output, now
				}
				return true, input
			},
		}
		if !porcupine.CheckOperations(model, append(s.history[vm], last)) {
			s.w.violated("S7 histories are linearizable", "that of %s is not: from %d, %+v, to %d", vm, first, s.history[vm], x.Spec.Replicas)
		}
		s.w.count["linearizable history"]++
		// What somebody gave up lately may still be carried out.
		s.history[vm] = slices.DeleteFunc(s.history[vm], func(op porcupine.Operation) bool {
			return op.Return != neverMS || op.Call < (s.w.now-unknownForMS)<<stampBits
		})
		s.unknown[vm], s.initial[vm] = len(s.history[vm]), x.Spec.Replicas
	}
}
