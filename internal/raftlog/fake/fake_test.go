package fake_test

import (
	"errors"
	"testing"

	"github.com/blixard/blixard/internal/raftlog"
	"github.com/blixard/blixard/internal/raftlog/fake"
	"github.com/blixard/blixard/internal/raftlog/raftlogtest"
)

type store struct{ disk *fake.Disk }

func (s store) Open() (raftlog.Opened, error) { return s.disk.Open() }
func (s store) Crash()                        { s.disk.Crash(0) }
func (s store) Fail(err error)                { s.disk.Fail(err) }

func TestSuite(t *testing.T) {
	raftlogtest.Suite(t, func(*testing.T) raftlogtest.Store { return store{&fake.Disk{}} })
}

func TestCrashKeepsAPrefixOfUnsyncedSaves(t *testing.T) {
	disk := &fake.Disk{}
	opened, err := disk.Open()
	if err != nil {
		t.Fatal(err)
	}
	for i := uint64(1); i <= 3; i++ {
		if err := opened.Log.Save(nil, raftlogtest.Entries(1, i, i), i == 1); err != nil {
			t.Fatal(err)
		}
	}
	if got := disk.Unsynced(); got != 2 {
		t.Fatalf("%d unsynced saves, want 2", got)
	}
	disk.Crash(1)
	if err := opened.Log.Save(nil, raftlogtest.Entries(1, 4, 4), true); !errors.Is(err, fake.ErrGone) {
		t.Fatalf("a log from before the crash answers %v", err)
	}
	if opened, err = disk.Open(); err != nil {
		t.Fatal(err)
	}
	if len(opened.Entries) != 2 {
		t.Fatalf("%d entries after the crash, want 2", len(opened.Entries))
	}
}
