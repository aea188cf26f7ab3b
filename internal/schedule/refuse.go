package schedule

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// Refusal explains why no node takes an instance.
type Refusal struct {
	Summary string // "0/3 nodes fit: 2 too little memory, 1 draining"
	Reasons []Reason
}

// Reason is the first objection of some nodes.
type Reason struct {
	Short   string
	Nodes   int
	Example blixard.NodeName // the first of them by name
}

// cachedRefusal is the refusal of a class when nothing about the VM decided it.
type cachedRefusal struct {
	at      uint64 // Index.changes
	refusal *Refusal
}

// Refuse explains why Find found nothing. It asks every node unless nothing
// changed since it was asked for a request of the same class.
func (x *Index) Refuse(r Request) Refusal {
	s := r.Spec
	shared := s.AntiAffinityGroup == "" && len(s.AffinityVMs) == 0 && len(s.Publish) == 0
	var cache *cachedRefusal
	if shared {
		cache = &x.class(s).refused
		if cache.refusal != nil && cache.at == x.changes() {
			return *cache.refusal
		}
	}
	by := map[string]*Reason{}
	var reasons []*Reason
	members := 0
	for n, row := range x.nodes {
		if row == nil {
			continue
		}
		members++
		c := state.Case{Node: row, Spec: s, Usage: x.usage[n], Held: x}
		short := c.Short()
		why := by[short]
		if why == nil {
			why = &Reason{Short: short, Example: row.Name}
			by[short] = why
			reasons = append(reasons, why)
		}
		why.Nodes++
		why.Example = min(why.Example, row.Name)
	}
	out := summarize(members, reasons)
	if cache != nil {
		*cache = cachedRefusal{at: x.changes(), refusal: &out}
	}
	return out
}

// summarize makes one line of the objections, the most frequent first.
func summarize(members int, reasons []*Reason) Refusal {
	slices.SortFunc(reasons, func(a, b *Reason) int {
		return cmp.Or(cmp.Compare(b.Nodes, a.Nodes), cmp.Compare(a.Short, b.Short))
	})
	fit := 0
	var out Refusal
	var parts []string
	for _, w := range reasons {
		if w.Short == "" {
			fit = w.Nodes
			continue
		}
		out.Reasons = append(out.Reasons, *w)
		if len(parts) < maxParts {
			parts = append(parts, strconv.Itoa(w.Nodes)+" "+w.Short)
		}
	}
	if more := len(out.Reasons) - len(parts); more > 0 {
		parts = append(parts, strconv.Itoa(more)+" more reasons")
	}
	noun := " nodes fit"
	if members == 1 {
		noun = " node fits"
	}
	out.Summary = strconv.Itoa(fit) + "/" + strconv.Itoa(members) + noun
	if len(parts) > 0 {
		out.Summary += ": " + strings.Join(parts, ", ")
	}
	return out
}

// maxParts bounds the reasons in a summary.
const maxParts = 6
