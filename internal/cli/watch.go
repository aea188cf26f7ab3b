package cli

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"time"

	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// settleFor is how long changes are gathered before a watched listing is shown
// again.
const settleFor = 100 * time.Millisecond

// watch renders whenever something of the kinds changed, until ctx ends. On a
// terminal the screen is rewritten; else what is new is appended, and nothing is
// when it looks the same.
func (a *app) watch(ctx context.Context, kinds []string, vm string, render func(context.Context, io.Writer) error) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	changed := make(chan struct{}, 1)
	ended := make(chan error, 1)
	go func() {
		var err error
		for _, watchErr := range c.Watch(ctx, &blixardv1.WatchRequest{Kinds: kinds, Vm: vm}) {
			if err = watchErr; err != nil {
				break
			}
			select {
			case changed <- struct{}{}:
			default: // it will be looked at anyway
			}
		}
		ended <- err
	}()
	end := func() {
		cancel()
		<-ended //nolint:errcheck // it ends since it was told to
	}
	_, tty := terminal(a.env.Stdout)
	var last []byte
	for {
		var b bytes.Buffer
		if err := render(ctx, &b); err != nil && ctx.Err() == nil {
			end()
			return err
		}
		if !bytes.Equal(b.Bytes(), last) && ctx.Err() == nil {
			last = bytes.Clone(b.Bytes())
			if tty {
				fmt.Fprint(a.env.Stdout, "\x1b[H\x1b[2J")
			}
			if _, err := a.env.Stdout.Write(last); err != nil {
				end()
				return nil // nobody reads any more
			}
		}
		select {
		case <-changed:
		case err := <-ended:
			if ctx.Err() != nil {
				return nil
			}
			return err
		case <-ctx.Done():
			end()
			return nil // Ctrl-C is how a watch ends
		}
		select {
		case <-time.After(settleFor):
		case <-ctx.Done():
		}
	}
}
