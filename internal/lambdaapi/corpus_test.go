package lambdaapi_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/blixard/blixard/internal/lambdaapi"
)

// corpus is a folder of the SDK's own recordings: what its client sends, and
// what it reads, for each operation and each error.
func corpus(t *testing.T, folder string) string {
	t.Helper()
	dir, err := corpusRoot()
	if err != nil {
		t.Fatalf("finding the SDK's module (`go mod download` fetches it): %v", err)
	}
	return filepath.Join(dir, folder)
}

var corpusRoot = sync.OnceValues(func() (string, error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/aws/aws-sdk-go-v2/service/lambda").Output()
	dir := strings.TrimSpace(string(out))
	if err == nil && dir == "" {
		err = fmt.Errorf("it is not in the module cache")
	}
	return dir, err
})

// snapshot is a recorded message: its first line, its headers and its body.
type snapshot struct {
	first  string
	header http.Header
	body   []byte
}

func readSnapshot(t *testing.T, path string) snapshot {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(bytes.NewReader(data))
	s := snapshot{header: http.Header{}}
	s.first, _ = r.ReadString('\n')
	s.first = strings.TrimSpace(s.first)
	for line := "x"; line != ""; {
		line, err = r.ReadString('\n')
		line = strings.TrimSpace(line)
		if name, value, ok := strings.Cut(line, ": "); ok {
			s.header.Add(name, value)
		}
		// Requests have an empty line before their headers, too.
		if line == "" && len(s.header) == 0 && err == nil {
			if next, _ := r.Peek(1); len(next) > 0 && next[0] != '\n' && next[0] != '{' {
				line = "x"
			}
		}
	}
	if s.body, err = io.ReadAll(r); err != nil {
		t.Fatal(err)
	}
	s.body = bytes.TrimSpace(s.body)
	return s
}

func snapshots(t *testing.T, folder, suffix string) map[string]snapshot {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(corpus(t, folder), "*"+suffix))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no files %s in %s: %v", suffix, folder, err)
	}
	out := map[string]snapshot{}
	for _, path := range paths {
		out[strings.TrimSuffix(filepath.Base(path), suffix)] = readSnapshot(t, path)
	}
	return out
}

// notRead are members of requests that are not looked at, with the reason.
var notRead = map[string]string{
	"CreateFunction.Code.S3ObjectStorageMode":     "code from S3 is refused by S3Bucket",
	"CreateFunction.Code.S3ObjectVersion":         "the same",
	"UpdateFunctionCode.S3ObjectStorageMode":      "the same",
	"UpdateFunctionCode.S3ObjectVersion":          "the same",
	"CreateFunction.SnapStart.OptimizationStatus": "an answer's only",
}

// Every request of the SDK finds its operation, and what it carries is read.
func TestRequestsOfTheCorpus(t *testing.T) {
	inputs := lambdaapi.Inputs()
	seen := map[string]bool{}
	for op, s := range snapshots(t, "request_snapshot", ".request.snap") {
		method, uri, ok := strings.Cut(s.first, " ")
		if !ok {
			t.Fatalf("%s begins with %q", op, s.first)
		}
		name, args, served, err := lambdaapi.Route(httptest.NewRequestWithContext(t.Context(), method, uri, nil))
		if err != nil || name != op {
			t.Errorf("%s went to %q: %v", s.first, name, err)
			continue
		}
		seen[op] = true
		for what, value := range args {
			if want := map[string]string{"f": "__FunctionName__", "arn": "__Resource__", "s": "__StatementId__", "a": "__Name__", "uuid": "__UUID__"}[what]; served && want != "" && value != want {
				t.Errorf("%s: the argument %s is %q", op, what, value)
			}
		}
		in, reads := inputs[op]
		delete(inputs, op)
		if !served || len(s.body) == 0 || s.body[0] != '{' || op == "UpdateEventSourceMapping" { // the last is true of any body: there is none to update
			continue
		}
		if !reads {
			t.Errorf("%s has a body that nobody reads: %s", op, s.body)
			continue
		}
		if err := json.Unmarshal(s.body, in); err != nil {
			t.Errorf("%s: %v", op, err)
			continue
		}
		again, err := json.Marshal(in)
		if err != nil {
			t.Fatal(err)
		}
		var sent, read any
		if json.Unmarshal(s.body, &sent) != nil || json.Unmarshal(again, &read) != nil {
			t.Fatalf("%s does not come back", op)
		}
		compare(t, op, sent, read)
	}
	for op := range inputs {
		t.Errorf("no request of the corpus has the body of %s", op)
	}
	for op := range lambdaapi.Operations() {
		if !seen[op] && op != "InvokeWithResponseStream" { // has no recording
			t.Errorf("the corpus has no %s", op)
		}
	}
}

