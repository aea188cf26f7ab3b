// Package apitest holds a whole cluster in memory for tests of what speaks to
// the API: the real state, applied at once, without raft, disks or hypervisors.
package apitest

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/api"
	"github.com/blixard/blixard/internal/record"
	"github.com/blixard/blixard/internal/state"
)

// Secret is the secret of the clusters made here.
const Secret = "the-cluster-secret"

// Cluster is a replicated state without replicas.
type Cluster struct {
	mu      sync.Mutex
	state   *state.State
	changes []state.Change
	floor   uint64 // every change after it is kept
	wake    chan struct{}
	fault   func(e state.Envelope) error
	lost    func(e state.Envelope) error
	noRead  error
}

var _ api.Backend = (*Backend)(nil)

// New returns a cluster with nodes node1, node2, … that are ready and have 8
// vCPUs and 16 GiB each. The address of a node can be set with SetAddress.
func New(nodes int) *Cluster {
	c := &Cluster{state: state.New(), wake: make(chan struct{})}
	for i := 1; i <= nodes; i++ {
		name := blixard.NodeName(fmt.Sprintf("node%d", i))
		identity := state.NodeIdentity{Name: name, Address: fmt.Sprintf("127.0.0.1:%d", 7000+i), Zone: fmt.Sprintf("z%d", i)}
		if i == 1 {
			c.Must(&state.Bootstrap{ClusterID: "c1", Name: "test", Secret: Secret, RaftID: 1, Node: identity, FeatureLevel: blixard.FeatureLevel})
		} else {
			c.Must(&state.JoinNode{Node: identity})
		}
		c.SetAddress(name, identity.Address)
	}
	return c
}

// SetAddress has a node report, at an address.
func (c *Cluster) SetAddress(name blixard.NodeName, address string) {
	n := c.View().Node(name)
	c.Must(&state.ReportNode{
		Name: name, RaftID: n.RaftID, Address: address, Zone: n.Zone, Capacity: blixard.Resources{MilliCPU: 8000, MemoryMiB: 16 << 10, DiskMiB: 100 << 10},
		Hypervisors: []string{"qemu"}, Acceleration: "tcg", Release: "test", FeatureLevel: blixard.FeatureLevel,
	})
}

// Node returns the backend of one node.
func (c *Cluster) Node(name blixard.NodeName) *Backend { return &Backend{c: c, name: name} }

// Must applies a command that cannot fail.
func (c *Cluster) Must(command state.Command) state.Outcome {
	out, err := c.apply(state.Envelope{NowMS: time.Now().UnixMilli(), Actor: "test", Command: command})
	if err != nil {
		panic(fmt.Sprintf("applying %T: %v", command, err))
	}
	return out
}

// Run places an incarnation of a VM's slot on a node and reports it in a state.
func (c *Cluster) Run(vm blixard.VMName, ordinal int, node blixard.NodeName, as blixard.InstanceState) {
	v := c.View()
	row, n := v.VM(vm), v.Node(node)
	generation := row.FirstGeneration
	if last := v.Latest(blixard.SlotID(vm, ordinal)); last != nil {
		generation = max(generation, last.Generation+1)
	}
	c.Must(&state.PlaceInstance{
		VM: vm, UID: row.UID, Ordinal: ordinal, Generation: generation, SpecVersion: row.SpecVersion, RestartSeq: row.RestartSeq, Node: node, NodeEpoch: n.Epoch,
	})
	if as != blixard.Pending {
		c.Must(&state.Observe{Node: node, RaftID: n.RaftID, Items: []state.Observation{{
			VM: vm, Ordinal: ordinal, Generation: generation, State: as, Address: "127.0.0.1:8080", Acceleration: "tcg",
			Ports: []blixard.PublishedPort{{Protocol: "tcp", Address: "127.0.0.1:8080", GuestPort: 80}},
		}}})
	}
}

// FailWith has proposals fail before they are applied when f says so; nil ends
// it.
func (c *Cluster) FailWith(f func(state.Envelope) error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fault = f
}

// LoseWith has answers to proposals lost after they were applied when f says
// so; nil ends it.
func (c *Cluster) LoseWith(f func(state.Envelope) error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lost = f
}

// FailReads has linearizable reads fail; nil ends it.
func (c *Cluster) FailReads(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.noRead = err
}

// Forget drops the changes kept for watchers, as if many had come since.
func (c *Cluster) Forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.floor, c.changes = c.state.Index(), nil
}

// View is the state as it is.
func (c *Cluster) View() *state.View {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state.View()
}

