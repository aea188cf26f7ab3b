package sim

import "testing"

// BenchmarkCalm plays an hour of 5 nodes with 200 VMs; virtual/s is how much
// faster than the real thing that is.
func BenchmarkCalm(b *testing.B) {
	for b.Loop() {
		res := Run(Options{Seed: 1, Profile: ProfileCalm, DurationMS: 600_000})
		if !res.OK {
			b.Fatal(res.Violation)
		}
		b.ReportMetric(float64(res.VirtualMS)/1000*float64(b.N)/b.Elapsed().Seconds(), "virtual/s")
		b.ReportMetric(float64(res.Events)*float64(b.N)/b.Elapsed().Seconds(), "events/s")
	}
}

// BenchmarkSwarm plays hours of profile swarm.
func BenchmarkSwarm(b *testing.B) {
	seed, virtual := uint64(0), int64(0)
	for b.Loop() {
		seed++
		res := Run(Options{Seed: seed, DurationMS: 3_600_000})
		if !res.OK {
			b.Fatal(res.Violation)
		}
		virtual += res.VirtualMS
	}
	b.ReportMetric(float64(virtual)/1000/b.Elapsed().Seconds(), "virtual/s")
}
