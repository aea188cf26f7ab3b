package agent

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/network"
	networkfake "github.com/blixard/blixard/internal/network/fake"
	"github.com/blixard/blixard/internal/vmm"
)

// bridged is a node with a bridge network.
func bridged(t *testing.T, edit func(*Options)) (*node, *networkfake.Machine) {
	t.Helper()
	wires := networkfake.NewMachine(networkfake.Options{})
	n := newNode(t, func(o *Options) {
		o.Network = wires.Open()
		if edit != nil {
			edit(o)
		}
	})
	return n, wires
}

func attachments(t *testing.T, wires *networkfake.Machine) []network.Attachment {
	t.Helper()
	all, err := wires.Open().List(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestBridge: attached before the start, told to the guest and to the cluster,
// found again by the next daemon, and gone in the end.
func TestBridge(t *testing.T) {
	n, wires := bridged(t, nil)
	published := n.cluster.place("web", 1, blixard.VMSpec{Network: "bridge", Publish: []blixard.Port{{Protocol: "tcp", HostPort: 8080, GuestPort: 80}}})
	bare := n.cluster.place("db", 1, blixard.VMSpec{Network: "bridge"})
	user := n.cluster.place("old", 1, blixard.VMSpec{})
	row := n.untilState(published, blixard.Running)
	if row.Address != "127.0.0.1:8080" || len(row.Ports) != 1 || row.Ports[0].GuestPort != 80 {
		t.Errorf("published at %q, %+v", row.Address, row.Ports)
	}
	row = n.untilState(bare, blixard.Running)
	n.untilState(user, blixard.Running)
	all := attachments(t, wires)
	if len(all) != 2 || all[0].Ref != "db-1.1" || row.Address == "" || !strings.HasPrefix(all[0].Address, row.Address+"/") {
		t.Fatalf("attached %+v, reported at %q", all, row.Address)
	}
	if _, err := netip.ParseAddr(row.Address); err != nil {
		t.Error(err)
	}
	for i, ref := range []string{"db-1.1", "web-1.1"} {
		parsed, err := vmm.ParseRef(ref)
		if err != nil {
			t.Fatal(err)
		}
		c := n.guests.of(refOf(parsed)).config
		if c.Address != all[i].Address || c.Gateway != all[i].Gateway || len(c.DNS) != len(all[i].DNS) {
			t.Errorf("the guest was told %+v of %+v", c, all[i])
		}
	}
	if c := n.guests.of(user).config; c.Address != "10.0.2.15/24" {
		t.Errorf("the guest of a user-mode network was told %+v", c)
	}
	n.stop()
	n.options.Network = wires.Open()
	n.start()
	n.until("the guest is talked to again", func() bool { return n.agent.clientOf(bare) != nil })
	if after := n.untilState(bare, blixard.Running); after.Address != row.Address {
		t.Errorf("at %q, then at %q", row.Address, after.Address)
	}
	n.cluster.want(published, func(i *blixard.Instance) { i.Wanted = blixard.WantStop })
	n.untilState(published, blixard.Stopped)
	n.until("what has stopped is detached", func() bool { return len(attachments(t, wires)) == 1 })
	n.cluster.want(published, func(i *blixard.Instance) { i.Wanted = blixard.WantRemove })
	n.cluster.want(bare, func(i *blixard.Instance) { i.Wanted = blixard.WantRemove })
	n.until("their rows are gone", func() bool { rows, _ := n.cluster.Assigned(); return len(rows) == 1 })
	if all := attachments(t, wires); len(all) != 0 {
		t.Errorf("left behind: %+v", all)
	}
}

// TestBridgeTakesOver: one that has crashed keeps its row and its logs, but not
// the port that the next one wants.
func TestBridgeTakesOver(t *testing.T) {
	n, wires := bridged(t, func(o *Options) { o.DefaultNetwork = "bridge" })
	spec := blixard.VMSpec{Publish: []blixard.Port{{Protocol: "tcp", HostPort: 8080, GuestPort: 80}}}
	first := n.cluster.place("web", 1, spec)
	n.untilState(first, blixard.Running)
	n.machine.Kill(vmmRef(first), "QEMU was killed")
	n.untilState(first, blixard.Failed)
	second := n.cluster.place("web", 2, spec)
	if row := n.untilState(second, blixard.Running); row.Address != "127.0.0.1:8080" {
		t.Errorf("at %q", row.Address)
	}
	if all := attachments(t, wires); len(all) != 1 || all[0].Ref != "web-1.2" {
		t.Errorf("attached: %+v", all)
	}
}

// TestBridgeLeftovers: attachments of a start that never came are removed, and
// so is what nobody knows.
func TestBridgeLeftovers(t *testing.T) {
	n, wires := bridged(t, nil)
	running := n.cluster.place("web", 1, blixard.VMSpec{Network: "bridge"})
	n.untilState(running, blixard.Running)
	n.stop()
	for _, ref := range []string{"gone-1.7", "web-1.2"} {
		if _, err := wires.Open().Attach(t.Context(), network.Request{Ref: ref}); err != nil {
			t.Fatal(err)
		}
	}
	n.start()
	n.until("only what runs is attached", func() bool { all := attachments(t, wires); return len(all) == 1 && all[0].Ref == "web-1.1" })
}

// TestBridgeFaults: whatever of the network fails at whatever step, a VM comes
// up or says why not, and leaves nothing behind.
func TestBridgeFaults(t *testing.T) {
	n, wires := bridged(t, nil)
	var count atomic.Int64
	broken := errors.New("the kernel refuses")
	for generation := uint64(1); generation <= 6; generation++ {
		count.Store(0)
		wires.Fail(func(string) error {
			if count.Add(1) == int64(generation) {
				return broken
			}
			return nil
		})
		ref := n.cluster.place("web", generation, blixard.VMSpec{Network: "bridge"})
		n.until(ref.String()+" has started or failed", func() bool {
			row, _ := n.cluster.row(ref)
			return row.State == blixard.Running || row.State == blixard.Failed && strings.Contains(row.Message, broken.Error())
		})
		n.cluster.want(ref, func(i *blixard.Instance) { i.Wanted = blixard.WantRemove })
		n.until(ref.String()+" is gone", func() bool { _, ok := n.cluster.row(ref); return !ok })
		if all := attachments(t, wires); len(all) != 0 {
			t.Errorf("left behind: %+v", all)
		}
	}
}

func TestNoBridge(t *testing.T) {
	for name, test := range map[string]struct {
		edit func(*Options)
		want string
	}{
		"none":      {func(o *Options) { o.Network = nil }, "the node n1 has no bridge network; use --network user"},
		"no rights": {func(o *Options) { o.Network = networkfake.NewMachine(networkfake.Options{Why: "it needs root"}).Open() }, "it needs root"},
		"no guest": {func(o *Options) {
			o.Images = imagesFunc(func(context.Context, string) (Bundle, error) { return Bundle{Kernel: "/vmlinuz", NoGuest: true}, nil })
		}, "no blixard-guest in it"},
	} {
		t.Run(name, func(t *testing.T) {
			n, _ := bridged(t, test.edit)
			row := n.untilState(n.cluster.place("web", 1, blixard.VMSpec{Network: "bridge"}), blixard.Failed)
			if !strings.Contains(row.Message, test.want) {
				t.Errorf("message %q, want %q", row.Message, test.want)
			}
		})
	}
}
