package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

// verb is one of the verbs that take a VM's name and nothing else.
type verb struct {
	name, short, long string
	call              func(*client.Client, context.Context, *blixardv1.VMVerbRequest) (*blixardv1.Change, error)
	goal              func() goal
	would, later      string
	done              func(*blixardv1.VM) string
	already           func(*blixardv1.VM) string // words when nothing had to change
}

func (a *app) vmVerb(v verb) *cobra.Command {
	var change changeFlags
	cmd := &cobra.Command{
		Use: v.name + " NAME…", Short: v.short, Long: v.long, Args: takes("NAME…"), ValidArgsFunction: a.completeVMs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.forEach(args, func(name string) error { return a.runVerb(cmd.Context(), v, name, change) })
		},
	}
	change.add(cmd, true)
	return cmd
}

// forEach checks all names, then does each; it goes on after a failure and
// returns the last one.
func (a *app) forEach(names []string, do func(name string) error) error {
	for _, name := range names {
		if err := blixard.CheckName(name); err != nil {
			return err
		}
	}
	return a.eachOf(names, do)
}

// eachOf is forEach for names that were checked, or that the cluster checks.
func (a *app) eachOf(names []string, do func(name string) error) error {
	var failed error
	for _, name := range names {
		if failed != nil {
			a.report(failed)
		}
		if err := do(name); err != nil {
			failed = err
		} else if failed != nil {
			failed = silentError(client.ExitCode(failed))
		}
	}
	return failed
}

func (a *app) runVerb(ctx context.Context, v verb, name string, change changeFlags) error {
	answer, err := ask(ctx, a, v.call, &blixardv1.VMVerbRequest{Name: name, DryRun: change.dryRun})
	switch {
	case err != nil:
		return err
	case change.dryRun && answer.Noop:
		return a.done("vm", name, "would stay as it is")
	case change.dryRun:
		return a.done("vm", name, v.would)
	case change.noWait:
		return a.done("vm", name, v.later)
	}
	vm, err := a.awaitVM(ctx, name, v.goal())
	if err != nil {
		return err
	}
	if answer.Noop {
		return a.doneVM(vm, v.already(vm))
	}
	return a.doneVM(vm, v.done(vm))
}

func words(text string) func(*blixardv1.VM) string {
	return func(*blixardv1.VM) string { return text }
}

func (a *app) vmStart() *cobra.Command {
	return a.vmVerb(verb{
		name: "start", short: "Start a VM", call: (*client.Client).StartVM, goal: running,
		long:  "Start a VM that is stopped. A VM that runs already is left alone.",
		would: "would be started", later: "is starting",
		done:    runningWords,
		already: func(vm *blixardv1.VM) string { return "is already started, " + runningWords(vm) },
	})
}

func (a *app) vmStop() *cobra.Command {
	return a.vmVerb(verb{
		name: "stop", short: "Stop a VM; it stays registered", call: (*client.Client).StopVM, goal: stopped,
		long:  "Ask the guests to shut down; what has not ended after the VM's stop grace is killed.",
		would: "would be stopped", later: "is stopping", done: words("stopped"), already: words("is already stopped"),
	})
}

func (a *app) vmRestart() *cobra.Command {
	return a.vmVerb(verb{
		name: "restart", short: "Replace every instance of a VM, one after another", call: (*client.Client).RestartVM, goal: running,
		would: "would be restarted", later: "is restarting",
		done: func(vm *blixardv1.VM) string { return "restarted, " + runningWords(vm) }, already: runningWords,
	})
}

func (a *app) vmPause() *cobra.Command {
	return a.vmVerb(verb{
		name: "pause", short: "Stop the virtual CPUs of a VM; its memory stays", call: (*client.Client).PauseVM, goal: paused,
		would: "would be paused", later: "is being paused", done: words("paused"), already: words("is already paused"),
	})
}

func (a *app) vmResume() *cobra.Command {
	return a.vmVerb(verb{
		name: "resume", short: "Let a paused VM go on", call: (*client.Client).ResumeVM, goal: resumed,
		would: "would go on", later: "is going on", done: words("resumed"), already: words("was not paused"),
	})
}

// resumed is the goal of resume: no instance is paused. Whether they all run is
// not its business.
func resumed() goal {
	return goal{
		what: "resumed",
		reached: func(vm *blixardv1.VM) bool {
			if vm == nil || vm.Paused {
				return false
			}
			for _, i := range vm.Instances {
				if i.State == "Running" && i.Paused {
					return false
				}
			}
			return true
		},
		hopeless: func(vm *blixardv1.VM) error {
			if vm == nil || vm.Paused {
				return blixard.Errorf(blixard.CodeConflict, "it was paused again or deleted meanwhile")
			}
			return nil
		},
	}
}

