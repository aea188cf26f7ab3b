package control

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

func testSpec(change func(*blixard.VMSpec)) blixard.VMSpec {
	s := blixard.VMSpec{Replicas: 1}
	if change != nil {
		change(&s)
	}
	s.Defaults()
	return s
}

var vmNames = []blixard.VMName{"a", "b", "c", "d"}

func drawVMSpec(t *rapid.T) blixard.VMSpec {
	return testSpec(func(s *blixard.VMSpec) {
		s.Replicas = rapid.IntRange(0, 5).Draw(t, "replicas")
		s.VCPUs = rapid.IntRange(1, 3).Draw(t, "vcpus")
		s.MemoryMiB = int64(rapid.IntRange(1, 4).Draw(t, "gib")) << 10
		s.Singleton = rapid.Bool().Draw(t, "singleton")
		s.AntiAffinityGroup = rapid.SampledFrom([]string{"", "", "g"}).Draw(t, "group")
		s.Priority = rapid.SampledFrom([]int{100, 500, 900}).Draw(t, "priority")
		s.Restart.Mode = rapid.SampledFrom([]string{"always", "always", "on-failure", "never"}).Draw(t, "restart")
		s.SpreadAcross = rapid.SampledFrom([]string{"", "zone"}).Draw(t, "across")
		if rapid.IntRange(0, 4).Draw(t, "dependent") == 0 {
			s.DependsOn = []blixard.VMName{"a"}
		}
		if rapid.IntRange(0, 4).Draw(t, "published") == 0 {
			s.Publish = []blixard.Port{{Protocol: "tcp", HostPort: 80, GuestPort: 80}}
		}
	})
}

// disturb does one random thing to the cluster.
func disturb(t *rapid.T, m *sim) {
	vm := rapid.SampledFrom(vmNames).Draw(t, "vm")
	a := rapid.SampledFrom(m.agents).Draw(t, "agent")
	switch rapid.SampledFrom([]string{"create", "create", "scale", "update", "verb", "restart", "delete", "cut", "heal", "crash", "guest", "availability", "maintenance", "elect", "time", "time", "skew", "remove"}).Draw(t, "do") {
	case "create":
		m.apply("user", &state.CreateVM{Name: vm, Spec: drawVMSpec(t), Start: true})
	case "scale":
		m.apply("user", &state.ScaleVM{Name: vm, Replicas: rapid.IntRange(0, 6).Draw(t, "to")})
	case "update":
		m.apply("user", &state.UpdateVM{Name: vm, Spec: drawVMSpec(t)})
	case "verb":
		m.apply("user", &state.SetVM{Name: vm, Verb: rapid.SampledFrom([]state.VMVerb{state.VerbStart, state.VerbStop, state.VerbPause, state.VerbResume}).Draw(t, "verb")})
	case "restart":
		m.apply("user", &state.RestartVM{Name: vm})
	case "delete":
		m.apply("user", &state.DeleteVM{Name: vm})
	case "cut":
		a.cut = true
	case "heal":
		a.cut = false
	case "crash":
		a.crash()
	case "guest":
		for _, k := range keys(a.guests) {
			a.guests[k].crash = rapid.Bool().Draw(t, "crash")
			a.guests[k].health = rapid.SampledFrom([]blixard.Health{blixard.HealthHealthy, blixard.HealthUnhealthy}).Draw(t, "health")
			break
		}
	case "availability":
		m.apply("user", &state.SetNode{Name: a.name, Availability: rapid.SampledFrom([]blixard.Availability{blixard.Active, blixard.Cordoned, blixard.Draining}).Draw(t, "to")})
	case "maintenance":
		m.apply("user", &state.SetMaintenance{On: rapid.Bool().Draw(t, "on")})
	case "elect":
		m.elect()
	case "time":
		m.run(int64(rapid.IntRange(1, 120).Draw(t, "tenths")) * 100)
	case "skew":
		m.skewMS = int64(rapid.IntRange(-3_600_000, 3_600_000).Draw(t, "skew"))
	case "remove":
		if m.view().NodeCount() > 2 && a.cut {
			m.apply("user", &state.RemoveNode{Name: a.name, Force: true})
		}
	}
	m.run(100)
}

