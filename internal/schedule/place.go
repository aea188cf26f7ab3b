package schedule

import (
	"slices"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/assert"
	"github.com/blixard/blixard/internal/state"
)

// Find returns the best node for a request, false if none fits. Nothing is
// booked.
func (x *Index) Find(r Request) (Placement, bool) {
	if n, pinned := x.pinned(r.Spec); pinned {
		return x.findAmong(r, n)
	}
	if len(r.Spec.AffinityVMs) > 0 {
		return x.findAmong(r, x.beside(r.Spec.AffinityVMs[0]))
	}
	s := x.search(r, x.class(r.Spec))
	for v := range s.c.trees {
		s.offset, s.inValue = 0, 0
		if r.Spec.SpreadAcross != "" {
			s.inValue = x.spread.of(v)
			s.offset = s.inValue * perSpreadValue
		}
		s.visit(&s.c.trees[v], 1)
	}
	return s.answer()
}

// Place is Find, and books what it found as this incarnation.
func (x *Index) Place(r Request, ordinal int, generation uint64) (Placement, bool) {
	p, ok := x.Find(r)
	if ok {
		x.Assume(r.VM, r.Spec, ordinal, generation, p.Node)
	}
	return p, ok
}

// FindWithout is Find as if one incarnation of the VM had ended.
func (x *Index) FindWithout(r Request, ordinal int, generation uint64) (Placement, bool) {
	h := x.release(r.VM, ordinal, generation)
	p, ok := x.Find(r)
	if h != nil {
		x.Assume(r.VM, h.spec, ordinal, generation, x.names[h.node])
	}
	return p, ok
}

// pinned returns the only node that a constraint on the name leaves.
func (x *Index) pinned(s *blixard.VMSpec) ([]int32, bool) {
	for i := range s.Constraints {
		if c := &s.Constraints[i]; c.Op == "=" && (c.Key == "node" || c.Key == "name") {
			if n, ok := x.number[blixard.NodeName(c.Value)]; ok {
				return []int32{n}, true
			}
			return nil, true
		}
	}
	return nil, false
}

// beside returns the nodes that hold an instance of a VM.
func (x *Index) beside(vm blixard.VMName) []int32 {
	var out []int32
	for i := range x.held[vm] {
		out = append(out, x.held[vm][i].node)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// findAmong asks a few nodes one by one.
func (x *Index) findAmong(r Request, among []int32) (Placement, bool) {
	c := &class{spec: r.Spec}
	s := search{x: x, r: r, c: c, best: -1, avoid: x.numbers(r.Avoid)}
	inValue := map[string]int64{}
	if r.Spec.SpreadAcross != "" {
		list := x.held[r.VM]
		for i := range list {
			inValue[x.labelOf(c, list[i].node)]++
		}
	}
	for _, n := range among {
		row := x.nodes[n]
		if row == nil {
			continue
		}
		q := question{Case: state.Case{Node: row, Spec: r.Spec, Usage: x.usage[n], Held: x}}
		if !q.Fits(state.ScopeNode) || !q.Fits(state.ScopeUsage) || !q.Fits(state.ScopeHeld) {
			continue
		}
		q.inValue = inValue[x.labelOf(c, n)]
		s.fill(&q, n)
		total := q.points(state.ScopeNode) + q.points(state.ScopeUsage) + q.points(state.ScopeHeld)
		if s.beats(total, n) {
			s.best, s.total = n, total
		}
	}
	return s.answer()
}

// search is one walk over the tournaments of a class. The winner of a tree is
// the best of it unless something about the VM speaks against that very node;
// only then the walk goes down. What the VM adds to a node's points is never
// positive, so a winner's points bound those of its tree.
type search struct {
	x       *Index
	r       Request
	c       *class
	avoid   []int32
	offset  int64 // what all nodes of the tree lose by its value
	inValue int64
	best    int32
	total   int64
}

func (x *Index) search(r Request, c *class) *search {
	s := &search{x: x, r: r, c: c, best: -1, avoid: x.numbers(r.Avoid)}
	x.stamp++
	if x.stamp == 0 { // after 2^32 searches
		clear(x.memoStamp)
		x.stamp = 1
	}
	if r.Spec.SpreadAcross != "" {
		x.spread.count(x, r.VM, c)
	}
	return s
}

func (x *Index) numbers(names []blixard.NodeName) []int32 {
	var out []int32
	for _, name := range names {
		if n, ok := x.number[name]; ok {
			out = append(out, n)
		}
	}
	return out
}

func (s *search) beats(total int64, n int32) bool {
	return s.best < 0 || total > s.total || total == s.total && s.x.names[n] < s.x.names[s.best]
}

func (s *search) visit(t *tree, k int) {
	w := t.win[k]
	if w < 0 || s.c.base[w] == none {
		return
	}
	bound := s.c.base[w] + s.offset
	if !s.beats(bound, w) {
		return
	}
	total := s.exact(w)
	if total != none && s.beats(total, w) {
		s.best, s.total = w, total
	}
	if total == bound || k >= t.size {
		return
	}
	left, right := 2*k, 2*k+1
	if t.win[left] == w { // the other half may hold a node nothing speaks against
		left, right = right, left
	}
	s.visit(t, left)
	s.visit(t, right)
}

// exact is a node's points with all that depends on the VM, none if it does
// not fit.
func (s *search) exact(n int32) int64 {
	x := s.x
	if x.memoStamp[n] == x.stamp {
		return x.memoTotal[n]
	}
	total := int64(none)
	q := &x.q
	*q = question{Case: state.Case{Node: x.nodes[n], Spec: s.r.Spec, Usage: x.usage[n], Held: x}, inValue: s.inValue}
	if q.Fits(state.ScopeHeld) {
		s.fill(q, n)
		more := q.points(state.ScopeHeld)
		assert.True(more <= s.offset, "a score that depends on the VM is %d, above %d", more, s.offset)
		total = s.c.base[n] + more
	}
	x.memoStamp[n], x.memoTotal[n] = x.stamp, total
	return total
}

func (s *search) fill(q *question, n int32) {
	q.onNode = int64(s.x.onNode[vmNode{s.r.VM, n}])
	q.avoid = slices.Contains(s.avoid, n)
}

func (s *search) answer() (Placement, bool) {
	if s.best < 0 {
		return Placement{}, false
	}
	row := s.x.nodes[s.best]
	return Placement{Node: row.Name, Epoch: row.Epoch, Score: s.total}, true
}

// spreadCount is how many instances the VM that was asked for last has in each
// tree of its class; it is kept while requests for it follow each other.
type spreadCount struct {
	vm    blixard.VMName
	c     *class
	built uint64 // class.built when it was counted
	n     []int64
}

func (k *spreadCount) of(v int) int64 { return k.n[v] }

func (k *spreadCount) count(x *Index, vm blixard.VMName, c *class) {
	if k.vm == vm && k.c == c && k.built == c.built {
		return
	}
	k.vm, k.c, k.built = vm, c, c.built
	k.n = append(k.n[:0], make([]int64, len(c.trees))...)
	list := x.held[vm]
	for i := range list {
		k.n[c.value[list[i].node]]++
	}
}

// booked keeps the count when something of the VM is booked.
func (k *spreadCount) booked(vm blixard.VMName, node, sign int32) {
	if k.c == nil || k.vm != vm {
		return
	}
	if k.built != k.c.built || int(node) >= len(k.c.value) {
		k.c = nil // counted by trees that are no more
		return
	}
	k.n[k.c.value[node]] += int64(sign)
}
