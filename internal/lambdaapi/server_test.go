package lambdaapi_test

import (
	"context"
	"encoding/base64"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/service/lambda"
	"github.com/aws/aws-sdk-go-v2/service/lambda/types"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/accesskey"
	"github.com/blixard/blixard/internal/lambdaapi"
	"github.com/blixard/blixard/internal/state"
)

func TestSignatures(t *testing.T) {
	w := newWorld(t, nil)
	list := func(change ...func(*lambda.Options)) error {
		_, err := w.client(change...).ListFunctions(t.Context(), &lambda.ListFunctionsInput{})
		return err
	}
	credentials := func(id, secret, token string) func(*lambda.Options) {
		return func(o *lambda.Options) {
			o.Credentials = aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
				return aws.Credentials{AccessKeyID: id, SecretAccessKey: secret, SessionToken: token}, nil
			})
		}
	}
	if err := list(); err != nil {
		t.Fatal(err)
	}
	wantCode(t, list(credentials(w.key, "wrong", "")), "InvalidSignatureException", "The request signature we calculated does not match the signature you provided.")
	wantCode(t, list(credentials("BLXAAAAAAAAAAAAAAAAA", w.secret, "")), "UnrecognizedClientException", "The security token included in the request is invalid.")
	wantCode(t, list(credentials(w.key, w.secret, "token")), "UnrecognizedClientException", "")
	wantCode(t, list(func(o *lambda.Options) { o.Region = "eu-west-1" }), "InvalidSignatureException", "Credential should be scoped to a valid region: this cluster is 'us-east-1'")
	status, body, h := w.send("GET", "/2015-03-31/functions", "")
	if status != http.StatusForbidden || body != `{"Type":"User","message":"Missing Authentication Token"}` || h.Get("X-Amzn-Errortype") != "MissingAuthenticationTokenException" || h.Get("X-Amzn-Requestid") == "" {
		t.Errorf("%d %s %v", status, body, h)
	}
	// A presigned request.
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, w.url+"/2015-03-31/functions?X-Amz-Expires=60", nil)
	if err != nil {
		t.Fatal(err)
	}
	uri, _, err := v4.NewSigner().PresignHTTP(t.Context(), aws.Credentials{AccessKeyID: w.key, SecretAccessKey: w.secret}, r, accesskey.EmptyHash, "lambda", region, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if status, body, _ := w.send("GET", strings.TrimPrefix(uri, w.url), ""); status != http.StatusOK {
		t.Errorf("presigned: %d %s", status, body)
	}
	// Nothing is done for a forged request.
	c := w.client(credentials(w.key, "wrong", ""))
	_, err = c.CreateFunction(t.Context(), createInput("forged"))
	wantCode(t, err, "InvalidSignatureException", "")
	_, err = c.Invoke(t.Context(), &lambda.InvokeInput{FunctionName: aws.String("forged"), InvocationType: types.InvocationTypeEvent})
	wantCode(t, err, "InvalidSignatureException", "")
	if w.cluster.View().FunctionCount() != 0 || len(w.invoker.events) != 0 {
		t.Error("a forged request did something")
	}
	w.cluster.Must(&state.RevokeAccessKey{ID: w.key})
	wantCode(t, list(), "UnrecognizedClientException", "")
}

func TestRoles(t *testing.T) {
	w := newWorld(t, nil)
	w.create("f")
	use := func(role string) {
		key, secret, err := accesskey.Create(t.Context(), w.cluster.Node("node1"), accesskey.New{Name: role, Role: role, RequestKey: role, Now: time.Now()})
		if err != nil {
			t.Fatal(err)
		}
		w.key, w.secret = key.ID, secret
	}
	get := func() error {
		_, err := w.client().GetFunction(t.Context(), &lambda.GetFunctionInput{FunctionName: aws.String("f")})
		return err
	}
	invoke := func() error {
		_, err := w.client().Invoke(t.Context(), &lambda.InvokeInput{FunctionName: aws.String("f")})
		return err
	}
	create := func() error {
		_, err := w.client().CreateFunction(t.Context(), createInput("g"))
		return err
	}
	use(accesskey.RoleInvoke)
	if err := invoke(); err != nil {
		t.Error(err)
	}
	wantCode(t, get(), "AccessDeniedException", "User: arn:aws:iam::000000000000:user/invoke is not authorized to perform: lambda:GetFunction")
	wantCode(t, create(), "AccessDeniedException", "")
	use(accesskey.RoleRead)
	if err := get(); err != nil {
		t.Error(err)
	}
	wantCode(t, invoke(), "AccessDeniedException", "lambda:InvokeFunction")
	wantCode(t, create(), "AccessDeniedException", "")
}

