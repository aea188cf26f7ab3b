package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// benchIdle measures the memory of clones that wait for calls.
func benchIdle(ctx context.Context, b *bench) error {
	count := b.clones
	if fit := int(availableMiB()-2048) / 64; fit < count {
		count = max(fit, 1)
		say("memory allows for %d clones only", count)
	}
	n, err := startNode(ctx, b.settings, "idle", "BLIXARD_FUNCTIONS_POOL_SIZE=0", "BLIXARD_FUNCTIONS_MEMORY_PERCENT=400")
	if err != nil {
		return err
	}
	defer n.stop()
	spec := bootstrap()
	spec.Scaling = &blixardv1.FunctionScaling{MinInstances: int32(count)}
	began := time.Now()
	if err := n.deploy(ctx, function{name: "idle", zip: b.code.lean, spec: spec}); err != nil {
		return err
	}
	err = until(ctx, 5*time.Minute, "the clones", func() error {
		on, err := n.on(ctx, "idle")
		if err == nil && int(on.GetWarm()) < count {
			err = fmt.Errorf("%d of %d are there", on.GetWarm(), count)
		}
		return err
	})
	if err != nil {
		return err
	}
	say("%d clones are there %.1f s after the function was sent", count, time.Since(began).Seconds())
	if err := rest(ctx, time.Second); err != nil {
		return err
	}
	var private, anonymous, shared times
	for _, pid := range hypervisors(n.dir) {
		m, err := memoryOf(pid)
		if err != nil {
			return err
		}
		private = append(private, m["Private_Clean"]+m["Private_Dirty"])
		anonymous, shared = append(anonymous, m["Anonymous"]), append(shared, m["Shared_Clean"]+m["Shared_Dirty"])
	}
	if len(private) != count {
		return fmt.Errorf("there are %d hypervisors for %d clones", len(private), count)
	}
	say("%d idle clones: %.1f MiB private each (at most %.1f), %.1f anonymous, %.1f shared", count, private.mean(), private.at(1), anonymous.mean(), shared.mean())
	b.out.put("idle_clone_private_mib", private.mean())
	b.out["idle_clones"] = count
	return nil
}

// hypervisors are the processes that run guests below a directory.
func hypervisors(dir string) (pids []int) {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		program, _, _ := bytes.Cut(text, []byte{0})
		if bytes.Contains(program, []byte("qemu")) && bytes.Contains(text, []byte(dir)) {
			if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file))); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// memoryOf is the memory of a process, in MiB by kind.
func memoryOf(pid int) (map[string]float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return nil, fmt.Errorf("reading the memory of a hypervisor: %w", err)
	}
	return kilobytes(text), nil
}

// kilobytes reads lines like "Private_Dirty:  12 kB", in MiB.
func kilobytes(text []byte) map[string]float64 {
	out := map[string]float64{}
	for line := range bytes.Lines(text) {
		f := bytes.Fields(line)
		if len(f) == 3 && string(f[2]) == "kB" {
			if n, err := strconv.ParseFloat(string(f[1]), 64); err == nil {
				out[string(bytes.TrimSuffix(f[0], []byte(":")))] = n / 1024
			}
		}
	}
	return out
}

func availableMiB() float64 {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	return kilobytes(text)["MemAvailable"]
}
