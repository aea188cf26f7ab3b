package blixard

import (
	"cmp"
	"strings"
)

// Constraint compares a node's label with a value. Both sides are compared as
// quantities when the operator is an ordering (memory>=32GB), else as text.
// "memory", "cpu" and "disk" name the node's allocatable resources unless it
// has labels of these names; "gpu.memory" and the like are labels.
type Constraint struct {
	Key   string
	Op    string // = != > >= < <=
	Value string
}

// Preference is a constraint that makes a node better, not eligible.
type Preference struct {
	Constraint
	Weight int // 1..100
}

func (c Constraint) String() string { return c.Key + c.Op + c.Value }

// constraintOps, longest first, since "=" is part of ">=".
var constraintOps = []string{"!=", ">=", "<=", "==", "=", ">", "<"}

// ParseConstraints reads "storage=nvme,memory>=32GB". An empty text is no
// constraint.
func ParseConstraints(text string) ([]Constraint, error) {
	if strings.TrimSpace(text) == "" {
		return nil, nil
	}
	var out []Constraint
	for part := range strings.SplitSeq(text, ",") {
		part = strings.TrimSpace(part)
		c, err := parseConstraint(part)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

func parseConstraint(part string) (Constraint, error) {
	const hint = `write key=value, key!=value or key>=quantity, such as "storage=nvme,memory>=32GB"`
	at, op := -1, ""
	for _, o := range constraintOps {
		if i := strings.Index(part, o); i >= 0 && (at < 0 || i < at) {
			at, op = i, o
		}
	}
	if at < 0 {
		return Constraint{}, Invalid("constraint", hint, "constraint %q has no operator", part)
	}
	c := Constraint{Key: strings.TrimSpace(part[:at]), Op: op, Value: strings.TrimSpace(part[at+len(op):])}
	if c.Op == "==" {
		c.Op = "="
	}
	return c, c.Check()
}

// Check tells what is wrong with the constraint, nil if nothing.
func (c Constraint) Check() error {
	const hint = `write key=value, key!=value or key>=quantity, such as "storage=nvme,memory>=32GB"`
	if err := CheckLabelKey(c.Key); err != nil {
		return Invalid("constraint", hint, "constraint %q: %v", c.String(), err)
	}
	switch c.Op {
	case "=", "!=":
		return CheckLabelValue(c.Value)
	case ">", ">=", "<", "<=":
		if _, err := ParseQuantity(c.Value); err != nil {
			return Invalid("constraint", hint, "constraint %q: %v", c.String(), err)
		}
		return nil
	default:
		return Invalid("constraint", hint, "constraint %q has no known operator", c.String())
	}
}

// Holds tells whether the constraint holds on a node.
func (c Constraint) Holds(n *Node) bool {
	have, ok := n.Label(c.Key)
	if !ok {
		if c.Key == "hypervisor" {
			found := false
			for _, h := range n.Hypervisors {
				found = found || h == c.Value
			}
			return c.Op == "=" && found || c.Op == "!=" && !found
		}
		q, known := n.resource(c.Key)
		if !known {
			return c.Op == "!="
		}
		want, err := ParseQuantity(c.Value)
		return err == nil && compares(c.Op, cmp.Compare(q, want))
	}
	switch c.Op {
	case "=":
		return have == c.Value
	case "!=":
		return have != c.Value
	}
	q, err := ParseQuantity(have)
	if err != nil {
		return false
	}
	want, err := ParseQuantity(c.Value)
	return err == nil && compares(c.Op, cmp.Compare(q, want))
}

// resource is a node's allocatable amount as a quantity: bytes or cores.
func (n *Node) resource(key string) (Quantity, bool) {
	free := n.Allocatable()
	switch key {
	case "memory":
		return Quantity(free.MemoryMiB) << 20 * 1000, true
	case "disk":
		return Quantity(free.DiskMiB) << 20 * 1000, true
	case "cpu", "cpus", "vcpus":
		return Quantity(free.MilliCPU), true
	}
	return 0, false
}

func compares(op string, c int) bool {
	switch op {
	case "=":
		return c == 0
	case "!=":
		return c != 0
	case ">":
		return c > 0
	case ">=":
		return c >= 0
	case "<":
		return c < 0
	case "<=":
		return c <= 0
	}
	return false
}
