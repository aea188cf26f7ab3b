package replica_test

import (
	"io"
	"log"
	"testing"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/blixard/blixard/internal/control"
	"github.com/blixard/blixard/internal/replica"
)

// A node alone may have acknowledged entries whose commit index was not made
// durable before it crashed: no read may be answered without them.
func TestReadAfterLostCommitIndex(t *testing.T) {
	boot := replica.NewCluster(1)
	entry := func(index uint64) *raftpb.Entry {
		return &raftpb.Entry{Index: proto.Uint64(index), Term: proto.Uint64(2), Type: raftpb.EntryNormal.Enum()}
	}
	boot.HardState = &raftpb.HardState{Term: proto.Uint64(2), Vote: proto.Uint64(1), Commit: proto.Uint64(1)}
	boot.Entries = []*raftpb.Entry{entry(2), entry(3), entry(4)}
	r, err := replica.New(replica.Config{RaftID: 1, ElectionTicks: 10, HeartbeatTicks: 1, MaxVoters: 1, Control: control.Config{}, Logger: &raft.DefaultLogger{Logger: log.New(io.Discard, "", 0)}}, boot)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Campaign(); err != nil {
		t.Fatal(err)
	}
	r.Read(7) // as early as can be
	asked, answered := false, 0
	for r.HasReady() {
		out, err := r.Advance(r.Ready())
		if err != nil {
			t.Fatal(err)
		}
		for _, read := range out.Reads {
			answered++
			if read.Index < 4 || read.Index > out.Applied {
				t.Errorf("read %d is answered at index %d, applied %d; acknowledged was 4", read.ID, read.Index, out.Applied)
			}
		}
		if !asked && r.Leader() == 1 {
			asked = true
			r.Read(8)
		}
	}
	if !asked || answered == 0 {
		t.Errorf("asked as a leader: %v; %d reads were answered", asked, answered)
	}
}
