package api_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
	"github.com/blixard/blixard/internal/api"
	"github.com/blixard/blixard/internal/api/apitest"
)

const token = "let-me-in"

// site is a cluster in memory whose nodes serve the API on loopback.
type site struct {
	t       *testing.T
	cluster *apitest.Cluster
	servers map[string]*http.Server // by node
	urls    map[string]string
	images  map[string]*apitest.Images
	serving map[string]*api.Handler
}

func newSite(t *testing.T, nodes int) *site {
	t.Helper()
	s := &site{t: t, cluster: apitest.New(nodes), servers: map[string]*http.Server{}, urls: map[string]string{}, images: map[string]*apitest.Images{}, serving: map[string]*api.Handler{}}
	for i := range nodes {
		s.serve([]string{"node1", "node2", "node3"}[i])
	}
	return s
}

// serve starts the server of one node.
func (s *site) serve(name string) {
	s.t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	address := listener.Addr().String()
	s.cluster.SetAddress(blixard.NodeName(name), address)
	images := &apitest.Images{}
	s.images[name] = images
	var mu sync.Mutex
	peers := map[string]*client.Client{}
	h := api.New(api.Options{
		Backend: s.cluster.Node(blixard.NodeName(name)), Guests: apitest.Guests{Node: name}, Images: images, Release: "v0-test",
		Token: func() string { return token }, Timeout: 5 * time.Second,
		Peers: func(address string) (*client.Client, error) {
			mu.Lock()
			defer mu.Unlock()
			if c := peers[address]; c != nil {
				return c, nil
			}
			c, err := client.New(client.Options{Addresses: []string{address}, Token: token, ForwardedBy: name})
			if err == nil {
				peers[address] = c
				s.t.Cleanup(c.Close)
			}
			return c, err
		},
	})
	s.serving[name] = h
	server := api.NewServer(h)
	s.servers[name], s.urls[name] = server, "http://"+address
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := server.Serve(h.Listen(listener)); err != http.ErrServerClosed { // as documented
			s.t.Errorf("serving %s: %v", name, err)
		}
	})
	s.t.Cleanup(func() {
		server.Close()
		wg.Wait()
	})
}

// client returns a client of the named nodes, all in order if none is named.
func (s *site) client(nodes ...string) *client.Client {
	s.t.Helper()
	if len(nodes) == 0 {
		nodes = []string{"node1"}
	}
	o := client.Options{Token: token, Actor: "alice", RetryFor: 5 * time.Second}
	for _, n := range nodes {
		o.Addresses = append(o.Addresses, s.urls[n])
	}
	c, err := client.New(o)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(c.Close)
	return c
}

// do makes a plain request with the token.
func (s *site) do(method, path, body string, headers ...string) (*http.Response, string) {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), method, s.urls["node1"]+path, strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i+1 < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp, string(data)
}

// create registers a VM.
func (s *site) create(name string, replicas int32) {
	s.t.Helper()
	_, err := s.client().CreateVM(s.t.Context(), &blixardv1.CreateVMRequest{Name: name, Spec: &blixardv1.VMSpec{Replicas: &replicas}})
	if err != nil {
		s.t.Fatalf("creating %s: %v", name, err)
	}
}

func wantCode(t *testing.T, err error, code blixard.Code) *blixard.Error {
	t.Helper()
	if err == nil || blixard.CodeOf(err) != code {
		t.Fatalf("the error is %v (%s), want %s", err, blixard.CodeOf(err), code)
	}
	return blixardv1.AsError(err)
}

func short(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}
