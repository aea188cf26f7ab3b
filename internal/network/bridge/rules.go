package bridge

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/network"
)

const (
	tablePrefix = "blixard_"
	hostTable   = tablePrefix + "host" // see settings.go; no node's id is "host"
	chainPublic = "prerouting"
	chainLocal  = "output"
	dnatStatus  = 1 << 5 // IPS_DST_NAT of the kernel's nf_conntrack_common.h
	rtnLocal    = 2      // RTN_LOCAL of the kernel's rtnetlink.h
)

func (n *Network) tableName() string { return tablePrefix + n.id }

// tables are the names of Blixard's tables, of all nodes in reach.
func tables() ([]string, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("opening nftables: %w", err)
	}
	all, err := c.ListTablesOfFamily(nftables.TableFamilyIPv4)
	if err != nil {
		return nil, fmt.Errorf("listing nftables tables: %w", err)
	}
	var out []string
	for _, t := range all {
		if strings.HasPrefix(t.Name, tablePrefix) {
			out = append(out, t.Name)
		}
	}
	return out, nil
}

// batch commits changes of nftables, all or none.
func batch(what string, change func(c *nftables.Conn)) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("opening nftables: %w", err)
	}
	change(c)
	if err := c.Flush(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// setRules makes the node's table what records want, in one transaction: there
// is no moment with half of the rules. Attachments without a device (the machine
// was restarted) publish nothing.
func (n *Network) setRules(records []*record) error {
	var live []*record
	for _, r := range records {
		if r.Ending {
			continue
		}
		l, err := link(r.Attachment.Tap)
		if err != nil {
			return err
		}
		if l != nil {
			live = append(live, r)
		}
	}
	subnet := records[0].subnet()
	return batch("setting the rules", func(c *nftables.Conn) {
		table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: n.tableName()})
		c.FlushTable(table)
		add := func(chain *nftables.Chain, comment string, parts ...[]expr.Any) {
			c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: slices.Concat(parts...), UserData: userdata.AppendString(nil, userdata.TypeComment, comment)})
		}
		chain := func(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority *nftables.ChainPriority) *nftables.Chain {
			return c.AddChain(&nftables.Chain{Name: name, Table: table, Type: kind, Hooknum: hook, Priority: priority})
		}
		loopback := netip.MustParsePrefix("127.0.0.0/8")
		guard := chain("guard", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw)
		drop := []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}
		add(guard, "no guest speaks to the node's loopback", n.onBridge(expr.MetaKeyIIFNAME, expr.CmpOpEq), within(toAddress, loopback, expr.CmpOpEq), drop)
		add(guard, "nor in its name", n.onBridge(expr.MetaKeyIIFNAME, expr.CmpOpEq), within(fromAddress, loopback, expr.CmpOpEq), drop)

		public := chain(chainPublic, nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest)
		local := chain(chainLocal, nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest)
		for _, r := range live {
			for _, p := range r.Attachment.Ports {
				for _, chain := range []*nftables.Chain{public, local} {
					add(chain, claim{r.Ref, p}.String(), published(p), forward(r.guest(), p))
				}
			}
		}

		masquerade := []expr.Any{&expr.Masq{}}
		out := chain("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
		add(out, "guests go out", within(fromAddress, subnet, expr.CmpOpEq), within(toAddress, subnet, expr.CmpOpNeq), n.onBridge(expr.MetaKeyOIFNAME, expr.CmpOpNeq), masquerade)
		add(out, "the node's loopback to a published port", within(fromAddress, loopback, expr.CmpOpEq), within(toAddress, subnet, expr.CmpOpEq), masquerade)
		// Else the answer would go to the asking guest straight, from an address
		// it has not asked.
		add(out, "guests to a published port", within(fromAddress, subnet, expr.CmpOpEq), within(toAddress, subnet, expr.CmpOpEq), []expr.Any{
			&expr.Ct{Register: 1, Key: expr.CtKeySTATUS},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(dnatStatus), Xor: make([]byte, 4)},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
		}, masquerade)
	})
}

func (n *Network) deleteRules() error { return deleteTable(n.tableName()) }

func deleteTable(name string) error {
	names, err := tables()
	if err != nil || !slices.Contains(names, name) {
		return err
	}
	return batch("deleting the rules", func(c *nftables.Conn) {
		c.DelTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: name})
	})
}

// onBridge matches the device a packet comes by or goes by.
func (n *Network) onBridge(key expr.MetaKey, op expr.CmpOp) []expr.Any {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, n.name)
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: name}}
}

// Offsets in the IPv4 header.
const (
	fromAddress = 12
	toAddress   = 16
)

// within matches an address by its network.
func within(offset uint32, p netip.Prefix, op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: net.CIDRMask(p.Bits(), 32), Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: 1, Data: p.Masked().Addr().AsSlice()},
	}
}

// published matches packets to a published port.
func published(p network.Port) []expr.Any {
	var out []expr.Any
	ip := netip.MustParseAddr(p.HostIP)
	if ip.IsUnspecified() {
		out = append(out, &expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(rtnLocal)})
	} else {
		out = append(out, within(toAddress, netip.PrefixFrom(ip, 32), expr.CmpOpEq)...)
	}
	return append(out,
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{protocolNumber(p.Protocol)}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(uint16(p.HostPort))},
	)
}

func protocolNumber(name string) byte {
	if name == "udp" {
		return unix.IPPROTO_UDP
	}
	return unix.IPPROTO_TCP
}

// forward sends packets to the guest's port.
func forward(guest netip.Addr, p network.Port) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: guest.AsSlice()},
		&expr.Immediate{Register: 2, Data: binary.BigEndian.AppendUint16(nil, uint16(p.GuestPort))},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegProtoMin: 2},
	}
}

// claim is a published port in the kernel's rules, whose comment tells other
// nodes of the machine who has it.
type claim struct {
	ref  string
	port network.Port
}

func (c claim) String() string {
	return fmt.Sprintf("%s %s %s %d", c.ref, c.port.Protocol, c.port.HostIP, c.port.HostPort)
}

func parseClaim(text string) (claim, bool) {
	f := strings.Fields(text)
	if len(f) != 4 {
		return claim{}, false
	}
	port, err := strconv.Atoi(f[3])
	return claim{f[0], network.Port{Protocol: f[1], HostIP: f[2], HostPort: port}}, err == nil
}

// foreignClaims are the ports that other nodes of this machine publish.
func (n *Network) foreignClaims() ([]claim, error) {
	names, err := tables()
	if err != nil {
		return nil, err
	}
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("opening nftables: %w", err)
	}
	var out []claim
	for _, name := range names {
		if name == n.tableName() || name == hostTable {
			continue
		}
		table := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: name}
		rules, err := c.GetRules(table, &nftables.Chain{Name: chainPublic, Table: table})
		if err != nil {
			return nil, fmt.Errorf("reading the rules of another node (%s): %w", name, err)
		}
		for _, r := range rules {
			if text, ok := userdata.GetString(r.UserData, userdata.TypeComment); ok {
				if cl, ok := parseClaim(text); ok {
					out = append(out, cl)
				}
			}
		}
	}
	return out, nil
}
