package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/term"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/sim"
)

// soak is many seeds, each in one of a few worker processes: raft draws its
// election jitter from a source that belongs to the process, so only one
// simulation can run in each at a time.
type soak struct {
	flags    simFlags
	count    uint64 // 0: until stopped
	from     uint64
	parallel int
	coverage bool

	mu      sync.Mutex
	next    uint64
	began   time.Time
	seeds   uint64
	events  uint64
	virtual float64
	covered map[string]int
	failed  *shownResult
}

// soakReport is what `-o json` shows.
type soakReport struct {
	OK             bool           `json:"ok"`
	From           uint64         `json:"from"`
	Seeds          uint64         `json:"seeds"`
	Events         uint64         `json:"events"`
	VirtualSeconds float64        `json:"virtual_seconds"`
	ElapsedSeconds float64        `json:"elapsed_seconds"`
	Coverage       map[string]int `json:"coverage"`
	// Failed is the first seed that broke something, Replay the command that
	// plays it again.
	Failed *shownResult `json:"failed"`
	Replay string       `json:"replay,omitempty"`
}

func simSoakCommand() *cobra.Command {
	s := &soak{covered: map[string]int{}}
	cmd := &cobra.Command{
		Use: "soak", Short: "Play many seeds, on all cores, until one fails",
		Long: `Play seed after seed in worker processes, and stop at the first that breaks
something (exit code 1) with the command that plays it again. Without --seeds it
goes on until Ctrl-C. What happened how often is shown at the end: a fault that
never happened has tested nothing.`,
		Example: "  blixard sim soak --seeds 1000 --hours 1\n  blixard sim soak --from 100000",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return s.run(cmd) },
	}
	fl := cmd.Flags()
	fl.Uint64Var(&s.count, "seeds", 0, "how many seeds; 0: until Ctrl-C")
	fl.Uint64Var(&s.from, "from", 0, "the first seed; 0: one that was hardly ever played before, and is shown")
	fl.IntVar(&s.parallel, "parallel", runtime.NumCPU(), "worker processes")
	fl.BoolVar(&s.coverage, "coverage", true, "show what happened how often")
	s.flags.bind(cmd, sim.Profiles())
	return cmd
}

func (s *soak) run(cmd *cobra.Command) error {
	if _, err := s.flags.options(sim.Profiles()); err != nil {
		return err
	}
	if s.parallel < 1 || s.parallel > 1024 {
		return blixard.Invalid("--parallel", "", "--parallel is %d; it must be between 1 and 1024", s.parallel)
	}
	if s.from == 0 {
		s.from = uint64(time.Now().UnixMilli()) // recent enough to be new
	}
	s.next, s.began = s.from, time.Now()
	words := cmd.ErrOrStderr()
	fmt.Fprintf(words, "seeds from %d on, %d at a time%s\n", s.from, s.parallel, s.flags.words())
	ctx, stop := context.WithCancel(cmd.Context())
	defer stop()
	g, ctx := errgroup.WithContext(ctx)
	for range s.parallel {
		g.Go(func() error { return s.worker(ctx, words, stop) })
	}
	shownAll := make(chan struct{})
	go func() {
		defer close(shownAll)
		s.progress(ctx, words)
	}()
	err := g.Wait()
	stop()
	<-shownAll
	return s.finish(cmd, err)
}

// worker plays seeds in one process, until there are no more.
func (s *soak) worker(ctx context.Context, words io.Writer, stop func()) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("finding this program: %w", err)
	}
	var last bytes.Buffer // what the worker says before it dies
	w := exec.CommandContext(ctx, self, append([]string{"sim", "worker"}, strings.Fields(s.flags.words())...)...)
	w.Stderr = &last
	w.Cancel = func() error { return w.Process.Kill() }
	in, err := w.StdinPipe()
	if err != nil {
		return fmt.Errorf("starting a worker: %w", err)
	}
	out, err := w.StdoutPipe()
	if err != nil {
		return fmt.Errorf("starting a worker: %w", err)
	}
	if err := w.Start(); err != nil {
		return fmt.Errorf("starting a worker: %w", err)
	}
	answers := json.NewDecoder(bufio.NewReader(out))
	for ctx.Err() == nil {
		seed, ok := s.take()
		if !ok {
			break
		}
		r := shownResult{Seed: seed}
		_, err := fmt.Fprintln(in, seed)
		if err == nil {
			err = answers.Decode(&r)
		}
		if ctx.Err() != nil {
			break
		}
		if err != nil { // the process died: that seed did it
			text := fmt.Sprintf("%s\n%v", last.String(), errors.Join(w.Wait(), err))
			r.Violation = &sim.Violation{Invariant: "panic", Detail: "the process died: " + firstLine(text), Trace: lines(text, 60)}
		}
		if !s.note(r) {
			fmt.Fprintf(words, "seed %d failed\n", seed)
			stop()
			break
		}
	}
	closed := in.Close()
	waited := w.Wait()
	if ended := ctx.Err() != nil || s.broke(); ended {
		return nil
	}
	return errors.Join(closed, waited)
}

