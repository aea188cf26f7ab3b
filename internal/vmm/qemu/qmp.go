package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
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

// qmpCommand is a command whose answer has nothing in it.
type qmpCommand struct {
	name      string
	arguments any
}

// newQMP shakes hands on conn, has commands executed, and owns conn from then
// on, also when it fails. All commands are sent before the first answer is read:
// QEMU greets long before it has time for them.
func newQMP(ctx context.Context, conn net.Conn, commands ...qmpCommand) (*qmpConn, error) {
	lines := bufio.NewScanner(conn)
	lines.Buffer(make([]byte, 0, 4096), qmpFrameBytes)
	q := &qmpConn{conn: conn, lines: lines}
	if err := q.begin(ctx, append([]qmpCommand{{"qmp_capabilities", nil}}, commands...)); err != nil {
		return nil, errors.Join(because(ctx, err), conn.Close())
	}
	return q, nil
}

func (q *qmpConn) begin(ctx context.Context, commands []qmpCommand) error {
	var requests []byte
	for i, command := range commands {
		request, err := encode(command.name, command.arguments, q.nextID+uint64(i)+1)
		if err != nil {
			return err
		}
		requests = append(requests, request...)
	}
	release := q.bind(ctx)
	defer release()
	frame, err := q.read()
	if err == nil && frame.Greeting == nil {
		err = errProtocol
	}
	if err != nil {
		return fmt.Errorf("waiting for the greeting: %w", err)
	}
	if _, err := q.conn.Write(requests); err != nil {
		return fmt.Errorf("sending %s: %w", commands[0].name, err)
	}
	for _, command := range commands {
		q.nextID++
		if _, err := q.answer(command.name, q.nextID); err != nil {
			return err
		}
	}
	return nil
}

func encode(command string, arguments any, id uint64) ([]byte, error) {
	request, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, arguments, id})
	if err != nil {
		return nil, fmt.Errorf("encoding %s: %w", command, err)
	}
	return append(request, '\n'), nil
}

// Close ends the session; QEMU then takes the next one.
func (q *qmpConn) Close() error { return q.conn.Close() }

// execute runs one command and decodes its answer into out unless that is nil.
// A refusal is a *QMPError and leaves the session usable; any other error,
// the context's included, ends it.
func (q *qmpConn) execute(ctx context.Context, command string, arguments, out any) error {
	return q.executeWith(ctx, command, arguments, out, nil)
}

// executeWith is execute with a file whose descriptor QEMU gets along with the
// command; nil for none.
func (q *qmpConn) executeWith(ctx context.Context, command string, arguments, out any, file *os.File) error {
	if q.broken != nil {
		return q.broken
	}
	q.nextID++
	request, err := encode(command, arguments, q.nextID)
	if err != nil {
		return err
	}
	release := q.bind(ctx)
	defer release()
	if err := q.send(request, file); err != nil {
		return q.fail(ctx, fmt.Errorf("sending %s: %w", command, err))
	}
	answer, err := q.answer(command, q.nextID)
	if refusal := (*QMPError)(nil); errors.As(err, &refusal) {
		return err
	}
	if err == nil && out != nil {
		if err = json.Unmarshal(answer, out); err != nil {
			err = fmt.Errorf("decoding the answer to %s: %w", command, err)
		}
	}
	if err != nil {
		return q.fail(ctx, err)
	}
	return nil
}

func (q *qmpConn) send(request []byte, file *os.File) error {
	if file == nil {
		_, err := q.conn.Write(request)
		return err
	}
	conn, ok := q.conn.(*net.UnixConn)
	if !ok {
		return fmt.Errorf("a file cannot be sent over %T: %w", q.conn, errors.ErrUnsupported)
	}
	n, _, err := conn.WriteMsgUnix(request, unix.UnixRights(int(file.Fd())), nil)
	if err == nil && n < len(request) {
		_, err = conn.Write(request[n:])
	}
	return err
}

// answer reads the answer to the command that was sent under id.
func (q *qmpConn) answer(command string, id uint64) (json.RawMessage, error) {
	for range qmpFramesSkipped {
		frame, err := q.read()
		if err != nil {
			return nil, fmt.Errorf("waiting for the answer to %s: %w", command, err)
		}
		if frame.Event != "" {
			q.keep(qmpEvent{frame.Event, frame.Data})
			continue
		}
		if frame.ID == nil || *frame.ID != id {
			continue // the answer to a command whose caller gave up, or noise
		}
		if frame.Error != nil {
			return nil, &QMPError{Command: command, Class: frame.Error.Class, Desc: frame.Error.Desc}
		}
		return frame.Return, nil
	}
	return nil, fmt.Errorf("no answer to %s in %d frames: %w", command, qmpFramesSkipped, errProtocol)
}

// awaitMigration reads until QEMU tells that the saving or loading of a state,
// the only one of this session, has ended. Its events have to be enabled.
func (q *qmpConn) awaitMigration(ctx context.Context) error {
	release := q.bind(ctx)
	defer release()
	for range qmpFramesSkipped {
		for len(q.events) > 0 {
			event := q.events[0]
			q.events = q.events[1:]
			var data struct{ Status string }
			if event.Name != "MIGRATION" || json.Unmarshal(event.Data, &data) != nil {
				continue
			}
			switch data.Status {
			case "completed":
				return nil
			case "failed", "cancelled":
				return &QMPError{Command: "the migration", Class: "GenericError", Desc: data.Status}
			}
		}
		frame, err := q.read()
		if err != nil {
			return q.fail(ctx, fmt.Errorf("waiting for the end of the migration: %w", err))
		}
		if frame.Event != "" {
			q.keep(qmpEvent{frame.Event, frame.Data})
		}
	}
	return q.fail(ctx, fmt.Errorf("no end of the migration in %d frames: %w", qmpFramesSkipped, errProtocol))
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
