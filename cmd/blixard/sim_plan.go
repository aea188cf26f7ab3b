package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/internal/cli"
	"github.com/blixard/blixard/internal/sim"
	"github.com/blixard/blixard/internal/state"
)

// planFlags say what cluster it is about and what happens to it.
type planFlags struct {
	files               []string
	snapshot            string
	live, check, trace  bool
	lose, drain         []string
	leader              string
	lease, election     time.Duration
	startTime, stopTime time.Duration
	maxVoters           int
}

func simPlanCommand() *cobra.Command {
	f := new(planFlags)
	cmd := &cobra.Command{
		Use: "plan", Short: "What if: nodes are lost or drained",
		Long: `Tell what becomes of a cluster when nodes are lost or drained: which instances
move where and when, for how long they are down, what has no place any more and
why, and what room is left. The production scheduler and reconcilers decide it on
virtual time; nothing real is touched.

The cluster is described by documents (-f: kinds Node, VM and Platform), a
snapshot that "blixard cluster snapshot FILE" has copied, or a live one (--live).
Without --lose and --drain it tells what the cluster looks like at rest.

--lose and --drain take names of nodes or labels, such as zone=a; all of it
happens at one moment, and drains are under way when nodes are lost.`,
		Example: `  blixard sim plan -f cluster.yaml --lose node2
  blixard sim plan -f cluster.yaml --lose zone=a --check
  blixard sim plan --live --drain node3
  blixard sim plan --snapshot state.snapshot --lose node1,node2`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd) },
	}
	fl := cmd.Flags()
	fl.StringSliceVarP(&f.files, "file", "f", nil, "documents that describe the cluster: files, directories, - for standard input")
	fl.StringVar(&f.snapshot, "snapshot", "", "`file` that blixard cluster snapshot FILE has written")
	fl.BoolVar(&f.live, "live", false, "the cluster that --addr names, as it is now")
	fl.StringSliceVar(&f.lose, "lose", nil, "nodes that are lost: names or labels such as zone=a")
	fl.StringSliceVar(&f.drain, "drain", nil, "nodes that are drained: names or labels")
	fl.StringVar(&f.leader, "leader", "", "the node that leads (default: with --live the one that does, else one that stays)")
	fl.DurationVar(&f.lease, "lease", 5*time.Second, "lease of a node (liveness.lease)")
	fl.DurationVar(&f.election, "election", 2*time.Second, "how long it takes until another node leads when the leader is lost")
	fl.DurationVar(&f.startTime, "start-time", 3*time.Second, "how long an instance takes to start")
	fl.DurationVar(&f.stopTime, "stop-time", time.Second, "how long an instance takes to stop")
	fl.IntVar(&f.maxVoters, "max-voters", 5, "most nodes that vote, in a described cluster")
	fl.BoolVar(&f.check, "check", false, "exit with 6 when a wanted instance does not run in the end, or cannot leave a drained node")
	fl.BoolVar(&f.trace, "trace", false, "show every decision")
	return cmd
}

func (f *planFlags) run(cmd *cobra.Command) error {
	if err := f.sound(); err != nil {
		return err
	}
	s, err := f.state(cmd)
	if err != nil {
		return err
	}
	type planned struct {
		report sim.WhatIfReport
		err    error
	}
	got, err := inBackground(cmd.Context(), func() planned {
		r, err := sim.WhatIf(s, sim.WhatIfOptions{
			Lose: f.lose, Drain: f.drain, Leader: blixard.NodeName(f.leader), LeaseMS: f.lease.Milliseconds(), ElectionMS: f.election.Milliseconds(),
			StartMS: f.startTime.Milliseconds(), StopMS: f.stopTime.Milliseconds(), MaxVoters: f.maxVoters, Detail: f.trace,
		})
		return planned{r, err}
	})
	if err != nil {
		return err
	}
	if got.err != nil {
		return got.err
	}
	done, err := structured(cmd, got.report)
	if err == nil && !done {
		err = writePlan(cmd.OutOrStdout(), got.report)
	}
	if err == nil && f.check && !got.report.OK {
		err = &blixard.Error{Code: blixard.CodeRefused, Message: fmt.Sprintf("%s down in the end, and %s on a drained node", plural(len(got.report.Down), "wanted instance"), plural(len(got.report.Stays), "instance")), Hint: "give the cluster more room, or the VMs fewer conditions"}
	}
	return err
}

// sound refuses flags that make no sense.
func (f *planFlags) sound() error {
	sources := 0
	for _, given := range []bool{len(f.files) > 0, f.snapshot != "", f.live} {
		if given {
			sources++
		}
	}
	if sources != 1 {
		return blixard.Invalid("--file", "`blixard help documents` shows how a cluster is described", "give one of -f FILE, --snapshot FILE and --live")
	}
	for _, d := range []struct {
		name string
		d    time.Duration
	}{{"--lease", f.lease}, {"--election", f.election}, {"--start-time", f.startTime}, {"--stop-time", f.stopTime}} {
		if d.d < time.Millisecond || d.d > time.Hour {
			return blixard.Invalid(d.name, "write a duration such as 500ms or 5s", "%s is %s; it must be between 1ms and 1h", d.name, d.d)
		}
	}
	if f.maxVoters < 1 || f.maxVoters > 9 {
		return blixard.Invalid("--max-voters", "", "--max-voters is %d; it must be between 1 and 9", f.maxVoters)
	}
	return nil
}

