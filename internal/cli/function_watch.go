package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

func (a *app) functionLogs() *cobra.Command {
	var follow bool
	var tail int32
	var request string
	cmd := &cobra.Command{
		Use: "logs NAME[:QUALIFIER]", Short: "What a function's instances have written", Args: takes("NAME"), ValidArgsFunction: a.completeOneFunction,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, qualifier, err := qualified(args[0])
			if err != nil {
				return err
			}
			if tail < -1 {
				return blixard.Invalid("--tail", "give a number of lines, or -1 for all that is kept", "--tail is %d", tail)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			req := &blixardv1.FunctionLogsRequest{Name: name, Qualifier: qualifier, Follow: follow, RequestId: request}
			if tail >= 0 {
				req.TailLines = &tail
			}
			err = c.FunctionLogs(cmd.Context(), req, func(m *blixardv1.LogsResponse) error {
				_, err := a.env.Stdout.Write(m.Data)
				return err
			})
			if follow && cmd.Context().Err() != nil {
				return nil //nolint:nilerr // Ctrl-C is how following ends
			}
			return err
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&follow, "follow", "f", false, "go on with what is written from now on, until Ctrl-C")
	f.Int32Var(&tail, "tail", -1, "begin with the last so many lines; -1: all that is kept")
	f.StringVar(&request, "request", "", "only what belongs to this request ID")
	return cmd
}

func (a *app) functionWatch() *cobra.Command {
	return &cobra.Command{
		Use: "watch NAME", Short: "Show scaling and placement decisions as they are made", Args: takes("NAME"), ValidArgsFunction: a.completeOneFunction,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := blixard.CheckFunctionName(args[0]); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			err = c.WatchFunction(cmd.Context(), &blixardv1.WatchFunctionRequest{Name: args[0]}, func(m *blixardv1.FunctionActivity) error {
				if a.output == formatJSON || a.output == formatYAML {
					return a.printObject(a.env.Stdout, m)
				}
				_, err := fmt.Fprintf(a.env.Stdout, "%s  %-10s %-12s %s\n", time.UnixMilli(m.AtMs).UTC().Format("15:04:05.000"), visible(m.Node), visible(m.Kind), visible(m.Message))
				return err
			})
			if cmd.Context().Err() != nil {
				return nil //nolint:nilerr // Ctrl-C is how watching ends
			}
			return err
		},
	}
}

func (a *app) functionMetrics() *cobra.Command {
	var window time.Duration
	cmd := &cobra.Command{
		Use: "metrics NAME", Short: "How often a function is called, and how long it takes", Args: takes("NAME"), ValidArgsFunction: a.completeOneFunction,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := blixard.CheckFunctionName(args[0]); err != nil {
				return err
			}
			if window < time.Second {
				return blixard.Invalid("--time-range", "give a duration of at least 1s, such as 1h", "--time-range is %s", window)
			}
			got, err := ask(cmd.Context(), a, (*client.Client).GetFunctionMetrics, &blixardv1.GetFunctionMetricsRequest{Name: args[0], WindowMs: window.Milliseconds()})
			if err != nil {
				return err
			}
			if a.output == formatJSON || a.output == formatYAML {
				return a.printObject(a.env.Stdout, got)
			}
			for _, line := range metricsLines(got) {
				fmt.Fprintln(a.env.Stdout, visible(line))
			}
			return nil
		},
	}
	cmd.Flags().DurationVar(&window, "time-range", time.Hour, "look back so long")
	return cmd
}

// metricsLines sums up metrics: first the line that is read, then what it is
// made of.
func metricsLines(m *blixardv1.GetFunctionMetricsResponse) []string {
	perHour := float64(m.Invocations) * float64(time.Hour.Milliseconds()) / float64(max(m.WindowMs, 1))
	lines := []string{fmt.Sprintf("Invocations: %s/hour, Avg cold start: %s, Avg duration: %s", short(perHour), meanText(m.Cold, m.ColdStarts), meanText(m.Duration, m.Invocations))}
	lines = append(lines, fmt.Sprintf("In the last %s: %d invocations, %d errors, %d throttled, %d cold starts (%d fell back to a boot)", time.Duration(m.WindowMs)*time.Millisecond, m.Invocations, m.Errors, m.Throttles, m.ColdStarts, m.RestoreFallbacks))
	for _, t := range []struct {
		name  string
		times *blixardv1.FunctionTimes
		parts *blixardv1.FunctionBreakdown
		count int64
	}{{"Cold", m.Cold, m.ColdParts, m.ColdStarts}, {"Warm", m.Warm, m.WarmParts, m.Invocations - m.ColdStarts}} {
		if t.count <= 0 || t.times == nil {
			continue
		}
		lines = append(lines, fmt.Sprintf("%s: p50 %s ms, p95 %s ms, p99 %s ms, max %s ms; on average %s", t.name, millis(t.times.P50Ms), millis(t.times.P95Ms), millis(t.times.P99Ms), millis(t.times.MaxMs), partsText(t.parts)))
	}
	for _, n := range m.Nodes {
		lines = append(lines, fmt.Sprintf("On %s: %d instances (%d warm, %d busy), template %s", n.Node, n.Instances, n.Warm, n.Busy, strings.TrimSpace(n.Template+" "+n.TemplateReason)))
	}
	return lines
}

func meanText(t *blixardv1.FunctionTimes, count int64) string {
	if t == nil || count == 0 {
		return "-"
	}
	return fmt.Sprintf("%.0fms", t.MeanMs)
}

// short writes 1234 as 1.2k.
func short(n float64) string {
	switch {
	case n >= 1e6:
		return fmt.Sprintf("%.1fM", n/1e6)
	case n >= 1e3:
		return fmt.Sprintf("%.1fk", n/1e3)
	default:
		return fmt.Sprintf("%.0f", n)
	}
}

