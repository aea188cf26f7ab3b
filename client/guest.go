package client

import (
	"context"
	"errors"
	"io"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/api/blixard/v1/blixardv1connect"
)

// chunkBytes is how much of an input is sent at once.
const chunkBytes = 32 << 10

// Logs hands the console logs of a VM, or of one instance, to take, piece by
// piece, until they end or (with follow) until ctx ends. An error of take ends
// it too.
func (c *Client) Logs(ctx context.Context, req *blixardv1.LogsRequest, take func(*blixardv1.LogsResponse) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var stream blixardv1connect.GuestServiceLogsClientStream
	var first *blixardv1.LogsResponse
	err := c.retry(ctx, func(e *endpoint) error {
		var err error
		if stream, err = e.guest.Logs(ctx, req); err != nil {
			return err
		}
		if first, err = stream.Receive(); errors.Is(err, io.EOF) {
			first = nil // there is nothing to tell
			return nil
		}
		return err
	})
	if err != nil || first == nil {
		return err
	}
	for m := first; ; {
		if err := take(m); err != nil {
			return err
		}
		if m, err = stream.Receive(); err != nil {
			return ignoreEOF(c.asError(ctx, err))
		}
	}
}

func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// ExecIO is what a command in a guest is connected to. Nil: nothing.
type ExecIO struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// Resize tells of new sizes of the terminal.
	Resize <-chan *blixardv1.TerminalSize
}

