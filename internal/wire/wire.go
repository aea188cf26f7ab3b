// Package wire is the deterministic encoding of everything that is replicated:
// commands, records of the state, snapshots.
//
// One function describes a record for both directions: it names each field
// once, in order, and a Coder either writes or reads it. Integers are varints,
// strings and lists carry their length, records carry their own length, so
//   - equal values have equal bytes, on every machine and in every release;
//   - fields are only ever appended: a reader of an older release skips what it
//     does not know, a newer one sees zero values for what is not there.
//
// There are no maps and no floats. A Coder never panics on foreign bytes; the
// first error sticks and later calls do nothing.
package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// ErrMalformed is wrapped by every decoding error.
var ErrMalformed = errors.New("malformed encoding")

// Coder writes to or reads from a buffer. The zero value writes.
type Coder struct {
	buf     []byte
	off     int
	end     int // of the record being read
	reading bool
	err     error
}

// Writer returns a Coder that appends to buf.
func Writer(buf []byte) *Coder { return &Coder{buf: buf} }

// Reader returns a Coder that reads all of buf. Strings and byte slices it
// reads are copies.
func Reader(buf []byte) *Coder { return &Coder{buf: buf, end: len(buf), reading: true} }

// Reading tells whether the Coder reads.
func (c *Coder) Reading() bool { return c.reading }

// Err is the first error.
func (c *Coder) Err() error { return c.err }

// Bytes is what was written so far.
func (c *Coder) Bytes() []byte { return c.buf }

// Done is the first error, or one if bytes are left over.
func (c *Coder) Done() error {
	if c.err == nil && c.reading && c.off != c.end {
		c.fail("%d bytes left over", c.end-c.off)
	}
	return c.err
}

func (c *Coder) fail(format string, args ...any) {
	if c.err == nil {
		c.err = fmt.Errorf("%w at byte %d: %s", ErrMalformed, c.off, fmt.Sprintf(format, args...))
		c.off = c.end
	}
}

// Left is how many bytes of the current record are unread.
func (c *Coder) Left() int { return c.end - c.off }

func (c *Coder) uvarint() uint64 {
	if c.off == c.end {
		return 0 // field of a newer release: zero
	}
	v, n := binary.Uvarint(c.buf[c.off:c.end])
	if n <= 0 {
		c.fail("bad varint")
		return 0
	}
	c.off += n
	return v
}

// Uint codes an unsigned integer.
func Uint[T ~uint | ~uint8 | ~uint16 | ~uint32 | ~uint64](c *Coder, v *T) {
	if c.reading {
		x := c.uvarint()
		if uint64(T(x)) != x {
			c.fail("integer %d out of range", x)
			return
		}
		*v = T(x)
		return
	}
	c.buf = binary.AppendUvarint(c.buf, uint64(*v))
}

// Int codes a signed integer.
func Int[T ~int | ~int8 | ~int16 | ~int32 | ~int64](c *Coder, v *T) {
	if c.reading {
		u := c.uvarint()
		x := int64(u >> 1)
		if u&1 != 0 {
			x = ^x
		}
		if int64(T(x)) != x {
			c.fail("integer %d out of range", x)
			return
		}
		*v = T(x)
		return
	}
	c.buf = binary.AppendVarint(c.buf, int64(*v))
}

// Bool codes a truth value.
func Bool[T ~bool](c *Coder, v *T) {
	var b uint8
	if *v {
		b = 1
	}
	Uint(c, &b)
	if c.reading {
		if b > 1 {
			c.fail("truth value %d", b)
		}
		*v = b == 1
	}
}

// length codes a length, bounded by what is left when reading.
func (c *Coder) length(n int) int {
	u := uint64(n)
	Uint(c, &u)
	if c.reading {
		if u > uint64(c.Left()) {
			c.fail("length %d exceeds the %d bytes left", u, c.Left())
			return 0
		}
		return int(u)
	}
	return n
}

// String codes a string.
func String[T ~string](c *Coder, v *T) {
	n := c.length(len(*v))
	if c.reading {
		*v = T(c.buf[c.off : c.off+n])
		c.off += n
		return
	}
	c.buf = append(c.buf, *v...)
}

// Blob codes bytes.
func (c *Coder) Blob(v *[]byte) {
	n := c.length(len(*v))
	if c.reading {
		*v = append([]byte(nil), c.buf[c.off:c.off+n]...)
		c.off += n
		return
	}
	c.buf = append(c.buf, *v...)
}

// List codes a list; each element takes at least one byte, which bounds what a
// foreign length can make the reader allocate.
func List[T any](c *Coder, v *[]T, elem func(*Coder, *T)) {
	n := c.length(len(*v))
	if c.reading {
		if n == 0 {
			*v = nil
			return
		}
		*v = make([]T, 0, min(n, 1024))
		for range n {
			if c.err != nil {
				return
			}
			var e T
			elem(c, &e)
			*v = append(*v, e)
		}
		return
	}
	for i := range *v {
		elem(c, &(*v)[i])
	}
}

// Strings codes a list of strings.
func Strings[T ~string](c *Coder, v *[]T) { List(c, v, String[T]) }

// Record codes a record with its length: fields may be appended in later
// releases.
func (c *Coder) Record(fields func(*Coder)) {
	if c.reading {
		n := c.length(0)
		outer := c.end
		c.end = c.off + n
		fields(c)
		if c.err == nil {
			c.off = c.end // skips fields of newer releases
		}
		c.end = outer
		return
	}
	// Records are short: leave one byte for the length and move if it takes more.
	start := len(c.buf)
	c.buf = append(c.buf, 0)
	fields(c)
	n := uint64(len(c.buf) - start - 1)
	if n < 0x80 {
		c.buf[start] = byte(n)
		return
	}
	var head [binary.MaxVarintLen64]byte
	h := binary.PutUvarint(head[:], n)
	c.buf = append(c.buf, head[1:h]...) // grow by h-1
	copy(c.buf[start+h:], c.buf[start+1:start+1+int(n)])
	copy(c.buf[start:], head[:h])
}

// Optional codes a pointer that may be nil.
func Optional[T any](c *Coder, v **T, fields func(*Coder, *T)) {
	has := *v != nil
	Bool(c, &has)
	if !has {
		if c.reading {
			*v = nil
		}
		return
	}
	if c.reading {
		*v = new(T)
	}
	c.Record(func(c *Coder) { fields(c, *v) })
}
