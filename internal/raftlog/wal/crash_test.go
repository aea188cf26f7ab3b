package wal_test

import (
	"errors"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/blixard/blixard/internal/raftlog"
	"github.com/blixard/blixard/internal/raftlog/raftlogtest"
	"github.com/blixard/blixard/internal/raftlog/wal"
	"github.com/blixard/blixard/internal/raftlog/wal/memfs"
)

// TestCrashAnywhere: before every single change to the file system, whatever
// of the unsynced ones a crash leaves, Open finds all that was acknowledged
// and nothing that was not saved; and so it does when it crashes itself.
func TestCrashAnywhere(t *testing.T) {
	seeds, steps := uint64(6), 40
	if testing.Short() {
		seeds, steps = 2, 30
	}
	torn := 0
	for seed := range seeds {
		m := newModel(seed)
		crashes := rand.New(rand.NewPCG(seed, 2))
		var crash func(fs *memfs.FS, op string, depth int)
		crash = func(fs *memfs.FS, op string, depth int) {
			for kind := range memfs.Kinds {
				image := fs.Crash(crashes, kind)
				after := image.Crash(crashes, memfs.All)
				if depth < 1 && crashes.IntN(10) == 0 {
					after.Hook = func(op string) { crash(after, "recovery, "+op, depth+1) }
				}
				opened, err := m.check(after)
				after.Hook = nil
				if err != nil {
					t.Fatalf("seed %d: crash before %s (survivors %d): %v\nhistory:\n%s", seed, op, kind, err, strings.Join(m.trace, "\n"))
				}
				if opened.Repaired != "" {
					torn++
				}
				goOn(t, after, opened)
			}
		}
		m.fs.Hook = func(op string) { crash(m.fs, op, 0) }
		if err := m.open(); err != nil {
			t.Fatal(err)
		}
		for range steps {
			if err := m.step(); err != nil {
				t.Fatalf("seed %d: %v\nhistory:\n%s", seed, err, strings.Join(m.trace, "\n"))
			}
		}
	}
	if torn == 0 {
		t.Error("no crash left a torn record: the test does not test repair")
	}
}

// goOn checks that a recovered log takes another entry and keeps it, and that
// what was repaired is not repaired again.
func goOn(t *testing.T, fs *memfs.FS, opened raftlog.Opened) {
	t.Helper()
	next := opened.Snapshot.GetIndex() + uint64(len(opened.Entries)) + 1
	if err := opened.Log.Save(nil, raftlogtest.Entries(99, next, next), true); err != nil {
		t.Fatalf("saving after recovery: %v", err)
	}
	again, err := wal.Open(fs.Crash(rand.New(rand.NewPCG(1, 1)), memfs.None), dir, options())
	if err != nil {
		t.Fatalf("opening once more: %v", err)
	}
	if got := again.Snapshot.GetIndex() + uint64(len(again.Entries)); got != next || again.Repaired != "" {
		t.Fatalf("the log ends at %d (%s), want %d", got, again.Repaired, next)
	}
}

// TestBitFlips: whatever bit of a file turns over, Open either refuses with
// ErrCorrupt or returns all that was acknowledged, unchanged.
func TestBitFlips(t *testing.T) {
	refused, fellBack, sound := 0, 0, 0
	seeds := uint64(6)
	if testing.Short() {
		seeds = 4
	}
	for seed := range seeds {
		m := newModel(100 + seed)
		if err := m.open(); err != nil {
			t.Fatal(err)
		}
		for range 40 {
			if err := m.step(); err != nil {
				t.Fatal(err)
			}
		}
		// End with something acknowledged that a careless reader takes for torn.
		next := m.now
		next.term, next.entries = max(next.term, 1), nil
		zeros := raftlogtest.Entries(next.term, m.now.last()+1, m.now.last()+1)
		zeros[0].Data = make([]byte, 3*memfs.Sector)
		next.entries = append(append(next.entries, m.now.entries...), zeros...)
		m.terms[zeros[0].GetIndex()], m.data[zeros[0].GetIndex()] = next.term, zeros[0].Data
		if err := m.call(next, true, "zeros", func() error { return m.log.Save(nil, zeros, true) }); err != nil {
			t.Fatal(err)
		}
		m.now.term, m.now.vote = hardStateOf(t, m)
		rng := rand.New(rand.NewPCG(seed, 3))
		for _, f := range flips(m.fs, rng) {
			image := m.fs.Crash(rng, memfs.All)
			image.Flip(f.name, f.bit)
			opened, err := wal.Open(image, dir, options())
			switch {
			case errors.Is(err, raftlog.ErrCorrupt):
				refused++
				if !strings.Contains(err.Error(), "offset") || !strings.Contains(err.Error(), "blixard cluster recover") {
					t.Fatalf("the error does not say where and what to do: %v", err)
				}
				continue
			case err != nil:
				t.Fatalf("seed %d, bit %d of %s: %v", seed, f.bit, f.name, err)
			}
			if err := m.covers(opened); err != nil {
				t.Fatalf("seed %d, bit %d of %s: %v (%s)", seed, f.bit, f.name, err, opened.Repaired)
			}
			switch {
			case strings.Contains(opened.Repaired, "cut off"):
				t.Fatalf("seed %d, bit %d of %s: taken for torn: %s", seed, f.bit, f.name, opened.Repaired)
			case opened.Repaired != "":
				fellBack++
			default:
				sound++
			}
		}
	}
	t.Logf("%d refused, %d fell back on an older snapshot, %d did not matter", refused, fellBack, sound)
	if refused == 0 || fellBack == 0 || sound == 0 {
		t.Error("one kind of outcome was never seen")
	}
}

