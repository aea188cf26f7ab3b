// Package schedule decides which node takes an instance.
//
// A node must pass every filter of state.Case; applying the placement asks the
// same filters again. Of the nodes that pass, the one with the most points of
// the table scores wins, and of equal ones the first by name, so that the
// decision depends on nothing but the state. All arithmetic is on integers.
//
// An Index is the fast way: it keeps what is held of each node, the changes it
// was told of and its own decisions that are not applied yet, and per class of
// request a tournament over the nodes that is brought up to date for the nodes
// that changed only. Explain is the slow way, straight from a View, for people
// and for tests: both find the same score.
//
// Ownership: an Index belongs to one caller, who reads and changes it in turn.
// It is volatile: it can be built again from a View at any time, and nothing
// replicated depends on it.
//
// Invariants: an Index never returns a node that a filter objects to; if it
// returns none, every node objects; its score is that of an exhaustive search.
package schedule

import "github.com/blixard/blixard"

// Request asks for a node for one more instance of a VM.
type Request struct {
	VM   blixard.VMName
	Spec *blixard.VMSpec
	// Avoid are nodes that are taken only when no other fits.
	Avoid []blixard.NodeName
}

// Placement is the answer to a Request.
type Placement struct {
	Node  blixard.NodeName
	Epoch uint64 // of the node's row
	Score int64
}

// Points are what one line of the table of scores gives a node.
type Points struct {
	Name   string
	Points int64
}
