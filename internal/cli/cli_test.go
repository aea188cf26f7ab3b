package cli_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/client"
	"github.com/blixard/blixard/internal/api"
	"github.com/blixard/blixard/internal/api/apitest"
	"github.com/blixard/blixard/internal/cli"
	"github.com/blixard/blixard/internal/control"
	"github.com/blixard/blixard/internal/state"
)

const token = "let-me-in"

// TestMain makes the test binary the program, for scripts.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"blixard": func() {
		os.Exit(cli.Run(context.Background(), cli.Env{
			Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv, Version: "v1.2.3",
			Doctor: []cli.Check{func(context.Context) cli.Finding {
				return cli.Finding{Check: "acceleration", Status: cli.CheckWarn, Detail: "guests run emulated", Mend: "buy a better machine"}
			}},
			PackImage: func(_ context.Context, path string) (cli.PackedImage, error) {
				data, err := os.ReadFile(path)
				if err != nil {
					return cli.PackedImage{}, err
				}
				return cli.PackedImage{Digest: digest(data), Size: int64(len(data)), ReadCloser: io.NopCloser(bytes.NewReader(data))}, nil
			},
			PackCode: func(_ context.Context, path string) (cli.PackedCode, error) {
				data, err := os.ReadFile(path)
				kind := map[string]string{".nix": "nix", ".wasm": "wasm", ".sh": "bootstrap"}[filepath.Ext(path)]
				return cli.PackedCode{Zip: data, Runtime: kind}, err
			},
		}, os.Args[1:]))
	}})
}

// TestScripts runs testdata/*.txtar, each against a cluster of its own: real
// state, API and control loop in memory, and an agent that pretends.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata", RequireExplicitExec: true, RequireUniqueNames: true,
		Setup: func(e *testscript.Env) error {
			s := newSite(t, e, 3)
			e.Setenv("BLIXARD_ADDR", s.addresses)
			e.Setenv("BLIXARD_TOKEN", token)
			e.Setenv("USER", "alice")
			e.Setenv("BLIXARD_DEV_DIR", filepath.Join(e.WorkDir, "dev"))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": exits, "manyvms": manyVMs,
		},
	})
}

// exits CODE COMMAND… runs a command that must end with that code.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND…")
	}
	err := ts.Exec(args[1], args[2:]...)
	code := 0
	if err != nil {
		var exit interface{ ExitCode() int }
		if !errors.As(err, &exit) {
			ts.Fatalf("running %v: %v", args[1:], err)
		}
		code = exit.ExitCode()
	}
	if fmt.Sprint(code) != args[0] {
		ts.Fatalf("%v ended with %d, want %s", args[1:], code, args[0])
	}
}

// manyvms FILE N writes N documents; the last one is wrong with a third word.
func manyVMs(ts *testscript.TestScript, _ bool, args []string) {
	var b strings.Builder
	n := 0
	if _, err := fmt.Sscan(args[1], &n); err != nil {
		ts.Fatalf("%v", err)
	}
	for i := range n {
		fmt.Fprintf(&b, "---\napiVersion: blixard.dev/v1\nkind: VM\nmetadata: {name: vm-%d}\nspec: {desired: stopped, memory: 128M}\n", i)
	}
	if len(args) > 2 {
		b.WriteString(strings.Join(args[2:], " ") + "\n")
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(b.String()), 0o600))
}

// site is a cluster in memory that serves its API on loopback.
type site struct {
	cluster   *apitest.Cluster
	addresses string
}

func newSite(t *testing.T, e interface{ Defer(func()) }, nodes int) *site {
	s := &site{cluster: apitest.New(nodes)}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	images, code := &apitest.Images{}, &apitest.Code{}
	var servers []*http.Server
	var all []string
	for i := range nodes {
		name := fmt.Sprintf("node%d", i+1)
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		address := listener.Addr().String()
		s.cluster.SetAddress(blixard.NodeName(name), address)
		all = append(all, address)
		server := api.NewServer(api.New(api.Options{
			Backend: s.cluster.Node(blixard.NodeName(name)), Guests: apitest.Guests{Node: name}, Images: images, Release: "v0-test",
			Code: code, Functions: apitest.Functions{Node: name},
			Token: func() string { return token }, Timeout: 10 * time.Second,
			Peers: func(address string) (*client.Client, error) {
				return client.New(client.Options{Addresses: []string{address}, Token: token, ForwardedBy: name})
			},
		}))
		servers = append(servers, server)
		wg.Go(func() {
			if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
				t.Errorf("serving: %v", err)
			}
		})
	}
	s.addresses = strings.Join(all, ",")
	wg.Go(func() { s.run(ctx) })
	e.Defer(func() {
		cancel()
		for _, server := range servers {
			if err := server.Close(); err != nil {
				t.Errorf("closing: %v", err)
			}
		}
		wg.Wait()
	})
	return s
}

