// Package network is the port to what connects guests with a node's network. A
// Network gives an incarnation a device, an address and published ports, and
// takes them away again; it decides nothing and remembers only what is on disk
// and in the kernel. User-mode networking needs none of this: the hypervisor
// brings it.
//
// Ownership: each attachment belongs to one incarnation, named by a text the
// caller chooses (its instance and generation). What a Network makes it marks,
// and it touches nothing that it cannot prove to be its own. The guests'
// traffic does not depend on the daemon: a Network opened later in the same
// place finds its attachments by List.
//
// The contract every adapter keeps, checked by networktest.Suite:
//   - Attach and Detach are idempotent and safe to repeat after a crash in
//     their middle. Whatever a crash left behind is in List and goes by Detach.
//   - Two attachments share no device, MAC address, guest address or published
//     port; what an attachment was told stays true until it is detached.
//   - A failed Attach publishes nothing; what it made goes by Detach, or becomes
//     whole by another Attach.
//   - With the last Detach nothing is left: devices, addresses, rules, settings
//     of the kernel, files.
package network

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
)

var (
	// ErrInvalid: the request can never work; nothing was made.
	ErrInvalid = errors.New("invalid network request")
	// ErrConflict: something else has what is asked for, such as a port, or the
	// incarnation is attached in another way already.
	ErrConflict = errors.New("conflict in the node's network")
	// ErrExhausted: no address or no port is free.
	ErrExhausted = errors.New("the node's network is full")
	// ErrUnavailable: this machine or this process cannot do it; see
	// Capabilities.
	ErrUnavailable = errors.New("the node has no bridge network")
)

// Port is one port of a guest that is published on the node.
type Port struct {
	Protocol  string `json:"protocol"`  // tcp, udp
	HostIP    string `json:"host_ip"`   // an IPv4 address of the node, loopback ones included; 0.0.0.0: all of them
	HostPort  int    `json:"host_port"` // 0: the network chooses
	GuestPort int    `json:"guest_port"`
}

// Request asks for an attachment.
type Request struct {
	// Ref names the incarnation, such as "webapp-1.3": letters a-z, digits, '-'
	// and '.', beginning with a letter or digit, at most 100 characters.
	Ref string `json:"ref"`
	// MAC of the guest's interface; empty: MAC(Ref).
	MAC   string `json:"mac,omitempty"`
	Ports []Port `json:"ports,omitempty"`
}

// Attachment is how an incarnation is connected.
type Attachment struct {
	Ref     string   `json:"ref"`
	Tap     string   `json:"tap"`     // device on the node for the hypervisor
	MAC     string   `json:"mac"`     // of the guest's interface
	Address string   `json:"address"` // of the guest, with its prefix: 10.88.3.17/24; empty when it is not known any more
	Gateway string   `json:"gateway"` // 10.88.3.1
	DNS     []string `json:"dns,omitempty"`
	Ports   []Port   `json:"ports,omitempty"` // in the order asked for, with the host ports in use
}

// Network connects guests. Its methods may be called concurrently.
type Network interface {
	// Capabilities tells whether guests can be attached here and, if not, why in
	// words that say what to do.
	Capabilities(ctx context.Context) (ok bool, why string)
	// Attach connects an incarnation. When it is attached already, by the same
	// request, the answer is the same again and what was lost since is restored.
	Attach(ctx context.Context, request Request) (Attachment, error)
	// Detach takes away everything of an incarnation; there being nothing is
	// fine.
	Detach(ctx context.Context, ref string) error
	// List tells of every attachment, whole or not, in order of Ref.
	List(ctx context.Context) ([]Attachment, error)
}

const (
	maxRef   = 100
	maxPorts = 256
)

var refPattern = regexp.MustCompile(`^[a-z0-9][-a-z0-9.]*$`)

// CheckRef refuses what names no incarnation; the error wraps ErrInvalid.
func CheckRef(ref string) error {
	if len(ref) > maxRef || !refPattern.MatchString(ref) {
		return fmt.Errorf("%q names no incarnation (a-z, 0-9, '-', '.', at most %d): %w", ref, maxRef, ErrInvalid)
	}
	return nil
}

// Check refuses what can never work; errors wrap ErrInvalid. Adapters call it
// before anything else.
func (r *Request) Check() error {
	if err := CheckRef(r.Ref); err != nil {
		return err
	}
	bad := func(format string, args ...any) error {
		return fmt.Errorf("attaching %s: %s: %w", r.Ref, fmt.Sprintf(format, args...), ErrInvalid)
	}
	if r.MAC != "" {
		mac, err := net.ParseMAC(r.MAC)
		if err != nil || len(mac) != 6 || mac[0]&1 != 0 || mac.String() != r.MAC {
			return bad("MAC address %q, want six lower-case hexadecimal bytes of a unicast address", r.MAC)
		}
	}
	if len(r.Ports) > maxPorts {
		return bad("%d published ports, at most %d", len(r.Ports), maxPorts)
	}
	for i, p := range r.Ports {
		if p.Protocol != "tcp" && p.Protocol != "udp" {
			return bad("protocol %q of a published port, want tcp or udp", p.Protocol)
		}
		if p.HostPort < 0 || p.HostPort > 65535 || p.GuestPort < 1 || p.GuestPort > 65535 {
			return bad("published port %d:%d is out of range", p.HostPort, p.GuestPort)
		}
		if ip, err := netip.ParseAddr(p.HostIP); err != nil || !ip.Is4() || ip.String() != p.HostIP {
			return bad("host address %q of a published port, want IPv4", p.HostIP)
		}
		if slices.ContainsFunc(r.Ports[:i], p.Overlaps) {
			return bad("port %d/%s is published twice", p.HostPort, p.Protocol)
		}
	}
	return nil
}

// Overlaps tells whether two published ports want the same of the node. Ports
// still to be chosen want nothing yet.
func (p Port) Overlaps(q Port) bool {
	const all = "0.0.0.0"
	return p.HostPort != 0 && p.HostPort == q.HostPort && p.Protocol == q.Protocol && (p.HostIP == q.HostIP || p.HostIP == all || q.HostIP == all)
}

// MAC derives a guest's MAC address from its Ref: locally administered, and the
// same for ever, since a generation never comes again.
func MAC(ref string) string {
	sum := sha256.Sum256([]byte("blixard guest " + ref))
	return net.HardwareAddr{0x02, 0xb1, sum[0], sum[1], sum[2], sum[3]}.String()
}
