// Package networktest is the conformance suite of the port network: what every
// adapter does alike.
package networktest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"testing"

	"github.com/blixard/blixard/internal/network"
)

// Rig is one machine to test on.
type Rig struct {
	// Open gives the machine's network to a daemon that has just begun; the one
	// opened before is used no more.
	Open func(t *testing.T) network.Network
	// Fail has decide tell of every named step of the adapter's work whether it
	// fails there; nil: none does.
	Fail func(decide func(step string) error)
	// Left tells what there is on the machine that was not there before: empty
	// after the last Detach.
	Left func(t *testing.T) []string
	// HostIP is an address of the machine to publish ports on.
	HostIP string
	// FreePort is a port that nothing on the machine uses, outside the range
	// that the network chooses from.
	FreePort int
}

// Suite checks the contract on fresh machines.
func Suite(t *testing.T, fresh func(t *testing.T) Rig) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, Rig)
	}{
		{"attach and detach", testLife},
		{"the same again", testIdempotent},
		{"another way", testConflict},
		{"ports", testPorts},
		{"refusals", testInvalid},
		{"crashes", testCrashes},
		{"all at once", testConcurrent},
		{"cancelled", testCancelled},
	} {
		t.Run(test.name, func(t *testing.T) {
			rig := fresh(t)
			test.run(t, rig)
			rig.Fail(nil)
			n := rig.Open(t)
			for _, a := range list(t, n) {
				detach(t, n, a.Ref)
			}
			if left := rig.Left(t); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

func attach(t *testing.T, n network.Network, r network.Request) network.Attachment {
	t.Helper()
	a, err := n.Attach(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func detach(t *testing.T, n network.Network, ref string) {
	t.Helper()
	if err := n.Detach(t.Context(), ref); err != nil {
		t.Error(err)
	}
}

func list(t *testing.T, n network.Network) []network.Attachment {
	t.Helper()
	out, err := n.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !slices.IsSortedFunc(out, func(a, b network.Attachment) int {
		if a.Ref < b.Ref {
			return -1
		}
		return 1
	}) {
		t.Errorf("the list is not in order: %+v", out)
	}
	return out
}

// check looks at one attachment for itself.
func check(t *testing.T, r network.Request, a network.Attachment) {
	t.Helper()
	address, err := netip.ParsePrefix(a.Address)
	if err != nil {
		t.Fatalf("address of %+v: %v", a, err)
	}
	gateway, err := netip.ParseAddr(a.Gateway)
	if err != nil || !address.Contains(gateway) || gateway == address.Addr() || address.Addr() == address.Masked().Addr() {
		t.Errorf("address %s with gateway %s (%v)", a.Address, a.Gateway, err)
	}
	if mac, err := net.ParseMAC(a.MAC); err != nil || mac[0]&3 != 2 && r.MAC == "" || r.MAC != "" && r.MAC != a.MAC {
		t.Errorf("MAC address %q of %+v: %v", a.MAC, r, err)
	}
	if a.Ref != r.Ref || a.Tap == "" || len(a.Tap) > 15 {
		t.Errorf("%+v attached as %+v", r, a)
	}
	if len(a.Ports) != len(r.Ports) {
		t.Fatalf("ports %+v for %+v", a.Ports, r.Ports)
	}
	for i, p := range a.Ports {
		want := r.Ports[i]
		if want.HostPort == 0 {
			want.HostPort = p.HostPort
		}
		if p != want || p.HostPort == 0 {
			t.Errorf("port %+v for %+v", p, r.Ports[i])
		}
	}
}

// distinct looks at all of them together.
func distinct(t *testing.T, all []network.Attachment) {
	t.Helper()
	seen := map[string]string{}
	for i, a := range all {
		for _, what := range []string{"tap " + a.Tap, "mac " + a.MAC, "address " + a.Address} {
			if other := seen[what]; other != "" {
				t.Errorf("%s and %s share %s", other, a.Ref, what)
			}
			seen[what] = a.Ref
		}
		for j, p := range a.Ports {
			for _, b := range all[:i] {
				if slices.ContainsFunc(b.Ports, p.Overlaps) {
					t.Errorf("%s and %s share the port %+v", a.Ref, b.Ref, p)
				}
			}
			if slices.ContainsFunc(a.Ports[:j], p.Overlaps) {
				t.Errorf("%s has the port %+v twice", a.Ref, p)
			}
		}
	}
}

func testLife(t *testing.T, rig Rig) {
	n := rig.Open(t)
	if ok, why := n.Capabilities(t.Context()); !ok {
		t.Fatalf("no network: %s", why)
	}
	if all := list(t, n); len(all) != 0 {
		t.Fatalf("something is attached: %+v", all)
	}
	if left := rig.Left(t); len(left) > 0 {
		t.Errorf("there before anything was attached: %q", left)
	}
	detach(t, n, "web-1.1")
	requests := []network.Request{
		{Ref: "web-1.1", Ports: []network.Port{{Protocol: "tcp", HostIP: rig.HostIP, GuestPort: 80}, {Protocol: "udp", HostIP: rig.HostIP, GuestPort: 53}}},
		{Ref: "web-1.2", MAC: "02:00:00:00:00:07"},
		{Ref: "web-2.1", Ports: []network.Port{{Protocol: "tcp", HostIP: rig.HostIP, HostPort: rig.FreePort, GuestPort: 80}}},
	}
	var want []network.Attachment
	for _, r := range requests {
		a := attach(t, n, r)
		check(t, r, a)
		want = append(want, a)
	}
	distinct(t, want)
	same(t, list(t, n), want)
	n = rig.Open(t)
	same(t, list(t, n), want)
	if left := rig.Left(t); len(left) == 0 {
		t.Error("what is attached does not show")
	}
	detach(t, n, "web-1.1")
	same(t, list(t, n), want[1:])
	detach(t, n, "web-1.1")
	detach(t, n, "web-1.2")
	detach(t, n, "web-2.1")
	if left := rig.Left(t); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	again := attach(t, n, requests[0])
	if again.MAC != want[0].MAC {
		t.Errorf("MAC address %s, then %s", want[0].MAC, again.MAC)
	}
}

func same(t *testing.T, got, want []network.Attachment) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("listed\n%+v, want\n%+v", got, want)
	}
}

func testIdempotent(t *testing.T, rig Rig) {
	r := network.Request{Ref: "a-1.1", Ports: []network.Port{{Protocol: "tcp", HostIP: rig.HostIP, GuestPort: 80}, {Protocol: "tcp", HostIP: rig.HostIP, HostPort: rig.FreePort, GuestPort: 81}}}
	n := rig.Open(t)
	first := attach(t, n, r)
	for range 2 {
		if again := attach(t, n, r); !reflect.DeepEqual(again, first) {
			t.Errorf("attached as %+v, then as %+v", first, again)
		}
		n = rig.Open(t)
	}
	same(t, list(t, n), []network.Attachment{first})
}

func testConflict(t *testing.T, rig Rig) {
	n := rig.Open(t)
	port := network.Port{Protocol: "tcp", HostIP: rig.HostIP, HostPort: rig.FreePort, GuestPort: 80}
	a := attach(t, n, network.Request{Ref: "a-1.1", Ports: []network.Port{port}})
	other := port
	other.GuestPort = 81
	all := port
	all.HostIP = "0.0.0.0"
	for _, r := range []network.Request{
		{Ref: "a-1.1"},
		{Ref: "a-1.1", MAC: "02:00:00:00:00:01", Ports: []network.Port{port}},
		{Ref: "a-1.1", Ports: []network.Port{other}},
		{Ref: "b-1.1", Ports: []network.Port{port}},
		{Ref: "b-1.1", Ports: []network.Port{all}},
		{Ref: "b-1.1", MAC: a.MAC},
	} {
		if got, err := n.Attach(t.Context(), r); !errors.Is(err, network.ErrConflict) {
			t.Errorf("%+v attached as %+v, %v", r, got, err)
		}
	}
	same(t, list(t, n), []network.Attachment{a})
	udp := port
	udp.Protocol = "udp"
	attach(t, n, network.Request{Ref: "c-1.1", Ports: []network.Port{udp}})
	detach(t, n, "a-1.1")
	b := attach(t, n, network.Request{Ref: "b-1.1", Ports: []network.Port{port}})
	if b.Ports[0] != port {
		t.Errorf("port %+v, want %+v", b.Ports[0], port)
	}
}

func testPorts(t *testing.T, rig Rig) {
	n := rig.Open(t)
	var all []network.Attachment
	for i := range 5 {
		r := network.Request{Ref: fmt.Sprintf("p-%d.1", i)}
		for port := range 3 {
			r.Ports = append(r.Ports, network.Port{Protocol: []string{"tcp", "udp"}[port%2], HostIP: rig.HostIP, GuestPort: 80 + port})
		}
		a := attach(t, n, r)
		check(t, r, a)
		all = append(all, a)
	}
	distinct(t, all)
	// A port that was chosen for one is taken for others.
	if _, err := n.Attach(t.Context(), network.Request{Ref: "q-1.1", Ports: all[0].Ports[:1]}); !errors.Is(err, network.ErrConflict) {
		t.Errorf("a port chosen for another: %v", err)
	}
}

func testInvalid(t *testing.T, rig Rig) {
	n := rig.Open(t)
	ok := network.Port{Protocol: "tcp", HostIP: rig.HostIP, HostPort: rig.FreePort, GuestPort: 80}
	with := func(edit func(*network.Port)) network.Request {
		p := ok
		edit(&p)
		return network.Request{Ref: "a-1.1", Ports: []network.Port{p}}
	}
	for _, r := range []network.Request{
		{},
		{Ref: "../a"},
		{Ref: ".."},
		{Ref: "A"},
		{Ref: "a/b"},
		{Ref: "a b"},
		{Ref: fmt.Sprintf("%0101d", 0)},
		{Ref: "a", MAC: "nonsense"},
		{Ref: "a", MAC: "01:00:00:00:00:00"},
		{Ref: "a", MAC: "02:00:00:00:00"},
		{Ref: "a", MAC: "02-00-00-00-00-0A"},
		{Ref: "a", Ports: []network.Port{ok, ok}},
		with(func(p *network.Port) { p.Protocol = "" }), with(func(p *network.Port) { p.Protocol = "sctp" }),
		with(func(p *network.Port) { p.HostPort = -1 }), with(func(p *network.Port) { p.HostPort = 65536 }),
		with(func(p *network.Port) { p.GuestPort = 0 }), with(func(p *network.Port) { p.GuestPort = 65536 }),
		with(func(p *network.Port) { p.HostIP = "" }), with(func(p *network.Port) { p.HostIP = "::1" }), with(func(p *network.Port) { p.HostIP = "host" }),
	} {
		if a, err := n.Attach(t.Context(), r); !errors.Is(err, network.ErrInvalid) {
			t.Errorf("%+v attached as %+v, %v", r, a, err)
		}
	}
	if err := n.Detach(t.Context(), "../a"); !errors.Is(err, network.ErrInvalid) {
		t.Errorf("detaching ../a: %v", err)
	}
	if left := rig.Left(t); len(left) > 0 {
		t.Errorf("refused requests left %q", left)
	}
}

var errCrash = errors.New("the daemon was killed here")

// crash has everything fail from the nth step on, as for a process that is gone;
// it tells whether there was one.
func crash(rig Rig, n int) (reached func() bool) {
	var mu sync.Mutex
	steps := 0
	rig.Fail(func(string) error {
		mu.Lock()
		defer mu.Unlock()
		if steps++; steps > n {
			return errCrash
		}
		return nil
	})
	return func() bool {
		mu.Lock()
		defer mu.Unlock()
		return steps > n
	}
}

// testCrashes ends the daemon at every step of Attach and Detach in turn. The
// next one attaches or detaches, and finds neither less nor more than a daemon
// that was never ended.
func testCrashes(t *testing.T, rig Rig) {
	r := network.Request{Ref: "c-1.1", Ports: []network.Port{{Protocol: "tcp", HostIP: rig.HostIP, GuestPort: 80}, {Protocol: "tcp", HostIP: rig.HostIP, HostPort: rig.FreePort, GuestPort: 81}}}
	const bound = 200
	detachAt := func(n network.Network, step int) bool {
		reached := crash(rig, step)
		err := n.Detach(t.Context(), r.Ref)
		rig.Fail(nil)
		if errors.Is(err, errCrash) != reached() || err != nil && !reached() {
			t.Fatalf("detaching with a crash at step %d: %v", step, err)
		}
		return reached()
	}
	attachAt := func(n network.Network, step int) bool {
		reached := crash(rig, step)
		_, err := n.Attach(t.Context(), r)
		rig.Fail(nil)
		if errors.Is(err, errCrash) != reached() || err != nil && !reached() {
			t.Fatalf("attaching with a crash at step %d: %v", step, err)
		}
		return reached()
	}
	gone := func(what string, step int) {
		t.Helper()
		if left := rig.Left(t); len(left) > 0 {
			t.Fatalf("%s at step %d left %q", what, step, left)
		}
	}
	for step := range bound {
		crashed := attachAt(rig.Open(t), step)
		n := rig.Open(t)
		before := list(t, n)
		if len(before) == 0 {
			gone("an attach that crashed, with nothing listed,", step)
		}
		a := attach(t, n, r)
		check(t, r, a)
		same(t, list(t, n), []network.Attachment{a})
		detach(t, n, r.Ref)
		gone("attach crashed, repeated and undone", step)

		attachAt(n, step)
		n = rig.Open(t)
		for _, a := range list(t, n) {
			detach(t, n, a.Ref)
		}
		gone("attach crashed and undone", step)
		if !crashed {
			break
		}
		if step == bound-1 {
			t.Fatalf("attaching has more than %d steps", bound)
		}
	}
	for step := range bound {
		n := rig.Open(t)
		attach(t, n, r)
		crashed := detachAt(n, step)
		n = rig.Open(t)
		for _, a := range list(t, n) {
			detach(t, n, a.Ref)
		}
		gone("detach crashed and repeated", step)

		a := attach(t, n, r)
		detachAt(n, step)
		n = rig.Open(t)
		again := attach(t, n, r)
		check(t, r, again)
		if again.MAC != a.MAC {
			t.Errorf("MAC address %s, then %s", a.MAC, again.MAC)
		}
		detach(t, n, r.Ref)
		gone("detach crashed, attached again and undone", step)
		if !crashed {
			break
		}
		if step == bound-1 {
			t.Fatalf("detaching has more than %d steps", bound)
		}
	}
}

func testConcurrent(t *testing.T, rig Rig) {
	const count = 12
	n := rig.Open(t)
	var wg sync.WaitGroup
	got := make([]network.Attachment, count)
	errs := make([]error, count)
	request := func(i int) network.Request {
		return network.Request{Ref: fmt.Sprintf("all-%02d.1", i), Ports: []network.Port{{Protocol: "tcp", HostIP: rig.HostIP, GuestPort: 80}}}
	}
	for i := range count {
		wg.Go(func() { got[i], errs[i] = n.Attach(context.WithoutCancel(t.Context()), request(i)) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	distinct(t, got)
	same(t, list(t, n), got)
	for i := range count {
		wg.Go(func() { errs[i] = n.Detach(context.WithoutCancel(t.Context()), request(i).Ref) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func testCancelled(t *testing.T, rig Rig) {
	n := rig.Open(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := n.Attach(ctx, network.Request{Ref: "x-1.1"}); !errors.Is(err, context.Canceled) {
		t.Errorf("attaching: %v", err)
	}
	if err := n.Detach(ctx, "x-1.1"); !errors.Is(err, context.Canceled) {
		t.Errorf("detaching: %v", err)
	}
	if left := rig.Left(t); len(left) > 0 {
		t.Errorf("cancelled requests left %q", left)
	}
}
