package main

import (
	"context"
	"fmt"
	"time"
)

// measured is what one system reached with one number of clients.
type measured struct{ perSecond, p50, p99, max, serversCPU, clientCPU []float64 }

func (m *measured) add(l load) {
	m.perSecond, m.p50, m.p99, m.max = append(m.perSecond, l.perSecond), append(m.p50, l.p50), append(m.p99, l.p99), append(m.max, l.max)
	m.serversCPU, m.clientCPU = append(m.serversCPU, l.serversCPU), append(m.clientCPU, l.clientCPU)
}

// benchCreate lets Blixard and etcd take turns with the same load.
func benchCreate(ctx context.Context, s settings, r *recorder) error {
	ours, err := startBlixard(ctx, s)
	if err != nil {
		return err
	}
	defer ours.stop()
	bytes := encodedBytes("vm-abcdef")
	systems := []system{ours}
	theirs, err := startEtcd(ctx, s, bytes-len("vm-abcdef"))
	if err != nil {
		r.missing(fmt.Errorf("the comparison: %w", err))
	} else {
		defer theirs.stop()
		systems = append(systems, theirs)
	}
	for _, n := range s.clients {
		got := make([]measured, len(systems))
		for round := range s.rounds {
			for i, sys := range systems {
				l, err := turn(ctx, sys, n, s.seconds, round == 0)
				if err != nil {
					return err
				}
				say("  %4d clients, %-14s %8.0f/s  p50 %6.2f ms  p99 %6.2f ms  max %6.1f ms  CPU per write: servers %4.0f µs, client %4.0f µs", n, sys.name(), l.perSecond, l.p50, l.p99, l.max, l.serversCPU, l.clientCPU)
				got[i].add(l)
			}
		}
		report(r, systems, n, bytes, got)
	}
	return nil
}

// turn is one measurement, with fresh connections that are warm.
func turn(ctx context.Context, sys system, clients int, d time.Duration, first bool) (load, error) {
	all, shut, err := writers(ctx, sys, clients)
	if err != nil {
		return load{}, err
	}
	defer shut()
	warm := 300 * time.Millisecond
	if first {
		warm = time.Second
	}
	if _, err := drive(ctx, all, "vm", warm); err != nil {
		return load{}, fmt.Errorf("%s, warming up: %w", sys.name(), err)
	}
	before, _, err := total(sys)
	if err != nil {
		return load{}, err
	}
	own := ownCPU()
	l, err := drive(ctx, all, "vm", d)
	if err != nil {
		return load{}, fmt.Errorf("%s: %w", sys.name(), err)
	}
	after, _, err := total(sys)
	if err != nil {
		return load{}, err
	}
	l.serversCPU, l.clientCPU = each(after-before, l.count), each(ownCPU()-own, l.count)
	return l, nil
}

// each is the share of one write in microseconds.
func each(d time.Duration, count int) float64 { return float64(d.Microseconds()) / float64(count) }

// report compares one number of clients.
func report(r *recorder, systems []system, clients, bytes int, got []measured) {
	how := fmt.Sprintf("unique VMs (not started) through package client, against etcd puts of unique keys, %d bytes in the log each", bytes)
	add := func(name, unit, target string, of func(measured) []float64, ok func(ours, theirs float64) bool) {
		f := figure{Name: name, Clients: clients, Value: median(of(got[0])), Unit: unit, Rounds: of(got[0]), Method: how}
		if len(got) > 1 {
			f.Peer = &peer{Name: systems[1].name(), Value: median(of(got[1])), Rounds: of(got[1])}
			if ok != nil {
				f.Target, f.Reached = target, reached(ok(f.Value, f.Peer.Value))
			}
		}
		r.add(f)
	}
	var rate, half func(ours, theirs float64) bool
	rateTarget, halfTarget := "", ""
	switch clients {
	case 1:
		half, halfTarget = func(o, t float64) bool { return o < t }, "below the peer's"
	case 100:
		rate, rateTarget = func(o, t float64) bool { return o >= 2.5*t }, "at least 2.5 times the peer's"
		half, halfTarget = func(o, t float64) bool { return o <= t/2 }, "at most half of the peer's"
	}
	add("creates", "1/s", rateTarget, func(m measured) []float64 { return m.perSecond }, rate)
	add("create p50", "ms", halfTarget, func(m measured) []float64 { return m.p50 }, half)
	add("create p99", "ms", "", func(m measured) []float64 { return m.p99 }, nil)
	add("create slowest", "ms", "", func(m measured) []float64 { return m.max }, nil)
	add("CPU of all servers per create", "µs", "", func(m measured) []float64 { return m.serversCPU }, nil)
	add("CPU of the load generator per create", "µs", "", func(m measured) []float64 { return m.clientCPU }, nil)
}
