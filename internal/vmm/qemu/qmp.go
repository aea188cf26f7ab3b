package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

const (
	// qmpFrameBytes bounds one line of the protocol; QEMU's longest answers
	// that we ask for are a few KiB.
	qmpFrameBytes = 1 << 20
	// qmpEventsKept bounds the events remembered while waiting for answers.
	qmpEventsKept = 64
	// qmpFramesSkipped bounds how many frames that are not the answer are read
	// before a command gives up.
	qmpFramesSkipped = 10_000
)

// QMPError is a refusal by QEMU.
type QMPError struct {
	Command string
	Class   string // such as GenericError, CommandNotFound
	Desc    string // in words
}

func (e *QMPError) Error() string {
	return fmt.Sprintf("qemu refused %s: %s (%s)", e.Command, e.Desc, e.Class)
}

var errProtocol = errors.New("not the QEMU machine protocol")

// qmpEvent is something QEMU told unasked.
type qmpEvent struct {
	Name string
	Data json.RawMessage
}

// qmpConn is one session of the QEMU machine protocol. It has no goroutine: an
// answer is read by the caller who waits for it, and events that arrive
// meanwhile are kept, the oldest dropped first, so that nobody has to drain
// them. One caller at a time.
type qmpConn struct {
	conn   net.Conn
	lines  *bufio.Scanner
	nextID uint64
	events []qmpEvent
	broken error // the stream cannot be trusted any more
}

type qmpFrame struct {
	Greeting json.RawMessage `json:"QMP"`
	ID       *uint64         `json:"id"`
	Return   json.RawMessage `json:"return"`
	Error    *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	Event string          `json:"event"`
	Data  json.RawMessage `json:"data"`
}

// newQMP shakes hands on conn and owns it from then on, also when it fails.
func newQMP(ctx context.Context, conn net.Conn) (*qmpConn, error) {
	lines := bufio.NewScanner(conn)
	lines.Buffer(make([]byte, 0, 4096), qmpFrameBytes)
	q := &qmpConn{conn: conn, lines: lines}
	release := q.bind(ctx)
	frame, err := q.read()
	release()
	if err == nil && frame.Greeting == nil {
		err = fmt.Errorf("waiting for the greeting: %w", errProtocol)
	}
	if err == nil {
		err = q.execute(ctx, "qmp_capabilities", nil, nil)
	}
	if err != nil {
		return nil, errors.Join(because(ctx, err), conn.Close())
	}
	return q, nil
}

// Close ends the session; QEMU then takes the next one.
func (q *qmpConn) Close() error { return q.conn.Close() }

// execute runs one command and decodes its answer into out unless that is nil.
// A refusal is a *QMPError and leaves the session usable; any other error,
// the context's included, ends it.
func (q *qmpConn) execute(ctx context.Context, command string, arguments, out any) error {
	if q.broken != nil {
		return q.broken
	}
	q.nextID++
	id := q.nextID
	request, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, arguments, id})
	if err != nil {
		return fmt.Errorf("encoding %s: %w", command, err)
	}
	release := q.bind(ctx)
	defer release()
	if _, err := q.conn.Write(append(request, '\n')); err != nil {
		return q.fail(ctx, fmt.Errorf("sending %s: %w", command, err))
	}
	for range qmpFramesSkipped {
		frame, err := q.read()
		if err != nil {
			return q.fail(ctx, fmt.Errorf("waiting for the answer to %s: %w", command, err))
		}
		if frame.Event != "" {
			q.keep(qmpEvent{frame.Event, frame.Data})
			continue
		}
		if frame.ID == nil || *frame.ID != id {
			continue // the answer to a command whose caller gave up, or noise
		}
		if frame.Error != nil {
			return &QMPError{Command: command, Class: frame.Error.Class, Desc: frame.Error.Desc}
		}
		if out == nil {
			return nil
		}
		if err := json.Unmarshal(frame.Return, out); err != nil {
			return q.fail(ctx, fmt.Errorf("decoding the answer to %s: %w", command, err))
		}
		return nil
	}
	return q.fail(ctx, fmt.Errorf("no answer to %s in %d frames: %w", command, qmpFramesSkipped, errProtocol))
}

func (q *qmpConn) read() (qmpFrame, error) {
	var frame qmpFrame
	for q.lines.Scan() {
		if len(q.lines.Bytes()) == 0 {
			continue
		}
		if err := json.Unmarshal(q.lines.Bytes(), &frame); err != nil {
			return frame, fmt.Errorf("%w: %w", errProtocol, err)
		}
		return frame, nil
	}
	if err := q.lines.Err(); err != nil {
		return frame, err
	}
	return frame, io.ErrUnexpectedEOF
}

func (q *qmpConn) keep(e qmpEvent) {
	if len(q.events) >= qmpEventsKept {
		q.events = append(q.events[:0], q.events[1:]...)
	}
	q.events = append(q.events, e)
}

// bind makes the end of ctx interrupt reads and writes until release is called.
func (q *qmpConn) bind(ctx context.Context) (release func()) {
	// SetDeadline fails only on a closed connection, which the next read tells.
	interrupt := func() { _ = q.conn.SetDeadline(time.Unix(1, 0)) }
	stop := context.AfterFunc(ctx, interrupt)
	return func() { stop() }
}

func (q *qmpConn) fail(ctx context.Context, err error) error {
	q.broken = because(ctx, err)
	return q.broken
}

// because names the context's end as the cause where it is one.
func because(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%w (%w)", err, context.Cause(ctx))
	}
	return err
}
