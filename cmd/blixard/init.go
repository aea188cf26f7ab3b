package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/agent"
	"github.com/blixard/blixard/internal/config"
	"github.com/blixard/blixard/internal/server"
)

// initCommand makes this machine a node: the founder of a cluster, or with
// --cluster-join a member of one.
func initCommand() *cobra.Command {
	f := new(serverFlags)
	var members []string
	cmd := &cobra.Command{
		Use: "init", Short: "Make this machine the first node of a new cluster, or a node of an existing one",
		Example: "  blixard init --node-id node1 --listen 10.0.0.1:7400\n  blixard init --cluster-join 10.0.0.1:7400 --token blx1.… --node-id node2 --listen 10.0.0.2:7400",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := f.load()
			if err != nil {
				return err
			}
			if len(members) > 0 {
				cfg.Cluster.Join = members
			}
			if len(cfg.Cluster.Join) > 0 {
				return joinHere(cmd, cfg, false)
			}
			return foundHere(cmd.OutOrStdout(), cmd.ErrOrStderr(), cfg)
		},
	}
	f.bind(cmd)
	cmd.Flags().StringSliceVar(&members, "cluster-join", nil, "member of the cluster to join (host:port)")
	return cmd
}

// clusterInitCommand is `cluster init`.
func clusterInitCommand() *cobra.Command {
	f := new(serverFlags)
	cmd := &cobra.Command{
		Use: "init", Short: "Make this machine the first node of a new cluster", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := f.load()
			if err != nil {
				return err
			}
			return foundHere(cmd.OutOrStdout(), cmd.ErrOrStderr(), cfg)
		},
	}
	f.bind(cmd)
	return cmd
}

// clusterJoinCommand is `cluster join`.
func clusterJoinCommand() *cobra.Command {
	f := new(serverFlags)
	var address string
	var replace bool
	cmd := &cobra.Command{
		Use: "join", Short: "Make this machine a node of an existing cluster",
		Long: `Make this machine a node of an existing cluster. The token, printed by "blixard
init" or "blixard cluster token create" on a member, names the cluster's members;
--join names others. Afterwards "blixard server" runs the node.

A node whose raft log is lost or damaged joins again with --replace: what it
knew is set aside, and it gets everything anew from the others.`,
		Example: "  blixard cluster join --token blx1.first.…@10.0.0.1:7400 --node-id node4 --address 10.0.0.4:7400",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := f.load()
			if err != nil {
				return err
			}
			if address != "" {
				cfg.Cluster.Advertise = withPort(address)
				if !cmd.Flags().Changed("listen") && cfg.Cluster.Listen == config.Default().Cluster.Listen {
					cfg.Cluster.Listen = cfg.Cluster.Advertise
				}
				if err := cfg.Check(); err != nil {
					return err
				}
			}
			return joinHere(cmd, cfg, replace)
		},
	}
	f.bind(cmd)
	cmd.Flags().StringVar(&address, "address", "", "address of this node, as other nodes reach it (port 7400 if none is given)")
	cmd.Flags().BoolVar(&replace, "replace", false, "take the place of the node of this name, whose disk is lost or damaged; what this directory knew is set aside")
	return cmd
}

func foundHere(out, words io.Writer, cfg config.Config) error {
	id, err := server.Found(cfg.Cluster.DataDir, blixard.NodeName(cfg.Cluster.NodeID))
	if err != nil {
		return err
	}
	fmt.Fprintf(words, "%s is the first node of the new cluster %s.\nRun it:   %s\nJoin others, within %s:\n", id.Name, id.ClusterID, serverLine(cfg), firstTokenLife)
	tokenID, secret := firstSecret(id)
	fmt.Fprintf(out, "blixard cluster join --token blx1.%s.%s@%s --node-id NAME --address ADDRESS\n", tokenID, secret, advertise(cfg))
	return nil
}

// joinHere makes this machine a node. A directory that is a node's already is
// given to the new one only with --replace, or when the old one was removed.
func joinHere(cmd *cobra.Command, cfg config.Config, replace bool) error {
	dir := cfg.Cluster.DataDir
	old, err := server.ReadIdentity(dir)
	switch {
	case errors.Is(err, server.ErrNoIdentity):
	case err != nil:
		return err
	default:
		removed, err := server.Removed(dir, old)
		if err != nil {
			return err
		}
		if !replace && !removed {
			return &blixard.Error{
				Code: blixard.CodeExists, Message: fmt.Sprintf("%s belongs to the node %s of cluster %s already", dir, old.Name, old.ClusterID),
				Hint: "run it with `blixard server`; if its raft log is lost or damaged, add --replace; for another node give another --data-dir",
			}
		}
		replace = true
		if cfg.Cluster.NodeID == config.Default().Cluster.NodeID {
			cfg.Cluster.NodeID = string(old.Name)
		}
	}
	if replace {
		release, err := holdLog(dir)
		if err != nil {
			return err
		}
		defer release() //nolint:errcheck // the lock goes with the process anyway
	}
	id, err := join(cmd.Context(), cfg, replace, cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "%s is a node of cluster %s now.\nRun it:   %s\n", id.Name, id.ClusterID, serverLine(cfg))
	return nil
}

// serverLine is the command that runs the node just made.
func serverLine(cfg config.Config) string {
	d, line := config.Default(), "blixard server"
	if cfg.Cluster.DataDir != d.Cluster.DataDir {
		line += " --data-dir " + cfg.Cluster.DataDir
	}
	if cfg.Cluster.Listen != d.Cluster.Listen {
		line += " --listen " + cfg.Cluster.Listen
	}
	if cfg.Cluster.Advertise != "" && cfg.Cluster.Advertise != cfg.Cluster.Listen {
		line += " --advertise " + cfg.Cluster.Advertise
	}
	return line
}

func withPort(address string) string {
	for i := len(address) - 1; i >= 0 && address[i] != ']'; i-- {
		if address[i] == ':' {
			return address
		}
	}
	return address + ":7400"
}

// watchdogCommand is started by the agent; see agent.Watchdog.
func watchdogCommand() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use: "watchdog", Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return agent.Watchdog(cmd.Context(), dir) },
	}
	cmd.Flags().StringVar(&dir, "data-dir", "", "data directory of the node")
	return cmd
}