// Without authentication only who is here gets in, and no web page that is open
// here.
func TestInsecureNoAuth(t *testing.T) {
	w := newWorld(t, func(o *lambdaapi.Options) { o.InsecureNoAuth = true })
	if status, body, _ := w.send("GET", "/2015-03-31/functions/", ""); status != http.StatusOK {
		t.Errorf("%d %s", status, body)
	}
	for _, header := range [][]string{{"Origin", "http://evil.example"}, {"Sec-Fetch-Site", "cross-site"}} {
		if status, _, _ := w.send("GET", "/2015-03-31/functions/", "", header...); status != http.StatusForbidden {
			t.Errorf("with %s: %d", header[0], status)
		}
	}
	server := lambdaapi.New(lambdaapi.Options{Backend: w.cluster.Node("node1"), Invoker: w.invoker, Code: noCode{}, InsecureNoAuth: true})
	for name, c := range map[string]struct {
		local, remote, host string
		ok                  bool
	}{
		"here":          {"127.0.0.1:80", "127.0.0.1:5", "localhost:80", true},
		"ipv6":          {"[::1]:80", "[::1]:5", "[::1]:80", true},
		"other name":    {"127.0.0.1:80", "127.0.0.1:5", "evil.example", false},
		"public":        {"192.0.2.1:80", "127.0.0.1:5", "localhost", false},
		"from outside":  {"127.0.0.1:80", "192.0.2.7:5", "localhost", false},
		"public itself": {"192.0.2.1:80", "192.0.2.1:5", "192.0.2.1", false},
	} {
		r := httptest.NewRequestWithContext(t.Context(), "GET", "/2015-03-31/functions", nil)
		address, err := net.ResolveTCPAddr("tcp", c.local)
		if err != nil {
			t.Fatal(err)
		}
		r = r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, net.Addr(address)))
		r.RemoteAddr, r.Host = c.remote, c.host
		rec := httptest.NewRecorder()
		server.ServeHTTP(rec, r)
		if (rec.Code == http.StatusOK) != c.ok {
			t.Errorf("%s: %d", name, rec.Code)
		}
	}
}

type noCode struct{ lambdaapi.Code }

