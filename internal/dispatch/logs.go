package dispatch

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
)

// LogLine is a line of a function's log.
type LogLine struct {
	TimeMS    int64                `json:"time_ms"`
	Function  blixard.FunctionName `json:"function"`
	Number    int                  `json:"number"`
	Node      blixard.NodeName     `json:"node"`
	Instance  string               `json:"instance"`
	RequestID string               `json:"request_id,omitempty"`
	Text      string               `json:"text"` // at most 64 KiB
}

// LogQuery asks for lines of a function's log.
type LogQuery struct {
	Function blixard.FunctionName
	// Number of the version; Any: of all.
	Number    int
	Any       bool
	RequestID string // "": of all calls
	SinceMS   int64  // 0: all that is kept
	Tail      int    // only so many of what is there already; 0: all
	Follow    bool   // go on with what comes
}

func (q *LogQuery) takes(l *LogLine) bool {
	return (q.Any || l.Number == q.Number) && (q.RequestID == "" || l.RequestID == q.RequestID) && l.TimeMS >= q.SinceMS
}

// Bounds of what is kept of a function's log on a node.
const (
	keptLines = 4000
	keptBytes = 2 << 20
	lineBytes = 64 << 10
)

type lineKind uint8

const (
	lineOutput lineKind = iota
	lineStart
	lineReport // END and REPORT
)

// record is a line as it is kept: those of calls are put into words only when
// somebody reads them.
type record struct {
	kind      lineKind
	at        time.Time
	number    int
	instance  string
	requestID string
	text      string
	report    reportLine
}

type reportLine struct {
	took    time.Duration
	init    time.Duration
	memory  int64
	used    int64
	failure string
}

// logRing is the end of a function's log.
type logRing struct {
	name blixard.FunctionName

	mu      sync.Mutex
	records []record // a ring once it is full
	first   uint64   // number of the oldest record there is
	next    uint64   // number of the next record
	bytes   int
	grown   chan struct{} // closed and replaced when there is somebody to tell
	readers int
}

func newLogRing(name blixard.FunctionName) *logRing {
	return &logRing{name: name, grown: make(chan struct{})}
}

func (l *logRing) at(n uint64) *record { return &l.records[n%keptLines] }

func (l *logRing) add(r record) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.records) < keptLines {
		l.records = append(l.records, r)
	} else {
		if l.next-l.first == keptLines {
			l.bytes -= len(l.at(l.first).text)
			l.first++
		}
		*l.at(l.next) = r
	}
	l.next++
	l.bytes += len(r.text)
	for l.bytes > keptBytes && l.first < l.next {
		l.bytes -= len(l.at(l.first).text)
		l.at(l.first).text = ""
		l.first++
	}
	if l.readers > 0 {
		close(l.grown)
		l.grown = make(chan struct{})
	}
}

func (l *logRing) begin(at time.Time, instance, requestID string, number int) {
	l.add(record{kind: lineStart, at: at, number: number, instance: instance, requestID: requestID})
}

func (l *logRing) end(requestID, instance string, number int, r *blixard.InvocationReport) {
	l.add(record{kind: lineReport, at: time.Now(), number: number, instance: instance, requestID: requestID, report: lineOf(r)})
}

func lineOf(r *blixard.InvocationReport) reportLine {
	line := reportLine{took: r.Parts.Handler, memory: r.MemoryMiB, used: r.UsedMiB}
	if r.Start.Cold() {
		line.init = r.Parts.Spawn + r.Parts.Restore + r.Parts.Boot + r.Parts.Init
	}
	if line.took == 0 {
		line.took = r.Parts.Transfer // nothing is known of the handler: it was ended
	}
	if r.Error != nil {
		line.failure = r.Error.Type
	}
	return line
}

// write adds output of the function.
func (l *logRing) write(number int, instance, requestID string, output []byte) {
	at := time.Now()
	for text := range strings.Lines(string(output)) {
		text = strings.TrimRight(text, "\r\n")
		for len(text) > lineBytes {
			l.add(record{at: at, number: number, instance: instance, requestID: requestID, text: text[:lineBytes]})
			text = text[lineBytes:]
		}
		l.add(record{at: at, number: number, instance: instance, requestID: requestID, text: text})
	}
}

