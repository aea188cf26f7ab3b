// Package fake is a network of memory alone: it keeps the contract of its port
// and connects nothing.
//
// Ownership: a Machine holds what a kernel and a disk would; a Network opened
// on it is a daemon's view and holds nothing.
package fake

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/blixard/blixard/internal/assert"
	"github.com/blixard/blixard/internal/network"
)

// Faults are named operations that can be told to fail, see Machine.Fail.
const (
	FaultRecord = "record" // before anything is written
	FaultDevice = "device" // with the record written
	FaultRules  = "rules"  // with the device made, or about to be taken away
)

// Options of a Machine.
type Options struct {
	// Subnet of the guests; 10.88.0.0/24 by default.
	Subnet netip.Prefix
	// FirstPort and LastPort bound the ports it chooses; 20000 to 29999 by
	// default.
	FirstPort, LastPort int
	// Why there is no network here; empty: there is.
	Why string
}

// Machine is what outlives a daemon.
type Machine struct {
	o Options

	mu       sync.Mutex
	attached map[string]*entry
	fail     func(operation string) error
}

type entry struct {
	request    network.Request
	attachment network.Attachment
	whole      bool
}

// NewMachine makes a machine with nothing attached.
func NewMachine(o Options) *Machine {
	if !o.Subnet.IsValid() {
		o.Subnet = netip.MustParsePrefix("10.88.0.0/24")
	}
	if o.FirstPort == 0 {
		o.FirstPort, o.LastPort = 20000, 29999
	}
	assert.True(o.Subnet.Addr().Is4() && o.Subnet.Bits() <= 30 && o.FirstPort <= o.LastPort, "a fake network of %s, ports %d to %d", o.Subnet, o.FirstPort, o.LastPort)
	o.Subnet = o.Subnet.Masked()
	return &Machine{o: o, attached: map[string]*entry{}}
}

// Open is a daemon's view of the machine.
func (m *Machine) Open() *Network { return &Network{m} }

// Fail has fail decide about every operation from now on; nil: all work.
func (m *Machine) Fail(fail func(operation string) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = fail
}

func (m *Machine) step(operation string) error {
	if m.fail == nil {
		return nil
	}
	return m.fail(operation)
}

// Network implements network.Network.
type Network struct{ m *Machine }

var _ network.Network = (*Network)(nil)

// Capabilities implements network.Network.
func (n *Network) Capabilities(context.Context) (bool, string) { return n.m.o.Why == "", n.m.o.Why }

// Attach implements network.Network.
func (n *Network) Attach(ctx context.Context, request network.Request) (network.Attachment, error) {
	if err := request.Check(); err != nil {
		return network.Attachment{}, err
	}
	if err := ctx.Err(); err != nil {
		return network.Attachment{}, fmt.Errorf("attaching %s: %w", request.Ref, err)
	}
	m := n.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.o.Why != "" {
		return network.Attachment{}, fmt.Errorf("attaching %s: %w: %s", request.Ref, network.ErrUnavailable, m.o.Why)
	}
	if request.MAC == "" {
		request.MAC = network.MAC(request.Ref)
	}
	e := m.attached[request.Ref]
	if e != nil && (e.request.MAC != request.MAC || !slices.Equal(e.request.Ports, request.Ports)) {
		return network.Attachment{}, fmt.Errorf("attaching %s: it is attached in another way: %w", request.Ref, network.ErrConflict)
	}
	if e == nil {
		made, err := m.plan(request)
		if err != nil {
			return network.Attachment{}, fmt.Errorf("attaching %s: %w", request.Ref, err)
		}
		if err := m.step(FaultRecord); err != nil {
			return network.Attachment{}, fmt.Errorf("recording %s: %w", request.Ref, err)
		}
		e = made
		m.attached[request.Ref] = e
	}
	for _, operation := range []string{FaultDevice, FaultRules} {
		if err := m.step(operation); err != nil {
			return network.Attachment{}, fmt.Errorf("attaching %s: %w", request.Ref, err)
		}
	}
	e.whole = true
	return e.copy(), nil
}

