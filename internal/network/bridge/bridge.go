// Package bridge connects guests by tap devices on a Linux bridge: each has an
// address of its own that the node reaches, goes out through the node's own
// addresses, and is published on the node's ports by nftables. It needs root or
// CAP_NET_ADMIN, and none of the command line tools.
//
// Ownership: everything bears the name of the node, which is derived from the
// path of its directory. Taps are known by their alias, the node's address on
// the bridge by its label, the rules by their table (blixard_<node>). A bridge
// made here is known by its alias; nodes of one machine share it, and the last
// one that leaves removes it. A bridge made by somebody else is used and stays.
// Settings of the kernel (forwarding) that were changed are noted in the table
// blixard_host, which lives as long as they do, and are put back by the last
// node, unless somebody else forwards by then.
//
// Ordering: a record of the attachment is on disk before the kernel hears of
// it, and goes after everything else is gone. One process works at a time, under
// a lock of the machine, as nodes share the bridge and the ports.
//
// Published ports work for packets from outside and from the node itself, for
// loopback addresses too: those need route_localnet on the bridge, and packets
// from guests to or from 127.0.0.0/8 are dropped before anything else sees them.
// While the daemon runs it holds every published port bound, without listening,
// so that no other program takes it and is shadowed.
//
// Limits: IPv4 only. A firewall of somebody else that drops what is forwarded
// (policy drop in a forward chain) also drops the guests' traffic: rules of one
// table cannot overrule another's.
package bridge

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/network"
)

// Options of a Network. Dir is required.
type Options struct {
	// Dir is the node's own directory for its attachments, made if need be; its
	// path is what tells nodes of one machine apart.
	Dir string
	// Bridge is the name of the bridge, at most ten characters; blixard0 by
	// default. While anything is attached the one it is attached to counts.
	Bridge string
	// Pool is what the node's subnet is taken from: 10.88.0.0/16 by default.
	Pool netip.Prefix
	// SubnetBits is the size of a node's subnet; 24 by default, or the pool's
	// own when that is smaller.
	SubnetBits int
	// Seed decides which subnet of the pool is tried first, so that nodes with
	// different seeds mostly have different ones.
	Seed string
	// DNS servers for the guests; those of the machine by default.
	DNS []string
	// FirstPort and LastPort bound the ports it chooses; 20000 to 29999 by
	// default. They should lie outside of ip_local_port_range.
	FirstPort, LastPort int
	// LockFile is the machine's; /run/blixard/network.lock by default.
	LockFile string
	Log      *slog.Logger
	// Fault, in tests, is asked before every step by its name and may fail it.
	Fault func(step string) error
}

// Network implements network.Network.
type Network struct {
	o   Options
	id  string // of the node, twelve hexadecimal digits
	log *slog.Logger

	mu    sync.Mutex
	name  string           // of the bridge in use
	label string           // of the node's address on it
	held  map[string][]int // sockets that hold ports, by ref
}

var _ network.Network = (*Network)(nil)

// Ten leave room for a label of the bridge's address: name, colon, four digits.
var bridgeName = regexp.MustCompile(`^[a-zA-Z0-9][-a-zA-Z0-9_]{0,9}$`)

// New opens the network of a node. It changes nothing of the machine.
func New(o Options) (*Network, error) {
	if o.Bridge == "" {
		o.Bridge = "blixard0"
	}
	if !bridgeName.MatchString(o.Bridge) {
		return nil, fmt.Errorf("the bridge name %q: want at most 10 letters, digits, '-' and '_': %w", o.Bridge, network.ErrInvalid)
	}
	if !o.Pool.IsValid() {
		o.Pool = netip.MustParsePrefix("10.88.0.0/16")
	}
	if o.SubnetBits == 0 {
		o.SubnetBits = max(24, o.Pool.Bits())
	}
	if !o.Pool.Addr().Is4() || o.Pool.Bits() < 8 || o.SubnetBits < o.Pool.Bits() || o.SubnetBits > 30 {
		return nil, fmt.Errorf("guest subnets of /%d in %s: want an IPv4 network of at least /8, and subnets within it of at most /30: %w", o.SubnetBits, o.Pool, network.ErrInvalid)
	}
	o.Pool = o.Pool.Masked()
	if o.FirstPort == 0 {
		o.FirstPort, o.LastPort = 20000, 29999
	}
	if o.FirstPort < 1 || o.LastPort > 65535 || o.LastPort < o.FirstPort {
		return nil, fmt.Errorf("ports %d to %d to publish on: %w", o.FirstPort, o.LastPort, network.ErrInvalid)
	}
	if o.LockFile == "" {
		o.LockFile = "/run/blixard/network.lock"
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("creating the network's directory: %w", err)
	}
	dir, err := filepath.Abs(o.Dir)
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if err != nil {
		return nil, fmt.Errorf("finding the network's directory: %w", err)
	}
	o.Dir = dir
	sum := sha256.Sum256([]byte(dir))
	n := &Network{o: o, id: hex.EncodeToString(sum[:6]), log: o.Log.With("component", "network"), held: map[string][]int{}}
	records, err := n.records()
	if err != nil {
		return nil, err
	}
	for _, r := range records {
		if !r.Ending {
			n.hold(r)
		}
	}
	return n, nil
}

