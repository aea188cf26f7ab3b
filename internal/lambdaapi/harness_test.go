package lambdaapi_test

import (
	"archive/zip"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/lambda"
	"github.com/aws/aws-sdk-go-v2/service/lambda/types"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/accesskey"
	"github.com/blixard/blixard/internal/api/apitest"
	"github.com/blixard/blixard/internal/code"
	"github.com/blixard/blixard/internal/lambdaapi"
	"github.com/blixard/blixard/internal/state"
)

const (
	region  = "us-east-1"
	account = "000000000000"
	role    = "arn:aws:iam::000000000000:role/any"
)

// world is a server with the real state, a builder that the test plays, and
// functions that are Go code.
type world struct {
	t       *testing.T
	cluster *apitest.Cluster
	invoker *invoker
	url     string
	record  *recorder
	key     string
	secret  string
}

// invoker stands for the gateway.
type invoker struct {
	mu     sync.Mutex
	invoke func(ctx context.Context, inv *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error)
	events []*blixard.Invocation
}

func (i *invoker) Invoke(ctx context.Context, inv *blixard.Invocation, w blixard.ResponseSink) (blixard.InvocationReport, error) {
	i.mu.Lock()
	invoke := i.invoke
	i.mu.Unlock()
	return invoke(ctx, inv, w)
}

func (i *invoker) Enqueue(_ context.Context, inv *blixard.Invocation) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.events = append(i.events, inv)
	return nil
}

// answers has the functions answer.
func (w *world) answers(f func(inv *blixard.Invocation, s blixard.ResponseSink) (blixard.InvocationReport, error)) {
	w.invoker.mu.Lock()
	defer w.invoker.mu.Unlock()
	w.invoker.invoke = func(_ context.Context, inv *blixard.Invocation, s blixard.ResponseSink) (blixard.InvocationReport, error) {
		return f(inv, s)
	}
}

// echo answers with the payload.
func echo(inv *blixard.Invocation, s blixard.ResponseSink) (blixard.InvocationReport, error) {
	if err := s.Begin(blixard.ResponseHead{}); err != nil {
		return blixard.InvocationReport{}, err
	}
	_, err := s.Write(inv.Payload)
	return blixard.InvocationReport{RequestID: inv.RequestID, Number: inv.Number, Start: blixard.StartWarm, Node: "node1"}, err
}

// failed is an error as the gateway makes them.
type failed struct {
	err    *blixard.Error
	status int
	reason string
}

func (f *failed) Error() string { return f.err.Error() }

func (f *failed) Unwrap() error { return f.err }

func (f *failed) Failure() (status int, reason string, handed bool, after time.Duration) {
	return f.status, f.reason, false, time.Second
}

func refusal(status int, reason string) error {
	return &failed{err: blixard.Errorf(blixard.CodeOverloaded, "no: %s", reason), status: status, reason: reason}
}

func newWorld(t *testing.T, change func(*lambdaapi.Options)) *world {
	t.Helper()
	w := &world{t: t, cluster: apitest.New(1), invoker: &invoker{}}
	w.answers(echo)
	backend := w.cluster.Node("node1")
	opt := lambdaapi.Options{Backend: backend, Invoker: w.invoker, Code: code.Store{Root: t.TempDir()}, TempDir: t.TempDir()}
	if change != nil {
		change(&opt)
	}
	w.record = record(t, lambdaapi.New(opt))
	server := httptest.NewServer(w.record)
	t.Cleanup(server.Close)
	w.url = server.URL
	key, secret, err := accesskey.Create(t.Context(), backend, accesskey.New{Name: "test", RequestKey: t.Name(), Now: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	w.key, w.secret = key.ID, secret
	return w
}

// client is the SDK's, as anybody would make it.
func (w *world) client(change ...func(*lambda.Options)) *lambda.Client {
	opt := lambda.Options{
		BaseEndpoint: aws.String(w.url), Region: region,
		Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{AccessKeyID: w.key, SecretAccessKey: w.secret}, nil
		}),
	}
	return lambda.New(opt, append([]func(*lambda.Options){func(o *lambda.Options) { o.RetryMaxAttempts = 1 }}, change...)...)
}

// build plays the node that builds a version.
func (w *world) build(name string, number int, as blixard.FunctionState) {
	w.t.Helper()
	v := w.cluster.View()
	fv, n := v.FunctionVersion(blixard.FunctionName(name), number), v.Node("node1")
	w.cluster.Must(&state.AssignBuild{Function: fv.Function, Number: number, Seq: fv.Seq, Node: n.Name, NodeEpoch: n.Epoch})
	w.cluster.Must(&state.ReportFunction{Function: fv.Function, Number: number, Seq: fv.Seq, Node: n.Name, NodeEpoch: n.Epoch, State: as, Code: "InitError", Reason: "it said no"})
}

// create makes a function that can be called.
func (w *world) create(name string) *lambda.CreateFunctionOutput {
	w.t.Helper()
	out, err := w.client().CreateFunction(w.t.Context(), createInput(name))
	if err != nil {
		w.t.Fatal(err)
	}
	w.build(name, 0, blixard.FunctionActive)
	return out
}

func createInput(name string) *lambda.CreateFunctionInput {
	return &lambda.CreateFunctionInput{
		FunctionName: &name, Role: aws.String(role), Runtime: types.RuntimeProvidedal2023, Handler: aws.String("bootstrap"),
		Code: &types.FunctionCode{ZipFile: zipOf("one")},
	}
}

// zipOf is a zip with a script that says something.
func zipOf(says string) []byte {
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	h := &zip.FileHeader{Name: "bootstrap", Method: zip.Deflate}
	h.SetMode(0o755)
	f, err := z.CreateHeader(h)
	if err != nil {
		panic(err)
	}
	if _, err := f.Write([]byte("#!/bin/sh\necho " + says + "\n")); err != nil {
		panic(err)
	}
	if err := z.Close(); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// want checks that an error is of the SDK's type T and has a text.
func want[T error](t *testing.T, err error, message string) T {
	t.Helper()
	e, ok := errors.AsType[T](err)
	if !ok {
		t.Fatalf("error %v, want a %T", err, e)
	}
	if text := e.Error(); message != "" && !bytes.Contains([]byte(text), []byte(message)) {
		t.Errorf("error %q does not say %q", text, message)
	}
	return e
}

// send sends a bare request, without signature.
func (w *world) send(method, path, body string, header ...string) (status int, text string, h http.Header) {
	w.t.Helper()
	r, err := http.NewRequestWithContext(w.t.Context(), method, w.url+path, bytes.NewReader([]byte(body)))
	if err != nil {
		w.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		w.t.Fatal(err)
	}
	defer answer.Body.Close()
	var b bytes.Buffer
	if _, err := b.ReadFrom(answer.Body); err != nil {
		w.t.Fatal(err)
	}
	return answer.StatusCode, b.String(), answer.Header
}

func decodeBase64(t *testing.T, text string) string {
	t.Helper()
	raw, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}
