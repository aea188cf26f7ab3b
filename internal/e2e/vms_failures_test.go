package e2e

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// A command that ends is run again, after a pause that doubles.
func testRestartAlways(u *user) {
	u.later("always")
	u.ok(slices.Concat([]string{"vm", "create", "always", "--no-wait"}, small, []string{"--", "/bin/sh", "-c", "echo failing; exit 3"})...)
	u.await("always", "has been restarted twice", func(i instanceStatus) bool { return i.Restarts == 2 })
	// What the events tell of each incarnation: when it ended and when the next
	// was placed.
	events := decode[struct {
		Events []struct {
			Kind, Message    string
			Generation, AtMs int64
		}
	}](u.T, u.ok("vm", "events", "always", "-o", "json"))
	failed, placed := map[int64]int64{}, map[int64]int64{}
	for _, e := range events.Events {
		switch e.Kind {
		case "Placed":
			placed[e.Generation] = e.AtMs
		case "Failed":
			failed[e.Generation] = e.AtMs
			if !strings.Contains(e.Message, "exit code 3") {
				u.Errorf("the event does not tell why: %q", e.Message)
			}
		}
	}
	first := slices.Min(slices.Collect(maps.Keys(placed)))
	for after, least := range map[int64]int64{0: 950, 1: 1900} {
		if pause := placed[first+after+1] - failed[first+after]; pause < least || failed[first+after] == 0 {
			u.Errorf("after failure %d the next came after %d ms, want %d: %v %v", after+1, pause, least, failed, placed)
		}
	}
	u.ok("vm", "stop", "always")
	u.says("stopped", "vm", "status", "always")
}

// A command that cannot be started is told at once, and never ran.
func testNotStarted(u *user) {
	u.later("nosuch")
	u.fails(6, []string{"nosuch-1 has failed on", "the command could not be started (exit code 126)", "/nosuch"},
		slices.Concat([]string{"vm", "create", "nosuch"}, small, []string{"--", "/nosuch"})...)
	u.says("the command could not be started", "vm", "list", "-o", "wide", "--filter", "name=nosuch")
	if out := u.ok("vm", "events", "nosuch"); strings.Contains(out, "Running") {
		u.Errorf("it is said to have run:\n%s", out)
	}
	u.ok("vm", "logs", "nosuch")
	u.fails(3, []string{"it is an instance of the VM nosuch"}, "vm", "restart", "nosuch-1")
	u.fails(2, []string{"memory is 64M; the builtin image needs at least 96M to boot"}, "vm", "create", "tiny", "--memory", "64M")
}

func testRestartOnFailure(u *user) {
	// Success is the end of it.
	u.later("success")
	u.ok(slices.Concat([]string{"vm", "create", "success", "--no-wait", "--restart", "on-failure"}, small, []string{"--", "/bin/sh", "-c", "exit 0"})...)
	success := u.await("success", "has ended", func(i instanceStatus) bool { return i.State == "Stopped" })
	u.fails(6, []string{"has ended (Stopped)", "on-failure"}, "vm", "start", "success")
	u.later("limited")
	status, answer := u.rest("POST", "/v1/vms", `{"name":"limited","spec":{"memoryMib":128,"command":["/bin/false"],"restart":{"mode":"on-failure","backoffMs":100,"maxRestarts":1}}}`)
	if status >= 300 {
		u.Fatalf("%d %v", status, answer)
	}
	u.await("limited", "has failed twice", func(i instanceStatus) bool { return i.Restarts == 1 && i.State == "Failed" })
	<-time.After(time.Second)
	if i := u.status("limited").newest("limited-1"); i.Restarts != 1 || i.State != "Failed" {
		u.Errorf("after the last restart: %+v", i)
	}
	if i := u.status("success").newest("success-1"); i.Generation != success.Generation || i.State != "Stopped" {
		u.Errorf("after success: %+v", i)
	}
}

func testRestartNever(u *user) {
	u.later("never")
	u.ok(slices.Concat([]string{"vm", "create", "never", "--no-wait", "--restart", "never"}, small, []string{"--", "/bin/sh", "-c", "echo last words; exit 5"})...)
	was := u.await("never", "has ended", func(i instanceStatus) bool { return i.State == "Failed" })
	u.fails(6, []string{"has ended (Failed)", "never", "exit code 5"}, "vm", "start", "never")
	u.says("last words", "vm", "logs", "never")
	if i := u.status("never").newest("never-1"); i.Generation != was.Generation || i.State != "Failed" {
		u.Errorf("%+v", i)
	}
	// A restart by hand is another matter.
	u.ok("vm", "restart", "never", "--no-wait")
	u.await("never", "has ended again", func(i instanceStatus) bool { return i.Generation == was.Generation+1 && i.State == "Failed" })
}

