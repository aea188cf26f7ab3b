package replica_test

import (
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"testing"
	"testing/cryptotest"
)

// Seeds that every run plays, and how many more a full run plays.
const (
	shortSeeds = 12
	fullSeeds  = 100
)

// TestSeeds plays random stories of a cluster. BLIXARD_SEEDS=n plays n of them,
// BLIXARD_SEED=s only that one.
func TestSeeds(t *testing.T) {
	if s := os.Getenv("BLIXARD_SEED"); s != "" {
		play(t, number(t, s)).report(t)
		return
	}
	n, count := uint64(fullSeeds), map[string]int{}
	if testing.Short() {
		n = shortSeeds
	}
	if s := os.Getenv("BLIXARD_SEEDS"); s != "" {
		n = number(t, s)
	}
	for seed := uint64(1); seed <= n && !t.Failed(); seed++ {
		s := play(t, seed)
		s.report(t)
		for _, what := range sorted(s.world.count) {
			count[what] += s.world.count[what]
		}
	}
	for _, what := range sorted(count) {
		t.Logf("%8d × %s", count[what], what)
	}
	if n < fullSeeds || t.Failed() {
		return
	}
	for _, what := range sometimes() {
		if count[what] == 0 {
			t.Errorf("in %d seeds there was never: %s", n, what)
		}
	}
}

// sometimes is what must have happened in a full run, or it proves little.
func sometimes() []string {
	out := []string{
		"leader", "snapshot written", "snapshot installed", "fence", "guest start", "acknowledged", "acknowledged after a retry", "linearizable read",
		"join", "removal", "vote crash", "instance Running", "instance Stopped", "instance Failed", "instance Lost",
	}
	for _, k := range faultKinds {
		out = append(out, k.name)
	}
	return out
}

// TestSameSeedSameStory keeps chance, clocks and the order of maps out.
func TestSameSeedSameStory(t *testing.T) {
	for seed := uint64(1); seed <= 4; seed++ {
		a, b := play(t, seed), play(t, seed)
		if a.world.hash.Sum64() != b.world.hash.Sum64() || a.world.steps != b.world.steps {
			t.Errorf("seed %d tells two stories: %x after %d events, %x after %d", seed, a.world.hash.Sum64(), a.world.steps, b.world.hash.Sum64(), b.world.steps)
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

// story is a seed that was played.
type story struct {
	world *world
	err   error
}

// play runs one seed. A panic is a finding like any other.
func play(t *testing.T, seed uint64) (s story) {
	t.Helper()
	cryptotest.SetGlobalRandom(t, seed)
	s.world = newWorld(seed)
	defer func() {
		switch p := recover().(type) {
		case nil:
		case violation:
			s.err = p
		default:
			s.err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	s.world.run()
	return s
}

func (s story) report(t *testing.T) {
	t.Helper()
	if s.err == nil {
		return
	}
	t.Errorf("seed %d fails after %d events: %v\n%s\nplay it again: BLIXARD_SEED=%d go test ./internal/replica -run TestSeeds\noptions: %+v",
		s.world.seed, s.world.steps, s.err, s.world.trace(), s.world.seed, s.world.opt)
}
