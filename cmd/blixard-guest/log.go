package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/blixard/blixard/internal/guest"
)

const (
	logBytes     = 512 << 10 // kept of the workload's output
	logLines     = 8192
	lineBytes    = 16 << 10 // a longer line is cut in pieces
	consoleBytes = 64 << 10 // waiting for the console, which is slow
)

// workloadLog keeps the newest lines of the workload's output and copies all
// of it to the console. The console is best effort: a workload that writes
// faster than a serial line takes loses lines there, and not its time.
type workloadLog struct {
	mu      sync.Mutex
	lines   []logLine
	first   uint64 // number of lines[0], counted from the start
	bytes   int
	partial []byte // an unfinished line
	changed chan struct{}

	console chan []byte
	lost    int // bytes the console did not get
	written sync.WaitGroup
}

type logLine struct {
	at   int64 // Unix time in nanoseconds
	text []byte
}

// newLog makes a log that writes to the console until it is closed.
func newLog(console io.Writer) *workloadLog {
	l := &workloadLog{changed: make(chan struct{}), console: make(chan []byte, consoleBytes>>10)}
	l.written.Go(func() {
		for p := range l.console {
			//nolint:errcheck // there is nobody to tell when the console does not take it
			console.Write(p)
		}
	})
	return l
}

// close waits until the console has got what was written. Nothing may be
// written afterwards.
func (l *workloadLog) close() {
	close(l.console)
	l.written.Wait()
}

// Write adds output; it never blocks and never fails.
func (l *workloadLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.toConsole(p)
	size := len(p)
	for len(p) > 0 {
		room := lineBytes - len(l.partial)
		end := bytes.IndexByte(p, '\n') + 1
		if end == 0 {
			end = len(p)
		}
		end = min(end, room)
		l.partial = append(l.partial, p[:end]...)
		p = p[end:]
		if l.partial[len(l.partial)-1] == '\n' || len(l.partial) == lineBytes {
			l.finish()
		}
	}
	return size, nil
}

func (l *workloadLog) toConsole(p []byte) {
	if l.lost > 0 {
		p = append(fmt.Appendf(nil, "\nblixard-guest: %d bytes of output are not shown here\n", l.lost), p...)
	}
	for len(p) > 0 {
		n := min(len(p), 1<<10)
		select {
		case l.console <- bytes.Clone(p[:n]):
			l.lost = 0
		default:
			l.lost += len(p)
			return
		}
		p = p[n:]
	}
}

// finish ends the partial line. Callers hold mu.
func (l *workloadLog) finish() {
	if len(l.partial) == 0 {
		return
	}
	l.lines = append(l.lines, logLine{at: time.Now().UnixNano(), text: bytes.Clone(l.partial)})
	l.bytes += len(l.partial)
	l.partial = l.partial[:0]
	for l.bytes > logBytes || len(l.lines) > logLines {
		l.bytes -= len(l.lines[0].text)
		l.lines[0].text = nil
		l.lines = l.lines[1:]
		l.first++
	}
	close(l.changed)
	l.changed = make(chan struct{})
}

// end finishes a line without an end, when its writer is gone.
func (l *workloadLog) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.partial) > 0 {
		l.partial = append(l.partial, '\n')
		l.finish()
	}
}

// copyTo writes what the request selects.
func (l *workloadLog) copyTo(ctx context.Context, request guest.LogRequest, w io.Writer) error {
	l.mu.Lock()
	next := l.first
	if request.TailLines > 0 {
		next += uint64(max(0, len(l.lines)-request.TailLines))
	}
	l.mu.Unlock()
	for {
		l.mu.Lock()
		if missed := l.first - next; next < l.first {
			l.mu.Unlock()
			if _, err := fmt.Fprintf(w, "blixard-guest: %d lines came too fast and are lost\n", missed); err != nil {
				return err
			}
			next += missed
			continue
		}
		if next == l.first+uint64(len(l.lines)) {
			changed := l.changed
			l.mu.Unlock()
			if !request.Follow {
				return nil
			}
			select {
			case <-changed:
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		line := l.lines[next-l.first]
		l.mu.Unlock()
		next++
		if line.at < request.Since {
			continue
		}
		if _, err := w.Write(line.text); err != nil {
			return err
		}
	}
}
