package main

import (
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/api"
	"github.com/blixard/blixard/internal/api/apitest"
	"github.com/blixard/blixard/internal/config"
)

// member serves the API of a cluster in memory, before which stands wrap.
func member(t *testing.T, wrap func(http.Handler) http.Handler) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := api.New(api.Options{Backend: apitest.New(1).Node("node1"), Token: func() string { return apitest.Secret }})
	server := api.NewServer(wrap(h))
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		<-served
	})
	return l.Addr().String()
}

// TestFailedJoinLeavesNothing: a join that certainly was not made leaves neither
// files nor directories; one that may have been made can be taken up.
func TestFailedJoinLeavesNothing(t *testing.T) {
	plain := func(h http.Handler) http.Handler { return h }
	lost := func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, "/Join") {
				panic(http.ErrAbortHandler) // the answer is lost
			}
			h.ServeHTTP(w, r)
		})
	}
	unknown := "blx1." + strings.Repeat("a", 16) + "." + strings.Repeat("A", 43)
	for name, c := range map[string]struct {
		at, token string
		code      blixard.Code
		left      string
	}{
		"nobody is there":    {"127.0.0.1:1", unknown, blixard.CodeUnavailable, ""},
		"the token is wrong": {member(t, plain), unknown, blixard.CodeDenied, ""},
		"it is no token":     {member(t, plain), "mine", blixard.CodeInvalid, ""},
		"the answer is lost": {member(t, lost), unknown, blixard.CodeUnavailable, "join.key"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			top := filepath.Join(t.TempDir(), "a")
			cfg := config.Default()
			cfg.Cluster.NodeID, cfg.Cluster.DataDir, cfg.Cluster.Token, cfg.Cluster.Join = "node9", filepath.Join(top, "b", "c"), c.token, []string{c.at}
			_, err := join(t.Context(), cfg, false, io.Discard)
			if blixard.CodeOf(err) != c.code {
				t.Fatalf("the error is %v (%s), want %s", err, blixard.CodeOf(err), c.code)
			}
			if c.left == "" {
				if _, err := os.Stat(top); !os.IsNotExist(err) {
					t.Errorf("something is left: %v", err)
				}
				return
			}
			if _, err := os.Stat(filepath.Join(cfg.Cluster.DataDir, c.left)); err != nil || !strings.Contains(textOf(join(t.Context(), cfg, false, io.Discard)), "may have taken") {
				t.Errorf("it cannot be taken up: %v", err)
			}
		})
	}
}

func textOf(_ any, err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
