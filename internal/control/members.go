package control

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// MemberKind is what is to be done to the raft configuration.
type MemberKind uint8

// The changes of the raft configuration.
const (
	MemberNone MemberKind = iota
	MemberAddLearner
	MemberPromote
	MemberDemote
	MemberRemove
	MemberTransferLeader // lead no more; RaftID is who should
)

func (k MemberKind) String() string {
	return [...]string{"none", "add-learner", "promote", "demote", "remove", "transfer-leader"}[k]
}

// MemberChange is one change of the raft configuration.
type MemberChange struct {
	Kind   MemberKind
	RaftID uint64
}

// ConfState is the raft configuration that is in force.
type ConfState struct {
	Voters   []uint64
	Learners []uint64
}

// Progress is how far a member's log has come, as the leader knows it.
type Progress struct {
	RaftID uint64
	Match  uint64
	Active bool // heard from lately
	// LostForMS is how long its node has been lost, by the clock of the leader that
	// asks and as far as it knows: wall clocks may jump.
	LostForMS int64
}

// MembersInput is what Members looks at.
type MembersInput struct {
	View      *state.View
	Conf      ConfState
	Progress  []Progress
	Committed uint64
	Self      uint64 // the leader
	MaxVoters int    // 0: 5
	// LostMS is how long a voter is lost until another takes its place; 0: a
	// minute.
	LostMS int64
}

// caughtUp is how many entries a learner may lack to become a voter.
const caughtUp = 1000

// Members decides the next change of the raft configuration, one at a time:
// propose it, and ask again when it is applied.
//
//   - A member whose node was removed is removed; the leader itself hands over
//     leadership first. A voter among an odd number stays until a learner has
//     taken its place, if one can: until then one less would bear no more.
//   - A node that is no member becomes a learner.
//   - Learners are promoted until there are as many voters as there should be:
//     an odd number, at most MaxVoters and at most the nodes that can be. With
//     two nodes that is one: with two voters the loss of either would stop
//     writes, with one only the loss of that one, and the other keeps a copy.
//     A witness makes three. Zones with the fewest voters come first, then the
//     oldest node.
//   - A voter that is lost for good keeps its vote until a learner has taken
//     its place; then it is made a learner.
//
// No change is made after which the voters heard from are not a majority.
func Members(in MembersInput) (MemberChange, string) {
	m := newMembership(in)
	if !m.quorum(m.voters) {
		return MemberChange{}, "the voters heard from are no majority"
	}
	for _, rule := range []func() (MemberChange, string){m.remove, m.add, m.promote, m.demote} {
		if c, why := rule(); c.Kind != MemberNone {
			return c, why
		}
	}
	return MemberChange{}, ""
}

// membership is the input in a handier form.
type membership struct {
	MembersInput
	rows     map[uint64]*blixard.Node
	progress map[uint64]Progress
	voters   []uint64
	learners []uint64
	nodes    []*blixard.Node // by raft ID
}

func newMembership(in MembersInput) *membership {
	in.MaxVoters, in.LostMS = cmp.Or(in.MaxVoters, 5), cmp.Or(in.LostMS, 60_000)
	m := &membership{MembersInput: in, rows: map[uint64]*blixard.Node{}, progress: map[uint64]Progress{}}
	in.View.Nodes(func(n *blixard.Node) bool {
		if n.Simulated {
			return true // has no replica
		}
		m.rows[n.RaftID] = n
		m.nodes = append(m.nodes, n)
		return true
	})
	slices.SortFunc(m.nodes, func(a, b *blixard.Node) int { return cmp.Compare(a.RaftID, b.RaftID) })
	for _, p := range in.Progress {
		m.progress[p.RaftID] = p
	}
	m.voters, m.learners = slices.Sorted(slices.Values(in.Conf.Voters)), slices.Sorted(slices.Values(in.Conf.Learners))
	return m
}

func (m *membership) active(id uint64) bool { return id == m.Self || m.progress[id].Active }

// quorum tells whether the voters heard from are a majority.
func (m *membership) quorum(voters []uint64) bool {
	n := 0
	for _, id := range voters {
		if m.active(id) {
			n++
		}
	}
	return n > len(voters)/2
}

func without(ids []uint64, id uint64) []uint64 {
	return slices.DeleteFunc(slices.Clone(ids), func(x uint64) bool { return x == id })
}

// goneFor tells whether a node is lost for so long that it is not counted on.
func (m *membership) gone(id uint64) bool {
	n := m.rows[id]
	return n == nil || n.State == blixard.NodeLost && !m.active(id) && m.progress[id].LostForMS >= m.LostMS
}

// remove takes out members whose nodes were removed.
func (m *membership) remove() (MemberChange, string) {
	for _, id := range m.learners {
		if m.rows[id] == nil {
			return MemberChange{MemberRemove, id}, fmt.Sprintf("member %x has no node any more", id)
		}
	}
	for _, id := range m.voters {
		if m.rows[id] == nil && id != m.Self && m.quorum(without(m.voters, id)) && !m.standIn() {
			return MemberChange{MemberRemove, id}, fmt.Sprintf("member %x has no node any more", id)
		}
	}
	if m.rows[m.Self] == nil && slices.Contains(m.voters, m.Self) {
		return m.handOver()
	}
	return MemberChange{}, ""
}