func (a *app) vmScale() *cobra.Command {
	var change changeFlags
	var replicas int
	cmd := &cobra.Command{
		Use: "scale NAME --replicas N", Short: "Change the number of a VM's instances", Args: takes("NAME"), ValidArgsFunction: a.completeOneVM,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := blixard.CheckName(args[0]); err != nil {
				return err
			}
			if !cmd.Flags().Changed("replicas") {
				return blixard.Invalid("--replicas", "", "--replicas says how many instances there are to be")
			}
			if replicas < 0 || replicas > blixard.MaxReplicas {
				return blixard.Invalid("--replicas", "", "--replicas is %d; it must be between 0 and %d", replicas, blixard.MaxReplicas)
			}
			return a.scale(cmd.Context(), args[0], replicas, change)
		},
	}
	cmd.Flags().IntVar(&replicas, "replicas", 0, "how many instances")
	change.add(cmd, true)
	return cmd
}

func (a *app) scale(ctx context.Context, name string, replicas int, change changeFlags) error {
	answer, err := ask(ctx, a, (*client.Client).ScaleVM, &blixardv1.ScaleVMRequest{Name: name, Replicas: new(int32(replicas)), DryRun: change.dryRun})
	to := fmt.Sprintf("%d replicas", replicas)
	if replicas == 1 {
		to = "1 replica"
	}
	switch {
	case err != nil:
		return err
	case change.dryRun && answer.Noop:
		return a.done("vm", name, "would stay as it is")
	case change.dryRun:
		return a.done("vm", name, "would be scaled to "+to)
	case change.noWait:
		return a.done("vm", name, "is being scaled to "+to)
	}
	got, err := ask(ctx, a, (*client.Client).GetVM, &blixardv1.GetVMRequest{Name: name})
	if err != nil {
		return err
	}
	if got.Vm.Desired == "stopped" {
		return a.doneVM(got.Vm, "has "+to+" now; it is stopped")
	}
	vm, err := a.awaitVM(ctx, name, running())
	if err != nil {
		return err
	}
	if answer.Noop {
		return a.doneVM(vm, "has "+to+" already, "+runningWords(vm))
	}
	return a.doneVM(vm, "scaled to "+to+", "+runningWords(vm))
}

func (a *app) vmDelete() *cobra.Command {
	var change changeFlags
	var ignoreMissing bool
	cmd := &cobra.Command{
		Use: "delete NAME…", Short: "Stop a VM and remove all of it", Aliases: []string{"rm"}, Args: takes("NAME…"), ValidArgsFunction: a.completeVMs,
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, name := range args {
				if err := blixard.CheckName(name); err != nil {
					return err
				}
			}
			return a.deleteVMs(cmd.Context(), args, ignoreMissing, change)
		},
	}
	change.add(cmd, true)
	cmd.Flags().BoolVar(&ignoreMissing, "ignore-missing", false, "VMs that are not there are no error")
	return cmd
}

// deleteVMs deletes all or none, and waits until nothing of them is left.
func (a *app) deleteVMs(ctx context.Context, names []string, ignoreMissing bool, change changeFlags) error {
	uids := map[string]uint64{}
	if len(names) > 50 { // one request instead of many
		list, err := ask(ctx, a, (*client.Client).ListVMs, &blixardv1.ListVMsRequest{WithoutInstances: true})
		if err != nil {
			return err
		}
		for _, vm := range list.Vms {
			uids[vm.Name] = vm.Uid
		}
	} else {
		for _, name := range names {
			got, err := ask(ctx, a, (*client.Client).GetVM, &blixardv1.GetVMRequest{Name: name})
			if err == nil {
				uids[name] = got.Vm.Uid
			} else if blixard.CodeOf(err) != blixard.CodeNotFound {
				return err
			}
		}
	}
	_, err := ask(ctx, a, (*client.Client).DeleteVMs, &blixardv1.DeleteVMsRequest{Names: names, DryRun: change.dryRun, IgnoreMissing: ignoreMissing})
	if err != nil {
		return err
	}
	for _, name := range names {
		uid, was := uids[name]
		switch {
		case !was:
			err = a.done("vm", name, "is not there")
		case change.dryRun:
			err = a.done("vm", name, "would be deleted")
		case change.noWait:
			err = a.done("vm", name, "is being deleted")
		default:
			if _, err = a.awaitVM(ctx, name, gone(uid)); err == nil {
				err = a.done("vm", name, "deleted")
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// kindName splits "vm/webapp".
func kindName(text string) (kind, name string, found bool) { return strings.Cut(text, "/") }
