package api

import (
	"context"
	"io"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/guest"
	"github.com/blixard/blixard/internal/state"
)

// Backend is what the API needs of the replica on this node.
type Backend interface {
	// View is the state as this node has it now; it may lag behind the leader.
	View() *state.View
	// ReadView is a view at least as new as every change acknowledged before the
	// call (linearizable); CodeUnavailable when there is no leader in time.
	ReadView(ctx context.Context) (*state.View, error)
	// Propose has a command committed and applied and returns its outcome. It
	// retries across leader changes until ctx ends, safely, since the envelope
	// carries a key (without one a command may be applied twice). Errors are
	// *blixard.Error.
	Propose(ctx context.Context, e state.Envelope) (state.Outcome, error)
	// Watch delivers every change after index from, in order, until ctx ends.
	// CodeGone when changes after from are no longer kept: list again.
	// Each call of next blocks for at least one change and returns whole indexes:
	// the caller owns the slice and resumes from the index of its last change.
	Watch(ctx context.Context, from uint64) (next func() ([]state.Change, error), err error)
	// Status tells how this node sees the consensus.
	Status() Status
	// TransferLeader hands leadership to the named node, "" for any voter that
	// is up to date.
	TransferLeader(ctx context.Context, to blixard.NodeName) error
	// Snapshot writes a snapshot of the applied state now and returns its index.
	Snapshot(ctx context.Context) (uint64, error)
	// WriteSnapshot streams the applied state.
	WriteSnapshot(ctx context.Context, w io.Writer) (uint64, error)
	// Record writes a recording (package record) that begins with a state not
	// newer than since (0: as early as possible); with follow it goes on until
	// ctx ends. Each write is of whole frames. CodeGone when the log does not
	// reach back so far, or when the writer was too slow for it.
	Record(ctx context.Context, since uint64, follow bool, w io.Writer) error
}

// Status is how a node sees the consensus.
type Status struct {
	Node      blixard.NodeName
	RaftID    uint64
	Term      uint64
	Leader    blixard.NodeName // "" when unknown
	Role      string           // leader, follower, candidate, learner
	Committed uint64
	Applied   uint64
	Ready     bool // has a leader and applied all it knows to be committed
	Release   string
	// Peers, on the leader only: how far each member has come.
	Peers []PeerStatus
}

// PeerStatus is the leader's knowledge of a member.
type PeerStatus struct {
	RaftID uint64
	Match  uint64
	Active bool
	State  string // replicate, probe, snapshot
}

// Guests is what the API needs of the agent on this node: access to the
// instances that run here. Errors are *blixard.Error.
type Guests interface {
	// Logs copies the instance's console log to w; with follow until ctx ends.
	Logs(ctx context.Context, id blixard.InstanceID, opt LogOptions, w io.Writer) error
	// Exec runs a command in the guest.
	Exec(ctx context.Context, id blixard.InstanceID, req guest.ExecRequest, stdin io.Reader, stdout, stderr io.Writer, resize <-chan guest.Size) (exitCode int, err error)
	// Console attaches to the guest's serial console.
	Console(ctx context.Context, id blixard.InstanceID, rw io.ReadWriter) error
}

// LogOptions choose lines of a log.
type LogOptions = guest.LogOptions
