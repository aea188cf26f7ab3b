package bridge

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/google/nftables"
)

// Settings of the kernel that guests need, all of them switches. One that was
// off is noted as an empty chain in the host table, which goes with the network
// namespace as the setting does, before it is switched on.

const noteForward = "ip_forward"

// noteLocalnet is the note of the bridge's route_localnet.
func (n *Network) noteLocalnet() string { return "route_localnet_" + n.name }

// settingPath is the file of a noted setting, "" for a note that is none.
func settingPath(note string) string {
	if note == noteForward {
		return "/proc/sys/net/ipv4/ip_forward"
	}
	if name, ok := strings.CutPrefix(note, "route_localnet_"); ok && bridgeName.MatchString(name) {
		return "/proc/sys/net/ipv4/conf/" + name + "/route_localnet"
	}
	return ""
}

// settings are the notes of what records need.
func (n *Network) settings(records []*record) []string {
	out := []string{noteForward}
	for _, r := range records {
		for _, p := range r.Attachment.Ports {
			if ip := netip.MustParseAddr(p.HostIP); ip.IsLoopback() || ip.IsUnspecified() {
				return append(out, n.noteLocalnet())
			}
		}
	}
	return out
}

func isOn(path string) (bool, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return false, fmt.Errorf("reading a setting of the kernel: %w", err)
	}
	return !bytes.Equal(bytes.TrimSpace(text), []byte("0")), nil
}

func turn(path, value string) error {
	if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
		return fmt.Errorf("changing a setting of the kernel: %w", err)
	}
	return nil
}

func (n *Network) noteSettings(records []*record) error {
	var off []string
	for _, note := range n.settings(records) {
		on, err := isOn(settingPath(note))
		if err != nil {
			return err
		}
		if !on {
			off = append(off, note)
		}
	}
	if len(off) == 0 {
		return nil
	}
	return batch("noting settings of the kernel", func(c *nftables.Conn) {
		table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: hostTable})
		for _, note := range off {
			c.AddChain(&nftables.Chain{Name: note, Table: table})
		}
	})
}

func (n *Network) switchSettings(records []*record) error {
	for _, note := range n.settings(records) {
		path := settingPath(note)
		on, err := isOn(path)
		if err == nil && !on {
			err = turn(path, "1")
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// last tells whether settings were changed and no node of the machine needs
// them any more.
func last() (bool, error) {
	names, err := tables()
	return slices.Equal(names, []string{hostTable}), err
}

func (n *Network) restoreSettings() error {
	if ok, err := last(); !ok || err != nil {
		return err
	}
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("opening nftables: %w", err)
	}
	chains, err := c.ListChains()
	if err != nil {
		return fmt.Errorf("listing nftables chains: %w", err)
	}
	for _, chain := range chains {
		if chain.Table.Name != hostTable {
			continue
		}
		path := settingPath(chain.Name)
		if path == "" || chain.Name == noteForward && othersForward(chains) {
			continue
		}
		if err := turn(path, "0"); err != nil && !errors.Is(err, fs.ErrNotExist) { // the bridge may be gone
			return err
		}
	}
	return nil
}

// othersForward tells whether somebody else has rules for forwarded packets, and
// so presumably relies on the machine's forwarding them.
func othersForward(chains []*nftables.Chain) bool {
	for _, chain := range chains {
		if !strings.HasPrefix(chain.Table.Name, tablePrefix) && chain.Hooknum != nil && *chain.Hooknum == *nftables.ChainHookForward &&
			slices.Contains([]nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyINet}, chain.Table.Family) {
			return true
		}
	}
	names, err := os.ReadFile("/proc/net/ip_tables_names") // the old iptables'
	return err == nil && len(bytes.TrimSpace(names)) > 0
}

func (n *Network) forgetSettings() error {
	if ok, err := last(); !ok || err != nil {
		return err
	}
	return deleteTable(hostTable)
}
