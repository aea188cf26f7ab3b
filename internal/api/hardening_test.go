package api_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"go.uber.org/goleak"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/api/blixard/v1/blixardv1connect"
	"github.com/blixard/blixard/client"
	"github.com/blixard/blixard/internal/api"
	"github.com/blixard/blixard/internal/api/apitest"
	"github.com/blixard/blixard/internal/state"
)

func TestMain(m *testing.M) {
	// The server lingers half a second on a connection it has just closed.
	linger := goleak.IgnoreAnyFunction("net/http.(*conn).closeWriteAndWait")
	goleak.VerifyTestMain(m, linger, goleak.IgnoreAnyFunction("net/http.(*persistConn).readLoop"), goleak.IgnoreAnyFunction("net/http.(*persistConn).writeLoop"),
		goleak.IgnoreAnyFunction("net/http.(*http2ClientConn).readLoop"), goleak.IgnoreAnyFunction("net/http/internal/http2.(*ClientConn).readLoop"))
}

func TestTooLargeOnEveryProtocol(t *testing.T) {
	s := newSite(t, 1)
	for name, transport := range map[string]connect.Transport{
		"connect": connecthttp.NewTransport(http.DefaultClient, s.urls["node1"]),
		"gzip":    connecthttp.NewTransport(http.DefaultClient, s.urls["node1"], connecthttp.WithSendGzip()),
		"grpc":    connecthttp.NewTransport(h2c(), s.urls["node1"], connecthttp.WithGRPC()),
	} {
		ctx, info := connect.NewClientContext(short(t))
		info.RequestHeader().Set("Authorization", "Bearer "+token)
		_, err := blixardv1connect.NewVMServiceClient(connect.NewClient(transport)).CreateVM(ctx, &blixardv1.CreateVMRequest{Name: strings.Repeat("a", 11<<20)})
		e, _, ok := blixardv1.FromRPC(err)
		if !ok || e.Code != blixard.CodeInvalid {
			t.Errorf("%s: %v, %+v", name, err, e)
		}
	}
}

// slow is a backend that waits for the end of the context.
type slow struct{ *apitest.Backend }

func (slow) Propose(ctx context.Context, _ state.Envelope) (state.Outcome, error) {
	<-ctx.Done()
	return state.Outcome{}, ctx.Err()
}

// broken is a backend with a bug.
type broken struct{ *apitest.Backend }

func (broken) Propose(context.Context, state.Envelope) (state.Outcome, error) { panic("a bug") }

func post(t *testing.T, h http.Handler, path, body string) *httptest.ResponseRecorder {
	t.Helper()
	req := httptest.NewRequestWithContext(t.Context(), "POST", path, strings.NewReader(body))
	req.Header.Set("Content-Type", "application/json")
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, req)
	return rec
}

func TestWhatGoesWrongInside(t *testing.T) {
	node := apitest.New(1).Node("node1")
	late := api.New(api.Options{Backend: slow{node}, Timeout: 20 * time.Millisecond})
	if rec := post(t, late, "/v1/vms", `{"name":"web"}`); rec.Code != 503 || !strings.Contains(rec.Body.String(), "no answer in time") {
		t.Errorf("late: %d %s", rec.Code, rec.Body)
	}
	var log strings.Builder
	bug := api.New(api.Options{Backend: broken{node}, Log: slog.New(slog.NewTextHandler(&log, nil))})
	if rec := post(t, bug, "/v1/vms", `{"name":"web"}`); rec.Code != 500 || strings.Contains(rec.Body.String(), "a bug\"") || !strings.Contains(log.String(), "a bug") {
		t.Errorf("bug: %d %s, log %s", rec.Code, rec.Body, log.String())
	}
	empty := api.New(api.Options{Backend: node, Token: func() string { return "" }})
	if rec := post(t, empty, "/v1/vms", `{"name":"web"}`); rec.Code != 503 || rec.Header().Get("Retry-After") == "" {
		t.Errorf("no member: %d %s", rec.Code, rec.Body)
	}
	bare := api.New(api.Options{Backend: node})
	if rec := post(t, bare, "/v1/images", "x"); rec.Code != 422 {
		t.Errorf("no images: %d %s", rec.Code, rec.Body)
	}
}

// TestBodiesThatTrickle: a caller that sends byte by byte is cut off, on REST
// and on RPC.
func TestBodiesThatTrickle(t *testing.T) {
	h := api.New(api.Options{Backend: apitest.New(1).Node("node1"), Timeout: 100 * time.Millisecond})
	server := httptest.NewServer(h)
	defer server.Close()
	for _, head := range []string{
		"POST /v1/vms HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{\"name\"",
		"POST /blixard.v1.VMService/CreateVM HTTP/1.1\r\nHost: x\r\nContent-Type: application/proto\r\nContent-Length: 100\r\n\r\n\n",
	} {
		conn, err := net.Dial("tcp", server.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, head); err != nil {
			t.Fatal(err)
		}
		if err := conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatalf("no answer: %v", err)
		}
		if resp.StatusCode < 400 || !resp.Close {
			t.Errorf("%s, closed %t", resp.Status, resp.Close)
		}
		resp.Body.Close()
		conn.Close()
	}
}

// TestKeepAlive: the deadline of one request's body does not end the next one.
func TestKeepAlive(t *testing.T) {
	h := api.New(api.Options{Backend: apitest.New(1).Node("node1"), Timeout: 50 * time.Millisecond})
	server := httptest.NewUnstartedServer(h)
	server.Config = api.NewServer(h)
	server.Start()
	defer server.Close()
	transport := &http.Transport{MaxConnsPerHost: 1}
	defer transport.CloseIdleConnections()
	c, err := client.New(client.Options{Addresses: []string{server.URL}, HTTPClient: &http.Client{Transport: transport}, RetryFor: -1})
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(200 * time.Millisecond)
	for n := 0; time.Now().Before(deadline); n++ {
		if _, err := c.CreateVM(short(t), &blixardv1.CreateVMRequest{Name: fmt.Sprintf("vm%d", n)}); err != nil {
			t.Fatal(err)
		}
	}
}
