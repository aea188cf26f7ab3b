package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// talk runs a session with a QEMU that answers each request with what answer
// gives, and waits for its end.
func talk(t *testing.T, answer func(id uint64, command string) string, use func(context.Context, *qmpConn)) {
	t.Helper()
	ours, theirs := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer theirs.Close()
		if _, err := io.WriteString(theirs, `{"QMP": {"version": {}, "capabilities": []}}`+"\r\n"); err != nil {
			return
		}
		requests := bufio.NewScanner(theirs)
		for requests.Scan() {
			var request struct {
				Execute string
				ID      uint64
			}
			if err := json.Unmarshal(requests.Bytes(), &request); err != nil {
				t.Errorf("request %q: %v", requests.Text(), err)
				return
			}
			text := fmt.Sprintf("{\"return\":{},\"id\":%d}\r\n", request.ID)
			if request.Execute != "qmp_capabilities" {
				text = answer(request.ID, request.Execute)
			}
			if _, err := io.WriteString(theirs, text); err != nil {
				return
			}
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	q, err := newQMP(ctx, ours)
	if err != nil {
		t.Fatal(err)
	}
	use(ctx, q)
	if err := q.Close(); err != nil {
		t.Error(err)
	}
	<-done
}

func TestQMPAnswers(t *testing.T) {
	answer := func(id uint64, command string) string {
		switch command {
		case "refused":
			return fmt.Sprintf(`{"id":%d,"error":{"class":"GenericError","desc":"no"}}`, id) + "\n"
		default: // a stale answer, an event, an empty line, then the answer
			return `{"id":99999,"return":"stale"}` + "\n" + `{"event":"STOP","data":{"a":1}}` + "\n\r\n" +
				fmt.Sprintf(`{"return":"%s","id":%d}`, command, id) + "\n"
		}
	}
	talk(t, answer, func(ctx context.Context, q *qmpConn) {
		var refusal *QMPError
		if err := q.execute(ctx, "refused", nil, nil); !errors.As(err, &refusal) || refusal.Desc != "no" || refusal.Class != "GenericError" {
			t.Errorf("refused: %v", err)
		}
		for range 3 * qmpEventsKept {
			var got string
			if err := q.execute(ctx, "query", nil, &got); err != nil || got != "query" {
				t.Fatalf("query: %q, %v", got, err)
			}
		}
		if len(q.events) != qmpEventsKept || q.events[0].Name != "STOP" {
			t.Errorf("%d events kept", len(q.events))
		}
		var number int
		if err := q.execute(ctx, "query", nil, &number); err == nil {
			t.Error("a text was decoded as a number")
		}
		if err := q.execute(ctx, "query", nil, nil); err == nil {
			t.Error("a broken session was used again")
		}
	})
}

func TestQMPContextEnds(t *testing.T) {
	talk(t, func(uint64, string) string { return "" }, func(ctx context.Context, q *qmpConn) {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
		defer cancel()
		if err := q.execute(ctx, "never", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}

func TestQMPGarbage(t *testing.T) {
	for name, text := range map[string]string{
		"nothing":        "",
		"no greeting":    `{"return":{}}` + "\n",
		"not JSON":       "hello\n",
		"JSON, no frame": "[1,2,3]\n",
		"cut off":        `{"QMP": {"ver`,
		"endless line":   strings.Repeat("x", qmpFrameBytes+10),
		"nothing after":  `{"QMP": {}}` + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			if q, err := newQMP(t.Context(), recording{strings.NewReader(text)}); err == nil {
				t.Errorf("took it for QMP: %+v", q)
			}
		})
	}
}

// recording is a peer that says what it says, whatever it is told.
type recording struct{ io.Reader }

func (recording) Write(p []byte) (int, error)      { return len(p), nil }
func (recording) Close() error                     { return nil }
func (recording) LocalAddr() net.Addr              { return nil }
func (recording) RemoteAddr() net.Addr             { return nil }
func (recording) SetDeadline(time.Time) error      { return nil }
func (recording) SetReadDeadline(time.Time) error  { return nil }
func (recording) SetWriteDeadline(time.Time) error { return nil }

// Whatever QEMU writes gives answers or errors, in bounded memory.
func FuzzQMP(f *testing.F) {
	f.Add("{\"QMP\":{}}\n{\"return\":{},\"id\":1}\n{\"return\":{\"running\":true},\"id\":2}\n")
	f.Add("{\"QMP\":{}}\n{\"event\":\"STOP\"}\n{\"error\":{\"class\":\"a\",\"desc\":\"b\"},\"id\":1}\n")
	f.Add("{\"QMP\":{}}\n\r\n{\"return\":null,\"id\":1}\n{\"id\":2}\n")
	f.Fuzz(func(t *testing.T, text string) {
		q, err := newQMP(t.Context(), recording{strings.NewReader(text)})
		if err != nil {
			return
		}
		var out map[string]any
		for range 4 {
			if err := q.execute(t.Context(), "query-status", nil, &out); err != nil {
				break
			}
		}
		if len(q.events) > qmpEventsKept {
			t.Errorf("%d events kept", len(q.events))
		}
	})
}
