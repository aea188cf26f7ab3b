package cli

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

// PackedCode is the code of a function, ready to be sent.
type PackedCode struct {
	Zip     []byte
	Runtime string // as far as the code tells; "" if it does not
	Handler string
}

func (a *app) functionCreate() *cobra.Command {
	var flags functionFlags
	var change changeFlags
	var publish bool
	cmd := &cobra.Command{
		Use: "create NAME --config CODE [-- COMMAND…]", Short: "Deploy a function",
		Long: `Send the code, register the function and wait until it can be called: its
template was booted, has initialised, and is saved. No instance is left running.

The code is a .nix file (the handler { event, context }: … or a module with
handler), a .wasm module (WASI), an executable on the Lambda Runtime API, a
directory with one called bootstrap, or a zip. With --runtime http it is an HTTP
server that listens on $PORT; what follows "--" starts it.`,
		Example: `  blixard function create hello --config hello.nix
  blixard function create image-processor --config image-processor.nix --memory 128M --timeout 30s --concurrent-executions 100
  blixard function create api --config ./server --runtime http --target-concurrency 10
  blixard function create ml-inference --config inference.nix --memory 4096M --constraint "gpu.memory>=8GB" --placement-strategy network-proximity`,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			at := cmd.ArgsLenAtDash()
			var command []string
			if at >= 0 {
				args, command = args[:at], args[at:]
			}
			if err := takes("NAME")(cmd, args); err != nil {
				return err
			}
			if err := blixard.CheckFunctionName(args[0]); err != nil {
				return err
			}
			if flags.config == "" {
				return blixard.Invalid("--config", "give --config FILE: a .nix file, a .wasm module, an executable, a directory or a zip", "a function needs code")
			}
			spec, err := flags.merge(cmd.Flags(), &blixardv1.FunctionSpec{}, command)
			if err != nil {
				return err
			}
			req := &blixardv1.CreateFunctionRequest{Name: args[0], Spec: spec, Publish: publish, DryRun: change.dryRun}
			if req.Settings, err = flags.settings(cmd.Flags()); err != nil {
				return err
			}
			return a.createFunction(cmd.Context(), req, flags.config, change)
		},
	}
	flags.add(cmd)
	change.add(cmd, true)
	cmd.Flags().BoolVar(&publish, "publish", false, "publish it as version 1 too")
	return cmd
}

// sendCode packs and sends what is at a path and completes spec with what the
// code tells.
func (a *app) sendCode(ctx context.Context, path string, spec *blixardv1.FunctionSpec) (digest string, err error) {
	if _, err := os.Stat(path); err != nil {
		if os.IsNotExist(err) {
			return "", blixard.Invalid("--config", "give the path of a .nix file, a .wasm module, an executable, a directory or a zip", "there is no file %s", path)
		}
		return "", fileError(path, err)
	}
	if a.env.PackCode == nil {
		return "", &blixard.Error{Code: blixard.CodeRefused, Message: "this program cannot pack code"}
	}
	packed, err := a.env.PackCode(ctx, path)
	if err != nil {
		return "", fmt.Errorf("packing %s: %w", path, err)
	}
	if err := completeSpec(spec, &packed, path); err != nil {
		return "", err
	}
	c, err := a.client()
	if err != nil {
		return "", err
	}
	code, err := c.PutCode(ctx, packed.Zip)
	if err != nil {
		return "", fmt.Errorf("sending %s: %w", path, err)
	}
	return code.Digest, nil
}

// completeSpec fills in what the code tells.
func completeSpec(spec *blixardv1.FunctionSpec, packed *PackedCode, path string) error {
	if spec.Runtime == "" {
		spec.Runtime = packed.Runtime
	}
	if spec.Runtime == "" {
		return blixard.Invalid("--runtime", "say --runtime nix, bootstrap, http or wasm", "what runs %s cannot be told from it", path)
	}
	if len(spec.Command) > 0 && spec.Runtime != "http" {
		return blixard.Invalid("arguments", "leave it out, or say --runtime http", "a command after -- is for HTTP servers; %s starts its code itself", spec.Runtime)
	}
	if spec.Handler == "" && spec.Runtime == packed.Runtime {
		spec.Handler = packed.Handler
	}
	return nil
}

func (a *app) createFunction(ctx context.Context, req *blixardv1.CreateFunctionRequest, config string, change changeFlags) error {
	var err error
	if req.CodeDigest, err = a.sendCode(ctx, config, req.Spec); err != nil {
		return err
	}
	if _, err := ask(ctx, a, (*client.Client).CreateFunction, req); err != nil {
		return err
	}
	switch {
	case change.dryRun:
		return a.done("function", req.Name, "would be created")
	case change.noWait:
		return a.done("function", req.Name, "created; its template is being built")
	}
	if req.Publish {
		if err := a.awaitVersion(ctx, req.Name, "1"); err != nil {
			return err
		}
	}
	return a.awaitFunction(ctx, req.Name, "created")
}

