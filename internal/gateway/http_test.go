package gateway_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/gateway"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/state"
)

func (c *cluster) trigger(name blixard.FunctionName, id, path, host string, methods ...string) {
	c.t.Helper()
	c.ok(&state.SetFunction{Name: name, Trigger: &blixard.Trigger{ID: id, Kind: "http", Path: path, Host: host, Methods: methods}})
}

func (c *cluster) url(name blixard.FunctionName, u blixard.FunctionURL) {
	c.t.Helper()
	if u.Auth == "" {
		u.Auth = "NONE"
	}
	if u.InvokeMode == "" {
		u.InvokeMode = "BUFFERED"
	}
	c.ok(&state.SetFunction{Name: name, URL: &state.URLChange{URL: u}})
}

const urlHost = "abc.lambda-url.us-east-1.example.test"

type answered struct {
	status int
	header http.Header
	body   string
}

// ask sends a request through a handler; headers are "Name: value".
func ask(t testing.TB, h http.Handler, method, target, host, body string, headers ...string) answered {
	t.Helper()
	r := httptest.NewRequest(method, target, strings.NewReader(body))
	if body == "" {
		r = httptest.NewRequest(method, target, nil)
	}
	if host != "" {
		r.Host = host
	}
	r.RemoteAddr = "192.0.2.7:4711"
	for _, line := range headers {
		name, value, _ := strings.Cut(line, ": ")
		r.Header.Add(name, value)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return answered{w.Code, w.Header(), w.Body.String()}
}

func TestTriggers(t *testing.T) {
	c := newCluster(t, "n1")
	for _, name := range []blixard.FunctionName{"exact", "below", "root", "post", "hosted"} {
		c.function(name)
	}
	c.trigger("exact", "t1", "/api/image", "", "GET", "POST")
	c.trigger("below", "t2", "/api/{proxy+}", "")
	c.trigger("root", "t3", "/*", "", "GET")
	c.trigger("post", "t4", "/api/image", "", "PUT")
	c.trigger("hosted", "t5", "/api/*", "Shop.example", "GET")
	m := c.member("n1")
	m.stub.serve = func(_ context.Context, inv *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
		var e struct {
			RouteKey       string            `json:"routeKey"`
			PathParameters map[string]string `json:"pathParameters"`
		}
		if err := json.Unmarshal(inv.Payload, &e); err != nil {
			return blixard.InvocationReport{}, err
		}
		return blixard.InvocationReport{}, answer(w, blixard.ResponseHead{}, `"`+string(inv.Function)+" "+e.RouteKey+" "+e.PathParameters["proxy"]+`"`)
	}
	for _, x := range []struct{ method, target, host, want string }{
		{"GET", "/api/image", "", `"exact GET /api/image "`},
		{"GET", "/api/image/", "", `"exact GET /api/image "`},
		{"GET", "/api/im%61ge", "", `"exact GET /api/image "`},
		{"PUT", "/api/image", "", `"post PUT /api/image "`},
		{"DELETE", "/api/image", "", `"below ANY /api/{proxy+} image"`},
		{"GET", "/api/image/1/x%20y", "", `"below ANY /api/{proxy+} image/1/x y"`},
		{"GET", "/api", "", `"below ANY /api/{proxy+} "`},
		{"GET", "/", "", `"root GET /* "`},
		{"GET", "/other", "", `"root GET /* other"`},
		{"GET", "/api/image", "shop.EXAMPLE:8080", `"hosted GET /api/* image"`},
		{"POST", "/api/image", "shop.example", `"exact POST /api/image "`},
	} {
		if got := ask(t, m, x.method, x.target, x.host, ""); got.status != 200 || got.body != x.want {
			t.Errorf("%s %s %s: %d %s, want %s", x.method, x.host, x.target, got.status, got.body, x.want)
		}
	}
	got := ask(t, m, "POST", "/other", "", "")
	if got.status != http.StatusMethodNotAllowed || got.header.Get("Allow") != "GET" || got.header.Get("Content-Type") != "application/problem+json" {
		t.Errorf("405: %+v", got)
	}
	c.ok(&state.SetFunction{Name: "root", DropTrigger: "t3"})
	got = ask(t, m, "GET", "/other", "", "")
	var problem struct{ Title, Code, Reason string }
	if err := json.Unmarshal([]byte(got.body), &problem); err != nil || got.status != http.StatusNotFound || problem.Code != "not_found" {
		t.Errorf("404: %+v %v", got, err)
	}
}

func TestByName(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	c.ok(&state.PublishVersion{Name: "f"})
	c.built("f", 1)
	m := c.member("n1", func(o *gateway.Options) {
		o.Authorize = func(r *http.Request) error {
			if r.Header.Get("Authorization") == "Bearer right" {
				return nil
			}
			return blixard.Errorf(blixard.CodeDenied, "no")
		}
	})
	if got := ask(t, m, "GET", "/function/f", "", ""); got.status != http.StatusUnauthorized || got.header.Get("Www-Authenticate") == "" {
		t.Fatalf("without a token: %+v", got)
	}
	if got := ask(t, m, "GET", "/function/f", "", "", "Authorization: Bearer wrong"); got.status != http.StatusForbidden {
		t.Fatalf("with a wrong token: %+v", got)
	}
	got := ask(t, m, "GET", "/function/f:1/x/y?q=1", "", "", "Authorization: Bearer right")
	var e map[string]any
	if err := json.Unmarshal([]byte(got.body), &e); err != nil || got.status != 200 || e["rawPath"] != "/x/y" || e["rawQueryString"] != "q=1" {
		t.Fatalf("%+v %v", got, err)
	}
	if n := m.stub.let()[0].Number; n != 1 {
		t.Fatalf("version %d was called", n)
	}
	if got.header.Get("Server-Timing") == "" || got.header.Get("X-Blixard-Start") != "warm" || got.header.Get("X-Amzn-Requestid") == "" {
		t.Fatalf("headers: %v", got.header)
	}
	for target, want := range map[string]int{
		"/function/": 400, "/function/none": 404, "/function/f:none": 404, "/function/f:9": 404, "/function/%2e%2e/x": 400, "/function/f:bad!": 400,
	} {
		if got := ask(t, m, "GET", target, "", "", "Authorization: Bearer right"); got.status != want || got.header.Get("Content-Type") != "application/problem+json" {
			t.Errorf("%s: %+v, want %d", target, got, want)
		}
	}
}

// TestEvent compares the whole event with what AWS documents.
func TestEvent(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	c.url("f", blixard.FunctionURL{ID: "abc"})
	m := c.member("n1")
	got := ask(t, m, "POST", "/my/p%20ath?a=1&a=2&b=x%20y&c&=", urlHost, `{"x":"`+"\u00fc\\n"+`"}`, "Content-Type: application/json; charset=utf-8",
		"Cookie: a=1; b=2", "Cookie: c=3", "X-Two: 1", "X-Two: 2", "User-Agent: t\"est", "X-Forwarded-For: 1.2.3.4", "Connection: keep-alive", "X-Amzn-Trace-Id: Root=1-2-3")
	if got.status != 200 {
		t.Fatalf("%+v", got)
	}
	var e map[string]any
	if err := json.Unmarshal([]byte(got.body), &e); err != nil {
		t.Fatalf("%v in %s", err, got.body)
	}
	ctx, ok := e["requestContext"].(map[string]any)
	if !ok {
		t.Fatal(got.body)
	}
	at, err := time.Parse("02/Jan/2006:15:04:05 -0700", ctx["time"].(string))
	if err != nil || time.Since(at) > time.Minute || ctx["timeEpoch"].(float64) < float64(at.UnixMilli()) {
		t.Errorf("time: %v %v", ctx, err)
	}
	delete(ctx, "time")
	delete(ctx, "timeEpoch")
	want := map[string]any{
		"version": "2.0", "routeKey": "$default", "rawPath": "/my/p%20ath", "rawQueryString": "a=1&a=2&b=x%20y&c&=",
		"cookies": []any{"a=1", "b=2", "c=3"},
		"headers": map[string]any{
			"host": urlHost, "content-type": "application/json; charset=utf-8", "x-two": "1,2", "user-agent": "t\"est", "x-forwarded-for": "192.0.2.7",
			"x-forwarded-port": "80", "x-forwarded-proto": "http", "x-amzn-trace-id": "Root=1-2-3", "content-length": "12",
		},
		"queryStringParameters": map[string]any{"a": "1,2", "b": "x y", "c": "", "": ""},
		"requestContext": map[string]any{
			"accountId": "anonymous", "apiId": "abc", "domainName": urlHost, "domainPrefix": "abc",
			"http":      map[string]any{"method": "POST", "path": "/my/p%20ath", "protocol": "HTTP/1.1", "sourceIp": "192.0.2.7", "userAgent": "t\"est"},
			"requestId": got.header.Get("X-Amzn-Requestid"), "routeKey": "$default", "stage": "$default",
		},
		"body": "{\"x\":\"\u00fc\\n\"}", "isBase64Encoded": false,
	}
	if !reflect.DeepEqual(e, want) {
		t.Errorf("the event is\n%v\nwant\n%v", e, want)
	}
}

func TestEventBodies(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	m := c.member("n1")
	for _, x := range []struct {
		kind, body, want string
		base64           bool
	}{
		{"text/plain", "hi", "hi", false},
		{"application/json", "{}", "{}", false},
		{"application/xml; charset=x", "<a/>", "<a/>", false},
		{"application/problem+json", "{}", "{}", false},
		{"application/x-www-form-urlencoded", "a=1", "YT0x", true},
		{"", "hi", "aGk=", true},
		{"text/plain", "\xff\x00", "/wA=", true}, // says text, is none
	} {
		got := ask(t, m, "POST", "/function/f", "", x.body, "Content-Type: "+x.kind)
		var e struct {
			Body            string
			IsBase64Encoded bool
		}
		if err := json.Unmarshal([]byte(got.body), &e); err != nil || e.Body != x.want || e.IsBase64Encoded != x.base64 {
			t.Errorf("%s %q: %+v %v", x.kind, x.body, e, err)
		}
	}
}

// TestResponses is the mapping of answers.
func TestResponses(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	c.url("f", blixard.FunctionURL{ID: "abc"})
	m := c.member("n1")
	for _, x := range []struct {
		payload string
		status  int
		body    string
		headers map[string]string
	}{
		{`{"a":1}`, 200, `{"a":1}`, map[string]string{"Content-Type": "application/json"}},
		{`"text"`, 200, `"text"`, map[string]string{"Content-Type": "application/json"}},
		{`null`, 200, `null`, nil},
		{``, 200, ``, nil},
		{`{"statusCode":201,"body":"made","headers":{"Content-Type":"text/plain","X-N":5}}`, 201, "made", map[string]string{"Content-Type": "text/plain", "X-N": "5"}},
		{`{"statusCode":"404"}`, 404, "", map[string]string{"Content-Type": "application/json"}},
		{`{"statusCode":200,"body":{"processed":true}}`, 200, `{"processed":true}`, map[string]string{"Content-Type": "application/json"}},
		{`{"statusCode":200,"body":"aGk=","isBase64Encoded":true}`, 200, "hi", nil},
		{`{"statusCode":200,"cookies":["a=1","b=2"],"multiValueHeaders":{"x-m":["1","2"]}}`, 200, "", map[string]string{"Set-Cookie": "a=1|b=2", "X-M": "1|2"}},
		{`{"statusCode":200,"headers":{"Connection":"close, X-Mine","X-Mine":"1","Transfer-Encoding":"chunked","Content-Length":"7"},"body":"abc"}`, 200, "abc", map[string]string{"Content-Length": "3", "X-Mine": "", "Connection": ""}},
		{`{"a":{"statusCode":9}}`, 200, `{"a":{"statusCode":9}}`, nil},
		{`{"headers":7,"a":{"statusCode":9}}`, 200, `{"headers":7,"a":{"statusCode":9}}`, nil},
		// What is no answer.
		{`{"statusCode":99}`, 502, `{"Message":"Bad Gateway"}`, nil},
		{`{"statusCode":"x"}`, 502, `{"Message":"Bad Gateway"}`, nil},
		{`{"statusCode":200,"headers":{"a":[]}}`, 502, `{"Message":"Bad Gateway"}`, nil},
		{`{"statusCode":200,"body":"!","isBase64Encoded":true}`, 502, `{"Message":"Bad Gateway"}`, nil},
		{`{"statusCode":200`, 502, `{"Message":"Bad Gateway"}`, nil},
		{`no JSON`, 502, `{"Message":"Bad Gateway"}`, nil},
	} {
		m.stub.set(func(s *stub) { s.serve = says(x.payload) })
		got := ask(t, m, "GET", "/", urlHost, "")
		if got.status != x.status || got.body != x.body {
			t.Errorf("%s: %d %q, want %d %q", x.payload, got.status, got.body, x.status, x.body)
		}
		for name, want := range x.headers {
			if have := strings.Join(got.header[name], "|"); have != want {
				t.Errorf("%s: %s is %q, want %q", x.payload, name, have, want)
			}
		}
	}
}

func TestFunctionErrors(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	c.url("f", blixard.FunctionURL{ID: "abc"})
	c.trigger("f", "t", "/t", "")
	m := c.member("n1")
	m.stub.serve = fails("Secret.Thing")
	if got := ask(t, m, "GET", "/", urlHost, ""); got.status != 502 || got.body != "Internal Server Error" {
		t.Errorf("%+v", got)
	}
	got := ask(t, m, "GET", "/t", "", "")
	if got.status != 502 || !strings.Contains(got.body, "FunctionError") || strings.Contains(got.body, "Secret") {
		t.Errorf("%+v", got)
	}
	if !strings.Contains(got.body, "what answers here has failed") {
		t.Errorf("%+v", got)
	}
	m.stub.refuse = func(*blixard.Invocation, gateway.Try) *route.Refused { return refused(route.NoMemory) }
	if got := ask(t, m, "GET", "/t", "", ""); got.status != 429 || strings.Contains(got.body, "stub") {
		t.Errorf("a stranger is told too much: %+v", got)
	}
	m.stub.refuse = nil
	m.stub.serve = fails("Sandbox.Timedout")
	if got := ask(t, m, "GET", "/t", "", ""); got.status != 504 {
		t.Errorf("%+v", got)
	}
}

// TestAnswerTooLarge: 7 MB where 6 may be.
func TestAnswerTooLarge(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	m := c.member("n1")
	m.stub.serve = says(`"` + strings.Repeat("x", 7_000_000) + `"`)
	if got := ask(t, m, "GET", "/function/f", "", ""); got.status != 502 || !strings.Contains(got.body, "TooLarge") {
		t.Fatalf("%d %.200s", got.status, got.body)
	}
	m.stub.serve = says(`"` + strings.Repeat("x", 6_000_000) + `"`)
	if got := ask(t, m, "GET", "/function/f", "", ""); got.status != 200 || len(got.body) != 6_000_002 {
		t.Fatalf("%d %.200s", got.status, got.body)
	}
}

func TestRequestTooLarge(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	c.url("f", blixard.FunctionURL{ID: "abc"})
	m := c.member("n1", func(o *gateway.Options) { o.Limits.SyncBytes = 1000 })
	if got := ask(t, m, "POST", "/function/f", "", strings.Repeat("x", 1001)); got.status != 413 || len(m.stub.let()) != 0 {
		t.Errorf("%+v", got)
	}
	if got := ask(t, m, "POST", "/", urlHost, strings.Repeat("x", 1001)); got.status != 413 || got.header.Get("X-Amzn-Errortype") != "RequestTooLargeException" {
		t.Errorf("%+v", got)
	}
	// In chunks, so that its length is not known beforehand.
	r := httptest.NewRequest("POST", "/function/f", io.MultiReader(strings.NewReader(strings.Repeat("x", 5000))))
	r.ContentLength = -1
	w := httptest.NewRecorder()
	m.ServeHTTP(w, r)
	if w.Code != 413 {
		t.Errorf("%d", w.Code)
	}
}

func TestThrottledURL(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f", limit(0))
	c.url("f", blixard.FunctionURL{ID: "abc"})
	m := c.member("n1")
	got := ask(t, m, "GET", "/", urlHost, "")
	if got.status != 429 || got.header.Get("X-Amzn-Errortype") != "TooManyRequestsException" || !strings.Contains(got.body, `"Reason":"ReservedFunctionConcurrentInvocationLimitExceeded"`) {
		t.Fatalf("%+v", got)
	}
}

type verifier struct{ err error }

func (v verifier) Verify(_ *http.Request, body []byte) (gateway.Identity, error) {
	if string(body) == "tampered" {
		return gateway.Identity{}, blixard.Errorf(blixard.CodeDenied, "the signature does not match")
	}
	return gateway.Identity{AccessKey: "BLXA1", AccountID: "1234", CallerID: "c", UserARN: "arn:u", UserID: "u"}, v.err
}

func TestIAM(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	c.url("f", blixard.FunctionURL{ID: "abc", Auth: "AWS_IAM"})
	m := c.member("n1", func(o *gateway.Options) { o.Verify = verifier{} })
	for _, body := range []string{"", "tampered"} {
		header := "X-None: 1"
		if body != "" {
			header = "Authorization: AWS4-HMAC-SHA256 x"
		}
		got := ask(t, m, "POST", "/", urlHost, body, header)
		if got.status != 403 || got.body != `{"Message":"Forbidden"}` || got.header.Get("X-Amzn-Errortype") != "AccessDeniedException" {
			t.Errorf("%q: %+v", body, got)
		}
	}
	got := ask(t, m, "POST", "/", urlHost, "right", "Authorization: AWS4-HMAC-SHA256 x")
	var e struct {
		RequestContext struct {
			AccountID  string
			Authorizer struct{ IAM map[string]any }
		}
	}
	if err := json.Unmarshal([]byte(got.body), &e); err != nil || e.RequestContext.AccountID != "1234" || e.RequestContext.Authorizer.IAM["accessKey"] != "BLXA1" || e.RequestContext.Authorizer.IAM["userArn"] != "arn:u" {
		t.Errorf("%+v %v", got, err)
	}
	if inv := m.stub.let(); len(inv) != 1 || inv[0].Caller != "BLXA1" {
		t.Errorf("%+v", inv)
	}
	unsafe := c.member("n1")
	if got := ask(t, unsafe, "POST", "/", urlHost, "right", "Authorization: AWS4-HMAC-SHA256 x"); got.status != 403 {
		t.Errorf("without a verifier: %+v", got)
	}
	if got := ask(t, m, "GET", "/", "nobody.lambda-url.us-east-1.example.test", ""); got.status != 403 || got.body != `{"Message":null}` {
		t.Errorf("an unknown URL: %+v", got)
	}
}

func TestCORS(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	c.url("f", blixard.FunctionURL{ID: "abc", CORS: &blixard.CORS{
		AllowCredentials: true, AllowHeaders: []string{"x-a", "x-b"}, AllowMethods: []string{"GET", "POST"}, AllowOrigins: []string{"https://a.example", "https://*.b.example"},
		ExposeHeaders: []string{"x-e"}, MaxAgeSeconds: 60,
	}})
	m := c.member("n1")
	m.stub.serve = says(`{"statusCode":200,"headers":{"access-control-allow-origin":"https://evil","vary":"X"},"body":"b"}`)
	got := ask(t, m, "OPTIONS", "/", urlHost, "", "Origin: https://x.b.example", "Access-Control-Request-Method: POST")
	want := map[string]string{
		"Access-Control-Allow-Origin": "https://x.b.example", "Access-Control-Allow-Credentials": "true", "Access-Control-Allow-Methods": "GET,POST",
		"Access-Control-Allow-Headers": "x-a,x-b", "Access-Control-Max-Age": "60", "Access-Control-Expose-Headers": "x-e", "Vary": "Origin",
	}
	for name, v := range want {
		if got.header.Get(name) != v {
			t.Errorf("preflight: %s is %q, want %q", name, got.header.Get(name), v)
		}
	}
	if got.status != 200 || len(m.stub.let()) != 0 {
		t.Errorf("a preflight was not answered by the gateway: %+v", got)
	}
	got = ask(t, m, "GET", "/", urlHost, "", "Origin: https://a.example")
	if got.body != "b" || strings.Join(got.header["Access-Control-Allow-Origin"], "|") != "https://a.example" {
		t.Errorf("%+v", got)
	}
	got = ask(t, m, "GET", "/", urlHost, "", "Origin: https://evil")
	if got.body != "b" || got.header.Get("Access-Control-Allow-Origin") != "" {
		t.Errorf("a foreign origin: %+v", got)
	}
	if got := ask(t, m, "OPTIONS", "/", urlHost, ""); got.body != "b" {
		t.Errorf("OPTIONS that is no preflight: %+v", got)
	}
}

// TestHTTPRuntime: requests and answers go through as they are.
func TestHTTPRuntime(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("web", runtime("http"))
	m := c.member("n1")
	m.stub.serve = func(_ context.Context, _ *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
		return blixard.InvocationReport{}, answer(w, blixard.ResponseHead{Status: 418, Headers: [][2]string{
			{"content-type", "image/png"}, {"Content-Length", "4"}, {"Connection", "X-Hop"}, {"X-Hop", "1"}, {"Keep-Alive", "5"}, {"Set-Cookie", "a=1"}, {"Set-Cookie", "b=2"},
		}}, "body")
	}
	got := ask(t, m, "PATCH", "/function/web/a%2Fb?x=1&y", "", "raw\x00", "X-Two: 1", "X-Two: 2", "Connection: X-Drop", "X-Drop: 1", "Te: trailers", "Upgrade: h2c")
	if got.status != 418 || got.body != "body" || got.header.Get("Content-Type") != "image/png" || got.header.Get("X-Hop")+got.header.Get("Keep-Alive")+got.header.Get("Connection") != "" ||
		len(got.header["Set-Cookie"]) != 2 || got.header.Get("Server-Timing") == "" {
		t.Fatalf("%+v", got)
	}
	inv := m.stub.let()[0]
	if string(inv.Payload) != "raw\x00" || inv.HTTP == nil || inv.HTTP.Method != "PATCH" || inv.HTTP.Target != "/a%2Fb?x=1&y" || inv.HTTP.Host != "example.com" {
		t.Fatalf("%+v %+v", inv, inv.HTTP)
	}
	h := http.Header{}
	for _, p := range inv.HTTP.Headers {
		h.Add(p[0], p[1])
	}
	if len(h["X-Two"]) != 2 || h.Get("X-Drop")+h.Get("Te")+h.Get("Upgrade")+h.Get("Connection") != "" || h.Get("X-Forwarded-For") != "192.0.2.7" ||
		h.Get("X-Forwarded-Host") != "example.com" || h.Get("X-Forwarded-Prefix") != "/function/web" || h.Get("X-Forwarded-Proto") != "http" {
		t.Fatalf("%v", h)
	}
}

// TestCanaryOfAnotherRuntime: each version gets the request in its own form.
func TestCanaryOfAnotherRuntime(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f", runtime("http"))
	one := int(c.ok(&state.PublishVersion{Name: "f"}).Value)
	c.built("f", one)
	s := spec()
	c.ok(&state.UpdateFunction{Name: "f", Spec: &s})
	c.built("f", 0)
	two := int(c.ok(&state.PublishVersion{Name: "f"}).Value)
	c.built("f", two)
	c.ok(&state.SetAlias{Function: "f", Alias: blixard.FunctionAlias{Name: "live", Number: one, Second: two, SecondShare: 500_000}})
	m := c.member("n1")
	for range 100 {
		ask(t, m, "POST", "/function/f:live/x", "", "body")
	}
	seen := map[int]int{}
	for _, inv := range m.stub.let() {
		seen[inv.Number]++
		if raw := inv.HTTP != nil; raw != (inv.Number == one) || raw != (string(inv.Payload) == "body") {
			t.Fatalf("version %d got %s", inv.Number, inv.Payload)
		}
	}
	if seen[one] == 0 || seen[two] == 0 {
		t.Fatalf("%v", seen)
	}
}

func TestTrustForwarded(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("web", runtime("http"))
	m := c.member("n1", func(o *gateway.Options) { o.TrustForwarded = true })
	ask(t, m, "GET", "/function/web", "", "", "X-Forwarded-For: 10.0.0.1, 10.0.0.2", "X-Forwarded-Proto: https")
	inv := m.stub.let()[0]
	if inv.Caller != "10.0.0.2" || !slices.Contains(inv.HTTP.Headers, [2]string{"X-Forwarded-For", "10.0.0.1, 10.0.0.2"}) ||
		!slices.Contains(inv.HTTP.Headers, [2]string{"X-Forwarded-Proto", "https"}) {
		t.Fatalf("%q %v", inv.Caller, inv.HTTP.Headers)
	}
}

// TestStreaming: over a real connection, bytes arrive as they are written.
func TestStreaming(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	c.url("f", blixard.FunctionURL{ID: "abc", InvokeMode: "RESPONSE_STREAM"})
	m := c.member("n1")
	c.serve(m)
	goOn := make(chan struct{})
	nul := string(make([]byte, 8))
	m.stub.serve = func(_ context.Context, _ *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
		h := blixard.ResponseHead{Streaming: true, ContentType: "application/vnd.awslambda.http-integration-response"}
		if err := answer(w, h, `{"statusCode":203,"headers":{"x-h":"1"},"cookies":["a=1"]}`+nul[:3], nul[3:]+"one "); err != nil {
			return blixard.InvocationReport{}, err
		}
		<-goOn
		_, err := w.Write([]byte("two"))
		return blixard.InvocationReport{}, err
	}
	req, err := http.NewRequestWithContext(t.Context(), "GET", m.server.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = urlHost
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	first := make([]byte, 4)
	if _, err := io.ReadFull(res.Body, first); err != nil || string(first) != "one " || res.StatusCode != 203 || res.Header.Get("X-H") != "1" || res.Header.Get("Set-Cookie") != "a=1" {
		t.Fatalf("%q %v %+v", first, err, res)
	}
	close(goOn)
	if rest, err := io.ReadAll(res.Body); err != nil || string(rest) != "two" {
		t.Fatalf("%q %v", rest, err)
	}
	// Where streams are not passed on, the same is answered whole.
	c.url("f", blixard.FunctionURL{ID: "abc"})
	got := ask(t, m, "GET", "/", urlHost, "")
	if got.status != 203 || got.body != "one two" || got.header.Get("Set-Cookie") != "a=1" {
		t.Fatalf("buffered: %+v", got)
	}
}

// TestStreamBreaks: a client sees that a stream has not come to its end, and a
// call whose client has left is ended.
func TestStreamBreaks(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	m := c.member("n1")
	c.serve(m)
	m.stub.serve = func(_ context.Context, _ *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
		if err := answer(w, blixard.ResponseHead{Streaming: true}, "begun"); err != nil {
			return blixard.InvocationReport{}, err
		}
		r := refused(route.Gone)
		r.Handed, r.Begun = true, true
		return blixard.InvocationReport{}, r
	}
	res, err := http.Get(m.server.URL + "/function/f")
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	if err := res.Body.Close(); err != nil {
		t.Fatal(err)
	}
	if string(body) != "begun" || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("%q %v", body, err)
	}
	ended := make(chan error, 1)
	m.stub.set(func(s *stub) {
		s.serve = func(ctx context.Context, _ *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
			err := answer(w, blixard.ResponseHead{Streaming: true}, "x")
			for err == nil && ctx.Err() == nil {
				_, err = w.Write(bytes.Repeat([]byte("y"), 1<<16))
			}
			ended <- err
			return blixard.InvocationReport{}, err
		}
	})
	if res, err = http.Get(m.server.URL + "/function/f"); err != nil {
		t.Fatal(err)
	}
	if err := res.Body.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err == nil {
			t.Fatal("the stream ended without an error")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the stream goes on though nobody reads it")
	}
	eventually(t, "no call is under way", func() bool { return m.Calls() == 0 })
}

// TestSlowRequest: who does not send what was announced holds nothing for long.
func TestSlowRequest(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	m := c.member("n1", func(o *gateway.Options) { o.Limits.Body = 20 * time.Millisecond })
	c.serve(m)
	r, w := io.Pipe()
	defer w.Close()
	req, err := http.NewRequestWithContext(t.Context(), "POST", m.server.URL+"/function/f", r)
	if err != nil {
		t.Fatal(err)
	}
	req.ContentLength = 10
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusRequestTimeout || len(m.stub.let()) != 0 {
		t.Fatalf("%v", res.Status)
	}
}

// TestSlowReader: who does not read a stream does not hold its instance.
func TestSlowReader(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	m := c.member("n1", func(o *gateway.Options) { o.Limits.Body = 50 * time.Millisecond })
	c.serve(m)
	ended := make(chan error, 1)
	m.stub.serve = func(ctx context.Context, _ *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
		err := answer(w, blixard.ResponseHead{Streaming: true}, "x")
		for err == nil && ctx.Err() == nil {
			_, err = w.Write(make([]byte, 1<<20))
		}
		ended <- err
		return blixard.InvocationReport{}, err
	}
	conn, err := net.Dial("tcp", m.server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "GET /function/f HTTP/1.1\r\nHost: h\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the stream waits for who does not read")
	}
}

