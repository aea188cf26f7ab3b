// Command bench measures Blixard against the numbers it wants to reach, and
// beside a peer where one is named. `make bench` runs it through scripts/bench.
//
// One JSON object per figure goes to stdout as soon as it is known, and one
// with all of them at the end; words go to stderr. A benchmark that cannot run
// says so in a figure with an error, and the exit code is 1.
//
// What is measured is real: server processes on loopback, logs on a real disk
// with real fsyncs, requests through the public API. Both sides of a comparison
// run in one invocation, taking turns, with the same load generator, the same
// number of connections spread over the nodes alike, and values of one size.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strings"
	"syscall"
	"time"
)

// settings are what the flags say.
type settings struct {
	root    string // of the tree
	blixard string // binary
	etcd    string // binary, "" for none
	dir     string // where clusters keep their data
	rounds  int
	seconds time.Duration // of one measurement
	clients []int
	pprof   int // port of node1's profiles, the next ones of node2's and node3's; 0 for none
}

// benchmark is one group of figures.
type benchmark struct {
	name string
	what string
	run  func(context.Context, settings, *recorder) error
	// asked: runs only when named.
	asked bool
}

var benchmarks = []benchmark{
	{name: "schedule", what: "decisions of the placement core on 10,000 nodes with 100,000 instances", run: benchSchedule},
	{name: "state", what: "size of 100,000 instances in memory, time of a snapshot, and whether writes stall during it", run: benchState},
	{name: "idle", what: "memory and CPU of three idle servers", run: benchIdle},
	{name: "create", what: "VM creates on 3 nodes beside puts of a 3-node etcd", run: benchCreate},
	{name: "failover", what: "time without writes after kill -9 of the leader, beside etcd", run: benchFailover},
	{name: "place", what: "from a create to a committed placement on 100 simulated nodes", run: benchPlace},
	{name: "demo", what: "seconds of make demo ONCE=1 (only when named)", run: benchDemo, asked: true},
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run() error {
	var s settings
	var clients string
	flag.StringVar(&s.root, "root", "..", "root of the source tree")
	flag.StringVar(&s.blixard, "blixard", "", "blixard binary (default: bin/blixard of the tree)")
	flag.StringVar(&s.etcd, "etcd", "etcd", "etcd binary, the peer")
	flag.StringVar(&s.dir, "dir", "", "directory on a real disk for the clusters' data (default: a new one in $TMPDIR)")
	flag.IntVar(&s.rounds, "rounds", 3, "how often each side of a comparison takes its turn")
	flag.DurationVar(&s.seconds, "time", 3*time.Second, "length of one measurement")
	flag.StringVar(&clients, "clients", "1,10,100,1000", "numbers of concurrent clients of the create benchmark")
	flag.IntVar(&s.pprof, "pprof", 0, "port on loopback where node1 serves its profiles, node2 on the next and so on, to look inside while it runs")
	profile := flag.String("cpuprofile", "", "file for a CPU profile of the load generator")
	flag.Usage = usage
	flag.Parse()
	for _, text := range strings.Split(clients, ",") {
		var n int
		if _, err := fmt.Sscanf(text, "%d", &n); err != nil || n < 1 || n > 10_000 {
			return fmt.Errorf("reading --clients: %q is not a number from 1 to 10000", text)
		}
		s.clients = append(s.clients, n)
	}
	if s.rounds < 1 || s.seconds <= 0 {
		return fmt.Errorf("--rounds and --time must be positive")
	}
	chosen, err := choose(flag.Args())
	if err != nil {
		return err
	}
	if s.root, err = filepath.Abs(s.root); err != nil {
		return fmt.Errorf("finding the tree: %w", err)
	}
	if s.blixard == "" {
		s.blixard = filepath.Join(s.root, "bin", "blixard")
	}
	if s.dir == "" {
		if s.dir, err = os.MkdirTemp("", "blixard-bench-"); err != nil {
			return fmt.Errorf("making a directory for the data: %w", err)
		}
		defer remove(s.dir)
	}
	if *profile != "" {
		f, err := os.Create(*profile)
		if err != nil {
			return fmt.Errorf("making the profile: %w", err)
		}
		defer f.Close() //nolint:errcheck // a profile that is cut short shows itself
		if err := pprof.StartCPUProfile(f); err != nil {
			return fmt.Errorf("starting the profile: %w", err)
		}
		defer pprof.StopCPUProfile()
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	m, err := look(s)
	if err != nil {
		return err
	}
	return measure(ctx, s, chosen, newRecorder(os.Stdout, m))
}

// measure runs the benchmarks one after the other.
func measure(ctx context.Context, s settings, chosen []benchmark, r *recorder) error {
	var failed []string
	for _, b := range chosen {
		say("%s: %s", b.name, b.what)
		r.bench = b.name
		if err := b.run(ctx, s, r); err != nil {
			if ctx.Err() != nil {
				return fmt.Errorf("interrupted: %w", ctx.Err())
			}
			say("%s failed: %v", b.name, err)
			r.missing(err)
			failed = append(failed, b.name)
		}
	}
	if err := r.finish(); err != nil {
		return err
	}
	if len(failed) > 0 {
		return fmt.Errorf("not measured to the end: %s", strings.Join(failed, ", "))
	}
	return nil
}

func choose(names []string) ([]benchmark, error) {
	var out []benchmark
	for _, b := range benchmarks {
		if slices.Contains(names, b.name) || len(names) == 0 && !b.asked {
			out = append(out, b)
		}
	}
	for _, name := range names {
		if !slices.ContainsFunc(benchmarks, func(b benchmark) bool { return b.name == name }) {
			return nil, fmt.Errorf("there is no benchmark named %q (known: %s)", name, strings.Join(known(), ", "))
		}
	}
	return out, nil
}

func known() []string {
	var names []string
	for _, b := range benchmarks {
		names = append(names, b.name)
	}
	return names
}

func usage() {
	fmt.Fprintln(os.Stderr, "usage: scripts/bench [flags] [name…]    (no name: all but demo)")
	for _, b := range benchmarks {
		fmt.Fprintf(os.Stderr, "  %-10s%s\n", b.name, b.what)
	}
	flag.PrintDefaults()
}

func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%s "+format+"\n", append([]any{time.Now().Format("15:04:05")}, args...)...)
}

func remove(dir string) {
	if err := os.RemoveAll(dir); err != nil {
		say("removing %s: %v", dir, err)
	}
}
