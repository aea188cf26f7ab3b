package api

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"strconv"
	"strings"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/internal/state"
)

// Functions is what the API needs to call functions, and to look at what this
// node does for them. Errors are *blixard.Error.
type Functions interface {
	// Invoke calls a function, wherever it runs.
	Invoke(ctx context.Context, inv *blixard.Invocation, sink blixard.ResponseSink) (blixard.InvocationReport, error)
	// Enqueue accepts an asynchronous invocation; it is durable when it returns.
	// It gives inv a request ID if it has none.
	Enqueue(ctx context.Context, inv *blixard.Invocation) error
	// Here is what this node does for functions; those for which it does nothing
	// are left out.
	Here() []OnNode
	// Metrics are this node's counts and samples of the last windowMS.
	Metrics(f blixard.FunctionName, windowMS int64) *blixardv1.GetFunctionMetricsResponse
	// Logs hands what instances of this node have written to take.
	Logs(ctx context.Context, q FunctionLogs, take func(*blixardv1.LogsResponse) error) error
	// Activity hands what happens on this node to take until ctx ends.
	Activity(ctx context.Context, f blixard.FunctionName, take func(*blixardv1.FunctionActivity) error) error
	// Explain tells what each node says to a call.
	Explain(f blixard.FunctionName, qualifier string) (*blixardv1.ExplainFunctionResponse, error)
	// Host is the host name of a function's URL, URLs where a path reaches the
	// gateways.
	Host(u *blixard.FunctionURL) string
	URLs(t *blixard.Trigger) []string
}

// OnNode is what a node does for a function.
type OnNode struct {
	Function string
	What     *blixardv1.FunctionOnNode
}

// FunctionLogs choose lines of a function's log.
type FunctionLogs struct {
	Function  blixard.FunctionName
	Number    *int // nil: all versions
	RequestID string
	Follow    bool
	TailLines int // -1: all that is kept
}

// functions implements FunctionService.
type functions struct{ *Handler }

func (h functions) host(u *blixard.FunctionURL) string {
	if h.opt.Functions == nil {
		return u.ID
	}
	return h.opt.Functions.Host(u)
}

// find returns the function as it is now.
func (h functions) find(ctx context.Context, name string) (*state.View, *blixard.Function, error) {
	if err := blixard.CheckFunctionName(name); err != nil {
		return nil, nil, err
	}
	view := h.opt.Backend.View()
	if forwarded(ctx) == "" {
		var err error
		if view, err = h.opt.Backend.ReadView(ctx); err != nil {
			return nil, nil, err
		}
	}
	f, err := findFunction(view, name)
	return view, f, err
}

func findFunction(view *state.View, name string) (*blixard.Function, error) {
	if f := view.Function(blixard.FunctionName(name)); f != nil {
		return f, nil
	}
	return nil, nearestNames(name, "function", func(yield func(string) bool) {
		view.Functions(func(f *blixard.Function) bool { return yield(string(f.Name)) })
	})
}

// checkCode refuses code that is not here, or that the runtime cannot start.
func (h functions) checkCode(ctx context.Context, digest string, spec *blixard.FunctionSpec) (int64, error) {
	if h.opt.Code == nil {
		return 0, errNoCode
	}
	if digest == "" {
		return 0, blixard.Invalid("codeDigest", "send the zip with POST /v1/code and give the digest of the answer", "the function has no code")
	}
	return h.opt.Code.Inspect(ctx, digest, *spec)
}

