package state

import (
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/wire"
)

// AssignBuild has a node build a version's template. Proposed by the leader;
// another assignment takes the former one's right to report.
type AssignBuild struct {
	Function  blixard.FunctionName
	Number    int
	Seq       uint64
	Node      blixard.NodeName
	NodeEpoch uint64
}

func (m *AssignBuild) kind() uint8 { return 48 }

func (m *AssignBuild) code(c *wire.Coder) {
	wire.String(c, &m.Function)
	wire.Int(c, &m.Number)
	wire.Uint(c, &m.Seq)
	wire.String(c, &m.Node)
	wire.Uint(c, &m.NodeEpoch)
}

func (m *AssignBuild) apply(tx *txn) (Outcome, *blixard.Error) {
	old, err := tx.building(m.Function, m.Number, m.Seq)
	if err != nil {
		return Outcome{}, err
	}
	if err := tx.takesWork(m.Node, m.NodeEpoch); err != nil {
		return Outcome{}, err
	}
	if old.Builder == m.Node && old.BuilderEpoch == m.NodeEpoch {
		return Outcome{Version: old.Seq, Noop: true}, nil
	}
	v := *old
	v.Builder, v.BuilderEpoch = m.Node, m.NodeEpoch
	tx.setVersion(&v)
	return Outcome{Version: v.Seq}, nil
}

// building returns a version that is to be built, or the refusal.
func (tx *txn) building(name blixard.FunctionName, number int, seq uint64) (*blixard.FunctionVersion, *blixard.Error) {
	f, err := tx.findFunction(name, 0)
	if err != nil {
		return nil, err
	}
	v := tx.t.version(name, number)
	if v == nil {
		return nil, noVersion(f, number)
	}
	if v.Seq != seq || v.State != blixard.FunctionPending {
		return nil, blixard.Errorf(blixard.CodeConflict, "version %s of %s was changed or built meanwhile", blixard.VersionName(number), name)
	}
	return v, nil
}

// takesWork refuses a node that is to get nothing new.
func (tx *txn) takesWork(name blixard.NodeName, epoch uint64) *blixard.Error {
	n := tx.t.node(name)
	switch {
	case n == nil || n.Epoch != epoch:
		return blixard.Errorf(blixard.CodeConflict, "the node %s was lost or removed meanwhile", clip(string(name)))
	case n.State != blixard.NodeReady || n.Availability != blixard.Active || !n.RunsInstances():
		return blixard.Errorf(blixard.CodeRefused, "the node %s takes no new work: it is %s and %s", name, n.State, n.Availability)
	}
	return nil
}

// ReportFunction is what became of building a version's template. Only the node
// that it was assigned to may report; the leader may too, with an empty Node.
type ReportFunction struct {
	Function  blixard.FunctionName
	Number    int
	Seq       uint64
	Node      blixard.NodeName
	NodeEpoch uint64
	// State is Active or Failed, or Pending to give the build back, to be tried
	// on another node.
	State  blixard.FunctionState
	Code   string // why it failed: InvalidCode, InitError, Timeout, OutOfMemory, Capacity, Internal
	Reason string // in words, with the end of the log
}

func (m *ReportFunction) kind() uint8 { return 47 }

func (m *ReportFunction) code(c *wire.Coder) {
	wire.String(c, &m.Function)
	wire.Int(c, &m.Number)
	wire.Uint(c, &m.Seq)
	wire.String(c, &m.Node)
	wire.Uint(c, &m.NodeEpoch)
	wire.String(c, &m.State)
	wire.String(c, &m.Code)
	wire.String(c, &m.Reason)
}

func (m *ReportFunction) apply(tx *txn) (Outcome, *blixard.Error) {
	old, err := tx.building(m.Function, m.Number, m.Seq)
	if err != nil {
		return Outcome{}, err
	}
	if m.Node != "" && (old.Builder != m.Node || old.BuilderEpoch != m.NodeEpoch) {
		return Outcome{}, blixard.Errorf(blixard.CodeConflict, "the build of %s was given to another node meanwhile", m.Function)
	}
	v := *old
	v.State, v.StateCode, v.StateReason = m.State, clip(m.Code), clipTo(m.Reason, maxStateReasonBytes)
	what := blixard.VersionName(v.Number)
	switch m.State {
	case blixard.FunctionActive:
		v.StateCode, v.StateReason, v.Previous = "", "", nil
		tx.event(Event{Kind: "FunctionActive", Function: v.Function, Node: m.Node, Message: what + " is ready"})
	case blixard.FunctionFailed:
		kept := ""
		if v.Previous != nil {
			kept = "; the former code goes on"
		}
		tx.event(Event{Kind: "FunctionFailed", Function: v.Function, Node: m.Node, Warning: true, Message: what + " could not be built: " + clipTo(m.Reason, 600) + kept})
	case blixard.FunctionPending:
		v.Builder, v.BuilderEpoch = "", 0
		tx.event(Event{Kind: "FunctionBuildRetried", Function: v.Function, Node: m.Node, Warning: true, Message: what + ": " + clipTo(m.Reason, 600)})
	default:
		return Outcome{}, blixard.Invalid("state", "known: Pending, Active, Failed", "the state %.40q is not known", string(m.State))
	}
	tx.setVersion(&v)
	return Outcome{Version: v.Seq}, nil
}

// clipTo is clip with another bound.
func clipTo(s string, most int) string {
	if len(s) > most {
		s = s[:most-3] + "..."
	}
	return strings.ToValidUTF8(s, "?")
}
