package agent

import (
	"bytes"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/guest"
	"github.com/blixard/blixard/internal/network/bridge"
)

// TestRealBridge boots real microVMs on a real bridge. They answer on their
// published port, on their own address and to each other; afterwards nothing of
// them is left in the kernel.
func TestRealBridge(t *testing.T) {
	if testing.Short() {
		t.Skip("boots real virtual machines and changes a kernel's network")
	}
	const inside = "BLIXARD_TEST_NAMESPACE"
	if os.Getenv(inside) == "" {
		if os.Geteuid() != 0 {
			t.Fatal("this test makes a network namespace, a bridge and rules: run it as root, or leave it out with -short")
		}
		again := exec.Command("/proc/self/exe", "-test.run=^TestRealBridge$", "-test.v", "-test.timeout=9m")
		again.Env = append(os.Environ(), inside+"=1")
		again.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		again.Stdout, again.Stderr = t.Output(), t.Output()
		if err := again.Run(); err != nil {
			t.Errorf("in a network namespace: %v", err)
		}
		return
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		t.Fatal(err)
	}
	before := kernelNetwork(t)
	dir, lock := t.TempDir(), filepath.Join(t.TempDir(), "lock")
	open := func(o *Options) {
		n, err := bridge.New(bridge.Options{Dir: dir, LockFile: lock, Log: o.Log})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := n.Close(); err != nil {
				t.Error(err)
			}
		})
		o.Network = n
	}
	r := newReal(t, open)
	spec := blixard.VMSpec{
		Network: "bridge", MemoryMiB: 256, Publish: []blixard.Port{{Protocol: "tcp", GuestPort: 80}},
		Health: &blixard.HealthCheck{Kind: "http", Port: 80, IntervalMS: 500, TimeoutMS: 5000},
	}
	web, db := r.cluster.place("web", 1, spec), r.cluster.place("db", 1, blixard.VMSpec{Network: "bridge", MemoryMiB: 256})
	row, other := r.state(web, blixard.Running), r.state(db, blixard.Running)
	all, err := r.options.Network.List(t.Context())
	if err != nil || len(all) != 2 {
		t.Fatalf("attached: %+v, %v", all, err)
	}
	address := netip.MustParsePrefix(all[1].Address).Addr().String()
	if published, err := netip.ParseAddrPort(row.Address); err != nil || !published.Addr().IsLoopback() || other.Address != netip.MustParsePrefix(all[0].Address).Addr().String() {
		t.Errorf("reported at %q and %q (%v), attached %+v", row.Address, other.Address, err, all)
	}
	for _, at := range []string{row.Address, address, other.Address} {
		r.within(time.Minute, "HTTP answers at "+at, func() bool { body, err := get("http://" + at + "/"); return err == nil && body != "" })
	}
	r.within(time.Minute, "it is healthy", func() bool { row, _ := r.cluster.row(web); return row.Health == blixard.HealthHealthy })
	var out bytes.Buffer
	code, err := r.agent.Exec(t.Context(), "db-1", guest.ExecRequest{Args: []string{"wget", "-q", "-O", "-", "http://" + address + "/"}}, nil, &out, &out, nil)
	if err != nil || code != 0 || out.Len() == 0 {
		t.Errorf("from guest to guest: code %d, %v, %q", code, err, out.String())
	}

	r.end()
	if body, err := get("http://" + row.Address + "/"); err != nil || body == "" {
		t.Errorf("HTTP without a daemon: %q, %v", body, err)
	}
	if n, ok := r.options.Network.(*bridge.Network); ok {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	}
	open(&r.options)
	r.begin()
	r.within(time.Minute, "the guest is talked to again", func() bool { return r.agent.clientOf(web) != nil })
	if err := syscall.Kill(r.pid(web), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	r.state(web, blixard.Failed)
	spec.Publish[0].HostPort = int(netip.MustParseAddrPort(row.Address).Port())
	second := r.cluster.place("web", 2, spec)
	if now := r.state(second, blixard.Running); now.Address != row.Address {
		t.Errorf("published at %q, then at %q", row.Address, now.Address)
	}
	r.within(time.Minute, "HTTP answers again", func() bool { body, err := get("http://" + row.Address + "/"); return err == nil && body != "" })

	for _, ref := range []struct {
		name string
		edit func()
	}{
		{"web-1.1", func() { r.cluster.want(web, func(i *blixard.Instance) { i.Wanted = blixard.WantRemove }) }},
		{"web-1.2", func() { r.cluster.want(second, func(i *blixard.Instance) { i.Wanted = blixard.WantRemove }) }},
		{"db-1.1", func() { r.cluster.want(db, func(i *blixard.Instance) { i.Wanted = blixard.WantRemove }) }},
	} {
		ref.edit()
	}
	r.within(time.Minute, "all rows are gone", func() bool { rows, _ := r.cluster.Assigned(); return len(rows) == 0 })
	if after := kernelNetwork(t); after != before {
		t.Errorf("before\n%s\nafter\n%s", before, after)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left on disk: %v, %v", left, err)
	}
}

// kernelNetwork describes what a network could leave behind.
func kernelNetwork(t *testing.T) string {
	t.Helper()
	var out []string
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		out = append(out, l.Type()+" "+l.Attrs().Name)
	}
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	tables, err := c.ListTables()
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range tables {
		out = append(out, "table "+table.Name)
	}
	forward, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(append(out, "ip_forward "+string(forward)), "\n")
}
