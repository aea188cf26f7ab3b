package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

func (a *app) vmDescribe() *cobra.Command {
	cmd := &cobra.Command{
		Use: "describe NAME", Short: "All about a VM: what is wanted, what is, and what happened", Args: takes("NAME"), ValidArgsFunction: a.completeOneVM,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := blixard.CheckName(args[0]); err != nil {
				return err
			}
			got, err := ask(cmd.Context(), a, (*client.Client).GetVM, &blixardv1.GetVMRequest{Name: args[0]})
			if err != nil {
				return err
			}
			events, err := ask(cmd.Context(), a, (*client.Client).ListEvents, &blixardv1.ListEventsRequest{Vm: args[0], Limit: 20})
			if err != nil {
				return err
			}
			switch a.output {
			case formatName:
				return a.done("vm", args[0], "")
			case formatJSON, formatYAML:
				return a.printObject(a.env.Stdout, map[string]any{"vm": got.Vm, "events": events.Events})
			}
			return a.describeVM(got.Vm, events.Events, time.Now())
		},
	}
	a.mayBeStale(cmd)
	return cmd
}

// facts writes "Key: value" lines in two columns; empty values are left out.
func facts(w io.Writer, lines [][2]string) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, l := range lines {
		if l[1] != "" {
			fmt.Fprintf(t, "%s:\t%s\n", l[0], visible(l[1]))
		}
	}
	return t.Flush()
}

func (a *app) describeVM(vm *blixardv1.VM, events []*blixardv1.Event, now time.Time) error {
	s := vm.GetSpec()
	lines := [][2]string{
		{"Name", vm.Name},
		{"State", fmt.Sprintf("%s, %d/%d ready, wanted %s", vm.Phase, vm.Ready, s.GetReplicas(), vm.Desired)},
		{"No place", refusalText(vm.Refusal)},
		{"Image", s.GetImage()},
		{"Size", fmt.Sprintf("%d vCPU, %s memory%s", s.GetVcpus(), blixard.FormatMiB(s.GetMemoryMib()), diskText(s.GetDiskMib()))},
		{"Command", commandText(s.GetCommand())},
		{"Environment", pairs(s.GetEnv())},
		{"Labels", pairs(s.GetLabels())},
		{"Publish", publishText(s.GetPublish())},
		{"Network", s.GetNetwork()},
		{"Hypervisor", s.GetHypervisor()},
		{"Constraints", strings.Join(s.GetConstraints(), ", ")},
		{"Preferences", preferencesText(s.GetPreferences())},
		{"Affinity", strings.Join(s.GetAffinity(), ", ")},
		{"Anti-affinity", s.GetAntiAffinityGroup()},
		{"Strategy", spreadText(s)},
		{"Priority", fmt.Sprint(s.GetPriority())},
		{"Singleton", singletonText(s)},
		{"Restart", restartText(s.GetRestart())},
		{"Health check", healthText(s.GetHealthCheck())},
		{"Depends on", strings.Join(s.GetDependsOn(), ", ")},
		{"Stop grace", durationText(s.GetStopGraceMs())},
		{"Created", when(vm.CreatedMs, now)},
		{"Updated", when(vm.UpdatedMs, now)},
		{"Version", fmt.Sprintf("%d (spec %d)", vm.Version, vm.SpecVersion)},
	}
	if err := facts(a.env.Stdout, lines); err != nil {
		return err
	}
	fmt.Fprintln(a.env.Stdout)
	if len(vm.Instances) > 0 {
		l := instanceListing(vm.Instances, now)
		a.printTable(a.env.Stdout, l, listFlags{})
		fmt.Fprintln(a.env.Stdout)
	}
	slices.Reverse(events) // oldest first, as a story
	for _, i := range vm.Instances {
		if i.Message != "" {
			fmt.Fprintf(a.env.Stdout, "%s generation %d: %s\n", i.Id, i.Generation, visible(i.Message))
		}
	}
	if len(events) > 0 {
		a.printTable(a.env.Stdout, eventListing(events, now), listFlags{})
	}
	return nil
}

func spreadText(s *blixardv1.VMSpec) string {
	if s.GetSpreadAcross() == "" {
		return s.GetStrategy()
	}
	return s.GetStrategy() + " across " + s.GetSpreadAcross()
}

