package main

import (
	"fmt"
	"io"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/sim"
)

func simRunCommand() *cobra.Command {
	f := new(simFlags)
	var trace bool
	var sizes []string
	profiles := append(sim.Profiles(), profileScale)
	cmd := &cobra.Command{
		Use: "run", Short: "Play a whole cluster under faults, from a seed",
		Long: `Play a cluster of machines, disks, a network, hypervisors and clients in one
process on virtual time, with faults drawn from the seed, and hold it against
what must always be true. The same seed and program give the same events and the
same trace hash, on every machine. Exit code 1 means that something was broken.

The profile scale has no faults: it places up to 2,000,000 instances on 10,000
nodes with the scheduler and the state alone, 100,000 on 1,000 with the leader's
reconcilers too, and measures what that costs.`,
		Example: "  blixard sim run --seed 7\n  blixard sim run --seed 7 --nodes 5 --hours 24 --profile partition -o json\n  blixard sim run --profile scale --size 100x20000",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.profile == profileScale {
				return runScale(cmd, f, sizes)
			}
			if len(sizes) > 0 {
				return blixard.Invalid("--size", "", "--size belongs to --profile scale")
			}
			o, err := f.options(profiles)
			if err != nil {
				return err
			}
			return runSeed(cmd, o, trace, "blixard sim shrink --seed "+strconv.FormatUint(f.seed, 10)+f.words())
		},
	}
	cmd.Flags().Uint64Var(&f.seed, "seed", 1, "what the run is drawn from")
	cmd.Flags().BoolVar(&trace, "trace", false, "one line per event, on standard error with -o json or yaml")
	cmd.Flags().StringSliceVar(&sizes, "size", nil, "with --profile scale: `NODESxINSTANCES` in place of all sizes")
	f.bind(cmd, profiles)
	return cmd
}

// runSeed plays one run and shows what came of it.
func runSeed(cmd *cobra.Command, o sim.Options, trace bool, shrink string) error {
	if trace {
		o.Trace = cmd.OutOrStdout()
		if format := outputOf(cmd); format == "json" || format == "yaml" {
			o.Trace = cmd.ErrOrStderr()
		}
	}
	began := time.Now()
	r, err := inBackground(cmd.Context(), func() sim.Result { return sim.Run(o) })
	if err != nil {
		return err
	}
	if r.Violation != nil && r.Violation.Invariant == invalidOptions {
		return blixard.Invalid("options", "", "this cannot be played: %s", r.Violation.Detail)
	}
	s := shown(r, time.Since(began))
	if done, err := structured(cmd, s); err != nil || done && r.OK {
		return err
	} else if !done {
		if err := writeResult(cmd.OutOrStdout(), s, shrink); err != nil {
			return err
		}
	}
	if !r.OK {
		return broken("the simulation", r.Violation)
	}
	return nil
}

func writeResult(w io.Writer, s shownResult, shrink string) error {
	word := "ok"
	if !s.OK {
		word = "BROKEN"
	}
	speed := 0.0
	if s.ElapsedSeconds > 0 {
		speed = s.VirtualSeconds / s.ElapsedSeconds
	}
	err := columns(w, [][]string{
		{"result", word},
		{"seed", strconv.FormatUint(s.Seed, 10)},
		{"profile", s.Profile},
		{"options", s.Options},
		{"trace hash", s.TraceHash},
		{"events", strconv.FormatUint(s.Events, 10)},
		{"virtual time", fmt.Sprintf("%.1f s in %.2f s (%.0f × real time)", s.VirtualSeconds, s.ElapsedSeconds, speed)},
	})
	if err != nil || s.OK {
		return err
	}
	if err := writeTrace(w, s.Violation); err != nil {
		return err
	}
	if shrink != "" {
		_, err = fmt.Fprintf(w, "\nto find what matters of it:  %s\n", shrink)
	}
	return err
}

// meter measures this process.
func meter() sim.Meter {
	began := time.Now()
	return sim.Meter{
		NowNS: func() int64 { return time.Since(began).Nanoseconds() },
		Memory: func() (live, made int64) {
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return int64(m.HeapAlloc), int64(m.Mallocs)
		},
	}
}

