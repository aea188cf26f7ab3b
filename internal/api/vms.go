package api

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/internal/schedule"
	"github.com/blixard/blixard/internal/state"
)

// maxDocuments bounds one apply or delete. The state takes twice as many.
const maxDocuments = 10_000

// vms implements VMService.
type vms struct{ *Handler }

func (h vms) CreateVM(ctx context.Context, req *blixardv1.CreateVMRequest) (*blixardv1.Change, error) {
	if err := blixard.CheckName(req.Name); err != nil {
		return nil, err
	}
	spec, err := h.specOf(req.Name, req.Spec)
	if err != nil {
		return nil, err
	}
	if err := h.checkImage(ctx, blixard.VMName(req.Name), spec.Image); err != nil {
		return nil, err
	}
	command := &state.CreateVM{Name: blixard.VMName(req.Name), Spec: spec, Start: req.Start == nil || *req.Start}
	return specChange(h.change(ctx, req.IdempotencyKey, req.DryRun, command))
}

// specChange gives a refusal of a spec by the state the path to the field.
func specChange(c *blixardv1.Change, err error) (*blixardv1.Change, error) {
	if e := blixardv1.AsError(err); err != nil && e.Field != "" {
		return nil, inSpec(e)
	}
	return c, err
}

func (h vms) GetVM(ctx context.Context, req *blixardv1.GetVMRequest) (*blixardv1.GetVMResponse, error) {
	view, err := h.view(ctx, req.Consistency)
	if err != nil {
		return nil, err
	}
	vm, err := findVM(view, req.Name)
	if err != nil {
		return nil, err
	}
	return &blixardv1.GetVMResponse{Vm: vmMessage(view, vm, true), Index: view.Index}, nil
}

func findVM(view *state.View, name string) (*blixard.VM, error) {
	if vm := view.VM(blixard.VMName(name)); vm != nil {
		return vm, nil
	}
	return nil, nearestNames(name, "VM", func(yield func(string) bool) {
		view.VMs(func(vm *blixard.VM) bool { return yield(string(vm.Name)) })
	})
}

func (h vms) ListVMs(ctx context.Context, req *blixardv1.ListVMsRequest) (*blixardv1.ListVMsResponse, error) {
	if req.Limit < 0 {
		return nil, blixard.Invalid("limit", "", "limit is %d; it must not be negative", req.Limit)
	}
	view, err := h.view(ctx, req.Consistency)
	if err != nil {
		return nil, err
	}
	answer := &blixardv1.ListVMsResponse{Index: view.Index}
	take := func(vm *blixard.VM) bool {
		switch {
		case string(vm.Name) <= req.After && req.After != "", !hasLabels(vm, req.Labels), req.Node != "" && !runsOn(view, vm.Name, req.Node):
			return true
		case req.Limit > 0 && len(answer.Vms) == int(req.Limit):
			answer.More = true
			return false
		}
		answer.Vms = append(answer.Vms, vmMessage(view, vm, !req.WithoutInstances))
		return ctx.Err() == nil
	}
	view.VMs(take)
	return answer, ctx.Err()
}

// hasLabels tells whether a VM has every label: "key" or "key=value".
func hasLabels(vm *blixard.VM, wanted []string) bool {
	for _, w := range wanted {
		key, value, exact := strings.Cut(w, "=")
		found := false
		for _, l := range vm.Spec.Labels {
			found = found || l.Key == key && (!exact || l.Value == value)
		}
		if !found {
			return false
		}
	}
	return true
}

func runsOn(view *state.View, vm blixard.VMName, node string) bool {
	found := false
	view.InstancesOf(vm, func(i *blixard.Instance) bool {
		found = string(i.Node) == node
		return !found
	})
	return found
}

func (h vms) UpdateVM(ctx context.Context, req *blixardv1.UpdateVMRequest) (*blixardv1.Change, error) {
	if err := blixard.CheckName(req.Name); err != nil {
		return nil, err
	}
	if req.Spec == nil {
		return nil, blixard.Invalid("spec", "give the whole spec; what is left out gets its default", "the request has no spec")
	}
	spec, err := h.specOf(req.Name, req.Spec)
	if err != nil {
		return nil, err
	}
	if err := h.checkImage(ctx, blixard.VMName(req.Name), spec.Image); err != nil {
		return nil, err
	}
	command := &state.UpdateVM{Name: blixard.VMName(req.Name), Spec: spec, ExpectVersion: req.ExpectVersion}
	return specChange(h.change(ctx, req.IdempotencyKey, req.DryRun, command))
}