func (h functions) CreateFunction(ctx context.Context, req *blixardv1.CreateFunctionRequest) (*blixardv1.FunctionChange, error) {
	if err := blixard.CheckFunctionName(req.Name); err != nil {
		return nil, err
	}
	spec, err := FunctionSpecOf(req.Spec)
	if err != nil {
		return nil, err
	}
	bytes, err := h.checkCode(ctx, req.CodeDigest, &spec)
	if err != nil {
		return nil, err
	}
	command := &state.CreateFunction{Name: blixard.FunctionName(req.Name), Spec: spec, CodeDigest: req.CodeDigest, CodeBytes: bytes, Publish: req.Publish}
	if n := req.GetSettings(); n.GetMaxConcurrent() != 0 || n != nil && n.MaxConcurrent != nil {
		command.MaxConcurrent, command.Reserved = int(n.GetMaxConcurrent()), true
	}
	commands := []state.Command{command}
	more, err := settingsCommands(req.Name, req.Settings, &blixard.Function{MaxConcurrent: command.MaxConcurrent})
	if err != nil {
		return nil, err
	}
	return h.functionChange(ctx, req.Name, req.IdempotencyKey, req.DryRun, req.Publish, append(commands, more...))
}

// settingsCommands are the changes that settings ask of a function.
func settingsCommands(name string, s *blixardv1.FunctionSettings, have *blixard.Function) ([]state.Command, error) {
	if s == nil {
		return nil, nil
	}
	var out []state.Command
	set := &state.SetFunction{Name: blixard.FunctionName(name)}
	if s.MaxConcurrent != nil && int(*s.MaxConcurrent) != have.MaxConcurrent {
		set.Concurrency = &state.ConcurrencyChange{Max: int(*s.MaxConcurrent)}
	}
	if s.RateLimit != nil || s.CallerLimit != nil {
		set.Limits = &state.LimitsChange{RateLimit: have.RateLimit, CallerLimit: have.CallerLimit}
		if s.RateLimit != nil {
			set.Limits.RateLimit = int(*s.RateLimit)
		}
		if s.CallerLimit != nil {
			set.Limits.CallerLimit = int(*s.CallerLimit)
		}
	}
	if set.Concurrency != nil || set.Limits != nil {
		out = append(out, set)
	}
	for _, a := range s.Async {
		c := blixard.AsyncConfig{
			Qualifier: cmp.Or(a.Qualifier, blixard.Latest), MaxRetries: blixard.DefaultMaxRetries, MaxAgeMS: cmp.Or(a.MaxAgeMs, blixard.DefaultMaxEventAgeMS),
			OnSuccess: a.OnSuccess, OnFailure: a.OnFailure,
		}
		if a.MaxRetries != nil {
			c.MaxRetries = int(*a.MaxRetries)
		}
		out = append(out, &state.SetFunction{Name: blixard.FunctionName(name), Async: &c})
	}
	return out, nil
}

// functionChange proposes commands as one, and tells version and revision.
func (h functions) functionChange(ctx context.Context, name, key string, dryRun, publish bool, commands []state.Command) (*blixardv1.FunctionChange, error) {
	command := commands[0]
	if len(commands) > 1 {
		command = &state.Batch{Commands: commands}
	}
	out, err := h.outcome(ctx, key, dryRun, command)
	if err != nil {
		if e := blixardv1.AsError(err); e.Field != "" {
			return nil, inSpec(e)
		}
		return nil, err
	}
	answer := &blixardv1.FunctionChange{Change: changeMessage(out, dryRun), Version: blixard.Latest}
	if len(commands) == 1 && out.Value != 0 {
		answer.Version = strconv.FormatUint(out.Value, 10)
	}
	if dryRun {
		return answer, nil
	}
	view := h.opt.Backend.View()
	if v := view.NewestVersion(blixard.FunctionName(name)); v != nil && publish && len(commands) > 1 {
		answer.Version = blixard.VersionName(v.Number)
	}
	if v := view.FunctionVersion(blixard.FunctionName(name), 0); v != nil {
		answer.RevisionId = v.RevisionID
	}
	return answer, nil
}

