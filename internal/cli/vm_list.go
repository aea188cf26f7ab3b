package cli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

func (a *app) vmList() *cobra.Command {
	var flags listFlags
	var labels []string
	var node string
	cmd := &cobra.Command{
		Use: "list", Short: "List VMs", Aliases: []string{"ls"}, Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			req := &blixardv1.ListVMsRequest{Labels: labels, Node: node}
			return a.show(cmd.Context(), flags, []string{"vm", "instance"}, "", func(ctx context.Context) (*listing, error) {
				list, err := ask(ctx, a, (*client.Client).ListVMs, req)
				if err != nil {
					return nil, err
				}
				return vmListing(list.Vms, time.Now()), nil
			})
		},
	}
	flags.add(cmd, true)
	completeSortOf(cmd, "vm")
	a.mayBeStale(cmd)
	cmd.Flags().StringArrayVarP(&labels, "selector", "l", nil, "only VMs with this label, KEY=VALUE or KEY")
	cmd.Flags().StringVar(&node, "node", "", "only VMs that have an instance on this node")
	return cmd
}

func vmListing(vms []*blixardv1.VM, now time.Time) *listing {
	l := &listing{
		key: "vms", empty: "there are no VMs; `blixard vm create NAME` makes one",
		columns: []column{
			{name: "NAME"},
			{name: "STATE"},
			{name: "READY"},
			{name: "VCPUS"},
			{name: "MEMORY"},
			{name: "NODES"},
			{name: "AGE"},
			{name: "IMAGE", wide: true},
			{name: "REPLICAS", wide: true},
			{name: "PRIORITY", wide: true},
			{name: "LABELS", wide: true},
			{name: "REASON", wide: true},
		},
	}
	for _, vm := range vms {
		s := vm.GetSpec()
		l.rows = append(l.rows, row{
			name: "vm/" + vm.Name, object: vm, labels: s.GetLabels(),
			cells: []cell{
				str(vm.Name), str(vm.Phase),
				{text: fmt.Sprintf("%d/%d", vm.Ready, s.GetReplicas()), number: blixard.Quantity(vm.Ready) * 1000, kind: numberCell},
				num(s.GetVcpus()), mib(s.GetMemoryMib()), str(strings.Join(holders(vm), ",")), age(now, vm.CreatedMs),
				str(shortImage(s.GetImage())), num(s.GetReplicas()), num(s.GetPriority()), str(pairs(s.GetLabels())), str(whyNot(vm)),
			},
		})
	}
	return l
}

// whyNot says why a VM does not run as it should.
func whyNot(vm *blixardv1.VM) string {
	if summary := vm.GetRefusal().GetSummary(); summary != "" {
		return summary
	}
	return strings.Join(complaints(vm), "; ")
}

// holders are the nodes that have a live instance of a VM.
func holders(vm *blixardv1.VM) []string {
	var out []string
	seen := map[string]bool{}
	for _, i := range vm.Instances {
		if !terminalState(i) && !seen[i.Node] {
			seen[i.Node] = true
			out = append(out, i.Node)
		}
	}
	return out
}

func shortImage(image string) string {
	if strings.HasPrefix(image, "sha256:") && len(image) > 19 {
		return image[:19]
	}
	return image
}

// show prints a listing, with --watch again and again.
func (a *app) show(ctx context.Context, flags listFlags, kinds []string, vm string, look func(context.Context) (*listing, error)) error {
	render := func(ctx context.Context, w io.Writer) error {
		l, err := look(ctx)
		if err != nil {
			return err
		}
		return a.print(w, l, flags)
	}
	if !flags.watch {
		return render(ctx, a.env.Stdout)
	}
	return a.watch(ctx, kinds, vm, render)
}

func instanceListing(instances []*blixardv1.Instance, now time.Time) *listing {
	l := &listing{
		key: "instances", empty: "there are no instances",
		columns: []column{
			{name: "INSTANCE"},
			{name: "NODE"},
			{name: "STATE"},
			{name: "GENERATION"},
			{name: "HEALTH"},
			{name: "ADDRESS"},
			{name: "AGE"},
			{name: "ACCELERATION", wide: true},
			{name: "RESTARTS", wide: true},
			{name: "PORTS", wide: true},
			{name: "WANTED", wide: true},
			{name: "MESSAGE", wide: true},
		},
	}
	for _, i := range instances {
		state := i.State
		if i.Paused && state == "Running" {
			state = "Paused"
		}
		since := i.StartedMs
		if since == 0 {
			since = i.CreatedMs
		}
		l.rows = append(l.rows, row{
			name: "instance/" + i.Id, object: i,
			cells: []cell{
				str(i.Id), str(i.Node), str(state), num(i.Generation), str(i.Health), str(i.Address), age(now, since),
				str(i.Acceleration), num(i.Restarts), str(portsText(i.Ports)), str(i.Wanted), str(firstOf(i.Message, i.WantReason)),
			},
		})
	}
	return l
}

