package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

func (a *app) vmEvents() *cobra.Command {
	var flags listFlags
	var warnings bool
	var limit int32
	cmd := &cobra.Command{
		Use: "events [NAME]", Short: "What happened to a VM, or to all, oldest first", Args: takes("[NAME]"), ValidArgsFunction: a.completeOneVM,
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &blixardv1.ListEventsRequest{Warnings: warnings, Limit: limit}
			if len(args) == 1 {
				if err := blixard.CheckName(args[0]); err != nil {
					return err
				}
				req.Vm = args[0]
			}
			return a.events(cmd.Context(), req, flags)
		},
	}
	addEventFlags(cmd, &flags, &warnings, &limit)
	a.mayBeStale(cmd)
	return cmd
}

func addEventFlags(cmd *cobra.Command, flags *listFlags, warnings *bool, limit *int32) {
	flags.add(cmd, true)
	completeSortOf(cmd, "event")
	cmd.Flags().BoolVar(warnings, "warnings", false, "warnings only")
	cmd.Flags().Int32Var(limit, "limit", 100, "at most so many, the newest")
}

// events prints what happened; with --watch it goes on with what happens.
func (a *app) events(ctx context.Context, req *blixardv1.ListEventsRequest, flags listFlags) error {
	if req.Limit < 0 {
		return blixard.Invalid("--limit", "", "--limit is negative")
	}
	got, err := ask(ctx, a, (*client.Client).ListEvents, req)
	if err != nil {
		return err
	}
	slices.Reverse(got.Events)
	l := eventListing(got.Events, time.Now())
	if req.Vm != "" && len(got.Events) == 0 {
		// Nothing happened to it, or there is none.
		if _, err := ask(ctx, a, (*client.Client).GetVM, &blixardv1.GetVMRequest{Name: req.Vm}); err != nil {
			return err
		}
	}
	if !flags.watch {
		return a.print(a.env.Stdout, l, flags)
	}
	if len(l.rows) > 0 {
		if err := a.printEvents(a.env.Stdout, l, flags); err != nil {
			return err
		}
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	flags.headers = true
	watch := &blixardv1.WatchRequest{Kinds: []string{"event"}, From: got.Index, Vm: req.Vm, Node: req.Node}
	for m, err := range c.Watch(ctx, watch) {
		if ctx.Err() != nil {
			return nil // Ctrl-C is how a watch ends
		}
		if err != nil {
			return err
		}
		e := m.GetEvent()
		if e == nil || req.Warnings && !e.Warning {
			continue
		}
		if err := a.printEvents(a.env.Stdout, eventListing([]*blixardv1.Event{e}, time.Now()), flags); err != nil {
			return err
		}
	}
	return nil
}

// printEvents prints events that more may follow: as JSON, one to a line.
func (a *app) printEvents(w io.Writer, l *listing, flags listFlags) error {
	if a.output != formatJSON {
		return a.print(w, l, flags)
	}
	if err := l.narrow(flags); err != nil {
		return err
	}
	for _, r := range l.rows {
		data, err := json.Marshal(r.object)
		if err != nil {
			return fmt.Errorf("writing JSON: %w", err)
		}
		fmt.Fprintln(w, string(data))
	}
	return nil
}

func eventListing(events []*blixardv1.Event, now time.Time) *listing {
	l := &listing{
		key: "events", empty: "nothing happened yet",
		columns: []column{{name: "AGE"}, {name: "KIND"}, {name: "OBJECT"}, {name: "NODE"}, {name: "MESSAGE"}, {name: "VM", wide: true}, {name: "WARNING", wide: true}, {name: "INDEX", wide: true}},
	}
	for _, e := range events {
		object := firstOf(e.Instance, e.Vm, e.Node)
		if e.Instance != "" && e.Generation > 0 {
			object += fmt.Sprintf("#%d", e.Generation)
		}
		warning := ""
		if e.Warning {
			warning = "yes"
		}
		l.rows = append(l.rows, row{
			name: fmt.Sprintf("event/%d", e.Seq), object: e,
			cells: []cell{age(now, e.AtMs), str(e.Kind), str(object), str(e.Node), str(e.Message), str(e.Vm), str(warning), num(e.Index)},
		})
	}
	return l
}
