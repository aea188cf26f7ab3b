package lambdaapi

import (
	"bytes"
	"encoding/json"
	"net/http"
	"slices"

	"github.com/aws/aws-sdk-go-v2/aws/protocol/eventstream"

	"github.com/blixard/blixard"
)

// maxChunk bounds the payload of one event of a stream.
const maxChunk = 64 << 10

// invokeStream answers with the function's answer in events, as it comes. What
// is not streamed by the function is held until it is known whether it is an
// answer or an error, since errors are told by the last event.
func (c *call) invokeStream() error {
	inv, err := c.invocation()
	if err != nil {
		return err
	}
	if c.invocationType() == invocationDryRun {
		return c.answer(http.StatusNoContent, nil)
	}
	s := &streamer{c: c, inv: inv, encoder: eventstream.NewEncoder()}
	report, err := c.s.opt.Invoker.Invoke(c.r.Context(), inv, s)
	if err != nil && !s.begun {
		return c.invocationError(inv, err)
	}
	complete := struct {
		ErrorCode    string `json:",omitempty"`
		ErrorDetails string `json:",omitempty"`
		LogResult    string `json:",omitempty"`
	}{}
	switch {
	case err != nil: // in the midst of the stream
		e := asException(c.invocationError(inv, err))
		complete.ErrorCode, complete.ErrorDetails = e.Type, e.Message
	case report.Error != nil:
		complete.ErrorCode = report.Error.Kind
		if complete.ErrorCode == "" {
			complete.ErrorCode = "Unhandled"
		}
		if complete.ErrorDetails = s.held.String(); complete.ErrorDetails == "" {
			details, err := encodeJSON(map[string]string{"errorType": report.Error.Type})
			if err != nil {
				return err
			}
			complete.ErrorDetails = string(details)
		}
		s.held.Reset()
	}
	if len(report.Log) > 0 {
		complete.LogResult = logTail(report.Log)
	}
	if err == nil && !s.begun {
		inv.Number = report.Number
	}
	data, encodeErr := json.Marshal(complete)
	if encodeErr != nil {
		return encodeErr
	}
	if err := s.begin(); err != nil {
		return nil //nolint:nilerr // the client has left: there is nobody to tell
	}
	if err := s.flushHeld(); err != nil {
		return nil //nolint:nilerr // the same
	}
	if err := s.event("InvokeComplete", "application/json", data); err != nil {
		return nil //nolint:nilerr // the same
	}
	return nil
}

// streamer makes events of an answer.
type streamer struct {
	c       *call
	inv     *blixard.Invocation
	encoder *eventstream.Encoder
	live    bool // the function streams
	begun   bool // the head of our answer is out
	held    bytes.Buffer
}

// Begin implements blixard.ResponseSink.
func (s *streamer) Begin(head blixard.ResponseHead) error {
	s.live = head.Streaming
	if head.Status != 0 {
		// The HTTP head goes before the body, as functions write it themselves.
		headers, cookies := httpHeaders(&head)
		prelude, err := encodeJSON(struct {
			StatusCode int               `json:"statusCode"`
			Headers    map[string]string `json:"headers"`
			Cookies    []string          `json:"cookies,omitempty"`
		}{head.Status, headers, cookies})
		if err != nil {
			return err
		}
		if _, err := s.Write(append(prelude, make([]byte, 8)...)); err != nil {
			return err
		}
	}
	return nil
}

// Write implements blixard.ResponseSink.
func (s *streamer) Write(p []byte) (int, error) {
	if !s.live {
		return s.held.Write(p)
	}
	if err := s.begin(); err != nil {
		return 0, err
	}
	for chunk := range slices.Chunk(p, maxChunk) {
		if err := s.event("PayloadChunk", "application/octet-stream", chunk); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// flushHeld sends what was held.
func (s *streamer) flushHeld() error {
	for chunk := range slices.Chunk(s.held.Bytes(), maxChunk) {
		if err := s.event("PayloadChunk", "application/octet-stream", chunk); err != nil {
			return err
		}
	}
	return nil
}

// begin sends the head of the answer, once.
func (s *streamer) begin() error {
	if s.begun {
		return nil
	}
	s.begun = true
	h := s.c.w.Header()
	h.Set("Content-Type", "application/vnd.amazon.eventstream")
	h.Set("X-Amz-Executed-Version", blixard.VersionName(s.inv.Number))
	h.Set("X-Amzn-Trace-Id", s.inv.TraceID)
	s.c.w.WriteHeader(http.StatusOK)
	return http.NewResponseController(s.c.w).Flush()
}

func (s *streamer) event(kind, contentType string, payload []byte) error {
	message := eventstream.Message{Payload: payload}
	message.Headers.Set(":message-type", eventstream.StringValue("event"))
	message.Headers.Set(":event-type", eventstream.StringValue(kind))
	message.Headers.Set(":content-type", eventstream.StringValue(contentType))
	if err := s.encoder.Encode(s.c.w, message); err != nil {
		return err
	}
	return http.NewResponseController(s.c.w).Flush()
}
