package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
)

func (a *app) clusterRecord() *cobra.Command {
	var since uint64
	var follow bool
	cmd := &cobra.Command{
		Use: "record [FILE]", Short: "Record what the cluster does, to be replayed by blixard sim replay", Args: takes("[FILE]"),
		Long: `Copy the log of the answering node to FILE (standard output without it): the
state at one index, every change that was applied after it, and hashes of what
came of them. "blixard sim replay FILE" plays it back command by command.

The recording reaches back to the node's last snapshot. With --follow it goes on
until Ctrl-C. FILE holds the cluster's secret and is readable by its owner only.`,
		Example: "  blixard cluster record incident.blxrec\n  blixard cluster record --follow incident.blxrec",
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				if _, is := terminal(a.env.Stdout); is {
					return blixard.Invalid("FILE", "name a file, or redirect the output", "a recording cannot be shown on a terminal")
				}
				return a.record(cmd.Context(), since, follow, a.env.Stdout.Write)
			}
			return a.recordTo(cmd.Context(), since, follow, args[0])
		},
	}
	cmd.Flags().Uint64Var(&since, "since", 0, "begin with a state not newer than this `index`; 0: as early as the node keeps its log")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what happens from now on, until Ctrl-C")
	return cmd
}

// writing is a function as a writer.
type writing func([]byte) (int, error)

func (w writing) Write(b []byte) (int, error) { return w(b) }

func (a *app) record(ctx context.Context, since uint64, follow bool, w writing) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	if !follow {
		var cancel context.CancelFunc
		ctx, cancel = a.wait(ctx)
		defer cancel()
	}
	return c.Record(ctx, since, follow, w)
}

// recordTo writes beside the file first, so that a recording that failed is
// never taken for one; what was followed until it broke off is kept.
func (a *app) recordTo(ctx context.Context, since uint64, follow bool, path string) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".blixard-record-*")
	if err != nil {
		return blixard.Invalid("FILE", "", "cannot write %s: %v", path, err)
	}
	written := int64(0)
	err = a.record(ctx, since, follow, func(b []byte) (int, error) {
		n, err := f.Write(b)
		written += int64(n)
		if err != nil {
			return n, fmt.Errorf("writing %s: %w", path, err)
		}
		return n, nil
	})
	if err != nil && (!follow || written == 0) {
		return errors.Join(err, f.Close(), os.Remove(f.Name()))
	}
	if closed := errors.Join(f.Sync(), f.Close()); closed != nil {
		return errors.Join(err, fmt.Errorf("writing %s: %w", path, closed), os.Remove(f.Name()))
	}
	if renamed := os.Rename(f.Name(), path); renamed != nil {
		return errors.Join(err, fmt.Errorf("writing %s: %w", path, renamed))
	}
	if err != nil {
		a.note("the recording in %s ends here", path)
		return err
	}
	if a.output == formatTable || a.output == formatWide {
		fmt.Fprintf(a.env.Stdout, "recorded to %s (%d bytes)\n", path, written)
		return nil
	}
	return a.done("recording", path, "written")
}
