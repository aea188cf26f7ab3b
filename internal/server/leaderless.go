package server

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/blixard/blixard"
)

// leaderlessFor is how long there may be no leader before requests are refused
// for that: an election takes less. It is below the time after which clients
// take a node for one that hangs.
const leaderlessFor = 4 * time.Second

// patience ends some time after the leader was lost. A request that comes later
// than that is refused at once.
type patience struct {
	*time.Timer
	s *Server
}

func (s *Server) newPatience() patience { return patience{time.NewTimer(s.leaderlessLeft()), s} }

// on tells, when the timer has fired, whether to wait on.
func (p patience) on() bool {
	left := p.s.leaderlessLeft()
	if left <= 0 {
		return false
	}
	p.Reset(left)
	return true
}

func (s *Server) leaderlessLeft() time.Duration {
	limit := max(leaderlessFor, 3*s.electionTimeout())
	st := s.status.Load()
	if st.leader != 0 {
		return limit
	}
	return limit - time.Since(st.since)
}

func (s *Server) electionTimeout() time.Duration {
	return time.Duration(s.opt.ElectionTicks) * s.opt.Tick
}

// noLeader refuses what needs a leader, and says what is known of why there is
// none. consequence is asked in the loop.
func (s *Server) noLeader(consequence func() string) error {
	e := &blixard.Error{Code: blixard.CodeUnavailable, Hint: "--stale shows what this node last knew; `blixard cluster status` tells which nodes do not answer"}
	told := make(chan struct{})
	if !s.call(func() { e.Message = s.whyNoLeader() + "; " + consequence(); close(told) }) {
		return errStopped
	}
	select {
	case <-told:
		return e
	case <-s.done:
		return errStopped
	}
}

// whyNoLeader runs in the loop.
func (s *Server) whyNoLeader() string {
	v, voters := s.r.View(), s.r.ConfState().GetVoters()
	st := s.status.Load()
	silence := time.Since(st.since).Round(time.Second)
	if !slices.Contains(voters, s.opt.Identity.RaftID) {
		return fmt.Sprintf("no leader: %s, no voter itself, has heard of none for %s", s.opt.Identity.Name, silence)
	}
	// Elections come within two timeouts, and ask everybody.
	within := 4 * s.electionTimeout().Milliseconds()
	var silent []string
	for _, id := range voters {
		if s.r.Heard(id, within) {
			continue
		}
		name := fmt.Sprintf("raft ID %d", id)
		if n := v.NodeByRaftID(id); n != nil {
			name = string(n.Name)
		}
		silent = append(silent, name)
	}
	heard, of := len(voters)-len(silent), len(voters)
	verb := "answer"
	if heard == 1 {
		verb = "answers"
	}
	text := fmt.Sprintf("no leader: %d of %d voters %s and %d are needed", heard, of, verb, of/2+1)
	if len(silent) > 0 {
		text += " (silent: " + strings.Join(silent, ", ") + ")"
	}
	return text
}
