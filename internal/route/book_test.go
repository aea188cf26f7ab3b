package route_test

import (
	"testing"

	"github.com/blixard/blixard/internal/route"
)

// TestSlotBook: what a node is told of its slots is never older than its lease or
// than what it has leased and returned itself.
func TestSlotBook(t *testing.T) {
	b := route.NewSlotBook()
	believes := func(when string, index uint64, want bool) {
		t.Helper()
		if got := b.Believes("f", index); got != want {
			t.Errorf("%s: a view of entry %d is believed: %t", when, index, got)
		}
	}
	first := b.Lease(true)
	if first == 0 || b.Lease(true) != 0 {
		t.Fatal("one lease asks once")
	}
	believes("before it is known how new a view has to be", 100, false)
	b.Lease(false)
	second := b.Lease(true)
	b.Fresh(first, 10)
	believes("with the answer to a lease that was lost meanwhile", 100, false)
	b.Fresh(second, 50)
	believes("from before the lease", 49, false)
	believes("from after it", 50, true)

	b.Began("f")
	believes("while slots are being returned", 70, false)
	if b.Forget("f") {
		t.Error("it is forgotten while slots are being returned")
	}
	b.Landed("f", 72)
	believes("that does not show what was returned", 71, false)
	believes("that shows it", 72, true)
	if !b.Forget("f") {
		t.Error("it is not forgotten")
	}
	b.Lease(false)
	believes("without a lease", 100, false)
}
