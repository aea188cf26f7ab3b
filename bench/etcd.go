package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// etcdVersion is the name of the peer.
func etcdVersion(binary string) (string, error) {
	out, err := exec.Command(binary, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("the peer cannot be run (apt-get install etcd-server, or --etcd): %w", err)
	}
	first, _, _ := strings.Cut(string(out), "\n")
	return "etcd " + strings.TrimSpace(strings.TrimPrefix(first, "etcd Version:")), nil
}

// etcd is a cluster of three etcd servers with their default settings.
type etcd struct {
	title     string
	value     string // of every put
	endpoints []string
	servers   []*process
}

// startEtcd starts three servers whose puts carry valueBytes.
func startEtcd(ctx context.Context, s settings, valueBytes int) (*etcd, error) {
	title, err := etcdVersion(s.etcd)
	if err != nil {
		return nil, err
	}
	ports, err := freePorts(6)
	if err != nil {
		return nil, err
	}
	e := &etcd{title: title, value: strings.Repeat("v", valueBytes)}
	base, err := os.MkdirTemp(s.dir, "etcd-")
	if err != nil {
		return nil, fmt.Errorf("making a directory for etcd: %w", err)
	}
	var members []string
	for i := range 3 {
		members = append(members, fmt.Sprintf("n%d=http://127.0.0.1:%d", i+1, ports[2*i+1]))
	}
	for i := range 3 {
		name := fmt.Sprintf("n%d", i+1)
		client, peer := fmt.Sprintf("http://127.0.0.1:%d", ports[2*i]), fmt.Sprintf("http://127.0.0.1:%d", ports[2*i+1])
		e.endpoints = append(e.endpoints, client)
		p := &process{name: "etcd " + name, log: filepath.Join(base, name+".log"), args: []string{
			s.etcd, "--name", name, "--data-dir", filepath.Join(base, name), "--listen-client-urls", client, "--advertise-client-urls", client,
			"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", strings.Join(members, ","),
			"--initial-cluster-state", "new", "--initial-cluster-token", "bench", "--logger", "zap", "--log-level", "error",
		}}
		e.servers = append(e.servers, p)
		if err := p.start(); err != nil {
			e.stop()
			return nil, err
		}
	}
	if err := e.ready(ctx); err != nil {
		err = fmt.Errorf("%w\n%s", err, e.servers[0].tail())
		e.stop()
		return nil, err
	}
	return e, nil
}

func (e *etcd) name() string      { return e.title }
func (e *etcd) nodes() []*process { return e.servers }

func (e *etcd) client(node int) (*clientv3.Client, error) {
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{e.endpoints[node]}, DialTimeout: 5 * time.Second, Logger: zap.NewNop()})
	if err != nil {
		return nil, fmt.Errorf("making a client of etcd: %w", err)
	}
	return c, nil
}

func (e *etcd) writer(node int) (write, func(), error) {
	c, err := e.client(node)
	if err != nil {
		return nil, nil, err
	}
	put := func(ctx context.Context, name string) error {
		if _, err := c.Put(ctx, name, e.value); err != nil {
			return fmt.Errorf("putting into etcd: %w", err)
		}
		return nil
	}
	return put, func() { closeQuietly(c) }, nil
}

func (e *etcd) leader(ctx context.Context) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	found := errors.New("no etcd server answers")
	for i := range e.servers {
		if e.servers[i].pid() == 0 {
			continue
		}
		c, err := e.client(i)
		if err != nil {
			return 0, err
		}
		st, err := c.Status(ctx, e.endpoints[i])
		closeQuietly(c)
		if err != nil {
			found = fmt.Errorf("asking etcd for its leader: %w", err)
			continue
		}
		if st.Leader != 0 && st.Leader == st.Header.MemberId {
			return i, nil
		}
		found = errors.New("no etcd server leads")
	}
	return 0, found
}

func (e *etcd) ready(ctx context.Context) error {
	return until(ctx, 30*time.Second, "etcd to be ready", func(ctx context.Context) error {
		var low, high uint64
		for i := range e.servers {
			if e.servers[i].dead() {
				return fmt.Errorf("%s has ended", e.servers[i].name)
			}
			c, err := e.client(i)
			if err != nil {
				return err
			}
			once, cancel := context.WithTimeout(ctx, time.Second)
			st, err := c.Status(once, e.endpoints[i])
			cancel()
			closeQuietly(c)
			switch {
			case err != nil:
				return err
			case st.Leader == 0:
				return errors.New("there is no leader")
			}
			if i == 0 {
				low, high = st.RaftAppliedIndex, st.RaftAppliedIndex
			}
			low, high = min(low, st.RaftAppliedIndex), max(high, st.RaftAppliedIndex)
		}
		if high-low > 10 {
			return fmt.Errorf("a server is %d entries behind", high-low)
		}
		return nil
	})
}

func (e *etcd) stop() {
	for _, p := range e.servers {
		p.kill()
	}
}

func closeQuietly(c *clientv3.Client) {
	if err := c.Close(); err != nil && !errors.Is(err, context.Canceled) {
		say("closing a client of etcd: %v", err)
	}
}
