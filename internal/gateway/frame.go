package gateway

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/wire"
)

// How a call travels between nodes: the request's body is the length of a head
// (4 bytes, big endian), the head, and the payload; the answer's body is frames
// of one byte for the kind, 4 bytes of length, and content. It ends with a
// report or an error; without one it was cut off.
const (
	frameHead   = 'H'
	frameData   = 'D'
	frameReport = 'R'
	frameError  = 'E'

	frameOverhead = 5
	maxHeadBytes  = 1 << 20 // of a call or an answer: HTTP headers, above all
	maxFrameBytes = 1 << 20
)

var errFrame = errors.New("malformed frame")

// callHead is a call without its payload.
type callHead struct {
	inv       *blixard.Invocation
	try       Try
	remaining time.Duration // until the deadline: clocks differ
}

func (h *callHead) code(c *wire.Coder) {
	inv := h.inv
	wire.String(c, &inv.RequestID)
	wire.String(c, &inv.Function)
	wire.String(c, &inv.Qualifier)
	wire.Int(c, &inv.Number)
	wire.Uint(c, &inv.Seq)
	wire.Int(c, &h.remaining)
	wire.String(c, &inv.ClientContext)
	wire.String(c, &inv.TraceID)
	wire.Bool(c, &inv.LogTail)
	wire.String(c, &inv.Caller)
	wire.Bool(c, &h.try.MayStart)
	wire.Bool(c, &h.try.MayWait)
	wire.Optional(c, &inv.HTTP, func(c *wire.Coder, r *blixard.HTTPRequest) {
		wire.String(c, &r.Method)
		wire.String(c, &r.Target)
		wire.String(c, &r.Host)
		wire.List(c, &r.Headers, codePair)
	})
	wire.Bool(c, &inv.Stream)
}

func codePair(c *wire.Coder, p *[2]string) {
	wire.String(c, &p[0])
	wire.String(c, &p[1])
}

func codeResponseHead(c *wire.Coder, h *blixard.ResponseHead) {
	wire.Int(c, &h.Status)
	wire.List(c, &h.Headers, codePair)
	wire.String(c, &h.ContentType)
	wire.Bool(c, &h.Streaming)
}

func codeReport(c *wire.Coder, r *blixard.InvocationReport) {
	wire.String(c, &r.RequestID)
	wire.String(c, &r.Node)
	wire.String(c, &r.Instance)
	wire.Int(c, &r.Number)
	wire.String(c, &r.Start)
	wire.Optional(c, &r.Error, func(c *wire.Coder, e *blixard.FunctionError) {
		wire.String(c, &e.Kind)
		wire.String(c, &e.Type)
	})
	for _, d := range []*time.Duration{
		&r.Parts.Queue, &r.Parts.Place, &r.Parts.Commit, &r.Parts.Spawn, &r.Parts.Restore, &r.Parts.Boot, &r.Parts.Init, &r.Parts.Handler, &r.Parts.Transfer, &r.Parts.Total,
	} {
		wire.Int(c, d)
	}
	wire.Int(c, &r.MemoryMiB)
	wire.Int(c, &r.UsedMiB)
	c.Blob(&r.Log)
}

// refusedFrame is a route.Refused, or any other error with Why "".
type refusedFrame struct {
	refused route.Refused
	err     blixard.Error
}

func (f *refusedFrame) code(c *wire.Coder) {
	wire.String(c, &f.refused.Why)
	wire.Bool(c, &f.refused.Handed)
	wire.Bool(c, &f.refused.Begun)
	wire.String(c, &f.err.Code)
	wire.String(c, &f.err.Message)
	wire.String(c, &f.err.Hint)
	wire.String(c, &f.err.Field)
}

func (f *refusedFrame) take(err error) {
	if r, ok := errors.AsType[*route.Refused](err); ok {
		f.refused, f.err = *r, *r.Err
		return
	}
	f.refused = route.Refused{Why: route.Gone, Handed: true}
	if e, ok := errors.AsType[*blixard.Error](err); ok {
		f.err = *e
	} else {
		f.err = *blixard.Errorf(blixard.CodeInternal, "%v", err)
	}
}

func (f *refusedFrame) give() *route.Refused {
	f.refused.Err = &f.err
	return &f.refused
}

