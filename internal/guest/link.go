package guest

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
)

// link is the writing half of a connection, the same at both ends: one
// goroutine writes what many have queued, so that nobody waits for a stuck
// connection longer than its context.
type link struct {
	conn io.ReadWriteCloser
	out  chan queued

	// epoch counts the sessions on the connection. What an ended session has
	// queued is not written behind the next one's HELLO-ACK, where the host
	// could take it for an answer of the new session.
	epoch atomic.Uint64

	mu     sync.Mutex
	resets []uint32 // streams to reset, ahead of what is queued
	wake   chan struct{}
	err    error

	done chan struct{} // closed when the connection is over
}

// queued is one encoded frame.
type queued struct {
	epoch uint64
	bytes []byte
}

// maxResets bounds resets that wait for a stuck connection.
const maxResets = 4096

func newLink(conn io.ReadWriteCloser) *link {
	return &link{
		conn: conn,
		out:  make(chan queued, queuedFrames),
		wake: make(chan struct{}, 1),
		done: make(chan struct{}),
	}
}

// fail ends the connection; the first reason is kept.
func (l *link) fail(err error) {
	l.mu.Lock()
	first := l.err == nil
	if first {
		l.err = err
	}
	l.mu.Unlock()
	if first {
		close(l.done)
		//nolint:errcheck // what a close says about a connection given up is of no use
		l.conn.Close()
	}
}

// closed is the error of a call that found the connection over.
func (l *link) closed() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return fmt.Errorf("%w: %w", ErrClosed, l.err)
}

// send queues a frame, or fails with the context or the connection.
func (l *link) send(ctx context.Context, epoch uint64, f frame) error {
	select {
	case <-l.done:
		return l.closed()
	default:
	}
	select {
	case l.out <- queued{epoch, appendFrame(make([]byte, 0, headerSize+len(f.payload)), f)}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-l.done:
		return l.closed()
	}
}

// reset tells the other side to forget a stream, without ever blocking.
func (l *link) reset(stream uint32) {
	l.mu.Lock()
	l.resets = append(l.resets, stream)
	stuck := len(l.resets) > maxResets
	l.mu.Unlock()
	if stuck {
		l.fail(fmt.Errorf("the connection is stuck with %d streams to reset", maxResets))
		return
	}
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// write is the goroutine that writes; it ends with the connection.
func (l *link) write() {
	for {
		var b []byte
		select {
		case <-l.done:
			return
		case <-l.wake:
			l.mu.Lock()
			for _, id := range l.resets {
				b = appendFrame(b, frame{stream: id, kind: frameReset})
			}
			l.resets = l.resets[:0]
			l.mu.Unlock()
		case q := <-l.out:
			if q.epoch != l.epoch.Load() {
				continue
			}
			b = q.bytes
		}
		if _, err := l.conn.Write(b); err != nil {
			l.fail(fmt.Errorf("writing: %w", err))
			return
		}
	}
}

// stream is one call's half at either end.
type stream struct {
	id    uint32
	epoch uint64
	link  *link

	mu       sync.Mutex
	received []frame // data, resize and result frames not yet taken
	held     int     // window the other side has used and not got back
	owed     int     // window consumed here and not yet granted
	credit   int     // window this side may still use
	over     error   // no more will be received
	changed  chan struct{}
}

func newStream(l *link, id uint32) *stream {
	return &stream{id: id, epoch: l.epoch.Load(), link: l, credit: windowSize, changed: make(chan struct{})}
}

// announce wakes everybody who waits for a change. Callers hold mu.
func (s *stream) announce() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// end lets receivers drain what is there and then see err.
func (s *stream) end(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over == nil {
		s.over = err
		s.announce()
	}
}

// maxControls bounds frames outside the window (resize, result) held per stream.
const maxControls = 256

// deliver takes a frame from the connection's reader and never blocks. An
// error means that the other side breaks the protocol.
func (s *stream) deliver(f frame) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over != nil {
		return nil // late frames of a stream given up
	}
	switch f.kind {
	case frameWindow:
		granted := binary.BigEndian.Uint32(f.payload)
		if granted > windowSize || s.credit+int(granted) > windowSize {
			return fmt.Errorf("stream %d: more window granted than was used: %w", s.id, errGarbage)
		}
		s.credit += int(granted)
		s.announce()
		return nil
	case frameData:
		if s.held+f.cost() > windowSize {
			return fmt.Errorf("stream %d: window overrun: %w", s.id, errGarbage)
		}
		s.held += f.cost()
	default:
		if len(s.received) > maxControls+windowSize/frameOverhead {
			return fmt.Errorf("stream %d: too many control frames: %w", s.id, errGarbage)
		}
	}
	s.received = append(s.received, f)
	s.announce()
	return nil
}

// next takes the next frame in order; after the last it returns the reason of
// the end.
func (s *stream) next(ctx context.Context) (frame, error) {
	for {
		s.mu.Lock()
		if len(s.received) > 0 {
			f := s.received[0]
			s.received[0] = frame{}
			s.received = s.received[1:]
			s.mu.Unlock()
			return f, nil
		}
		over, changed := s.over, s.changed
		s.mu.Unlock()
		if over != nil {
			return frame{}, over
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return frame{}, context.Cause(ctx)
		case <-s.link.done:
			// A result may have come just before the end of the connection.
			s.end(s.link.closed())
		}
	}
}

// send queues a frame of this stream.
func (s *stream) send(ctx context.Context, f frame) error {
	f.stream = s.id
	return s.link.send(ctx, s.epoch, f)
}

// consumed gives the window of a data frame back to the sender, in batches.
func (s *stream) consumed(ctx context.Context, f frame) error {
	s.mu.Lock()
	s.owed += f.cost()
	if s.owed < windowSize/4 {
		s.mu.Unlock()
		return nil
	}
	granted := s.owed
	s.owed = 0
	s.held -= granted
	s.mu.Unlock()
	return s.send(ctx, frame{
		kind:    frameWindow,
		payload: binary.BigEndian.AppendUint32(nil, uint32(granted)),
	})
}

// write sends data on a channel, waiting for window.
func (s *stream) write(ctx context.Context, channel uint8, p []byte) (int, error) {
	written := 0
	for written < len(p) {
		f := frame{kind: frameData, flags: channel, payload: p[written:min(len(p), written+dataChunk)]}
		if err := s.take(ctx, f.cost()); err != nil {
			return written, err
		}
		if err := s.send(ctx, f); err != nil {
			return written, err
		}
		written += len(f.payload)
	}
	return written, nil
}

// writeEnd marks the end of a channel.
func (s *stream) writeEnd(ctx context.Context, channel uint8) error {
	f := frame{kind: frameData, flags: channel | flagEnd}
	if err := s.take(ctx, f.cost()); err != nil {
		return err
	}
	return s.send(ctx, f)
}

// take waits until the window allows so many bytes.
func (s *stream) take(ctx context.Context, bytes int) error {
	for {
		s.mu.Lock()
		if s.over != nil {
			defer s.mu.Unlock()
			return s.over
		}
		if s.credit >= bytes {
			s.credit -= bytes
			s.mu.Unlock()
			return nil
		}
		changed := s.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.link.done:
			return s.link.closed()
		}
	}
}

// channelWriter is an io.Writer on one channel of a stream.
type channelWriter struct {
	ctx     context.Context //nolint:containedctx // of the call whose output it writes
	stream  *stream
	channel uint8
}

func (w channelWriter) Write(p []byte) (int, error) { return w.stream.write(w.ctx, w.channel, p) }
