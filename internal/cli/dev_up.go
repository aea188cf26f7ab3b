package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// serverGrace is how long servers get to end by themselves.
const serverGrace = 5 * time.Second

func (a *app) devUp() *cobra.Command {
	var nodes, vcpus int
	var memory string
	var detach, keep bool
	var args []string
	cmd := &cobra.Command{
		Use: "up", Short: "Start a cluster of real servers on this machine", Args: takes(),
		Long: `Start a cluster of server processes on this machine, on loopback ports that are
free, and wait until all nodes are ready. Their logs are shown until Ctrl-C, which
ends servers and VMs and deletes the cluster, unless it was there before or with
--keep; with --detach they go on in the background until "blixard dev down". The
cluster is kept below $BLIXARD_DEV_DIR (default
~/.local/state/blixard/dev); several with different directories can run at once.
Each node publishes ports of VMs on a loopback address of its own.`,
		Example: "  blixard dev up --detach && eval \"$(blixard dev env)\" && blixard cluster status",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if nodes < 1 || nodes > maxDevNodes {
				return blixard.Invalid("--nodes", "", "--nodes is %d; it must be between 1 and %d", nodes, maxDevNodes)
			}
			if _, err := blixard.ParseMemoryMiB(memory); err != nil {
				return inFlag("--capacity-memory", err)
			}
			if vcpus < 1 || vcpus > blixard.MaxVCPUs {
				return blixard.Invalid("--capacity-vcpus", "", "--capacity-vcpus is %d; it must be between 1 and %d", vcpus, blixard.MaxVCPUs)
			}
			want := &devCluster{Format: 1, CapacityMemory: memory, CapacityVCPUs: vcpus, Args: args}
			return a.devBringUp(cmd, want, nodes, detach, keep)
		},
	}
	f := cmd.Flags()
	f.IntVar(&nodes, "nodes", 3, "how many nodes")
	f.BoolVarP(&detach, "detach", "d", false, "return when the cluster is ready")
	f.BoolVar(&keep, "keep", false, "keep the state when Ctrl-C ends it; blixard dev up starts it again")
	f.StringVar(&memory, "capacity-memory", "4G", "memory that each node offers to VMs")
	f.IntVar(&vcpus, "capacity-vcpus", 8, "vCPUs that each node offers to VMs")
	f.StringArrayVar(&args, "server-arg", nil, "a further argument for each server, such as --server-arg=--lease=2s")
	return cmd
}

func (a *app) devBringUp(cmd *cobra.Command, want *devCluster, nodes int, detach, keep bool) (err error) {
	d, err := a.prepareDev(cmd, want, nodes)
	if err != nil {
		return err
	}
	keep = keep || d != want // what was there before is not this command's to delete
	if err := a.startDev(cmd.Context(), d); err != nil {
		defer func() { err = errors.Join(err, d.release()) }()
		switch {
		case cmd.Context().Err() != nil:
			return errors.Join(err, a.endForeground(d, keep))
		case detach:
			a.note("what was started runs on; `blixard dev down` ends it, `blixard dev logs` shows more")
			return err
		}
		a.note("the logs are kept in %s (`blixard dev down` deletes them)", d.dir)
		return errors.Join(err, a.endDev(d))
	}
	are := "nodes are"
	if len(d.Nodes) == 1 {
		are = "node is"
	}
	a.note("%d %s ready in %s", len(d.Nodes), are, d.dir)
	if err := d.release(); err != nil {
		return err
	}
	if detach {
		a.note("`eval \"$(blixard dev env)\"` points commands at it, `blixard dev down` ends it")
		return nil
	}
	a.note("`eval \"$(blixard dev env)\"` in another shell points commands at it; Ctrl-C ends it")
	followErr := a.followLogs(cmd.Context(), d, d.Nodes, 0)
	return errors.Join(followErr, a.endForeground(d, keep))
}

// endForeground ends a cluster that was brought up in the foreground. Another
// command may have ended it, or changed it, meanwhile.
func (a *app) endForeground(d *devCluster, keep bool) error {
	if d.lock == nil {
		now, err := a.lockedDev()
		if err != nil {
			return err
		}
		if now == nil {
			a.note("ended by another command")
			return nil
		}
		d = now
	}
	a.note("ending servers and VMs")
	if err := a.endDev(d); err != nil {
		return errors.Join(err, d.release())
	}
	if keep {
		a.note("ended; the state is kept in %s (`blixard dev up` starts it again, `blixard dev down` deletes it)", d.dir)
		return d.release()
	}
	err := d.delete()
	if err == nil {
		a.note("ended, and nothing is left of %s", d.dir)
	}
	return errors.Join(err, d.release())
}

