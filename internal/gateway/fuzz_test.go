package gateway

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/wire"
)

type kept struct {
	heads []blixard.ResponseHead
	body  []byte
}

func (k *kept) Begin(h blixard.ResponseHead) error {
	k.heads = append(k.heads, h)
	return nil
}

func (k *kept) Write(p []byte) (int, error) {
	k.body = append(k.body, p...)
	return len(p), nil
}

// TestFramesAreWrittenAndRead: calls, answers and refusals come out as they went in.
func TestFramesAreWrittenAndRead(t *testing.T) {
	in := callHead{try: Try{MayStart: true}, remaining: time.Second, inv: &blixard.Invocation{
		RequestID: "id", Function: "f", Qualifier: "q", Number: 3, Seq: 9, ClientContext: "cc", TraceID: "t", LogTail: true, Stream: true, Caller: "me",
		HTTP: &blixard.HTTPRequest{Method: "GET", Target: "/", Host: "h", Headers: [][2]string{{"A", "1"}, {"A", "2"}}},
	}}
	b := append(appendCall(nil, &in), "payload"...)
	out, err := readCall(bytes.NewReader(b), int64(len(b)), 100)
	if err != nil {
		t.Fatal(err)
	}
	in.inv.Payload = []byte("payload")
	if !reflect.DeepEqual(in, out) {
		t.Fatalf("%+v\n%+v", in, out)
	}
	report := blixard.InvocationReport{
		RequestID: "id", Node: "n", Instance: "i", Number: 3, Start: blixard.StartPooled, Error: &blixard.FunctionError{Kind: "k", Type: "t"},
		Parts: blixard.Breakdown{Queue: 1, Place: 2, Commit: 3, Spawn: 4, Restore: 5, Boot: 6, Init: 7, Handler: 8, Transfer: 9, Total: 10}, MemoryMiB: 11, UsedMiB: 12, Log: []byte("log"),
	}
	w := httptest.NewRecorder()
	a := newAnswerWriter(w)
	head := blixard.ResponseHead{Status: 201, Headers: [][2]string{{"B", "2"}}, ContentType: "c", Streaming: true}
	if err := errors.Join(a.Begin(head), second(a.Write([]byte("one"))), second(a.Write(make([]byte, 3<<20)))); err != nil {
		t.Fatal(err)
	}
	a.report(&report)
	a.free()
	var k kept
	r := answerReader{r: w.Body}
	got, err := r.copyTo(&k)
	if err != nil || !reflect.DeepEqual(got, report) || len(k.heads) != 1 || !reflect.DeepEqual(k.heads[0], head) || len(k.body) != 3<<20+3 {
		t.Fatalf("%+v %+v %d %v", got, k.heads, len(k.body), err)
	}
	w = httptest.NewRecorder()
	a = newAnswerWriter(w)
	a.refused(&route.Refused{Why: route.Busy, Err: &blixard.Error{Code: blixard.CodeOverloaded, Message: "m", Hint: "h"}})
	a.free()
	r = answerReader{r: w.Body}
	_, err = r.copyTo(&kept{})
	if e, ok := errors.AsType[*route.Refused](err); !ok || e.Why != route.Busy || e.Handed || e.Err.Message != "m" || e.Err.Hint != "h" {
		t.Fatalf("%+v", err)
	}
}

func second[T any](_ T, err error) error { return err }

