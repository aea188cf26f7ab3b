package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/jedib0t/go-pretty/v6/text"
	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/blixard/blixard"
)

// Formats of --output.
const (
	formatTable = "table"
	formatWide  = "wide"
	formatJSON  = "json"
	formatYAML  = "yaml"
	formatName  = "name"
)

var outputNames = []string{formatTable, formatWide, formatJSON, formatYAML, formatName}

// cell is one value of a table. Numbers and times are compared as such.
type cell struct {
	text   string
	number blixard.Quantity // thousandths; of seconds for an age
	kind   cellKind
}

type cellKind int

const (
	textCell cellKind = iota
	numberCell
	ageCell
)

func str(s string) cell { return cell{text: s} }
func num[N ~int | ~int32 | ~int64 | ~uint64](n N) cell {
	return cell{text: strconv.FormatInt(int64(n), 10), number: blixard.Quantity(n) * 1000, kind: numberCell}
}

func mib(n int64) cell {
	return cell{text: blixard.FormatMiB(n), number: blixard.Quantity(n) << 20 * 1000, kind: numberCell}
}

// age is the time since a moment in ms, "-" for 0.
func age(now time.Time, ms int64) cell {
	if ms == 0 {
		return cell{text: "-", kind: ageCell}
	}
	d := max(now.Sub(time.UnixMilli(ms)), 0)
	return cell{text: shortDuration(d), number: blixard.Quantity(d.Milliseconds()), kind: ageCell}
}

// shortDuration writes a duration in its one or two largest units.
func shortDuration(d time.Duration) string {
	s := int64(d / time.Second)
	switch {
	case s < 120:
		return fmt.Sprintf("%ds", s)
	case s < 3600:
		return fmt.Sprintf("%dm%ds", s/60, s%60)
	case s < 48*3600:
		return fmt.Sprintf("%dh%dm", s/3600, s%3600/60)
	default:
		return fmt.Sprintf("%dd%dh", s/86400, s%86400/3600)
	}
}

// column is a column of a listing. A wide one shows with -o wide only, but
// filters and sorting know it always.
type column struct {
	name string
	wide bool
}

// row is one thing of a listing.
type row struct {
	name   string // "vm/webapp"
	cells  []cell
	labels map[string]string
	object any // as JSON
}

// listing is what commands print: the same things as a table, as JSON or YAML
// below one key, or as names.
type listing struct {
	key     string // of the list in JSON: "vms"
	columns []column
	rows    []row
	// whole makes the JSON document of the rows' objects; nil: {key: objects}.
	whole func(objects []any) any
	empty string // words when there is nothing
	after string // a line below the table
}

// listFlags are the flags of commands that print listings.
type listFlags struct {
	filters []string
	sortBy  string
	watch   bool
	headers bool
}

func (l *listFlags) add(cmd *cobra.Command, watchable bool) {
	f := cmd.Flags()
	f.StringArrayVar(&l.filters, "filter", nil, "show only what matches, such as state=Running or memory>=1G (see blixard help filters)")
	f.StringVar(&l.sortBy, "sort", "", "order by this column; -COLUMN for the reverse")
	f.BoolVar(&l.headers, "no-headers", false, "leave the table's header out")
	if watchable {
		f.BoolVarP(&l.watch, "watch", "w", false, "show it again whenever it changes, until Ctrl-C")
	}
}

// completeSort completes --sort with the columns of what a command lists.
func completeSort(cmd *cobra.Command, columns func(args []string) []column) {
	err := cmd.RegisterFlagCompletionFunc("sort", func(_ *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
		sign := ""
		if strings.HasPrefix(toComplete, "-") {
			sign = "-"
		}
		var out []string
		for _, c := range columns(args) {
			out = append(out, sign+strings.ReplaceAll(strings.ToLower(c.name), " ", "-"))
		}
		return out, cobra.ShellCompDirectiveNoFileComp
	})
	if err != nil {
		panic("completing --sort: " + err.Error()) // the flag is not there: a bug
	}
}

// columnsOf are the columns of what `get` lists of a kind.
func columnsOf(kind string) []column {
	switch strings.TrimSuffix(kind, "s") {
	case "vm":
		return vmListing(nil, time.Time{}).columns
	case "node":
		return nodeListing(nil, time.Time{}).columns
	case "instance":
		return instanceListing(nil, time.Time{}).columns
	case "function":
		return functionListing(nil, time.Time{}).columns
	case "event":
		return eventListing(nil, time.Time{}).columns
	case "token":
		return tokenColumns
	case "image":
		return imageColumns
	}
	return nil
}

