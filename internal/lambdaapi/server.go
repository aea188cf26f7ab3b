package lambdaapi

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/accesskey"
	"github.com/blixard/blixard/internal/assert"
	"github.com/blixard/blixard/internal/code"
	"github.com/blixard/blixard/internal/state"
)

// Backend is the replicated state as this package needs it. Errors are
// *blixard.Error.
type Backend interface {
	// View is the state as this node has it now.
	View() *state.View
	// ReadView is a view at least as new as every change acknowledged before.
	ReadView(ctx context.Context) (*state.View, error)
	// Propose has a command committed and applied.
	Propose(ctx context.Context, e state.Envelope) (state.Outcome, error)
}

// Invoker calls functions: the gateway. Errors wrap a *blixard.Error; those that
// are failures tell more.
type Invoker interface {
	// Invoke calls a function and gives its answer to the sink as it comes.
	Invoke(ctx context.Context, inv *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error)
	// Enqueue accepts an asynchronous call; it is durable when Enqueue returns.
	Enqueue(ctx context.Context, inv *blixard.Invocation) error
}

// failure is what an Invoker's error may tell beyond its text.
type failure interface {
	error
	// Failure is the HTTP status, the machine's word for the reason, whether the
	// function may have run, and when to try again (0: unknown).
	Failure() (status int, reason string, handed bool, retryAfter time.Duration)
}

// Code keeps zips by content. Errors are *blixard.Error.
type Code interface {
	Put(ctx context.Context, r io.Reader) (code.Package, error)
	Open(digest string) (io.ReadCloser, int64, error)
	Inspect(ctx context.Context, digest string, spec blixard.FunctionSpec) error
}

// Options are what a Server is made of.
type Options struct {
	Backend Backend
	Invoker Invoker
	Code    Code
	// Region is what requests must be signed for, and what stands in ARNs; default
	// us-east-1. AccountID has 12 digits; default 000000000000.
	Region    string
	AccountID string
	// URLHost makes the host name (with the port, when it is not the scheme's) of a
	// function URL from its ID; nil: "<id>.lambda-url.<region>.localhost" with the
	// port of the request.
	URLHost func(id string) string
	// InsecureNoAuth lets requests in without signature that reach a loopback
	// address of this machine from itself. Never on another listener.
	InsecureNoAuth bool
	// TempDir holds uploads until they were checked; "": the system's.
	TempDir string
	Limits  Limits
	Log     *slog.Logger
}

// Limits bound what requests may take; zero fields are the defaults.
type Limits struct {
	SyncBytes    int64 // payload of a synchronous call, 6 MiB
	AsyncBytes   int64 // payload of an asynchronous call, 1 MiB
	UploadBytes  int64 // body of CreateFunction and UpdateFunctionCode, 70,167,211
	MemoryBytes  int64 // of bodies and answers in memory at once, 512 MiB
	Uploads      int64 // uploads at once, 8
	Concurrency  int   // what GetAccountSettings tells, 1,000
	DefaultPage  int   // items of a list, 50
	UploadSecond int64 // seconds that an upload may take, 900
}

func (l *Limits) fill() {
	number := func(p *int64, v int64) {
		if *p == 0 {
			*p = v
		}
	}
	number(&l.SyncBytes, 6<<20)
	number(&l.AsyncBytes, 1<<20)
	number(&l.UploadBytes, 70_167_211)
	number(&l.MemoryBytes, 512<<20)
	number(&l.Uploads, 8)
	number(&l.UploadSecond, 900)
	if l.Concurrency == 0 {
		l.Concurrency = blixard.DefaultMaxConcurrent
	}
	if l.DefaultPage == 0 {
		l.DefaultPage = 50
	}
}

// Server is the Lambda API as an http.Handler.
type Server struct {
	opt     Options
	memory  *semaphore.Weighted
	uploads *semaphore.Weighted
	secret  func() string
}

