package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// changeFlags are the flags of verbs that change something.
type changeFlags struct {
	noWait bool
	dryRun bool
}

func (c *changeFlags) add(cmd *cobra.Command, waits bool) {
	if waits {
		cmd.Flags().BoolVar(&c.noWait, "no-wait", false, "end when it is accepted; the effect comes later")
	}
	cmd.Flags().BoolVar(&c.dryRun, "dry-run", false, "check everything and change nothing")
}

// progress tells how a change goes: one line that is rewritten on a terminal,
// else a line for each change.
type progress struct {
	a     *app
	tty   bool
	width int
	last  string
	shown bool
}

func (a *app) newProgress() *progress {
	width, is := terminal(a.env.Stderr)
	return &progress{a: a, tty: is && a.env.Getenv("TERM") != "dumb", width: width}
}

func (p *progress) show(text string) {
	if text == p.last {
		return
	}
	p.last = text
	if !p.tty {
		p.a.note("%s", visible(text))
		return
	}
	line := []rune(visible(text))
	if p.width > 1 && len(line) > p.width-1 {
		line = append(line[:p.width-2], '…')
	}
	fmt.Fprintf(p.a.env.Stderr, "\r\x1b[K%s", string(line))
	p.shown = true
}

// tell writes a line that stays.
func (p *progress) tell(text string) {
	line := p.last
	p.end()
	p.a.note("%s", visible(text))
	if p.tty && line != "" {
		p.last = ""
		p.show(line)
	}
}

// end wipes the line of a terminal.
func (p *progress) end() {
	if p.shown {
		fmt.Fprint(p.a.env.Stderr, "\r\x1b[K")
		p.shown = false
	}
}

// goal is what a verb waits for.
type goal struct {
	// reached tells whether the VM, nil when there is none, is as wanted.
	reached func(*blixardv1.VM) bool
	// hopeless says why it never will be, nil while there is hope.
	hopeless func(*blixardv1.VM) error
	what     string // "running", for words
}

// awaitVM waits for a goal and tells the truth about it.
func (a *app) awaitVM(ctx context.Context, name string, g goal) (*blixardv1.VM, error) {
	c, err := a.client()
	if err != nil {
		return nil, err
	}
	waitCtx, cancel := a.wait(ctx)
	defer cancel()
	p := a.newProgress()
	var lost error
	var told []string
	vm, err := c.WaitVM(waitCtx, name, func(vm *blixardv1.VM) bool {
		if g.reached(vm) {
			return true
		}
		if g.hopeless != nil {
			lost = g.hopeless(vm)
		}
		return lost != nil
	}, func(vm *blixardv1.VM) {
		if vm == nil {
			return
		}
		p.show(vmProgress(vm))
		for _, text := range complaints(vm) {
			if !slices.Contains(told, text) && len(told) < 10 {
				told = append(told, text)
				p.tell("  " + text)
			}
		}
	})
	p.end()
	switch {
	case lost != nil:
		return vm, lost
	case err == nil:
		return vm, nil
	case ctx.Err() != nil:
		a.note("the change was made and goes on; `blixard vm status %s` shows how", name)
		return vm, context.Canceled
	case waitCtx.Err() != nil:
		return vm, a.notReached(name, vm, g)
	}
	return vm, err
}

// notReached explains why a goal was not reached in time.
func (a *app) notReached(name string, vm *blixardv1.VM, g goal) error {
	e := &blixard.Error{
		Code: blixard.CodeUnavailable, Message: fmt.Sprintf("vm/%s is not %s after %s", name, g.what, a.timeout),
		Hint: "the change was made and goes on; `blixard vm describe " + name + "` shows more, --timeout waits longer",
	}
	if vm == nil {
		return e
	}
	e.Message += ": " + strings.TrimPrefix(vmProgress(vm), name+": ")
	if why := complaints(vm); len(why) > 0 {
		e.Message += ": " + why[0]
	}
	if vm.Refusal != nil {
		e.Code = blixard.CodeRefused
		e.Hint = "`blixard vm explain " + name + "` shows what each node says; it starts by itself when there is room"
	}
	return e
}

