package agent

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/blixard/blixard/internal/guest"
)

// buffer is a bytes.Buffer for one writer and one reader.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func write(t *testing.T, path, text string, flags int) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|flags, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
}

func never() bool  { return false }
func always() bool { return true }

func TestTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console.log")
	write(t, path+".2", "1\n2\n", 0)
	write(t, path+".1", "3\n4\n", 0)
	write(t, path, "5\n6\n7", 0)
	for lines, want := range map[int]string{
		-1: "1\n2\n3\n4\n5\n6\n7", 0: "", 1: "7", 2: "6\n7", 3: "5\n6\n7", 4: "4\n5\n6\n7", 6: "2\n3\n4\n5\n6\n7", 100: "1\n2\n3\n4\n5\n6\n7",
	} {
		var out bytes.Buffer
		if err := copyLog(t.Context(), path, guest.LogOptions{TailLines: lines}, always, &out); err != nil || out.String() != want {
			t.Errorf("last %d: %q, want %q (%v)", lines, out.String(), want, err)
		}
	}
}

// The tail of any file is what a plain reading of it gives.
func TestTailAgainstModel(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 1))
	path := filepath.Join(t.TempDir(), "log")
	for range 200 {
		var b strings.Builder
		for range random.IntN(60) {
			b.WriteString(strings.Repeat("x", random.IntN(4)*random.IntN(2000)))
			if random.IntN(3) > 0 {
				b.WriteByte('\n')
			}
		}
		text, lines := b.String(), random.IntN(20)+1
		write(t, path, text, os.O_TRUNC)
		all := strings.SplitAfter(text, "\n")
		if all[len(all)-1] == "" {
			all = all[:len(all)-1]
		}
		want := strings.Join(all[max(0, len(all)-lines):], "")
		start, found, err := tailStart(path, lines)
		if err != nil || text[start:] != want || found != min(lines, len(all)) {
			t.Fatalf("seed %d: the last %d of %d lines begin at %d (%d found, %v)", seed, lines, len(all), start, found, err)
		}
	}
}

func TestFollow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console.log")
	ctx, cancel := context.WithCancel(t.Context())
	var out buffer
	done := make(chan error, 1)
	go func() { done <- copyLog(ctx, path, guest.LogOptions{Follow: true, TailLines: 1}, never, &out) }()
	expect := func(want string) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); out.String() != want; {
			if time.Now().After(deadline) {
				t.Fatalf("have %q, want %q", out.String(), want)
			}
			pause(ctx, 5*time.Millisecond)
		}
	}
	// It comes after the follower, and whole: of a file that is still being
	// written the last line is not known.
	write(t, path+".new", "0\n1\n", 0)
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	expect("1\n")
	write(t, path, "2\n", os.O_APPEND)
	expect("1\n2\n")
	// Rotated by truncation, as the QEMU driver does.
	write(t, path, "", os.O_TRUNC)
	write(t, path, "3\n", os.O_APPEND)
	expect("1\n2\n3\n")
	// Rotated by renaming.
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	write(t, path, "4\n", 0)
	expect("1\n2\n3\n4\n")
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Following ends with the instance, with all it said.
func TestFollowEnds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console.log")
	write(t, path, "last words\n", 0)
	var out bytes.Buffer
	if err := copyLog(t.Context(), path, guest.LogOptions{Follow: true, TailLines: -1}, always, &out); err != nil || out.String() != "last words\n" {
		t.Errorf("%q, %v", out.String(), err)
	}
	if err := copyLog(t.Context(), path+".none", guest.LogOptions{Follow: true, TailLines: -1}, always, &out); err != nil {
		t.Error(err)
	}
}

func BenchmarkTail(b *testing.B) {
	path := filepath.Join(b.TempDir(), "log")
	var text bytes.Buffer
	for i := range 200_000 {
		fmt.Fprintf(&text, "line %d of a log that is long\n", i)
	}
	if err := os.WriteFile(path, text.Bytes(), 0o600); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, _, err := tailStart(path, 100); err != nil {
			b.Fatal(err)
		}
	}
}