// lockedDev reads the cluster as it is now, and waits a while for a command that
// is at work on it; nil when there is none any more.
func (a *app) lockedDev() (*devCluster, error) {
	deadline := time.Now().Add(30 * time.Second)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		d, err := a.openDev(true)
		if blixard.CodeOf(err) != blixard.CodeConflict || time.Now().After(deadline) {
			return d, err
		}
		<-tick.C
	}
}

// prepareDev finds the cluster of the directory, or lays out a new one. It
// returns it locked.
func (a *app) prepareDev(cmd *cobra.Command, want *devCluster, nodes int) (*devCluster, error) {
	d, err := a.openDev(true)
	if err != nil {
		return nil, err
	}
	if d != nil {
		if cmd.Flags().Changed("nodes") && len(d.Nodes) != nodes {
			return nil, errors.Join(&blixard.Error{
				Code: blixard.CodeConflict, Message: fmt.Sprintf("the cluster in %s has %d nodes, not %d", d.dir, len(d.Nodes), nodes),
				Hint: "`blixard dev down` deletes it, or BLIXARD_DEV_DIR names another directory",
			}, d.release())
		}
		return d, nil
	}
	dir, err := a.devDir()
	if err != nil {
		return nil, err
	}
	want.dir = dir
	if err := checkEmpty(dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, blixard.Invalid("BLIXARD_DEV_DIR", "", "cannot make %s: %v", dir, err)
	}
	if err := want.acquire(); err != nil {
		return nil, err
	}
	if err := want.layOut(nodes); err != nil {
		return nil, errors.Join(err, want.release())
	}
	return want, want.save()
}

// checkEmpty refuses a directory that holds something else: `dev down` deletes
// it.
func checkEmpty(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return blixard.Invalid("BLIXARD_DEV_DIR", "", "cannot read %s: %v", dir, err)
	}
	for _, e := range entries {
		if e.Name() != "dev.lock" && e.Name() != "dev.json.new" {
			return blixard.Invalid("BLIXARD_DEV_DIR", "name an empty directory, or one that is not there", "%s holds something that is no development cluster: %s", dir, e.Name())
		}
	}
	return nil
}

// startDev starts what does not run and waits until all nodes are ready.
func (a *app) startDev(ctx context.Context, d *devCluster) error {
	founded := d.token() != ""
	first := d.Nodes[0]
	if !founded {
		if !first.alive() {
			if err := d.begin(a, first, "", ""); err != nil {
				return err
			}
		}
		if err := a.awaitDev(ctx, d, []*devNode{first}, 1); err != nil {
			return err
		}
	}
	for _, n := range d.Nodes {
		if n.alive() {
			continue
		}
		if joined(d, n) {
			if err := d.begin(a, n, "", ""); err != nil {
				return err
			}
			continue
		}
		token, err := d.joinToken(ctx, n)
		if err != nil {
			return err
		}
		if err := d.begin(a, n, first.Listen, token); err != nil {
			return err
		}
	}
	return a.awaitDev(ctx, d, d.Nodes, len(d.Nodes))
}

// voters is how many nodes are to vote before the cluster counts as ready: it
// then survives what its size promises. The servers choose the largest odd
// number up to five.
func (d *devCluster) voters(nodes int) int {
	for _, arg := range d.Args {
		if strings.HasPrefix(arg, "--max-voters") || strings.HasPrefix(arg, "--config") || arg == "--witness" {
			return 1 // the user's business
		}
	}
	return (min(nodes, 5)+1)/2*2 - 1
}

// joined tells whether a node was a member before: its data directory has what
// a member has.
func joined(d *devCluster, n *devNode) bool {
	_, err := os.Stat(filepath.Join(d.dataDir(n), "admin.token"))
	return err == nil
}