// vmProgress says in one line how a VM is.
func vmProgress(vm *blixardv1.VM) string {
	want := int(vm.GetSpec().GetReplicas())
	text := fmt.Sprintf("%s: %s, %d/%d ready", vm.Name, vm.Phase, vm.Ready, want)
	var busy []string
	for _, i := range newest(vm.Instances) {
		unchecked := vm.GetSpec().GetHealthCheck() != nil && i.Health == ""
		if i.State == "Running" && i.Health != "unhealthy" && !unchecked || i.State == "Stopped" {
			continue
		}
		one := fmt.Sprintf("%s %s on %s", i.Id, i.State, i.Node)
		if i.State == "Running" {
			one = fmt.Sprintf("%s %s on %s", i.Id, firstOf(i.Health, "not yet healthy"), i.Node)
		}
		busy = append(busy, one)
	}
	if len(busy) > 3 {
		busy = append(busy[:3], fmt.Sprintf("and %d more", len(busy)-3))
	}
	if len(busy) > 0 {
		text += "; " + strings.Join(busy, ", ")
	}
	if r := vm.Refusal; r != nil {
		text += fmt.Sprintf("; no place for %d: %s", r.Missing, r.Summary)
	}
	return text
}

// complaints are the reasons that instances gave for not running, each once.
func complaints(vm *blixardv1.VM) []string {
	var out []string
	for _, i := range newest(vm.Instances) {
		bad := i.State == "Failed" || i.State == "Lost" || i.Health == "unhealthy"
		if bad && i.Message != "" && !slices.Contains(out, i.Message) {
			out = append(out, i.Message)
		}
	}
	return out
}

// newest leaves the newest incarnation of each slot, in order of the slots.
func newest(instances []*blixardv1.Instance) []*blixardv1.Instance {
	var out []*blixardv1.Instance
	for _, i := range instances {
		at := slices.IndexFunc(out, func(o *blixardv1.Instance) bool { return o.Ordinal == i.Ordinal })
		switch {
		case at < 0:
			out = append(out, i)
		case out[at].Generation < i.Generation:
			out[at] = i
		}
	}
	slices.SortFunc(out, func(x, y *blixardv1.Instance) int { return int(x.Ordinal) - int(y.Ordinal) })
	return out
}

// terminalState tells whether an instance has ended.
func terminalState(i *blixardv1.Instance) bool { return blixard.InstanceState(i.State).Terminal() }

// running is the goal of create, start, scale, restart and resume: all replicas
// wanted by now run, of the newest spec and restart, and no others.
func running() goal {
	return goal{
		what: "running",
		reached: func(vm *blixardv1.VM) bool {
			if vm == nil || vm.Desired != "running" || vm.Ready < vm.GetSpec().GetReplicas() || vm.Paused {
				return false
			}
			live := int32(0)
			for _, i := range vm.Instances {
				if terminalState(i) {
					continue
				}
				live++
				if i.Wanted != "run" || i.RestartSeq < vm.RestartSeq || i.Paused {
					return false
				}
			}
			return live == vm.GetSpec().GetReplicas()
		},
		hopeless: func(vm *blixardv1.VM) error {
			switch {
			case vm == nil:
				return blixard.Errorf(blixard.CodeConflict, "the VM was deleted meanwhile")
			case vm.Deleting:
				return blixard.Errorf(blixard.CodeConflict, "vm/%s is being deleted meanwhile", vm.Name)
			case vm.Desired != "running":
				return blixard.Errorf(blixard.CodeConflict, "vm/%s was stopped meanwhile", vm.Name)
			case vm.Paused:
				return blixard.Errorf(blixard.CodeConflict, "vm/%s is paused; `blixard vm resume %s` lets it go on", vm.Name, vm.Name)
			}
			if err := neverStarts(vm); err != nil {
				return err
			}
			return neverRestarted(vm)
		},
	}
}