// TestConnectionsAreUsedAgain: the bounds of one request are not the next one's.
func TestConnectionsAreUsedAgain(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	m := c.member("n1", func(o *gateway.Options) { o.Limits.Body = 50 * time.Millisecond })
	c.serve(m)
	conn, err := net.Dial("tcp", m.server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r := bufio.NewReader(conn)
	for i := range 4 {
		serve := echo
		if i%2 == 0 {
			serve = func(_ context.Context, _ *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
				return blixard.InvocationReport{}, answer(w, blixard.ResponseHead{Streaming: true}, "a", "b")
			}
		}
		m.stub.set(func(s *stub) { s.serve = serve })
		if _, err := io.WriteString(conn, "POST /function/f HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nxy"); err != nil {
			t.Fatal(err)
		}
		res, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatalf("request %d: %v", i, err)
		}
		if _, err := io.Copy(io.Discard, res.Body); err != nil || res.StatusCode != 200 {
			t.Fatalf("request %d: %v %v", i, res.Status, err)
		}
		<-time.After(80 * time.Millisecond)
	}
}

// TestClientLeaves: a call that is not streamed runs to its end.
func TestClientLeaves(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	m := c.member("n1")
	c.serve(m)
	begun, end := make(chan struct{}), make(chan error, 1)
	m.stub.serve = func(ctx context.Context, inv *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
		close(begun)
		select {
		case <-ctx.Done():
			end <- ctx.Err()
		case <-time.After(50 * time.Millisecond):
			end <- nil
		}
		return echo(ctx, inv, w)
	}
	ctx, cancel := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, "GET", m.server.URL+"/function/f", nil)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		<-begun
		cancel()
	}()
	if res, err := http.DefaultClient.Do(req); err == nil {
		res.Body.Close()
		t.Fatal("the client did not leave")
	}
	if err := <-end; err != nil {
		t.Fatalf("the call was ended: %v", err)
	}
	eventually(t, "no call is under way", func() bool { return m.Calls() == 0 })
}

