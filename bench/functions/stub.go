package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
	"github.com/blixard/blixard/internal/code"
	"github.com/blixard/blixard/internal/dispatch"
	"github.com/blixard/blixard/internal/gateway"
	"github.com/blixard/blixard/internal/image"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/state"
	"github.com/blixard/blixard/internal/vmm"
	"github.com/blixard/blixard/internal/vmm/fake"
)

// What this program is called with to be the stub, and the gateway before it.
const (
	stubCommand    = "stub-process"
	gatewayCommand = "gateway-process"
)

// stub answers invocations at once, as a guest would on its call port.
type stub struct{}

var stubAnswer = []byte(`{"statusCode":200,"headers":{"Content-Type":"text/plain"},"body":"hello"}`)

func (stub) Init(*call.Init) (call.Ready, error)      { return call.Ready{}, nil }
func (stub) Restore(*call.Identity) (call.Ack, error) { return call.Ack{}, nil }
func (stub) Cancel(*call.Request)                     {}
func (stub) Stat() (call.Stat, error)                 { return call.Stat{}, nil }
func (stub) Shutdown(string, time.Duration)           {}

func (stub) Invoke(_ *call.Request, w call.ResponseWriter) {
	if _, err := w.Write(stubAnswer); err != nil {
		return // nobody waits
	}
	if err := w.Finish(call.Outcome{Handler: time.Microsecond}); err != nil {
		return
	}
}

// runStub is the stub instance: a process that answers on call ports, and the
// same over HTTP. It prints where and ends with its standard input.
func runStub() error {
	dir, err := os.MkdirTemp("", "bs")
	if err != nil {
		return fmt.Errorf("making a directory for a socket: %w", err)
	}
	defer func() {
		if err := os.RemoveAll(dir); err != nil {
			say("removing %s: %v", dir, err)
		}
	}()
	ports, err := net.Listen("unix", filepath.Join(dir, "call"))
	if err != nil {
		return fmt.Errorf("listening: %w", err)
	}
	go func() { // ends with the process
		for {
			conn, err := ports.Accept()
			if err != nil {
				return
			}
			go func() { // ends with the connection
				if err := call.NewGuest(conn, stub{}).Serve(); err != nil && !errors.Is(err, io.EOF) {
					say("the stub: %v", err)
				}
			}()
		}
	}()
	return serve(filepath.Join(dir, "call"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return
		}
		w.Header().Set("Content-Type", "text/plain")
		if _, err := w.Write([]byte("hello")); err != nil {
			return
		}
	}))
}

// serve serves HTTP until standard input ends, and says where.
func serve(words string, h http.Handler) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("listening: %w", err)
	}
	go func() { // ends with the process
		if err := http.Serve(l, h); err != nil { //nolint:gosec // timeouts would be measured, too
			say("serving: %v", err)
		}
	}()
	fmt.Println(l.Addr(), words)
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// alone is a state without consensus: commands are applied at once.
type alone struct {
	mu    sync.Mutex
	state *state.State
	view  *state.View
	news  chan struct{}
}

func (c *alone) View() *state.View {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.view
}

func (c *alone) Fresh(context.Context) (*state.View, error) { return c.View(), nil }