func (h functions) GetFunction(ctx context.Context, req *blixardv1.GetFunctionRequest) (*blixardv1.GetFunctionResponse, error) {
	view, err := h.view(ctx, req.Consistency)
	if err != nil {
		return nil, err
	}
	f, err := findFunction(view, req.Name)
	if err != nil {
		return nil, err
	}
	m := functionMessage(view, f, h.host)
	if !req.WithoutNodes {
		h.addNodes(ctx, view, []*blixardv1.Function{m})
	}
	return &blixardv1.GetFunctionResponse{Function: m, Index: view.Index}, nil
}

func (h functions) ListFunctions(ctx context.Context, req *blixardv1.ListFunctionsRequest) (*blixardv1.ListFunctionsResponse, error) {
	if req.Limit < 0 {
		return nil, blixard.Invalid("limit", "", "limit is %d; it must not be negative", req.Limit)
	}
	view, err := h.view(ctx, req.Consistency)
	if err != nil {
		return nil, err
	}
	answer := &blixardv1.ListFunctionsResponse{Index: view.Index}
	view.FunctionsFrom(blixard.FunctionName(req.After), func(f *blixard.Function) bool {
		if string(f.Name) == req.After && req.After != "" {
			return true
		}
		if req.Limit > 0 && len(answer.Functions) == int(req.Limit) {
			answer.More = true
			return false
		}
		answer.Functions = append(answer.Functions, functionMessage(view, f, h.host))
		return ctx.Err() == nil
	})
	if !req.WithoutNodes {
		h.addNodes(ctx, view, answer.Functions)
	}
	return answer, ctx.Err()
}

func (h functions) UpdateFunction(ctx context.Context, req *blixardv1.UpdateFunctionRequest) (*blixardv1.FunctionChange, error) {
	view, f, err := h.find(ctx, req.Name)
	if err != nil {
		return nil, err
	}
	var commands []state.Command
	if req.Spec != nil || req.CodeDigest != "" || req.CopyVersion != "" {
		update, err := h.update(ctx, view, f, req)
		if err != nil {
			return nil, err
		}
		commands = append(commands, update)
	} else if req.Publish {
		commands = append(commands, &state.PublishVersion{Name: f.Name, Revision: req.RevisionId})
	}
	more, err := settingsCommands(req.Name, req.Settings, f)
	if err != nil {
		return nil, err
	}
	if commands = append(commands, more...); len(commands) == 0 {
		if req.Settings != nil {
			return &blixardv1.FunctionChange{Change: &blixardv1.Change{Version: f.Version, Index: view.Index, Noop: true, DryRun: req.DryRun}, Version: blixard.Latest}, nil
		}
		return nil, blixard.Invalid("spec", "give spec, codeDigest, copyVersion, settings or publish", "nothing is to be changed")
	}
	return h.functionChange(ctx, req.Name, req.IdempotencyKey, req.DryRun, req.Publish, commands)
}

// update is the change of code and configuration that a request asks for.
func (h functions) update(ctx context.Context, view *state.View, f *blixard.Function, req *blixardv1.UpdateFunctionRequest) (*state.UpdateFunction, error) {
	latest := view.FunctionVersion(f.Name, 0)
	command := &state.UpdateFunction{Name: f.Name, Revision: req.RevisionId, Publish: req.Publish}
	if req.CopyVersion != "" {
		if req.Spec != nil || req.CodeDigest != "" {
			return nil, blixard.Invalid("copyVersion", "give one of them", "copyVersion and spec or codeDigest are both given")
		}
		number, err := numberOf("copyVersion", req.CopyVersion)
		if err != nil {
			return nil, err
		}
		v := view.FunctionVersion(f.Name, number)
		if v == nil || number == 0 {
			return nil, &blixard.Error{Code: blixard.CodeNotFound, Field: "copyVersion", Message: "the function " + req.Name + " has no published version " + req.CopyVersion, Hint: "`blixard function versions " + req.Name + "` lists them"}
		}
		spec := v.Spec
		command.Spec, command.CodeDigest, command.CodeBytes = &spec, v.CodeDigest, v.CodeBytes
		return command, nil
	}
	spec := latest.Spec
	if req.Spec != nil {
		var err error
		if spec, err = FunctionSpecOf(req.Spec); err != nil {
			return nil, err
		}
		spec.Role = latest.Spec.Role
		command.Spec = &spec
	}
	bytes, err := h.checkCode(ctx, cmp.Or(req.CodeDigest, latest.CodeDigest), &spec)
	if err != nil {
		return nil, err
	}
	if req.CodeDigest != "" {
		command.CodeDigest, command.CodeBytes = req.CodeDigest, bytes
	}
	return command, nil
}

