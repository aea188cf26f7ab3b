package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// world is one network namespace per node, all on one bridge.
type world struct {
	t      *testing.T
	spaces map[*Node]string // the node's namespace
	links  map[*Node]string // its plug in the bridge
}

func ip(t *testing.T, args ...string) {
	t.Helper()
	out, err := exec.Command("ip", args...).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Fatal("the command ip is missing: run scripts/setup")
	}
	if err != nil {
		t.Fatalf("ip %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// apart starts n nodes, each in a network namespace of its own.
func apart(t *testing.T, n int, extra ...string) (*Cluster, *world) {
	t.Helper()
	w := &world{t: t, spaces: map[*Node]string{}, links: map[*Node]string{}}
	tag := fmt.Sprintf("%x", os.Getpid()%0xffff)
	bridge := "blxe" + tag
	subnet := fmt.Sprintf("10.%d.%d.", 180+os.Getpid()%40, os.Getpid()/40%250)
	ip(t, "link", "add", bridge, "type", "bridge")
	t.Cleanup(func() { ip(t, "link", "del", bridge) })
	ip(t, "addr", "add", subnet+"254/24", "dev", bridge)
	ip(t, "link", "set", bridge, "up")
	spaces := make([]string, n)
	for i := range n {
		spaces[i] = fmt.Sprintf("blxe%s-%d", tag, i+1)
		ip(t, "netns", "add", spaces[i])
		t.Cleanup(func() { ip(t, "netns", "del", spaces[i]) })
	}
	c := New(t, n, extra...) // its processes end before the namespaces go
	for i, node := range c.Nodes {
		space, link := spaces[i], fmt.Sprintf("bx%s-%d", tag, i+1)
		address := fmt.Sprintf("%s%d", subnet, i+1)
		ip(t, "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
		ip(t, "link", "set", link, "master", bridge, "up")
		ip(t, "-n", space, "addr", "add", address+"/24", "dev", "eth0")
		ip(t, "-n", space, "link", "set", "eth0", "up")
		ip(t, "-n", space, "link", "set", "lo", "up")
		w.spaces[node], w.links[node] = space, link
		node.args[slices.Index(node.args, "--listen")+1] = address + ":7400"
		node.args[slices.Index(node.args, "--publish-address")+1] = address
		node.Address, node.Publish = address+":7400", address
	}
	w.start(c, c.Nodes[0])
	c.Token = c.readToken()
	for _, node := range c.Nodes[1:] {
		node.args = append(node.args, "--join", c.Nodes[0].Address, "--token", c.token())
		w.start(c, node)
	}
	c.waitMembers(n, n, 30*time.Second)
	return c, w
}

// start is Cluster.start in the node's namespace.
func (w *world) start(c *Cluster, node *Node) {
	c.launch(node, exec.Command("ip", append([]string{"netns", "exec", w.spaces[node], filepath.Join(bin, "blixard")}, node.args...)...))
}

func (w *world) cut(node *Node)  { ip(w.t, "link", "set", w.links[node], "down") }
func (w *world) heal(node *Node) { ip(w.t, "link", "set", w.links[node], "up") }

// sighting is the life of one hypervisor process, as far as it was seen.
type sighting struct {
	instance    string // "db-1"
	incarnation string // "db-1.1"
	dir         string // of its node
	first, last time.Time
}

// watchman looks at the hypervisors again and again.
type watchman struct {
	c    *Cluster
	stop chan struct{}
	done chan struct{}

	mu   sync.Mutex
	seen map[string]*sighting // by pid and start time
	both []string             // an instance of which two incarnations ran at one instant
}

func (c *Cluster) watch(singletons ...string) *watchman {
	w := &watchman{c: c, stop: make(chan struct{}), done: make(chan struct{}), seen: map[string]*sighting{}}
	go func() {
		defer close(w.done)
		for {
			w.look(singletons)
			select {
			case <-w.stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	}()
	end := sync.OnceFunc(func() {
		close(w.stop)
		<-w.done
	})
	c.t.Cleanup(end)
	return w
}

func (w *watchman) look(singletons []string) {
	now, procs := time.Now(), w.c.hypervisors()
	w.mu.Lock()
	defer w.mu.Unlock()
	alive := map[string][]string{}
	for _, p := range procs {
		i := slices.Index(p.Args, "-name")
		if i < 0 || i+1 >= len(p.Args) {
			continue
		}
		name, _, _ := strings.Cut(p.Args[i+1], ",")
		name = strings.TrimPrefix(name, "guest=")
		id := fmt.Sprintf("%d@%s", p.Pid, p.Start)
		s := w.seen[id]
		if s == nil {
			s = &sighting{incarnation: name, first: now}
			s.instance, _, _ = strings.Cut(name, ".")
			for _, n := range w.c.Nodes {
				if strings.Contains(strings.Join(p.Args, " "), n.Dir+"/") {
					s.dir = n.Name
				}
			}
			w.seen[id] = s
		}
		s.last = now
		alive[s.instance] = append(alive[s.instance], s.incarnation+" on "+s.dir)
	}
	for _, one := range singletons {
		if len(alive[one]) > 1 {
			w.both = append(w.both, fmt.Sprint(alive[one]))
		}
	}
}

// lives are the processes of an instance, by their beginning.
func (w *watchman) lives(instance string) []sighting {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []sighting
	for _, s := range w.seen { //order:any sorted below
		if s.instance == instance {
			out = append(out, *s)
		}
	}
	slices.SortFunc(out, func(a, b sighting) int { return a.first.Compare(b.first) })
	return out
}

// running tells whether a process was there at the last look.
func (s sighting) running() bool { return time.Since(s.last) < 500*time.Millisecond }

// place creates db (a singleton) and web on one node, and waits until both run.
func (c *Cluster) place(on *Node) {
	c.t.Helper()
	for _, n := range c.Nodes {
		if n != on {
			c.Must("cluster", "cordon", n.Name)
		}
	}
	c.Must("vm", "create", "db", "--singleton", "--memory", "128M", "--no-wait")
	c.Must("vm", "create", "web", "--memory", "128M", "--publish", "80", "--timeout", "2m")
	c.waitRuns("db", on)
	for _, n := range c.Nodes {
		if n != on {
			c.Must("cluster", "uncordon", n.Name)
		}
	}
}

// waitRuns waits until a VM's only instance runs, on a node or on any but it.
func (c *Cluster) waitRuns(vm string, on *Node) {
	c.t.Helper()
	c.Eventually(vm+" runs on "+on.Name, 90*time.Second, func() error {
		node, state := c.whereIs(vm)
		if node != on.Name || state != "Running" {
			return fmt.Errorf("it is %s on %q", state, node)
		}
		return nil
	})
}

// whereIs is where a VM's newest instance is, and its state.
func (c *Cluster) whereIs(vm string) (node, state string) {
	out, _, code := c.CLI("vm", "status", vm, "-o", "json")
	if code != 0 {
		return "", "unknown"
	}
	got := decode[struct {
		Instances []struct {
			Node, State string
			Generation  int
		}
	}](c.t, out)
	best := -1
	for _, i := range got.Instances {
		if i.Generation > best {
			best, node, state = i.Generation, i.Node, i.State
		}
	}
	return node, state
}

// replaced waits until an instance has a second life on another node.
func (w *watchman) replaced(instance string, from *Node) (was, is sighting) {
	w.c.t.Helper()
	w.c.Eventually(instance+" is started elsewhere", 30*time.Second, func() error {
		lives := w.lives(instance)
		if len(lives) < 2 || lives[len(lives)-1].dir == from.Name {
			return fmt.Errorf("%d lives", len(lives))
		}
		was, is = lives[len(lives)-2], lives[len(lives)-1]
		return nil
	})
	return was, is
}

// safe checks the life of the singleton: it ended on the node that was out of
// touch before it began elsewhere, and not before the lease was over.
func (w *watchman) safe(out time.Time, was, is sighting, cutOff *Node) {
	w.c.t.Helper()
	if was.dir != cutOff.Name {
		w.c.t.Fatalf("the singleton ran on %s, not on %s", was.dir, cutOff.Name)
	}
	if !is.first.After(was.last) {
		w.c.t.Errorf("the singleton began on %s %s before it ended on %s", is.dir, was.last.Sub(is.first), was.dir)
	}
	if after := is.first.Sub(out); after < 4900*time.Millisecond || after > 15*time.Second {
		w.c.t.Errorf("the singleton was replaced %s after its node was out of touch; the lease and its margin are 6 s, the bound is 15 s", after)
	}
	if ended := was.last.Sub(out); ended > 5100*time.Millisecond {
		w.c.t.Errorf("the singleton ran on for %s after its node was out of touch; its lease is 5 s", ended)
	}
	w.c.t.Logf("out of touch: the singleton ended after %s and began elsewhere after %s", was.last.Sub(out).Round(time.Millisecond), is.first.Sub(out).Round(time.Millisecond))
}

// settled waits until one process of each instance runs, where the state says,
// and all nodes are ready.
func (w *watchman) settled(within time.Duration, vms ...string) {
	w.c.t.Helper()
	start := time.Now()
	w.c.Eventually("everything has converged", within, func() error {
		st, err := w.c.status()
		if err != nil {
			return err
		}
		for _, n := range st.GetNodes() {
			if n.GetState() != "Ready" {
				return fmt.Errorf("%s is %s", n.GetId(), n.GetState())
			}
		}
		for _, vm := range vms {
			node, state := w.c.whereIs(vm)
			var running []string
			for _, s := range w.lives(vm + "-1") {
				if s.running() {
					running = append(running, s.dir)
				}
			}
			if state != "Running" || len(running) != 1 || running[0] != node {
				return fmt.Errorf("%s is %s on %s, processes run on %v", vm, state, node, running)
			}
		}
		return nil
	})
	w.c.t.Logf("converged %s after the node was back", time.Since(start).Round(time.Millisecond))
	for _, both := range w.both {
		w.c.t.Errorf("two incarnations of a singleton at one instant: %s", both)
	}
}

// A node that is cut off keeps what is stateless running while that is replaced
// elsewhere, and stops a singleton before its lease ends; the singleton starts
// elsewhere only then. Healed, everything converges. The second time it is the
// leader that is cut off.
func TestCutOff(t *testing.T) {
	needs(t, true)
	t.Parallel()
	c, w := apart(t, 3)
	seen := c.watch("db-1")
	first := c.Nodes[1]
	if c.Leader() == first {
		c.Must("cluster", "transfer-leader", c.Nodes[0].Name)
	}
	c.place(first)
	for round, node := range []*Node{first, nil} {
		if node == nil {
			at, _ := c.whereIs("db")
			node = c.Nodes[slices.IndexFunc(c.Nodes, func(n *Node) bool { return n.Name == at })]
			c.Must("cluster", "transfer-leader", node.Name)
		}
		stateless := seen.lives("web-1")
		out := time.Now()
		w.cut(node)
		was, is := seen.replaced("db-1", node)
		seen.safe(out, was, is, node)
		if old := stateless[len(stateless)-1]; round == 0 {
			_, now := seen.replaced("web-1", node)
			if i := slices.IndexFunc(seen.lives("web-1"), func(s sighting) bool { return s.incarnation == old.incarnation && s.running() }); i < 0 {
				t.Errorf("the stateless instance was stopped on the node that is cut off")
			}
			t.Logf("the stateless instance was replaced after %s and ran on meanwhile", now.first.Sub(out).Round(time.Millisecond))
		}
		c.waitRuns("db", c.named(is.dir))
		w.heal(node)
		seen.settled(30*time.Second, "db", "web")
	}
}

func (c *Cluster) named(name string) *Node {
	return c.Nodes[slices.IndexFunc(c.Nodes, func(n *Node) bool { return n.Name == name })]
}

// A server that hangs (SIGSTOP) for longer than the lease: the watchdog ends the
// singleton in its place.
func TestFrozenServer(t *testing.T) {
	needs(t, false)
	t.Parallel()
	c := New(t, 3)
	c.start(c.Nodes[0])
	c.Token = c.readToken()
	for _, n := range c.Nodes[1:] {
		c.Join(n)
	}
	c.waitMembers(3, 3, 30*time.Second)
	seen := c.watch("db-1")
	node := c.Leader() // whose election takes time too
	c.place(node)
	out := time.Now()
	freeze(t, node)
	was, is := seen.replaced("db-1", node)
	seen.safe(out, was, is, node)
	c.waitRuns("db", c.named(is.dir))
	thaw(t, node)
	seen.settled(30*time.Second, "db", "web")

	// Given up by force while it hangs with instances: when it wakes it is told,
	// ends what it runs and then itself.
	at, _ := c.whereIs("web")
	gone, all := c.named(at), c.Nodes
	freeze(t, gone)
	c.Nodes = slices.DeleteFunc(slices.Clone(all), func(n *Node) bool { return n == gone })
	c.Must("cluster", "force-remove-node", gone.Name)
	c.waitMembers(2, 1, 30*time.Second)
	thaw(t, gone)
	c.ends(gone, 30*time.Second, "was removed from the cluster")
	c.Eventually("nothing runs on the removed node", 10*time.Second, func() error {
		for _, p := range processes(gone.Dir) {
			if !slices.Contains(p.Args, "watchdog") {
				return fmt.Errorf("%v", p.Args)
			}
		}
		return nil
	})
	seen.settled(60*time.Second, "db", "web")
	c.Nodes = all
}
