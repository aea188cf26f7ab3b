package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestVMs uses every verb of `blixard vm` as a user types it, on real guests of
// one cluster, and looks at what really became of them: inside the guest, on
// the machine, over HTTP. Parts that disturb others run after those that do not.
func TestVMs(t *testing.T) {
	if testing.Short() {
		t.Skip("boots real guests for some minutes")
	}
	c := Start(t, 3)
	together := func(name string, parts map[string]func(*user)) {
		t.Run(name, func(t *testing.T) {
			for name, part := range parts {
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					part(&user{T: t, c: c})
				})
			}
		})
	}
	together("verbs", map[string]func(*user){
		"guest": testGuest, "ports": testPorts, "life": testLife, "scale": testScale, "console": testConsole, "terminal": testTerminal,
		"logs": testLogs, "formats": testFormats, "dry run": testDryRun, "rest": testREST, "depends on": testDependsOn,
	})
	together("failures", map[string]func(*user){
		"restart always": testRestartAlways, "restart on failure": testRestartOnFailure, "restart never": testRestartNever, "not started": testNotStarted,
		"health exec": testHealthExec, "health http": testHealthHTTP, "health tcp": testHealthTCP, "ends": testEnds, "timeout": testTimeout,
	})
	together("images", map[string]func(*user){
		"trees": testImageTrees, "bundle": testImageBundle, "disk": testImageDisk, "refused": testImageRefused,
		"control groups": testGroups,
	})
	for _, part := range []struct {
		name string
		run  func(*user)
	}{
		{"placement", testPlacement}, {"maintenance", testMaintenance}, {"drain", testDrain}, {"server killed", testServerKilled}, {"uploader killed", testUploaderKilled},
	} {
		t.Run(part.name, func(t *testing.T) { part.run(&user{T: t, c: c}) })
	}
	t.Run("nothing left", func(t *testing.T) { (&user{T: t, c: c}).nothingLeft() })
}

// user types commands, in one test.
type user struct {
	*testing.T
	c *Cluster
}

// small are the flags of a guest that needs little.
var small = []string{"--memory", "128M", "--timeout", "2m"}

// create creates a VM with a small guest and has it deleted in the end.
func (u *user) create(name string, args ...string) string {
	u.Helper()
	u.later(name)
	return u.ok(slices.Concat([]string{"vm", "create", name}, small, args)...)
}

// later deletes a VM, if it is there, at the end of the test.
func (u *user) later(name string) {
	u.Cleanup(func() {
		if _, words, code := u.c.CLI("vm", "delete", name, "--ignore-missing"); code != 0 {
			u.Errorf("deleting %s in the end: %s", name, words)
		}
	})
}

// ok runs a command that has to succeed.
func (u *user) ok(args ...string) string {
	u.Helper()
	out, words, code := u.c.CLI(args...)
	if code != 0 {
		u.Fatalf("blixard %s: exit code %d\n%s%s", strings.Join(args, " "), code, out, words)
	}
	return out
}

// says runs a command that has to succeed and to print a text.
func (u *user) says(want string, args ...string) string {
	u.Helper()
	out := u.ok(args...)
	if !strings.Contains(out, want) {
		u.Errorf("blixard %s: %q is not in what it prints:\n%s", strings.Join(args, " "), want, out)
	}
	return out
}

// fails runs a command that has to fail with an exit code and all of the texts.
func (u *user) fails(code int, wants []string, args ...string) {
	u.Helper()
	out, words, got := u.c.CLI(args...)
	if got != code {
		u.Fatalf("blixard %s: exit code %d, want %d\n%s%s", strings.Join(args, " "), got, code, out, words)
	}
	for _, want := range wants {
		if !strings.Contains(words, want) {
			u.Errorf("blixard %s: %q is not in its words:\n%s", strings.Join(args, " "), want, words)
		}
	}
}

