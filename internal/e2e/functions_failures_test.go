package e2e

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// A hypervisor that dies in the middle of a call: who waits is told at once, and
// an asynchronous call is made again.
func testHypervisorKilled(d *deployer) {
	l := d.ledger()
	d.laterFunction("fragile")
	d.ok("function", "create", "fragile", "--config", d.probe(), "--timeout", "1m", "--max-concurrent", "2")
	d.trigger("fragile", "/fragile")
	answers := make(chan answer, 1)
	go func() {
		got, err := post(d.Context(), d.c.Nodes[0], "POST", "/fragile", "", l.order("http"))
		if err != nil {
			got.body = err.Error()
		}
		answers <- got
	}()
	d.inOrder(l, 1, 30*time.Second)
	d.killInstance("fragile")
	select {
	case got := <-answers:
		if got.status != 502 || got.problem() != "NodeLost" {
			d.Errorf("over HTTP: %d %s", got.status, got.body)
		}
	case <-time.After(20 * time.Second):
		d.Fatal("the call has no answer 20 s after its hypervisor was killed")
	}
	wait := d.start("function", "invoke", "fragile", "--data", l.order("cli"))
	d.inOrder(l, 1, 30*time.Second)
	d.killInstance("fragile")
	if out, words, code := wait(); code != 7 && code != 10 || !strings.Contains(words, "may have run") {
		d.Errorf("by the command: exit code %d\n%s%s", code, out, words)
	}
	// Asynchronous: at least once.
	d.ok("function", "invoke", "fragile", "--async", "--data", l.order("async"))
	d.inOrder(l, 1, 30*time.Second)
	d.killInstance("fragile")
	d.until("the asynchronous call is made again", 60*time.Second, func() error {
		if n := l.times("async"); n < 2 {
			return fmt.Errorf("%d times so far", n)
		}
		return nil
	})
	l.open()
	d.noEvents("fragile")
	d.answers("fragile", `{}`, `"hello"`)
	d.settled("fragile")
}

// killInstance kills the hypervisors of the node where a function runs one call.
func (d *deployer) killInstance(name string) {
	d.Helper()
	busy := ""
	d.until("one instance is busy", 20*time.Second, func() error {
		for _, n := range d.function(name).Nodes {
			if n.Busy == 1 {
				busy = n.Node
				return nil
			}
		}
		return errText("none is")
	})
	dir := d.c.nodeNamed(busy).Dir
	killed := 0
	for _, p := range d.instances() { // those spawned ahead, too: it cannot be seen from outside which is which
		if slices.ContainsFunc(p.Args, func(a string) bool { return strings.Contains(a, dir+"/") }) {
			kill(d.T, p.Pid)
			killed++
		}
	}
	if killed == 0 {
		d.Fatalf("no hypervisor runs on %s", busy)
	}
}

// noEvents waits until no asynchronous call of a function is left, and none has
// failed for good.
func (d *deployer) noEvents(name string) {
	d.Helper()
	d.until("all asynchronous calls of "+name+" have ended", 60*time.Second, func() error {
		out := d.ok("function", "events", "list", name, "-o", "json")
		if got := decode[struct{ Events []any }](d.T, out); len(got.Events) > 0 {
			return errText(out)
		}
		return nil
	})
}

// What a node has accepted is done, although the node is killed at once and does
// not come back.
func testAcceptingNodeKilled(d *deployer) {
	l := d.ledger()
	l.open()
	d.deploy("later", d.probe())
	node := d.c.Leader() // the worst one
	const n = 20
	for i := range n {
		got, err := post(d.Context(), node, "POST", "/function/later", "", l.order(fmt.Sprint("async", i)), "Authorization", "Bearer "+d.c.Token, "X-Amz-Invocation-Type", "Event")
		if err != nil || got.status != 202 {
			d.Fatalf("call %d: %d %s %v", i, got.status, got.body, err)
		}
	}
	d.c.Kill(node)
	d.Cleanup(func() {
		if node.cmd == nil {
			d.c.Restart(node)
			d.c.WaitReady(len(d.c.Nodes))
		}
	})
	d.until("all calls were made", 90*time.Second, func() error {
		for i := range n {
			if l.times(fmt.Sprint("async", i)) == 0 {
				return fmt.Errorf("call %d was not", i)
			}
		}
		return nil
	})
	d.noEvents("later")
	d.c.Restart(node)
	d.c.WaitReady(len(d.c.Nodes))
	d.answers("later", `{}`, `"hello"`)
}

// The node that runs a call is killed: who asked another node is told, and an
// asynchronous call is made elsewhere. Its hypervisors end although nothing of
// Blixard but the watchdog lives there.
func testNodeKilled(d *deployer) {
	l := d.ledger()
	d.laterFunction("there")
	d.ok("function", "create", "there", "--config", d.probe(), "--timeout", "1m", "--constraint", "zone=zone-node3", "--max-concurrent", "1")
	d.trigger("there", "/there")
	node := d.c.nodeNamed("node3")
	answers := make(chan answer, 1)
	go func() {
		got, err := post(d.Context(), d.c.Nodes[0], "POST", "/there", "", l.order("http"))
		if err != nil {
			got.body = err.Error()
		}
		answers <- got
	}()
	d.inOrder(l, 1, 30*time.Second)
	d.ok("function", "invoke", "there", "--async", "--data", l.order("async"))
	d.c.Kill(node)
	select {
	case got := <-answers:
		if got.status != 502 || got.problem() != "NodeLost" {
			d.Errorf("over HTTP: %d %s", got.status, got.body)
		}
	case <-time.After(30 * time.Second):
		d.Fatal("the call has no answer 30 s after its node was killed")
	}
	d.until("the lost node's hypervisors have ended", 40*time.Second, func() error {
		for _, p := range d.instances() {
			if slices.ContainsFunc(p.Args, func(a string) bool { return strings.Contains(a, node.Dir+"/") }) {
				return fmt.Errorf("%d lives", p.Pid)
			}
		}
		return nil
	})
	// No node fits now.
	out, words, code := d.c.CLI("function", "invoke", "there")
	if code == 0 || code == 11 {
		d.Errorf("without a node that fits: exit code %d\n%s%s", code, out, words)
	}
	l.open()
	d.c.Restart(node)
	d.c.WaitReady(len(d.c.Nodes))
	d.noEvents("there")
	if l.times("async") == 0 {
		d.Error("the asynchronous call was never made")
	}
	d.until("it can be called again", 30*time.Second, func() error {
		if out, words, code := d.c.CLI("function", "invoke", "there"); code != 0 {
			return errText(out + words)
		}
		return nil
	})
	d.settled("there")
	if _, most := l.count(); most != 1 {
		d.Errorf("%d ran at once", most)
	}
}