func (c *Cluster) apply(e state.Envelope) (state.Outcome, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fault != nil {
		if err := c.fault(e); err != nil {
			return state.Outcome{}, err
		}
	}
	// Through the encoding, as in a real log.
	results, changes, err := c.state.Apply(c.state.Index()+1, 1, state.EncodeEntry([]state.Envelope{e}))
	if err != nil {
		return state.Outcome{}, fmt.Errorf("applying: %w", err)
	}
	c.changes = append(c.changes, changes...)
	close(c.wake)
	c.wake = make(chan struct{})
	if c.lost != nil {
		if err := c.lost(e); err != nil {
			return state.Outcome{}, err
		}
	}
	if results[0].Err != nil {
		return state.Outcome{}, results[0].Err
	}
	return results[0].Outcome, nil
}

// Backend is one node of a Cluster.
type Backend struct {
	c    *Cluster
	name blixard.NodeName
}

// View implements api.Backend.
func (b *Backend) View() *state.View { return b.c.View() }

// ReadView implements api.Backend.
func (b *Backend) ReadView(ctx context.Context) (*state.View, error) {
	b.c.mu.Lock()
	defer b.c.mu.Unlock()
	if b.c.noRead != nil {
		return nil, b.c.noRead
	}
	return b.c.state.View(), ctx.Err()
}

// Propose implements api.Backend.
func (b *Backend) Propose(ctx context.Context, e state.Envelope) (state.Outcome, error) {
	if err := ctx.Err(); err != nil {
		return state.Outcome{}, err
	}
	return b.c.apply(e)
}

// Watch implements api.Backend.
func (b *Backend) Watch(ctx context.Context, from uint64) (func() ([]state.Change, error), error) {
	gone := &blixard.Error{Code: blixard.CodeGone, Message: "changes of that age are no longer kept", Hint: "list again"}
	b.c.mu.Lock()
	defer b.c.mu.Unlock()
	if from < b.c.floor {
		return nil, gone
	}
	return func() ([]state.Change, error) {
		for {
			b.c.mu.Lock()
			if from < b.c.floor {
				b.c.mu.Unlock()
				return nil, gone
			}
			var out []state.Change
			for _, ch := range b.c.changes {
				if ch.Index > from {
					out = append(out, ch)
				}
			}
			wake := b.c.wake
			b.c.mu.Unlock()
			if len(out) > 0 {
				from = out[len(out)-1].Index
				return out, nil
			}
			select {
			case <-wake:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
	}, nil
}

// Status implements api.Backend.
func (b *Backend) Status() api.Status {
	v := b.View()
	st := api.Status{Node: b.name, Term: 1, Leader: "node1", Role: "follower", Committed: v.Index, Applied: v.Index, Ready: true, Release: "test"}
	if n := v.Node(b.name); n != nil {
		st.RaftID = n.RaftID
	}
	if b.name == "node1" {
		st.Role = "leader"
		v.Nodes(func(n *blixard.Node) bool {
			st.Peers = append(st.Peers, api.PeerStatus{RaftID: n.RaftID, Match: v.Index, Active: true, State: "replicate"})
			return true
		})
	}
	return st
}

// TransferLeader implements api.Backend.
func (b *Backend) TransferLeader(context.Context, blixard.NodeName) error { return nil }

// Snapshot implements api.Backend.
func (b *Backend) Snapshot(context.Context) (uint64, error) { return b.View().Index, nil }

// WriteSnapshot implements api.Backend.
func (b *Backend) WriteSnapshot(_ context.Context, w io.Writer) (uint64, error) {
	v := b.View()
	_, err := v.WriteTo(w)
	return v.Index, err
}

// Record implements api.Backend. There is no log here: a recording is of the
// state as it is.
func (b *Backend) Record(ctx context.Context, _ uint64, follow bool, w io.Writer) error {
	v := b.View()
	out, err := record.NewWriter(w, record.Header{Node: b.name, Release: "test", AtMS: v.Cluster().NowMS, Index: v.Index, Term: v.Term, Conf: &raftpb.ConfState{Voters: []uint64{1}}})
	if err != nil {
		return err
	}
	if err := out.Snapshot(v); err != nil {
		return err
	}
	if err := out.Checkpoint(record.Checkpoint{Index: v.Index, Hash: v.Hash()}); err != nil {
		return err
	}
	if !follow {
		return out.End()
	}
	if err := out.Flush(); err != nil {
		return err
	}
	<-ctx.Done()
	return ctx.Err()
}
