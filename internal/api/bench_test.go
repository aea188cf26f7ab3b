package api_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync/atomic"
	"testing"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"google.golang.org/protobuf/proto"

	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/api/blixard/v1/blixardv1connect"
	"github.com/blixard/blixard/internal/api"
	"github.com/blixard/blixard/internal/api/apitest"
	"github.com/blixard/blixard/internal/state"
)

// stub acknowledges every proposal at once, so that only the API is measured.
type stub struct{ *apitest.Backend }

func (stub) Propose(context.Context, state.Envelope) (state.Outcome, error) {
	return state.Outcome{Version: 7}, nil
}

func benchRequest(i int) *blixardv1.CreateVMRequest {
	return &blixardv1.CreateVMRequest{Name: "vm-" + strconv.Itoa(i), Spec: &blixardv1.VMSpec{Image: "builtin", MemoryMib: 256, Labels: map[string]string{"app": "web"}}}
}

// BenchmarkCreateVM measures a create: "handler" is the handler alone on a
// Connect request, the others are whole requests over loopback by 16 clients.
func BenchmarkCreateVM(b *testing.B) {
	h := api.New(api.Options{Backend: stub{apitest.New(1).Node("node1")}, Token: func() string { return token }})
	body, err := proto.Marshal(benchRequest(1))
	if err != nil {
		b.Fatal(err)
	}
	b.Run("handler", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			req := httptest.NewRequest("POST", blixardv1connect.VMServiceCreateVMProcedure, bytes.NewReader(body))
			req.Header.Set("Content-Type", "application/proto")
			req.Header.Set("Authorization", "Bearer "+token)
			rec := httptest.NewRecorder()
			h.ServeHTTP(rec, req)
			if rec.Code != 200 {
				b.Fatal(rec.Code, rec.Body)
			}
		}
	})
	url := benchServe(b, h)
	h1 := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}
	for name, transport := range map[string]connect.Transport{
		"connect": connecthttp.NewTransport(h1, url, connecthttp.WithCompressors()),
		"grpc":    connecthttp.NewTransport(h2c(), url, connecthttp.WithGRPC(), connecthttp.WithCompressors()),
	} {
		b.Run(name, func(b *testing.B) {
			vms := blixardv1connect.NewVMServiceClient(connect.NewClient(transport))
			var n atomic.Int64
			b.ReportAllocs()
			b.SetParallelism(8)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					ctx, info := connect.NewClientContext(b.Context())
					info.RequestHeader().Set("Authorization", "Bearer "+token)
					if _, err := vms.CreateVM(ctx, benchRequest(int(n.Add(1)))); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
	b.Run("rest", func(b *testing.B) {
		b.ReportAllocs()
		b.SetParallelism(8)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				req, err := http.NewRequest("POST", url+"/v1/vms", bytes.NewReader([]byte(`{"name":"vm","spec":{"image":"builtin","memoryMib":256,"labels":{"app":"web"}}}`)))
				if err != nil {
					b.Error(err)
					return
				}
				req.Header.Set("Content-Type", "application/json")
				req.Header.Set("Authorization", "Bearer "+token)
				resp, err := h1.Do(req)
				if err != nil {
					b.Error(err)
					return
				}
				if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.Body.Close() != nil || resp.StatusCode != 200 {
					b.Error(err, resp.Status)
					return
				}
			}
		})
	})
}

func benchServe(b *testing.B, h http.Handler) string {
	b.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	server := api.NewServer(h)
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	b.Cleanup(func() {
		server.Close()
		<-done
	})
	return "http://" + listener.Addr().String()
}
