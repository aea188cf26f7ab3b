package lint

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Every mutant still applies to the tree: `make mutants` takes long and is not
// run on every change, a patch that has gone stale would not be noticed.
func TestMutantsApply(t *testing.T) {
	root := filepath.Join("..", "..")
	patches, err := filepath.Glob(filepath.Join(root, "internal", "sim", "mutants", "*.patch"))
	if err != nil {
		t.Fatal(err)
	}
	if len(patches) < 25 {
		t.Errorf("%d mutants, want at least 25", len(patches))
	}
	for _, p := range patches {
		text, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Base(p)
		what, _, found := strings.Cut(string(text), "\n--- ")
		if what = strings.TrimSpace(what); !found || what == "" || strings.HasPrefix(what, "---") {
			t.Errorf("%s does not begin with what it breaks", name)
			continue
		}
		for _, h := range hunks(string(text)) {
			source, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(h.file)))
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if n := strings.Count(string(source), h.old); n != 1 {
				t.Errorf("%s: what it changes is %d times in %s, make it anew:\n%s", name, n, h.file, h.old)
			}
		}
	}
}

// hunk is one place that a patch changes, as it was before.
type hunk struct{ file, old string }

func hunks(patch string) (out []hunk) {
	file := ""
	for line := range strings.Lines(patch) {
		last := len(out) - 1
		switch {
		case strings.HasPrefix(line, "+++ b/"):
			file = strings.TrimSpace(strings.TrimPrefix(line, "+++ b/"))
		case strings.HasPrefix(line, "--- "):
		case strings.HasPrefix(line, "@@ "):
			out = append(out, hunk{file: file})
		case last >= 0 && (line[0] == ' ' || line[0] == '-'):
			out[last].old += line[1:]
		case last >= 0 && line == "\n": // a context line whose blank was trimmed
			out[last].old += line
		}
	}
	return out
}