// standIn tells whether a learner will take the place of a voter whose node was
// removed. Going first, the voter would leave an even number: were another one
// lost just then, the rest would be no majority, whatever learners there are.
func (m *membership) standIn() bool {
	return len(m.voters)%2 == 1 && len(m.counted()) < m.target() && slices.ContainsFunc(m.learners, func(id uint64) bool {
		return m.rows[id] != nil && m.rows[id].State == blixard.NodeReady
	})
}

// handOver finds the voter that should lead instead of this one.
func (m *membership) handOver() (MemberChange, string) {
	best := uint64(0)
	for _, id := range m.voters {
		if id != m.Self && m.rows[id] != nil && m.active(id) && (best == 0 || m.progress[id].Match > m.progress[best].Match) {
			best = id
		}
	}
	if best == 0 {
		return MemberChange{}, ""
	}
	return MemberChange{MemberTransferLeader, best}, "the leader's node was removed"
}

// add makes nodes members.
func (m *membership) add() (MemberChange, string) {
	for _, n := range m.nodes {
		if n.State != blixard.NodeLost && !slices.Contains(m.voters, n.RaftID) && !slices.Contains(m.learners, n.RaftID) {
			return MemberChange{MemberAddLearner, n.RaftID}, "the node " + string(n.Name) + " joined"
		}
	}
	return MemberChange{}, ""
}

// target is how many voters there should be.
func (m *membership) target() int {
	usable := 0
	for _, id := range m.voters {
		if m.rows[id] != nil {
			usable++
		}
	}
	for _, id := range m.learners {
		if !m.gone(id) {
			usable++
		}
	}
	n := min(m.MaxVoters, usable)
	if n%2 == 0 {
		n--
	}
	return max(n, 1)
}

// counted are the voters that are counted on.
func (m *membership) counted() []uint64 {
	return slices.DeleteFunc(slices.Clone(m.voters), m.gone)
}

// ready are the learners that can be promoted, the best first.
func (m *membership) ready() []uint64 {
	var out []uint64
	for _, id := range m.learners {
		n, p := m.rows[id], m.progress[id]
		if n != nil && n.State == blixard.NodeReady && p.Active && p.Match+caughtUp >= m.Committed {
			out = append(out, id)
		}
	}
	inZone := m.perZone(m.counted())
	slices.SortFunc(out, func(a, b uint64) int {
		x, y := m.rows[a], m.rows[b]
		return cmp.Or(cmp.Compare(inZone[x.Zone], inZone[y.Zone]), cmp.Compare(x.JoinedMS, y.JoinedMS), cmp.Compare(a, b))
	})
	return out
}

func (m *membership) perZone(ids []uint64) map[string]int {
	out := map[string]int{}
	for _, id := range ids {
		if n := m.rows[id]; n != nil {
			out[n.Zone]++
		}
	}
	return out
}

// promote makes a learner a voter. From an odd number it takes two to get to
// the next, unless one only takes the place of a voter that is gone.
func (m *membership) promote() (MemberChange, string) {
	counted, ready := len(m.counted()), m.ready()
	if counted >= m.target() || len(ready) == 0 {
		return MemberChange{}, ""
	}
	if replaces := counted < len(m.voters); !replaces && counted%2 == 1 && len(ready) < 2 {
		return MemberChange{}, ""
	}
	id := ready[0]
	if !m.quorum(append(slices.Clone(m.voters), id)) {
		return MemberChange{}, ""
	}
	return MemberChange{MemberPromote, id}, fmt.Sprintf("%d voters of %d", counted, m.target())
}

// demote makes a voter a learner: one that is gone and has been replaced, or
// one too many, from the zone that has the most, the youngest first.
func (m *membership) demote() (MemberChange, string) {
	if len(m.voters) <= m.target() {
		return MemberChange{}, ""
	}
	inZone := m.perZone(m.voters)
	candidates := without(m.voters, m.Self)
	slices.SortFunc(candidates, func(a, b uint64) int {
		if x, y := m.gone(a), m.gone(b); x != y {
			if x {
				return -1
			}
			return 1
		}
		x, y := m.rows[a], m.rows[b]
		if x == nil || y == nil {
			return cmp.Compare(a, b)
		}
		return cmp.Or(cmp.Compare(inZone[y.Zone], inZone[x.Zone]), cmp.Compare(y.JoinedMS, x.JoinedMS), cmp.Compare(b, a))
	})
	for _, id := range candidates {
		if m.rows[id] == nil || !m.quorum(without(m.voters, id)) {
			continue
		}
		why := "there are more voters than needed"
		if m.gone(id) {
			why = "the voter " + string(m.rows[id].Name) + " is lost and was replaced"
		}
		return MemberChange{MemberDemote, id}, why
	}
	return MemberChange{}, ""
}
