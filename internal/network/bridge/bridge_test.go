package bridge_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/blixard/blixard/internal/network"
	"github.com/blixard/blixard/internal/network/bridge"
	"github.com/blixard/blixard/internal/network/networktest"
)

func TestSuite(t *testing.T) {
	real(t)
	networktest.Suite(t, func(t *testing.T) networktest.Rig {
		outside(t)
		dir, lock := t.TempDir(), filepath.Join(t.TempDir(), "lock")
		before := look(t)
		var fault atomic.Pointer[func(string) error]
		var opened *bridge.Network
		t.Cleanup(func() { must(t, "closing", opened.Close()) })
		return networktest.Rig{
			Open: func(t *testing.T) network.Network {
				if opened != nil {
					must(t, "closing", opened.Close())
				}
				var err error
				opened, err = bridge.New(bridge.Options{Dir: dir, LockFile: lock, Fault: func(step string) error {
					if f := fault.Load(); f != nil && *f != nil {
						return (*f)(step)
					}
					return nil
				}})
				must(t, "opening", err)
				return opened
			},
			Fail:   func(f func(string) error) { fault.Store(&f) },
			Left:   func(t *testing.T) []string { return leavings(t, before, dir) },
			HostIP: "127.0.0.1", FreePort: 8080,
		}
	})
}

// serve answers on a port of a host with the address of who asks, and a name.
func serve(t *testing.T, h *host, protocol string, port int, name string) {
	t.Helper()
	var closer io.Closer
	must(t, "listening", h.within(func() error {
		if protocol == "udp" {
			c, err := net.ListenPacket("udp4", fmt.Sprintf(":%d", port))
			if err != nil {
				return err
			}
			closer = c
			go func() {
				buffer := make([]byte, 64)
				for {
					_, from, err := c.ReadFrom(buffer)
					if err != nil {
						return
					}
					if _, err := c.WriteTo([]byte(name+" "+from.String()), from); err != nil {
						return
					}
				}
			}()
			return nil
		}
		l, err := net.Listen("tcp4", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		closer = l
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Fprintf(c, "%s %s", name, c.RemoteAddr()) // the asker will notice
				c.Close()                                     // as above
			}
		}()
		return nil
	}))
	t.Cleanup(func() { must(t, "closing", closer.Close()) })
}

// here is this namespace as a host.
func here(t *testing.T) *host {
	t.Helper()
	f, err := os.Open("/proc/thread-self/ns/net")
	must(t, "opening this namespace", err)
	t.Cleanup(func() { must(t, "closing", f.Close()) })
	return &host{f}
}

// ask connects from a host and tells the answer: name and asker's IP address.
func ask(h *host, protocol, address string) (answer string, err error) {
	err = h.within(func() error {
		c, err := net.DialTimeout(protocol+"4", address, 2*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
			return err
		}
		if protocol == "udp" {
			if _, err := c.Write([]byte("?")); err != nil {
				return err
			}
		}
		buffer := make([]byte, 64)
		n, err := c.Read(buffer)
		if err != nil {
			return err
		}
		answer = string(buffer[:n])
		if i := strings.LastIndexByte(answer, ':'); i > 0 {
			answer = answer[:i]
		}
		return nil
	})
	return answer, err
}

func expect(t *testing.T, from *host, protocol, address, want string) {
	t.Helper()
	if got, err := ask(from, protocol, address); err != nil || got != want {
		t.Errorf("%s %s answered %q, %v; want %q", protocol, address, got, err, want)
	}
}

func attach(t *testing.T, n network.Network, r network.Request) network.Attachment {
	t.Helper()
	a, err := n.Attach(t.Context(), r)
	must(t, "attaching", err)
	return a
}

func bare(a network.Attachment) string { return netip.MustParsePrefix(a.Address).Addr().String() }