func hardStateOf(t *testing.T, m *model) (term, vote uint64) {
	t.Helper()
	opened, err := wal.Open(m.fs.Crash(m.rng, memfs.All), dir, options())
	if err != nil {
		t.Fatal(err)
	}
	return opened.HardState.GetTerm(), opened.HardState.GetVote()
}

type flip struct {
	name string
	bit  int
}

// flips are random bits of every file, and every few of the last segment.
func flips(fs *memfs.FS, rng *rand.Rand) []flip {
	var out []flip
	last := ""
	for _, name := range fs.Names() {
		if n := fs.Size(name); n > 0 {
			for range 80 {
				out = append(out, flip{name, rng.IntN(8 * n)})
			}
		}
		if filepath.Ext(name) == ".wal" {
			last = name
		}
	}
	for bit := rng.IntN(97); bit < 8*fs.Size(last); bit += 97 {
		out = append(out, flip{last, bit})
	}
	return out
}

// TestFaults: each named operation fails once at every place it occurs. The
// log then refuses all further calls, and after a restart nothing acknowledged
// is missing.
func TestFaults(t *testing.T) {
	seen := map[string]int{}
	for _, cause := range []error{syscall.EIO, syscall.ENOSPC} {
		for seed := range uint64(3) {
			for at := 0; ; at++ {
				m := newModel(200 + seed)
				count, failed := 0, ""
				m.fs.Fault = func(op string) error {
					count++
					if count-1 != at {
						return nil
					}
					failed = op
					return cause
				}
				err := m.open()
				for i := 0; err == nil && i < 25; i++ {
					err = m.step()
				}
				if failed == "" {
					break
				}
				seen[failed]++
				if !errors.Is(err, cause) {
					t.Fatalf("seed %d: %s failed, but the call answers %v", seed, failed, err)
				}
				if m.log != nil && m.trace != nil && m.trace[len(m.trace)-1] != "reopen" {
					if again := m.log.Save(nil, nil, true); !errors.Is(again, cause) {
						t.Fatalf("seed %d: after %s failed, Save answers %v", seed, failed, again)
					}
				}
				// The next process may find what never got to disk in the page
				// cache, go on from it, and then lose power.
				restarted := m.fs
				restarted.Reboot()
				if opened, err := m.check(restarted); err != nil {
					t.Fatalf("seed %d: after %s failed: %v\n%s", seed, failed, err, strings.Join(m.trace, "\n"))
				} else {
					goOn(t, restarted, opened)
				}
			}
		}
	}
	t.Logf("failures: %v", seen)
	for _, op := range []string{
		"wal.create", "wal.allocate", "wal.write", "wal.sync", "wal.rename", "wal.remove", "snap.create",
		"snap.write", "snap.sync", "snap.rename", "snap.remove", "dir.sync", "dir.create", "lock.create",
	} {
		if seen[op] == 0 {
			t.Errorf("%s never failed", op)
		}
	}
}

// TestFullDisk: the log ends with a clear error, and goes on after space was
// made, with all that was acknowledged.
func TestFullDisk(t *testing.T) {
	fs := memfs.New()
	fs.Space = 40 * memfs.Sector
	opened, err := wal.Open(fs, dir, options())
	if err != nil {
		t.Fatal(err)
	}
	saved := uint64(0)
	for err == nil {
		if err = opened.Log.Save(nil, raftlogtest.Entries(1, saved+1, saved+1), true); err == nil {
			saved++
		}
	}
	if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "is full: free space") {
		t.Fatalf("a full disk is reported as: %v", err)
	}
	if again := opened.Log.Save(nil, nil, true); !errors.Is(again, syscall.ENOSPC) {
		t.Fatalf("after a full disk, Save answers %v", again)
	}
	if err := opened.Log.Close(); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("after a full disk, Close answers %v", err)
	}
	// Still full: opening works, as it needs no room.
	opened, err = wal.Open(fs, dir, options())
	if err != nil {
		t.Fatal(err)
	}
	if err := opened.Log.Close(); err != nil {
		t.Fatal(err)
	}
	fs.Space = 0
	opened, err = wal.Open(fs, dir, options())
	if err != nil {
		t.Fatal(err)
	}
	if !raftlogtest.SameEntries(opened.Entries, raftlogtest.Entries(1, 1, saved)) {
		t.Fatalf("%d entries after the disk had room again, want %d", len(opened.Entries), saved)
	}
	goOn(t, fs, opened)
}
