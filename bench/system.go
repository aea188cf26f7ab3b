package main

import "context"

// write makes one durable change under a name that was never used before.
type write func(ctx context.Context, name string) error

// system is a cluster of three nodes to which both sides of a comparison come
// down.
type system interface {
	name() string
	// writer returns a client with a connection of its own to the node.
	writer(node int) (write, func(), error)
	// leader is the index of the leading node.
	leader(ctx context.Context) (int, error)
	// ready returns when all nodes follow a leader and are up to date.
	ready(ctx context.Context) error
	nodes() []*process
	stop()
}

// writers makes n clients, spread over the nodes. The first is at the leader, on
// either side, so that a single one measures the same thing.
func writers(ctx context.Context, s system, n int) ([]write, func(), error) {
	lead, err := s.leader(ctx)
	if err != nil {
		return nil, nil, err
	}
	var all []write
	var closers []func()
	shut := func() {
		for _, c := range closers {
			c()
		}
	}
	for i := range n {
		w, c, err := s.writer((lead + i) % len(s.nodes()))
		if err != nil {
			shut()
			return nil, nil, err
		}
		all, closers = append(all, w), append(closers, c)
	}
	return all, shut, nil
}
