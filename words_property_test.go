package blixard_test

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/blixard/blixard"
)

// drawAmount is a number with up to three decimals as people write it, and its
// thousandths.
func drawAmount(t *rapid.T) (text string, milli int64) {
	whole := int64(rapid.IntRange(0, 4000).Draw(t, "whole"))
	text, milli = fmt.Sprint(whole), whole*1000
	digits := rapid.IntRange(0, 3).Draw(t, "digits")
	if digits == 0 {
		return text, milli
	}
	scale := []int64{0, 100, 10, 1}[digits]
	fraction := int64(rapid.IntRange(0, int(999/scale)).Draw(t, "fraction"))
	return fmt.Sprintf("%s.%0*d", text, digits, fraction), milli + fraction*scale
}

// TestQuantitiesAreExact: a quantity is the number times its unit without any
// loss, however the unit is written, and blanks around it do not matter.
func TestQuantitiesAreExact(t *testing.T) {
	units := map[string]uint{"": 0, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40}
	rapid.Check(t, func(t *rapid.T) {
		text, milli := drawAmount(t)
		unit := rapid.SampledFrom([]string{"", "B", "K", "M", "G", "T"}).Draw(t, "unit")
		suffix := unit
		if unit != "" && unit != "B" {
			suffix += rapid.SampledFrom([]string{"", "B", "i", "iB"}).Draw(t, "form")
			if rapid.Bool().Draw(t, "lower") && suffix != "M" { // "m" alone is thousandths
				suffix = strings.ToLower(suffix)
			}
		}
		blank := rapid.SampledFrom([]string{"", " "}).Draw(t, "blank")
		got, err := blixard.ParseQuantity(blank + text + suffix + blank)
		if want := blixard.Quantity(milli << units[unit]); err != nil || got != want {
			t.Fatalf("%q is read as %d, %v; it is %d", text+suffix, got, err, want)
		}
	})
}

// TestMemoryIsWrittenAndRead: an amount of memory comes back from its own
// writing, and is written in the largest unit that is exact.
func TestMemoryIsWrittenAndRead(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		mib := rapid.Int64Range(0, blixard.MaxDiskMiB).Draw(t, "mib") >> rapid.IntRange(0, 26).Draw(t, "less")
		mib = min(mib<<rapid.SampledFrom([]int{0, 0, 10}).Draw(t, "round"), blixard.MaxDiskMiB)
		text := blixard.FormatMiB(mib)
		if again, err := blixard.ParseMemoryMiB(text); err != nil || again != mib {
			t.Fatalf("%d MiB is written %s and read as %d, %v", mib, text, again, err)
		}
		if mib > 0 && mib%1024 == 0 && strings.HasSuffix(text, "M") {
			t.Fatalf("%d MiB is written %s", mib, text)
		}
		q, err := blixard.ParseQuantity(text)
		if err != nil || int64(q) != mib<<20*1000 {
			t.Fatalf("%s is the quantity %d, %v", text, q, err)
		}
	})
}

func drawConstraint(t *rapid.T) blixard.Constraint {
	c := blixard.Constraint{
		Key: rapid.StringMatching(`[a-zA-Z0-9][a-zA-Z0-9._/-]{0,20}`).Draw(t, "key"),
		Op:  rapid.SampledFrom([]string{"=", "!=", ">", ">=", "<", "<="}).Draw(t, "op"),
	}
	if c.Op == "=" || c.Op == "!=" {
		// A value's first sign must not prolong the operator, nor blanks be lost.
		c.Value = rapid.StringMatching(`([a-zA-Z0-9äß._:][a-zA-Z0-9 =<>!._:-]{0,20}[a-z0-9])?`).Draw(t, "value")
		return c
	}
	text, _ := drawAmount(t)
	c.Value = text + rapid.SampledFrom([]string{"", "M", "GB", "GiB", "T"}).Draw(t, "unit")
	return c
}

// TestConstraintsAreWrittenAndRead: constraints come back from their own
// writing, in order, whatever blanks are between them.
func TestConstraintsAreWrittenAndRead(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := rapid.SliceOfN(rapid.Custom(drawConstraint), 1, 5).Draw(t, "constraints")
		var parts []string
		for _, c := range want {
			parts = append(parts, c.String())
		}
		text := strings.Join(parts, rapid.SampledFrom([]string{",", ", ", " ,\t"}).Draw(t, "between"))
		got, err := blixard.ParseConstraints(text)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("%q is read as %q, %v; it was %q", text, got, err, want)
		}
	})
}

