package lint

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// root of the tree, seen from this package.
const root = "../.."

// module is the path of the tree's Go module.
const module = "github.com/blixard/blixard"

// skipped tells directories that are not ours to judge: what git and tools keep
// for themselves, what is built, what is copied from others unchanged.
func skipped(dir, name string) bool {
	return strings.HasPrefix(name, ".") && name != "." && name != ".." && name != ".ci" || name == "testdata" || name == "third_party" ||
		filepath.Clean(dir) == filepath.Join(root, "bin") || filepath.Clean(dir) == filepath.Join(root, "dist")
}

// walk calls visit for each file below base, path relative to base with
// slashes. Directories with a go.mod of their own are left out if modules is
// false.
func walk(t *testing.T, base string, modules bool, visit func(path string)) {
	t.Helper()
	err := filepath.WalkDir(base, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if path == base {
				return nil
			}
			if skipped(path, d.Name()) {
				return fs.SkipDir
			}
			if _, err := os.Stat(filepath.Join(path, "go.mod")); err == nil && !modules {
				return fs.SkipDir
			}
			return nil
		}
		rel, err := filepath.Rel(base, path)
		if err != nil {
			return err
		}
		visit(filepath.ToSlash(rel))
		return nil
	})
	if err != nil {
		t.Fatalf("walking %s: %v", base, err)
	}
}

// parse parses a file of the tree below base; a file that cannot be parsed
// fails the test.
func parse(t *testing.T, fset *token.FileSet, base, path string, mode parser.Mode) *ast.File {
	t.Helper()
	f, err := parser.ParseFile(fset, filepath.Join(base, filepath.FromSlash(path)), nil, mode)
	if err != nil {
		t.Fatalf("parsing: %v", err)
	}
	return f
}

// plant writes files into a new directory and returns it.
func plant(t *testing.T, files map[string]string) string {
	t.Helper()
	base := t.TempDir()
	for path, text := range files { //order:any files do not depend on each other
		full := filepath.Join(base, filepath.FromSlash(path))
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(full, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return base
}

// expect compares what a check found with what it was to find: one wanted text
// in each finding, in order.
func expect(t *testing.T, found []string, want ...string) {
	t.Helper()
	for i := range max(len(found), len(want)) {
		switch {
		case i >= len(found):
			t.Errorf("not found: %s", want[i])
		case i >= len(want):
			t.Errorf("found too much: %s", found[i])
		case !strings.Contains(found[i], want[i]):
			t.Errorf("found %q, want it to say %q", found[i], want[i])
		}
	}
}
