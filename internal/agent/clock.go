package agent

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// clock tells milliseconds since the agent began, counting the time the machine
// slept: a lease runs out meanwhile, though Go's monotonic clock stands still.
type clock struct {
	began time.Time
	base  time.Duration // slept before
	slept *atomic.Int64 // nanoseconds of sleep known of
}

func newClock() clock {
	return clock{began: time.Now(), base: sleptSinceBoot(), slept: new(atomic.Int64)}
}

func (c clock) nowMS() int64 {
	// Every measure is at most the truth, so the greatest is the best.
	if s := int64(sleptSinceBoot() - c.base); s > c.slept.Load() {
		// Below this it is the difference between two readings, not sleep.
		const noise = int64(20 * time.Millisecond)
		if s > noise {
			c.slept.Store(s)
		}
	}
	return (time.Since(c.began) + time.Duration(c.slept.Load())).Milliseconds()
}

// sleptSinceBoot is how long the machine has slept, or a little less: what
// passes between the two readings makes it less, never more.
func sleptSinceBoot() time.Duration {
	boot := bootTime()
	var mono unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono) != nil {
		return 0
	}
	return boot - time.Duration(mono.Nano())
}

// bootTime is the time since the machine was booted, sleep included. Other
// processes have the same.
func bootTime() time.Duration {
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) != nil {
		return 0
	}
	return time.Duration(t.Nano())
}
