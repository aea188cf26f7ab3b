package lint

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// core is the deterministic part: the same inputs in the same order give the
// same outputs, on every machine, so that replicas agree and a simulator can
// replay what happened.
var core = []string{".", "internal/assert", "internal/wire", "internal/state", "internal/schedule", "internal/control", "internal/converge", "internal/route", "internal/replica", "internal/record"}

// coreImports is all that the core may import besides our own packages, whose
// turn is TestLayers'. None of it has a clock, chance, concurrency, environment
// or device: not sync, not context, not hash/maphash, whose seed is random. Of
// time only values may be used, no function and no variable. etcd's raft reads crypto/rand for its election jitter, which the
// simulator seeds.
var coreImports = []string{
	"bufio", "bytes", "cmp", "container/heap", "encoding/binary", "encoding/hex", "errors", "fmt", "hash/crc32", "hash/fnv", "io", "iter", "maps", "math",
	"math/bits", "net/netip", "reflect", "slices", "sort", "strconv", "strings", "time", "unicode", "unicode/utf8",
	"github.com/tidwall/btree", "go.etcd.io/raft/v3", "go.etcd.io/raft/v3/raftpb", "go.etcd.io/raft/v3/tracker", "google.golang.org/protobuf/proto",
}

// excuse begins the comment on the line above a loop whose result does not
// depend on the order; the reason follows.
const excuse = "//order:any"

// TestCoreIsDeterministic finds what import rules cannot see: concurrency, the
// order of maps, and arithmetic that differs between machines.
func TestCoreIsDeterministic(t *testing.T) {
	s := newSource(t)
	for _, pkg := range core {
		for _, sin := range checkDeterministic(t, s, filepath.Join(root, pkg)) {
			t.Error(sin)
		}
	}
}

func checkDeterministic(t *testing.T, s *source, dir string) []string {
	t.Helper()
	files, err := s.files(dir, parser.ParseComments)
	if err != nil {
		return []string{fmt.Sprintf("reading %s: %v", dir, err)}
	}
	c := checker{fset: s.fset, excused: map[string]token.Pos{}, info: &types.Info{Types: map[ast.Expr]types.TypeAndValue{}, Uses: map[*ast.Ident]types.Object{}}}
	for _, f := range files {
		for _, spec := range f.Imports {
			path := strings.Trim(spec.Path.Value, `"`)
			if path != module && !strings.HasPrefix(path, module+"/") && !slices.Contains(coreImports, path) {
				c.sin(spec, "the import of "+path)
			}
		}
		for _, group := range f.Comments {
			for _, line := range group.List {
				if why, ok := strings.CutPrefix(line.Text, excuse); ok {
					if strings.TrimSpace(why) == "" {
						c.sin(line, excuse+" without a reason")
					}
					p := c.fset.Position(line.Pos())
					p.Line++
					c.excused[place(p)] = line.Pos()
				}
			}
		}
	}
	// Without types the rest would find nothing and seem clean.
	conf := types.Config{Importer: s, Error: func(err error) { c.sins = append(c.sins, fmt.Sprintf("checking types: %v", err)) }, Sizes: types.SizesFor("gc", s.build.GOARCH)}
	_, _ = conf.Check(dir, s.fset, files, c.info) // its errors went to conf.Error
	for _, f := range files {
		ast.PreorderStack(f, nil, func(n ast.Node, stack []ast.Node) bool {
			if what := c.judge(n, stack); what != "" {
				c.sin(n, what)
			}
			return true
		})
	}
	for _, pos := range c.excused { //order:any sorted below
		c.sins = append(c.sins, fmt.Sprintf("%s: %s excuses nothing on the line below", c.fset.Position(pos), excuse))
	}
	slices.Sort(c.sins)
	return c.sins
}

type checker struct {
	fset    *token.FileSet
	info    *types.Info
	excused map[string]token.Pos // place of a loop with a reason -> its comment
	sins    []string
}

func place(p token.Position) string { return fmt.Sprintf("%s:%d", p.Filename, p.Line) }

func (c *checker) sin(n ast.Node, what string) {
	p := c.fset.Position(n.Pos())
	if strings.HasPrefix(what, "map order") {
		if _, ok := c.excused[place(p)]; ok {
			delete(c.excused, place(p))
			return
		}
	}
	c.sins = append(c.sins, fmt.Sprintf("%s: %s in the deterministic core", p, what))
}

// judge names the sin of one node, "" if it has none.
func (c *checker) judge(n ast.Node, stack []ast.Node) string {
	switch x := n.(type) {
	case *ast.GoStmt:
		return "a goroutine"
	case *ast.SelectStmt:
		return "select"
	case *ast.ChanType:
		return "a channel"
	case *ast.SendStmt:
		return "a send"
	case *ast.RangeStmt:
		switch c.under(x.X).(type) {
		case *types.Map:
			return "map order (a range over a map: sort the keys first)"
		case *types.Chan:
			return "a range over a channel"
		}
	case *ast.UnaryExpr:
		if x.Op == token.ARROW {
			return "a receive"
		}
	case *ast.BinaryExpr:
		return c.float(x)
	case *ast.SelectorExpr:
		return c.clock(x)
	case *ast.CallExpr:
		switch name := c.called(x); name {
		case "maps.Keys", "maps.Values", "maps.All":
			if len(stack) > 0 {
				if outer, ok := stack[len(stack)-1].(*ast.CallExpr); ok && strings.HasPrefix(c.called(outer), "slices.Sorted") {
					return ""
				}
			}
			return "map order (" + name + " outside slices.Sorted)"
		case "reflect.MapKeys", "reflect.MapRange":
			return "map order (" + name + ")"
		}
	}
	return ""
}

