package control

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// TestStories runs the scripts of testdata: what happens to a cluster, and what
// the leader proposes about it. Each line of output begins with the time since
// the story began. Run with -rewrite to record anew.
//
//	nodes n1 n2 [cores=N] [memory=SIZE] [zone=Z]
//	create NAME [replicas=N] [memory=SIZE] [singleton] [group=G] [across=LABEL] [after=VM] [restart=MODE] [backoff=MS] [health] [priority=N]
//	update NAME memory=SIZE
//	scale NAME N; start|stop|pause|resume|restart|delete NAME
//	cut|heal|crash|drain|uncordon|remove NODE; maintenance on|off; elect
//	kill|sicken|cure INSTANCE
//	run DURATION
//	show
func TestStories(t *testing.T) {
	datadriven.Walk(t, "testdata/stories", func(t *testing.T, path string) {
		st := &story{t: t, sim: newSim(t.Fatalf)}
		st.sim.log = func(line string) { fmt.Fprintf(&st.out, "%s %s\n", st.clock(), line) }
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			st.out.Reset()
			for line := range strings.SplitSeq(d.Input, "\n") {
				st.do(append([]string{}, strings.Fields(line)...))
			}
			st.do(append([]string{d.Cmd}, argsOf(d)...))
			if st.out.Len() == 0 {
				return "ok\n"
			}
			return st.out.String()
		})
	})
}

func argsOf(d *datadriven.TestData) []string {
	var out []string
	for _, a := range d.CmdArgs {
		if len(a.Vals) > 0 {
			out = append(out, a.Key+"="+a.Vals[0])
		} else {
			out = append(out, a.Key)
		}
	}
	return out
}

type story struct {
	t   *testing.T
	sim *sim
	out strings.Builder
}

func (s *story) clock() string { return fmt.Sprintf("%5.1fs", float64(s.sim.now-1000)/1000) }

func (s *story) do(words []string) {
	if len(words) == 0 {
		return
	}
	m, verb, args := s.sim, words[0], words[1:]
	option := map[string]string{}
	var names []string
	for _, a := range args {
		k, v, is := strings.Cut(a, "=")
		if is || k == "singleton" || k == "health" {
			option[k] = v
		} else {
			names = append(names, k)
		}
	}
	first := ""
	if len(names) > 0 {
		first = names[0]
	}
	vm, node := blixard.VMName(first), blixard.NodeName(first)
	user := func(c state.Command) {
		if r := m.apply("you", c)[0]; r.Err != nil {
			fmt.Fprintf(&s.out, "refused: %v\n", r.Err)
		}
	}
	switch verb {
	case "nodes":
		for _, n := range names {
			k := machine{cores: 4, memoryMiB: 8192, zone: option["zone"]}
			if v, ok := option["memory"]; ok {
				k.memoryMiB = s.mib(v)
			}
			if v, ok := option["cores"]; ok {
				k.cores = int64(s.number(v))
			}
			m.addNode(blixard.NodeName(n), k)
		}
	case "create":
		user(&state.CreateVM{Name: vm, Spec: s.spec(option), Start: true})
	case "update":
		spec := m.view().VM(vm).Spec
		spec.MemoryMiB = s.mib(option["memory"])
		user(&state.UpdateVM{Name: vm, Spec: spec})
	case "scale":
		user(&state.ScaleVM{Name: vm, Replicas: s.number(names[1])})
	case "start", "stop", "pause", "resume":
		user(&state.SetVM{Name: vm, Verb: state.VMVerb(verb)})
	case "restart":
		user(&state.RestartVM{Name: vm})
	case "delete":
		user(&state.DeleteVM{Name: vm})
	case "drain":
		user(&state.SetNode{Name: node, Availability: blixard.Draining})
	case "uncordon":
		user(&state.SetNode{Name: node, Availability: blixard.Active})
	case "remove":
		user(&state.RemoveNode{Name: node, Force: true})
	case "maintenance":
		user(&state.SetMaintenance{On: first == "on"})
	case "cut", "heal":
		m.agent(node).cut = verb == "cut"
	case "crash":
		m.agent(node).crash()
	case "elect":
		m.elect()
	case "kill", "sicken", "cure":
		s.guest(verb, first)
	case "run":
		d, err := time.ParseDuration(first)
		if err != nil {
			s.t.Fatal(err)
		}
		m.run(d.Milliseconds())
	case "show":
		s.show()
	default:
		s.t.Fatalf("the story has an unknown verb %q", verb)
	}
}

func (s *story) number(text string) int {
	n, err := strconv.Atoi(text)
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}

func (s *story) mib(text string) int64 {
	n, err := blixard.ParseMemoryMiB(text)
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}

func (s *story) spec(option map[string]string) blixard.VMSpec {
	return testSpec(func(p *blixard.VMSpec) {
		if v, ok := option["replicas"]; ok {
			p.Replicas = s.number(v)
		}
		if v, ok := option["memory"]; ok {
			p.MemoryMiB = s.mib(v)
		}
		if v, ok := option["priority"]; ok {
			p.Priority = s.number(v)
		}
		if v, ok := option["backoff"]; ok {
			p.Restart.BackoffMS = int64(s.number(v))
		}
		if v, ok := option["after"]; ok {
			p.DependsOn = []blixard.VMName{blixard.VMName(v)}
		}
		if _, ok := option["health"]; ok {
			p.Health = &blixard.HealthCheck{Kind: "tcp", Port: 80}
		}
		_, p.Singleton = option["singleton"]
		p.AntiAffinityGroup, p.SpreadAcross, p.Restart.Mode = option["group"], option["across"], option["restart"]
	})
}

// guest does something to what runs as an instance.
func (s *story) guest(verb, id string) {
	for _, a := range s.sim.agents {
		for _, k := range keys(a.guests) {
			if !strings.HasPrefix(k, id+"#") {
				continue
			}
			switch g := a.guests[k]; verb {
			case "kill":
				g.crash = true
			case "sicken":
				g.health = blixard.HealthUnhealthy
			case "cure":
				g.health = blixard.HealthHealthy
			}
		}
	}
}

func (s *story) show() {
	v := s.sim.view()
	v.Nodes(func(n *blixard.Node) bool {
		if n.State != blixard.NodeReady || n.Availability != blixard.Active {
			fmt.Fprintf(&s.out, "node %s is %s, %s\n", n.Name, n.State, n.Availability)
		}
		return true
	})
	v.VMs(func(vm *blixard.VM) bool {
		if vm.Refusal != nil {
			fmt.Fprintf(&s.out, "%s lacks %d: %s\n", vm.Name, vm.Refusal.Missing, vm.Refusal.Summary)
		}
		return true
	})
	v.Instances(func(i *blixard.Instance) bool {
		fmt.Fprintf(&s.out, "%s on %s: %s, to %s", i.Incarnation(), i.Node, i.State, i.Wanted)
		if i.StatePaused {
			s.out.WriteString(", paused")
		}
		s.out.WriteString("\n")
		return true
	})
}
