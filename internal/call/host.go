package call

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

// Options of a Conn. Zero values are the constants.
type Options struct {
	// LogBytes is how much of the output of an invocation, or of the
	// initialisation, is kept for its result: the newest. Default 256 KiB.
	LogBytes int
	// Log is given all output as it comes; requestID is "" for what belongs to no
	// invocation. It is called by the goroutine that reads the connection, which
	// must not wait, and the bytes are its own only until it returns.
	Log func(requestID string, output []byte)
	// MaxAnswer bounds an answer in bytes, whatever the guest was told at Init.
	// Default MaxStream.
	MaxAnswer int64
}

// maxTextBytes bounds words of the guest that go into errors.
const maxTextBytes = 2048

// Conn is the host's end. Its methods may be called at the same time.
type Conn struct {
	conn    net.Conn
	options Options
	reading sync.WaitGroup
	turn    chan struct{} // holds one value while nobody writes
	done    chan struct{} // closed when the connection is over

	mu     sync.Mutex
	err    error // why it is over
	open   map[uint32]*exchange
	lastID uint32
}

// exchange is a question or an invocation that has not ended.
type exchange struct {
	id        uint32
	requestID string
	invoke    bool
	wake      chan struct{} // one value: there is news

	// Under Conn.mu.
	chunks []chunk // of the answer, not taken yet
	window int     // bytes that the guest may still send
	begun  bool    // HEAD came
	final  kind    // of the frame that ended it; 0 before
	last   []byte  // its payload
	log    tail
}

// chunk is a frame of an answer.
type chunk struct {
	kind    kind // HEAD or DATA
	payload []byte
}

// New takes a connection to a guest's call port and owns it from then on.
func New(conn net.Conn, options Options) *Conn {
	if options.LogBytes <= 0 {
		options.LogBytes = 256 << 10
	}
	if options.MaxAnswer <= 0 {
		options.MaxAnswer = MaxStream
	}
	c := &Conn{
		conn: conn, options: options,
		turn: make(chan struct{}, 1), done: make(chan struct{}),
		open: make(map[uint32]*exchange),
	}
	c.turn <- struct{}{}
	c.reading.Go(c.read)
	return c
}

// Close ends the connection and waits for its goroutine. What is under way
// fails with ErrClosed.
func (c *Conn) Close() error {
	c.fail(errors.New("closed by its owner"))
	c.reading.Wait()
	return nil
}

// Done is closed when the connection is over.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Err tells why the connection is over; nil while it is not. It wraps ErrClosed,
// and ErrHostile when the guest broke the protocol.
func (c *Conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		return nil
	}
	return fmt.Errorf("%w: %w", ErrClosed, c.err)
}

func (c *Conn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = err
	close(c.done)
	//nolint:errcheck // the connection is given up; it has no data to lose
	c.conn.Close()
}

// read is the goroutine that reads.
func (c *Conn) read() {
	frames := newFrameReader(c.conn)
	for {
		h, payload, err := frames.next()
		if err == nil {
			err = c.take(h, payload)
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = errors.New("the guest's end was closed")
			}
			c.fail(fmt.Errorf("reading: %w", err))
			return
		}
	}
}

// take gives a frame to its exchange.
func (c *Conn) take(h header, payload []byte) error {
	if h.kind < kindOK || h.kind > kindLog {
		return fmt.Errorf("a frame of type %d: %w", h.kind, ErrHostile)
	}
	c.mu.Lock()
	x := c.open[h.id]
	if x == nil {
		known := h.id <= c.lastID
		c.mu.Unlock()
		if !known {
			return fmt.Errorf("a frame for %d, which nobody asked: %w", h.id, ErrHostile)
		}
		if h.kind == kindLog && c.options.Log != nil {
			c.options.Log("", payload)
		}
		return nil // of one that was given up
	}
	defer c.mu.Unlock()
	if h.kind == kindLog {
		x.log.write(payload, c.options.LogBytes)
		if c.options.Log != nil {
			c.options.Log(x.requestID, payload)
		}
		return nil
	}
	if err := x.deliver(h.kind, payload); err != nil {
		return err
	}
	if x.final != 0 {
		delete(c.open, h.id)
	}
	select {
	case x.wake <- struct{}{}:
	default:
	}
	return nil
}

