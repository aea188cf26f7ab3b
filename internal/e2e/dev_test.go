package e2e

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// words is what a command says while it runs.
type words struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (w *words) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.Write(p)
}

func (w *words) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.String()
}

// devUp runs `blixard dev up` in the foreground until it has said what to wait
// for, interrupts it, and returns what it said.
func devUp(t *testing.T, dir, until string, args ...string) string {
	t.Helper()
	var said words
	cmd := exec.Command(filepath.Join(bin, "blixard"), append([]string{"dev", "up", "--nodes", "2"}, args...)...)
	cmd.Env = append(os.Environ(), "BLIXARD_DEV_DIR="+dir)
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		ended <- cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		if err := cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("ending dev up: %v", err)
		}
		for range ended { // until it is gone
		}
	})
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(time.Minute)
	for !strings.Contains(said.String(), until) {
		select {
		case <-tick.C:
		case err := <-ended:
			t.Fatalf("it ended by itself: %v\n%s", err, said.String())
		case <-deadline:
			t.Fatalf("it did not say %q\n%s", until, said.String())
		}
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if exit := (*exec.ExitError)(nil); err != nil && !(errors.As(err, &exit) && exit.ExitCode() == 130) {
			t.Errorf("it ended with %v\n%s", err, said.String())
		}
	case <-time.After(time.Minute):
		t.Fatalf("Ctrl-C does not end it\n%s", said.String())
	}
	return said.String()
}

// TestDevInForeground: Ctrl-C leaves nothing of a cluster that the command made,
// wherever it was; what is to be kept is kept.
func TestDevInForeground(t *testing.T) {
	needs(t, false)
	dir := filepath.Join(t.TempDir(), "dev")
	t.Cleanup(func() {
		cmd := exec.Command(filepath.Join(bin, "blixard"), "dev", "down")
		cmd.Env = append(os.Environ(), "BLIXARD_DEV_DIR="+dir)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("dev down: %v\n%s", err, out)
		}
	})
	left := func() bool {
		t.Helper()
		if found := processes(dir); len(found) > 0 {
			t.Errorf("processes are left: %v", found)
		}
		_, err := os.Stat(dir)
		return err == nil
	}
	for _, until := range []string{"waiting for", "Ctrl-C ends it"} {
		if said := devUp(t, dir, until); left() || !strings.Contains(said, "nothing is left of "+dir) {
			t.Errorf("interrupted at %q, it leaves %s behind\n%s", until, dir, said)
		}
	}
	if said := devUp(t, dir, "Ctrl-C ends it", "--keep"); !left() || !strings.Contains(said, "the state is kept in "+dir) {
		t.Errorf("--keep: %s", said)
	}
	// What was there before is not this command's to delete.
	if said := devUp(t, dir, "Ctrl-C ends it"); !left() || !strings.Contains(said, "the state is kept in "+dir) {
		t.Errorf("of a cluster that was there: %s", said)
	}
}

// TestDevStartInParallel: a node that waits for a majority keeps nobody from
// starting the node that makes one.
func TestDevStartInParallel(t *testing.T) {
	needs(t, false)
	t.Parallel()
	dir := t.TempDir()
	dev := func(said *words, args ...string) *exec.Cmd {
		cmd := exec.Command(filepath.Join(bin, "blixard"), append([]string{"dev"}, args...)...)
		cmd.Env = append(os.Environ(), "BLIXARD_DEV_DIR="+dir)
		cmd.Stdout, cmd.Stderr = said, said
		return cmd
	}
	run := func(args ...string) {
		t.Helper()
		var said words
		if err := dev(&said, args...).Run(); err != nil {
			t.Errorf("dev %v: %v\n%s", args, err, said.String())
		}
	}
	run("up", "--detach", "--nodes", "3")
	t.Cleanup(func() { run("down") })
	run("kill", "node1", "node2", "node3")
	var first words
	waits := dev(&first, "start", "node1")
	if err := waits.Start(); err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(20 * time.Second); !strings.Contains(first.String(), "waits for a leader"); {
		select {
		case <-tick.C:
		case <-deadline:
			t.Errorf("it does not say that it waits:\n%s", first.String())
			deadline = nil
		}
		if t.Failed() {
			break
		}
	}
	run("start", "node2")
	if err := waits.Wait(); err != nil || strings.Contains(first.String(), "no member") {
		t.Errorf("dev start node1: %v\n%s", err, first.String())
	}
}
