package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

func (a *app) clusterTransferLeader() *cobra.Command {
	return &cobra.Command{
		Use: "transfer-leader [NODE]", Short: "Hand leadership to another voter", Args: takes("[NODE]"), ValidArgsFunction: a.completeOneNode,
		RunE: func(cmd *cobra.Command, args []string) error {
			to := ""
			if len(args) == 1 {
				to = args[0]
				if err := blixard.CheckName(to); err != nil {
					return err
				}
			}
			return a.transferLeader(cmd.Context(), to)
		},
	}
}

func (a *app) transferLeader(ctx context.Context, to string) error {
	before, err := ask(ctx, a, (*client.Client).GetStatus, &blixardv1.GetStatusRequest{})
	if err != nil {
		return err
	}
	if to != "" && before.Leader == to {
		return a.done("node", to, "leads already")
	}
	if _, err := ask(ctx, a, (*client.Client).TransferLeader, &blixardv1.TransferLeaderRequest{To: to}); err != nil {
		return err
	}
	leader := ""
	err = a.poll(ctx, "leadership has not moved", func(ctx context.Context) (bool, string, error) {
		now, err := ask(ctx, a, (*client.Client).GetStatus, &blixardv1.GetStatusRequest{})
		if err != nil {
			return false, "", err
		}
		leader = now.Leader
		moved := leader == to || to == "" && leader != "" && (leader != before.Leader || len(now.Nodes) == 1)
		return moved, "the leader is " + firstOf(leader, "not known"), nil
	})
	if err != nil {
		return err
	}
	return a.done("node", leader, "leads")
}

func (a *app) clusterSnapshot() *cobra.Command {
	return &cobra.Command{
		Use: "snapshot [FILE]", Short: "Have a snapshot written, or copy the state to FILE", Args: takes("[FILE]"),
		Long: `Without FILE the answering node writes a snapshot of the state and shortens its
log. With FILE the state is copied there; FILE holds the cluster's secret and is
readable by its owner only.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				return a.downloadSnapshot(cmd.Context(), args[0])
			}
			got, err := ask(cmd.Context(), a, (*client.Client).WriteSnapshot, &blixardv1.WriteSnapshotRequest{})
			if err != nil {
				return err
			}
			return a.done("snapshot", fmt.Sprint(got.Index), "written")
		},
	}
}

// downloadSnapshot writes beside the file first, so that a half one is never
// taken for a whole.
func (a *app) downloadSnapshot(ctx context.Context, path string) (err error) {
	c, err := a.client()
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".blixard-snapshot-*")
	if err != nil {
		return blixard.Invalid("FILE", "", "cannot write %s: %v", path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	ctx, cancel := a.wait(ctx)
	defer cancel()
	if err := c.DownloadSnapshot(ctx, f); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := f.Sync(); err != nil {
		return errors.Join(fmt.Errorf("writing %s: %w", path, err), f.Close())
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	if a.output == formatTable || a.output == formatWide {
		fmt.Fprintf(a.env.Stdout, "snapshot written to %s\n", path)
		return nil
	}
	return a.done("snapshot", path, "written")
}

func (a *app) clusterMaintenance() *cobra.Command {
	var change changeFlags
	cmd := &cobra.Command{
		Use: "maintenance-mode enable|disable", Short: "Place, move and restart nothing by itself", Args: takes("enable|disable"),
		ValidArgs: []string{"enable", "disable"},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := oneOf("maintenance-mode", args[0], []string{"enable", "disable"}); err != nil {
				return err
			}
			on := args[0] == "enable"
			answer, err := ask(cmd.Context(), a, (*client.Client).SetMaintenance, &blixardv1.SetMaintenanceRequest{On: &on, DryRun: change.dryRun})
			words := map[bool]string{true: "on", false: "off"}[on]
			switch {
			case err != nil:
				return err
			case answer.Noop:
				return a.done("cluster", "maintenance-mode", "is already "+words)
			case change.dryRun:
				return a.done("cluster", "maintenance-mode", "would be "+words)
			}
			return a.done("cluster", "maintenance-mode", "is "+words)
		},
	}
	change.add(cmd, false)
	return cmd
}
