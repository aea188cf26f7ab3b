package sim

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/record"
	"github.com/blixard/blixard/internal/schedule"
	"github.com/blixard/blixard/internal/state"
)

// ReplayOptions choose what of a recording is replayed.
type ReplayOptions struct {
	// At is the index to stop after; 0: the recording's end.
	At uint64
	// Trace gets one line per command; nil: none.
	Trace io.Writer
}

// ReplayReport is what a replay found.
type ReplayReport struct {
	OK      bool             `json:"ok"`
	Node    blixard.NodeName `json:"node"` // whose log was recorded
	Release string           `json:"release"`
	// From is the index of the state that the recording begins with, To the last
	// one that was replayed.
	From      uint64 `json:"from"`
	To        uint64 `json:"to"`
	FirstMS   int64  `json:"first_ms"` // wall clock of the first and of the last command
	LastMS    int64  `json:"last_ms"`
	Entries   int    `json:"entries"`
	Commands  int    `json:"commands"`
	Refused   int    `json:"refused"` // commands the state refused
	StateHash string `json:"state_hash"`
	// Hashes is how many recorded hashes of the state were compared, and
	// CheckedTo the index of the last: what comes after it has none.
	Hashes    int    `json:"hashes"`
	CheckedTo uint64 `json:"checked_to"`
	// Placements is how many placements of the leader were decided again, Same
	// how many came out alike. Others had been decided upon an older state.
	Placements int `json:"placements"`
	Same       int `json:"same"`
	// Complete: the recording has its end. One that was followed has none.
	Complete  bool       `json:"complete"`
	Violation *Violation `json:"violation,omitempty"`
}

// Replay plays a recording back through the production state, and holds every
// entry against what must be: the recorded hashes (S2, S13), rows that only
// move forward, one live incarnation per slot, generations that are never used
// again, capacity and anti-affinity at each placement (S5, S6). It stops at the
// first violation. The view is the state it came to. An error means that the
// recording cannot be read.
func Replay(r io.Reader, o ReplayOptions) (ReplayReport, *state.View, error) {
	in, err := record.NewReader(r)
	if err != nil {
		return ReplayReport{}, nil, err
	}
	s, err := in.State()
	if err != nil {
		return ReplayReport{}, nil, err
	}
	p, err := newReplay(in.Header(), s, o)
	if err != nil {
		return ReplayReport{}, nil, err
	}
	err = p.run(in)
	p.report.To, p.report.StateHash = s.Index(), hashText(s.View().Hash())
	p.report.OK = err == nil && p.report.Violation == nil
	return p.report, s.View(), err
}

func hashText(h uint64) string { return fmt.Sprintf("%016x", h) }

// replay is one recording being played back.
type replay struct {
	o      ReplayOptions
	s      *state.State
	index  *schedule.Index
	roles  *raft.RawNode
	rows   map[string]rowMark            // by incarnation
	newest map[blixard.InstanceID]uint64 // highest generation ever seen of a slot
	report ReplayReport
	recent []string // the last lines of the trace
}

// rowMark is what must not go back.
type rowMark struct {
	state  blixard.InstanceState
	wanted blixard.Wanted
	node   blixard.NodeName
}

func newReplay(h record.Header, s *state.State, o ReplayOptions) (*replay, error) {
	if o.At > 0 && o.At < h.Index {
		return nil, &blixard.Error{Code: blixard.CodeInvalid, Message: fmt.Sprintf("the recording begins at index %d, after %d", h.Index, o.At)}
	}
	roles, err := rolesAt(h)
	if err != nil {
		return nil, err
	}
	v := s.View()
	p := &replay{
		o: o, s: s, index: schedule.NewIndex(v), roles: roles, rows: map[string]rowMark{}, newest: map[blixard.InstanceID]uint64{},
		report: ReplayReport{Node: h.Node, Release: h.Release, From: h.Index},
	}
	v.Instances(func(i *blixard.Instance) bool {
		p.rows[i.Incarnation()] = rowMark{i.State, i.Wanted, i.Node}
		p.newest[i.ID] = max(p.newest[i.ID], i.Generation)
		return true
	})
	return p, nil
}

// rolesAt is a raft node that only follows the configuration.
func rolesAt(h record.Header) (*raft.RawNode, error) {
	storage := raft.NewMemoryStorage()
	if h.Index > 0 {
		meta := &raftpb.SnapshotMetadata{ConfState: h.Conf, Index: new(h.Index), Term: new(h.Term)}
		if err := storage.ApplySnapshot(&raftpb.Snapshot{Metadata: meta}); err != nil {
			return nil, fmt.Errorf("taking the recorded raft configuration: %w", err)
		}
	}
	rn, err := raft.NewRawNode(&raft.Config{
		ID: 1 << 62, ElectionTick: 10, HeartbeatTick: 1, Storage: storage, Applied: h.Index, MaxSizePerMsg: 1, MaxInflightMsgs: 1, Logger: mute{},
	})
	if err != nil {
		return nil, fmt.Errorf("following the raft configuration: %w", err)
	}
	return rn, nil
}

