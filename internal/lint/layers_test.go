package lint

import (
	"fmt"
	"go/parser"
	"go/token"
	"path"
	"slices"
	"strings"
	"testing"
)

// anything stands for "may import all of ours but test support".
const anything = "ANY"

// layers is the architecture: package -> the packages of ours it may import.
// Arrows point down only. A trailing /* stands for the direct children that
// have no row of their own.
var layers = map[string]string{
	// 0: words.
	".":               "",
	"internal/assert": "",
	"internal/wire":   "",
	// 1: decisions. Pure functions of state, input and now.
	"internal/state":    ". internal/assert internal/wire",
	"internal/schedule": ". internal/assert internal/state",
	"internal/control":  ". internal/assert internal/state internal/schedule",
	"internal/converge": ". internal/assert",
	"internal/route":    ". internal/assert",
	"internal/replica":  ". internal/assert internal/state internal/control",
	"internal/record":   ". internal/state internal/wire",
	// 2: ports, and what both sides of one speak.
	"internal/vmm":       ".",
	"internal/network":   ".",
	"internal/raftlog":   ".",
	"internal/transport": ".",
	"internal/guest":     ". internal/assert",
	"internal/call":      ". internal/assert",
	"internal/image":     ". internal/assert",
	"internal/code":      ".",
	"internal/wasmlane":  "",
	"internal/accesskey": ". internal/state",
	// 3: adapters. Each knows its own port and no other adapter.
	"internal/vmm/*":             ". internal/assert internal/vmm",
	"internal/network/*":         ". internal/assert internal/network",
	"internal/raftlog/*":         ". internal/assert internal/raftlog",
	"internal/raftlog/wal/memfs": "internal/raftlog/wal",
	"internal/transport/grpc":    ". internal/assert internal/transport api/blixard/peer/v1 api/blixard/peer/v1/peerv1connect",
	"api/blixard/v1":             ".",
	"api/blixard/v1/*":           "api/blixard/v1",
	"api/blixard/peer/v1":        "",
	"api/blixard/peer/v1/*":      "api/blixard/peer/v1",
	// 4: shells. Goroutines, sockets, the wall clock.
	"client":            ". api/blixard/v1 api/blixard/v1/blixardv1connect",
	"internal/config":   ".",
	"internal/dispatch": ". internal/assert internal/route internal/state internal/vmm internal/call internal/code internal/image internal/schedule",
	"internal/server":   ". internal/assert internal/state internal/control internal/replica internal/record internal/raftlog internal/transport",
	"internal/agent":    ". internal/assert internal/converge internal/vmm internal/network internal/guest internal/image",
	// A node passes a request on to another one as any client would.
	"internal/api":       ". client internal/assert internal/state internal/schedule internal/guest api/blixard/v1 api/blixard/v1/blixardv1connect",
	"internal/lambdaapi": ". internal/accesskey internal/assert internal/code internal/state",
	"internal/gateway":   ". internal/route internal/schedule internal/state internal/wire",
	// The messages of the API are the words in which client speaks.
	"internal/cli": ". client api/blixard/v1",
	// Tests: of the tree itself, of the programs as a whole, and what supports them.
	"internal/lint":        "",
	"internal/e2e":         "",
	"internal/api/apitest": ". client internal/api internal/guest internal/record internal/state api/blixard/v1",
	// The simulator drives the core with the real log on a disk in memory.
	"internal/sim": ". internal/assert internal/state internal/route internal/schedule internal/control internal/converge internal/replica internal/record internal/raftlog internal/raftlog/wal internal/raftlog/wal/memfs",
	// 5: wiring, the only place that names adapters.
	"cmd/*": anything,
}

func TestLayers(t *testing.T) {
	for _, sin := range checkLayers(t, root, layers) {
		t.Error(sin)
	}
}

// rule finds a package's row.
func rule(table map[string]string, pkg string) (key, allowed string, ok bool) {
	for _, key := range []string{pkg, path.Dir(pkg) + "/*"} {
		if allowed, ok := table[key]; ok {
			return key, allowed, true
		}
	}
	return "", "", false
}

// testSupport tells whether a package is for tests only, such as a port's
// conformance suite.
func testSupport(pkg string) bool { return strings.HasSuffix(pkg, "test") }

func checkLayers(t *testing.T, base string, table map[string]string) []string {
	t.Helper()
	var sins []string
	used, unknown := map[string]bool{}, map[string]bool{}
	fset := token.NewFileSet()
	walk(t, base, false, func(file string) {
		if !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") {
			return
		}
		pkg := path.Dir(file)
		key, allowed, ok := rule(table, pkg)
		if !ok {
			if !unknown[pkg] {
				sins = append(sins, fmt.Sprintf("%s is not in the table of layers: add it to internal/lint/layers_test.go with the packages it may import", pkg))
			}
			unknown[pkg] = true
			return
		}
		used[key] = true
		for _, spec := range parse(t, fset, base, file, parser.ImportsOnly).Imports {
			imported := strings.Trim(spec.Path.Value, `"`)
			if imported == module {
				imported = "."
			} else if rest, ok := strings.CutPrefix(imported, module+"/"); ok {
				imported = rest
			} else {
				continue
			}
			switch {
			case testSupport(imported) && !testSupport(pkg):
				sins = append(sins, fmt.Sprintf("%s may not import %s, which is for tests", file, imported))
			case allowed != anything && !slices.Contains(strings.Fields(allowed), imported):
				sins = append(sins, fmt.Sprintf("%s may not import %s (%s may import: %s)", file, imported, key, allowed))
			}
		}
	})
	var stale []string
	for key := range table { //order:any sorted below
		if !used[key] {
			stale = append(stale, fmt.Sprintf("the table of layers has a row for %s, of which there is no file", key))
		}
	}
	slices.Sort(stale)
	return append(sins, stale...)
}

func TestLayersFindsSins(t *testing.T) {
	imports := func(pkgs ...string) string {
		text := "package p\n"
		for _, p := range pkgs {
			text += "import _ \"" + p + "\"\n"
		}
		return text
	}
	base := plant(t, map[string]string{
		"a.go":                       imports("fmt", module+"/internal/state"),
		"internal/state/state.go":    imports(module, module+"/internal/vmm/qemu"),
		"internal/state/x_test.go":   imports(module + "/cmd/x"),
		"internal/vmm/vmm.go":        imports("net"),
		"internal/vmm/qemu/qemu.go":  imports(module+"/internal/vmm", module+"/internal/vmm/vmmtest"),
		"internal/vmm/vmmtest/s.go":  imports(module + "/internal/vmm"),
		"internal/surprise/one.go":   imports(module),
		"internal/surprise/two.go":   imports(module),
		"cmd/x/main.go":              imports(module + "/internal/vmm/qemu"),
		"other/go.mod":               "module other\n",
		"other/main.go":              imports(module + "/internal/state"),
		"internal/vmm/testdata/t.go": "no Go at all",
	})
	table := map[string]string{
		".": "", "internal/state": ".", "internal/vmm": "", "internal/vmm/*": "internal/vmm", "cmd/*": anything, "internal/gone": "",
	}
	expect(t, checkLayers(t, base, table),
		"a.go may not import internal/state",
		"internal/state/state.go may not import internal/vmm/qemu",
		"internal/surprise is not in the table",
		"internal/vmm/qemu/qemu.go may not import internal/vmm/vmmtest, which is for tests",
		"row for internal/gone",
	)
}
