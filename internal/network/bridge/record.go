package bridge

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/blixard/blixard/internal/assert"
	"github.com/blixard/blixard/internal/network"
)

// record is what is on disk of an attachment.
type record struct {
	Format     int                `json:"format"`
	Ref        string             `json:"ref"`
	Bridge     string             `json:"bridge"`
	Request    network.Request    `json:"request"`
	Attachment network.Attachment `json:"attachment"`
	// Ending: it is being taken away, and publishes nothing any more.
	Ending bool `json:"ending,omitempty"`

	lost bool // there is none on disk: only its device is left
}

const (
	recordFormat = 1
	recordSuffix = ".json"
)

// answers tells whether the record is what request asks for.
func (r *record) answers(request network.Request) bool {
	return r.Request.MAC == request.MAC && slices.Equal(r.Request.Ports, request.Ports)
}

// prefix is the guest's address with its subnet.
func (r *record) prefix() netip.Prefix { return netip.MustParsePrefix(r.Attachment.Address) }

func (r *record) subnet() netip.Prefix { return r.prefix().Masked() }

// guest is the guest's address.
func (r *record) guest() netip.Addr { return r.prefix().Addr() }

func find(records []*record, ref string) *record {
	for _, r := range records {
		if r.Ref == ref {
			return r
		}
	}
	return nil
}

func (n *Network) path(ref string) string { return filepath.Join(n.o.Dir, ref+recordSuffix) }

// records reads all of them, in order of ref, sweeps out what a crash left of one
// being written, and settles which bridge is in use. Callers hold mu.
func (n *Network) records() ([]*record, error) {
	entries, err := os.ReadDir(n.o.Dir)
	if err != nil {
		return nil, fmt.Errorf("reading attachments: %w", err)
	}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), recordSuffix+".tmp") {
			continue
		}
		if err := os.Remove(filepath.Join(n.o.Dir, e.Name())); err != nil {
			return nil, fmt.Errorf("removing an unfinished record: %w", err)
		}
	}
	out, err := n.load()
	if err != nil {
		return nil, err
	}
	n.name = n.o.Bridge
	if len(out) > 0 {
		n.name = out[0].Bridge
	}
	n.label = n.name + ":" + n.id[:min(12, 15-len(n.name)-1)]
	return out, nil
}

// load reads all records, in order of ref. It may run beside one that writes.
func (n *Network) load() ([]*record, error) {
	entries, err := os.ReadDir(n.o.Dir)
	if err != nil {
		return nil, fmt.Errorf("reading attachments: %w", err)
	}
	var out []*record
	for _, e := range entries {
		ref, ok := strings.CutSuffix(e.Name(), recordSuffix)
		if !ok {
			continue
		}
		r, err := n.read(ref)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	// By ref, which is not the order of the file names: '.' sorts after '-'.
	slices.SortFunc(out, func(a, b *record) int { return strings.Compare(a.Ref, b.Ref) })
	return out, nil
}

func (n *Network) read(ref string) (*record, error) {
	text, err := os.ReadFile(n.path(ref))
	if err != nil {
		return nil, fmt.Errorf("reading the attachment %s: %w", ref, err)
	}
	var r record
	if err := json.Unmarshal(text, &r); err != nil {
		return nil, fmt.Errorf("reading the attachment %s: %w (delete the file if the instance is gone)", n.path(ref), err)
	}
	p, err := netip.ParsePrefix(r.Attachment.Address)
	if r.Format != recordFormat || r.Ref != ref || r.Attachment.Ref != ref || err != nil || !p.Addr().Is4() || !bridgeName.MatchString(r.Bridge) {
		return nil, fmt.Errorf("reading the attachment %s: it is not one of this release (delete the file if the instance is gone)", n.path(ref))
	}
	return &r, nil
}

// write puts a record on disk, durably.
func (n *Network) write(r *record) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding its record: %w", err)
	}
	path := n.path(r.Ref)
	f, err := os.OpenFile(path+".tmp", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("writing its record: %w", err)
	}
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(path+".tmp", path)
	}
	if err == nil {
		err = n.syncDir()
	}
	if err != nil {
		return fmt.Errorf("writing its record: %w", err)
	}
	return nil
}

func (n *Network) erase(ref string) error {
	if err := os.Remove(n.path(ref)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("deleting its record: %w", err)
	}
	return n.syncDir()
}

func (n *Network) syncDir() error {
	d, err := os.Open(n.o.Dir)
	if err != nil {
		return fmt.Errorf("opening the network's directory: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("writing the network's directory: %w", err)
	}
	return nil
}

// plan chooses everything of a new attachment and holds its ports; nothing is
// made yet. Callers hold the lock.
func (n *Network) plan(request network.Request, records []*record) (*record, error) {
	r := &record{Format: recordFormat, Ref: request.Ref, Bridge: n.name, Request: request}
	if _, err := n.bridge(); err != nil {
		return nil, err
	}
	subnet, err := n.chooseSubnet(records)
	if err != nil {
		return nil, err
	}
	used := map[netip.Addr]bool{}
	for _, o := range records {
		used[o.guest()] = true
		if o.Attachment.MAC == request.MAC {
			return nil, fmt.Errorf("%s has the MAC address %s: %w", o.Ref, request.MAC, network.ErrConflict)
		}
	}
	guest, err := chooseAddress(subnet, request.Ref, used)
	if err != nil {
		return nil, err
	}
	dns := slices.Clone(n.o.DNS)
	if len(dns) == 0 {
		dns = resolvers()
	}
	r.Attachment = network.Attachment{
		Ref: request.Ref, Tap: n.tapName(request.Ref), MAC: request.MAC, Address: netip.PrefixFrom(guest, subnet.Bits()).String(),
		Gateway: gateway(subnet).String(), DNS: dns,
	}
	if err := n.choosePorts(r, records); err != nil {
		n.release(r.Ref)
		return nil, err
	}
	return r, nil
}

// tapName is the device of an incarnation: 15 characters at most.
func (n *Network) tapName(ref string) string {
	sum := sha256.Sum256([]byte(n.id + " " + ref))
	name := "blx" + hex.EncodeToString(sum[:6])
	assert.True(len(name) == 15, "the device name %s", name)
	return name
}

// resolvers are the machine's own DNS servers, as far as guests can reach them.
func resolvers() []string {
	// Where systemd-resolved answers on a loopback address, it keeps the real
	// ones in a file of its own.
	for _, path := range []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"} {
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		var out []string
		for line := range strings.Lines(string(text)) {
			fields := strings.Fields(line)
			if len(fields) < 2 || fields[0] != "nameserver" {
				continue
			}
			if ip := net.ParseIP(fields[1]).To4(); ip != nil && !ip.IsLoopback() && len(out) < 3 {
				out = append(out, ip.String())
			}
		}
		if len(out) > 0 {
			return out
		}
	}
	return nil
}
