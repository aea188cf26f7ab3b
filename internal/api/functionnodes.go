package api

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
	"github.com/blixard/blixard/internal/state"
)

// peerWithin bounds how long another node is waited for that only adds to an
// answer.
const peerWithin = 2 * time.Second

// maxSamples bounds the invocations of one node that metrics are made of.
const maxSamples = 1000

func millis(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e6 }

// functionPeers are the other nodes that may run functions.
func (h *Handler) functionPeers(ctx context.Context, view *state.View) []*blixard.Node {
	if forwarded(ctx) != "" || h.opt.Peers == nil {
		return nil
	}
	here := h.opt.Backend.Status().Node
	var out []*blixard.Node
	view.Nodes(func(n *blixard.Node) bool {
		if n.Name != here && n.State == blixard.NodeReady && n.RunsInstances() && !n.Simulated {
			out = append(out, n)
		}
		return true
	})
	return out
}

// askNodes asks other nodes at once, each for a bounded time, and tells who was
// silent.
func (h *Handler) askNodes(ctx context.Context, nodes []*blixard.Node, ask func(context.Context, *blixard.Node, *client.Client) error) (silent []string) {
	ctx, cancel := context.WithTimeout(ctx, peerWithin)
	defer cancel()
	var mu sync.Mutex
	var group errgroup.Group
	group.SetLimit(32)
	for _, n := range nodes {
		group.Go(func() error {
			c, err := h.opt.Peers(n.Address)
			if err == nil {
				err = ask(ctx, n, c)
			}
			if err != nil {
				mu.Lock()
				defer mu.Unlock()
				silent = append(silent, string(n.Name))
			}
			return nil
		})
	}
	_ = group.Wait() // nobody fails: who does is silent
	slices.Sort(silent)
	return silent
}

// addNodes adds what nodes do for functions.
func (h functions) addNodes(ctx context.Context, view *state.View, list []*blixardv1.Function) {
	if len(list) == 0 {
		return
	}
	by := make(map[string]*blixardv1.Function, len(list))
	for _, f := range list {
		by[f.Name] = f
	}
	if h.opt.Functions != nil {
		for _, n := range h.opt.Functions.Here() {
			if f := by[n.Function]; f != nil {
				f.Nodes = append(f.Nodes, n.What)
			}
		}
	}
	var mu sync.Mutex
	req := &blixardv1.ListFunctionsRequest{Consistency: blixardv1.Consistency_CONSISTENCY_STALE}
	silent := h.askNodes(ctx, h.functionPeers(ctx, view), func(ctx context.Context, _ *blixard.Node, c *client.Client) error {
		got, err := c.ListFunctions(ctx, req)
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		for _, theirs := range got.Functions {
			if f := by[theirs.Name]; f != nil {
				f.Nodes = append(f.Nodes, theirs.Nodes...)
			}
		}
		return nil
	})
	for _, f := range list {
		slices.SortFunc(f.Nodes, func(a, b *blixardv1.FunctionOnNode) int { return cmp.Compare(a.Node, b.Node) })
		f.SilentNodes = silent
	}
}

func (h functions) GetFunctionMetrics(ctx context.Context, req *blixardv1.GetFunctionMetricsRequest) (*blixardv1.GetFunctionMetricsResponse, error) {
	view, f, err := h.find(ctx, req.Name)
	if err != nil {
		return nil, err
	}
	if req.WindowMs < 0 {
		return nil, blixard.Invalid("windowMs", "", "windowMs is %d; it must not be negative", req.WindowMs)
	}
	window := cmp.Or(req.WindowMs, time.Hour.Milliseconds())
	sum := &blixardv1.GetFunctionMetricsResponse{WindowMs: window}
	if h.opt.Functions != nil {
		add(sum, h.opt.Functions.Metrics(f.Name, window))
	}
	var mu sync.Mutex
	h.askNodes(ctx, h.functionPeers(ctx, view), func(ctx context.Context, _ *blixard.Node, c *client.Client) error {
		got, err := c.GetFunctionMetrics(ctx, &blixardv1.GetFunctionMetricsRequest{Name: req.Name, WindowMs: window})
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		add(sum, got)
		return nil
	})
	slices.SortFunc(sum.Nodes, func(a, b *blixardv1.FunctionOnNode) int { return cmp.Compare(a.Node, b.Node) })
	slices.SortStableFunc(sum.Recent, func(a, b *blixardv1.FunctionReport) int { return cmp.Compare(b.AtMs, a.AtMs) })
	if forwarded(ctx) == "" {
		sumUp(sum)
	}
	return sum, nil
}

// add adds the counts and samples of one node.
func add(sum, one *blixardv1.GetFunctionMetricsResponse) {
	sum.Invocations += one.Invocations
	sum.Errors += one.Errors
	sum.Throttles += one.Throttles
	sum.ColdStarts += one.ColdStarts
	sum.RestoreFallbacks += one.RestoreFallbacks
	sum.Nodes = append(sum.Nodes, one.Nodes...)
	sum.Recent = append(sum.Recent, one.Recent[:min(len(one.Recent), maxSamples)]...)
}

// maxRecent bounds the single invocations that are told to users.
const maxRecent = 20

// sumUp makes times of the samples and keeps the newest of them.
func sumUp(m *blixardv1.GetFunctionMetricsResponse) {
	var cold, warm, duration []float64
	m.ColdParts, m.WarmParts = &blixardv1.FunctionBreakdown{}, &blixardv1.FunctionBreakdown{}
	for _, r := range m.Recent {
		duration = append(duration, r.GetParts().GetHandlerMs())
		if r.Start == string(blixard.StartWarm) {
			warm = append(warm, r.GetParts().GetTotalMs())
			addParts(m.WarmParts, r.GetParts())
		} else {
			cold = append(cold, r.GetParts().GetTotalMs())
			addParts(m.ColdParts, r.GetParts())
		}
	}
	m.Cold, m.Warm, m.Duration = timesOf(cold), timesOf(warm), timesOf(duration)
	scaleParts(m.ColdParts, len(cold))
	scaleParts(m.WarmParts, len(warm))
	m.Recent = m.Recent[:min(len(m.Recent), maxRecent)]
}

// timesOf are mean and quantiles of samples in milliseconds, nil for none.
func timesOf(samples []float64) *blixardv1.FunctionTimes {
	if len(samples) == 0 {
		return nil
	}
	slices.Sort(samples)
	at := func(percent int) float64 { return samples[(len(samples)-1)*percent/100] }
	sum := 0.0
	for _, s := range samples {
		sum += s
	}
	return &blixardv1.FunctionTimes{MeanMs: sum / float64(len(samples)), P50Ms: at(50), P95Ms: at(95), P99Ms: at(99), MaxMs: samples[len(samples)-1]}
}

// partsOf are the fields of a breakdown.
func partsOf(p *blixardv1.FunctionBreakdown) []*float64 {
	return []*float64{&p.QueueMs, &p.PlaceMs, &p.CommitMs, &p.SpawnMs, &p.RestoreMs, &p.BootMs, &p.InitMs, &p.HandlerMs, &p.TransferMs, &p.TotalMs}
}

func addParts(sum, one *blixardv1.FunctionBreakdown) {
	if one == nil {
		return
	}
	more := partsOf(one)
	for i, p := range partsOf(sum) {
		*p += *more[i]
	}
}

func scaleParts(sum *blixardv1.FunctionBreakdown, n int) {
	if n == 0 {
		return
	}
	for _, p := range partsOf(sum) {
		*p /= float64(n)
	}
}
