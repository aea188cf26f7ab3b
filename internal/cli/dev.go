package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

// A development cluster is a directory: dev.json says which nodes there are,
// nodes/NAME is the data directory of a server, logs/NAME.log its log. Servers
// are processes of this very program. One command at a time changes a cluster:
// it holds the lock on dev.lock.

// maxDevNodes is bounded by the last byte of the nodes' addresses.
const maxDevNodes = 50

// devNode is a node of a development cluster.
type devNode struct {
	Name    string
	Listen  string // 127.0.0.1:PORT
	Publish string // 127.x.y.N: ports of VMs, so that nodes do not clash
	Zone    string
	Pid     int    `json:",omitempty"`
	Ticks   uint64 `json:",omitempty"` // start time of Pid, in clock ticks since boot
	Started bool   // it is to run; false after kill
}

// devCluster is what dev.json holds.
type devCluster struct {
	dir            string
	lock           *os.File
	Format         int
	CapacityMemory string
	CapacityVCPUs  int
	Nodes          []*devNode
	Args           []string `json:",omitempty"` // further flags of the servers
}

// devDir is where the cluster of this environment lives.
func (a *app) devDir() (string, error) {
	if d := a.env.Getenv("BLIXARD_DEV_DIR"); d != "" {
		return filepath.Abs(d)
	}
	if d := a.env.Getenv("XDG_STATE_HOME"); d != "" {
		return filepath.Join(d, "blixard", "dev"), nil
	}
	home := a.env.Getenv("HOME")
	if home == "" {
		return "", blixard.Invalid("BLIXARD_DEV_DIR", "export BLIXARD_DEV_DIR=/some/directory", "there is no home directory to keep the cluster in")
	}
	return filepath.Join(home, ".local", "state", "blixard", "dev"), nil
}

