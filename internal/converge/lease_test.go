package converge

import (
	"testing"

	"github.com/blixard/blixard"
)

func book() *LeaseBook { return &LeaseBook{LengthMS: 5000, FenceMS: 1000} }

// TestLeaseCountsOnceSeen: what the node runs may have been given up before a
// newer lease was given, so that lease counts for it only when the view shows
// what the leader had decided by then.
func TestLeaseCountsOnceSeen(t *testing.T) {
	b := book()
	if back, plan := b.Granted(1000, 1100, 10, 10); !back || !plan {
		t.Errorf("the first lease: back %t, plan %t", back, plan)
	}
	b.Granted(2000, 2100, 20, 10) // the view lags
	b.Granted(3000, 3100, 30, 10)
	if l := b.Lease(); l != (Lease{UntilMS: 8000, Index: 30, SureMS: 6000}) {
		t.Errorf("a lease the view lags behind: %+v", l)
	}
	if b.StartByMS() != 5000 || b.KillMS() != 5500 {
		t.Errorf("start by %d, kill at %d", b.StartByMS(), b.KillMS())
	}
	if in := (Input{NowMS: 3100, ViewIndex: 10, Lease: b.Lease(), Limits: Limits{FenceMS: 1000}}); in.fenceMS() != 5000 || in.Fresh() {
		t.Errorf("fence at %d, fresh %t", in.fenceMS(), in.Fresh())
	}
	if !b.Seen(20) || b.Lease().SureMS != 7000 || b.Seen(25) || !b.Seen(30) || b.Lease().SureMS != 8000 || b.Seen(31) {
		t.Errorf("when the view has caught up: %+v", b.Lease())
	}
}

// TestRecalledLease: a daemon that comes back goes on with what is left of the
// lease, for what runs only, until the leader answers.
func TestRecalledLease(t *testing.T) {
	b := book()
	b.Recall(100, 9000)
	l := b.Lease()
	if in := (Input{NowMS: 200, ViewIndex: 99, Lease: l, Limits: Limits{FenceMS: 1000}}); in.Fresh() || in.fenceMS() != 4100 {
		t.Errorf("recalled: %+v, fresh %t, fence at %d", l, in.Fresh(), in.fenceMS())
	}
	b.Granted(1000, 1100, 50, 40)
	if b.Lease() != (Lease{UntilMS: 6000, Index: 50, SureMS: 5100}) {
		t.Errorf("the first answer: %+v", b.Lease())
	}
	if b.Refused(2000) || b.Silent(5999) || !b.Silent(6000) || b.Silent(7000) {
		t.Error("what is told of silence and refusals is wrong")
	}
	b.Reported(3000)
	if b.Refused(2999) || !b.Refused(3001) {
		t.Error("a refusal counts only if the heartbeat was sent after the report")
	}
}

// TestStartIsGivenUp: a start under way is killed when its row is gone or lost,
// however new the lease: it was counted as ended, and runs elsewhere by now.
func TestStartIsGivenUp(t *testing.T) {
	spec := blixard.VMSpec{Singleton: true}
	spec.Defaults()
	lost := &blixard.Instance{ID: "web-1", VM: "web", Ordinal: 1, Generation: 3, Spec: &spec, Wanted: blixard.WantRun, State: blixard.Lost}
	for name, rows := range map[string][]*blixard.Instance{"lost": {lost}, "gone": nil} {
		in := Input{
			NowMS: 1000, ViewIndex: 10, Lease: Lease{UntilMS: 6000, Index: 10, SureMS: 6000}, Rows: rows,
			Locals: []Local{{Ref: Ref{"web-1", 3}, Busy: Start, StopsOnPartition: true}},
			Limits: Limits{Starts: 4, Effects: 4, FenceMS: 1000, OrphanGraceMS: 1000, ResendMS: 1000},
		}
		actions, _ := Plan(in)
		if len(actions) != 1 || actions[0].Kind != Kill {
			t.Errorf("%s: %v", name, actions)
		}
		in.Locals[0].Busy = Kill
		if actions, _ := Plan(in); len(actions) != 0 {
			t.Errorf("%s, while it is killed: %v", name, actions)
		}
	}
}
