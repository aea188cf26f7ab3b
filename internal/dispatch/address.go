package dispatch

import (
	"fmt"
	"net/netip"

	"github.com/blixard/blixard/internal/vmm"
)

// Every guest of the cluster has an address of its own, although each is alone in
// its user-mode network: what it tells others of itself, or writes to a log, says
// which guest it was. 10.64.0.0/10 is cut into subnets of nodes, which are cut into
// addresses of guests:
//
//	10.64.0.0 + (Raft ID of the node mod 512) << 13 + 16 + host
//
// Raft IDs are counted and never given twice, so that two nodes have the same
// subnet only if 512 members have joined between them and both are there. A host
// number is free again when nothing of its guest is left. The first 16 addresses
// of a subnet are the gateway's (2), the name server's (3) and DHCP's (15).
const (
	nodeSubnets = 512
	subnetBits  = 19
	firstHost   = 16
	// hosts are how many guests of a node have addresses of their own; with more
	// of them some are shared.
	hosts = 1<<(32-subnetBits) - firstHost - 1
)

// place is where a guest is in the cluster's network of guests.
type place struct {
	node uint64 // Raft ID
	host uint32 // from 1 to hosts; 0: none yet
}

// placeOf is the place of an instance, which it keeps when it has one. Callers
// hold mu.
func (d *Dispatcher) placeOf(has place) place {
	if has.host != 0 {
		return has
	}
	for range hosts {
		d.nextHost = d.nextHost%hosts + 1
		if !d.places[d.nextHost] {
			break
		}
	}
	d.places[d.nextHost] = true
	return place{node: d.raftID, host: d.nextHost}
}

// leavePlace makes the place of a guest free that is in no books.
func (d *Dispatcher) leavePlace(in *instance) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.places, in.place.host)
}

func (p place) subnet() netip.Prefix {
	n := uint32(p.node%nodeSubnets) << (32 - subnetBits)
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 64 + byte(n>>16), byte(n >> 8), 0}), subnetBits)
}

// at is an address of the subnet.
func (p place) at(n uint32) netip.Addr {
	base := p.subnet().Addr().As4()
	return netip.AddrFrom4([4]byte{base[0], base[1], base[2] + byte(n>>8), byte(n)})
}

// addresses of a guest, as vmm.Network has them.
func (p place) addresses() (address, gateway string, dns []string) {
	return netip.PrefixFrom(p.at(firstHost+p.host-1), subnetBits).String(), p.at(2).String(), []string{p.at(3).String()}
}

// network of an instance; the user-mode network is each guest's own.
func (d *Dispatcher) network(in *instance) vmm.Network {
	if in.v.spec.Network == "none" {
		return vmm.Network{Mode: "none"}
	}
	n, node := in.ref.Generation, in.place.node
	return vmm.Network{
		Mode: "user", Subnet: in.place.subnet().String(),
		MAC: fmt.Sprintf("02:%02x:%02x:%02x:%02x:%02x", byte(node>>8), byte(node), byte(n>>16), byte(n>>8), byte(n)),
	}
}
