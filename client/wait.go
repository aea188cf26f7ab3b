package client

import (
	"context"
	"errors"
	"fmt"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// WaitVM waits until the VM is as until says, and returns it. until and
// progress get the VM with its instances, nil when there is none; both are
// called once at the beginning and after each change. progress may be nil.
//
// When ctx ends first the error is CodeUnavailable and wraps ctx's, and the VM
// is the last one seen.
func (c *Client) WaitVM(ctx context.Context, name string, until func(*blixardv1.VM) bool, progress func(*blixardv1.VM)) (*blixardv1.VM, error) {
	watchCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	var vm *blixardv1.VM
	// look reads the VM and tells whether it is as wanted.
	look := func() (bool, uint64, error) {
		answer, err := c.GetVM(ctx, &blixardv1.GetVMRequest{Name: name})
		switch {
		case err == nil:
			vm = answer.Vm
		case blixard.CodeOf(err) == blixard.CodeNotFound:
			vm = nil
		default:
			return false, 0, err
		}
		if progress != nil {
			progress(vm)
		}
		return until(vm), answer.GetIndex(), nil
	}
	seen := uint64(0)
	err := errEarly
	for m, watchErr := range c.Watch(watchCtx, &blixardv1.WatchRequest{Kinds: []string{"vm", "instance"}, Vm: name}) {
		if watchErr != nil {
			err = watchErr
			break
		}
		if m.Index <= seen && m.Type != WatchReset && m.Type != WatchReady {
			continue // what was read last is newer
		}
		done, index, lookErr := look()
		if done || lookErr != nil {
			err = lookErr
			break
		}
		seen = max(seen, index)
	}
	if err != nil && ctx.Err() != nil {
		return vm, &waitError{blixard.Error{
			Code: blixard.CodeUnavailable, Message: fmt.Sprintf("waiting for the VM %s ended early: %s", name, stateOf(vm)),
			Hint: "the change itself was made; `blixard vm status " + name + "` shows how it goes on",
		}, ctx.Err()}
	}
	return vm, err
}

var errEarly = errors.New("the watch ended by itself")

// waitError is a blixard.Error that also is a context's.
type waitError struct {
	verdict blixard.Error
	cause   error
}

func (e *waitError) Error() string   { return e.verdict.Error() }
func (e *waitError) Unwrap() []error { return []error{&e.verdict, e.cause} }

func stateOf(vm *blixardv1.VM) string {
	if vm == nil {
		return "there is none"
	}
	text := fmt.Sprintf("it is %s, %d of %d ready", vm.Phase, vm.Ready, vm.GetSpec().GetReplicas())
	if vm.Refusal != nil {
		text += "; " + vm.Refusal.Summary
	}
	return text
}

// Running tells whether every wanted instance of a VM runs, for WaitVM.
func Running(vm *blixardv1.VM) bool { return vm != nil && vm.Phase == "Running" }

// Stopped tells whether a VM is stopped with nothing left running, for WaitVM.
func Stopped(vm *blixardv1.VM) bool { return vm != nil && vm.Phase == "Stopped" }

// Gone tells whether a VM is deleted and nothing of it is left, for WaitVM.
func Gone(vm *blixardv1.VM) bool { return vm == nil }
