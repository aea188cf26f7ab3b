package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

func (a *app) devStatus() *cobra.Command {
	var flags listFlags
	cmd := &cobra.Command{
		Use: "status", Short: "The nodes of the cluster on this machine", Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := a.needDev(false)
			if err != nil {
				return err
			}
			s, statusErr := d.status(cmd.Context())
			l := d.listing(s)
			l.whole = func(objects []any) any {
				return map[string]any{"dir": d.dir, "leader": s.GetLeader(), "nodes": objects}
			}
			if err := a.print(a.env.Stdout, l, flags); err != nil {
				return err
			}
			if statusErr != nil {
				return fmt.Errorf("asking the cluster: %w", statusErr)
			}
			return nil
		},
	}
	flags.add(cmd, false)
	return cmd
}

func (d *devCluster) listing(s *blixardv1.ClusterStatus) *listing {
	l := &listing{
		key: "nodes", columns: []column{{name: "NODE"}, {name: "SERVER"}, {name: "STATE"}, {name: "ROLE"}, {name: "PID"}, {name: "ADDRESS"}, {name: "PUBLISH"}, {name: "DATA", wide: true}, {name: "LOG", wide: true}},
	}
	known := map[string]*blixardv1.Node{}
	for _, n := range s.GetNodes() {
		known[n.Id] = n
	}
	for _, n := range d.Nodes {
		server, pid := "down", 0
		if n.alive() {
			server, pid = "up", n.Pid
		}
		of := known[n.Name]
		pidCell := str("")
		if pid > 0 {
			pidCell = num(pid)
		}
		l.rows = append(l.rows, row{
			name: "node/" + n.Name,
			object: map[string]any{
				"id": n.Name, "server": server, "pid": pid, "state": of.GetState(), "role": of.GetRole(), "address": n.Listen, "publishAddress": n.Publish,
				"dataDir": d.dataDir(n), "log": d.logFile(n),
			},
			cells: []cell{str(n.Name), str(server), str(of.GetState()), str(of.GetRole()), pidCell, str(n.Listen), str(n.Publish), str(d.dataDir(n)), str(d.logFile(n))},
		})
	}
	return l
}

