package main

import (
	"errors"
	"fmt"
	"testing"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/gateway"
)

// Callers are told what the gateway says, however the error was wrapped.
func TestAsError(t *testing.T) {
	said := &blixard.Error{Code: blixard.CodeOverloaded, Message: "said"}
	deep := &blixard.Error{Code: blixard.CodeInternal, Message: "deep"}
	plain := errors.New("plain")
	for _, c := range []struct{ given, want error }{
		{&gateway.Error{Err: said}, said},
		{errors.Join(deep, &gateway.Error{Err: said}), said},
		{fmt.Errorf("calling: %w", &gateway.Error{Err: said}), said},
		{fmt.Errorf("reading: %w", deep), deep},
		{plain, plain},
	} {
		if got := asError(c.given); got != c.want { //nolint:errorlint // the very error
			t.Errorf("of %v: %v, want %v", c.given, got, c.want)
		}
	}
	if asError(nil) != nil {
		t.Error("an error of none")
	}
}
