package cli

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

func (a *app) vmCreate() *cobra.Command {
	var flags specFlags
	var change changeFlags
	var config, microvmConfig string
	var noStart bool
	cmd := &cobra.Command{
		Use: "create NAME [-- COMMAND…]", Short: "Register a VM, and start it",
		Long: `Register a VM and start its instances. Ends when all of them run (and are
healthy, with --health-check), or says why they do not.

--config takes a YAML document of kind VM; flags on the command line win over it.
What follows "--" is run in the guest instead of what the image says.`,
		Example: `  blixard vm create webapp --replicas 3 --memory 256M --publish 8080:80 --health-check http:80/
  blixard vm create database --constraint "storage=nvme,memory>=32GB" --singleton
  blixard vm create hello -- /bin/sh -c 'echo hello; sleep 3600'`,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, command, err := nameAndCommand(cmd, args)
			if err != nil {
				return err
			}
			if config != "" && microvmConfig != "" {
				return blixard.Invalid("--config", "--microvm-config is the same as --config", "--config and --microvm-config are both given")
			}
			base, desired, err := a.readConfig(name, firstOf(config, microvmConfig))
			if err != nil {
				return err
			}
			spec, err := flags.merge(cmd.Flags(), base, command)
			if err != nil {
				return err
			}
			start := !noStart && desired != "stopped"
			return a.create(cmd.Context(), name, spec, start, change)
		},
	}
	flags.add(cmd, a.completeOneVM)
	change.add(cmd, true)
	cmd.Flags().StringVar(&config, "config", "", "a VM document in YAML (.nix needs nodes with the microvm.nix driver)")
	cmd.Flags().StringVar(&microvmConfig, "microvm-config", "", "the same as --config")
	cmd.Flags().BoolVar(&noStart, "no-start", false, "register it only")
	return cmd
}

// nameAndCommand splits "NAME -- COMMAND…".
func nameAndCommand(cmd *cobra.Command, args []string) (name string, command []string, err error) {
	at := cmd.ArgsLenAtDash()
	if at >= 0 {
		args, command = args[:at], args[at:]
	}
	if err := takes("NAME")(cmd, args); err != nil {
		if len(args) > 1 {
			return "", nil, blixard.Invalid("arguments", "put -- before the command for the guest", "%s does not know what to do with %q", cmd.CommandPath(), args[1])
		}
		return "", nil, err
	}
	return args[0], command, blixard.CheckName(args[0])
}

// readConfig reads the VM document of --config, nil without one.
func (a *app) readConfig(name, path string) (*blixard.VMSpec, string, error) {
	if path == "" {
		return nil, "", nil
	}
	if strings.EqualFold(filepath.Ext(path), ".nix") {
		if _, err := os.Stat(path); err != nil {
			return nil, "", fileError(path, err)
		}
		return nil, "", refuseNix(path)
	}
	docs, err := a.readDocuments([]string{path})
	if err != nil {
		return nil, "", err
	}
	if len(docs) != 1 {
		return nil, "", blixard.Invalid("--config", "`blixard apply -f "+path+"` creates all of them", "%s describes %d VMs, and one is to be created", path, len(docs))
	}
	if docs[0].name != name {
		return nil, "", blixard.Invalid("--config", "give the same name, or use `blixard apply -f "+path+"`", "%s:%d: the document is about the VM %s, not %s", docs[0].file, docs[0].line, docs[0].name, name)
	}
	return &docs[0].spec, docs[0].desired, nil
}

func (a *app) create(ctx context.Context, name string, spec blixard.VMSpec, start bool, change changeFlags) error {
	if err := a.sendImage(ctx, &spec, change.dryRun); err != nil {
		return err
	}
	req := &blixardv1.CreateVMRequest{Name: name, Spec: requestSpec(spec), Start: &start, DryRun: change.dryRun}
	if _, err := ask(ctx, a, (*client.Client).CreateVM, req); err != nil {
		return err
	}
	switch {
	case change.dryRun:
		return a.done("vm", name, "would be created")
	case !start:
		return a.done("vm", name, "created; `blixard vm start "+name+"` starts it")
	case change.noWait:
		return a.done("vm", name, "created; it is starting")
	}
	vm, err := a.awaitVM(ctx, name, running())
	if err != nil {
		return err
	}
	return a.doneVM(vm, "created, "+runningWords(vm))
}

// sendImage packs and sends an image that is named by a path.
func (a *app) sendImage(ctx context.Context, spec *blixard.VMSpec, dryRun bool) error {
	path := spec.Image
	if path == "" || path == "builtin" || strings.HasPrefix(path, imagePrefix) {
		return nil
	}
	digest, err := a.importImage(ctx, path, dryRun)
	if err != nil {
		return err
	}
	spec.Image = digest
	if dryRun {
		spec.Image = "builtin" // in its place: what is not sent is kept nowhere
	}
	return nil
}

// importImage packs what is at a path, sends it unless dryRun, and returns its
// "sha256:…".
func (a *app) importImage(ctx context.Context, path string, dryRun bool) (digest string, err error) {
	if _, err := os.Stat(path); err != nil {
		if os.IsNotExist(err) {
			return "", blixard.Invalid("--image", "use builtin, sha256:… of an imported image, or the path of a bundle or root filesystem", "there is no file %s", path)
		}
		return "", fileError(path, err)
	}
	if a.env.PackImage == nil {
		return "", &blixard.Error{Code: blixard.CodeRefused, Message: "this program cannot pack images", Hint: "use builtin or sha256:… of an imported image"}
	}
	a.note("packing %s", path)
	packed, err := a.env.PackImage(ctx, path)
	if err != nil {
		return "", fmt.Errorf("packing the image %s: %w", path, err)
	}
	defer packed.Close()
	if dryRun {
		return packed.Digest, nil
	}
	c, err := a.client()
	if err != nil {
		return "", err
	}
	a.note("sending it as %s", packed.Digest)
	if _, err := c.PutImage(ctx, packed.Digest, packed, packed.Size); err != nil {
		return "", fmt.Errorf("sending the image %s: %w", path, err)
	}
	return packed.Digest, nil
}

// done tells the outcome of a verb: its name for scripts, words for people.
func (a *app) done(kind, name, words string) error {
	switch a.output {
	case formatName:
		fmt.Fprintln(a.env.Stdout, kind+"/"+name)
	case formatJSON, formatYAML:
		return a.printObject(a.env.Stdout, map[string]any{"kind": kind, "name": name, "result": words})
	default:
		fmt.Fprintf(a.env.Stdout, "%s/%s %s\n", kind, name, words)
	}
	return nil
}

// doneVM is done that prints the VM itself as JSON or YAML.
func (a *app) doneVM(vm *blixardv1.VM, words string) error {
	if a.output == formatJSON || a.output == formatYAML {
		return a.printObject(a.env.Stdout, vm)
	}
	return a.done("vm", vm.Name, words)
}

// runningWords says where a VM runs.
func runningWords(vm *blixardv1.VM) string {
	if vm.GetSpec().GetReplicas() == 0 {
		return "with no replicas"
	}
	return "running on [" + strings.Join(runningOn(vm), ", ") + "]"
}

// runningOn are the nodes that run a VM, each once, in order of the slots.
func runningOn(vm *blixardv1.VM) []string {
	var out []string
	seen := map[string]bool{}
	for _, i := range vm.Instances {
		if i.State == "Running" && !seen[i.Node] {
			seen[i.Node] = true
			out = append(out, i.Node)
		}
	}
	return out
}
