package state

import (
	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/wire"
)

// FunctionsLevel is the feature level from which a cluster knows functions,
// asynchronous events and access keys.
const FunctionsLevel = 2

// levelOf is the feature level that a command needs. A cluster of mixed releases
// works at the lowest level of its nodes: what an old one does not know must not
// be in the log, since it would refuse what the others accept.
func levelOf(cmd Command) int {
	switch k := cmd.kind(); {
	case k == batchKind:
		level := 0
		if b, ok := cmd.(*Batch); ok {
			for _, c := range b.Commands {
				if c.kind() != batchKind {
					level = max(level, levelOf(c))
				}
			}
		}
		return level
	case k >= firstFunctionKind && k <= lastFunctionKind:
		return FunctionsLevel
	}
	return 0 // known to all
}

const (
	firstFunctionKind = 40
	lastFunctionKind  = 59
)

// Allows refuses a command that not all nodes of the cluster know yet. It is
// asked before proposing; Apply asks it again.
func (v *View) Allows(cmd Command) *blixard.Error { return v.t.allows(cmd) }

func (t *tables) allows(cmd Command) *blixard.Error {
	need := levelOf(cmd)
	if need <= t.cluster.FeatureLevel {
		return nil
	}
	return &blixard.Error{
		Code: blixard.CodeRefused, Message: "the cluster works at feature level " + itoa(t.cluster.FeatureLevel) + ", and this needs " + itoa(need),
		Hint: "upgrade every node: `blixard cluster list` shows their releases; the level rises by itself",
	}
}

// LevelGraceMS is how long a node that is lost still counts for the feature level:
// it may only be restarting. One that comes back later and knows less than the
// cluster uses by then has to be upgraded before it can go on.
const LevelGraceMS = 600_000

// CountsForLevel tells whether the cluster waits for a node to know more.
func CountsForLevel(n *blixard.Node, nowMS int64) bool {
	return n.State != blixard.NodeLost || nowMS-n.LostMS < LevelGraceMS
}

// RaiseLevel lets the cluster use what all its nodes know. Proposed by the
// leader when each has reported that level; it never goes down.
type RaiseLevel struct {
	Level int
}

func (m *RaiseLevel) kind() uint8 { return 31 }

func (m *RaiseLevel) code(c *wire.Coder) { wire.Int(c, &m.Level) }

func (m *RaiseLevel) apply(tx *txn) (Outcome, *blixard.Error) {
	c := &tx.t.cluster
	if c.ID == "" || m.Level <= c.FeatureLevel {
		return Outcome{Noop: true}, nil
	}
	if m.Level > maxLevel {
		return Outcome{}, blixard.Invalid("level", "", "there is no feature level %d", m.Level)
	}
	var behind *blixard.Node
	tx.t.nodes.Scan(func(_ blixard.NodeName, n *blixard.Node) bool {
		if n.FeatureLevel < m.Level && CountsForLevel(n, tx.nowMS) {
			behind = n
		}
		return behind == nil
	})
	if behind != nil {
		return Outcome{}, blixard.Errorf(blixard.CodeConflict, "the node %s knows feature level %d only", behind.Name, behind.FeatureLevel)
	}
	c.FeatureLevel = m.Level
	tx.event(Event{Kind: "FeatureLevel", Message: "the cluster works at feature level " + itoa(m.Level)})
	return Outcome{Version: tx.index}, nil
}

// maxLevel bounds foreign numbers; it is the same in all releases.
const maxLevel = 1_000_000
