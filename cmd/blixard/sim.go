package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/sim"
)

const (
	profileScale = "scale"
	msPerHour    = 3_600_000
	// invalidOptions is the "invariant" of a run that was not even begun.
	invalidOptions = "options"
)

// simCommand is `blixard sim`.
func simCommand() *cobra.Command {
	group := &cobra.Command{
		Use: "sim", Short: "Simulate clusters: faults, incidents, what if, and scale",
		Long: `Run the decisions of Blixard - consensus, state, scheduler, reconcilers, agents -
on virtual time. Nothing here touches a real cluster.

  sim plan     what becomes of a cluster when nodes are lost or drained
  sim replay   play back a recording of a real cluster, or a failing schedule
  sim run      a whole cluster under faults, from a seed
  sim soak     many seeds, on all cores
  sim shrink   a shorter schedule that fails alike`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			var known []string
			for _, c := range cmd.Commands() {
				known = append(known, c.Name())
			}
			hint := "`blixard sim --help` lists the commands"
			if near := blixard.Nearest(args[0], known); near != "" {
				hint = "did you mean `blixard sim " + near + "`? " + hint
			}
			return blixard.Invalid("command", hint, "blixard sim has no command %q", args[0])
		},
	}
	group.AddCommand(simRunCommand(), simSoakCommand(), simWorkerCommand(), simShrinkCommand(), simReplayCommand(), simPlanCommand())
	return group
}

// simFlags are what a run is made of.
type simFlags struct {
	seed    uint64
	nodes   int
	vms     int
	hours   float64
	profile string
}

func (f *simFlags) bind(cmd *cobra.Command, profiles []string) {
	fl := cmd.Flags()
	fl.IntVar(&f.nodes, "nodes", 0, "machines of the cluster; 0: the seed decides")
	fl.IntVar(&f.vms, "vms", 0, "VMs that clients work on; 0: the seed decides")
	fl.Float64Var(&f.hours, "hours", 0, "virtual time, in hours; 0: the seed decides")
	fl.StringVar(&f.profile, "profile", sim.ProfileSwarm, "which faults there are: "+strings.Join(profiles, ", "))
	complete := func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return profiles, cobra.ShellCompDirectiveNoFileComp
	}
	if err := cmd.RegisterFlagCompletionFunc("profile", complete); err != nil {
		panic(err) // the flag was just made
	}
}

// options checks the flags.
func (f *simFlags) options(profiles []string) (sim.Options, error) {
	o := sim.Options{Seed: f.seed, Nodes: f.nodes, VMs: f.vms, DurationMS: int64(f.hours * msPerHour), Profile: f.profile}
	switch {
	case f.nodes < 0 || f.nodes > 9:
		return o, blixard.Invalid("--nodes", "", "--nodes is %d; it must be between 1 and 9, or 0 to let the seed decide", f.nodes)
	case f.vms < 0 || f.vms > 2000:
		return o, blixard.Invalid("--vms", "", "--vms is %d; it must be between 1 and 2000, or 0 to let the seed decide", f.vms)
	case f.hours < 0 || f.hours > 9600:
		return o, blixard.Invalid("--hours", "", "--hours is %g; it must be between 0 and 9600", f.hours)
	}
	return o, knownProfile(f.profile, profiles)
}

func knownProfile(name string, profiles []string) error {
	if slices.Contains(profiles, name) {
		return nil
	}
	hint := "known: " + strings.Join(profiles, ", ")
	if near := blixard.Nearest(name, profiles); near != "" {
		hint = "did you mean " + near + "? " + hint
	}
	return blixard.Invalid("--profile", hint, "the profile %q is not known", name)
}

// words are the flags that give the same run again.
func (f *simFlags) words() string {
	s := ""
	if f.nodes > 0 {
		s += fmt.Sprintf(" --nodes %d", f.nodes)
	}
	if f.vms > 0 {
		s += fmt.Sprintf(" --vms %d", f.vms)
	}
	if f.hours > 0 {
		s += fmt.Sprintf(" --hours %g", f.hours)
	}
	if f.profile != sim.ProfileSwarm {
		s += " --profile " + f.profile
	}
	return s
}

// outputOf is the format that --output names.
func outputOf(cmd *cobra.Command) string {
	f := cmd.Flag("output")
	if f == nil {
		return "table"
	}
	return f.Value.String()
}

// structured writes v as JSON or YAML if the user wants that.
func structured(cmd *cobra.Command, v any) (bool, error) {
	format := outputOf(cmd)
	if format != "json" && format != "yaml" {
		return false, nil
	}
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return true, fmt.Errorf("writing JSON: %w", err)
	}
	data = append(data, '\n')
	if format == "yaml" {
		if data, err = yaml.JSONToYAML(data); err != nil {
			return true, fmt.Errorf("writing YAML: %w", err)
		}
	}
	_, err = cmd.OutOrStdout().Write(data)
	return true, err
}

// columns writes lines of cells below each other.
func columns(w io.Writer, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for _, r := range rows {
		if _, err := fmt.Fprintln(t, strings.TrimRight(strings.Join(r, "\t"), "\t")); err != nil {
			return err
		}
	}
	return t.Flush()
}

// inBackground runs f so that Ctrl-C ends the command: a simulation cannot be
// told to stop, but it holds nothing that would have to be let go of.
func inBackground[T any](ctx context.Context, f func() T) (T, error) {
	done := make(chan T, 1)
	go func() { done <- f() }()
	select {
	case v := <-done:
		return v, nil
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}

// shownResult is a result as `-o json` shows it. Others rely on its names.
type shownResult struct {
	OK             bool           `json:"ok"`
	Seed           uint64         `json:"seed"`
	TraceHash      string         `json:"trace_hash"`
	Events         uint64         `json:"events"`
	VirtualSeconds float64        `json:"virtual_seconds"`
	Violation      *sim.Violation `json:"violation"`
	Profile        string         `json:"profile"`
	Options        string         `json:"options"`
	Coverage       map[string]int `json:"coverage,omitempty"`
	ElapsedSeconds float64        `json:"elapsed_seconds"`
}

func shown(r sim.Result, elapsed time.Duration) shownResult {
	return shownResult{
		OK: r.OK, Seed: r.Seed, TraceHash: r.TraceHash, Events: r.Events, VirtualSeconds: float64(r.VirtualMS) / 1000, Violation: r.Violation,
		Profile: r.Profile, Options: r.Options, Coverage: r.Coverage, ElapsedSeconds: float64(elapsed.Milliseconds()) / 1000,
	}
}

// broken is the error of a run that found a violation: exit code 1.
func broken(what string, v *sim.Violation) error {
	if v == nil {
		return fmt.Errorf("%s failed", what)
	}
	return fmt.Errorf("%s broke %s after %.3f s: %s", what, v.Invariant, float64(v.AtMS)/1000, v.Detail)
}

// writeTrace shows the events before a violation.
func writeTrace(w io.Writer, v *sim.Violation) error {
	if v == nil || len(v.Trace) == 0 {
		return nil
	}
	_, err := fmt.Fprintf(w, "\nthe last events before it:\n  %s\n", strings.Join(v.Trace, "\n  "))
	return err
}
