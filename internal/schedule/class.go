package schedule

import (
	"math"
	"strconv"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// none is the base of a node that does not fit.
const none = math.MinInt64

// maxClassEntries bounds what remembered classes take: about 24 bytes each.
const maxClassEntries = 4 << 20

// classKey is the part of a spec that filters and scores below ScopeHeld look
// at: requests with equal keys share one tournament.
type classKey struct {
	needs      blixard.Resources
	binpack    bool
	hypervisor string
	spread     string
	rest       string // constraints and preferences
}

func keyFor(s *blixard.VMSpec) classKey {
	k := classKey{needs: s.Needs(), binpack: s.Strategy == "binpack", hypervisor: s.Hypervisor, spread: s.SpreadAcross}
	if len(s.Constraints)+len(s.Preferences) > 0 {
		var b strings.Builder
		for i := range s.Constraints {
			b.WriteString(s.Constraints[i].String())
			b.WriteByte(0)
		}
		for i := range s.Preferences {
			b.WriteByte(1)
			b.WriteString(s.Preferences[i].String())
			b.WriteByte(0)
			b.WriteString(strconv.Itoa(s.Preferences[i].Weight))
			b.WriteByte(0)
		}
		k.rest = b.String()
	}
	return k
}

// class is the standing of all nodes for requests with one key: their points
// without what depends on the VM, in one tournament for each value of the
// label to spread over.
type class struct {
	spec    *blixard.VMSpec // any spec with the key
	seen    uint64          // changes taken in
	built   uint64          // number of the build, for what is counted by tree
	used    uint64          // Index.clock when last asked
	static  []int64         // points of ScopeNode, none if a filter of ScopeNode objects
	base    []int64         // static and points of ScopeUsage, none if the node does not fit
	value   []int32         // number of the tree the node is in
	leaf    []int32         // its leaf there
	trees   []tree
	labels  []string // the value each tree stands for
	refused cachedRefusal
}

// tree is a tournament: win[1] is the best node, win[k] the better one of
// win[2k] and win[2k+1], and the leaves win[size:] are the nodes, -1 for none.
type tree struct {
	size int
	win  []int32
}

// class returns the up-to-date class of a spec.
func (x *Index) class(s *blixard.VMSpec) *class {
	key := keyFor(s)
	c := x.classes[key]
	if c == nil {
		x.makeRoom()
		c = &class{spec: s}
		x.classes[key] = c
	}
	x.clock++
	c.used = x.clock
	x.refresh(c)
	return c
}

// makeRoom forgets the class that was not asked for the longest.
func (x *Index) makeRoom() {
	if limit := max(maxClassEntries/(len(x.names)+1), 16); len(x.classes) < min(limit, 4096) {
		return
	}
	var oldest classKey
	used := uint64(math.MaxUint64)
	//order:any the minimum of numbers that are all different
	for k, c := range x.classes {
		if c.used < used {
			oldest, used = k, c.used
		}
	}
	delete(x.classes, oldest)
}

// refresh takes in the changes since the class was last asked.
func (x *Index) refresh(c *class) {
	now := x.changes()
	if len(c.base) != len(x.names) || c.seen < x.trimmed || now-c.seen > uint64(len(x.names)) {
		x.build(c)
		return
	}
	last := int32(math.MinInt32)
	for _, change := range x.journal[c.seen-x.trimmed:] {
		n := change
		if n == last {
			continue // the usage as it is now was taken in
		}
		last = n
		if n < 0 {
			n = ^n
			if x.valueDiffers(c, n) {
				x.build(c)
				return
			}
			c.static[n] = x.static(c, n)
		}
		if base := x.base(c, n); base != c.base[n] {
			c.base[n] = base
			x.replay(c, n)
		}
	}
	c.seen = now
}

// build makes a class from nothing.
func (x *Index) build(c *class) {
	n := len(x.names)
	c.static, c.base, c.value, c.leaf = make([]int64, n), make([]int64, n), make([]int32, n), make([]int32, n)
	c.labels = nil
	values := map[string]int32{}
	var sizes []int32
	for k := range x.names {
		label := x.labelOf(c, int32(k))
		v, ok := values[label]
		if !ok {
			v = int32(len(sizes))
			values[label] = v
			sizes, c.labels = append(sizes, 0), append(c.labels, label)
		}
		c.value[k], c.leaf[k] = v, sizes[v]
		sizes[v]++
		c.static[k] = x.static(c, int32(k))
		c.base[k] = x.base(c, int32(k))
	}
	c.trees = make([]tree, len(sizes))
	for v, members := range sizes {
		size := 1
		for size < int(members) {
			size *= 2
		}
		t := tree{size: size, win: make([]int32, 2*size)}
		for k := range t.win {
			t.win[k] = -1
		}
		c.trees[v] = t
	}
	for k := range x.names {
		t := &c.trees[c.value[k]]
		t.win[t.size+int(c.leaf[k])] = int32(k)
	}
	for v := range c.trees {
		t := &c.trees[v]
		for k := t.size - 1; k > 0; k-- {
			t.win[k] = x.winner(c, t.win[2*k], t.win[2*k+1])
		}
	}
	c.seen = x.changes()
	x.builds++
	c.built = x.builds
}

// labelOf is the value of the label to spread over; nodes without it share one.
func (x *Index) labelOf(c *class, n int32) string {
	if c.spec.SpreadAcross == "" || x.nodes[n] == nil {
		return ""
	}
	return spreadValue(x.nodes[n], c.spec.SpreadAcross)
}

func spreadValue(n *blixard.Node, label string) string {
	v, ok := n.Label(label)
	if !ok {
		return ""
	}
	return "=" + v
}

// valueDiffers tells whether a node whose row changed belongs into another tree.
func (x *Index) valueDiffers(c *class, n int32) bool {
	if c.spec.SpreadAcross == "" {
		return false
	}
	return x.labelOf(c, n) != c.labels[c.value[n]]
}

func (x *Index) static(c *class, n int32) int64 {
	row := x.nodes[n]
	if row == nil {
		return none
	}
	q := &x.q
	*q = question{Case: state.Case{Node: row, Spec: c.spec}}
	if !q.Fits(state.ScopeNode) {
		return none
	}
	return q.points(state.ScopeNode)
}

func (x *Index) base(c *class, n int32) int64 {
	if c.static[n] == none || x.nodes[n] == nil { // that the row is gone may come later in the journal
		return none
	}
	q := &x.q // what is left in it of the last question is not looked at
	q.Node, q.Spec, q.Usage = x.nodes[n], c.spec, x.usage[n]
	if !q.Fits(state.ScopeUsage) {
		return none
	}
	return c.static[n] + q.points(state.ScopeUsage)
}

// winner is the better of two nodes: more points, then the lower name.
func (x *Index) winner(c *class, a, b int32) int32 {
	switch {
	case b < 0:
		return a
	case a < 0:
		return b
	case c.base[a] != c.base[b]:
		if c.base[a] > c.base[b] {
			return a
		}
		return b
	case c.base[a] == none || x.names[a] <= x.names[b]:
		return a
	}
	return b
}

// replay holds the rounds of a tournament again that a node takes part in.
func (x *Index) replay(c *class, n int32) {
	t := &c.trees[c.value[n]]
	for k := (t.size + int(c.leaf[n])) / 2; k > 0; k /= 2 {
		w := x.winner(c, t.win[2*k], t.win[2*k+1])
		if w == t.win[k] && w != n {
			return // the node lost here before and does now
		}
		t.win[k] = w
	}
}
