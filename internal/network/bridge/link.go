package bridge

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/network"
)

const (
	tunDevice   = "/dev/net/tun"
	bridgeAlias = "blixard bridge, goes with the last guest on this machine"
	maxAlias    = 255
)

// steady repeats a list that was changed by others while it was read.
func steady[T any](list func() ([]T, error)) ([]T, error) {
	const attempts = 50
	for try := 1; ; try++ {
		out, err := list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) || try == attempts {
			return out, err
		}
	}
}

// addressesOf are the IPv4 addresses of a device, or of all for nil.
func addressesOf(l netlink.Link) ([]netlink.Addr, error) {
	return steady(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_V4) })
}

// link finds a device, nil if there is none of that name.
func link(name string) (netlink.Link, error) {
	l, err := netlink.LinkByName(name)
	if _, ok := errors.AsType[netlink.LinkNotFoundError](err); ok {
		return nil, nil //nolint:nilnil // nil is the answer
	}
	if err != nil {
		return nil, fmt.Errorf("looking for the device %s: %w", name, err)
	}
	return l, nil
}

// bridgeMAC is the address that a bridge made here has. Without one of its own
// it would take that of a port, and change it under the guests' feet.
func bridgeMAC(name string) net.HardwareAddr {
	sum := sha256.Sum256([]byte("blixard bridge " + name))
	return net.HardwareAddr{0x02, 0xb0, sum[0], sum[1], sum[2], sum[3]}
}

// madeHere tells whether the bridge is Blixard's: it has the alias, or the
// address of one that a crash kept from getting it.
func madeHere(l netlink.Link) bool {
	a := l.Attrs()
	return a.Alias == bridgeAlias || a.Alias == "" && bytes.Equal(a.HardwareAddr, bridgeMAC(a.Name))
}

// bridge finds the bridge, nil if there is none.
func (n *Network) bridge() (netlink.Link, error) {
	l, err := link(n.name)
	if l != nil && l.Type() != "bridge" {
		return nil, fmt.Errorf("the device %s is no bridge but a %s: set network.bridge_name to another name: %w", n.name, l.Type(), network.ErrConflict)
	}
	return l, err
}

func (n *Network) makeBridge() error {
	if l, err := n.bridge(); l != nil || err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = n.name, bridgeMAC(n.name)
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return fmt.Errorf("making the bridge %s: %w", n.name, err)
	}
	return nil
}

// anyBridge is the bridge for what undoes: a device of its name that is none has
// nothing of ours.
func (n *Network) anyBridge() (netlink.Link, error) {
	l, err := link(n.name)
	if l != nil && l.Type() != "bridge" {
		return nil, nil //nolint:nilnil // as for link
	}
	return l, err
}

// mustBridge is the bridge, which was there a moment ago.
func (n *Network) mustBridge() (netlink.Link, error) {
	l, err := n.bridge()
	if l == nil && err == nil {
		err = fmt.Errorf("the bridge %s has just been removed by somebody else", n.name)
	}
	return l, err
}

func (n *Network) nameBridge() error {
	l, err := n.mustBridge()
	if err != nil {
		return err
	}
	if madeHere(l) && l.Attrs().Alias != bridgeAlias {
		if err := netlink.LinkSetAlias(l, bridgeAlias); err != nil {
			return fmt.Errorf("marking the bridge %s: %w", n.name, err)
		}
	}
	if l.Attrs().Flags&net.FlagUp == 0 {
		if err := netlink.LinkSetUp(l); err != nil {
			return fmt.Errorf("switching the bridge %s on: %w", n.name, err)
		}
	}
	return nil
}

func (n *Network) addressBridge(subnet netip.Prefix) error {
	l, err := n.mustBridge()
	if err != nil {
		return err
	}
	address := &netlink.Addr{Label: n.label, IPNet: &net.IPNet{IP: gateway(subnet).AsSlice(), Mask: net.CIDRMask(subnet.Bits(), 32)}}
	if err := netlink.AddrReplace(l, address); err != nil {
		return fmt.Errorf("giving the bridge %s the address %s: %w", n.name, address.IPNet, err)
	}
	return nil
}

func (n *Network) unaddressBridge() error {
	l, err := n.anyBridge()
	if l == nil || err != nil {
		return err
	}
	addresses, err := addressesOf(l)
	if err != nil {
		return fmt.Errorf("listing the addresses of the bridge %s: %w", n.name, err)
	}
	for i := range addresses {
		if addresses[i].Label != n.label {
			continue
		}
		if err := netlink.AddrDel(l, &addresses[i]); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("taking the address %s from the bridge %s: %w", addresses[i].IPNet, n.name, err)
		}
	}
	return nil
}

// deleteBridge removes the bridge if it was made here and nobody uses it: other
// nodes have an address on it, or guests.
func (n *Network) deleteBridge() error {
	l, err := n.anyBridge()
	if l == nil || err != nil || !madeHere(l) {
		return err
	}
	addresses, err := addressesOf(l)
	if err != nil {
		return fmt.Errorf("listing the addresses of the bridge %s: %w", n.name, err)
	}
	links, err := steady(netlink.LinkList)
	if err != nil {
		return fmt.Errorf("listing devices: %w", err)
	}
	if len(addresses) > 0 || slices.ContainsFunc(links, func(o netlink.Link) bool { return o.Attrs().MasterIndex == l.Attrs().Index }) {
		return nil
	}
	if err := netlink.LinkDel(l); err != nil {
		return fmt.Errorf("deleting the bridge %s: %w", n.name, err)
	}
	return nil
}

