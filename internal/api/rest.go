package api

import (
	"context"
	"errors"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"sort"
	"strings"

	"connectrpc.com/connect/v2"
	"google.golang.org/genproto/googleapis/api/annotations"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

// protocolREST is the protocol of calls that came by REST.
const protocolREST = "rest"

// passedHeaders are what the procedures read of a request's header.
var passedHeaders = []string{"Authorization", client.KeyHeader, client.ActorHeader, client.ForwardedHeader, "Traceparent"}

// rest serves the google.api.http annotations of a server's procedures.
type rest struct {
	h      *Handler
	server *connect.Server
	routes map[int][]*route // by number of segments
	paths  []string         // templates, for hints
}

// route is one binding of a procedure.
type route struct {
	spec     connect.Spec
	method   string
	segments []string // "{name}" is a variable
	body     bool     // the body is the request
}

func newREST(h *Handler, server *connect.Server) *rest {
	r := &rest{h: h, server: server, routes: map[int][]*route{}}
	for spec := range server.Specs() {
		md, ok := spec.Schema.(protoreflect.MethodDescriptor)
		if !ok {
			continue
		}
		rule, ok := proto.GetExtension(md.Options(), annotations.E_Http).(*annotations.HttpRule)
		if !ok || rule == nil {
			continue
		}
		for _, binding := range append([]*annotations.HttpRule{rule}, rule.AdditionalBindings...) {
			r.add(spec, binding)
		}
	}
	sort.Strings(r.paths)
	return r
}

func (r *rest) add(spec connect.Spec, rule *annotations.HttpRule) {
	method, path := ruleOf(rule)
	segments := strings.Split(strings.TrimPrefix(path, "/"), "/")
	r.routes[len(segments)] = append(r.routes[len(segments)], &route{spec: spec, method: method, segments: segments, body: rule.Body == "*"})
	r.paths = append(r.paths, path)
}

func ruleOf(rule *annotations.HttpRule) (method, path string) {
	switch p := rule.Pattern.(type) {
	case *annotations.HttpRule_Get:
		return http.MethodGet, p.Get
	case *annotations.HttpRule_Put:
		return http.MethodPut, p.Put
	case *annotations.HttpRule_Post:
		return http.MethodPost, p.Post
	case *annotations.HttpRule_Delete:
		return http.MethodDelete, p.Delete
	case *annotations.HttpRule_Patch:
		return http.MethodPatch, p.Patch
	}
	return "", ""
}

// match returns what path variables of a route stand for, nil if the path is
// another.
func (rt *route) match(segments []string) (map[string]string, bool) {
	var vars map[string]string
	for i, s := range rt.segments {
		name, variable := strings.CutPrefix(s, "{")
		switch {
		case !variable && s != segments[i]:
			return nil, false
		case variable:
			if vars == nil {
				vars = map[string]string{}
			}
			vars[strings.TrimSuffix(name, "}")] = segments[i]
		}
	}
	return vars, true
}

// literal counts the segments that are no variables: the route with more of
// them is the better match.
func (rt *route) literal() int {
	n := 0
	for _, s := range rt.segments {
		if !strings.HasPrefix(s, "{") {
			n++
		}
	}
	return n
}

// find returns the route of a request.
func (r *rest) find(method, escapedPath string) (*route, map[string]string, error) {
	segments := strings.Split(strings.TrimPrefix(escapedPath, "/"), "/")
	for i, s := range segments {
		plain, err := url.PathUnescape(s)
		if err != nil {
			return nil, nil, &httpError{status: http.StatusBadRequest, err: blixard.Errorf(blixard.CodeInvalid, "the path cannot be read: %v", err)}
		}
		segments[i] = plain
	}
	if method == http.MethodHead {
		method = http.MethodGet
	}
	var best *route
	var bestVars map[string]string
	var allowed []string
	for _, rt := range r.routes[len(segments)] {
		vars, ok := rt.match(segments)
		if !ok {
			continue
		}
		allowed = append(allowed, rt.method)
		if rt.method == method && (best == nil || rt.literal() > best.literal()) {
			best, bestVars = rt, vars
		}
	}
	switch {
	case best != nil:
		return best, bestVars, nil
	case len(allowed) > 0:
		sort.Strings(allowed)
		return nil, nil, errMethod(method, strings.Join(slices.Compact(allowed), ", "))
	}
	return nil, nil, &httpError{status: http.StatusNotFound, err: errNoPath("/"+strings.Join(segments, "/"), r.paths)}
}

func (r *rest) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	rt, vars, err := r.find(req.Method, req.URL.EscapedPath())
	if err != nil {
		r.h.problem(w, err)
		return
	}
	info := &connect.CallInfo{Spec: rt.spec, PeerAddr: req.RemoteAddr, Protocol: protocolREST, Codec: connect.CodecNameJSON}
	for _, name := range passedHeaders {
		if v := req.Header.Get(name); v != "" {
			info.RequestHeader().Set(name, v)
		}
	}
	s := &restStream{r: r, rt: rt, vars: vars, w: w, req: req}
	s.out = r.output(s)
	ctx := req.Context()
	if rt.spec.StreamType != connect.StreamTypeUnary {
		ctx = withUnblock(ctx, http.NewResponseController(w))
	}
	err = r.server.Call(ctx, rt.spec.Procedure, info, s)
	s.finish(ctx, err)
}

