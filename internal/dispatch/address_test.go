package dispatch_test

import (
	"net/netip"
	"testing"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
	"github.com/blixard/blixard/internal/dispatch"
)

// Clones of two nodes share no address, and each can reach its gateway.
func TestAddressesAreUniqueInTheCluster(t *testing.T) {
	const many = 40
	a, b := pair(t)
	a.deploy("f", 10*many, nil)
	b.until("a copy", func() bool { _, _, err := b.invoke("f", "echo"); return err == nil })
	for _, w := range []*world{a, b} {
		wait := w.crowd("f", many)
		close(w.gate)
		wait()
	}
	seen := map[string]blixard.NodeName{}
	for _, w := range []*world{a, b} {
		own := map[string]string{} // a clone is told who it is again when it leaves the pool
		w.set(func() {
			for _, id := range w.identities {
				own[id.Address] = id.Hostname
				check(t, &id)
			}
		})
		for address := range own {
			if other, ok := seen[address]; ok {
				t.Errorf("%s and %s have the guest %s", other, w.node, address)
			}
			seen[address] = w.node
		}
	}
	if len(seen) < 2*many {
		t.Errorf("%d addresses", len(seen))
	}
}

func check(t *testing.T, id *call.Identity) {
	t.Helper()
	p, err := netip.ParsePrefix(id.Address)
	if err != nil {
		t.Fatal(err)
	}
	gateway, err := netip.ParseAddr(id.Gateway)
	if err != nil || !p.Contains(gateway) || gateway == p.Addr() || !netip.MustParsePrefix("10.64.0.0/10").Contains(p.Addr()) {
		t.Errorf("%+v", id)
	}
}

// Addresses that are free again are used again, and never twice at a time.
func TestPlaces(t *testing.T) {
	hosts, taken := dispatch.NewPlaces(513)
	seen := map[string]bool{}
	for range hosts {
		address := taken.Next()
		if seen[address] {
			t.Fatalf("%s is given twice", address)
		}
		seen[address] = true
	}
	if !seen["10.64.32.16/19"] || !seen["10.64.63.254/19"] || seen["10.64.63.255/19"] || seen["10.64.32.15/19"] {
		t.Error("the subnet of the node 513 is not used from its 16th address to the last but one")
	}
	taken.Free(7)
	if again := taken.Next(); again != "10.64.32.22/19" {
		t.Errorf("%s is not the one that is free", again)
	}
}
