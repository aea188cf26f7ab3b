// Package client speaks to a Blixard cluster. It is what the CLI, the agents
// and programs of users use.
//
//	c, err := client.New(client.Options{Addresses: []string{"10.0.0.1:7400", "10.0.0.2:7400"}, Token: token})
//	change, err := c.CreateVM(ctx, &blixardv1.CreateVMRequest{Name: "web", Spec: &blixardv1.VMSpec{Image: "builtin"}})
//
// Requests and answers are the messages of package blixardv1 everywhere; they
// marshal to the JSON of the REST interface (encoding/json works on them and on
// whatever holds them).
//
// A Client may be used by many goroutines. Any node answers any request, so
// with several addresses a call goes on to the next one when a node cannot be
// reached. The first call finds one that answers: the first address has half a
// second, then the next one is asked beside it. Calls that change something carry an idempotency key, which stays
// the same over the repeats of one call, so that repeating them is safe; give a
// key of your own in the request to make it safe over calls, too. Calls that
// are refused as unavailable or overloaded are repeated, as the server asks,
// for at most Options.RetryFor.
//
// Errors from the cluster are *blixard.Error, with their code, hint and field.
// When no node could be reached the code is CodeUnavailable.
package client

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/api/blixard/v1/blixardv1connect"
)

// maxMessageBytes bounds what is read of one answer: a list of everything in a
// large cluster is long.
const maxMessageBytes = 256 << 20

// defaultRetryFor bounds the repeats of one call.
const defaultRetryFor = 10 * time.Second

// ForwardedHeader marks a request that a node passes on to another, which must
// not pass it on again.
const ForwardedHeader = "Blixard-Forwarded-By"

// Options say how to reach a cluster.
type Options struct {
	// Addresses of nodes: "host:port", "http://host:port", "https://host:port".
	// The first is tried first.
	Addresses []string
	// Token authenticates the caller.
	Token string
	// TLS makes addresses without a scheme https.
	TLS *tls.Config
	// HTTPClient replaces the built-in one. For Exec and Console it must speak
	// HTTP/2.
	HTTPClient *http.Client
	// UserAgent names the program.
	UserAgent string
	// Actor names the user in events, "operator" if empty. At most 64 printable
	// characters.
	Actor string
	// RetryFor bounds the repeats of one call, 0: 10 s, negative: no repeats.
	// The context of a call bounds it too.
	RetryFor time.Duration
	// ForwardedBy is set by a node that passes requests on: its name.
	ForwardedBy string
}

// Client speaks to a cluster.
type Client struct {
	endpoints []*endpoint
	preferred atomic.Int32 // index of the endpoint that answered last
	settled   atomic.Bool  // one that answers was looked for
	retryFor  time.Duration
	header    http.Header // of every request
	close     func()
}

// endpoint is one node.
type endpoint struct {
	url       string
	plain     *http.Client // for unary calls and plain HTTP
	rpc       *connect.Client
	streams   *connect.Client
	vms       blixardv1connect.VMServiceClient
	cluster   blixardv1connect.ClusterServiceClient
	events    blixardv1connect.EventServiceClient
	images    blixardv1connect.ImageServiceClient
	system    blixardv1connect.SystemServiceClient
	functions blixardv1connect.FunctionServiceClient
	access    blixardv1connect.AccessServiceClient
	// The following stream.
	watch  blixardv1connect.EventServiceClient
	member blixardv1connect.ClusterServiceClient
	guest  blixardv1connect.GuestServiceClient
	invoke blixardv1connect.FunctionServiceClient
}

// New returns a Client. Nothing is dialled yet.
func New(o Options) (*Client, error) {
	if len(o.Addresses) == 0 {
		return nil, blixard.Invalid("address", "give one with --addr or BLIXARD_ADDR, such as 127.0.0.1:7400", "no address of a node is given")
	}
	c := &Client{retryFor: o.RetryFor, header: http.Header{}}
	if c.retryFor == 0 {
		c.retryFor = defaultRetryFor
	}
	agent := o.UserAgent
	if agent == "" {
		agent = "blixard-client"
	}
	c.header.Set("User-Agent", agent)
	if o.Token != "" {
		c.header.Set("Authorization", "Bearer "+o.Token)
	}
	if o.Actor != "" {
		c.header.Set(ActorHeader, o.Actor)
	}
	if o.ForwardedBy != "" {
		c.header.Set(ForwardedHeader, o.ForwardedBy)
	}
	unary, streams := o.HTTPClient, o.HTTPClient
	var calls connecthttp.HTTPClient = unary
	c.close = func() {}
	if o.HTTPClient == nil {
		a, b := transports(o.TLS)
		unary, streams = &http.Client{Transport: a}, &http.Client{Transport: b}
		lean := newUnaryHTTP(a.DialContext, unary)
		calls = lean
		c.close = func() { a.CloseIdleConnections(); b.CloseIdleConnections(); lean.CloseIdleConnections() }
	}
	for _, address := range o.Addresses {
		url, err := baseURL(address, o.TLS != nil)
		if err != nil {
			return nil, err
		}
		c.endpoints = append(c.endpoints, newEndpoint(url, unary, calls, streams, c.setHeaders))
	}
	return c, nil
}

