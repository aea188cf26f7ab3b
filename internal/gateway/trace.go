package gateway

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/blixard/blixard"
)

// Bounds of what waits to be sent to a collector.
const (
	tracesKept   = 4096
	tracesBatch  = 512
	tracesEvery  = time.Second
	tracesWithin = 5 * time.Second
)

// Traces sends what became of calls to an OpenTelemetry collector: OTLP over
// HTTP, as JSON. Each call is a span with one child for each part of its time.
// What the collector does not take in time is dropped and counted.
type Traces struct {
	url      string
	ratio    float64
	resource []attribute
	queue    chan *span
	http     *http.Client
	log      *slog.Logger
	sent     *prometheus.CounterVec // result
}

// NewTraces makes Traces for a collector's endpoint, such as
// "http://127.0.0.1:4318", which has the path /v1/traces. ratio is the share of
// calls that are traced of those whose caller does not say: 0 to 1.
func NewTraces(endpoint string, ratio float64, node blixard.NodeName, release string, log *slog.Logger) *Traces {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Traces{
		url: strings.TrimSuffix(endpoint, "/") + "/v1/traces", ratio: ratio, queue: make(chan *span, tracesKept), log: log,
		resource: []attribute{textAttribute("service.name", "blixard"), textAttribute("service.version", release), textAttribute("service.instance.id", string(node))},
		http:     &http.Client{Timeout: tracesWithin},
		sent:     prometheus.NewCounterVec(prometheus.CounterOpts{Name: "blixard_gateway_traces_total", Help: "Traced calls, by whether the collector got them."}, []string{"result"}),
	}
}

// Describe implements prometheus.Collector.
func (t *Traces) Describe(out chan<- *prometheus.Desc) { t.sent.Describe(out) }

// Collect implements prometheus.Collector.
func (t *Traces) Collect(out chan<- prometheus.Metric) { t.sent.Collect(out) }

// span is a traced call.
type span struct {
	trace, id, parent string // hexadecimal; parent may be ""
	function          string
	qualifier         string
	request           string
	began             time.Time
	report            blixard.InvocationReport
	err               *Error
}

// begin makes a span for a call if it is traced, and lets the function know it.
func (t *Traces) begin(inv *blixard.Invocation) *span {
	if t == nil {
		return nil
	}
	trace, parent, sampled := parseTrace(inv.TraceID)
	if sampled == "" {
		sampled = "0"
		if rand.Float64() < t.ratio {
			sampled = "1"
		}
	}
	if trace == "" {
		trace, _, _ = parseTrace(newTraceID(inv.Received))
	}
	if sampled != "1" {
		return nil
	}
	var id [8]byte
	putUint64(id[:], rand.Uint64()|1)
	s := &span{
		trace: trace, id: hex.EncodeToString(id[:]), parent: parent, function: string(inv.Function), qualifier: inv.Qualifier, request: inv.RequestID, began: inv.Received,
	}
	inv.TraceID = "Root=1-" + trace[:8] + "-" + trace[8:] + ";Parent=" + s.id + ";Sampled=1"
	if inv.HTTP != nil {
		for i := range inv.HTTP.Headers {
			switch h := &inv.HTTP.Headers[i]; {
			case strings.EqualFold(h[0], "X-Amzn-Trace-Id"):
				h[1] = inv.TraceID
			case strings.EqualFold(h[0], "Traceparent"):
				h[1] = "00-" + trace + "-" + s.id + "-01"
			}
		}
	}
	return s
}

// end hands the span to whoever sends it.
func (t *Traces) end(s *span, report *blixard.InvocationReport, err *Error) {
	if s == nil {
		return
	}
	s.report, s.err = *report, err
	s.report.Log = nil
	if err != nil {
		s.report.Parts.Total = time.Since(s.began)
	}
	select {
	case t.queue <- s:
	default:
		t.sent.WithLabelValues("dropped").Inc()
	}
}

