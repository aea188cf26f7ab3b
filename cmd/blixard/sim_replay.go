package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/record"
	"github.com/blixard/blixard/internal/sim"
	"github.com/blixard/blixard/internal/state"
)

// maxScheduleBytes bounds a schedule that is read.
const maxScheduleBytes = 64 << 20

func simReplayCommand() *cobra.Command {
	var at uint64
	var quiet, trace bool
	cmd := &cobra.Command{
		Use: "replay FILE", Short: "Play back a recorded incident, or a schedule of sim shrink",
		Long: `FILE is a recording made by "blixard cluster record" or a schedule made by
"blixard sim shrink"; "-" is standard input.

A recording is played through the state as this program knows it, one line per
command, and held against what the cluster recorded: the hashes of its state,
rows that only move forward, capacity and anti-affinity at each placement. The
leader's placements are decided again, to see whether they come out alike. With
--at the state at one index is shown. Exit code 1 means that something differs
or was broken.`,
		Example: "  blixard sim replay incident.blxrec\n  blixard sim replay incident.blxrec --at 1234 --quiet\n  blixard sim replay seed7.json --trace",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return blixard.Invalid("arguments", "usage: blixard sim replay FILE", "blixard sim replay needs FILE")
			}
			in, done, err := openInput(cmd, args[0])
			if err != nil {
				return err
			}
			defer done()
			head, err := in.Peek(len(record.Magic))
			if err != nil && !errors.Is(err, io.EOF) {
				return blixard.Invalid("FILE", "", "cannot read %s: %v", args[0], err)
			}
			if record.Is(head) {
				return replayRecording(cmd, args[0], in, at, !quiet)
			}
			if at != 0 {
				return blixard.Invalid("--at", "", "--at belongs to a recording; %s is none", args[0])
			}
			return replaySchedule(cmd, args[0], in, trace)
		},
	}
	cmd.Flags().Uint64Var(&at, "at", 0, "stop after this `index` and show the state")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "no line per command of a recording")
	cmd.Flags().BoolVar(&trace, "trace", false, "one line per event of a schedule")
	return cmd
}

func openInput(cmd *cobra.Command, path string) (*bufio.Reader, func(), error) {
	if path == "-" {
		return bufio.NewReader(cmd.InOrStdin()), func() {}, nil
	}
	f, err := os.Open(path)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, nil, blixard.Invalid("FILE", "", "there is no file %s", path)
		}
		return nil, nil, blixard.Invalid("FILE", "", "cannot read %s: %v", path, err)
	}
	return bufio.NewReader(f), func() { _ = f.Close() }, nil // only read
}

// replaySchedule plays what sim shrink has found.
func replaySchedule(cmd *cobra.Command, path string, in io.Reader, trace bool) error {
	s, err := sim.ReadSchedule(io.LimitReader(in, maxScheduleBytes))
	if err != nil {
		return blixard.Invalid("FILE", "recordings come from `blixard cluster record`, schedules from `blixard sim shrink`", "%s is neither a recording nor a schedule that can be played: %v", path, err)
	}
	return runSeed(cmd, sim.Options{Seed: s.Seed, Profile: s.Profile, Schedule: s}, trace, "")
}

// shownReplay is what `-o json` shows of a recording.
type shownReplay struct {
	sim.ReplayReport
	State *shownState `json:"state,omitempty"`
}

// shownState is a state at one index.
type shownState struct {
	Index     uint64          `json:"index"`
	Nodes     []shownNode     `json:"nodes"`
	VMs       []shownVM       `json:"vms"`
	Instances []shownInstance `json:"instances"`
}

type shownNode struct {
	Name         blixard.NodeName     `json:"name"`
	State        blixard.NodeState    `json:"state"`
	Availability blixard.Availability `json:"availability"`
	Role         blixard.RaftRole     `json:"role"`
	Instances    int                  `json:"instances"`
	UsedMiB      int64                `json:"used_memory_mib"`
	OffersMiB    int64                `json:"offered_memory_mib"`
}

type shownVM struct {
	Name     blixard.VMName  `json:"name"`
	Desired  blixard.Desired `json:"desired"`
	Replicas int             `json:"replicas"`
	Refusal  string          `json:"refusal,omitempty"`
}

type shownInstance struct {
	ID         blixard.InstanceID    `json:"id"`
	Generation uint64                `json:"generation"`
	Node       blixard.NodeName      `json:"node"`
	State      blixard.InstanceState `json:"state"`
	Wanted     blixard.Wanted        `json:"wanted"`
	Message    string                `json:"message,omitempty"`
}

