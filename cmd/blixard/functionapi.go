package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/internal/accesskey"
	"github.com/blixard/blixard/internal/api"
	"github.com/blixard/blixard/internal/dispatch"
	"github.com/blixard/blixard/internal/gateway"
	"github.com/blixard/blixard/internal/state"
)

// functionAPI is what the API asks about functions.
type functionAPI struct{ *functions }

// asError takes the word of the cluster out of an error of the gateway: what the
// gateway itself says to the caller, rather than what it was told by a node.
func asError(err error) error {
	if g, ok := errors.AsType[*gateway.Error](err); ok {
		return g.Err
	}
	if e, ok := errors.AsType[*blixard.Error](err); ok {
		return e
	}
	return err
}

// Invoke implements api.Functions.
func (f functionAPI) Invoke(ctx context.Context, inv *blixard.Invocation, sink blixard.ResponseSink) (blixard.InvocationReport, error) {
	report, err := f.gateway.Invoke(ctx, inv, sink)
	return report, asError(err)
}

// Enqueue implements api.Functions.
func (f functionAPI) Enqueue(ctx context.Context, inv *blixard.Invocation) error {
	return asError(f.gateway.Enqueue(ctx, inv))
}

// Here implements api.Functions.
func (f functionAPI) Here() []api.OnNode {
	if f.dispatcher == nil {
		return nil
	}
	status := f.dispatcher.Status()
	var out []api.OnNode
	for i := range status.Functions {
		v := &status.Functions[i]
		if len(out) == 0 || out[len(out)-1].Function != string(v.Function) {
			out = append(out, api.OnNode{Function: string(v.Function), What: &blixardv1.FunctionOnNode{Node: string(status.Node), Slots: int32(v.SlotsLeased), Template: v.TemplateHere, TemplateReason: v.Failure}})
		}
		what := out[len(out)-1].What
		what.Instances += int32(v.Instances)
		what.Warm += int32(v.Idle)
		what.Busy += int32(v.Instances - v.Idle - v.Starting)
		what.Starting += int32(v.Starting)
		what.Pooled += int32(v.Pooled)
		if v.Number == 0 && !v.Retired { // $LATEST is what people look at
			what.Template, what.TemplateReason = v.TemplateHere, v.Failure
		}
	}
	return out
}

// Metrics implements api.Functions.
func (f functionAPI) Metrics(name blixard.FunctionName, windowMS int64) *blixardv1.GetFunctionMetricsResponse {
	out := &blixardv1.GetFunctionMetricsResponse{}
	if f.dispatcher == nil {
		return out
	}
	for _, n := range f.Here() {
		if n.Function == string(name) {
			out.Nodes = append(out.Nodes, n.What)
		}
	}
	m, ok := f.dispatcher.Metrics(name)
	if !ok {
		return out
	}
	out.Throttles, out.RestoreFallbacks = m.Throttles, m.RestoreFailures
	since := time.Now().UnixMilli() - windowMS
	for i := range slices.Backward(m.Recent) {
		r := &m.Recent[i]
		if r.TimeMS < since {
			break
		}
		report := &blixardv1.FunctionReport{
			RequestId: r.RequestID, Node: string(r.Node), Instance: r.Instance, Version: blixard.VersionName(r.Number), Start: string(r.Start),
			ErrorType: r.Error, UsedMib: r.UsedMiB, AtMs: r.TimeMS, Parts: api.Parts(&r.Parts),
		}
		if r.Error != "" {
			report.ErrorKind = "Unhandled"
		}
		out.Recent = append(out.Recent, report)
	}
	if windowMS == time.Hour.Milliseconds() {
		out.Invocations, out.Errors, out.ColdStarts = m.HourInvocations, m.HourErrors, m.HourCold
		return out
	}
	if windowMS > time.Hour.Milliseconds() { // more than the last hour is known only since the start
		out.Invocations, out.Errors, out.ColdStarts = m.Invocations(), m.Errors, m.Cold()
		return out
	}
	for _, r := range out.Recent {
		out.Invocations++
		if r.ErrorKind != "" {
			out.Errors++
		}
		if r.Start != string(blixard.StartWarm) {
			out.ColdStarts++
		}
	}
	return out
}

// Logs implements api.Functions.
func (f functionAPI) Logs(ctx context.Context, q api.FunctionLogs, take func(*blixardv1.LogsResponse) error) error {
	if f.dispatcher == nil {
		return nil
	}
	query := dispatch.LogQuery{Function: q.Function, Any: q.Number == nil, RequestID: q.RequestID, Follow: q.Follow, Tail: max(q.TailLines, 0)}
	if q.TailLines == 0 { // nothing of what is there
		query.SinceMS = time.Now().UnixMilli() + 1
	}
	if q.Number != nil {
		query.Number = *q.Number
	}
	err := f.dispatcher.Logs(ctx, query, func(l dispatch.LogLine) error {
		text := time.UnixMilli(l.TimeMS).UTC().Format("2006-01-02T15:04:05.000Z") + " " + l.Instance + " " + l.Text + "\n"
		return take(&blixardv1.LogsResponse{Instance: l.Instance, Data: []byte(text)})
	})
	if errors.Is(err, dispatch.ErrUnknownFunction) {
		return nil
	}
	return err
}

