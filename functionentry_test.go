package blixard_test

import (
	"path"
	"slices"
	"testing"

	"github.com/blixard/blixard"
)

func TestNixEntry(t *testing.T) {
	for _, test := range []struct {
		handler         string
		files           []string
		file, attribute string
		ok              bool
	}{
		{"", []string{"handler.nix", "a.nix"}, "handler.nix", "", true},
		{"", []string{"a.nix", "default.nix"}, "default.nix", "", true},
		{"", []string{"a.nix"}, "a.nix", "", true},
		{"", []string{"a.nix", "pkgs.nix"}, "a.nix", "", true},
		{"", []string{"a.nix", "b.nix"}, "handler.nix", "", false},
		{"", nil, "handler.nix", "", false},
		{"a", []string{"a.nix", "b.nix"}, "a.nix", "", true},
		{"a.nix", []string{"a.nix", "b.nix"}, "a.nix", "", true},
		{"./a.nix", []string{"a.nix"}, "a.nix", "", true},
		{"a.process", []string{"a.nix"}, "a.nix", "process", true},
		{"a.nix.api.process", []string{"a.nix"}, "a.nix", "api.process", true},
		{"lib/a.b.process", []string{"lib/a.b.nix"}, "lib/a.b.nix", "process", true},
		{"lib.d/a", []string{"lib.nix"}, "lib.d/a", "", false},
		{"b.process", []string{"a.nix"}, "b.process", "", false},
		{"bootstrap", []string{"bootstrap", "a.nix"}, "bootstrap", "", false},
	} {
		inRoot := slices.DeleteFunc(slices.Clone(test.files), func(name string) bool { return path.Dir(name) != "." || path.Ext(name) != ".nix" })
		file, attribute, ok := blixard.NixEntry(test.handler, inRoot, func(name string) bool { return slices.Contains(test.files, name) })
		if file != test.file || attribute != test.attribute || ok != test.ok {
			t.Errorf("%q in %v: %q %q %t", test.handler, test.files, file, attribute, ok)
		}
	}
}
