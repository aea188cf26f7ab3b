package dispatch

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"

	"github.com/blixard/blixard"
)

// Prefix of the paths that nodes serve for each other.
const Prefix = "/peer/v1/functions/"

// HTTPPeers are the other nodes, asked over HTTP.
type HTTPPeers struct {
	// URL is where a node serves, such as "http://10.0.0.2:7400"; "" if that is
	// not known.
	URL    func(blixard.NodeName) string
	Secret func() string // of the cluster
	Client *http.Client  // nil: http.DefaultClient
}

// Get implements Peers.
func (p *HTTPPeers) Get(ctx context.Context, node blixard.NodeName, path string) (io.ReadCloser, error) {
	base := p.URL(node)
	if base == "" {
		return nil, fmt.Errorf("the address of the node %s is not known", node)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+Prefix+path, http.NoBody)
	if err != nil {
		return nil, fmt.Errorf("asking the node %s: %w", node, err)
	}
	req.Header.Set("Authorization", "Bearer "+p.Secret())
	client := p.Client
	if client == nil {
		client = http.DefaultClient
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("asking the node %s: %w", node, err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
	}
	words, err := io.ReadAll(io.LimitReader(resp.Body, 1000))
	err = errors.Join(err, resp.Body.Close())
	code := blixard.CodeUnavailable
	if resp.StatusCode == http.StatusNotFound {
		code = blixard.CodeNotFound
	}
	return nil, errors.Join(blixard.Errorf(code, "the node %s answers %s: %s", node, resp.Status, words), err)
}

// Handler serves the other nodes, below Prefix: status, logs, events and metrics
// as lines of JSON, templates and code. Who asks must have been checked before.
func (d *Dispatcher) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+Prefix+"status", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, d.Status()) })
	mux.HandleFunc("GET "+Prefix+"metrics/{function}", func(w http.ResponseWriter, r *http.Request) {
		m, ok := d.Metrics(blixard.FunctionName(r.PathValue("function")))
		if !ok {
			http.NotFound(w, r)
			return
		}
		writeJSON(w, m)
	})
	mux.HandleFunc("GET "+Prefix+"logs/{function}", d.serveLogs)
	mux.HandleFunc("GET "+Prefix+"events/{$}", d.serveEvents)
	mux.HandleFunc("GET "+Prefix+"events/{function}", d.serveEvents)
	mux.HandleFunc("GET "+Prefix+"template/{key}", d.serveTemplate)
	mux.HandleFunc("GET "+Prefix+"code/{digest}", d.serveCode)
	return mux
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(v); err != nil {
		panic(http.ErrAbortHandler) // whoever asked is gone, or sees that it is not all
	}
}

// lines writes each value as a line of JSON, at once.
func lines[T any](w http.ResponseWriter) func(T) error {
	w.Header().Set("Content-Type", "application/jsonlines")
	enc, flush := json.NewEncoder(w), http.NewResponseController(w)
	return func(v T) error {
		if err := enc.Encode(v); err != nil {
			return err
		}
		return flush.Flush()
	}
}

// readLines reads what lines has written.
func readLines[T any](r io.Reader, yield func(T) error) error {
	dec := json.NewDecoder(r)
	for {
		var v T
		if err := dec.Decode(&v); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("reading a node's answer: %w", err)
		}
		if err := yield(v); err != nil {
			return err
		}
	}
}

// query is q as the path and query of a request.
func (q *LogQuery) query() string {
	v := url.Values{"since": {strconv.FormatInt(q.SinceMS, 10)}, "tail": {strconv.Itoa(q.Tail)}, "request": {q.RequestID}}
	if !q.Any {
		v.Set("number", strconv.Itoa(q.Number))
	}
	if q.Follow {
		v.Set("follow", "1")
	}
	return "logs/" + url.PathEscape(string(q.Function)) + "?" + v.Encode()
}

