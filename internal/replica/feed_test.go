package replica

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// TestFeed: whatever is added, forgotten and reset at two nodes, a watcher that
// moves between them sees every index that changed something once, whole and in
// order, or is told that something is gone.
func TestFeed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		keep := rapid.IntRange(1, 20).Draw(t, "keep")
		nodes := []*Feed{{Keep: keep}, {Keep: keep}}
		size := []int{0} // changes by index
		var seen uint64
		at, cursor := 0, Cursor{}
		resume := func() {
			c, err := nodes[at].Watch(seen)
			if err != nil { // list anew
				seen = nodes[at].Applied()
				c, err = nodes[at].Watch(seen)
			}
			if err != nil {
				t.Fatalf("watching from what is applied: %v", err)
			}
			cursor = c
		}
		resume()
		t.Repeat(map[string]func(*rapid.T){
			"apply": func(t *rapid.T) {
				n := nodes[rapid.IntRange(0, 1).Draw(t, "node")]
				index := n.Applied() + 1
				if index == uint64(len(size)) {
					size = append(size, rapid.IntRange(0, 3).Draw(t, "size"))
				}
				n.Add(index, changesAt(index, size[index]))
			},
			"restore": func(t *rapid.T) {
				n := nodes[rapid.IntRange(0, 1).Draw(t, "node")]
				n.Reset(uint64(rapid.IntRange(int(n.Applied()), len(size)-1).Draw(t, "index")))
			},
			"move": func(*rapid.T) { at = 1 - at; resume() },
			"look": func(t *rapid.T) {
				got, err := nodes[at].Next(&cursor)
				if err != nil {
					if err.Code != blixard.CodeGone {
						t.Fatalf("%v", err)
					}
					resume()
					return
				}
				for len(got) > 0 {
					index, n := got[0].Index, 0
					for n < len(got) && got[n].Index == index {
						if want := fmt.Sprint(index, "/", n); got[n].Object != want {
							t.Fatalf("%v in place of %s", got[n].Object, want)
						}
						n++
					}
					for i := seen + 1; i < index; i++ {
						if size[i] > 0 {
							t.Fatalf("%d comes after %d: %d is missing", index, seen, i)
						}
					}
					if index <= seen || n != size[index] {
						t.Fatalf("%d changes of %d after %d, want %d", n, index, seen, size[index])
					}
					seen, got = index, got[n:]
				}
			},
		})
	})
}

func changesAt(index uint64, n int) (out []state.Change) {
	for i := range n {
		out = append(out, state.Change{Index: index, Object: fmt.Sprint(index, "/", i)})
	}
	return out
}