// deliver keeps a frame until it is taken. Callers hold Conn.mu.
func (x *exchange) deliver(k kind, payload []byte) error {
	answers := k == kindOK || k == kindFail
	if answers == x.invoke {
		return fmt.Errorf("a frame of type %d does not answer %d: %w", k, x.id, ErrHostile)
	}
	own := append([]byte(nil), payload...)
	switch k {
	case kindHead:
		if x.begun {
			return fmt.Errorf("a second head for %d: %w", x.id, ErrHostile)
		}
		x.begun = true
		x.chunks = append(x.chunks, chunk{k, own})
	case kindData:
		if !x.begun || len(own) == 0 || len(own) > x.window {
			return fmt.Errorf("%d bytes of an answer to %d that may not come: %w", len(own), x.id, ErrHostile)
		}
		x.window -= len(own)
		// One chunk for many small frames: what is held is bounded in bytes only.
		if n := len(x.chunks) - 1; n >= 0 && x.chunks[n].kind == kindData && len(x.chunks[n].payload)+len(own) <= MaxFrame {
			x.chunks[n].payload = append(x.chunks[n].payload, own...)
			return nil
		}
		x.chunks = append(x.chunks, chunk{k, own})
	default:
		x.final, x.last = k, own
	}
	return nil
}

// ask begins an exchange.
func (c *Conn) ask(invoke bool, requestID string) (*exchange, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return nil, fmt.Errorf("%w: %w", ErrClosed, c.err)
	}
	if len(c.open) >= MaxOpen || c.lastID+1 == 0 {
		return nil, fmt.Errorf("more than %d questions to one guest at once", MaxOpen)
	}
	c.lastID++
	x := &exchange{id: c.lastID, requestID: requestID, invoke: invoke, window: Window, wake: make(chan struct{}, 1)}
	c.open[x.id] = x
	return x, nil
}

// leave gives an exchange up, unless it has ended.
func (c *Conn) leave(x *exchange) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.open, x.id)
	x.chunks = nil
}

// write sends bytes that are whole frames. When ctx ends in the middle the
// connection is over.
func (c *Conn) write(ctx context.Context, frames []byte) error {
	select {
	case <-c.turn:
	case <-c.done:
		return c.Err()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { c.turn <- struct{}{} }()
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		//nolint:errcheck // a connection that takes no deadline is closed
		c.conn.SetWriteDeadline(time.Unix(1, 0))
	})
	_, err := c.conn.Write(frames)
	if !stop() {
		<-ended
		if err == nil {
			// It came too late to do harm; the next writer needs no deadline.
			err = c.conn.SetWriteDeadline(time.Time{})
		}
	}
	if err != nil {
		c.fail(fmt.Errorf("writing: %w", err))
		if ctx.Err() != nil {
			return fmt.Errorf("%w: %w", ErrClosed, context.Cause(ctx))
		}
		return c.Err()
	}
	return nil
}

// frame is one frame as bytes, with room for its payload.
func frame(k kind, id uint32, payload func(*writer)) ([]byte, error) {
	w := writer{b: make([]byte, headerBytes, 512)}
	payload(&w)
	size := len(w.b) - headerBytes
	if size > MaxFrame {
		return nil, fmt.Errorf("%d bytes do not fit into a frame of at most %d", size, MaxFrame)
	}
	putHeader(w.b, k, id, size)
	return w.b, nil
}

