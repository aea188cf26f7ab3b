package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// maxPayloadBytes bounds what is read as a payload; the cluster's own limits are
// lower.
const maxPayloadBytes = 64 << 20

// exitFunctionError is the exit code when the function, not Blixard, has failed.
const exitFunctionError = 11

func (a *app) functionInvoke() *cobra.Command {
	var data string
	var async, dryRun, logs, parts bool
	cmd := &cobra.Command{
		Use: "invoke NAME[:QUALIFIER]", Short: "Call a function and print its answer", Args: takes("NAME"), ValidArgsFunction: a.completeOneFunction,
		Long: `Call a function with a payload and print its answer to standard output; on
standard error it says whether the start was cold or warm, and where the time
went. Exit code 11 says that the function has failed.

--data is the payload itself, @FILE, or - for standard input.`,
		Example: `  blixard function invoke hello --data '{"name": "you"}'
  blixard function invoke hello:live --data @event.json --log
  blixard function invoke report --async --data '{}'`,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, qualifier, err := qualified(args[0])
			if err != nil {
				return err
			}
			payload, err := a.payload(data)
			if err != nil {
				return err
			}
			req := &blixardv1.InvokeFunctionRequest{Name: name, Qualifier: qualifier, Payload: payload, LogTail: logs}
			switch {
			case async && dryRun:
				return blixard.Invalid("--async", "give one of them", "--async and --dry-run are both given")
			case async:
				req.Type = "async"
			case dryRun:
				req.Type = "dry-run"
			}
			ctx := cmd.Context()
			if cmd.Flags().Changed("timeout") && a.timeout > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeoutCause(ctx, a.timeout, &blixard.Error{
					Code: blixard.CodeUnavailable, Message: fmt.Sprintf("no answer within %s", a.timeout), Hint: "the call may have run; --timeout waits longer, and the function's own timeout ends it",
				})
				defer cancel()
			}
			err = a.invokeFunction(ctx, req, parts)
			if cause := context.Cause(ctx); err != nil && cause != nil && cmd.Context().Err() == nil {
				return cause
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVarP(&data, "data", "d", "{}", "the payload: JSON, @FILE or - for standard input")
	f.BoolVar(&async, "async", false, "accept it for later: it is kept, tried, and tried again")
	f.BoolVar(&dryRun, "dry-run", false, "check that it could be called, and do not")
	f.BoolVar(&logs, "log", false, "print the tail of what the call has logged, to standard error")
	f.BoolVar(&parts, "breakdown", false, "print where the time went")
	return cmd
}

// payload reads what --data names.
func (a *app) payload(data string) ([]byte, error) {
	var in io.Reader
	switch {
	case data == "-":
		in = a.env.Stdin
	case strings.HasPrefix(data, "@"):
		f, err := os.Open(data[1:])
		if err != nil {
			return nil, fileError(data[1:], err)
		}
		defer f.Close()
		if info, err := f.Stat(); err == nil && info.IsDir() {
			return nil, blixard.Invalid("--data", "give a file", "%s is a directory", data[1:])
		}
		in = f
	default:
		return []byte(data), nil
	}
	payload, err := io.ReadAll(io.LimitReader(in, maxPayloadBytes+1))
	if err != nil {
		return nil, fmt.Errorf("reading the payload: %w", err)
	}
	if len(payload) > maxPayloadBytes {
		return nil, blixard.Invalid("--data", "", "the payload has more than %d MiB", maxPayloadBytes>>20)
	}
	return payload, nil
}

// answer gathers what comes of an invocation and prints the payload as it comes.
type answer struct {
	a      *app
	head   *blixardv1.InvokeFunctionHead
	report *blixardv1.FunctionReport
	body   []byte // with -o json and yaml, else it is printed
	last   byte
}

func (a *app) newAnswer() *answer { return &answer{a: a, last: '\n'} }

func (w *answer) whole() bool { return w.a.output == formatJSON || w.a.output == formatYAML }

// Begin implements blixard.ResponseSink.
func (w *answer) Begin(head blixard.ResponseHead) error {
	w.head = &blixardv1.InvokeFunctionHead{Status: int32(head.Status), ContentType: head.ContentType}
	return nil
}

// Write implements blixard.ResponseSink.
func (w *answer) Write(p []byte) (int, error) {
	if w.whole() {
		w.body = append(w.body, p...)
		return len(p), nil
	}
	if len(p) > 0 {
		w.last = p[len(p)-1]
	}
	return w.a.env.Stdout.Write(p)
}

// finish prints what there is beside the payload, and tells whether the function
// has failed.
func (w *answer) finish(name string, took time.Duration, parts bool) error {
	a := w.a
	if w.whole() {
		if err := a.printObject(a.env.Stdout, invocationObject(w.head, w.body, w.report)); err != nil {
			return err
		}
	} else if w.last != '\n' {
		fmt.Fprintln(a.env.Stdout)
	}
	if w.report == nil {
		return nil
	}
	if len(w.report.Log) > 0 {
		if _, err := a.env.Stderr.Write(w.report.Log); err != nil {
			return err
		}
	}
	a.note("%s", reportSentence(w.report, took))
	if parts {
		a.note("%s", partsText(w.report.GetParts()))
	}
	if w.report.ErrorKind != "" {
		a.say("the function %s has failed: %s (request %s)", name, firstOf(w.report.ErrorType, w.report.ErrorKind), w.report.RequestId)
		return silentError(exitFunctionError)
	}
	return nil
}

func (a *app) invokeFunction(ctx context.Context, req *blixardv1.InvokeFunctionRequest, parts bool) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	w := a.newAnswer()
	began := time.Now()
	err = c.InvokeFunction(ctx, req, func(m *blixardv1.InvokeFunctionResponse) error {
		switch part := m.Message.(type) {
		case *blixardv1.InvokeFunctionResponse_Head:
			w.head = part.Head
		case *blixardv1.InvokeFunctionResponse_Payload:
			_, err := w.Write(part.Payload)
			return err
		case *blixardv1.InvokeFunctionResponse_Report:
			w.report = part.Report
		}
		return nil
	})
	took := time.Since(began)
	if err != nil {
		return err
	}
	switch {
	case w.report == nil && req.Type == "":
		return blixard.Errorf(blixard.CodeUnavailable, "the connection ended before the call did: it may have run")
	case w.head.GetAccepted():
		a.note("accepted as %s; `blixard function events list %s` shows it until it has ended", w.head.GetRequestId(), req.Name)
	case req.Type == "dry-run":
		a.note("%s could be called", req.Name)
	}
	return w.finish(req.Name, took, parts)
}