func (a *app) functionEventsList() *cobra.Command {
	var flags listFlags
	var dead bool
	cmd := &cobra.Command{
		Use: "list NAME", Short: "Asynchronous calls that have not ended, and those that have failed for good", Args: takes("NAME"), ValidArgsFunction: a.completeOneFunction,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := blixard.CheckFunctionName(args[0]); err != nil {
				return err
			}
			got, err := ask(cmd.Context(), a, (*client.Client).ListFunctionEvents, &blixardv1.ListFunctionEventsRequest{Name: args[0], Dead: dead})
			if err != nil {
				return err
			}
			now := time.Now()
			l := &listing{
				key: "events", empty: "no asynchronous call of " + args[0] + " is waiting or has failed",
				columns: []column{{name: "ID"}, {name: "STATE"}, {name: "ATTEMPTS"}, {name: "AGE"}, {name: "NEXT"}, {name: "OWNER", wide: true}, {name: "BYTES", wide: true}, {name: "LAST ERROR"}},
			}
			for _, e := range got.Events {
				state, next := "waiting", "now"
				if e.Dead {
					state, next = e.Condition, "-"
				} else if e.NotBeforeMs > now.UnixMilli() {
					next = "in " + shortDuration(time.UnixMilli(e.NotBeforeMs).Sub(now))
				}
				l.rows = append(l.rows, row{name: "event/" + e.Id, object: e, cells: []cell{str(e.Id), str(state), num(e.Attempts), age(now, e.AcceptedMs), str(next), str(e.Owner), num(e.PayloadBytes), str(e.LastError)}})
			}
			if got.More {
				l.after = "there are more; --output json and the API page through them"
			}
			return a.print(a.env.Stdout, l, flags)
		},
	}
	flags.add(cmd, false)
	cmd.Flags().BoolVar(&dead, "dead", false, "only those that have failed for good")
	return cmd
}

func (a *app) functionEventVerb(use, short, words string, call func(*client.Client, context.Context, *blixardv1.FunctionEventRequest) (*blixardv1.Change, error)) *cobra.Command {
	var dryRun bool
	cmd := &cobra.Command{
		Use: use + " NAME ID…", Short: short, Args: takes("NAME", "ID…"), ValidArgsFunction: a.completeOneFunction,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := blixard.CheckFunctionName(args[0]); err != nil {
				return err
			}
			return a.eachOf(args[1:], func(id string) error {
				answer, err := ask(cmd.Context(), a, call, &blixardv1.FunctionEventRequest{Name: args[0], Id: id, DryRun: dryRun})
				if err != nil {
					return err
				}
				return a.done("event", id, outcome(answer, dryRun, words))
			})
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "check it, and change nothing")
	return cmd
}

func (a *app) functionEvents() *cobra.Command {
	return group("events", "Asynchronous calls: those that wait and those that have failed",
		a.functionEventsList(),
		a.functionEventVerb("replay", "Have failed asynchronous calls tried again from the beginning", "is tried again", (*client.Client).ReplayFunctionEvent),
		a.functionEventVerb("delete", "Forget asynchronous calls", "forgotten", (*client.Client).DeleteFunctionEvent),
	)
}

func (a *app) functionAsync() *cobra.Command {
	var c blixardv1.FunctionAsync
	var retries int32
	var maxAge time.Duration
	var dryRun bool
	cmd := &cobra.Command{
		Use: "async NAME[:QUALIFIER]", Short: "What becomes of asynchronous calls: retries, and where results go", Args: takes("NAME"), ValidArgsFunction: a.completeOneFunction,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, qualifier, err := qualified(args[0])
			if err != nil {
				return err
			}
			got, err := ask(cmd.Context(), a, (*client.Client).GetFunction, &blixardv1.GetFunctionRequest{Name: name, WithoutNodes: true})
			if err != nil {
				return err
			}
			next := &blixardv1.FunctionAsync{Qualifier: firstOf(qualifier, "$LATEST"), MaxRetries: new(int32(blixard.DefaultMaxRetries)), MaxAgeMs: blixard.DefaultMaxEventAgeMS}
			for _, have := range got.Function.GetSettings().GetAsync() {
				if have.Qualifier == next.Qualifier {
					next = have
				}
			}
			given := cmd.Flags().Changed
			if given("max-retries") {
				next.MaxRetries = &retries
			}
			if given("max-age") {
				next.MaxAgeMs = maxAge.Milliseconds()
			}
			if given("on-success") {
				next.OnSuccess = c.OnSuccess
			}
			if given("on-failure") {
				next.OnFailure = c.OnFailure
			}
			answer, err := ask(cmd.Context(), a, (*client.Client).UpdateFunction, &blixardv1.UpdateFunctionRequest{Name: name, DryRun: dryRun, Settings: &blixardv1.FunctionSettings{Async: []*blixardv1.FunctionAsync{next}}})
			if err != nil {
				return err
			}
			return a.done("function", args[0], outcome(answer.Change, dryRun, asyncText(next)))
		},
	}
	f := cmd.Flags()
	f.Int32Var(&retries, "max-retries", 2, "how often a call that has failed is tried again, 0 to 2")
	f.DurationVar(&maxAge, "max-age", 6*time.Hour, "how old a call may become, 1m to 6h")
	f.StringVar(&c.OnSuccess, "on-success", "", "function that gets the record of what has succeeded")
	f.StringVar(&c.OnFailure, "on-failure", "", "function that gets the record of what has failed for good")
	f.BoolVar(&dryRun, "dry-run", false, "check it, and change nothing")
	return cmd
}
