package wal

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
)

const (
	sectorBytes  = 512
	headBytes    = 16                        // magic, length, crc, header crc
	firstBytes   = sectorBytes - headBytes   // payload in the first sector
	nextBytes    = sectorBytes - 1           // payload in every further one
	tagNext      = 0x5a                      // begins every further sector
	maxPayload   = 1 << 30                   // bytes; one Save is far below
	maxFileBytes = maxPayload + maxPayload/8 // no segment is ever larger
)

// magic begins every frame; its last byte is the version of the format.
var magic = [4]byte{0xa5, 'B', 'X', 1}

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	zeros      [sectorBytes]byte
)

// frameBytes is how much room a frame takes for a payload of n bytes.
func frameBytes(n int) int {
	sectors := 1
	if n > firstBytes {
		sectors += (n - firstBytes + nextBytes - 1) / nextBytes
	}
	return sectors * sectorBytes
}

// appendFrame writes payload as one frame into buf (reused, grown if need be)
// and returns it with the chain's next checksum.
func appendFrame(buf, payload []byte, chain uint32) ([]byte, uint32) {
	size := frameBytes(len(payload))
	if cap(buf) < size {
		buf = make([]byte, size)
	}
	buf = buf[:size]
	copy(buf, magic[:])
	binary.LittleEndian.PutUint32(buf[4:], uint32(len(payload)))
	n := copy(buf[headBytes:sectorBytes], payload)
	end := headBytes + n
	for off := sectorBytes; off < size; off += sectorBytes {
		buf[off] = tagNext
		c := copy(buf[off+1:off+sectorBytes], payload[n:])
		n += c
		end = off + 1 + c
	}
	clear(buf[end:])
	crc := frameCRC(buf, chain)
	binary.LittleEndian.PutUint32(buf[8:], crc)
	binary.LittleEndian.PutUint32(buf[12:], crc32.Update(chain, castagnoli, buf[:12]))
	return buf, crc
}

func frameCRC(frame []byte, chain uint32) uint32 {
	return crc32.Update(crc32.Update(chain, castagnoli, frame[:8]), castagnoli, frame[headBytes:])
}

// verdict is what readFrame found.
type verdict int

const (
	frameValid   verdict = iota
	frameNone            // only zeros up to the end of the file
	frameTorn            // the last write, cut short; see the package comment
	frameDamaged         // anything else
)

// found is a frame as read: its payload (in a buffer that the next call may
// reuse), its size in the file and the chain's next checksum if it is valid,
// else why it is not.
type found struct {
	verdict verdict
	payload []byte
	size    int
	chain   uint32
	why     string
}

// readFrame reads the frame at b[off:] of a segment's bytes. buf is scratch.
func readFrame(b []byte, off int, chain uint32, buf []byte) found {
	rest := b[off:]
	if len(rest) < sectorBytes {
		if allZero(rest) {
			return found{verdict: frameNone}
		}
		return damaged("a record begins but the file ends within its first sector")
	}
	head := rest[:sectorBytes]
	if allZero(head) {
		return readHeadless(rest)
	}
	if !bytes.Equal(head[:4], magic[:]) {
		return damaged("no record begins here, yet the place is not empty")
	}
	if crc32.Update(chain, castagnoli, head[:12]) != binary.LittleEndian.Uint32(head[12:]) {
		return damaged("a record's header does not match its checksum, or it does not follow the record before it")
	}
	length := int64(binary.LittleEndian.Uint32(head[4:]))
	if length > maxPayload || int64(frameBytes(int(length))) > int64(len(rest)) {
		return damaged("a record is longer than the file")
	}
	size := frameBytes(int(length))
	frame := rest[:size]
	crc := frameCRC(frame, chain)
	if crc == binary.LittleEndian.Uint32(head[8:]) {
		return found{payload: payloadOf(frame, int(length), buf), size: size, chain: crc}
	}
	missing := 0
	for at := sectorBytes; at < size; at += sectorBytes {
		sector := frame[at : at+sectorBytes]
		switch {
		case allZero(sector):
			missing++
		case sector[0] != tagNext:
			return damaged("a record does not match its checksum, and a part of it is foreign")
		}
	}
	switch {
	case missing == 0:
		return damaged("a complete record does not match its checksum")
	case !allZero(rest[size:]):
		return damaged("a record has missing parts, yet something was written after it")
	}
	return found{verdict: frameTorn, size: size}
}

// readHeadless judges what follows a first sector of zeros: nothing, or the
// further sectors of the one outstanding write, whose first never got there.
func readHeadless(rest []byte) found {
	end := 0
	for at := sectorBytes; at < len(rest); at += sectorBytes {
		sector := rest[at:min(at+sectorBytes, len(rest))]
		if allZero(sector) {
			continue
		}
		if sector[0] != tagNext || len(sector) < sectorBytes {
			return damaged("a record is missing, yet something was written after it")
		}
		end = at + sectorBytes
	}
	if end == 0 {
		return found{verdict: frameNone}
	}
	return found{verdict: frameTorn, size: end}
}

func payloadOf(frame []byte, length int, buf []byte) []byte {
	buf = append(buf[:0], frame[headBytes:headBytes+min(length, firstBytes)]...)
	for at := sectorBytes; len(buf) < length; at += sectorBytes {
		buf = append(buf, frame[at+1:at+1+min(length-len(buf), nextBytes)]...)
	}
	return buf
}

func damaged(why string) found { return found{verdict: frameDamaged, why: why} }

func allZero(b []byte) bool {
	for len(b) >= sectorBytes {
		if !bytes.Equal(b[:sectorBytes], zeros[:]) {
			return false
		}
		b = b[sectorBytes:]
	}
	return bytes.Equal(b, zeros[:len(b)])
}
