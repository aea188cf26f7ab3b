package api

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/api/blixard/v1/blixardv1connect"
	"github.com/blixard/blixard/internal/state"
)

const (
	defaultEvents = 1000
	maxEvents     = 10_000
)

// watchKinds are the tables that can be watched, by the API's name.
var watchKinds = map[string]state.ChangeKind{
	"vm": state.ChangeVM, "instance": state.ChangeInstance, "node": state.ChangeNode, "event": state.ChangeEvent,
}

var watchKindNames = []string{"vm", "instance", "node", "event"}

// events implements EventService.
type events struct{ *Handler }

func (h events) ListEvents(ctx context.Context, req *blixardv1.ListEventsRequest) (*blixardv1.ListEventsResponse, error) {
	limit := int(req.Limit)
	switch {
	case limit == 0:
		limit = defaultEvents
	case limit < 0 || limit > maxEvents:
		return nil, blixard.Invalid("limit", "", "limit is %d; it must be between 1 and %d", limit, maxEvents)
	}
	view, err := h.view(ctx, req.Consistency)
	if err != nil {
		return nil, err
	}
	answer := &blixardv1.ListEventsResponse{Index: view.Index}
	view.Events(func(e *state.Event) bool {
		switch {
		case req.BeforeSeq != 0 && e.Seq >= req.BeforeSeq, req.Warnings && !e.Warning, req.Vm != "" && string(e.VM) != req.Vm,
			req.Node != "" && string(e.Node) != req.Node, req.Instance != "" && string(e.Instance) != req.Instance:
			return true
		}
		answer.Events = append(answer.Events, eventMessage(e))
		return len(answer.Events) < limit
	})
	return answer, nil
}

// interest is what a watcher wants to see.
type interest struct {
	kinds    map[state.ChangeKind]bool // empty: all
	vm, node string
}

func interestOf(req *blixardv1.WatchRequest) (interest, error) {
	in := interest{kinds: map[state.ChangeKind]bool{}, vm: req.Vm, node: req.Node}
	for _, name := range req.Kinds {
		kind, ok := watchKinds[strings.TrimSuffix(strings.ToLower(name), "s")]
		if !ok {
			hint := "known: " + strings.Join(watchKindNames, ", ")
			if near := blixard.Nearest(name, watchKindNames); near != "" {
				hint = "did you mean " + near + "? " + hint
			}
			return in, blixard.Invalid("kinds", hint, "the kind %.40q is not known", name)
		}
		in.kinds[kind] = true
	}
	if req.Snapshot && req.From != 0 {
		return in, blixard.Invalid("from", "", "from and snapshot exclude each other")
	}
	return in, nil
}

// wants tells whether a changed object is of interest.
func (in *interest) wants(kind state.ChangeKind, object any) bool {
	if len(in.kinds) > 0 && !in.kinds[kind] || int(kind) > len(watchKindNames) { // slots and the like have no message
		return false
	}
	var vm, node string
	switch o := object.(type) {
	case *blixard.VM:
		vm = string(o.Name)
	case *blixard.Instance:
		vm, node = string(o.VM), string(o.Node)
	case *blixard.Node:
		node = string(o.Name)
	case *state.Event:
		vm, node = string(o.VM), string(o.Node)
	}
	return (in.vm == "" || vm == in.vm) && (in.node == "" || node == in.node)
}