// awaitVersion waits until a published version, which has a template of its own,
// can be called.
func (a *app) awaitVersion(ctx context.Context, name, version string) error {
	return a.poll(ctx, "function "+name+":"+version, func(ctx context.Context) (bool, string, error) {
		got, err := ask(ctx, a, (*client.Client).ListFunctionVersions, &blixardv1.ListFunctionVersionsRequest{Name: name})
		if err != nil {
			return false, "", err
		}
		for _, v := range got.Versions {
			if v.Version != version {
				continue
			}
			switch blixard.FunctionState(v.State) {
			case blixard.FunctionActive:
				return true, "", nil
			case blixard.FunctionFailed:
				return false, "", &blixard.Error{Code: blixard.CodeRefused, Message: fmt.Sprintf("version %s of %s cannot be called: %s", version, name, firstOf(v.StateReason, v.StateCode)), Hint: "`blixard function logs " + name + "` shows what it wrote"}
			}
			return false, "building the template of version " + version, nil
		}
		return false, "", blixard.Errorf(blixard.CodeNotFound, "version %s of %s is not there any more", version, name)
	})
}

// awaitFunction waits until $LATEST can be called, or has failed.
func (a *app) awaitFunction(ctx context.Context, name, words string) error {
	began := time.Now()
	var last *blixardv1.Function
	err := a.poll(ctx, "function "+name, func(ctx context.Context) (bool, string, error) {
		got, err := ask(ctx, a, (*client.Client).GetFunction, &blixardv1.GetFunctionRequest{Name: name, WithoutNodes: true})
		if err != nil {
			return false, "", err
		}
		last = got.Function
		switch v := last.GetLatest(); blixard.FunctionState(v.GetState()) {
		case blixard.FunctionActive:
			return true, "", nil
		case blixard.FunctionFailed:
			e := &blixard.Error{Code: blixard.CodeRefused, Message: fmt.Sprintf("the function %s cannot be called: %s", name, firstOf(v.GetStateReason(), v.GetStateCode())), Hint: "`blixard function logs " + name + "` shows what it wrote; mend it and run `blixard function update " + name + " --config …`"}
			if v.GetPreviousAnswers() {
				e.Message += "; the former code goes on answering"
			}
			return false, "", e
		}
		return false, "building its template", nil
	})
	if err != nil {
		return err
	}
	if a.output == formatJSON || a.output == formatYAML {
		return a.printObject(a.env.Stdout, last)
	}
	return a.done("function", name, fmt.Sprintf("%s, ready to be called after %.1f s", words, time.Since(began).Seconds()))
}

func (a *app) functionUpdate() *cobra.Command {
	var flags functionFlags
	var change changeFlags
	var publish bool
	var revision string
	cmd := &cobra.Command{
		Use: "update NAME [--config CODE] [-- COMMAND…]", Short: "Change a function's code or configuration",
		Long: `Change code, configuration or limits of a function. What is not given stays. The
former code answers calls until the new one is ready; if that fails it goes on.`,
		Example: `  blixard function update hello --config hello.nix
  blixard function update hello --memory 256M --timeout 10s
  blixard function update hello --max-concurrent 50`,
		ValidArgsFunction: a.completeOneFunction,
		RunE: func(cmd *cobra.Command, args []string) error {
			at := cmd.ArgsLenAtDash()
			var command []string
			if at >= 0 {
				args, command = args[:at], args[at:]
			}
			if err := takes("NAME")(cmd, args); err != nil {
				return err
			}
			if err := blixard.CheckFunctionName(args[0]); err != nil {
				return err
			}
			req := &blixardv1.UpdateFunctionRequest{Name: args[0], Publish: publish, RevisionId: revision, DryRun: change.dryRun}
			var err error
			if req.Settings, err = flags.settings(cmd.Flags()); err != nil {
				return err
			}
			got, err := ask(cmd.Context(), a, (*client.Client).GetFunction, &blixardv1.GetFunctionRequest{Name: args[0], WithoutNodes: true})
			if err != nil {
				return err
			}
			before := fmt.Sprint(got.Function.GetLatest().GetSpec())
			if req.Spec, err = flags.merge(cmd.Flags(), got.Function.GetLatest().GetSpec(), command); err != nil {
				return err
			}
			if flags.config != "" {
				if req.CodeDigest, err = a.sendCode(cmd.Context(), flags.config, req.Spec); err != nil {
					return err
				}
			} else if before == fmt.Sprint(req.Spec) {
				req.Spec = nil
			}
			if req.Spec == nil && req.CodeDigest == "" && req.Settings == nil && !publish {
				return blixard.Invalid("flags", "give --config CODE, or a flag of what is to change; `blixard function update --help` lists them", "nothing is to be changed")
			}
			if req.RevisionId == "" && req.Spec != nil {
				req.RevisionId = got.Function.GetLatest().GetRevisionId() // what was read is what is changed
			}
			return a.updateFunction(cmd.Context(), req, change, "updated")
		},
	}
	flags.add(cmd)
	change.add(cmd, true)
	cmd.Flags().BoolVar(&publish, "publish", false, "publish the result as a version")
	cmd.Flags().StringVar(&revision, "revision", "", "change nothing if $LATEST has another revision by now")
	return cmd
}

