package client

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

const (
	// hedgeAfter is how long an address may be silent before the next one is asked
	// beside it: a process that hangs still takes connections.
	hedgeAfter = 500 * time.Millisecond
	// settleFor bounds the search for a node that answers.
	settleFor = 3 * time.Second
)

// answers makes sure that a node is there and serves, for a call that cannot be
// made twice.
func (e *endpoint) answers(ctx context.Context) error {
	ask, cancel := context.WithTimeout(ctx, silentFor)
	defer cancel()
	_, err := e.system.GetHealth(ask, &blixardv1.GetHealthRequest{})
	if err != nil && ask.Err() != nil && ctx.Err() == nil {
		return &blixard.Error{Code: blixard.CodeUnavailable, Message: fmt.Sprintf("no answer from %s within %s", e.url, silentFor), Hint: "does the node hang? --addr names others"}
	}
	return err
}

// health is what became of asking one node.
type health struct {
	at           int
	there, ready bool
}

func (c *Client) health(ctx context.Context, at int) health {
	answer, err := c.endpoints[at].system.GetHealth(ctx, &blixardv1.GetHealthRequest{})
	if err == nil {
		return health{at: at, there: true, ready: answer.GetReady()}
	}
	e, _, refused := blixardv1.FromRPC(err)
	refused = refused && e.Code != blixard.CodeUnavailable && e.Code != blixard.CodeOverloaded && ctx.Err() == nil
	return health{at: at, there: refused, ready: refused} // what it has to say is to be heard
}

// settle finds, once and only when there are several addresses, the one to ask
// first: the first that says it is ready, else the first that answers at all.
// With none, calls begin with the first address and tell what is wrong.
func (c *Client) settle(ctx context.Context) {
	if len(c.endpoints) < 2 || c.settled.Swap(true) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, settleFor)
	var asking sync.WaitGroup
	defer asking.Wait()
	defer cancel()
	found := make(chan health, len(c.endpoints)) // room for all: the late ones wait for nobody
	asked, answered, second := 0, 0, -1
	for answered < len(c.endpoints) {
		if at := asked; at < len(c.endpoints) {
			asking.Go(func() { found <- c.health(ctx, at) })
			asked++
		}
		h, ok := nextHealth(ctx, found)
		switch {
		case ctx.Err() != nil:
			answered = len(c.endpoints)
		case ok && h.ready:
			c.preferred.Store(int32(h.at))
			return
		case ok && h.there && second < 0:
			second = h.at
		}
		if ok {
			answered++
		}
	}
	if second >= 0 {
		c.preferred.Store(int32(second))
	}
}

// nextHealth waits for an answer, but not for long.
func nextHealth(ctx context.Context, found <-chan health) (health, bool) {
	silence := time.NewTimer(hedgeAfter)
	defer silence.Stop()
	select {
	case h := <-found:
		return h, true
	case <-silence.C:
	case <-ctx.Done():
	}
	return health{}, false
}
