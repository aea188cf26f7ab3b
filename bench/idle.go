package main

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

const (
	settleFor = 10 * time.Second
	idleFor   = 30 * time.Second
)

// benchIdle looks at what three servers use that nobody asks for anything.
func benchIdle(ctx context.Context, s settings, r *recorder) error {
	ours, err := startBlixard(ctx, s)
	if err != nil {
		return err
	}
	rss, cpu, err := idle(ctx, ours)
	ours.stop()
	if err != nil {
		return err
	}
	how := fmt.Sprintf("three servers on one machine, no requests, over %v; the largest resident set, and the CPU time of all three", idleFor)
	mem := figure{Name: "resident memory of an idle server", Value: rss, Unit: "MB", Target: "less than 60 MB", Reached: reached(rss < 60), Method: how}
	use := figure{Name: "CPU of three idle servers", Value: cpu, Unit: "% of a core", Target: "less than 3 %", Reached: reached(cpu < 3), Method: how}
	theirs, err := startEtcd(ctx, s, 100)
	if err == nil {
		var peerRSS, peerCPU float64
		peerRSS, peerCPU, err = idle(ctx, theirs)
		theirs.stop()
		mem.Peer, use.Peer = &peer{Name: theirs.name(), Value: peerRSS}, &peer{Name: theirs.name(), Value: peerCPU}
	}
	if err != nil {
		mem.Peer, use.Peer = nil, nil
		r.missing(fmt.Errorf("the comparison: %w", err))
	}
	r.add(mem)
	r.add(use)
	return nil
}

// idle returns the largest resident set in MB and the CPU share of all in
// percent of one core.
func idle(ctx context.Context, sys system) (rssMB, cpuPercent float64, err error) {
	sleep(ctx, settleFor)
	before, _, err := total(sys)
	if err != nil {
		return 0, 0, err
	}
	start := time.Now()
	sleep(ctx, idleFor)
	after, rss, err := total(sys)
	if err != nil {
		return 0, 0, err
	}
	return float64(rss) / 1e6, 100 * (after - before).Seconds() / time.Since(start).Seconds(), ctx.Err()
}

func total(sys system) (cpu time.Duration, largestRSS int64, err error) {
	for _, p := range sys.nodes() {
		rss, used, err := p.usage()
		if err != nil {
			return 0, 0, err
		}
		cpu, largestRSS = cpu+used, max(largestRSS, rss)
	}
	return cpu, largestRSS, nil
}

// ownCPU is the CPU time this process has used.
func ownCPU() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0 // never happens with these arguments
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
