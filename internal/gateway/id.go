package gateway

import (
	"encoding/hex"
	"math/rand/v2"
	"time"
)

// NewRequestID makes the ID of an invocation: a random UUID (version 4).
func NewRequestID() string {
	var raw [16]byte
	putUint64(raw[:8], rand.Uint64())
	putUint64(raw[8:], rand.Uint64())
	return formatUUID(raw)
}

func formatUUID(raw [16]byte) string {
	raw[6] = raw[6]&0x0f | 0x40
	raw[8] = raw[8]&0x3f | 0x80
	var out [36]byte
	hex.Encode(out[0:8], raw[0:4])
	hex.Encode(out[9:13], raw[4:6])
	hex.Encode(out[14:18], raw[6:8])
	hex.Encode(out[19:23], raw[8:10])
	hex.Encode(out[24:36], raw[10:16])
	out[8], out[13], out[18], out[23] = '-', '-', '-', '-'
	return string(out[:])
}

// newTraceID makes a value of X-Amzn-Trace-Id for a call that came without.
func newTraceID(now time.Time) string {
	var raw [12]byte
	putUint64(raw[:8], rand.Uint64())
	low := rand.Uint32()
	raw[8], raw[9], raw[10], raw[11] = byte(low>>24), byte(low>>16), byte(low>>8), byte(low)
	const head = "Root=1-"
	var out [len(head) + 8 + 1 + 24]byte
	copy(out[:], head)
	sec := uint32(now.Unix())
	hex.Encode(out[len(head):], []byte{byte(sec >> 24), byte(sec >> 16), byte(sec >> 8), byte(sec)})
	out[len(head)+8] = '-'
	hex.Encode(out[len(head)+9:], raw[:])
	return string(out[:])
}

func putUint64(b []byte, v uint64) {
	for i := range 8 {
		b[i] = byte(v >> (8 * (7 - i)))
	}
}
