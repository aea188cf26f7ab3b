package route_test

import (
	"fmt"
	"testing"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/route"
)

// TestMinIsShared: all nodes together keep as many instances as are wanted, none
// of them more than one above another, and who may run none keeps none.
func TestMinIsShared(t *testing.T) {
	nodes := []blixard.NodeName{"n1", "n2", "n3"}
	for count := range 8 {
		for i := range 5 {
			f := &blixard.Function{Name: blixard.FunctionName(fmt.Sprintf("f%d", i)), UID: 7, MaxConcurrent: 10}
			v := &blixard.FunctionVersion{Function: f.Name, Seq: 3, Spec: blixard.FunctionSpec{MinInstances: count, MaxInstances: 3, Burst: 2}}
			sum := 0
			for _, n := range append(nodes, "drained") {
				site := route.Site{Node: n, Workers: nodes}
				s := site.SettingsOf(f, v, true)
				sum += s.Min
				if s.Min < count/3 && n != "drained" || s.Min > (count+2)/3 || n == "drained" && s.Min != 0 {
					t.Errorf("%s keeps %d of %d", n, s.Min, count)
				}
				if s.Revision != (route.Revision{Function: f.Name, UID: 7, Seq: 3}) || s.SlotsPerInstance != 4 || s.Burst != 1 || !s.Clones {
					t.Errorf("%+v", s)
				}
			}
			if sum != count {
				t.Errorf("all keep %d of %d", sum, count)
			}
		}
	}
}