func stateOf(v *state.View) *shownState {
	s := &shownState{Index: v.Index, Nodes: []shownNode{}, VMs: []shownVM{}, Instances: []shownInstance{}}
	v.Nodes(func(n *blixard.Node) bool {
		u := v.Usage(n.Name)
		s.Nodes = append(s.Nodes, shownNode{n.Name, n.State, n.Availability, n.Raft, u.Instances, u.Used.MemoryMiB, n.Allocatable().MemoryMiB})
		return true
	})
	v.VMs(func(vm *blixard.VM) bool {
		row := shownVM{Name: vm.Name, Desired: vm.Desired, Replicas: vm.Spec.Replicas}
		if vm.Refusal != nil {
			row.Refusal = vm.Refusal.Summary
		}
		s.VMs = append(s.VMs, row)
		return true
	})
	v.Instances(func(i *blixard.Instance) bool {
		s.Instances = append(s.Instances, shownInstance{i.ID, i.Generation, i.Node, i.State, i.Wanted, i.Message})
		return true
	})
	return s
}

func replayRecording(cmd *cobra.Command, path string, in io.Reader, at uint64, trace bool) error {
	o := sim.ReplayOptions{At: at}
	out := bufio.NewWriter(cmd.OutOrStdout())
	if format := outputOf(cmd); trace && format != "json" && format != "yaml" && format != "name" {
		o.Trace = out
	}
	type replayed struct {
		report sim.ReplayReport
		view   *state.View
		err    error
	}
	got, err := inBackground(cmd.Context(), func() replayed {
		r, v, err := sim.Replay(in, o)
		return replayed{r, v, err}
	})
	if err != nil {
		return err
	}
	if err := out.Flush(); err != nil {
		return fmt.Errorf("writing: %w", err)
	}
	r := shownReplay{ReplayReport: got.report}
	if got.err != nil {
		return blixard.Invalid("FILE", "", "%s cannot be replayed: %v", path, got.err)
	}
	if at > 0 {
		r.State = stateOf(got.view)
	}
	done, err := structured(cmd, r)
	if err == nil && !done {
		err = writeReplay(cmd.OutOrStdout(), r)
	}
	switch {
	case err != nil:
		return err
	case !r.OK:
		return broken("the recorded cluster", r.Violation)
	case at > 0 && r.To < at:
		return blixard.Invalid("--at", "", "the recording ends at index %d, before %d", r.To, at)
	}
	return nil
}

func writeReplay(w io.Writer, r shownReplay) error {
	fmt.Fprintln(w)
	if r.State != nil {
		if err := writeState(w, r.State); err != nil {
			return err
		}
	}
	span := "no commands"
	if r.Commands > 0 {
		span = fmt.Sprintf("%s to %s UTC", time.UnixMilli(r.FirstMS).UTC().Format(time.DateTime), time.UnixMilli(r.LastMS).UTC().Format(time.DateTime))
	}
	checked := fmt.Sprintf("%d recorded hashes agree, the last at %d", r.Hashes, r.CheckedTo)
	if r.Hashes == 0 {
		checked = "no recorded hash was reached"
	}
	word, end := "sound", ""
	if !r.OK {
		word = "BROKEN"
	}
	if !r.Complete && r.State == nil && r.OK {
		end = " (the recording was followed until it was stopped)"
	}
	placements := "none"
	if r.Placements > 0 {
		placements = fmt.Sprintf("%d, of which %d are decided alike now", r.Placements, r.Same)
	}
	err := columns(w, [][]string{
		{"result", word},
		{"log of", string(r.Node) + ", release " + r.Release},
		{"index", fmt.Sprintf("%d to %d%s", r.From, r.To, end)},
		{"time", span},
		{"entries", fmt.Sprintf("%d with %d commands, %d refused", r.Entries, r.Commands, r.Refused)},
		{"placements", placements},
		{"hashes", checked},
		{"state hash", r.StateHash},
	})
	if err != nil {
		return err
	}
	return writeTrace(w, r.Violation)
}

func writeState(w io.Writer, s *shownState) error {
	fmt.Fprintf(w, "the state at index %d\n\n", s.Index)
	nodes := [][]string{{"NODE", "STATE", "AVAILABILITY", "ROLE", "INSTANCES", "MEMORY"}}
	for _, n := range s.Nodes {
		nodes = append(nodes, []string{string(n.Name), string(n.State), string(n.Availability), string(n.Role), strconv.Itoa(n.Instances), blixard.FormatMiB(n.UsedMiB) + " of " + blixard.FormatMiB(n.OffersMiB)})
	}
	vms := [][]string{{"\nVM", "DESIRED", "REPLICAS", "REFUSAL"}}
	for _, v := range s.VMs {
		vms = append(vms, []string{string(v.Name), string(v.Desired), strconv.Itoa(v.Replicas), v.Refusal})
	}
	instances := [][]string{{"\nINSTANCE", "NODE", "STATE", "WANTED", "MESSAGE"}}
	for _, i := range s.Instances {
		instances = append(instances, []string{fmt.Sprintf("%s#%d", i.ID, i.Generation), string(i.Node), string(i.State), string(i.Wanted), i.Message})
	}
	for _, table := range [][][]string{nodes, vms, instances} {
		if len(table) == 1 {
			continue
		}
		if err := columns(w, table); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintln(w)
	return err
}
