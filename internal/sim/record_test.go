package sim

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/record"
	"github.com/blixard/blixard/internal/state"
)

// recorder is a cluster of one replica whose log is recorded.
type recorder struct {
	t   *testing.T
	s   *state.State
	out bytes.Buffer
	w   *record.Writer
}

func newRecorder(t *testing.T) *recorder {
	t.Helper()
	s, err := Describe(threeNodes(), []WhatIfVM{{Name: "web", Spec: blixard.VMSpec{Replicas: 2, MemoryMiB: 512}}}, 3)
	if err != nil {
		t.Fatal(err)
	}
	r := &recorder{t: t, s: s}
	v := s.View()
	r.w, err = record.NewWriter(&r.out, record.Header{Node: "node1", Release: "test", Index: v.Index, Term: v.Term, Conf: &raftpb.ConfState{Voters: []uint64{1, 2, 3}}})
	if err = errors.Join(err, r.w.Snapshot(v)); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *recorder) entry(kind raftpb.EntryType, data []byte) {
	r.t.Helper()
	if err := r.w.Entry(&raftpb.Entry{Index: new(r.s.Index() + 1), Term: new(uint64(2)), Type: kind.Enum(), Data: data}); err != nil {
		r.t.Fatal(err)
	}
}

func (r *recorder) apply(actor string, commands ...state.Command) []state.Result {
	r.t.Helper()
	envelopes := make([]state.Envelope, len(commands))
	for i, c := range commands {
		envelopes[i] = state.Envelope{NowMS: 1_700_000_000_000 + int64(r.s.Index())*1000, Actor: actor, Command: c}
	}
	data := state.EncodeEntry(envelopes)
	r.entry(raftpb.EntryNormal, data)
	results, _, err := r.s.Apply(r.s.Index()+1, 2, data)
	if err != nil {
		r.t.Fatal(err)
	}
	return results
}

func (r *recorder) checkpoint(flip uint64) {
	r.t.Helper()
	if err := r.w.Checkpoint(record.Checkpoint{Index: r.s.Index(), Hash: r.s.View().Hash() ^ flip}); err != nil {
		r.t.Fatal(err)
	}
}

func (r *recorder) end() *bytes.Reader {
	r.t.Helper()
	if err := r.w.End(); err != nil {
		r.t.Fatal(err)
	}
	return bytes.NewReader(r.out.Bytes())
}

// life records a bit of everything: a leader's first entry, placements, one of
// which nobody would decide so, a refused command, a configuration change.
func (r *recorder) life() {
	r.entry(raftpb.EntryNormal, nil)
	r.s.Advance(r.s.Index()+1, 2)
	vm := r.s.View().VM("web")
	place := func(ordinal int, node blixard.NodeName) state.Command {
		return &state.PlaceInstance{VM: "web", UID: vm.UID, Ordinal: ordinal, Generation: 1, SpecVersion: vm.SpecVersion, Node: node}
	}
	r.apply("leader", place(1, "node1"), place(2, "node1"))
	r.apply("agent of node1", &state.Observe{Node: "node1", RaftID: 1, Items: []state.Observation{{VM: "web", Ordinal: 1, Generation: 1, State: blixard.Running}}})
	r.apply("alice", &state.CreateVM{Name: "web", Spec: vm.Spec}, &state.ScaleVM{Name: "web", Replicas: 1})
	cc := &raftpb.ConfChangeV2{Changes: []*raftpb.ConfChangeSingle{{Type: raftpb.ConfChangeAddLearnerNode.Enum(), NodeId: new(uint64(3))}}}
	data, err := proto.Marshal(cc)
	if err != nil {
		r.t.Fatal(err)
	}
	r.entry(raftpb.EntryConfChangeV2, data)
	r.s.SetRaftRoles(r.s.Index()+1, 2, []uint64{1, 2}, []uint64{3})
	r.checkpoint(0)
}