// healthy waits for the first health.
func (u *user) healthy(name string) instanceStatus {
	u.Helper()
	return u.await(name, "is healthy", func(i instanceStatus) bool { return i.Health == "healthy" && i.State == "Running" })
}

// Each kind of health check notices, and makes a new incarnation.
func testHealthExec(u *user) {
	u.create("healthexec", "--health-check", "exec:test ! -e /tmp/ill", "--health-interval", "200ms", "--health-retries", "2", "--publish", "80")
	was := u.status("healthexec").newest("healthexec-1")
	if was.Health != "healthy" {
		u.Errorf("create came back before it was healthy: %+v", was)
	}
	u.exec("healthexec", "touch /tmp/ill")
	u.again("healthexec", was.Generation)
	u.healthy("healthexec")
	u.says("health check", "vm", "events", "healthexec")
}

const httpd = "mkdir /www; echo fine > /www/index.html; httpd -p 8080 -h /www; exec sleep 100000"

func testHealthHTTP(u *user) {
	u.create("healthhttp", "--health-check", "http:8080/index.html", "--health-interval", "200ms", "--health-retries", "2", "--publish", "8080", "--", "/bin/sh", "-c", httpd)
	was := u.healthy("healthhttp")
	if body, err := get("http://" + was.Address + "/index.html"); err != nil || body != "fine\n" {
		u.Errorf("%q, %v", body, err)
	}
	u.exec("healthhttp", "rm /www/index.html") // 404 is not healthy either
	u.again("healthhttp", was.Generation)
	u.healthy("healthhttp")
}

func testHealthTCP(u *user) {
	u.create("healthtcp", "--health-check", "tcp:8080", "--health-interval", "200ms", "--health-retries", "2", "--", "/bin/sh", "-c", httpd)
	was := u.healthy("healthtcp")
	u.exec("healthtcp", "killall httpd")
	u.again("healthtcp", was.Generation)
	u.healthy("healthtcp")
}

// The ways in which a running instance can end by itself.
func testEnds(u *user) {
	u.create("ends", "--", "/bin/sh", "-c", "sleep 100000; exit 4")
	one := u.status("ends").newest("ends-1")
	// The command crashes.
	u.until("the command has come to its sleep", 10*time.Second, func() error {
		_, words, code := u.c.CLI("vm", "exec", "ends", "--", "killall", "-9", "sleep")
		if code != 0 {
			return errors.New(words)
		}
		return nil
	})
	two := u.again("ends", one.Generation)
	u.says("exit code 4", "vm", "events", "ends")
	// The hypervisor is killed.
	victim := u.hypervisor("ends-1")
	kill(u.T, victim.Pid)
	three := u.again("ends", two.Generation)
	u.says("signal 9", "vm", "events", "ends")
	if three.Generation != two.Generation+1 {
		u.Errorf("generation %d after %d", three.Generation, two.Generation)
	}
	// The guest shuts down: no failure, but not what was wanted. How the shell
	// that asked for it ends, if it is told at all, says nothing.
	u.c.CLI("vm", "exec", "ends", "--", "/bin/sh", "-c", "kill -TERM 1")
	four := u.again("ends", three.Generation)
	// The hypervisor is killed while the guest boots.
	u.ok("vm", "restart", "ends", "--no-wait")
	u.until("the next hypervisor is killed at once", 30*time.Second, func() error {
		for _, p := range u.c.hypervisors() {
			if name := fmt.Sprintf("guest=ends-1.%d", four.Generation+1); slices.Contains(p.Args, name) {
				kill(u.T, p.Pid)
				return nil
			}
		}
		return errors.New("not there yet")
	})
	u.again("ends", four.Generation+1)
}

