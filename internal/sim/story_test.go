package sim

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"
)

// TestSameSeedSameStory keeps chance, clocks and the order of maps out: a seed
// tells the same story again, also in another process and on one processor.
func TestSameSeedSameStory(t *testing.T) {
	if os.Getenv("BLIXARD_TELL") != "" {
		for seed := uint64(1); seed <= 4; seed++ {
			res := Run(Options{Seed: seed})
			fmt.Println("story", res.Seed, res.TraceHash, res.Events)
		}
		return
	}
	var here []string
	for seed := uint64(1); seed <= 4; seed++ {
		res := Run(Options{Seed: seed})
		here = append(here, fmt.Sprintln("story", res.Seed, res.TraceHash, res.Events))
	}
	for _, procs := range []string{"1", "4"} {
		cmd := exec.Command(os.Args[0], "-test.run=^TestSameSeedSameStory$")
		cmd.Env = append(os.Environ(), "BLIXARD_TELL=1", "GOMAXPROCS="+procs)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("telling it elsewhere: %v\n%s", err, out)
		}
		for _, line := range here {
			if !strings.Contains(string(out), line) {
				t.Errorf("another process with %s processors tells another story: %s\nhere: %s", procs, out, line)
			}
		}
	}
}

// TestScheduleIsData: a schedule that was written and read plays the same story
// as its seed.
func TestScheduleIsData(t *testing.T) {
	for _, profile := range Profiles() {
		o := Options{Seed: 7, Profile: profile, DurationMS: 20_000, VMs: 12}
		s, err := Plan(o)
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		var again Schedule
		if err := json.Unmarshal(b, &again); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(s, again) {
			t.Fatalf("%+v is read as %+v", s, again)
		}
		x, y := Run(o), Run(Options{Schedule: &again})
		report(t, x)
		if x.TraceHash != y.TraceHash || x.Events != y.Events {
			t.Errorf("%s: seed 7 gives %s after %d events, its schedule %s after %d", profile, x.TraceHash, x.Events, y.TraceHash, y.Events)
		}
	}
}

// TestShrink: of a schedule that breaks an invariant, what does not matter is
// left out.
func TestShrink(t *testing.T) {
	s, err := Plan(Options{Seed: 3, Nodes: 3})
	if err != nil {
		t.Fatal(err)
	}
	// A disk that a majority loses for good cannot be survived.
	s.Faults = append(s.Faults, Fault{AtMS: s.DurationMS - 2, Kind: "test: lose everything", Node: "n1"})
	kinds = append(kinds, kind{name: "test: lose everything", do: func(w *world, m *machine, _ *Fault) {
		for _, m := range w.machines {
			m.powerCut()
			m.damaged = true
		}
	}})
	defer func() { kinds = kinds[:len(kinds)-1] }()
	short, res := Shrink(Options{Schedule: &s}, 60)
	if res.OK || !strings.HasPrefix(res.Violation.Invariant, "L1") {
		t.Fatalf("the shrunk schedule gives %+v", res.Violation)
	}
	if len(short.Faults) != 1 || short.DurationMS > s.DurationMS {
		t.Errorf("%d of %d faults are left: %v", len(short.Faults), len(s.Faults), short.Faults)
	}
}

// TestBadOptions are refused in words.
func TestBadOptions(t *testing.T) {
	bad := Schedule{Version: 99}
	for _, o := range []Options{{Profile: "storm"}, {Nodes: -1}, {Nodes: 1000}, {VMs: -3}, {DurationMS: -1}, {Schedule: &bad}} {
		if res := Run(o); res.OK || res.Violation == nil || res.Violation.Invariant != "options" || res.Violation.Detail == "" {
			t.Errorf("%+v: %+v", o, res)
		}
	}
}
