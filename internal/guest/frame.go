package guest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

const (
	// MaxPayload bounds a frame's payload in bytes, in both directions.
	MaxPayload = 64 << 10

	headerSize    = 10
	dataChunk     = 16 << 10  // bytes of data put in one frame, so that others get between
	windowSize    = 256 << 10 // bytes a side may send ahead per stream
	frameOverhead = 64        // charged to the window per data frame: tiny frames are not free to hold
	queuedFrames  = 8         // encoded frames waiting for the connection
)

type frameType uint8

const (
	frameHello    frameType = iota + 1 // stream 0, host: helloMagic, session id
	frameHelloAck                      // stream 0, guest: the same back
	frameOpen                          // host: JSON openRequest
	frameData                          // flags: channel and flagEnd
	frameWindow                        // u32: bytes the other side may send further
	frameResize                        // host: JSON Size
	frameResult                        // guest: JSON resultReply; ends the stream
	frameReset                         // either: the stream is over, forget it
)

// Channels of a data frame, and its end mark.
const (
	channelStdin  uint8 = 0
	channelStdout uint8 = 1
	channelStderr uint8 = 2
	flagEnd       uint8 = 0x80
	channelMask   uint8 = 0x03
)

type frame struct {
	stream  uint32
	kind    frameType
	flags   uint8
	payload []byte
}

// cost is what a data frame takes from the window.
func (f frame) cost() int { return len(f.payload) + frameOverhead }

const sessionSize = 16

type session [sessionSize]byte

// helloMagic begins with a byte that does not occur in it again.
const helloMagic = "\xb1blixard-guest/1"

func helloPayload(s session) []byte { return append([]byte(helloMagic), s[:]...) }

// errGarbage: the bytes read are no frame.
var errGarbage = errors.New("not a frame of the guest protocol")

func appendFrame(b []byte, f frame) []byte {
	b = binary.BigEndian.AppendUint32(b, f.stream)
	b = append(b, byte(f.kind), f.flags)
	b = binary.BigEndian.AppendUint32(b, uint32(len(f.payload)))
	return append(b, f.payload...)
}

// readFrame reads one frame; its payload is its own. The header is checked as
// tightly as the protocol allows, so that garbage is seen as such early.
func readFrame(r *bufio.Reader) (frame, error) {
	var header [headerSize]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return frame{}, err
	}
	f := frame{
		stream: binary.BigEndian.Uint32(header[0:4]),
		kind:   frameType(header[4]),
		flags:  header[5],
	}
	length := binary.BigEndian.Uint32(header[6:10])
	if err := f.check(length); err != nil {
		return frame{}, err
	}
	if length > 0 {
		f.payload = make([]byte, length)
		if _, err := io.ReadFull(r, f.payload); err != nil {
			return frame{}, err
		}
	}
	if (f.kind == frameHello || f.kind == frameHelloAck) && string(f.payload[:len(helloMagic)]) != helloMagic {
		return frame{}, fmt.Errorf("hello without magic: %w", errGarbage)
	}
	return f, nil
}

func (f frame) check(length uint32) error {
	hello := f.kind == frameHello || f.kind == frameHelloAck
	ok := length <= MaxPayload && hello == (f.stream == 0)
	switch f.kind {
	case frameHello, frameHelloAck:
		ok = ok && f.flags == 0 && length == uint32(len(helloMagic)+sessionSize)
	case frameData:
		ok = ok && f.flags&^(channelMask|flagEnd) == 0 && f.flags&channelMask <= channelStderr
	case frameWindow:
		ok = ok && f.flags == 0 && length == 4
	case frameReset:
		ok = ok && f.flags == 0 && length == 0
	case frameOpen, frameResize, frameResult:
		ok = ok && f.flags == 0
	default:
		ok = false
	}
	if !ok {
		return fmt.Errorf("type %d, flags %#x, stream %d, %d bytes: %w", f.kind, f.flags, f.stream, length, errGarbage)
	}
	return nil
}

// hunt reads until just behind the pattern, wherever in the stream it begins.
func hunt(r io.ByteReader, pattern []byte) error {
	// Knuth, Morris, Pratt: fail[i] is the longest border of pattern[:i+1].
	fail := make([]int, len(pattern))
	for i, k := 1, 0; i < len(pattern); i++ {
		for k > 0 && pattern[i] != pattern[k] {
			k = fail[k-1]
		}
		if pattern[i] == pattern[k] {
			k++
		}
		fail[i] = k
	}
	for matched := 0; matched < len(pattern); {
		b, err := r.ReadByte()
		if err != nil {
			return err
		}
		for matched > 0 && b != pattern[matched] {
			matched = fail[matched-1]
		}
		if b == pattern[matched] {
			matched++
		}
	}
	return nil
}
