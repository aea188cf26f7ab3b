package main

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	busyBytesPerSecond = 16 << 20 // of allocations
	// What is left lying while busy: half more than what lives, within bounds.
	minGarbageBytes = 64 << 20
	maxGarbageBytes = 256 << 20
)

// paceGC lets a busy server with a small heap collect garbage less often. Go
// collects whenever the heap has doubled, which for the 10 MB of a small cluster
// is several times a second under load and takes a fifth of the CPU. An idle
// server, and one with a large state, keep Go's setting, and so a small
// footprint. GOGC in the environment turns it off.
func paceGC(ctx context.Context) error {
	if os.Getenv("GOGC") != "" {
		return nil
	}
	samples := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}, {Name: "/gc/heap/live:bytes"}}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	metrics.Read(samples)
	allocated, percent := samples[0].Value.Uint64(), 100
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		metrics.Read(samples)
		now, live := samples[0].Value.Uint64(), samples[1].Value.Uint64()
		want := 100
		if now-allocated > busyBytesPerSecond {
			garbage := min(max(live*3/2, minGarbageBytes), maxGarbageBytes)
			want = int(max(garbage*100/max(live, 1<<20), 100))
		}
		allocated = now
		// Setting it stops the world for a moment: only when it matters.
		if want < percent*9/10 || want > percent*11/10 {
			debug.SetGCPercent(want)
			percent = want
		}
	}
}
