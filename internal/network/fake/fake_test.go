package fake_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/blixard/blixard/internal/network"
	"github.com/blixard/blixard/internal/network/fake"
	"github.com/blixard/blixard/internal/network/networktest"
)

func TestSuite(t *testing.T) {
	networktest.Suite(t, func(*testing.T) networktest.Rig {
		m := fake.NewMachine(fake.Options{})
		return networktest.Rig{
			Open: func(*testing.T) network.Network { return m.Open() },
			Fail: m.Fail,
			Left: func(t *testing.T) []string {
				var out []string
				all, err := m.Open().List(context.Background())
				if err != nil {
					t.Fatal(err)
				}
				for _, a := range all {
					out = append(out, a.Ref)
				}
				return out
			},
			HostIP: "192.0.2.1", FreePort: 8080,
		}
	})
}

func TestExhausted(t *testing.T) {
	m := fake.NewMachine(fake.Options{Subnet: netip.MustParsePrefix("10.1.2.0/29"), FirstPort: 100, LastPort: 103})
	n := m.Open()
	port := network.Port{Protocol: "tcp", HostIP: "192.0.2.1", GuestPort: 80}
	for i := range 5 { // .2 to .6
		r := network.Request{Ref: fmt.Sprintf("a-%d.1", i)}
		if i < 4 {
			r.Ports = []network.Port{port}
		}
		if i == 4 {
			full := r
			full.Ports = []network.Port{port}
			if _, err := n.Attach(t.Context(), full); !errors.Is(err, network.ErrExhausted) {
				t.Errorf("a fifth of four ports: %v", err)
			}
		}
		if _, err := n.Attach(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := n.Attach(t.Context(), network.Request{Ref: "a-9.1"}); !errors.Is(err, network.ErrExhausted) {
		t.Errorf("a sixth of five addresses: %v", err)
	}
}

func TestUnavailable(t *testing.T) {
	n := fake.NewMachine(fake.Options{Why: "it is said so"}).Open()
	if ok, why := n.Capabilities(t.Context()); ok || why != "it is said so" {
		t.Errorf("capabilities: %v, %q", ok, why)
	}
	if _, err := n.Attach(t.Context(), network.Request{Ref: "a-1.1"}); !errors.Is(err, network.ErrUnavailable) {
		t.Errorf("attaching: %v", err)
	}
}
