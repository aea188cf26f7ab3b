package blixard_test

import (
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/blixard/blixard"
)

func validFunction() blixard.FunctionSpec {
	var s blixard.FunctionSpec
	s.Defaults()
	return s
}

// TestFunctionDefaults: what is left out becomes a spec that is accepted, and
// what is filled in once is not changed again.
func TestFunctionDefaults(t *testing.T) {
	for _, runtime := range []string{"", "bootstrap", "provided.al2023", "http"} {
		s := blixard.FunctionSpec{Runtime: runtime}
		s.Defaults()
		if err := s.CheckNew(); err != nil {
			t.Errorf("runtime %q: %v", runtime, err)
		}
		again := s
		if again.Defaults(); !again.SameTemplate(&s) || again.RecycleCalls != s.RecycleCalls {
			t.Errorf("defaults change what they made: %+v, %+v", s, again)
		}
	}
	s := blixard.FunctionSpec{MemoryMiB: 4000, Env: []blixard.Label{{Key: "B"}, {Key: "A"}}}
	s.Defaults()
	if s.VCPUs != 3 || s.Env[0].Key != "A" {
		t.Errorf("4000 MiB have %d vCPUs, the environment is %v", s.VCPUs, s.Env)
	}
}

// TestFunctionChecks: each bound names its field, and what may be meant.
func TestFunctionChecks(t *testing.T) {
	for _, c := range []struct {
		change func(s *blixard.FunctionSpec)
		field  string
		says   string
	}{
		{func(s *blixard.FunctionSpec) { s.MemoryMiB = 63 }, "memory", "memory is 63 MiB; it must be between 64 and 10240"},
		{func(s *blixard.FunctionSpec) { s.MemoryMiB = 10241 }, "memory", "10241"},
		{func(s *blixard.FunctionSpec) { s.TimeoutMS = 0 }, "timeout", "0 ms"},
		{func(s *blixard.FunctionSpec) { s.TimeoutMS = 900_001 }, "timeout", "15 minutes"},
		{func(s *blixard.FunctionSpec) { s.Env = []blixard.Label{{Key: "A", Value: strings.Repeat("x", 4096)}} }, "env", "4097 bytes; at most 4096"},
		{func(s *blixard.FunctionSpec) { s.Env = []blixard.Label{{Key: "A"}, {Key: "A"}} }, "env", "twice"},
		{func(s *blixard.FunctionSpec) { s.Env = []blixard.Label{{Key: "A B"}} }, "env", "without spaces"},
		{func(s *blixard.FunctionSpec) { s.Env = []blixard.Label{{Key: "A=B"}} }, "env", "NAME=value"},
		{func(s *blixard.FunctionSpec) { s.Runtime = "bootstap" }, "runtime", "did you mean bootstrap?"},
		{func(s *blixard.FunctionSpec) { s.Runtime = "python3.12" }, "runtime", "bring its program as bootstrap"},
		{func(s *blixard.FunctionSpec) { s.Runtime = "" }, "runtime", "known: nix, bootstrap"},
		{func(s *blixard.FunctionSpec) { s.Runtime, s.Port = "http", 0 }, "port", "--port 8080"},
		{func(s *blixard.FunctionSpec) { s.Handler = strings.Repeat("x", 129) }, "handler", "129 bytes"},
		{func(s *blixard.FunctionSpec) { s.Command = []string{"a\x00"} }, "command", "zero byte"},
		{func(s *blixard.FunctionSpec) { s.Architecture = "arm64" }, "architecture", "known: x86_64"},
		{func(s *blixard.FunctionSpec) { s.Network = "bridge" }, "network", "known: user, none"},
		{func(s *blixard.FunctionSpec) { s.Snapshot = "of" }, "snapshot", "did you mean"},
		{func(s *blixard.FunctionSpec) { s.TargetConcurrency = 0 }, "targetConcurrency", "between 1 and 1000"},
		{func(s *blixard.FunctionSpec) { s.MinInstances, s.MaxInstances = 3, 2 }, "minInstances", "more than maxInstances"},
		{func(s *blixard.FunctionSpec) { s.Placement.Strategies = []string{"bestfit"} }, "placement.strategies", "did you mean best-fit?"},
		{func(s *blixard.FunctionSpec) { s.Placement.Strategies = []string{"best-fit", "best-fit"} }, "placement.strategies", "twice"},
		{func(s *blixard.FunctionSpec) {
			s.Placement.Constraints = []blixard.Constraint{{Key: "a", Op: ">=", Value: "much"}}
		}, "constraint", "much"},
		{func(s *blixard.FunctionSpec) {
			s.Placement.Constraints = []blixard.Constraint{{Key: "a", Op: "=", Value: "=b"}}
		}, "constraint", "more than one operator"},
		{func(s *blixard.FunctionSpec) {
			s.Placement.Preferences = []blixard.Preference{{Constraint: blixard.Constraint{Key: "a", Op: "=", Value: "b"}, Weight: 101}}
		}, "placement.preferences", "between 1 and 100"},
		{func(s *blixard.FunctionSpec) { s.Placement.DataHints = []string{"raw-data"} }, "placement.dataHints", "no kind and value"},
		{func(s *blixard.FunctionSpec) { s.Placement.DataHints = []string{"ceph-pol:raw"} }, "placement.dataHints", "did you mean ceph-pool?"},
	} {
		s := validFunction()
		c.change(&s)
		err, ok := s.CheckNew().(*blixard.Error) //nolint:errorlint // it is returned as it is
		if !ok || err.Code != blixard.CodeInvalid || err.Field != c.field || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%v, want %s about %s", err, c.says, c.field)
		}
	}
}

