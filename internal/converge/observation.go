package converge

import (
	"fmt"
	"slices"
	"strings"

	"github.com/blixard/blixard"
)

// Observation is what the node tells the cluster of one incarnation: the whole
// of what it sees, so that repeating it changes nothing.
type Observation struct {
	VM           blixard.VMName
	Ordinal      int
	Generation   uint64
	State        blixard.InstanceState
	Paused       bool
	Message      string
	Address      string // of the first published port, else of the guest
	Ports        []blixard.PublishedPort
	Health       blixard.Health
	Acceleration string
	// Removed: nothing of it is left on the node.
	Removed bool
}

// String writes what differs from an empty observation, in one line.
func (o *Observation) String() string {
	if o.Removed {
		return "removed"
	}
	var b strings.Builder
	b.WriteString(string(o.State))
	if o.Paused {
		b.WriteString(" paused")
	}
	if o.Health != blixard.HealthUnknown {
		fmt.Fprintf(&b, " %s", o.Health)
	}
	if o.Address != "" {
		fmt.Fprintf(&b, " at %s", o.Address)
	}
	if o.Message != "" {
		fmt.Fprintf(&b, " %q", o.Message)
	}
	return b.String()
}

// Equal tells whether both say the same.
func (o *Observation) Equal(p *Observation) bool {
	if o == nil || p == nil {
		return o == p
	}
	return o.VM == p.VM && o.Ordinal == p.Ordinal && o.Generation == p.Generation &&
		o.State == p.State && o.Paused == p.Paused && o.Message == p.Message &&
		o.Address == p.Address && slices.Equal(o.Ports, p.Ports) &&
		o.Health == p.Health && o.Acceleration == p.Acceleration && o.Removed == p.Removed
}

// maxMessage keeps messages below the bound of the state, which would cut them
// and so make what was stored differ from what is seen for ever.
const maxMessage = 1000

// clip makes text fit to be reported.
func clip(text string) string {
	text = strings.ToValidUTF8(text, "?")
	if len(text) > maxMessage {
		text = strings.ToValidUTF8(text[:maxMessage-3], "") + "..."
	}
	return text
}

// known is the row's own content as an observation.
func known(row *blixard.Instance) Observation {
	return Observation{
		VM: row.VM, Ordinal: row.Ordinal, Generation: row.Generation, State: row.State, Paused: row.StatePaused, Message: row.Message,
		Address: row.Address, Ports: row.Ports, Health: row.Health, Acceleration: row.Acceleration,
	}
}

// observe is what the node sees of an incarnation that is in state. What it
// does not know at the moment stays as the row has it.
func (p *planner) observe(e *entry, state blixard.InstanceState, message string) Observation {
	o := known(e.row)
	o.State, o.Message = state, clip(message)
	if state == blixard.Pending || state == blixard.Preparing {
		return o
	}
	if p.in.Acceleration != "" {
		o.Acceleration = p.in.Acceleration
	}
	if e.found != nil {
		o.Paused = e.found.Phase == Paused
		if len(e.found.Ports) > 0 {
			o.Ports = e.found.Ports
		}
	}
	switch o.Address = ""; {
	case len(o.Ports) > 0:
		o.Address = o.Ports[0].Address
	case e.found != nil:
		o.Address = e.found.Address
	}
	if e.local != nil && e.local.Health != blixard.HealthUnknown {
		o.Health = e.local.Health
	}
	return o
}

// report orders a report unless the cluster has it already, or will have once
// the view has caught up.
func (p *planner) report(e *entry, o Observation) {
	row := known(e.row)
	if !o.Removed {
		if row.Equal(&o) || e.row.State.Terminal() || o.State != e.row.State && !blixard.CanFollow(e.row.State, o.State) {
			return
		}
	}
	if l := e.local; l != nil && l.Sent.Equal(&o) {
		if p.in.ViewIndex < l.SentIndex {
			return
		}
		if again := l.SentMS + p.in.Limits.ResendMS; p.in.NowMS < again {
			p.wakeAt(again)
			return
		}
	}
	p.add(Action{Kind: Report, Ref: e.ref, Observation: &o})
}
