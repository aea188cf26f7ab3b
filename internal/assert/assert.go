// Package assert holds invariants that stay on in production. A failed one is
// a bug in Blixard, never a state of the world, and ends the process before it
// can spread.
package assert

import "fmt"

// True panics with the message unless ok.
func True(ok bool, format string, args ...any) {
	if !ok {
		panic("invariant broken: " + fmt.Sprintf(format, args...))
	}
}