func (a *app) updateFunction(ctx context.Context, req *blixardv1.UpdateFunctionRequest, change changeFlags, words string) error {
	got, err := ask(ctx, a, (*client.Client).UpdateFunction, req)
	switch {
	case err != nil:
		return err
	case change.dryRun:
		return a.done("function", req.Name, "would be "+words)
	case got.GetChange().GetNoop():
		return a.done("function", req.Name, "is as wanted already")
	case change.noWait:
		return a.done("function", req.Name, words)
	}
	if req.Publish {
		words += " and published as version " + got.GetVersion()
		if err := a.awaitVersion(ctx, req.Name, got.GetVersion()); err != nil {
			return err
		}
	}
	return a.awaitFunction(ctx, req.Name, words)
}

func (a *app) functionDelete() *cobra.Command {
	var ignoreMissing, dryRun bool
	var version string
	cmd := &cobra.Command{
		Use: "delete NAME…", Short: "Delete functions, or one version of a function", Aliases: []string{"rm"}, Args: takes("NAME…"), ValidArgsFunction: a.completeFunctions,
		Long: "Delete functions with their versions, aliases and triggers. Calls under way end first.",
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, name := range args {
				if err := blixard.CheckFunctionName(name); err != nil {
					return err
				}
			}
			if version != "" && len(args) > 1 {
				return blixard.Invalid("--version", "delete one version of one function at a time", "--version is of one function, and %d are named", len(args))
			}
			return a.eachOf(args, func(name string) error {
				return a.deleteFunction(cmd.Context(), &blixardv1.DeleteFunctionRequest{Name: name, Version: version, IgnoreMissing: ignoreMissing, DryRun: dryRun})
			})
		},
	}
	cmd.Flags().BoolVar(&ignoreMissing, "ignore-missing", false, "functions that are not there are no error")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "check it, and change nothing")
	cmd.Flags().StringVar(&version, "version", "", "delete only this published version")
	return cmd
}

func (a *app) deleteFunction(ctx context.Context, req *blixardv1.DeleteFunctionRequest) error {
	answer, err := ask(ctx, a, (*client.Client).DeleteFunction, req)
	name := req.Name
	if req.Version != "" {
		name += ":" + req.Version
	}
	switch {
	case err != nil:
		return err
	case answer.Noop:
		return a.done("function", name, "is not there")
	case req.DryRun:
		return a.done("function", name, "would be deleted")
	case req.Version != "":
		return a.done("function", name, "deleted")
	}
	err = a.poll(ctx, "function "+name, func(ctx context.Context) (bool, string, error) {
		_, err := ask(ctx, a, (*client.Client).GetFunction, &blixardv1.GetFunctionRequest{Name: req.Name, WithoutNodes: true})
		if blixard.CodeOf(err) == blixard.CodeNotFound {
			return true, "", nil
		}
		return false, "waiting for calls under way", err
	})
	if err != nil {
		return err
	}
	return a.done("function", name, "deleted")
}

func (a *app) functionRollback() *cobra.Command {
	var change changeFlags
	cmd := &cobra.Command{
		Use: "rollback NAME [VERSION]", Short: "Make a function what a published version of it is", Args: takes("NAME", "[VERSION]"), ValidArgsFunction: a.completeOneFunction,
		Long: `Give $LATEST the code and configuration of a published version: the newest one,
or the given one. Aliases stay; "blixard function alias" moves them.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := blixard.CheckFunctionName(args[0]); err != nil {
				return err
			}
			version := ""
			if len(args) == 2 {
				if n, err := strconv.Atoi(args[1]); err != nil || n < 1 {
					return blixard.Invalid("version", "`blixard function versions "+args[0]+"` lists them", "%q is not the number of a version", args[1])
				}
				version = args[1]
			} else {
				got, err := ask(cmd.Context(), a, (*client.Client).ListFunctionVersions, &blixardv1.ListFunctionVersionsRequest{Name: args[0]})
				if err != nil {
					return err
				}
				if version = rollbackTo(got.Versions); version == "" {
					return &blixard.Error{Code: blixard.CodeRefused, Message: "the function " + args[0] + " has no published version that differs from $LATEST", Hint: "`blixard function publish " + args[0] + "` makes one, before the next update"}
				}
			}
			req := &blixardv1.UpdateFunctionRequest{Name: args[0], CopyVersion: version, DryRun: change.dryRun}
			return a.updateFunction(cmd.Context(), req, change, "rolled back to version "+version)
		},
	}
	change.add(cmd, true)
	return cmd
}

// rollbackTo is the newest published version that is not what $LATEST is.
func rollbackTo(versions []*blixardv1.FunctionVersion) string {
	var latest *blixardv1.FunctionVersion
	best := ""
	for _, v := range versions {
		if v.Version == "$LATEST" {
			latest = v
		}
	}
	for _, v := range versions {
		if v.Version != "$LATEST" && (latest == nil || v.CodeDigest != latest.CodeDigest || fmt.Sprint(v.Spec) != fmt.Sprint(latest.Spec)) {
			best = v.Version
		}
	}
	return best
}
