package lambdaapi

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
)

// maxControl bounds the bodies of operations that carry neither a payload nor
// code.
const maxControl = 1 << 20

// upload is a zip that came in a body, in a file that has no name any more.
type upload struct {
	file  *os.File
	bytes int64
}

// Write implements io.Writer.
func (u *upload) Write(p []byte) (int, error) {
	n, err := u.file.Write(p)
	u.bytes += int64(n)
	return n, err
}

// readBody reads the body within the operation's bound, and returns its SHA-256.
// release gives back what it holds, also after an error.
func (c *call) readBody() (release func(), hash string, err error) {
	limit := int64(maxControl)
	switch {
	case c.op.zip != nil:
		return c.readUpload()
	case c.op.invokes:
		limit = c.payloadLimit()
	}
	size := c.r.ContentLength
	if size > limit {
		return func() {}, "", c.tooLarge(size, limit)
	}
	if size < 0 {
		size = limit
	}
	// What cannot be held now is refused at once: waiting would hold connections
	// instead.
	if !c.s.memory.TryAcquire(size) {
		return func() {}, "", throttled("")
	}
	release = func() { c.s.memory.Release(size) }
	body, err := io.ReadAll(http.MaxBytesReader(c.w, c.r.Body, limit))
	if err != nil {
		if e, ok := errors.AsType[*http.MaxBytesError](err); ok {
			return release, "", c.tooLarge(e.Limit+1, limit)
		}
		return release, "", brokenBody(err)
	}
	c.body = body
	sum := sha256.Sum256(body)
	return release, hex.EncodeToString(sum[:]), nil
}

func brokenBody(err error) error {
	return refuse("SerializationException", "The body could not be read to its end: %v", err)
}

func (c *call) tooLarge(size, limit int64) error {
	if c.op.invokes {
		return refuse("RequestTooLargeException", "%d byte payload is too large for the %s invocation type (limit %d bytes)", size, c.invocationType(), limit)
	}
	return refuse("RequestEntityTooLargeException", "Request must be smaller than %d bytes for the %s operation", limit, c.op.name)
}

// readUpload reads a body with a zip in it: the zip goes to a file, the rest
// stays in memory. Both are judged only once the signature was.
func (c *call) readUpload() (release func(), sum string, err error) {
	release = func() {}
	limit := c.s.opt.Limits.UploadBytes
	if c.r.ContentLength > limit {
		return release, "", c.tooLarge(c.r.ContentLength, limit)
	}
	if !c.s.uploads.TryAcquire(1) {
		return release, "", throttled("")
	}
	release = func() { c.s.uploads.Release(1) }
	// The server's own deadline for a request is made for small ones.
	if err := http.NewResponseController(c.w).SetReadDeadline(time.Now().Add(time.Duration(c.s.opt.Limits.UploadSecond) * time.Second)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return release, "", fmt.Errorf("giving an upload its time: %w", err)
	}
	file, err := os.CreateTemp(c.s.opt.TempDir, "blixard-upload-*")
	if err != nil {
		return release, "", fmt.Errorf("making a file for an upload: %w", err)
	}
	c.zip = &upload{file: file}
	release = func() {
		if err := file.Close(); err != nil {
			c.s.opt.Log.Error("closing an upload failed", "error", err)
		}
		c.s.uploads.Release(1)
	}
	if err := os.Remove(file.Name()); err != nil {
		return release, "", fmt.Errorf("taking the name of an upload: %w", err)
	}
	hash := sha256.New()
	rest, found, err := takeZip(io.TeeReader(http.MaxBytesReader(c.w, c.r.Body, limit), hash), c.op.zip, c.zip)
	if err != nil {
		return release, "", c.uploadError(err, limit)
	}
	if !found {
		c.zip = nil
	}
	c.body = rest
	return release, hex.EncodeToString(hash.Sum(nil)), nil
}

func (c *call) uploadError(err error, limit int64) error {
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return c.tooLarge(limit+1, limit)
	}
	switch {
	case errors.Is(err, errRestTooLarge):
		return refuse("RequestEntityTooLargeException", "Request must be smaller than %d bytes, besides the zip, for the %s operation", maxRest, c.op.name)
	case errors.Is(err, errNotBase64):
		return refuse("SerializationException", "The ZipFile is not base64")
	case errors.Is(err, errNotJSON):
		return refuse("SerializationException", "The body is not JSON")
	}
	return brokenBody(err)
}

// decode reads the body, a JSON object, into v. No body is an empty object.
func (c *call) decode(v any) error {
	if len(bytes.TrimSpace(c.body)) == 0 {
		return nil
	}
	if err := json.Unmarshal(c.body, v); err != nil {
		if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
			return refuse("SerializationException", "The value of %s is a %s, which it cannot be", e.Field, e.Value)
		}
		return refuse("SerializationException", "Could not parse request body into json: %v", err)
	}
	return nil
}

func encodeJSON(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, fmt.Errorf("encoding an answer: %w", err)
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}
