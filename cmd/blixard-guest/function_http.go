package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
)

const (
	// httpPort is where servers listen that are not told otherwise.
	httpPort = 8080
	// httpIdle connections are kept for the calls that come.
	httpIdle = 16
	// httpAttempt is how often a server that starts is tried.
	httpAttempt = 5 * time.Millisecond
	// httpEndWait is how much later than of its connections' end we may hear of a
	// server's.
	httpEndWait = 100 * time.Millisecond
)

// httpRuntime runs any HTTP server, and passes requests on to it over the
// loopback. Invocations that came as HTTP requests stay what they are; others
// become a POST of / with the payload.
//
// Connections are plain blocking sockets, which under emulation answer a first
// call sooner than Go's own, and are opened ahead of the calls.
type httpRuntime struct {
	host *functionHost
	port int
	args []string

	mu    sync.Mutex
	life  int // grows with kill: connections of a former life are not kept
	idle  []*httpConn
	ended chan struct{} // closed when the server has ended
	exit  functionExit
}

func newHTTP(host *functionHost) functionRuntime { return &httpRuntime{host: host, life: 1} }

func (h *httpRuntime) init(ctx context.Context) error {
	if err := h.prepare(); err != nil {
		return err
	}
	ended := make(chan struct{})
	h.mu.Lock()
	life := h.life
	h.ended = ended
	h.mu.Unlock()
	env := h.host.environment("PORT=" + strconv.Itoa(h.port))
	_, err := h.host.processes.start(functionCommand{args: h.args, env: env, dir: h.host.taskRoot}, func(exit functionExit) {
		h.mu.Lock()
		h.exit = exit
		current := life == h.life
		h.mu.Unlock()
		close(ended)
		if current {
			h.host.exited(exitFault(exit))
		}
	})
	if err != nil {
		close(ended)
		return fault("Runtime.InvalidEntrypoint", "%v", err)
	}
	return h.waitForServer(ctx, ended)
}

// prepare finds the server's command.
func (h *httpRuntime) prepare() error {
	init := h.host.init
	h.port = init.Port
	if h.port <= 0 || h.port > 65535 {
		h.port = httpPort
	}
	h.args = init.Command
	root := h.host.taskRoot
	if len(h.args) > 0 {
		// A relative name with a slash, or the name of a file of the code, is below it.
		if first := h.args[0]; !strings.HasPrefix(first, "/") && (strings.Contains(first, "/") || isFile(filepath.Join(root, first))) {
			h.args = append([]string{filepath.Join(root, first)}, h.args[1:]...)
		}
		return nil
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return fmt.Errorf("looking for the server: %w", err)
	}
	var programs []string
	for _, entry := range entries {
		if info, err := entry.Info(); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			programs = append(programs, entry.Name())
		}
	}
	file, ok := blixard.HTTPEntry(init.Handler, programs, func(name string) bool { return isFile(filepath.Join(root, name)) })
	if !ok {
		return fault("Runtime.InvalidEntrypoint", "it is not clear which program of the code is the server")
	}
	h.args = []string{filepath.Join(root, file)}
	return nil
}

// waitForServer returns when the server takes connections, and keeps the one that
// told: a first call need not open it.
func (h *httpRuntime) waitForServer(ctx context.Context, ended chan struct{}) error {
	for {
		conn, err := dialHTTP(h.port)
		if err == nil {
			h.put(conn)
			return nil
		}
		if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("connecting to the server: %w", err)
		}
		select {
		case <-ended:
			h.mu.Lock()
			defer h.mu.Unlock()
			return exitFault(h.exit)
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(httpAttempt):
		}
	}
}

// dialHTTP connects to a server on the loopback.
func dialHTTP(port int) (*httpConn, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	address := unix.SockaddrInet4{Port: port, Addr: netip.AddrFrom4([4]byte{127, 0, 0, 1}).As4()}
	if err := unix.Connect(fd, &address); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return &httpConn{fd: fd}, nil
}

// get gives a connection; fresh is false for one that may have been closed by the
// server meanwhile.
func (h *httpRuntime) get() (conn *httpConn, fresh bool, err error) {
	for {
		h.mu.Lock()
		if len(h.idle) == 0 {
			h.mu.Unlock()
			break
		}
		conn = h.idle[len(h.idle)-1]
		h.idle = h.idle[:len(h.idle)-1]
		h.mu.Unlock()
		if conn.quiet() {
			return conn, false, nil
		}
		conn.close()
	}
	conn, err = dialHTTP(h.port)
	if err != nil {
		return nil, true, err
	}
	h.mu.Lock()
	conn.life = h.life
	h.mu.Unlock()
	return conn, true, nil
}

// put keeps a connection for the next call.
func (h *httpRuntime) put(conn *httpConn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if conn.life == 0 {
		conn.life = h.life
	}
	if conn.life == h.life && len(h.idle) < httpIdle {
		h.idle = append(h.idle, conn)
		return
	}
	conn.close()
}

func (h *httpRuntime) kill() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.life++
	for _, conn := range h.idle {
		conn.close()
	}
	h.idle = nil
}

func (h *httpRuntime) restored(context.Context, *call.Identity) error { return nil }

// stop asks the server to end by itself, with a SIGTERM.
func (h *httpRuntime) stop(ctx context.Context, _ string) {
	h.mu.Lock()
	ended := h.ended
	// Its end is what was asked for.
	h.life++
	h.mu.Unlock()
	if ended == nil {
		return
	}
	h.host.processes.signal(unix.SIGTERM)
	select {
	case <-ended:
	case <-ctx.Done():
	}
}

func (h *httpRuntime) invoke(q *call.Request, w call.ResponseWriter) {
	began := time.Now()
	request := httpRequest(q)
	for attempt := 0; ; attempt++ {
		conn, fresh, err := h.get()
		if err != nil {
			h.fail(q, w, "the server does not take connections: "+err.Error())
			return
		}
		conn.limit = int(h.host.init.MaxResponse)
		keep, err := conn.exchange(q, request, w)
		if err == nil && keep {
			h.put(conn)
		} else {
			conn.close()
		}
		switch {
		case err == nil:
			finishHTTP(w, call.Outcome{Handler: time.Since(began)})
			return
		case errors.Is(err, call.ErrEnded):
			return
		case errors.Is(err, errUnanswered) && !fresh && attempt < 2 && idempotent(q):
			// The server closed an idle connection just when it was used.
			continue
		}
		h.fail(q, w, err.Error())
		return
	}
}

func finishHTTP(w call.ResponseWriter, o call.Outcome) {
	if err := w.Finish(o); err != nil && !errors.Is(err, call.ErrEnded) {
		logf("answering: %v", err)
	}
}

// fail ends an invocation that the server has not answered. If the server has
// ended, that is what has happened, and the agent tells it: by exited, or since it
// was the agent who has ended it.
func (h *httpRuntime) fail(q *call.Request, w call.ResponseWriter, message string) {
	h.mu.Lock()
	ended := h.ended
	h.mu.Unlock()
	select {
	case <-ended:
		return
	case <-time.After(httpEndWait):
	}
	finishHTTP(w, call.Outcome{Error: unhandled("Runtime.BadResponse"), Body: errorBody("Runtime.BadResponse", message, q.RequestID), Detail: message})
}

// idempotent requests may be sent again when it is not known what became of them.
func idempotent(q *call.Request) bool {
	if q.HTTP == nil {
		return false
	}
	switch q.HTTP.Method {
	case "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE":
		return true
	}
	return false
}
