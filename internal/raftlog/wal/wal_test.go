package wal_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/raftlog"
	"github.com/blixard/blixard/internal/raftlog/raftlogtest"
	"github.com/blixard/blixard/internal/raftlog/wal"
	"github.com/blixard/blixard/internal/raftlog/wal/memfs"
)

// writerDir, in the environment, makes the test binary the writer of
// TestKill9 instead.
const writerDir = "BLIXARD_WAL_TEST_WRITER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(writerDir); dir != "" {
		err := writeForever(dir)
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// memStore runs the suite on memory, where a crash loses what was not synced.
type memStore struct{ fs *memfs.FS }

func (s *memStore) Open() (raftlog.Opened, error) { return wal.Open(s.fs, dir, options()) }
func (s *memStore) Crash()                        { s.fs = s.fs.Crash(rand.New(rand.NewPCG(1, 1)), memfs.None) }
func (s *memStore) Fail(err error)                { s.fs.Fault = func(string) error { return err } }

// diskStore runs it on the machine's disk. A crash is that of the process: the
// files as they are go to a new directory.
type diskStore struct {
	t    *testing.T
	dir  string
	open raftlog.Log
	fs   *failingFS
}

func (s *diskStore) Open() (raftlog.Opened, error) {
	opened, err := wal.Open(s.fs, s.dir, wal.Options{SegmentBytes: 4096})
	if err == nil {
		s.open = opened.Log
	}
	return opened, err
}

func (s *diskStore) Crash() {
	s.t.Helper()
	next := s.t.TempDir()
	if err := os.CopyFS(next, os.DirFS(s.dir)); err != nil {
		s.t.Fatal(err)
	}
	s.fs.err = nil
	if err := s.open.Close(); err != nil {
		s.t.Logf("closing the crashed log: %v", err)
	}
	s.dir = next
}

func (s *diskStore) Fail(err error) { s.fs.err = err }

// failingFS is the machine's file system whose syncs can fail.
type failingFS struct {
	wal.FS
	err error
}

func (f *failingFS) Create(name string) (wal.File, error) { return f.wrap(f.FS.Create(name)) }
func (f *failingFS) Open(name string) (wal.File, error)   { return f.wrap(f.FS.Open(name)) }

func (f *failingFS) wrap(file wal.File, err error) (wal.File, error) {
	if err != nil {
		return nil, err
	}
	return failingFile{file, f}, nil
}

type failingFile struct {
	wal.File
	fs *failingFS
}

func (f failingFile) Sync() error { return errors.Join(f.fs.err, f.File.Sync()) }

func TestSuite(t *testing.T) {
	t.Run("memory", func(t *testing.T) {
		raftlogtest.Suite(t, func(*testing.T) raftlogtest.Store { return &memStore{memfs.New()} })
	})
	t.Run("disk", func(t *testing.T) {
		raftlogtest.Suite(t, func(t *testing.T) raftlogtest.Store {
			return &diskStore{t: t, dir: t.TempDir(), fs: &failingFS{FS: wal.OS}}
		})
	})
}

// writeForever is the process that TestKill9 kills: it prints the index of
// each entry after it was acknowledged.
func writeForever(dir string) error {
	opened, err := wal.Open(wal.OS, dir, wal.Options{SegmentBytes: 32 << 10})
	if err != nil {
		return err
	}
	next := opened.Snapshot.GetIndex() + uint64(len(opened.Entries)) + 1
	for ; ; next++ {
		if err := opened.Log.Save(raftlogtest.HardState(1, 1, next), raftlogtest.Entries(1, next, next), true); err != nil {
			return err
		}
		if _, err := fmt.Println(next); err != nil {
			return err
		}
		if next%40 == 0 {
			if err := opened.Log.WriteSnapshot(raftlogtest.Meta(1, next), raftlogtest.Data(strconv.FormatUint(next, 10))); err != nil {
				return err
			}
			if err := opened.Log.Compact(next - 10); err != nil {
				return err
			}
		}
	}
}