// Activity implements api.Functions.
func (f functionAPI) Activity(ctx context.Context, name blixard.FunctionName, take func(*blixardv1.FunctionActivity) error) error {
	if f.dispatcher == nil {
		<-ctx.Done()
		return nil
	}
	since := time.Now().UnixMilli()
	return f.dispatcher.Events(ctx, name, true, func(e dispatch.Event) error {
		if e.TimeMS < since {
			return nil
		}
		m := &blixardv1.FunctionActivity{AtMs: e.TimeMS, Node: string(e.Node), Kind: e.Kind, Message: e.Text, Instance: e.Instance}
		for _, n := range f.Here() {
			if n.Function == string(name) {
				m.Instances, m.Warm, m.Busy = n.What.Instances, n.What.Warm, n.What.Busy
			}
		}
		return take(m)
	})
}

// Explain implements api.Functions.
func (f functionAPI) Explain(name blixard.FunctionName, qualifier string) (*blixardv1.ExplainFunctionResponse, error) {
	verdicts, err := f.gateway.Explain(name, qualifier)
	if err != nil {
		return nil, asError(err)
	}
	out := &blixardv1.ExplainFunctionResponse{}
	for _, verdict := range verdicts {
		c := &blixardv1.FunctionCandidate{Node: string(verdict.Node), Fits: verdict.Fits, Score: verdict.Score}
		for _, o := range verdict.Objections {
			c.Reasons = append(c.Reasons, cmp.Or(o.Detail, o.Short))
		}
		for _, p := range verdict.Points {
			switch p.Name {
			case "resources", "best-fit", "load-balanced":
				c.Resources += p.Points
			case "data locality", "data-locality":
				c.DataLocality += p.Points
			case "network proximity", "network-proximity":
				c.NetworkProximity += p.Points
			case "specialisation":
				c.Specialization += p.Points
			}
		}
		if verdict.Chosen {
			out.Chosen = string(verdict.Node)
		}
		out.Nodes = append(out.Nodes, c)
	}
	return out, nil
}

// Host implements api.Functions.
func (f functionAPI) Host(u *blixard.FunctionURL) string { return f.gateway.URLHost(u.ID) }

// URLs implements api.Functions: this node's addresses for a trigger.
func (f functionAPI) URLs(t *blixard.Trigger) []string {
	var out []string
	for _, address := range []string{f.n.cfg.Functions.GatewayListen, advertise(f.n.cfg)} {
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			continue
		}
		if t.Host != "" {
			host = t.Host
		}
		out = append(out, "http://"+net.JoinHostPort(host, port)+t.Path)
	}
	return out
}

// keyVerifier checks requests to function URLs that were signed with access keys.
type keyVerifier struct {
	keys    accesskey.Keys
	scope   accesskey.Scope
	account string
}

func (f *functions) verifier() gateway.Verifier {
	c := f.n.cfg.Functions
	return keyVerifier{accesskey.KeysOf(f.n.srv.View), accesskey.Scope{Region: c.Region, Service: "lambda"}, c.AccountID}
}

// Verify implements gateway.Verifier.
func (v keyVerifier) Verify(r *http.Request, body []byte) (gateway.Identity, error) {
	key, err := accesskey.Verify(r, body, v.scope, time.Now(), v.keys)
	if err == nil && key.Role == accesskey.RoleRead {
		err = fmt.Errorf("the key %s may read and not call", key.ID)
	}
	if err != nil {
		return gateway.Identity{}, blixard.Errorf(blixard.CodeDenied, "%s", err)
	}
	return gateway.Identity{AccessKey: key.ID, AccountID: v.account, CallerID: key.ID, UserARN: "arn:aws:iam::" + v.account + ":user/" + key.Name, UserID: key.ID}, nil
}

// accessKeys implements api.Keys.
type accessKeys struct{ backend }

func (k accessKeys) Create(ctx context.Context, requestKey, actor, name, role string, expiresIn time.Duration) (blixard.AccessKey, string, error) {
	return accesskey.Create(ctx, k.Server, accesskey.New{Name: name, Role: role, Lifetime: expiresIn, RequestKey: requestKey, Actor: actor, Now: time.Now()})
}

func (k accessKeys) Revoke(ctx context.Context, requestKey, actor, id string, dryRun bool) (*blixardv1.Change, error) {
	if dryRun {
		view, err := k.ReadView(ctx)
		if err != nil {
			return nil, err
		}
		result := view.Try(state.Envelope{NowMS: time.Now().UnixMilli(), Actor: actor, Command: &state.RevokeAccessKey{ID: id}})
		if result.Err != nil {
			return nil, result.Err
		}
		return &blixardv1.Change{Version: result.Outcome.Version, Index: view.Index, Noop: result.Outcome.Noop, DryRun: true}, nil
	}
	out, err := accesskey.Revoke(ctx, k.Server, id, requestKey, actor, time.Now())
	return &blixardv1.Change{Version: out.Version, Index: out.Index, Noop: out.Noop}, err
}