func (c *alone) Wait(ctx context.Context, index uint64) error {
	for {
		c.mu.Lock()
		news, now := c.news, c.view.Index
		c.mu.Unlock()
		if now > index {
			return nil
		}
		select {
		case <-news:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (c *alone) Propose(_ context.Context, command state.Command, key string) (state.Outcome, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	index := c.state.Index() + 1
	results, _ := c.state.ApplyAll(index, 1, []state.Envelope{{Key: key, NowMS: time.Now().UnixMilli(), Command: command}})
	close(c.news)
	c.news, c.view = make(chan struct{}), c.state.View()
	out := results[0].Outcome
	out.Index = index
	if err := results[0].Err; err != nil {
		return out, fmt.Errorf("applying %T: %w", command, err)
	}
	return out, nil
}

// stubDriver pretends hypervisors whose guests are all the stub.
type stubDriver struct {
	dispatch.Driver
	socket string
}

// DialCall implements vmm.Channels.
func (d stubDriver) DialCall(ctx context.Context, _ vmm.Ref) (net.Conn, error) {
	var dialer net.Dialer
	return dialer.DialContext(ctx, "unix", d.socket)
}

type noImages struct{}

func (noImages) Function(context.Context) (image.Bundle, error) {
	return image.Bundle{Digest: "none", Kernel: "/none", Initrd: "/none", Cmdline: call.RoleWord}, nil
}

func (noImages) Runtime(context.Context, string) (image.Disk, error) { return image.Disk{}, nil }

// local is the dispatcher as the gateway sees it.
type local struct{ d *dispatch.Dispatcher }

func (l local) Invoke(ctx context.Context, inv *blixard.Invocation, try gateway.Try, w blixard.ResponseSink) (blixard.InvocationReport, error) {
	return l.d.Invoke(ctx, dispatch.Request{Invocation: inv, MayStart: try.MayStart, MayWait: try.MayWait}, w)
}

func (l local) Load() gateway.NodeLoad { return gateway.NodeLoad{MemoryMiB: l.d.Status().UsedMiB} }

// runGateway is a node's gateway and dispatcher, with the stub for a guest.
func runGateway(socket string) error {
	dir, err := os.MkdirTemp("", "bg")
	if err != nil {
		return fmt.Errorf("making a directory: %w", err)
	}
	defer func() {
		if err := os.RemoveAll(dir); err != nil {
			say("removing %s: %v", dir, err)
		}
	}()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	store := code.Store{Root: filepath.Join(dir, "code")}
	c, err := stubState(ctx, store)
	if err != nil {
		return err
	}
	d, err := dispatch.New(dispatch.Options{
		Node: "n1", Cluster: c, Lease: func() bool { return true }, Driver: stubDriver{fake.NewMachine(fake.Options{Now: time.Now}).Open(), socket},
		Code: store, Images: noImages{}, Dir: filepath.Join(dir, "d"), Limits: dispatch.Limits{BudgetMiB: 100_000, RecycleCalls: 1 << 40, Route: route.Limits{}},
	})
	if err != nil {
		return err
	}
	g, err := gateway.New(gateway.Options{Node: "n1", View: c.View, Propose: c.Propose, Local: local{d}, Secret: func() string { return "s" }, Metrics: gateway.NewMetrics()})
	if err != nil {
		return err
	}
	var group sync.WaitGroup
	for _, run := range []func(context.Context) error{d.Run, g.Run} {
		group.Go(func() {
			if err := run(ctx); err != nil {
				say("the gateway: %v", err)
			}
		})
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("listening: %w", err)
	}
	group.Go(func() {
		if err := g.Serve(ctx, l); err != nil {
			say("the gateway: %v", err)
		}
	})
	fmt.Println(l.Addr(), "-")
	_, err = io.Copy(io.Discard, os.Stdin)
	cancel()
	group.Wait()
	return err
}

// stubState is a cluster of one node with one function and its trigger.
func stubState(ctx context.Context, store code.Store) (*alone, error) {
	zip, err := code.Zip("bootstrap", 0o755, []byte("#!/bin/sh\n"))
	if err != nil {
		return nil, fmt.Errorf("packing the code: %w", err)
	}
	p, err := store.Put(ctx, strings.NewReader(string(zip)))
	if err != nil {
		return nil, fmt.Errorf("storing the code: %w", err)
	}
	s := state.New()
	c := &alone{state: s, view: s.View(), news: make(chan struct{})}
	spec := blixard.FunctionSpec{Runtime: "bootstrap", MemoryMiB: 128, Snapshot: "off"}
	spec.Defaults()
	for _, command := range []func() state.Command{
		func() state.Command {
			return &state.Bootstrap{
				ClusterID: "c", Name: "c", Secret: "s", RaftID: 1, FeatureLevel: blixard.FeatureLevel,
				Node: state.NodeIdentity{Name: "n1", Address: "127.0.0.1:1", Roles: []string{"hypervisor"}},
			}
		},
		func() state.Command {
			return &state.ReportNode{
				Name: "n1", RaftID: c.View().Node("n1").RaftID, Address: "127.0.0.1:1", Hypervisors: []string{"fake"}, FeatureLevel: blixard.FeatureLevel,
				Capacity: blixard.Resources{MilliCPU: 8000, MemoryMiB: 8192, DiskMiB: 8192},
			}
		},
		func() state.Command {
			return &state.CreateFunction{Name: "stub", Spec: spec, CodeDigest: p.Digest, CodeBytes: p.Bytes, MaxConcurrent: 100, Reserved: true}
		},
		func() state.Command {
			return &state.SetFunction{Name: "stub", Trigger: &blixard.Trigger{ID: "t", Kind: "http", Path: path("stub")}}
		},
		func() state.Command {
			view := c.View()
			return &state.AssignBuild{Function: "stub", Seq: view.FunctionVersion("stub", 0).Seq, Node: "n1", NodeEpoch: view.Node("n1").Epoch}
		},
	} {
		if _, err := c.Propose(ctx, command(), ""); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// child starts this program as something else, and returns where it serves and
// what it says beside it.
func child(ctx context.Context, args ...string) (address, words string, stop func(), err error) {
	self, err := os.Executable()
	if err != nil {
		return "", "", nil, fmt.Errorf("finding this program: %w", err)
	}
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		return "", "", nil, fmt.Errorf("starting %s: %w", args[0], err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", "", nil, fmt.Errorf("starting %s: %w", args[0], err)
	}
	if err := cmd.Start(); err != nil {
		return "", "", nil, fmt.Errorf("starting %s: %w", args[0], err)
	}
	stop = func() {
		if err := in.Close(); err != nil {
			say("ending %s: %v", args[0], err)
		}
		if err := cmd.Wait(); err != nil {
			say("%s has ended: %v", args[0], err)
		}
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		stop()
		return "", "", nil, fmt.Errorf("waiting for %s: %w", args[0], err)
	}
	address, words, _ = strings.Cut(strings.TrimSpace(line), " ")
	return address, words, stop, nil
}

// benchStub compares calls through the gateway to a stub with calls of the stub
// over HTTP; they take turns.
func benchStub(ctx context.Context, b *bench) error {
	direct, socket, stop, err := child(ctx, stubCommand)
	if err != nil {
		return err
	}
	defer stop()
	through, _, stop, err := child(ctx, gatewayCommand, socket)
	if err != nil {
		return err
	}
	defer stop()
	if err := until(ctx, 20*time.Second, "the gateway", func() error {
		c, err := dial(through, path("stub"))
		if err != nil {
			return err
		}
		defer c.close()
		_, err = c.call(false)
		return err
	}); err != nil {
		return err
	}
	if err := b.transfer(through); err != nil {
		return err
	}
	const rounds = 5
	var rps, directRPS, added, one, directOne times
	for range rounds {
		perSecond, _, err := hammer(through, path("stub"), 16, b.seconds)
		if err != nil {
			return err
		}
		rps = append(rps, perSecond)
		if perSecond, _, err = hammer(direct, "/", 16, b.seconds); err != nil {
			return err
		}
		directRPS = append(directRPS, perSecond)
		_, with, err := hammer(through, path("stub"), 1, b.seconds/2)
		if err != nil {
			return err
		}
		_, without, err := hammer(direct, "/", 1, b.seconds/2)
		if err != nil {
			return err
		}
		one, directOne = append(one, with.at(0.5)), append(directOne, without.at(0.5))
		added = append(added, with.at(0.5)-without.at(0.5))
	}
	say("16 connections: %.0f/s through the gateway, %.0f/s direct; one: p50 %.3f ms, direct %.3f (load %s)", rps.at(0.5), directRPS.at(0.5), one.at(0.5), directOne.at(0.5), loadNow())
	b.out.put("warm_rps", rps.at(0.5))
	b.out.put("direct_rps", directRPS.at(0.5))
	b.out.put("warm_added_p50_ms", added.at(0.5))
	b.out.put("direct_p50_ms", directOne.at(0.5))
	b.out["warm_load"] = loadNow()
	return nil
}

// transfer finds out what the host's part of a call's transfer is.
func (b *bench) transfer(address string) error {
	c, err := dial(address, path("stub"))
	if err != nil {
		return err
	}
	defer c.close()
	var transfers []float64
	for range 200 {
		a, err := c.call(true)
		if err != nil {
			return err
		}
		transfers = append(transfers, a.parts["transfer"])
	}
	slices.Sort(transfers)
	b.stubMS = transfers[len(transfers)/2]
	say("the host's part of a call's transfer: %.3f ms", b.stubMS)
	return nil
}
