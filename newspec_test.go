package blixard_test

import (
	"strings"
	"testing"

	"github.com/blixard/blixard"
)

func TestCheckNew(t *testing.T) {
	label := func(key string) blixard.Label { return blixard.Label{Key: key, Value: "x"} }
	for name, c := range map[string]struct {
		spec blixard.VMSpec
		want string // "" is no error
	}{
		"as it is":          {blixard.VMSpec{Env: []blixard.Label{label("A"), label("b.c-d")}, AffinityVMs: []blixard.VMName{"cache"}}, ""},
		"beside itself":     {blixard.VMSpec{AffinityVMs: []blixard.VMName{"cache", "web"}}, "beside itself"},
		"spaced variable":   {blixard.VMSpec{Env: []blixard.Label{label("A B")}}, "cannot name"},
		"unprintable":       {blixard.VMSpec{Env: []blixard.Label{label("A\n")}}, "cannot name"},
		"doubled variable":  {blixard.VMSpec{Env: []blixard.Label{label("A"), label("B"), label("A")}}, "A is given twice"},
		"no program":        {blixard.VMSpec{Command: []string{""}}, "no program"},
		"empty argument":    {blixard.VMSpec{Command: []string{"echo", ""}}, ""},
		"two operators":     {blixard.VMSpec{Constraints: []blixard.Constraint{{Key: "a", Op: "=", Value: "b=c"}}}, "more than one operator"},
		"arrow":             {blixard.VMSpec{Preferences: []blixard.Preference{{Constraint: blixard.Constraint{Key: "a", Op: "=", Value: ">5"}, Weight: 5}}}, "more than one operator"},
		"unknown driver":    {blixard.VMSpec{Hypervisor: "qemuu"}, "not known"},
		"what Check checks": {blixard.VMSpec{Replicas: -1}, "replicas"},
	} {
		c.spec.Defaults()
		err := c.spec.CheckNew("web")
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want %q", name, err, c.want)
		}
	}
	for zone, ok := range map[string]bool{"": true, "eu-west/1a": true, "ü": false, "a b": false, strings.Repeat("z", 64): false} {
		if err := blixard.CheckZone(zone); (err == nil) != ok {
			t.Errorf("the zone %q: %v", zone, err)
		}
	}
}
