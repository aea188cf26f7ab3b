package dispatch

import (
	"context"
	"sync"

	"github.com/blixard/blixard"
)

// Event is something that happened to a function on this node, for people who
// watch it: build, template, start, ready, start-failed, restore-failed, kill,
// lease, return, throttle.
type Event struct {
	TimeMS   int64                `json:"time_ms"`
	Function blixard.FunctionName `json:"function"`
	Number   int                  `json:"number"`
	Node     blixard.NodeName     `json:"node"`
	Kind     string               `json:"kind"`
	Instance string               `json:"instance,omitempty"`
	Text     string               `json:"text,omitempty"`
}

// keptEvents of all functions are kept on a node.
const keptEvents = 1000

// events is the ring of what happened last. The zero value is empty.
type events struct {
	mu    sync.Mutex
	ring  []Event
	next  uint64 // number of the next one
	grown chan struct{}
}

func (e *events) add(one Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.ring) < keptEvents {
		e.ring = append(e.ring, one)
	} else {
		e.ring[e.next%keptEvents] = one
	}
	e.next++
	if e.grown != nil {
		close(e.grown)
		e.grown = nil
	}
}

// since are the events from a number on, the number after them, and a channel
// that is closed when there are more.
func (e *events) since(next uint64) ([]Event, uint64, <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.next > keptEvents {
		next = max(next, e.next-keptEvents)
	}
	var out []Event
	for ; next < e.next; next++ {
		out = append(out, e.ring[next%keptEvents])
	}
	if e.grown == nil {
		e.grown = make(chan struct{})
	}
	return out, next, e.grown
}

// Events calls yield for what happened to a function ("" for all) on this node:
// what is still kept, and, when following, what comes until ctx ends.
func (d *Dispatcher) Events(ctx context.Context, name blixard.FunctionName, follow bool, yield func(Event) error) error {
	next := uint64(0)
	for {
		batch, after, grown := d.events.since(next)
		next = after
		for _, one := range batch {
			if name != "" && one.Function != name {
				continue
			}
			if err := yield(one); err != nil {
				return err
			}
		}
		if !follow {
			return nil
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