// shownScale is a report of the profile scale as `-o json` shows it: with the
// names every run has.
type shownScale struct {
	sim.ScaleReport
	Events         uint64  `json:"events"`
	VirtualSeconds float64 `json:"virtual_seconds"`
	Profile        string  `json:"profile"`
	ElapsedSeconds float64 `json:"elapsed_seconds"`
	// Violation is null, not left out, as in every run.
	Violation *sim.Violation `json:"violation"`
}

func runScale(cmd *cobra.Command, f *simFlags, words []string) error {
	if f.nodes != 0 || f.vms != 0 || f.hours != 0 {
		return blixard.Invalid("--profile", "choose with --size NODESxINSTANCES", "--nodes, --vms and --hours do not belong to --profile scale")
	}
	sizes, err := scaleSizes(words)
	if err != nil {
		return err
	}
	table := slices.Contains([]string{"table", "wide"}, outputOf(cmd))
	out := cmd.OutOrStdout()
	if table {
		fmt.Fprintln(cmd.ErrOrStderr(), "placing; the largest size takes a minute or two")
	}
	began := time.Now()
	r, err := inBackground(cmd.Context(), func() sim.ScaleReport {
		return sim.Scale(f.seed, sizes, meter(), func(c sim.ScaleCost) {
			if table {
				fmt.Fprintf(cmd.ErrOrStderr(), "  %d nodes, %d instances: %.1f s\n", c.Nodes, c.Instances, float64(c.ElapsedMS)/1000)
			}
		})
	})
	if err != nil {
		return err
	}
	s := shownScale{ScaleReport: r, Profile: profileScale, ElapsedSeconds: float64(time.Since(began).Milliseconds()) / 1000, Violation: r.Violation}
	for _, c := range r.Sizes {
		s.Events += c.Entries
		s.VirtualSeconds += float64(c.VirtualMS) / 1000
	}
	done, err := structured(cmd, s)
	if err == nil && !done {
		err = writeScale(out, r)
	}
	if err == nil && !r.OK {
		err = broken("the profile scale", r.Violation)
	}
	return err
}

func scaleSizes(words []string) ([]sim.ScaleSize, error) {
	if len(words) == 0 {
		return sim.ScaleSizes(), nil
	}
	var out []sim.ScaleSize
	for _, word := range words {
		a, b, ok := strings.Cut(word, "x")
		nodes, err1 := strconv.Atoi(a)
		instances, err2 := strconv.Atoi(b)
		if !ok || err1 != nil || err2 != nil || nodes < 4 || nodes > 100_000 || instances < nodes || instances > 10_000_000 {
			return nil, blixard.Invalid("--size", "write --size 100x20000", "--size %q is not NODESxINSTANCES with 4 nodes or more and an instance for each", word)
		}
		out = append(out, sim.ScaleSize{Nodes: nodes, Instances: instances, Control: instances <= 100_000})
	}
	return out, nil
}

func writeScale(w io.Writer, r sim.ScaleReport) error {
	rows := [][]string{{"NODES", "INSTANCES", "WITH LEADER", "DECISIONS/S", "APPLIED/S", "BYTES EACH", "ALLOCS EACH", "INDEX", "SNAPSHOT", "NODE LOST", "TOTAL", "STATE"}}
	for _, c := range r.Sizes {
		leader, lost := "no", "-"
		if c.Control {
			leader, lost = "yes", fmt.Sprintf("%d ms", c.LossMS)
		}
		rows = append(rows, []string{
			strconv.Itoa(c.Nodes), strconv.Itoa(c.Instances), leader, strconv.FormatInt(c.DecisionsPS, 10), strconv.FormatInt(c.AppliedPS, 10), strconv.FormatInt(c.PerInstance, 10),
			strconv.FormatInt(c.PerPlacing, 10), fmt.Sprintf("%d ms", c.IndexMS), fmt.Sprintf("%d MiB, %d ms", c.SnapshotMiB, c.SnapshotMS), lost,
			fmt.Sprintf("%.1f s", float64(c.ElapsedMS)/1000), c.StateHash,
		})
	}
	if err := columns(w, rows); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\nhash of all: %s (seed %d)\n", r.TraceHash, r.Seed)
	return err
}