func (d *devCluster) joinToken(ctx context.Context, n *devNode) (string, error) {
	c, err := d.connect(d.Nodes[0].Listen)
	if err != nil {
		return "", err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	got, err := c.CreateToken(ctx, &blixardv1.CreateTokenRequest{Node: n.Name})
	if err != nil {
		return "", fmt.Errorf("making a join token for %s: %w", n.Name, err)
	}
	return got.Token, nil
}

// awaitDev waits until the nodes run and the cluster knows that many ready ones
// and a leader.
func (a *app) awaitDev(ctx context.Context, d *devCluster, nodes []*devNode, ready int) error {
	return a.poll(ctx, "the cluster is not ready", func(ctx context.Context) (bool, string, error) {
		for _, n := range nodes {
			if !n.alive() {
				return false, "", blixard.Errorf(blixard.CodeRefused, "the server of %s has ended: %s", n.Name, d.lastWords(n))
			}
		}
		if d.token() == "" {
			return false, "waiting for the first node", nil
		}
		s, err := d.status(ctx)
		if err != nil {
			return false, "waiting for an answer", nil //nolint:nilerr // they have not come up yet
		}
		have, voting := 0, 0
		for _, n := range s.Nodes {
			if n.State == "Ready" && n.Role != "none" {
				have++
			}
			if n.Role == "leader" || n.Role == "voter" {
				voting++
			}
		}
		return have >= ready && voting >= d.voters(ready) && s.Leader != "" && s.Ready, fmt.Sprintf("%d/%d nodes ready, the leader is %s", have, len(d.Nodes), firstOf(s.Leader, "not known")), nil
	})
}

// endDev ends all processes; the state stays.
func (a *app) endDev(d *devCluster) error {
	exe, err := a.serverExe()
	if err != nil {
		return err
	}
	if err := endAll(d.dir, exe, serverGrace); err != nil {
		return err
	}
	for _, n := range d.Nodes {
		n.Pid, n.Ticks = 0, 0
	}
	return errors.Join(d.save(), a.endNodes(d))
}

// endNodes takes away what the nodes have left outside of the cluster's directory.
func (a *app) endNodes(d *devCluster) error {
	if a.env.EndNode == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for _, n := range d.Nodes {
		if err := a.env.EndNode(ctx, d.dataDir(n)); err != nil {
			return fmt.Errorf("ending %s: %w", n.Name, err)
		}
	}
	return nil
}

// serverExe is the base name of the servers' program.
func (a *app) serverExe() (string, error) {
	exe := a.env.Executable
	if exe == "" {
		var err error
		if exe, err = os.Executable(); err != nil {
			return "", fmt.Errorf("finding this program: %w", err)
		}
	}
	if real, err := filepath.EvalSymlinks(exe); err == nil {
		exe = real
	}
	return filepath.Base(strings.TrimSuffix(exe, " (deleted)")), nil
}

func (a *app) devDown() *cobra.Command {
	var keep bool
	cmd := &cobra.Command{
		Use: "down", Short: "End all VMs and servers of the cluster, and delete its state", Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := a.openDev(true)
			if err != nil {
				return err
			}
			if d == nil {
				dir, err := a.devDir()
				if err != nil {
					return err
				}
				a.note("there is no development cluster in %s", dir)
				return nil
			}
			if err := a.endDev(d); err != nil {
				return errors.Join(err, d.release())
			}
			if keep {
				a.note("ended; the state is kept in %s", d.dir)
				return d.release()
			}
			if err := d.delete(); err != nil {
				return errors.Join(err, d.release())
			}
			a.note("ended, and nothing is left of %s", d.dir)
			return d.release()
		},
	}
	cmd.Flags().BoolVar(&keep, "keep", false, "keep the state; blixard dev up starts it again")
	return cmd
}

// delete removes what a development cluster consists of, and the directory if
// nothing else is in it.
func (d *devCluster) delete() error {
	for _, name := range []string{"nodes", "logs", "dev.json.new", "dev.json", "dev.lock"} {
		if err := os.RemoveAll(d.path(name)); err != nil {
			return fmt.Errorf("deleting the cluster's state: %w", err)
		}
	}
	if entries, err := os.ReadDir(d.dir); err == nil && len(entries) == 0 {
		if err := os.Remove(d.dir); err != nil {
			return fmt.Errorf("deleting the cluster's state: %w", err)
		}
	}
	return nil
}