// invocationObject is an answer as a document: a JSON payload as such, else text.
func invocationObject(head *blixardv1.InvokeFunctionHead, body []byte, report *blixardv1.FunctionReport) map[string]any {
	out := map[string]any{"requestId": head.GetRequestId()}
	if head.GetStatus() != 0 {
		out["status"] = head.GetStatus()
	}
	if head.GetAccepted() {
		out["accepted"] = true
	}
	if len(body) > 0 {
		if json.Valid(body) {
			out["payload"] = json.RawMessage(body)
		} else {
			out["payload"] = string(body)
		}
	}
	if report != nil {
		out["report"] = report
	}
	return out
}

// reportSentence says how an invocation went: "cold on node2 in 61.3 ms (…)".
func reportSentence(r *blixardv1.FunctionReport, took time.Duration) string {
	start := "cold"
	if r.Start == string(blixard.StartWarm) {
		start = "warm"
	}
	how := ""
	if start == "cold" {
		how = ", " + r.Start
	}
	return fmt.Sprintf("%s on %s%s: %s ms in the cluster, %s ms of it in the handler; %s ms as seen from here", start, r.Node, how, millis(r.GetParts().GetTotalMs()), millis(r.GetParts().GetHandlerMs()), millis(float64(took.Microseconds())/1000))
}

func millis(ms float64) string {
	switch {
	case ms == 0:
		return "0"
	case ms < 10:
		return fmt.Sprintf("%.2f", ms)
	default:
		return fmt.Sprintf("%.1f", ms)
	}
}

// partsText lists the parts of a breakdown that took time.
func partsText(p *blixardv1.FunctionBreakdown) string {
	var out []string
	for _, part := range []struct {
		name string
		ms   float64
	}{
		{"queue", p.GetQueueMs()},
		{"place", p.GetPlaceMs()},
		{"commit", p.GetCommitMs()},
		{"spawn", p.GetSpawnMs()},
		{"restore", p.GetRestoreMs()},
		{"boot", p.GetBootMs()},
		{"init", p.GetInitMs()},
		{"handler", p.GetHandlerMs()},
		{"transfer", p.GetTransferMs()},
		{"total", p.GetTotalMs()},
	} {
		if part.ms > 0 {
			out = append(out, part.name+" "+millis(part.ms))
		}
	}
	if len(out) == 0 {
		return "nothing measured"
	}
	return strings.Join(out, ", ") + " (ms)"
}
