package call

import (
	"encoding/binary"
	"fmt"
	"io"
)

type kind byte

// The numbers are the protocol.
const (
	kindInit     kind = 1
	kindRestore  kind = 2
	kindStat     kind = 3
	kindShutdown kind = 4
	kindInvoke   kind = 5
	kindBody     kind = 6
	kindWindow   kind = 7
	kindCancel   kind = 8

	kindOK     kind = 33
	kindFail   kind = 34
	kindHead   kind = 35
	kindData   kind = 36
	kindResult kind = 37
	kindLog    kind = 38
)

const headerBytes = 9

// header is of a frame.
type header struct {
	kind kind
	id   uint32
	size int // of the payload, at most MaxFrame
}

func putHeader(b []byte, k kind, id uint32, size int) {
	b[0] = byte(k)
	binary.BigEndian.PutUint32(b[1:], id)
	binary.BigEndian.PutUint32(b[5:], uint32(size))
}

func parseHeader(b []byte) (header, error) {
	h := header{kind: kind(b[0]), id: binary.BigEndian.Uint32(b[1:])}
	size := binary.BigEndian.Uint32(b[5:])
	if size > MaxFrame {
		return h, fmt.Errorf("a frame of %d bytes: %w", size, ErrHostile)
	}
	h.size = int(size)
	return h, nil
}

// frameReader cuts a stream into frames. The payload is valid until the next call.
type frameReader struct {
	r      io.Reader
	buffer []byte // of one frame and what came behind it
	have   int    // bytes in buffer
	used   int    // of them, given out
}

func newFrameReader(r io.Reader) *frameReader {
	return &frameReader{r: r, buffer: make([]byte, headerBytes+MaxFrame)}
}

// reset forgets what was read.
func (f *frameReader) reset() { f.have, f.used = 0, 0 }

func (f *frameReader) next() (header, []byte, error) {
	if err := f.fill(headerBytes); err != nil {
		return header{}, nil, err
	}
	h, err := parseHeader(f.buffer[f.used:])
	if err != nil {
		return h, nil, err
	}
	if err := f.fill(headerBytes + h.size); err != nil {
		if err == io.EOF { //nolint:errorlint // as fill has it
			err = io.ErrUnexpectedEOF
		}
		return h, nil, err
	}
	start := f.used + headerBytes
	f.used = start + h.size
	return h, f.buffer[start:f.used:f.used], nil
}

// fill reads until n bytes are there that were not given out.
func (f *frameReader) fill(n int) error {
	if f.have-f.used >= n {
		return nil
	}
	if f.used > 0 {
		f.have = copy(f.buffer, f.buffer[f.used:f.have])
		f.used = 0
	}
	for f.have < n {
		read, err := f.r.Read(f.buffer[f.have:])
		f.have += read
		if f.have >= n {
			return nil
		}
		if err != nil {
			if err == io.EOF && f.have > 0 {
				return io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}
