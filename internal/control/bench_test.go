package control

import (
	"fmt"
	"testing"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// benchCluster has all VMs up and at rest.
func benchCluster(t testing.TB, nodes, vms int) *sim {
	m := newSim(t.Fatalf)
	for i := range nodes {
		m.addNode(blixard.NodeName(fmt.Sprintf("n%d", i)), machine{cores: 1 << 10, memoryMiB: 1 << 20})
	}
	for i := range vms {
		m.index++
		_, changes, err := m.s.Apply(m.index, 1, state.EncodeEntry([]state.Envelope{{NowMS: m.now, Command: &state.CreateVM{Name: blixard.VMName(fmt.Sprintf("vm-%d", i)), Spec: testSpec(nil), Start: true}}}))
		if err != nil {
			t.Fatal(err)
		}
		m.c.Observe(changes)
	}
	for range 100 {
		out := m.c.Step(Input{View: m.view(), NowMonoMS: m.now, NowWallMS: m.now})
		if len(out.Commands) == 0 {
			break
		}
		entry := make([]state.Envelope, len(out.Commands))
		for k, c := range out.Commands {
			entry[k] = state.Envelope{NowMS: m.now, Command: c}
		}
		m.index++
		_, changes := m.s.ApplyAll(m.index, 1, entry)
		m.c.Observe(changes)
	}
	return m
}

// TestPassCostsWhatHasNotConverged: among many VMs at rest, a change of one has
// few rows looked at, whether or not the slow sweep goes on meanwhile.
func TestPassCostsWhatHasNotConverged(t *testing.T) {
	const vms = 5000
	m := benchCluster(t, 10, vms)
	if n := m.view().InstanceCount(); n != vms {
		t.Fatalf("%d of %d are placed", n, vms)
	}
	m.index++
	_, changes := m.s.ApplyAll(m.index, 1, []state.Envelope{{NowMS: m.now, Command: &state.ScaleVM{Name: "vm-7", Replicas: 2}}})
	m.c.Observe(changes)
	if n := m.c.freshVMs.Len(); n != 1 {
		t.Errorf("a change of one VM has %d looked at", n)
	}
	if out := m.c.Step(Input{View: m.view(), NowMonoMS: m.now, NowWallMS: m.now}); len(out.Commands) != 1 {
		t.Errorf("%d commands", len(out.Commands))
	}
	if len(m.c.books) > 10 {
		t.Errorf("%d books are kept", len(m.c.books))
	}
}

// BenchmarkPass measures one pass in a cluster of 100,000 VMs at rest.
func BenchmarkPass(b *testing.B) {
	vms := 100_000
	if testing.Short() {
		vms = 2000
	}
	m := benchCluster(b, 100, vms)
	for _, elapsed := range []int64{0, 100, 1000} {
		b.Run(fmt.Sprintf("elapsed=%dms", elapsed), func(b *testing.B) {
			v := m.view()
			for b.Loop() {
				m.now += elapsed
				m.c.Leases.assumeAll(m.now)
				m.c.touched("vm-7")
				if out := m.c.Step(Input{View: v, NowMonoMS: m.now, NowWallMS: m.now}); len(out.Commands) > 0 {
					b.Fatalf("%T", out.Commands[0])
				}
			}
		})
	}
	b.Run("new leader", func(b *testing.B) {
		for b.Loop() {
			m.c.Reset(m.view(), m.now)
			m.c.Step(Input{View: m.view(), NowMonoMS: m.now, NowWallMS: m.now})
		}
	})
}
