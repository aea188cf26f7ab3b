package qemu

import (
	"bufio"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/vmm"
)

// lineGuest talks to the guest of testdata/callguest.
type lineGuest struct {
	conn net.Conn
	in   *bufio.Reader
}

func dialLines(tb testing.TB, d *Driver, ref vmm.Ref) *lineGuest {
	tb.Helper()
	conn, err := d.DialCall(tb.Context(), ref)
	if err != nil {
		tb.Fatal(err)
	}
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		tb.Fatal(err)
	}
	return &lineGuest{conn, bufio.NewReader(conn)}
}

func (g *lineGuest) say(tb testing.TB, line string) string {
	tb.Helper()
	if _, err := fmt.Fprintln(g.conn, line); err != nil {
		tb.Error(err)
	}
	answer, err := g.in.ReadString('\n')
	if err != nil {
		tb.Error(err)
	}
	return strings.TrimSuffix(answer, "\n")
}

func (g *lineGuest) close(tb testing.TB) {
	tb.Helper()
	if err := g.conn.Close(); err != nil {
		tb.Error(err)
	}
}

// benchTemplate saves a guest that has answered calls before, as a function's has
// when its runtime was warmed up.
func benchTemplate(tb testing.TB, d *Driver, spec vmm.Spec, calls int) vmm.Spec {
	tb.Helper()
	spec.Template = filepath.Join(tb.TempDir(), "template")
	if err := d.Start(tb.Context(), spec); err != nil {
		tb.Fatal(err)
	}
	guest := dialLines(tb, d, spec.Ref)
	for range calls {
		guest.say(tb, "get")
	}
	guest.say(tb, "set saved")
	if err := d.Snapshot(tb.Context(), spec.Ref); err != nil {
		tb.Fatal(err)
	}
	guest.close(tb)
	if err := d.Remove(tb.Context(), spec.Ref); err != nil {
		tb.Fatal(err)
	}
	return spec
}

// BenchmarkClone tells the parts of a cold start as the driver has them, in
// milliseconds at the median: "spawn" is Clone, which a pool hides.
//
//	go test ./internal/vmm/qemu -run xxx -bench Clone -benchtime 40x
func BenchmarkClone(b *testing.B) {
	options := Options{}
	if os.Getenv("BLIXARD_BENCH_LOG") != "" {
		options.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	d := benchDriver(b, options)
	began := time.Now()
	guestSpec := callSpec(b, vmm.Ref{Instance: "bench", Generation: 1})
	guestSpec.Cmdline = os.Getenv("BLIXARD_BENCH_CMDLINE")
	spec := benchTemplate(b, d, guestSpec, 200)
	var memory unix.Stat_t
	if err := unix.Stat(filepath.Join(spec.Template, fileMemory), &memory); err != nil {
		b.Fatal(err)
	}
	b.Logf("template built in %d ms, its memory takes %d MiB of the disk", time.Since(began).Milliseconds(), memory.Blocks*512>>20)
	parts := map[string][]float64{}
	var last time.Time
	lap := func(name string) {
		now := time.Now()
		parts[name] = append(parts[name], float64(now.Sub(last).Microseconds())/1000)
		last = now
	}
	b.ResetTimer()
	for i := range b.N {
		spec.Ref = vmm.Ref{Instance: "clone-" + strconv.Itoa(i), Generation: 1}
		first := time.Now()
		last = first
		if err := d.Clone(b.Context(), spec); err != nil {
			b.Fatal(err)
		}
		lap("clone-ms")
		guest := dialLines(b, d, spec.Ref)
		lap("dial-ms")
		if err := d.Resume(b.Context(), spec.Ref); err != nil {
			b.Fatal(err)
		}
		lap("resume-ms")
		pid := d.watch.get(spec.Ref).pid
		loaded := cpuMS(b, pid)
		if got := guest.say(b, "get"); got != "saved" {
			b.Fatalf("the clone says %q", got)
		}
		lap("answer-ms")
		parts["clone-cpu-ms"] = append(parts["clone-cpu-ms"], loaded)
		parts["answer-cpu-ms"] = append(parts["answer-cpu-ms"], cpuMS(b, pid)-loaded)
		parts["cold-ms"] = append(parts["cold-ms"], float64(last.Sub(first).Microseconds())/1000)
		parts["pooled-ms"] = append(parts["pooled-ms"], parts["resume-ms"][i]+parts["answer-ms"][i])
		guest.say(b, "get")
		lap("second-ms")
		for range 20 {
			guest.say(b, "get")
		}
		last = time.Now()
		guest.say(b, "get")
		lap("warm-ms")
		b.StopTimer()
		// A clone that has answered before it was paused has its code translated.
		if err := d.Pause(b.Context(), spec.Ref); err != nil {
			b.Fatal(err)
		}
		last = time.Now()
		if err := d.Resume(b.Context(), spec.Ref); err != nil {
			b.Fatal(err)
		}
		guest.say(b, "get")
		lap("primed-ms")
		private, shared, err := d.MemoryUse(b.Context(), spec.Ref)
		if err != nil {
			b.Fatal(err)
		}
		parts["private-MiB"] = append(parts["private-MiB"], float64(private)/(1<<20))
		parts["shared-MiB"] = append(parts["shared-MiB"], float64(shared)/(1<<20))
		guest.close(b)
		last = time.Now()
		if err := d.Remove(b.Context(), spec.Ref); err != nil {
			b.Fatal(err)
		}
		lap("remove-ms")
		b.StartTimer()
	}
	for name, values := range parts { //order:any each is reported by its name
		slices.Sort(values)
		b.ReportMetric(values[len(values)/2], name)
		if name == "cold-ms" || name == "pooled-ms" {
			b.ReportMetric(values[len(values)*99/100], "p99-"+name)
		}
	}
	b.ReportMetric(0, "ns/op")
}

// cpuMS is the processor time that a process has taken: unlike the time that
// passes, it says the same on a busy machine.
func cpuMS(tb testing.TB, pid int) float64 {
	tb.Helper()
	paths, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil || len(paths) == 0 {
		tb.Fatalf("no threads of process %d: %v", pid, err)
	}
	var ns float64
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // a thread that has ended
		}
		var own float64
		if _, err := fmt.Sscan(string(text), &own); err != nil {
			tb.Fatal(err)
		}
		ns += own
	}
	return ns / 1e6
}

func benchDriver(tb testing.TB, options Options) *Driver {
	tb.Helper()
	options.Root = tb.TempDir()
	d, err := New(options)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		refs, err := d.refs()
		if err != nil {
			tb.Error(err)
		}
		for _, ref := range refs {
			if err := d.Remove(tb.Context(), ref); err != nil {
				tb.Error(err)
			}
		}
		if err := d.Close(); err != nil {
			tb.Error(err)
		}
	})
	return d
}