func TestKill9(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "raft")
	rng := rand.New(rand.NewPCG(7, 7))
	acked := uint64(0)
	for range 10 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), writerDir+"="+dir)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for left := rng.IntN(200); lines.Scan(); left-- {
			if acked, err = strconv.ParseUint(lines.Text(), 10, 64); err != nil {
				t.Fatal(err)
			}
			if left == 0 {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := cmd.Wait(); err == nil || stderr.String() != "" {
			t.Fatalf("the writer ended by itself: %v, %s", err, stderr.String())
		}
		opened, err := wal.Open(wal.OS, dir, wal.Options{})
		if err != nil {
			t.Fatal(err)
		}
		from := opened.Snapshot.GetIndex()
		last := from + uint64(len(opened.Entries))
		if last < acked || last > acked+1 || opened.HardState.GetCommit() != last {
			t.Fatalf("the log ends at %d with commit %d after %d was acknowledged", last, opened.HardState.GetCommit(), acked)
		}
		if !raftlogtest.SameEntries(opened.Entries, raftlogtest.Entries(1, from+1, last)) {
			t.Fatalf("entries after %d differ", from)
		}
		if from > 0 {
			if got, err := raftlogtest.Load(opened); err != nil || got != strconv.FormatUint(from, 10) {
				t.Fatalf("snapshot %d holds %q (%v)", from, got, err)
			}
		}
		if err := opened.Log.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if acked == 0 {
		t.Fatal("nothing was ever acknowledged")
	}
}

// TestNotOurDirectory: what the user can mend is said as such.
func TestNotOurDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "raft")
	opened, err := wal.Open(wal.OS, dir, wal.Options{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = wal.Open(wal.OS, dir, wal.Options{})
	if !errors.Is(err, wal.ErrLocked) || !strings.Contains(err.Error(), "another blixard server") {
		t.Errorf("a locked directory is reported as: %v", err)
	}
	if err := opened.Log.Close(); err != nil {
		t.Fatal(err)
	}
	mustChmod(t, filepath.Dir(filepath.Dir(dir)), 0o755)
	mustChmod(t, dir, 0o555)
	mustChmod(t, filepath.Join(dir, "LOCK"), 0o444)
	asNobody(t, func() { _, err = wal.Open(wal.OS, dir, wal.Options{}) })
	if err == nil || !strings.Contains(err.Error(), "mount it read-write") || errors.Is(err, raftlog.ErrCorrupt) {
		t.Errorf("a read-only directory is reported as: %v", err)
	}
	mustChmod(t, dir, 0o755)
}

func mustChmod(t *testing.T, name string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(name, mode); err != nil {
		t.Fatal(err)
	}
}

// asNobody runs f without root's right to write everywhere.
func asNobody(t *testing.T, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		f()
		return
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Setfsuid(65534); err != nil {
		t.Fatal(err)
	}
	f()
	if err := unix.Setfsuid(0); err != nil {
		t.Fatal(err)
	}
}

// TestMissingFiles: a segment or snapshot that someone took away is missed.
func TestMissingFiles(t *testing.T) {
	build := func() *memfs.FS {
		fs := memfs.New()
		opened, err := wal.Open(fs, dir, options())
		if err != nil {
			t.Fatal(err)
		}
		for i := uint64(1); i <= 60; i++ {
			if err := opened.Log.Save(raftlogtest.HardState(1, 1, i), raftlogtest.Entries(1, i, i), true); err != nil {
				t.Fatal(err)
			}
		}
		if err := opened.Log.WriteSnapshot(raftlogtest.Meta(1, 30), raftlogtest.Data("thirty")); err != nil {
			t.Fatal(err)
		}
		if err := opened.Log.Compact(30); err != nil {
			t.Fatal(err)
		}
		return fs.Crash(rand.New(rand.NewPCG(1, 1)), memfs.None)
	}
	names := build().Names()
	for _, name := range names {
		if filepath.Base(name) == "LOCK" {
			continue
		}
		fs := build()
		fs.Delete(name)
		if _, err := wal.Open(fs, dir, options()); !errors.Is(err, raftlog.ErrCorrupt) {
			t.Errorf("without %s of %v, Open answers %v", name, names, err)
		}
	}
}

// TestSnapshotBesideSaves: WriteSnapshot on another goroutine does not stop
// Save, nor do the two race.
func TestSnapshotBesideSaves(t *testing.T) {
	opened, err := wal.Open(wal.OS, t.TempDir(), wal.Options{SegmentBytes: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	if err := opened.Log.Save(raftlogtest.HardState(1, 1, 5), raftlogtest.Entries(1, 1, 5), true); err != nil {
		t.Fatal(err)
	}
	started, finish, done := make(chan struct{}), make(chan struct{}), make(chan error)
	go func() {
		done <- opened.Log.WriteSnapshot(raftlogtest.Meta(1, 5), func(w io.Writer) error {
			close(started)
			<-finish
			_, err := w.Write(make([]byte, 1<<20))
			return err
		})
	}()
	<-started
	for i := uint64(6); i < 100; i++ {
		if i == 50 {
			close(finish)
		}
		if err := opened.Log.Save(raftlogtest.HardState(1, 1, i), raftlogtest.Entries(1, i, i), true); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(opened.Log.Compact(5), opened.Log.Close()); err != nil {
		t.Fatal(err)
	}
}

func TestSaveDoesNotAllocate(t *testing.T) {
	opened, err := wal.Open(memfs.New(), dir, wal.Options{})
	if err != nil {
		t.Fatal(err)
	}
	hs, entries := raftlogtest.HardState(1, 1, 0), raftlogtest.Entries(1, 1, 8)
	if n := testing.AllocsPerRun(100, func() {
		if err := opened.Log.Save(hs, nil, false); err != nil {
			t.Fatal(err)
		}
	}); n > 0 {
		t.Errorf("an unsynced hard state costs %v allocations", n)
	}
	if err := opened.Log.Save(nil, entries, true); err != nil {
		t.Fatal(err)
	}
}

func BenchmarkSaveSync(b *testing.B) {
	for _, count := range []uint64{1, 64} {
		b.Run(fmt.Sprintf("entries=%d", count), func(b *testing.B) {
			opened, err := wal.Open(wal.OS, b.TempDir(), wal.Options{})
			if err != nil {
				b.Fatal(err)
			}
			entries := raftlogtest.Entries(1, 1, count)
			for _, e := range entries {
				e.Data = make([]byte, 256)
				for i := range e.Data {
					e.Data[i] = byte(rand.Uint32())
				}
			}
			hs := raftlogtest.HardState(1, 1, 0)
			next := uint64(1)
			start := time.Now()
			b.ReportAllocs()
			for b.Loop() {
				for _, e := range entries {
					*e.Index = next
					next++
				}
				*hs.Commit = next - 1
				if err := opened.Log.Save(hs, entries, true); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "saves/s")
			b.ReportMetric(float64(next-1)/time.Since(start).Seconds(), "entries/s")
			if err := opened.Log.Close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}
