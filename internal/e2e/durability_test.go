package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// A disk that fills up ends the node that has it, with words about which disk
// and what to do; the others go on, nothing acknowledged is lost, and the node
// comes back when there is space.
func TestDiskFull(t *testing.T) {
	needs(t, true)
	t.Parallel()
	t.Run("one of three", func(t *testing.T) { diskFull(t, 3) })
	t.Run("the only one", func(t *testing.T) { diskFull(t, 1) })
}

func diskFull(t *testing.T, n int) {
	t.Parallel()
	c := New(t, n)
	full := c.Nodes[0] // the founder, which leads at first
	tmpfs(t, full.Dir, "64m")
	c.start(full)
	c.Token = c.readToken()
	for _, node := range c.Nodes[1:] {
		c.Join(node)
	}
	c.waitMembers(n, n, 30*time.Second)

	w := &writer{c: c, prefix: "vm", spec: &blixardv1.VMSpec{Env: map[string]string{"FILL": strings.Repeat("x", 12<<10)}}}
	stop := w.begin(6, c.Nodes...)
	c.Eventually("some creates", 20*time.Second, func() error {
		if got := w.count(); got < 100 {
			return fmt.Errorf("%d", got)
		}
		return nil
	})
	ballast := filepath.Join(full.Dir, "ballast")
	fill(t, ballast)
	c.ends(full, 60*time.Second, full.Dir, "is full", "free space there and start again", "nothing that was acknowledged is lost")

	if n > 1 {
		before := w.count()
		c.Eventually("the others go on", 15*time.Second, func() error {
			if got := w.count(); got < before+20 {
				return fmt.Errorf("%d creates since the disk was full", got-before)
			}
			return nil
		})
	}
	stop()

	// Again while it is still full: it may serve until it has to write more, or
	// refuse; either way it says why it ends, and nothing breaks.
	c.forgetLog(full)
	c.start(full)
	select {
	case <-full.exited:
		c.ends(full, time.Second, full.Dir, "is full")
	case <-time.After(3 * time.Second):
		c.Kill(full)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	c.start(full)
	c.waitMembers(n, n, 30*time.Second)
	w.check(full)
	if n > 1 {
		c.sameState(t)
	}
	t.Logf("%d creates acknowledged, %d not", w.count(), w.failed.Load())

	if n == 1 {
		c.Kill(full)
		c.forgetLog(full)
		// The watchdog writes its log there. It outlives the server by a lease and ten
		// seconds.
		var err error
		for late := time.Now().Add(40 * time.Second); ; <-time.After(50 * time.Millisecond) {
			if err = syscall.Mount("", full.Dir, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); !errors.Is(err, syscall.EBUSY) || time.Now().After(late) {
				break
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		c.refuses(full, full.Dir, "read-only file system", "mount it read-write")
		if err := syscall.Mount("", full.Dir, "", syscall.MS_REMOUNT, ""); err != nil {
			t.Fatal(err)
		}
		c.start(full)
		w.check(full)
	}
}

// fill takes all space that is left.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	block := make([]byte, 64<<10)
	for size := len(block); size >= 512; {
		if _, err := f.Write(block[:size]); errors.Is(err, syscall.ENOSPC) {
			size /= 2
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// A stopped node whose log or snapshot was damaged, cut or taken away refuses
// to start with words; what they say works.
func TestDamagedLog(t *testing.T) {
	needs(t, false)
	t.Parallel()
	c := Start(t, 3, configured(t, "[consensus]\nsnapshot_threshold = 40\n")...)
	w := &writer{c: c, prefix: "vm"}
	for c.waitMembers(3, 3, 30*time.Second); w.count() < 100; {
		cl := c.Client()
		w.create(t.Context(), cl)
		cl.Close()
	}
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1))
	for _, victim := range []*Node{c.Nodes[1], c.Nodes[0]} { // a node that joined, and the founder
		other := c.Nodes[2]
		raft, kept := filepath.Join(victim.Dir, "raft"), victim.Dir+".kept"
		c.Stop(victim)
		copyDir(t, raft, kept)
		for _, d := range damages {
			c.forgetLog(victim)
			file := newest(t, raft, d.ext)
			what := d.do(t, rng, file)
			c.start(victim)
			if ended := c.endsOrServes(victim); ended {
				log := c.log(victim)
				for _, word := range []string{raft, "damaged", "blixard cluster join --replace", "blixard cluster token create"} {
					if !strings.Contains(log, word) {
						t.Errorf("%s of %s (%s): refused without saying %q:\n%s", d.name, victim.Name, what, word, tail(log))
					}
				}
			} else {
				if d.refused {
					t.Errorf("%s of %s (%s): it started all the same:\n%s", d.name, victim.Name, what, tail(c.log(victim)))
				}
				c.Kill(victim)
			}
			restoreDir(t, kept, raft)
		}

		c.forgetLog(victim)
		if err := os.RemoveAll(raft); err != nil {
			t.Fatal(err)
		}
		c.refuses(victim, "raft log of "+victim.Name+" is gone", "blixard cluster join --replace")
		c.refuses(victim, "raft log of "+victim.Name+" is gone") // and again: the refusal made nothing
		out := c.joinAgain(victim, other)
		if !strings.Contains(out, "is a node of cluster") {
			t.Errorf("joining again said %q", out)
		}
		c.start(victim)
		c.waitMembers(3, 3, 40*time.Second)
		w.check(victim)
		c.sameState(t)
	}

	// Damaged, then joined again without removing anything by hand.
	victim := c.Nodes[1]
	c.Stop(victim)
	damages[0].do(t, rng, newest(t, filepath.Join(victim.Dir, "raft"), ".wal"))
	c.forgetLog(victim)
	c.refuses(victim, "blixard cluster join --replace")
	if out := c.joinAgain(victim, c.Nodes[2]); !strings.Contains(out, "set aside in") {
		t.Errorf("joining again said %q", out)
	}
	c.start(victim)
	c.waitMembers(3, 3, 40*time.Second)
	w.check(victim)
	c.sameState(t)
}

// endsOrServes waits until a server has ended, with a documented code, or
// serves.
func (c *Cluster) endsOrServes(n *Node) (ended bool) {
	c.t.Helper()
	c.Eventually(n.Name+" serves or ends", 20*time.Second, func() error {
		select {
		case <-n.exited:
			ended = true
			return nil
		default:
		}
		if !strings.Contains(c.log(n), "server_started") {
			return errors.New("neither")
		}
		return nil
	})
	if ended {
		c.ends(n, time.Second)
	}
	return ended
}

// damages are what can happen to a file; refused says that it must be noticed
// as damage. (A cut or flipped end may be a torn write, which is repaired.)
var damages = []struct {
	name, ext string
	refused   bool
	do        func(t *testing.T, rng *rand.Rand, file string) string
}{
	{"a flipped bit in the log's first records", ".wal", true, func(t *testing.T, rng *rand.Rand, file string) string {
		return flip(t, file, int64(rng.IntN(1024)), rng.IntN(8))
	}},
	{"a log cut to nothing", ".wal", true, func(t *testing.T, _ *rand.Rand, file string) string { return cut(t, file, 0) }},
	{"a log cut within a record", ".wal", true, func(t *testing.T, rng *rand.Rand, file string) string {
		return cut(t, file, 512+int64(rng.IntN(400)))
	}},
	{"a flipped bit in the snapshot", ".snap", false, func(t *testing.T, rng *rand.Rand, file string) string {
		return flip(t, file, int64(rng.IntN(2000)), rng.IntN(8))
	}},
	{"a cut snapshot", ".snap", false, func(t *testing.T, rng *rand.Rand, file string) string {
		return cut(t, file, int64(rng.IntN(2000)))
	}},
	{"a removed snapshot", ".snap", false, func(t *testing.T, _ *rand.Rand, file string) string {
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		return "removed " + file
	}},
}

func flip(t *testing.T, file string, at int64, bit int) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	at %= int64(len(b))
	b[at] ^= 1 << bit
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("bit %d of byte %d of %s", bit, at, file)
}

func cut(t *testing.T, file string, to int64) string {
	t.Helper()
	if err := os.Truncate(file, to); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%s cut to %d bytes", file, to)
}

// newest is the last file with an extension, as the names sort.
func newest(t *testing.T, dir, ext string) string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*"+ext))
	if err != nil || len(names) == 0 {
		t.Fatalf("there is no %s in %s (%v)", ext, dir, err)
	}
	return slices.Max(names)
}

func copyDir(t *testing.T, from, to string) {
	t.Helper()
	if err := os.RemoveAll(to); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}

func restoreDir(t *testing.T, from, to string) {
	t.Helper()
	copyDir(t, from, to)
}

// kill -9 while snapshots are written and the log is compacted, many times:
// the node always starts again and has everything it acknowledged.
func TestKillDuringSnapshots(t *testing.T) {
	needs(t, false)
	t.Parallel()
	c := Start(t, 1, configured(t, "[consensus]\nsnapshot_threshold = 10\n")...)
	node := c.Nodes[0]
	w := &writer{c: c, prefix: "vm", spec: &blixardv1.VMSpec{Env: map[string]string{"FILL": strings.Repeat("x", 4<<10)}}}
	stop := w.begin(4, node)
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 2))
	written := 0
	for range 20 {
		before := w.count()
		c.Eventually("creates go on after kill -9", 20*time.Second, func() error {
			if w.count() < before+15 {
				return fmt.Errorf("%d since the restart", w.count()-before)
			}
			return nil
		})
		wait(time.Duration(rng.IntN(60)) * time.Millisecond)
		c.Kill(node)
		snaps, err := filepath.Glob(filepath.Join(node.Dir, "raft", "*.tmp"))
		if err != nil {
			t.Fatal(err)
		}
		written += len(snaps)
		c.Restart(node)
	}
	stop()
	w.check(node)
	t.Logf("%d creates acknowledged, %d kills hit a snapshot being written", w.count(), written)
	if files, err := os.ReadDir(filepath.Join(node.Dir, "raft")); err != nil || len(files) > 12 {
		t.Errorf("the log is not compacted: %d files (%v)", len(files), err)
	}
}

