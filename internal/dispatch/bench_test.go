package dispatch_test

import (
	"testing"

	"github.com/blixard/blixard/internal/dispatch"
)

// BenchmarkWarm is the whole way of a warm call through the dispatcher to a
// pretend guest in this process and back.
func BenchmarkWarm(b *testing.B) {
	for _, callers := range []int{1, 16} {
		b.Run(map[int]string{1: "1", 16: "16"}[callers], func(b *testing.B) {
			w := newWorld(b, nil)
			w.deploy("f", 100, nil)
			for range callers {
				w.must("f", "echo")
			}
			inv := w.invocation("f", "echo")
			inv.LogTail = false
			b.SetParallelism(callers)
			b.ReportAllocs()
			b.ResetTimer()
			if callers == 1 {
				for b.Loop() {
					one(b, w, dispatch.Request{Invocation: inv, MayStart: true, MayWait: true})
				}
				return
			}
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					one(b, w, dispatch.Request{Invocation: inv, MayStart: true, MayWait: true})
				}
			})
		})
	}
}

func one(b *testing.B, w *world, r dispatch.Request) {
	var s sink
	if _, err := w.d.Invoke(b.Context(), r, &s); err != nil {
		b.Error(err)
	}
}
