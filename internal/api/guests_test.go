package api_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

// running is a site of two nodes with an instance of web on each.
func running(t *testing.T) *site {
	t.Helper()
	s := newSite(t, 2)
	s.create("web", 2)
	s.cluster.Run("web", 1, "node1", blixard.Running)
	s.cluster.Run("web", 2, "node2", blixard.Running)
	return s
}

func TestLogsOfAllInstances(t *testing.T) {
	s := running(t)
	last := int32(2)
	var b strings.Builder
	err := s.client().Logs(short(t), &blixardv1.LogsRequest{Vm: "web", TailLines: &last}, func(m *blixardv1.LogsResponse) error {
		b.WriteString(m.Instance + ": " + string(m.Data))
		return nil
	})
	want := "web-1: web-1 line 2\nweb-1: web-1 line 3\nweb-2: web-2 line 2\nweb-2: web-2 line 3\n"
	if err != nil || b.String() != want {
		t.Errorf("%v, got %q", err, b.String())
	}
	_, body := s.do("GET", "/v1/vms/web/logs?instance=web-2", "")
	if body != "web-2 line 1\nweb-2 line 2\nweb-2 line 3\n" {
		t.Errorf("over REST: %q", body)
	}
}

func TestLogsFollow(t *testing.T) {
	s := running(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var mu sync.Mutex
	lines := 0
	err := s.client().Logs(ctx, &blixardv1.LogsRequest{Vm: "web", Follow: true}, func(m *blixardv1.LogsResponse) error {
		mu.Lock()
		defer mu.Unlock()
		if lines += bytes.Count(m.Data, []byte("\n")); lines == 6 {
			cancel()
		}
		return nil
	})
	if !errors.Is(err, context.Canceled) || lines != 6 {
		t.Errorf("%v after %d lines", err, lines)
	}
}

func TestLogsRefusals(t *testing.T) {
	s := running(t)
	s.create("empty", 1)
	ask := func(vm, instance string) error {
		return s.client().Logs(short(t), &blixardv1.LogsRequest{Vm: vm, Instance: instance}, func(*blixardv1.LogsResponse) error { return nil })
	}
	wantCode(t, ask("wep", ""), blixard.CodeNotFound)
	wantCode(t, ask("web", "web-3"), blixard.CodeNotFound)
	wantCode(t, ask("empty", ""), blixard.CodeConflict)
}

func TestExecHereAndThere(t *testing.T) {
	s := running(t)
	for _, target := range []string{"web", "web-1", "web-2"} {
		var out, bad bytes.Buffer
		text := strings.Repeat("echo me ", 20_000)
		code, err := s.client().Exec(short(t), &blixardv1.ExecStart{Target: target, Command: []string{"cat"}}, client.ExecIO{Stdin: strings.NewReader(text), Stdout: &out, Stderr: &bad})
		if err != nil || code != 0 || out.String() != text {
			t.Errorf("%s: %d, %v, %d bytes of %d", target, code, err, out.Len(), len(text))
		}
		code, err = s.client().Exec(short(t), &blixardv1.ExecStart{Target: target, Command: []string{"exit", "42"}, Env: map[string]string{"B": "2", "A": "1"}}, client.ExecIO{Stderr: &bad})
		if err != nil || code != 42 {
			t.Errorf("%s: %d, %v", target, code, err)
		}
		node := "node1"
		if target == "web-2" {
			node = "node2"
		}
		if want := " on " + node + " ends with 42, env [A=1 B=2]\n"; !strings.HasSuffix(bad.String(), want) {
			t.Errorf("%s: standard error is %q, want %q", target, bad.String(), want)
		}
		sizes := make(chan *blixardv1.TerminalSize, 1)
		sizes <- &blixardv1.TerminalSize{Columns: 132, Rows: 43}
		out.Reset()
		if _, err = s.client().Exec(short(t), &blixardv1.ExecStart{Target: target, Command: []string{"size"}, Tty: true}, client.ExecIO{Stdout: &out, Resize: sizes}); err != nil || out.String() != "132x43" {
			t.Errorf("%s: %v, %q", target, err, out.String())
		}
	}
}

func TestExecRefusals(t *testing.T) {
	s := running(t)
	s.create("new", 1)
	s.cluster.Run("new", 1, "node1", blixard.Starting)
	run := func(target string, command ...string) error {
		_, err := s.client().Exec(short(t), &blixardv1.ExecStart{Target: target, Command: command}, client.ExecIO{})
		return err
	}
	for _, target := range []string{"web-1", "web-2"} {
		e := wantCode(t, run(target, "fly"), blixard.CodeNotFound)
		if !strings.Contains(e.Message, "fly") {
			t.Errorf("%v", e)
		}
	}
	wantCode(t, run("web"), blixard.CodeInvalid)
	wantCode(t, run("wep", "cat"), blixard.CodeNotFound)
	wantCode(t, run("new", "cat"), blixard.CodeConflict)
	_, err := s.client().Exec(short(t), &blixardv1.ExecStart{Target: "web-1", Command: []string{"hang"}, TimeoutMs: 20}, client.ExecIO{})
	wantCode(t, err, blixard.CodeUnavailable)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.client().Exec(ctx, &blixardv1.ExecStart{Target: "web-2", Command: []string{"hang"}}, client.ExecIO{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the context ended it with %v", err)
	}
}

func TestConsoleHereAndThere(t *testing.T) {
	s := running(t)
	for _, target := range []string{"web-1", "web-2"} {
		keys, type_ := io.Pipe()
		var out bytes.Buffer
		ctx, cancel := context.WithCancel(short(t))
		seen := make(chan struct{})
		done := make(chan error, 1)
		go func() {
			done <- s.client().Console(ctx, target, keys, writer(func(p []byte) {
				out.Write(p)
				if out.String() == "LOGIN ROOT\n" {
					close(seen)
				}
			}))
		}()
		for _, part := range []string{"login ", "root\n"} {
			if _, err := type_.Write([]byte(part)); err != nil {
				t.Fatal(err)
			}
		}
		select {
		case <-seen:
		case <-ctx.Done():
			t.Fatalf("%s: no answer but %q", target, out.String())
		}
		type_.Close()
		if err := <-done; err != nil {
			t.Errorf("%s: %v", target, err)
		}
		cancel()
	}
}

type writer func([]byte)

func (w writer) Write(p []byte) (int, error) {
	w(p)
	return len(p), nil
}

func TestNothingIsPassedOnTwice(t *testing.T) {
	s := running(t)
	c, err := client.New(client.Options{Addresses: []string{s.urls["node1"]}, Token: token, ForwardedBy: "node2", RetryFor: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = c.Exec(short(t), &blixardv1.ExecStart{Target: "web-2", Command: []string{"cat"}}, client.ExecIO{})
	wantCode(t, err, blixard.CodeUnavailable)
}