func parseLogQuery(r *http.Request) (q LogQuery, err error) {
	v := r.URL.Query()
	q = LogQuery{Function: blixard.FunctionName(r.PathValue("function")), RequestID: v.Get("request"), Follow: v.Get("follow") != "", Any: !v.Has("number")}
	number := func(key string) int64 {
		n := int64(0)
		if text := v.Get(key); text != "" && err == nil {
			n, err = strconv.ParseInt(text, 10, 64)
		}
		return n
	}
	q.SinceMS, q.Tail, q.Number = number("since"), int(number("tail")), int(number("number"))
	return q, err
}

func (d *Dispatcher) serveLogs(w http.ResponseWriter, r *http.Request) {
	q, err := parseLogQuery(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	err = d.Logs(r.Context(), q, lines[LogLine](w))
	if errors.Is(err, ErrUnknownFunction) {
		http.Error(w, err.Error(), http.StatusNotFound)
	}
}

func (d *Dispatcher) serveEvents(w http.ResponseWriter, r *http.Request) {
	follow := r.URL.Query().Get("follow") != ""
	if err := d.Events(r.Context(), blixard.FunctionName(r.PathValue("function")), follow, lines[Event](w)); err != nil && r.Context().Err() == nil {
		d.log.Debug("telling events to a node", "event", "events", "error", err)
	}
}

func (d *Dispatcher) serveCode(w http.ResponseWriter, r *http.Request) {
	f, size, err := d.o.Code.Open(r.PathValue("digest"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	defer f.Close()
	w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
	if _, err := io.Copy(w, f); err != nil {
		panic(http.ErrAbortHandler)
	}
}

// LogsOn are Logs of another node, EventsOn its Events, MetricsOn its Metrics,
// StatusOn its Status.
func LogsOn(ctx context.Context, p Peers, node blixard.NodeName, q LogQuery, yield func(LogLine) error) error {
	return readFrom(ctx, p, node, q.query(), yield)
}

// EventsOn are Events of another node.
func EventsOn(ctx context.Context, p Peers, node blixard.NodeName, name blixard.FunctionName, follow bool, yield func(Event) error) error {
	path := "events/" + url.PathEscape(string(name))
	if follow {
		path += "?follow=1"
	}
	return readFrom(ctx, p, node, path, yield)
}

// MetricsOn are Metrics of another node.
func MetricsOn(ctx context.Context, p Peers, node blixard.NodeName, name blixard.FunctionName) (m FunctionMetrics, err error) {
	err = readFrom(ctx, p, node, "metrics/"+url.PathEscape(string(name)), func(got FunctionMetrics) error { m = got; return nil })
	return m, err
}

// StatusOn is the Status of another node.
func StatusOn(ctx context.Context, p Peers, node blixard.NodeName) (s NodeStatus, err error) {
	err = readFrom(ctx, p, node, "status", func(got NodeStatus) error { s = got; return nil })
	return s, err
}

func readFrom[T any](ctx context.Context, p Peers, node blixard.NodeName, path string, yield func(T) error) error {
	body, err := p.Get(ctx, node, path)
	if err != nil {
		return err
	}
	return errors.Join(readLines(body, yield), body.Close())
}

// haveCode makes sure that the code of a version is here.
func (d *Dispatcher) haveCode(ctx context.Context, v *version) error {
	if d.o.Code.Has(v.code) {
		return nil
	}
	err := blixard.Errorf(blixard.CodeUnavailable, "no node has the code %.12s of %s", v.code, v.rev.Function)
	if d.o.Peers == nil {
		return err
	}
	for _, node := range d.others(v) {
		body, failed := d.o.Peers.Get(ctx, node, "code/"+v.code)
		if failed == nil {
			_, failed = d.o.Code.PutDigest(ctx, v.code, body)
			failed = errors.Join(failed, body.Close())
		}
		if failed == nil {
			return nil
		}
		if blixard.CodeOf(failed) != blixard.CodeNotFound {
			d.log.Warn("fetching the code of a function", "event", "fetch", "node", string(node), "digest", v.code, "error", failed)
		}
	}
	return err
}
