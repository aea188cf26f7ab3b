package lambdaapi

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
)

// maxRest bounds what is left of a body once the zip was taken out, and
// maxDepth how deep its JSON nests.
const (
	maxRest  = 1 << 20
	maxDepth = 64
)

var errNotJSON = errors.New("the body is not JSON")

// takeZip reads a JSON document of any size and copies the decoded value of one
// member, base64 in a string, to zip as it comes. It returns the document with
// "" in its place, and whether the member was there. path names the member from
// the outermost object inwards.
func takeZip(r io.Reader, path []string, zip io.Writer) (rest []byte, found bool, err error) {
	t := &zipTaker{r: bufio.NewReaderSize(r, 64<<10), path: path, zip: zip}
	if err := t.run(); err != nil {
		return nil, false, err
	}
	return t.rest, t.found, nil
}

type zipTaker struct {
	r      *bufio.Reader
	path   []string
	zip    io.Writer
	rest   []byte
	frames []frame
	found  bool
}

// frame is an object or array that is open.
type frame struct {
	object  bool
	wantKey bool
	key     string
}

func (t *zipTaker) keep(c byte) error {
	if len(t.rest) >= maxRest {
		return errRestTooLarge
	}
	t.rest = append(t.rest, c)
	return nil
}

var errRestTooLarge = errors.New("the body without the zip is too large")

// run copies the document. It only follows its nesting: whether it is JSON is
// judged when what was kept is decoded.
func (t *zipTaker) run() error {
	for {
		c, err := t.r.ReadByte()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading the body: %w", err)
		}
		if c == '"' {
			if err := t.text(); err != nil {
				return err
			}
			continue
		}
		if err := t.keep(c); err != nil {
			return err
		}
		if err := t.nest(c); err != nil {
			return err
		}
	}
}

func (t *zipTaker) nest(c byte) error {
	switch c {
	case '{', '[':
		if len(t.frames) == maxDepth {
			return errNotJSON
		}
		t.frames = append(t.frames, frame{object: c == '{', wantKey: c == '{'})
	case '}', ']':
		if len(t.frames) == 0 {
			return errNotJSON
		}
		t.frames = t.frames[:len(t.frames)-1]
	case ',', ':':
		if len(t.frames) > 0 {
			top := &t.frames[len(t.frames)-1]
			top.wantKey = top.object && c == ','
		}
	}
	return nil
}

// text reads a string, whose opening quote was read.
func (t *zipTaker) text() error {
	if t.wanted() {
		return t.take()
	}
	begin := len(t.rest)
	for escaped, open := false, false; ; {
		if !open {
			open = true
			if err := t.keep('"'); err != nil {
				return err
			}
		}
		c, err := t.r.ReadByte()
		if err != nil {
			return unexpectedEnd(err)
		}
		if err := t.keep(c); err != nil {
			return err
		}
		if c == '"' && !escaped {
			break
		}
		escaped = c == '\\' && !escaped
	}
	if len(t.frames) > 0 {
		if top := &t.frames[len(t.frames)-1]; top.wantKey {
			if err := json.Unmarshal(t.rest[begin:], &top.key); err != nil {
				return errNotJSON
			}
		}
	}
	return nil
}

func unexpectedEnd(err error) error {
	if errors.Is(err, io.EOF) {
		return errNotJSON
	}
	return fmt.Errorf("reading the body: %w", err)
}

// wanted tells whether the string that begins is the value of the member.
func (t *zipTaker) wanted() bool {
	keys := make([]string, 0, len(t.path))
	for i := range t.frames {
		if f := &t.frames[i]; !f.object || f.wantKey || len(keys) == len(t.path) {
			return false
		}
		keys = append(keys, t.frames[i].key)
	}
	return slices.Equal(keys, t.path)
}

// take decodes the member's value.
func (t *zipTaker) take() error {
	if t.found {
		return fmt.Errorf("%w: it has the zip twice", errNotJSON)
	}
	t.found = true
	s := &stringReader{r: t.r}
	if _, err := io.Copy(t.zip, base64.NewDecoder(base64.StdEncoding, s)); err != nil {
		if _, corrupt := errors.AsType[base64.CorruptInputError](err); corrupt || errors.Is(err, io.ErrUnexpectedEOF) {
			return errNotBase64
		}
		return fmt.Errorf("reading the zip: %w", err)
	}
	// What stands behind the end of the base64.
	if n, err := io.Copy(io.Discard, s); err != nil {
		return fmt.Errorf("reading the zip: %w", err)
	} else if n > 0 {
		return errNotBase64
	}
	for range 2 {
		if err := t.keep('"'); err != nil {
			return err
		}
	}
	return nil
}

var errNotBase64 = errors.New("the zip is not base64")

// stringReader reads the characters of a JSON string up to its closing quote.
// Characters outside ASCII are no base64: it need not know them.
type stringReader struct {
	r   *bufio.Reader
	end bool
}

// Read implements io.Reader.
func (s *stringReader) Read(p []byte) (int, error) {
	n := 0
	for n < len(p) && !s.end {
		// Long stretches without escapes are copied at once.
		ahead, err := s.r.Peek(min(len(p)-n, max(1, s.r.Buffered())))
		if len(ahead) == 0 {
			return n, unexpectedEnd(err)
		}
		plain := slices.IndexFunc(ahead, func(c byte) bool { return c == '"' || c == '\\' })
		if plain != 0 {
			if plain < 0 {
				plain = len(ahead)
			}
			n += copy(p[n:], ahead[:plain])
			discard(s.r, plain)
			continue
		}
		discard(s.r, 1)
		if ahead[0] == '"' {
			s.end = true
			break
		}
		c, err := s.escaped()
		if err != nil {
			return n, err
		}
		p[n] = c
		n++
	}
	if n == 0 && s.end {
		return 0, io.EOF
	}
	return n, nil
}

// escaped reads what follows a backslash.
func (s *stringReader) escaped() (byte, error) {
	c, err := s.r.ReadByte()
	if err != nil {
		return 0, unexpectedEnd(err)
	}
	switch c {
	case '/':
		return '/', nil
	case 'n', 'r':
		return '\n', nil // base64 passes over it
	case 'u':
		var digits [4]byte
		if _, err := io.ReadFull(s.r, digits[:]); err != nil {
			return 0, unexpectedEnd(err)
		}
		code, err := strconv.ParseUint(string(digits[:]), 16, 16)
		if err != nil || code > 0x7f {
			return 0, errNotBase64
		}
		return byte(code), nil
	}
	return 0, errNotBase64
}

// discard drops bytes that are buffered, which cannot fail.
func discard(r *bufio.Reader, n int) {
	if _, err := r.Discard(n); err != nil {
		panic("bufio lost " + strconv.Itoa(n) + " bytes that it had buffered")
	}
}
