package api

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/api/blixard/v1/blixardv1connect"
	"github.com/blixard/blixard/client"
	"github.com/blixard/blixard/internal/state"
)

// Code is what the API needs of the cluster's code packages. Errors are
// *blixard.Error.
type Code interface {
	// Put keeps a zip, on more than one node if there is more than one.
	Put(ctx context.Context, zip io.Reader) (client.Code, error)
	// PutCopy keeps a zip that another node passes on, here only.
	PutCopy(ctx context.Context, zip io.Reader) (client.Code, error)
	// Open opens a zip, wherever it is kept, or with here only what this node
	// keeps; CodeNotFound when it is nowhere.
	Open(ctx context.Context, digest string, here bool) (io.ReadCloser, int64, error)
	// Inspect refuses code that is kept nowhere or that the spec's runtime cannot
	// start, and tells the bytes of the zip.
	Inspect(ctx context.Context, digest string, spec blixard.FunctionSpec) (int64, error)
}

const codePath = "/v1/code"

// codeContent tells whether a request sends or gets code.
func codeContent(path string) bool { return path == codePath || strings.HasPrefix(path, codePath+"/") }

// serveCode serves POST /v1/code and GET /v1/code/{digest}.
func (h *Handler) serveCode(w http.ResponseWriter, r *http.Request) {
	if err := h.authorize(r.Header.Get("Authorization")); err != nil {
		h.problem(w, err)
		return
	}
	if h.opt.Code == nil {
		h.problem(w, errNoCode)
		return
	}
	digest := strings.TrimPrefix(strings.TrimPrefix(r.URL.Path, codePath), "/")
	switch {
	case r.Method == http.MethodPost && digest == "":
		put := h.opt.Code.Put
		if r.Header.Get(forwardedHeader) != "" {
			put = h.opt.Code.PutCopy
		}
		code, err := put(r.Context(), r.Body)
		if err != nil {
			h.problem(w, err)
			return
		}
		data, err := json.Marshal(code)
		if err != nil {
			h.problem(w, err)
			return
		}
		writeJSON(w, http.StatusOK, data)
	case r.Method == http.MethodGet && digest != "":
		h.getCode(w, r, digest)
	case digest == "":
		h.problem(w, errMethod(r.Method, "POST"))
	default:
		h.problem(w, errMethod(r.Method, "GET"))
	}
}

func (h *Handler) getCode(w http.ResponseWriter, r *http.Request, digest string) {
	zip, size, err := h.opt.Code.Open(r.Context(), digest, r.Header.Get(forwardedHeader) != "")
	if err != nil {
		h.problem(w, err)
		return
	}
	defer zip.Close()
	w.Header().Set("Content-Type", "application/zip")
	if size >= 0 {
		w.Header().Set("Content-Length", itoa(int(size)))
	}
	if _, err := io.Copy(w, zip); err != nil {
		panic(http.ErrAbortHandler) // the receiver must not take half for the whole
	}
}

// invocation is the call that a request asks for.
func (h functions) invocation(name, qualifier string, payload []byte) (*blixard.Invocation, error) {
	if h.opt.Functions == nil {
		return nil, errNoFunctions
	}
	if err := blixard.CheckFunctionName(name); err != nil {
		return nil, err
	}
	if err := blixard.CheckQualifier(qualifier); err != nil && qualifier != "" {
		return nil, err
	}
	return &blixard.Invocation{Function: blixard.FunctionName(name), Qualifier: qualifier, Payload: payload, Received: time.Now()}, nil
}

// streamSink sends an answer as messages.
type streamSink struct {
	send func(*blixardv1.InvokeFunctionResponse) error
	id   string
}

func (s *streamSink) Begin(head blixard.ResponseHead) error {
	return s.send(&blixardv1.InvokeFunctionResponse{Message: &blixardv1.InvokeFunctionResponse_Head{Head: &blixardv1.InvokeFunctionHead{
		RequestId: s.id, Status: int32(head.Status), ContentType: head.ContentType,
	}}})
}

func (s *streamSink) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		n := min(len(rest), 64<<10)
		if err := s.send(&blixardv1.InvokeFunctionResponse{Message: &blixardv1.InvokeFunctionResponse_Payload{Payload: rest[:n]}}); err != nil {
			return 0, err
		}
		rest = rest[n:]
	}
	return len(p), nil
}

