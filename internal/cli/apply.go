package cli

import (
	"context"
	"fmt"
	"regexp"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

func (a *app) apply() *cobra.Command {
	var files []string
	var change changeFlags
	cmd := &cobra.Command{
		Use: "apply -f FILE|DIR|-", Short: "Create and update VMs so that they are as documents say, all or none", Args: takes(),
		Long: `Read YAML documents (see "blixard help documents") and make the cluster's VMs as
they say. Either all of them are applied or none. Mistakes are told with file and
line, and end with exit code 2. By default it ends when the change is accepted;
--wait waits until the VMs that are to run do.`,
		Example: "  blixard apply -f platform.yaml\n  blixard apply -f vms/ --dry-run\n  blixard get vm/webapp -o yaml | sed 's/replicas: 2/replicas: 3/' | blixard apply -f -",
		RunE: func(cmd *cobra.Command, _ []string) error {
			docs, err := a.filesOf(files)
			if err != nil {
				return err
			}
			return a.applyDocuments(cmd.Context(), docs, change)
		},
	}
	addFileFlag(cmd, &files)
	wait := false
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until the VMs that are to run do")
	cmd.Flags().BoolVar(&change.dryRun, "dry-run", false, "tell what would be created, updated and unchanged, and change nothing")
	cmd.PreRun = func(*cobra.Command, []string) { change.noWait = !wait }
	return cmd
}

func addFileFlag(cmd *cobra.Command, files *[]string) {
	cmd.Flags().StringArrayVarP(files, "file", "f", nil, "file, directory of .yaml files, or - for standard input (repeatable)")
}

func (a *app) filesOf(files []string) ([]vmDocument, error) {
	if len(files) == 0 {
		return nil, blixard.Invalid("--file", "", "-f says which documents")
	}
	return a.readDocuments(files)
}

func (a *app) applyDocuments(ctx context.Context, docs []vmDocument, change changeFlags) error {
	req := &blixardv1.ApplyVMsRequest{DryRun: change.dryRun}
	for i := range docs {
		req.Vms = append(req.Vms, docs[i].request())
	}
	got, err := ask(ctx, a, (*client.Client).ApplyVMs, req)
	if err != nil {
		return locate(err, docs)
	}
	l := &listing{key: "results", columns: []column{{name: "VM"}, {name: "ACTION"}}}
	for _, r := range got.Results {
		l.rows = append(l.rows, row{name: "vm/" + r.Name, object: r, cells: []cell{str(r.Name), str(r.Action)}})
	}
	if a.output == formatTable || a.output == formatWide {
		for _, r := range got.Results {
			words := r.Action
			if change.dryRun && words != "unchanged" {
				words = "would be " + words
			}
			fmt.Fprintf(a.env.Stdout, "vm/%s %s\n", r.Name, words)
		}
	} else if err := a.print(a.env.Stdout, l, listFlags{}); err != nil {
		return err
	}
	if change.noWait || change.dryRun {
		return nil
	}
	for i := range docs {
		got, err := ask(ctx, a, (*client.Client).GetVM, &blixardv1.GetVMRequest{Name: docs[i].name})
		if err != nil {
			return err
		}
		g := running()
		if got.Vm.Desired == "stopped" {
			g = stopped()
		}
		if _, err := a.awaitVM(ctx, docs[i].name, g); err != nil {
			return err
		}
	}
	return nil
}

var documentField = regexp.MustCompile(`^vms\[(\d+)\]`)

// locate adds to the cluster's refusal the line that it is about.
func locate(err error, docs []vmDocument) error {
	var e *blixard.Error
	if !asError(err, &e) {
		return err
	}
	m := documentField.FindStringSubmatch(e.Field)
	if m == nil {
		return err
	}
	at, numErr := strconv.Atoi(m[1])
	if numErr != nil || at >= len(docs) {
		return err
	}
	d := &docs[at]
	located := *e
	located.Message = fmt.Sprintf("%s:%d: vm/%s: %s; nothing was changed", d.file, d.line, d.name, e.Message)
	return &located
}

func (a *app) delete() *cobra.Command {
	var files []string
	var change changeFlags
	var ignoreMissing bool
	cmd := &cobra.Command{
		Use: "delete -f FILE|DIR|- | vm/NAME…", Short: "Delete the VMs of documents, or named ones, all or none", ValidArgsFunction: a.completeObjects,
		RunE: func(cmd *cobra.Command, args []string) error {
			names, err := a.namesToDelete(files, args)
			if err != nil {
				return err
			}
			return a.deleteVMs(cmd.Context(), names, ignoreMissing, change)
		},
	}
	addFileFlag(cmd, &files)
	change.add(cmd, true)
	cmd.Flags().BoolVar(&ignoreMissing, "ignore-missing", false, "VMs that are not there are no error")
	return cmd
}

func (a *app) namesToDelete(files, args []string) ([]string, error) {
	if (len(files) > 0) == (len(args) > 0) {
		return nil, blixard.Invalid("--file", "write `blixard delete -f FILE` or `blixard delete vm/NAME`", "either -f or names say what to delete")
	}
	var out []string
	if len(files) > 0 {
		docs, err := a.readDocuments(files)
		for i := range docs {
			out = append(out, docs[i].name)
		}
		return out, err
	}
	for _, arg := range args {
		kind, name, found := kindName(arg)
		if !found || kind != "vm" {
			return nil, blixard.Invalid("arguments", "write vm/NAME; nodes are removed by `blixard cluster remove-node`", "%q cannot be deleted here", arg)
		}
		if err := blixard.CheckName(name); err != nil {
			return nil, err
		}
		out = append(out, name)
	}
	return out, nil
}
