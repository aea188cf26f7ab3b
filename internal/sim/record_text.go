package sim

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/record"
	"github.com/blixard/blixard/internal/state"
)

// recentLines is how much of a trace stands with a violation.
const recentLines = 40

// command writes one command of an entry as one line.
func (p *replay) command(e *record.Entry, env *state.Envelope, res *state.Result, note string) {
	p.report.Commands++
	if p.report.FirstMS == 0 {
		p.report.FirstMS = env.NowMS
	}
	p.report.LastMS = env.NowMS
	text := describe(env.Command)
	switch {
	case res.Err != nil:
		p.report.Refused++
		text += " -> refused: " + res.Err.Message
	case res.Outcome.Noop:
		text += " -> as it was"
	}
	if note != "" {
		text += " (" + note + ")"
	}
	p.line("%d t%d %s %s: %s", e.Index, e.Term, time.UnixMilli(env.NowMS).UTC().Format("15:04:05.000"), env.Actor, text)
}

// line writes a line of the trace and keeps the last ones.
func (p *replay) line(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if len(p.recent) == recentLines {
		p.recent = p.recent[1:]
	}
	p.recent = append(p.recent, text)
	if p.o.Trace != nil {
		// A reader of the trace that has gone does not change what is found.
		if _, err := io.WriteString(p.o.Trace, text+"\n"); err != nil {
			p.o.Trace = nil
		}
	}
}

// describe says a command in one line.
func describe(c state.Command) string {
	switch c := c.(type) {
	case *state.CreateVM:
		return fmt.Sprintf("create %s with %d replicas%s", c.Name, c.Spec.Replicas, unless(c.Start, ", stopped"))
	case *state.UpdateVM:
		return fmt.Sprintf("update %s", c.Name)
	case *state.ScaleVM:
		return fmt.Sprintf("scale %s to %d", c.Name, c.Replicas)
	case *state.SetVM:
		return fmt.Sprintf("%s %s", c.Verb, c.Name)
	case *state.RestartVM:
		return fmt.Sprintf("restart %s", c.Name)
	case *state.DeleteVM:
		return fmt.Sprintf("delete %s", c.Name)
	case *state.ApplyVM:
		return fmt.Sprintf("apply %s with %d replicas", c.Name, c.Spec.Replicas)
	case *state.Batch:
		return fmt.Sprintf("all or none of %d: %s", len(c.Commands), few(len(c.Commands), func(i int) string { return describe(c.Commands[i]) }))
	case *state.Observe:
		return "reports " + few(len(c.Items), func(i int) string { return describeItem(&c.Items[i]) })
	case *state.RefuseVM:
		if c.Missing == 0 {
			return fmt.Sprintf("%s has all its places", c.Name)
		}
		return fmt.Sprintf("%d of %s have no place: %s", c.Missing, c.Name, c.Summary)
	}
	return describeRest(c)
}

// describeRest is describe for instances, nodes and the cluster.
func describeRest(c state.Command) string {
	switch c := c.(type) {
	case *state.PlaceInstance:
		return fmt.Sprintf("place %s-%d#%d on %s", c.VM, c.Ordinal, c.Generation, c.Node)
	case *state.EndInstance:
		if c.Wanted == blixard.WantRun {
			return fmt.Sprintf("paused=%t for %s-%d#%d", c.Paused, c.VM, c.Ordinal, c.Generation)
		}
		return fmt.Sprintf("%s %s-%d#%d: %s", c.Wanted, c.VM, c.Ordinal, c.Generation, c.Reason)
	case *state.PreemptInstances:
		return fmt.Sprintf("make room on %s for %s-%d: stop %s", c.Node, c.VM, c.Ordinal, few(len(c.Victims), func(i int) string {
			return fmt.Sprintf("%s-%d#%d", c.Victims[i].VM, c.Victims[i].Ordinal, c.Victims[i].Generation)
		}))
	case *state.DropInstance:
		return fmt.Sprintf("forget %s-%d#%d", c.VM, c.Ordinal, c.Generation)
	case *state.Bootstrap:
		return fmt.Sprintf("found the cluster %s on %s", c.Name, c.Node.Name)
	case *state.JoinNode:
		return fmt.Sprintf("%s joins at %s", c.Node.Name, c.Node.Address)
	case *state.ReportNode:
		return fmt.Sprintf("offers %d MiB and %d thousandths of a CPU, release %s", c.Capacity.MemoryMiB, c.Capacity.MilliCPU, c.Release)
	case *state.SetNode:
		return strings.TrimSpace(fmt.Sprintf("set %s %s", c.Name, c.Availability))
	case *state.LoseNode:
		return fmt.Sprintf("%s is lost", c.Name)
	case *state.ReviveNode:
		return fmt.Sprintf("%s is back", c.Name)
	case *state.RemoveNode:
		return fmt.Sprintf("remove %s%s", c.Name, unless(!c.Force, " by force"))
	case *state.CreateToken:
		return "make the join token " + c.Token.ID
	case *state.RevokeToken:
		return "revoke the join token " + c.ID
	case *state.RemoveImage:
		return fmt.Sprintf("remove the image %.12s%s", c.Digest, unless(!c.Back, ": no, it is back"))
	case *state.SetMaintenance:
		return fmt.Sprintf("maintenance mode: %t", c.On)
	}
	return describeFunction(c)
}

func describeItem(o *state.Observation) string {
	name := fmt.Sprintf("%s-%d#%d", o.VM, o.Ordinal, o.Generation)
	switch {
	case o.Removed:
		return name + " removed"
	case o.Message != "":
		return fmt.Sprintf("%s %s (%s)", name, o.State, o.Message)
	case o.Health != blixard.HealthUnknown:
		return fmt.Sprintf("%s %s, %s", name, o.State, o.Health)
	}
	return fmt.Sprintf("%s %s", name, o.State)
}

// few joins the first texts and says how many more there are.
func few(n int, text func(int) string) string {
	const most = 4
	var out []string
	for i := range min(n, most) {
		out = append(out, text(i))
	}
	if n > most {
		out = append(out, fmt.Sprintf("and %d more", n-most))
	}
	return strings.Join(out, ", ")
}

func unless(held bool, text string) string {
	if held {
		return ""
	}
	return text
}
