package cli_test

import (
	"strings"
	"testing"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/cli"
)

const described = `apiVersion: blixard.dev/v1
kind: Node
metadata: {name: rack-a, labels: {storage: nvme}}
spec: {count: 2, zone: a, vcpus: 8, memory: 32G, reserved: {memory: 2G}, maxInstances: 40}
---
apiVersion: blixard.dev/v1
kind: Node
metadata: {name: witness}
spec: {vcpus: 1, memory: 1G, disk: 1G, witness: true, availability: cordoned}
---
apiVersion: blixard.dev/v1
kind: VM
metadata: {name: web}
spec: {replicas: 3, memory: 1G, desired: stopped}
`

func TestReadCluster(t *testing.T) {
	got, err := cli.ReadCluster(strings.NewReader(described), []string{"-"})
	if err != nil || len(got.Nodes) != 3 || len(got.VMs) != 1 {
		t.Fatalf("%+v, %v", got, err)
	}
	n := got.Nodes[1]
	want := blixard.Resources{MilliCPU: 8000, MemoryMiB: 32 << 10, DiskMiB: 1 << 20}
	if n.Name != "rack-a-2" || n.Zone != "a" || n.Capacity != want || n.Reserved.MemoryMiB != 2048 || n.MaxInstances != 40 || len(n.Labels) != 1 {
		t.Errorf("%+v", n)
	}
	if w := got.Nodes[2]; w.Name != "witness" || !w.Witness || w.Availability != blixard.Cordoned || w.Capacity.DiskMiB != 1024 {
		t.Errorf("%+v", w)
	}
	if vm := got.VMs[0]; vm.Name != "web" || vm.Spec.Replicas != 3 || !vm.Stopped {
		t.Errorf("%+v", vm)
	}
}

func TestReadClusterSaysWhatIsWrong(t *testing.T) {
	node := func(metadata, spec string) string {
		return "apiVersion: blixard.dev/v1\nkind: Node\nmetadata: " + metadata + "\nspec: " + spec + "\n"
	}
	for _, c := range []struct{ text, want string }{
		{node("{name: n}", "{vcpu: 1, memory: 1G}"), "standard input:4: spec.vcpu is not known (did you mean vcpus?)"},
		{node("{name: n}", "{vcpus: 1}"), "the node n has no vcpus or no memory"},
		{node("{}", "{vcpus: 1, memory: 1G}"), "no metadata.name"},
		{node("{name: n}", "{vcpus: 0, memory: 1G}"), "must be at least 1"},
		{node("{name: n}", "{vcpus: 1, memory: 1G, reserved: {memory: 2G}}"), "reserves more than it has"},
		{node("{name: n}", "{vcpus: 1, memory: 512Q}"), "spec.memory"},
		{node("{name: n}", "{vcpus: 1, memory: 1G, count: 20000}"), "more than 10000 nodes"},
		{node("{name: n}", "{vcpus: 1, memory: 1G, availability: drained}"), "did you mean draining?"},
		{node("{name: n}", "{vcpus: 1, memory: 1G}") + "---\n" + node("{name: n}", "{vcpus: 1, memory: 1G}"), "described twice"},
		{"", "no document"},
	} {
		if _, err := cli.ReadCluster(strings.NewReader(c.text), []string{"-"}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s\ngives %v, want %q", c.text, err, c.want)
		}
	}
}
