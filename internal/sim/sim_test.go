package sim

import (
	"io"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Seeds that every run plays, and how many of them a short one does.
const (
	fixedSeeds = 200
	shortSeeds = 20
	newSeeds   = 50
)

// TestSeeds plays random stories of a cluster: always the same, and some that
// were never told. BLIXARD_SEEDS=n plays n of them, BLIXARD_SEED=s only that one;
// BLIXARD_MINUTES=m plays so long stories, BLIXARD_TRACE=file writes one down.
func TestSeeds(t *testing.T) {
	o := Options{}
	if s := os.Getenv("BLIXARD_MINUTES"); s != "" {
		o.DurationMS = int64(number(t, s)) * 60_000
	}
	if s := os.Getenv("BLIXARD_SEED"); s != "" {
		o.Seed, o.Trace = number(t, s), traceTo(t)
		report(t, Run(o))
		return
	}
	n := uint64(fixedSeeds)
	if testing.Short() {
		n = shortSeeds
	}
	if s := os.Getenv("BLIXARD_SEEDS"); s != "" {
		n = number(t, s)
	}
	count := map[string]int{}
	play := func(seed uint64) {
		o.Seed = seed
		began := time.Now()
		res := Run(o)
		t.Logf("seed %d: %d s in %v, %d events", seed, res.VirtualMS/1000, time.Since(began), res.Events)
		report(t, res)
		for what, n := range res.Coverage {
			count[what] += n
		}
	}
	for seed := uint64(1); seed <= n && !t.Failed(); seed++ {
		play(seed)
	}
	if !testing.Short() {
		base := uint64(time.Now().UnixNano())
		t.Logf("new seeds from %d", base)
		for seed := base; seed < base+newSeeds && !t.Failed(); seed++ {
			play(seed)
		}
	}
	for _, what := range sorted(count) {
		t.Logf("%9d × %s", count[what], what)
	}
	if n < fixedSeeds || t.Failed() {
		return
	}
	for _, what := range Sometimes() {
		if count[what] == 0 {
			t.Errorf("in %d seeds there was never: %s", n, what)
		}
	}
}

func number(t *testing.T, s string) uint64 {
	t.Helper()
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatalf("BLIXARD_SEEDS and BLIXARD_SEED take a number: %v", err)
	}
	return n
}

func traceTo(t *testing.T) io.Writer {
	t.Helper()
	name := os.Getenv("BLIXARD_TRACE")
	if name == "" {
		return nil
	}
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

func report(t *testing.T, res Result) {
	t.Helper()
	if res.OK {
		return
	}
	t.Errorf("seed %d: %v\n%s\nplay it again: BLIXARD_SEED=%d go test ./internal/sim -run TestSeeds\nknobs: %s",
		res.Seed, res.Violation, strings.Join(res.Violation.Trace, "\n"), res.Seed, res.Options)
}
