package qemu

import (
	"strconv"
	"sync"
	"time"
)

// hostTSCKHz is the rate of this machine's time stamp counter, which emulated
// guests see as it is; 0 if it has none. Their kernels would measure it against
// an emulated timer, and be several times off on a machine that is busy: their
// clocks would run that much too fast. So they are told.
var hostTSCKHz = sync.OnceValue(func() int64 {
	const look = 20 * time.Millisecond
	ticks, began := tscNow()
	time.Sleep(look)
	more, ended := tscNow()
	took := ended.Sub(began)
	if more <= ticks || took < look/2 {
		return 0
	}
	return int64(float64(more-ticks) / float64(took.Nanoseconds()) * 1e6)
})

// tscNow reads counter and clock together: of some tries the one that the least
// came between.
func tscNow() (ticks uint64, at time.Time) {
	best := time.Hour
	for range 20 {
		before := time.Now()
		t := readTSC()
		if took := time.Since(before); took < best {
			best, ticks, at = took, t, before.Add(took/2)
		}
	}
	return ticks, at
}

// clockWord tells an emulated guest's kernel the rate of its counter. It is taken
// unless the kernel finds something within a hundredth of it.
func (f features) clockWord() string {
	if khz := hostTSCKHz(); khz > 0 && f.Acceleration == "tcg" {
		return "tsc_early_khz=" + strconv.FormatInt(khz, 10)
	}
	return ""
}
