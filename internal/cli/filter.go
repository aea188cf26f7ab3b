package cli

import (
	"cmp"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/blixard/blixard"
)

func writeFilterHelp(w io.Writer) {
	fmt.Fprint(w, `--filter KEY=VALUE shows only what matches. It may be given several times, and
one may hold several conditions with commas between them; all must hold.

KEY is a column of the output, also one that only -o wide shows, in any case, or
the key of a label; "label.KEY" means the label when both exist.

  state=Running        equal, in any case; "*" stands for anything: name=web-*
  node!=node2          not equal
  memory>=1G age<10m   > >= < <= compare numbers, amounts and times

--sort COLUMN orders by a column, --sort -COLUMN in reverse.
`)
}

// condition is one part of a filter.
type condition struct {
	key, op, value string
}

// conditionOps, longest first, since "=" is part of ">=".
var conditionOps = []string{"!=", ">=", "<=", "==", "=", ">", "<"}

func parseCondition(part string) (condition, error) {
	const hint = "write KEY=VALUE, such as state=Running; `blixard help filters` tells more"
	at, op := -1, ""
	for _, o := range conditionOps {
		if i := strings.Index(part, o); i >= 0 && (at < 0 || i < at) {
			at, op = i, o
		}
	}
	if at <= 0 {
		return condition{}, blixard.Invalid("--filter", hint, "the filter %q cannot be read", part)
	}
	c := condition{key: strings.TrimSpace(part[:at]), op: op, value: strings.TrimSpace(part[at+len(op):])}
	if c.op == "==" {
		c.op = "="
	}
	if c.key == "" {
		return condition{}, blixard.Invalid("--filter", hint, "the filter %q names no column", part)
	}
	return c, nil
}

// narrow leaves the rows that match, in order.
func (l *listing) narrow(flags listFlags) error {
	for _, f := range flags.filters {
		for part := range strings.SplitSeq(f, ",") {
			c, err := parseCondition(part)
			if err != nil {
				return err
			}
			if l.rows, err = l.matching(c); err != nil {
				return err
			}
		}
	}
	if flags.sortBy == "" {
		return nil
	}
	name, reverse := strings.CutPrefix(flags.sortBy, "-")
	at := l.column(name)
	if at < 0 {
		return blixard.Invalid("--sort", l.columnHint(name), "there is no column %q", name)
	}
	slices.SortStableFunc(l.rows, func(x, y row) int {
		c := compareCells(x.cells[at], y.cells[at])
		if reverse {
			c = -c
		}
		return c
	})
	return nil
}

// column is the index of a column, -1 when there is none.
func (l *listing) column(name string) int {
	return slices.IndexFunc(l.columns, func(c column) bool { return sameColumn(c.name, name) })
}

func sameColumn(a, b string) bool {
	plain := strings.NewReplacer("-", "", "_", "", " ", "")
	return strings.EqualFold(plain.Replace(a), plain.Replace(b))
}

func (l *listing) columnHint(name string) string {
	names := make([]string, len(l.columns))
	for i, c := range l.columns {
		names[i] = strings.ToLower(c.name)
	}
	hint := "columns: " + strings.Join(names, ", ")
	if near := blixard.Nearest(name, names); near != "" {
		hint = "did you mean " + near + "? " + hint
	}
	return hint
}

func (l *listing) matching(c condition) ([]row, error) {
	at := l.column(c.key)
	label, isLabel := strings.CutPrefix(c.key, "label.")
	if !isLabel && at >= 0 {
		return keep(l.rows, func(r row) (bool, error) { return c.holds(r.cells[at]) })
	}
	known := isLabel
	for _, r := range l.rows {
		_, ok := r.labels[label]
		known = known || ok
	}
	if !known && len(l.rows) > 0 {
		return nil, blixard.Invalid("--filter", l.columnHint(c.key), "there is no column and no label %q", c.key)
	}
	return keep(l.rows, func(r row) (bool, error) {
		value, ok := r.labels[label]
		if !ok {
			return c.op == "!=", nil
		}
		return c.holds(cell{text: value})
	})
}

func keep(rows []row, match func(row) (bool, error)) ([]row, error) {
	out := rows[:0:0]
	for _, r := range rows {
		ok, err := match(r)
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, r)
		}
	}
	return out, nil
}

// holds tells whether a cell satisfies the condition.
func (c condition) holds(have cell) (bool, error) {
	switch c.op {
	case "=", "!=":
		equal, err := c.equals(have)
		return equal == (c.op == "="), err
	}
	want, err := amount(have.kind, c.value)
	if err != nil {
		return false, blixard.Invalid("--filter", "write an amount such as 3, 512M or 10m", "%q in the filter %s%s%s is no amount", c.value, c.key, c.op, c.value)
	}
	number := have.number
	if have.kind == textCell {
		if number, err = amount(textCell, have.text); err != nil {
			return false, nil //nolint:nilerr // a text that is no amount is not compared with one
		}
	}
	order := cmp.Compare(number, want)
	switch c.op {
	case ">":
		return order > 0, nil
	case ">=":
		return order >= 0, nil
	case "<":
		return order < 0, nil
	default:
		return order <= 0, nil
	}
}

func (c condition) equals(have cell) (bool, error) {
	if strings.EqualFold(have.text, c.value) {
		return true, nil
	}
	if strings.Contains(c.value, "*") {
		// Only "*" is special, and it stands for "/" too.
		pattern := strings.NewReplacer(`\`, `\\`, "?", `\?`, "[", `\[`, "/", "\x00").Replace(strings.ToLower(c.value))
		return path.Match(pattern, strings.ReplaceAll(strings.ToLower(have.text), "/", "\x00"))
	}
	if have.kind == numberCell {
		if want, err := blixard.ParseQuantity(c.value); err == nil {
			return want == have.number, nil
		}
	}
	// A cell such as "node1,node2" equals each of its parts.
	for part := range strings.SplitSeq(have.text, ",") {
		if strings.EqualFold(part, c.value) {
			return true, nil
		}
	}
	return false, nil
}

// amount reads what a cell is compared with: for an age a duration (10m, 2h30m;
// in thousandths of a second), else a quantity.
func amount(kind cellKind, text string) (blixard.Quantity, error) {
	if kind != ageCell {
		return blixard.ParseQuantity(text)
	}
	d, err := time.ParseDuration(text)
	return blixard.Quantity(d.Milliseconds()), err
}

// compareCells orders numbers by value and texts so that web-2 is before web-10.
func compareCells(a, b cell) int {
	if a.kind != textCell && b.kind != textCell {
		return cmp.Compare(a.number, b.number)
	}
	return compareNatural(a.text, b.text)
}

func compareNatural(a, b string) int {
	for a != "" && b != "" {
		da, db := digits(a), digits(b)
		if da > 0 && db > 0 {
			na, nb := strings.TrimLeft(a[:da], "0"), strings.TrimLeft(b[:db], "0")
			if c := cmp.Or(cmp.Compare(len(na), len(nb)), cmp.Compare(na, nb)); c != 0 {
				return c
			}
			a, b = a[da:], b[db:]
			continue
		}
		if a[0] != b[0] {
			return cmp.Compare(a[0], b[0])
		}
		a, b = a[1:], b[1:]
	}
	return cmp.Compare(len(a), len(b))
}

func digits(s string) int {
	n := 0
	for n < len(s) && s[n] >= '0' && s[n] <= '9' {
		n++
	}
	return n
}
