package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/internal/api"
	"github.com/blixard/blixard/internal/cli"
	"github.com/blixard/blixard/internal/code"
	"github.com/blixard/blixard/internal/dispatch"
	"github.com/blixard/blixard/internal/gateway"
	"github.com/blixard/blixard/internal/image"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/state"
	"github.com/blixard/blixard/internal/vmm/qemu"
)

// localFunctions run functions on this machine without a cluster: the state of a
// cluster with one node, in memory, and a dispatcher as every node has it.
type localFunctions struct {
	mu      sync.Mutex
	state   *state.State
	changed chan struct{} // closed by the next change

	dir        string
	store      code.Store
	driver     *qemu.Driver
	dispatcher *dispatch.Dispatcher
	stop       context.CancelFunc
	ended      chan error
}

const localNode blixard.NodeName = "local"

// View implements dispatch.Cluster.
func (l *localFunctions) View() *state.View {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state.View()
}

// Wait implements dispatch.Cluster.
func (l *localFunctions) Wait(ctx context.Context, index uint64) error {
	for {
		l.mu.Lock()
		now, changed := l.state.Index(), l.changed
		l.mu.Unlock()
		if now > index {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Fresh implements dispatch.Cluster.
func (l *localFunctions) Fresh(context.Context) (*state.View, error) { return l.View(), nil }

// Propose implements dispatch.Cluster: what is proposed is applied.
func (l *localFunctions) Propose(_ context.Context, c state.Command, key string) (state.Outcome, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := state.Envelope{Request: 1, Key: key, NowMS: time.Now().UnixMilli(), Actor: "test", Command: c}
	results, _, err := l.state.Apply(l.state.Index()+1, 1, state.EncodeEntry([]state.Envelope{e}))
	if err != nil {
		return state.Outcome{}, err
	}
	close(l.changed)
	l.changed = make(chan struct{})
	if results[0].Err != nil {
		return state.Outcome{}, results[0].Err
	}
	return results[0].Outcome, nil
}

// openLocal implements cli.Env.LocalFunctions.
func openLocal(context.Context) (cli.LocalFunctions, error) {
	dir, err := os.MkdirTemp("", "blixard-function-")
	if err != nil {
		return nil, fmt.Errorf("making a directory: %w", err)
	}
	l := &localFunctions{state: state.New(), changed: make(chan struct{}), dir: dir, store: code.Store{Root: filepath.Join(dir, "code")}, ended: make(chan error, 1)}
	if err := l.open(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return l, nil
}

func (l *localFunctions) open() error {
	images := image.Store{Root: filepath.Join(l.dir, "images")}
	if cache, err := os.UserCacheDir(); err == nil { // images are the same in every run
		images.Root = filepath.Join(cache, "blixard", "images")
	}
	log := slog.New(slog.DiscardHandler)
	var err error
	if l.driver, err = qemu.New(qemu.Options{Root: filepath.Join(l.dir, "vms"), Log: log}); err != nil {
		return fmt.Errorf("opening the QEMU driver: %w", err)
	}
	l.dispatcher, err = dispatch.New(dispatch.Options{
		Node: localNode, Cluster: l, Lease: func() bool { return true }, Driver: l.driver, Code: l.store, Images: images, Dir: filepath.Join(l.dir, "templates"), Log: log,
		Limits: dispatch.Limits{Route: route.Limits{Pool: 1}},
	})
	if err != nil {
		return err
	}
	all := blixard.Resources{MilliCPU: int64(runtime.NumCPU()) * 1000, MemoryMiB: 1 << 20}
	for _, c := range []state.Command{
		&state.Bootstrap{ClusterID: "local", Name: "local", Secret: "local", RaftID: 1, FeatureLevel: blixard.FeatureLevel, Node: state.NodeIdentity{Name: localNode, Address: "127.0.0.1:1", Roles: []string{"hypervisor"}}},
		&state.ReportNode{Name: localNode, RaftID: 1, Address: "127.0.0.1:1", Capacity: all, Hypervisors: []string{"qemu"}, FeatureLevel: blixard.FeatureLevel},
	} {
		if _, err := l.Propose(context.Background(), c, ""); err != nil {
			return err
		}
	}
	ctx, stop := context.WithCancel(context.Background())
	l.stop = stop
	go func() { l.ended <- l.dispatcher.Run(ctx) }()
	return nil
}

// Close ends all instances and leaves nothing behind but images.
func (l *localFunctions) Close() error {
	l.stop()
	return errors.Join(<-l.ended, l.driver.Close(), os.RemoveAll(l.dir))
}

// localStart is how long a call may wait for its instance.
const localStart = 2 * time.Minute

// Run implements cli.LocalFunctions.
func (l *localFunctions) Run(ctx context.Context, c cli.LocalCall, sink blixard.ResponseSink) (*blixardv1.FunctionReport, error) {
	spec, err := api.FunctionSpecOf(c.Spec)
	if err != nil {
		return nil, err
	}
	p, err := l.store.Put(ctx, bytes.NewReader(c.Zip))
	if err == nil {
		err = l.store.Inspect(ctx, p.Digest, spec)
	}
	if err == nil {
		err = l.deploy(ctx, c.Name, spec, p)
	}
	if err != nil {
		return nil, err
	}
	v := l.View().FunctionVersion(blixard.FunctionName(c.Name), 0)
	inv := &blixard.Invocation{
		RequestID: gateway.NewRequestID(), Function: blixard.FunctionName(c.Name), Seq: v.Seq, Payload: c.Payload, LogTail: true, Received: time.Now(),
		Deadline: time.Now().Add(localStart + time.Duration(spec.TimeoutMS)*time.Millisecond),
	}
	report, err := l.dispatcher.Invoke(ctx, dispatch.Request{Invocation: inv, MayStart: true, MayWait: true}, sink)
	if err != nil {
		if e, ok := errors.AsType[*blixard.Error](err); ok {
			err = e
		}
		return nil, err
	}
	report.Parts.Total = time.Since(inv.Received)
	return api.Report(&report), nil
}

// deploy makes the function what is to be tried, and waits until it can be
// called.
func (l *localFunctions) deploy(ctx context.Context, name string, spec blixard.FunctionSpec, p code.Package) error {
	fn := blixard.FunctionName(name)
	var err error
	if l.View().Function(fn) == nil {
		_, err = l.Propose(ctx, &state.CreateFunction{Name: fn, Spec: spec, CodeDigest: p.Digest, CodeBytes: p.Bytes}, "")
	} else {
		_, err = l.Propose(ctx, &state.UpdateFunction{Name: fn, Spec: &spec, CodeDigest: p.Digest, CodeBytes: p.Bytes}, "")
	}
	if err != nil {
		return err
	}
	view := l.View()
	if v := view.FunctionVersion(fn, 0); v.State == blixard.FunctionPending {
		if _, err := l.Propose(ctx, &state.AssignBuild{Function: fn, Seq: v.Seq, Node: localNode, NodeEpoch: view.Node(localNode).Epoch}, ""); err != nil {
			return err
		}
	}
	for {
		view = l.View()
		switch v := view.FunctionVersion(fn, 0); v.State {
		case blixard.FunctionActive:
			return nil
		case blixard.FunctionFailed:
			return blixard.Errorf(blixard.CodeRefused, "the code does not start: %s", v.StateReason)
		}
		if err := l.Wait(ctx, view.Index); err != nil {
			return err
		}
	}
}