// compare tells what was sent and not read.
func compare(t *testing.T, at string, sent, read any) {
	t.Helper()
	if notRead[at] != "" {
		return
	}
	switch sent := sent.(type) {
	case map[string]any:
		have, _ := read.(map[string]any)
		for key, value := range sent {
			compare(t, at+"."+key, value, have[key])
		}
	default:
		if !reflect.DeepEqual(sent, read) {
			t.Errorf("%s: sent %v, read %v", at, sent, read)
		}
	}
}

// Every error of the SDK has the form in which we would send it.
func TestErrorsOfTheCorpus(t *testing.T) {
	for kind, s := range snapshots(t, "response_snapshot", ".error.snap") {
		w := httptest.NewRecorder()
		e := &lambdaapi.Exception{Type: kind, Message: "__Message__"}
		if kind == "TooManyRequestsException" {
			e.Reason, e.RetryAfter = "ConcurrentInvocationLimitExceeded", 1
		}
		lambdaapi.WriteException(w, e)
		if fmt.Sprint(w.Code) != s.first {
			t.Errorf("%s: status %d, want %s", kind, w.Code, s.first)
		}
		var want, have map[string]string
		if err := json.Unmarshal(s.body, &want); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(w.Body.Bytes(), &have); err != nil {
			t.Fatal(err)
		}
		if got := w.Header().Get("X-Amzn-Errortype"); got != want["__type"] {
			t.Errorf("%s: the header says %q", kind, got)
		}
		delete(want, "__type")
		delete(want, "EC2ErrorCode") // of clouds
		if have["Type"] != "User" && have["Type"] != "Server" {
			t.Errorf("%s: its type is %q", kind, have["Type"])
		}
		have["Type"] = want["Type"]
		if !reflect.DeepEqual(want, have) {
			t.Errorf("%s: body %v, want %v", kind, have, want)
		}
		for _, name := range []string{"Content-Type", "Retry-After"} {
			if (w.Header().Get(name) == "") != (s.header.Get(name) == "") {
				t.Errorf("%s: header %s is %q, want %q", kind, name, w.Header().Get(name), s.header.Get(name))
			}
		}
	}
}

// recorder compares what a server answers with the SDK's recordings: no member
// may have a name or a type that the SDK does not read.
type recorder struct {
	t       *testing.T
	next    http.Handler
	answers map[string]snapshot
	mu      sync.Mutex
	seen    map[string]bool // operations that have answered well
	after   func()          // once after the next answer
}

// onNext has f called after the next answer was made.
func (r *recorder) onNext(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.after = f
}

func record(t *testing.T, next http.Handler) *recorder {
	t.Helper()
	return &recorder{t: t, next: next, answers: snapshots(t, "response_snapshot", ".response.snap"), seen: map[string]bool{}}
}

// free are maps whose keys are the user's.
var free = []string{"Variables", "Tags", "AdditionalVersionWeights"}

func (r *recorder) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	name, _, _, err := lambdaapi.Route(req)
	if err != nil || strings.HasPrefix(name, "Invoke") {
		r.next.ServeHTTP(w, req)
		return
	}
	rec := httptest.NewRecorder()
	r.next.ServeHTTP(rec, req.WithContext(req.Context()))
	for k, v := range rec.Header() {
		w.Header()[k] = v
	}
	w.WriteHeader(rec.Code)
	if _, err := w.Write(rec.Body.Bytes()); err != nil {
		r.t.Log(err)
	}
	if rec.Code >= 300 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen[name] = true
	if r.after != nil {
		r.after()
		r.after = nil
	}
	if rec.Body.Len() == 0 {
		return
	}
	var want, have any
	if err := json.Unmarshal(rec.Body.Bytes(), &have); err != nil {
		r.t.Errorf("%s answered %q: %v", name, rec.Body, err)
		return
	}
	if err := json.Unmarshal(r.answers[name].body, &want); err != nil {
		r.t.Errorf("%s has a body, which the SDK does not read: %s", name, rec.Body)
		return
	}
	for _, sin := range unread(name, have, want) {
		r.t.Error(sin)
	}
}

func unread(at string, have, want any) (sins []string) {
	switch h := have.(type) {
	case map[string]any:
		w, ok := want.(map[string]any)
		if !ok {
			return []string{fmt.Sprintf("%s is an object, the SDK reads %v", at, want)}
		}
		if slices.Contains(free, at[strings.LastIndexByte(at, '.')+1:]) {
			return nil
		}
		for key, value := range h {
			member, ok := w[key]
			if !ok {
				sins = append(sins, fmt.Sprintf("the SDK does not read %s.%s", at, key))
				continue
			}
			sins = append(sins, unread(at+"."+key, value, member)...)
		}
	case []any:
		w, ok := want.([]any)
		if !ok {
			return []string{fmt.Sprintf("%s is a list, the SDK reads %v", at, want)}
		}
		for _, value := range h {
			sins = append(sins, unread(at, value, w[0])...)
		}
	default:
		if fmt.Sprintf("%T", have) != fmt.Sprintf("%T", want) {
			sins = append(sins, fmt.Sprintf("%s is %v, the SDK reads one like %v", at, have, want))
		}
	}
	return sins
}
