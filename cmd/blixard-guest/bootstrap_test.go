package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
)

// runtimeAPI speaks to the Runtime API as a runtime or an extension would.
type runtimeAPI struct {
	t    *testing.T
	base string
}

// startSleeper starts a function that does nothing, so that the test may be its
// runtime. It gives what Init has to say.
func startSleeper(t *testing.T, init call.Init, more map[string]string) (*function, runtimeAPI, chan error) {
	t.Helper()
	files := map[string]string{"bootstrap": "#!/bin/sh\nexec sleep 1000\n"}
	maps.Copy(files, more)
	f := startFunction(t, files)
	done := make(chan error, 1)
	go func() {
		_, err := f.Init(context.Background(), init)
		done <- err
	}()
	var base string
	for end := time.Now().Add(10 * time.Second); base == "" && time.Now().Before(end); {
		f.agent.mu.Lock()
		if b, ok := f.agent.runtime.(*bootstrap); ok {
			b.mu.Lock()
			if b.process != nil || len(b.extensions.list) > 0 {
				base = "http://" + b.host.api
			}
			b.mu.Unlock()
		}
		f.agent.mu.Unlock()
	}
	if base == "" {
		t.Fatal("the Runtime API does not come up")
	}
	return f, runtimeAPI{t, base}, done
}

// do asks; header values are "name: value".
func (a runtimeAPI) do(method, path, body string, headers ...string) (int, string, http.Header) {
	request, err := http.NewRequestWithContext(a.t.Context(), method, a.base+path, strings.NewReader(body))
	if err != nil {
		a.t.Error(err)
		return 0, "", nil
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		request.Header.Set(name, value)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		a.t.Error(err)
		return 0, "", nil
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		a.t.Error(err)
	}
	return response.StatusCode, strings.TrimSpace(string(text)), response.Header
}

func (a runtimeAPI) expect(wantStatus int, want, method, path, body string, headers ...string) {
	a.t.Helper()
	status, text, _ := a.do(method, path, body, headers...)
	if status != wantStatus || !strings.Contains(text, want) {
		a.t.Errorf("%s %s: %d %s, want %d …%s…", method, path, status, text, wantStatus, want)
	}
}

const (
	nextPath   = "/2018-06-01/runtime/invocation/next"
	noUUID     = "00000000-0000-4000-8000-000000000000"
	registerAt = "/2020-01-01/extension/register"
	eventAt    = "/2020-01-01/extension/event/next"
)

// goNext asks for an invocation in the background.
func (a runtimeAPI) goNext() chan http.Header {
	got := make(chan http.Header, 1)
	go func() {
		_, body, header := a.do("GET", nextPath, "")
		header.Set("Test-Body", body)
		got <- header
	}()
	return got
}

