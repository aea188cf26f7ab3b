package cli

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/blixard/blixard"
)

// documentError is something wrong in a file.
type documentError struct {
	file string
	line int
	text string
	hint string
}

// documentErrors are all that is wrong in some files; nothing was changed.
type documentErrors []documentError

// maxDocumentErrors bounds what is told about one set of files.
const maxDocumentErrors = 20

func (d documentErrors) lines() []string {
	var out []string
	for i, e := range d {
		if i == maxDocumentErrors {
			out = append(out, fmt.Sprintf("… and %d more errors", len(d)-i))
			break
		}
		text := fmt.Sprintf("%s:%d: %s", e.file, e.line, e.text)
		if e.hint != "" {
			text += " (" + e.hint + ")"
		}
		out = append(out, text)
	}
	return append(out, "nothing was changed")
}

func (d documentErrors) Error() string { return strings.Join(d.lines(), "\n") }

// reader walks a YAML document and collects what is wrong with it.
type reader struct {
	file   string
	errors documentErrors
	lists  bool // within a list: an alias may lead back to it
	// nodes takes documents of kind Node; nil: there may be none.
	nodes *[]NodeDocument
}

func (r *reader) fail(n *yaml.Node, hint, format string, args ...any) {
	r.errors = append(r.errors, documentError{file: r.file, line: n.Line, text: fmt.Sprintf(format, args...), hint: hint})
}

// failed adds an error of the domain.
func (r *reader) failed(n *yaml.Node, path string, err error) {
	var e *blixard.Error
	if asError(err, &e) {
		r.fail(n, e.Hint, "%s: %s", path, e.Message)
		return
	}
	r.fail(n, "", "%s: %v", path, err)
}

// resolve follows an alias.
func resolve(n *yaml.Node) *yaml.Node {
	for n.Kind == yaml.AliasNode && n.Alias != nil {
		n = n.Alias
	}
	return n
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.Tag == "!!null" }

// field is what to do with one key of a mapping.
type field func(path string, n *yaml.Node)

