package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// caller is an HTTP/1.1 client with one connection, that costs as little as it
// can: it shares the machine with what it measures.
type caller struct {
	conn    net.Conn
	r       *bufio.Reader
	request []byte
}

// answer is what a caller looks at of a response.
type answer struct {
	took   time.Duration
	status int
	start  string             // X-Blixard-Start
	parts  map[string]float64 // Server-Timing, milliseconds; only when asked for
	body   []byte             // the same
}

func dial(address, path string) (*caller, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("connecting to %s: %w", address, err)
	}
	const body = `{"name":"bench"}`
	request := fmt.Appendf(nil, "POST %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: bench\r\nAccept: */*\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", path, address, len(body), body)
	return &caller{conn: conn, r: bufio.NewReader(conn), request: request}, nil
}

func (c *caller) close() {
	if err := c.conn.Close(); err != nil {
		say("closing a connection: %v", err)
	}
}

// call makes one request. With details it keeps what the response says.
func (c *caller) call(details bool) (a answer, err error) {
	began := time.Now()
	if _, err := c.conn.Write(c.request); err != nil {
		return a, fmt.Errorf("sending a request: %w", err)
	}
	line, err := c.r.ReadSlice('\n')
	if err != nil {
		return a, fmt.Errorf("reading an answer: %w", err)
	}
	if len(line) < 12 {
		return a, fmt.Errorf("reading an answer: it begins with %q", line)
	}
	if a.status, err = strconv.Atoi(string(line[9:12])); err != nil {
		return a, fmt.Errorf("reading an answer: it begins with %q", line)
	}
	length := -1
	for {
		if line, err = c.r.ReadSlice('\n'); err != nil {
			return a, fmt.Errorf("reading an answer: %w", err)
		}
		if len(line) <= 2 {
			break
		}
		if name, value, ok := bytes.Cut(line, []byte(": ")); ok {
			value = bytes.TrimSpace(value)
			switch {
			case bytes.EqualFold(name, []byte("Content-Length")):
				if length, err = strconv.Atoi(string(value)); err != nil {
					return a, fmt.Errorf("reading the length of an answer: %w", err)
				}
			case details && bytes.EqualFold(name, []byte("Server-Timing")):
				a.parts = timing(string(value))
			case details && bytes.EqualFold(name, []byte("X-Blixard-Start")):
				a.start = string(value)
			}
		}
	}
	if length < 0 {
		return a, fmt.Errorf("reading an answer: it has no length, and so no breakdown")
	}
	if details || a.status != 200 {
		a.body = make([]byte, length)
		_, err = io.ReadFull(c.r, a.body)
	} else {
		_, err = c.r.Discard(length)
	}
	a.took = time.Since(began)
	if err != nil {
		return a, fmt.Errorf("reading an answer: %w", err)
	}
	if a.status != 200 {
		return a, fmt.Errorf("the answer is %d: %.300s", a.status, a.body)
	}
	return a, nil
}

// timing reads a Server-Timing header.
func timing(text string) map[string]float64 {
	parts := map[string]float64{}
	for part := range strings.SplitSeq(text, ", ") {
		name, value, _ := strings.Cut(part, ";dur=")
		if ms, err := strconv.ParseFloat(value, 64); err == nil {
			parts[name] = ms
		}
	}
	return parts
}

// times are how long things took, in milliseconds.
type times []float64

func (t *times) add(d time.Duration) { *t = append(*t, ms(d)) }

// at is a quantile, 0 of nothing.
func (t times) at(q float64) float64 {
	if len(t) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(t))
	return s[int(q*float64(len(s)-1))]
}

func (t times) mean() float64 {
	sum := 0.0
	for _, x := range t {
		sum += x
	}
	return sum / float64(max(len(t), 1))
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// hammer lets so many callers call one after the other for a while.
func hammer(address, path string, connections int, d time.Duration) (perSecond float64, took times, err error) {
	var failed atomic.Pointer[error]
	all := make([]times, connections)
	callers := make([]*caller, connections)
	for i := range callers {
		if callers[i], err = dial(address, path); err != nil {
			return 0, nil, err
		}
		defer callers[i].close()
		if _, err := callers[i].call(false); err != nil {
			return 0, nil, err
		}
	}
	var group sync.WaitGroup
	began := time.Now()
	for i, c := range callers {
		group.Go(func() {
			for time.Since(began) < d && failed.Load() == nil {
				a, err := c.call(false)
				if err != nil {
					failed.Store(&err)
					return
				}
				all[i].add(a.took)
			}
		})
	}
	group.Wait()
	elapsed := time.Since(began)
	if err := failed.Load(); err != nil {
		return 0, nil, *err
	}
	took = slices.Concat(all...)
	return float64(len(took)) / elapsed.Seconds(), took, nil
}