// question asks and waits for the answer; the output that came meanwhile is
// given in any case.
func (c *Conn) question(ctx context.Context, k kind, payload func(*writer)) (answer, log []byte, err error) {
	x, err := c.ask(false, "")
	if err != nil {
		return nil, nil, err
	}
	defer c.leave(x)
	frames, err := frame(k, x.id, payload)
	if err != nil {
		return nil, nil, err
	}
	if err := c.write(ctx, frames); err != nil {
		return nil, nil, err
	}
	select {
	case <-x.wake:
	case <-c.done:
	case <-ctx.Done():
		return nil, c.logOf(x), context.Cause(ctx)
	}
	log = c.logOf(x)
	c.mu.Lock()
	final, last := x.final, x.last
	c.mu.Unlock()
	switch final {
	case kindOK:
		return last, log, nil
	case kindFail:
		r := reader{b: last}
		f := r.failure()
		if r.err != nil {
			c.fail(r.err)
			return nil, log, c.Err()
		}
		f.message = printable(f.message, maxTextBytes)
		if f.errorType == "" {
			return nil, log, fmt.Errorf("%w: %s", ErrRefused, f.message)
		}
		return nil, log, &InitError{Type: printable(f.errorType, 256), Message: f.message, Body: f.body, Log: log}
	default:
		return nil, log, c.Err()
	}
}

func (c *Conn) logOf(x *exchange) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return x.log.bytes()
}

// decoded ends the connection when the guest's answer makes no sense.
func (c *Conn) decoded(r *reader) error {
	if r.err == nil {
		return nil
	}
	c.fail(r.err)
	return c.Err()
}

// Init starts the function in a guest that may still be booting. It fails with
// an *InitError when that is the function's fault, with ErrRefused when the
// guest is not able to, with ErrClosed when the connection is over.
func (c *Conn) Init(ctx context.Context, init Init) (Ready, error) {
	answer, log, err := c.question(ctx, kindInit, func(w *writer) { w.init(&init) })
	if err != nil {
		return Ready{}, fmt.Errorf("initialising the function: %w", err)
	}
	r := reader{b: answer}
	ready := r.ready()
	ready.Log = log
	return ready, c.decoded(&r)
}

// Restore gives a clone its identity and returns when it has it. After any error
// the clone must be thrown away.
func (c *Conn) Restore(ctx context.Context, identity Identity) (Ack, error) {
	answer, _, err := c.question(ctx, kindRestore, func(w *writer) { w.identity(&identity) })
	if err != nil {
		return Ack{}, fmt.Errorf("giving the clone its identity: %w", err)
	}
	r := reader{b: answer}
	ack := r.ack()
	for i, text := range ack.Seen {
		ack.Seen[i] = printable(text, 256)
	}
	return ack, c.decoded(&r)
}

// Stat asks the guest how it is.
func (c *Conn) Stat(ctx context.Context) (Stat, error) {
	answer, _, err := c.question(ctx, kindStat, func(*writer) {})
	if err != nil {
		return Stat{}, fmt.Errorf("asking the guest how it is: %w", err)
	}
	r := reader{b: answer}
	stat := r.stat()
	return stat, c.decoded(&r)
}

// Shutdown tells runtime and extensions that the guest is about to end, and
// waits until they have ended, at most grace. The caller then ends the guest.
func (c *Conn) Shutdown(ctx context.Context, reason string, grace time.Duration) error {
	_, _, err := c.question(ctx, kindShutdown, func(w *writer) {
		w.text(reason)
		w.duration(grace)
	})
	if err != nil {
		return fmt.Errorf("shutting the function down: %w", err)
	}
	return nil
}

// tail keeps the newest bytes of a stream.
type tail struct {
	b    []byte
	full bool // older ones were dropped
}

func (t *tail) write(p []byte, limit int) {
	if len(p) >= limit {
		t.b, t.full = append(t.b[:0], p[len(p)-limit:]...), true
		return
	}
	// Twice the limit at most, so that each byte is moved once.
	if len(t.b)+len(p) > 2*limit {
		t.b, t.full = append(t.b[:0], t.b[len(t.b)-limit+len(p):]...), true
	}
	t.b = append(t.b, p...)
	t.full = t.full || len(t.b) > limit
}

func (t *tail) bytes() []byte { return t.b }

// printable makes words of a guest fit for logs and terminals.
func printable(s string, limit int) string {
	if len(s) > limit {
		s = s[:limit] + "…"
	}
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || r < ' ' && r != '\n' && r != '\t' || r == 0x7f {
			return '?'
		}
		return r
	}, s)
}