// TestSafetyAndConvergence: whatever happens, a slot never has two incarnations
// that have not ended, no node is overbooked, anti-affinity holds and an
// exclusive VM never runs twice (sim.check, sim.checkProposal); when the
// disturbances stop, everything wanted runs or is refused with a reason, and
// then the leader proposes nothing more; when all is deleted, no row is left.
func TestSafetyAndConvergence(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newSim(t.Fatalf)
		m.log = func(line string) { t.Logf("%d %s", m.now, line) }
		for i := range rapid.IntRange(1, 5).Draw(t, "nodes") {
			m.addNode(blixard.NodeName(fmt.Sprintf("n%d", i+1)), machine{
				cores: int64(rapid.IntRange(2, 8).Draw(t, "cores")), memoryMiB: int64(rapid.IntRange(2, 8).Draw(t, "memory")) << 10, zone: rapid.SampledFrom([]string{"x", "y"}).Draw(t, "zone"),
			})
		}
		for range rapid.IntRange(1, 40).Draw(t, "disturbances") {
			disturb(t, m)
		}
		// The disturbances end.
		for _, a := range m.agents {
			a.cut = false
			for _, k := range keys(a.guests) {
				a.guests[k].crash, a.guests[k].health = false, blixard.HealthHealthy
			}
			m.apply("user", &state.SetNode{Name: a.name, Availability: blixard.Active})
		}
		m.skewMS = 3_600_000 // clocks go forward again
		m.apply("user", &state.SetMaintenance{})
		m.run(400_000) // back-offs are a minute at most, for each slot in turn
		if why := m.unsettled(); why != "" {
			t.Fatalf("not settled: %s", why)
		}
		if quiet := m.now - m.idleMS; quiet < 40_000 {
			t.Fatalf("the leader proposed something %d ms ago", quiet)
		}
		converged(t, m)
		for _, vm := range vmNames {
			m.apply("user", &state.DeleteVM{Name: vm})
		}
		m.run(60_000)
		if v := m.view(); v.VMCount() != 0 || v.InstanceCount() != 0 {
			v.Instances(func(i *blixard.Instance) bool {
				t.Logf("left: %s %s %s on %s", i.Incarnation(), i.State, i.Wanted, i.Node)
				return true
			})
			t.Fatalf("after deleting everything %d VMs and %d instances are left", v.VMCount(), v.InstanceCount())
		}
		for _, a := range m.agents {
			// One that was removed by force is on its own.
			if n := m.view().Node(a.name); n != nil && n.RaftID == a.raftID && len(a.guests) > 0 {
				t.Fatalf("guests are left on %s: %v", a.name, keys(a.guests))
			}
		}
	})
}

// converged: a new leader that looks at everything finds nothing to do.
func converged(t *rapid.T, m *sim) {
	c := New(Config{})
	c.Reset(m.view(), m.now)
	if out := c.Step(Input{View: m.view(), NowMonoMS: m.now, NowWallMS: m.now + m.skewMS}); len(out.Commands) > 0 {
		t.Fatalf("a converged cluster yields %s", render(out.Commands[0], state.Result{}))
	}
	if len(m.c.books) > m.view().VMCount() {
		t.Fatalf("%d books for %d VMs", len(m.c.books), m.view().VMCount())
	}
}

// TestDeterminism: two controllers that are told the same propose the same.
func TestDeterminism(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newSim(t.Fatalf)
		var lines [2][]string
		m.log = func(line string) { lines[0] = append(lines[0], line) }
		for i := range 3 {
			m.addNode(blixard.NodeName(fmt.Sprintf("n%d", i+1)), machine{cores: 4, memoryMiB: 8192})
		}
		for range 10 {
			m.apply("user", &state.CreateVM{Name: rapid.SampledFrom(vmNames).Draw(t, "vm"), Spec: drawVMSpec(t), Start: true})
		}
		v, now := m.view(), m.now
		for k := range lines {
			c := New(Config{})
			c.Reset(v, now)
			lines[k] = nil
			for _, command := range c.Step(Input{View: v, NowMonoMS: now, NowWallMS: now}).Commands {
				lines[k] = append(lines[k], render(command, state.Result{}))
			}
		}
		if fmt.Sprint(lines[0]) != fmt.Sprint(lines[1]) {
			t.Fatalf("%v\n%v", lines[0], lines[1])
		}
	})
}
