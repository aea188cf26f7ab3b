package main

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/client"
	"github.com/blixard/blixard/internal/agent"
	"github.com/blixard/blixard/internal/state"
	"github.com/blixard/blixard/internal/vmm/fake"
)

// What each simulated node offers.
const (
	simulatedMilliCPU  = 64_000
	simulatedMemoryMiB = 256 << 10
)

// simulate runs agents of pretended machines until ctx ends: real agents, that
// report, renew leases and converge, on a driver that only pretends. It is for
// load tests of everything above the hypervisor.
func (n *node) simulate(ctx context.Context, count int) error {
	group, ctx := errgroup.WithContext(ctx)
	for i := 1; i <= count && ctx.Err() == nil; i++ {
		name := blixard.NodeName(fmt.Sprintf("%s-sim-%03d", n.id.Name, i))
		raftID, err := n.joinSimulated(ctx, name, i)
		if ctx.Err() != nil {
			break
		}
		if err != nil {
			return err
		}
		report := func(r agent.NodeReport) *state.ReportNode {
			return &state.ReportNode{
				Name: name, RaftID: raftID, Address: simulatedAddress(name), PublishAddress: "127.0.0.1", Zone: fmt.Sprintf("zone-%d", i%3),
				Capacity: r.Capacity, MaxInstances: r.MaxInstances, Hypervisors: r.Hypervisors, Release: r.Release, FeatureLevel: r.FeatureLevel,
			}
		}
		machine := fake.NewMachine(fake.Options{Now: time.Now})
		a, err := agent.New(agent.Options{
			Node: name, Cluster: n.local.cluster(name, raftID, report), Driver: machine.Open(), Images: pretended{},
			DataDir: filepath.Join(n.cfg.Cluster.DataDir, "simulated", string(name)), Log: slog.New(slog.DiscardHandler),
			Release: release(), Capacity: &blixard.Resources{MilliCPU: simulatedMilliCPU, MemoryMiB: simulatedMemoryMiB, DiskMiB: 1 << 20},
			HeartbeatEvery: time.Duration(n.cfg.Liveness.HeartbeatInterval), Lease: time.Duration(n.cfg.Liveness.Lease),
		})
		if err != nil {
			return fmt.Errorf("making the agent of %s: %w", name, err)
		}
		group.Go(func() error { return a.Run(ctx) })
	}
	return group.Wait()
}

func simulatedAddress(name blixard.NodeName) string { return string(name) + ".invalid:1" }

// joinSimulated makes a pretended machine a member, again after each restart.
func (n *node) joinSimulated(ctx context.Context, name blixard.NodeName, i int) (uint64, error) {
	for {
		short, cancel := context.WithTimeout(ctx, 10*time.Second)
		// Without a key a change of leader could make it join twice, and the first
		// raft ID, which this process would go on with, be void.
		out, err := n.srv.Propose(short, state.Envelope{Key: client.NewKey(), Actor: "simulation", Command: &state.JoinNode{Replace: true, Node: state.NodeIdentity{
			Name: name, Address: simulatedAddress(name), Zone: fmt.Sprintf("zone-%d", i%3), Simulated: true,
		}}})
		cancel()
		if err == nil {
			return out.Value, nil
		}
		if blixard.CodeOf(err) != blixard.CodeUnavailable || ctx.Err() != nil {
			return 0, fmt.Errorf("registering %s: %w", name, err)
		}
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// pretended are images that nothing boots.
type pretended struct{}

// Bundle implements agent.Images.
func (pretended) Bundle(context.Context, string) (agent.Bundle, error) {
	return agent.Bundle{Kernel: "/pretended", NoGuest: true}, nil
}
