package vmm

import (
	"fmt"
	"net/netip"
)

// CheckSubnet refuses a Subnet that no guest can have; the error wraps
// ErrInvalid.
func (n Network) CheckSubnet() error {
	if n.Subnet == "" {
		return nil
	}
	if n.Mode != "user" {
		return fmt.Errorf("a subnet needs network mode user, not %q: %w", n.Mode, ErrInvalid)
	}
	// The guest's address is the 15th.
	if p, err := netip.ParsePrefix(n.Subnet); err != nil || !p.Addr().Is4() || p != p.Masked() || p.Bits() < 8 || p.Bits() > 27 {
		return fmt.Errorf("subnet %q, want an IPv4 network such as 10.0.2.0/24, from /8 to /27: %w", n.Subnet, ErrInvalid)
	}
	return nil
}