// TestReach sends real packets every way there is: to a guest's own address, to
// published ports from outside, from the node by any of its addresses and from
// guests, and from guests to the outside.
func TestReach(t *testing.T) {
	real(t)
	beyond, node := outside(t), here(t)
	before := look(t)
	dir := t.TempDir()
	n := open(t, bridge.Options{Dir: dir, DNS: []string{"192.0.2.53"}})
	a := attach(t, n, network.Request{Ref: "web-1.1", Ports: []network.Port{
		{Protocol: "tcp", HostIP: "198.51.100.1", HostPort: 8080, GuestPort: 80},
		{Protocol: "tcp", HostIP: "127.1.2.3", HostPort: 8080, GuestPort: 80},
		{Protocol: "udp", HostIP: "198.51.100.1", GuestPort: 53},
		{Protocol: "udp", HostIP: "127.0.0.1", HostPort: 5353, GuestPort: 53},
	}})
	b := attach(t, n, network.Request{Ref: "db-1.1", Ports: []network.Port{{Protocol: "tcp", HostIP: "0.0.0.0", HostPort: 9090, GuestPort: 80}}})
	if len(a.DNS) != 1 || a.DNS[0] != "192.0.2.53" {
		t.Errorf("DNS %q", a.DNS)
	}
	web, db := asGuest(t, "blixard0", "g0", a), asGuest(t, "blixard0", "g1", b)
	serve(t, web, "tcp", 80, "web")
	serve(t, web, "udp", 53, "names")
	serve(t, db, "tcp", 80, "db")
	serve(t, beyond, "tcp", 80, "beyond")

	t.Log("from the node")
	expect(t, node, "tcp", bare(a)+":80", "web "+a.Gateway)
	expect(t, node, "tcp", "198.51.100.1:8080", "web 198.51.100.1")
	expect(t, node, "tcp", "127.1.2.3:8080", "web "+a.Gateway)
	expect(t, node, "udp", "127.0.0.1:5353", "names "+a.Gateway)
	expect(t, node, "tcp", "127.0.0.1:9090", "db "+a.Gateway)
	t.Log("from outside")
	expect(t, beyond, "tcp", "198.51.100.1:8080", "web 198.51.100.2")
	expect(t, beyond, "udp", fmt.Sprintf("198.51.100.1:%d", a.Ports[2].HostPort), "names 198.51.100.2")
	expect(t, beyond, "tcp", "198.51.100.1:9090", "db 198.51.100.2")
	t.Log("from guests")
	expect(t, web, "tcp", "198.51.100.2:80", "beyond 198.51.100.1")
	expect(t, web, "tcp", bare(b)+":80", "db "+bare(a))
	expect(t, web, "tcp", "198.51.100.1:9090", "db "+a.Gateway)
	expect(t, web, "tcp", b.Gateway+":9090", "db "+a.Gateway)

	t.Log("what must not be")
	if got, err := ask(node, "tcp", "127.0.0.1:8080"); err == nil {
		t.Errorf("a port published on one address is reached by another: %q", got)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, "listening on the node's loopback", err)
	defer listener.Close()
	must(t, "a way to the node's loopback", db.within(func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := os.WriteFile("/proc/sys/net/ipv4/conf/eth0/route_localnet", []byte("1"), 0o644); err != nil {
			return err
		}
		_, loopback, err := net.ParseCIDR("127.0.0.0/8")
		if err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: loopback, Gw: net.ParseIP(b.Gateway), Flags: int(netlink.FLAG_ONLINK)})
	}))
	if c, err := askAs(db, listener.Addr().String()); err == nil {
		t.Errorf("a guest reaches the node's loopback: %v", c)
	}
	for _, address := range []string{"198.51.100.1:8080", "0.0.0.0:8080", "127.1.2.3:8080"} {
		if l, err := net.Listen("tcp4", address); err == nil {
			t.Errorf("another program can listen on %s", address)
			must(t, "closing", l.Close())
		}
	}

	t.Log("after the daemon was restarted, and without one")
	must(t, "closing", n.Close())
	expect(t, beyond, "tcp", "198.51.100.1:8080", "web 198.51.100.2")
	n = open(t, bridge.Options{Dir: dir})
	expect(t, beyond, "tcp", "198.51.100.1:8080", "web 198.51.100.2")

	must(t, "detaching", n.Detach(t.Context(), "web-1.1"))
	if got, err := ask(node, "tcp", "127.1.2.3:8080"); err == nil {
		t.Errorf("still published: %q", got)
	}
	expect(t, beyond, "tcp", "198.51.100.1:9090", "db 198.51.100.2")
	for _, device := range []string{"g0", "g1"} {
		l, err := netlink.LinkByName(device)
		must(t, device, err)
		must(t, "removing "+device, netlink.LinkDel(l))
	}
	must(t, "detaching", n.Detach(t.Context(), "db-1.1"))
	if left := leavings(t, before, dir); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// askAs connects from the host to an address that is the asker's own loopback
