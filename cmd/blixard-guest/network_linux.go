package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/guest"
)

// configureMachine sets host name, files and network of a guest that is ours.
func configureMachine(config guest.Config) error {
	name := config.Hostname
	if name == "" {
		name = config.InstanceID
	}
	if name != "" {
		if err := setHostname(name); err != nil {
			return err
		}
	}
	if err := writeFiles(name, config); err != nil {
		return err
	}
	if err := withNetlink(func(n *netlink) error { return n.up("lo", 0) }); err != nil {
		return fmt.Errorf("bringing up lo: %w", err)
	}
	if config.Address == "" {
		return nil
	}
	address, err := netip.ParsePrefix(config.Address)
	if err != nil {
		return fmt.Errorf("%w: address %q: %w", guest.ErrInvalid, config.Address, err)
	}
	var gateway netip.Addr
	if config.Gateway != "" {
		if gateway, err = netip.ParseAddr(config.Gateway); err != nil {
			return fmt.Errorf("%w: gateway %q: %w", guest.ErrInvalid, config.Gateway, err)
		}
	}
	device, err := findInterface()
	if err != nil {
		return err
	}
	return withNetlink(func(n *netlink) error {
		if err := n.up(device, config.MTU); err != nil {
			return fmt.Errorf("bringing up %s: %w", device, err)
		}
		if err := n.address(device, address); err != nil {
			return fmt.Errorf("giving %s to %s: %w", address, device, err)
		}
		if !gateway.IsValid() {
			return nil
		}
		if err := n.defaultRoute(device, gateway); err != nil {
			return fmt.Errorf("routing by %s: %w", gateway, err)
		}
		return nil
	})
}

func writeFiles(name string, config guest.Config) error {
	hosts := []string{"127.0.0.1 localhost", "::1 localhost"}
	if name != "" {
		address := "127.0.1.1"
		if prefix, err := netip.ParsePrefix(config.Address); err == nil {
			address = prefix.Addr().String()
		}
		hosts = append(hosts, address+" "+name)
	}
	for _, host := range config.Hosts {
		if strings.ContainsAny(host.Address+strings.Join(host.Names, ""), "\n\r") {
			return fmt.Errorf("%w: a line break in a host's name", guest.ErrInvalid)
		}
		hosts = append(hosts, host.Address+" "+strings.Join(host.Names, " "))
	}
	files := [][2]string{{"/etc/hosts", strings.Join(hosts, "\n") + "\n"}}
	if name != "" {
		files = append(files, [2]string{"/etc/hostname", name + "\n"})
	}
	if len(config.DNS) > 0 {
		var b strings.Builder
		for _, server := range config.DNS {
			if _, err := netip.ParseAddr(server); err != nil {
				return fmt.Errorf("%w: DNS server %q: %w", guest.ErrInvalid, server, err)
			}
			fmt.Fprintf(&b, "nameserver %s\n", server)
		}
		files = append(files, [2]string{"/etc/resolv.conf", b.String()})
	}
	if err := os.MkdirAll("/etc", 0o755); err != nil {
		return err
	}
	for _, file := range files {
		// An image's /etc may be read-only, and it works nevertheless.
		if err := os.WriteFile(file[0], []byte(file[1]), 0o644); err != nil {
			logf("writing %s: %v", file[0], err)
		}
	}
	return nil
}

