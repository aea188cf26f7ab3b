package main

import (
	"bufio"
	"context"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
)

// benchSchedule runs the benchmarks of internal/schedule and reads what they
// print.
func benchSchedule(ctx context.Context, s settings, r *recorder) error {
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", ".", "-benchtime", "2s", "./internal/schedule")
	cmd.Dir = s.root
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("running the benchmarks of internal/schedule: %w\n%s", err, out)
	}
	lines := bufio.NewScanner(strings.NewReader(string(out)))
	for lines.Scan() {
		name, values, ok := benchLine(lines.Text())
		if !ok {
			continue
		}
		say("  %s", lines.Text())
		if v, ok := values["decisions/s"]; ok {
			f := figure{Name: name, Value: v, Unit: "decisions/s", Method: "go test -bench of internal/schedule, 10,000 nodes, 100,000 instances, one core, each decision booked"}
			// The targets are for ordinary requests; the others are extremes, to know
			// what they cost.
			switch name {
			case "Place/plain", "Place/binpack":
				f.Target, f.Reached = "at least 50,000/s", reached(v >= 50_000)
			case "Place/spread+anti-affinity":
				f.Target, f.Reached = "at least 20,000/s", reached(v >= 20_000)
			}
			r.add(f)
		}
		if v, ok := values["score/best"]; ok {
			r.add(figure{Name: name + " score", Value: v, Unit: "of an exhaustive search's", Target: "at least 0.99", Reached: reached(v >= 0.99)})
		}
		if v, ok := values["ns/op"]; ok && strings.HasPrefix(name, "NewIndex") {
			r.add(figure{Name: "index for a new leader", Value: v / 1e6, Unit: "ms"})
		}
	}
	return nil
}

// benchLine reads one line of a Go benchmark.
func benchLine(line string) (name string, values map[string]float64, ok bool) {
	f := strings.Fields(line)
	if len(f) < 4 || !strings.HasPrefix(f[0], "Benchmark") {
		return "", nil, false
	}
	name = strings.TrimPrefix(f[0], "Benchmark")
	if at := strings.LastIndexByte(name, '-'); at > 0 {
		if _, err := strconv.Atoi(name[at+1:]); err == nil {
			name = name[:at]
		}
	}
	values = map[string]float64{}
	for i := 2; i+1 < len(f); i += 2 {
		v, err := strconv.ParseFloat(f[i], 64)
		if err != nil {
			return "", nil, false
		}
		values[f[i+1]] = v
	}
	return name, values, true
}
