package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// The server's times.
const (
	headWithin   = 10 * time.Second // for the head of a request
	idleWithin   = 2 * time.Minute  // between two requests of a connection
	maxHeadSize  = 64 << 10
	drainWithin  = 30 * time.Second // for calls when the server ends
	closeTimeout = time.Second
)

// Run tells other nodes what there is here, makes asynchronous calls and sends
// traces, until ctx ends.
func (g *Gateway) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	parts := []func(context.Context){g.announce, g.async.run}
	if g.opt.Traces != nil {
		parts = append(parts, g.opt.Traces.run)
	}
	for _, part := range parts {
		wg.Go(func() { part(ctx) })
	}
	wg.Wait()
	g.peers.close()
	return nil
}

// NewServer is an HTTP server for the gateway, with bounds for what clients send
// and how long they take.
func (g *Gateway) NewServer() *http.Server {
	return &http.Server{
		Handler: g, ReadHeaderTimeout: headWithin, IdleTimeout: idleWithin, MaxHeaderBytes: maxHeadSize,
		ErrorLog: slog.NewLogLogger(g.log.Handler(), slog.LevelDebug),
	}
}

// Serve answers requests that come to a listener, until ctx ends; then it
// refuses new calls and waits for those under way, for a while.
func (g *Gateway) Serve(ctx context.Context, l net.Listener) error {
	s := g.NewServer()
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	select {
	case err := <-served:
		return fmt.Errorf("serving functions on %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainWithin)
	defer cancel()
	err := g.Drain(ctx)
	if err != nil {
		g.log.Warn("calls are cut off, they do not end", "event", "gateway_drain", "calls", g.Calls(), "error", err)
	}
	stop, done := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer done()
	if err := s.Shutdown(stop); err != nil {
		if err := s.Close(); err != nil {
			g.log.Debug("closing the gateway's connections", "error", err)
		}
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving functions on %s: %w", l.Addr(), err)
	}
	return nil
}
