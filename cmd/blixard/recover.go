package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/config"
	"github.com/blixard/blixard/internal/raftlog/wal"
	"github.com/blixard/blixard/internal/server"
)

// clusterRecoverCommand is `cluster recover`.
func clusterRecoverCommand() *cobra.Command {
	f := new(serverFlags)
	var from string
	var discard bool
	cmd := &cobra.Command{
		Use: "recover", Short: "Go on with this node alone, when the majority is gone for good",
		Long: `Make this node the only member of its cluster, with what its own log holds, or
with a state saved by "blixard cluster snapshot FILE". It is for the day when a
majority of the voters is gone for good; as long as it may come back, let it.

With --from it also works on a machine that never was a node, when all machines
are gone: with an empty --data-dir, and --node-id, --listen and --advertise as for
"blixard init". That node takes the cluster over, with its VMs; what ran on the
old machines is taken for lost and runs here, or on nodes that join. The name may
be that of a former node.

The server of this node must be stopped. All other nodes lose their membership:
stop what is left of them first, and have them join again afterwards with
"blixard cluster join --replace". What only they knew is lost. Without
--discard-other-nodes it only tells what it would do.`,
		Example: "  blixard cluster recover --data-dir /var/lib/blixard\n  blixard cluster recover --from backup.snapshot --discard-other-nodes\n" +
			"  blixard cluster recover --from backup.snapshot --node-id node7 --listen 10.0.0.7:7400 --discard-other-nodes",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := f.load()
			if err != nil {
				return err
			}
			return recoverHere(cmd.OutOrStdout(), cmd.ErrOrStderr(), cfg, from, discard)
		},
	}
	f.bind(cmd)
	cmd.Flags().StringVar(&from, "from", "", "`file` saved by blixard cluster snapshot FILE, in place of this node's log")
	cmd.Flags().BoolVar(&discard, "discard-other-nodes", false, "do it: every other node loses its membership, and what only they knew is lost")
	return cmd
}