func (h functions) DeleteFunction(ctx context.Context, req *blixardv1.DeleteFunctionRequest) (*blixardv1.Change, error) {
	if err := blixard.CheckFunctionName(req.Name); err != nil {
		return nil, err
	}
	command := &state.DeleteFunction{Name: blixard.FunctionName(req.Name)}
	if req.Version != "" {
		number, err := numberOf("version", req.Version)
		if err != nil {
			return nil, err
		}
		if number == 0 {
			return nil, blixard.Invalid("version", "leave it out to delete the whole function", "$LATEST cannot be deleted alone")
		}
		command.Number = number
	}
	change, err := h.change(ctx, req.IdempotencyKey, req.DryRun, command)
	if err != nil && req.IgnoreMissing && blixard.CodeOf(err) == blixard.CodeNotFound {
		return &blixardv1.Change{Noop: true, DryRun: req.DryRun, Index: h.opt.Backend.View().Index}, nil
	}
	return change, err
}

func (h functions) PublishFunction(ctx context.Context, req *blixardv1.PublishFunctionRequest) (*blixardv1.FunctionChange, error) {
	if err := blixard.CheckFunctionName(req.Name); err != nil {
		return nil, err
	}
	return h.functionChange(ctx, req.Name, req.IdempotencyKey, req.DryRun, true, []state.Command{&state.PublishVersion{Name: blixard.FunctionName(req.Name), Description: req.Description}})
}

func (h functions) ListFunctionVersions(ctx context.Context, req *blixardv1.ListFunctionVersionsRequest) (*blixardv1.ListFunctionVersionsResponse, error) {
	view, err := h.view(ctx, req.Consistency)
	if err != nil {
		return nil, err
	}
	f, err := findFunction(view, req.Name)
	if err != nil {
		return nil, err
	}
	answer := &blixardv1.ListFunctionVersionsResponse{Aliases: aliasMessages(f)}
	view.FunctionVersions(f.Name, func(v *blixard.FunctionVersion) bool {
		answer.Versions = append(answer.Versions, functionVersionMessage(v))
		return true
	})
	return answer, nil
}

func (h functions) SetFunctionAlias(ctx context.Context, req *blixardv1.SetFunctionAliasRequest) (*blixardv1.Change, error) {
	if err := blixard.CheckFunctionName(req.Name); err != nil {
		return nil, err
	}
	number, err := numberOf("version", req.Version)
	if err != nil {
		return nil, err
	}
	alias := blixard.FunctionAlias{Name: req.Alias, Description: req.Description, Number: number}
	if req.SecondWeight != 0 || req.SecondVersion != "" {
		if alias.Second, err = numberOf("secondVersion", req.SecondVersion); err != nil {
			return nil, err
		}
		if !(req.SecondWeight >= 0 && req.SecondWeight <= 1) { // NaN, too
			return nil, blixard.Invalid("secondWeight", "write a share between 0 and 1", "secondWeight is %g", req.SecondWeight)
		}
		alias.SecondShare = int(req.SecondWeight*1e6 + 0.5)
	}
	return h.change(ctx, req.IdempotencyKey, req.DryRun, &state.SetAlias{Function: blixard.FunctionName(req.Name), Alias: alias})
}

func (h functions) DeleteFunctionAlias(ctx context.Context, req *blixardv1.DeleteFunctionAliasRequest) (*blixardv1.Change, error) {
	return h.change(ctx, req.IdempotencyKey, req.DryRun, &state.DeleteAlias{Function: blixard.FunctionName(req.Name), Name: req.Alias})
}

