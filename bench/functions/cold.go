package main

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// cold is what a series of cold calls took.
type cold struct {
	total, own times
	parts      map[string]times
}

// settle is how long nothing may happen before a cold call.
const settle = 150 * time.Millisecond

// coldCalls measures calls that find no instance: each instance ends after one
// call. Before each call the former instance is gone and, with a pool, the next
// clone is ready.
func (n *node) coldCalls(ctx context.Context, f function, count int, want string, stubMS float64) (c cold, err error) {
	if err := n.deploy(ctx, f); err != nil {
		return c, err
	}
	client, err := dial(n.gateway, path(f.name))
	if err != nil {
		return c, err
	}
	defer client.close()
	c.parts = map[string]times{}
	for i := range count + warmups {
		err := until(ctx, time.Minute, "the former instance to end and a clone to be ready", func() error {
			on, err := n.on(ctx, f.name)
			if err == nil && (on.GetInstances()+on.GetStarting() > 0 || want == "pooled" && on.GetPooled() == 0) {
				err = fmt.Errorf("there are %d instances and %d in the pool", on.GetInstances(), on.GetPooled())
			}
			return err
		})
		if err != nil {
			return c, err
		}
		if err := rest(ctx, settle); err != nil {
			return c, err
		}
		a, err := client.call(true)
		if err != nil {
			return c, fmt.Errorf("calling %s: %w", f.name, err)
		}
		if i < warmups {
			continue // slots are leased ahead now, caches are warm
		}
		if a.start != want {
			return c, fmt.Errorf("calling %s: it began %s instead of %s", f.name, a.start, want)
		}
		c.total.add(a.took)
		rest := ms(a.took)
		for _, part := range []string{"spawn", "restore", "boot", "init", "handler", "transfer"} {
			rest -= a.parts[part]
		}
		c.own = append(c.own, max(rest, 0)+min(stubMS, a.parts["transfer"]))
		for _, part := range partNames {
			c.parts[part] = append(c.parts[part], a.parts[part])
		}
	}
	say("%s, %d times %s: p50 %.1f ms, p99 %.1f, own p50 %.2f; %s (load %s)", f.name, count, want, c.total.at(0.5), c.total.at(0.99), c.own.at(0.5), c.words(), loadNow())
	return c, n.remove(ctx, f.name)
}

// warmups are calls that are not counted.
const warmups = 3

var partNames = []string{"queue", "place", "commit", "spawn", "restore", "init", "handler", "transfer", "total"}

// words are the medians of the parts.
func (c *cold) words() string {
	var out []string
	for _, name := range partNames {
		if v := c.parts[name].at(0.5); v > 0 {
			out = append(out, fmt.Sprintf("%s %.2f", name, v))
		}
	}
	return strings.Join(out, ", ")
}
