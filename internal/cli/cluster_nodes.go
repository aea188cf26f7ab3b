package cli

import (
	"context"
	"fmt"
	"net"
	"strings"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

// defaultPort is added to an address without one.
const defaultPort = "7400"

func (a *app) clusterAddNode() *cobra.Command {
	var change changeFlags
	var id, address, zone string
	var roles, labels []string
	var replace, witness bool
	cmd := &cobra.Command{
		Use: "add-node --node-id NAME --address HOST[:PORT]", Short: "Make a machine a member, and print what to run there", Args: takes(),
		Long: `Let a machine join: a token for that node only is made, and the command to run on
it is printed. The machine becomes a member when it joins with that token.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			node, err := nodeIdentity(id, address, zone, roles, labels, witness)
			if err != nil {
				return err
			}
			return a.addNode(cmd.Context(), node, replace, change)
		},
	}
	f := cmd.Flags()
	f.StringVar(&id, "node-id", "", "name of the new node")
	f.StringVar(&address, "address", "", "HOST[:PORT] where the new node will serve")
	f.StringVar(&zone, "zone", "", "zone of the new node")
	f.StringSliceVar(&roles, "roles", []string{"hypervisor"}, "what it is for: hypervisor; nothing else runs instances")
	f.StringArrayVarP(&labels, "label", "l", nil, "label of the node, KEY=VALUE")
	f.BoolVar(&replace, "replace", false, "also when a node of that name is in touch")
	f.BoolVar(&witness, "witness", false, "it votes and runs nothing")
	change.add(cmd, false)
	return cmd
}

// nodeIdentity checks what is said of a new node.
func nodeIdentity(id, address, zone string, roles, labels []string, witness bool) (*blixardv1.NodeIdentity, error) {
	if id == "" {
		return nil, blixard.Invalid("--node-id", "", "--node-id names the new node")
	}
	if err := blixard.CheckName(id); err != nil {
		return nil, inFlag("--node-id", err)
	}
	if address == "" {
		return nil, blixard.Invalid("--address", "write HOST or HOST:PORT", "--address says where the new node will serve")
	}
	if _, _, err := net.SplitHostPort(address); err != nil {
		address = net.JoinHostPort(strings.Trim(address, "[]"), defaultPort)
	}
	if host, port, err := net.SplitHostPort(address); err != nil || host == "" || port == "" || strings.ContainsAny(host, " /?#@;&|$`'\"") {
		return nil, blixard.Invalid("--address", "write HOST or HOST:PORT, such as 10.0.0.4:7400", "the address %q cannot be used", address)
	}
	for _, r := range roles {
		if r == "ceph-osd" || r == "ceph-mon" || r == "ceph-mds" || r == "ceph-mgr" {
			return nil, &blixard.Error{Code: blixard.CodeRefused, Field: "--roles", Message: "the role " + r + " belongs to distributed storage, which this build does not have yet", Hint: "add the node with --roles hypervisor"}
		}
		if err := oneOf("--roles", r, []string{"hypervisor", "control"}); err != nil {
			return nil, err
		}
	}
	pairs, err := parsePairs("--label", labels, checkLabel)
	if err != nil {
		return nil, err
	}
	return &blixardv1.NodeIdentity{Name: id, Address: address, Zone: zone, Roles: roles, Labels: labelMap(pairs), Witness: witness}, nil
}

// addNode makes a token that only this node can use. The membership itself
// begins when the node joins: a voter that does not run would only cost the
// cluster its quorum.
func (a *app) addNode(ctx context.Context, node *blixardv1.NodeIdentity, replace bool, change changeFlags) error {
	_, err := ask(ctx, a, (*client.Client).AddNode, &blixardv1.AddNodeRequest{Node: node, Replace: replace, DryRun: true})
	if err != nil {
		return err
	}
	if change.dryRun {
		return a.done("node", node.Name, "could join from "+node.Address)
	}
	token, err := ask(ctx, a, (*client.Client).CreateToken, &blixardv1.CreateTokenRequest{Node: node.Name})
	if err != nil {
		return err
	}
	status, err := ask(ctx, a, (*client.Client).GetStatus, &blixardv1.GetStatusRequest{})
	if err != nil {
		return err
	}
	member := a.addresses()[0]
	for _, n := range status.Nodes {
		if n.Id == firstOf(status.Leader, status.Node) {
			member = n.Address
		}
	}
	command := fmt.Sprintf("blixard server --node-id %s --listen %s --join %s --token %s", node.Name, node.Address, member, token.Token)
	if node.Zone != "" {
		command += " --zone " + shellQuote(node.Zone)
	}
	for l := range strings.SplitSeq(pairs(node.Labels), ",") {
		if l != "" {
			command += " --label " + shellQuote(l)
		}
	}
	if strings.Join(node.Roles, ",") != "hypervisor" {
		command += " --roles " + strings.Join(node.Roles, ",")
	}
	if node.Witness {
		command += " --witness"
	}
	if a.output == formatJSON || a.output == formatYAML {
		return a.printObject(a.env.Stdout, map[string]any{"kind": "node", "name": node.Name, "token": token.Token, "expiresMs": token.ExpiresMs, "command": command})
	}
	if a.output == formatName {
		return a.done("node", node.Name, "")
	}
	a.note("node/%s may join once within 24 hours; run this there:", node.Name)
	fmt.Fprintln(a.env.Stdout, command)
	return nil
}

// shellQuote quotes a word for a shell.
func shellQuote(s string) string { return commandText([]string{s}) }

func (a *app) clusterRemoveNode() *cobra.Command {
	var change changeFlags
	var migrate, drainOSDs bool
	cmd := &cobra.Command{
		Use: "remove-node NAME", Short: "End a node's membership; with --migrate-vms its instances move first", Args: takes("NAME"), ValidArgsFunction: a.completeOneNode,
		RunE: func(cmd *cobra.Command, args []string) error {
			if drainOSDs {
				return &blixard.Error{Code: blixard.CodeRefused, Field: "--drain-osds", Message: "this build has no distributed storage yet, so there are no OSDs to drain", Hint: "leave --drain-osds out"}
			}
			return a.removeNode(cmd.Context(), args[0], migrate, false, change)
		},
	}
	cmd.Flags().BoolVar(&migrate, "migrate-vms", false, "have its instances start elsewhere first, and wait for it")
	cmd.Flags().BoolVar(&drainOSDs, "drain-osds", false, "refused: this build has no distributed storage yet")
	change.add(cmd, false)
	return cmd
}

func (a *app) clusterForceRemoveNode() *cobra.Command {
	var change changeFlags
	var markDown bool
	cmd := &cobra.Command{
		Use: "force-remove-node NAME", Short: "End the membership of a node that is gone for good", Args: takes("NAME"), ValidArgsFunction: a.completeOneNode,
		Long: `End a node's membership though it holds instances: they count as lost and start
elsewhere. Be sure that the machine is off, or that its server is.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if markDown {
				return &blixard.Error{Code: blixard.CodeRefused, Field: "--mark-osds-down", Message: "this build has no distributed storage yet, so there are no OSDs to mark", Hint: "leave --mark-osds-down out"}
			}
			return a.removeNode(cmd.Context(), args[0], false, true, change)
		},
	}
	cmd.Flags().BoolVar(&markDown, "mark-osds-down", false, "refused: this build has no distributed storage yet")
	change.add(cmd, false)
	return cmd
}

func (a *app) clusterLeave() *cobra.Command {
	var change changeFlags
	var id string
	cmd := &cobra.Command{
		Use: "leave", Short: "Move everything away from this node and end its membership", Args: takes(),
		Long: `End the membership of the node that answers, or of the one named by --node-id,
after its instances have started elsewhere. Its server then ends by itself.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if id == "" {
				status, err := ask(cmd.Context(), a, (*client.Client).GetStatus, &blixardv1.GetStatusRequest{})
				if err != nil {
					return err
				}
				id = status.Node
			}
			return a.removeNode(cmd.Context(), id, true, false, change)
		},
	}
	cmd.Flags().StringVar(&id, "node-id", "", "node that leaves; default: the one that answers")
	change.add(cmd, false)
	return cmd
}