// float finds arithmetic on floats at run time: compilers may fuse it, and
// machines then differ in the last bit.
func (c *checker) float(x *ast.BinaryExpr) string {
	tv := c.info.Types[x]
	if tv.Type == nil || tv.Value != nil {
		return ""
	}
	if b, ok := tv.Type.Underlying().(*types.Basic); ok && b.Info()&(types.IsFloat|types.IsComplex) != 0 {
		return "arithmetic on floats"
	}
	return ""
}

func (c *checker) under(x ast.Expr) types.Type {
	if tv, ok := c.info.Types[x]; ok && tv.Type != nil {
		if p, ok := tv.Type.(*types.TypeParam); ok {
			if m, ok := mapOf(p); ok {
				return m
			}
		}
		return tv.Type.Underlying()
	}
	return nil
}

// mapOf is the map type that a type parameter like ~map[K]V stands for.
func mapOf(p *types.TypeParam) (types.Type, bool) {
	set, ok := p.Constraint().Underlying().(*types.Interface)
	if !ok {
		return nil, false
	}
	for e := range set.EmbeddedTypes() {
		switch u := e.(type) {
		case *types.Union:
			for term := range u.Terms() {
				if m, ok := term.Type().Underlying().(*types.Map); ok {
					return m, true
				}
			}
		default:
			if m, ok := u.Underlying().(*types.Map); ok {
				return m, true
			}
		}
	}
	return nil, false
}

// called is the package and name of the function or method that is called.
// clock finds what of package time is no value or type: functions read the
// clock or wait for it, variables are the machine's zones.
func (c *checker) clock(x *ast.SelectorExpr) string {
	obj := c.info.Uses[x.Sel]
	if obj == nil || obj.Pkg() == nil || obj.Pkg().Path() != "time" {
		return ""
	}
	switch o := obj.(type) {
	case *types.Func:
		if o.Signature().Recv() != nil {
			return "" // of a value
		}
	case *types.Var:
		if o.IsField() {
			return ""
		}
	default:
		return ""
	}
	return "time." + obj.Name()
}

func (c *checker) called(call *ast.CallExpr) string {
	fun := call.Fun
	if index, ok := fun.(*ast.IndexExpr); ok {
		fun = index.X
	}
	if index, ok := fun.(*ast.IndexListExpr); ok {
		fun = index.X
	}
	if sel, ok := fun.(*ast.SelectorExpr); ok {
		if obj := c.info.Uses[sel.Sel]; obj != nil && obj.Pkg() != nil {
			return obj.Pkg().Path() + "." + obj.Name()
		}
	}
	return ""
}

func TestDeterminismFindsSins(t *testing.T) {
	cases := []struct {
		name, body string
		want       []string
	}{
		{"clean", "import \"slices\"\nimport \"maps\"\nfunc f(m map[int]string) []int { return slices.Sorted(maps.Keys(m)) }", nil},
		{"goroutine", "func f() { go f() }", []string{"x.go:2:12: a goroutine"}},
		{"channel", "func f(c chan int) { c <- 1; <-c }", []string{"a channel", "a send", "a receive"}},
		{"select", "func f() { select {} }", []string{"select"}},
		{"map", "type set map[string]bool\nfunc f(s set) (n int) {\n\tfor range s {\n\t\tn++\n\t}\n\treturn n\n}", []string{"x.go:4:2: map order"}},
		{"map of others", "import \"go.etcd.io/raft/v3\"\nfunc f(s raft.Status) {\n\tfor range s.Progress {\n\t}\n}", []string{"x.go:4:2: map order"}},
		{"map of a type parameter", "func f[M ~map[int]int](m M) {\n\tfor range m {\n\t}\n}", []string{"map order"}},
		{"excused", "func f(m map[int]int) (n int) {\n\t//order:any a sum\n\tfor _, v := range m {\n\t\tn += v\n\t}\n\treturn n\n}", nil},
		{"excused without reason", "func f(m map[int]int) {\n\t//order:any\n\tfor range m {\n\t}\n}", []string{"without a reason"}},
		{"excuse of nothing", "//order:any because\nfunc f() {}", []string{"excuses nothing"}},
		{"keys", "import \"maps\"\nfunc f(m map[int]int) (n int) {\n\tfor k := range maps.Keys(m) {\n\t\tn = k\n\t}\n\treturn n\n}", []string{"maps.Keys outside slices.Sorted"}},
		{"clock", "import \"time\"\nfunc f() time.Time { return time.Now() }", []string{"x.go:3:29: time.Now"}},
		{"zone", "import \"time\"\nvar here = time.Local", []string{"time.Local"}},
		{"times as values", "import \"time\"\nfunc f(a, b time.Time) time.Duration { return b.Sub(a) + time.Second }", nil},
		{"chance", "import \"math/rand/v2\"\nfunc f() int { return rand.Int() }", []string{"the import of math/rand/v2"}},
		{"lock", "import \"sync\"\nvar mu sync.Mutex", []string{"the import of sync"}},
		{"floats", "func f(a, b float64) float64 { const c = 1.5 * 2; return a*b + c }", []string{"arithmetic on floats", "arithmetic on floats"}},
		{"no types", "func f() int { return missing }", []string{"checking types"}},
	}
	s := newSource(t)
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			dir := plant(t, map[string]string{"x.go": "package x\n" + c.body + "\n", "x_test.go": "package x\nfunc t() { go t() }\n"})
			expect(t, checkDeterministic(t, s, dir), c.want...)
		})
	}
}