func portsText(ports []*blixardv1.PublishedPort) string {
	var out []string
	for _, p := range ports {
		out = append(out, fmt.Sprintf("%s->%d/%s", p.Address, p.GuestPort, firstOf(p.Protocol, "tcp")))
	}
	return strings.Join(out, ",")
}

func (a *app) vmStatus() *cobra.Command {
	var flags listFlags
	var all bool
	cmd := &cobra.Command{
		Use: "status NAME", Short: "How a VM is: its instances, where they run, and why not", Args: takes("NAME"), ValidArgsFunction: a.completeOneVM,
		RunE: func(cmd *cobra.Command, args []string) error {
			name := args[0]
			if err := blixard.CheckName(name); err != nil {
				return err
			}
			return a.show(cmd.Context(), flags, []string{"vm", "instance"}, name, func(ctx context.Context) (*listing, error) {
				got, err := ask(ctx, a, (*client.Client).GetVM, &blixardv1.GetVMRequest{Name: name})
				if err != nil {
					return nil, err
				}
				return statusListing(got.Vm, all, time.Now()), nil
			})
		},
	}
	flags.add(cmd, true)
	a.mayBeStale(cmd)
	cmd.Flags().BoolVarP(&all, "all", "a", false, "ended incarnations too")
	return cmd
}

// statusListing are the instances of a VM; as JSON it is the VM.
func statusListing(vm *blixardv1.VM, all bool, now time.Time) *listing {
	instances := vm.Instances
	if !all {
		instances = current(vm)
	}
	l := instanceListing(instances, now)
	l.empty = statusSentence(vm)
	l.after = statusSentence(vm)
	l.whole = func(objects []any) any {
		out := proto.CloneOf(vm)
		out.Instances = typed[*blixardv1.Instance](objects)
		return out
	}
	return l
}

// current leaves what a person wants to see: live incarnations, and the last
// one of a slot that has none, if the VM is to run.
func current(vm *blixardv1.VM) []*blixardv1.Instance {
	live := map[int32]bool{}
	for _, i := range vm.Instances {
		live[i.Ordinal] = live[i.Ordinal] || !terminalState(i)
	}
	latest := map[string]bool{}
	for _, i := range newest(vm.Instances) {
		latest[fmt.Sprint(i.Id, i.Generation)] = true
	}
	var out []*blixardv1.Instance
	for _, i := range vm.Instances {
		if !terminalState(i) || !live[i.Ordinal] && latest[fmt.Sprint(i.Id, i.Generation)] {
			out = append(out, i)
		}
	}
	return out
}

// typed are the objects of rows as what they are.
func typed[T any](objects []any) []T {
	out := make([]T, len(objects))
	for i, o := range objects {
		out[i] = o.(T) //nolint:errcheck // rows of one listing hold one type
	}
	return out
}

// statusSentence says it in one line, as the people who read it do.
func statusSentence(vm *blixardv1.VM) string {
	nodes := runningOn(vm)
	text := ""
	switch {
	case vm.Desired == "stopped" && len(nodes) == 0:
		text = vm.Name + " VMs are stopped"
	case len(nodes) == 0:
		text = fmt.Sprintf("%s VMs running on [] (%s, %d/%d ready)", vm.Name, vm.Phase, vm.Ready, vm.GetSpec().GetReplicas())
	default:
		text = vm.Name + " VMs running on [" + strings.Join(nodes, ", ") + "]"
		if vm.Phase != "Running" {
			text += fmt.Sprintf(" (%s, %d/%d ready)", vm.Phase, vm.Ready, vm.GetSpec().GetReplicas())
		}
	}
	if r := vm.Refusal; r != nil {
		text += fmt.Sprintf("\nno place for %d: %s; `blixard vm explain %s` tells more", r.Missing, visible(r.Summary), vm.Name)
	}
	return text
}
