package replica_test

import (
	"io"
	"log"
	"testing"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

	"github.com/blixard/blixard/internal/control"
	"github.com/blixard/blixard/internal/replica"
	"github.com/blixard/blixard/internal/state"
)

// What a leader sends before it is durable must not outrun what is known of who
// votes: nothing does until an entry of its term is applied, entries do after.
func TestEarlyOnlyWhenSettled(t *testing.T) {
	boot := replica.NewCluster(1)
	boot.Conf = &raftpb.ConfState{Voters: []uint64{1}, Learners: []uint64{2}}
	r, err := replica.New(replica.Config{
		RaftID: 1, ElectionTicks: 10, HeartbeatTicks: 1, MaxVoters: 1, Control: control.Config{}, Logger: &raft.DefaultLogger{Logger: log.New(io.Discard, "", 0)},
	}, boot)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Campaign(); err != nil {
		t.Fatal(err)
	}
	// carry does all there is to do and counts what may go out early, by whether
	// an entry of the term had been applied.
	carry := func() (before, after int) {
		for r.HasReady() {
			led := r.Leads()
			rd := r.Ready()
			for _, m := range rd.Messages {
				if m.GetType() == raftpb.MsgApp { // the learner answers, or no more is sent
					answer := &raftpb.Message{
						Type: raftpb.MsgAppResp.Enum(), From: new(uint64(2)), To: new(uint64(1)), Term: new(r.Term()), Index: new(m.GetIndex() + uint64(len(m.GetEntries()))),
					}
					defer func() {
						if err := r.Step(answer); err != nil {
							t.Error(err)
						}
					}()
				}
			}
			if led {
				after += len(rd.Early)
			} else {
				before += len(rd.Early)
			}
			if _, err := r.Advance(rd); err != nil {
				t.Fatal(err)
			}
		}
		return before, after
	}
	before, _ := carry()
	more, _ := carry()
	if before+more != 0 || !r.Leads() {
		t.Errorf("%d messages go out early before the leader rules; it rules: %t", before+more, r.Leads())
	}
	if err := r.Propose(state.PackEntry(nil)); err != nil {
		t.Fatal(err)
	}
	if _, after := carry(); after == 0 {
		t.Error("an entry of a leader that rules does not go out early")
	}
}
