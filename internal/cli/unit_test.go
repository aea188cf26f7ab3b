package cli_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/client"
	"github.com/blixard/blixard/internal/cli"
	"github.com/blixard/blixard/internal/state"
)

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// cleanups is a testscript.Env for tests without a script.
type cleanups struct{ *testing.T }

func (c cleanups) Defer(f func()) { c.Cleanup(f) }

// run runs a command and returns what it printed.
func run(t *testing.T, s *site, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, words strings.Builder
	code = cli.Run(t.Context(), s.env(&out, &words), args)
	return out.String(), words.String(), code
}

func (s *site) env(stdout, stderr io.Writer) cli.Env {
	return cli.Env{Stdout: stdout, Stderr: stderr, Getenv: func(key string) string {
		return map[string]string{"BLIXARD_ADDR": s.addresses, "BLIXARD_TOKEN": token}[key]
	}}
}

// TestWatch: a watched listing is shown again when it changed, and ends without
// an error when it is interrupted.
func TestWatch(t *testing.T) {
	s := newSite(t, cleanups{t}, 1)
	for _, args := range [][]string{
		{"vm", "list", "--watch", "-o", "name"}, {"get", "vms", "-w", "-o", "json"}, {"vm", "events", "-w", "-o", "json"}, {"cluster", "status", "-w"},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			name := "watched-" + strings.ReplaceAll(strings.Join(args, ""), "-", "")
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			r, w := io.Pipe()
			ended := make(chan int, 1)
			var wg sync.WaitGroup
			wg.Go(func() {
				ended <- cli.Run(ctx, s.env(w, io.Discard), args)
				if err := w.Close(); err != nil {
					t.Errorf("closing: %v", err)
				}
			})
			wg.Go(func() {
				if _, words, code := run(t, s, "vm", "create", name); code != 0 {
					t.Errorf("creating: %d %s", code, words)
				}
			})
			want := name
			if args[0] == "cluster" {
				want = "4 with 4 instances, 4 running"
			}
			seen := false
			for lines := bufio.NewScanner(r); lines.Scan(); {
				if strings.Contains(lines.Text(), want) && !seen {
					seen = true
					cancel()
				}
			}
			wg.Wait()
			if code := <-ended; !seen || code != 0 {
				t.Fatalf("seen: %v, exit code %d", seen, code)
			}
		})
	}
}

// TestExitCodes: the documented codes are those that are used.
func TestExitCodes(t *testing.T) {
	var out strings.Builder
	if code := cli.Run(t.Context(), cli.Env{Stdout: &out, Stderr: io.Discard}, []string{"help", "exit-codes"}); code != 0 {
		t.Fatalf("ended with %d", code)
	}
	for _, code := range []blixard.Code{
		blixard.CodeInternal, blixard.CodeInvalid, blixard.CodeNotFound, blixard.CodeExists, blixard.CodeConflict, blixard.CodeRefused,
		blixard.CodeUnavailable, blixard.CodeOverloaded, blixard.CodeDenied, blixard.CodeGone,
	} {
		if want := cli.DocumentedExit(code); want != client.ExitCode(blixard.Errorf(code, "x")) {
			t.Errorf("%s is documented as %d and is %d", code, want, client.ExitCode(blixard.Errorf(code, "x")))
		}
	}
}

// TestRetryOverLeaderLoss: a verb goes on while a cluster has no leader for a
// moment, and changes nothing twice.
func TestRetryOverLeaderLoss(t *testing.T) {
	s := newSite(t, cleanups{t}, 1)
	failures := 3
	s.cluster.FailWith(func(e state.Envelope) error {
		if _, ok := e.Command.(*state.CreateVM); ok && failures > 0 {
			failures--
			return blixard.Errorf(blixard.CodeUnavailable, "there is no leader")
		}
		return nil
	})
	if _, words, code := run(t, s, "vm", "create", "web"); code != 0 {
		t.Fatalf("ended with %d: %s", code, words)
	}
	lost := false
	s.cluster.LoseWith(func(e state.Envelope) error {
		if _, ok := e.Command.(*state.CreateVM); ok && !lost {
			lost = true
			return blixard.Errorf(blixard.CodeUnavailable, "the answer was lost")
		}
		return nil
	})
	if _, words, code := run(t, s, "vm", "create", "again"); code != 0 {
		t.Fatalf("a repeated create ended with %d: %s", code, words)
	}
}
