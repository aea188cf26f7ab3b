package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

// kinds are what `get` knows, by singular and plural.
var kinds = []string{"vm", "vms", "node", "nodes", "instance", "instances", "event", "events", "token", "tokens", "image", "images", "function", "functions"}

func (a *app) get() *cobra.Command {
	var flags listFlags
	cmd := &cobra.Command{
		Use: "get KIND | KIND/NAME | KIND NAME", Short: "Get vms, functions, nodes, instances, events, tokens or images",
		Long: `Print things of a kind, or one of them. As YAML and JSON a VM is a document that
"blixard apply" reads; "blixard vm status NAME -o json" tells how it is.`,
		Example: "  blixard get vms\n  blixard get vm/webapp -o yaml\n  blixard get nodes --filter state=Ready -o name",
		Args:    takes("KIND", "[NAME]"), ValidArgsFunction: a.completeObjects,
		RunE: func(cmd *cobra.Command, args []string) error {
			kind, name, slash := kindName(args[0])
			if len(args) == 2 {
				if slash {
					return blixard.Invalid("arguments", "write KIND/NAME or KIND NAME", "%q and %q both give a name", args[0], args[1])
				}
				name = args[1]
			}
			if err := oneOf("kind", kind, kinds); err != nil {
				return err
			}
			kind = strings.TrimSuffix(kind, "s")
			if name == "" && slash {
				return blixard.Invalid("arguments", "write KIND or KIND/NAME", "%q gives no name", args[0])
			}
			return a.getKind(cmd.Context(), kind, name, flags)
		},
	}
	flags.add(cmd, true)
	completeSort(cmd, func(args []string) []column {
		if len(args) == 0 {
			return nil
		}
		kind, _, _ := kindName(args[0])
		return columnsOf(kind)
	})
	a.mayBeStale(cmd)
	return cmd
}

func (a *app) getKind(ctx context.Context, kind, name string, flags listFlags) error {
	if name != "" && kind != "image" && kind != "token" {
		check := blixard.CheckName
		if kind == "function" {
			check = blixard.CheckFunctionName
		}
		if kind == "instance" {
			check = checkTarget
		}
		if err := check(name); err != nil {
			return err
		}
	}
	watched := map[string][]string{"vm": {"vm", "instance"}, "node": {"node", "instance"}, "instance": {"instance"}}
	switch kind {
	case "event":
		return a.events(ctx, &blixardv1.ListEventsRequest{Vm: name, Limit: 100}, flags)
	case "token", "image", "function":
		if flags.watch {
			return blixard.Invalid("--watch", "", "%ss cannot be watched", kind)
		}
	}
	return a.show(ctx, flags, watched[kind], "", func(ctx context.Context) (*listing, error) {
		switch kind {
		case "vm":
			return a.getVMs(ctx, name)
		case "node":
			return a.getNodes(ctx, name)
		case "instance":
			return a.getInstances(ctx, name)
		case "token":
			return a.getTokens(ctx, name)
		case "function":
			return a.getFunctions(ctx, name)
		default:
			return a.getImages(ctx, name)
		}
	})
}

func (a *app) getVMs(ctx context.Context, name string) (*listing, error) {
	var vms []*blixardv1.VM
	if name != "" {
		got, err := ask(ctx, a, (*client.Client).GetVM, &blixardv1.GetVMRequest{Name: name})
		if err != nil {
			return nil, err
		}
		vms = []*blixardv1.VM{got.Vm}
	} else {
		got, err := ask(ctx, a, (*client.Client).ListVMs, &blixardv1.ListVMsRequest{})
		if err != nil {
			return nil, err
		}
		vms = got.Vms
	}
	l := vmListing(vms, time.Now())
	for i, vm := range vms {
		l.rows[i].object = document(vm)
	}
	l.whole = func(objects []any) any {
		if name != "" && len(objects) == 1 {
			return objects[0]
		}
		return map[string]any{"apiVersion": apiVersion, "kind": "List", "items": objects}
	}
	return l, nil
}

