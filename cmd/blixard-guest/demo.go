package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"
)

const (
	demoAddress   = ":80"
	demoConns     = 256
	demoIdle      = 60 * time.Second
	demoHeaderMax = 16 << 10
)

// identity is what the demo server tells about itself.
type identity struct {
	Instance   string `json:"instance"`
	VM         string `json:"vm"`
	Generation uint64 `json:"generation"`
	Node       string `json:"node"`
	BootID     string `json:"boot_id"`
}

// demoServer is the workload of a guest that has none: an HTTP server that
// tells who answers. It is written on bare connections, since net/http doubles
// the size of the program and what an emulated CPU has to translate at start.
type demoServer struct {
	identity identity
	listener net.Listener
	slots    chan struct{}
	log      io.Writer
	wg       sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]struct{}
	over  bool
}

func startDemo(address string, who identity, log io.Writer) (*demoServer, error) {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("starting the demo server: %w", err)
	}
	s := &demoServer{
		identity: who, listener: listener, log: log,
		slots: make(chan struct{}, demoConns), conns: make(map[net.Conn]struct{}),
	}
	s.say("demo server of %s listens on %s", who.Instance, address)
	s.wg.Go(s.accept)
	return s, nil
}

func (s *demoServer) say(format string, args ...any) {
	// the log takes everything
	fmt.Fprintf(s.log, format+"\n", args...)
}

// stop closes everything and waits.
func (s *demoServer) stop() {
	s.mu.Lock()
	s.over = true
	//order:any every connection is closed
	for conn := range s.conns {
		closeQuietly(conn)
	}
	s.mu.Unlock()
	closeQuietly(s.listener)
	s.wg.Wait()
	s.say("demo server has stopped")
}

func closeQuietly(c io.Closer) {
	//nolint:errcheck // nothing is buffered behind it
	c.Close()
}

func (s *demoServer) accept() {
	for {
		s.slots <- struct{}{}
		conn, err := s.listener.Accept()
		if err != nil {
			<-s.slots
			if errors.Is(err, net.ErrClosed) {
				return
			}
			time.Sleep(50 * time.Millisecond) // out of descriptors or memory
			continue
		}
		s.mu.Lock()
		if s.over {
			s.mu.Unlock()
			closeQuietly(conn)
			<-s.slots
			continue
		}
		s.conns[conn] = struct{}{}
		s.mu.Unlock()
		s.wg.Go(func() {
			defer func() {
				s.mu.Lock()
				delete(s.conns, conn)
				s.mu.Unlock()
				closeQuietly(conn)
				<-s.slots
			}()
			s.serve(conn)
		})
	}
}

// serve answers requests of one connection, one after the other.
func (s *demoServer) serve(conn net.Conn) {
	limited := &io.LimitedReader{R: conn}
	r := bufio.NewReaderSize(limited, 4096)
	for {
		if err := conn.SetDeadline(time.Now().Add(demoIdle)); err != nil {
			return
		}
		limited.N = demoHeaderMax
		method, path, keep, err := readRequest(r)
		if errors.Is(err, errBadRequest) {
			//nolint:errcheck // the connection ends anyway
			io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
			return
		}
		if err != nil {
			return
		}
		status, kind, body := s.answer(method, path)
		connection := "keep-alive"
		if !keep {
			connection = "close"
		}
		head := fmt.Sprintf("HTTP/1.1 %s\r\nServer: blixard-guest\r\nX-Blixard-Instance: %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nConnection: %s\r\n\r\n",
			status, s.identity.Instance, kind, len(body), connection)
		if method == "HEAD" {
			body = ""
		}
		if _, err := io.WriteString(conn, head+body); err != nil || !keep {
			return
		}
	}
}

func (s *demoServer) answer(method, path string) (status, kind, body string) {
	const text = "text/plain; charset=utf-8"
	if method != "GET" && method != "HEAD" {
		return "405 Method Not Allowed", text, "only GET and HEAD are answered here\n"
	}
	path, _, _ = strings.Cut(path, "?")
	switch path {
	case "/":
		return "200 OK", text, fmt.Sprintf("Hello from %s (generation %d) on %s\n", s.identity.Instance, s.identity.Generation, s.identity.Node)
	case "/healthz":
		return "200 OK", text, "ok\n"
	case "/env":
		reply, err := json.Marshal(struct {
			identity
			UptimeMS int64 `json:"uptime_ms"`
		}{s.identity, uptime().Milliseconds()})
		if err != nil {
			return "500 Internal Server Error", text, err.Error() + "\n"
		}
		return "200 OK", "application/json", string(reply) + "\n"
	}
	return "404 Not Found", text, "there are /, /healthz and /env here\n"
}

var errBadRequest = errors.New("not an HTTP/1 request")

// readRequest reads a request's head. A body ends the connection after the
// answer, since it is not read.
func readRequest(r *bufio.Reader) (method, path string, keep bool, err error) {
	line, err := r.ReadString('\n')
	if err != nil {
		return "", "", false, err
	}
	fields := strings.Fields(line)
	if len(fields) != 3 || !strings.HasPrefix(fields[2], "HTTP/1.") || !strings.HasPrefix(fields[1], "/") {
		return "", "", false, errBadRequest
	}
	keep = fields[2] == "HTTP/1.1"
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return "", "", false, errBadRequest
		}
		line = strings.TrimRight(line, "\r\n")
		if line == "" {
			return fields[0], fields[1], keep, nil
		}
		name, value, ok := strings.Cut(line, ":")
		if !ok {
			return "", "", false, errBadRequest
		}
		value = strings.ToLower(strings.TrimSpace(value))
		switch strings.ToLower(name) {
		case "connection":
			keep = value == "keep-alive" || (keep && value != "close")
		case "content-length", "transfer-encoding":
			if value != "0" {
				keep = false
			}
		}
	}
}