// findInterface waits for the network device, which may still be appearing.
func findInterface() (string, error) {
	for range 100 {
		devices, err := filepath.Glob("/sys/class/net/*/device")
		if err != nil {
			return "", err
		}
		if len(devices) > 0 {
			slices.Sort(devices)
			return filepath.Base(filepath.Dir(devices[0])), nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return "", errors.New("an address is configured and the guest has no network device")
}

// netlink speaks the four words of rtnetlink that a guest needs.
type netlink struct{ fd int }

func withNetlink(f func(*netlink) error) (err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("opening netlink: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("binding netlink: %w", err)
	}
	return f(&netlink{fd})
}

func (n *netlink) up(device string, mtu int) error {
	index, err := interfaceIndex(device)
	if err != nil {
		return err
	}
	body := []byte{unix.AF_UNSPEC, 0, 0, 0}
	body = binary.NativeEndian.AppendUint32(body, uint32(index))
	body = binary.NativeEndian.AppendUint32(body, unix.IFF_UP)
	body = binary.NativeEndian.AppendUint32(body, unix.IFF_UP)
	if mtu > 0 {
		body = attribute(body, unix.IFLA_MTU, binary.NativeEndian.AppendUint32(nil, uint32(mtu)))
	}
	return n.request(unix.RTM_NEWLINK, 0, body)
}

func (n *netlink) address(device string, address netip.Prefix) error {
	index, err := interfaceIndex(device)
	if err != nil {
		return err
	}
	body := []byte{family(address.Addr()), byte(address.Bits()), 0, unix.RT_SCOPE_UNIVERSE}
	body = binary.NativeEndian.AppendUint32(body, uint32(index))
	body = attribute(body, unix.IFA_LOCAL, address.Addr().AsSlice())
	body = attribute(body, unix.IFA_ADDRESS, address.Addr().AsSlice())
	return n.request(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, body)
}

func (n *netlink) defaultRoute(device string, gateway netip.Addr) error {
	index, err := interfaceIndex(device)
	if err != nil {
		return err
	}
	body := []byte{family(gateway), 0, 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST, 0, 0, 0, 0}
	body = attribute(body, unix.RTA_GATEWAY, gateway.AsSlice())
	body = attribute(body, unix.RTA_OIF, binary.NativeEndian.AppendUint32(nil, uint32(index)))
	return n.request(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, body)
}

// request sends one message and waits for its acknowledgement.
func (n *netlink) request(kind uint16, flags int, body []byte) error {
	message := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(body)))
	message = binary.NativeEndian.AppendUint16(message, kind)
	message = binary.NativeEndian.AppendUint16(message, uint16(unix.NLM_F_REQUEST|unix.NLM_F_ACK|flags))
	message = binary.NativeEndian.AppendUint32(message, 1)
	message = binary.NativeEndian.AppendUint32(message, 0)
	message = append(message, body...)
	if err := unix.Sendto(n.fd, message, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	reply := make([]byte, 8192)
	size, _, err := unix.Recvfrom(n.fd, reply, 0)
	if err != nil {
		return err
	}
	if size < unix.NLMSG_HDRLEN+4 || binary.NativeEndian.Uint16(reply[4:]) != unix.NLMSG_ERROR {
		return errors.New("the kernel gave no acknowledgement")
	}
	if code := int32(binary.NativeEndian.Uint32(reply[unix.NLMSG_HDRLEN:])); code != 0 {
		return unix.Errno(-code)
	}
	return nil
}

func attribute(b []byte, kind uint16, value []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, value...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func family(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func interfaceIndex(name string) (int, error) {
	device, err := net.InterfaceByName(name)
	if err != nil {
		return 0, err
	}
	return device.Index, nil
}

// unmountAll makes disks consistent before the machine ends: what can be
// unmounted is, the rest becomes read-only.
func unmountAll() {
	unix.Sync()
	table, err := os.ReadFile("/proc/mounts")
	if err != nil {
		return
	}
	lines := slices.Collect(strings.Lines(string(table)))
	slices.Reverse(lines)
	for _, line := range lines {
		fields := strings.Fields(line)
		if len(fields) < 3 || !strings.HasPrefix(fields[0], "/dev/") {
			continue
		}
		if err := unix.Unmount(fields[1], 0); err == nil {
			continue
		}
		if err := unix.Mount("", fields[1], "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			logf("making %s read-only: %v", fields[1], err)
		}
	}
}
