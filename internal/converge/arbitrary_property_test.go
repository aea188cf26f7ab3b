package converge

import (
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/blixard/blixard"
)

// drawInput makes an input of parts that need not go together at all: a daemon
// may find anything after a crash, an old view or another's leftovers.
func drawInput(t *rapid.T) Input {
	in := Input{
		NowMS: 10_000, ViewIndex: uint64(rapid.IntRange(1, 3).Draw(t, "view")), Pauses: rapid.Bool().Draw(t, "pauses"), Limits: testLimits,
		Lease: Lease{UntilMS: rapid.SampledFrom([]int64{0, 9_999, 10_000, 10_001, 20_000}).Draw(t, "lease"), Index: uint64(rapid.IntRange(1, 3).Draw(t, "index"))},
	}
	for k := range rapid.IntRange(1, 8).Draw(t, "incarnations") {
		ref := Ref{blixard.InstanceID([]string{"a-1", "b-1", "c-1", "d-1"}[k/2]), uint64(1 + k%2)}
		if rapid.Bool().Draw(t, "row") {
			in.Rows = append(in.Rows, &blixard.Instance{
				ID: ref.Instance, Generation: ref.Generation, Spec: rapid.SampledFrom(modelSpecs).Draw(t, "spec"),
				Wanted: rapid.SampledFrom([]blixard.Wanted{blixard.WantRun, blixard.WantRun, blixard.WantStop, blixard.WantRemove}).Draw(t, "wanted"), Paused: rapid.Bool().Draw(t, "paused"),
				State: rapid.SampledFrom([]blixard.InstanceState{
					blixard.Pending, blixard.Preparing, blixard.Starting, blixard.Running, blixard.Running, blixard.Stopping, blixard.Stopped, blixard.Failed, blixard.Lost,
				}).Draw(t, "state"),
			})
		}
		if rapid.Bool().Draw(t, "found") {
			in.Found = append(in.Found, Found{Ref: ref, Phase: rapid.SampledFrom([]Phase{Prepared, Running, Running, Paused, Exited}).Draw(t, "phase"), StopsOnPartition: rapid.Bool().Draw(t, "stops")})
		}
		if rapid.Bool().Draw(t, "local") {
			in.Locals = append(in.Locals, Local{
				Ref: ref, Busy: rapid.SampledFrom([]Kind{None, None, Prepare, Start, Stop, Kill, Pause, Remove}).Draw(t, "busy"), NotBeforeMS: rapid.SampledFrom([]int64{0, 10_001}).Draw(t, "rests"),
				FailedStops: rapid.IntRange(0, 1).Draw(t, "failed stops"), Prepared: rapid.Bool().Draw(t, "prepared"), Failure: rapid.SampledFrom([]string{"", "", "bad"}).Draw(t, "failure"),
				Attached: rapid.Bool().Draw(t, "attached"), Ready: rapid.Bool().Draw(t, "ready"), BootDeadlineMS: rapid.SampledFrom([]int64{0, 9_000, 11_000}).Draw(t, "boot"),
				Exit: rapid.SampledFrom([]*Exit{nil, nil, {Code: 1}}).Draw(t, "exit"),
			})
		}
	}
	return in
}

// TestPlanOfAnything: of whatever is found a plan can be made, and it keeps to
// its bounds: it acts only on what is known, one effect for one incarnation and
// no more than the limits at once, fences first; it starts only what no trace
// speaks against, on a fresh view; and what is wanted, runs and is well under
// its lease is left alone.
func TestPlanOfAnything(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := drawInput(t)
		actions, wake := Plan(in)
		if wake <= in.NowMS {
			t.Fatalf("a plan at %d is to be made again at %d", in.NowMS, wake)
		}
		var done []Ref
		effects, starts := 0, 0 // at once
		acted, started := 0, 0  // of them newly
		for _, l := range in.Locals {
			if l.Busy != None && l.Busy != Kill {
				effects++
			}
			if l.Busy == Prepare || l.Busy == Start {
				starts++
			}
		}
		for k, a := range actions {
			row, found, local := partsOf(&in, a.Ref)
			if row == nil && found == nil && local == nil {
				t.Fatalf("%s, which nobody knows", a)
			}
			if k > 0 && a.Kind == Kill && a.Why == fenceWhy && actions[k-1].Why != fenceWhy {
				t.Fatalf("%s comes after %s", a, actions[k-1])
			}
			switch a.Kind {
			case Report:
				if row == nil {
					t.Fatalf("%s, which has no row", a)
				}
				continue
			case Configure:
				continue
			case Start, Prepare:
				starts++
				started++
				if !in.Fresh() || row == nil || row.Wanted != blixard.WantRun || row.State.Terminal() || row.State == blixard.Running || found != nil && found.Phase != Prepared {
					t.Fatalf("%s with row %+v and found %+v, fresh: %t", a, row, found, in.Fresh())
				}
			case Remove:
				if found.alive() {
					t.Fatalf("%s, which runs", a)
				}
			}
			if a.Kind != Kill {
				effects++
				acted++
			}
			if slices.Contains(done, a.Ref) || local != nil && local.Busy != None && a.Kind != Kill {
				t.Fatalf("%s beside another effect", a)
			}
			done = append(done, a.Ref)
			if well(&in, row, found, local) && (a.Kind == Kill || a.Kind == Stop || a.Kind == Remove) {
				t.Fatalf("%s, which is wanted and well", a)
			}
		}
		if started > 0 && starts > in.Limits.Starts || acted > 0 && effects > in.Limits.Effects {
			t.Fatalf("%d starts and %d effects at once: %v", starts, effects, actions)
		}
	})
}

func partsOf(in *Input, ref Ref) (row *blixard.Instance, found *Found, local *Local) {
	for _, r := range in.Rows {
		if rowRef(r) == ref {
			row = r
		}
	}
	for k := range in.Found {
		if in.Found[k].Ref == ref {
			found = &in.Found[k]
		}
	}
	for k := range in.Locals {
		if in.Locals[k].Ref == ref {
			local = &in.Locals[k]
		}
	}
	return row, found, local
}

// well tells whether an incarnation is wanted, runs and gives no cause to end
// it.
func well(in *Input, row *blixard.Instance, found *Found, local *Local) bool {
	if row == nil || row.Wanted != blixard.WantRun || row.State.Terminal() || !found.alive() || in.NowMS >= in.fenceMS() {
		return false
	}
	return local == nil || local.Failure == "" && local.Exit == nil && (local.Ready || local.BootDeadlineMS == 0 || local.BootDeadlineMS > in.NowMS)
}
