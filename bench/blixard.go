package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
	"github.com/blixard/blixard/internal/state"
)

// cluster is three Blixard servers.
type cluster struct {
	token     string
	addresses []string
	servers   []*process
	dirs      []string
}

// startBlixard founds a cluster of three nodes; extra flags go to each server.
func startBlixard(ctx context.Context, s settings, extra ...string) (*cluster, error) {
	ports, err := freePorts(3)
	if err != nil {
		return nil, err
	}
	base, err := os.MkdirTemp(s.dir, "blixard-")
	if err != nil {
		return nil, fmt.Errorf("making a directory for Blixard: %w", err)
	}
	c := &cluster{}
	for i, port := range ports {
		name := fmt.Sprintf("node%d", i+1)
		dir, address := filepath.Join(base, name), fmt.Sprintf("127.0.0.1:%d", port)
		c.addresses, c.dirs = append(c.addresses, address), append(c.dirs, dir)
		p := &process{name: "blixard " + name, log: filepath.Join(base, name+".log"), args: append([]string{
			s.blixard, "server", "--data-dir", dir, "--node-id", name, "--listen", address, "--zone", name, "--log-level", "warn",
		}, extra...)}
		if s.pprof != 0 {
			p.env = append(p.env, fmt.Sprintf("BLIXARD_MONITORING_PPROF_ADDRESS=127.0.0.1:%d", s.pprof+i))
		}
		c.servers = append(c.servers, p)
	}
	if err := c.form(ctx); err != nil {
		err = fmt.Errorf("%w\n%s", err, c.servers[0].tail())
		c.stop()
		return nil, err
	}
	return c, nil
}

// form starts the first node, and the others with a token of it.
func (c *cluster) form(ctx context.Context) error {
	if err := c.servers[0].start(); err != nil {
		return err
	}
	err := until(ctx, 30*time.Second, "the first node", func(ctx context.Context) error {
		if c.servers[0].dead() {
			return errors.New("it has ended")
		}
		b, err := os.ReadFile(filepath.Join(c.dirs[0], "admin.token"))
		if err != nil {
			return err
		}
		c.token = strings.TrimSpace(string(b))
		st, err := c.status(ctx, 0)
		if err == nil && !st.GetReady() {
			err = errors.New("it is not ready")
		}
		return err
	})
	if err != nil {
		return err
	}
	admin, err := c.client(0)
	if err != nil {
		return err
	}
	defer admin.Close()
	for _, p := range c.servers[1:] {
		t, err := admin.CreateToken(ctx, &blixardv1.CreateTokenRequest{})
		if err != nil {
			return fmt.Errorf("making a join token: %w", err)
		}
		p.args = append(p.args, "--join", c.addresses[0], "--token", t.GetToken())
		if err := p.start(); err != nil {
			return err
		}
	}
	return c.ready(ctx)
}

func (c *cluster) name() string      { return "blixard" }
func (c *cluster) nodes() []*process { return c.servers }

// client reaches the nodes given, in that order.
func (c *cluster) client(nodes ...int) (*client.Client, error) {
	o := client.Options{Token: c.token, UserAgent: "blixard-bench"}
	for _, i := range nodes {
		o.Addresses = append(o.Addresses, c.addresses[i])
	}
	return client.New(o)
}

// request is the VM that is created; it is not started.
func request(name string) *blixardv1.CreateVMRequest {
	return &blixardv1.CreateVMRequest{
		Name: name, Start: proto.Bool(false),
		Spec: &blixardv1.VMSpec{Image: "builtin", Vcpus: 2, MemoryMib: 512, Labels: map[string]string{"app": "bench", "tier": "web"}},
	}
}

// encodedBytes is how long request is in the replicated log.
func encodedBytes(name string) int {
	spec := blixard.VMSpec{Image: "builtin", VCPUs: 2, MemoryMiB: 512, Labels: []blixard.Label{{Key: "app", Value: "bench"}, {Key: "tier", Value: "web"}}}
	spec.Defaults()
	return len(state.AppendEnvelope(nil, &state.Envelope{
		Request: 1 << 40, Key: strings.Repeat("k", 26), NowMS: time.Now().UnixMilli(), Actor: "operator",
		Command: &state.CreateVM{Name: blixard.VMName(name), Spec: spec},
	}))
}

func (c *cluster) writer(node int) (write, func(), error) {
	cl, err := c.client(node)
	if err != nil {
		return nil, nil, err
	}
	create := func(ctx context.Context, name string) error {
		if _, err := cl.CreateVM(ctx, request(name)); err != nil {
			return fmt.Errorf("creating a VM: %w", err)
		}
		return nil
	}
	return create, cl.Close, nil
}

func (c *cluster) status(ctx context.Context, node int) (*blixardv1.ClusterStatus, error) {
	cl, err := client.New(client.Options{Addresses: []string{c.addresses[node]}, Token: c.token, RetryFor: -1})
	if err != nil {
		return nil, err
	}
	defer cl.Close()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	st, err := cl.GetStatus(ctx, &blixardv1.GetStatusRequest{})
	if err != nil {
		return nil, fmt.Errorf("asking node %d for its status: %w", node+1, err)
	}
	return st, nil
}

func (c *cluster) leader(ctx context.Context) (int, error) {
	for i, p := range c.servers {
		if p.pid() == 0 {
			continue
		}
		st, err := c.status(ctx, i)
		if err != nil {
			return 0, err
		}
		for k := range c.servers {
			if st.GetLeader() == fmt.Sprintf("node%d", k+1) && c.servers[k].pid() != 0 {
				return k, nil
			}
		}
	}
	return 0, errors.New("no Blixard server leads")
}

// ready waits until all three vote, so that every write needs two disks.
func (c *cluster) ready(ctx context.Context) error {
	return until(ctx, 60*time.Second, "Blixard to be ready", func(ctx context.Context) error {
		var low, high uint64
		for i := range c.servers {
			if c.servers[i].dead() {
				return fmt.Errorf("%s has ended: %s", c.servers[i].name, c.servers[i].tail())
			}
			st, err := c.status(ctx, i)
			switch {
			case err != nil:
				return err
			case !st.GetReady() || st.GetLeader() == "":
				return fmt.Errorf("node%d is not ready", i+1)
			}
			voters := 0
			for _, n := range st.GetNodes() {
				if n.GetRole() == "leader" || n.GetRole() == "voter" {
					voters++
				}
			}
			if voters != len(c.servers) {
				return fmt.Errorf("%d of %d nodes vote", voters, len(c.servers))
			}
			if i == 0 {
				low, high = st.GetApplied(), st.GetApplied()
			}
			low, high = min(low, st.GetApplied()), max(high, st.GetApplied())
		}
		if high-low > 10 {
			return fmt.Errorf("a node is %d entries behind", high-low)
		}
		return nil
	})
}

func (c *cluster) stop() {
	for _, p := range c.servers {
		p.kill()
	}
}