func TestFunctionNames(t *testing.T) {
	for name, ok := range map[string]bool{"a": true, "A_b-9": true, "": false, "a b": false, "a.b": false, "ä": false, strings.Repeat("x", 64): true, strings.Repeat("x", 65): false} {
		if err := blixard.CheckFunctionName(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
	for name, ok := range map[string]bool{"live": true, "v1": true, "1": false, "": false, "$LATEST": false, strings.Repeat("x", 129): false} {
		if err := blixard.CheckAliasName(name); (err == nil) != ok {
			t.Errorf("alias %q: %v", name, err)
		}
	}
	for q, want := range map[string]int{"": 0, "$LATEST": 0, "1": 1, "12": 12, "0": -1, "01": -1, "live": -1, "-1": -1, "99999999999999999999": -1} {
		n, ok := blixard.ParseVersion(q)
		if ok != (want >= 0) || ok && n != want {
			t.Errorf("%q is %d, %t", q, n, ok)
		}
		if ok && q != "" && blixard.VersionName(n) != q {
			t.Errorf("%q becomes %q", q, blixard.VersionName(n))
		}
	}
	for q, ok := range map[string]bool{"": true, "$LATEST": true, "3": true, "live": true, "0": false, "a:b": false} {
		if err := blixard.CheckQualifier(q); (err == nil) != ok {
			t.Errorf("qualifier %q: %v", q, err)
		}
	}
}

// TestTemplatesDiffer: what a template holds tells templates apart, what only
// counts and places instances does not.
func TestTemplatesDiffer(t *testing.T) {
	a := validFunction()
	for i, change := range []func(s *blixard.FunctionSpec){
		func(s *blixard.FunctionSpec) { s.Runtime = "http" }, func(s *blixard.FunctionSpec) { s.Handler = "x" }, func(s *blixard.FunctionSpec) { s.MemoryMiB++ },
		func(s *blixard.FunctionSpec) { s.Env = []blixard.Label{{Key: "A"}} }, func(s *blixard.FunctionSpec) { s.TimeoutMS++ }, func(s *blixard.FunctionSpec) { s.TargetConcurrency++ },
		func(s *blixard.FunctionSpec) { s.Command = []string{"x"} }, func(s *blixard.FunctionSpec) { s.Network = "none" }, func(s *blixard.FunctionSpec) { s.Snapshot = "off" },
	} {
		if b := validFunction(); b.SameTemplate(&a) {
			if change(&b); b.SameTemplate(&a) {
				t.Errorf("change %d makes no other template", i)
			}
		}
	}
	b := validFunction()
	b.Description, b.MinInstances, b.ScaleDownDelayMS, b.Placement.Strategies = "x", 3, 1, []string{"best-fit"}
	if !b.SameTemplate(&a) {
		t.Error("placing and counting makes another template")
	}
}

// TestFunctionCheckNeverPanics: whatever a spec holds, Check says what is wrong
// or takes it.
func TestFunctionCheckNeverPanics(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := blixard.FunctionSpec{
			Runtime: rapid.String().Draw(t, "runtime"), Handler: rapid.String().Draw(t, "handler"), MemoryMiB: rapid.Int64().Draw(t, "memory"), TimeoutMS: rapid.Int64().Draw(t, "timeout"),
			VCPUs: rapid.Int().Draw(t, "vcpus"), Port: rapid.Int().Draw(t, "port"),
		}
		s.Placement.DataHints = rapid.SliceOf(rapid.String()).Draw(t, "hints")
		s.Placement.Strategies = rapid.SliceOf(rapid.String()).Draw(t, "strategies")
		if rapid.Bool().Draw(t, "defaults") {
			s.Defaults()
		}
		if s.CheckNew() == nil && s.Check() != nil {
			t.Fatalf("%+v is new and not valid", s)
		}
		if f := rapid.String().Draw(t, "name"); blixard.CheckFunctionName(f) == nil && strings.Contains(f, "\x00") {
			t.Fatalf("%q is a name", f)
		}
	})
}

func TestCallable(t *testing.T) {
	former := &blixard.FunctionVersion{State: blixard.FunctionActive}
	for _, c := range []struct {
		v    blixard.FunctionVersion
		self bool
		want *blixard.FunctionVersion
	}{
		{blixard.FunctionVersion{State: blixard.FunctionActive}, true, nil},
		{blixard.FunctionVersion{State: blixard.FunctionPending}, false, nil},
		{blixard.FunctionVersion{State: blixard.FunctionPending, Previous: former}, false, former},
		{blixard.FunctionVersion{State: blixard.FunctionFailed, Previous: former}, false, former},
	} {
		if got := c.v.Callable(); c.self && got != &c.v || !c.self && got != c.want {
			t.Errorf("%+v answers with %+v", c.v, got)
		}
	}
	f := blixard.Function{Async: []blixard.AsyncConfig{{Qualifier: "live", MaxRetries: 0}}}
	if f.AsyncFor("live").MaxRetries != 0 || f.AsyncFor("").MaxRetries != 2 || f.AsyncFor("").Qualifier != blixard.Latest {
		t.Errorf("%+v, %+v", f.AsyncFor("live"), f.AsyncFor(""))
	}
}