// exec runs a line of shell in a guest.
func (u *user) exec(target, line string) string {
	u.Helper()
	return strings.TrimSpace(u.ok("vm", "exec", target, "--", "/bin/sh", "-c", line))
}

// until polls.
func (u *user) until(what string, within time.Duration, f func() error) {
	u.Helper()
	deadline := time.Now().Add(within)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			u.Fatalf("%s: not within %s: %v", what, within, err)
		}
		<-time.After(50 * time.Millisecond)
	}
}

// vm is what `vm status -o json` tells.
type vmStatus struct {
	Name      string
	Version   uint64
	Phase     string
	Ready     int
	Refusal   *struct{ Summary string }
	Instances []instanceStatus
}

type instanceStatus struct {
	ID, Node, State, Address, Health, Message, Wanted string
	Generation                                        uint64
	Restarts                                          int
	Paused                                            bool
	StartedMs, EndedMs                                int64
}

func (u *user) status(name string) vmStatus {
	u.Helper()
	return decode[vmStatus](u.T, u.ok("vm", "status", name, "-o", "json"))
}

// newest is the newest incarnation of an instance.
func (v vmStatus) newest(id string) instanceStatus {
	var found instanceStatus
	for _, i := range v.Instances {
		if i.ID == id && i.Generation > found.Generation {
			found = i
		}
	}
	return found
}

// await waits until the newest incarnation of name-1 is as wanted.
func (u *user) await(name, what string, is func(instanceStatus) bool) instanceStatus {
	u.Helper()
	var now instanceStatus
	u.until(name+"-1 "+what, 60*time.Second, func() error {
		now = u.status(name).newest(name + "-1")
		if !is(now) {
			return fmt.Errorf("%+v", now)
		}
		return nil
	})
	return now
}

// again waits for a running incarnation of a higher generation.
func (u *user) again(name string, after uint64) instanceStatus {
	u.Helper()
	return u.await(name, fmt.Sprintf("runs again after generation %d", after), func(i instanceStatus) bool { return i.Generation > after && i.State == "Running" })
}

func (u *user) nodes(name string) []string {
	u.Helper()
	var out []string
	for _, i := range u.status(name).Instances {
		out = append(out, i.Node)
	}
	slices.Sort(out)
	return out
}

// get asks over HTTP; the error tells of a status that is no success, too.
func get(url string) (string, error) {
	h := http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	answer, err := h.Get(url)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(io.LimitReader(answer.Body, 1<<20))
	if err == nil && answer.StatusCode >= 300 {
		err = errors.New(answer.Status)
	}
	return string(body), err
}

// rest sends a request to the API of a node and returns status and answer.
func (u *user) rest(method, path, body string) (int, map[string]any) {
	u.Helper()
	request, err := http.NewRequest(method, "http://"+u.c.Nodes[1].Address+path, strings.NewReader(body))
	if err != nil {
		u.Fatal(err)
	}
	request.Header.Set("Authorization", "Bearer "+u.c.Token)
	request.Header.Set("Content-Type", "application/json")
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		u.Fatal(err)
	}
	defer answer.Body.Close()
	var m map[string]any
	if err := json.NewDecoder(answer.Body).Decode(&m); err != nil {
		u.Fatalf("%s %s: %s: %v", method, path, answer.Status, err)
	}
	return answer.StatusCode, m
}

// hypervisor is the process of the newest incarnation of an instance.
func (u *user) hypervisor(instance string) Process {
	u.Helper()
	for _, p := range u.c.hypervisors() {
		if slices.ContainsFunc(p.Args, func(a string) bool { return strings.HasPrefix(a, "guest="+instance+".") }) {
			return p
		}
	}
	u.Fatalf("no hypervisor runs %s", instance)
	return Process{}
}

// command prepares the program for input and output of a test's own.
func (u *user) command(args ...string) *exec.Cmd {
	var addresses []string
	for _, n := range u.c.Nodes {
		addresses = append(addresses, n.Address)
	}
	cmd := exec.Command(filepath.Join(bin, "blixard"), args...)
	cmd.Env = append(os.Environ(), "BLIXARD_ADDR="+strings.Join(addresses, ","), "BLIXARD_TOKEN="+u.c.Token, "TERM=xterm")
	return cmd
}