// Close lets go of the held ports; the guests' traffic goes on.
func (n *Network) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	for ref := range n.held { //order:any each stands alone
		n.release(ref)
	}
	return nil
}

// Capabilities implements network.Network.
func (n *Network) Capabilities(context.Context) (bool, string) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil || data[0].Effective&(1<<unix.CAP_NET_ADMIN) == 0 {
		return false, "bridge networking needs root, or the capability CAP_NET_ADMIN; user-mode networking (--network user) needs neither"
	}
	f, err := os.OpenFile(tunDevice, os.O_RDWR, 0)
	if err != nil {
		return false, fmt.Sprintf("bridge networking needs the kernel's tap devices (modprobe tun): %v", err)
	}
	if err := f.Close(); err != nil {
		return false, fmt.Sprintf("closing %s: %v", tunDevice, err)
	}
	if _, err := tables(); err != nil {
		return false, fmt.Sprintf("bridge networking needs the kernel's nftables (modprobe nf_tables): %v", err)
	}
	return true, ""
}

// step is asked before everything that changes anything.
func (n *Network) step(name string) error {
	if n.o.Fault == nil {
		return nil
	}
	if err := n.o.Fault(name); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// do is one step of several.
type do struct {
	name string
	run  func() error
}

func (n *Network) steps(list ...do) error {
	for _, s := range list {
		if err := n.step(s.name); err != nil {
			return err
		}
		if err := s.run(); err != nil {
			return err
		}
	}
	return nil
}

// Attach implements network.Network.
func (n *Network) Attach(ctx context.Context, request network.Request) (network.Attachment, error) {
	if err := request.Check(); err != nil {
		return network.Attachment{}, err
	}
	if request.MAC == "" {
		request.MAC = network.MAC(request.Ref)
	}
	if err := ctx.Err(); err != nil {
		return network.Attachment{}, fmt.Errorf("attaching %s: %w", request.Ref, err)
	}
	if ok, why := n.Capabilities(ctx); !ok {
		return network.Attachment{}, fmt.Errorf("attaching %s: %w: %s", request.Ref, network.ErrUnavailable, why)
	}
	var out network.Attachment
	err := n.locked(ctx, func() error {
		records, err := n.records()
		if err != nil {
			return err
		}
		r := find(records, request.Ref)
		if r != nil && r.Ending {
			if err := n.end(r, records); err != nil {
				return fmt.Errorf("ending what it was before: %w", err)
			}
			records = slices.DeleteFunc(records, func(o *record) bool { return o == r })
			r = nil
		}
		switch {
		case r == nil:
			if r, err = n.plan(request, records); err != nil {
				return err
			}
			if err := n.steps(do{"writing its record", func() error { return n.write(r) }}); err != nil {
				n.release(r.Ref)
				return err
			}
			records = append(records, r)
		case !r.answers(request):
			return fmt.Errorf("it is attached in another way already: %w", network.ErrConflict)
		default:
			n.hold(r)
		}
		out = r.Attachment
		return n.ensure(r, records)
	})
	if err != nil {
		return network.Attachment{}, fmt.Errorf("attaching %s: %w", request.Ref, err)
	}
	return out, nil
}

// ensure makes an attachment whole. Callers hold the lock.
func (n *Network) ensure(r *record, records []*record) error {
	return n.steps(
		do{"making the bridge", n.makeBridge},
		do{"naming the bridge", n.nameBridge},
		do{"addressing the bridge", func() error { return n.addressBridge(r.subnet()) }},
		do{"making the tap device", func() error { return n.makeTap(r) }},
		do{"naming the tap device", func() error { return n.nameTap(r) }},
		do{"connecting the tap device", func() error { return n.connectTap(r) }},
		do{"setting the rules", func() error { return n.setRules(records) }},
		do{"noting the forwarding", func() error { return n.noteSettings(records) }},
		do{"switching the forwarding on", func() error { return n.switchSettings(records) }},
	)
}

// Detach implements network.Network.
func (n *Network) Detach(ctx context.Context, ref string) error {
	if err := network.CheckRef(ref); err != nil {
		return err
	}
	// Most are not attached, and need neither rights nor the machine's lock.
	all, err := n.List(ctx)
	if err == nil && !slices.ContainsFunc(all, func(a network.Attachment) bool { return a.Ref == ref }) {
		return nil
	}
	if err == nil {
		err = n.locked(ctx, func() error { return n.endRef(ref) })
	}
	if err != nil {
		return fmt.Errorf("detaching %s: %w", ref, err)
	}
	return nil
}

// endRef takes an attachment away, if there is one. Callers hold the lock.
func (n *Network) endRef(ref string) error {
	records, err := n.records()
	if err != nil {
		return err
	}
	if r := find(records, ref); r != nil {
		return n.end(r, records)
	}
	taps, err := n.taps()
	if err != nil {
		return err
	}
	for _, a := range without(taps, records) {
		if a.Ref == ref {
			return n.end(&record{Ref: ref, Attachment: a, lost: true}, records)
		}
	}
	return nil
}

// end takes an attachment away; with the last one everything else. Callers hold
// the lock.
func (n *Network) end(r *record, records []*record) error {
	rest := slices.DeleteFunc(slices.Clone(records), func(o *record) bool { return o == r })
	n.release(r.Ref)
	if !r.lost {
		r.Ending = true
		if err := n.steps(do{"marking its record", func() error { return n.write(r) }}); err != nil {
			return err
		}
	}
	list := []do{{"deleting the tap device", func() error { return n.deleteTap(r) }}}
	if len(rest) > 0 {
		list = append([]do{{"setting the rules", func() error { return n.setRules(rest) }}}, list...)
	} else {
		list = append([]do{{"deleting the rules", n.deleteRules}}, list...)
		list = append(list,
			do{"taking the address from the bridge", n.unaddressBridge},
			do{"switching the forwarding back", n.restoreSettings},
			do{"forgetting the forwarding", n.forgetSettings},
			do{"deleting the bridge", n.deleteBridge},
		)
	}
	list = append(list, do{"forgetting connections", func() error { return forgetConnections(r) }})
	if !r.lost {
		list = append(list, do{"deleting its record", func() error { return n.erase(r.Ref) }})
	}
	return n.steps(list...)
}

// List implements network.Network. It needs no rights.
func (n *Network) List(ctx context.Context) ([]network.Attachment, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("listing attachments: %w", err)
	}
	// Without any lock: whoever lists does not wait for others' work. A device
	// is looked for first, as its record is there before it and after it.
	taps, err := n.taps()
	if err != nil {
		return nil, fmt.Errorf("listing attachments: %w", err)
	}
	records, err := n.load()
	if err != nil {
		return nil, err
	}
	out := without(taps, records)
	for _, r := range records {
		out = append(out, r.Attachment)
	}
	slices.SortFunc(out, func(a, b network.Attachment) int {
		if a.Ref < b.Ref {
			return -1
		}
		return 1
	})
	return out, nil
}

// locked runs f under the lock of the process and that of the machine.
func (n *Network) locked(ctx context.Context, f func() error) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(n.o.LockFile), 0o755); err != nil {
		return fmt.Errorf("creating the directory of the machine's network lock: %w", err)
	}
	lock, err := os.OpenFile(n.o.LockFile, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("opening the machine's network lock: %w", err)
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return errors.Join(fmt.Errorf("taking the machine's network lock: %w", err), lock.Close())
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("waiting for the machine's network lock: %w", context.Cause(ctx)), lock.Close())
		case <-tick.C:
		}
	}
	return errors.Join(f(), lock.Close()) // which gives the lock back
}
