package api_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/internal/api"
	"github.com/blixard/blixard/internal/api/apitest"
)

// serveBoth serves one handler twice: through Listen, and by net/http alone.
func serveBoth(t *testing.T) (lean, plain string) {
	t.Helper()
	h := api.New(api.Options{Backend: apitest.New(1).Node("node1"), Release: "v0-test", Token: func() string { return token }, Timeout: 5 * time.Second})
	serve := func(wrap func(net.Listener) net.Listener) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		address := l.Addr().String()
		server := api.NewServer(h)
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := server.Serve(wrap(l)); err != http.ErrServerClosed { // as documented
				t.Errorf("serving: %v", err)
			}
		})
		t.Cleanup(func() {
			if err := server.Close(); err != nil {
				t.Errorf("closing: %v", err)
			}
			wg.Wait()
		})
		return address
	}
	return serve(h.Listen), serve(func(l net.Listener) net.Listener { return l })
}

// raw sends parts, one write each, and reads as many answers.
func raw(t *testing.T, address string, answers int, parts ...string) []string {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	br := bufio.NewReader(c)
	for _, p := range parts {
		if _, err := c.Write([]byte(p)); err != nil {
			t.Fatal(err)
		}
	}
	var out []string
	for range answers {
		res, err := http.ReadResponse(br, &http.Request{Method: http.MethodPost})
		if err != nil {
			out = append(out, "error: "+err.Error())
			return out
		}
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, fmt.Sprintf("%d %s %q retry=%q", res.StatusCode, res.Header.Get("Content-Type"), body, res.Header.Get("Retry-After")))
	}
	return out
}

func rawPost(path, body string, headers ...string) string {
	return "POST " + path + " HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + token + "\r\nContent-Type: application/proto\r\n" +
		strings.Join(append(headers, ""), "\r\n") + fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(body), body)
}

// TestListenAnswersLikeNetHTTP compares what is answered without net/http with
// what net/http answers, for requests that are in order and ones that are not.
func TestListenAnswersLikeNetHTTP(t *testing.T) {
	lean, plain := serveBoth(t)
	message := func(m proto.Message) string {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	const get, version = "/blixard.v1.VMService/GetVM", "/blixard.v1.SystemService/GetVersion"
	none := message(&blixardv1.GetVMRequest{Name: "nowhere"})
	bad := message(&blixardv1.CreateVMRequest{Name: "No Name"})
	for name, c := range map[string]struct { //order:any cases do not depend on each other
		answers int
		parts   []string
	}{
		"answer":             {1, []string{rawPost(version, "")}},
		"refusal":            {1, []string{rawPost(get, none)}},
		"invalid":            {1, []string{rawPost("/blixard.v1.VMService/CreateVM", bad)}},
		"not a message":      {1, []string{rawPost(get, "\xff\xff\xff")}},
		"connect version":    {1, []string{rawPost(version, "", "Connect-Protocol-Version: 1")}},
		"foreign version":    {1, []string{rawPost(version, "", "Connect-Protocol-Version: 2")}},
		"timeout":            {1, []string{rawPost(version, "", "Connect-Timeout-Ms: 2000")}},
		"no timeout":         {1, []string{rawPost(version, "", "Connect-Timeout-Ms: soon")}},
		"keep-alive":         {1, []string{rawPost(version, "", "Connection: keep-alive")}},
		"lower case":         {1, []string{strings.Replace(rawPost(version, ""), "Authorization", "authorization", 1)}},
		"wrong token":        {1, []string{strings.Replace(rawPost(version, ""), token, "guess", 1)}},
		"two in one":         {2, []string{rawPost(version, "") + rawPost(get, none)}},
		"one after another":  {2, []string{rawPost(version, ""), rawPost(get, none)}},
		"then another kind":  {2, []string{rawPost(version, ""), "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"}},
		"in two parts":       {1, []string{rawPost(get, none)[:40], rawPost(get, none)[40:]}},
		"json":               {1, []string{strings.Replace(rawPost(version, "{}"), "application/proto", "application/json", 1)}},
		"unknown procedure":  {1, []string{rawPost("/blixard.v1.VMService/Nothing", "")}},
		"query":              {1, []string{rawPost(version+"?x=1", "")}},
		"no host":            {1, []string{strings.Replace(rawPost(version, ""), "Host: x\r\n", "", 1)}},
		"two hosts":          {1, []string{rawPost(version, "", "Host: y")}},
		"two lengths":        {1, []string{rawPost(get, none, "Content-Length: 3")}},
		"negative length":    {1, []string{strings.Replace(rawPost(version, ""), "Content-Length: 0", "Content-Length: -1", 1)}},
		"chunked":            {1, []string{strings.Replace(rawPost(version, ""), "Content-Length: 0\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 1)}},
		"length and chunked": {1, []string{rawPost(version, "", "Transfer-Encoding: identity, chunked")}},
		"folded header":      {1, []string{rawPost(version, "", "X-A: 1\r\n 2")}},
		"space before colon": {1, []string{rawPost(version, "", "X-A : 1")}},
		"control character":  {1, []string{rawPost(version, "", "X-A: \x01")}},
		"http 1.0":           {1, []string{strings.Replace(rawPost(version, ""), "HTTP/1.1", "HTTP/1.0", 1)}},
		"gzip":               {1, []string{rawPost(version, "x", "Content-Encoding: gzip")}},
		"rest":               {1, []string{"GET /v1/version HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + token + "\r\n\r\n"}},
		"not http":           {1, []string{"hello, this is no HTTP at all\r\n\r\n"}},
	} {
		t.Run(name, func(t *testing.T) {
			got, want := raw(t, lean, c.answers, c.parts...), raw(t, plain, c.answers, c.parts...)
			if strings.Join(got, "\n") != strings.Join(want, "\n") {
				t.Errorf("answered\n%s\nnet/http answers\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		})
	}
}

// TestListenCloses waits for nobody who has nothing to say.
func TestListenCloses(t *testing.T) {
	h := api.New(api.Options{Backend: apitest.New(1).Node("node1"), Release: "v0-test"})
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := h.Listen(inner)
	c, err := net.Dial("tcp", inner.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("PO")); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Accept(); err == nil {
		t.Error("a closed listener accepts")
	}
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(c); err != nil {
		if ne, ok := err.(net.Error); ok && ne.Timeout() { //nolint:errorlint // of a plain connection
			t.Error("the connection is still open")
		}
	}
}
