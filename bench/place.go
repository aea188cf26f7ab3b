package main

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

const (
	placeNodes    = 100
	placeReplicas = 1_000
	placeSingles  = 500
	placeClients  = 10
)

// benchPlace follows creates until their instances are placed and committed,
// as a watcher sees it.
func benchPlace(ctx context.Context, s settings, r *recorder) error {
	// 100 machines: the servers share them.
	// The servers themselves offer too little for any instance.
	ours, err := startBlixard(ctx, s, "--simulated", fmt.Sprint((placeNodes+2)/3), "--capacity-memory", "64M")
	if err != nil {
		return fmt.Errorf("starting servers with simulated nodes: %w", err)
	}
	defer ours.stop()
	cl, err := ours.client(0, 1, 2)
	if err != nil {
		return err
	}
	defer cl.Close()
	how, err := capacity(ctx, cl)
	if err != nil {
		return err
	}
	say("  %s", how)
	var many, rate, p50 []float64
	for range s.rounds {
		took, err := placeMany(ctx, cl)
		if err != nil {
			return err
		}
		many = append(many, took.Seconds())
		perSecond, median, err := placeSingle(ctx, ours)
		if err != nil {
			return err
		}
		rate, p50 = append(rate, perSecond), append(p50, median)
		say("  1,000 replicas %.3f s; 500 VMs from 10 clients %.0f/s, create to placed p50 %.1f ms", took.Seconds(), perSecond, median)
	}
	nomad := "; Nomad on such a machine (not run here): 2.5 s, 47/s, 65-106 ms"
	r.add(figure{Name: "1,000 replicas of one VM placed and committed", Value: median(many), Unit: "s", Rounds: many, Target: "less than 0.2 s", Reached: reached(median(many) < 0.2), Method: how + "; from the create to the watcher's sight of the last placement" + nomad})
	r.add(figure{Name: "single-replica VMs placed", Clients: placeClients, Value: median(rate), Unit: "1/s", Rounds: rate, Target: "at least 2,000/s", Reached: reached(median(rate) >= 2000), Method: how + "; 500 VMs, from the first create to the watcher's sight of the last placement" + nomad})
	r.add(figure{Name: "create to placed p50", Clients: placeClients, Value: median(p50), Unit: "ms", Rounds: p50, Target: "at most 8 ms", Reached: reached(median(p50) <= 8), Method: how + "; from the create's call to the watcher's sight of the placement" + nomad})
	return nil
}

// capacity tells what the simulated nodes offer, and refuses too little.
func capacity(ctx context.Context, cl *client.Client) (string, error) {
	var text string
	err := until(ctx, 30*time.Second, "the simulated nodes", func(ctx context.Context) error {
		st, err := cl.GetStatus(ctx, &blixardv1.GetStatusRequest{})
		if err != nil {
			return err
		}
		ready := 0
		for _, n := range st.GetNodes() {
			if n.GetState() == "Ready" && n.GetAllocatable().GetMemoryMib() >= 1024 {
				ready++
			}
		}
		text = fmt.Sprintf("%d nodes of %d that offer capacity, %d vCPUs and %d GiB in all", ready, len(st.GetNodes()), st.GetAllocatable().GetMilliCpu()/1000, st.GetAllocatable().GetMemoryMib()>>10)
		if ready < placeNodes {
			return fmt.Errorf("%s; %d nodes are wanted (does `blixard server --simulated` make them?)", text, placeNodes)
		}
		return nil
	})
	return text, err
}

// placement watches instances and notes when each VM got its last one.
type placement struct {
	mu     sync.Mutex
	placed map[string]map[string]time.Time // VM, instance
	wake   chan struct{}
}

// watch notes placements of VMs until the returned function is called.
func watch(ctx context.Context, cl *client.Client) (*placement, func(), error) {
	ctx, cancel := context.WithCancel(ctx)
	p := &placement{placed: map[string]map[string]time.Time{}, wake: make(chan struct{}, 1)}
	ready := make(chan error, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		for m, err := range cl.Watch(ctx, &blixardv1.WatchRequest{Kinds: []string{"instance"}, Snapshot: true}) {
			if err != nil {
				ready <- err
				return
			}
			if m.GetType() == client.WatchReady {
				ready <- nil
			}
			if i := m.GetInstance(); i != nil && m.GetType() == client.WatchChanged && i.GetNode() != "" {
				p.note(i.GetVm(), i.GetId(), time.Now())
			}
		}
	})
	stop := func() { cancel(); wg.Wait() }
	select {
	case err := <-ready:
		if err == nil {
			return p, stop, nil
		}
		stop()
		return nil, nil, fmt.Errorf("watching instances: %w", err)
	case <-time.After(10 * time.Second):
		stop()
		return nil, nil, fmt.Errorf("watching instances: not ready within 10 s")
	}
}