// transports returns one for unary calls, which are leanest over HTTP/1.1 when
// there is no TLS, and one for streams, which need HTTP/2.
func transports(config *tls.Config) (unary, streams *http.Transport) {
	dialer := &net.Dialer{Timeout: 3 * time.Second, KeepAlive: 15 * time.Second}
	unary = &http.Transport{
		DialContext: dialer.DialContext, TLSClientConfig: config, ForceAttemptHTTP2: true,
		MaxIdleConns: 1024, MaxIdleConnsPerHost: 512, IdleConnTimeout: 60 * time.Second, TLSHandshakeTimeout: 5 * time.Second,
		DisableCompression: true,
		// Without it the content of an image would be sent before the node can say
		// that it has it.
		ExpectContinueTimeout: 10 * time.Second,
	}
	streams = unary.Clone()
	// A stream may be silent for long: pings find out when the node is gone.
	streams.HTTP2 = &http.HTTP2Config{SendPingTimeout: 10 * time.Second, PingTimeout: 5 * time.Second}
	streams.Protocols = new(http.Protocols)
	streams.Protocols.SetHTTP2(true)
	streams.Protocols.SetUnencryptedHTTP2(true)
	return unary, streams
}

func newEndpoint(url string, unary *http.Client, calls connecthttp.HTTPClient, streams *http.Client, headers connect.ClientInterceptor) *endpoint {
	limit := connecthttp.WithReadMaxBytes(maxMessageBytes)
	e := &endpoint{
		url: url, plain: unary,
		rpc:     connect.NewClient(connecthttp.NewTransport(calls, url, limit, connecthttp.WithCompressors()), headers),
		streams: connect.NewClient(connecthttp.NewTransport(streams, url, limit, connecthttp.WithCompressors()), headers),
	}
	e.vms = blixardv1connect.NewVMServiceClient(e.rpc)
	e.cluster = blixardv1connect.NewClusterServiceClient(e.rpc)
	e.events = blixardv1connect.NewEventServiceClient(e.rpc)
	e.images = blixardv1connect.NewImageServiceClient(e.rpc)
	e.system = blixardv1connect.NewSystemServiceClient(e.rpc)
	e.functions = blixardv1connect.NewFunctionServiceClient(e.rpc)
	e.access = blixardv1connect.NewAccessServiceClient(e.rpc)
	e.watch = blixardv1connect.NewEventServiceClient(e.streams)
	e.member = blixardv1connect.NewClusterServiceClient(e.streams)
	e.guest = blixardv1connect.NewGuestServiceClient(e.streams)
	e.invoke = blixardv1connect.NewFunctionServiceClient(e.streams)
	return e
}

// setHeaders is the interceptor that says who calls.
func (c *Client) setHeaders(next connect.ClientFunc) connect.ClientFunc {
	return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
		if info, ok := connect.CallInfoForClientContext(ctx); ok {
			for name, values := range c.header {
				info.RequestHeader().SetValues(name, values)
			}
		}
		return next(ctx, spec)
	}
}

// baseURL makes a URL of an address.
func baseURL(address string, secure bool) (string, error) {
	scheme, host, found := strings.Cut(strings.TrimSuffix(address, "/"), "://")
	if !found {
		scheme, host = "http", scheme
		if secure {
			scheme = "https"
		}
	}
	if _, port, err := net.SplitHostPort(host); err != nil || port == "" || scheme != "http" && scheme != "https" || strings.ContainsAny(host, "/?#@ ") {
		return "", blixard.Invalid("address", "write host:port, such as 127.0.0.1:7400", "the address %q cannot be used", address)
	}
	return scheme + "://" + host, nil
}

// Close lets go of idle connections. Calls under way go on.
func (c *Client) Close() { c.close() }

// Addresses are the URLs of the nodes that the Client knows.
func (c *Client) Addresses() []string {
	urls := make([]string, len(c.endpoints))
	for i, e := range c.endpoints {
		urls[i] = e.url
	}
	return urls
}

// Guest is the raw guest service of the first node, for a node that passes
// streams on.
func (c *Client) Guest() blixardv1connect.GuestServiceClient { return c.endpoints[0].guest }
