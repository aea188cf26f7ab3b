package server

import (
	"context"
	"time"

	"github.com/blixard/blixard"
)

// PeerCaller asks other nodes.
type PeerCaller interface {
	// Heartbeat renews a node's lease at the node at address. leader is the
	// raft ID of whom that node takes for the leader, if it is not itself.
	Heartbeat(ctx context.Context, address string, node blixard.NodeName, raftID uint64) (Grant, error)
}

// Grant is the leader's answer to a heartbeat.
type Grant struct {
	// OK: the lease is granted, counted from when the heartbeat was sent.
	OK bool
	// Index is the leader's applied index: a view as new as this knows
	// everything that was decided about the node before.
	Index uint64
}

// Heartbeat renews the lease of this node's agent at the leader.
func (s *Server) Heartbeat(ctx context.Context) (Grant, error) {
	return s.HeartbeatOf(ctx, s.opt.Identity.Name, s.opt.Identity.RaftID)
}

// HeartbeatOf renews the lease of a node whose agent works through this server.
func (s *Server) HeartbeatOf(ctx context.Context, node blixard.NodeName, raftID uint64) (Grant, error) {
	st := s.status.Load()
	switch {
	case st.leader == 0:
		return Grant{}, &blixard.Error{Code: blixard.CodeUnavailable, Message: "no leader is known"}
	case st.leader == s.opt.Identity.RaftID:
		return s.GrantLease(ctx, node, raftID)
	}
	n := s.View().NodeByRaftID(st.leader)
	if n == nil {
		return Grant{}, &blixard.Error{Code: blixard.CodeUnavailable, Message: "the leader's address is not known yet"}
	}
	return s.opt.Peers.Heartbeat(ctx, n.Address, node, raftID)
}

// GrantLease answers a heartbeat on the leader. Leadership is confirmed by a
// majority after the heartbeat arrived: a leader that was deposed without
// knowing it can extend no lease.
func (s *Server) GrantLease(ctx context.Context, node blixard.NodeName, raftID uint64) (Grant, error) {
	if !s.status.Load().leads {
		return Grant{}, &blixard.Error{Code: blixard.CodeUnavailable, Message: "this node does not lead"}
	}
	if _, err := s.ReadView(ctx); err != nil {
		return Grant{}, err
	}
	result := make(chan Grant, 1)
	ok := s.call(func() {
		result <- Grant{OK: s.r.Heartbeat(node, raftID), Index: s.r.View().Index}
	})
	if !ok {
		return Grant{}, errStopped
	}
	select {
	case g := <-result:
		return g, nil
	case <-s.done:
		return Grant{}, errStopped
	case <-ctx.Done():
		return Grant{}, unavailable(ctx, "the heartbeat was not answered in time")
	}
}

// A leader whose process has died is known to be dead at once: its port
// refuses. Waiting out the election timeout would only cost time. So every
// follower lets its raft clock catch up: first by a whole timeout (which also
// ends the promise not to vote while the leader lives), then fast, spread by
// raft's own jitter. Ticks are only a measure of time: this cannot break
// safety, and a leader that lives after all is protected by pre-vote.
const (
	hurryDelay    = 25 * time.Millisecond // until every follower has noticed
	hurryInterval = 12 * time.Millisecond
	hurryFor      = 2 * time.Second
)

func (s *Server) peerGone(raftID uint64) {
	s.r.Unreachable(raftID)
	if raftID != s.r.Leader() || !s.hurryUntil.IsZero() {
		return
	}
	s.log.Info("the leader's process is gone", "event", "leader_gone", "leader", s.nameOf(raftID))
	now := time.Now()
	s.hurryUntil, s.hurryFrom, s.hurryLeader = now.Add(hurryFor), now.Add(hurryDelay), raftID
	s.hurryTicks = s.opt.ElectionTicks
}

func (s *Server) hurryTick(timer *time.Timer) {
	if s.hurryUntil.IsZero() {
		return
	}
	lead := s.r.Leader()
	if lead != 0 && lead != s.hurryLeader || time.Now().After(s.hurryUntil) {
		s.hurryUntil = time.Time{}
		return
	}
	for range max(s.hurryTicks, 1) {
		s.r.Tick()
	}
	s.hurryTicks = 1
	timer.Reset(hurryInterval)
}
