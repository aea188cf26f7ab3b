package agent

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/converge"
	"github.com/blixard/blixard/internal/guest"
	"github.com/blixard/blixard/internal/network"
	"github.com/blixard/blixard/internal/vmm"
)

// An incarnation on the bridge is attached before its hypervisor starts, and
// detached when that has ended, at the latest when it is removed: its attachment
// never outlasts what the driver holds of it, so it proves nothing about starts.
// One that the driver does not list is left from before a start, and is to be
// removed like anything else that was only prepared.

// networkBridge is the mode of the specification that needs attachments.
const networkBridge = "bridge"

// network is how an instance of spec is connected on this node.
func (a *Agent) network(spec *blixard.VMSpec) string {
	return cmp.Or(spec.Network, a.o.DefaultNetwork, "user")
}

// connect chooses the network of an incarnation that is about to start, and
// attaches it.
func (a *Agent) connect(ctx context.Context, j job, spec *vmm.Spec) error {
	var ports []vmm.Port
	for _, p := range j.row.Spec.Publish {
		ports = append(ports, vmm.Port{Protocol: cmp.Or(p.Protocol, "tcp"), HostIP: a.o.PublishAddress, HostPort: p.HostPort, GuestPort: p.GuestPort})
	}
	if err := a.releaseEnded(ctx); err != nil {
		return err
	}
	mode := a.network(j.row.Spec)
	if mode != networkBridge {
		spec.Network = vmm.Network{Mode: mode, Ports: ports}
		return portsFree(ctx, ports, a.o.Node)
	}
	if err := a.canBridge(ctx, j.bundle); err != nil {
		return err
	}
	request := network.Request{Ref: spec.Ref.String()}
	for _, p := range ports {
		request.Ports = append(request.Ports, network.Port(p))
	}
	attachment, err := a.o.Network.Attach(ctx, request)
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.attached[j.action.Ref] = attachment
	a.mu.Unlock()
	spec.Network = vmm.Network{Mode: "tap", MAC: attachment.MAC, Tap: attachment.Tap}
	spec.Labels = append(spec.Labels, labelBridge)
	return nil
}

// canBridge refuses what would start and never have an address.
func (a *Agent) canBridge(ctx context.Context, b *Bundle) error {
	const instead = "use --network user"
	if a.o.Network == nil {
		return fmt.Errorf("the node %s has no bridge network; %s", a.o.Node, instead)
	}
	if ok, why := a.o.Network.Capabilities(ctx); !ok {
		return fmt.Errorf("the node %s has no bridge network: %s", a.o.Node, why)
	}
	a.mu.Lock()
	c := a.capabilities
	a.mu.Unlock()
	if c.Driver != "" && !c.TapNetworking {
		return fmt.Errorf("the hypervisor %s of the node %s cannot use the bridge network; %s", c.Driver, a.o.Node, instead)
	}
	if b.NoGuest {
		return fmt.Errorf("the image has no blixard-guest in it, which sets the address on a bridge network; %s", instead)
	}
	return nil
}

// releaseEnded gives back what incarnations hold that have ended and are kept
// for their logs: the one that starts may want the same ports.
func (a *Agent) releaseEnded(ctx context.Context) error {
	if a.o.Network == nil {
		return nil
	}
	found, err := a.list(ctx)
	if err != nil {
		return err
	}
	for _, s := range found.statuses {
		if _, attached := found.attached[refOf(s.Ref)]; attached && s.Phase == vmm.Exited {
			if err := a.detach(ctx, refOf(s.Ref)); err != nil {
				return err
			}
		}
	}
	return nil
}

// detach takes an incarnation from the network, whether it is attached or not.
func (a *Agent) detach(ctx context.Context, ref converge.Ref) error {
	if a.o.Network == nil {
		return nil
	}
	if err := a.o.Network.Detach(ctx, vmmRef(ref).String()); err != nil {
		return err
	}
	a.mu.Lock()
	delete(a.attached, ref)
	a.mu.Unlock()
	return nil
}

// release detaches what was just ended. It is done again when it is removed, or
// when another one starts: its failure is no failure to end it.
func (a *Agent) release(ctx context.Context, ref converge.Ref) {
	if err := a.detach(ctx, ref); err != nil {
		a.event(slog.LevelWarn, ref, "network", "taking it from the network failed and is tried again", "error", err)
	}
}

// listing is what the driver and the network hold at one time.
type listing struct {
	statuses []vmm.Status // in order of Ref
	attached map[converge.Ref]network.Attachment
}

// withAttachments adds what the network holds to what the driver found. A
// network that cannot be listed makes nobody blind: what is remembered stands.
func (a *Agent) withAttachments(ctx context.Context, found []vmm.Status) listing {
	out := listing{statuses: found, attached: map[converge.Ref]network.Attachment{}}
	if a.o.Network == nil {
		return out
	}
	all, err := a.o.Network.List(ctx)
	if err != nil {
		a.log.Warn("listing what is on the network failed and is tried again", "event", "network", "error", err)
		a.mu.Lock()
		defer a.mu.Unlock()
		//order:any a copy
		maps.Copy(out.attached, a.attached)
		return out
	}
	known := map[vmm.Ref]bool{}
	for _, s := range found {
		known[s.Ref] = true
	}
	for _, attachment := range all {
		ref, err := vmm.ParseRef(attachment.Ref)
		if err != nil {
			continue // attached by somebody else in the same place
		}
		out.attached[refOf(ref)] = attachment
		if !known[ref] {
			out.statuses = append(out.statuses, vmm.Status{Ref: ref, Phase: vmm.Prepared})
		}
	}
	slices.SortFunc(out.statuses, func(x, y vmm.Status) int { return x.Ref.Compare(y.Ref) })
	return out
}

// attachment is how ref is attached as far as is known. Callers hold mu.
func (a *Agent) attachment(ref converge.Ref) (network.Attachment, bool) {
	attachment, ok := a.attached[ref]
	return attachment, ok && attachment.Address != ""
}

// publish adds to a finding where an attached guest can be reached. Callers hold
// mu.
func (a *Agent) publish(f *converge.Found) {
	attachment, ok := a.attachment(f.Ref)
	if !ok || f.Phase != converge.Running && f.Phase != converge.Paused {
		return
	}
	f.Address, _, _ = strings.Cut(attachment.Address, "/")
	for _, p := range attachment.Ports {
		f.Ports = append(f.Ports, blixard.PublishedPort{Protocol: p.Protocol, Address: net.JoinHostPort(p.HostIP, strconv.Itoa(p.HostPort)), GuestPort: p.GuestPort})
	}
}

// address sets what a guest has to know of its network.
func (a *Agent) address(config *guest.Config, ref converge.Ref) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if attachment, ok := a.attachment(ref); ok {
		config.Address, config.Gateway, config.DNS = attachment.Address, attachment.Gateway, attachment.DNS
		return nil
	}
	for i := range a.found {
		if refOf(a.found[i].Ref) == ref && hasLabel(a.found[i].Labels, labelBridge) {
			return fmt.Errorf("how it is attached to the network of the node %s is not known", a.o.Node)
		}
	}
	// The addresses of QEMU's user-mode network.
	config.Address, config.Gateway, config.DNS = "10.0.2.15/24", "10.0.2.2", []string{"10.0.2.3"}
	return nil
}