// openDev reads the cluster; nil when there is none. lock keeps other commands
// from changing it meanwhile.
func (a *app) openDev(lock bool) (*devCluster, error) {
	dir, err := a.devDir()
	if err != nil {
		return nil, err
	}
	d := &devCluster{dir: dir}
	data, err := os.ReadFile(d.path("dev.json"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the development cluster: %w", err)
	}
	if lock {
		if err := d.acquire(); err != nil {
			return nil, err
		}
		if data, err = os.ReadFile(d.path("dev.json")); err != nil {
			return nil, errors.Join(fmt.Errorf("reading the development cluster: %w", err), d.release())
		}
	}
	if err := json.Unmarshal(data, d); err != nil {
		return nil, errors.Join(&blixard.Error{Code: blixard.CodeConflict, Message: d.path("dev.json") + " is damaged: " + err.Error(), Hint: "end its processes and delete " + dir}, d.release())
	}
	return d, nil
}

// needDev is openDev where there must be a cluster.
func (a *app) needDev(lock bool) (*devCluster, error) {
	d, err := a.openDev(lock)
	if err == nil && d == nil {
		dir, dirErr := a.devDir()
		if dirErr != nil {
			return nil, dirErr
		}
		return nil, &blixard.Error{Code: blixard.CodeNotFound, Message: "there is no development cluster in " + dir, Hint: "`blixard dev up` makes one; BLIXARD_DEV_DIR names another directory"}
	}
	return d, err
}

func (d *devCluster) path(parts ...string) string {
	return filepath.Join(append([]string{d.dir}, parts...)...)
}
func (d *devCluster) dataDir(n *devNode) string { return d.path("nodes", n.Name) }
func (d *devCluster) logFile(n *devNode) string { return d.path("logs", n.Name+".log") }

func (d *devCluster) acquire() error {
	f, err := os.OpenFile(d.path("dev.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("locking the development cluster: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return errors.Join(&blixard.Error{
			Code: blixard.CodeConflict, Message: "another `blixard dev` command is at work on " + d.dir, Hint: "wait for it, or end it",
		}, f.Close())
	}
	d.lock = f
	return nil
}

func (d *devCluster) release() error {
	if d.lock == nil {
		return nil
	}
	err := d.lock.Close()
	d.lock = nil
	return err
}

// save writes dev.json so that it is whole at any moment.
func (d *devCluster) save() error {
	data, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return fmt.Errorf("saving the development cluster: %w", err)
	}
	tmp := d.path("dev.json.new")
	if err := os.WriteFile(tmp, append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("saving the development cluster: %w", err)
	}
	if err := os.Rename(tmp, d.path("dev.json")); err != nil {
		return fmt.Errorf("saving the development cluster: %w", err)
	}
	return nil
}

func (d *devCluster) node(name string) (*devNode, error) {
	var known []string
	for _, n := range d.Nodes {
		if n.Name == name {
			return n, nil
		}
		known = append(known, n.Name)
	}
	return nil, &blixard.Error{Code: blixard.CodeNotFound, Message: fmt.Sprintf("the development cluster has no node %q", name), Hint: "nodes: " + strings.Join(known, ", ")}
}

// layOut chooses ports and addresses for n nodes. Ports are taken from below
// the range of outgoing connections, so that they are still free after a
// restart.
func (d *devCluster) layOut(n int) error {
	h := fnv.New64a()
	if _, err := h.Write([]byte(d.dir)); err != nil {
		return err
	}
	sum := h.Sum64()
	port := 20000 + int(sum%10000)
	for i := 1; i <= n; i++ {
		free := 0
		for tries := 0; free == 0; tries++ {
			if tries == 2000 {
				return blixard.Errorf(blixard.CodeRefused, "there is no free port between 20000 and 32000")
			}
			if port++; port >= 32000 {
				port = 20000
			}
			l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
			if err != nil {
				continue
			}
			if err := l.Close(); err != nil {
				return fmt.Errorf("looking for a free port: %w", err)
			}
			free = port
		}
		d.Nodes = append(d.Nodes, &devNode{
			Name: "node" + strconv.Itoa(i), Listen: "127.0.0.1:" + strconv.Itoa(free),
			Publish: fmt.Sprintf("127.%d.%d.%d", 16+sum>>16%200, sum>>32%256, i), Zone: "zone" + strconv.Itoa(i),
		})
	}
	return nil
}

// begin starts the server of a node.
func (d *devCluster) begin(a *app, n *devNode, join, token string) error {
	exe := a.env.Executable
	if exe == "" {
		var err error
		if exe, err = os.Executable(); err != nil {
			return fmt.Errorf("finding this program: %w", err)
		}
	}
	if err := os.MkdirAll(d.dataDir(n), 0o700); err != nil {
		return fmt.Errorf("making the data directory: %w", err)
	}
	if err := os.MkdirAll(d.path("logs"), 0o700); err != nil {
		return fmt.Errorf("making the log directory: %w", err)
	}
	log, err := os.OpenFile(d.logFile(n), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("opening the log: %w", err)
	}
	defer log.Close()
	args := []string{
		"server", "--data-dir", d.dataDir(n), "--node-id", n.Name, "--listen", n.Listen, "--advertise", n.Listen, "--publish-address", n.Publish,
		"--zone", n.Zone, "--log-format", "json", "--log-file", d.logFile(n),
		"--capacity-memory", d.CapacityMemory, "--capacity-vcpus", strconv.Itoa(d.CapacityVCPUs),
	}
	if join != "" {
		args = append(args, "--join", join)
	}
	cmd := exec.Command(exe, append(args, d.Args...)...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = d.dir, log, log
	// What is meant for commands must not steer servers, but a token on a command
	// line could be read by anybody.
	for _, kv := range os.Environ() {
		if name, _, _ := strings.Cut(kv, "="); !slices.Contains([]string{"BLIXARD_ADDR", "BLIXARD_TOKEN", "BLIXARD_DATA_DIR", "BLIXARD_DEV_DIR"}, name) {
			cmd.Env = append(cmd.Env, kv)
		}
	}
	if token != "" {
		cmd.Env = append(cmd.Env, "BLIXARD_CLUSTER_TOKEN="+token)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting %s: %w", n.Name, err)
	}
	n.Pid, n.Started = cmd.Process.Pid, true
	if p, err := readProcess(n.Pid); err == nil {
		n.Ticks = p.ticks
	}
	if err := cmd.Process.Release(); err != nil {
		return fmt.Errorf("starting %s: %w", n.Name, err)
	}
	return d.save()
}

// alive tells whether the server of a node runs.
func (n *devNode) alive() bool {
	if n.Pid == 0 {
		return false
	}
	p, err := readProcess(n.Pid)
	return err == nil && p.ticks == n.Ticks && p.state != 'Z' && p.state != 'X'
}

// addresses of the nodes whose servers run come first.
func (d *devCluster) addresses() []string {
	var up, down []string
	for _, n := range d.Nodes {
		if n.alive() {
			up = append(up, n.Listen)
		} else {
			down = append(down, n.Listen)
		}
	}
	return append(up, down...)
}

// token is the API token, from the first data directory that has one.
func (d *devCluster) token() string {
	for _, n := range d.Nodes {
		if data, err := os.ReadFile(filepath.Join(d.dataDir(n), "admin.token")); err == nil && len(bytes.TrimSpace(data)) > 0 {
			return string(bytes.TrimSpace(data))
		}
	}
	return ""
}

// connect is a client of the cluster, or of one node.
func (d *devCluster) connect(addresses ...string) (*client.Client, error) {
	if len(addresses) == 0 {
		addresses = d.addresses()
	}
	return client.New(client.Options{Addresses: addresses, Token: d.token(), RetryFor: 2 * time.Second, UserAgent: "blixard-dev"})
}

// status asks the cluster, within a moment.
func (d *devCluster) status(ctx context.Context, addresses ...string) (*blixardv1.ClusterStatus, error) {
	c, err := d.connect(addresses...)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	return c.GetStatus(ctx, &blixardv1.GetStatusRequest{})
}

// lastWords are the last lines of a node's log, for a server that ended.
func (d *devCluster) lastWords(n *devNode) string {
	data, err := os.ReadFile(d.logFile(n))
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	lines = lines[max(0, len(lines)-3):]
	// A server that says itself why it ends logged the same before.
	if at := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, "blixard: ") }); at > 0 {
		lines = lines[at:]
	}
	for i := range lines {
		lines[i] = readableLog(lines[i])
	}
	return strings.Join(lines, "; ")
}
