package bridge

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"

	"github.com/blixard/blixard/internal/network"
)

func hash(text string) uint32 {
	h := fnv.New32a()
	h.Write([]byte(text)) // it cannot fail
	return h.Sum32()
}

// nth is the address so far behind base.
func nth(base netip.Addr, offset uint32) netip.Addr {
	b := base.As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+offset)
	return netip.AddrFrom4(b)
}

// gateway is the node's own address in its subnet: the first.
func gateway(subnet netip.Prefix) netip.Addr { return subnet.Addr().Next() }

// chooseAddress takes a free one. It begins at a place of ref's own, so that an
// address that was just given back is not the next one in use: others may still
// remember whose it was.
func chooseAddress(subnet netip.Prefix, ref string, used map[netip.Addr]bool) (netip.Addr, error) {
	count := uint32(1)<<(32-subnet.Bits()) - 3 // without network, gateway and broadcast
	first := hash(ref) % count
	for i := range count {
		if a := nth(subnet.Addr(), 2+(first+i)%count); !used[a] {
			return a, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("all %d guest addresses of %s are in use: %w", count, subnet, network.ErrExhausted)
}

// chooseSubnet keeps the node's subnet while it has attachments, and else takes
// one of the pool that nothing on this machine has to do with.
func (n *Network) chooseSubnet(records []*record) (netip.Prefix, error) {
	if len(records) > 0 {
		return records[0].subnet(), nil
	}
	busy, err := n.busyPrefixes()
	if err != nil {
		return netip.Prefix{}, err
	}
	count := uint32(1) << (n.o.SubnetBits - n.o.Pool.Bits())
	first := hash(n.o.Seed+n.id) % count
	if n.o.Seed != "" {
		first = hash(n.o.Seed) % count
	}
	var last string
next:
	for i := range count {
		base := nth(n.o.Pool.Addr(), (first+i)%count<<(32-n.o.SubnetBits))
		subnet := netip.PrefixFrom(base, n.o.SubnetBits)
		for _, b := range busy {
			if b.prefix.Overlaps(subnet) {
				last = fmt.Sprintf("%s overlaps with %s of %s", subnet, b.prefix, b.what)
				continue next
			}
		}
		return subnet, nil
	}
	return netip.Prefix{}, fmt.Errorf("no subnet of %s is free on this machine (%s): set network.subnet to another one: %w", n.o.Pool, last, network.ErrConflict)
}

type busyPrefix struct {
	prefix netip.Prefix
	what   string
}

// busyPrefixes are the networks that the machine has addresses in or ways to,
// but for the node's own.
func (n *Network) busyPrefixes() ([]busyPrefix, error) {
	addresses, err := addressesOf(nil)
	if err != nil {
		return nil, fmt.Errorf("listing addresses: %w", err)
	}
	var out []busyPrefix
	own := map[netip.Prefix]bool{}
	for _, a := range addresses {
		p, ok := toPrefix(a.IPNet)
		switch {
		case !ok:
		case a.Label == n.label:
			own[p] = true
		default:
			out = append(out, busyPrefix{p, "an address of " + a.Label})
		}
	}
	routes, err := steady(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("listing routes: %w", err)
	}
	for _, r := range routes {
		if p, ok := toPrefix(r.Dst); ok && p.Bits() > 0 && !own[p] {
			out = append(out, busyPrefix{p, "a route"})
		}
	}
	return out, nil
}

func toPrefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	ip, ok := netip.AddrFromSlice(n.IP.To4())
	ones, bits := n.Mask.Size()
	if !ok || bits != 32 {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(ip, ones).Masked(), true
}
