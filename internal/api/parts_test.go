package api

import (
	"bytes"
	"testing"
)

// TestParts: what is written at once is whole with its last message only.
func TestParts(t *testing.T) {
	var got []byte
	var whole []int
	p := &parts{send: func(data []byte, last bool) error {
		got = append(got, data...)
		if last {
			whole = append(whole, len(got))
		}
		return nil
	}}
	small, large := []byte("small"), bytes.Repeat([]byte("x"), 9*chunkBytes)
	for _, b := range [][]byte{small, large, small} {
		if n, err := p.Write(b); n != len(b) || err != nil {
			t.Fatalf("%d, %v", n, err)
		}
	}
	if !bytes.Equal(got, bytes.Join([][]byte{small, large, small}, nil)) || len(whole) != 3 || whole[1] != len(small)+len(large) {
		t.Errorf("%d bytes, whole at %v", len(got), whole)
	}
}
