package api_test

import (
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// volatile is what differs between runs.
var volatile = regexp.MustCompile(`("(?:createdMs|startedMs|updatedMs|atMs|expiresMs|joinedMs)":)\d+|127\.0\.0\.1:\d+`)

// TestScripts runs testdata/rest/*: each command is a request,
//
//	http [fail=<code>] [no-token] [header=(Name: value)]
//	METHOD PATH
//	body
//
// and its output the status, telling headers and body. `go test -run Scripts
// -rewrite` writes what is answered now.
func TestScripts(t *testing.T) {
	datadriven.Walk(t, "testdata/rest", func(t *testing.T, path string) {
		s := newSite(t, 1)
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			switch d.Cmd {
			case "http":
				return s.script(t, d)
			case "run": // places an instance
				var vm string
				d.ScanArgs(t, "vm", &vm)
				s.cluster.Run(blixard.VMName(vm), 1, "node1", blixard.Running)
				return ""
			}
			d.Fatalf(t, "unknown command %s", d.Cmd)
			return ""
		})
	})
}

func (s *site) script(t *testing.T, d *datadriven.TestData) string {
	s.t = t
	first, body, _ := strings.Cut(d.Input, "\n")
	method, path, ok := strings.Cut(first, " ")
	if !ok {
		d.Fatalf(t, "the first line must be METHOD PATH")
	}
	var headers []string
	for _, arg := range d.CmdArgs {
		switch arg.Key {
		case "fail":
			code := blixard.Code(arg.Vals[0])
			s.cluster.FailWith(func(state.Envelope) error {
				return &blixard.Error{Code: code, Message: "as the test wants", Hint: "nothing helps"}
			})
			defer s.cluster.FailWith(nil)
		case "no-token":
			headers = append(headers, "Authorization", "")
		case "header":
			for _, h := range arg.Vals {
				name, value, _ := strings.Cut(h, ":")
				headers = append(headers, name, strings.TrimSpace(value))
			}
		}
	}
	resp, text := s.do(method, path, strings.TrimSpace(body), headers...)
	var b strings.Builder
	fmt.Fprintf(&b, "%d %s\n", resp.StatusCode, http.StatusText(resp.StatusCode))
	for _, h := range []string{"Content-Type", "Allow", "Retry-After", "Www-Authenticate"} {
		if v := resp.Header.Get(h); v != "" {
			fmt.Fprintf(&b, "%s: %s\n", h, v)
		}
	}
	b.WriteString(volatile.ReplaceAllString(strings.TrimSpace(text), "${1}…"))
	return b.String()
}

func TestHostileBodies(t *testing.T) {
	s := newSite(t, 1)
	index := s.cluster.View().Index
	big := `{"name":"a","spec":{"image":"` + strings.Repeat("x", 10<<20) + `"}}`
	for name, c := range map[string]struct {
		body   string
		status int
	}{
		"ten megabytes":       {big, 413},
		"deep lists":          {`{"name":` + strings.Repeat("[", 1<<20), 400},
		"deep objects":        {strings.Repeat(`{"spec":`, 1<<18), 400},
		"deep in a map":       {`{"spec":{"labels":` + strings.Repeat(`{"a":`, 1<<18), 400},
		"nul":                 {`{"name":"a\u0000b"}`, 400},
		"raw nul":             {"{\"name\":\"a\x00b\"}", 400},
		"bad utf-8":           {"{\"name\":\"a\xff\xfeb\"}", 400},
		"lone surrogate":      {`{"name":"\ud800"}`, 400},
		"huge number":         {`{"name":"a","spec":{"memoryMib":` + strings.Repeat("9", 4000) + `}}`, 400},
		"huge exponent":       {`{"name":"a","spec":{"memoryMib":1e999999999}}`, 400},
		"fraction":            {`{"name":"a","spec":{"memoryMib":1.5}}`, 400},
		"negative":            {`{"name":"a","spec":{"memoryMib":-1}}`, 400},
		"most negative":       {`{"name":"a","spec":{"replicas":-2147483648}}`, 400},
		"too many replicas":   {`{"name":"a","spec":{"replicas":2147483647}}`, 400},
		"wrong type":          {`{"name":["a"]}`, 400},
		"string for object":   {`{"name":"a","spec":"big"}`, 400},
		"twice":               {`{"name":"a","name":"b"}`, 400},
		"two documents":       {`{"name":"a"}{"name":"b"}`, 400},
		"a list":              {`[{"name":"a"}]`, 400},
		"not json":            {`name: a`, 400},
		"cut off":             {`{"name":"a","spec":{"replicas":`, 400},
		"shell":               {`{"name":"$(reboot)"}`, 400},
		"path":                {`{"name":"../../etc/passwd"}`, 400},
		"image path":          {`{"name":"a","spec":{"image":"../../etc/passwd"}}`, 400},
		"too many labels":     {`{"name":"a","spec":{"labels":{` + manyLabels(300) + `}}}`, 400},
		"many constraints":    {`{"name":"a","spec":{"constraints":["a=b` + strings.Repeat(",a=b", 100_000) + `"]}}`, 400},
		"bad key":             {`{"name":"a","idempotencyKey":"a\nb"}`, 400},
		"null":                {`null`, 400},
		"null everywhere":     {`{"name":null,"spec":null}`, 400},
		"unknown enum":        {`{"consistency":"x"}`, 400},
		"whitespace only":     {strings.Repeat(" ", 1<<20), 400},
		"health check in two": {`{"name":"a","spec":{"healthCheck":{"kind":"tcp","port":99999999999}}}`, 400},
	} {
		t.Run(name, func(t *testing.T) {
			s.t = t
			start := time.Now()
			resp, body := s.do("POST", "/v1/vms", c.body)
			if resp.StatusCode != c.status || resp.Header.Get("Content-Type") != "application/problem+json" {
				t.Errorf("%s %.300s, want %d", resp.Status, body, c.status)
			}
			if len(body) > 4096 {
				t.Errorf("the answer is %d bytes long", len(body))
			}
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("it took %s", took)
			}
		})
	}
	if now := s.cluster.View().Index; now != index {
		t.Errorf("something was proposed: index %d, was %d", now, index)
	}
}

func manyLabels(n int) string {
	var parts []string
	for i := range n {
		parts = append(parts, fmt.Sprintf(`"k%d":"v"`, i))
	}
	return strings.Join(parts, ",")
}
