package server

import (
	"context"
	"slices"
	"strconv"
	"time"

	"go.etcd.io/raft/v3"

	"github.com/blixard/blixard"
)

func utoa(n uint64) string { return strconv.FormatUint(n, 10) }

// Status is how this node sees the consensus.
type Status struct {
	Node      blixard.NodeName
	RaftID    uint64
	Term      uint64
	Leader    blixard.NodeName // "" when unknown
	Role      string           // leader, follower, candidate, learner
	Committed uint64
	Applied   uint64
	Ready     bool // has a leader and has applied what it knows to be committed
	// Peers, on the leader only: how far each member has come.
	Peers []PeerStatus
}

// PeerStatus is the leader's knowledge of a member.
type PeerStatus struct {
	RaftID uint64
	Match  uint64
	Active bool
	State  string // replicate, probe, snapshot
}

// Status asks the loop; it answers from what was published if the loop is busy
// for longer than ctx allows.
func (s *Server) Status(ctx context.Context) Status {
	result := make(chan Status, 1)
	if s.call(func() { result <- s.statusNow() }) {
		select {
		case st := <-result:
			return st
		case <-ctx.Done():
		case <-s.done:
		}
	}
	p, v := s.status.Load(), s.View()
	out := Status{Node: s.opt.Identity.Name, RaftID: s.opt.Identity.RaftID, Term: p.term, Role: "follower", Committed: p.committed, Applied: p.applied}
	if n := v.NodeByRaftID(p.leader); n != nil {
		out.Leader = n.Name
	}
	return out
}

func (s *Server) statusNow() Status {
	st := s.r.Status()
	out := Status{
		Node: s.opt.Identity.Name, RaftID: s.opt.Identity.RaftID, Term: s.r.Term(), Leader: blixard.NodeName(s.nameOf(s.r.Leader())),
		Committed: st.HardState.GetCommit(), Applied: s.r.View().Index,
	}
	out.Ready = s.r.Leader() != 0 && out.Applied >= out.Committed && s.r.View().Cluster().ID != ""
	switch {
	case st.RaftState == raft.StateLeader:
		out.Role = "leader"
	case slices.Contains(s.r.ConfState().GetLearners(), out.RaftID):
		out.Role = "learner"
	case st.RaftState == raft.StateCandidate || st.RaftState == raft.StatePreCandidate:
		out.Role = "candidate"
	default:
		out.Role = "follower"
	}
	for _, id := range slices.Concat(s.r.ConfState().GetVoters(), s.r.ConfState().GetLearners()) {
		if p, ok := st.Progress[id]; ok {
			out.Peers = append(out.Peers, PeerStatus{RaftID: id, Match: p.Match, Active: p.RecentActive || id == out.RaftID, State: p.State.String()})
		}
	}
	return out
}

// Ready tells whether this node can serve: it has a leader and is up to date.
func (s *Server) Ready() bool {
	st := s.status.Load()
	return st.leader != 0 && st.applied >= st.committed && s.View().Cluster().ID != ""
}

// TransferLeader hands leadership to the named node, "" for any voter that is
// up to date. It returns when another node leads.
func (s *Server) TransferLeader(ctx context.Context, to blixard.NodeName) error {
	refused := make(chan error, 1)
	ok := s.call(func() { refused <- s.transfer(to) })
	if !ok {
		return errStopped
	}
	select {
	case err := <-refused:
		if err != nil {
			return err
		}
	case <-s.done:
		return errStopped
	}
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for {
		st := s.status.Load()
		if n := s.View().NodeByRaftID(st.leader); n != nil && (to != "" && n.Name == to || to == "" && st.leader != s.opt.Identity.RaftID) {
			return nil
		}
		select {
		case <-t.C:
		case <-s.done:
			return errStopped
		case <-ctx.Done():
			return unavailable(ctx, "leadership was not taken over in time")
		}
	}
}

func (s *Server) transfer(to blixard.NodeName) error {
	st := s.r.Status()
	if st.RaftState != raft.StateLeader {
		return &blixard.Error{Code: blixard.CodeConflict, Message: "this node does not lead", Hint: "ask the leader: " + s.nameOf(s.r.Leader())}
	}
	voters := s.r.ConfState().GetVoters()
	if to == "" {
		best, match := uint64(0), uint64(0)
		for _, id := range voters {
			if p := st.Progress[id]; id != s.opt.Identity.RaftID && p.RecentActive && (best == 0 || p.Match > match) {
				best, match = id, p.Match
			}
		}
		if best == 0 {
			return &blixard.Error{Code: blixard.CodeRefused, Message: "no other voter is in touch"}
		}
		s.r.TransferLeader(best)
		return nil
	}
	n := s.r.View().Node(to)
	switch {
	case n == nil:
		return &blixard.Error{Code: blixard.CodeNotFound, Message: "there is no node named " + string(to)}
	case !slices.Contains(voters, n.RaftID):
		return &blixard.Error{Code: blixard.CodeRefused, Message: string(to) + " is no voter, so it cannot lead", Hint: "`blixard cluster list` shows the roles"}
	}
	s.r.TransferLeader(n.RaftID)
	return nil
}
