// Package wasmlane is what blixard-guest and blixard-guest-wasm say to each other
// in a guest: the one has the invocations, the other runs WebAssembly for it.
//
// A lane is a connection on which one invocation at a time goes through: a request,
// then parts of the answer, then how it ended. The first lane begins with how the
// compilation has ended. Frames are type (1 byte), length (4, big endian), payload.
//
// Trust: the agent reads what a process has written that runs foreign code. Lengths
// are checked before anything is allocated.
//
// Ownership: each end of a lane is used by one goroutine at a time.
package wasmlane

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"
)

// FirstDescriptor of the lanes in blixard-guest-wasm.
const FirstDescriptor = 3

const (
	maxFrame  = 64 << 10
	maxEvent  = 64 << 20
	headBytes = 5
)

// What frames are.
const (
	kindRequest = 'R'
	kindOutput  = 'O' // a part of the module's standard output
	kindOutcome = 'X' // the end of an invocation, or of the compilation
)

// ErrMalformed: the other end does not keep to the protocol.
var ErrMalformed = errors.New("malformed frame")

// Request is an invocation.
type Request struct {
	Remaining time.Duration // what it may take
	Env       []string      // NAME=value, besides those of the function
	Event     []byte        // the module's standard input
}

// Outcome is how an invocation or a compilation has ended.
type Outcome struct {
	Type    string // of the error; "" when all is well
	Message string
}

// WriteRequest sends an invocation.
func WriteRequest(w io.Writer, q Request) error {
	b := make([]byte, headBytes, headBytes+64+len(q.Event))
	b = binary.BigEndian.AppendUint64(b, uint64(max(0, q.Remaining)))
	b = binary.BigEndian.AppendUint32(b, uint32(len(q.Env)))
	for _, entry := range q.Env {
		b = appendText(b, entry)
	}
	return send(w, kindRequest, append(b, q.Event...))
}

// ReadRequest waits for an invocation; io.EOF when there are no more.
func ReadRequest(r io.Reader) (Request, error) {
	kind, b, err := receive(r, maxEvent)
	if err != nil {
		return Request{}, err
	}
	if kind != kindRequest || len(b) < 12 {
		return Request{}, ErrMalformed
	}
	q := Request{Remaining: time.Duration(binary.BigEndian.Uint64(b))}
	n := binary.BigEndian.Uint32(b[8:])
	b = b[12:]
	for range n {
		var entry string
		if entry, b, err = cutText(b); err != nil {
			return Request{}, err
		}
		q.Env = append(q.Env, entry)
	}
	q.Event = b
	return q, nil
}

// WriteOutput sends a part of the answer.
func WriteOutput(w io.Writer, p []byte) error {
	for len(p) > 0 {
		n := min(len(p), maxFrame)
		if err := send(w, kindOutput, append(make([]byte, headBytes, headBytes+n), p[:n]...)); err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// WriteOutcome ends an answer.
func WriteOutcome(w io.Writer, o Outcome) error {
	const most = 16 << 10
	b := appendText(make([]byte, headBytes), o.Type[:min(len(o.Type), 256)])
	return send(w, kindOutcome, appendText(b, o.Message[:min(len(o.Message), most)]))
}

// ReadAnswer gives the parts of an answer to output, and then its outcome.
func ReadAnswer(r io.Reader, output func([]byte) error) (Outcome, error) {
	for {
		kind, b, err := receive(r, maxFrame)
		if err != nil {
			return Outcome{}, err
		}
		switch kind {
		case kindOutput:
			if err := output(b); err != nil {
				return Outcome{}, err
			}
		case kindOutcome:
			var o Outcome
			if o.Type, b, err = cutText(b); err == nil {
				o.Message, _, err = cutText(b)
			}
			return o, err
		default:
			return Outcome{}, ErrMalformed
		}
	}
}

func appendText(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
}

func cutText(b []byte) (string, []byte, error) {
	if len(b) < 4 || uint64(binary.BigEndian.Uint32(b)) > uint64(len(b)-4) {
		return "", nil, ErrMalformed
	}
	n := int(binary.BigEndian.Uint32(b))
	return string(b[4 : 4+n]), b[4+n:], nil
}

// send fills in the head, for which b has room, and writes all at once.
func send(w io.Writer, kind byte, b []byte) error {
	b[0] = kind
	binary.BigEndian.PutUint32(b[1:], uint32(len(b)-headBytes))
	if _, err := w.Write(b); err != nil {
		return fmt.Errorf("writing to a lane: %w", err)
	}
	return nil
}

func receive(r io.Reader, limit int) (byte, []byte, error) {
	var head [headBytes]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		if errors.Is(err, io.EOF) {
			return 0, nil, io.EOF
		}
		return 0, nil, fmt.Errorf("reading from a lane: %w", err)
	}
	n := binary.BigEndian.Uint32(head[1:])
	if uint64(n) > uint64(limit) {
		return 0, nil, ErrMalformed
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return 0, nil, fmt.Errorf("reading from a lane: %w", err)
	}
	return head[0], b, nil
}
