package lint

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"testing"

	"github.com/blixard/blixard/internal/config"
)

// TestConfigurationIsDocumented: docs/configuration.md, which errors about
// unknown keys point to, has a row for each key and for no other.
func TestConfigurationIsDocumented(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "docs", "configuration.md"))
	if err != nil {
		t.Fatal(err)
	}
	missing, unknown := checkConfiguration(text, config.Keys())
	for _, key := range missing {
		t.Errorf("docs/configuration.md does not explain %s", key)
	}
	for _, key := range unknown {
		t.Errorf("docs/configuration.md explains %s, which is no key", key)
	}
}

// row begins a table row that explains a key.
var row = regexp.MustCompile("(?m)^\\| `([a-z_.]+)` \\|")

func checkConfiguration(text []byte, keys []string) (missing, unknown []string) {
	explained := map[string]bool{}
	for _, m := range row.FindAllSubmatch(text, -1) {
		key := string(bytes.TrimSpace(m[1]))
		explained[key] = true
		if !slices.Contains(keys, key) {
			unknown = append(unknown, key)
		}
	}
	for _, key := range keys {
		if !explained[key] {
			missing = append(missing, key)
		}
	}
	return missing, unknown
}

func TestConfigurationFindsSins(t *testing.T) {
	missing, unknown := checkConfiguration([]byte("| key |\n| `a.b` | x |\n| `a.d` | y |\nand `a.c` in a sentence\n"), []string{"a.b", "a.c"})
	expect(t, missing, "a.c")
	expect(t, unknown, "a.d")
}
