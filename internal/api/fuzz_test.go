package api_test

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/internal/api"
	"github.com/blixard/blixard/internal/api/apitest"
)

// FuzzREST sends any method, path and body to a node. Nothing panics, every
// refusal is a problem, every other answer is JSON, and what was refused
// changed nothing.
func FuzzREST(f *testing.F) {
	for _, seed := range [][3]string{
		{"POST", "/v1/vms", `{"name":"web","spec":{"replicas":2,"labels":{"a":"b"},"publish":[{"guestPort":80}]}}`},
		{"GET", "/v1/vms?limit=1&labels=a,b", ""},
		{"PUT", "/v1/vms/web", `{"spec":{"healthCheck":{"kind":"tcp","port":1}}}`},
		{"POST", "/v1/apply", `{"vms":[{"name":"a"},{"name":"b","desired":"stopped"}]}`},
		{"POST", "/v1/vms/web/scale", `{"replicas":1e9}`},
		{"DELETE", "/v1/vms/%2e%2e%2f?expectVersion=18446744073709551615", ""},
		{"PATCH", "/v1/nodes/node1", `{"setLabels":{"a":"b"},"dropLabels":["c"]}`},
		{"POST", "/v1/explain", `{"spec":{"constraints":["memory>=1G"]}}`},
		{"POST", "/v1/join", `{"token":"blx1.a.b"}`},
		{"GET", "/v1/images/sha256:00", ""},
		{"GET", "//v1//vms/../%zz", "\x00\xff"},
	} {
		f.Add(seed[0], seed[1], seed[2])
	}
	cluster := apitest.New(1)
	h := api.New(api.Options{Backend: cluster.Node("node1"), Images: &apitest.Images{}})
	f.Fuzz(func(t *testing.T, method, path, body string) {
		path, _, _ = strings.Cut(path, "#")
		if !strings.HasPrefix(path, "/") {
			return
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond) // watches never end
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, method, "http://node"+path, strings.NewReader(body))
		if err != nil {
			return
		}
		req.Header.Set("Content-Type", "application/json")
		version := stateOf(cluster)
		rec, start := httptest.NewRecorder(), time.Now()
		h.ServeHTTP(rec, req)
		if took := time.Since(start); took > 2*time.Second {
			t.Fatalf("%s %q %q took %s", method, path, body, took)
		}
		resp := rec.Result()
		data, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		ct := resp.Header.Get("Content-Type")
		switch {
		case ct == "text/event-stream", ct == "text/plain; charset=utf-8", ct == "application/octet-stream", ct == "application/x-tar", strings.HasPrefix(path, "/blixard."):
			return
		case !utf8.Valid(data) || !json.Valid(data):
			t.Fatalf("%s %q answers %d %s %q", method, path, resp.StatusCode, ct, data)
		case resp.StatusCode >= 400:
			var p struct {
				Status       int
				Detail, Code string
			}
			if err := json.Unmarshal(data, &p); path != "/readyz" && (err != nil || ct != "application/problem+json" || p.Status != resp.StatusCode || p.Detail == "" || p.Code == "") {
				t.Fatalf("%s %q answers %d %s %s", method, path, resp.StatusCode, ct, data)
			}
			if resp.StatusCode == 500 {
				t.Fatalf("%s %q %q answers %s", method, path, body, data)
			}
			if now := stateOf(cluster); now != version {
				t.Fatalf("%s %q was refused with %s and changed the state from %v to %v", method, path, data, version, now)
			}
		}
	})
}

// stateOf tells states apart by what users can change.
func stateOf(c *apitest.Cluster) [4]uint64 {
	v := c.View()
	return [4]uint64{uint64(v.VMCount()), v.Cluster().NextEvent, uint64(v.NodeCount()), v.Cluster().NextRaftID}
}

// FuzzJSON decodes anything into a request, and what can be decoded survives a
// round trip.
func FuzzJSON(f *testing.F) {
	f.Add(`{"name":"web","spec":{"replicas":0,"env":{"A":"\u2028"},"restart":{"mode":"never"}},"start":false}`)
	f.Add(`{"spec":{"command":["a","b"],"preferences":[{"constraint":"a=b","weight":3}],"memory_mib":"5"}}`)
	f.Add(`{"name":"\ud83d\ude00\u0000"}`)
	f.Fuzz(func(t *testing.T, text string) {
		var m, back blixardv1.CreateVMRequest
		if blixardv1.DecodeJSON([]byte(text), &m) != nil {
			return
		}
		first := blixardv1.AppendJSON(nil, &m)
		if err := blixardv1.DecodeJSON(first, &back); err != nil {
			t.Fatalf("%q gives %s, which cannot be read: %v", text, first, err)
		}
		if second := blixardv1.AppendJSON(nil, &back); string(first) != string(second) {
			t.Fatalf("%q gives %s, then %s", text, first, second)
		}
	})
}