func (h functions) AddFunctionTrigger(ctx context.Context, req *blixardv1.AddFunctionTriggerRequest) (*blixardv1.AddFunctionTriggerResponse, error) {
	if err := blixard.CheckFunctionName(req.Name); err != nil {
		return nil, err
	}
	m := req.GetTrigger()
	t := blixard.Trigger{ID: m.GetId(), Kind: cmp.Or(m.GetKind(), "http"), Qualifier: m.GetQualifier(), Path: m.GetPath(), Host: strings.ToLower(m.GetHost())}
	for _, method := range m.GetMethods() {
		t.Methods = append(t.Methods, strings.ToUpper(method))
	}
	if t.ID == "" {
		t.ID = "http-" + randomID(4)
	}
	if owned := ownPath(t.Path); owned != "" && t.Host == "" {
		return nil, blixard.Invalid("path", "choose another path, or say for which host it is", "requests to %s are the API's own on every node", owned)
	}
	change, err := h.change(ctx, req.IdempotencyKey, req.DryRun, &state.SetFunction{Name: blixard.FunctionName(req.Name), Trigger: &t})
	if err != nil {
		return nil, err
	}
	answer := &blixardv1.AddFunctionTriggerResponse{Change: change, Id: t.ID}
	if h.opt.Functions != nil {
		answer.Urls = h.opt.Functions.URLs(&t)
	}
	return answer, nil
}

// ownPath is the part of a trigger's path that is the node's own on the one port,
// "" if none is.
func ownPath(path string) string {
	for _, own := range []string{"/v1/", "/peer/", "/function/"} {
		if strings.HasPrefix(path+"/", own) {
			return own
		}
	}
	for _, own := range []string{"/metrics", "/healthz", "/readyz", "/openapi.json"} {
		if path == own {
			return own
		}
	}
	if strings.HasPrefix(path, "/blixard.") {
		return "/blixard."
	}
	// The Lambda API's paths begin with a date.
	if len(path) >= 11 && path[5] == '-' && path[8] == '-' && strings.Trim(path[1:5]+path[6:8]+path[9:11], "0123456789") == "" {
		return path[:11]
	}
	return ""
}

// randomID is n random bytes in hexadecimal digits.
func randomID(n int) string {
	b := make([]byte, n)
	rand.Read(b) //nolint:errcheck,gosec // crypto/rand never fails
	return hex.EncodeToString(b)
}

func (h functions) DeleteFunctionTrigger(ctx context.Context, req *blixardv1.DeleteFunctionTriggerRequest) (*blixardv1.Change, error) {
	if req.Id == "" {
		return nil, blixard.Invalid("id", "`blixard function trigger "+req.Name+"` lists them", "the ID of the trigger is missing")
	}
	return h.change(ctx, req.IdempotencyKey, req.DryRun, &state.SetFunction{Name: blixard.FunctionName(req.Name), DropTrigger: req.Id})
}

func (h functions) SetFunctionURL(ctx context.Context, req *blixardv1.SetFunctionURLRequest) (*blixardv1.SetFunctionURLResponse, error) {
	_, f, err := h.find(ctx, req.Name)
	if err != nil {
		return nil, err
	}
	u := blixard.FunctionURL{
		Qualifier: cmp.Or(req.GetUrl().GetQualifier(), blixard.Latest), ID: randomID(16),
		Auth: cmp.Or(req.GetUrl().GetAuth(), "NONE"), InvokeMode: cmp.Or(req.GetUrl().GetInvokeMode(), "BUFFERED"),
	}
	if old := f.URL(u.Qualifier); old != nil {
		u.CORS, u.ID = old.CORS, old.ID
	}
	change, err := h.change(ctx, req.IdempotencyKey, req.DryRun, &state.SetFunction{Name: f.Name, URL: &state.URLChange{URL: u}})
	if err != nil {
		return nil, err
	}
	return &blixardv1.SetFunctionURLResponse{Change: change, Url: urlMessage(&u, h.host)}, nil
}