// neverStarts tells of instances whose command cannot be started: it is tried
// again, but that is nothing to wait for.
func neverStarts(vm *blixardv1.VM) error {
	for _, i := range vm.Instances {
		current := i.SpecVersion >= vm.SpecVersion && i.RestartSeq >= vm.RestartSeq
		if current && i.State == "Failed" && strings.HasPrefix(i.Message, blixard.CommandNotStarted) {
			return &blixard.Error{
				Code: blixard.CodeRefused, Message: fmt.Sprintf("%s has failed on %s: %s", i.Id, i.Node, i.Message),
				Hint: "the image may lack it, or it is no program; vm/" + vm.Name + " is there and tries again, until it is given another command or is deleted",
			}
		}
	}
	return nil
}

// neverRestarted tells of instances that have ended and stay so.
func neverRestarted(vm *blixardv1.VM) error {
	mode := vm.GetSpec().GetRestart().GetMode()
	if mode != "never" && mode != "on-failure" {
		return nil
	}
	for _, i := range newest(vm.Instances) {
		current := i.SpecVersion >= vm.SpecVersion && i.RestartSeq >= vm.RestartSeq && i.Wanted == "run"
		if current && (i.State == "Failed" && mode == "never" || i.State == "Stopped") {
			return &blixard.Error{
				Code: blixard.CodeRefused, Message: fmt.Sprintf("%s has ended (%s) and its restart policy is %s: %s", i.Id, i.State, mode, firstOf(i.Message, "no reason is known")),
				Hint: "`blixard vm logs " + i.Id + "` shows its last words",
			}
		}
	}
	return nil
}

func stopped() goal {
	return goal{
		what: "stopped",
		reached: func(vm *blixardv1.VM) bool {
			return vm != nil && vm.Desired == "stopped" && !slices.ContainsFunc(vm.Instances, func(i *blixardv1.Instance) bool { return !terminalState(i) })
		},
		hopeless: func(vm *blixardv1.VM) error {
			if vm == nil {
				return blixard.Errorf(blixard.CodeConflict, "the VM was deleted meanwhile")
			}
			if vm.Desired != "stopped" {
				return blixard.Errorf(blixard.CodeConflict, "vm/%s was started again meanwhile", vm.Name)
			}
			return nil
		},
	}
}

// gone is the goal of delete: no VM, or another one of the same name.
func gone(uid uint64) goal {
	return goal{what: "gone", reached: func(vm *blixardv1.VM) bool { return vm == nil || vm.Uid != uid }}
}

func paused() goal {
	return goal{
		what: "paused",
		reached: func(vm *blixardv1.VM) bool {
			return vm != nil && vm.Paused && !slices.ContainsFunc(vm.Instances, func(i *blixardv1.Instance) bool { return i.State == "Running" && !i.Paused })
		},
		hopeless: func(vm *blixardv1.VM) error {
			if vm == nil || !vm.Paused {
				return blixard.Errorf(blixard.CodeConflict, "it was resumed or deleted meanwhile")
			}
			return nil
		},
	}
}

// poll looks again and again until done, for effects that no watch tells of.
func (a *app) poll(ctx context.Context, what string, look func(context.Context) (done bool, words string, err error)) error {
	waitCtx, cancel := a.wait(ctx)
	defer cancel()
	p := a.newProgress()
	defer p.end()
	tick := time.NewTicker(300 * time.Millisecond)
	defer tick.Stop()
	words := ""
	for {
		done, now, err := look(waitCtx)
		switch {
		case done:
			return nil
		case err != nil && waitCtx.Err() == nil && blixard.CodeOf(err) != blixard.CodeUnavailable:
			return err
		case err == nil:
			words = now
			p.show(words)
		}
		select {
		case <-tick.C:
		case <-waitCtx.Done():
			if ctx.Err() != nil {
				return context.Canceled
			}
			if errors.Is(waitCtx.Err(), context.DeadlineExceeded) && words == "" && err != nil {
				return err
			}
			return &blixard.Error{Code: blixard.CodeUnavailable, Message: fmt.Sprintf("%s after %s: %s", what, a.timeout, words), Hint: "what was asked for goes on; --timeout waits longer"}
		}
	}
}