// single prints one thing that was asked for by name as itself.
func single(name, key string) func([]any) any {
	return func(objects []any) any {
		if name != "" && len(objects) == 1 {
			return objects[0]
		}
		return map[string]any{key: objects}
	}
}

func (a *app) getNodes(ctx context.Context, name string) (*listing, error) {
	var nodes []*blixardv1.Node
	if name != "" {
		got, err := ask(ctx, a, (*client.Client).GetNode, &blixardv1.GetNodeRequest{Name: name})
		if err != nil {
			return nil, err
		}
		nodes = []*blixardv1.Node{got.Node}
	} else {
		got, err := ask(ctx, a, (*client.Client).ListNodes, &blixardv1.ListNodesRequest{})
		if err != nil {
			return nil, err
		}
		nodes = got.Nodes
	}
	l := nodeListing(nodes, time.Now())
	l.whole = single(name, "nodes")
	return l, nil
}

func (a *app) getInstances(ctx context.Context, name string) (*listing, error) {
	got, err := ask(ctx, a, (*client.Client).ListInstances, &blixardv1.ListInstancesRequest{})
	if err != nil {
		return nil, err
	}
	instances := got.Instances
	if name != "" {
		instances = nil
		for _, i := range got.Instances {
			if i.Id == name {
				instances = append(instances, i)
			}
		}
		if len(instances) == 0 {
			return nil, &blixard.Error{Code: blixard.CodeNotFound, Message: "there is no instance " + name, Hint: "`blixard get instances` lists them"}
		}
	}
	return instanceListing(instances, time.Now()), nil
}

func (a *app) getFunctions(ctx context.Context, name string) (*listing, error) {
	var list []*blixardv1.Function
	if name != "" {
		got, err := ask(ctx, a, (*client.Client).GetFunction, &blixardv1.GetFunctionRequest{Name: name})
		if err != nil {
			return nil, err
		}
		list = []*blixardv1.Function{got.Function}
	} else {
		got, err := ask(ctx, a, (*client.Client).ListFunctions, &blixardv1.ListFunctionsRequest{})
		if err != nil {
			return nil, err
		}
		list = got.Functions
	}
	l := functionListing(list, time.Now())
	l.whole = single(name, "functions")
	return l, nil
}

func (a *app) getTokens(ctx context.Context, name string) (*listing, error) {
	l, err := a.tokens(ctx)
	if err != nil || name == "" {
		return l, err
	}
	return l.named("token", name)
}

var imageColumns = []column{{name: "DIGEST"}, {name: "SIZE"}, {name: "AGE"}, {name: "DESCRIPTION"}}

func (a *app) getImages(ctx context.Context, name string) (*listing, error) {
	got, err := ask(ctx, a, (*client.Client).ListImages, &blixardv1.ListImagesRequest{})
	if err != nil {
		return nil, err
	}
	l := &listing{key: "images", empty: "there are no images; builtin is always there", columns: imageColumns}
	for _, i := range got.Images {
		size := cell{text: fmt.Sprintf("%.1fM", float64(i.SizeBytes)/(1<<20)), number: blixard.Quantity(i.SizeBytes) * 1000, kind: numberCell}
		l.rows = append(l.rows, row{name: "image/" + i.Digest, object: i, cells: []cell{str(i.Digest), size, age(time.Now(), i.CreatedMs), str(i.Description)}})
	}
	if name == "" {
		return l, nil
	}
	return l.named("image", name)
}

// named leaves the one thing of that name.
func (l *listing) named(kind, name string) (*listing, error) {
	for _, r := range l.rows {
		if r.name == kind+"/"+name {
			l.rows = []row{r}
			l.whole = single(name, l.key)
			return l, nil
		}
	}
	return nil, &blixard.Error{Code: blixard.CodeNotFound, Message: fmt.Sprintf("there is no %s %s", kind, name), Hint: "`blixard get " + kind + "s` lists them"}
}
