package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/converge"
	"github.com/blixard/blixard/internal/guest"
)

// errUnknown: the check could not be made, which says nothing of the instance.
var errUnknown = errors.New("the check could not be made")

// verdict turns outcomes of checks into a health.
type verdict struct {
	check   blixard.HealthCheck
	began   time.Time
	misses  int
	health  blixard.Health
	because string // what the last failure was
}

// take takes one outcome and tells whether the health changed.
func (v *verdict) take(err error, now time.Time) (changed bool) {
	before := v.health
	switch {
	case err == nil:
		v.misses, v.health, v.because = 0, blixard.HealthHealthy, ""
	case errors.Is(err, errUnknown):
	case v.health != blixard.HealthHealthy && now.Sub(v.began) < time.Duration(v.check.StartPeriodMS)*time.Millisecond:
		// It may still be starting. Once it was healthy it is not.
	default:
		v.misses++
		if v.misses >= v.check.FailureThreshold && v.health != blixard.HealthUnhealthy {
			v.health = blixard.HealthUnhealthy
			v.because = fmt.Sprintf("the health check failed %d times in a row: %v", v.misses, err)
		}
	}
	return v.health != before
}

// checkHealth probes an instance once it is ready, until ctx ends.
func (a *Agent) checkHealth(ctx context.Context, s *session, row *blixard.Instance, ready <-chan struct{}) {
	check := row.Spec.Health
	if check == nil {
		return
	}
	select {
	case <-ctx.Done():
		return
	case <-ready:
	}
	v := verdict{check: *check, began: time.Now(), health: row.Health}
	tick := time.NewTicker(time.Duration(check.IntervalMS) * time.Millisecond)
	defer tick.Stop()
	for {
		if !s.isPaused() {
			err := a.probe(ctx, s, check)
			if ctx.Err() != nil {
				return
			}
			result := "ok"
			if err != nil {
				result = "failed"
			}
			a.o.Metrics.checks.WithLabelValues(result).Inc()
			if v.take(err, time.Now()) {
				a.setHealth(s.ref, v.health, v.because)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (a *Agent) setHealth(ref converge.Ref, health blixard.Health, because string) {
	level := slog.LevelInfo
	if health == blixard.HealthUnhealthy {
		level = slog.LevelWarn
	}
	a.event(level, ref, "health", "now "+string(health), "why", because)
	a.mu.Lock()
	l := a.memory(ref)
	l.Health, l.Note = health, because
	a.mu.Unlock()
	poke(a.wake)
}

// probe makes one check: nil when it is healthy, errUnknown when that cannot be
// told. HTTP goes through the published port if there is one, as users do. TCP
// is tried inside the guest if that is possible: QEMU's user-mode network takes
// every connection to a published port, whether the guest listens or not.
func (a *Agent) probe(ctx context.Context, s *session, check *blixard.HealthCheck) error {
	limit := time.Duration(check.TimeoutMS) * time.Millisecond
	ctx, cancel := context.WithTimeout(ctx, limit+time.Second)
	defer cancel()
	address := a.published(s.ref, check.Port)
	client := s.current()
	switch {
	case check.Kind == "http" && address != "":
		return probeHTTP(ctx, address, check.Path, limit)
	case client != nil:
		err := client.Check(ctx, guest.Check{Kind: check.Kind, Args: check.Command, Port: check.Port, Path: check.Path, TimeoutMS: check.TimeoutMS})
		if err != nil && !errors.Is(err, guest.ErrUnhealthy) && !errors.Is(err, guest.ErrInvalid) && !errors.Is(err, guest.ErrCommand) && !errors.Is(err, context.DeadlineExceeded) {
			return fmt.Errorf("%w: %w", errUnknown, err)
		}
		return err
	case check.Kind == "tcp" && address != "":
		return probeTCP(ctx, address, limit)
	default:
		return fmt.Errorf("%w: the guest's channel is not open", errUnknown)
	}
}

// published is where the guest's TCP port can be reached from here, "" if it
// cannot.
func (a *Agent) published(ref converge.Ref, guestPort int) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i := range a.found {
		if refOf(a.found[i].Ref) != ref {
			continue
		}
		found := finding(&a.found[i])
		a.publish(&found)
		for _, p := range found.Ports {
			if p.GuestPort == guestPort && p.Protocol != "udp" {
				return p.Address
			}
		}
	}
	return ""
}

func probeHTTP(ctx context.Context, address, path string, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+path, nil)
	if err != nil {
		return fmt.Errorf("making the request: %w", err)
	}
	request.Header.Set("User-Agent", "blixard-health")
	// A dial that its request no longer waits for goes on: it needs a limit of its own.
	transport := &http.Transport{DisableKeepAlives: true, DialContext: (&net.Dialer{Timeout: limit}).DialContext}
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if _, err := io.CopyN(io.Discard, response.Body, 64<<10); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("reading the answer: %w", err)
	}
	if response.StatusCode < 200 || response.StatusCode > 399 {
		return fmt.Errorf("GET %s answered %s", path, response.Status)
	}
	return nil
}

// probeTCP connects, and takes a connection that is closed at once for refused.
func probeTCP(ctx context.Context, address string, limit time.Duration) error {
	dialer := net.Dialer{Timeout: limit}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetReadDeadline(time.Now().Add(min(limit, 500*time.Millisecond))); err != nil {
		return fmt.Errorf("bounding the wait: %w", err)
	}
	var timeout net.Error
	if _, err := conn.Read(make([]byte, 1)); err != nil && !(errors.As(err, &timeout) && timeout.Timeout()) {
		return fmt.Errorf("the connection was closed at once: %w", err)
	}
	return nil
}
