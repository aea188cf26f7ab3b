package call

import (
	"errors"
	"fmt"
	"sync"

	"github.com/blixard/blixard"
)

// Of an answer that goes into RESULT as a whole; the rest of the frame is for what
// else is in there.
const (
	inlineBytes     = MaxFrame - 16<<10
	inlineHeadBytes = 8 << 10
	maxHeadBytes    = MaxFrame - 1<<10
)

// response is the ResponseWriter of one invocation.
type response struct {
	guest   *Guest
	id      uint32
	request *Request

	mu     sync.Mutex
	more   sync.Cond // the window has grown, or it has ended
	head   blixard.ResponseHead
	begun  bool
	sent   bool   // HEAD was
	buffer []byte // written and not sent
	window int
	ended  bool
}

func newResponse(g *Guest, id uint32, q *Request) *response {
	w := &response{guest: g, id: id, request: q, window: Window}
	w.more.L = &w.mu
	return w
}

func (w *response) grant(n uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.window += int(min(n, Window))
	w.more.Broadcast()
}

// giveUp ends it without telling the host.
func (w *response) giveUp() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = true
	w.more.Broadcast()
}

// Begin implements ResponseWriter.
func (w *response) Begin(head blixard.ResponseHead) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		return ErrEnded
	}
	if w.begun {
		return errors.New("the answer has begun already")
	}
	size := headBytes(head)
	if size > maxHeadBytes {
		return fmt.Errorf("the head of the answer is %d bytes long, at most %d are allowed", size, maxHeadBytes)
	}
	w.head, w.begun = head, true
	if head.Streaming || size > inlineHeadBytes {
		return w.sendHead()
	}
	return nil
}

// headBytes is about what a head takes in a frame, rather more than less.
func headBytes(h blixard.ResponseHead) int {
	const perText = 4
	size := 16 + perText + len(h.ContentType)
	for _, pair := range h.Headers {
		size += 2*perText + len(pair[0]) + len(pair[1])
	}
	return size
}

// sendHead is called with mu held.
func (w *response) sendHead() error {
	if w.sent {
		return nil
	}
	if err := w.guest.write(kindHead, w.id, func(out *writer) { out.head(w.head) }); err != nil {
		return fmt.Errorf("sending the head of an answer: %w", err)
	}
	w.begun, w.sent = true, true
	return nil
}

// Write implements ResponseWriter.
func (w *response) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		return 0, ErrEnded
	}
	if !w.sent && len(w.buffer)+len(p) <= inlineBytes {
		w.buffer = append(w.buffer, p...)
		return len(p), nil
	}
	if err := w.sendHead(); err != nil {
		return 0, err
	}
	early := w.buffer
	w.buffer = nil
	if err := w.send(early); err != nil {
		return 0, err
	}
	if err := w.send(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// send sends all of p as the window allows. It is called with mu held, which is
// released while it waits.
func (w *response) send(p []byte) error {
	for len(p) > 0 {
		for w.window == 0 && !w.ended {
			w.more.Wait()
		}
		if w.ended {
			return ErrEnded
		}
		n := min(len(p), w.window, MaxFrame)
		w.window -= n
		if err := w.guest.write(kindData, w.id, func(out *writer) { out.b = append(out.b, p[:n]...) }); err != nil {
			return fmt.Errorf("sending an answer: %w", err)
		}
		p = p[n:]
	}
	return nil
}

// Finish implements ResponseWriter.
func (w *response) Finish(o Outcome) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		return ErrEnded
	}
	w.ended = true
	w.more.Broadcast()
	if o.Body != nil && !w.sent {
		w.head = blixard.ResponseHead{ContentType: "application/json"}
		w.buffer = o.Body
		if len(w.buffer) > inlineBytes {
			// Errors have no room for more; a part of it would be no JSON.
			w.buffer = []byte(`{"errorMessage":"the error is too long to be passed on"}`)
		}
	}
	const most = 4 << 10
	if len(o.Detail) > most {
		o.Detail = o.Detail[:most]
	}
	w.guest.finished(w.id)
	return w.guest.write(kindResult, w.id, func(out *writer) {
		out.outcome(&o)
		out.flag(!w.sent)
		if !w.sent {
			out.head(w.head)
			out.b = append(out.b, w.buffer...)
		}
	})
}