// restStream is one REST request, as the procedures see it.
type restStream struct {
	r    *rest
	rt   *route
	vars map[string]string
	w    http.ResponseWriter
	req  *http.Request

	received bool
	started  bool // something was sent
	out      output
}

// output writes the messages of one kind of answer.
type output interface {
	// begin writes the header of the answer.
	begin()
	// send writes one message.
	send(m proto.Message) error
	// fail ends an answer that has begun.
	fail(err error)
}

func (r *rest) output(s *restStream) output {
	switch s.rt.spec.Procedure {
	case watchProcedure, activityProcedure:
		return &sse{s: s}
	case logsProcedure, functionLogsProcedure:
		return &raw{s: s, contentType: "text/plain; charset=utf-8"}
	case downloadProcedure, recordProcedure:
		return &raw{s: s, contentType: "application/octet-stream"}
	}
	return &document{s: s}
}

// Receive implements connect.ServerStream: it decodes the request.
func (s *restStream) Receive(msg any) error {
	if s.received {
		return io.EOF
	}
	s.received = true
	m, ok := msg.(proto.Message)
	if !ok {
		return blixard.Errorf(blixard.CodeInternal, "%T is no message", msg)
	}
	if s.rt.body {
		if err := s.body(m); err != nil {
			return err
		}
	} else if s.req.ContentLength != 0 {
		return blixard.Invalid("", "give parameters in the query", "%s %s takes no body", s.req.Method, "/"+strings.Join(s.rt.segments, "/"))
	}
	query, err := url.ParseQuery(s.req.URL.RawQuery)
	if err != nil {
		return blixard.Errorf(blixard.CodeInvalid, "the query cannot be read: %v", err)
	}
	names := make([]string, 0, len(query))
	for name := range query {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		if err := blixardv1.DecodeText(m, name, query[name]); err != nil {
			return err
		}
	}
	if err := s.variables(m); err != nil {
		return err
	}
	return s.lastEventID(m)
}

// variables puts what stands in the path into the request. It wins, but what
// the body says otherwise is a mistake.
func (s *restStream) variables(m proto.Message) error {
	fields := m.ProtoReflect().Descriptor().Fields()
	for name, value := range s.vars {
		fd := fields.ByName(protoreflect.Name(name))
		if have := m.ProtoReflect().Get(fd).String(); have != "" && have != value {
			return blixard.Invalid(fd.JSONName(), "leave it out of the body and the query", "%s is %.60q in the request and %.60q in the path", fd.JSONName(), have, value)
		}
		if err := blixardv1.DecodeText(m, name, []string{value}); err != nil {
			return err
		}
	}
	return nil
}

