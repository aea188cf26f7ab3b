package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

// needs skips what takes too long for -short, and fails where there is no root,
// which mounts and network namespaces need.
func needs(t *testing.T, root bool) {
	t.Helper()
	if testing.Short() {
		t.Skip("starts real servers")
	}
	if root && os.Geteuid() != 0 {
		t.Fatal("this test mounts file systems or makes network namespaces: run it as root, as `.ci/run` does (`sudo -E make test`)")
	}
}

// New makes the directories of n nodes and starts none.
func New(t *testing.T, n int, extra ...string) *Cluster {
	t.Helper()
	if bin == "" {
		t.Fatal("the programs were not built")
	}
	c := &Cluster{t: t, dir: t.TempDir(), extra: extra}
	t.Cleanup(c.stop)
	for range n {
		c.Another()
	}
	return c
}

// Another adds a node that is not started.
func (c *Cluster) Another() *Node {
	i := len(c.Nodes) + 1
	return c.add(fmt.Sprintf("node%d", i), fmt.Sprintf("127.78.%d.%d", os.Getpid()%200, i))
}

// configured is the flag that names a configuration with the given text.
func configured(t *testing.T, text string) []string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"--config", path}
}

// log is what a node has logged.
func (c *Cluster) log(n *Node) string {
	b, err := os.ReadFile(filepath.Join(c.dir, n.Name+".log"))
	if err != nil {
		c.t.Fatal(err)
	}
	return string(b)
}

// forgetLog begins a node's log anew.
func (c *Cluster) forgetLog(n *Node) {
	if err := os.Truncate(filepath.Join(c.dir, n.Name+".log"), 0); err != nil {
		c.t.Fatal(err)
	}
}

// ends waits until a node's server has ended by itself, not well but for one that
// was removed, and has said all of words.
func (c *Cluster) ends(n *Node, within time.Duration, words ...string) {
	c.t.Helper()
	select {
	case <-n.exited:
	case <-time.After(within):
		c.t.Fatalf("the server of %s has not ended within %s; it should have, saying %q; its log:\n%s", n.Name, within, words, tail(c.log(n)))
	}
	lowest := 1
	if slices.Contains(words, "was removed from the cluster") {
		lowest = 0
	}
	if code := n.cmd.ProcessState.ExitCode(); code < lowest || code > 10 {
		c.t.Errorf("the server of %s ended with %s: not a documented exit code", n.Name, n.cmd.ProcessState)
	}
	n.cmd = nil
	log := c.log(n)
	for _, w := range words {
		if !strings.Contains(log, w) {
			c.t.Errorf("the server of %s ended without saying %q; its log:\n%s", n.Name, w, tail(log))
		}
	}
	if strings.Contains(log, "panic:") || strings.Contains(log, "goroutine 1 [") {
		c.t.Errorf("the server of %s panicked:\n%s", n.Name, tail(log))
	}
}

func tail(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-15):], "\n")
}

// refuses starts a node and waits until it has ended with all of words.
func (c *Cluster) refuses(n *Node, words ...string) {
	c.t.Helper()
	c.start(n)
	c.ends(n, 20*time.Second, words...)
}

// local runs the blixard command on this machine's files, without a cluster.
func (c *Cluster) local(args ...string) (string, int) {
	cmd := exec.Command(filepath.Join(bin, "blixard"), args...)
	b, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		c.t.Fatal(err)
	}
	return string(b), cmd.ProcessState.ExitCode()
}

// mustLocal is local that has to succeed.
func (c *Cluster) mustLocal(args ...string) string {
	c.t.Helper()
	out, code := c.local(args...)
	if code != 0 {
		c.t.Fatalf("blixard %s: exit code %d\n%s", strings.Join(args, " "), code, out)
	}
	return out
}

// plain takes the join flags away: the node has joined already.
func (n *Node) plain() {
	for _, flag := range []string{"--join", "--token"} {
		if i := slices.Index(n.args, flag); i >= 0 {
			n.args = slices.Delete(n.args, i, i+2)
		}
	}
}

// token makes a join token.
func (c *Cluster) token(flags ...string) string {
	c.t.Helper()
	return strings.TrimSpace(c.Must(append([]string{"cluster", "token", "create"}, flags...)...))
}

// joinAgain does what a node with a lost or damaged log is told to do.
func (c *Cluster) joinAgain(n, via *Node) string {
	c.t.Helper()
	n.plain()
	return c.mustLocal("cluster", "join", "--replace", "--data-dir", n.Dir, "--node-id", n.Name, "--listen", n.Address, "--publish-address", n.Publish,
		"--zone", "zone-"+n.Name, "--token", c.token("--node-id", n.Name), "--join", via.Address)
}

