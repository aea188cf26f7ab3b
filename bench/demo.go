package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"time"
)

// benchDemo is how long the demonstration takes from a built tree.
func benchDemo(ctx context.Context, s settings, r *recorder) error {
	start := time.Now()
	cmd := exec.CommandContext(ctx, "make", "-C", s.root, "demo", "ONCE=1")
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("running the demo: %w", err)
	}
	took := time.Since(start).Seconds()
	r.add(figure{Name: "make demo ONCE=1", Value: took, Unit: "s", Target: "less than 60 s", Reached: reached(took < 60), Method: "from a built tree, real QEMU guests"})
	return nil
}