func (h functions) DeleteFunctionURL(ctx context.Context, req *blixardv1.DeleteFunctionURLRequest) (*blixardv1.Change, error) {
	return h.change(ctx, req.IdempotencyKey, req.DryRun, &state.SetFunction{Name: blixard.FunctionName(req.Name), DropURL: cmp.Or(req.Qualifier, blixard.Latest)})
}

func (h functions) ExplainFunction(ctx context.Context, req *blixardv1.ExplainFunctionRequest) (*blixardv1.ExplainFunctionResponse, error) {
	_, f, err := h.find(ctx, req.Name)
	if err != nil {
		return nil, err
	}
	if h.opt.Functions == nil {
		return nil, errNoFunctions
	}
	return h.opt.Functions.Explain(f.Name, req.Qualifier)
}

var (
	errNoFunctions = blixard.Errorf(blixard.CodeRefused, "this node calls no functions")
	errNoCode      = blixard.Errorf(blixard.CodeRefused, "this node keeps no code of functions")
)

func (h functions) ListFunctionEvents(ctx context.Context, req *blixardv1.ListFunctionEventsRequest) (*blixardv1.ListFunctionEventsResponse, error) {
	view, f, err := h.find(ctx, req.Name)
	if err != nil {
		return nil, err
	}
	if req.Limit < 0 {
		return nil, blixard.Invalid("limit", "", "limit is %d; it must not be negative", req.Limit)
	}
	limit := cmp.Or(int(req.Limit), 1000)
	answer := &blixardv1.ListFunctionEventsResponse{}
	view.AsyncEventsOf(f.Name, func(e *blixard.AsyncEvent) bool {
		if req.Dead && !e.Dead || e.ID <= req.After && req.After != "" {
			return true
		}
		if len(answer.Events) == limit {
			answer.More = true
			return false
		}
		answer.Events = append(answer.Events, &blixardv1.FunctionEvent{
			Id: e.ID, Function: string(e.Function), Qualifier: e.Qualifier, Owner: string(e.Owner), Attempts: int32(e.Attempts), AcceptedMs: e.AcceptedMS,
			NotBeforeMs: e.NotBeforeMS, Dead: e.Dead, Condition: e.Condition, LastError: e.LastError, PayloadBytes: int64(len(e.Payload)),
		})
		return true
	})
	return answer, nil
}

func (h functions) ReplayFunctionEvent(ctx context.Context, req *blixardv1.FunctionEventRequest) (*blixardv1.Change, error) {
	self := h.opt.Backend.View().Node(h.opt.Backend.Status().Node)
	if self == nil {
		return nil, blixard.Errorf(blixard.CodeUnavailable, "this node does not know itself yet")
	}
	return h.eventChange(ctx, req, &state.ReplayEvent{ID: req.Id, Node: self.Name, NodeEpoch: self.Epoch})
}

func (h functions) DeleteFunctionEvent(ctx context.Context, req *blixardv1.FunctionEventRequest) (*blixardv1.Change, error) {
	return h.eventChange(ctx, req, &state.PurgeEvent{ID: req.Id})
}

func (h functions) eventChange(ctx context.Context, req *blixardv1.FunctionEventRequest, command state.Command) (*blixardv1.Change, error) {
	view, f, err := h.find(ctx, req.Name)
	if err != nil {
		return nil, err
	}
	if e := view.AsyncEvent(req.Id); e == nil || e.Function != f.Name {
		return nil, &blixard.Error{Code: blixard.CodeNotFound, Message: "the function " + req.Name + " has no event " + strconv.Quote(req.Id), Hint: "`blixard function events list " + req.Name + "` lists them; those that have succeeded are gone"}
	}
	return h.change(ctx, req.IdempotencyKey, req.DryRun, command)
}