// for any other asker.
func askAs(h *host, address string) (string, error) {
	got := ""
	err := h.within(func() error {
		dialer := net.Dialer{Timeout: 300 * time.Millisecond, LocalAddr: nil}
		c, err := dialer.Dial("tcp4", address)
		if err != nil {
			return err
		}
		got = c.LocalAddr().String() + " to " + c.RemoteAddr().String()
		return c.Close()
	})
	return got, err
}

// TestTwoNodes: nodes of one machine share the bridge and nothing else.
func TestTwoNodes(t *testing.T) {
	real(t)
	before := look(t)
	lock := filepath.Join(t.TempDir(), "lock")
	dirs := []string{t.TempDir(), t.TempDir()}
	var nodes []*bridge.Network
	for _, dir := range dirs {
		nodes = append(nodes, open(t, bridge.Options{Dir: dir, LockFile: lock, Seed: "the same"}))
	}
	port := network.Port{Protocol: "tcp", HostIP: "127.0.0.1", HostPort: 8080, GuestPort: 80}
	a := attach(t, nodes[0], network.Request{Ref: "web-1.1", Ports: []network.Port{port}})
	free := network.Port{Protocol: "tcp", HostIP: "127.0.0.1", GuestPort: 80}
	r := network.Request{Ref: "web-1.1", MAC: "02:00:00:00:00:01", Ports: []network.Port{free}}
	b := attach(t, nodes[1], r)
	if a.Tap == b.Tap || a.Gateway == b.Gateway || netip.MustParsePrefix(a.Address).Overlaps(netip.MustParsePrefix(b.Address)) {
		t.Errorf("nodes share: %+v, %+v", a, b)
	}
	if _, err := nodes[1].Attach(t.Context(), network.Request{Ref: "web-2.1", Ports: []network.Port{port}}); !errors.Is(err, network.ErrConflict) {
		t.Errorf("the other node's port: %v", err)
	}
	// Also when the daemon that holds the port is not there.
	must(t, "closing", nodes[0].Close())
	_, err := nodes[1].Attach(t.Context(), network.Request{Ref: "web-2.1", Ports: []network.Port{port}})
	if !errors.Is(err, network.ErrConflict) || !strings.Contains(err.Error(), "web-1.1") {
		t.Errorf("the other node's port: %v", err)
	}
	serve(t, asGuest(t, "blixard0", "g0", a), "tcp", 80, "first")
	serve(t, asGuest(t, "blixard0", "g1", b), "tcp", 80, "second")
	node := here(t)
	expect(t, node, "tcp", "127.0.0.1:8080", "first "+a.Gateway)
	second := fmt.Sprintf("127.0.0.1:%d", b.Ports[0].HostPort)
	expect(t, node, "tcp", second, "second "+b.Gateway)

	nodes[0] = open(t, bridge.Options{Dir: dirs[0], LockFile: lock})
	for _, ref := range []string{"web-1.1", "web-2.1"} {
		must(t, "detaching", nodes[0].Detach(t.Context(), ref))
	}
	expect(t, node, "tcp", second, "second "+b.Gateway)
	if left := leavings(t, before, dirs[0]); len(left) == 0 {
		t.Error("the second node's things are gone with the first's")
	}
	for _, device := range []string{"g0", "g1"} {
		l, err := netlink.LinkByName(device)
		must(t, device, err)
		must(t, "removing "+device, netlink.LinkDel(l))
	}
	must(t, "detaching", nodes[1].Detach(t.Context(), "web-1.1"))
	if left := leavings(t, before, dirs...); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// TestOthers: what belongs to somebody else is used if it can be, and stays as
// it was.
func TestOthers(t *testing.T) {
	real(t)
	t.Run("a bridge", func(t *testing.T) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "br0"
		theirs := &netlink.Bridge{LinkAttrs: attrs}
		must(t, "making a bridge", netlink.LinkAdd(theirs))
		defer netlink.LinkDel(theirs) // the namespace ends soon
		address, err := netlink.ParseAddr("10.88.0.1/17")
		must(t, "an address", err)
		must(t, "setting an address", netlink.AddrAdd(theirs, address))
		up(t, "br0")
		before := look(t)
		dir := t.TempDir()
		n := open(t, bridge.Options{Dir: dir, Bridge: "br0"})
		a := attach(t, n, network.Request{Ref: "a-1.1", Ports: []network.Port{{Protocol: "tcp", HostIP: "127.0.0.1", GuestPort: 80}}})
		if netip.MustParsePrefix("10.88.0.0/17").Contains(netip.MustParseAddr(a.Gateway)) {
			t.Errorf("%+v is in a subnet that is in use", a)
		}
		must(t, "detaching", n.Detach(t.Context(), "a-1.1"))
		if left := leavings(t, before, dir); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
	})
	t.Run("no bridge", func(t *testing.T) {
		outside(t)
		before := look(t)
		dir := t.TempDir()
		n := open(t, bridge.Options{Dir: dir, Bridge: "up0"})
		if a, err := n.Attach(t.Context(), network.Request{Ref: "a-1.1"}); !errors.Is(err, network.ErrConflict) {
			t.Errorf("attached to no bridge: %+v, %v", a, err)
		}
		must(t, "detaching", n.Detach(t.Context(), "a-1.1"))
		if left := leavings(t, before, dir); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
	})
	t.Run("a tap", func(t *testing.T) {
		dir := t.TempDir()
		n := open(t, bridge.Options{Dir: dir})
		a := attach(t, n, network.Request{Ref: "a-1.1"})
		l, err := netlink.LinkByName(a.Tap)
		must(t, a.Tap, err)
		must(t, "renaming its owner", netlink.LinkSetAlias(l, "somebody's"))
		if err := n.Detach(t.Context(), "a-1.1"); !errors.Is(err, network.ErrConflict) {
			t.Errorf("detached somebody's device: %v", err)
		}
		if _, err := netlink.LinkByName(a.Tap); err != nil {
			t.Errorf("somebody's device: %v", err)
		}
		must(t, "removing it", netlink.LinkDel(l))
		must(t, "detaching", n.Detach(t.Context(), "a-1.1"))
	})
	t.Run("forwarding", func(t *testing.T) {
		c, err := nftables.New()
		must(t, "nftables", err)
		n := open(t, bridge.Options{})
		attach(t, n, network.Request{Ref: "a-1.1"})
		table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "router"})
		c.AddChain(&nftables.Chain{Name: "forward", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter})
		must(t, "their rules", c.Flush())
		must(t, "detaching", n.Detach(t.Context(), "a-1.1"))
		const path = "/proc/sys/net/ipv4/ip_forward"
		text, err := os.ReadFile(path)
		if err != nil || strings.TrimSpace(string(text)) != "1" {
			t.Errorf("forwarding, on which somebody relies, is %q, %v", text, err)
		}
		c.DelTable(table)
		must(t, "removing their rules", c.Flush())
		must(t, "switching it back", os.WriteFile(path, []byte("0"), 0o644))
	})
	t.Run("a port", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, "listening", err)
		defer l.Close()
		before := look(t)
		dir := t.TempDir()
		n := open(t, bridge.Options{Dir: dir})
		port := network.Port{Protocol: "tcp", HostIP: "0.0.0.0", HostPort: l.Addr().(*net.TCPAddr).Port, GuestPort: 80}
		if _, err := n.Attach(t.Context(), network.Request{Ref: "a-1.1", Ports: []network.Port{port}}); !errors.Is(err, network.ErrConflict) {
			t.Errorf("publishing on another program's port: %v", err)
		}
		port.HostIP = "192.0.2.77"
		if _, err := n.Attach(t.Context(), network.Request{Ref: "a-1.1", Ports: []network.Port{port}}); !errors.Is(err, network.ErrInvalid) {
			t.Errorf("publishing on another machine's address: %v", err)
		}
		if left := leavings(t, before, dir); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
	})
}

