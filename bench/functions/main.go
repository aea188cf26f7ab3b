// Command functions measures what calls of functions cost, cold and warm, with
// real daemons and real guests, and prints one line of JSON. `make
// bench-functions` runs it through scripts/bench-functions; what each figure is
// and how it comes about is in docs/performance-functions.md. Words go to
// stderr. A figure that could not be measured is left out, the reason is among
// the words and the exit code is 1.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// settings are what the flags say.
type settings struct {
	root    string // of the tree
	blixard string // binary
	dir     string // for everything that is made
	calls   int    // cold ones of each kind
	clones  int    // idle ones
	seconds time.Duration
	pprof   string
	only    string
}

// figures are what the line of JSON holds.
type figures map[string]any

// put keeps a number with as many digits as mean something.
func (f figures) put(name string, value float64) {
	f[name] = math.Round(value*1000) / 1000
}

// part is a group of figures.
type part struct {
	name, what string
	run        func(context.Context, *bench) error
}

// bench is one run.
type bench struct {
	settings
	code sources
	out  figures
	// stubMS is the median of the transfer of a call to the stub: the host's part.
	stubMS float64
}

var parts = []part{
	{"stub", "calls through the gateway to a stub instance, and to the stub itself", benchStub},
	{"cold", "cold calls with clones in the pool", benchCold},
	{"nopool", "cold calls without a pool, 20 of them at once, and from 0 to 10 instances and back", benchNoPool},
	{"warm", "warm calls of a guest", benchWarm},
	{"idle", "memory of idle clones", benchIdle},
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == stubCommand {
		fail(runStub())
		return
	}
	if len(os.Args) > 1 && os.Args[1] == gatewayCommand {
		fail(runGateway(os.Args[2]))
		return
	}
	fail(run())
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench-functions:", err)
		os.Exit(1)
	}
}

func run() error {
	var s settings
	flag.StringVar(&s.root, "root", ".", "root of the source tree")
	flag.StringVar(&s.blixard, "blixard", "", "blixard binary (default: bin/blixard of the tree)")
	flag.IntVar(&s.calls, "calls", 100, "cold calls of each kind")
	flag.IntVar(&s.clones, "clones", 100, "idle clones whose memory is measured")
	flag.DurationVar(&s.seconds, "time", 3*time.Second, "length of one measurement of warm calls")
	flag.StringVar(&s.pprof, "pprof", "", "host:port where the daemon serves its profiles meanwhile")
	flag.StringVar(&s.only, "function", "", "measure cold calls of this function only (lean, leanhttp, lambda, web, wasm, nix)")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: scripts/bench-functions [flags] [part…]    (no part: all)")
		for _, p := range parts {
			fmt.Fprintf(os.Stderr, "  %-8s%s\n", p.name, p.what)
		}
		flag.PrintDefaults()
	}
	flag.Parse()
	for _, name := range flag.Args() {
		if !slices.ContainsFunc(parts, func(p part) bool { return p.name == name }) {
			return fmt.Errorf("there is no part named %q (--help shows them)", name)
		}
	}
	var err error
	if s.root, err = filepath.Abs(s.root); err != nil {
		return fmt.Errorf("finding the tree: %w", err)
	}
	if s.blixard == "" {
		s.blixard = filepath.Join(s.root, "bin", "blixard")
	}
	// Sockets are below it, whose names have to be short.
	if s.dir, err = os.MkdirTemp("", "bf"); err != nil {
		return fmt.Errorf("making a directory for the data: %w", err)
	}
	defer func() {
		if err := os.RemoveAll(s.dir); err != nil {
			say("removing %s: %v", s.dir, err)
		}
	}()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	return measure(ctx, s, flag.Args())
}

func measure(ctx context.Context, s settings, chosen []string) error {
	b := &bench{settings: s, out: figures{}}
	acceleration, err := acceleration(s)
	if err != nil {
		return err
	}
	b.out["date"], b.out["cpus"], b.out["load"], b.out["acceleration"] = time.Now().UTC().Format(time.RFC3339), runtime.NumCPU(), loadNow(), acceleration
	say("building the functions")
	if b.code, err = compile(ctx, s); err != nil {
		return err
	}
	var failed []string
	for _, p := range parts {
		if len(chosen) > 0 && !slices.Contains(chosen, p.name) {
			continue
		}
		say("%s: %s (load %s)", p.name, p.what, loadNow())
		if err := p.run(ctx, b); err != nil {
			if ctx.Err() != nil {
				return fmt.Errorf("interrupted: %w", ctx.Err())
			}
			say("%s failed: %v", p.name, err)
			failed = append(failed, p.name)
		}
	}
	b.out["load_end"] = loadNow()
	line, err := json.Marshal(b.out)
	if err != nil {
		return fmt.Errorf("writing the figures: %w", err)
	}
	fmt.Println(string(line))
	if len(failed) > 0 {
		return fmt.Errorf("not measured to the end: %s", strings.Join(failed, ", "))
	}
	return nil
}

// acceleration is what guests run with here, as the daemon finds it.
func acceleration(s settings) (string, error) {
	out, err := exec.Command(s.blixard, "version").Output()
	if err != nil {
		return "", fmt.Errorf("running %s (make build makes it): %w", s.blixard, err)
	}
	say("%s", strings.TrimSpace(string(out)))
	return probe(s)
}

// loadNow is the load average of the last minute.
func loadNow() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Fields(string(b))[0]
}

func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%s "+format+"\n", append([]any{time.Now().Format("15:04:05")}, args...)...)
}