// tapAlias names the tap's owner: node, incarnation, and for people the directory.
func (n *Network) tapAlias(ref string) string {
	alias := "blixard " + n.id + " " + ref + " "
	return alias + n.o.Dir[:min(len(n.o.Dir), maxAlias-len(alias))]
}

// tapOwner reads what tapAlias wrote.
func tapOwner(alias string) (id, ref string, ok bool) {
	fields := strings.SplitN(alias, " ", 4)
	if len(fields) != 4 || fields[0] != "blixard" || network.CheckRef(fields[2]) != nil {
		return "", "", false
	}
	return fields[1], fields[2], true
}

// tap finds the device of an attachment, nil if there is none. Its name alone,
// before it has its alias, is proof enough: it is derived from the node and the
// incarnation, whose record is on disk.
func (n *Network) tap(r *record) (netlink.Link, error) {
	l, err := link(r.Attachment.Tap)
	if l == nil || err != nil {
		return nil, err
	}
	if id, ref, ok := tapOwner(l.Attrs().Alias); l.Type() != "tuntap" || l.Attrs().Alias != "" && (!ok || id != n.id || ref != r.Ref) {
		return nil, fmt.Errorf("the device %s (%q) is not ours: %w", r.Attachment.Tap, l.Attrs().Alias, network.ErrConflict)
	}
	return l, nil
}

func (n *Network) makeTap(r *record) (err error) {
	if l, err := n.tap(r); l != nil || err != nil {
		return err
	}
	f, err := os.OpenFile(tunDevice, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening the kernel's tap devices: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	request, err := unix.NewIfreq(r.Attachment.Tap)
	if err != nil {
		return fmt.Errorf("naming the tap device %s: %w", r.Attachment.Tap, err)
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	fd := int(f.Fd())
	err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	if err == nil { // for a hypervisor that has no rights but this daemon's user
		err = unix.IoctlSetInt(fd, unix.TUNSETOWNER, os.Geteuid())
	}
	if err == nil {
		err = unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1)
	}
	if err != nil {
		return fmt.Errorf("making the tap device %s: %w", r.Attachment.Tap, err)
	}
	return nil
}

func (n *Network) nameTap(r *record) error {
	l, err := n.mustTap(r)
	if err != nil || l.Attrs().Alias != "" {
		return err
	}
	if err := netlink.LinkSetAlias(l, n.tapAlias(r.Ref)); err != nil {
		return fmt.Errorf("marking the tap device %s: %w", r.Attachment.Tap, err)
	}
	return nil
}

func (n *Network) mustTap(r *record) (netlink.Link, error) {
	l, err := n.tap(r)
	if l == nil && err == nil {
		err = fmt.Errorf("the tap device %s has just been removed by somebody else", r.Attachment.Tap)
	}
	return l, err
}

func (n *Network) connectTap(r *record) error {
	l, err := n.mustTap(r)
	if err != nil {
		return err
	}
	b, err := n.mustBridge()
	if err != nil {
		return err
	}
	if l.Attrs().MasterIndex != b.Attrs().Index {
		if err := netlink.LinkSetMaster(l, b); err != nil {
			return fmt.Errorf("connecting %s with the bridge %s: %w", r.Attachment.Tap, n.name, err)
		}
	}
	if l.Attrs().Flags&net.FlagUp == 0 {
		if err := netlink.LinkSetUp(l); err != nil {
			return fmt.Errorf("switching the tap device %s on: %w", r.Attachment.Tap, err)
		}
	}
	return nil
}

func (n *Network) deleteTap(r *record) error {
	l, err := n.tap(r)
	if l == nil || err != nil {
		return err
	}
	if err := netlink.LinkDel(l); err != nil {
		return fmt.Errorf("deleting the tap device %s: %w", r.Attachment.Tap, err)
	}
	return nil
}

// taps are this node's devices.
func (n *Network) taps() ([]network.Attachment, error) {
	links, err := steady(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("listing devices: %w", err)
	}
	var out []network.Attachment
	for _, l := range links {
		id, ref, ok := tapOwner(l.Attrs().Alias)
		if ok && id == n.id {
			out = append(out, network.Attachment{Ref: ref, Tap: l.Attrs().Name})
		}
	}
	return out, nil
}

// without are the taps that no record tells of, as when the node's directory was
// lost.
func without(taps []network.Attachment, records []*record) []network.Attachment {
	return slices.DeleteFunc(taps, func(a network.Attachment) bool { return find(records, a.Ref) != nil })
}

// forgetConnections has the kernel forget what it tracks of a guest, lest the
// next one with its address or its ports gets packets of old connections.
func forgetConnections(r *record) error {
	if r.lost {
		return nil
	}
	_, err := steady(func() ([]struct{}, error) {
		_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, guestFlows(r.guest()))
		return nil, err
	})
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EPROTONOSUPPORT) {
		return fmt.Errorf("forgetting connections of %s: %w", r.guest(), err)
	}
	return nil
}

type guestFlows netip.Addr

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (g guestFlows) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	ip := net.IP(netip.Addr(g).AsSlice())
	return flow.Forward.SrcIP.Equal(ip) || flow.Forward.DstIP.Equal(ip) || flow.Reverse.SrcIP.Equal(ip)
}