// removeNode ends a membership, after the node's instances have moved if
// asked.
func (a *app) removeNode(ctx context.Context, name string, migrate, force bool, change changeFlags) error {
	if err := blixard.CheckName(name); err != nil {
		return err
	}
	before, err := ask(ctx, a, (*client.Client).GetNode, &blixardv1.GetNodeRequest{Name: name})
	if err != nil {
		return err
	}
	// What will be refused at the end is refused before anything moves.
	moves := migrate && before.Node.Instances > 0
	if _, err := ask(ctx, a, (*client.Client).RemoveNode, &blixardv1.RemoveNodeRequest{Name: name, Force: force || moves, DryRun: true}); err != nil {
		return err
	}
	if change.dryRun {
		return a.done("node", name, "would be removed")
	}
	if moves {
		if err := a.drain(ctx, name, changeFlags{}); err != nil {
			a.note("node/%s stays a member and goes on draining; `blixard cluster uncordon %s` takes that back", name, name)
			return err
		}
	}
	if _, err := ask(ctx, a, (*client.Client).RemoveNode, &blixardv1.RemoveNodeRequest{Name: name, Force: force}); err != nil {
		return err
	}
	err = a.poll(ctx, "node/"+name+" is still a member", func(ctx context.Context) (bool, string, error) {
		_, err := ask(ctx, a, (*client.Client).GetNode, &blixardv1.GetNodeRequest{Name: name})
		return blixard.CodeOf(err) == blixard.CodeNotFound && err != nil, "waiting for the other nodes", err
	})
	if err != nil {
		return err
	}
	return a.done("node", name, "removed")
}