// Watch implements EventService: what is there (if asked for), ready, then
// every change, with a sign of life when there is none.
func (h events) Watch(ctx context.Context, req *blixardv1.WatchRequest, stream blixardv1connect.EventServiceWatchServerStream) error {
	in, err := interestOf(req)
	if err != nil {
		return err
	}
	from, view := req.From, h.opt.Backend.View()
	if from == 0 {
		// Linearizable, so that a watch begun after a change does not miss what
		// follows from it.
		if view, err = h.readView(ctx); err != nil {
			return err
		}
		from = view.Index
	} else if from > view.Index {
		// This node may lag; the cluster itself never does.
		if view, err = h.readView(ctx); err != nil {
			return err
		}
		if from > view.Index {
			return &blixard.Error{
				Code: blixard.CodeGone, Message: fmt.Sprintf("the changes of this cluster end at index %d, before %d", view.Index, from),
				Hint: "the index is of another cluster, or of before a recovery: list anew and watch from there",
			}
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	next, err := h.opt.Backend.Watch(ctx, from)
	if err != nil {
		return err
	}
	if req.Snapshot {
		if err := h.sendExisting(view, &in, stream.Send); err != nil {
			return err
		}
	}
	if err := stream.Send(&blixardv1.WatchResponse{Type: "ready", Index: from}); err != nil {
		return err
	}
	return h.follow(ctx, cancel, &in, next, from, stream.Send)
}

// readView is a linearizable view, with the deadline that streams do not have.
func (h *Handler) readView(ctx context.Context) (*state.View, error) {
	ctx, cancel := context.WithTimeout(ctx, h.timeout)
	defer cancel()
	return h.opt.Backend.ReadView(ctx)
}

// sendExisting sends every object of interest. Events are no objects that are
// there: they are listed.
func (h events) sendExisting(view *state.View, in *interest, send func(*blixardv1.WatchResponse) error) error {
	var err error
	st := h.opt.Backend.Status()
	one := func(kind state.ChangeKind, object any) bool {
		if in.wants(kind, object) {
			m := h.watchMessage(view, &st, state.Change{Index: view.Index, Kind: kind, Object: object})
			m.Type = "existing"
			err = send(m)
		}
		return err == nil
	}
	view.Nodes(func(n *blixard.Node) bool { return one(state.ChangeNode, n) })
	if err == nil {
		view.VMs(func(vm *blixard.VM) bool { return one(state.ChangeVM, vm) })
	}
	if err == nil {
		view.Instances(func(i *blixard.Instance) bool { return one(state.ChangeInstance, i) })
	}
	return err
}

// batch is what one call of a watch's next gave.
type batch struct {
	changes []state.Change
	err     error
}

// follow sends changes until there is an error. One goroutine waits for
// changes, so that this one can send signs of life; it ends before follow does.
func (h events) follow(ctx context.Context, cancel context.CancelFunc, in *interest, next func() ([]state.Change, error), at uint64, send func(*blixardv1.WatchResponse) error) error {
	batches, done := make(chan batch), make(chan struct{})
	go func() {
		defer close(done)
		for {
			changes, err := next()
			select {
			case batches <- batch{changes, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	defer func() {
		cancel()
		<-done
	}()
	ticker := time.NewTicker(heartbeat)
	defer ticker.Stop()
	for {
		select {
		case b := <-batches:
			if b.err != nil {
				return b.err
			}
			if err := h.sendChanges(in, b.changes, send); err != nil {
				return err
			}
			if len(b.changes) > 0 {
				at = b.changes[len(b.changes)-1].Index
			}
		case <-ticker.C:
			if err := send(&blixardv1.WatchResponse{Type: "progress", Index: at}); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// sendChanges sends what is of interest of a batch, which holds whole indexes.
func (h events) sendChanges(in *interest, changes []state.Change, send func(*blixardv1.WatchResponse) error) error {
	changes = slices.DeleteFunc(changes, func(c state.Change) bool { return !in.wants(c.Kind, c.Object) })
	if len(changes) == 0 {
		return nil
	}
	view, st := h.opt.Backend.View(), Status{}
	if slices.ContainsFunc(changes, func(c state.Change) bool { return c.Kind == state.ChangeNode }) {
		st = h.opt.Backend.Status()
	}
	for i, c := range changes {
		m := h.watchMessage(view, &st, c)
		m.More = i+1 < len(changes) && changes[i+1].Index == c.Index
		if err := send(m); err != nil {
			return err
		}
	}
	return nil
}

func (h events) watchMessage(view *state.View, st *Status, c state.Change) *blixardv1.WatchResponse {
	m := &blixardv1.WatchResponse{Type: "changed", Index: c.Index, Kind: watchKindNames[c.Kind-1]}
	if c.Deleted {
		m.Type = "deleted"
	}
	switch o := c.Object.(type) {
	case *blixard.VM:
		m.Object = &blixardv1.WatchResponse_Vm{Vm: vmMessage(view, o, false)}
	case *blixard.Instance:
		m.Object = &blixardv1.WatchResponse_Instance{Instance: instanceMessage(o)}
	case *blixard.Node:
		m.Object = &blixardv1.WatchResponse_Node{Node: nodeMessage(view, o, st)}
	case *state.Event:
		m.Object = &blixardv1.WatchResponse_Event{Event: eventMessage(o)}
	}
	return m
}