// InvokeFunction implements FunctionService.
func (h functions) InvokeFunction(ctx context.Context, req *blixardv1.InvokeFunctionRequest, stream blixardv1connect.FunctionServiceInvokeFunctionServerStream) error {
	inv, err := h.invocation(req.Name, req.Qualifier, req.Payload)
	if err != nil {
		return err
	}
	inv.LogTail, inv.Caller = req.LogTail, actor(ctx)
	head := func(accepted bool) error {
		return stream.Send(&blixardv1.InvokeFunctionResponse{Message: &blixardv1.InvokeFunctionResponse_Head{Head: &blixardv1.InvokeFunctionHead{RequestId: inv.RequestID, Accepted: accepted}}})
	}
	switch req.Type {
	case "dry-run":
		if err := h.callable(ctx, req.Name, req.Qualifier); err != nil {
			return err
		}
		return head(false)
	case "async":
		inv.RequestID = req.RequestId
		if err := h.opt.Functions.Enqueue(ctx, inv); err != nil {
			return err
		}
		return head(true)
	case "", "sync":
	default:
		return blixard.Invalid("type", "known: sync, async, dry-run", "the type of call %.40q is not known", req.Type)
	}
	inv.RequestID = newRequestID()
	report, err := h.opt.Functions.Invoke(ctx, inv, &streamSink{send: stream.Send, id: inv.RequestID})
	if err != nil {
		return err
	}
	return stream.Send(&blixardv1.InvokeFunctionResponse{Message: &blixardv1.InvokeFunctionResponse_Report{Report: Report(&report)}})
}

// newRequestID is a random UUID.
func newRequestID() string {
	id := randomID(16)
	return id[:8] + "-" + id[8:12] + "-4" + id[13:16] + "-a" + id[17:20] + "-" + id[20:]
}

// callable refuses what could not be called.
func (h functions) callable(ctx context.Context, name, qualifier string) error {
	view, f, err := h.find(ctx, name)
	if err != nil {
		return err
	}
	v, refused := view.Resolve(f.Name, qualifier, 0)
	if refused != nil {
		return refused
	}
	if v.Callable() == nil {
		return &blixard.Error{Code: blixard.CodeConflict, Message: "the function " + name + " cannot be called yet: it is " + string(v.State) + ", " + v.StateReason, Hint: "`blixard function describe " + name + "` shows how it is"}
	}
	return nil
}

// FunctionLogs implements FunctionService: what instances of all nodes have
// written, node after node, and then as it comes.
func (h functions) FunctionLogs(ctx context.Context, req *blixardv1.FunctionLogsRequest, stream blixardv1connect.FunctionServiceFunctionLogsServerStream) error {
	view, f, err := h.find(ctx, req.Name)
	if err != nil {
		return err
	}
	q := FunctionLogs{Function: f.Name, RequestID: req.RequestId, Follow: req.Follow, TailLines: -1}
	if req.TailLines != nil {
		if *req.TailLines < 0 {
			return blixard.Invalid("tailLines", "", "tailLines is %d; it must not be negative", *req.TailLines)
		}
		q.TailLines = int(*req.TailLines)
	}
	if req.Qualifier != "" {
		v, refused := view.Resolve(f.Name, req.Qualifier, 0)
		if refused != nil {
			return refused
		}
		q.Number = &v.Number
	}
	here := func(ctx context.Context, send func(*blixardv1.LogsResponse) error) error {
		if h.opt.Functions == nil {
			return nil
		}
		return h.opt.Functions.Logs(ctx, q, send)
	}
	peer := func(ctx context.Context, c *client.Client, send func(*blixardv1.LogsResponse) error) error {
		return c.FunctionLogs(ctx, req, send)
	}
	return fanOut(ctx, h, view, stream.Send, req.Follow, here, peer)
}

// WatchFunction implements FunctionService.
func (h functions) WatchFunction(ctx context.Context, req *blixardv1.WatchFunctionRequest, stream blixardv1connect.FunctionServiceWatchFunctionServerStream) error {
	view, f, err := h.find(ctx, req.Name)
	if err != nil {
		return err
	}
	here := func(ctx context.Context, send func(*blixardv1.FunctionActivity) error) error {
		if h.opt.Functions == nil {
			<-ctx.Done()
			return nil
		}
		return h.opt.Functions.Activity(ctx, f.Name, send)
	}
	peer := func(ctx context.Context, c *client.Client, send func(*blixardv1.FunctionActivity) error) error {
		return c.WatchFunction(ctx, req, send)
	}
	return fanOut(ctx, h, view, stream.Send, true, here, peer)
}

// peerAgain is how long following waits before it asks a silent node again.
const peerAgain = time.Second