// broke tells whether a seed has failed.
func (s *soak) broke() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed != nil
}

func firstLine(text string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(text), "\n")
	return line
}

func lines(text string, most int) []string {
	all := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return all[:min(len(all), most)]
}

// take gives out the next seed.
func (s *soak) take() (uint64, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed != nil || s.count > 0 && s.next-s.from >= s.count {
		return 0, false
	}
	s.next++
	return s.next - 1, true
}

// note adds a result; false if it is the end of the soak.
func (s *soak) note(r shownResult) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seeds++
	s.events += r.Events
	s.virtual += r.VirtualSeconds
	for k, n := range r.Coverage {
		s.covered[k] += n
	}
	if !r.OK && s.failed == nil {
		s.failed = &r
	}
	return r.OK
}

// progress says now and then how far it is.
func (s *soak) progress(ctx context.Context, words io.Writer) {
	every, end := 30*time.Second, "\n"
	f, ok := words.(*os.File)
	if live := ok && term.IsTerminal(int(f.Fd())); live {
		every, end = time.Second, "\r"
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			s.mu.Lock()
			elapsed := time.Since(s.began).Seconds()
			fmt.Fprintf(words, "%d seeds, %.1f virtual hours, %.0f × real time, %.1fM events, all sound   %s", s.seeds, s.virtual/3600, s.virtual/elapsed, float64(s.events)/1e6, end)
			s.mu.Unlock()
		}
	}
}

// finish shows what came of it all.
func (s *soak) finish(cmd *cobra.Command, failed error) error {
	if failed != nil {
		return failed
	}
	r := soakReport{
		OK: s.failed == nil, From: s.from, Seeds: s.seeds, Events: s.events, VirtualSeconds: s.virtual, ElapsedSeconds: float64(time.Since(s.began).Milliseconds()) / 1000,
		Coverage: s.covered, Failed: s.failed,
	}
	if s.failed != nil {
		r.Replay = fmt.Sprintf("blixard sim run --seed %d%s --trace", s.failed.Seed, s.flags.words())
	}
	done, err := structured(cmd, r)
	if err == nil && !done {
		err = s.show(cmd.OutOrStdout(), r)
	}
	switch {
	case err != nil:
		return err
	case s.failed != nil:
		return broken(fmt.Sprintf("seed %d", s.failed.Seed), s.failed.Violation)
	case s.count > 0 && s.seeds < s.count:
		return cmd.Context().Err() // Ctrl-C before all were played
	}
	return nil
}

func (s *soak) show(w io.Writer, r soakReport) error {
	if s.coverage && len(r.Coverage) > 0 {
		rows := [][]string{{"WHAT HAPPENED", "TIMES"}}
		for _, k := range slices.Sorted(maps.Keys(r.Coverage)) {
			rows = append(rows, []string{k, strconv.Itoa(r.Coverage[k])})
		}
		if err := columns(w, rows); err != nil {
			return err
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintf(w, "%d seeds from %d on: %.1f virtual hours in %.1f s (%.0f × real time), %d events\n",
		r.Seeds, r.From, r.VirtualSeconds/3600, r.ElapsedSeconds, r.VirtualSeconds/max(r.ElapsedSeconds, 0.001), r.Events)
	if r.Failed == nil {
		return nil
	}
	if err := writeTrace(w, r.Failed.Violation); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\nto play it again:  %s\n", r.Replay)
	return err
}

// simWorkerCommand plays the seeds it reads, one per line, and answers each
// with a line of JSON.
func simWorkerCommand() *cobra.Command {
	f := new(simFlags)
	cmd := &cobra.Command{
		Use: "worker", Short: "Play the seeds of standard input", Args: cobra.NoArgs, Hidden: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o, err := f.options(sim.Profiles())
			if err != nil {
				return err
			}
			seeds, out := bufio.NewScanner(cmd.InOrStdin()), json.NewEncoder(cmd.OutOrStdout())
			for seeds.Scan() {
				if o.Seed, err = strconv.ParseUint(seeds.Text(), 10, 64); err != nil {
					return blixard.Invalid("seed", "", "%q is no seed", seeds.Text())
				}
				began := time.Now()
				if err := out.Encode(shown(sim.Run(o), time.Since(began))); err != nil {
					return fmt.Errorf("answering: %w", err)
				}
			}
			return seeds.Err()
		},
	}
	f.bind(cmd, sim.Profiles())
	return cmd
}