func (a *app) completeDevNodes(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	d, err := a.openDev(false)
	if err != nil || d == nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []string
	for _, n := range d.Nodes {
		out = append(out, n.Name)
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// withDev runs do with the locked cluster.
func (a *app) withDev(do func(*devCluster) error) error {
	d, err := a.needDev(true)
	if err != nil {
		return err
	}
	return errors.Join(do(d), d.release())
}

func (a *app) devKill() *cobra.Command {
	var withVMs bool
	cmd := &cobra.Command{
		Use: "kill NODE…", Short: "Kill the server of a node with SIGKILL, as a crash would", Args: takes("NODE…"), ValidArgsFunction: a.completeDevNodes,
		Long: `Kill the server of a node with SIGKILL. Its VMs run on, as after a crash of the
server; --vms kills them too, as a power cut would.`,
		RunE: func(_ *cobra.Command, args []string) error {
			return a.withDev(func(d *devCluster) error {
				var victims []*devNode
				for _, name := range args { // all are known before one is killed
					n, err := d.node(name)
					if err != nil {
						return err
					}
					victims = append(victims, n)
				}
				for _, n := range victims {
					if err := a.killNode(d, n, withVMs); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&withVMs, "vms", false, "kill its VMs too, as a power cut would")
	return cmd
}

func (a *app) killNode(d *devCluster, n *devNode, withVMs bool) error {
	var victims []process
	if n.alive() {
		p, err := readProcess(n.Pid)
		if err != nil {
			return fmt.Errorf("looking at the server of %s: %w", n.Name, err)
		}
		victims = append(victims, p)
	} else if !withVMs {
		return blixard.Errorf(blixard.CodeConflict, "the server of %s does not run", n.Name)
	}
	for _, p := range victims {
		if err := p.signal(unix.SIGKILL); err != nil {
			return err
		}
	}
	if left := awaitEnd(victims, 5*time.Second); len(left) > 0 {
		return blixard.Errorf(blixard.CodeUnavailable, "the server of %s does not end", n.Name)
	}
	n.Pid, n.Ticks, n.Started = 0, 0, false
	if err := d.save(); err != nil {
		return err
	}
	if !withVMs {
		return a.done("node", n.Name, "killed")
	}
	exe, err := a.serverExe()
	if err != nil {
		return err
	}
	if err := endAll(d.dataDir(n), exe, 0); err != nil {
		return err
	}
	return a.done("node", n.Name, "killed with its VMs")
}

func (a *app) devStart() *cobra.Command {
	noWait := false
	cmd := &cobra.Command{
		Use: "start NODE…", Short: "Start the server of a node again", Args: takes("NODE…"), ValidArgsFunction: a.completeDevNodes,
		RunE: func(cmd *cobra.Command, args []string) error {
			var started []*devNode
			var d *devCluster
			err := a.withDev(func(locked *devCluster) error {
				d = locked
				nodes := make([]*devNode, len(args))
				for i, name := range args { // all are known before one is started
					var err error
					if nodes[i], err = d.node(name); err != nil {
						return err
					}
				}
				for _, n := range nodes {
					if n.alive() {
						if err := a.done("node", n.Name, "runs already"); err != nil {
							return err
						}
						continue
					}
					if err := a.startNode(cmd.Context(), d, n); err != nil {
						return err
					}
					started = append(started, n)
				}
				return nil
			})
			if err != nil {
				return err
			}
			// Others may be needed for a majority: nobody is kept from starting them.
			for _, n := range started {
				if !noWait {
					if err := a.awaitNode(cmd.Context(), d, n); err != nil {
						return err
					}
				}
				if err := a.done("node", n.Name, "started"); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "do not wait until the node is ready")
	return cmd
}

// startNode starts the server of a node.
func (a *app) startNode(ctx context.Context, d *devCluster, n *devNode) error {
	join, token := "", ""
	if !joined(d, n) && n != d.Nodes[0] {
		var err error
		if token, err = d.joinToken(ctx, n); err != nil {
			return err
		}
		join = d.Nodes[0].Listen
	}
	return d.begin(a, n, join, token)
}

// awaitNode waits until a node is ready, in its own words.
func (a *app) awaitNode(ctx context.Context, d *devCluster, n *devNode) error {
	return a.poll(ctx, "node/"+n.Name+" is not ready", func(ctx context.Context) (bool, string, error) {
		if !n.alive() {
			return false, "", blixard.Errorf(blixard.CodeRefused, "the server of %s has ended: %s", n.Name, d.lastWords(n))
		}
		s, err := d.status(ctx, n.Listen)
		if err != nil {
			return false, "waiting for an answer of " + n.Name, nil //nolint:nilerr // it has not come up yet
		}
		for _, m := range s.Nodes {
			switch {
			case m.Id != n.Name:
			case s.Leader == "":
				return false, n.Name + " runs and waits for a leader: a majority of the voters must run", nil
			default:
				return m.State == "Ready" && s.Ready, n.Name + " is " + m.State, nil
			}
		}
		if !s.Ready {
			return false, n.Name + " runs and has not heard from the cluster yet", nil
		}
		return false, n.Name + " is no member", nil
	})
}

func (a *app) devEnv() *cobra.Command {
	return &cobra.Command{
		Use: "env", Short: "Print shell exports that point commands at the cluster", Args: takes(),
		Example: "  eval \"$(blixard dev env)\"",
		RunE: func(*cobra.Command, []string) error {
			d, err := a.needDev(false)
			if err != nil {
				return err
			}
			token := d.token()
			if token == "" {
				return &blixard.Error{Code: blixard.CodeUnavailable, Message: "the cluster in " + d.dir + " has no token yet", Hint: "`blixard dev up --detach` starts it and waits until it is ready"}
			}
			env := [][2]string{{"BLIXARD_ADDR", strings.Join(d.addresses(), ",")}, {"BLIXARD_TOKEN", token}, {"BLIXARD_DEV_DIR", d.dir}}
			if a.output == formatJSON || a.output == formatYAML {
				out := map[string]string{}
				for _, kv := range env {
					out[kv[0]] = kv[1]
				}
				return a.printObject(a.env.Stdout, out)
			}
			for _, kv := range env {
				fmt.Fprintf(a.env.Stdout, "export %s='%s'\n", kv[0], strings.ReplaceAll(kv[1], "'", `'\''`))
			}
			return nil
		},
	}
}