// lastEventID resumes a watch of a browser, which repeats its first request.
func (s *restStream) lastEventID(m proto.Message) error {
	watch, ok := m.(*blixardv1.WatchRequest)
	id := s.req.Header.Get("Last-Event-ID")
	if !ok || id == "" {
		return nil
	}
	watch.From, watch.Snapshot = 0, false
	if err := blixardv1.DecodeText(watch, "from", []string{id}); err != nil {
		return blixard.Invalid("Last-Event-ID", "", "Last-Event-ID must be an index, not %.40q", id)
	}
	return nil
}

func (s *restStream) body(m proto.Message) error {
	if t := s.req.Header.Get("Content-Type"); t != "" || s.req.ContentLength != 0 {
		media, params, err := mime.ParseMediaType(t)
		charset := strings.ToLower(params["charset"])
		if err != nil && t != "" || media != "application/json" || charset != "" && charset != "utf-8" {
			if s.req.ContentLength != 0 {
				return &httpError{status: http.StatusUnsupportedMediaType, err: &blixard.Error{
					Code: blixard.CodeInvalid, Message: "the content type of the body must be application/json", Hint: "add the header Content-Type: application/json",
				}}
			}
		}
	}
	if enc := s.req.Header.Get("Content-Encoding"); enc != "" && enc != "identity" {
		return &httpError{status: http.StatusUnsupportedMediaType, err: blixard.Errorf(blixard.CodeInvalid, "the body is encoded as %.40q, which is not understood", enc)}
	}
	data, err := io.ReadAll(http.MaxBytesReader(s.w, s.req.Body, MaxBodyBytes))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return &httpError{status: http.StatusRequestEntityTooLarge, err: blixard.Errorf(blixard.CodeInvalid, "the body is too large; at most %d bytes are allowed", MaxBodyBytes)}
	case err != nil:
		return &httpError{status: http.StatusRequestTimeout, err: blixard.Errorf(blixard.CodeInvalid, "the body did not arrive: %v", err)}
	case len(data) == 0:
		return nil // an empty body is an empty request
	}
	return blixardv1.DecodeJSON(data, m)
}

// SendHeaders implements connect.ServerStream.
func (s *restStream) SendHeaders() error { return nil }

// Send implements connect.ServerStream.
func (s *restStream) Send(msg any) error {
	m, ok := msg.(proto.Message)
	if !ok {
		return blixard.Errorf(blixard.CodeInternal, "%T is no message", msg)
	}
	if !s.started {
		s.started = true
		s.out.begin()
	}
	return s.out.send(m)
}

// finish ends the answer.
func (s *restStream) finish(ctx context.Context, err error) {
	switch {
	case err == nil && !s.started:
		s.out.begin() // a stream of nothing
	case err == nil || s.started && ctx.Err() != nil:
	case s.started:
		s.out.fail(err)
	default:
		s.r.h.problem(s.w, asProblem(err))
	}
}

// asProblem takes back what guard made fit for RPC: the cause has the error
// with its status.
func asProblem(err error) error {
	var ce *connect.Error
	var special *httpError
	var e *blixard.Error
	switch {
	case errors.As(err, &special):
		return special
	case errors.Is(err, errNoToken):
		return errNoToken
	case errors.As(err, &e):
		return e
	case errors.As(err, &ce):
		if verdict, _, ok := blixardv1.FromRPC(err); ok {
			return verdict
		}
		if ce.Unwrap() != nil {
			return blixardv1.AsError(ce.Unwrap())
		}
		return blixard.Errorf(blixard.CodeInternal, "%s", ce.Message())
	}
	return err
}