// A verb that does not get there in time says how far it got and why.
func testTimeout(u *user) {
	u.later("late")
	u.fails(7, []string{"vm/late is not running after 300ms", "goes on"}, "vm", "create", "late", "--memory", "128M", "--timeout", "300ms", "--", "/bin/sh", "-c", "trap '' TERM; while :; do sleep 1; done")
	u.again("late", 0)
	// A guest that ignores the request to end is killed after its grace.
	u.ok("vm", "delete", "late")
	u.create("stubborn", "--stop-grace", "2s", "--", "/bin/sh", "-c", "trap '' TERM; while :; do sleep 1; done")
	u.fails(7, []string{"vm/stubborn is not stopped after 500ms"}, "vm", "stop", "stubborn", "--timeout", "500ms")
	began := time.Now()
	u.ok("vm", "stop", "stubborn")
	if took := time.Since(began); took > 8*time.Second {
		u.Errorf("stopping it took %s with a grace of 2s", took)
	}
	u.later("huge")
	u.fails(6, []string{"0/3 nodes fit", "memory"}, "vm", "create", "huge", "--memory", "1T", "--timeout", "500ms")
	if out := u.ok("vm", "explain", "huge"); strings.Count(out, "needs 1T of memory") != 3 {
		u.Errorf("explain: %s", out)
	}
	u.ok("vm", "scale", "huge", "--replicas", "0")
}

// Where instances are put. Most never boot: they are deleted once placed.
func testPlacement(u *user) {
	placed := func(name string, n int, args ...string) []string {
		u.Helper()
		u.later(name)
		u.ok(slices.Concat([]string{"vm", "create", name, "--no-wait", "--replicas", fmt.Sprint(n)}, small, args)...)
		var nodes []string
		u.until(name+" is placed", 10*time.Second, func() error {
			if nodes = u.nodes(name); len(nodes) != n {
				return fmt.Errorf("%d of %d", len(nodes), n)
			}
			return nil
		})
		return nodes
	}
	all := []string{"node1", "node2", "node3"}
	if got := placed("one", 1, "--constraint", "zone=zone-node2"); !slices.Equal(got, []string{"node2"}) {
		u.Errorf("by constraint: %v", got)
	}
	if got := placed("beside", 2, "--affinity", "one"); !slices.Equal(got, []string{"node2", "node2"}) {
		u.Errorf("by affinity: %v", got)
	}
	if got := placed("across", 3, "--spread-across", "zone"); !slices.Equal(got, all) {
		u.Errorf("spread: %v", got)
	}
	if got := placed("packed", 1, "--strategy", "binpack"); !slices.Equal(got, []string{"node2"}) { // the fullest
		u.Errorf("packed: %v", got)
	}
	if got := placed("apart", 2, "--anti-affinity-group", "g"); len(slices.Compact(got)) != 2 {
		u.Errorf("apart: %v", got)
	}
	if got := placed("apart2", 1, "--anti-affinity-group", "g"); slices.Contains(u.nodes("apart"), got[0]) {
		u.Errorf("apart: %v beside %v", got, u.nodes("apart"))
	}
	u.later("apart3")
	u.fails(6, []string{"0/3 nodes fit"}, slices.Concat([]string{"vm", "create", "apart3", "--anti-affinity-group", "g"}, small, []string{"--timeout", "500ms"})...)
	u.says("g", "vm", "explain", "apart3")
	u.later("nowhere")
	u.fails(6, []string{"0/3 nodes fit"}, slices.Concat([]string{"vm", "create", "nowhere", "--constraint", "storage=nvme,memory>=1GB"}, small, []string{"--timeout", "500ms"})...)
	u.says("storage=nvme", "vm", "explain", "nowhere")
	// A label given to a node lets it in.
	u.ok("cluster", "label", "node3", "storage=nvme")
	u.until("the labelled node takes it", 10*time.Second, func() error {
		if got := u.nodes("nowhere"); !slices.Equal(got, []string{"node3"}) {
			return fmt.Errorf("%v", got)
		}
		return nil
	})
	u.ok("cluster", "label", "node3", "storage-")
	// Deleting what is being started leaves nothing.
	u.ok("vm", "delete", "one", "beside", "across", "packed", "apart", "apart2", "apart3", "nowhere")
	u.nothingLeft()
}

