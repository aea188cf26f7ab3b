package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

// bin is where TestMain has built the programs.
var bin string

func TestMain(m *testing.M) {
	flag.Parse()
	if testing.Short() {
		os.Exit(m.Run())
	}
	code := func() int {
		dir, err := os.MkdirTemp("", "blixard-e2e-")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		build := exec.Command("go", "build", "-o", dir, "github.com/blixard/blixard/cmd/blixard", "github.com/blixard/blixard/cmd/blixard-guest", "github.com/blixard/blixard/cmd/blixard-guest-wasm")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "building the programs: %v\n%s", err, out)
			return 1
		}
		bin = dir
		return m.Run()
	}()
	os.Exit(code)
}

// Node is one server process.
type Node struct {
	Name    string
	Dir     string
	Address string
	Publish string
	args    []string
	cmd     *exec.Cmd
	exited  chan struct{}
}

// Cluster is a set of server processes.
type Cluster struct {
	t     *testing.T
	dir   string
	Nodes []*Node
	Token string
	mu    sync.Mutex
	extra []string
}

// Start starts n nodes and waits until all are ready. extra flags go to each
// server.
func Start(t *testing.T, n int, extra ...string) *Cluster {
	t.Helper()
	if bin == "" {
		t.Fatal("the programs were not built")
	}
	c := &Cluster{t: t, dir: t.TempDir(), extra: extra}
	t.Cleanup(c.stop)
	block := os.Getpid() % 200
	for i := 1; i <= n; i++ {
		c.add(fmt.Sprintf("node%d", i), fmt.Sprintf("127.77.%d.%d", block, i))
	}
	c.start(c.Nodes[0])
	c.Token = c.readToken()
	for _, node := range c.Nodes[1:] {
		c.Join(node)
	}
	c.WaitReady(n)
	return c
}

func (c *Cluster) add(name, publish string) *Node {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		c.t.Fatal(err)
	}
	defer l.Close()
	node := &Node{Name: name, Dir: filepath.Join(c.dir, name), Address: l.Addr().String(), Publish: publish}
	if err := os.MkdirAll(node.Dir, 0o700); err != nil {
		c.t.Fatal(err)
	}
	node.args = append([]string{
		"server", "--data-dir", node.Dir, "--node-id", name, "--listen", node.Address, "--publish-address", publish, "--zone", "zone-" + name,
		"--capacity-memory", "8G", "--capacity-vcpus", "32",
	}, c.extra...)
	c.Nodes = append(c.Nodes, node)
	return node
}

// Join gives a node a token and starts it.
func (c *Cluster) Join(node *Node) {
	c.t.Helper()
	cl := c.Client()
	defer cl.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	tok, err := cl.CreateToken(ctx, &blixardv1.CreateTokenRequest{})
	if err != nil {
		c.t.Fatalf("making a join token: %v", err)
	}
	node.args = append(node.args, "--join", c.Nodes[0].Address, "--token", tok.GetToken())
	c.start(node)
}

func (c *Cluster) start(node *Node) {
	c.t.Helper()
	c.launch(node, exec.Command(filepath.Join(bin, "blixard"), node.args...))
}

// launch starts a node's server by a command, with its words in the node's log.
func (c *Cluster) launch(node *Node, cmd *exec.Cmd) {
	c.t.Helper()
	logFile, err := os.OpenFile(filepath.Join(c.dir, node.Name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		c.t.Fatal(err)
	}
	defer logFile.Close()
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	c.mu.Lock()
	node.cmd, node.exited = cmd, make(chan struct{})
	exited := node.exited
	c.mu.Unlock()
	go func() {
		_ = cmd.Wait() // how it ended is in its log
		close(exited)
	}()
}

// Kill is kill -9.
func (c *Cluster) Kill(node *Node) { c.signal(node, syscall.SIGKILL) }

// Stop is an orderly end.
func (c *Cluster) Stop(node *Node) { c.signal(node, syscall.SIGTERM) }

func (c *Cluster) signal(node *Node, sig syscall.Signal) {
	c.t.Helper()
	if node.cmd == nil {
		return
	}
	if err := node.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		c.t.Fatal(err)
	}
	select {
	case <-node.exited:
	case <-time.After(20 * time.Second):
		c.t.Errorf("%s has not ended 20 s after %v", node.Name, sig)
	}
	node.cmd = nil
}

// Restart starts a node that was killed.
func (c *Cluster) Restart(node *Node) { c.start(node) }

func (c *Cluster) readToken() string {
	c.t.Helper()
	var b []byte
	c.Eventually("the admin token", 20*time.Second, func() error {
		var err error
		b, err = os.ReadFile(filepath.Join(c.Nodes[0].Dir, "admin.token"))
		return err
	})
	return strings.TrimSpace(string(b))
}

