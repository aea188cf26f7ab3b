package call

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"github.com/blixard/blixard"
)

type discard struct{}

func (discard) Begin(blixard.ResponseHead) error { return nil }
func (discard) Write(p []byte) (int, error)      { return len(p), nil }

func raw(k kind, id uint32, payload []byte) []byte {
	b := make([]byte, headerBytes, headerBytes+len(payload))
	putHeader(b, k, id, len(payload))
	return append(b, payload...)
}

func encoded(write func(*writer)) []byte {
	var w writer
	write(&w)
	return w.b
}

// against runs an invocation against a guest that says what it wants, once it has
// been asked.
func against(t *testing.T, frames ...[]byte) error {
	t.Helper()
	host, port := net.Pipe()
	conn := New(host, Options{MaxAnswer: 1 << 20})
	defer conn.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer port.Close()
		buffer := make([]byte, 64<<10)
		if _, err := port.Read(buffer); err != nil {
			return
		}
		go func() {
			for {
				if _, err := port.Read(buffer); err != nil {
					return
				}
			}
		}()
		for _, frame := range frames {
			if _, err := port.Write(frame); err != nil {
				return
			}
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	result, err := conn.Invoke(ctx, &blixard.Invocation{Deadline: time.Now().Add(time.Second)}, Target{}, discard{})
	if err != nil && !result.Broken {
		t.Errorf("%v, and the instance is to be used again", err)
	}
	<-done
	return err
}

func TestHostileGuestLosesItsConnection(t *testing.T) {
	head := encoded(func(w *writer) { w.head(blixard.ResponseHead{}) })
	result := encoded(func(w *writer) { w.outcome(&Outcome{}); w.flag(false) })
	endless := [][]byte{raw(kindHead, 1, head)}
	for range 40 {
		endless = append(endless, raw(kindData, 1, make([]byte, 64<<10)))
	}
	cases := map[string][][]byte{
		"a frame of 4 GiB":        {{byte(kindData), 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff}},
		"an unknown type":         {raw(99, 1, nil)},
		"a frame of the host's":   {raw(kindInvoke, 1, nil)},
		"nobody asked":            {raw(kindOK, 77, nil)},
		"answer to a question":    {raw(kindOK, 1, nil)},
		"data without a head":     {raw(kindData, 1, []byte("x"))},
		"two heads":               {raw(kindHead, 1, head), raw(kindHead, 1, head)},
		"empty data":              {raw(kindHead, 1, head), raw(kindData, 1, nil)},
		"over the window":         endless,
		"no answer":               {raw(kindResult, 1, result)},
		"a head twice":            {raw(kindHead, 1, head), raw(kindResult, 1, encoded(func(w *writer) { w.outcome(&Outcome{}); w.flag(true); w.head(blixard.ResponseHead{}) }))},
		"a result cut off":        {raw(kindResult, 1, result[:2])},
		"a list of 4 billion":     {raw(kindHead, 1, []byte{0, 0xff, 0xff, 0xff, 0xff, 0x0f})},
		"a number without an end": {raw(kindHead, 1, []byte{0xff, 0xff})},
	}
	for name, frames := range cases {
		t.Run(name, func(t *testing.T) {
			if err := against(t, frames...); !errors.Is(err, ErrHostile) && !errors.Is(err, ErrClosed) {
				t.Errorf("Invoke: %v", err)
			}
		})
	}
	t.Run("it hangs up", func(t *testing.T) {
		if err := against(t, raw(kindHead, 1, head)); !errors.Is(err, ErrClosed) {
			t.Errorf("Invoke: %v", err)
		}
	})
}

// FuzzHost: whatever a guest says, the host neither panics nor hangs.
func FuzzHost(f *testing.F) {
	head := encoded(func(w *writer) { w.head(blixard.ResponseHead{Status: 200, Headers: [][2]string{{"a", "b"}}}) })
	result := encoded(func(w *writer) {
		w.outcome(&Outcome{Error: &blixard.FunctionError{Kind: "a", Type: "b"}})
		w.flag(true)
		w.head(blixard.ResponseHead{})
	})
	f.Add(raw(kindResult, 1, result))
	f.Add(append(raw(kindHead, 1, head), raw(kindData, 1, []byte("x"))...))
	f.Add(append(raw(kindLog, 1, []byte("log")), raw(kindOK, 2, encoded(func(w *writer) { w.stat(&Stat{}) }))...))
	f.Add(raw(kindFail, 2, encoded(func(w *writer) { w.failure(failure{"a", "b", nil}) })))
	f.Fuzz(func(t *testing.T, said []byte) {
		host, port := net.Pipe()
		conn := New(host, Options{MaxAnswer: 1 << 20})
		heard := make(chan struct{})
		go func() {
			defer close(heard)
			buffer := make([]byte, 64<<10)
			for {
				if _, err := port.Read(buffer); err != nil {
					return
				}
			}
		}()
		asked := make(chan struct{})
		go func() {
			defer close(asked)
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			if _, err := conn.Invoke(ctx, &blixard.Invocation{Deadline: time.Now()}, Target{}, discard{}); err != nil && errors.Is(err, context.DeadlineExceeded) {
				t.Error("the invocation hung")
			}
			if _, err := conn.Stat(ctx); errors.Is(err, context.DeadlineExceeded) {
				t.Error("the question hung")
			}
		}()
		if err := port.SetWriteDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		for len(said) > 0 { // in pieces
			n := min(len(said), 7)
			if _, err := port.Write(said[:n]); err != nil {
				break
			}
			said = said[n:]
		}
		port.Close()
		<-asked
		<-heard
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	})
}
