package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/agent"
	"github.com/blixard/blixard/internal/api"
	"github.com/blixard/blixard/internal/converge"
	"github.com/blixard/blixard/internal/server"
	"github.com/blixard/blixard/internal/state"
)

// backend is the server as the API sees it.
type backend struct{ *server.Server }

// Status implements api.Backend.
func (b backend) Status() api.Status {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	s := b.Server.Status(ctx)
	out := api.Status{
		Node: s.Node, RaftID: s.RaftID, Term: s.Term, Leader: s.Leader, Role: s.Role, Committed: s.Committed, Applied: s.Applied, Ready: s.Ready, Release: release(),
	}
	for _, p := range s.Peers {
		out.Peers = append(out.Peers, api.PeerStatus(p))
	}
	return out
}

// quiet is how long an agent may not hear that the view has moved on, when
// nothing of it is the agent's business.
const quiet = 100 * time.Millisecond

// follower tells the agents of this process which changes concern them, so
// that each sleeps through everybody else's.
type follower struct {
	srv *server.Server
	mu  sync.Mutex
	of  map[blixard.NodeName]*localCluster
}

func newFollower(srv *server.Server) *follower {
	return &follower{srv: srv, of: map[blixard.NodeName]*localCluster{}}
}

// cluster is the replica as the agent of a node sees it.
func (f *follower) cluster(name blixard.NodeName, raftID uint64, report func(agent.NodeReport) *state.ReportNode) *localCluster {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := &localCluster{srv: f.srv, name: name, raftID: raftID, report: report, wake: make(chan struct{})}
	f.of[name] = l
	return l
}

// run follows the changes until ctx ends.
func (f *follower) run(ctx context.Context) error {
	for ctx.Err() == nil {
		from := f.srv.View().Index
		f.mu.Lock()
		for _, l := range f.of {
			l.touch(from)
		}
		f.mu.Unlock()
		next, err := f.srv.Watch(ctx, from)
		for err == nil {
			var changes []state.Change
			if changes, err = next(); err == nil {
				f.tell(changes)
			}
		}
	}
	return nil
}

func (f *follower) tell(changes []state.Change) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range changes {
		switch o := changes[i].Object.(type) {
		case *blixard.Instance:
			if l := f.of[o.Node]; l != nil {
				l.touch(changes[i].Index)
			}
		case *blixard.Function, *blixard.FunctionVersion, *blixard.FunctionSlots, *blixard.Node:
			if l := f.of[functionsOf]; l != nil {
				l.touch(changes[i].Index)
			}
		}
	}
}

// functionsOf stands for the dispatcher among the agents: no node has that name.
const functionsOf blixard.NodeName = "*"

// localCluster is the replica as an agent of this process sees it.
type localCluster struct {
	srv    *server.Server
	name   blixard.NodeName
	raftID uint64
	report func(agent.NodeReport) *state.ReportNode

	mu      sync.Mutex
	touched uint64        // index of the last change of a row of this node
	wake    chan struct{} // closed by the next one
}

func (l *localCluster) touch(index uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if index > l.touched {
		l.touched = index
		close(l.wake)
		l.wake = make(chan struct{})
	}
}

// Assigned implements agent.Cluster.
func (l *localCluster) Assigned() ([]*blixard.Instance, uint64) {
	v := l.srv.View()
	var rows []*blixard.Instance
	v.InstancesOn(l.name, func(i *blixard.Instance) bool {
		rows = append(rows, i)
		return true
	})
	slices.SortFunc(rows, func(a, b *blixard.Instance) int {
		return converge.Ref{Instance: a.ID, Generation: a.Generation}.Compare(converge.Ref{Instance: b.ID, Generation: b.Generation})
	})
	return rows, v.Index
}

// Wait implements agent.Cluster.
func (l *localCluster) Wait(ctx context.Context, index uint64) error {
	timer := time.NewTimer(quiet)
	defer timer.Stop()
	for {
		l.mu.Lock()
		touched, wake := l.touched, l.wake
		l.mu.Unlock()
		if touched > index {
			return l.srv.WaitApplied(ctx, index)
		}
		select {
		case <-wake:
		case <-timer.C:
			return l.srv.WaitApplied(ctx, index)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Report implements agent.Cluster.
func (l *localCluster) Report(ctx context.Context, items []converge.Observation) (uint64, error) {
	cmd := &state.Observe{Node: l.name, RaftID: l.raftID, Items: make([]state.Observation, len(items))}
	for i := range items {
		o := &items[i]
		cmd.Items[i] = state.Observation{
			VM: o.VM, Ordinal: o.Ordinal, Generation: o.Generation, State: o.State, Paused: o.Paused, Message: o.Message, Address: o.Address,
			Ports: o.Ports, Health: o.Health, Acceleration: o.Acceleration, Removed: o.Removed,
		}
	}
	out, err := l.srv.Propose(ctx, state.Envelope{Actor: "agent of " + string(l.name), Command: cmd})
	if err != nil {
		return 0, fmt.Errorf("reporting observations: %w", err)
	}
	return out.Version, nil
}

// ReportNode implements agent.Cluster.
func (l *localCluster) ReportNode(ctx context.Context, r agent.NodeReport) error {
	_, err := l.srv.Propose(ctx, state.Envelope{Actor: "agent of " + string(l.name), Command: l.report(r)})
	return err
}

// report is what this node says of itself: its machine and its configuration.
func (n *node) report(r agent.NodeReport) *state.ReportNode {
	labels := make([]blixard.Label, 0, len(n.cfg.Cluster.Labels))
	for _, k := range slices.Sorted(maps.Keys(n.cfg.Cluster.Labels)) {
		labels = append(labels, blixard.Label{Key: k, Value: n.cfg.Cluster.Labels[k]})
	}
	return &state.ReportNode{
		Name: n.id.Name, RaftID: n.id.RaftID, Address: advertise(n.cfg), PublishAddress: n.publishAddress(), Zone: n.cfg.Cluster.Zone, Labels: labels,
		Capacity: r.Capacity, Reserved: r.Reserved, MaxInstances: r.MaxInstances, Hypervisors: r.Hypervisors, Acceleration: r.Acceleration,
		Release: r.Release, FeatureLevel: r.FeatureLevel,
	}
}

// Heartbeat implements agent.Cluster.
func (l *localCluster) Heartbeat(ctx context.Context) (agent.Ack, error) {
	g, err := l.srv.HeartbeatOf(ctx, l.name, l.raftID)
	return agent.Ack{OK: g.OK, Index: g.Index}, err
}