func (e *entry) copy() network.Attachment {
	a := e.attachment
	a.DNS, a.Ports = slices.Clone(a.DNS), slices.Clone(a.Ports)
	return a
}

func (m *Machine) refs() []string { return slices.Sorted(maps.Keys(m.attached)) }

// plan chooses what is free.
func (m *Machine) plan(request network.Request) (*entry, error) {
	usedIP, usedTap := map[string]bool{}, map[string]bool{}
	var usedPorts []network.Port
	for _, ref := range m.refs() {
		a := m.attached[ref].attachment
		if a.MAC == request.MAC {
			return nil, fmt.Errorf("%s has the MAC address %s: %w", ref, a.MAC, network.ErrConflict)
		}
		usedIP[a.Address], usedTap[a.Tap] = true, true
		usedPorts = append(usedPorts, a.Ports...)
	}
	gateway := m.o.Subnet.Addr().Next()
	a := network.Attachment{Ref: request.Ref, MAC: request.MAC, Gateway: gateway.String(), DNS: []string{gateway.String()}}
	for ip := gateway.Next(); m.o.Subnet.Contains(ip.Next()); ip = ip.Next() { // the last one is for broadcasts
		if text := netip.PrefixFrom(ip, m.o.Subnet.Bits()).String(); !usedIP[text] {
			a.Address = text
			break
		}
	}
	if a.Address == "" {
		return nil, fmt.Errorf("no address of %s is free: %w", m.o.Subnet, network.ErrExhausted)
	}
	for i := 0; a.Tap == ""; i++ {
		if tap := fmt.Sprintf("fake%d", i); !usedTap[tap] {
			a.Tap = tap
		}
	}
	taken := func(p network.Port) bool { return slices.ContainsFunc(usedPorts, p.Overlaps) }
	a.Ports = slices.Clone(request.Ports)
	for _, p := range a.Ports { // given ones first, lest a chosen one takes theirs
		if taken(p) {
			return nil, fmt.Errorf("the port %d/%s is taken: %w", p.HostPort, p.Protocol, network.ErrConflict)
		}
	}
	usedPorts = append(usedPorts, a.Ports...)
	for i := range a.Ports {
		p := &a.Ports[i]
		for port := m.o.FirstPort; p.HostPort == 0 && port <= m.o.LastPort; port++ {
			try := *p
			if try.HostPort = port; !taken(try) {
				*p = try
				usedPorts = append(usedPorts, try)
			}
		}
		if p.HostPort == 0 {
			return nil, fmt.Errorf("no port from %d to %d is free: %w", m.o.FirstPort, m.o.LastPort, network.ErrExhausted)
		}
	}
	return &entry{request: request, attachment: a}, nil
}

// Detach implements network.Network.
func (n *Network) Detach(ctx context.Context, ref string) error {
	if err := network.CheckRef(ref); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("detaching %s: %w", ref, err)
	}
	m := n.m
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.attached[ref]
	if e == nil {
		return nil
	}
	for _, operation := range []string{FaultRules, FaultDevice, FaultRecord} {
		if err := m.step(operation); err != nil {
			return fmt.Errorf("detaching %s: %w", ref, err)
		}
		e.whole = false
	}
	delete(m.attached, ref)
	return nil
}

// List implements network.Network.
func (n *Network) List(ctx context.Context) ([]network.Attachment, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("listing attachments: %w", err)
	}
	n.m.mu.Lock()
	defer n.m.mu.Unlock()
	var out []network.Attachment
	for _, ref := range n.m.refs() {
		out = append(out, n.m.attached[ref].copy())
	}
	return out, nil
}

// Whole tells whether ref is attached and works, as a packet would find out.
func (m *Machine) Whole(ref string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.attached[ref]
	return e != nil && e.whole
}