func (p *placement) note(vm, instance string, at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.placed[vm] == nil {
		p.placed[vm] = map[string]time.Time{}
	}
	if _, ok := p.placed[vm][instance]; !ok {
		p.placed[vm][instance] = at
	}
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// all waits until the VMs have that many instances each, and returns when each
// VM got its last.
func (p *placement) all(ctx context.Context, vms []string, replicas int) (map[string]time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		if out, missing := p.look(vms, replicas); missing == 0 {
			return out, nil
		} else if ctx.Err() != nil {
			return nil, fmt.Errorf("%d instances of %s… are not placed", missing, vms[0])
		}
		select {
		case <-p.wake:
		case <-ctx.Done():
		}
	}
}

func (p *placement) look(vms []string, replicas int) (last map[string]time.Time, missing int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	last = map[string]time.Time{}
	for _, vm := range vms {
		missing += max(0, replicas-len(p.placed[vm]))
		for _, at := range p.placed[vm] {
			if at.After(last[vm]) {
				last[vm] = at
			}
		}
	}
	return last, missing
}

func started(name string, replicas int32) *blixardv1.CreateVMRequest {
	return &blixardv1.CreateVMRequest{Name: name, Spec: &blixardv1.VMSpec{Image: "builtin", Vcpus: 1, MemoryMib: 128, Replicas: proto.Int32(replicas)}}
}

// placeMany creates one VM of many replicas and deletes it again.
func placeMany(ctx context.Context, cl *client.Client) (time.Duration, error) {
	p, stop, err := watch(ctx, cl)
	if err != nil {
		return 0, err
	}
	defer stop()
	name := nextName("many")
	start := time.Now()
	if _, err := cl.CreateVM(ctx, started(name, placeReplicas)); err != nil {
		return 0, fmt.Errorf("creating a VM: %w", err)
	}
	last, err := p.all(ctx, []string{name}, placeReplicas)
	if err != nil {
		return 0, err
	}
	return last[name].Sub(start), gone(ctx, cl, []string{name})
}

// placeSingle creates VMs of one replica from several clients at once.
func placeSingle(ctx context.Context, c *cluster) (perSecond, p50 float64, err error) {
	cl, err := c.client(0, 1, 2)
	if err != nil {
		return 0, 0, err
	}
	defer cl.Close()
	p, stop, err := watch(ctx, cl)
	if err != nil {
		return 0, 0, err
	}
	defer stop()
	var vms []string
	begun := map[string]time.Time{}
	var mu sync.Mutex
	errs := make(chan error, placeClients)
	var wg sync.WaitGroup
	start := time.Now()
	for i := range placeClients {
		own, err := c.client(i % len(c.addresses))
		if err != nil {
			return 0, 0, err
		}
		defer own.Close()
		wg.Go(func() {
			for range placeSingles / placeClients {
				name := nextName("one")
				mu.Lock()
				vms, begun[name] = append(vms, name), time.Now()
				mu.Unlock()
				if _, err := own.CreateVM(ctx, started(name, 1)); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		return 0, 0, fmt.Errorf("creating VMs: %w", err)
	default:
	}
	last, err := p.all(ctx, vms, 1)
	if err != nil {
		return 0, 0, err
	}
	var took []float64
	end := start
	for vm, at := range last {
		took = append(took, float64(at.Sub(begun[vm]).Microseconds())/1000)
		if at.After(end) {
			end = at
		}
	}
	return float64(len(vms)) / end.Sub(start).Seconds(), median(took), gone(ctx, cl, vms)
}

// gone deletes VMs and waits until nothing is left of them.
func gone(ctx context.Context, cl *client.Client, vms []string) error {
	if _, err := cl.DeleteVMs(ctx, &blixardv1.DeleteVMsRequest{Names: vms}); err != nil {
		return fmt.Errorf("deleting %s…: %w", vms[0], err)
	}
	return until(ctx, time.Minute, "deleted VMs to be gone", func(ctx context.Context) error {
		st, err := cl.GetStatus(ctx, &blixardv1.GetStatusRequest{})
		if err == nil && (st.GetVms() > 0 || st.GetInstances() > 0) {
			err = fmt.Errorf("%d VMs and %d instances are left of %s", st.GetVms(), st.GetInstances(), strings.Join(vms[:1], ""))
		}
		return err
	})
}
