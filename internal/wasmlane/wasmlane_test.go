package wasmlane_test

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/blixard/blixard/internal/wasmlane"
)

func TestWhatIsWrittenIsRead(t *testing.T) {
	var lane bytes.Buffer
	want := wasmlane.Request{Remaining: time.Second, Env: []string{"A=b", "EMPTY="}, Event: bytes.Repeat([]byte("x"), 200_000)}
	if err := wasmlane.WriteRequest(&lane, want); err != nil {
		t.Fatal(err)
	}
	got, err := wasmlane.ReadRequest(&lane)
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Error(err, diff)
	}
	if _, err := wasmlane.ReadRequest(&lane); !errors.Is(err, io.EOF) {
		t.Errorf("behind the last request: %v", err)
	}
	body := strings.Repeat("answer ", 30_000)
	outcome := wasmlane.Outcome{Type: "Wasm.Trap", Message: "unreachable"}
	if err := errors.Join(wasmlane.WriteOutput(&lane, []byte(body)), wasmlane.WriteOutcome(&lane, outcome)); err != nil {
		t.Fatal(err)
	}
	var answer bytes.Buffer
	end, err := wasmlane.ReadAnswer(&lane, func(p []byte) error { answer.Write(p); return nil })
	if err != nil || end != outcome || answer.String() != body {
		t.Errorf("%+v, %v, %d bytes", end, err, answer.Len())
	}
}

func FuzzReadAnswer(f *testing.F) {
	f.Add([]byte("O\x00\x00\x00\x01xX\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00\x00\x00"))
	f.Add([]byte("X\x00\x00\x00\x08\xff\xff\xff\xff\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, lane []byte) {
		total := 0
		_, err := wasmlane.ReadAnswer(bytes.NewReader(lane), func(p []byte) error { total += len(p); return nil })
		if total > len(lane) {
			t.Errorf("%d bytes of %d, %v", total, len(lane), err)
		}
		if _, err := wasmlane.ReadRequest(bytes.NewReader(lane)); err == nil && lane[0] != 'R' {
			t.Error("an answer was taken for a request")
		}
	})
}
