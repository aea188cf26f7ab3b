package route

import (
	"cmp"
	"slices"

	"github.com/blixard/blixard"
)

// Candidate is a node as the gateway knows it, for one revision. What a node
// has told may be old: a choice is an offer that the node may refuse.
type Candidate struct {
	Node  blixard.NodeName
	Local bool
	// As the node has told, AgeMS ago; of a node that has told nothing all are 0.
	Warm        int // calls that it would take at once: instance and slot are free
	SlotsFree   int // leased and unused
	Pooled      int
	HasTemplate bool
	AgeMS       int64
	// Fits: it passes the filters; Score, 0 to 1,000, is of those that do.
	Fits  bool
	Score int
	// HasSlots: slots are leased to it, as the view has it.
	HasSlots bool
}

// Choice is a node to offer a call to.
type Choice struct {
	Node              blixard.NodeName
	MayStart, MayWait bool
}

// What a template and a spawned clone are worth beside the score: the first
// saves seconds, the second tens of milliseconds.
const (
	templatePoints = 250
	pooledPoints   = 100
	// reports older than this are not believed.
	staleMS = 3000
)

// Pick orders the offers of one call: a free slot of a warm instance here, then
// elsewhere, by lot among those that have some, then a start on the best node
// that fits, at last waiting on the best. exhausted: the function's slots are all
// leased, so that only who holds some can take the call. chance is any number.
func Pick(candidates []Candidate, exhausted bool, chance uint64) []Choice {
	choices := make([]Choice, 0, 2*len(candidates)+1)
	choices = appendWarm(choices, candidates, chance)
	cold := make([]Candidate, 0, len(candidates))
	for _, c := range candidates {
		if c.Fits && (!exhausted || c.SlotsFree > 0 && c.AgeMS <= staleMS) {
			cold = append(cold, c)
		}
	}
	slices.SortStableFunc(cold, func(a, b Candidate) int {
		return cmp.Or(cmp.Compare(b.points(), a.points()), compareBool(b.Local, a.Local), cmp.Compare(a.Node, b.Node))
	})
	for _, c := range cold {
		choices = append(choices, Choice{Node: c.Node, MayStart: true})
	}
	if len(cold) > 0 {
		return append(choices, Choice{Node: cold[0].Node, MayStart: true, MayWait: true})
	}
	// Slots may have become free that nobody has told of yet.
	for _, c := range candidates {
		if exhausted && c.Fits && (c.HasSlots || c.Local) {
			choices = append(choices, Choice{Node: c.Node, MayStart: true})
		}
	}
	return choices
}

func (c *Candidate) points() int {
	points := c.Score
	if c.HasTemplate {
		points += templatePoints
	}
	if c.Pooled > 0 && c.AgeMS <= staleMS {
		points += pooledPoints
	}
	return points
}

func appendWarm(choices []Choice, candidates []Candidate, chance uint64) []Choice {
	var warm []Candidate
	total := uint64(0)
	for _, c := range candidates {
		switch {
		case c.Warm == 0:
		case c.Local:
			choices = append(choices, Choice{Node: c.Node})
		case c.AgeMS <= staleMS:
			warm = append(warm, c)
			total += uint64(c.Warm)
		}
	}
	if len(warm) == 0 {
		return choices
	}
	slices.SortStableFunc(warm, func(a, b Candidate) int { return cmp.Or(cmp.Compare(b.Warm, a.Warm), cmp.Compare(a.Node, b.Node)) })
	lot := chance % total
	for i, c := range warm {
		if lot < uint64(c.Warm) {
			warm = slices.Insert(slices.Delete(warm, i, i+1), 0, c)
			break
		}
		lot -= uint64(c.Warm)
	}
	for _, c := range warm {
		choices = append(choices, Choice{Node: c.Node})
	}
	return choices
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	default:
		return -1
	}
}

// shareUnit is what a share of an alias is counted in.
const shareUnit = 1_000_000

// PickNumber is the version that answers a call of an alias; chance is any
// number, and spread evenly.
func PickNumber(a *blixard.FunctionAlias, chance uint64) int {
	if chance%shareUnit < uint64(max(a.SecondShare, 0)) {
		return a.Second
	}
	return a.Number
}

// Worst is the refusal to tell the caller when several nodes have refused a
// call: the one that says most about it. It is "" without any.
func Worst(all []Refusal) Refusal {
	worst, rank := Refusal(""), 0
	for _, r := range all {
		if at := slices.Index(worstFirst(), r); at >= 0 && (worst == "" || at < rank) {
			worst, rank = r, at
		}
	}
	return worst
}

// worstFirst is what a caller is told first: what is about the call itself, then
// limits of the function, then of nodes.
func worstFirst() []Refusal {
	return []Refusal{Gone, TimedOut, Late, Superseded, StartFailed, NoSlot, NoMemory, Busy, NoWarm, NoLease, Draining, Unknown, Unreachable}
}

// Refused is the error of a call that no function has answered.
type Refused struct { //nolint:errname // a refusal, as everywhere
	Why Refusal
	// Handed: a guest had the call and may have run it, so that only a caller that
	// asked for at least once may repeat it.
	Handed bool
	// Begun: a part of the answer has gone out.
	Begun bool
	Err   *blixard.Error
}

func (r *Refused) Error() string { return r.Err.Error() }

// Unwrap gives the error for the user.
func (r *Refused) Unwrap() error { return r.Err }

// Again tells whether the call may be offered to another node: no guest has had
// it. That an instance was gone before it had the call is no reason to give up.
func (r *Refused) Again() bool {
	return (r.Why.Elsewhere() || r.Why == Gone) && !r.Handed && !r.Begun
}