// Maintenance mode: nothing is placed and nothing restarted. Afterwards the
// higher priority comes first.
func testMaintenance(u *user) {
	u.create("kept")
	was := u.status("kept").newest("kept-1")
	u.ok("cluster", "maintenance-mode", "enable")
	u.Cleanup(func() { u.ok("cluster", "maintenance-mode", "disable") })
	u.later("low")
	u.later("high")
	u.ok("vm", "create", "low", "--memory", "5G", "--replicas", "3", "--priority", "100", "--no-wait")
	u.fails(6, []string{"maintenance"}, "vm", "create", "high", "--memory", "5G", "--replicas", "3", "--priority", "900", "--timeout", "500ms")
	kill(u.T, u.hypervisor("kept-1").Pid)
	u.await("kept", "has failed", func(i instanceStatus) bool { return i.State == "Failed" })
	<-time.After(1500 * time.Millisecond)
	if v := u.status("kept"); v.newest("kept-1").Generation != was.Generation {
		u.Errorf("restarted in maintenance mode: %+v", v)
	}
	if n := len(u.nodes("low")) + len(u.nodes("high")); n != 0 {
		u.Errorf("%d instances were placed in maintenance mode", n)
	}
	u.ok("cluster", "maintenance-mode", "disable")
	u.until("the higher priority has its place", 10*time.Second, func() error {
		if got := u.nodes("high"); len(got) != 3 {
			return fmt.Errorf("%v", got)
		}
		return nil
	})
	if got := u.nodes("low"); len(got) != 0 {
		u.Errorf("the lower priority is on %v", got)
	}
	u.ok("vm", "delete", "low", "high")
	u.again("kept", was.Generation)
}

// Drain moves running instances one after another; uncordon lets the node in
// again.
func testDrain(u *user) {
	u.create("moved", "--replicas", "3", "--publish", "80")
	u.ok("cluster", "drain", "node2")
	// Drain ends when the node is empty; what came last from it may still boot.
	var v vmStatus
	u.until("all three run", 60*time.Second, func() error {
		if v = u.status("moved"); v.Ready != 3 {
			return fmt.Errorf("%+v", v)
		}
		return nil
	})
	live := 0
	for _, i := range v.Instances {
		if i.State == "Running" {
			live++
			if i.Node == "node2" {
				u.Errorf("still on the drained node: %+v", i)
			}
			if body, err := get("http://" + i.Address + "/"); err != nil || !strings.Contains(body, i.ID) {
				u.Errorf("%s at %s: %q, %v", i.ID, i.Address, body, err)
			}
		}
	}
	if live != 3 {
		u.Errorf("%d of 3 run after the drain: %+v", live, v)
	}
	u.ok("vm", "scale", "moved", "--replicas", "4")
	if slices.Contains(u.nodes("moved"), "node2") {
		u.Error("the drained node got an instance")
	}
	u.says("drain", "vm", "explain", "moved")
	u.ok("cluster", "uncordon", "node2")
	u.ok("vm", "scale", "moved", "--replicas", "5")
	if !slices.Contains(u.nodes("moved"), "node2") {
		u.Error("the node that is used again got nothing")
	}
}

// The server of the instance's node is killed in the middle of each step, and
// comes back: the step ends as wanted, once.
func testServerKilled(u *user) {
	pinned := slices.Concat([]string{"--constraint", "zone=zone-node3", "--publish", "80"}, small)
	node := u.c.nodeNamed("node3")
	twice := map[string]Process{} // hypervisor by incarnation
	note := func() {
		u.Helper()
		for _, p := range u.c.hypervisors() {
			for _, a := range p.Args {
				if was, known := twice[a]; strings.HasPrefix(a, "guest=") {
					if known && (was.Pid != p.Pid || was.Start != p.Start) {
						u.Errorf("%s ran as %d and as %d", a, was.Pid, p.Pid)
					}
					twice[a] = p
				}
			}
		}
	}
	crash := func() {
		u.Helper()
		u.c.Kill(node)
		note()
		u.c.Restart(node)
	}
	for i, pause := range []time.Duration{0, 60 * time.Millisecond, 200 * time.Millisecond, 1200 * time.Millisecond} {
		name := fmt.Sprintf("crash%d", i)
		u.later(name)
		u.ok(slices.Concat([]string{"vm", "create", name, "--no-wait"}, pinned)...)
		<-time.After(pause)
		crash()
		u.ok("vm", "start", name) // waits until it runs
		note()
	}
	// A running guest does not notice.
	before := u.hypervisor("crash3-1")
	i := u.status("crash3").newest("crash3-1")
	crash()
	u.until("the guest is found again", 20*time.Second, func() error {
		_, words, code := u.c.CLI("vm", "exec", "crash3", "--", "true")
		if code != 0 {
			return errors.New(words)
		}
		return nil
	})
	if after := u.hypervisor("crash3-1"); after.Pid != before.Pid || after.Start != before.Start {
		u.Errorf("the hypervisor was %d and is %d", before.Pid, after.Pid)
	}
	if now := u.status("crash3").newest("crash3-1"); now.Generation != i.Generation || now.Address != i.Address {
		u.Errorf("it was %+v and is %+v", i, now)
	}
	was := u.status("crash1").newest("crash1-1").Generation
	// In the middle of a stop, a restart and a delete.
	u.ok("vm", "stop", "crash0", "--no-wait")
	u.ok("vm", "restart", "crash1", "--no-wait")
	u.ok("vm", "delete", "crash2", "--no-wait")
	crash()
	u.ok("vm", "stop", "crash0")
	u.ok("vm", "start", "crash1")
	if g := u.status("crash1").newest("crash1-1").Generation; g != was+1 {
		u.Errorf("one restart led from generation %d to %d", was, g)
	}
	u.until("the deleted VM is gone", 20*time.Second, func() error {
		if _, _, code := u.c.CLI("vm", "status", "crash2"); code != 3 {
			return fmt.Errorf("exit code %d", code)
		}
		return nil
	})
	note()
	// The hypervisor dies while nobody looks.
	u.c.Kill(node)
	kill(u.T, before.Pid)
	u.c.Restart(node)
	u.again("crash3", i.Generation)
	note()
	u.ok("vm", "delete", "crash0", "crash1", "crash3")
	u.nothingLeft()
}