// Exec runs a command in a guest and returns its exit code. It goes to a node
// that has just answered, and is not repeated once it was sent: it may have run. It returns when the command has ended, even when
// Stdin.Read still blocks; what that read returns is then lost.
func (c *Client) Exec(ctx context.Context, start *blixardv1.ExecStart, streams ExecIO) (exitCode int, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var stream blixardv1connect.GuestServiceExecClientStream
	err = c.retry(ctx, func(e *endpoint) error {
		err := e.answers(ctx)
		if err == nil {
			stream, err = e.guest.Exec(ctx)
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	if err := stream.Send(&blixardv1.ExecRequest{Message: &blixardv1.ExecRequest_Start{Start: start}}); err != nil && !errors.Is(err, io.EOF) {
		return 0, c.asError(ctx, err)
	}
	go sendExec(ctx, stream, streams)
	for {
		m, err := stream.Receive()
		if err != nil {
			if err = c.asError(ctx, err); errors.Is(err, io.EOF) {
				err = &blixard.Error{Code: blixard.CodeUnavailable, Message: "the connection ended before the command did"}
			}
			return 0, err
		}
		switch part := m.Message.(type) {
		case *blixardv1.ExecResponse_Stdout:
			err = writeAll(streams.Stdout, part.Stdout)
		case *blixardv1.ExecResponse_Stderr:
			err = writeAll(streams.Stderr, part.Stderr)
		case *blixardv1.ExecResponse_Exit:
			return int(part.Exit.Code), nil
		}
		if err != nil {
			return 0, err
		}
	}
}

func writeAll(w io.Writer, data []byte) error {
	if w == nil {
		return nil
	}
	_, err := w.Write(data)
	return err
}

// piece is a read of an input.
type piece struct {
	data []byte
	err  error
}

// pieces reads r until it ends. The goroutine ends with the first read that
// returns after ctx has ended: a blocked read of a terminal cannot be undone.
func pieces(ctx context.Context, r io.Reader) <-chan piece {
	out := make(chan piece)
	go func() {
		for {
			buf := make([]byte, chunkBytes)
			n, err := r.Read(buf)
			select {
			case out <- piece{buf[:n], err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	return out
}

// closeSend ends the sending of a stream whose context has ended: as long as
// the sending goes on, the transport does not look at the context, and a blocked
// Receive would not return.
func closeSend(stream interface{ CloseSend() error }) {
	_ = stream.CloseSend() // the stream has ended
}

// sendExec sends input and sizes until ctx ends. Errors show on the receiving
// side.
func sendExec(ctx context.Context, stream blixardv1connect.GuestServiceExecClientStream, streams ExecIO) {
	var input <-chan piece
	if streams.Stdin != nil {
		input = pieces(ctx, streams.Stdin)
	} else if stream.Send(stdinEnd()) != nil {
		return
	}
	for {
		var m *blixardv1.ExecRequest
		select {
		case <-ctx.Done():
			closeSend(stream)
			return
		case size, ok := <-streams.Resize:
			if !ok {
				streams.Resize = nil
				continue
			}
			m = &blixardv1.ExecRequest{Message: &blixardv1.ExecRequest_Resize{Resize: size}}
		case p := <-input:
			if p.err != nil {
				input = nil
			}
			if len(p.data) > 0 && stream.Send(&blixardv1.ExecRequest{Message: &blixardv1.ExecRequest_Stdin{Stdin: p.data}}) != nil {
				return
			}
			if p.err == nil {
				continue
			}
			m = stdinEnd()
		}
		if stream.Send(m) != nil {
			return
		}
	}
}

func stdinEnd() *blixardv1.ExecRequest {
	return &blixardv1.ExecRequest{Message: &blixardv1.ExecRequest_StdinEnd{StdinEnd: true}}
}

// Console connects in and out with the serial console of a VM's first running
// instance, or of one instance, until ctx or in ends. It is not repeated once it
// was sent to a node that has just answered.
func (c *Client) Console(ctx context.Context, target string, in io.Reader, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var stream blixardv1connect.GuestServiceConsoleClientStream
	err := c.retry(ctx, func(e *endpoint) error {
		err := e.answers(ctx)
		if err == nil {
			stream, err = e.guest.Console(ctx)
		}
		return err
	})
	if err != nil {
		return err
	}
	if err := stream.Send(&blixardv1.ConsoleRequest{Message: &blixardv1.ConsoleRequest_Start{Start: target}}); err != nil && !errors.Is(err, io.EOF) {
		return c.asError(ctx, err)
	}
	go sendConsole(ctx, stream, in)
	for {
		m, err := stream.Receive()
		if err != nil {
			return ignoreEOF(c.asError(ctx, err))
		}
		if err := writeAll(out, m.Data); err != nil {
			return err
		}
	}
}

func sendConsole(ctx context.Context, stream blixardv1connect.GuestServiceConsoleClientStream, in io.Reader) {
	input := pieces(ctx, in)
	for {
		select {
		case <-ctx.Done():
			closeSend(stream)
			return
		case p := <-input:
			if len(p.data) > 0 && stream.Send(&blixardv1.ConsoleRequest{Message: &blixardv1.ConsoleRequest_Data{Data: p.data}}) != nil {
				return
			}
			if p.err != nil {
				closeSend(stream)
				return
			}
		}
	}
}

// DownloadSnapshot writes the state as the answering node has it to w. The
// bytes hold the cluster's secret.
func (c *Client) DownloadSnapshot(ctx context.Context, w io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var stream blixardv1connect.ClusterServiceDownloadSnapshotClientStream
	var first *blixardv1.DownloadSnapshotResponse
	err := c.retry(ctx, func(e *endpoint) error {
		var err error
		if stream, err = e.member.DownloadSnapshot(ctx, &blixardv1.DownloadSnapshotRequest{}); err != nil {
			return err
		}
		first, err = stream.Receive()
		return err
	})
	if err != nil {
		return err
	}
	for m := first; ; {
		if _, err := w.Write(m.Data); err != nil {
			return err
		}
		if m, err = stream.Receive(); err != nil {
			return ignoreEOF(c.asError(ctx, err))
		}
	}
}

// Record writes a recording of the answering node's log to w: the state at an
// index not newer than since (0: as early as it is kept), and what was applied
// after it; with follow until ctx ends, which is no error then. Each write is
// of whole frames, so that w can be read up to any of them. The bytes hold the
// cluster's secret.
func (c *Client) Record(ctx context.Context, since uint64, follow bool, w io.Writer) error {
	stop := ctx
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var stream blixardv1connect.ClusterServiceRecordClientStream
	var m *blixardv1.RecordResponse
	err := c.retry(ctx, func(e *endpoint) error {
		var err error
		if stream, err = e.member.Record(ctx, &blixardv1.RecordRequest{Since: since, Follow: follow}); err != nil {
			return err
		}
		m, err = stream.Receive()
		return err
	})
	if err != nil {
		return err
	}
	var frames []byte
	for {
		frames = append(frames, m.Data...)
		if m.Whole {
			if _, err := w.Write(frames); err != nil {
				return err
			}
			frames = frames[:0]
		}
		if m, err = stream.Receive(); err != nil {
			if follow && stop.Err() != nil {
				return nil
			}
			return ignoreEOF(c.asError(ctx, err))
		}
	}
}
