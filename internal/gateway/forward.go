package gateway

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/wire"
)

// Where nodes serve each other.
const (
	peerPrefix = "/peer/v1/gateway/"
	invokePath = peerPrefix + "invoke"
	statusPath = peerPrefix + "status"
)

const (
	dialWithin    = time.Second
	idlePeerConns = 256
	idlePeerTime  = 60 * time.Second
)

// peers speaks to other nodes: HTTP/1.1, connections kept.
type peers struct {
	http   *http.Client
	secret func() string
}

func newPeers(secret func() string) *peers {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	return &peers{secret: secret, http: &http.Client{
		Transport: &http.Transport{
			Protocols: protocols, DialContext: (&net.Dialer{Timeout: dialWithin, KeepAlive: 5 * time.Second}).DialContext,
			MaxIdleConnsPerHost: idlePeerConns, IdleConnTimeout: idlePeerTime, DisableCompression: true,
			ReadBufferSize: 16 << 10, WriteBufferSize: 16 << 10,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

func (p *peers) close() { p.http.CloseIdleConnections() }

func (p *peers) post(ctx context.Context, address, path string, body io.Reader, size int64) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+address+path, body)
	if err != nil {
		return nil, fmt.Errorf("making a request to %s: %w", address, err)
	}
	req.ContentLength = size
	req.Header["Authorization"] = []string{"Bearer " + p.secret()}
	req.Header["User-Agent"] = nil
	return p.http.Do(req)
}

func unreachable(node blixard.NodeName, err error) *route.Refused {
	return &route.Refused{Why: route.Unreachable, Err: blixard.Errorf(blixard.CodeUnavailable, "%s cannot be reached: %v", node, err)}
}

// forward has another node run the call. The request is written from a copy, as
// the connection may still read it when the call has ended.
func (g *Gateway) forward(ctx context.Context, node *blixard.Node, inv *blixard.Invocation, try Try, sink blixard.ResponseSink) (blixard.InvocationReport, error) {
	began := time.Now()
	h := callHead{inv: inv, try: try, remaining: inv.Deadline.Sub(began)}
	body := appendCall(make([]byte, 0, 512+len(inv.Payload)), &h)
	body = append(body, inv.Payload...)
	g.metrics.forwards.Inc()
	res, err := g.peers.post(ctx, node.Address, invokePath, bytes.NewReader(body), int64(len(body)))
	if err != nil {
		return blixard.InvocationReport{}, notSent(ctx, node.Name, err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK { // it was not let in
		return blixard.InvocationReport{}, unreachable(node.Name, fmt.Errorf("it answers %s", res.Status))
	}
	a := answerReader{r: res.Body}
	report, err := a.copyTo(sink)
	if err != nil {
		if ctx.Err() != nil && errors.Is(context.Cause(ctx), errDeadline) {
			return report, &route.Refused{Why: route.TimedOut, Handed: true, Err: blixard.Errorf(blixard.CodeUnavailable, "%s has not answered by the deadline", node.Name)}
		}
		return report, err
	}
	if _, err := io.Copy(io.Discard, io.LimitReader(res.Body, 1)); err != nil { // the end, so that the connection can be used again
		g.log.Debug("a connection to a peer is not used again", "node", string(node.Name), "error", err)
	}
	report.Parts.Transfer += time.Since(began) - report.Parts.Total
	return report, nil
}

// notSent tells a call that certainly was not taken from one that may have been.
func notSent(ctx context.Context, node blixard.NodeName, err error) *route.Refused {
	r := unreachable(node, err)
	op, isOp := errors.AsType[*net.OpError](err)
	if isOp && op.Op == "dial" || errors.Is(err, syscall.ECONNREFUSED) {
		return r
	}
	r.Why, r.Handed = route.Gone, true
	if ctx.Err() != nil && errors.Is(context.Cause(ctx), errDeadline) {
		r.Why = route.TimedOut
	}
	return r
}

// PeerHandler serves other nodes' gateways below /peer/v1/gateway/. Whoever
// mounts it asks callers for the cluster's secret.
func (g *Gateway) PeerHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+invokePath, g.serveInvoke)
	mux.HandleFunc("POST "+statusPath, g.serveStatus)
	return mux
}

// serveInvoke runs a call that another node's gateway decided to run here.
func (g *Gateway) serveInvoke(w http.ResponseWriter, r *http.Request) {
	began := time.Now()
	h, err := readCall(r.Body, r.ContentLength, g.limits.SyncBytes)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	out := newAnswerWriter(w)
	defer out.free()
	report, err := g.serveCall(r.Context(), &h, began, out)
	if err != nil {
		out.refused(err)
		return
	}
	report.Parts.Total = time.Since(began)
	out.report(&report)
}

func (g *Gateway) serveCall(ctx context.Context, h *callHead, began time.Time, sink blixard.ResponseSink) (blixard.InvocationReport, error) {
	if !g.enter() {
		return blixard.InvocationReport{}, &route.Refused{Why: route.Draining, Err: errDraining().Err}
	}
	defer g.leave()
	if g.opt.Local == nil {
		return blixard.InvocationReport{}, &route.Refused{Why: route.Unknown, Err: blixard.Errorf(blixard.CodeUnavailable, "the node %s runs no functions", g.opt.Node)}
	}
	h.inv.Received, h.inv.Deadline = began, began.Add(h.remaining)
	ctx, cancel := context.WithDeadline(ctx, h.inv.Deadline)
	defer cancel()
	return g.opt.Local.Invoke(ctx, h.inv, h.try, sink)
}

// answerWriter writes an answer as frames. What is not streamed is sent at the
// end, or when much has come together.
type answerWriter struct {
	w      http.ResponseWriter
	buf    *bufio.Writer
	stream bool
	small  []byte
}

var answerBuffers = sync.Pool{New: func() any { return bufio.NewWriterSize(nil, 16<<10) }}

func newAnswerWriter(w http.ResponseWriter) *answerWriter {
	buf, ok := answerBuffers.Get().(*bufio.Writer)
	if !ok {
		buf = bufio.NewWriterSize(nil, 16<<10)
	}
	buf.Reset(w)
	return &answerWriter{w: w, buf: buf}
}

func (a *answerWriter) free() {
	a.buf.Reset(nil)
	answerBuffers.Put(a.buf)
}

func (a *answerWriter) Begin(h blixard.ResponseHead) error {
	a.stream = h.Streaming
	a.small = appendFrame(a.small[:0], frameHead, func(c *wire.Coder) { codeResponseHead(c, &h) })
	if _, err := a.buf.Write(a.small); err != nil {
		return err
	}
	return a.flush(a.stream)
}

func (a *answerWriter) Write(p []byte) (int, error) {
	written := 0
	for len(p) > 0 {
		n := min(len(p), maxFrameBytes)
		head := [frameOverhead]byte{frameData, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}
		if _, err := a.buf.Write(head[:]); err != nil {
			return written, err
		}
		if _, err := a.buf.Write(p[:n]); err != nil {
			return written, err
		}
		written += n
		p = p[n:]
	}
	return written, a.flush(a.stream)
}

func (a *answerWriter) flush(now bool) error {
	if !now {
		return nil
	}
	if err := a.buf.Flush(); err != nil {
		return err
	}
	return flush(a.w)
}

func (a *answerWriter) report(r *blixard.InvocationReport) {
	a.end(appendFrame(a.small[:0], frameReport, func(c *wire.Coder) { codeReport(c, r) }))
}

func (a *answerWriter) refused(err error) {
	var f refusedFrame
	f.take(err)
	a.end(appendFrame(a.small[:0], frameError, f.code))
}

// end writes the last frame. If that fails the other side sees an answer that
// was cut off.
func (a *answerWriter) end(frame []byte) {
	if _, err := a.buf.Write(frame); err != nil {
		return
	}
	if err := a.buf.Flush(); err != nil {
		return
	}
}