func (h vms) ScaleVM(ctx context.Context, req *blixardv1.ScaleVMRequest) (*blixardv1.Change, error) {
	if req.Replicas == nil {
		return nil, blixard.Invalid("replicas", "say how many there are to be; 0 is a number, too", "replicas is missing")
	}
	replicas := req.GetReplicas()
	if replicas < 0 || replicas > blixard.MaxReplicas {
		return nil, blixard.Invalid("replicas", "", "replicas is %d; it must be between 0 and %d", replicas, blixard.MaxReplicas)
	}
	command := &state.ScaleVM{Name: blixard.VMName(req.Name), Replicas: int(replicas), ExpectVersion: req.ExpectVersion}
	return h.change(ctx, req.IdempotencyKey, req.DryRun, command)
}

func (h vms) verb(ctx context.Context, req *blixardv1.VMVerbRequest, verb state.VMVerb) (*blixardv1.Change, error) {
	return h.change(ctx, req.IdempotencyKey, req.DryRun, &state.SetVM{Name: blixard.VMName(req.Name), Verb: verb})
}

func (h vms) StartVM(ctx context.Context, req *blixardv1.VMVerbRequest) (*blixardv1.Change, error) {
	return h.verb(ctx, req, state.VerbStart)
}

func (h vms) StopVM(ctx context.Context, req *blixardv1.VMVerbRequest) (*blixardv1.Change, error) {
	return h.verb(ctx, req, state.VerbStop)
}

func (h vms) PauseVM(ctx context.Context, req *blixardv1.VMVerbRequest) (*blixardv1.Change, error) {
	return h.verb(ctx, req, state.VerbPause)
}

func (h vms) ResumeVM(ctx context.Context, req *blixardv1.VMVerbRequest) (*blixardv1.Change, error) {
	return h.verb(ctx, req, state.VerbResume)
}

func (h vms) RestartVM(ctx context.Context, req *blixardv1.VMVerbRequest) (*blixardv1.Change, error) {
	return h.change(ctx, req.IdempotencyKey, req.DryRun, &state.RestartVM{Name: blixard.VMName(req.Name)})
}

func (h vms) DeleteVM(ctx context.Context, req *blixardv1.DeleteVMRequest) (*blixardv1.Change, error) {
	command := &state.DeleteVM{Name: blixard.VMName(req.Name), ExpectVersion: req.ExpectVersion, IfExists: req.IgnoreMissing}
	return h.change(ctx, req.IdempotencyKey, req.DryRun, command)
}

func (h vms) DeleteVMs(ctx context.Context, req *blixardv1.DeleteVMsRequest) (*blixardv1.Change, error) {
	if err := checkCount("names", len(req.Names)); err != nil {
		return nil, err
	}
	batch := &state.Batch{Commands: make([]state.Command, len(req.Names))}
	for i, name := range req.Names {
		batch.Commands[i] = &state.DeleteVM{Name: blixard.VMName(name), IfExists: req.IgnoreMissing}
	}
	out, err := h.outcome(ctx, req.IdempotencyKey, req.DryRun, batch)
	if err != nil {
		return nil, inItem(err, "names", req.Names)
	}
	return changeMessage(out, req.DryRun), nil
}

func checkCount(field string, n int) error {
	if n == 0 {
		return blixard.Invalid(field, "", "%s is empty", field)
	}
	if n > maxDocuments {
		return blixard.Invalid(field, "split it", "%s has %d entries; at most %d are allowed", field, n, maxDocuments)
	}
	return nil
}

// inItem gives a batch's error, which counts items from 1, the path to the item
// in the request.
func inItem(err error, field string, names []string) error {
	e := *blixardv1.AsError(err)
	rest, ok := strings.CutPrefix(e.Message, "item ")
	number, text, found := strings.Cut(rest, ": ")
	n, convErr := strconv.Atoi(number)
	if !ok || !found || convErr != nil || n < 1 || n > len(names) {
		return err
	}
	e.Message = text
	path := fmt.Sprintf("%s[%d]", field, n-1)
	if field == "vms" && e.Field != "" && e.Field != "desired" {
		path += "." + blixardv1.AsError(inSpec(&e)).Field
	}
	e.Field = path
	return &e
}

func (h vms) ApplyVMs(ctx context.Context, req *blixardv1.ApplyVMsRequest) (*blixardv1.ApplyVMsResponse, error) {
	if err := checkCount("vms", len(req.Vms)); err != nil {
		return nil, err
	}
	commands, names, err := h.applyCommands(req.Vms)
	if err != nil {
		return nil, err
	}
	asked := map[string]bool{}
	for i, command := range commands {
		if asked[command.Spec.Image] || !h.newImage(command.Name, command.Spec.Image) {
			continue
		}
		if err := h.checkImage(ctx, command.Name, command.Spec.Image); err != nil {
			return nil, inField(err, fmt.Sprintf("vms[%d].spec.image", i))
		}
		asked[command.Spec.Image] = true
	}
	view, err := h.opt.Backend.ReadView(ctx)
	if err != nil {
		return nil, err
	}
	answer := &blixardv1.ApplyVMsResponse{Results: make([]*blixardv1.ApplyResult, len(names))}
	batch := &state.Batch{Commands: make([]state.Command, len(names))}
	for i, command := range commands {
		answer.Results[i] = &blixardv1.ApplyResult{Name: names[i], Action: applyAction(view, command)}
		batch.Commands[i] = command
	}
	out, err := h.outcome(ctx, req.IdempotencyKey, req.DryRun, batch)
	if err != nil {
		return nil, inItem(err, "vms", names)
	}
	answer.Change = changeMessage(out, req.DryRun)
	return answer, nil
}

