package api

import (
	"context"
	"errors"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/api/blixard/v1/blixardv1connect"
	"github.com/blixard/blixard/client"
	"github.com/blixard/blixard/internal/guest"
	"github.com/blixard/blixard/internal/state"
)

// maxLogStreams bounds the instances whose logs one request follows.
const maxLogStreams = 256

// guests implements GuestService.
type guests struct{ *Handler }

// place says where an instance is reached: on this node, or at a peer.
type place struct {
	instance *blixard.Instance
	peer     *client.Client // nil: here
}

// locate tells where to reach an instance.
func (h guests) locate(ctx context.Context, view *state.View, i *blixard.Instance) (place, error) {
	here := h.opt.Backend.Status().Node
	if i.Node == here {
		if h.opt.Guests == nil {
			return place{}, blixard.Errorf(blixard.CodeRefused, "the node %s runs no instances", here)
		}
		return place{instance: i}, nil
	}
	if by := forwarded(ctx); by != "" {
		return place{}, &blixard.Error{
			Code: blixard.CodeUnavailable, Message: "the instance " + string(i.ID) + " is not on " + string(here) + ", to which " + by + " passed the request on",
			Hint: "it is being moved; try again",
		}
	}
	node := view.Node(i.Node)
	switch {
	case node == nil:
		return place{}, blixard.Errorf(blixard.CodeNotFound, "the node %s of %s is no longer a member", i.Node, i.ID)
	case h.opt.Peers == nil:
		return place{}, blixard.Errorf(blixard.CodeRefused, "the instance %s is on the node %s, and this node passes nothing on", i.ID, i.Node)
	case node.State == blixard.NodeLost:
		return place{}, blixard.Errorf(blixard.CodeUnavailable, "the node %s of %s is out of touch", i.Node, i.ID)
	}
	peer, err := h.opt.Peers(node.Address)
	if err != nil {
		return place{}, err
	}
	return place{i, peer}, nil
}

// newest is the newest incarnation of each of a VM's slots, by ordinal.
func newest(view *state.View, vm blixard.VMName) []*blixard.Instance {
	var out []*blixard.Instance
	view.InstancesOf(vm, func(i *blixard.Instance) bool {
		if n := len(out); n > 0 && out[n-1].Ordinal == i.Ordinal {
			out[n-1] = i
		} else {
			out = append(out, i)
		}
		return true
	})
	return out
}

// target finds the instance that a VM's or an instance's name stands for: of a
// VM, the first that runs.
func (h guests) target(ctx context.Context, name string) (place, error) {
	view := h.opt.Backend.View()
	if view.VM(blixard.VMName(name)) == nil && view.Latest(blixard.InstanceID(name)) == nil {
		var err error
		if view, err = h.readView(ctx); err != nil { // it may be new
			return place{}, err
		}
	}
	i := view.Latest(blixard.InstanceID(name))
	if view.VM(blixard.VMName(name)) != nil {
		i = nil
		for _, c := range slices.Backward(newest(view, blixard.VMName(name))) {
			if c.State == blixard.Running || i == nil {
				i = c
			}
		}
		if i == nil {
			return place{}, &blixard.Error{Code: blixard.CodeConflict, Message: "the VM " + name + " has no instance", Hint: "`blixard vm start " + name + "` starts it"}
		}
	}
	switch {
	case i == nil:
		if at := strings.LastIndexByte(name, '-'); at > 0 && view.VM(blixard.VMName(name[:at])) != nil {
			if _, err := strconv.Atoi(name[at+1:]); err == nil {
				return place{}, &blixard.Error{Code: blixard.CodeNotFound, Message: "the VM " + name[:at] + " has no instance " + name, Hint: "`blixard vm status " + name[:at] + "` lists them"}
			}
		}
		_, err := findVM(view, name)
		return place{}, err
	case i.State != blixard.Running:
		return place{}, &blixard.Error{
			Code: blixard.CodeConflict, Message: "the instance " + string(i.ID) + " is " + string(i.State) + ", not Running", Hint: "`blixard vm status " + string(i.VM) + "` shows it",
		}
	}
	return h.locate(ctx, view, i)
}

