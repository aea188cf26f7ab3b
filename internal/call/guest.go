package call

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// ErrEnded: the invocation has ended, or nobody waits for its answer.
var ErrEnded = errors.New("the invocation has ended")

// Guest is the guest's end.
type Guest struct {
	port    io.ReadWriter
	handler Handler
	frames  *frameReader

	writing sync.Mutex // a frame at a time
	out     []byte     // what is being written; under writing

	mu         sync.Mutex
	open       map[uint32]*response // invocations that were handed over
	partial    map[uint32]*partial  // invocations of which a part of the payload is missing
	init       uint32               // the question that is being answered; 0: none
	maxPayload uint64
	ended      uint64
}

type partial struct {
	request *Request
	size    int // of the whole payload
}

// NewGuest makes the guest's end of a port. Reads and writes of the port may be
// under way at the same time.
func NewGuest(port io.ReadWriter, handler Handler) *Guest {
	return &Guest{
		port: port, handler: handler, frames: newFrameReader(port),
		out:  make([]byte, 0, headerBytes+MaxFrame),
		open: make(map[uint32]*response), partial: make(map[uint32]*partial), maxPayload: MaxPayload,
	}
}

// SetMaxPayload bounds payloads to so many bytes.
func (g *Guest) SetMaxPayload(n int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.maxPayload = uint64(max(0, n))
}

// Serve answers the host until the connection ends, which is never nil. What is
// open then is given up; Serve may be called again when the host is back.
func (g *Guest) Serve() error {
	g.frames.reset()
	for {
		h, payload, err := g.frames.next()
		if err == nil {
			err = g.take(h, payload)
		}
		if err != nil {
			g.abandon()
			return err
		}
	}
}

func (g *Guest) abandon() {
	g.mu.Lock()
	defer g.mu.Unlock()
	clear(g.partial)
	for _, w := range g.open { //order:any each is told the same
		w.giveUp()
	}
	clear(g.open)
}

func (g *Guest) take(h header, payload []byte) error {
	r := reader{b: payload}
	switch h.kind {
	case kindInvoke:
		return g.takeInvoke(h.id, &r)
	case kindBody:
		return g.takeBody(h.id, payload)
	case kindWindow:
		if w := g.response(h.id); w != nil {
			w.grant(r.uint())
		}
		return r.err
	case kindCancel:
		g.mu.Lock()
		w := g.open[h.id]
		delete(g.open, h.id)
		delete(g.partial, h.id)
		g.mu.Unlock()
		if w != nil {
			w.giveUp()
			g.handler.Cancel(w.request)
		}
		return nil
	case kindInit:
		init := r.init()
		if r.err != nil {
			return g.answer(h.id, r.err, nil)
		}
		g.setInit(h.id)
		ready, err := g.handler.Init(&init)
		g.setInit(0)
		return g.answer(h.id, err, func(w *writer) { w.ready(&ready) })
	case kindRestore:
		identity := r.identity()
		if r.err != nil {
			return g.answer(h.id, r.err, nil)
		}
		ack, err := g.handler.Restore(&identity)
		return g.answer(h.id, err, func(w *writer) { w.ack(&ack) })
	case kindStat:
		stat, err := g.handler.Stat()
		return g.answer(h.id, err, func(w *writer) { w.stat(&stat) })
	case kindShutdown:
		reason, grace := r.text(), r.duration()
		if r.err != nil {
			return r.err
		}
		// The connection is the guest's life: nothing waits for this one.
		go func() {
			g.handler.Shutdown(reason, grace)
			//nolint:errcheck // a host that is gone has no use for the answer
			g.answer(h.id, nil, func(*writer) {})
		}()
		return nil
	default:
		return fmt.Errorf("a frame of type %d is not the host's to send", h.kind)
	}
}

func (g *Guest) setInit(id uint32) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.init = id
}

func (g *Guest) response(id uint32) *response {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.open[id]
}

func (g *Guest) takeInvoke(id uint32, r *reader) error {
	q := &Request{}
	size := r.request(q)
	if r.err != nil {
		return r.err
	}
	g.mu.Lock()
	limit, open := g.maxPayload, len(g.open)+len(g.partial)
	g.mu.Unlock()
	if size > limit || open >= MaxOpen {
		return fmt.Errorf("a payload of %d bytes with %d invocations open", size, open)
	}
	part := r.b
	if uint64(len(part)) > size {
		return errors.New("more payload than was announced")
	}
	q.Payload = append(make([]byte, 0, size), part...)
	if uint64(len(part)) < size {
		g.mu.Lock()
		g.partial[id] = &partial{q, int(size)}
		g.mu.Unlock()
		return nil
	}
	g.begin(id, q)
	return nil
}

func (g *Guest) takeBody(id uint32, payload []byte) error {
	g.mu.Lock()
	p := g.partial[id]
	g.mu.Unlock()
	if p == nil {
		return nil // it was cancelled
	}
	if len(payload) > p.size-len(p.request.Payload) {
		return errors.New("more payload than was announced")
	}
	p.request.Payload = append(p.request.Payload, payload...)
	if len(p.request.Payload) == p.size {
		g.mu.Lock()
		delete(g.partial, id)
		g.mu.Unlock()
		g.begin(id, p.request)
	}
	return nil
}

func (g *Guest) begin(id uint32, q *Request) {
	q.Arrived = time.Now()
	w := newResponse(g, id, q)
	g.mu.Lock()
	g.open[id] = w
	g.mu.Unlock()
	g.handler.Invoke(q, w)
}

// Open is how many invocations have not ended.
func (g *Guest) Open() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.open)
}

// Ended is how many invocations have ended.
func (g *Guest) Ended() uint64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.ended
}

func (g *Guest) finished(id uint32) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.open, id)
	g.ended++
}

// Log sends output of the function. It belongs to the invocation that is open,
// when that is the only one, or to the initialisation under way.
func (g *Guest) Log(p []byte) error {
	g.mu.Lock()
	id := g.init
	if len(g.open) == 1 {
		for only := range g.open { //order:any there is one
			id = only
		}
	}
	g.mu.Unlock()
	for len(p) > 0 {
		n := min(len(p), MaxFrame)
		if err := g.write(kindLog, id, func(w *writer) { w.b = append(w.b, p[:n]...) }); err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// answer ends a question.
func (g *Guest) answer(id uint32, failed error, payload func(*writer)) error {
	if failed == nil {
		return g.write(kindOK, id, payload)
	}
	f := failure{message: failed.Error()}
	if fault, ok := errors.AsType[*InitError](failed); ok {
		f = failure{errorType: fault.Type, message: fault.Message, body: fault.Body}
	}
	const most = MaxFrame / 4
	if len(f.message) > most {
		f.message = f.message[:most]
	}
	if len(f.body) > most {
		f.body = nil // a part of it would be no JSON
	}
	return g.write(kindFail, id, func(w *writer) { w.failure(f) })
}

// write sends one frame.
func (g *Guest) write(k kind, id uint32, payload func(*writer)) error {
	g.writing.Lock()
	defer g.writing.Unlock()
	w := writer{b: append(g.out[:0], make([]byte, headerBytes)...)}
	payload(&w)
	size := len(w.b) - headerBytes
	if size > MaxFrame {
		return fmt.Errorf("%d bytes do not fit into a frame of at most %d", size, MaxFrame)
	}
	putHeader(w.b, k, id, size)
	_, err := g.port.Write(w.b)
	return err
}
