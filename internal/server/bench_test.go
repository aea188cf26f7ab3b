package server_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// BenchmarkPropose creates VMs on three nodes in one process, each with a real
// log on disk and real streams between them.
func BenchmarkPropose(b *testing.B) {
	for _, clients := range []int{1, 10, 100, 1000} {
		b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
			c := newCluster(b)
			c.threshold = 10_000
			c.three()
			lead := c.leader()
			var n atomic.Int64
			took := make([][]time.Duration, clients)
			b.ResetTimer()
			var wg sync.WaitGroup
			for i := range clients {
				wg.Go(func() {
					for {
						k := n.Add(1)
						if k > int64(b.N) {
							return
						}
						start := time.Now()
						_, err := lead.srv.Propose(context.Background(), state.Envelope{Key: fmt.Sprint("k", k), Command: &state.CreateVM{Name: blixard.VMName(fmt.Sprint("vm", k)), Spec: spec(1)}})
						if err != nil {
							b.Error(err)
							return
						}
						took[i] = append(took[i], time.Since(start))
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			all := slices.Sorted(func(yield func(time.Duration) bool) {
				for _, t := range took {
					for _, d := range t {
						if !yield(d) {
							return
						}
					}
				}
			})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "creates/s")
			b.ReportMetric(float64(all[len(all)/2].Microseconds())/1000, "p50-ms")
		})
	}
}