// state reads the cluster that it is about.
func (f *planFlags) state(cmd *cobra.Command) (*state.State, error) {
	switch {
	case f.live:
		return f.liveState(cmd)
	case f.snapshot != "":
		file, err := os.Open(f.snapshot)
		if err != nil {
			return nil, blixard.Invalid("--snapshot", "", "cannot read %s: %v", f.snapshot, err)
		}
		s, err := state.Read(file)
		if err = errors.Join(err, file.Close()); err != nil {
			return nil, blixard.Invalid("--snapshot", "it must be a file that `blixard cluster snapshot FILE` has written", "cannot use %s: %v", f.snapshot, err)
		}
		return s, nil
	}
	docs, err := cli.ReadCluster(cmd.InOrStdin(), f.files)
	if err != nil {
		return nil, err
	}
	nodes, vms := make([]sim.WhatIfNode, len(docs.Nodes)), make([]sim.WhatIfVM, len(docs.VMs))
	for i, n := range docs.Nodes {
		nodes[i] = sim.WhatIfNode(n)
	}
	for i, vm := range docs.VMs {
		vms[i] = sim.WhatIfVM(vm)
	}
	return sim.Describe(nodes, vms, f.maxVoters)
}

// liveState copies the state of the cluster that the global flags name, and
// learns who leads it.
func (f *planFlags) liveState(cmd *cobra.Command) (*state.State, error) {
	limit, err := cmd.Flags().GetDuration("timeout")
	if err != nil {
		return nil, err
	}
	ctx := cmd.Context()
	if limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	c, err := cli.Dial(cmd, cli.Env{Getenv: os.Getenv, Version: release()})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if f.leader == "" {
		status, err := c.GetStatus(ctx, &blixardv1.GetStatusRequest{})
		if err != nil {
			return nil, err
		}
		f.leader = status.Leader
	}
	r, w := io.Pipe()
	go func() { w.CloseWithError(c.DownloadSnapshot(ctx, w)) }()
	s, err := state.Read(r)
	if err != nil {
		err = errors.Join(err, r.CloseWithError(err))
		return nil, fmt.Errorf("copying the state: %w", err)
	}
	return s, r.Close()
}

func plural(n int, word string) string {
	if n == 1 {
		return "1 " + word
	}
	return fmt.Sprintf("%d %ss", n, word)
}

func seconds(ms int64) string { return fmt.Sprintf("%.1f s", float64(ms)/1000) }

func writePlan(w io.Writer, r sim.WhatIfReport) error {
	what := "At rest"
	if len(r.Lost)+len(r.Drained) > 0 {
		var parts []string
		if len(r.Drained) > 0 {
			parts = append(parts, "draining "+names(r.Drained))
		}
		if len(r.Lost) > 0 {
			parts = append(parts, "losing "+names(r.Lost))
		}
		what = strings.Join(parts, ", ")
		what = strings.ToUpper(what[:1]) + what[1:]
	}
	fmt.Fprintf(w, "%s\n\n", what)
	for _, step := range r.Steps {
		fmt.Fprintf(w, "%8.1f s  %s\n", float64(step.AtMS)/1000, step.Text)
	}
	if len(r.Steps) > 0 {
		fmt.Fprintln(w)
	}
	for _, part := range []func(io.Writer, sim.WhatIfReport) error{writePlanMoves, writePlanDown, writePlanNodes} {
		if err := part(w, r); err != nil {
			return err
		}
	}
	return writePlanEnd(w, r)
}

func names(list []blixard.NodeName) string {
	const most = 8
	var out []string
	for i, n := range list {
		if i == most {
			out = append(out, fmt.Sprintf("%d more", len(list)-most))
			break
		}
		out = append(out, string(n))
	}
	return strings.Join(out, ", ")
}

func writePlanMoves(w io.Writer, r sim.WhatIfReport) error {
	if len(r.Moves) == 0 {
		return nil
	}
	rows := [][]string{{"INSTANCE", "FROM", "TO", "PLACED", "RUNS", "DOWN FOR", "WHY"}}
	for i, m := range r.Moves {
		if i == maxPlanMoves {
			rows = append(rows, []string{fmt.Sprintf("and %d more", len(r.Moves)-i)})
			break
		}
		from, runs, down := string(m.From), seconds(m.RunningMS), seconds(m.DownMS)
		if from == "" {
			from = "-"
		}
		if m.RunningMS < m.PlacedMS {
			runs, down = "-", "-"
		}
		rows = append(rows, []string{string(m.Instance), from, string(m.To), seconds(m.PlacedMS), runs, down, m.Why})
	}
	if err := columns(w, rows); err != nil {
		return err
	}
	_, err := fmt.Fprintln(w)
	return err
}

