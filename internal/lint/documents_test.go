package lint

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestDocumentsAreTrue: what the documents name in backticks exists: files,
// directories, tests.
func TestDocumentsAreTrue(t *testing.T) {
	for _, sin := range checkDocuments(t, root) {
		t.Error(sin)
	}
}

var (
	namedPath = regexp.MustCompile("`((?:internal|cmd|client|api|docs|scripts|tools)(?:/[A-Za-z0-9_.-]+)+/?|[A-Z]+\\.md)`")
	namedTest = regexp.MustCompile("`((?:Test|Fuzz)[A-Z][A-Za-z0-9_]*)`")
	linked    = regexp.MustCompile(`\]\(([^)#:]+)(?:#[^)]*)?\)`)
	testFunc  = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)[A-Z][A-Za-z0-9_]*)\(`)
)

func checkDocuments(t *testing.T, base string) []string {
	t.Helper()
	tests := map[string]bool{}
	texts := map[string]string{}
	var documents []string
	walk(t, base, true, func(file string) {
		if !strings.HasSuffix(file, "_test.go") && !strings.HasSuffix(file, ".md") {
			return
		}
		text, err := os.ReadFile(filepath.Join(base, filepath.FromSlash(file)))
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(file, ".md") {
			documents = append(documents, file)
			texts[file] = string(text)
			return
		}
		for _, m := range testFunc.FindAllSubmatch(text, -1) {
			tests[string(m[1])] = true
		}
	})
	exists := func(path string) bool {
		_, err := os.Stat(path)
		return err == nil
	}
	var sins []string
	for _, doc := range documents {
		for _, m := range namedPath.FindAllStringSubmatch(texts[doc], -1) {
			if !exists(filepath.Join(base, m[1])) {
				sins = append(sins, fmt.Sprintf("%s names %s, which does not exist", doc, m[1]))
			}
		}
		for _, m := range namedTest.FindAllStringSubmatch(texts[doc], -1) {
			if !tests[m[1]] {
				sins = append(sins, fmt.Sprintf("%s names the test %s, which does not exist", doc, m[1]))
			}
		}
		for _, m := range linked.FindAllStringSubmatch(texts[doc], -1) {
			if !exists(filepath.Join(base, filepath.Dir(doc), m[1])) {
				sins = append(sins, fmt.Sprintf("%s links to %s, which does not exist", doc, m[1]))
			}
		}
	}
	slices.Sort(sins)
	return slices.Compact(sins)
}

func TestDocumentsFindsSins(t *testing.T) {
	base := plant(t, map[string]string{
		"README.md":       "See `internal/a/a.go`, `internal/b`, `TestA`, `TestB`, [here](docs/x.md#top), [there](docs/y.md), [web](https://example.com/).\n",
		"docs/x.md":       "[back](../README.md), `LICENSE.md`\n",
		"internal/a/a.go": "package a\n",
		"a_test.go":       "package p\n\nfunc TestA(t *testing.T) {}\n",
	})
	expect(t, checkDocuments(t, base),
		"README.md links to docs/y.md", "README.md names internal/b,", "README.md names the test TestB", "docs/x.md names LICENSE.md")
}

// TestDependenciesHaveReasons: RATIONALE.md has a line for each module that
// go.mod requires directly, and for no other.
func TestDependenciesHaveReasons(t *testing.T) {
	mod, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	why, err := os.ReadFile(filepath.Join(root, "RATIONALE.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, sin := range checkDependencies(string(mod), string(why)) {
		t.Error(sin)
	}
}

var (
	required = regexp.MustCompile(`(?m)^(?:require)?\s+([a-z0-9.]+\.[a-z]+/\S+) v\S+$`)
	reasoned = regexp.MustCompile("(?m)^\\| `([a-z0-9.]+\\.[a-z]+/\\S+)` \\|")
)

func checkDependencies(mod, why string) []string {
	var sins []string
	direct, given := map[string]bool{}, map[string]bool{}
	for _, m := range reasoned.FindAllStringSubmatch(why, -1) {
		given[m[1]] = true
	}
	for _, m := range required.FindAllStringSubmatch(mod, -1) {
		direct[m[1]] = true
		if !given[m[1]] {
			sins = append(sins, fmt.Sprintf("RATIONALE.md does not say why %s is required", m[1]))
		}
	}
	for _, m := range reasoned.FindAllStringSubmatch(why, -1) {
		if !direct[m[1]] {
			sins = append(sins, fmt.Sprintf("RATIONALE.md explains %s, which go.mod does not require directly", m[1]))
		}
	}
	return sins
}

func TestDependenciesFindsSins(t *testing.T) {
	mod := "module x.org/y\n\nrequire (\n\ta.org/b v1.0.0\n\tc.org/d/v2 v2.1.0\n)\n\nrequire (\n\te.org/f v1.0.0 // indirect\n)\n\nrequire g.org/h v0.1.0\n"
	why := "| `a.org/b` | good |\n| `e.org/f` | not ours |\n"
	expect(t, checkDependencies(mod, why), "why c.org/d/v2", "why g.org/h", "explains e.org/f")
}
