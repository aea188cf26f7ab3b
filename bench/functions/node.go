package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

// node is a cluster of one daemon, a process of its own.
type node struct {
	name    string
	dir     string // its data
	gateway string // host:port of calls
	cmd     *exec.Cmd
	exited  chan struct{}
	client  *client.Client
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("looking for a free port: %w", err)
	}
	defer l.Close() //nolint:errcheck // it was never used
	return l.Addr().(*net.TCPAddr).Port, nil
}

// startNode starts a daemon and waits until it can be asked.
func startNode(ctx context.Context, s settings, name string, env ...string) (*node, error) {
	var ports [2]int
	var err error
	for i := range ports {
		if ports[i], err = freePort(); err != nil {
			return nil, err
		}
	}
	api := "127.0.0.1:" + strconv.Itoa(ports[0])
	n := &node{name: name, dir: filepath.Join(s.dir, name), gateway: "127.0.0.1:" + strconv.Itoa(ports[1]), exited: make(chan struct{})}
	log, err := os.Create(n.dir + ".log")
	if err != nil {
		return nil, fmt.Errorf("making the log of %s: %w", name, err)
	}
	n.cmd = exec.Command(s.blixard, "server", "--data-dir", n.dir, "--node-id", name, "--listen", api, "--gateway-listen", n.gateway, "--log-level", "warn")
	n.cmd.Env = append(os.Environ(), env...)
	n.cmd.Env = append(n.cmd.Env, "BLIXARD_MICROVM_IMAGE_DIR="+filepath.Join(s.dir, "images"))
	if s.pprof != "" {
		n.cmd.Env = append(n.cmd.Env, "BLIXARD_MONITORING_PPROF_ADDRESS="+s.pprof)
	}
	n.cmd.Stdout, n.cmd.Stderr = log, log
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	err = errors.Join(n.cmd.Start(), log.Close())
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	go func() { // ends with the process
		if err := n.cmd.Wait(); err != nil {
			say("%s has ended: %v", name, err)
		}
		close(n.exited)
	}()
	err = until(ctx, time.Minute, name, func() error {
		select {
		case <-n.exited:
			return errors.New("it has ended")
		default:
		}
		token, err := os.ReadFile(filepath.Join(n.dir, "admin.token"))
		if err != nil {
			return err
		}
		if n.client == nil {
			if n.client, err = client.New(client.Options{Addresses: []string{api}, Token: strings.TrimSpace(string(token)), UserAgent: "blixard-bench"}); err != nil {
				return err
			}
		}
		st, err := n.client.GetStatus(ctx, &blixardv1.GetStatusRequest{})
		if err == nil && !st.GetReady() {
			err = errors.New("it is not ready")
		}
		return err
	})
	if err != nil {
		tail, _ := os.ReadFile(n.dir + ".log") //nolint:errcheck // the error in hand says more
		n.stop()
		return nil, fmt.Errorf("%w\n%s", err, tail)
	}
	return n, nil
}

// stop ends the daemon in order, which ends its instances.
func (n *node) stop() {
	if n.client != nil {
		n.client.Close()
	}
	if err := n.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		say("ending %s: %v", n.name, err)
	}
	select {
	case <-n.exited:
	case <-time.After(30 * time.Second):
		say("%s does not end, it is killed", n.name)
		if err := n.cmd.Process.Kill(); err != nil {
			say("killing %s: %v", n.name, err)
		}
		<-n.exited
	}
}

// function is what is deployed.
type function struct {
	name  string
	zip   []byte
	spec  *blixardv1.FunctionSpec
	limit int32
}

func path(name string) string { return "/bench/" + name }

// deploy creates a function with a trigger and waits until it can be called.
func (n *node) deploy(ctx context.Context, f function) error {
	code, err := n.client.PutCode(ctx, f.zip)
	if err != nil {
		return fmt.Errorf("sending the code of %s: %w", f.name, err)
	}
	limit := f.limit
	if limit == 0 {
		limit = 1000
	}
	_, err = n.client.CreateFunction(ctx, &blixardv1.CreateFunctionRequest{
		Name: f.name, Spec: f.spec, CodeDigest: code.Digest, Settings: &blixardv1.FunctionSettings{MaxConcurrent: &limit},
	})
	if err != nil {
		return fmt.Errorf("creating %s: %w", f.name, err)
	}
	var failed error
	err = until(ctx, 5*time.Minute, f.name, func() error {
		got, err := n.client.GetFunction(ctx, &blixardv1.GetFunctionRequest{Name: f.name})
		if err != nil {
			return err
		}
		switch v := got.GetFunction().GetLatest(); v.GetState() {
		case "Active":
		case "Failed":
			failed = fmt.Errorf("building %s: %s", f.name, v.GetStateReason())
		default:
			return fmt.Errorf("it is %s", v.GetState())
		}
		return nil
	})
	if err := errors.Join(err, failed); err != nil {
		return err
	}
	_, err = n.client.AddFunctionTrigger(ctx, &blixardv1.AddFunctionTriggerRequest{
		Name: f.name, Trigger: &blixardv1.FunctionTrigger{Kind: "http", Path: path(f.name)},
	})
	if err != nil {
		return fmt.Errorf("making the trigger of %s: %w", f.name, err)
	}
	return nil
}

func (n *node) remove(ctx context.Context, name string) error {
	if _, err := n.client.DeleteFunction(ctx, &blixardv1.DeleteFunctionRequest{Name: name}); err != nil {
		return fmt.Errorf("deleting %s: %w", name, err)
	}
	return nil
}

// on tells what the node does for a function; nothing is all zero.
func (n *node) on(ctx context.Context, name string) (*blixardv1.FunctionOnNode, error) {
	got, err := n.client.GetFunction(ctx, &blixardv1.GetFunctionRequest{Name: name})
	if err != nil {
		return nil, fmt.Errorf("asking for %s: %w", name, err)
	}
	if on := got.GetFunction().GetNodes(); len(on) > 0 {
		return on[0], nil
	}
	return &blixardv1.FunctionOnNode{}, nil
}

// until tries again until f succeeds or the time is up.
func until(ctx context.Context, within time.Duration, what string, f func() error) error {
	for end := time.Now().Add(within); ; {
		err := f()
		if err == nil {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("waiting %v for %s: %w", within, what, err)
		}
		if err := rest(ctx, 10*time.Millisecond); err != nil {
			return err
		}
	}
}

// rest does nothing for a while.
func rest(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
