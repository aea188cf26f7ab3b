// Command lean is a function that does nothing, with as little of a runtime of
// its own as a Go program can have: blocking system calls on sockets. It speaks
// the Lambda Runtime API when its name is bootstrap, and serves HTTP otherwise. "sleep=MS" anywhere in a request makes it wait so long.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

const answer = `{"statusCode":200,"headers":{"Content-Type":"text/plain"},"body":"hello"}`

func main() {
	var err error
	if filepath.Base(os.Args[0]) == "bootstrap" {
		err = bootstrap()
	} else {
		err = serve()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "lean:", err)
		os.Exit(1)
	}
}

func port(text string, otherwise int) int {
	if i := bytes.LastIndexByte([]byte(text), ':'); i >= 0 {
		text = text[i+1:]
	}
	if n, err := strconv.Atoi(text); err == nil {
		return n
	}
	return otherwise
}

func socket() (fd int, err error) {
	if fd, err = syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0); err != nil {
		return 0, fmt.Errorf("making a socket: %w", err)
	}
	return fd, nil
}

var loopback = [4]byte{127, 0, 0, 1}

// bootstrap asks for invocations and answers them, one after the other.
func bootstrap() error {
	fd, err := socket()
	if err != nil {
		return err
	}
	at := &syscall.SockaddrInet4{Port: port(os.Getenv("AWS_LAMBDA_RUNTIME_API"), 9001), Addr: loopback}
	if err := syscall.Connect(fd, at); err != nil {
		return fmt.Errorf("connecting to the Runtime API: %w", err)
	}
	c := conn{fd: fd}
	next := []byte("GET /2018-06-01/runtime/invocation/next HTTP/1.1\r\nHost: r\r\n\r\n")
	var out []byte
	for {
		if err := c.write(next); err != nil {
			return err
		}
		head, body, err := c.read()
		if err != nil {
			return err
		}
		wait(body)
		id := header(head, "lambda-runtime-aws-request-id")
		out = append(append(append(out[:0], "POST /2018-06-01/runtime/invocation/"...), id...), "/response HTTP/1.1\r\nHost: r\r\nContent-Length: "...)
		out = append(append(strconv.AppendInt(out, int64(len(answer)), 10), "\r\n\r\n"...), answer...)
		if err := c.write(out); err != nil {
			return err
		}
		if _, _, err := c.read(); err != nil {
			return err
		}
	}
}

// serve answers HTTP requests.
func serve() error {
	fd, err := socket()
	if err != nil {
		return err
	}
	if err := syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1); err != nil {
		return fmt.Errorf("setting up the socket: %w", err)
	}
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Port: port(os.Getenv("PORT"), 8080), Addr: loopback}); err != nil {
		return fmt.Errorf("binding: %w", err)
	}
	if err := syscall.Listen(fd, 64); err != nil {
		return fmt.Errorf("listening: %w", err)
	}
	for {
		client, _, err := syscall.Accept(fd)
		if err != nil {
			return fmt.Errorf("accepting: %w", err)
		}
		go func() { // ends with the connection
			c := conn{fd: client}
			for c.answer() == nil {
			}
			if err := syscall.Close(client); err != nil {
				fmt.Fprintln(os.Stderr, "lean: closing:", err)
			}
		}()
	}
}

func (c *conn) answer() error {
	head, body, err := c.read()
	if err != nil {
		return err
	}
	wait(head)
	wait(body)
	return c.write([]byte("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello"))
}

// wait waits as long as the request says.
func wait(request []byte) {
	at := bytes.Index(request, []byte("sleep="))
	if at < 0 {
		return
	}
	ms := 0
	for _, c := range request[at+len("sleep="):] {
		if c < '0' || c > '9' || ms > 60_000 {
			break
		}
		ms = ms*10 + int(c-'0')
	}
	time.Sleep(time.Duration(ms) * time.Millisecond)
}

// conn is a connection with HTTP messages whose length is told.
type conn struct {
	fd   int
	have []byte
	room [16 << 10]byte
}

var errEnded = errors.New("the connection has ended")

func (c *conn) fill() error {
	n, err := syscall.Read(c.fd, c.room[:])
	for err == syscall.EINTR {
		n, err = syscall.Read(c.fd, c.room[:])
	}
	if err != nil {
		return fmt.Errorf("reading: %w", err)
	}
	if n == 0 {
		return errEnded
	}
	c.have = append(c.have, c.room[:n]...)
	return nil
}

// read returns the next message; it is valid until the next call but one.
func (c *conn) read() (head, body []byte, err error) {
	for {
		if end := bytes.Index(c.have, []byte("\r\n\r\n")); end >= 0 {
			head = c.have[:end+2]
			long := 0
			if text := header(head, "content-length"); text != nil {
				if long, err = strconv.Atoi(string(text)); err != nil {
					return nil, nil, fmt.Errorf("reading the length: %w", err)
				}
			}
			for len(c.have) < end+4+long {
				if err := c.fill(); err != nil {
					return nil, nil, err
				}
			}
			head, body = c.have[:end+2], c.have[end+4:end+4+long]
			c.have = c.have[end+4+long:]
			return head, body, nil
		}
		if err := c.fill(); err != nil {
			return nil, nil, err
		}
	}
}

func (c *conn) write(b []byte) error {
	for len(b) > 0 {
		n, err := syscall.Write(c.fd, b)
		if err != nil && err != syscall.EINTR {
			return fmt.Errorf("writing: %w", err)
		}
		b = b[max(n, 0):]
	}
	return nil
}

// header finds the value of a header, whose name is in lower case.
func header(head []byte, name string) []byte {
	for len(head) > 0 {
		line := head
		if i := bytes.IndexByte(head, '\n'); i >= 0 {
			line, head = head[:i], head[i+1:]
		} else {
			head = nil
		}
		if len(line) > len(name) && line[len(name)] == ':' && bytes.EqualFold(line[:len(name)], []byte(name)) {
			return bytes.TrimSpace(line[len(name)+1:])
		}
	}
	return nil
}