// The SDK tries again when it is throttled, and after an answer that was lost:
// that changes nothing twice.
func TestRetries(t *testing.T) {
	w := newWorld(t, nil)
	w.create("f")
	c := w.client(func(o *lambda.Options) { o.RetryMaxAttempts = 5 })
	var calls atomic.Int32
	w.answers(func(inv *blixard.Invocation, s blixard.ResponseSink) (blixard.InvocationReport, error) {
		if calls.Add(1) < 3 {
			return blixard.InvocationReport{}, refusal(http.StatusTooManyRequests, "ConcurrentInvocationLimitExceeded")
		}
		return echo(inv, s)
	})
	if _, err := c.Invoke(t.Context(), &lambda.InvokeInput{FunctionName: aws.String("f")}); err != nil || calls.Load() != 3 {
		t.Errorf("%d calls, %v", calls.Load(), err)
	}
	lose := func(what string, f func() error) {
		t.Helper()
		lost := 0
		w.cluster.LoseWith(func(state.Envelope) error {
			if lost++; lost > 1 {
				return nil
			}
			return blixard.Errorf(blixard.CodeUnavailable, "the leader is gone")
		})
		defer w.cluster.LoseWith(nil)
		if err := f(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if lost < 1 {
			t.Errorf("%s: no answer was lost", what)
		}
	}
	lose("create", func() error {
		_, err := c.CreateFunction(t.Context(), createInput("g"))
		return err
	})
	w.build("g", 0, blixard.FunctionActive)
	lose("configure", func() error {
		_, err := c.UpdateFunctionConfiguration(t.Context(), &lambda.UpdateFunctionConfigurationInput{FunctionName: aws.String("g"), MemorySize: aws.Int32(512)})
		return err
	})
	w.build("g", 0, blixard.FunctionActive)
	lose("publish", func() error {
		out, err := c.PublishVersion(t.Context(), &lambda.PublishVersionInput{FunctionName: aws.String("g")})
		if err == nil && *out.Version != "1" {
			t.Errorf("version %s", *out.Version)
		}
		return err
	})
	lose("alias", func() error {
		_, err := c.CreateAlias(t.Context(), &lambda.CreateAliasInput{FunctionName: aws.String("g"), Name: aws.String("a"), FunctionVersion: aws.String("1")})
		return err
	})
	lose("alias update", func() error {
		_, err := c.UpdateAlias(t.Context(), &lambda.UpdateAliasInput{FunctionName: aws.String("g"), Name: aws.String("a"), Description: aws.String("x")})
		return err
	})
	lose("permission", func() error {
		_, err := c.AddPermission(t.Context(), &lambda.AddPermissionInput{FunctionName: aws.String("g"), StatementId: aws.String("s"), Action: aws.String("lambda:InvokeFunction"), Principal: aws.String("*")})
		return err
	})
	lose("url", func() error {
		_, err := c.CreateFunctionUrlConfig(t.Context(), &lambda.CreateFunctionUrlConfigInput{FunctionName: aws.String("g"), AuthType: types.FunctionUrlAuthTypeNone})
		return err
	})
	lose("async", func() error {
		_, err := c.PutFunctionEventInvokeConfig(t.Context(), &lambda.PutFunctionEventInvokeConfigInput{FunctionName: aws.String("g"), MaximumRetryAttempts: aws.Int32(0)})
		return err
	})
	lose("async update", func() error {
		_, err := c.UpdateFunctionEventInvokeConfig(t.Context(), &lambda.UpdateFunctionEventInvokeConfigInput{FunctionName: aws.String("g"), MaximumRetryAttempts: aws.Int32(1)})
		return err
	})
}

func TestBareRequests(t *testing.T) {
	w := newWorld(t, func(o *lambdaapi.Options) { o.InsecureNoAuth, o.Limits.UploadBytes = true, 1<<16 })
	w.create("f")
	zip := base64.StdEncoding.EncodeToString(zipOf("x"))
	for name, c := range map[string]struct {
		method, path, body string
		header             []string
		status             int
		says               string
	}{
		"no operation":    {"GET", "/2015-03-31/nothing", "", nil, 404, "There is no operation GET /2015-03-31/nothing"},
		"wrong method":    {"PATCH", "/2015-03-31/functions", "", nil, 404, "There is no operation"},
		"bad escape":      {"GET", "/2015-03-31/functions/%25zz", "", nil, 400, "functionName"},
		"bad query":       {"GET", "/2015-03-31/functions?a=%zz", "", nil, 400, "query"},
		"not json":        {"POST", "/2015-03-31/functions", "{", nil, 400, "Could not parse request body into json"},
		"wrong type":      {"POST", "/2015-03-31/functions", `{"FunctionName":1}`, nil, 400, "FunctionName"},
		"not base64":      {"POST", "/2015-03-31/functions", `{"Code":{"ZipFile":"?"}}`, nil, 400, "ZipFile is not base64"},
		"nothing":         {"POST", "/2015-03-31/functions", ``, nil, 400, "functionName"},
		"large":           {"POST", "/2015-03-31/functions", `{"Code":{"ZipFile":"` + strings.Repeat("A", 1<<16) + `"}}`, nil, 413, "Request must be smaller than 65536 bytes for the CreateFunction operation"},
		"large control":   {"PUT", "/2017-10-31/functions/f/concurrency", strings.Repeat(" ", 1<<20+1), nil, 413, "Request must be smaller than 1048576 bytes for the PutFunctionConcurrency operation"},
		"compressed":      {"POST", "/2015-03-31/functions/f/invocations", "{}", []string{"Content-Encoding", "gzip"}, 415, "content encoding"},
		"escaped base64":  {"PUT", "/2015-03-31/functions/f/code", `{"ZipFile":"` + strings.ReplaceAll(strings.ReplaceAll(zip, "/", `\/`), "=", `\u003d`) + `"}`, nil, 200, "CodeSha256"},
		"slash at end":    {"GET", "/2015-03-31/functions/", "", nil, 200, "Functions"},
		"arn in path":     {"GET", "/2015-03-31/functions/arn:aws:lambda:us-east-1:000000000000:function:f", "", nil, 200, "Configuration"},
		"other account":   {"GET", "/2015-03-31/functions/123456789012:function:f", "", nil, 404, "Function not found"},
		"layer arn":       {"GET", "/2015-03-31/functions/arn:aws:lambda:us-east-1:000000000000:layer:f", "", nil, 400, "functionName"},
		"empty qualifier": {"GET", "/2015-03-31/functions/f?Qualifier=", "", nil, 200, "Configuration"},
		"odd qualifier":   {"GET", "/2015-03-31/functions/f?Qualifier=a%20b", "", nil, 400, "Value 'a b' at 'qualifier' failed to satisfy constraint: Member must satisfy regular expression pattern: (|[a-zA-Z0-9$_-]+)"},
	} {
		t.Run(name, func(t *testing.T) {
			status, body, _ := w.send(c.method, c.path, c.body, c.header...)
			if status != c.status || !strings.Contains(body, c.says) {
				t.Errorf("%d %s, want %d %s", status, body, c.status, c.says)
			}
		})
	}
}

// An internal error keeps its words for the log.
func TestInternalErrorsTellNothing(t *testing.T) {
	w := newWorld(t, func(o *lambdaapi.Options) { o.InsecureNoAuth = true })
	w.cluster.FailReads(context.DeadlineExceeded)
	if status, body, _ := w.send("GET", "/2015-03-31/functions", ""); status != 500 || strings.Contains(body, "deadline") {
		t.Errorf("%d %s", status, body)
	}
	w.cluster.FailReads(blixard.Errorf(blixard.CodeUnavailable, "no leader"))
	if status, body, _ := w.send("GET", "/2015-03-31/functions", ""); status != 503 || !strings.Contains(body, "no leader") {
		t.Errorf("%d %s", status, body)
	}
}

func TestServes(t *testing.T) {
	for path, want := range map[string]bool{"/2015-03-31/functions": true, "/2021-11-15/x": true, "/v1/vms": false, "/": false, "/2015-3-31/functions": false, "/20a5-03-31/functions": false} {
		if got := lambdaapi.Serves(httptest.NewRequestWithContext(t.Context(), "GET", path, nil)); got != want {
			t.Errorf("%s: %v", path, got)
		}
	}
}
