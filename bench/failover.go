package main

import (
	"context"
	"fmt"
	"sync"
	"time"
)

const (
	killRounds  = 5
	writeEvery  = 4 * time.Millisecond
	beforeKill  = time.Second
	afterKill   = 6 * time.Second
	giveUpAfter = 8 * time.Second
)

// benchFailover kills leaders under a steady stream of writes.
func benchFailover(ctx context.Context, s settings, r *recorder) error {
	ours, err := startBlixard(ctx, s)
	if err != nil {
		return err
	}
	gaps, err := failovers(ctx, ours)
	ours.stop()
	if err != nil {
		return err
	}
	f := figure{
		Name: "no write succeeds after kill -9 of the leader", Value: median(gaps), Unit: "s", Rounds: gaps, Target: "within 1 s", Reached: reached(median(gaps) <= 1),
		Method: fmt.Sprintf("a new write every %v through each node in turn, whatever became of those before; the longest time without one that succeeds, beginning with the kill; default settings of both", writeEvery),
	}
	theirs, err := startEtcd(ctx, s, encodedBytes("vm-abcdef")-9)
	if err == nil {
		var peerGaps []float64
		peerGaps, err = failovers(ctx, theirs)
		theirs.stop()
		f.Peer = &peer{Name: theirs.name(), Value: median(peerGaps), Rounds: peerGaps}
	}
	if err != nil {
		f.Peer = nil
		r.missing(fmt.Errorf("the comparison: %w", err))
	}
	r.add(f)
	return nil
}

func failovers(ctx context.Context, sys system) ([]float64, error) {
	var gaps []float64
	for range killRounds {
		gap, err := failover(ctx, sys)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", sys.name(), err)
		}
		say("  %-14s %.2f s without a write", sys.name(), gap)
		gaps = append(gaps, gap)
	}
	return gaps, nil
}

// failover kills the leader once and starts it again at the end.
func failover(ctx context.Context, sys system) (gapSeconds float64, err error) {
	all, shut, err := writers(ctx, sys, len(sys.nodes()))
	if err != nil {
		return 0, err
	}
	defer shut()
	lead, err := sys.leader(ctx)
	if err != nil {
		return 0, err
	}
	st := newStream(all)
	stop := st.run(ctx)
	sleep(ctx, beforeKill)
	killed := time.Now()
	sys.nodes()[lead].kill()
	sleep(ctx, afterKill)
	ended := time.Now()
	stop()
	if err := sys.nodes()[lead].start(); err != nil {
		return 0, err
	}
	if err := sys.ready(ctx); err != nil {
		return 0, err
	}
	return st.gap(killed, ended), nil
}

// stream is an open loop of writes: one begins every few milliseconds, whether
// or not those before have ended.
type stream struct {
	clients []write
	mu      sync.Mutex
	done    []time.Time // when writes succeeded
}

func newStream(clients []write) *stream { return &stream{clients: clients} }

// run writes until the returned function is called, which waits for what is
// under way.
func (s *stream) run(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		t := time.NewTicker(writeEvery)
		defer t.Stop()
		for i := 0; ; i++ {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
			}
			wg.Go(func() { s.one(ctx, s.clients[i%len(s.clients)]) })
		}
	})
	return func() { cancel(); wg.Wait() }
}

// one is a single write; that some fail while there is no leader is what this
// is about.
func (s *stream) one(ctx context.Context, w write) {
	ctx, cancel := context.WithTimeout(ctx, giveUpAfter)
	defer cancel()
	if w(ctx, nextName("vm")) != nil {
		return
	}
	s.mu.Lock()
	s.done = append(s.done, time.Now())
	s.mu.Unlock()
}

// gap is the longest time without a success between two moments.
func (s *stream) gap(from, to time.Time) float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	last, longest := from, time.Duration(0)
	for _, t := range s.done { // in order: noted as they end
		if t.Before(from) || t.After(to) {
			continue
		}
		longest, last = max(longest, t.Sub(last)), t
	}
	return max(longest, to.Sub(last)).Seconds()
}

// sleep waits, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