// lines puts a record into words.
func (l *logRing) lines(node blixard.NodeName, r record) []LogLine {
	line := LogLine{TimeMS: r.at.UnixMilli(), Function: l.name, Number: r.number, Node: node, Instance: r.instance, RequestID: r.requestID, Text: strings.ToValidUTF8(r.text, "?")}
	switch r.kind {
	case lineStart:
		line.Text = startLine(r.requestID, r.number)
	case lineReport:
		end := line
		end.Text = "END RequestId: " + r.requestID
		line.Text = r.report.text(r.requestID)
		return []LogLine{end, line}
	case lineOutput:
	}
	return []LogLine{line}
}

func startLine(requestID string, number int) string {
	return "START RequestId: " + requestID + " Version: " + blixard.VersionName(number)
}

func (r *reportLine) text(requestID string) string {
	ms := float64(r.took) / float64(time.Millisecond)
	text := fmt.Sprintf("REPORT RequestId: %s\tDuration: %.2f ms\tBilled Duration: %d ms\tMemory Size: %d MB\tMax Memory Used: %d MB", requestID, ms, int64(ms+0.999999), r.memory, r.used)
	if r.init > 0 {
		text += "\tInit Duration: " + strconv.FormatFloat(float64(r.init)/float64(time.Millisecond), 'f', 2, 64) + " ms"
	}
	switch r.failure {
	case "":
	case "Sandbox.Timedout":
		text += "\tStatus: timeout"
	default:
		text += "\tStatus: error\tError Type: " + r.failure
	}
	return text
}

// tailBytes of a call's log go back with the answer.
const tailBytes = 4 << 10

// tail is the end of a call's log as the Lambda API tells it.
func tail(r *blixard.InvocationReport, requestID string, number int, output []byte) []byte {
	line := lineOf(r)
	text := make([]byte, 0, len(output)+512)
	text = append(text, startLine(requestID, number)...)
	text = append(text, '\n')
	text = append(text, output...)
	if n := len(output); n > 0 && output[n-1] != '\n' {
		text = append(text, '\n')
	}
	text = append(text, "END RequestId: "+requestID+"\n"+line.text(requestID)+"\n"...)
	return slices.Clone(text[max(0, len(text)-tailBytes):])
}

// logger takes the output of an instance's guest.
func (d *Dispatcher) logger(in *instance) func(requestID string, output []byte) {
	v, name := in.v, in.name
	return func(requestID string, output []byte) { v.f.log.write(v.rev.Number, name, requestID, output) }
}

// ErrUnknownFunction: this node has nothing of that function.
var ErrUnknownFunction = errors.New("this node has nothing of that function")

// Logs calls yield for each line that is asked for, in order, until it fails or,
// when following, ctx ends. Only what ran on this node is told.
func (d *Dispatcher) Logs(ctx context.Context, q LogQuery, yield func(LogLine) error) error {
	d.mu.Lock()
	f := d.functions[q.Function]
	d.mu.Unlock()
	if f == nil {
		return ErrUnknownFunction
	}
	l := f.log
	l.mu.Lock()
	l.readers++
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		l.readers--
		l.mu.Unlock()
	}()
	next, first := uint64(0), true
	for {
		l.mu.Lock()
		next = max(next, l.first)
		batch := make([]record, 0, l.next-next)
		for ; next < l.next; next++ {
			batch = append(batch, *l.at(next))
		}
		grown := l.grown
		l.mu.Unlock()
		var lines []LogLine
		for _, r := range batch {
			for _, line := range l.lines(d.o.Node, r) {
				if q.takes(&line) {
					lines = append(lines, line)
				}
			}
		}
		if first && q.Tail > 0 {
			lines = lines[max(0, len(lines)-q.Tail):]
		}
		first = false
		for _, line := range lines {
			if err := yield(line); err != nil {
				return err
			}
		}
		if !q.Follow {
			return nil
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// isOver tells whether the guest's connection is what failed.
func isOver(err error) bool {
	return errors.Is(err, call.ErrClosed) || errors.Is(err, call.ErrHostile) || errors.Is(err, call.ErrRefused)
}
