package control

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// raftGroup is a raft configuration that Members changes.
type raftGroup struct {
	m      *sim
	conf   ConfState
	self   uint64
	dead   map[uint64]bool
	behind map[uint64]bool
	max    int
}

func (g *raftGroup) input() MembersInput {
	in := MembersInput{View: g.m.view(), Conf: g.conf, Committed: 5000, Self: g.self, MaxVoters: g.max}
	for _, id := range append(slices.Clone(g.conf.Voters), g.conf.Learners...) {
		p := Progress{RaftID: id, Match: 5000, Active: !g.dead[id]}
		if g.behind[id] {
			p.Match = 10
		}
		if n := g.m.view().NodeByRaftID(id); n != nil && n.State == blixard.NodeLost {
			p.LostForMS = g.m.now - n.LostMS
		}
		in.Progress = append(in.Progress, p)
	}
	return in
}

func (g *raftGroup) alive(ids []uint64) (n int) {
	for _, id := range ids {
		if !g.dead[id] {
			n++
		}
	}
	return n
}

func (g *raftGroup) do(c MemberChange) {
	switch c.Kind {
	case MemberAddLearner:
		g.conf.Learners = append(g.conf.Learners, c.RaftID)
	case MemberPromote:
		g.conf.Learners, g.conf.Voters = without(g.conf.Learners, c.RaftID), append(g.conf.Voters, c.RaftID)
	case MemberDemote:
		g.conf.Voters, g.conf.Learners = without(g.conf.Voters, c.RaftID), append(g.conf.Learners, c.RaftID)
	case MemberRemove:
		g.conf.Voters, g.conf.Learners = without(g.conf.Voters, c.RaftID), without(g.conf.Learners, c.RaftID)
	case MemberTransferLeader:
		g.self = c.RaftID
	case MemberNone:
	}
}

// settle lets Members change until it has nothing more to change, and checks
// every step.
func (g *raftGroup) settle(fail func(string, ...any)) (steps []string) {
	for range 100 {
		c, why := Members(g.input())
		if c.Kind == MemberNone {
			return steps
		}
		if why == "" {
			fail("%v has no reason", c)
		}
		had := g.alive(g.conf.Voters) > len(g.conf.Voters)/2
		g.do(c)
		if has := g.alive(g.conf.Voters) > len(g.conf.Voters)/2; !had || !has {
			fail("%v of %x (%s) leaves voters %v of which %d live", c.Kind, c.RaftID, why, g.conf.Voters, g.alive(g.conf.Voters))
		}
		if g.dead[g.self] || !slices.Contains(g.conf.Voters, g.self) {
			fail("%v of %x leaves the leader %x without a vote", c.Kind, c.RaftID, g.self)
		}
		steps = append(steps, fmt.Sprintf("%s %d", c.Kind, c.RaftID))
	}
	fail("the configuration does not settle: %v", steps)
	return nil
}

// TestMembersKeepQuorum: no change of the configuration loses the majority or
// the leader's vote; changes come to an end; and with every node alive there is
// the right number of voters.
func TestMembersKeepQuorum(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		g := &raftGroup{m: newSim(t.Fatalf), self: 1, dead: map[uint64]bool{}, behind: map[uint64]bool{}, max: rapid.SampledFrom([]int{0, 1, 3, 5}).Draw(t, "max")}
		g.m.addNode("n1", machine{cores: 4, memoryMiB: 4096, zone: "x"})
		g.conf.Voters = []uint64{1}
		next := 2
		for range rapid.IntRange(1, 20).Draw(t, "steps") {
			ids := append(slices.Clone(g.conf.Voters), g.conf.Learners...)
			id := rapid.SampledFrom(ids).Draw(t, "id")
			n := g.m.view().NodeByRaftID(id)
			switch rapid.SampledFrom([]string{"add", "add", "add", "die", "live", "lag", "remove", "time"}).Draw(t, "do") {
			case "add":
				if g.m.view().NodeCount() < 9 {
					g.m.addNode(blixard.NodeName(fmt.Sprintf("n%d", next)), machine{cores: 4, memoryMiB: 4096, zone: rapid.SampledFrom([]string{"x", "y", "z"}).Draw(t, "zone")})
					next++
				}
			case "die":
				if id != g.self && n != nil {
					g.dead[id] = true
					g.m.apply("leader", &state.LoseNode{Name: n.Name, RaftID: id, Epoch: n.Epoch})
				}
			case "live":
				g.dead[id] = false
				if n != nil {
					g.m.apply("leader", &state.ReviveNode{Name: n.Name, RaftID: id})
				}
			case "lag":
				g.behind[id] = rapid.Bool().Draw(t, "behind")
			case "remove":
				if n != nil {
					g.m.apply("user", &state.RemoveNode{Name: n.Name, Force: true})
				}
			case "time":
				g.m.now += 61_000
			}
			if rapid.Bool().Draw(t, "settle") {
				g.settle(t.Fatalf)
			}
		}
		g.behind = map[uint64]bool{}
		for _, id := range append(slices.Clone(g.conf.Voters), g.conf.Learners...) {
			g.dead[id] = false
			if n := g.m.view().NodeByRaftID(id); n != nil {
				g.m.apply("leader", &state.ReviveNode{Name: n.Name, RaftID: id})
			}
		}
		g.settle(t.Fatalf)
		want := min(g.m.view().NodeCount(), max(g.max, 1))
		if g.max == 0 {
			want = min(g.m.view().NodeCount(), 5)
		}
		want -= 1 - want%2
		if len(g.conf.Voters) != max(want, 1) || len(g.conf.Voters)+len(g.conf.Learners) != g.m.view().NodeCount() {
			t.Fatalf("%d nodes, but %v", g.m.view().NodeCount(), g.conf)
		}
	})
}

