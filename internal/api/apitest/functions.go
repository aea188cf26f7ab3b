package apitest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"sync"
	"time"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
	"github.com/blixard/blixard/internal/api"
)

// Code keeps code in memory, without looking into it.
type Code struct {
	mu   sync.Mutex
	zips map[string][]byte
}

var _ api.Code = (*Code)(nil)

// Put implements api.Code. What begins with "broken" is refused.
func (c *Code) Put(_ context.Context, zip io.Reader) (client.Code, error) {
	data, err := io.ReadAll(zip)
	if err != nil {
		return client.Code{}, err
	}
	if bytes.HasPrefix(data, []byte("broken")) {
		return client.Code{}, blixard.Invalid("code", "zip it again", "the code is no zip")
	}
	sum := sha256.Sum256(data)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.zips == nil {
		c.zips = map[string][]byte{}
	}
	digest := hex.EncodeToString(sum[:])
	c.zips[digest] = data
	return client.Code{Digest: digest, Bytes: int64(len(data)), UnzippedBytes: int64(len(data)), Files: 1}, nil
}

// PutCopy implements api.Code.
func (c *Code) PutCopy(ctx context.Context, zip io.Reader) (client.Code, error) {
	return c.Put(ctx, zip)
}

// Open implements api.Code.
func (c *Code) Open(_ context.Context, digest string, _ bool) (io.ReadCloser, int64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	data, ok := c.zips[digest]
	if !ok {
		return nil, 0, blixard.Errorf(blixard.CodeNotFound, "there is no code %.20s", digest)
	}
	return io.NopCloser(bytes.NewReader(data)), int64(len(data)), nil
}

// Inspect implements api.Code.
func (c *Code) Inspect(ctx context.Context, digest string, _ blixard.FunctionSpec) (int64, error) {
	_, size, err := c.Open(ctx, digest, true)
	return size, err
}

// Functions answers calls with their payload. The function "broken" fails, "full"
// is at its limit.
type Functions struct{ Node string }

var _ api.Functions = Functions{}

// Invoke implements api.Functions.
func (f Functions) Invoke(_ context.Context, inv *blixard.Invocation, sink blixard.ResponseSink) (blixard.InvocationReport, error) {
	report := blixard.InvocationReport{
		RequestID: inv.RequestID, Node: blixard.NodeName(f.Node), Instance: "fn-1", Start: blixard.StartPooled, MemoryMiB: 128, UsedMiB: 12,
		Parts: blixard.Breakdown{Restore: 8 * time.Millisecond, Handler: 1500 * time.Microsecond, Total: 61300 * time.Microsecond},
	}
	if inv.LogTail {
		report.Log = []byte("START RequestId: 1 Version: $LATEST\nhello\n")
	}
	answer := inv.Payload
	switch inv.Function {
	case "full":
		return report, &blixard.Error{Code: blixard.CodeOverloaded, Message: "the function full runs as often at once as it may", Hint: "try again"}
	case "broken":
		report.Error, report.Start = &blixard.FunctionError{Kind: "Unhandled", Type: "Runtime.ExitError"}, blixard.StartWarm
		answer = []byte(`{"errorMessage":"it broke","errorType":"Runtime.ExitError"}`)
	}
	if err := sink.Begin(blixard.ResponseHead{ContentType: "application/json"}); err != nil {
		return report, err
	}
	_, err := sink.Write(answer)
	return report, err
}

// Enqueue implements api.Functions.
func (f Functions) Enqueue(_ context.Context, inv *blixard.Invocation) error {
	if inv.RequestID == "" {
		inv.RequestID = "11111111-2222-4333-a444-555555555555"
	}
	return nil
}

// Here implements api.Functions: node2 has an instance of "warm".
func (f Functions) Here() []api.OnNode {
	if f.Node != "node2" {
		return nil
	}
	return []api.OnNode{{Function: "warm", What: &blixardv1.FunctionOnNode{Node: f.Node, Instances: 1, Warm: 1, Slots: 2, Template: "ready"}}}
}

// Metrics implements api.Functions: each node had 400 calls, one of four cold.
func (f Functions) Metrics(blixard.FunctionName, int64) *blixardv1.GetFunctionMetricsResponse {
	m := &blixardv1.GetFunctionMetricsResponse{Invocations: 400, ColdStarts: 100, Errors: 1}
	for i := range 4 {
		start, total := "warm", 3.0
		if i == 0 {
			start, total = "pooled", 82.0
		}
		m.Recent = append(m.Recent, &blixardv1.FunctionReport{
			RequestId: "r", Node: f.Node, Start: start, AtMs: int64(i), Parts: &blixardv1.FunctionBreakdown{HandlerMs: 450, TotalMs: total},
		})
	}
	return m
}

// Logs implements api.Functions.
func (f Functions) Logs(_ context.Context, _ api.FunctionLogs, take func(*blixardv1.LogsResponse) error) error {
	return take(&blixardv1.LogsResponse{Instance: "fn-1", Data: []byte("hello from " + f.Node + "\n")})
}

// Activity implements api.Functions.
func (f Functions) Activity(ctx context.Context, _ blixard.FunctionName, take func(*blixardv1.FunctionActivity) error) error {
	if err := take(&blixardv1.FunctionActivity{AtMs: 1, Node: f.Node, Kind: "start", Message: "an instance is started"}); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// Explain implements api.Functions.
func (f Functions) Explain(blixard.FunctionName, string) (*blixardv1.ExplainFunctionResponse, error) {
	return &blixardv1.ExplainFunctionResponse{Chosen: "node1", Nodes: []*blixardv1.FunctionCandidate{
		{Node: "node1", Fits: true, Score: 700, Resources: 300}, {Node: "node2", Reasons: []string{"it is draining"}},
	}}, nil
}

// Host implements api.Functions.
func (f Functions) Host(u *blixard.FunctionURL) string { return u.ID + ".lambda-url.test" }

// URLs implements api.Functions.
func (f Functions) URLs(t *blixard.Trigger) []string { return []string{"http://127.0.0.1:1" + t.Path} }
