package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// load is what a number of closed-loop clients reached.
type load struct {
	perSecond     float64
	p50, p99, max float64 // milliseconds
	count         int
	// Microseconds of CPU per write, of all servers and of this process.
	serversCPU, clientCPU float64
}

// names numbers everything that is ever written.
var names atomic.Uint64

func nextName(prefix string) string { return prefix + "-" + strconv.FormatUint(names.Add(1), 36) }

// drive lets each client write for as long as told. The first error ends it.
func drive(ctx context.Context, clients []write, prefix string, d time.Duration) (load, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, d+30*time.Second, fmt.Errorf("writes did not end %v after the measurement", 30*time.Second))
	defer cancel()
	took := make([][]time.Duration, len(clients))
	errs := make(chan error, len(clients))
	start := time.Now()
	end := start.Add(d)
	var wg sync.WaitGroup
	for i, w := range clients {
		wg.Go(func() {
			mine := make([]time.Duration, 0, 1024)
			defer func() { took[i] = mine }()
			for {
				begin := time.Now()
				if begin.After(end) {
					return
				}
				if err := w(ctx, nextName(prefix)); err != nil {
					errs <- err
					cancel()
					return
				}
				mine = append(mine, time.Since(begin))
			}
		})
	}
	wg.Wait()
	elapsed := time.Since(start)
	select {
	case err := <-errs:
		return load{}, fmt.Errorf("writing with %d clients: %w", len(clients), err)
	default:
	}
	all := slices.Concat(took...)
	if len(all) == 0 {
		return load{}, fmt.Errorf("no write of %d clients ended within %v", len(clients), d)
	}
	slices.Sort(all)
	at := func(q float64) float64 { return float64(all[int(q*float64(len(all)-1))].Microseconds()) / 1000 }
	return load{perSecond: float64(len(all)) / elapsed.Seconds(), p50: at(0.50), p99: at(0.99), max: at(1), count: len(all)}, nil
}