// An upload survives the loss of the node that took it.
func testUploaderKilled(u *user) {
	node := u.c.Leader()
	var other *Node
	for _, n := range u.c.Nodes {
		if n != node {
			other = n
		}
	}
	tree := u.tree("an upload")
	if err := os.WriteFile(filepath.Join(tree, "etc/only"), []byte("here"), 0o600); err != nil {
		u.Fatal(err)
	}
	// The first address is the one that is asked.
	cmd := u.command("vm", "create", "upload", "--no-start", "--image", tree)
	cmd.Env = append(cmd.Env, "BLIXARD_ADDR="+other.Address)
	u.later("upload")
	if out, err := cmd.CombinedOutput(); err != nil {
		u.Fatalf("uploading: %v\n%s", err, out)
	}
	if got := u.holders("an upload"); len(got) != 2 || !slices.Contains(got, other.Name) {
		u.Fatalf("the image was sent to %s and is on %v", other.Name, got)
	}
	u.c.Kill(other)
	u.Cleanup(func() {
		if other.cmd == nil {
			u.c.Restart(other)
			u.c.WaitReady(3)
		}
	})
	if err := os.RemoveAll(filepath.Join(other.Dir, "images")); err != nil {
		u.Fatal(err)
	}
	// Every other node can run it, also the one that has no copy.
	for _, n := range u.c.Nodes {
		if n == other {
			continue
		}
		name := "upload-" + n.Name
		u.create(name, "--image", u.imageOf("upload"), "--constraint", "zone=zone-"+n.Name)
		if got := u.exec(name, "cat /etc/only"); got != "here" {
			u.Errorf("%q", got)
		}
	}
	u.c.Restart(other)
	u.c.WaitReady(3)
	u.create("upload-back", "--image", u.imageOf("upload"), "--constraint", "zone=zone-"+other.Name)
	u.ok("vm", "delete", "upload", "upload-back")
}

// A VM starts when those it depends on run and are healthy.
func testDependsOn(u *user) {
	u.later("first")
	u.create("second", "--no-wait", "--depends-on", "first")
	u.until("the second says what it waits for", 10*time.Second, func() error {
		v := u.status("second")
		if v.Refusal == nil || !strings.Contains(v.Refusal.Summary, "waits for first, which does not exist") {
			return fmt.Errorf("%+v", v)
		}
		return nil
	})
	u.create("first", "--health-check", "exec:test -e /tmp/ready", "--health-interval", "200ms", "--health-start-period", "1m", "--no-wait")
	u.again("first", 0)
	u.until("the second waits for the first one's health", 10*time.Second, func() error {
		v := u.status("second")
		if v.Refusal == nil || !strings.Contains(v.Refusal.Summary, "healthy") || len(v.Instances) > 0 {
			return fmt.Errorf("%+v", v)
		}
		return nil
	})
	u.exec("first", "touch /tmp/ready")
	u.again("second", 0)
}
