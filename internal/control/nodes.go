package control

import (
	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// lookAtNodes takes in the nodes whose rows changed or whose time has come, and
// asks the lost ones whether they are back.
func (p *pass) lookAtNodes() {
	p.lost.Scan(func(name blixard.NodeName) bool { p.freshNodes.Insert(name); return true })
	var names []blixard.NodeName
	p.freshNodes.Scan(func(name blixard.NodeName) bool { names = append(names, name); return true })
	for _, name := range names {
		p.freshNodes.Delete(name)
		p.lookAtNode(name)
	}
}

func (p *pass) lookAtNode(name blixard.NodeName) {
	n := p.v.Node(name)
	if p.index.Node(name) != n {
		p.index.SyncNode(p.v, name)
		p.freed = true
	}
	if n == nil {
		delete(p.nodes, name)
		p.lost.Delete(name)
		p.Leases.forget(name, p.now)
		if p.Leases.nodes[name] != nil {
			p.timers.Set(timer{atMS: p.now + p.config.LeaseMS, node: name})
		}
		return
	}
	old, now := p.nodes[name], nodeMark{n.RaftID, n.Epoch, n.State, n.Availability}
	if old != now {
		p.nodes[name] = now
		if n.State == blixard.NodeReady && (old.state != now.state || old.raftID != now.raftID || old.epoch != now.epoch) {
			p.Leases.renew(n, p.now)
		}
		if old.availability != now.availability || old.state != now.state {
			p.v.InstancesOn(name, func(i *blixard.Instance) bool { p.freshVMs.Insert(i.VM); return true })
		}
	}
	switch n.State {
	case blixard.NodeReady:
		p.lost.Delete(name)
		p.watchLease(n)
	case blixard.NodeLost:
		p.lost.Insert(name)
		if p.Leases.back(n, p.now) {
			p.emit(&state.ReviveNode{Name: name, RaftID: n.RaftID})
		}
	case blixard.NodeJoining:
		p.lost.Delete(name)
	}
}

// watchLease declares a node lost whose lease is over, else comes back when
// it is.
func (p *pass) watchLease(n *blixard.Node) {
	at := p.Leases.EndMS(n)
	if p.now >= at {
		at = p.now + 1
		if p.emit(&state.LoseNode{Name: n.Name, RaftID: n.RaftID, Epoch: n.Epoch}) {
			at = p.now + 1000
		}
	}
	p.timers.Set(timer{atMS: at, node: n.Name})
}
