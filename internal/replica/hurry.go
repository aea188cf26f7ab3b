package replica

// A leader whose process has died is known to be dead at once: its port
// refuses. Waiting out the election timeout would only cost time. So every
// follower lets its raft clock catch up: first by a whole timeout (which also
// ends the promise not to vote while the leader lives), then fast, spread by
// raft's own jitter. Ticks are only a measure of time: this cannot break
// safety, and a leader that lives after all is protected by pre-vote.
const (
	hurryDelayMS    = 25 // until every follower has noticed
	hurryIntervalMS = 12
	hurryForMS      = 2000
)

// hurry is a raft clock that catches up. The zero hurry is none.
type hurry struct {
	leader  uint64 // that is gone
	untilMS int64
	wakeMS  int64
	ticks   int // at the next wake
}

// PeerGone notes that the process of a peer has ended. It tells whether that
// was the leader, whose place is now to be taken soon: see WakeMS.
func (l *Loop) PeerGone(raftID uint64) (hurries bool) {
	l.r.Unreachable(raftID)
	if raftID == 0 || raftID != l.r.lead || l.hurry.leader != 0 {
		return false
	}
	now := l.r.nowMonoMS
	l.hurry = hurry{leader: raftID, untilMS: now + hurryForMS, wakeMS: now + hurryDelayMS, ticks: l.cfg.ElectionTicks}
	return true
}

// WakeMS is when Wake is to be called, 0 for never.
func (l *Loop) WakeMS() int64 { return l.hurry.wakeMS }

// Wake lets the raft clock catch up by one step.
func (l *Loop) Wake() {
	h := &l.hurry
	if h.leader == 0 || l.r.nowMonoMS < h.wakeMS {
		return
	}
	if lead := l.r.lead; lead != 0 && lead != h.leader || l.r.nowMonoMS > h.untilMS {
		*h = hurry{}
		return
	}
	for range max(h.ticks, 1) {
		l.r.Tick()
	}
	h.ticks, h.wakeMS = 1, l.r.nowMonoMS+hurryIntervalMS
}