// FuzzAnswer: whatever a node answers, nothing is handed to the sink twice, what
// is cut off is never taken for whole, and nothing panics.
func FuzzAnswer(f *testing.F) {
	w := httptest.NewRecorder()
	a := newAnswerWriter(w)
	if err := errors.Join(a.Begin(blixard.ResponseHead{Status: 200, Headers: [][2]string{{"a", "b"}}}), second(a.Write([]byte("body")))); err != nil {
		f.Fatal(err)
	}
	a.report(&blixard.InvocationReport{Start: blixard.StartWarm})
	f.Add(w.Body.Bytes())
	f.Add(w.Body.Bytes()[:20])
	f.Add(appendFrame(nil, frameError, (&refusedFrame{}).code))
	f.Fuzz(func(t *testing.T, b []byte) {
		var k kept
		r := answerReader{r: bytes.NewReader(b)}
		_, err := r.copyTo(&k)
		if len(k.heads) > 1 || len(k.heads) == 0 && len(k.body) > 0 {
			t.Fatalf("%d heads, %d bytes", len(k.heads), len(k.body))
		}
		if refused, ok := errors.AsType[*route.Refused](err); err != nil && (!ok || refused.Err == nil) {
			t.Fatalf("%T %v", err, err)
		}
	})
}

// FuzzCall: whatever a node sends as a call, it is read or refused.
func FuzzCall(f *testing.F) {
	h := callHead{inv: &blixard.Invocation{Function: "f", HTTP: &blixard.HTTPRequest{Headers: [][2]string{{"a", "b"}}}}}
	f.Add(append(appendCall(nil, &h), "payload"...))
	c := wire.Writer(nil)
	c.Record((&announcement{node: "n", load: NodeLoad{Revisions: []Load{{Warm: 1}}}, demands: []Demand{{"f", 1}}}).code)
	f.Add(c.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		if got, err := readCall(bytes.NewReader(b), int64(len(b)), 1<<20); err == nil && len(got.inv.Payload) > len(b) {
			t.Fatal("more payload than bytes")
		}
		if a, err := readAnnouncement(bytes.NewReader(b)); err == nil {
			newTable().take(&a, time.Now())
		}
	})
}

// FuzzEvent: whatever a client sends, the event is JSON and says what was sent.
func FuzzEvent(f *testing.F) {
	f.Add("/a%20b", "a=1&b", "x\xff\x00\"\\\n\u2028", "text/plain", "c=1; d", []byte("body"))
	f.Fuzz(func(t *testing.T, path, query, header, kind, cookie string, body []byte) {
		r := httptest.NewRequest(http.MethodPost, "/", nil)
		r.URL.RawQuery = query
		r.Header["X-Any"] = []string{header, header}
		r.Header["Content-Type"] = []string{kind}
		r.Header["Cookie"] = []string{cookie}
		in := eventInput{request: r, body: body, path: path, routeKey: "k", requestID: "id", param: "proxy", value: header}
		b := appendEvent(nil, &in)
		var e struct {
			RawPath, RawQueryString string
			Headers                 map[string]string
			Body                    string
			IsBase64Encoded         bool
		}
		if err := json.Unmarshal(b, &e); err != nil {
			t.Fatalf("%v in %s", err, b)
		}
		if want := strings.ToValidUTF8(header+","+header, "\ufffd"); utf8.ValidString(header) && e.Headers["x-any"] != want {
			t.Fatalf("the header is %q, want %q", e.Headers["x-any"], want)
		}
		if utf8.ValidString(path) && e.RawPath != path {
			t.Fatalf("the path is %q, want %q", e.RawPath, path)
		}
		if !e.IsBase64Encoded && e.Body != string(body) {
			t.Fatalf("the body is %q, want %q", e.Body, body)
		}
	})
}

// FuzzResponse: whatever a function answers, the gateway's answer is one.
func FuzzResponse(f *testing.F) {
	f.Add([]byte(`{"statusCode":200,"headers":{"a":"b"},"body":"x","cookies":["a=b"]}`))
	f.Add([]byte(`{"statusCode":"204","multiValueHeaders":{"a":["b",1]}}`))
	f.Add([]byte("{\"statusCode\":200}\x00\x00\x00\x00\x00\x00\x00\x00body"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, ok := mapResponse(b); ok && (m.status < 200 || m.status > 599) {
			t.Fatalf("status %d", m.status)
		}
		if m, ok := wholePrelude(b); ok && (m.status < 200 || m.status > 599) {
			t.Fatalf("status %d", m.status)
		}
	})
}