// mapping reads a mapping of known keys; others, and doubled ones, are errors.
func (r *reader) mapping(path string, n *yaml.Node, fields map[string]field) {
	n = resolve(n)
	if n.Kind != yaml.MappingNode {
		r.fail(n, "", "%s must be a mapping of %s", firstOf(path, "a document"), keys(fields))
		return
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		at := join(path, key.Value)
		if line, twice := seen[key.Value]; twice {
			r.fail(key, "", "%s is given twice, first in line %d", at, line)
			continue
		}
		seen[key.Value] = key.Line
		read, known := fields[key.Value]
		if !known {
			hint := "known: " + keys(fields)
			if near := blixard.Nearest(key.Value, names(fields)); near != "" {
				hint = "did you mean " + near + "?"
			}
			r.fail(key, hint, "%s is not known", at)
			continue
		}
		if value = resolve(value); !isNull(value) {
			read(at, value)
		}
	}
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

func names(fields map[string]field) []string {
	var out []string
	for k := range fields {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

func keys(fields map[string]field) string { return strings.Join(names(fields), ", ") }

// each reads a list; a single value where a list is due is a list of one.
func (r *reader) each(path string, n *yaml.Node, read field) {
	if n.Kind != yaml.SequenceNode {
		read(path, n)
		return
	}
	for i, item := range n.Content {
		read(fmt.Sprintf("%s[%d]", path, i), resolve(item))
	}
}

// text reads a scalar as it is written.
func (r *reader) text(to *string) field {
	return func(path string, n *yaml.Node) {
		if n.Kind != yaml.ScalarNode {
			r.fail(n, "", "%s must be a text", path)
			return
		}
		*to = n.Value
	}
}

func (r *reader) texts(to *[]string) field {
	return func(path string, n *yaml.Node) {
		r.each(path, n, func(path string, n *yaml.Node) {
			var s string
			r.text(&s)(path, n)
			*to = append(*to, s)
		})
	}
}

func (r *reader) integer(to *int) field {
	return func(path string, n *yaml.Node) {
		v, err := strconv.Atoi(n.Value)
		if n.Kind != yaml.ScalarNode || err != nil {
			r.fail(n, "", "%s must be a whole number", path)
			return
		}
		*to = v
	}
}

// positive is an integer where 0 would be taken for "left out".
func (r *reader) positive(to *int) field {
	return func(path string, n *yaml.Node) {
		before := len(r.errors)
		r.integer(to)(path, n)
		if len(r.errors) == before && *to < 1 {
			r.fail(n, "", "%s is %d; it must be at least 1", path, *to)
		}
	}
}

// version reads a VM's version.
func (r *reader) version(to *uint64) field {
	return func(path string, n *yaml.Node) {
		v, err := strconv.ParseUint(n.Value, 10, 64)
		if n.Kind != yaml.ScalarNode || err != nil || v == 0 {
			r.fail(n, "leave it out to change the VM whatever its version is", "%s must be a version as `blixard get -o yaml` prints it", path)
			return
		}
		*to = v
	}
}

func (r *reader) boolean(to *bool) field {
	return func(path string, n *yaml.Node) {
		switch {
		case n.Kind == yaml.ScalarNode && n.Value == "true":
			*to = true
		case n.Kind == yaml.ScalarNode && n.Value == "false":
			*to = false
		default:
			r.fail(n, "", "%s must be true or false", path)
		}
	}
}

// memory reads an amount in MiB; a bare number is MiB.
func (r *reader) memory(to *int64) field {
	return func(path string, n *yaml.Node) {
		if n.Kind != yaml.ScalarNode {
			r.fail(n, "", "%s must be an amount such as 512M", path)
			return
		}
		v, err := blixard.ParseMemoryMiB(n.Value)
		switch {
		case err != nil:
			r.failed(n, path, err)
		default:
			*to = v
		}
	}
}

func (r *reader) duration(toMS *int64) field {
	return func(path string, n *yaml.Node) {
		d, err := time.ParseDuration(n.Value)
		if n.Kind != yaml.ScalarNode || err != nil || d < 0 {
			r.fail(n, "", "%s must be a duration such as 500ms, 30s or 2m", path)
			return
		}
		*toMS = d.Milliseconds()
	}
}

// labels reads a mapping of texts, or a list of KEY=VALUE.
func (r *reader) labels(to *[]blixard.Label, check func(key, value string) error) field {
	add := func(path string, n *yaml.Node, key, value string) {
		if check != nil {
			if err := check(key, value); err != nil {
				r.failed(n, path, err)
				return
			}
		}
		if slices.ContainsFunc(*to, func(l blixard.Label) bool { return l.Key == key }) {
			r.fail(n, "", "%s is given twice", path)
			return
		}
		*to = append(*to, blixard.Label{Key: key, Value: value})
	}
	return func(path string, n *yaml.Node) {
		if n.Kind == yaml.SequenceNode {
			r.each(path, n, func(path string, n *yaml.Node) {
				key, value, found := strings.Cut(n.Value, "=")
				if n.Kind != yaml.ScalarNode || !found || key == "" {
					r.fail(n, "", "%s must be KEY=VALUE", path)
					return
				}
				add(path, n, key, value)
			})
			return
		}
		if n.Kind != yaml.MappingNode {
			r.fail(n, "", "%s must be a mapping of keys to texts", path)
			return
		}
		for i := 0; i+1 < len(n.Content); i += 2 {
			key, value := n.Content[i], resolve(n.Content[i+1])
			if value.Kind != yaml.ScalarNode {
				r.fail(value, "", "%s must be a text", join(path, key.Value))
				continue
			}
			add(join(path, key.Value), key, key.Value, value.Value)
		}
	}
}
