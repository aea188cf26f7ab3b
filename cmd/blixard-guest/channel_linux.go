package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/guest"
)

// openChannel gives the opener of the channel to the host: the virtio-serial
// port when there is one, else vsock. It looks again each time it is asked,
// since a driver may be late.
func openChannel(init bool) func(context.Context) (io.ReadWriteCloser, error) {
	var port *serialPort
	var listener *vsockListener
	tried := false
	return func(ctx context.Context) (io.ReadWriteCloser, error) {
		if port == nil && listener == nil {
			if path := findPort(); path != "" {
				file, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
				if err != nil {
					return nil, err
				}
				port = &serialPort{file: file}
			} else if init && !tried {
				loadModules("vsock")
				tried = true
			}
		}
		if port != nil {
			return port.open()
		}
		if listener == nil {
			l, err := listenVsock(guest.VsockPort)
			if err != nil {
				return nil, errors.Join(err, wait(ctx, 100*time.Millisecond))
			}
			listener = l
		}
		return listener.accept(ctx)
	}
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

func findPort() string {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err == nil {
		for _, path := range names {
			name, err := os.ReadFile(path)
			if err == nil && strings.TrimSpace(string(name)) == guest.PortName {
				return "/dev/" + filepath.Base(filepath.Dir(path))
			}
		}
	}
	const first = "/dev/vport0p1"
	if _, err := os.Stat(first); err == nil {
		return first
	}
	return ""
}

// serialPort keeps the port open for ever: closing it drops what the host has
// sent already. A connection on it is the time from the host's coming to its going.
type serialPort struct{ file *os.File }

func (p *serialPort) open() (io.ReadWriteCloser, error) {
	if err := p.file.SetDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("reopening the port: %w", err)
	}
	raw, err := p.file.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("reopening the port: %w", err)
	}
	return &serialConn{port: p, read: raw.Read, write: raw.Write}, nil
}

type serialConn struct {
	port        *serialPort
	read, write func(func(fd uintptr) bool) error
	host        atomic.Bool // a host was seen
}

// Read waits for a host at first: without one the port reads as ended, which
// is the end of this connection only if there was a host before. The port's
// wake-up when the host comes back is the runtime poller's edge, so waiting
// costs nothing.
func (c *serialConn) Read(b []byte) (n int, err error) {
	waitErr := c.read(func(fd uintptr) bool {
		for {
			n, err = unix.Read(int(fd), b)
			switch {
			case errors.Is(err, unix.EINTR):
				continue
			case errors.Is(err, unix.EAGAIN):
				c.host.Store(true)
				n, err = 0, nil
				return false
			case err == nil && n == 0 && len(b) > 0:
				if c.host.Load() {
					err = io.EOF
					return true
				}
				return false
			case n > 0:
				c.host.Store(true)
			}
			return true
		}
	})
	if waitErr != nil {
		return 0, waitErr
	}
	return max(n, 0), err
}

func (c *serialConn) Write(b []byte) (written int, err error) {
	for written < len(b) && err == nil {
		waitErr := c.write(func(fd uintptr) bool {
			var n int
			n, err = unix.Write(int(fd), b[written:])
			if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
				again := errors.Is(err, unix.EINTR)
				err = nil
				return again
			}
			written += max(n, 0)
			return true
		})
		if waitErr != nil {
			return written, waitErr
		}
	}
	return written, err
}

// Close ends a Read and a Write under way and leaves the port open.
func (c *serialConn) Close() error { return c.port.file.SetDeadline(time.Unix(1, 0)) }

// vsockListener accepts one host at a time.
type vsockListener struct{ file *os.File }

func listenVsock(port uint32) (*vsockListener, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("opening vsock: %w", err)
	}
	file := os.NewFile(uintptr(fd), "vsock")
	if err := unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port}); err != nil {
		return nil, errors.Join(fmt.Errorf("binding vsock port %d: %w", port, err), file.Close())
	}
	if err := unix.Listen(fd, 4); err != nil {
		return nil, errors.Join(fmt.Errorf("listening on vsock: %w", err), file.Close())
	}
	return &vsockListener{file}, nil
}

func (l *vsockListener) accept(ctx context.Context) (io.ReadWriteCloser, error) {
	if err := l.file.SetReadDeadline(time.Time{}); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() {
		//nolint:errcheck // it only wakes the wait below
		l.file.SetReadDeadline(time.Unix(1, 0))
	})
	defer stop()
	raw, err := l.file.SyscallConn()
	if err != nil {
		return nil, err
	}
	var conn int
	waitErr := raw.Read(func(fd uintptr) bool {
		conn, _, err = unix.Accept4(int(fd), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		return !errors.Is(err, unix.EAGAIN)
	})
	if waitErr != nil {
		return nil, waitErr
	}
	if err != nil {
		return nil, fmt.Errorf("accepting on vsock: %w", err)
	}
	return os.NewFile(uintptr(conn), "vsock connection"), nil
}