// nothingLeft: no hypervisor, no file and no socket of an incarnation.
func (u *user) nothingLeft() {
	u.Helper()
	u.until("nothing is left", 30*time.Second, func() error {
		if left := u.c.hypervisors(); len(left) > 0 {
			return fmt.Errorf("%d hypervisors: %v", len(left), left[0].Args)
		}
		for _, n := range u.c.Nodes {
			for _, dir := range []string{"vms/vms", "vms/trash"} {
				left, err := os.ReadDir(filepath.Join(n.Dir, dir))
				if err != nil || len(left) > 0 {
					return fmt.Errorf("%s of %s: %v, %v", dir, n.Name, left, err) //nolint:errorlint // nil, as a rule
				}
			}
		}
		return nil
	})
}

// Each flag of create that makes a difference inside a guest.
func testGuest(u *user) {
	u.create("guest", "--vcpus", "2", "--env", "COLOUR=deep red", "-e", "EMPTY=", "--label", "tier=front", "--label", "team=a",
		"--", "/bin/sh", "-c", `echo "the colour is $COLOUR"; exec sleep 100000`)
	if got := u.exec("guest", `grep -c ^processor /proc/cpuinfo; hostname; echo "<$COLOUR><$EMPTY>"; awk '/MemTotal/{print ($2>80000 && $2<131072)}' /proc/meminfo`); got != "2\nguest-1\n<deep red><>\n1" {
		u.Errorf("inside the guest: %q", got)
	}
	u.until("the command's words", 10*time.Second, func() error {
		if out := u.ok("vm", "logs", "guest"); !strings.Contains(out, "the colour is deep red") {
			return errors.New(out)
		}
		return nil
	})
	u.says("tier=front", "vm", "describe", "guest")
	if got := u.ok("vm", "list", "-o", "name", "--filter", "label.tier=front"); strings.TrimSpace(got) != "vm/guest" {
		u.Errorf("the VMs with the label: %q", got)
	}
	// exec: exit code, streams, input, environment, directory.
	out, words, code := u.c.CLI("vm", "exec", "guest", "--env", "A=b", "--workdir", "/etc", "--", "/bin/sh", "-c", "pwd; echo $A; echo woe >&2; exit 7")
	if out != "/etc\nb\n" || words != "woe\n" || code != 7 {
		u.Errorf("exec: %q, %q, %d", out, words, code)
	}
	in := u.command("vm", "exec", "-i", "guest", "--", "wc", "-c")
	in.Stdin = bytes.NewReader(make([]byte, 1<<20))
	if out, err := in.Output(); strings.TrimSpace(string(out)) != "1048576" {
		u.Errorf("a megabyte of input: %q, %v", out, err)
	}
	if out := u.ok("vm", "exec", "guest", "--", "head", "-c", "1048576", "/dev/zero"); len(out) != 1<<20 {
		u.Errorf("a megabyte of output: %d bytes", len(out))
	}
	u.fails(2, []string{"nosuch is not in PATH"}, "vm", "exec", "guest", "--", "nosuch")
	u.fails(3, []string{"no instance guest-2"}, "vm", "exec", "guest-2", "--", "true")
	u.fails(7, []string{"did not end in time"}, "vm", "exec", "--limit", "300ms", "guest", "--", "sleep", "100")
}

