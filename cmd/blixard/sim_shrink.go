package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/sim"
)

func simShrinkCommand() *cobra.Command {
	f := new(simFlags)
	var budget int
	var path string
	cmd := &cobra.Command{
		Use: "shrink", Short: "Find a shorter schedule that fails as a seed does",
		Long: `Take faults away from the run of a seed that fails, as long as the same invariant
is still broken, and write what is left as a schedule that "blixard sim replay"
plays.`,
		Example: "  blixard sim shrink --seed 7 --out seed7.json\n  blixard sim replay seed7.json --trace",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o, err := f.options(sim.Profiles())
			if err != nil {
				return err
			}
			if budget < 1 {
				return blixard.Invalid("--budget", "", "--budget is %d; it must be at least 1", budget)
			}
			return shrink(cmd, o, budget, path)
		},
	}
	cmd.Flags().Uint64Var(&f.seed, "seed", 1, "a seed that fails")
	cmd.Flags().IntVar(&budget, "budget", 500, "how many runs to try at most")
	cmd.Flags().StringVar(&path, "out", "", "`file` for the schedule (default: standard output)")
	f.bind(cmd, sim.Profiles())
	return cmd
}

func shrink(cmd *cobra.Command, o sim.Options, budget int, path string) error {
	type found struct {
		schedule sim.Schedule
		result   sim.Result
	}
	got, err := inBackground(cmd.Context(), func() found {
		s, r := sim.Shrink(o, budget)
		return found{s, r}
	})
	if err != nil {
		return err
	}
	if v := got.result.Violation; v != nil && v.Invariant == invalidOptions {
		return blixard.Invalid("options", "", "this cannot be played: %s", v.Detail)
	}
	if got.result.OK {
		return blixard.Invalid("--seed", "", "seed %d breaks nothing with this program and these options: there is nothing to shrink", o.Seed)
	}
	data, err := json.MarshalIndent(got.schedule, "", "  ")
	if err != nil {
		return fmt.Errorf("writing the schedule: %w", err)
	}
	data = append(data, '\n')
	words := cmd.ErrOrStderr()
	fmt.Fprintf(words, "%d faults are left that break %s: %s\n", len(got.schedule.Faults), got.result.Violation.Invariant, got.result.Violation.Detail)
	if path == "" {
		_, err = cmd.OutOrStdout().Write(data)
		return err
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		return blixard.Invalid("--out", "", "cannot write %s: %v", path, err)
	}
	fmt.Fprintf(words, "blixard sim replay %s --trace\n", path)
	return nil
}
