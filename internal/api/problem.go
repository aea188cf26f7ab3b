package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

const (
	forwardedHeader = client.ForwardedHeader
	problemType     = "application/problem+json"
	problemBase     = "https://blixard.dev/problems/"
)

// httpError is an error with an HTTP status of its own.
type httpError struct {
	err    *blixard.Error
	status int
	allow  string // methods, for 405
}

func (e *httpError) Error() string { return e.err.Error() }
func (e *httpError) Unwrap() error { return e.err }

// details are the members of a problem (RFC 9457), in this order.
type details struct {
	Type    string `json:"type"`
	Title   string `json:"title"`
	Status  int    `json:"status"`
	Detail  string `json:"detail"`
	Code    string `json:"code"`
	Hint    string `json:"hint,omitempty"`
	Field   string `json:"field,omitempty"`
	Version uint64 `json:"version,omitempty"`
}

var titles = map[blixard.Code]string{
	blixard.CodeInvalid: "The request is not valid", blixard.CodeNotFound: "Not found", blixard.CodeExists: "It exists already",
	blixard.CodeConflict: "Changed meanwhile, or in the wrong state", blixard.CodeRefused: "It cannot be done now", blixard.CodeUnavailable: "Not available",
	blixard.CodeOverloaded: "Too many requests", blixard.CodeDenied: "Not allowed", blixard.CodeGone: "No longer kept", blixard.CodeInternal: "A bug",
}

// problemOf makes a problem of an error.
func problemOf(err error) (p details, allow string) {
	e := blixardv1.AsError(err)
	p = details{
		Type: problemBase + string(e.Code), Title: titles[e.Code], Status: blixardv1.HTTPStatus(e.Code), Detail: e.Message, Code: string(e.Code),
		Hint: e.Hint, Field: e.Field, Version: e.Version,
	}
	var special *httpError
	switch {
	case errors.As(err, &special):
		p.Status, allow = special.status, special.allow
		p.Type, p.Title = "about:blank", http.StatusText(special.status)
	case errors.Is(err, errNoToken):
		p.Status = http.StatusUnauthorized
	}
	return p, allow
}

// problem answers with an error.
func (h *Handler) problem(w http.ResponseWriter, err error) {
	p, allow := problemOf(err)
	head := w.Header()
	switch {
	case allow != "":
		head.Set("Allow", allow)
	case p.Status == http.StatusUnauthorized:
		head.Set("WWW-Authenticate", `Bearer realm="blixard"`)
	}
	if after := blixardv1.RetryAfter(blixard.Code(p.Code)); after > 0 {
		setRetryAfter(head, after)
	}
	if p.Code == string(blixard.CodeInternal) {
		h.opt.Log.Error("a request failed", "error", err)
	}
	head.Set("Content-Type", problemType)
	writeBody(w, p.Status, p.json())
}

// json is the problem as a document.
func (p *details) json() []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(p); err != nil { // plain strings and numbers always marshal
		return []byte(`{"title":"A bug","status":500}`)
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

func setRetryAfter(h http.Header, after time.Duration) { h.Set("Retry-After", seconds(after)) }

func writeJSON(w http.ResponseWriter, status int, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	writeBody(w, status, body)
}

func writeBody(w http.ResponseWriter, status int, body []byte) {
	h := w.Header()
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Length", strconv.Itoa(len(body)+1))
	w.WriteHeader(status)
	if _, err := w.Write(append(slices.Clip(body), '\n')); err != nil {
		return // the caller has left
	}
}

func errNoPath(path string, known []string) *blixard.Error {
	short := path
	if len(short) > 100 {
		short = short[:100] + "…"
	}
	e := blixard.Errorf(blixard.CodeNotFound, "nothing is served at %s", strconv.Quote(short))
	e.Hint = "/openapi.json describes what is"
	if near := blixard.Nearest(path, known); near != "" {
		e.Hint = "did you mean " + near + "? " + e.Hint
	}
	return e
}

func errMethod(method, allow string) error {
	return &httpError{
		status: http.StatusMethodNotAllowed, allow: allow,
		err: &blixard.Error{Code: blixard.CodeInvalid, Message: "the method " + strings.ToValidUTF8(method, "?") + " is not served here", Hint: "use " + allow},
	}
}
