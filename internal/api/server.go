package api

import (
	"context"
	"log/slog"
	"net/http"
	"runtime"
	"strings"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/api/blixard/v1/blixardv1connect"
	"github.com/blixard/blixard/client"
)

// Bounds of what is served.
const (
	// MaxBodyBytes bounds a request message on every protocol. Images are not
	// messages and are bounded by their store.
	MaxBodyBytes = 10 << 20
	// DefaultTimeout bounds a request that is not a stream.
	DefaultTimeout = 30 * time.Second
	// heartbeat is how often an idle watch says that it is alive.
	heartbeat = 10 * time.Second
)

// Options are what a Handler works with. Backend is required; without Guests
// or Images what needs them is refused.
type Options struct {
	Backend Backend
	Guests  Guests
	Images  Images
	// Functions calls functions, Code keeps their code, Keys makes access keys.
	// Nil: what needs them is refused.
	Functions Functions
	Code      Code
	Keys      Keys
	// Edge serves what is no path of the API, such as requests that call
	// functions. Nil: there is nothing.
	Edge http.Handler
	// Peers returns a client for another node's address, for requests that are
	// passed on. It must say who passes on (client.Options.ForwardedBy).
	Peers func(address string) (*client.Client, error)
	// Token returns the token that callers must present. Nil: nobody is asked.
	// While it returns "" (a node that is no member yet), nobody is let in.
	Token func() string
	// Defaults are a spec's fields that take the place of the built-in defaults
	// where a request leaves them out: Hypervisor, VCPUs, MemoryMiB, StopGraceMS.
	Defaults blixard.VMSpec
	// Release is the version of the software.
	Release string
	// Timeout bounds a request that is not a stream; 0: DefaultTimeout.
	Timeout time.Duration
	Log     *slog.Logger
}

// Handler serves the API.
type Handler struct {
	opt     Options
	rpc     *http.ServeMux
	rest    *rest
	streams map[string]bool // procedures that are not unary
	unary   map[string]connect.Spec
	timeout time.Duration
}

// New makes a Handler.
func New(o Options) *Handler {
	h := &Handler{opt: o, rpc: http.NewServeMux(), streams: map[string]bool{}, unary: map[string]connect.Spec{}, timeout: o.Timeout}
	if h.timeout == 0 {
		h.timeout = DefaultTimeout
	}
	if h.opt.Log == nil {
		h.opt.Log = slog.New(slog.DiscardHandler)
	}
	server := connect.NewServer(h.guard)
	blixardv1connect.RegisterVMServiceHandler(server, vms{h})
	blixardv1connect.RegisterGuestServiceHandler(server, guests{h})
	blixardv1connect.RegisterEventServiceHandler(server, events{h})
	blixardv1connect.RegisterClusterServiceHandler(server, cluster{h})
	blixardv1connect.RegisterImageServiceHandler(server, images{h})
	blixardv1connect.RegisterSystemServiceHandler(server, system{h})
	blixardv1connect.RegisterFunctionServiceHandler(server, functions{h})
	blixardv1connect.RegisterAccessServiceHandler(server, access{h})
	for spec := range server.Specs() {
		h.streams[spec.Procedure] = spec.StreamType != connect.StreamTypeUnary
		if spec.StreamType == connect.StreamTypeUnary {
			h.unary[spec.Procedure] = spec
		}
	}
	connecthttp.Mount(h.rpc, server, connecthttp.WithReadMaxBytes(MaxBodyBytes), connecthttp.WithCompressMinBytes(16<<10))
	h.rest = newREST(h, server)
	return h
}

// ServeHTTP serves one request of any protocol.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := r.URL.Path
	h.limitRequest(w, r)
	switch {
	case strings.HasPrefix(path, "/blixard.v1."):
		stream, known := h.streams[path]
		if !known {
			h.problem(w, &httpError{status: http.StatusNotFound, err: errNoPath(path, nil)})
			return
		}
		if stream {
			r = r.WithContext(withUnblock(r.Context(), http.NewResponseController(w)))
		}
		h.rpc.ServeHTTP(w, r)
	case imageContent(r):
		h.serveImage(w, r)
	case codeContent(path):
		h.serveCode(w, r)
	case invocationPath(path):
		h.serveInvocation(w, r)
	case strings.HasPrefix(path, "/v1/"):
		h.rest.ServeHTTP(w, r)
	default:
		h.serveOpen(w, r)
	}
}