// Logs implements GuestService.
func (h guests) Logs(ctx context.Context, req *blixardv1.LogsRequest, stream blixardv1connect.GuestServiceLogsServerStream) error {
	if req.TailLines != nil && *req.TailLines < -1 {
		return blixard.Invalid("tailLines", "", "tailLines is %d; it must not be negative", *req.TailLines)
	}
	view, instances, err := h.logged(ctx, req)
	if err != nil {
		return err
	}
	var mu sync.Mutex // one Send at a time
	send := func(m *blixardv1.LogsResponse) error {
		mu.Lock()
		defer mu.Unlock()
		return stream.Send(m)
	}
	if !req.Follow || len(instances) == 1 {
		for _, i := range instances {
			if err := h.logsOf(ctx, view, i, req, send); err != nil {
				return err
			}
		}
		return nil
	}
	group, ctx := errgroup.WithContext(ctx)
	for _, i := range instances {
		group.Go(func() error { return h.logsOf(ctx, view, i, req, send) })
	}
	return group.Wait()
}

// logged is which instances a request for logs is about.
func (h guests) logged(ctx context.Context, req *blixardv1.LogsRequest) (*state.View, []*blixard.Instance, error) {
	view := h.opt.Backend.View()
	vm := view.VM(blixard.VMName(req.Vm))
	if vm == nil || len(newest(view, vm.Name)) == 0 {
		var err error
		if view, err = h.readView(ctx); err != nil {
			return nil, nil, err
		}
		if vm, err = findVM(view, req.Vm); err != nil {
			return nil, nil, err
		}
	}
	instances := newest(view, vm.Name)
	if req.Instance != "" {
		instances = slices.DeleteFunc(instances, func(i *blixard.Instance) bool { return string(i.ID) != req.Instance })
	}
	switch {
	case len(instances) == 0 && req.Instance != "":
		return nil, nil, nearestNames(req.Instance, "instance", func(yield func(string) bool) {
			view.InstancesOf(vm.Name, func(i *blixard.Instance) bool { return yield(string(i.ID)) })
		})
	case len(instances) == 0:
		return nil, nil, &blixard.Error{Code: blixard.CodeConflict, Message: "the VM " + req.Vm + " has no instance, so there are no logs", Hint: "`blixard vm status " + req.Vm + "` tells why"}
	case req.Follow && len(instances) > maxLogStreams:
		return nil, nil, blixard.Invalid("instance", "name one instance", "the VM %s has %d instances; at most %d can be followed at once", req.Vm, len(instances), maxLogStreams)
	}
	return view, instances, nil
}

// logsOf sends the log of one instance.
func (h guests) logsOf(ctx context.Context, view *state.View, i *blixard.Instance, req *blixardv1.LogsRequest, send func(*blixardv1.LogsResponse) error) error {
	at, err := h.locate(ctx, view, i)
	if err != nil {
		return err
	}
	if at.peer != nil {
		return at.peer.Logs(ctx, &blixardv1.LogsRequest{Vm: string(i.VM), Instance: string(i.ID), Follow: req.Follow, TailLines: req.TailLines}, send)
	}
	opt := LogOptions{Follow: req.Follow, TailLines: -1}
	if req.TailLines != nil {
		opt.TailLines = int(*req.TailLines)
	}
	w := writerFunc(func(data []byte) error { return send(&blixardv1.LogsResponse{Instance: string(i.ID), Data: data}) })
	return h.opt.Guests.Logs(ctx, i.ID, opt, w)
}

// writerFunc makes a writer of what sends one message; the message is sent when
// it returns, so that the bytes need no copy.
type writerFunc func([]byte) error

func (f writerFunc) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	n := 0
	for part := range slices.Chunk(p, chunkBytes) {
		if err := f(part); err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, nil
}