func (a *app) clusterDrain() *cobra.Command {
	var change changeFlags
	cmd := &cobra.Command{
		Use: "drain NAME", Short: "Move every instance away from a node, and place none there", Args: takes("NAME"), ValidArgsFunction: a.completeOneNode,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.drain(cmd.Context(), args[0], change); err != nil {
				return err
			}
			switch {
			case change.dryRun:
				return a.done("node", args[0], "would be drained")
			case change.noWait:
				return a.done("node", args[0], "is draining")
			}
			return a.done("node", args[0], "drained; `blixard cluster uncordon "+args[0]+"` ends it")
		},
	}
	change.add(cmd, true)
	return cmd
}

func (a *app) drain(ctx context.Context, name string, change changeFlags) error {
	if _, err := a.setNode(ctx, &blixardv1.SetNodeRequest{Name: name, Availability: "draining", DryRun: change.dryRun}); err != nil || change.dryRun || change.noWait {
		return err
	}
	return a.poll(ctx, "node/"+name+" is not empty", func(ctx context.Context) (bool, string, error) {
		got, err := ask(ctx, a, (*client.Client).GetNode, &blixardv1.GetNodeRequest{Name: name})
		if err != nil {
			return false, "", err
		}
		if got.Node.Availability != "draining" {
			return false, "", blixard.Errorf(blixard.CodeConflict, "node/%s was set to %s meanwhile", name, got.Node.Availability)
		}
		return got.Node.Instances == 0, fmt.Sprintf("%s: draining, %d instances left", name, got.Node.Instances), nil
	})
}

func (a *app) setNode(ctx context.Context, req *blixardv1.SetNodeRequest) (*blixardv1.Change, error) {
	if err := blixard.CheckName(req.Name); err != nil {
		return nil, err
	}
	return ask(ctx, a, (*client.Client).SetNode, req)
}

func (a *app) clusterCordon() *cobra.Command {
	return a.availability("cordon NAME", "Place nothing new on a node; what it has stays", "cordoned", "cordoned")
}

func (a *app) clusterUncordon() *cobra.Command {
	return a.availability("uncordon NAME", "Use a node again after cordon or drain", "active", "in use")
}

func (a *app) availability(use, short, value, words string) *cobra.Command {
	var change changeFlags
	cmd := &cobra.Command{
		Use: use, Short: short, Args: takes("NAME"), ValidArgsFunction: a.completeOneNode,
		RunE: func(cmd *cobra.Command, args []string) error {
			answer, err := a.setNode(cmd.Context(), &blixardv1.SetNodeRequest{Name: args[0], Availability: value, DryRun: change.dryRun})
			switch {
			case err != nil:
				return err
			case answer.Noop:
				return a.done("node", args[0], "is already "+words)
			case change.dryRun:
				return a.done("node", args[0], "would be "+words)
			}
			return a.done("node", args[0], words)
		},
	}
	change.add(cmd, false)
	return cmd
}

func (a *app) clusterLabel() *cobra.Command {
	var change changeFlags
	cmd := &cobra.Command{
		Use: "label NAME KEY=VALUE… KEY-…", Short: "Set and drop (KEY-) labels of a node", Args: takes("NAME", "LABEL…"), ValidArgsFunction: a.completeOneNode,
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &blixardv1.SetNodeRequest{Name: args[0], DryRun: change.dryRun}
			var sets []string
			for _, l := range args[1:] {
				if key, dropped := strings.CutSuffix(l, "-"); dropped && !strings.Contains(l, "=") {
					if err := blixard.CheckLabelKey(key); err != nil {
						return err
					}
					req.DropLabels = append(req.DropLabels, key)
					continue
				}
				sets = append(sets, l)
			}
			labels, err := parsePairs("label", sets, checkLabel)
			if err != nil {
				return err
			}
			req.SetLabels = labelMap(labels)
			answer, err := a.setNode(cmd.Context(), req)
			switch {
			case err != nil:
				return err
			case answer.Noop:
				return a.done("node", args[0], "has these labels already")
			case change.dryRun:
				return a.done("node", args[0], "would be labelled")
			}
			return a.done("node", args[0], "labelled")
		},
	}
	change.add(cmd, false)
	return cmd
}