func recoverHere(out, words io.Writer, cfg config.Config, from string, discard bool) (err error) {
	dir := cfg.Cluster.DataDir
	id, err := server.ReadIdentity(dir)
	elsewhere := errors.Is(err, server.ErrNoIdentity) && from != ""
	switch {
	case elsewhere:
	case errors.Is(err, server.ErrNoIdentity):
		return &blixard.Error{
			Code: blixard.CodeRefused, Message: dir + " belongs to no node, so it holds nothing to go on with",
			Hint: "--data-dir names a node's directory; `blixard cluster recover --from SNAPSHOT` makes this machine a node from a saved state",
		}
	case err != nil:
		return fmt.Errorf("recovering in %s: %w", dir, err)
	default:
		if removed, err := server.Removed(dir, id); err != nil || removed {
			return errors.Join(err, server.CheckLog(dir, id))
		}
	}
	var plan *server.Recovery
	var carry, done func() error
	if elsewhere {
		plan, carry, done, err = planElsewhere(cfg, from)
	} else {
		plan, carry, done, err = planRecovery(dir, id, from)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	id = plan.Identity()
	others := "no other node was a member"
	if len(plan.Others) > 0 {
		names := make([]string, len(plan.Others))
		for i, n := range plan.Others {
			names[i] = string(n)
		}
		others = "these lose their membership: " + strings.Join(names, ", ")
	}
	fmt.Fprintf(words, "%s would go on alone with %d VMs as of entry %d, made %s; %s.\nWhat came after that entry is lost.\n",
		id.Name, plan.VMs, plan.Index, time.UnixMilli(plan.Changed).UTC().Format(time.RFC3339), others)
	if !discard {
		return &blixard.Error{
			Code: blixard.CodeRefused, Message: "nothing was changed",
			Hint: "when the others are gone for good and stopped, run it again with --discard-other-nodes",
		}
	}
	if err := carry(); err != nil {
		return err
	}
	fmt.Fprintf(words, "Done. Run it:   %s\nOther machines join anew with `blixard cluster join --replace`.\n", serverLine(cfg))
	fmt.Fprintf(out, "node/%s recovered\n", id.Name)
	return nil
}

// planRecovery opens what is gone on with; carry makes it so, done lets go of
// everything.
func planRecovery(dir string, id server.Identity, from string) (plan *server.Recovery, carry, done func() error, err error) {
	logDir := server.LogDir(dir)
	if from == "" {
		if err := server.CheckLog(dir, id); err != nil {
			return nil, nil, nil, err
		}
		opened, err := wal.Open(wal.OS, logDir, wal.Options{})
		if err != nil {
			return nil, nil, nil, err
		}
		plan, err = server.RecoverLog(id, opened)
		if err != nil {
			return nil, nil, nil, errors.Join(err, opened.Log.Close())
		}
		return plan, func() error { return plan.Carry(opened.Log) }, opened.Log.Close, nil
	}
	release, err := holdLog(dir)
	if err != nil {
		return nil, nil, nil, err
	}
	plan, err = readSnapshot(from, func(f io.Reader) (*server.Recovery, error) { return server.RecoverSnapshot(id, f) })
	if err != nil {
		return nil, nil, nil, errors.Join(err, release())
	}
	return plan, func() error { return carryNew(dir, plan) }, release, nil
}

// planElsewhere is planRecovery on a machine that is no node yet. Nothing is left
// behind unless it is carried out.
func planElsewhere(cfg config.Config, from string) (plan *server.Recovery, carry, done func() error, err error) {
	dir := cfg.Cluster.DataDir
	plan, err = readSnapshot(from, func(f io.Reader) (*server.Recovery, error) { return server.RecoverElsewhere(identityOf(cfg), f) })
	if err != nil {
		return nil, nil, nil, err
	}
	release := func() error { return nil }
	carry = func() error {
		free, err := holdLog(dir)
		if err != nil {
			return err
		}
		release = free
		// The log comes first: without an identity it starts nothing, and the command
		// can be run again.
		if err := carryNew(dir, plan); err != nil {
			return err
		}
		return server.TakeIdentity(dir, plan.Identity())
	}
	return plan, carry, func() error { return release() }, nil
}

func readSnapshot(from string, plan func(io.Reader) (*server.Recovery, error)) (*server.Recovery, error) {
	f, err := os.Open(from)
	if err != nil {
		return nil, blixard.Invalid("--from", "`blixard cluster snapshot FILE` saves one", "the snapshot cannot be read: %v", err)
	}
	r, err := plan(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("recovering from %s: %w", from, err)
	}
	return r, nil
}

// carryNew makes a new log beside the old one and swaps them. A crash between
// the two renames leaves a node without a log, which refuses to start; the
// command can be run again.
func carryNew(dir string, plan *server.Recovery) error {
	fresh := server.LogDir(dir) + ".new"
	if err := os.RemoveAll(fresh); err != nil {
		return fmt.Errorf("clearing %s: %w", fresh, err)
	}
	opened, err := wal.Open(wal.OS, fresh, wal.Options{})
	if err != nil {
		return err
	}
	if err := errors.Join(plan.Carry(opened.Log), opened.Log.Close()); err != nil {
		return err
	}
	if _, err := server.SetAside(dir); err != nil {
		return err
	}
	if err := os.Rename(fresh, server.LogDir(dir)); err != nil {
		return fmt.Errorf("putting the new log in place: %w", err)
	}
	return wal.OS.SyncDir(dir)
}

// holdLog keeps every server from starting on dir until release is called.
func holdLog(dir string) (release func() error, err error) {
	if err := os.MkdirAll(server.LogDir(dir), 0o700); err != nil {
		return nil, fmt.Errorf("making the log's directory: %w", err)
	}
	lock, err := wal.OS.Lock(filepath.Join(server.LogDir(dir), "LOCK"))
	if errors.Is(err, wal.ErrLocked) {
		return nil, &blixard.Error{Code: blixard.CodeConflict, Message: "a blixard server runs on " + dir, Hint: "stop it first"}
	}
	if err != nil {
		return nil, err
	}
	return lock.Close, nil
}
