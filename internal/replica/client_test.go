package replica_test

import (
	"fmt"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// client is a user who owns some VMs and does one thing after another: it
// repeats each under the same idempotency key, through any node, until it is
// answered. So what its VMs must be is known exactly.
type client struct {
	w       *world
	name    string
	seq     int
	op      *operation
	model   map[blixard.VMName]*wish
	stopped bool
}

// wish is what a VM must be after the acknowledged commands.
type wish struct {
	replicas   int
	memoryMiB  int64
	running    bool
	restartSeq uint64
	atIndex    uint64 // of the last acknowledged change
}

// operation is what a client waits for.
type operation struct {
	key    string
	cmd    state.Command // nil: a read
	tries  int
	answer *state.Result
}

func newClient(w *world, i int) *client {
	return &client{w: w, name: fmt.Sprintf("c%d", i+1), model: map[blixard.VMName]*wish{}}
}

func (c *client) stop() { c.stopped = true }

// next begins the next operation after a while.
func (c *client) next() {
	c.w.after(c.w.between(10, 1500), func() {
		if c.stopped {
			return
		}
		c.seq++
		c.op = &operation{key: fmt.Sprintf("%s/%d", c.name, c.seq)}
		if !c.w.chance(25) {
			c.op.cmd = c.choose()
		}
		c.try()
	})
}

func (c *client) choose() state.Command {
	w := c.w
	name := blixard.VMName(fmt.Sprintf("%s-vm%d", c.name, w.rng.IntN(3)))
	m := c.model[name]
	if m == nil || w.chance(3) {
		return &state.CreateVM{Name: name, Spec: c.spec(), Start: w.chance(85)}
	}
	switch w.rng.IntN(10) {
	case 0, 1, 2:
		return &state.ScaleVM{Name: name, Replicas: w.rng.IntN(5)}
	case 3:
		return &state.SetVM{Name: name, Verb: state.VerbStop}
	case 4, 5:
		return &state.SetVM{Name: name, Verb: state.VerbStart}
	case 6, 7:
		return &state.RestartVM{Name: name}
	case 8:
		return &state.ApplyVM{Name: name, Spec: c.spec()}
	}
	return &state.DeleteVM{Name: name}
}

func (c *client) spec() blixard.VMSpec {
	s := blixard.VMSpec{Replicas: 1 + c.w.rng.IntN(3), VCPUs: 1, MemoryMiB: 256 * c.w.between(1, 4), Singleton: c.w.chance(60)}
	if c.w.chance(15) {
		s.AntiAffinityGroup = c.name
	}
	s.Defaults()
	return s
}

// try asks some node, and another one when there is no answer in time.
func (c *client) try() {
	op, w := c.op, c.w
	op.tries++
	n := op.tries
	w.after(w.between(500, 3000), func() {
		if c.op == op && op.tries == n {
			c.try()
		}
	})
	s := w.anyServer()
	if s == nil {
		return
	}
	s.enter(func() {
		if op.cmd == nil {
			if c.op == op {
				s.read(func(v *state.View) { c.read(op, s, v) })
			}
			return
		}
		w.say("%s asks %s: %s %T%+v", c.name, s.m.name, op.key, op.cmd, brief(op.cmd))
		s.propose(state.Envelope{Key: op.key, Actor: c.name, Command: op.cmd}, func(res state.Result) { c.answered(op, s, res) })
	})
}

func brief(cmd state.Command) any {
	switch m := cmd.(type) {
	case *state.CreateVM:
		return []any{m.Name, m.Spec.Replicas, m.Spec.MemoryMiB, m.Spec.Singleton, m.Start}
	case *state.ApplyVM:
		return []any{m.Name, m.Spec.Replicas, m.Spec.MemoryMiB, m.Spec.Singleton}
	}
	return cmd
}

// answered takes an answer; a later one to the same key must be the same.
func (c *client) answered(op *operation, s *server, res state.Result) {
	res.Request = 0
	if op.answer != nil {
		if op.answer.Outcome != res.Outcome || fmt.Sprint(op.answer.Err) != fmt.Sprint(res.Err) {
			c.w.violated("%s is answered %+v, %v and then %+v, %v", op.key, op.answer.Outcome, op.answer.Err, res.Outcome, res.Err)
		}
		return
	}
	op.answer = &res
	c.w.say("%s is answered by %s: %s %+v %v", c.name, s.m.name, op.key, res.Outcome, res.Err)
	c.w.count["acknowledged"]++
	if op.tries > 1 {
		c.w.count["acknowledged after a retry"]++
	}
	if res.Err == nil {
		c.learn(op.cmd, res.Outcome.Index)
	}
	c.op = nil
	c.next()
}

// learn changes the model as an acknowledged command changes the state.
func (c *client) learn(cmd state.Command, index uint64) {
	switch m := cmd.(type) {
	case *state.CreateVM:
		c.model[m.Name] = &wish{m.Spec.Replicas, m.Spec.MemoryMiB, m.Start, 0, index}
	case *state.ApplyVM:
		if w := c.model[m.Name]; w != nil {
			w.replicas, w.memoryMiB, w.atIndex = m.Spec.Replicas, m.Spec.MemoryMiB, index
		} else {
			c.model[m.Name] = &wish{m.Spec.Replicas, m.Spec.MemoryMiB, true, 0, index}
		}
	case *state.ScaleVM:
		c.model[m.Name].replicas, c.model[m.Name].atIndex = m.Replicas, index
	case *state.SetVM:
		c.model[m.Name].running, c.model[m.Name].atIndex = m.Verb == state.VerbStart, index
	case *state.RestartVM:
		c.model[m.Name].restartSeq++
		c.model[m.Name].atIndex = index
	case *state.DeleteVM:
		delete(c.model, m.Name)
	}
}

// read takes a linearizable view: nothing was under way, so it must show the
// model.
func (c *client) read(op *operation, s *server, v *state.View) {
	if c.op != op {
		return
	}
	c.w.say("%s reads %d at %s", c.name, v.Index, s.m.name)
	c.w.count["linearizable read"]++
	c.holds(v, "a linearizable read at "+string(s.m.name))
	c.op = nil
	c.next()
}

// holds compares a view with the model.
func (c *client) holds(v *state.View, where string) {
	for k := range 3 {
		name := blixard.VMName(fmt.Sprintf("%s-vm%d", c.name, k))
		vm, m := v.VM(name), c.model[name]
		switch exists := vm != nil && !vm.Deleting; {
		case exists != (m != nil):
			c.w.violated("%s, at entry %d: %s exists is %t, must be %t", where, v.Index, name, exists, m != nil)
		case !exists:
		case vm.Spec.Replicas != m.replicas || vm.Spec.MemoryMiB != m.memoryMiB || (vm.Desired == blixard.DesiredRunning) != m.running || vm.RestartSeq != m.restartSeq:
			c.w.violated("%s, at entry %d: %s is %d × %d MiB, %s, restart %d; must be %+v", where, v.Index, name, vm.Spec.Replicas, vm.Spec.MemoryMiB, vm.Desired, vm.RestartSeq, *m)
		}
	}
}
