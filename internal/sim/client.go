package sim

import (
	"fmt"
	"math/rand/v2"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// client is a user who owns some VMs and does one thing after another: it
// repeats each under the same idempotency key, through any node, until it is
// answered. So what its VMs must be is known exactly.
type client struct {
	w       *world
	rng     *rand.Rand
	name    string
	names   []blixard.VMName
	seq     int
	op      *operation
	model   map[blixard.VMName]*wish
	stopped bool
	asleep  bool // next is planned
}

// wish is what a VM must be after the acknowledged commands.
type wish struct {
	replicas   int
	memoryMiB  int64
	running    bool
	paused     bool
	restartSeq uint64
}

// operation is what a client waits for.
type operation struct {
	key    string
	cmd    state.Command // nil: a read
	tries  int
	answer *state.Result
}

func newClient(w *world, i int) *client {
	c := &client{w: w, rng: rand.New(rand.NewPCG(w.s.Seed, uint64(100+i))), name: fmt.Sprintf("c%d", i+1), model: map[blixard.VMName]*wish{}}
	for k := i; k < w.k.VMs; k += w.k.Clients {
		c.names = append(c.names, blixard.VMName(fmt.Sprintf("%s-v%d", c.name, k/w.k.Clients)))
	}
	return c
}

func (c *client) chance(pct int) bool { return c.rng.IntN(100) < pct }

func (c *client) between(lo, hi int64) int64 { return lo + c.rng.Int64N(hi-lo+1) }

// next begins the next operation after a while.
func (c *client) next() {
	if c.asleep || c.op != nil {
		return
	}
	c.asleep = true
	pause := c.between(1, 2*c.w.k.ThinkMS) * c.w.pace
	if len(c.model) < len(c.names)/2 {
		pause = pause/20 + 1 // first of all there must be VMs
	}
	c.w.after(pause, func() {
		c.asleep = false
		if c.stopped {
			return
		}
		c.seq++
		c.op = &operation{key: fmt.Sprintf("%s/%d", c.name, c.seq)}
		if !c.chance(25) {
			c.op.cmd = c.choose()
		}
		c.try()
	})
}

func (c *client) choose() state.Command {
	name := c.names[c.rng.IntN(len(c.names))]
	if len(c.model) < len(c.names)/2 {
		name = c.names[len(c.model)]
	}
	m := c.model[name]
	if m == nil || c.chance(3) {
		return &state.CreateVM{Name: name, Spec: c.spec(), Start: c.chance(85)}
	}
	switch c.rng.IntN(14) {
	case 0, 1, 2:
		return &state.ScaleVM{Name: name, Replicas: c.rng.IntN(4)}
	case 3:
		return &state.SetVM{Name: name, Verb: state.VerbStop}
	case 4, 5, 6:
		return &state.SetVM{Name: name, Verb: state.VerbStart}
	case 7, 8:
		return &state.RestartVM{Name: name}
	case 9:
		return &state.ApplyVM{Name: name, Spec: c.spec()}
	case 10:
		return &state.SetVM{Name: name, Verb: state.VerbPause}
	case 11:
		return &state.SetVM{Name: name, Verb: state.VerbResume}
	case 12:
		return &state.UpdateVM{Name: name, Spec: c.spec()}
	}
	return &state.DeleteVM{Name: name}
}

func (c *client) spec() blixard.VMSpec {
	s := blixard.VMSpec{Replicas: 1 + c.rng.IntN(3), VCPUs: 1, MemoryMiB: 128 * c.between(1, 4), Singleton: c.chance(50), StopGraceMS: c.between(0, 3000)}
	s.Restart = blixard.RestartPolicy{BackoffMS: c.between(100, 1000), MaxBackoffMS: 3000}
	switch c.rng.IntN(12) {
	case 0, 1:
		s.AntiAffinityGroup = c.name
	case 2, 3:
		s.SpreadAcross = "zone"
	case 4:
		s.Strategy = "binpack"
	case 5:
		s.Restart.Mode = "on-failure"
	case 6:
		s.Constraints = []blixard.Constraint{{Key: "zone", Op: "=", Value: fmt.Sprintf("z%d", 1+c.rng.IntN(c.w.k.Zones))}}
	case 7:
		s.Priority = int(c.between(1, 1000))
	case 8:
		if !s.Singleton {
			s.OnPartition = blixard.OnPartitionStop
		}
	}
	s.Defaults()
	return s
}

// try asks some node, and another one when there is no answer in time.
func (c *client) try() {
	op, w := c.op, c.w
	op.tries++
	n := op.tries
	w.after(c.between(500, 3000), func() {
		if c.op == op && op.tries == n {
			c.try()
		}
	})
	p := w.anyProcess(c.rng)
	if p == nil {
		return
	}
	if op.cmd == nil {
		p.enter(func() {
			if c.op == op {
				p.read(func(v *state.View) { c.read(op, p, v) })
			}
		})
		return
	}
	w.say("%s asks %s: %s %s", c.name, p.m.name, op.key, brief(op.cmd))
	c.send(op, p)
	if c.chance(5) { // some libraries are in a hurry
		if twice := w.anyProcess(c.rng); twice != nil {
			w.count["client sends twice"]++
			c.send(op, twice)
		}
	}
}

func (c *client) send(op *operation, p *process) {
	p.enter(func() {
		p.propose(state.Envelope{Key: op.key, Actor: c.name, Command: op.cmd}, func(res state.Result) { c.answered(op, p, res) }, nil)
	})
}

// brief is a command in few words.
func brief(cmd state.Command) string {
	spec := func(s *blixard.VMSpec) string {
		return fmt.Sprintf("%d × %d MiB singleton=%t priority=%d", s.Replicas, s.MemoryMiB, s.Singleton, s.Priority)
	}
	switch m := cmd.(type) {
	case *state.CreateVM:
		return fmt.Sprintf("create %s %s start=%t", m.Name, spec(&m.Spec), m.Start)
	case *state.ApplyVM:
		return fmt.Sprintf("apply %s %s", m.Name, spec(&m.Spec))
	case *state.UpdateVM:
		return fmt.Sprintf("update %s %s", m.Name, spec(&m.Spec))
	case *state.ScaleVM:
		return fmt.Sprintf("scale %s to %d", m.Name, m.Replicas)
	case *state.SetVM:
		return fmt.Sprintf("%s %s", m.Verb, m.Name)
	case *state.RestartVM:
		return fmt.Sprintf("restart %s", m.Name)
	case *state.DeleteVM:
		return fmt.Sprintf("delete %s", m.Name)
	}
	return fmt.Sprintf("%T%+v", cmd, cmd)
}

// answered takes an answer; a later one to the same key must be the same.
func (c *client) answered(op *operation, p *process, res state.Result) {
	res.Request = 0
	if op.answer != nil {
		if op.answer.Outcome != res.Outcome || fmt.Sprint(op.answer.Err) != fmt.Sprint(res.Err) {
			c.w.violated("S7 one key, one answer", "%s is answered %+v, %v and then %+v, %v", op.key, op.answer.Outcome, op.answer.Err, res.Outcome, res.Err)
		}
		return
	}
	op.answer = &res
	c.w.say("%s is answered by %s: %s %+v %v", c.name, p.m.name, op.key, res.Outcome, res.Err)
	c.w.count["acknowledged"]++
	if op.tries > 1 {
		c.w.count["acknowledged after a retry"]++
	}
	if res.Err == nil {
		c.learn(op.cmd)
	}
	c.op = nil
	c.next()
}

// learn changes the model as an acknowledged command changes the state.
func (c *client) learn(cmd state.Command) {
	switch m := cmd.(type) {
	case *state.CreateVM:
		c.model[m.Name] = &wish{replicas: m.Spec.Replicas, memoryMiB: m.Spec.MemoryMiB, running: m.Start}
	case *state.ApplyVM:
		if w := c.model[m.Name]; w != nil {
			w.replicas, w.memoryMiB = m.Spec.Replicas, m.Spec.MemoryMiB
		} else {
			c.model[m.Name] = &wish{replicas: m.Spec.Replicas, memoryMiB: m.Spec.MemoryMiB, running: true}
		}
	case *state.UpdateVM:
		c.model[m.Name].replicas, c.model[m.Name].memoryMiB = m.Spec.Replicas, m.Spec.MemoryMiB
	case *state.ScaleVM:
		c.model[m.Name].replicas = m.Replicas
	case *state.SetVM:
		w := c.model[m.Name]
		switch m.Verb {
		case state.VerbStart:
			w.running = true
		case state.VerbStop:
			w.running, w.paused = false, false
		case state.VerbPause, state.VerbResume:
			w.paused = m.Verb == state.VerbPause
		}
	case *state.RestartVM:
		c.model[m.Name].restartSeq++
	case *state.DeleteVM:
		delete(c.model, m.Name)
	}
}

// read takes a linearizable view: nothing was under way, so it must show the
// model.
func (c *client) read(op *operation, p *process, v *state.View) {
	if c.op != op {
		return
	}
	c.w.count["linearizable read"]++
	c.w.mix(uint64(c.w.now), v.Index)
	c.holds(v, "a linearizable read at "+string(p.m.name))
	c.op = nil
	c.next()
}

// holds compares a view with the model.
func (c *client) holds(v *state.View, where string) {
	for _, name := range c.names {
		vm, m := v.VM(name), c.model[name]
		switch exists := vm != nil && !vm.Deleting; {
		case exists != (m != nil):
			c.w.violated("S3 what was acknowledged holds", "%s, at entry %d: %s exists is %t, must be %t", where, v.Index, name, exists, m != nil)
		case !exists:
		case vm.Spec.Replicas != m.replicas || vm.Spec.MemoryMiB != m.memoryMiB || (vm.Desired == blixard.DesiredRunning) != m.running || vm.Paused != m.paused || vm.RestartSeq != m.restartSeq:
			c.w.violated("S3 what was acknowledged holds", "%s, at entry %d: %s is %d × %d MiB, %s, paused=%t, restart %d; must be %+v",
				where, v.Index, name, vm.Spec.Replicas, vm.Spec.MemoryMiB, vm.Desired, vm.Paused, vm.RestartSeq, *m)
		}
	}
}
