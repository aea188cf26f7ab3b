package lint

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// maxLines of a file that people write.
const maxLines = 800

var (
	// The words are put together here so that this file does not hold them.
	unfinished = regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME|X` + `XX|HA` + `CK)\b|(?i:\bnot ` + `(yet )?implemented\b)`)
	// Copies beside the original, and reports on a state that passes.
	copied = regexp.MustCompile(`(?i)([_-](v[0-9]+|new|old|copy|backup|final)(_test)?\.[a-z]+|\.(orig|rej|bak|swp)|~)$`)
	report = regexp.MustCompile(`(?i)(^|[_-])(status|progress|summary|report)([_-].*)?\.md$`)
	// Names that say nothing about what the thing does.
	hollow = regexp.MustCompile(`(Manager|Service|Helper|Util|Utils|Impl|V[0-9]+)$`)
)

// TestNoJunk keeps out what a newcomer would stumble over.
func TestNoJunk(t *testing.T) {
	for _, sin := range checkJunk(t, root) {
		t.Error(sin)
	}
}

func checkJunk(t *testing.T, base string) []string {
	t.Helper()
	var sins []string
	walk(t, base, true, func(file string) {
		name := path.Base(file)
		if copied.MatchString(name) {
			sins = append(sins, file+": a copy beside the original: delete what a better one replaces")
		}
		if report.MatchString(name) {
			sins = append(sins, file+": a report on a passing state does not belong into the tree")
		}
		if !written(name) {
			return
		}
		text, err := os.ReadFile(filepath.Join(base, filepath.FromSlash(file)))
		if err != nil {
			t.Fatal(err)
		}
		var f *ast.File
		fset := token.NewFileSet()
		if strings.HasSuffix(name, ".go") {
			if f, err = parser.ParseFile(fset, file, text, parser.ParseComments); err != nil {
				t.Fatalf("parsing: %v", err)
			}
			if ast.IsGenerated(f) {
				return
			}
		}
		if n := bytes.Count(text, []byte("\n")); n > maxLines {
			sins = append(sins, fmt.Sprintf("%s: %d lines, more than can be held in the head; at most %d", file, n, maxLines))
		}
		for i, line := range bytes.Split(text, []byte("\n")) {
			if word := unfinished.Find(line); word != nil && !strings.HasSuffix(name, ".md") {
				sins = append(sins, fmt.Sprintf("%s:%d: %s: finish it, or open an issue", file, i+1, word))
			}
		}
		if f != nil {
			sins = append(sins, judgeGo(fset, f, strings.HasSuffix(name, "_test.go"))...)
		}
	})
	return sins
}

// written tells the kinds of files that people write here.
func written(name string) bool {
	if name == "Makefile" || name == "setup" || name == "demo" || name == "bench" || name == "run" {
		return true
	}
	return slices.Contains([]string{".go", ".proto", ".md", ".sh", ".toml", ".yml", ".yaml", ".nix"}, path.Ext(name))
}

// judgeGo finds names that say nothing, sleeping tests and silent skips.
func judgeGo(fset *token.FileSet, f *ast.File, test bool) []string {
	var sins []string
	sin := func(n ast.Node, format string, args ...any) {
		sins = append(sins, fmt.Sprintf("%s: %s", fset.Position(n.Pos()), fmt.Sprintf(format, args...)))
	}
	ast.PreorderStack(f, nil, func(n ast.Node, stack []ast.Node) bool {
		switch x := n.(type) {
		case *ast.TypeSpec:
			if hollow.MatchString(x.Name.Name) {
				sin(x, "the name %s says nothing about what it does", x.Name.Name)
			}
		case *ast.CallExpr:
			sel, ok := x.Fun.(*ast.SelectorExpr)
			if !ok || !test {
				break
			}
			on, _ := sel.X.(*ast.Ident)
			switch {
			case on != nil && on.Name == "time" && sel.Sel.Name == "Sleep":
				sin(x, "a test that sleeps: wait for what is to happen, with a bound, or use testing/synctest")
			case sel.Sel.Name == "SkipNow" && len(x.Args) == 0, sel.Sel.Name == "Skip" && len(x.Args) == 0:
				sin(x, "a test that is skipped without a word")
			case (sel.Sel.Name == "Skip" || sel.Sel.Name == "Skipf") && on != nil && !excusable(stack):
				sin(x, "a test may be skipped for -short, another system or missing rights; what else is missing fails it, with the command that brings it")
			}
		}
		return true
	})
	return sins
}

// excusable tells whether a condition round a skip is about -short, the system
// or the user's rights.
func excusable(stack []ast.Node) bool {
	for _, n := range stack {
		branch, ok := n.(*ast.IfStmt)
		if !ok {
			continue
		}
		found := false
		for _, part := range []ast.Node{branch.Init, branch.Cond} {
			if part == nil || part == ast.Stmt(nil) {
				continue
			}
			ast.Inspect(part, func(n ast.Node) bool {
				if sel, ok := n.(*ast.SelectorExpr); ok {
					on, _ := sel.X.(*ast.Ident)
					found = found || on != nil && slices.Contains([]string{"testing.Short", "runtime.GOOS", "runtime.GOARCH", "os.Getuid", "os.Geteuid", "unix.Geteuid"}, on.Name+"."+sel.Sel.Name)
				}
				return !found
			})
		}
		if found {
			return true
		}
	}
	return false
}

func TestNoJunkFindsSins(t *testing.T) {
	const head = "package p\n\nimport (\n\t\"testing\"\n\t\"time\"\n)\n\n"
	base := plant(t, map[string]string{
		"a.go":             "package p\n\n// TO" + "DO: finish\nvar x int\n",
		"b.sh":             "# FIX" + "ME\nmktemp x.XXXXXX\n",
		"c.go":             "package p\n\nvar e = \"Not " + "implemented\"\n",
		"gen.go":           "// Code generated by x. DO NOT EDIT.\n\npackage p\n\n// TO" + "DO\n\ntype FooService int\n" + strings.Repeat("\n", maxLines),
		"long.go":          "package p\n" + strings.Repeat("\n", maxLines),
		"names.go":         "package p\n\ntype VMManager struct{}\n\ntype managerial int\n",
		"store_v2.go":      "package p\n",
		"sub/PROGRESS.md":  "all is well\n",
		"sub/status.go":    "package sub\n",
		"t_test.go":        head + "func TestA(t *testing.T) {\n\ttime.Sleep(1)\n\tt.Skip()\n\tt.Skip(\"no qemu\")\n}\n",
		"u_test.go":        head + "func TestB(t *testing.T) {\n\tif testing.Short() {\n\t\tt.Skip(\"long\")\n\t}\n}\n",
		"testdata/TO.go":   "nonsense TO" + "DO",
		"third_party/x.go": "nonsense",
		"w.go":             "package p\n\nimport \"time\"\n\nfunc wait() { time.Sleep(1) }\n",
	})
	expect(t, checkJunk(t, base),
		"a.go:3: TO"+"DO", "b.sh:1: FIX"+"ME", "c.go:3: Not ", "long.go: 801 lines", "names.go:3:6: the name VMManager", "store_v2.go: a copy",
		"sub/PROGRESS.md: a report", "t_test.go:9:2: a test that sleeps", "t_test.go:10:2: a test that is skipped", "t_test.go:11:2: a test may be skipped for",
	)
}
