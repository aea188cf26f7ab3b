package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/schedule"
	"github.com/blixard/blixard/internal/state"
)

const (
	stateInstances = 100_000
	stateNodes     = 1_000
	stateReplicas  = 10
	stateBatch     = 500 // commands in one entry
)

// world applies commands to a state as a replica would.
type world struct {
	s     *state.State
	index uint64
}

func (w *world) apply(commands ...state.Command) error {
	w.index++
	e := make([]state.Envelope, len(commands))
	for i, c := range commands {
		e[i] = state.Envelope{NowMS: int64(w.index), Actor: "bench", Key: fmt.Sprintf("key-%d-%d", w.index, i), Command: c}
	}
	results, _, err := w.s.Apply(w.index, 1, state.EncodeEntry(e))
	if err != nil {
		return fmt.Errorf("applying an entry: %w", err)
	}
	for _, r := range results {
		if r.Err != nil {
			return fmt.Errorf("applying a command: %w", r.Err)
		}
	}
	return nil
}

// benchState fills a state with instances, in this process.
func benchState(ctx context.Context, s settings, r *recorder) error {
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	w := &world{s: state.New()}
	if err := w.fill(ctx); err != nil {
		return err
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	heap := float64(after.HeapAlloc-before.HeapAlloc) / 1e6
	how := fmt.Sprintf("%d running instances of VMs with %d replicas on %d nodes, built through Apply in one process; their events and idempotency keys included", stateInstances, stateReplicas, stateNodes)
	r.add(figure{Name: "heap of 100,000 instances", Value: heap, Unit: "MB", Target: "less than 600 MB", Reached: reached(heap < 600), Method: how})
	return w.snapshot(ctx, s, r, how)
}

// fill registers nodes and VMs, and places and runs their instances.
func (w *world) fill(ctx context.Context) error {
	for i := range stateNodes {
		id := state.NodeIdentity{Name: blixard.NodeName(fmt.Sprintf("node-%04d", i)), Address: fmt.Sprintf("10.0.%d.%d:7400", i/250, i%250), Zone: fmt.Sprintf("zone-%d", i%3)}
		var join state.Command = &state.JoinNode{Node: id}
		if i == 0 {
			join = &state.Bootstrap{ClusterID: "bench", Name: "bench", RaftID: 1, Node: id}
		}
		if err := w.apply(join); err != nil {
			return err
		}
		n := w.s.View().Node(id.Name)
		if err := w.apply(&state.ReportNode{
			Name: id.Name, RaftID: n.RaftID, Address: id.Address, Zone: id.Zone, Hypervisors: []string{"qemu"},
			Capacity: blixard.Resources{MilliCPU: 256_000, MemoryMiB: 1 << 20, DiskMiB: 1 << 24},
		}); err != nil {
			return err
		}
	}
	x := schedule.NewIndex(w.s.View())
	for v := 0; v < stateInstances/stateReplicas; v += stateBatch / stateReplicas {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := w.place(x, v, stateBatch/stateReplicas); err != nil {
			return err
		}
	}
	if n := w.s.View().InstanceCount(); n != stateInstances {
		return fmt.Errorf("the state holds %d instances instead of %d", n, stateInstances)
	}
	return nil
}

// place creates VMs first…first+n-1 and runs all of their replicas.
func (w *world) place(x *schedule.Index, first, n int) error {
	var create, place []state.Command
	for i := first; i < first+n; i++ {
		create = append(create, createCommand(fmt.Sprintf("service-%05d", i), stateReplicas))
	}
	if err := w.apply(create...); err != nil {
		return err
	}
	view := w.s.View()
	for i := first; i < first+n; i++ {
		vm := view.VM(blixard.VMName(fmt.Sprintf("service-%05d", i)))
		for ordinal := 1; ordinal <= stateReplicas; ordinal++ {
			p, ok := x.Place(schedule.Request{VM: vm.Name, Spec: &vm.Spec}, ordinal, vm.FirstGeneration)
			if !ok {
				return fmt.Errorf("no place for instance %d of %s", ordinal, vm.Name)
			}
			place = append(place, &state.PlaceInstance{
				VM: vm.Name, UID: vm.UID, Ordinal: ordinal, Generation: vm.FirstGeneration, SpecVersion: vm.SpecVersion, RestartSeq: vm.RestartSeq, Node: p.Node, NodeEpoch: p.Epoch,
			})
		}
	}
	return w.apply(place...)
}

func createCommand(name string, replicas int) *state.CreateVM {
	spec := blixard.VMSpec{Image: "builtin", Replicas: replicas, VCPUs: 1, MemoryMiB: 512, Labels: []blixard.Label{{Key: "app", Value: "bench"}, {Key: "tier", Value: "web"}}}
	spec.Defaults()
	return &state.CreateVM{Name: blixard.VMName(name), Spec: spec, Start: true}
}

// snapshot writes the state to disk, twice: alone, and while changes go on, and
// compares how long changes take.
func (w *world) snapshot(ctx context.Context, s settings, r *recorder, how string) error {
	took, size, err := writeSnapshot(w.s.View(), filepath.Join(s.dir, "snapshot"))
	if err != nil {
		return err
	}
	r.add(figure{Name: "snapshot of 100,000 instances", Value: took.Seconds(), Unit: "s", Target: "less than 3 s", Reached: reached(took < 3*time.Second), Method: how + fmt.Sprintf("; written to a file with fsync, %d MB", size/1_000_000)})
	quiet, err := w.write(ctx, func() bool { return true }, 2*time.Second)
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	view := w.s.View()
	go func() { // waited for below
		_, _, err := writeSnapshot(view, filepath.Join(s.dir, "snapshot"))
		done <- err
	}()
	ended := false
	busy, err := w.write(ctx, func() bool {
		select {
		case err = <-done:
			ended = true
		default:
		}
		return !ended
	}, time.Minute)
	if err != nil {
		return err
	}
	if !ended {
		if err := <-done; err != nil {
			return err
		}
	}
	method := "creates applied one after the other in this process, a view taken after each as a server does; the slowest of them"
	r.add(figure{Name: "slowest write without a snapshot", Value: slices.Max(quiet), Unit: "ms", Method: method})
	f := figure{Name: "slowest write during the snapshot", Value: slices.Max(busy), Unit: "ms", Method: method, Target: "without stalling writes (taken as: none takes 100 ms)"}
	f.Reached = reached(f.Value < 100)
	r.add(f)
	r.add(figure{Name: "median write during the snapshot", Value: median(busy), Unit: "ms", Method: method})
	r.add(figure{Name: "median write without a snapshot", Value: median(quiet), Unit: "ms", Method: method})
	return nil
}

// write creates VMs while more says so, for at most d, and returns how many
// milliseconds each took.
func (w *world) write(ctx context.Context, more func() bool, d time.Duration) ([]float64, error) {
	var took []float64
	for end := time.Now().Add(d); more() && time.Now().Before(end) && ctx.Err() == nil; {
		start := time.Now()
		if err := w.apply(createCommand(nextName("more"), 1)); err != nil {
			return nil, err
		}
		if w.s.View().Index != w.index {
			return nil, errors.New("a view is not of the newest index")
		}
		took = append(took, float64(time.Since(start).Microseconds())/1000)
	}
	if len(took) == 0 {
		return nil, fmt.Errorf("nothing was written: %w", context.Cause(ctx))
	}
	return took, nil
}

func writeSnapshot(v *state.View, path string) (took time.Duration, size int64, err error) {
	start := time.Now()
	f, err := os.Create(path)
	if err != nil {
		return 0, 0, fmt.Errorf("writing a snapshot: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if size, err = v.WriteTo(io.Writer(f)); err != nil {
		return 0, 0, err
	}
	if err := f.Sync(); err != nil {
		return 0, 0, fmt.Errorf("writing a snapshot: %w", err)
	}
	return time.Since(start), size, nil
}