// run is leader and agents in one: it does what is wanted, a step at a time.
func (s *site) run(ctx context.Context) {
	started := time.Now()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	seen := uint64(0)
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		view := s.cluster.View()
		now := time.Since(started).Milliseconds()
		ctl := control.New(control.Config{})
		ctl.Reset(view, now)
		if view.Index == seen && now%500 > 20 {
			continue
		}
		seen = view.Index
		for _, c := range ctl.Step(control.Input{View: view, NowMonoMS: now, NowWallMS: time.Now().UnixMilli()}).Commands {
			s.propose(ctx, c)
		}
		s.observe(ctx)
		s.build(ctx)
	}
}

// build pretends to make templates. Those of functions whose name begins with
// "bad" fail.
func (s *site) build(ctx context.Context) {
	view := s.cluster.View()
	view.PendingVersions(func(v *blixard.FunctionVersion) bool {
		if v.Builder == "" {
			return true
		}
		report := &state.ReportFunction{Function: v.Function, Number: v.Number, Seq: v.Seq, Node: v.Builder, NodeEpoch: v.BuilderEpoch, State: blixard.FunctionActive}
		if strings.HasPrefix(string(v.Function), "bad") {
			report.State, report.Code, report.Reason = blixard.FunctionFailed, "InitError", "it ended with exit status 3"
		}
		s.propose(ctx, report)
		return true
	})
}

func (s *site) propose(ctx context.Context, c state.Command) {
	e := state.Envelope{NowMS: time.Now().UnixMilli(), Actor: "leader", Command: c}
	if _, err := s.cluster.Node("node1").Propose(ctx, e); err != nil && blixard.CodeOf(err) == blixard.CodeInternal {
		return // the script has ended
	}
}

// observe pretends to be the agents. Instances of VMs whose name begins with
// "stuck" never get beyond Starting, those of "failing" fail.
func (s *site) observe(ctx context.Context) {
	view := s.cluster.View()
	view.Instances(func(i *blixard.Instance) bool {
		o := state.Observation{
			VM: i.VM, Ordinal: i.Ordinal, Generation: i.Generation, State: i.State, Paused: i.StatePaused, Acceleration: "tcg",
			Address: i.Address, Ports: i.Ports, Message: i.Message, Health: i.Health,
		}
		switch {
		case i.Wanted == blixard.WantRemove:
			o.Removed = true
			if !i.State.Terminal() {
				o.State = blixard.Stopped
			}
		case i.Wanted == blixard.WantStop && !i.State.Terminal():
			o.State = blixard.Stopped
		case i.State.Terminal():
			return true
		case strings.HasPrefix(string(i.VM), "stuck"):
			o.State = blixard.Starting
		case strings.HasPrefix(string(i.VM), "failing"):
			o.State, o.Message = blixard.Failed, "the guest panicked"
		default:
			o.State, o.Paused = blixard.Running, i.Paused
			if i.Spec.Health != nil {
				o.Health = blixard.HealthHealthy
			}
			for at, p := range i.Spec.Publish {
				port := p.HostPort
				if port == 0 {
					port = 30000 + at
				}
				address := fmt.Sprintf("127.0.0.1:%d", port)
				o.Address, o.Ports = address, append(o.Ports[:0:0], blixard.PublishedPort{Protocol: "tcp", Address: address, GuestPort: p.GuestPort})
			}
		}
		if o.State == i.State && o.Paused == i.StatePaused && o.Health == i.Health && !o.Removed {
			return true
		}
		if n := view.Node(i.Node); n != nil {
			s.propose(ctx, &state.Observe{Node: i.Node, RaftID: n.RaftID, Items: []state.Observation{o}})
		}
		return true
	})
}