// TestJustMade: what another node has made a moment ago is found, and asking for
// what is not there does not keep the cluster busy.
func TestJustMade(t *testing.T) {
	c := newCluster(t, "n1")
	c.function("f")
	old := c.View()
	c.trigger("f", "t", "/new", "")
	c.url("f", blixard.FunctionURL{ID: "fresh", Auth: "NONE"})
	asked := 0
	m := c.member("n1", func(o *gateway.Options) {
		o.View = func() *state.View { return old }
		o.Fresh = func(context.Context) (*state.View, error) { asked++; return c.View(), nil }
	})
	ask := func(host, path string) int {
		r := httptest.NewRequest(http.MethodGet, "http://"+host+path, nil)
		w := httptest.NewRecorder()
		m.ServeHTTP(w, r)
		return w.Code
	}
	if got := ask("x", "/new"); got != http.StatusOK {
		t.Errorf("a trigger: %d", got)
	}
	if got := ask(m.URLHost("fresh"), "/"); got != http.StatusOK {
		t.Errorf("a URL: %d", got)
	}
	if asked != 2 {
		t.Errorf("asked %d times", asked)
	}
	for range 500 {
		if got := ask("x", "/none"); got != http.StatusNotFound {
			t.Fatalf("what is not there: %d", got)
		}
	}
	if asked > 100 {
		t.Errorf("asked %d times", asked)
	}
}
