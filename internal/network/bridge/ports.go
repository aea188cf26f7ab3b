package bridge

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/network"
)

// choosePorts fills in the ports of a new attachment and holds them. Callers
// hold the lock.
func (n *Network) choosePorts(r *record, records []*record) error {
	taken, err := n.foreignClaims()
	if err != nil {
		return err
	}
	for _, o := range records {
		for _, p := range o.Attachment.Ports {
			taken = append(taken, claim{o.Ref, p})
		}
	}
	owner := func(p network.Port) string {
		for _, c := range taken {
			if c.port.Overlaps(p) {
				return c.ref
			}
		}
		return ""
	}
	ports := append([]network.Port(nil), r.Request.Ports...)
	for _, p := range ports { // given ones first, lest a chosen one takes theirs
		if p.HostPort == 0 {
			continue
		}
		if ref := owner(p); ref != "" {
			return fmt.Errorf("the port %d/%s is published by %s: publish another one, or leave the host port out to have a free one chosen: %w", p.HostPort, p.Protocol, ref, network.ErrConflict)
		}
		if err := n.reserve(r.Ref, p); err != nil {
			return err
		}
		taken = append(taken, claim{r.Ref, p})
	}
	count := n.o.LastPort - n.o.FirstPort + 1
	for i := range ports {
		p := &ports[i]
		if p.HostPort != 0 {
			continue
		}
		first := int(hash(fmt.Sprintf("%s %s %d", r.Ref, p.Protocol, p.GuestPort)) % uint32(count))
		for j := 0; j < count && p.HostPort == 0; j++ {
			try := *p
			try.HostPort = n.o.FirstPort + (first+j)%count
			if owner(try) != "" {
				continue
			}
			err := n.reserve(r.Ref, try)
			if err != nil && !errors.Is(err, network.ErrConflict) {
				return err
			}
			if err == nil {
				*p = try
				taken = append(taken, claim{r.Ref, try})
			}
		}
		if p.HostPort == 0 {
			return fmt.Errorf("all ports from %d to %d of %s are in use: %w", n.o.FirstPort, n.o.LastPort, p.HostIP, network.ErrExhausted)
		}
	}
	r.Attachment.Ports = ports
	return nil
}

// reserve holds a port for ref: no other program of the machine can listen on
// it. Nothing listens on it here either, so that without a rule connections are
// refused and do not hang.
func (n *Network) reserve(ref string, p network.Port) error {
	kind := unix.SOCK_STREAM
	if p.Protocol == "udp" {
		kind = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("opening a socket: %w", err)
	}
	if kind == unix.SOCK_STREAM {
		// Connections of a former listener that wait for their end are no hindrance.
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet4{Port: p.HostPort, Addr: netip.MustParseAddr(p.HostIP).As4()})
	}
	if err == nil && kind == unix.SOCK_STREAM {
		// But nobody may listen beside us.
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 0)
	}
	if err == nil {
		n.held[ref] = append(n.held[ref], fd)
		return nil
	}
	closeErr := unix.Close(fd)
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		err = fmt.Errorf("another program has the port %d/%s of %s: publish another one, or leave the host port out to have a free one chosen: %w", p.HostPort, p.Protocol, p.HostIP, network.ErrConflict)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		err = fmt.Errorf("%s is not an address of this machine, so nothing can be published on it: %w", p.HostIP, network.ErrInvalid)
	default:
		err = fmt.Errorf("taking the port %d/%s of %s: %w", p.HostPort, p.Protocol, p.HostIP, err)
	}
	return errors.Join(err, closeErr)
}

// hold takes the ports of an attachment that a former daemon made. Somebody may
// have taken one in between; the guest has it all the same.
func (n *Network) hold(r *record) {
	if len(n.held[r.Ref]) > 0 {
		return
	}
	for _, p := range r.Attachment.Ports {
		if err := n.reserve(r.Ref, p); err != nil {
			n.log.Warn("a published port could not be taken; packets to it go to the guest, not to whoever has it", "event", "port", "ref", r.Ref, "port", p.HostPort, "protocol", p.Protocol, "error", err)
		}
	}
}

// release lets go of the ports of an attachment.
func (n *Network) release(ref string) {
	for _, fd := range n.held[ref] {
		if err := unix.Close(fd); err != nil {
			n.log.Warn("letting go of a published port failed", "event", "port", "ref", ref, "error", err)
		}
	}
	delete(n.held, ref)
}
