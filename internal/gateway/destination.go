package gateway

import (
	"crypto/sha256"
	"encoding/json"
	"strings"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// deadLetters, as destination, keeps what has failed in the state.
const deadLetters = "dead-letters"

// record is what a destination is called with.
type record struct {
	Version         string           `json:"version"`
	Timestamp       string           `json:"timestamp"`
	RequestContext  requestContext   `json:"requestContext"`
	RequestPayload  json.RawMessage  `json:"requestPayload"`
	ResponseContext *responseContext `json:"responseContext,omitempty"`
	ResponsePayload json.RawMessage  `json:"responsePayload,omitempty"`
}

type requestContext struct {
	RequestID              string `json:"requestId"`
	FunctionARN            string `json:"functionArn"`
	Condition              string `json:"condition"`
	ApproximateInvokeCount int    `json:"approximateInvokeCount"`
}

type responseContext struct {
	StatusCode      int    `json:"statusCode"`
	ExecutedVersion string `json:"executedVersion"`
	FunctionError   string `json:"functionError,omitempty"`
}

// destination makes the event that tells a destination what became of another
// one. Its ID follows from that one's, so that it is the same however often the
// settlement is proposed.
func (g *Gateway) destination(e *blixard.AsyncEvent, out *outcome, s *state.SettleEvent, to string, nowMS int64) *state.EnqueueEvent {
	name, qualifier := ParseFunctionARN(to)
	c := g.event(derivedID(e, s.Condition), name, qualifier)
	c.Context, c.Hops = e.Context, e.Hops+1
	var more eventContext
	if json.Unmarshal([]byte(e.Context), &more) == nil {
		if b, err := json.Marshal(eventContext{Trace: more.Trace}); err == nil {
			c.Context = string(b)
		}
	}
	c.Payload = g.record(e, out, s.Condition, nowMS)
	return c
}

// derivedID is the ID of the event that a destination gets.
func derivedID(e *blixard.AsyncEvent, condition string) string {
	sum := sha256.Sum256([]byte("destination\x00" + e.ID + "\x00" + condition))
	var raw [16]byte
	copy(raw[:], sum[:])
	return formatUUID(raw)
}

// record is the JSON that a destination gets. What makes it larger than what the
// state takes is left out: first the answer, then the request.
func (g *Gateway) record(e *blixard.AsyncEvent, out *outcome, condition string, nowMS int64) []byte {
	count := e.Tries
	if out.tried {
		count++
	}
	r := record{
		Version: "1.0", Timestamp: time.UnixMilli(nowMS).UTC().Format("2006-01-02T15:04:05.000Z"),
		RequestContext: requestContext{RequestID: e.ID, FunctionARN: g.ARN(e.Function, e.Qualifier), Condition: condition, ApproximateInvokeCount: count},
		RequestPayload: asJSON(e.Payload),
	}
	if out.tried && out.err == nil {
		r.ResponseContext = &responseContext{StatusCode: 200, ExecutedVersion: blixard.VersionName(out.report.Number)}
		if out.report.Error != nil {
			r.ResponseContext.FunctionError = out.report.Error.Kind
		}
		if !out.tooLong {
			r.ResponsePayload = asJSON(out.answer)
		}
	}
	b := r.json()
	if len(b) > state.MaxEventPayload && r.ResponsePayload != nil {
		r.ResponsePayload = nil
		b = r.json()
	}
	if len(b) > state.MaxEventPayload {
		r.RequestPayload = json.RawMessage("null")
		b = r.json()
	}
	return b
}

func (r *record) json() []byte {
	b, err := json.Marshal(r)
	if err != nil { // what is raw was checked, the rest is strings and numbers
		return []byte("{}")
	}
	return b
}

// asJSON is a payload as a part of JSON: as it is, or as a string.
func asJSON(p []byte) json.RawMessage {
	switch {
	case len(p) == 0:
		return json.RawMessage("null")
	case json.Valid(p):
		return p
	}
	return appendString(nil, p)
}

// ARN is the name of a function as AWS writes them.
func (g *Gateway) ARN(name blixard.FunctionName, qualifier string) string {
	arn := "arn:aws:lambda:" + g.opt.Region + ":" + g.opt.AccountID + ":function:" + string(name)
	if qualifier != "" {
		arn += ":" + qualifier
	}
	return arn
}

// ParseFunctionARN reads "name", "name:qualifier", the same with
// "<account>:function:" before, and whole ARNs.
func ParseFunctionARN(s string) (name blixard.FunctionName, qualifier string) {
	if i := strings.LastIndex(s, "function:"); i >= 0 {
		s = s[i+len("function:"):]
	}
	n, q, _ := strings.Cut(s, ":")
	return blixard.FunctionName(n), q
}
