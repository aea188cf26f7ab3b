package blixard_test

import (
	"reflect"
	"strings"
	"testing"

	"github.com/blixard/blixard"
)

func TestParseConstraints(t *testing.T) {
	for _, c := range []struct {
		text string
		want []blixard.Constraint
		ok   bool
	}{
		{"", nil, true},
		{"  ", nil, true},
		{"storage=nvme", []blixard.Constraint{{Key: "storage", Op: "=", Value: "nvme"}}, true},
		{"storage==nvme", []blixard.Constraint{{Key: "storage", Op: "=", Value: "nvme"}}, true},
		{"storage=nvme, memory>=32GB", []blixard.Constraint{{Key: "storage", Op: "=", Value: "nvme"}, {Key: "memory", Op: ">=", Value: "32GB"}}, true},
		{"zone!=a", []blixard.Constraint{{Key: "zone", Op: "!=", Value: "a"}}, true},
		{"cpu<8", []blixard.Constraint{{Key: "cpu", Op: "<", Value: "8"}}, true},
		{"a=b=c", []blixard.Constraint{{Key: "a", Op: "=", Value: "b=c"}}, true},
		{"a=", []blixard.Constraint{{Key: "a", Op: "=", Value: ""}}, true},
		{"storage", nil, false},
		{"=nvme", nil, false},
		{"memory>=lots", nil, false},
		{"memory>", nil, false},
		{"a=b,,c=d", nil, false},
		{"a b=c", nil, false},
		{"a=b\n", []blixard.Constraint{{Key: "a", Op: "=", Value: "b"}}, true},
		{"a=b\x00c", nil, false},
		{strings.Repeat("k", 64) + "=v", nil, false},
		{"k=" + strings.Repeat("v", 256), nil, false},
	} {
		got, err := blixard.ParseConstraints(c.text)
		if (err == nil) != c.ok || c.ok && !reflect.DeepEqual(got, c.want) {
			t.Errorf("ParseConstraints(%.40q) = %v, %v; want %v", c.text, got, err, c.want)
		}
	}
}

func TestConstraintHolds(t *testing.T) {
	n := &blixard.Node{
		Name: "n1", Zone: "a", Hypervisors: []string{"qemu"}, Capacity: blixard.Resources{MilliCPU: 8500, MemoryMiB: 32 << 10, DiskMiB: 1 << 20}, Reserved: blixard.Resources{MilliCPU: 500},
		Labels: []blixard.Label{{Key: "gpu.memory", Value: "16G"}, {Key: "rack", Value: "r1"}},
	}
	for text, want := range map[string]bool{
		"zone=a": true, "zone=b": false, "zone!=b": true, "rack=r1": true, "rack!=r1": false, "node=n1": true, "name=n2": false, "absent=x": false, "absent!=x": true, "absent>1": false,
		"memory>=32G": true, "memory>32G": false, "memory<=32G": true, "memory=32G": true, "memory!=32G": false, "cpu>=8": true, "cpu>8": false, "vcpus=8": true, "disk>=1T": true,
		"gpu.memory>=16GB": true, "gpu.memory>16GB": false, "gpu.memory<1": false, "rack>1": false, "hypervisor=qemu": true, "hypervisor=firecracker": false, "hypervisor!=firecracker": true, "hypervisor>1": false, "hypervisor<=1": false,
	} {
		cs, err := blixard.ParseConstraints(text)
		if err != nil {
			t.Fatal(err)
		}
		if got := cs[0].Holds(n); got != want {
			t.Errorf("%s holds: %t, want %t", text, got, want)
		}
	}
}

func FuzzParseConstraints(f *testing.F) {
	for _, s := range []string{"", "a=b", "storage=nvme,memory>=32GB", "a!=b,c<1", ",", "=", "a==b"} {
		f.Add(s)
	}
	n := &blixard.Node{Name: "n1"}
	f.Fuzz(func(t *testing.T, text string) {
		cs, err := blixard.ParseConstraints(text)
		if err != nil {
			return
		}
		var parts []string
		for _, c := range cs {
			if err := c.Check(); err != nil {
				t.Fatalf("%q is read as %v: %v", text, c, err)
			}
			c.Holds(n)
			parts = append(parts, c.String())
		}
		again, err := blixard.ParseConstraints(strings.Join(parts, ","))
		if err != nil || !reflect.DeepEqual(cs, again) {
			t.Fatalf("%q is read as %v, and that as %v, %v", text, cs, again, err)
		}
	})
}