// TestConstraintsAreLogic: of a label that is set exactly one of = and !=
// holds, of an amount exactly one of < and >=, and one of > and <=; what is not
// set holds under != only.
func TestConstraintsAreLogic(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := &blixard.Node{
			Name: "n1", Zone: rapid.SampledFrom([]string{"", "a"}).Draw(t, "zone"), Hypervisors: []string{"qemu"},
			Capacity: blixard.Resources{MilliCPU: int64(rapid.IntRange(0, 9).Draw(t, "cpu")) * 1000, MemoryMiB: int64(rapid.IntRange(0, 9).Draw(t, "memory")) << 10},
			Labels:   []blixard.Label{{Key: "gpu", Value: rapid.SampledFrom([]string{"2", "16G", "none"}).Draw(t, "gpu")}},
		}
		key := rapid.SampledFrom([]string{"zone", "node", "gpu", "cpu", "memory", "hypervisor", "absent"}).Draw(t, "key")
		value := rapid.SampledFrom([]string{"a", "n1", "2", "4G", "16G", "qemu", "none", "0"}).Draw(t, "value")
		holds := func(op string) bool { return blixard.Constraint{Key: key, Op: op, Value: value}.Holds(n) }
		_, set := n.Label(key)
		_, asQuantity := blixard.ParseQuantity(value)
		switch {
		case key == "absent" || key == "zone" && !set:
			for _, op := range []string{"=", "!=", "<", "<=", ">", ">="} {
				if holds(op) != (op == "!=") {
					t.Fatalf("%s%s%s of a label that is not set holds: %t", key, op, value, holds(op))
				}
			}
		case set || key == "hypervisor" || asQuantity == nil:
			if holds("=") == holds("!=") {
				t.Fatalf("%s=%s and %s!=%s hold alike", key, value, key, value)
			}
		}
		if holds("<") && holds(">=") || holds(">") && holds("<=") || holds("<") && !holds("<=") || holds(">") && !holds(">=") {
			t.Fatalf("%s against %s: < %t, <= %t, > %t, >= %t", key, value, holds("<"), holds("<="), holds(">"), holds(">="))
		}
	})
}

// TestEveryLifeEnds: by the transition table no way leads back, terminal
// states are ends, and every state reaches one in one step.
func TestEveryLifeEnds(t *testing.T) {
	all := []blixard.InstanceState{
		blixard.Pending, blixard.Preparing, blixard.Starting, blixard.Running, blixard.Stopping, blixard.Stopped, blixard.Failed, blixard.Lost,
	}
	rapid.Check(t, func(t *rapid.T) {
		at := rapid.SampledFrom(all).Draw(t, "from")
		seen := []blixard.InstanceState{at}
		for !at.Terminal() {
			if !blixard.CanFollow(at, blixard.Lost) || !blixard.CanFollow(at, blixard.Failed) {
				t.Fatalf("%s cannot end", at)
			}
			var after []blixard.InstanceState
			for _, s := range all {
				if blixard.CanFollow(at, s) {
					after = append(after, s)
				}
			}
			at = rapid.SampledFrom(after).Draw(t, "to")
			if slices.Contains(seen, at) {
				t.Fatalf("%s comes again: %v", at, seen)
			}
			seen = append(seen, at)
		}
		for _, s := range all {
			if blixard.CanFollow(at, s) {
				t.Fatalf("%s follows the end %s", s, at)
			}
		}
	})
}

// TestNamesAreLabels: a name is accepted exactly if it is a DNS label that
// leaves room for an ordinal, and the ID of its slot is a DNS label, too.
func TestNamesAreLabels(t *testing.T) {
	label := func(s string, most int) bool {
		ok := len(s) >= 1 && len(s) <= most && s[0] != '-' && s[len(s)-1] != '-'
		for _, r := range s {
			ok = ok && (r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-')
		}
		return ok
	}
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.OneOf(rapid.StringMatching(`[a-z0-9-]{0,60}`), rapid.String()).Draw(t, "name")
		if got := blixard.CheckName(name) == nil; got != label(name, 56) {
			t.Fatalf("%q is accepted: %t", name, got)
		} else if !got {
			return
		}
		if id := blixard.SlotID(blixard.VMName(name), blixard.MaxReplicas); !label(string(id), 63) {
			t.Fatalf("the slot %q is no DNS label", id)
		}
	})
}

// TestSpecsAreCompleted: filling in what was left out is done once for good,
// and what is complete and was acceptable stays so.
func TestSpecsAreCompleted(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := blixard.VMSpec{
			Replicas: rapid.IntRange(0, blixard.MaxReplicas).Draw(t, "replicas"), VCPUs: rapid.IntRange(0, blixard.MaxVCPUs).Draw(t, "vcpus"),
			MemoryMiB: rapid.SampledFrom([]int64{0, 32, blixard.MaxMemoryMiB}).Draw(t, "memory"), Priority: rapid.IntRange(0, 1000).Draw(t, "priority"),
			Strategy: rapid.SampledFrom([]string{"", "spread", "binpack"}).Draw(t, "strategy"), Singleton: rapid.Bool().Draw(t, "singleton"),
			Constraints: rapid.SliceOfN(rapid.Custom(drawConstraint), 0, 3).Draw(t, "constraints"),
			Publish:     rapid.SampledFrom([][]blixard.Port{nil, {{HostPort: 1, GuestPort: 80}}}).Draw(t, "publish"),
			Health:      rapid.SampledFrom([]*blixard.HealthCheck{nil, {Kind: "tcp", Port: 1}}).Draw(t, "health"),
		}
		for _, p := range rapid.SliceOfN(rapid.Custom(drawConstraint), 0, 3).Draw(t, "preferences") {
			s.Preferences = append(s.Preferences, blixard.Preference{Constraint: p, Weight: rapid.IntRange(0, 100).Draw(t, "weight")})
		}
		s.Defaults()
		if err := s.Check(); err != nil {
			t.Fatalf("a complete spec is refused: %v", err)
		}
		again := s
		again.Defaults()
		if !reflect.DeepEqual(s, again) {
			t.Fatalf("completed twice:\n%+v\n%+v", s, again)
		}
		if need := s.Needs(); need.MilliCPU < 1000 || need.MemoryMiB < 32 || !need.Fits(need) || need.Add(need).Sub(need) != need {
			t.Fatalf("it needs %+v", need)
		}
	})
}