func testPorts(u *user) {
	taken, err := net.Listen("tcp", u.c.Nodes[0].Publish+":0")
	if err != nil {
		u.Fatal(err)
	}
	port := fmt.Sprint(taken.Addr().(*net.TCPAddr).Port)
	u.later("ports")
	u.ok(slices.Concat([]string{"vm", "create", "ports", "--no-wait", "--constraint", "zone=zone-node1", "--publish", port + ":80", "--publish", "81/udp"}, small)...)
	// What else is on the node cannot be known in advance: the start fails, says
	// why, and is tried again.
	u.await("ports", "says that its port is taken", func(i instanceStatus) bool {
		return strings.Contains(i.Message, "port "+port+"/tcp of the node node1 is taken")
	})
	if err := taken.Close(); err != nil {
		u.Fatal(err)
	}
	i := u.await("ports", "runs", func(i instanceStatus) bool { return i.State == "Running" })
	if want := u.c.Nodes[0].Publish + ":" + port; i.Address != want {
		u.Errorf("published at %s, want %s", i.Address, want)
	}
	if body, err := get("http://" + i.Address + "/"); err != nil || !strings.Contains(body, "Hello from ports-1") {
		u.Errorf("%q, %v", body, err)
	}
	if wide := u.ok("vm", "status", "ports", "-o", "wide"); !strings.Contains(wide, "->81/udp") || strings.Contains(wide, ":0->81") {
		u.Errorf("the chosen port: %s", wide)
	}
	// What another VM has is known: refused, with a reason for each node.
	u.later("ports2")
	args := slices.Concat([]string{"vm", "create", "ports2", "--constraint", "zone=zone-node1", "--publish", port + ":80"}, small, []string{"--timeout", "1s"})
	u.fails(6, []string{"not running after 1s", "0/3 nodes fit"}, args...)
	u.says("port "+port, "vm", "explain", "ports2")
	u.says("zone", "vm", "explain", "ports2")
}

// create --no-start, start, stop, restart, pause, resume, delete.
func testLife(u *user) {
	const trap = `trap 'echo going; sleep 1; echo gone; exit 0' TERM; echo up; while :; do sleep 0.1; done`
	u.create("life", "--no-start", "--publish", "80", "--", "/bin/sh", "-c", trap)
	if v := u.status("life"); v.Phase != "Stopped" || len(v.Instances) != 0 {
		u.Errorf("after --no-start: %+v", v)
	}
	u.says("running on", "vm", "start", "life")
	u.says("is already started", "vm", "start", "life")
	first := u.status("life").newest("life-1").Generation
	u.says("stopped", "vm", "stop", "life")
	u.says("is already stopped", "vm", "stop", "life")
	// The guest was given time to end in order, and its words are kept.
	if log := u.ok("vm", "logs", "life"); !strings.Contains(log, "up") || !strings.Contains(log, "gone") {
		u.Errorf("the log of the stopped VM: %s", log)
	}
	u.fails(5, []string{"life-1 is Stopped, not Running"}, "vm", "exec", "life", "--", "true")
	u.ok("vm", "start", "life")
	if g := u.status("life").newest("life-1").Generation; g != first+1 {
		u.Errorf("started again as generation %d after %d", g, first)
	}
	u.says("restarted", "vm", "restart", "life")
	if g := u.status("life").newest("life-1").Generation; g != first+2 {
		u.Errorf("restarted as generation %d after %d", g, first+1)
	}

	// Paused, the guest does nothing; its clock is right when it goes on.
	u.exec("life", "(while :; do date +%s > /tmp/beat; sleep 0.1; done) > /dev/null 2>&1 &")
	u.says("paused", "vm", "pause", "life")
	u.says("already paused", "vm", "pause", "life")
	u.fails(5, []string{"is paused"}, "vm", "exec", "life", "--", "true")
	if i := u.status("life").newest("life-1"); !i.Paused || i.State != "Running" {
		u.Errorf("while paused: %+v", i)
	}
	<-time.After(3 * time.Second) // the clock of the guest stands still
	u.says("resumed", "vm", "resume", "life")
	u.says("was not paused", "vm", "resume", "life")
	u.until("the guest's clock is right", 10*time.Second, func() error {
		var guest int64
		if _, err := fmt.Sscan(u.exec("life", "date +%s"), &guest); err != nil {
			return err
		}
		if off := time.Now().Unix() - guest; off > 2 || off < -2 {
			return fmt.Errorf("off by %d s", off)
		}
		return nil
	})
	// A paused VM can be stopped in order, too, and starts unpaused.
	u.ok("vm", "pause", "life")
	u.ok("vm", "stop", "life")
	if log := u.ok("vm", "logs", "life", "--tail", "6"); !strings.Contains(log, "gone") {
		u.Errorf("the log of the VM that was stopped while paused: %s", log)
	}
	dir := filepath.Join(u.c.nodeNamed(u.status("life").newest("life-1").Node).Dir, "vms", "vms")
	if kept, err := os.ReadDir(dir); err != nil || !slices.ContainsFunc(kept, func(e os.DirEntry) bool { return strings.HasPrefix(e.Name(), "life-1.") }) {
		u.Errorf("what is kept of the stopped VM: %v, %v", kept, err)
	}
	u.says("deleted", "vm", "delete", "life")
	u.fails(3, []string{"no VM"}, "vm", "status", "life")
	u.fails(3, nil, "vm", "delete", "life")
	if kept, err := os.ReadDir(dir); err != nil || slices.ContainsFunc(kept, func(e os.DirEntry) bool { return strings.HasPrefix(e.Name(), "life-1.") }) {
		u.Errorf("what is kept of the deleted VM: %v, %v", kept, err)
	}
	// Another VM of that name never repeats a generation.
	u.create("life", "--no-wait")
	u.await("life", "is placed", func(i instanceStatus) bool { return i.Generation > first+2 })
}