// Exec implements GuestService.
func (h guests) Exec(ctx context.Context, stream blixardv1connect.GuestServiceExecServerStream) error {
	first, err := stream.Receive()
	if err != nil {
		return errNoStart(err)
	}
	start := first.GetStart()
	if start == nil || len(start.Command) == 0 {
		return blixard.Invalid("start.command", "", "the first message must say what to run")
	}
	if start.TimeoutMs < 0 {
		return blixard.Invalid("start.timeoutMs", "", "timeoutMs is %d; it must not be negative", start.TimeoutMs)
	}
	at, err := h.target(ctx, start.Target)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if at.peer != nil { // which keeps to the limit: it is nearer to the command
		return h.passExec(ctx, at, first, stream)
	}
	if start.TimeoutMs > 0 {
		late := &blixard.Error{Code: blixard.CodeUnavailable, Message: "the command did not end in time and was given up"}
		var stop context.CancelFunc
		ctx, stop = context.WithTimeoutCause(ctx, time.Duration(start.TimeoutMs)*time.Millisecond, late)
		defer stop()
	}
	code, err := h.exec(ctx, cancel, at.instance.ID, start, stream)
	if err != nil {
		var late *blixard.Error
		if ctx.Err() != nil && errors.As(context.Cause(ctx), &late) {
			return late
		}
		return err
	}
	return stream.Send(&blixardv1.ExecResponse{Message: &blixardv1.ExecResponse_Exit{Exit: &blixardv1.ExecExit{Code: int32(code)}}})
}

func errNoStart(err error) error {
	if errors.Is(err, io.EOF) {
		return blixard.Invalid("start", "", "the stream ended before its first message")
	}
	return err
}

// exec runs a command on this node. The goroutine that receives what the caller
// sends ends before exec does.
func (h guests) exec(ctx context.Context, cancel context.CancelFunc, id blixard.InstanceID, start *blixardv1.ExecStart, stream blixardv1connect.GuestServiceExecServerStream) (int, error) {
	input, toInput := io.Pipe()
	sizes, done := make(chan guest.Size, 1), make(chan struct{})
	go func() {
		defer close(done)
		receiveExec(ctx, cancel, stream, toInput, sizes)
	}()
	defer func() {
		cancel()
		unblock(ctx)
		input.CloseWithError(io.ErrClosedPipe)
		<-done
	}()
	var mu sync.Mutex
	send := func(m *blixardv1.ExecResponse) error {
		mu.Lock()
		defer mu.Unlock()
		return stream.Send(m)
	}
	out := writerFunc(func(p []byte) error {
		return send(&blixardv1.ExecResponse{Message: &blixardv1.ExecResponse_Stdout{Stdout: p}})
	})
	bad := writerFunc(func(p []byte) error {
		return send(&blixardv1.ExecResponse{Message: &blixardv1.ExecResponse_Stderr{Stderr: p}})
	})
	return h.opt.Guests.Exec(ctx, id, execRequest(start), input, out, bad, sizes)
}

func execRequest(start *blixardv1.ExecStart) guest.ExecRequest {
	req := guest.ExecRequest{Args: start.Command, Dir: start.Directory, TTY: start.Tty}
	for _, l := range labelsOf(start.Env) {
		req.Env = append(req.Env, l.Key+"="+l.Value)
	}
	size := sizeOf(start.Size)
	req.Rows, req.Cols = size.Rows, size.Cols
	return req
}

func sizeOf(m *blixardv1.TerminalSize) guest.Size {
	return guest.Size{Rows: uint16(min(m.GetRows(), 65535)), Cols: uint16(min(m.GetColumns(), 65535))}
}