// parseTrace reads "Root=1-<8>-<24>;Parent=<16>;Sampled=1"; what is not usable is "".
func parseTrace(s string) (trace, parent, sampled string) {
	for part := range strings.SplitSeq(s, ";") {
		key, value, _ := strings.Cut(strings.TrimSpace(part), "=")
		switch key {
		case "Root":
			if len(value) == 35 && strings.HasPrefix(value, "1-") && value[10] == '-' && isHex(value[2:10]) && isHex(value[11:]) {
				trace = value[2:10] + value[11:]
			}
		case "Parent":
			if len(value) == 16 && isHex(value) {
				parent = value
			}
		case "Sampled":
			if value == "0" || value == "1" {
				sampled = value
			}
		}
	}
	if trace == "" {
		parent = ""
	}
	return trace, parent, sampled
}

// traceOf is the trace that a request's W3C traceparent names, as X-Amzn-Trace-Id
// writes it; "" if there is none.
func traceOf(traceparent string) string {
	const form = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-00"
	if len(traceparent) != len(form) || !strings.HasPrefix(traceparent, "00-") || traceparent[35] != '-' || traceparent[52] != '-' {
		return ""
	}
	trace, parent, flags := traceparent[3:35], traceparent[36:52], traceparent[53:]
	if !isHex(trace) || !isHex(parent) || !isHex(flags) || strings.Trim(trace, "0") == "" || strings.Trim(parent, "0") == "" {
		return ""
	}
	sampled := "0"
	if strings.IndexByte("13579bdf", flags[1]) >= 0 {
		sampled = "1"
	}
	return "Root=1-" + trace[:8] + "-" + trace[8:] + ";Parent=" + parent + ";Sampled=" + sampled
}

func isHex(s string) bool { return strings.Trim(s, "0123456789abcdef") == "" }

// run sends spans until ctx ends, and then what is left.
func (t *Traces) run(ctx context.Context) {
	tick := time.NewTicker(tracesEvery)
	defer tick.Stop()
	var batch []*span
	quiet := false
	for {
		full := false
		select {
		case s := <-t.queue:
			batch = append(batch, s)
			full = len(batch) >= tracesBatch
		case <-tick.C:
			full = true
		case <-ctx.Done():
			t.last(batch)
			return
		}
		if !full || len(batch) == 0 {
			continue
		}
		err := t.send(ctx, batch)
		if err != nil && !quiet {
			t.log.Warn("the collector of traces takes none; they are dropped until it does", "event", "traces", "url", t.url, "error", err)
		}
		quiet, batch = err != nil, batch[:0]
	}
}

// last sends what is there when the gateway ends.
func (t *Traces) last(batch []*span) {
	for len(t.queue) > 0 {
		batch = append(batch, <-t.queue)
	}
	if len(batch) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), tracesEvery)
	defer cancel()
	if err := t.send(ctx, batch); err != nil {
		t.log.Debug("the last traces were not sent", "error", err)
	}
}