// Client reaches all nodes, beginning with the given ones.
func (c *Cluster) Client(first ...*Node) *client.Client {
	c.t.Helper()
	var addresses []string
	for _, n := range append(slices.Clone(first), c.Nodes...) {
		if !slices.Contains(addresses, n.Address) {
			addresses = append(addresses, n.Address)
		}
	}
	cl, err := client.New(client.Options{Addresses: addresses, Token: c.Token})
	if err != nil {
		c.t.Fatal(err)
	}
	return cl
}

// CLI runs the blixard command against the cluster.
func (c *Cluster) CLI(args ...string) (stdout, stderr string, code int) {
	cmd := exec.Command(filepath.Join(bin, "blixard"), args...)
	var addresses []string
	for _, n := range c.Nodes {
		addresses = append(addresses, n.Address)
	}
	cmd.Env = append(os.Environ(), "BLIXARD_ADDR="+strings.Join(addresses, ","), "BLIXARD_TOKEN="+c.Token)
	var out, errb strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errb
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &exit):
		code = exit.ExitCode()
	default:
		c.t.Fatal(err)
	}
	return out.String(), errb.String(), code
}

// Must runs the command and fails the test if it fails.
func (c *Cluster) Must(args ...string) string {
	c.t.Helper()
	out, words, code := c.CLI(args...)
	if code != 0 {
		c.t.Fatalf("blixard %s: exit code %d\n%s%s", strings.Join(args, " "), code, out, words)
	}
	return out
}

// WaitReady waits until n nodes are ready and vote as they should.
func (c *Cluster) WaitReady(n int) {
	c.t.Helper()
	cl := c.Client()
	defer cl.Close()
	c.Eventually(fmt.Sprintf("%d ready nodes", n), 60*time.Second, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		st, err := cl.GetStatus(ctx, &blixardv1.GetStatusRequest{})
		if err != nil {
			return err
		}
		ready := 0
		for _, node := range st.GetNodes() {
			if node.GetState() == "Ready" {
				ready++
			}
		}
		if ready != n || st.GetLeader() == "" {
			return fmt.Errorf("%d of %d nodes are ready, the leader is %q", ready, n, st.GetLeader())
		}
		return nil
	})
}

// Leader is the node that leads.
func (c *Cluster) Leader() *Node {
	c.t.Helper()
	var found *Node
	cl := c.Client()
	defer cl.Close()
	c.Eventually("a leader", 30*time.Second, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		st, err := cl.GetStatus(ctx, &blixardv1.GetStatusRequest{})
		if err != nil {
			return err
		}
		for _, n := range c.Nodes {
			if n.Name == st.GetLeader() {
				found = n
				return nil
			}
		}
		return errors.New("none yet")
	})
	return found
}

// Eventually polls until f gives no error.
func (c *Cluster) Eventually(what string, within time.Duration, f func() error) {
	c.t.Helper()
	deadline := time.Now().Add(within)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			c.dumpLogs()
			c.t.Fatalf("%s: not within %s: %v", what, within, err)
		}
		<-time.After(50 * time.Millisecond)
	}
}

func (c *Cluster) dumpLogs() {
	for _, n := range c.Nodes {
		b, err := os.ReadFile(filepath.Join(c.dir, n.Name+".log"))
		if err != nil {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		c.t.Logf("--- the end of %s's log\n%s", n.Name, strings.Join(lines[max(0, len(lines)-25):], "\n"))
	}
}

// stop ends every process of the cluster, hypervisors too.
func (c *Cluster) stop() {
	if c.t.Failed() {
		c.dumpLogs()
	}
	for _, n := range c.Nodes {
		c.Kill(n)
	}
	for _, p := range processes(c.dir) {
		if err := syscall.Kill(p.Pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			c.t.Errorf("ending the leftover process %d: %v", p.Pid, err)
		}
	}
}

// Process is a process whose command line names a path of the cluster.
type Process struct {
	Pid   int
	Start string // clock ticks since boot, from /proc
	Args  []string
}

// processes lists what runs with dir on its command line.
func processes(dir string) []Process {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		panic(err)
	}
	var out []Process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		b, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil || !strings.Contains(string(b), dir) {
			continue
		}
		stat, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		if err != nil {
			continue
		}
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if len(fields) < 20 || fields[0] == "Z" {
			continue
		}
		out = append(out, Process{Pid: pid, Start: fields[19], Args: strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")})
	}
	return out
}

// hypervisors are the QEMU processes of the cluster.
func (c *Cluster) hypervisors() []Process {
	return slices.DeleteFunc(processes(c.dir), func(p Process) bool { return !strings.Contains(filepath.Base(p.Args[0]), "qemu") })
}

func decode[T any](t *testing.T, text string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("reading %q: %v", text, err)
	}
	return v
}