func refusalText(r *blixardv1.Refusal) string {
	if r == nil {
		return ""
	}
	return fmt.Sprintf("%d instances: %s", r.Missing, r.Summary)
}

func diskText(diskMiB int64) string {
	if diskMiB == 0 {
		return ""
	}
	return ", " + blixard.FormatMiB(diskMiB) + " disk"
}

func commandText(command []string) string {
	var out []string
	for _, c := range command {
		if c == "" || strings.ContainsAny(c, " \t\n\"'$`\\|&;<>*?()") {
			c = "'" + strings.ReplaceAll(c, "'", `'\''`) + "'"
		}
		out = append(out, c)
	}
	return strings.Join(out, " ")
}

func publishText(ports []*blixardv1.Port) string {
	var out []string
	for _, p := range ports {
		out = append(out, portText(p))
	}
	return strings.Join(out, ", ")
}

func preferencesText(preferences []*blixardv1.Preference) string {
	var out []string
	for _, p := range preferences {
		out = append(out, fmt.Sprintf("%s (weight %d)", p.Constraint, p.Weight))
	}
	return strings.Join(out, ", ")
}

func singletonText(s *blixardv1.VMSpec) string {
	text := ""
	if s.GetSingleton() {
		text = "yes"
	}
	if s.GetOnPartition() != "" {
		text = firstOf(text, "no") + ", cut off nodes " + s.GetOnPartition()
	}
	return text
}

func restartText(r *blixardv1.RestartPolicy) string {
	if r == nil {
		return ""
	}
	text := fmt.Sprintf("%s, after %s, later up to %s", r.Mode, durationText(r.BackoffMs), durationText(r.MaxBackoffMs))
	if r.MaxRestarts > 0 {
		text += fmt.Sprintf(", at most %d times", r.MaxRestarts)
	}
	return text
}

func healthText(h *blixardv1.HealthCheck) string {
	if h == nil {
		return ""
	}
	probe := fmt.Sprintf("%s:%d%s", h.Kind, h.Port, h.Path)
	if h.Kind == "exec" {
		probe = "exec:" + commandText(h.Command)
	}
	return fmt.Sprintf("%s every %s, within %s, unhealthy after %d failures", probe, durationText(h.IntervalMs), durationText(h.TimeoutMs), h.FailureThreshold)
}

func when(ms int64, now time.Time) string {
	if ms == 0 {
		return ""
	}
	return time.UnixMilli(ms).UTC().Format(time.RFC3339) + " (" + age(now, ms).text + " ago)"
}

func (a *app) vmExplain() *cobra.Command {
	var flags listFlags
	cmd := &cobra.Command{
		Use: "explain NAME", Short: "What each node says to an instance of a VM, and why", Args: takes("NAME"), ValidArgsFunction: a.completeOneVM,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := blixard.CheckName(args[0]); err != nil {
				return err
			}
			return a.show(cmd.Context(), flags, []string{"vm", "instance", "node"}, "", func(ctx context.Context) (*listing, error) {
				got, err := ask(ctx, a, (*client.Client).ExplainVM, &blixardv1.ExplainVMRequest{Name: args[0]})
				if err != nil {
					return nil, err
				}
				return explainListing(got), nil
			})
		},
	}
	flags.add(cmd, true)
	return cmd
}

func explainListing(got *blixardv1.ExplainVMResponse) *listing {
	l := &listing{
		key: "nodes", columns: []column{{name: "NODE"}, {name: "FITS"}, {name: "INSTANCES"}, {name: "WHY NOT"}},
		empty: firstOf(got.Summary, "there are no nodes"), after: visible(got.Summary),
	}
	if r := got.Refusal; r != nil && r.Summary != got.Summary {
		l.after += fmt.Sprintf("\nno place for %d: %s", r.Missing, visible(r.Summary))
	}
	for _, n := range got.Nodes {
		var why []string
		for _, o := range n.Objections {
			why = append(why, firstOf(o.Detail, o.Short))
		}
		fits := "no"
		if n.Fits {
			fits = "yes"
		}
		l.rows = append(l.rows, row{name: "node/" + n.Node, object: n, cells: []cell{str(n.Node), str(fits), num(n.Instances), str(strings.Join(why, "; "))}})
	}
	l.whole = func(objects []any) any {
		out := proto.CloneOf(got)
		out.Nodes = typed[*blixardv1.NodeVerdict](objects)
		return out
	}
	return l
}