func (t *Traces) send(ctx context.Context, batch []*span) (err error) {
	result := "sent"
	defer func() {
		if err != nil {
			result = "dropped"
		}
		t.sent.WithLabelValues(result).Add(float64(len(batch)))
	}()
	body, err := json.Marshal(t.document(batch))
	if err != nil {
		return fmt.Errorf("encoding traces: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, t.url, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("making a request for traces: %w", err)
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := t.http.Do(req)
	if err != nil {
		return fmt.Errorf("sending traces: %w", err)
	}
	_, err = io.Copy(io.Discard, io.LimitReader(res.Body, 64<<10))
	if err := errors.Join(err, res.Body.Close()); err != nil {
		return fmt.Errorf("reading the collector's answer: %w", err)
	}
	if res.StatusCode/100 != 2 {
		return fmt.Errorf("the collector answers %s", res.Status)
	}
	return nil
}

// The document of OTLP, as far as it is used here.
type (
	traceDocument struct {
		ResourceSpans []resourceSpans `json:"resourceSpans"`
	}
	resourceSpans struct {
		Resource   resource     `json:"resource"`
		ScopeSpans []scopeSpans `json:"scopeSpans"`
	}
	resource struct {
		Attributes []attribute `json:"attributes"`
	}
	scopeSpans struct {
		Scope struct {
			Name string `json:"name"`
		} `json:"scope"`
		Spans []spanDocument `json:"spans"`
	}
	spanDocument struct {
		TraceID    string      `json:"traceId"`
		SpanID     string      `json:"spanId"`
		Parent     string      `json:"parentSpanId,omitempty"`
		Name       string      `json:"name"`
		Kind       int         `json:"kind"` // 1: internal, 2: server
		Start      string      `json:"startTimeUnixNano"`
		End        string      `json:"endTimeUnixNano"`
		Attributes []attribute `json:"attributes,omitempty"`
		Status     *spanStatus `json:"status,omitempty"`
	}
	spanStatus struct {
		Code    int    `json:"code"` // 2: error
		Message string `json:"message,omitempty"`
	}
	attribute struct {
		Key   string         `json:"key"`
		Value attributeValue `json:"value"`
	}
	attributeValue struct {
		Text *string `json:"stringValue,omitempty"`
		Bool *bool   `json:"boolValue,omitempty"`
		Int  *string `json:"intValue,omitempty"`
	}
)

func textAttribute(key, value string) attribute {
	return attribute{Key: key, Value: attributeValue{Text: &value}}
}

func boolAttribute(key string, value bool) attribute {
	return attribute{Key: key, Value: attributeValue{Bool: &value}}
}

func intAttribute(key string, value int64) attribute {
	text := strconv.FormatInt(value, 10)
	return attribute{Key: key, Value: attributeValue{Int: &text}}
}

func (t *Traces) document(batch []*span) traceDocument {
	ss := scopeSpans{}
	ss.Scope.Name = "blixard/gateway"
	for _, s := range batch {
		ss.Spans = s.appendTo(ss.Spans)
	}
	return traceDocument{ResourceSpans: []resourceSpans{{Resource: resource{t.resource}, ScopeSpans: []scopeSpans{ss}}}}
}

// appendTo writes the call and, one after the other, the parts of its time.
func (s *span) appendTo(out []spanDocument) []spanDocument {
	r := &s.report
	nano := func(at time.Time) string { return strconv.FormatInt(at.UnixNano(), 10) }
	whole := spanDocument{
		TraceID: s.trace, SpanID: s.id, Parent: s.parent, Name: "invoke " + s.function, Kind: 2, Start: nano(s.began), End: nano(s.began.Add(r.Parts.Total)),
		Attributes: []attribute{
			textAttribute("faas.name", s.function), textAttribute("faas.invocation_id", s.request), textAttribute("blixard.qualifier", s.qualifier),
		},
	}
	switch {
	case s.err != nil:
		whole.Attributes = append(whole.Attributes, textAttribute("error.type", s.err.Reason))
		whole.Status = &spanStatus{Code: 2, Message: s.err.Error()}
		return append(out, whole)
	case r.Error != nil:
		whole.Attributes = append(whole.Attributes, textAttribute("error.type", r.Error.Type))
		whole.Status = &spanStatus{Code: 2, Message: r.Error.Kind}
	}
	whole.Attributes = append(whole.Attributes, textAttribute("faas.version", blixard.VersionName(r.Number)), boolAttribute("faas.coldstart", r.Start.Cold()),
		textAttribute("blixard.start", string(r.Start)), textAttribute("blixard.node", string(r.Node)), textAttribute("faas.instance", r.Instance), intAttribute("blixard.used_mib", r.UsedMiB))
	out = append(out, whole)
	at := s.began
	var id [8]byte
	p := &r.Parts
	for _, part := range [...]struct {
		name string
		took time.Duration
	}{
		{"place", p.Place},
		{"queue", p.Queue},
		{"commit", p.Commit},
		{"spawn", p.Spawn},
		{"restore", p.Restore},
		{"boot", p.Boot},
		{"init", p.Init},
		{"handler", p.Handler},
		{"transfer", p.Transfer},
	} {
		if part.took <= 0 {
			continue
		}
		putUint64(id[:], rand.Uint64()|1)
		end := at.Add(part.took)
		out = append(out, spanDocument{TraceID: s.trace, SpanID: hex.EncodeToString(id[:]), Parent: s.id, Name: part.name, Kind: 1, Start: nano(at), End: nano(end)})
		at = end
	}
	return out
}
