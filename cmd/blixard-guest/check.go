package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/blixard/blixard/internal/guest"
)

// checkOutput is how much of a failed check's output is told.
const checkOutput = 512

// Check probes the workload from inside.
func (a *agent) Check(ctx context.Context, check guest.Check) error {
	if check.Kind != "exec" && (check.Port < 1 || check.Port > 65535) {
		return fmt.Errorf("%w: port %d of a check is out of range", guest.ErrInvalid, check.Port)
	}
	switch check.Kind {
	case "exec":
		return a.checkExec(ctx, check)
	case "tcp":
		conn, err := dialLocal(ctx, check.Port)
		if err != nil {
			return err
		}
		return conn.Close()
	case "http":
		return checkHTTP(ctx, check)
	}
	return fmt.Errorf("%w: unknown kind of check %q (known: exec, tcp, http)", guest.ErrInvalid, check.Kind)
}

func (a *agent) checkExec(ctx context.Context, check guest.Check) error {
	if len(check.Args) == 0 {
		return fmt.Errorf("%w: an exec check needs a command", guest.ErrInvalid)
	}
	var output tail
	code, err := a.exec(ctx, guest.ExecRequest{Args: check.Args}, guest.Streams{
		Stdin: strings.NewReader(""), Stdout: &output, Stderr: &output,
	})
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("%w: %s took longer than %s", guest.ErrUnhealthy, check.Args[0], check.Timeout())
	case err != nil:
		return fmt.Errorf("%w: %w", guest.ErrUnhealthy, err)
	case code != 0:
		return fmt.Errorf("%w: %s exited with code %d: %s", guest.ErrUnhealthy, check.Args[0], code, output.text())
	}
	return nil
}

func dialLocal(ctx context.Context, port int) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", guest.ErrUnhealthy, err)
	}
	return conn, nil
}

func checkHTTP(ctx context.Context, check guest.Check) error {
	path := check.Path
	if path == "" {
		path = "/"
	}
	if path[0] != '/' || strings.ContainsAny(path, " \r\n") {
		return fmt.Errorf("%w: path %q of a check", guest.ErrInvalid, path)
	}
	conn, err := dialLocal(ctx, check.Port)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { closeQuietly(conn) })
	defer stop()
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: localhost\r\nUser-Agent: blixard-guest\r\nConnection: close\r\n\r\n", path); err != nil {
		return fmt.Errorf("%w: %w", guest.ErrUnhealthy, err)
	}
	line, err := bufio.NewReader(io.LimitReader(conn, demoHeaderMax)).ReadString('\n')
	if ctx.Err() != nil {
		return fmt.Errorf("%w: no answer within %s", guest.ErrUnhealthy, check.Timeout().Round(time.Millisecond))
	}
	if err != nil {
		return fmt.Errorf("%w: %w", guest.ErrUnhealthy, err)
	}
	fields := strings.Fields(line)
	if len(fields) < 2 || !strings.HasPrefix(fields[0], "HTTP/") {
		return fmt.Errorf("%w: port %d does not speak HTTP", guest.ErrUnhealthy, check.Port)
	}
	if status, err := strconv.Atoi(fields[1]); err != nil || status < 200 || status > 399 {
		return fmt.Errorf("%w: GET %s answered %s", guest.ErrUnhealthy, path, strings.Join(fields[1:], " "))
	}
	return nil
}

// tail keeps the end of what is written to it; its two writers are a command's
// outputs, which may come at once.
type tail struct {
	mu    sync.Mutex
	bytes []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.bytes = append(t.bytes, p...)
	if over := len(t.bytes) - checkOutput; over > 0 {
		t.bytes = append(t.bytes[:0], t.bytes[over:]...)
	}
	return len(p), nil
}

func (t *tail) text() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(bytes.TrimSpace(t.bytes))
}