func (c *Cluster) nodeNamed(name string) *Node {
	for _, n := range c.Nodes {
		if n.Name == name {
			return n
		}
	}
	c.t.Fatalf("no node %q", name)
	return nil
}

func testScale(u *user) {
	u.create("scale", "--replicas", "2", "--publish", "80")
	u.says("scaled to 3 replicas", "vm", "scale", "scale", "--replicas", "3")
	if got := u.nodes("scale"); !slices.Equal(got, []string{"node1", "node2", "node3"}) {
		u.Errorf("on %v", got)
	}
	u.says("has 3 replicas already", "vm", "scale", "scale", "--replicas", "3")
	u.ok("vm", "scale", "scale", "--replicas", "2")
	// A restart replaces one after another: one of the two always answers.
	before := u.status("scale")
	done := make(chan error, 1)
	cmd := u.command("vm", "restart", "scale", "--timeout", "2m")
	go func() { done <- cmd.Run() }()
	least := 2
	for over := false; !over; {
		select {
		case err := <-done:
			if err != nil {
				u.Fatalf("restarting: %v", err)
			}
			over = true
		case <-time.After(50 * time.Millisecond):
			running := 0
			for _, i := range u.status("scale").Instances {
				if i.State == "Running" && i.Wanted == "run" {
					running++
				}
			}
			least = min(least, running)
		}
	}
	after := u.status("scale")
	for _, id := range []string{"scale-1", "scale-2"} {
		if after.newest(id).Generation != before.newest(id).Generation+1 {
			u.Errorf("%s went from generation %d to %d", id, before.newest(id).Generation, after.newest(id).Generation)
		}
	}
	if least < 1 {
		u.Error("for a moment no instance was running during the restart")
	}
	u.says("scaled to 0 replicas", "vm", "scale", "scale", "--replicas", "0")
	if v := u.status("scale"); len(v.Instances) != 0 {
		u.Errorf("with 0 replicas: %+v", v.Instances)
	}
	u.fails(2, []string{"--replicas"}, "vm", "scale", "scale", "--replicas", "-1")
}

// pty opens a terminal: what a person has, and what a program is given.
func (u *user) pty() (person, program *os.File) {
	u.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		u.Fatal(err)
	}
	u.Cleanup(func() { master.Close() })
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		err = unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 33, Col: 101})
	}
	if err != nil {
		u.Fatalf("opening a terminal: %v", err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		u.Fatal(err)
	}
	u.Cleanup(func() { slave.Close() })
	return master, slave
}