// run replays frame by frame.
func (p *replay) run(in *record.Reader) error {
	for p.report.Violation == nil && (p.o.At == 0 || p.s.Index() < p.o.At) {
		frame, err := in.Next()
		switch {
		case errors.Is(err, io.EOF):
			p.report.Complete = true
			return nil
		case errors.Is(err, record.ErrCut):
			return nil
		case err != nil:
			return err
		}
		switch f := frame.(type) {
		case *record.Entry:
			err = p.entry(f)
		case *record.Checkpoint:
			p.compare(f)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// compare holds the state against what the cluster had at the same index.
func (p *replay) compare(k *record.Checkpoint) {
	p.report.Hashes++
	p.report.CheckedTo = k.Index
	if h := p.s.View().Hash(); h != k.Hash {
		p.violate("S13", "the state at %d is %s, the cluster recorded %s", k.Index, hashText(h), hashText(k.Hash))
	}
}

func (p *replay) entry(e *record.Entry) error {
	p.report.Entries++
	if e.Type != raftpb.EntryNormal {
		return p.configuration(e)
	}
	if len(e.Data) == 0 {
		p.line("%d t%d a new leader's first entry", e.Index, e.Term)
		p.s.Advance(e.Index, e.Term)
		return nil
	}
	envelopes, err := state.DecodeEntry(e.Data)
	if err != nil {
		return fmt.Errorf("reading entry %d: %w", e.Index, err)
	}
	before := p.s.View()
	notes := p.decideAgain(before, envelopes)
	results, changes, err := p.s.Apply(e.Index, e.Term, e.Data)
	if err != nil {
		return err
	}
	for i := range results {
		p.command(e, &envelopes[i], &results[i], notes[i])
	}
	after := p.s.View()
	p.index.Observe(after, changes)
	for i := range envelopes { // what was refused holds nothing
		if m, ok := envelopes[i].Command.(*state.PlaceInstance); ok {
			p.index.SyncVM(after, m.VM)
		}
	}
	p.check(before, after, changes)
	return nil
}

// configuration applies a change of the raft configuration.
func (p *replay) configuration(e *record.Entry) error {
	var cc raftpb.ConfChangeI
	var err error
	if e.Type == raftpb.EntryConfChange {
		one := new(raftpb.ConfChange)
		cc, err = one, proto.Unmarshal(e.Data, one)
	} else {
		two := new(raftpb.ConfChangeV2)
		cc, err = two, proto.Unmarshal(e.Data, two)
	}
	if err != nil {
		return fmt.Errorf("reading the configuration change at %d: %w", e.Index, err)
	}
	conf := p.roles.ApplyConfChange(cc)
	before := p.s.View()
	changes := p.s.SetRaftRoles(e.Index, e.Term, conf.GetVoters(), conf.GetLearners())
	p.line("%d t%d raft configuration: voters %v, learners %v", e.Index, e.Term, conf.GetVoters(), conf.GetLearners())
	p.index.Observe(p.s.View(), changes)
	p.check(before, p.s.View(), changes)
	return nil
}

// decideAgain asks the scheduler for the leader's placements of an entry, as if
// it decided now. A note per envelope says where it comes out differently.
func (p *replay) decideAgain(v *state.View, envelopes []state.Envelope) []string {
	notes := make([]string, len(envelopes))
	assumed := map[string]bool{}
	for i := range envelopes {
		m, ok := envelopes[i].Command.(*state.PlaceInstance)
		if !ok || v.VM(m.VM) == nil {
			continue
		}
		vm := v.VM(m.VM)
		r := schedule.Request{VM: m.VM, Spec: &vm.Spec}
		if last := v.Latest(blixard.SlotID(m.VM, m.Ordinal)); last != nil && last.State == blixard.Failed && m.Restarts >= 2 {
			r.Avoid = []blixard.NodeName{last.Node}
		}
		p.report.Placements++
		switch at, found := p.index.Find(r); {
		case found && at.Node == m.Node:
			p.report.Same++
		case found:
			notes[i] = "decided upon an older state: now it would be " + string(at.Node)
		default:
			notes[i] = "decided upon an older state: now no node fits"
		}
		key := fmt.Sprintf("%s-%d#%d", m.VM, m.Ordinal, m.Generation)
		if !assumed[key] && v.Instance(m.VM, m.Ordinal, m.Generation) == nil {
			assumed[key] = true
			p.index.Assume(m.VM, &vm.Spec, m.Ordinal, m.Generation, m.Node)
		}
	}
	return notes
}

// check holds what an entry changed against what must be.
func (p *replay) check(before, after *state.View, changes []state.Change) {
	placedOn := map[blixard.NodeName]bool{}
	for i := range changes {
		inst, ok := changes[i].Object.(*blixard.Instance)
		if !ok {
			continue
		}
		key := inst.Incarnation()
		old, known := p.rows[key]
		switch {
		case changes[i].Deleted:
			delete(p.rows, key)
			continue
		case known:
			p.forward(key, old, inst)
		default:
			if inst.Generation <= p.newest[inst.ID] {
				p.violate("generations", "%s is placed, but %s#%d was there before", key, inst.ID, p.newest[inst.ID])
			}
			p.newest[inst.ID] = max(p.newest[inst.ID], inst.Generation)
			placedOn[inst.Node] = true
			p.alone(after, inst)
		}
		p.rows[key] = rowMark{inst.State, inst.Wanted, inst.Node}
	}
	for _, name := range slices.Sorted(maps.Keys(placedOn)) {
		p.capacity(before, after, name)
	}
}

// forward checks that a row moved forward only.
func (p *replay) forward(key string, old rowMark, now *blixard.Instance) {
	rank := map[blixard.Wanted]int{blixard.WantRun: 1, blixard.WantStop: 2, blixard.WantRemove: 3}
	switch {
	case old.state != now.State && !blixard.CanFollow(old.state, now.State):
		p.violate("forward", "%s goes from %s back to %s", key, old.state, now.State)
	case rank[now.Wanted] < rank[old.wanted]:
		p.violate("forward", "%s was wanted %s and is wanted %s", key, old.wanted, now.Wanted)
	case old.node != now.Node:
		p.violate("forward", "%s moves from %s to %s", key, old.node, now.Node)
	}
}

// alone checks that a new incarnation is its slot's only live one.
func (p *replay) alone(v *state.View, placed *blixard.Instance) {
	v.InstancesOf(placed.VM, func(i *blixard.Instance) bool {
		if i.ID == placed.ID && i.Generation != placed.Generation && i.Holds() && placed.Holds() {
			p.violate("S4", "%s is placed while %s is %s on %s", placed.Incarnation(), i.Incarnation(), i.State, i.Node)
		}
		return true
	})
}

// capacity counts anew what a node holds on which something was placed.
func (p *replay) capacity(before, after *state.View, name blixard.NodeName) {
	var used blixard.Resources
	groups := map[string]blixard.InstanceID{}
	after.InstancesOn(name, func(i *blixard.Instance) bool {
		if !i.Holds() {
			return true
		}
		used = used.Add(i.Spec.Needs())
		if g := i.Spec.AntiAffinityGroup; g != "" {
			if groups[g] != "" {
				p.violate("S6", "%s and %s of the group %s share %s", groups[g], i.ID, g, name)
			}
			groups[g] = i.ID
		}
		return true
	})
	fits := false // an entry may also change what the node offers
	for _, v := range []*state.View{before, after} {
		if n := v.Node(name); n != nil && used.Fits(n.Allocatable()) {
			fits = true
		}
	}
	if !fits {
		p.violate("S5", "%s holds %d MiB and %d thousandths of a CPU, more than it offers", name, used.MemoryMiB, used.MilliCPU)
	}
}

func (p *replay) violate(invariant, format string, args ...any) {
	if p.report.Violation == nil {
		p.report.Violation = &Violation{
			Invariant: invariant, Detail: fmt.Sprintf("entry %d: ", p.s.Index()) + fmt.Sprintf(format, args...),
			AtMS: p.s.View().Cluster().NowMS - p.report.FirstMS, Trace: slices.Clone(p.recent),
		}
	}
}

// mute is a raft logger that says nothing.
type mute struct{}

func (mute) Debug(...any)            {}
func (mute) Debugf(string, ...any)   {}
func (mute) Error(...any)            {}
func (mute) Errorf(string, ...any)   {}
func (mute) Info(...any)             {}
func (mute) Infof(string, ...any)    {}
func (mute) Warning(...any)          {}
func (mute) Warningf(string, ...any) {}
func (mute) Fatal(v ...any)          { panic(fmt.Sprint(v...)) }
func (mute) Fatalf(f string, v ...any) {
	panic(fmt.Sprintf(f, v...))
}
func (mute) Panic(v ...any)            { panic(fmt.Sprint(v...)) }
func (mute) Panicf(f string, v ...any) { panic(fmt.Sprintf(f, v...)) }