// completeSortOf is completeSort for a command that lists one kind.
func completeSortOf(cmd *cobra.Command, kind string) {
	completeSort(cmd, func([]string) []column { return columnsOf(kind) })
}

// print filters, sorts and writes a listing.
func (a *app) print(w io.Writer, l *listing, flags listFlags) error {
	if err := l.narrow(flags); err != nil {
		return err
	}
	switch a.output {
	case formatName:
		for _, r := range l.rows {
			fmt.Fprintln(w, r.name)
		}
		return nil
	case formatJSON, formatYAML:
		objects := make([]any, len(l.rows))
		for i, r := range l.rows {
			objects[i] = r.object
		}
		var doc any = map[string]any{l.key: objects}
		if l.whole != nil {
			doc = l.whole(objects)
		}
		return a.printObject(w, doc)
	}
	if len(l.rows) == 0 {
		if len(flags.filters) > 0 {
			a.note("nothing matches the filter")
		} else if l.empty != "" {
			a.note("%s", l.empty)
		}
		return nil
	}
	a.printTable(w, l, flags)
	return nil
}

// printObject writes v as JSON or YAML.
func (a *app) printObject(w io.Writer, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("writing JSON: %w", err)
	}
	if a.output == formatYAML {
		if data, err = yaml.JSONToYAML(data); err != nil {
			return fmt.Errorf("writing YAML: %w", err)
		}
		_, err = w.Write(data)
		return err
	}
	var b bytes.Buffer
	if err := json.Indent(&b, data, "", "  "); err != nil {
		return fmt.Errorf("writing JSON: %w", err)
	}
	b.WriteByte('\n')
	_, err = w.Write(b.Bytes())
	return err
}

func (a *app) printTable(w io.Writer, l *listing, flags listFlags) {
	t := table.NewWriter()
	style := table.StyleDefault
	style.Options = table.OptionsNoBordersAndSeparators
	style.Box.PaddingLeft, style.Box.PaddingRight = "", "  "
	style.Format.Header = text.FormatDefault
	t.SetStyle(style)
	t.SuppressTrailingSpaces()
	colours := a.colours(w)
	var header table.Row
	for _, c := range l.columns {
		if a.shows(c) {
			header = append(header, c.name)
		}
	}
	if !flags.headers {
		t.AppendHeader(header)
	}
	for _, r := range l.rows {
		var out table.Row
		for i, c := range l.columns {
			if !a.shows(c) {
				continue
			}
			value := visible(firstOf(r.cells[i].text, "-"))
			if colours {
				value = coloured(value)
			}
			out = append(out, value)
		}
		t.AppendRow(out)
	}
	if width, is := terminal(w); is && width > 0 {
		if room := width - l.widthBeforeLast(a); room >= 20 { // nothing is ever cut; what has no room, the terminal wraps
			t.SetColumnConfigs([]table.ColumnConfig{{Number: len(header), WidthMax: room, WidthMaxEnforcer: text.WrapSoft}})
		}
	}
	fmt.Fprintln(w, t.Render())
	if l.after != "" {
		fmt.Fprintln(w, l.after)
	}
}

// widthBeforeLast is how much room the columns before the last that shows take.
func (l *listing) widthBeforeLast(a *app) int {
	total, last := 0, 0
	for i, c := range l.columns {
		if !a.shows(c) {
			continue
		}
		total, last = total+last, text.StringWidth(c.name)
		for _, r := range l.rows {
			last = max(last, text.StringWidth(visible(firstOf(r.cells[i].text, "-"))))
		}
		last += 2 // of padding
	}
	return total
}

func (a *app) shows(c column) bool { return !c.wide || a.output == formatWide }

// visible makes a text from the cluster safe for a terminal: one line, no
// control characters.
func visible(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case r < ' ' || r >= 0x7f && r < 0xa0:
			return '?'
		}
		return r
	}, s)
}

// coloured gives the words for states their colour.
func coloured(value string) string {
	switch value {
	case "Running", "Ready", "healthy", "yes", "ok", "created":
		return text.FgGreen.Sprint(value)
	case "Failed", "Lost", "unhealthy", "no", "fail":
		return text.FgRed.Sprint(value)
	case "Pending", "Preparing", "Starting", "Stopping", "Degraded", "Joining", "draining", "cordoned", "Deleting", "Paused", "warn", "updated":
		return text.FgYellow.Sprint(value)
	}
	return value
}
