package sim

import (
	"fmt"
	"math/rand/v2"
	"slices"
)

// mendKind ends everything that goes wrong, and asks that all comes to rest.
const mendKind = "mend"

// class is a class of faults that a seed switches on or off as a whole.
type class struct {
	name string
	pct  int // of the seeds of profile swarm
	// profiles that always have it.
	profiles []string
}

var classes = []class{
	{"process", 60, []string{ProfileCrash}},
	{"power", 60, []string{ProfileCrash}},
	{"blackout", 25, []string{ProfileCrash}},
	{"vote", 25, []string{ProfileCrash}},
	{"loss", 25, []string{ProfileCrash}},
	{"disk", 35, []string{ProfileCrash}},
	{"decay", 25, []string{ProfileCrash}},
	{"partition", 60, []string{ProfilePartition}},
	{"one-way", 40, []string{ProfilePartition}},
	{"messages", 60, []string{ProfilePartition}},
	{"slow link", 30, []string{ProfilePartition}},
	{"late", 30, []string{ProfilePartition}},
	{"pause", 50, nil},
	{"clock", 35, nil},
	{"guest", 50, nil},
	{"hypervisor", 50, nil},
	{"scheduler", 40, nil},
	{"members", 45, nil},
	{"operator", 45, nil},
	{"upgrade", 25, nil},
}

func classesOf(profile string) []string {
	var out []string
	for _, c := range classes {
		if slices.Contains(c.profiles, profile) {
			out = append(out, c.name)
		}
	}
	return out
}

// kind is a fault by name: what it draws, and what it does to a machine.
type kind struct {
	name  string
	class string
	draw  func(d *drawer, f *Fault)
	do    func(w *world, m *machine, f *Fault)
}

// drawer draws faults.
type drawer struct {
	*rand.Rand
	k *Knobs
}

func (d *drawer) between(lo, hi int64) int64 { return lo + d.Int64N(hi-lo+1) }

func (d *drawer) chance(pct int) bool { return d.IntN(100) < pct }

func (d *drawer) node() string { return fmt.Sprintf("n%d", 1+d.IntN(d.k.Nodes)) }

// some are machines beside the one that is met.
func (d *drawer) some(pct int) []string {
	var out []string
	for i := range d.k.Nodes {
		if d.chance(pct) {
			out = append(out, fmt.Sprintf("n%d", i+1))
		}
	}
	return out
}

func forBetween(lo, hi int64) func(*drawer, *Fault) {
	return func(d *drawer, f *Fault) { f.ForMS = d.between(lo, hi) }
}

// down is for how long a machine stays down: often hardly at all, since what it
// has forgotten shows best while the others still remember.
func down(d *drawer, f *Fault) {
	f.ForMS = d.between(0, 8000)
	if d.chance(40) {
		f.ForMS = d.between(0, 50)
	}
}

func kindOf(name string) *kind {
	for i := range kinds {
		if kinds[i].name == name {
			return &kinds[i]
		}
	}
	return nil
}

// drawFaults fills in what goes wrong when: windows in which it does, each
// followed by time to mend.
func drawFaults(r *rand.Rand, s *Schedule) {
	if len(s.Knobs.Classes) == 0 || s.Knobs.FaultEveryMS == 0 {
		return
	}
	d := &drawer{r, &s.Knobs}
	var on []int
	for i := range kinds {
		if kinds[i].draw != nil && slices.Contains(s.Knobs.Classes, kinds[i].class) {
			on = append(on, i)
		}
	}
	at := d.between(0, 5000)
	for at < s.DurationMS {
		end := min(at+[]int64{15_000, 25_000, 40_000}[d.IntN(3)], s.DurationMS)
		for at += d.between(1, 2*s.Knobs.FaultEveryMS); at < end; at += d.between(1, 2*s.Knobs.FaultEveryMS) {
			k := &kinds[on[d.IntN(len(on))]]
			f := Fault{AtMS: at, Kind: k.name, Node: d.node()}
			if d.chance(50) {
				f.Node = "leader"
			}
			k.draw(d, &f)
			s.Faults = append(s.Faults, f)
		}
		at = end + []int64{60_000, 300_000, 600_000, 900_000}[d.IntN(4)]
		if at < s.DurationMS {
			s.Faults = append(s.Faults, Fault{AtMS: end, Kind: mendKind})
		}
	}
}