// Two servers on one data directory: the second is refused and harms nothing.
func TestTwoServersOneDirectory(t *testing.T) {
	needs(t, false)
	t.Parallel()
	c := Start(t, 1)
	second := c.Another()
	second.args = slices.Clone(c.Nodes[0].args)
	second.args[slices.Index(second.args, "--listen")+1] = second.Address
	c.refuses(second, c.Nodes[0].Dir, "another blixard server runs on")
	for _, args := range [][]string{
		{"cluster", "join", "--replace", "--data-dir", c.Nodes[0].Dir, "--listen", second.Address, "--token", "blx1.0000000000000000.x", "--join", second.Address},
		{"cluster", "recover", "--data-dir", c.Nodes[0].Dir, "--discard-other-nodes"},
	} {
		if out, code := c.local(args...); code == 0 || !strings.Contains(out, "server runs on") {
			t.Errorf("blixard %s beside a running server: exit code %d, %s", strings.Join(args[:2], " "), code, out)
		}
	}
	c.Nodes = c.Nodes[:1]
	c.Must("vm", "create", "after", "--no-start")
}

// The majority is gone for good: a survivor goes on alone with `cluster
// recover`, and others join it; a lost node's return harms nothing.
func TestRecoverWithoutMajority(t *testing.T) {
	needs(t, false)
	t.Parallel()
	c := Start(t, 3)
	c.waitMembers(3, 3, 30*time.Second)
	w := &writer{c: c, prefix: "vm"}
	cl := c.Client()
	for w.count() < 30 {
		w.create(t.Context(), cl)
	}
	cl.Close()
	saved := filepath.Join(c.dir, "saved")
	c.Must("cluster", "snapshot", saved)
	survivor, zombie := c.Nodes[2], c.Nodes[1]
	// Up to date: what only the majority knew would be lost, rightly.
	if lost := w.lost(survivor); len(lost) > 0 {
		t.Fatalf("%s lacks %v", survivor.Name, lost)
	}
	for _, n := range c.Nodes {
		c.Kill(n)
	}
	out, code := c.local("cluster", "recover", "--data-dir", survivor.Dir)
	if code != 6 || !strings.Contains(out, "nothing was changed") || !strings.Contains(out, "node1, node2") || !strings.Contains(out, "--discard-other-nodes") {
		t.Errorf("without the flag: exit code %d\n%s", code, out)
	}
	c.mustLocal("cluster", "recover", "--data-dir", survivor.Dir, "--discard-other-nodes")
	survivor.plain()
	c.start(survivor)
	all := c.Nodes
	c.Nodes = []*Node{survivor}
	c.waitMembers(1, 1, 20*time.Second)
	w.check(survivor)
	c.Must("vm", "create", "after", "--no-start")

	// One of the others comes back after all: it is told, and ends.
	c.forgetLog(zombie)
	c.start(zombie)
	c.ends(zombie, 30*time.Second, "was removed from the cluster", "blixard cluster join")
	c.refuses(zombie, "was removed from the cluster")
	c.joinAgain(zombie, survivor)
	c.start(zombie)
	c.Nodes = all[1:]
	c.waitMembers(2, 1, 30*time.Second)
	w.check(zombie)

	// The only copy of a cluster is damaged: a saved state goes on.
	c.Kill(zombie)
	c.Kill(survivor)
	cut(t, newest(t, filepath.Join(survivor.Dir, "raft"), ".wal"), 0)
	c.forgetLog(survivor)
	c.refuses(survivor, "blixard cluster recover --from SNAPSHOT")
	c.mustLocal("cluster", "recover", "--data-dir", survivor.Dir, "--from", saved, "--discard-other-nodes")
	c.start(survivor)
	c.Nodes = []*Node{survivor}
	c.waitMembers(1, 1, 20*time.Second)
	w.check(survivor)
	c.Nodes = all
}