// New returns a Server.
func New(opt Options) *Server {
	assert.True(opt.Backend != nil && opt.Invoker != nil && opt.Code != nil, "a Lambda API without backend, invoker or code")
	if opt.Region == "" {
		opt.Region = "us-east-1"
	}
	if opt.AccountID == "" {
		opt.AccountID = "000000000000"
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	opt.Limits.fill()
	return &Server{
		opt: opt, memory: semaphore.NewWeighted(opt.Limits.MemoryBytes), uploads: semaphore.NewWeighted(opt.Limits.Uploads),
		secret: func() string { return opt.Backend.View().Cluster().Secret },
	}
}

// Serves tells whether a request is one for the Lambda API, so that it can share
// a port: its paths begin with a date.
func Serves(r *http.Request) bool {
	p := r.URL.Path
	if len(p) < 12 || p[0] != '/' || p[5] != '-' || p[8] != '-' || p[11] != '/' {
		return false
	}
	return strings.Trim(p[1:5]+p[6:8]+p[9:11], "0123456789") == ""
}

// call is one request on its way.
type call struct {
	s         *Server
	op        *operation
	w         http.ResponseWriter
	r         *http.Request
	args      map[string]string // from the path
	query     url.Values
	requestID string
	keyID     string // of the access key; "" without one
	key       string // idempotency key of the request; "" for none
	now       time.Time

	body []byte // without the zip
	zip  *upload
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := &call{s: s, w: w, r: r, requestID: newUUID(), now: time.Now()}
	h := w.Header()
	h.Set("X-Amzn-Requestid", c.requestID)
	h.Set("X-Content-Type-Options", "nosniff")
	if err := c.serve(); err != nil {
		c.fail(err)
	}
}

// fail answers with an error.
func (c *call) fail(err error) {
	if errors.Is(err, context.Canceled) && c.r.Context().Err() != nil {
		return // the client has left
	}
	e := asException(err)
	name := "none"
	if c.op != nil {
		name = c.op.name
	}
	level := slog.LevelDebug
	if e.Type == "ServiceException" {
		level = slog.LevelError
	}
	c.s.opt.Log.Log(c.r.Context(), level, "a request of the Lambda API failed", "operation", name, "request_id", c.requestID, "access_key", c.keyID, "error", err)
	writeException(c.w, e)
}

func (c *call) serve() error {
	var err error
	if c.query, err = url.ParseQuery(c.r.URL.RawQuery); err != nil {
		return refuse("SerializationException", "The query string is malformed.")
	}
	if c.isCodeLink() {
		return c.serveCode()
	}
	if c.op, c.args, err = route(c.r, c.query); err != nil {
		return err
	}
	if encoding := c.r.Header.Get("Content-Encoding"); encoding != "" && encoding != "identity" {
		return refuse("UnsupportedMediaTypeException", "The content encoding '%.40s' is not taken here: send the body as it is.", encoding)
	}
	signed, err := c.authenticate()
	if err != nil {
		return err
	}
	release, hash, err := c.readBody()
	defer release()
	if err != nil {
		return err
	}
	if signed != nil {
		if err := signed.Check(hash); err != nil {
			return err
		}
		if err := c.authorize(&signed.Key); err != nil {
			return err
		}
	}
	if c.op.refusal != "" {
		return refuse("UnsupportedOperationException", "Blixard does not know the operation %s: %s", c.op.name, c.op.refusal)
	}
	return c.op.serve(c)
}

// authenticate judges the head of a request; nil when it may go on without a
// signature.
func (c *call) authenticate() (*accesskey.Request, error) {
	if c.s.opt.InsecureNoAuth && c.fromHere() {
		return nil, nil
	}
	scope := accesskey.Scope{Region: c.s.opt.Region, Service: "lambda"}
	signed, err := accesskey.Parse(c.r, scope, c.now, accesskey.KeysOf(c.s.opt.Backend.View))
	if err != nil {
		return nil, err
	}
	c.keyID = signed.Key.ID
	// Clients say when they repeat a request: that changes nothing twice.
	if id := c.r.Header.Get("Amz-Sdk-Invocation-Id"); id != "" && len(id) <= 64 && strings.Trim(id, nameLetters) == "" {
		c.key = "lambda:" + c.keyID + ":" + id
	}
	return signed, nil
}

// fromHere tells whether a request came to a loopback address from this machine,
// and not from a web page that a browser on it shows.
func (c *call) fromHere() bool {
	local, ok := c.r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if !ok || !loopback(local.String()) || !loopback(c.r.RemoteAddr) {
		return false
	}
	if c.r.Header.Get("Origin") != "" || c.r.Header.Get("Sec-Fetch-Site") != "" {
		return false
	}
	host := c.r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func loopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	ip := net.ParseIP(host)
	return err == nil && ip != nil && ip.IsLoopback()
}

// authorize tells whether a key's role allows the operation.
func (c *call) authorize(key *blixard.AccessKey) error {
	allowed := false
	switch key.Role {
	case "", accesskey.RoleAdmin:
		allowed = true
	case accesskey.RoleInvoke:
		allowed = c.op.invokes
	case accesskey.RoleRead:
		allowed = c.op.method == http.MethodGet
	}
	if allowed {
		return nil
	}
	action := c.op.name
	if c.op.invokes {
		action = "InvokeFunction"
	}
	return refuse("AccessDeniedException", "User: %s is not authorized to perform: lambda:%s, since the access key has the role %s", c.s.userARN(key), action, key.Role)
}

func (s *Server) userARN(key *blixard.AccessKey) string {
	return "arn:aws:iam::" + s.opt.AccountID + ":user/" + key.Name
}

// propose has a command applied. part tells the proposals of one request apart.
func (c *call) propose(part string, command state.Command) (state.Outcome, error) {
	key := c.key
	if key == "" {
		key = "lambda:" + c.requestID
	}
	actor := "lambda-api"
	if c.keyID != "" {
		actor = c.keyID
	}
	return c.s.opt.Backend.Propose(c.r.Context(), state.Envelope{Key: key + ":" + part, NowMS: c.now.UnixMilli(), Actor: actor, Command: command})
}

// partAt is the part of a proposal that was made of what was read at a version:
// when the request is repeated, what is read may be newer, and the command with
// it.
func partAt(part string, version uint64) string { return part + "@" + strconv.FormatUint(version, 10) }

// view is a linearizable view.
func (c *call) view() (*state.View, error) { return c.s.opt.Backend.ReadView(c.r.Context()) }

// answer writes a JSON document; nil is no document.
func (c *call) answer(status int, document any) error {
	if document == nil {
		c.w.WriteHeader(status)
		return nil
	}
	data, err := encodeJSON(document)
	if err != nil {
		return err
	}
	h := c.w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(data)))
	c.w.WriteHeader(status)
	if _, err := c.w.Write(data); err != nil {
		return nil //nolint:nilerr // the client has left: there is nobody to tell
	}
	return nil
}

// newUUID makes a random UUID (version 4).
func newUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails: it ends the process instead
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	s := hex.EncodeToString(b[:])
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}
