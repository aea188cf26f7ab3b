package server

import (
	"context"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/replica"
)

// PeerCaller asks other nodes.
type PeerCaller interface {
	// Heartbeat renews a node's lease at the node at address. leader is the
	// raft ID of whom that node takes for the leader, if it is not itself.
	Heartbeat(ctx context.Context, address string, node blixard.NodeName, raftID uint64) (Grant, error)
}

// Grant is the leader's answer to a heartbeat.
type Grant = replica.Grant

// Heartbeat renews the lease of this node's agent at the leader.
func (s *Server) Heartbeat(ctx context.Context) (Grant, error) {
	return s.HeartbeatOf(ctx, s.opt.Identity.Name, s.opt.Identity.RaftID)
}

// HeartbeatOf renews the lease of a node whose agent works through this server.
func (s *Server) HeartbeatOf(ctx context.Context, node blixard.NodeName, raftID uint64) (Grant, error) {
	st := s.status.Load()
	switch st.leader {
	case 0:
		// Anybody: it may lead, and if this node was removed, it says so. Whom this
		// node took for the leader may have been removed with it.
		address := s.anyMember()
		if address == "" {
			return Grant{}, &blixard.Error{Code: blixard.CodeUnavailable, Message: "no leader is known"}
		}
		return s.opt.Peers.Heartbeat(ctx, address, node, raftID)
	case s.opt.Identity.RaftID:
		return s.GrantLease(ctx, node, raftID)
	}
	n := s.View().NodeByRaftID(st.leader)
	if n == nil {
		return Grant{}, &blixard.Error{Code: blixard.CodeUnavailable, Message: "the leader's address is not known yet"}
	}
	return s.opt.Peers.Heartbeat(ctx, n.Address, node, raftID)
}

// GrantLease answers a heartbeat on the leader, see replica.Loop.
func (s *Server) GrantLease(ctx context.Context, node blixard.NodeName, raftID uint64) (Grant, error) {
	leads, granted := make(chan bool, 1), newWait[Grant]()
	if !s.call(func() { leads <- s.loop.GrantLease(node, raftID, granted) }) {
		return Grant{}, errStopped
	}
	for {
		select {
		case ok := <-leads:
			if !ok {
				return Grant{}, &blixard.Error{Code: blixard.CodeUnavailable, Message: "this node does not lead"}
			}
			leads = nil // it will be answered
		case g := <-granted.result:
			return g, nil
		case <-s.done:
			return Grant{}, errStopped
		case <-ctx.Done():
			granted.left.Store(true)
			return Grant{}, unavailable(ctx, "the heartbeat was not answered in time")
		}
	}
}

// anyMember is the address of another member, each time of the next one; "" when
// none is known.
func (s *Server) anyMember() string {
	var addresses []string
	s.View().Nodes(func(n *blixard.Node) bool {
		if n.RaftID != s.opt.Identity.RaftID && !n.Simulated {
			addresses = append(addresses, n.Address)
		}
		return true
	})
	if len(addresses) == 0 {
		for _, p := range s.opt.Identity.Peers {
			addresses = append(addresses, p.Address)
		}
	}
	if len(addresses) == 0 {
		return ""
	}
	return addresses[s.asked.Add(1)%uint64(len(addresses))]
}
