package guest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

func FuzzReadFrame(f *testing.F) {
	f.Add(appendFrame(nil, frame{stream: 1, kind: frameData, flags: channelStderr, payload: []byte("x")}))
	f.Add(appendFrame(nil, frame{kind: frameHello, payload: helloPayload(session{7})}))
	f.Add([]byte{0, 0, 0, 1, 4, 0, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		got, err := readFrame(bufio.NewReaderSize(r, 16))
		if err != nil {
			if !errors.Is(err, errGarbage) && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("error %v", err)
			}
			return
		}
		if len(got.payload) > MaxPayload {
			t.Fatalf("payload of %d bytes", len(got.payload))
		}
		if again := appendFrame(nil, got); !bytes.HasPrefix(in, again) {
			t.Fatalf("decoded %+v, encoded %x", got, again)
		}
	})
}

// FuzzClient gives a client bytes of a hostile guest behind the handshake.
func FuzzClient(f *testing.F) {
	f.Add(appendFrame(nil, frame{stream: 1, kind: frameResult, payload: []byte(`{"body":{}}`)}))
	f.Add(appendFrame(nil, frame{stream: 1, kind: frameData, flags: channelStdout, payload: []byte("x")}))
	f.Add([]byte("garbage"))
	f.Fuzz(func(t *testing.T, in []byte) {
		host, inside := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			defer inside.Close()
			hello := make([]byte, headerSize+len(helloMagic)+sessionSize)
			if _, err := io.ReadFull(inside, hello); err != nil {
				return
			}
			if _, err := inside.Write(appendFrame(nil, frame{kind: frameHelloAck, payload: hello[headerSize:]})); err != nil {
				return
			}
			if _, err := inside.Read(make([]byte, MaxPayload)); err != nil {
				return
			}
			// the host may hang up
			inside.Write(in)
		}()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		c, err := Dial(ctx, host)
		if err != nil {
			t.Fatal(err)
		}
		code, err := c.Exec(ctx, ExecRequest{Args: []string{"true"}}, nil, io.Discard, io.Discard, nil)
		if errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("the call outlived its connection: code %d, %v", code, err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		<-done
	})
}

// FuzzServe gives a guest bytes of a noisy host, then a real one on the same bytes.
func FuzzServe(f *testing.F) {
	f.Add([]byte{})
	f.Add(appendFrame(nil, frame{stream: 1, kind: frameData, payload: make([]byte, 100)})[:50])
	f.Add(append(appendFrame(nil, frame{kind: frameHello, payload: helloPayload(session{7})}),
		appendFrame(nil, frame{stream: 1, kind: frameOpen, payload: []byte(`{"method":"state"}`)})...))
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) > MaxPayload {
			return
		}
		host, inside := net.Pipe()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		p := &port{conns: make(chan net.Conn, 1)}
		p.conns <- inside
		serving, stop := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			h := &handler{ended: make(chan string, maxCalls)}
			h.exec = func(context.Context, ExecRequest, Streams) (int, error) { return 0, nil }
			Serve(serving, p.open, h)
		}()
		// What the guest answers to the noise is read and dropped by Dial.
		c, err := dial(ctx, &noisy{Conn: host, noise: in}, time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.State(ctx); err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		stop()
		<-done
	})
}

// noisy sends noise ahead of the first bytes.
type noisy struct {
	net.Conn
	noise []byte
}

func (n *noisy) Write(b []byte) (int, error) {
	if len(n.noise) > 0 {
		if _, err := n.Conn.Write(n.noise); err != nil {
			return 0, err
		}
		n.noise = nil
	}
	return n.Conn.Write(b)
}