// applyCommands checks every document and makes a command of each.
func (h vms) applyCommands(documents []*blixardv1.VMDocument) ([]*state.ApplyVM, []string, error) {
	commands := make([]*state.ApplyVM, len(documents))
	names := make([]string, len(documents))
	seen := make(map[string]int, len(documents))
	for i, d := range documents {
		path := fmt.Sprintf("vms[%d]", i)
		if err := blixard.CheckName(d.GetName()); err != nil {
			return nil, nil, inField(err, path+".name")
		}
		if first, twice := seen[d.Name]; twice {
			return nil, nil, blixard.Invalid(path+".name", "", "the VM %s is there twice, as vms[%d] too", d.Name, first)
		}
		seen[d.Name], names[i] = i, d.Name
		if d.Spec == nil {
			return nil, nil, blixard.Invalid(path+".spec", "give the whole spec; what is left out gets its default", "the document of the VM %s has no spec", d.Name)
		}
		spec, err := h.specOf(d.Name, d.Spec)
		if err != nil {
			return nil, nil, inField(err, path+"."+blixardv1.AsError(err).Field)
		}
		commands[i] = &state.ApplyVM{Name: blixard.VMName(d.Name), Spec: spec, Desired: blixard.Desired(d.Desired), ExpectVersion: d.ExpectVersion}
	}
	return commands, names, nil
}

// applyAction is what applying a document means for a view.
func applyAction(view *state.View, command *state.ApplyVM) string {
	out := view.Try(state.Envelope{Command: command})
	if out.Err != nil { // the batch may succeed all the same, or says why not
		return "updated"
	}
	return out.Outcome.Text
}

func (h vms) ExplainVM(ctx context.Context, req *blixardv1.ExplainVMRequest) (*blixardv1.ExplainVMResponse, error) {
	view, err := h.view(ctx, req.Consistency)
	if err != nil {
		return nil, err
	}
	answer := &blixardv1.ExplainVMResponse{Index: view.Index}
	question := schedule.Request{VM: blixard.VMName(req.Name)}
	switch {
	case req.Spec != nil:
		spec, err := h.specOf(req.Name, req.Spec)
		if err != nil {
			return nil, err
		}
		question.Spec = &spec
	case req.Name == "":
		return nil, blixard.Invalid("name", "", "give the name of a VM, or a spec")
	default:
		vm, err := findVM(view, req.Name)
		if err != nil {
			return nil, err
		}
		question.Spec, answer.Refusal = &vm.Spec, refusalMessage(vm.Refusal)
	}
	for _, verdict := range schedule.Explain(view, question) {
		answer.Nodes = append(answer.Nodes, verdictMessage(view, question.VM, &verdict))
	}
	answer.Summary = schedule.Refuse(view, question.Spec).Summary
	if !slices.ContainsFunc(answer.Nodes, func(n *blixardv1.NodeVerdict) bool { return n.Fits }) {
		if room, ok := schedule.ExplainRoom(view, schedule.Want{Request: question}); ok {
			answer.Summary += "; it would get " + room.String()
		}
	}
	return answer, nil
}

func (h vms) ListInstances(ctx context.Context, req *blixardv1.ListInstancesRequest) (*blixardv1.ListInstancesResponse, error) {
	view, err := h.view(ctx, req.Consistency)
	if err != nil {
		return nil, err
	}
	answer := &blixardv1.ListInstancesResponse{Index: view.Index}
	take := func(i *blixard.Instance) bool {
		if (req.Vm == "" || string(i.VM) == req.Vm) && (req.Node == "" || string(i.Node) == req.Node) {
			answer.Instances = append(answer.Instances, instanceMessage(i))
		}
		return ctx.Err() == nil
	}
	switch {
	case req.Vm != "":
		if _, err := findVM(view, req.Vm); err != nil {
			return nil, err
		}
		view.InstancesOf(blixard.VMName(req.Vm), take)
	case req.Node != "":
		if _, err := findNode(view, req.Node); err != nil {
			return nil, err
		}
		view.InstancesOn(blixard.NodeName(req.Node), take)
	default:
		view.Instances(take)
	}
	return answer, ctx.Err()
}
