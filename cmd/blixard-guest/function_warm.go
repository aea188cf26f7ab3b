package main

import (
	"errors"
	"io"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
)

// warmUp runs the agent's own way of a call once, without the function, so that
// its pages are in memory when the guest is saved.
func warmUp() {
	toGuest, fromHost := io.Pipe()
	guest := call.NewGuest(dryPort{toGuest}, dryHandler{})
	host := call.DryInvocation(&blixard.Invocation{RequestID: newUUID(), Payload: []byte(`{"warm":true}`), Deadline: time.Now().Add(time.Second)})
	go func() {
		_, err := fromHost.Write(host)
		fromHost.CloseWithError(errors.Join(io.EOF, err))
	}()
	//nolint:errcheck // it ends with the pipe
	guest.Serve()
}

type dryPort struct{ io.Reader }

func (dryPort) Write(p []byte) (int, error) { return len(p), nil }

// dryHandler answers with what it got.
type dryHandler struct{ call.Handler }

func (dryHandler) Invoke(request *call.Request, w call.ResponseWriter) {
	if _, err := w.Write(request.Payload); err != nil {
		logf("warming up: %v", err)
	}
	if err := w.Finish(call.Outcome{}); err != nil {
		logf("warming up: %v", err)
	}
}
