package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/blixard/blixard/internal/network/bridge"
	"github.com/blixard/blixard/internal/vmm/qemu"
)

func vmsDir(dataDir string) string     { return filepath.Join(dataDir, "vms") }
func networkDir(dataDir string) string { return filepath.Join(dataDir, "network") }

// openNetwork opens the bridge network of this node. It changes nothing before a
// guest is attached, and tells by itself when the machine or the user has not
// what it takes. Nodes of one machine choose different subnets of the pool.
func (n *node) openNetwork() error {
	pool, err := netip.ParsePrefix(n.cfg.Network.Subnet)
	if err != nil {
		return fmt.Errorf("reading network.subnet: %w", err)
	}
	wires, err := bridge.New(bridge.Options{
		Dir: networkDir(n.cfg.Cluster.DataDir), Bridge: n.cfg.Network.BridgeName, Pool: pool,
		Seed: fmt.Sprintf("%s %d", n.cfg.Cluster.Name, n.id.RaftID), Log: n.log,
	})
	if err != nil {
		return fmt.Errorf("opening the bridge network: %w", err)
	}
	n.close, n.wires = append(n.close, wires.Close), wires
	return nil
}

// detachAll takes every instance of this node from the network.
func (n *node) detachAll(ctx context.Context) error { return detachAll(ctx, n.wires) }

func detachAll(ctx context.Context, wires *bridge.Network) error {
	all, err := wires.List(ctx)
	if err != nil {
		return fmt.Errorf("detaching the instances of a node: %w", err)
	}
	for _, a := range all {
		if err := wires.Detach(ctx, a.Ref); err != nil {
			return fmt.Errorf("detaching the instances of a node: %w", err)
		}
	}
	return nil
}

// endNode takes away what the instances of a node, whose processes have ended,
// left outside of its data directory.
func endNode(ctx context.Context, dataDir string) error {
	return errors.Join(endNetwork(ctx, dataDir), qemu.RemoveGroups(vmsDir(dataDir)))
}

// endNetwork takes every instance of such a node from the network.
func endNetwork(ctx context.Context, dataDir string) error {
	dir := networkDir(dataDir)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	wires, err := bridge.New(bridge.Options{Dir: dir})
	if err != nil {
		return fmt.Errorf("opening the bridge network: %w", err)
	}
	return errors.Join(detachAll(ctx, wires), wires.Close())
}
