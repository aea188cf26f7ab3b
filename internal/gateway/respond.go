package gateway

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// mappedResponse is an HTTP answer that was made of a function's payload.
type mappedResponse struct {
	status  int
	headers [][2]string
	cookies []string
	body    []byte
}

// structured is an answer in the payload format 2.0. Headers of format 1.0 with
// several values are taken, too.
type structured struct {
	StatusCode        json.RawMessage              `json:"statusCode"`
	Headers           map[string]json.RawMessage   `json:"headers"`
	MultiValueHeaders map[string][]json.RawMessage `json:"multiValueHeaders"`
	Cookies           []string                     `json:"cookies"`
	Body              json.RawMessage              `json:"body"`
	IsBase64Encoded   bool                         `json:"isBase64Encoded"`
}

// mapResponse makes an HTTP answer of a payload: JSON without a statusCode is the
// body of a 200; else statusCode, headers, cookies and body say what it is. A
// body that is no string is sent as the JSON that it is. ok is false for what is
// no JSON, or no HTTP answer.
func mapResponse(payload []byte) (m mappedResponse, ok bool) {
	m = mappedResponse{status: http.StatusOK, body: payload}
	trimmed := bytes.TrimLeft(payload, " \t\r\n")
	if len(trimmed) == 0 {
		return m, true
	}
	if trimmed[0] != '{' || !bytes.Contains(trimmed, statusCodeKey) {
		return m, json.Valid(payload)
	}
	var s structured
	if err := json.Unmarshal(payload, &s); err != nil {
		// The word may be anywhere: what has no statusCode of its own may look as it likes.
		var own map[string]json.RawMessage
		if json.Unmarshal(payload, &own) != nil {
			return m, false
		}
		_, has := own["statusCode"]
		return m, !has
	}
	if s.StatusCode == nil {
		return m, true
	}
	if m.status, ok = statusOf(s.StatusCode); !ok || !m.takeHeaders(&s) {
		return m, false
	}
	m.body = nil
	switch body := s.Body; {
	case len(body) == 0 || string(body) == "null":
	case body[0] != '"':
		m.body = body
	default:
		var text string
		if err := json.Unmarshal(body, &text); err != nil {
			return m, false
		}
		m.body = []byte(text)
		if s.IsBase64Encoded {
			plain, err := base64.StdEncoding.DecodeString(text)
			if err != nil {
				return m, false
			}
			m.body = plain
		}
	}
	return m, true
}

var statusCodeKey = []byte(`"statusCode"`)

// statusOf reads 200 and "200".
func statusOf(raw json.RawMessage) (int, bool) {
	n, err := strconv.Atoi(strings.Trim(string(raw), `"`))
	return n, err == nil && n >= 200 && n <= 599
}

// takeHeaders takes the headers in the order of their names.
func (m *mappedResponse) takeHeaders(s *structured) bool {
	add := func(name string, raw json.RawMessage) bool {
		value, ok := headerValue(raw)
		if ok {
			m.headers = append(m.headers, [2]string{name, value})
		}
		return ok
	}
	for name, raw := range s.Headers { //order:any sorted below
		if !add(name, raw) {
			return false
		}
	}
	for name, all := range s.MultiValueHeaders { //order:any sorted below, and stable
		if _, single := s.Headers[name]; single {
			continue
		}
		for _, raw := range all {
			if !add(name, raw) {
				return false
			}
		}
	}
	slices.SortStableFunc(m.headers, func(a, b [2]string) int { return strings.Compare(a[0], b[0]) })
	m.cookies = s.Cookies
	return true
}

// headerValue reads a string, number or truth value.
func headerValue(raw json.RawMessage) (string, bool) {
	if len(raw) == 0 {
		return "", false
	}
	switch raw[0] {
	case '"':
		var v string
		err := json.Unmarshal(raw, &v)
		return v, err == nil
	case '{', '[':
		return "", false
	}
	return string(raw), true
}

// parsePrelude reads the head of a streamed answer.
func parsePrelude(head []byte) (m mappedResponse, ok bool) {
	var s structured
	if len(bytes.TrimSpace(head)) == 0 {
		return mappedResponse{status: http.StatusOK}, true
	}
	if err := json.Unmarshal(head, &s); err != nil {
		return m, false
	}
	m.status = http.StatusOK
	if s.StatusCode != nil {
		if m.status, ok = statusOf(s.StatusCode); !ok {
			return m, false
		}
	}
	return m, m.takeHeaders(&s)
}

// wholePrelude reads an answer with a prelude that was collected.
func wholePrelude(all []byte) (m mappedResponse, ok bool) {
	head, body, ok := bytes.Cut(all, preludeEnd)
	if !ok {
		return m, false
	}
	m, ok = parsePrelude(head)
	m.body = body
	return m, ok
}
