package api

import (
	"net/http"
	"strconv"

	"google.golang.org/protobuf/proto"

	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/api/blixard/v1/blixardv1connect"
	"github.com/blixard/blixard/client"
)

const (
	watchProcedure    = blixardv1connect.EventServiceWatchProcedure
	logsProcedure     = blixardv1connect.GuestServiceLogsProcedure
	downloadProcedure = blixardv1connect.ClusterServiceDownloadSnapshotProcedure
	recordProcedure   = blixardv1connect.ClusterServiceRecordProcedure

	functionLogsProcedure = blixardv1connect.FunctionServiceFunctionLogsProcedure
	activityProcedure     = blixardv1connect.FunctionServiceWatchFunctionProcedure
)

// document is one JSON document.
type document struct{ s *restStream }

func (d *document) begin() {}

func (d *document) send(m proto.Message) error {
	writeJSON(d.s.w, http.StatusOK, blixardv1.AppendJSON(nil, m))
	return nil
}

func (d *document) fail(error) {} // the one message was sent

// raw is the bytes of a stream as they are.
type raw struct {
	s           *restStream
	contentType string
}

func (r *raw) begin() {
	r.s.w.Header().Set("Content-Type", r.contentType)
	r.s.w.Header().Set("X-Content-Type-Options", "nosniff")
	r.s.w.Header().Set("Cache-Control", "no-store")
	r.s.w.WriteHeader(http.StatusOK)
}

func (r *raw) send(m proto.Message) error {
	var data []byte
	switch part := m.(type) {
	case *blixardv1.LogsResponse:
		data = part.Data
	case *blixardv1.DownloadSnapshotResponse:
		data = part.Data
	case *blixardv1.RecordResponse:
		data = part.Data
	}
	if _, err := r.s.w.Write(data); err != nil {
		return err
	}
	return http.NewResponseController(r.s.w).Flush()
}

// fail breaks the connection, so that nobody takes half for the whole.
func (r *raw) fail(err error) {
	r.s.r.h.opt.Log.Warn("an answer broke off", "procedure", r.s.rt.spec.Procedure, "error", err)
	panic(http.ErrAbortHandler)
}

// sse is a stream of server-sent events. The id of an event is the index from
// which to resume, given only where an index is complete.
type sse struct {
	s   *restStream
	buf []byte
}

func (e *sse) begin() {
	h := e.s.w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Accel-Buffering", "no") // proxies must not hold events back
	e.s.w.WriteHeader(http.StatusOK)
	e.buf = append(e.buf[:0], "retry: 1000\n\n"...)
}

func (e *sse) send(m proto.Message) error {
	if a, ok := m.(*blixardv1.FunctionActivity); ok { // cannot be resumed: no id
		e.buf = append(append(append(e.buf, "event: "...), a.Kind...), "\ndata: "...)
		e.buf = append(blixardv1.AppendJSON(e.buf, a), "\n\n"...)
		return e.flush()
	}
	w, ok := m.(*blixardv1.WatchResponse)
	if !ok {
		return nil
	}
	if !w.More && w.Type != client.WatchExisting {
		e.buf = append(e.buf, "id: "...)
		e.buf = strconv.AppendUint(e.buf, w.Index, 10)
		e.buf = append(e.buf, '\n')
	}
	if w.Type != "progress" { // an id alone moves the browser's last event on
		e.buf = append(e.buf, "event: "...)
		e.buf = append(e.buf, w.Type...)
		e.buf = append(e.buf, "\ndata: "...)
		e.buf = blixardv1.AppendJSON(e.buf, w)
		e.buf = append(e.buf, '\n')
	}
	e.buf = append(e.buf, '\n')
	return e.flush()
}

func (e *sse) flush() error {
	_, err := e.s.w.Write(e.buf)
	e.buf = e.buf[:0]
	if err != nil {
		return err
	}
	return http.NewResponseController(e.s.w).Flush()
}

// fail tells the reason as an event of its own.
func (e *sse) fail(err error) {
	p, _ := problemOf(asProblem(err))
	e.buf = append(e.buf, "event: error\ndata: "...)
	e.buf = append(e.buf, p.json()...)
	e.buf = append(e.buf, "\n\n"...)
	if e.flush() != nil {
		return // the caller has left
	}
}