// appendCall adds the head of a call and its length to buf; the payload follows.
func appendCall(buf []byte, h *callHead) []byte {
	start := len(buf)
	buf = append(buf, 0, 0, 0, 0)
	c := wire.Writer(buf)
	c.Record(h.code)
	buf = c.Bytes()
	binary.BigEndian.PutUint32(buf[start:], uint32(len(buf)-start-4))
	return buf
}

// readCall reads a call as appendCall wrote it, with its payload.
func readCall(r io.Reader, size, limit int64) (callHead, error) {
	h := callHead{inv: new(blixard.Invocation)}
	if size < 4 || size > limit+maxHeadBytes+4 {
		return h, fmt.Errorf("%w: a call of %d bytes", errFrame, size)
	}
	buf := make([]byte, size)
	if _, err := io.ReadFull(r, buf); err != nil {
		return h, fmt.Errorf("reading a call: %w", err)
	}
	n := int64(binary.BigEndian.Uint32(buf))
	if n > maxHeadBytes || 4+n > size {
		return h, fmt.Errorf("%w: a head of %d bytes in a call of %d", errFrame, n, size)
	}
	c := wire.Reader(buf[4 : 4+n])
	c.Record(h.code)
	if err := c.Done(); err != nil {
		return h, fmt.Errorf("reading the head of a call: %w", err)
	}
	h.inv.Payload = buf[4+n:]
	return h, nil
}

// appendFrame adds a frame whose content code writes.
func appendFrame(buf []byte, kind byte, code func(*wire.Coder)) []byte {
	start := len(buf)
	buf = append(buf, kind, 0, 0, 0, 0)
	c := wire.Writer(buf)
	c.Record(code)
	buf = c.Bytes()
	binary.BigEndian.PutUint32(buf[start+1:], uint32(len(buf)-start-frameOverhead))
	return buf
}

// answerReader takes an answer apart.
type answerReader struct {
	r    io.Reader
	head [frameOverhead]byte
	buf  []byte
}

// copyTo hands the answer to sink. Its error is the *route.Refused that was sent, or
// one that says that the answer was cut off, or the sink's.
func (a *answerReader) copyTo(sink blixard.ResponseSink) (blixard.InvocationReport, error) {
	var report blixard.InvocationReport
	begun := false
	for {
		kind, content, err := a.next()
		if err != nil {
			return report, cut(begun, err)
		}
		switch kind {
		case frameHead:
			var h blixard.ResponseHead
			if err := decode(content, func(c *wire.Coder) { codeResponseHead(c, &h) }); err != nil || begun {
				return report, cut(begun, errors.Join(err, errFrame))
			}
			begun = true
			if err := sink.Begin(h); err != nil {
				return report, err
			}
		case frameData:
			if !begun {
				return report, cut(begun, errFrame)
			}
			if _, err := sink.Write(content); err != nil {
				return report, err
			}
		case frameReport:
			if err := decode(content, func(c *wire.Coder) { codeReport(c, &report) }); err != nil {
				return report, cut(begun, err)
			}
			return report, nil
		case frameError:
			var f refusedFrame
			if err := decode(content, f.code); err != nil {
				return report, cut(begun, err)
			}
			r := f.give()
			r.Begun = r.Begun || begun
			return report, r
		default:
			return report, cut(begun, fmt.Errorf("%w: kind %q", errFrame, kind))
		}
	}
}

func decode(content []byte, code func(*wire.Coder)) error {
	c := wire.Reader(content)
	c.Record(code)
	return c.Done()
}

func cut(begun bool, err error) *route.Refused {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return &route.Refused{Why: route.Gone, Handed: true, Begun: begun, Err: blixard.Errorf(blixard.CodeUnavailable, "the answer was cut off: %v", err)}
}

// next returns a frame; its content is valid until the next call.
func (a *answerReader) next() (kind byte, content []byte, err error) {
	if _, err := io.ReadFull(a.r, a.head[:]); err != nil {
		return 0, nil, err
	}
	n := int(binary.BigEndian.Uint32(a.head[1:]))
	if n > maxFrameBytes {
		return 0, nil, fmt.Errorf("%w: %d bytes", errFrame, n)
	}
	if cap(a.buf) < n {
		a.buf = make([]byte, max(n, 4096))
	}
	content = a.buf[:n]
	if _, err := io.ReadFull(a.r, content); err != nil {
		return 0, nil, err
	}
	return a.head[0], content, nil
}