// limitBody bounds how long a body may take to arrive, so that a caller that
// sends byte by byte holds a connection for a bounded time only.
func (h *Handler) limitBody(w http.ResponseWriter, within time.Duration) {
	if err := http.NewResponseController(w).SetReadDeadline(time.Now().Add(within)); err != nil {
		h.opt.Log.Debug("no read deadline", "error", err)
	}
}

// strangerTimeout bounds how long the body of a request may take to arrive that
// is refused, or that has no use for one.
const strangerTimeout = 5 * time.Second

// limitRequest bounds how long a body may hold a connection, before anything is
// decided about the request: what is left of it is passed over before the answer
// goes out. A caller without a token is put off after the refusal. Streams and
// images of members may take as long as they do.
func (h *Handler) limitRequest(w http.ResponseWriter, r *http.Request) {
	path := r.URL.Path
	served := strings.HasPrefix(path, "/v1/") || strings.HasPrefix(path, "/blixard.v1.")
	switch {
	case r.ContentLength == 0:
	case path == "/v1/join" || path == blixardv1connect.ClusterServiceJoinProcedure:
		h.limitBody(w, h.timeout)
	case !served && h.opt.Edge != nil:
		h.limitBody(w, h.timeout) // it may be a call of a function
	case !served:
		h.limitBody(w, strangerTimeout)
	case h.authorize(r.Header.Get("Authorization")) != nil:
		w.Header().Set("Connection", "close")
		h.limitBody(w, strangerTimeout)
	case !h.streams[path] && !imageContent(r) && !codeContent(path):
		h.limitBody(w, h.timeout)
	}
}

// imageContent tells whether a request sends or gets the content of an image.
func imageContent(r *http.Request) bool {
	return strings.HasPrefix(r.URL.Path, imagePrefix) && r.Method != http.MethodDelete || r.URL.Path == "/v1/images" && r.Method == http.MethodPost
}

// serveOpen serves what anybody may ask.
func (h *Handler) serveOpen(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		switch r.URL.Path {
		case "/healthz", "/readyz", "/openapi.json":
			h.problem(w, errMethod(r.Method, "GET, HEAD"))
			return
		}
	}
	switch r.URL.Path {
	case "/healthz":
		writeJSON(w, http.StatusOK, []byte(`{"status":"ok"}`))
	case "/readyz":
		m := h.health()
		status := http.StatusOK
		if !m.Ready {
			status = http.StatusServiceUnavailable
			setRetryAfter(w.Header(), time.Second)
		}
		writeJSON(w, status, blixardv1.AppendJSON(nil, m))
	case "/openapi.json":
		writeJSON(w, http.StatusOK, blixardv1.OpenAPI)
	default:
		if h.opt.Edge != nil {
			h.opt.Edge.ServeHTTP(w, r)
			return
		}
		h.problem(w, &httpError{status: http.StatusNotFound, err: errNoPath(r.URL.Path, []string{"/v1/vms", "/v1/nodes", "/v1/cluster", "/healthz", "/readyz", "/openapi.json"})})
	}
}

func (h *Handler) health() *blixardv1.GetHealthResponse {
	st := h.opt.Backend.Status()
	return &blixardv1.GetHealthResponse{Ready: st.Ready, Node: string(st.Node), Leader: string(st.Leader)}
}

// NewServer is an http.Server for the handler with limits against slow and
// greedy callers, that speaks HTTP/1.1 and HTTP/2, without TLS too (which gRPC
// and the streams of exec need). It has no read and write timeout, since
// streams last; the Handler bounds everything else.
func NewServer(h http.Handler) *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	return &http.Server{
		Handler: h, Protocols: protocols, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		HTTP2: &http.HTTP2Config{MaxConcurrentStreams: 1000, SendPingTimeout: 15 * time.Second, PingTimeout: 10 * time.Second, WriteByteTimeout: 30 * time.Second},
	}
}

// system implements SystemService.
type system struct{ *Handler }

func (h system) GetVersion(_ context.Context, _ *blixardv1.GetVersionRequest) (*blixardv1.GetVersionResponse, error) {
	return &blixardv1.GetVersionResponse{
		Release: h.opt.Release, FeatureLevel: blixard.FeatureLevel, GoVersion: runtime.Version(), Node: string(h.opt.Backend.Status().Node),
	}, nil
}

func (h system) GetHealth(_ context.Context, _ *blixardv1.GetHealthRequest) (*blixardv1.GetHealthResponse, error) {
	return h.health(), nil
}