// screen collects what a terminal shows.
type screen struct {
	u    *user
	f    *os.File
	show chan string
	text string
}

func (u *user) screen(f *os.File) *screen {
	s := &screen{u: u, f: f, show: make(chan string, 100)}
	go func() { // ends with the terminal
		defer close(s.show)
		buf := make([]byte, 4096)
		for {
			n, err := f.Read(buf)
			if err != nil {
				return
			}
			s.show <- string(buf[:n])
		}
	}()
	return s
}

func (s *screen) write(keys string) {
	s.u.Helper()
	if _, err := s.f.WriteString(keys); err != nil {
		s.u.Fatal(err)
	}
}

// waitFor reads on until the text is there.
func (s *screen) waitFor(text string) {
	s.u.Helper()
	limit := time.After(20 * time.Second)
	for !strings.Contains(s.text, text) {
		select {
		case more, ok := <-s.show:
			if !ok {
				s.u.Fatalf("%q did not come; the terminal showed %q", text, s.text)
			}
			s.text += more
		case <-limit:
			s.u.Fatalf("%q did not come in time; the terminal showed %q", text, s.text)
		}
	}
	s.text = s.text[strings.Index(s.text, text)+len(text):]
}

// finish waits for the end of a command.
func (u *user) finish(cmd *exec.Cmd) int {
	u.Helper()
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case <-done:
		return cmd.ProcessState.ExitCode()
	case <-time.After(20 * time.Second):
		if err := cmd.Process.Kill(); err != nil {
			u.Error(err)
		}
		u.Fatalf("%v has not ended", cmd.Args)
		return -1
	}
}

// console: a shell on the guest's serial line, attached from a terminal.
func testConsole(u *user) {
	u.create("console", "--", "/bin/sh", "-c", "while :; do sh -i < /dev/ttyS0 > /dev/ttyS0 2>&1; done")
	for range 2 { // it can be left and attached again
		person, program := u.pty()
		cmd := u.command("vm", "console", "console")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = program, program, program
		if err := cmd.Start(); err != nil {
			u.Fatal(err)
		}
		s := u.screen(person)
		s.waitFor("Ctrl-] leaves it")
		s.write("\r")
		s.waitFor("# ")
		s.write("echo $((6*7))-$(hostname)\r")
		s.waitFor("42-console-1")
		s.write("\x1d")
		if code := u.finish(cmd); code != 0 {
			u.Errorf("leaving the console: exit code %d", code)
		}
	}
	u.says("42-console-1", "vm", "logs", "console")
}

// exec -it: a terminal in the guest, with its size and its keys.
func testTerminal(u *user) {
	u.create("terminal")
	person, program := u.pty()
	cmd := u.command("vm", "exec", "-it", "terminal", "--", "/bin/sh")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = program, program, program
	if err := cmd.Start(); err != nil {
		u.Fatal(err)
	}
	s := u.screen(person)
	s.waitFor("# ")
	s.write("stty size; tty\r")
	s.waitFor("33 101")
	s.waitFor("/dev/pts/")
	s.write("sleep 1000\r")
	<-time.After(300 * time.Millisecond)
	s.write("\x03") // Ctrl-C is for the guest
	s.write("exit 9\r")
	if code := u.finish(cmd); code != 9 {
		u.Errorf("the shell ended with %d, want 9", code)
	}
	u.fails(2, []string{"standard input is not a terminal"}, "vm", "exec", "-it", "terminal", "--", "true")
}