func mustUp(t *testing.T, done chan error) {
	t.Helper()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func (f *function) goInvoke(t *testing.T, payload string) chan *answer {
	t.Helper()
	done := make(chan *answer, 1)
	go func() {
		a := &answer{}
		result, err := f.Invoke(context.Background(), &blixard.Invocation{
			RequestID: testIDs(), Payload: []byte(payload), Deadline: time.Now().Add(20 * time.Second), TraceID: "Root=1\r\nX: y", ClientContext: `{"a":1}`,
		}, call.Target{ARN: "arn:f", Tenant: "blue"}, a)
		if err != nil {
			t.Error(err)
		}
		if result.Error != nil {
			fmt.Fprint(&a.body, " ", result.Error.Type)
		}
		done <- a
	}()
	return done
}

func TestRuntimeAPIStates(t *testing.T) {
	f, api, done := startSleeper(t, testInit(), nil)
	api.expect(200, "pong", "GET", "/2018-06-01/ping", "")
	api.expect(404, "NotFound", "GET", "/2018-06-01/nothing", "")
	api.expect(405, "MethodNotAllowed", "POST", nextPath, "")
	api.expect(400, `"errorType":"InvalidRequestID","errorMessage":"Invalid request ID"`, "POST", "/2018-06-01/runtime/invocation/"+noUUID+"/response", "x")
	next := api.goNext()
	mustUp(t, done)
	answered := f.goInvoke(t, `{"in":1}`)
	header := <-next
	id := header.Get("Lambda-Runtime-Aws-Request-Id")
	for name, want := range map[string]string{
		"Test-Body": `{"in":1}`, "Lambda-Runtime-Invoked-Function-Arn": "arn:f", "Lambda-Runtime-Trace-Id": "Root=1X: y", "Lambda-Runtime-Client-Context": `{"a":1}`,
		"Lambda-Runtime-Aws-Tenant-Id": "blue", "X": "",
	} {
		if header.Get(name) != want {
			t.Errorf("%s is %q, want %q", name, header.Get(name), want)
		}
	}
	api.expect(403, "State transition from Running to Ready failed for runtime. Error: State transition is not allowed", "GET", nextPath, "")
	api.expect(400, "InvalidRequestID", "POST", "/2018-06-01/runtime/invocation/"+noUUID+"/response", "x")
	api.expect(403, "InvalidStateTransition", "POST", "/2018-06-01/runtime/init/error", `{}`)
	api.expect(202, `{"status":"OK"}`, "POST", "/2018-06-01/runtime/invocation/"+id+"/response", "not JSON", "Content-Type: text/plain")
	if a := <-answered; a.body.String() != "not JSON" || a.head.ContentType != "text/plain" {
		t.Errorf("answer %q %+v", a.body.String(), a.head)
	}
	api.expect(403, "InvalidStateTransition", "POST", "/2018-06-01/runtime/invocation/"+id+"/response", "again")
	if stat, err := f.Stat(t.Context()); err != nil || !stat.Busy || stat.Open != 0 {
		t.Errorf("between answer and next: %+v, %v", stat, err)
	}

	// An event that comes before the runtime asks for it waits.
	answered = f.goInvoke(t, `2`)
	id = (<-api.goNext()).Get("Lambda-Runtime-Aws-Request-Id")
	api.expect(202, "OK", "POST", "/2018-06-01/runtime/invocation/"+id+"/error", `{"errorType":"Mine","errorMessage":"no"}`, "Lambda-Runtime-Function-XRay-Error-Cause: "+strings.Repeat("x", 100<<10))
	if a := <-answered; a.body.String() != `{"errorType":"Mine","errorMessage":"no"} Mine` {
		t.Errorf("answer %q", a.body.String())
	}

	answered = f.goInvoke(t, `3`)
	id = (<-api.goNext()).Get("Lambda-Runtime-Aws-Request-Id")
	api.expect(413, "Exceeded maximum allowed payload size (6291556 bytes).", "POST", "/2018-06-01/runtime/invocation/"+id+"/response", strings.Repeat("x", 7<<20))
	if a := <-answered; !strings.HasSuffix(a.body.String(), "Function.ResponseSizeTooLarge") {
		t.Errorf("answer %q", a.body.String())
	}

	answered = f.goInvoke(t, `4`)
	id = (<-api.goNext()).Get("Lambda-Runtime-Aws-Request-Id")
	api.expect(400, "InvalidFunctionResponseMode", "POST", "/2018-06-01/runtime/invocation/"+id+"/response", "x", "Lambda-Runtime-Function-Response-Mode: odd")
	if a := <-answered; !strings.HasSuffix(a.body.String(), "Runtime.InvalidResponseModeHeader") {
		t.Errorf("answer %q", a.body.String())
	}
	f.fails(t, "5", 300*time.Millisecond, "Sandbox.Timedout", "RequestId: ID Error: Task timed out after 3.00 seconds")
}

func TestInitError(t *testing.T) {
	_, api, done := startSleeper(t, testInit(), nil)
	const body = `{"errorType":"Init.Mine","errorMessage":"no database"}`
	api.expect(202, "OK", "POST", "/2018-06-01/runtime/init/error", body, "Lambda-Runtime-Function-Error-Type: Function.NoDatabase")
	err := <-done
	fault := initFault(err)
	if fault.Type != "Function.NoDatabase" || fault.Message != "no database" || string(fault.Body) != body {
		t.Errorf("Init: %v", err)
	}
}

// A runtime with hooks waits in /restore/next, is saved there, and takes calls only
// when its hooks are through.
func TestRestoreHooks(t *testing.T) {
	hook := func(api runtimeAPI) chan int {
		got := make(chan int, 1)
		go func() {
			status, _, _ := api.do("GET", "/2018-06-01/runtime/restore/next", "")
			got <- status
		}()
		return got
	}
	identity := call.Identity{Epoch: 1, Entropy: make([]byte, 64)}
	t.Run("through", func(t *testing.T) {
		f, api, done := startSleeper(t, testInit(), nil)
		waiting := hook(api)
		mustUp(t, done)
		var next chan http.Header
		hooked := make(chan struct{})
		go func() {
			defer close(hooked)
			if status := <-waiting; status != 200 {
				t.Errorf("restore/next: %d", status)
			}
			next = api.goNext()
		}()
		// Its hooks are the function's own once; what comes later is the agent's alone.
		if ack, err := f.Restore(t.Context(), identity); err != nil || ack.Hook == 0 {
			t.Fatalf("%+v, %v", ack, err)
		}
		<-hooked
		if ack, err := f.Restore(t.Context(), identity); err != nil || ack.Hook != 0 {
			t.Fatalf("again: %+v, %v", ack, err)
		}
		answered := f.goInvoke(t, "1")
		id := (<-next).Get("Lambda-Runtime-Aws-Request-Id")
		api.expect(202, "OK", "POST", "/2018-06-01/runtime/invocation/"+id+"/response", "yes")
		if a := <-answered; a.body.String() != "yes" {
			t.Errorf("answer %q", a.body.String())
		}
	})
	t.Run("fail", func(t *testing.T) {
		f, api, done := startSleeper(t, testInit(), nil)
		waiting := hook(api)
		mustUp(t, done)
		posted := make(chan struct{})
		go func() {
			defer close(posted)
			<-waiting
			api.expect(202, "OK", "POST", "/2018-06-01/runtime/restore/error", `{"errorType":"E","errorMessage":"no"}`)
		}()
		defer func() { <-posted }()
		if _, err := f.Restore(t.Context(), identity); err == nil || !strings.Contains(err.Error(), "E: no") {
			t.Errorf("Restore: %v", err)
		}
	})
	t.Run("take too long", func(t *testing.T) {
		f, api, done := startSleeper(t, testInit(), nil)
		waiting := hook(api)
		mustUp(t, done)
		slow := identity
		slow.RestoreMS = 100
		if _, err := f.Restore(t.Context(), slow); err == nil || !strings.Contains(err.Error(), "Runtime.RestoreHookTimedout") {
			t.Errorf("Restore: %v", err)
		}
		<-waiting
	})
	t.Run("not restored", func(t *testing.T) {
		f, api, done := startSleeper(t, testInit(), nil)
		waiting := hook(api)
		mustUp(t, done)
		answered := f.goInvoke(t, "1")
		<-waiting
		id := (<-api.goNext()).Get("Lambda-Runtime-Aws-Request-Id")
		api.expect(202, "OK", "POST", "/2018-06-01/runtime/invocation/"+id+"/response", "yes")
		<-answered
	})
}

func TestExtensions(t *testing.T) {
	f, api, done := startSleeper(t, testInit(), map[string]string{"extensions/watcher": "#!/bin/sh\nexec sleep 1000\n"})
	missing := []string{"POST", registerAt, `{"events":["INVOKE"]}`}
	api.expect(403, "Extension.InvalidExtensionName", missing[0], missing[1], missing[2])
	api.expect(403, "InvalidRequestFormat", "POST", registerAt, `{`, "Lambda-Extension-Name: watcher")
	api.expect(403, "Extension.InvalidEventType", "POST", registerAt, `{"events":["SHUTDOWN"]}`, "Lambda-Extension-Name: inner")
	api.expect(403, "Extension.MissingExtensionIdentifier", "GET", eventAt, "")
	api.expect(403, "Extension.InvalidExtensionIdentifier", "GET", eventAt, "", "Lambda-Extension-Identifier: x")
	api.expect(403, "Extension.UnknownExtensionIdentifier", "GET", eventAt, "", "Lambda-Extension-Identifier: "+noUUID)
	status, body, header := api.do("POST", registerAt, `{"events":["INVOKE","SHUTDOWN"]}`, "Lambda-Extension-Name: watcher")
	id := header.Get("Lambda-Extension-Identifier")
	if status != 200 || body != `{"functionName":"f","functionVersion":"$LATEST","handler":"main"}` || !isUUID(id) {
		t.Fatalf("register: %d %s %q", status, body, id)
	}
	api.expect(403, "Extension.InvalidExtensionState", "POST", registerAt, `{"events":[]}`, "Lambda-Extension-Name: watcher")
	for i := range maxExtensions - 1 {
		_, _, header := api.do("POST", registerAt, `{"events":[]}`, fmt.Sprintf("Lambda-Extension-Name: inner-%d", i))
		inner := header.Get("Lambda-Extension-Identifier")
		go func() { // it never hears of anything
			request, err := http.NewRequestWithContext(t.Context(), "GET", api.base+eventAt, nil)
			if err != nil {
				t.Error(err)
				return
			}
			request.Header.Set("Lambda-Extension-Identifier", inner)
			if response, err := http.DefaultClient.Do(request); err == nil {
				response.Body.Close()
			}
		}()
	}
	api.expect(403, "Extension limit (10) reached", "POST", registerAt, `{"events":[]}`, "Lambda-Extension-Name: one-more")
	api.expect(202, "Telemetry.NotSupported", "PUT", "/2022-07-01/telemetry", `{}`, "Lambda-Extension-Identifier: "+id)
	api.expect(202, "Logs.NotSupported", "PUT", "/2020-08-15/logs", `{}`, "Lambda-Extension-Identifier: "+id)
	event := func() chan string {
		got := make(chan string, 1)
		go func() {
			_, body, _ := api.do("GET", eventAt, "", "Lambda-Extension-Identifier: "+id)
			got <- body
		}()
		return got
	}
	first := event()
	next := api.goNext()
	mustUp(t, done)
	api.expect(403, "Extension.RegistrationClosed", "POST", registerAt, `{"events":[]}`, "Lambda-Extension-Name: late")
	answered := f.goInvoke(t, "1")
	var got struct {
		EventType, RequestID, InvokedFunctionARN, ShutdownReason string
		DeadlineMS                                               int64
	}
	if err := json.Unmarshal([]byte(<-first), &got); err != nil || got.EventType != "INVOKE" || got.InvokedFunctionARN != "arn:f" || got.DeadlineMS < time.Now().UnixMilli() {
		t.Errorf("event %+v, %v", got, err)
	}
	requestID := (<-next).Get("Lambda-Runtime-Aws-Request-Id")
	if requestID != got.RequestID {
		t.Errorf("request %q, the extension was told of %q", requestID, got.RequestID)
	}
	api.expect(202, "OK", "POST", "/2018-06-01/runtime/invocation/"+requestID+"/response", "yes")
	<-answered
	second := event()
	ended := make(chan error, 1)
	go func() { ended <- f.Shutdown(context.Background(), "spindown", 600*time.Millisecond) }()
	if err := json.Unmarshal([]byte(<-second), &got); err != nil || got.EventType != "SHUTDOWN" || got.ShutdownReason != "spindown" {
		t.Errorf("event %+v, %v", got, err)
	}
	if err := <-ended; err != nil || f.agent.processes.alive() {
		t.Errorf("Shutdown: %v", err)
	}
}

// A function may be a shell script.
func TestShellBootstrap(t *testing.T) {
	f := startFunction(t, map[string]string{"bootstrap": `#!/bin/sh
api=http://$AWS_LAMBDA_RUNTIME_API/2018-06-01/runtime/invocation
while :; do
	event=$(curl -sS -D head "$api/next") || exit 1
	id=$(sed -n 's/^lambda-runtime-aws-request-id: *//Ip' head | tr -d '\r')
	echo "working on $event" >&2
	echo "told" >/dev/stderr
	curl -sS -o /dev/null -H 'Expect: 100-continue' --data-binary "{\"event\":$event}" "$api/$id/response"
done
`})
	f.up(t, testInit())
	for range 2 {
		result, a, _ := f.invoke(t, `{"a":1}`, 20*time.Second, false)
		if result.Error != nil || a.body.String() != `{"event":{"a":1}}` || !bytes.Contains(result.Log, []byte("working on {\"a\":1}\ntold\n")) {
			t.Errorf("%+v %q, log %q", result.Error, a.body.String(), result.Log)
		}
	}
	large := `"` + strings.Repeat("z", 100<<10) + `"`
	if result, a, _ := f.invoke(t, large, 20*time.Second, false); result.Error != nil || a.body.String() != `{"event":`+large+`}` {
		t.Errorf("100 KB: %+v, %d bytes", result.Error, a.body.Len())
	}
}

func FuzzRuntimeAPI(f *testing.F) {
	f.Add([]byte("GET /2018-06-01/runtime/invocation/next HTTP/1.1\r\nHost: x\r\n\r\n"))
	f.Add([]byte("POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nA: b\r\n\r\nGET / HTTP/1.0\r\n\r\n"))
	f.Add([]byte("POST /a HTTP/1.1\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\nabc"))
	f.Fuzz(func(t *testing.T, said []byte) {
		read, write := socketPair(t)
		c := &apiConn{fd: read, in: make([]byte, 64)}
		go func() {
			for len(said) > 0 {
				n, err := sendAll(write, said[:min(len(said), 5)])
				if err != nil {
					break
				}
				said = said[n:]
			}
			closeFD(write)
		}()
		for {
			request, err := c.next()
			if err != nil {
				break
			}
			c.answer(200, "", nil)
			if _, err := c.body(request, func([]byte) error { return nil }); err != nil {
				break
			}
		}
		c.shut()
		c.close()
	})
}
