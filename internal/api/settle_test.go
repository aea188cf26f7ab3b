package api_test

import (
	"bytes"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

// frozen is the address of a process that takes connections and hangs.
func frozen(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return "http://" + l.Addr().String()
}

// dead is an address that refuses connections.
func dead(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return "http://" + l.Addr().String()
}

// TestFirstAddressIsOfNoUse: every kind of call goes to a node that answers, and
// soon.
func TestFirstAddressIsOfNoUse(t *testing.T) {
	s := newSite(t, 1)
	s.create("web", 1)
	s.cluster.Run("web", 1, "node1", blixard.Running)
	for name, first := range map[string]string{"dead": dead(t), "frozen": frozen(t)} {
		for call, do := range map[string]func(c *client.Client) error{
			"read": func(c *client.Client) error {
				_, err := c.GetVersion(short(t), &blixardv1.GetVersionRequest{})
				return err
			},
			"change": func(c *client.Client) error {
				_, err := c.ScaleVM(short(t), &blixardv1.ScaleVMRequest{Name: "web", Replicas: new(int32(1))})
				return err
			},
			"exec": func(c *client.Client) error {
				_, err := c.Exec(short(t), &blixardv1.ExecStart{Target: "web", Command: []string{"exit", "0"}}, client.ExecIO{})
				return err
			},
			"console": func(c *client.Client) error {
				var out bytes.Buffer
				err := c.Console(short(t), "web", strings.NewReader("hello"), &out)
				if err == nil && out.String() != "HELLO" {
					err = errors.New("the console says " + out.String())
				}
				return err
			},
			"logs": func(c *client.Client) error {
				return c.Logs(short(t), &blixardv1.LogsRequest{Vm: "web"}, func(*blixardv1.LogsResponse) error { return nil })
			},
			"watch": func(c *client.Client) error {
				for _, err := range c.Watch(short(t), &blixardv1.WatchRequest{Snapshot: true}) {
					return err
				}
				return errors.New("nothing came")
			},
		} {
			t.Run(name+"/"+call, func(t *testing.T) {
				c, err := client.New(client.Options{Addresses: []string{first, s.urls["node1"]}, Token: token})
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				start := time.Now()
				if err := do(c); err != nil {
					t.Error(err)
				}
				if took := time.Since(start); took > 2*time.Second {
					t.Errorf("it took %s", took)
				}
			})
		}
	}
}

// TestEmptyLog: a log of nothing is no failure, at the node that has it and
// through another one.
func TestEmptyLog(t *testing.T) {
	s := newSite(t, 2)
	s.create("web", 1)
	s.cluster.Run("web", 1, "node2", blixard.Running)
	for _, node := range []string{"node1", "node2"} {
		err := s.client(node).Logs(short(t), &blixardv1.LogsRequest{Vm: "web", TailLines: new(int32(0))}, func(m *blixardv1.LogsResponse) error {
			return errors.New("there is something: " + string(m.Data))
		})
		if err != nil {
			t.Errorf("%s: %v", node, err)
		}
	}
}