func testLogs(u *user) {
	u.create("logs", "--replicas", "2", "--", "/bin/sh", "-c", `for i in 1 2 3; do echo line $i; done; while ! test -e /tmp/more; do sleep 0.1; done; echo line 4; exec sleep 100000`)
	u.until("all lines", 10*time.Second, func() error {
		out := u.ok("vm", "logs", "logs")
		if !strings.Contains(out, "logs-1 | line 3") || !strings.Contains(out, "logs-2 | line 3") {
			return errors.New(out)
		}
		return nil
	})
	if out := u.ok("vm", "logs", "logs-2", "--tail", "2"); strings.Contains(out, "line 1") || !strings.HasSuffix(strings.ReplaceAll(out, "\r", ""), "line 2\nline 3\n") {
		u.Errorf("the last two lines: %q", out)
	}
	follow := u.command("vm", "logs", "-f", "--tail", "1", "logs-2")
	out, err := follow.StdoutPipe()
	if err == nil {
		err = follow.Start()
	}
	if err != nil {
		u.Fatal(err)
	}
	lines := make(chan string, 10)
	go func() {
		defer close(lines)
		b := make([]byte, 4096)
		for {
			n, err := out.Read(b)
			if err != nil {
				return
			}
			lines <- string(b[:n])
		}
	}()
	s := &screen{u: u, show: lines}
	s.waitFor("line 3")
	u.exec("logs-2", "touch /tmp/more")
	s.waitFor("line 4")
	if err := follow.Process.Signal(os.Interrupt); err != nil {
		u.Fatal(err)
	}
	if code := u.finish(follow); code != 0 {
		u.Errorf("following ended with %d", code)
	}
	u.fails(3, nil, "vm", "logs", "logs-3")
}

func testFormats(u *user) {
	u.create("formats", "--no-start")
	for _, c := range [][]string{
		{"vm", "status", "formats"},
		{"vm", "list"},
		{"vm", "describe", "formats"},
		{"vm", "explain", "formats"},
		{"vm", "events", "formats"},
		{"get", "vms"},
		{"get", "nodes"},
		{"get", "instances"},
		{"cluster", "status"},
		{"cluster", "list"},
	} {
		for _, format := range []string{"table", "wide", "json", "yaml", "name"} {
			out := u.ok(append(c, "-o", format)...)
			switch {
			case format == "json" && !json.Valid([]byte(out)):
				u.Errorf("%v: no JSON:\n%s", c, out)
			case format == "name" && strings.Contains(out, "formats") && !strings.Contains(out, "vm/formats"):
				u.Errorf("%v: no names:\n%s", c, out)
			case format == "yaml" && (strings.Contains(out, "\t") || strings.HasPrefix(out, "{")):
				u.Errorf("%v: no YAML:\n%s", c, out)
			}
		}
	}
	u.fails(2, []string{"wide", "json"}, "vm", "list", "-o", "xml")
	u.fails(2, []string{"did you mean --replicas"}, "vm", "create", "x", "--replica", "2")
	u.fails(2, []string{"512Q"}, "vm", "create", "x", "--memory", "512Q")
	u.fails(4, []string{"formats"}, "vm", "create", "formats")
}