func TestReplay(t *testing.T) {
	r := newRecorder(t)
	first := r.s.Index()
	r.life()
	var trace strings.Builder
	got, v, err := Replay(r.end(), ReplayOptions{Trace: &trace})
	if err != nil {
		t.Fatal(err)
	}
	want := ReplayReport{
		OK: true, Node: "node1", Release: "test", From: first, To: r.s.Index(), FirstMS: got.FirstMS, LastMS: got.LastMS, Entries: 5, Commands: 5, Refused: 1,
		StateHash: hashText(r.s.View().Hash()), Hashes: 1, CheckedTo: r.s.Index(), Placements: 2, Same: 1, Complete: true,
	}
	if got != want || v.Hash() != r.s.View().Hash() {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	for _, line := range []string{
		"a new leader's first entry", "leader: place web-1#1 on node1\n", "place web-2#1 on node1 (decided upon an older state: now it would be node2)",
		"agent of node1: reports web-1#1 Running", "alice: create web with 2 replicas, stopped -> refused: a VM named", "alice: scale web to 1",
		"raft configuration: voters [1 2], learners [3]",
	} {
		if !strings.Contains(trace.String(), line) {
			t.Errorf("the trace lacks %q:\n%s", line, trace.String())
		}
	}
}

// TestReplayStops: --at shows the state of the past.
func TestReplayStops(t *testing.T) {
	r := newRecorder(t)
	at := r.s.Index() + 2
	r.life()
	got, v, err := Replay(r.end(), ReplayOptions{At: at})
	if err != nil || !got.OK || got.To != at || v.InstanceCount() != 2 || v.VM("web").Spec.Replicas != 2 {
		t.Errorf("%+v, %v", got, err)
	}
	if _, _, err := Replay(bytes.NewReader(r.out.Bytes()), ReplayOptions{At: 1}); blixard.CodeOf(err) != blixard.CodeInvalid {
		t.Errorf("before the recording begins: %v", err)
	}
}

// TestReplayFindsAnotherState: a cluster that came to another state than the
// log gives is found out.
func TestReplayFindsAnotherState(t *testing.T) {
	r := newRecorder(t)
	r.life()
	r.checkpoint(1)
	r.apply("alice", &state.DeleteVM{Name: "web"})
	got, _, err := Replay(r.end(), ReplayOptions{})
	if err != nil || got.OK || got.Violation == nil || got.Violation.Invariant != "S13" || len(got.Violation.Trace) == 0 {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestReplayChecks breaks each rule that a replay holds the rows against, which
// the state itself would not let happen.
func TestReplayChecks(t *testing.T) {
	for name, broken := range map[string]func(p *replay, row blixard.Instance){
		"S4": func(p *replay, row blixard.Instance) {
			row.Generation = 7
			p.check(p.s.View(), p.s.View(), []state.Change{{Kind: state.ChangeInstance, Object: &row}})
		},
		"generations": func(p *replay, row blixard.Instance) {
			p.check(p.s.View(), p.s.View(), []state.Change{{Kind: state.ChangeInstance, Object: &row, Deleted: true}})
			p.check(p.s.View(), p.s.View(), []state.Change{{Kind: state.ChangeInstance, Object: &row}})
		},
		"forward": func(p *replay, row blixard.Instance) {
			row.State = blixard.Pending
			p.check(p.s.View(), p.s.View(), []state.Change{{Kind: state.ChangeInstance, Object: &row}})
		},
		"S5": func(p *replay, _ blixard.Instance) {
			small, err := Describe([]WhatIfNode{{Name: "node1", Capacity: blixard.Resources{MilliCPU: 1, MemoryMiB: 1}}}, nil, 1)
			if err != nil {
				t.Fatal(err)
			}
			p.capacity(small.View(), small.View(), "node1") // nothing there yet
			if p.report.Violation != nil {
				t.Errorf("an empty node: %v", p.report.Violation)
			}
			p.capacity(small.View(), p.s.View(), "node2")
			p.report.Violation = nil
			p.capacity(small.View(), withoutNodes(t, p.s.View()), "node1")
		},
	} {
		r := newRecorder(t)
		r.life()
		p, err := newReplay(record.Header{Node: "n", Index: r.s.Index(), Term: 2, Conf: &raftpb.ConfState{Voters: []uint64{1}}}, r.s, ReplayOptions{})
		if err != nil {
			t.Fatal(err)
		}
		broken(p, *r.s.View().Instance("web", 1, 1))
		if p.report.Violation == nil || p.report.Violation.Invariant != name {
			t.Errorf("%s: found %+v", name, p.report.Violation)
		}
	}
}

// withoutNodes is a view whose nodes offer next to nothing.
func withoutNodes(t *testing.T, v *state.View) *state.View {
	t.Helper()
	var b bytes.Buffer
	if _, err := v.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	s, err := state.Read(&b)
	if err != nil {
		t.Fatal(err)
	}
	s.ApplyAll(s.Index()+1, 2, []state.Envelope{{Command: &state.ReportNode{Name: "node1", RaftID: 1, Address: "a:1", Capacity: blixard.Resources{MemoryMiB: 1}, FeatureLevel: blixard.FeatureLevel}}})
	return s.View()
}

func TestReplayRefusesWhatIsNoRecording(t *testing.T) {
	if _, _, err := Replay(strings.NewReader("BLXSTATE"), ReplayOptions{}); !errors.Is(err, record.ErrDamaged) {
		t.Error(err)
	}
}
