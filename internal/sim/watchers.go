package sim

import (
	"fmt"
	"math/rand/v2"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/replica"
	"github.com/blixard/blixard/internal/state"
)

// watchers follow the changes of the state through any node, move on to another
// one when theirs is gone or just so, resume by the index that they have seen,
// and list anew when a node no longer keeps what comes after it. They must see
// every index that changed something, once, whole and in order (S9).
type watchers struct {
	w   *world
	rng *rand.Rand
	all []*watcher
}

type watcher struct {
	name    string
	at      *process // nil: not connected
	cursor  replica.Cursor
	seen    uint64
	listing bool
}

// watchPauseMS is the longest pause between two looks of a watcher.
const watchPauseMS = 800

func newWatchers(w *world) *watchers {
	ws := &watchers{w: w, rng: rand.New(rand.NewPCG(w.s.Seed, 98))}
	for i := range w.k.Watchers {
		ws.all = append(ws.all, &watcher{name: fmt.Sprintf("watcher %d", i+1)})
	}
	return ws
}

func (ws *watchers) begin() {
	for _, x := range ws.all {
		ws.look(x)
	}
}

// look has a watcher look again and again.
func (ws *watchers) look(x *watcher) {
	if !x.listing {
		ws.once(x)
	}
	ws.w.after((1+ws.rng.Int64N(watchPauseMS))*min(ws.w.pace, 4), func() { ws.look(x) })
}

func (ws *watchers) once(x *watcher) {
	if x.at == nil || !x.at.alive() || ws.rng.IntN(12) == 0 {
		if x.at = ws.w.anyProcess(ws.rng); x.at == nil {
			return
		}
		ws.w.count["watch resumed"]++
		cursor, err := x.at.feed.Watch(x.seen)
		if err != nil {
			ws.list(x, err)
			return
		}
		x.cursor = cursor
	}
	for !x.at.m.paused() {
		got, err := x.at.feed.Next(&x.cursor)
		if err != nil {
			ws.list(x, err)
			return
		}
		if len(got) == 0 {
			return
		}
		ws.take(x, got)
	}
}

// take checks what a watcher is given.
func (ws *watchers) take(x *watcher, got []state.Change) {
	c := ws.w.check
	for len(got) > 0 {
		n, index := 1, got[0].Index
		for n < len(got) && got[n].Index == index {
			n++
		}
		if index <= x.seen {
			ws.w.violated("S9 changes come in order, each once", "%s is given entry %d by %s after %d", x.name, index, x.at.m.name, x.seen)
		}
		ws.complete(x, index-1)
		if want, known := c.prints[index]; known && want != fingerprint(got[:n]) {
			ws.w.violated("S9 changes come in order, each once", "%s is given other changes of entry %d by %s than were applied", x.name, index, x.at.m.name)
		}
		x.seen, got = index, got[n:]
		ws.w.count["watched entry"]++
	}
}

// complete: nothing between what a watcher has seen and an index was left out.
func (ws *watchers) complete(x *watcher, until uint64) {
	c := ws.w.check
	for i := max(x.seen+1, c.pruned); i <= until; i++ {
		if _, changed := c.prints[i]; changed {
			ws.w.violated("S9 no change is left out", "%s has seen %d, and %s goes on without %d", x.name, x.seen, x.at.m.name, i)
		}
	}
}

// list has a watcher begin anew from a linearizable view.
func (ws *watchers) list(x *watcher, err *blixard.Error) {
	p := x.at
	if err.Code != blixard.CodeGone {
		ws.w.violated("S9 a watcher is told what is gone", "%s is told by %s: %v", x.name, p.m.name, err)
	}
	ws.w.count["watch gone"]++
	x.listing, x.at = true, nil
	over := false
	ws.w.after(1000, func() {
		if !over {
			over, x.listing = true, false
		}
	})
	p.enter(func() {
		p.read(func(v *state.View) {
			if over {
				return
			}
			over = true
			if x.listing = false; v.Index < x.seen {
				ws.w.violated("S9 a list is as new as what was watched before it", "%s has seen %d, the list of %s is of %d", x.name, x.seen, p.m.name, v.Index)
			}
			x.seen = v.Index
		})
	})
}

// unsettled tells which watcher has not seen everything.
func (ws *watchers) unsettled(v *state.View) string {
	c := ws.w.check
	for _, x := range ws.all {
		for i := max(x.seen+1, c.pruned); i <= v.Index; i++ {
			if _, changed := c.prints[i]; changed {
				return fmt.Sprintf("%s has seen up to %d, not %d", x.name, x.seen, i)
			}
		}
	}
	return ""
}