// --dry-run and --no-wait of every verb that changes something.
func testDryRun(u *user) {
	u.create("dry", "--no-start")
	u.later("dry2")
	document := filepath.Join(u.TempDir(), "dry.yaml")
	text := "apiVersion: blixard.dev/v1\nkind: VM\nmetadata: {name: dry}\nspec: {replicas: 5, memory: 128M}\n---\napiVersion: blixard.dev/v1\nkind: VM\nmetadata: {name: dry2}\nspec: {memory: 128M}\n"
	if err := os.WriteFile(document, []byte(text), 0o600); err != nil {
		u.Fatal(err)
	}
	all := func() string {
		var b strings.Builder
		b.WriteString(u.ok("vm", "status", "dry", "-o", "json"))
		_, _, code := u.c.CLI("vm", "status", "dry2")
		fmt.Fprintln(&b, code)
		nodes := decode[struct {
			Nodes []struct{ ID, Availability string }
		}](u.T, u.ok("cluster", "status", "-o", "json")).Nodes
		fmt.Fprintln(&b, nodes)
		return b.String()
	}
	before := all()
	for _, args := range [][]string{
		{"vm", "create", "dry2", "--image", u.tree("a dry run")},
		{"vm", "start", "dry"},
		{"vm", "stop", "dry"},
		{"vm", "scale", "dry", "--replicas", "3"},
		{"vm", "delete", "dry"},
		{"apply", "-f", document},
		{"delete", "-f", document, "--ignore-missing"},
		{"cluster", "drain", "node1"},
		{"cluster", "cordon", "node1"},
		{"cluster", "uncordon", "node1"},
		{"cluster", "maintenance-mode", "enable"},
		{"cluster", "label", "node1", "a=b"},
	} {
		u.ok(append(args, "--dry-run")...)
		if after := all(); after != before {
			u.Fatalf("%v --dry-run changed something:\n%s\nwas\n%s", args, after, before)
		}
	}
	if got := u.holders("a dry run"); len(got) > 0 {
		u.Errorf("--dry-run has sent the image to %v", got)
	}
	for _, verb := range []string{"restart", "pause", "resume"} { // of a VM that is stopped
		u.fails(5, []string{"dry is stopped"}, "vm", verb, "dry", "--dry-run")
	}
	u.fails(4, []string{"dry"}, "vm", "create", "dry", "--dry-run")
	u.fails(3, nil, "vm", "start", "dry2", "--dry-run")
	// --no-wait ends at once.
	began := time.Now()
	u.says("starting", "vm", "start", "dry", "--no-wait")
	u.says("stopping", "vm", "stop", "dry", "--no-wait")
	u.says("", "vm", "delete", "dry", "--no-wait")
	if took := time.Since(began); took > 3*time.Second {
		u.Errorf("three verbs with --no-wait took %s", took)
	}
}

// The same over REST, as curl would do it, at a node of one's own choice.
func testREST(u *user) {
	u.later("rest")
	u.later("rest2")
	status, change := u.rest("POST", "/v1/vms", `{"name":"rest","spec":{"memoryMib":128,"env":{"A":"b"},"publish":[{"guestPort":80}],"restart":{"mode":"on-failure"}}}`)
	if status >= 300 {
		u.Fatalf("POST: %d %v", status, change)
	}
	u.again("rest", 0)
	status, vm := u.rest("GET", "/v1/vms/rest", "")
	if text := fmt.Sprint(vm); status != 200 || !strings.Contains(text, "state:Running") {
		u.Errorf("GET: %d %s", status, text)
	}
	for _, verb := range []string{"pause", "resume", "stop"} {
		if status, answer := u.rest("POST", "/v1/vms/rest/"+verb, "{}"); status != 200 {
			u.Errorf("%s: %d %v", verb, status, answer)
		}
	}
	u.await("rest", "is stopped", func(i instanceStatus) bool { return i.State == "Stopped" })
	for _, bad := range []struct {
		status             int
		method, path, body string
		want               string
	}{
		{409, "POST", "/v1/vms", `{"name":"rest","spec":{}}`, "exists"},
		{404, "GET", "/v1/vms/nosuch", "", "nosuch"},
		{400, "POST", "/v1/vms", `{"name":"rest2","spec":{"memory":128}}`, "memoryMib"},
		{400, "POST", "/v1/vms", `{"name":"rest2","spec":{"memoryMib":1}}`, "spec.memoryMib"},
		{400, "POST", "/v1/vms", `{"name":"Rest;2"}`, "name"},
		{400, "POST", "/v1/vms", `{"name":`, ""},
	} {
		status, problem := u.rest(bad.method, bad.path, bad.body)
		if text := fmt.Sprint(problem); status != bad.status || !strings.Contains(text, bad.want) || problem["detail"] == "" {
			u.Errorf("%s %s %s: %d %s", bad.method, bad.path, bad.body, status, text)
		}
	}
	if status, answer := u.rest("DELETE", "/v1/vms/rest", ""); status != 200 {
		u.Errorf("DELETE: %d %v", status, answer)
	}
}