// Bounds of what a person is shown; -o json has it all.
const (
	maxPlanRows  = 20
	maxPlanMoves = 60
	maxPlanNodes = 60
)

func writePlanDown(w io.Writer, r sim.WhatIfReport) error {
	for _, part := range []struct {
		head []string
		list []sim.WhatIfDown
	}{{[]string{"DOES NOT RUN", "WAS ON", "WHY"}, r.Down}, {[]string{"STAYS", "ON", "WHY"}, r.Stays}} {
		if err := writePlanList(w, part.head, part.list); err != nil {
			return err
		}
	}
	for _, refused := range r.Refused {
		fmt.Fprintf(w, "why %s has no place for %d:\n", refused.VM, refused.Missing)
		var rows [][]string
		for i, n := range refused.Nodes {
			if i == maxPlanRows {
				break
			}
			rows = append(rows, []string{"  " + string(n.Node), strings.Join(n.Why, "; ")})
		}
		if more := len(refused.Nodes) + refused.More - maxPlanRows; more > 0 {
			rows = append(rows, []string{fmt.Sprintf("  and %d more nodes", more)})
		}
		if err := columns(w, rows); err != nil {
			return err
		}
		fmt.Fprintln(w)
	}
	return nil
}

func writePlanList(w io.Writer, head []string, list []sim.WhatIfDown) error {
	if len(list) == 0 {
		return nil
	}
	rows := [][]string{head}
	for i, d := range list {
		if i == maxPlanRows {
			rows = append(rows, []string{fmt.Sprintf("and %d more", len(list)-i)})
			break
		}
		was := string(d.Was)
		if was == "" {
			was = "-"
		}
		rows = append(rows, []string{string(d.Instance), was, d.Why})
	}
	if err := columns(w, rows); err != nil {
		return err
	}
	_, err := fmt.Fprintln(w)
	return err
}

func writePlanNodes(w io.Writer, r sim.WhatIfReport) error {
	rows := [][]string{{"NODE", "ZONE", "STATE", "INSTANCES", "MEMORY", "VCPUS", "FREE MEMORY"}}
	changed := func(before, after string) string {
		if before == after {
			return before
		}
		return before + " → " + after
	}
	shownNodes := r.Nodes
	if len(shownNodes) > maxPlanNodes { // those where something changes, first
		shownNodes = slices.Clone(shownNodes)
		slices.SortStableFunc(shownNodes, func(a, b sim.WhatIfNodeUse) int {
			ca, cb := a.Before == a.After, b.Before == b.After
			switch {
			case ca == cb:
				return 0
			case cb:
				return -1
			}
			return 1
		})
	}
	for i, n := range shownNodes {
		if i == maxPlanNodes {
			rows = append(rows, []string{fmt.Sprintf("and %d more", len(shownNodes)-i)})
			break
		}
		free := blixard.FormatMiB(n.Allocatable.MemoryMiB - n.After.Used.MemoryMiB)
		if n.State == string(blixard.NodeLost) {
			free = "-"
		}
		zone := n.Zone
		if zone == "" {
			zone = "-"
		}
		rows = append(rows, []string{
			string(n.Name), zone, n.State, changed(strconv.Itoa(n.Before.Instances), strconv.Itoa(n.After.Instances)),
			changed(blixard.FormatMiB(n.Before.Used.MemoryMiB), blixard.FormatMiB(n.After.Used.MemoryMiB)) + " of " + blixard.FormatMiB(n.Allocatable.MemoryMiB),
			changed(strconv.FormatInt(n.Before.Used.MilliCPU/1000, 10), strconv.FormatInt(n.After.Used.MilliCPU/1000, 10)) + " of " + strconv.FormatInt(n.Allocatable.MilliCPU/1000, 10), free,
		})
	}
	if err := columns(w, rows); err != nil {
		return err
	}
	_, err := fmt.Fprintln(w)
	return err
}

func writePlanEnd(w io.Writer, r sim.WhatIfReport) error {
	rows := [][]string{
		{"running", fmt.Sprintf("%d of %d wanted before, %d of %d after", r.Before.Instances, r.Before.Wanted, r.After.Instances, r.After.Wanted)},
		{"room left", fmt.Sprintf("%s of memory and %d vCPUs on %s; at most %s on one node", blixard.FormatMiB(r.After.Free.MemoryMiB), r.After.Free.MilliCPU/1000, plural(r.After.Nodes, "node"), blixard.FormatMiB(r.After.LargestMiB))},
		{"majority", fmt.Sprintf("%d of %d voters are left, %d are needed", r.Quorum.Left, len(r.Quorum.Voters), r.Quorum.Needed)},
	}
	if len(r.Lost) > 0 && r.Quorum.OK {
		rows = append(rows, []string{"declared lost", "after " + seconds(r.DeclareMS)})
	}
	if len(r.Moves) > 0 {
		rows = append(rows, []string{"all moved", "after " + seconds(r.SettledMS)})
	}
	if err := columns(w, rows); err != nil {
		return err
	}
	for _, note := range r.Notes {
		fmt.Fprintf(w, "note: %s\n", note)
	}
	return nil
}
