package api_test

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/api/blixard/v1/blixardv1connect"
)

// h2c is an HTTP client that speaks HTTP/2 without TLS.
func h2c() *http.Client {
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	return &http.Client{Transport: &http.Transport{Protocols: p}}
}

func TestEveryProtocolSpeaksTheSame(t *testing.T) {
	s := newSite(t, 1)
	h1 := &http.Client{Transport: &http.Transport{}}
	transports := map[string]connect.Transport{
		"connect":      connecthttp.NewTransport(h1, s.urls["node1"]),
		"connect-json": connecthttp.NewTransport(h1, s.urls["node1"], connecthttp.WithProtoJSON()),
		"connect-h2":   connecthttp.NewTransport(h2c(), s.urls["node1"]),
		"grpc":         connecthttp.NewTransport(h2c(), s.urls["node1"], connecthttp.WithGRPC()),
		"grpc-web":     connecthttp.NewTransport(h1, s.urls["node1"], connecthttp.WithGRPCWeb()),
	}
	for name, transport := range transports {
		t.Run(name, func(t *testing.T) {
			vms := blixardv1connect.NewVMServiceClient(connect.NewClient(transport))
			ctx, info := connect.NewClientContext(short(t))
			info.RequestHeader().Set("Authorization", "Bearer "+token)
			made, err := vms.CreateVM(ctx, &blixardv1.CreateVMRequest{Name: "vm-" + name, Spec: &blixardv1.VMSpec{Env: map[string]string{"A": "ü"}}})
			if err != nil {
				t.Fatal(err)
			}
			ctx, info = connect.NewClientContext(short(t))
			info.RequestHeader().Set("Authorization", "Bearer "+token)
			got, err := vms.GetVM(ctx, &blixardv1.GetVMRequest{Name: "vm-" + name})
			if err != nil {
				t.Fatal(err)
			}
			if got.Vm.Version != made.Version || got.Vm.Spec.Env["A"] != "ü" || got.Vm.Spec.MemoryMib != 512 || got.Vm.Phase != "Pending" {
				t.Errorf("got %v", got.Vm)
			}
			ctx, info = connect.NewClientContext(short(t))
			info.RequestHeader().Set("Authorization", "Bearer "+token)
			_, err = vms.GetVM(ctx, &blixardv1.GetVMRequest{Name: "vm-" + name + "x"})
			e, _, ok := blixardv1.FromRPC(err)
			if !ok || e.Code != blixard.CodeNotFound || !strings.Contains(e.Hint, "vm-"+name) {
				t.Errorf("the error is %v with %+v", err, e)
			}
			_, err = vms.GetVM(short(t), &blixardv1.GetVMRequest{Name: "vm-" + name})
			if connect.CodeOf(err) != connect.CodeUnauthenticated {
				t.Errorf("without a token: %v", err)
			}
		})
	}
}

func TestRESTHasNumbersAndEveryField(t *testing.T) {
	s := newSite(t, 2)
	s.create("web", 2)
	s.cluster.Run("web", 1, "node1", blixard.Running)
	resp, body := s.do("GET", "/v1/vms/web", "")
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "application/json" {
		t.Fatalf("%s %s", resp.Status, body)
	}
	var got struct {
		VM struct {
			Phase     string
			Version   uint64
			Ready     *int
			Instances []struct {
				ID, Node, State, Address string
				Generation               uint64
				EndedMS                  *int64 `json:"endedMs"`
			}
		}
		Index uint64
	}
	if err := json.Unmarshal([]byte(body), &got); err != nil {
		t.Fatalf("%v in %s", err, body)
	}
	i := got.VM.Instances[0]
	if i.ID != "web-1" || i.Node != "node1" || i.State != "Running" || i.Generation != 1 || i.Address != "127.0.0.1:8080" || i.EndedMS == nil || *got.VM.Ready != 1 || got.Index == 0 {
		t.Errorf("got %+v of %s", got, body)
	}
	_, body = s.do("GET", "/v1/cluster", "")
	var status struct {
		Leader string
		Nodes  []struct{ ID, State, Role, Address string }
	}
	if err := json.Unmarshal([]byte(body), &status); err != nil || status.Leader != "node1" || len(status.Nodes) != 2 {
		t.Fatalf("%v in %s", err, body)
	}
	if n := status.Nodes[0]; n.ID != "node1" || n.State != "Ready" || n.Role != "leader" || "http://"+n.Address != s.urls["node1"] {
		t.Errorf("node %+v", n)
	}
}

func TestMessagesMarshalAsREST(t *testing.T) {
	s := newSite(t, 1)
	s.create("web", 1)
	list, err := s.client().ListVMs(short(t), &blixardv1.ListVMsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(map[string]any{"all": list.Vms})
	if err != nil {
		t.Fatal(err)
	}
	var back struct{ All []*blixardv1.VM }
	if err := json.Unmarshal(text, &back); err != nil {
		t.Fatal(err)
	}
	if back.All[0].Version != list.Vms[0].Version || !strings.Contains(string(text), `"instances":[]`) || strings.Contains(string(text), "antiAffinityGroup") {
		t.Errorf("%s", text)
	}
}

// TestOpenAPIAgreesWithTheRoutes asks for every path of the document: all are
// served, with the methods it names.
func TestOpenAPIAgreesWithTheRoutes(t *testing.T) {
	s := newSite(t, 1)
	resp, body := s.do("GET", "/openapi.json", "")
	if resp.StatusCode != 200 {
		t.Fatal(resp.Status)
	}
	var doc struct {
		OpenAPI string
		Paths   map[string]map[string]any
	}
	if err := json.Unmarshal([]byte(body), &doc); err != nil || doc.OpenAPI != "3.1.0" {
		t.Fatalf("%v, %s", err, doc.OpenAPI)
	}
	if len(doc.Paths) < 30 {
		t.Errorf("%d paths", len(doc.Paths))
	}
	for path, methods := range doc.Paths {
		concrete := strings.NewReplacer("{name}", "x", "{vm}", "x", "{id}", "x", "{digest}", strings.Repeat("a", 64)).Replace(path)
		resp, body := s.do("PURGE", concrete, "")
		if resp.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("%s answers %s %s", path, resp.Status, body)
			continue
		}
		for m := range methods {
			if !strings.Contains(resp.Header.Get("Allow"), strings.ToUpper(m)) && !strings.HasPrefix(path, "/v1/images") {
				t.Errorf("%s %s is not allowed: %s", m, path, resp.Header.Get("Allow"))
			}
		}
	}
}