// status is what the cluster says of itself.
func (c *Cluster) status() (*blixardv1.ClusterStatus, error) {
	cl := c.Client()
	defer cl.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return cl.GetStatus(ctx, &blixardv1.GetStatusRequest{})
}

// waitMembers waits for the number of nodes and of voters among them.
func (c *Cluster) waitMembers(nodes, voters int, within time.Duration) {
	c.t.Helper()
	c.Eventually(fmt.Sprintf("%d nodes, %d of them voters", nodes, voters), within, func() error {
		st, err := c.status()
		if err != nil {
			return err
		}
		ready, votes, words := 0, 0, []string{}
		for _, n := range st.GetNodes() {
			words = append(words, n.GetId()+" "+n.GetState()+" "+n.GetRole())
			if n.GetState() == "Ready" {
				ready++
			}
			if n.GetRole() == "voter" || n.GetRole() == "leader" {
				votes++
			}
		}
		if len(st.GetNodes()) != nodes || ready != nodes || votes != voters {
			return fmt.Errorf("%s", strings.Join(words, ", "))
		}
		return nil
	})
}

// writer creates VMs, one after the other, and remembers what was acknowledged.
type writer struct {
	c      *Cluster
	spec   *blixardv1.VMSpec
	prefix string
	failed atomic.Int64
	n      atomic.Int64

	mu      sync.Mutex
	acked   []string
	last    time.Time
	longest time.Duration // between two acknowledged creates
}

// begin lets so many clients create until stop is called.
func (w *writer) begin(clients int, nodes ...*Node) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.run(ctx, clients, nodes...)
	}()
	end := sync.OnceFunc(func() {
		cancel()
		<-done
	})
	w.c.t.Cleanup(end)
	return end
}

// run creates with so many clients until ctx ends.
func (w *writer) run(ctx context.Context, clients int, nodes ...*Node) {
	var wg sync.WaitGroup
	w.last = time.Now()
	var addresses []string
	for _, n := range nodes {
		addresses = append(addresses, n.Address)
	}
	for range clients {
		cl, err := client.New(client.Options{Addresses: addresses, Token: w.c.Token})
		if err != nil {
			w.c.t.Error(err)
			return
		}
		wg.Go(func() {
			defer cl.Close()
			for ctx.Err() == nil {
				w.create(ctx, cl)
			}
		})
	}
	wg.Wait()
}

func (w *writer) create(ctx context.Context, cl *client.Client) {
	no, name := false, fmt.Sprintf("%s-%d", w.prefix, w.n.Add(1))
	short, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	_, err := cl.CreateVM(short, &blixardv1.CreateVMRequest{Name: name, Start: &no, Spec: w.spec})
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		w.failed.Add(1)
		return
	}
	w.acked = append(w.acked, name)
	w.longest, w.last = max(w.longest, time.Since(w.last)), time.Now()
}

// count is how many creates were acknowledged.
func (w *writer) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.acked)
}

// lost tells which acknowledged VMs a node does not have once it is up to date.
func (w *writer) lost(n *Node) []string {
	w.c.t.Helper()
	cl, err := client.New(client.Options{Addresses: []string{n.Address}, Token: w.c.Token})
	if err != nil {
		w.c.t.Fatal(err)
	}
	defer cl.Close()
	have := map[string]bool{}
	w.c.Eventually("a list of the VMs from "+n.Name, 30*time.Second, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		for after := ""; ; {
			res, err := cl.ListVMs(ctx, &blixardv1.ListVMsRequest{After: after, Limit: 200, Consistency: blixardv1.Consistency_CONSISTENCY_LINEARIZABLE})
			if err != nil {
				return err
			}
			for _, vm := range res.GetVms() {
				after = vm.GetName()
				have[after] = true
			}
			if !res.GetMore() {
				return nil
			}
		}
	})
	w.mu.Lock()
	defer w.mu.Unlock()
	var lost []string
	for _, name := range w.acked {
		if !have[name] {
			lost = append(lost, name)
		}
	}
	return lost
}

// check fails the test if a node lacks anything that was acknowledged.
func (w *writer) check(nodes ...*Node) {
	w.c.t.Helper()
	for _, n := range nodes {
		if lost := w.lost(n); len(lost) > 0 {
			w.c.t.Errorf("%s has lost %d of %d acknowledged creates, such as %s", n.Name, len(lost), w.count(), lost[0])
		}
	}
}

// tmpfs mounts a small file system on dir until the test ends. It must be
// called before the cluster's servers are started, and after New.
func tmpfs(t *testing.T, dir, size string) {
	t.Helper()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatalf("mounting a tmpfs on %s: %v", dir, err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmounting %s: %v", dir, err)
		}
	})
}
