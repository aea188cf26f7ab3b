package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/blixard/blixard/internal/vmm/qemu"

	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// probe asks the driver what it runs guests with.
func probe(s settings) (string, error) {
	d, err := qemu.New(qemu.Options{Root: filepath.Join(s.dir, "probe"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return "", fmt.Errorf("opening the hypervisor: %w", err)
	}
	caps, err := d.Capabilities(context.Background())
	return caps.Acceleration, errors.Join(err, d.Close())
}

// kinds are the runtimes whose cold calls are measured.
func (b *bench) kinds() []struct {
	figure string
	f      function
} {
	return []struct {
		figure string
		f      function
	}{
		{"cold", function{name: "lean", zip: b.code.lean, spec: once(bootstrap())}},
		{"cold_leanhttp", function{name: "leanhttp", zip: b.code.leanWeb, spec: once(web())}},
		{"cold_bootstrap", function{name: "lambda", zip: b.code.lambda, spec: once(bootstrap())}},
		{"cold_http", function{name: "web", zip: b.code.web, spec: once(web())}},
		{"cold_wasm", function{name: "wasm", zip: b.code.wasm, spec: once(&blixardv1.FunctionSpec{Runtime: "wasm", MemoryMib: 192})}},
		{"cold_nix", function{name: "nix", zip: b.code.nix, spec: once(&blixardv1.FunctionSpec{Runtime: "nix", MemoryMib: 128})}},
	}
}

// benchCold measures cold calls of every runtime with a clone in the pool.
func benchCold(ctx context.Context, b *bench) error {
	n, err := startNode(ctx, b.settings, "pool", "BLIXARD_FUNCTIONS_POOL_SIZE=1")
	if err != nil {
		return err
	}
	defer n.stop()
	var failed error
	for _, k := range b.kinds() {
		if b.only != "" && b.only != k.f.name {
			continue
		}
		c, err := n.coldCalls(ctx, k.f, b.calls, "pooled", b.stubMS)
		if err != nil {
			failed = errors.Join(failed, err)
			if err := n.remove(ctx, k.f.name); err != nil {
				say("%v", err)
			}
			continue
		}
		b.out.put(k.figure+"_p50_ms", c.total.at(0.5))
		b.out.put(k.figure+"_p99_ms", c.total.at(0.99))
		if k.figure == "cold" {
			b.out.put("cold_own_p50_ms", c.own.at(0.5))
			b.out.put("cold_own_p99_ms", c.own.at(0.99))
		}
	}
	left, err := n.left(ctx)
	if err == nil && left > 0 {
		err = fmt.Errorf("%d processes and directories are left of deleted functions", left)
	}
	return errors.Join(failed, err)
}

// benchNoPool measures what happens without a pool.
func benchNoPool(ctx context.Context, b *bench) error {
	n, err := startNode(ctx, b.settings, "nopool", "BLIXARD_FUNCTIONS_POOL_SIZE=0")
	if err != nil {
		return err
	}
	defer n.stop()
	c, err := n.coldCalls(ctx, function{name: "lean", zip: b.code.lean, spec: once(bootstrap())}, b.calls, "restored", b.stubMS)
	if err != nil {
		return err
	}
	b.out.put("cold_nopool_p50_ms", c.total.at(0.5))
	b.out.put("cold_nopool_p99_ms", c.total.at(0.99))
	took, err := n.crowd(ctx, function{name: "crowd", zip: b.code.lean, spec: once(bootstrap())}, 20)
	if err != nil {
		return err
	}
	b.out.put("restore_20_at_once_ms", took)
	left, err := n.upAndDown(ctx, b.code.lean)
	if err != nil {
		return err
	}
	b.out["scale_0_10_0_left"] = left
	return nil
}

// crowd measures how long so many calls at once take, each of which needs an
// instance of its own.
func (n *node) crowd(ctx context.Context, f function, count int) (float64, error) {
	if err := n.deploy(ctx, f); err != nil {
		return 0, err
	}
	took, err := n.atOnce(path(f.name), count)
	if err != nil {
		return 0, err
	}
	say("%d at once: all have answered after %.0f ms, the first after %.0f, the median after %.0f (load %s)", count, took.at(1), took.at(0), took.at(0.5), loadNow())
	return took.at(1), n.remove(ctx, f.name)
}

// atOnce makes so many calls at once.
func (n *node) atOnce(path string, count int) (times, error) {
	took := make(times, count)
	errs := make([]error, count)
	var group sync.WaitGroup
	for i := range count {
		c, err := dial(n.gateway, path)
		if err != nil {
			return nil, err
		}
		defer c.close()
		group.Go(func() {
			a, err := c.call(false)
			took[i], errs[i] = ms(a.took), err
		})
	}
	group.Wait()
	return took, errors.Join(errs...)
}

// upAndDown has ten instances started and waits until none is there, and tells
// what is left of them.
func (n *node) upAndDown(ctx context.Context, zip []byte) (int, error) {
	spec := bootstrap()
	delay := int64(1000)
	spec.Scaling = &blixardv1.FunctionScaling{ScaleDownDelayMs: &delay}
	f := function{name: "updown", zip: zip, spec: spec}
	if err := n.deploy(ctx, f); err != nil {
		return 0, err
	}
	const instances = 10
	done := make(chan error, 1)
	go func() { // ends with the calls
		_, err := n.atOnce(path(f.name)+"?sleep=2000", instances)
		done <- err
	}()
	most := 0
	err := until(ctx, 2*time.Minute, "ten calls", func() error {
		on, err := n.on(ctx, f.name)
		if err != nil {
			return err
		}
		most = max(most, int(on.GetInstances()))
		select {
		case err := <-done:
			done <- err
			return nil
		default:
			return errors.New("they have not ended")
		}
	})
	if err := errors.Join(err, <-done); err != nil {
		return 0, err
	}
	if most != instances {
		return 0, fmt.Errorf("%d instances were there at most, not %d", most, instances)
	}
	err = until(ctx, time.Minute, "no instance", func() error {
		on, err := n.on(ctx, f.name)
		if err == nil && on.GetInstances()+on.GetStarting()+on.GetPooled() > 0 {
			err = fmt.Errorf("there are %d", on.GetInstances())
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	left, err := n.left(ctx)
	say("from 0 to %d instances and back: %d processes and directories are left", most, left)
	return left, err
}

// left counts hypervisors and directories of instances, once they do not get
// fewer any more.
func (n *node) left(ctx context.Context) (int, error) {
	count := 0
	err := until(ctx, 10*time.Second, "nothing to be left", func() error {
		count = len(hypervisors(n.dir))
		for _, dir := range []string{"vms", "trash"} {
			found, err := os.ReadDir(filepath.Join(n.dir, "functions", "vms", dir))
			if err != nil {
				return err
			}
			count += len(found)
		}
		if count > 0 {
			return fmt.Errorf("%d are", count)
		}
		return nil
	})
	if err != nil && count > 0 {
		return count, nil
	}
	return count, err
}
