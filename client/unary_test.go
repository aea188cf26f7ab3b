package client

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func newTestUnary(t *testing.T) *unaryHTTP {
	t.Helper()
	u := newUnaryHTTP((&net.Dialer{}).DialContext, http.DefaultClient)
	t.Cleanup(u.CloseIdleConnections)
	return u
}

func post(ctx context.Context, t *testing.T, u *unaryHTTP, url, body string) (string, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Test", "yes")
	res, err := u.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return string(b), err
}

func TestUnaryHTTP(t *testing.T) {
	long := strings.Repeat("0123456789", 100_000)
	connections := map[net.Addr]bool{}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil || r.Header.Get("X-Test") != "yes" {
			t.Errorf("reading the request: %v, headers %v", err, r.Header)
		}
		switch r.URL.Path {
		case "/long":
			io.WriteString(w, long)
		case "/hints":
			w.WriteHeader(http.StatusEarlyHints)
			io.WriteString(w, "after hints")
		default:
			w.Write(body)
		}
	}))
	s.Config.ConnState = func(c net.Conn, state http.ConnState) {
		if state == http.StateNew {
			connections[c.RemoteAddr()] = true
		}
	}
	s.Start()
	defer s.Close()
	u := newTestUnary(t)
	for path, want := range map[string]string{"/echo": "hello", "/long": long, "/hints": "after hints"} {
		for range 3 {
			got, err := post(t.Context(), t, u, s.URL+path, "hello")
			if err != nil || got != want {
				t.Fatalf("%s: %d bytes, %v; want %d bytes", path, len(got), err, len(want))
			}
		}
	}
	s.Close() // and no connection is made any more
	if len(connections) != 1 {
		t.Errorf("%d connections were made for calls one after the other, want 1", len(connections))
	}
}

// TestUnaryHTTPRepeats makes the call again that fell into the closing of an
// idle connection, on a new one.
func TestUnaryHTTPRepeats(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	served := make(chan struct{})
	go func() {
		defer close(served)
		for range 3 { // each connection serves one call and is closed
			c, err := l.Accept()
			if err != nil {
				return
			}
			buf := make([]byte, 4096)
			if _, err := c.Read(buf); err != nil {
				t.Errorf("reading: %v", err)
			}
			if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"); err != nil {
				t.Errorf("writing: %v", err)
			}
			c.Close()
		}
	}()
	u := newTestUnary(t)
	for range 3 {
		if got, err := post(t.Context(), t, u, "http://"+l.Addr().String()+"/x", "hello"); err != nil || got != "ok" {
			t.Fatalf("%q, %v", got, err)
		}
	}
	<-served
}

func TestUnaryHTTPEndsWithContext(t *testing.T) {
	release := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release }))
	defer s.Close()
	defer close(release)
	u := newTestUnary(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := post(ctx, t, u, s.URL, "hello"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the error is %v", err)
	}
	if n := len(u.idle[strings.TrimPrefix(s.URL, "http://")]); n != 0 {
		t.Errorf("%d connections are kept of a call that was broken off", n)
	}
}

// TestUnaryHTTPRefusesHugeHeads bounds what a node can make a client read.
func TestUnaryHTTPRefusesHugeHeads(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X-Long", strings.Repeat("x", 2*maxHeaderBytes))
	}))
	defer s.Close()
	if _, err := post(t.Context(), t, newTestUnary(t), s.URL, "hello"); err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("the error is %v", err)
	}
}
