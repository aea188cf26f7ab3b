package cli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

func (a *app) clusterStatus() *cobra.Command {
	var flags listFlags
	var verbose bool
	cmd := &cobra.Command{
		Use: "status", Short: "How the cluster is: its leader, its nodes, what runs", Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			look := func(ctx context.Context, w io.Writer) error {
				s, err := ask(ctx, a, (*client.Client).GetStatus, &blixardv1.GetStatusRequest{})
				if err != nil {
					return err
				}
				return a.printStatus(w, s, flags, verbose)
			}
			if flags.watch {
				return a.watch(cmd.Context(), []string{"node", "vm", "instance"}, "", look)
			}
			return look(cmd.Context(), a.env.Stdout)
		},
	}
	flags.add(cmd, true)
	completeSortOf(cmd, "node")
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "resources, replication and releases too")
	return cmd
}

func (a *app) printStatus(w io.Writer, s *blixardv1.ClusterStatus, flags listFlags, verbose bool) error {
	l := nodeListing(s.Nodes, time.Now())
	l.whole = func(objects []any) any {
		out := proto.CloneOf(s)
		out.Nodes = typed[*blixardv1.Node](objects)
		return out
	}
	if a.output != formatTable && a.output != formatWide {
		return a.print(w, l, flags)
	}
	ready := 0
	for _, n := range s.Nodes {
		if n.State == "Ready" {
			ready++
		}
	}
	nodes := fmt.Sprintf("%d, %d ready", len(s.Nodes), ready)
	if s.Leader == "" {
		nodes += ", as last known: states change only by a leader's word"
	}
	lines := [][2]string{
		{"Cluster", firstOf(s.Name, s.Id)},
		{"Leader", firstOf(s.Leader, "none: nothing can be changed until there is one")},
		{"Nodes", nodes},
		{"VMs", fmt.Sprintf("%d with %d instances, %d running", s.Vms, s.Instances, s.Running)},
		{"Used", usedText(s.Used, s.Allocatable)},
	}
	if s.Maintenance {
		lines = append(lines, [2]string{"Maintenance", "on: nothing is placed, moved or restarted by itself"})
	}
	if verbose {
		lines = append(lines,
			[2]string{"Cluster ID", s.Id},
			[2]string{"Created", when(s.CreatedMs, time.Now())},
			[2]string{"Asked node", fmt.Sprintf("%s (%s), release %s", s.Node, s.Role, s.Release)},
			[2]string{"Consensus", fmt.Sprintf("term %d, committed %d, applied %d", s.Term, s.Committed, s.Applied)},
			[2]string{"Feature level", fmt.Sprint(s.FeatureLevel)},
		)
	}
	if err := facts(w, lines); err != nil {
		return err
	}
	fmt.Fprintln(w)
	if verbose {
		was := a.output
		a.output = formatWide
		defer func() { a.output = was }()
	}
	return a.print(w, l, flags)
}

func usedText(used, of *blixardv1.Resources) string {
	return fmt.Sprintf("%s of %s vCPUs, %s of %s memory", cores(used.GetMilliCpu()), cores(of.GetMilliCpu()), blixard.FormatMiB(used.GetMemoryMib()), blixard.FormatMiB(of.GetMemoryMib()))
}

func cores(milli int64) string {
	if milli%1000 == 0 {
		return fmt.Sprint(milli / 1000)
	}
	return fmt.Sprintf("%.1f", float64(milli)/1000)
}

func (a *app) clusterList() *cobra.Command {
	var flags listFlags
	cmd := &cobra.Command{
		Use: "list", Short: "List the nodes", Aliases: []string{"ls", "nodes"}, Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error { return a.listNodes(cmd.Context(), flags) },
	}
	flags.add(cmd, true)
	completeSortOf(cmd, "node")
	a.mayBeStale(cmd)
	return cmd
}

func (a *app) listNodes(ctx context.Context, flags listFlags) error {
	return a.show(ctx, flags, []string{"node", "instance"}, "", func(ctx context.Context) (*listing, error) {
		list, err := ask(ctx, a, (*client.Client).ListNodes, &blixardv1.ListNodesRequest{})
		if err != nil {
			return nil, err
		}
		return nodeListing(list.Nodes, time.Now()), nil
	})
}

func nodeListing(nodes []*blixardv1.Node, now time.Time) *listing {
	l := &listing{
		key: "nodes", empty: "there are no nodes",
		columns: []column{
			{name: "NODE"},
			{name: "STATE"},
			{name: "ROLE"},
			{name: "AVAILABILITY"},
			{name: "ADDRESS"},
			{name: "ZONE"},
			{name: "INSTANCES"},
			{name: "MEMORY"},
			{name: "AGE", wide: true},
			{name: "VCPUS", wide: true},
			{name: "HYPERVISORS", wide: true},
			{name: "ACCELERATION", wide: true},
			{name: "PUBLISH", wide: true},
			{name: "MATCH", wide: true},
			{name: "RELEASE", wide: true},
			{name: "ROLES", wide: true},
			{name: "LABELS", wide: true},
		},
	}
	for _, n := range nodes {
		memory := mib(n.GetUsed().GetMemoryMib())
		memory.text += "/" + blixard.FormatMiB(n.GetAllocatable().GetMemoryMib())
		cpus := cell{text: cores(n.GetUsed().GetMilliCpu()) + "/" + cores(n.GetAllocatable().GetMilliCpu()), number: blixard.Quantity(n.GetUsed().GetMilliCpu()), kind: numberCell}
		match := str("")
		if p := n.Progress; p != nil {
			match = num(p.Match)
		}
		l.rows = append(l.rows, row{
			name: "node/" + n.Id, object: n, labels: n.Labels,
			cells: []cell{
				str(n.Id), str(n.State), str(n.Role), str(n.Availability), str(n.Address), str(n.Zone), num(n.Instances), memory, age(now, n.JoinedMs),
				cpus, str(strings.Join(n.Hypervisors, ",")), str(n.Acceleration), str(n.PublishAddress),
				match, str(n.Version), str(strings.Join(n.Roles, ",")), str(pairs(n.Labels)),
			},
		})
	}
	return l
}
