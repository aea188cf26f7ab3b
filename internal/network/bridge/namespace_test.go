package bridge_test

import (
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/network"
	"github.com/blixard/blixard/internal/network/bridge"
)

const insideEnv = "BLIXARD_TEST_NAMESPACE"

// TestMain runs the tests in a network namespace of their own, so that they
// neither see nor touch the machine's network.
func TestMain(m *testing.M) {
	flag.Parse()
	if testing.Short() || os.Getenv(insideEnv) != "" {
		os.Exit(m.Run())
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests make network namespaces, bridges and rules: run them as root, or leave them out with -short")
		os.Exit(1)
	}
	inside := exec.Command("/proc/self/exe", os.Args[1:]...)
	inside.Env = append(os.Environ(), insideEnv+"=1")
	inside.Stdin, inside.Stdout, inside.Stderr = os.Stdin, os.Stdout, os.Stderr
	inside.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := inside.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "in a network namespace:", err)
		os.Exit(1)
	}
}

// real leaves a test out that needs the kernel.
func real(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("changes a kernel's network")
	}
	if os.Geteuid() == 0 {
		up(t, "lo")
	}
}

func must(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func up(t *testing.T, name string) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	must(t, name, err)
	must(t, "switching on "+name, netlink.LinkSetUp(l))
}

// host is another machine: a network namespace, joined by a pair of devices.
type host struct{ ns *os.File }

// within runs f in the host's namespace, on a thread that ends with it.
func (h *host) within(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(int(h.ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

// newHost makes a host with one device eth0, whose other end is device here.
func newHost(t *testing.T, device, mac, address, gateway string) *host {
	t.Helper()
	type made struct {
		ns  *os.File
		err error
	}
	done := make(chan made, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- made{nil, err}
			return
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		done <- made{f, err}
	}()
	m := <-done
	must(t, "making a network namespace", m.err)
	h := &host{m.ns}
	t.Cleanup(func() { must(t, "closing a namespace", m.ns.Close()) })
	attrs := netlink.NewLinkAttrs()
	attrs.Name = device
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(m.ns.Fd()))}
	if mac != "" {
		peer, err := net.ParseMAC(mac)
		must(t, "the MAC address", err)
		veth.PeerHardwareAddr = peer
	}
	must(t, "joining a namespace", netlink.LinkAdd(veth))
	t.Cleanup(func() {
		if l, err := netlink.LinkByName(device); err == nil {
			must(t, "removing "+device, netlink.LinkDel(l))
		}
	})
	up(t, device)
	must(t, "setting up the host", h.within(func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(address)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(l, a); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return err
		}
		if gateway == "" {
			return nil
		}
		return netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(gateway)})
	}))
	return h
}

// outside is a machine beyond this one: 198.51.100.2, this one being .1.
func outside(t *testing.T) *host {
	t.Helper()
	h := newHost(t, "up0", "", "198.51.100.2/24", "")
	l, err := netlink.LinkByName("up0")
	must(t, "up0", err)
	a, err := netlink.ParseAddr("198.51.100.1/24")
	must(t, "an address", err)
	must(t, "setting an address", netlink.AddrAdd(l, a))
	return h
}

// asGuest puts a host on the bridge in a guest's place.
func asGuest(t *testing.T, bridgeName, device string, a network.Attachment) *host {
	t.Helper()
	h := newHost(t, device, a.MAC, a.Address, a.Gateway)
	l, err := netlink.LinkByName(device)
	must(t, device, err)
	b, err := netlink.LinkByName(bridgeName)
	must(t, bridgeName, err)
	must(t, "joining the bridge", netlink.LinkSetMaster(l, b))
	return h
}

// look describes all that a network could leave behind in this namespace.
func look(t *testing.T) []string {
	t.Helper()
	var out []string
	links, err := netlink.LinkList()
	must(t, "listing devices", err)
	for _, l := range links {
		out = append(out, "device "+l.Attrs().Name)
		on, err := os.ReadFile("/proc/sys/net/ipv4/conf/" + l.Attrs().Name + "/route_localnet")
		must(t, "reading route_localnet", err)
		out = append(out, "route_localnet "+l.Attrs().Name+" "+strings.TrimSpace(string(on)))
	}
	addresses, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	must(t, "listing addresses", err)
	for _, a := range addresses {
		out = append(out, "address "+a.String())
	}
	c, err := nftables.New()
	must(t, "nftables", err)
	all, err := c.ListTables()
	must(t, "listing tables", err)
	for _, table := range all {
		out = append(out, "table "+table.Name)
	}
	forward, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	must(t, "reading ip_forward", err)
	out = append(out, "ip_forward "+strings.TrimSpace(string(forward)))
	slices.Sort(out)
	return out
}

// leavings tells what is there that was not, and what is not that was.
func leavings(t *testing.T, before []string, dirs ...string) []string {
	t.Helper()
	now := look(t)
	var out []string
	for _, s := range now {
		if !slices.Contains(before, s) {
			out = append(out, "+"+s)
		}
	}
	for _, s := range before {
		if !slices.Contains(now, s) {
			out = append(out, "-"+s)
		}
	}
	for _, dir := range dirs {
		files, err := os.ReadDir(dir)
		must(t, "listing files", err)
		for _, f := range files {
			out = append(out, "+file "+f.Name())
		}
	}
	return out
}

// open opens a node's network until the test ends.
func open(t *testing.T, o bridge.Options) *bridge.Network {
	t.Helper()
	if o.Dir == "" {
		o.Dir = t.TempDir()
	}
	if o.LockFile == "" {
		o.LockFile = filepath.Join(t.TempDir(), "lock")
	}
	n, err := bridge.New(o)
	must(t, "opening the network", err)
	t.Cleanup(func() { must(t, "closing the network", n.Close()) })
	return n
}