// TestMembersStory walks a cluster from one node to five and back.
func TestMembersStory(t *testing.T) {
	g := &raftGroup{m: newSim(t.Fatalf), self: 1, dead: map[uint64]bool{}, behind: map[uint64]bool{}, max: 3}
	g.conf.Voters = []uint64{1}
	g.m.addNode("n1", machine{cores: 4, memoryMiB: 4096, zone: "x"})
	expect := func(when string, want ...string) {
		t.Helper()
		if got := g.settle(t.Fatalf); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", when, got, want)
		}
	}
	add := func(name blixard.NodeName, zone string) {
		g.m.addNode(name, machine{cores: 4, memoryMiB: 4096, zone: zone})
	}
	expect("alone")
	add("n2", "x")
	expect("two nodes keep one voter", "add-learner 2")
	add("n3", "y")
	expect("three nodes vote", "add-learner 3", "promote 3", "promote 2")
	add("n4", "z")
	expect("a fourth learns", "add-learner 4")
	g.dead[2] = true
	n2 := g.m.view().Node("n2")
	g.m.apply("leader", &state.LoseNode{Name: "n2", RaftID: 2, Epoch: n2.Epoch})
	expect("a lost voter keeps its vote for a minute")
	g.m.now += 60_000
	expect("then the fourth takes its place", "promote 4", "demote 2")
	g.dead[2] = false
	g.m.apply("leader", &state.ReviveNode{Name: "n2", RaftID: 2})
	expect("the lost one learns when it is back")
	g.m.apply("user", &state.RemoveNode{Name: "n1", Force: true})
	expect("a leader that is removed hands over", "transfer-leader 3", "promote 2", "remove 1")
	g.m.apply("user", &state.RemoveNode{Name: "n4", Force: true})
	expect("two that are left keep one voter", "remove 4", "demote 2")
}

// TestMembersReplaceBeforeRemoval: of three voters and a learner one voter is
// removed. The learner votes before it goes, so that another one may be lost at
// any time; without a learner in touch it goes at once.
func TestMembersReplaceBeforeRemoval(t *testing.T) {
	for _, lost := range []bool{false, true} {
		g := &raftGroup{m: newSim(t.Fatalf), self: 1, dead: map[uint64]bool{}, behind: map[uint64]bool{}, max: 3}
		for _, name := range []blixard.NodeName{"n1", "n2", "n3", "n4"} {
			g.m.addNode(name, machine{cores: 4, memoryMiB: 4096, zone: "x"})
		}
		g.conf.Voters = []uint64{1}
		g.settle(t.Fatalf)
		out, learner := g.conf.Voters[1], g.conf.Learners[0]
		want := []string{fmt.Sprintf("promote %d", learner), fmt.Sprintf("remove %d", out)}
		if lost {
			g.dead[learner] = true
			g.m.apply("leader", &state.LoseNode{Name: g.m.view().NodeByRaftID(learner).Name, RaftID: learner})
			want = want[1:]
		}
		g.m.apply("user", &state.RemoveNode{Name: g.m.view().NodeByRaftID(out).Name, Force: true})
		if !lost {
			g.behind[learner] = true
			if steps := g.settle(t.Fatalf); len(steps) > 0 {
				t.Errorf("while the learner is behind: %q", steps)
			}
			g.behind[learner] = false
		}
		if steps := g.settle(t.Fatalf); !slices.Equal(steps, want) {
			t.Errorf("learner lost %t: %q, want %q", lost, steps, want)
		}
	}
}

// TestMembersReplaceTheLost: of five voters two are lost for good, and one
// learner can take a place. It does, and keeps it.
func TestMembersReplaceTheLost(t *testing.T) {
	g := &raftGroup{m: newSim(t.Fatalf), self: 1, dead: map[uint64]bool{}, behind: map[uint64]bool{}}
	for _, name := range []blixard.NodeName{"n1", "n2", "n3", "n4", "n5", "n6"} {
		g.m.addNode(name, machine{cores: 4, memoryMiB: 4096, zone: "x"})
	}
	g.conf.Voters = []uint64{1}
	g.settle(t.Fatalf)
	for _, id := range g.conf.Voters[1:3] {
		n := g.m.view().NodeByRaftID(id)
		g.dead[id] = true
		g.m.apply("leader", &state.LoseNode{Name: n.Name, RaftID: id, Epoch: n.Epoch})
	}
	g.m.now += 61_000
	steps := g.settle(t.Fatalf)
	if len(steps) != 2 || !strings.HasPrefix(steps[0], "promote") || !strings.HasPrefix(steps[1], "demote") || g.alive(g.conf.Voters) != 4 || len(g.conf.Voters) != 5 {
		t.Errorf("%v leaves the voters %v, of which %d live", steps, g.conf.Voters, g.alive(g.conf.Voters))
	}
}