// fanOut sends what this node and all others tell. Following goes on when a node
// is silent, and asks it again.
func fanOut[M any](ctx context.Context, h functions, view *state.View, send func(*M) error, follow bool,
	here func(context.Context, func(*M) error) error, peer func(context.Context, *client.Client, func(*M) error) error,
) error {
	var mu sync.Mutex // one send at a time
	locked := func(m *M) error {
		mu.Lock()
		defer mu.Unlock()
		if err := send(m); err != nil {
			return sendError{err}
		}
		return nil
	}
	nodes := h.functionPeers(ctx, view)
	group, ctx := errgroup.WithContext(ctx)
	if !follow {
		group.SetLimit(1) // in order
	}
	group.Go(func() error { return here(ctx, locked) })
	for _, n := range nodes {
		group.Go(func() error {
			for {
				c, err := h.opt.Peers(n.Address)
				if err == nil {
					err = peer(ctx, c, locked)
				}
				if _, ours := errors.AsType[sendError](err); ours || ctx.Err() != nil || !follow {
					if !ours && blixard.CodeOf(err) == blixard.CodeUnavailable {
						return nil // a silent node has nothing to tell
					}
					return err
				}
				select {
				case <-time.After(peerAgain):
				case <-ctx.Done():
					return nil
				}
			}
		})
	}
	err := group.Wait()
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// sendError is a failure of the caller's stream, not of what feeds it.
type sendError struct{ error }

func (e sendError) Unwrap() error { return e.error }

const invocationsSuffix = "/invocations"

// invocationPath tells whether a path is that of raw calls,
// /v1/functions/{name}/invocations.
func invocationPath(path string) bool {
	rest, ok := strings.CutPrefix(path, "/v1/functions/")
	return ok && strings.HasSuffix(rest, invocationsSuffix) && strings.Count(rest, "/") == 1
}

// plainSink writes an answer to an HTTP response as it is.
type plainSink struct {
	w     http.ResponseWriter
	begun bool
}

func (s *plainSink) Begin(head blixard.ResponseHead) error {
	s.begun = true
	if head.ContentType != "" {
		s.w.Header().Set("Content-Type", head.ContentType)
	} else {
		s.w.Header().Set("Content-Type", "application/json")
	}
	s.w.Header().Set("X-Content-Type-Options", "nosniff")
	s.w.Header().Set("Trailer", functionErrorHeader+", Server-Timing, Blixard-Start, Blixard-Node")
	s.w.WriteHeader(http.StatusOK)
	return nil
}

func (s *plainSink) Write(p []byte) (int, error) { return s.w.Write(p) }

const functionErrorHeader = "Blixard-Function-Error"

// serveInvocation serves POST /v1/functions/{name}/invocations: the body is the
// payload, the answer's body the function's. The query takes qualifier and type
// (sync, async, dry-run). What is known only at the end comes as trailers.
func (h *Handler) serveInvocation(w http.ResponseWriter, r *http.Request) {
	if err := h.authorize(r.Header.Get("Authorization")); err != nil {
		h.problem(w, err)
		return
	}
	if r.Method != http.MethodPost {
		h.problem(w, errMethod(r.Method, "POST"))
		return
	}
	f := functions{h}
	payload, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxBodyBytes))
	if err != nil {
		h.problem(w, blixard.Invalid("body", "", "reading the payload: %v", err))
		return
	}
	name := strings.TrimSuffix(strings.TrimPrefix(r.URL.Path, "/v1/functions/"), invocationsSuffix)
	query := r.URL.Query()
	inv, err := f.invocation(name, query.Get("qualifier"), payload)
	if err != nil {
		h.problem(w, err)
		return
	}
	if inv.Caller = r.Header.Get(client.ActorHeader); len(inv.Caller) > maxActorBytes || !printable(inv.Caller) {
		inv.Caller = ""
	}
	switch kind := query.Get("type"); kind {
	case "async":
		if err = f.opt.Functions.Enqueue(r.Context(), inv); err == nil {
			w.Header().Set("Blixard-Request-Id", inv.RequestID)
			w.WriteHeader(http.StatusAccepted)
		}
	case "dry-run":
		if err = f.callable(r.Context(), name, inv.Qualifier); err == nil {
			w.WriteHeader(http.StatusNoContent)
		}
	case "", "sync":
		err = f.answerPlain(w, r, inv)
	default:
		err = blixard.Invalid("type", "known: sync, async, dry-run", "the type of call %.40q is not known", kind)
	}
	if err != nil {
		h.problem(w, err)
	}
}

func (h functions) answerPlain(w http.ResponseWriter, r *http.Request, inv *blixard.Invocation) error {
	inv.RequestID = newRequestID()
	w.Header().Set("Blixard-Request-Id", inv.RequestID)
	sink := &plainSink{w: w}
	report, err := h.opt.Functions.Invoke(r.Context(), inv, sink)
	if err != nil {
		if sink.begun {
			panic(http.ErrAbortHandler) // nobody may take half for the whole
		}
		return err
	}
	if !sink.begun {
		w.Header().Set("Trailer", functionErrorHeader)
	}
	if report.Error != nil {
		w.Header().Set(functionErrorHeader, report.Error.Kind+" "+report.Error.Type)
	}
	w.Header().Set("Blixard-Start", string(report.Start))
	w.Header().Set("Blixard-Node", string(report.Node))
	w.Header().Set("Server-Timing", report.Parts.ServerTiming())
	return nil
}
