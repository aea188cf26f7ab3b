package blixard_test

import (
	"strings"
	"testing"

	"github.com/blixard/blixard"
)

func TestCheckName(t *testing.T) {
	for name, ok := range map[string]bool{
		"a": true, "web-1": true, "0": true, "a--b": true, strings.Repeat("a", 56): true,
		"": false, "-a": false, "a-": false, "Web": false, "a.b": false, "a_b": false, "a/b": false, "../a": false, "a b": false, "$(rm)": false, "a;b": false, "ä": false, "a\x00": false, "a\n": false,
		strings.Repeat("a", 57): false,
	} {
		err := blixard.CheckName(name)
		if (err == nil) != ok {
			t.Errorf("CheckName(%q) = %v", name, err)
		}
		if err != nil && blixard.CodeOf(err) != blixard.CodeInvalid {
			t.Errorf("CheckName(%q) is refused with %s", name, blixard.CodeOf(err))
		}
	}
}

func TestNearest(t *testing.T) {
	for _, c := range []struct {
		name       string
		candidates []string
		want       string
	}{
		{"sprad", []string{"spread", "binpack"}, "spread"},
		{"SPREAD", []string{"spread"}, "spread"},
		{"wbe", []string{"db", "web"}, "web"},
		{"xyz", []string{"spread", "binpack"}, ""},
		{"", []string{"a"}, ""},
		{"web", nil, ""},
		{"ab", []string{"ax", "ay"}, "ax"}, // the first of equals
		{strings.Repeat("a", 100), []string{strings.Repeat("a", 99)}, ""},
	} {
		if got := blixard.Nearest(c.name, c.candidates); got != c.want {
			t.Errorf("Nearest(%.20q, %v) = %q, want %q", c.name, c.candidates, got, c.want)
		}
	}
}

func FuzzCheckName(f *testing.F) {
	for _, s := range []string{"web", "", "-", "a-b", "../x", "\x00"} {
		f.Add(s, "web")
	}
	f.Fuzz(func(t *testing.T, name, other string) {
		if near := blixard.Nearest(name, []string{other, "b"}); near != "" && near != other && near != "b" {
			t.Fatalf("Nearest made up %q", near)
		}
		if blixard.CheckName(name) != nil {
			return
		}
		if strings.ContainsAny(name, "/.\\ \x00\n$;") || len(name) > 56 || strings.ToLower(name) != name {
			t.Fatalf("%q is taken for a name", name)
		}
	})
}

func TestCheckHypervisor(t *testing.T) {
	for _, name := range append(blixard.Hypervisors(), "") {
		if err := blixard.CheckHypervisor(name); err != nil {
			t.Errorf("%q is refused: %v", name, err)
		}
	}
	for name, hint := range map[string]string{"qemuu": "did you mean qemu?", "cloudhypervisor": "did you mean cloud-hypervisor?", "x": "known: qemu", strings.Repeat("q", 65): "known: qemu"} {
		if err := blixard.CheckHypervisor(name); blixard.CodeOf(err) != blixard.CodeInvalid || !strings.Contains(err.Error(), hint) {
			t.Errorf("%q: %v, want a hint %q", name, err, hint)
		}
	}
}