// receiveExec hands on what the caller sends. A caller that breaks off ends the
// command; one that has nothing more to say does not.
func receiveExec(ctx context.Context, cancel context.CancelFunc, stream blixardv1connect.GuestServiceExecServerStream, input *io.PipeWriter, sizes chan guest.Size) {
	for {
		m, err := stream.Receive()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				cancel()
			}
			input.Close() //nolint:errcheck // closing a pipe's writer cannot fail
			return
		}
		switch part := m.Message.(type) {
		case *blixardv1.ExecRequest_Stdin:
			if _, err := input.Write(part.Stdin); err != nil {
				continue // nobody reads it any more; sizes may still come
			}
		case *blixardv1.ExecRequest_StdinEnd:
			input.Close() //nolint:errcheck // closing a pipe's writer cannot fail
		case *blixardv1.ExecRequest_Resize:
			select {
			case <-sizes: // only the newest size matters
			default:
			}
			select {
			case sizes <- sizeOf(part.Resize):
			case <-ctx.Done():
				return
			}
		}
	}
}

// passExec passes an exec on to the instance's node.
func (h guests) passExec(ctx context.Context, at place, first *blixardv1.ExecRequest, stream blixardv1connect.GuestServiceExecServerStream) error {
	first.GetStart().Target = string(at.instance.ID)
	peer, err := at.peer.Guest().Exec(ctx)
	if err != nil {
		return err
	}
	defer peer.Close() // its outcome was received already
	if err := peer.Send(first); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return pass(ctx,
		func() error {
			m, err := stream.Receive()
			if err == nil {
				err = peer.Send(m)
			}
			return err
		}, peer.CloseSend,
		func() error {
			m, err := peer.Receive()
			if err == nil {
				err = stream.Send(m)
			}
			return err
		})
}

// pass moves messages both ways until the way back has ended. The goroutine for
// the way there ends before pass does.
func pass(ctx context.Context, there, closeThere, back func() error) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			if err := there(); err != nil {
				if closeThere() != nil {
					return // the way back tells why
				}
				return
			}
		}
	}()
	defer func() {
		unblock(ctx)
		<-done
	}()
	for {
		if err := back(); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}

// Console implements GuestService.
func (h guests) Console(ctx context.Context, stream blixardv1connect.GuestServiceConsoleServerStream) error {
	first, err := stream.Receive()
	if err != nil {
		return errNoStart(err)
	}
	if first.GetStart() == "" {
		return blixard.Invalid("start", "", "the first message must say which instance to attach to")
	}
	at, err := h.target(ctx, first.GetStart())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if at.peer != nil {
		return h.passConsole(ctx, at, stream)
	}
	input, toInput := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			m, err := stream.Receive()
			if err != nil {
				cancel()        // the caller has left
				toInput.Close() //nolint:errcheck // closing a pipe's writer cannot fail
				return
			}
			if _, err := toInput.Write(m.GetData()); err != nil {
				return
			}
		}
	}()
	defer func() {
		cancel()
		unblock(ctx)
		input.CloseWithError(io.ErrClosedPipe)
		<-done
	}()
	err = h.opt.Guests.Console(ctx, at.instance.ID, readWriter{input, writerFunc(func(p []byte) error {
		return stream.Send(&blixardv1.ConsoleResponse{Data: p})
	})})
	if ctx.Err() != nil {
		return nil // the caller has left, perhaps before the console was open
	}
	return err
}

type readWriter struct {
	io.Reader
	io.Writer
}

func (h guests) passConsole(ctx context.Context, at place, stream blixardv1connect.GuestServiceConsoleServerStream) error {
	peer, err := at.peer.Guest().Console(ctx)
	if err != nil {
		return err
	}
	defer peer.Close() // its outcome was received already
	start := &blixardv1.ConsoleRequest{Message: &blixardv1.ConsoleRequest_Start{Start: string(at.instance.ID)}}
	if err := peer.Send(start); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return pass(ctx,
		func() error {
			m, err := stream.Receive()
			if err == nil {
				err = peer.Send(m)
			}
			return err
		}, peer.CloseSend,
		func() error {
			m, err := peer.Receive()
			if err == nil {
				err = stream.Send(m)
			}
			return err
		})
}