// TestLostDirectory: devices whose records are gone are still this node's.
func TestLostDirectory(t *testing.T) {
	real(t)
	before := look(t)
	dir := t.TempDir()
	n := open(t, bridge.Options{Dir: dir})
	a := attach(t, n, network.Request{Ref: "a-1.1"})
	must(t, "closing", n.Close())
	must(t, "losing the record", os.Remove(filepath.Join(dir, "a-1.1.json")))
	n = open(t, bridge.Options{Dir: dir})
	all, err := n.List(t.Context())
	if err != nil || len(all) != 1 || all[0].Ref != "a-1.1" || all[0].Tap != a.Tap {
		t.Errorf("listed %+v, %v", all, err)
	}
	must(t, "detaching", n.Detach(t.Context(), "a-1.1"))
	if left := leavings(t, before, dir); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// TestRestartedMachine: the records are there, and nothing of the kernel's.
func TestRestartedMachine(t *testing.T) {
	real(t)
	before := look(t)
	dir := t.TempDir()
	n := open(t, bridge.Options{Dir: dir})
	first := attach(t, n, network.Request{Ref: "a-1.1", Ports: []network.Port{{Protocol: "tcp", HostIP: "127.0.0.1", GuestPort: 80}}})
	must(t, "closing", n.Close())
	for _, name := range []string{first.Tap, "blixard0"} {
		l, err := netlink.LinkByName(name)
		must(t, name, err)
		must(t, "removing "+name, netlink.LinkDel(l))
	}
	c, err := nftables.New()
	must(t, "nftables", err)
	c.FlushRuleset()
	must(t, "flushing", c.Flush())
	must(t, "switching back", os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0o644))
	n = open(t, bridge.Options{Dir: dir})
	attach(t, n, network.Request{Ref: "a-1.2"})
	must(t, "detaching", n.Detach(t.Context(), "a-1.1"))
	must(t, "detaching", n.Detach(t.Context(), "a-1.2"))
	if left := leavings(t, before, dir); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// TestWithoutRights: a node without rights says so, and removes what it has not.
func TestWithoutRights(t *testing.T) {
	real(t)
	const unprivileged = "BLIXARD_TEST_UNPRIVILEGED"
	if os.Getenv(unprivileged) == "" {
		again := exec.Command("/proc/self/exe", "-test.run=^TestWithoutRights$")
		again.Env = append(os.Environ(), unprivileged+"=1")
		again.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		if out, err := again.CombinedOutput(); err != nil {
			t.Errorf("as nobody: %v\n%s", err, out)
		}
		return
	}
	dir := t.TempDir()
	n, err := bridge.New(bridge.Options{Dir: dir})
	must(t, "opening", err)
	if ok, why := n.Capabilities(t.Context()); ok || !strings.Contains(why, "CAP_NET_ADMIN") {
		t.Errorf("capabilities: %v, %q", ok, why)
	}
	if _, err := n.Attach(t.Context(), network.Request{Ref: "a-1.1"}); !errors.Is(err, network.ErrUnavailable) {
		t.Errorf("attaching: %v", err)
	}
	must(t, "detaching what is not attached", n.Detach(t.Context(), "a-1.1"))
	all, err := n.List(t.Context())
	if err != nil || len(all) != 0 {
		t.Errorf("listed %+v, %v", all, err)
	}
	must(t, "closing", n.Close())
}

// TestRenamedBridge: the configuration may name another bridge while guests are
// on the old one.
func TestRenamedBridge(t *testing.T) {
	real(t)
	before := look(t)
	dir := t.TempDir()
	n := open(t, bridge.Options{Dir: dir, Bridge: "old0"})
	attach(t, n, network.Request{Ref: "a-1.1"})
	must(t, "closing", n.Close())
	n = open(t, bridge.Options{Dir: dir, Bridge: "new0"})
	attach(t, n, network.Request{Ref: "b-1.1"})
	if _, err := netlink.LinkByName("new0"); err == nil {
		t.Error("guests of one node are on two bridges")
	}
	must(t, "detaching", n.Detach(t.Context(), "a-1.1"))
	must(t, "detaching", n.Detach(t.Context(), "b-1.1"))
	if left := leavings(t, before, dir); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	attach(t, n, network.Request{Ref: "c-1.1"})
	if _, err := netlink.LinkByName("new0"); err != nil {
		t.Errorf("the new bridge: %v", err)
	}
	must(t, "detaching", n.Detach(t.Context(), "c-1.1"))
	if left := leavings(t, before, dir); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

func TestOptions(t *testing.T) {
	for _, o := range []bridge.Options{
		{Bridge: "much-too-long"},
		{Bridge: "a/b"},
		{Bridge: "-x"},
		{Pool: netip.MustParsePrefix("fd00::/64")},
		{Pool: netip.MustParsePrefix("10.0.0.0/16"), SubnetBits: 8},
		{SubnetBits: 31},
		{FirstPort: 10, LastPort: 9},
		{FirstPort: 1, LastPort: 70000},
	} {
		o.Dir = t.TempDir()
		if _, err := bridge.New(o); !errors.Is(err, network.ErrInvalid) {
			t.Errorf("%+v: %v", o, err)
		}
	}
}
