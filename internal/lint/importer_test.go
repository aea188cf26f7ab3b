package lint

import (
	"bufio"
	"fmt"
	"go/ast"
	"go/build"
	"go/parser"
	"go/token"
	"go/types"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode"
)

// source imports packages from their source: ours, those of the modules in
// go.mod, and the standard library. Bodies of functions are not looked at,
// which makes it fast.
type source struct {
	fset    *token.FileSet
	modules map[string]string // path -> directory
	done    map[string]*types.Package
	build   build.Context
}

func newSource(t *testing.T) *source {
	t.Helper()
	s := &source{fset: token.NewFileSet(), modules: map[string]string{module: root}, done: map[string]*types.Package{"unsafe": types.Unsafe}, build: build.Default}
	s.build.CgoEnabled = false
	cache := os.Getenv("GOMODCACHE")
	if cache == "" {
		path := filepath.SplitList(s.build.GOPATH)
		if len(path) == 0 {
			t.Fatal("neither GOMODCACHE nor GOPATH is known")
		}
		cache = filepath.Join(path[0], "pkg", "mod")
	}
	f, err := os.Open(filepath.Join(root, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		words := strings.Fields(strings.TrimPrefix(strings.TrimSpace(lines.Text()), "require "))
		if len(words) >= 2 && strings.Contains(words[0], "/") && strings.HasPrefix(words[1], "v") {
			s.modules[words[0]] = filepath.Join(cache, escaped(words[0])+"@"+escaped(words[1]))
		}
	}
	return s
}

// escaped is a module path as the module cache writes it: "!a" for "A".
func escaped(path string) string {
	var b strings.Builder
	for _, r := range path {
		if unicode.IsUpper(r) {
			b.WriteByte('!')
			r = unicode.ToLower(r)
		}
		b.WriteRune(r)
	}
	return b.String()
}

// dir finds a package's directory.
func (s *source) dir(path string) (string, error) {
	for prefix := path; prefix != "." && prefix != "/"; prefix = filepath.Dir(prefix) {
		if d, ok := s.modules[prefix]; ok {
			return filepath.Join(d, strings.TrimPrefix(path, prefix)), nil
		}
	}
	for _, d := range []string{path, filepath.Join("vendor", path)} {
		full := filepath.Join(s.build.GOROOT, "src", d)
		if _, err := os.Stat(full); err == nil {
			return full, nil
		}
	}
	return "", fmt.Errorf("the package %s is in no module of go.mod", path)
}

// Import implements types.Importer.
func (s *source) Import(path string) (*types.Package, error) {
	if p := s.done[path]; p != nil {
		return p, nil
	}
	dir, err := s.dir(path)
	if err != nil {
		return nil, err
	}
	files, err := s.files(dir, 0)
	if err != nil {
		return nil, fmt.Errorf("importing %s: %w", path, err)
	}
	// A package of others may use what only its own build knows; what can be
	// known of its types is enough.
	conf := types.Config{Importer: s, IgnoreFuncBodies: true, FakeImportC: true, Error: func(error) {}, Sizes: types.SizesFor("gc", s.build.GOARCH)}
	p, err := conf.Check(path, s.fset, files, nil)
	if p == nil {
		return nil, fmt.Errorf("importing %s: %w", path, err)
	}
	p.MarkComplete()
	s.done[path] = p
	return p, nil
}

// files parses the files of a directory that belong to the build.
func (s *source) files(dir string, mode parser.Mode) ([]*ast.File, error) {
	p, err := s.build.ImportDir(dir, 0)
	if err != nil {
		return nil, err
	}
	var out []*ast.File
	for _, name := range p.GoFiles {
		f, err := parser.ParseFile(s.fset, filepath.Join(dir, name), nil, mode|parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		out = append(out, f)
	}
	return out, nil
}
