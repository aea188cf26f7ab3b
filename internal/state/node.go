package state

import (
	"reflect"
	"slices"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/wire"
)

// NodeIdentity is what a node says of itself when it joins.
type NodeIdentity struct {
	Name           blixard.NodeName
	Address        string
	PublishAddress string
	Zone           string
	Labels         []blixard.Label
	Roles          []string
	Witness        bool
	Simulated      bool
}

func (n *NodeIdentity) check() *blixard.Error {
	if err := blixard.CheckName(string(n.Name)); err != nil {
		return asError(err)
	}
	if n.Address == "" || len(n.Address) > 255 {
		return blixard.Errorf(blixard.CodeInvalid, "the node %s has no usable address", n.Name)
	}
	return checkLabels(n.Labels)
}

func checkLabels(labels []blixard.Label) *blixard.Error {
	if len(labels) > 256 {
		return blixard.Errorf(blixard.CodeInvalid, "%d labels; at most 256 are allowed", len(labels))
	}
	for _, l := range labels {
		if err := blixard.CheckLabelKey(l.Key); err != nil {
			return asError(err)
		}
		if err := blixard.CheckLabelValue(l.Value); err != nil {
			return asError(err)
		}
	}
	return nil
}

func (n *NodeIdentity) node() *blixard.Node {
	roles := n.Roles
	if len(roles) == 0 {
		roles = []string{"hypervisor"}
	}
	return &blixard.Node{
		Name: n.Name, Address: n.Address, PublishAddress: n.PublishAddress, Zone: n.Zone, Labels: n.Labels, Roles: roles, Witness: n.Witness, Simulated: n.Simulated,
		Availability: blixard.Active, State: blixard.NodeJoining, Raft: blixard.RoleNone, ConfigLabels: labelKeys(n.Labels),
	}
}

func codeIdentity(c *wire.Coder, n *NodeIdentity) {
	wire.String(c, &n.Name)
	wire.String(c, &n.Address)
	wire.String(c, &n.PublishAddress)
	wire.String(c, &n.Zone)
	wire.List(c, &n.Labels, codeLabel)
	wire.Strings(c, &n.Roles)
	wire.Bool(c, &n.Witness)
	wire.Bool(c, &n.Simulated)
}

// Bootstrap is the first command of a cluster: it names the cluster and its
// first node.
type Bootstrap struct {
	ClusterID string
	Name      string
	Secret    string
	RaftID    uint64
	Node      NodeIdentity
	// FeatureLevel is what the founding release knows; 0 stands for 1.
	FeatureLevel int
}

func (m *Bootstrap) kind() uint8 { return 20 }

func (m *Bootstrap) code(c *wire.Coder) {
	wire.String(c, &m.ClusterID)
	wire.String(c, &m.Name)
	wire.String(c, &m.Secret)
	wire.Uint(c, &m.RaftID)
	codeIdentity(c, &m.Node)
	wire.Int(c, &m.FeatureLevel)
}

func (m *Bootstrap) apply(tx *txn) (Outcome, *blixard.Error) {
	if tx.t.cluster.ID != "" {
		return Outcome{Noop: true}, nil
	}
	if err := m.Node.check(); err != nil {
		return Outcome{}, err
	}
	c := &tx.t.cluster
	c.ID, c.Name, c.Secret, c.NextRaftID, c.FeatureLevel, c.CreatedMS = m.ClusterID, m.Name, m.Secret, m.RaftID+1, max(m.FeatureLevel, 1), tx.nowMS
	n := m.Node.node()
	n.RaftID, n.JoinedMS, n.Raft = m.RaftID, tx.nowMS, blixard.RoleVoter
	tx.setNode(n)
	tx.event(Event{Kind: "ClusterCreated", Node: n.Name, Message: "cluster " + m.Name + " created on " + string(n.Name)})
	return Outcome{Version: tx.index, Value: m.RaftID}, nil
}

// JoinNode makes a node a member and gives it a raft ID of its own
// (Outcome.Value). Token is a join token's secret part hashed; an empty one is
// for operators who are trusted already (add-node). A node that joins again under its name
// replaces the former one, which must be lost unless Replace.
type JoinNode struct {
	Node      NodeIdentity
	TokenID   string
	TokenHash string
	Replace   bool
}

func (m *JoinNode) kind() uint8 { return 21 }

func (m *JoinNode) code(c *wire.Coder) {
	codeIdentity(c, &m.Node)
	wire.String(c, &m.TokenID)
	wire.String(c, &m.TokenHash)
	wire.Bool(c, &m.Replace)
}

func (m *JoinNode) apply(tx *txn) (Outcome, *blixard.Error) {
	if err := m.Node.check(); err != nil {
		return Outcome{}, err
	}
	if tx.t.cluster.ID == "" { // the founder's raft ID is not taken yet
		return Outcome{}, blixard.Errorf(blixard.CodeUnavailable, "the cluster is not founded yet")
	}
	if err := tx.checkToken(m.TokenID, m.TokenHash, m.Node.Name); err != nil {
		return Outcome{}, err
	}
	var clash *blixard.Node
	tx.t.nodes.Scan(func(_ blixard.NodeName, n *blixard.Node) bool {
		if n.Address == m.Node.Address && n.Name != m.Node.Name {
			clash = n
		}
		return clash == nil
	})
	if clash != nil {
		return Outcome{}, &blixard.Error{
			Code: blixard.CodeExists, Message: "the address " + m.Node.Address + " belongs to the node " + string(clash.Name),
			Hint: "remove that node first with `blixard cluster remove-node " + string(clash.Name) + "`",
		}
	}
	if old := tx.t.node(m.Node.Name); old != nil {
		// A token for anybody must not be enough to push out a node that works.
		if old.State == blixard.NodeReady && (!m.Replace || m.TokenID != "" && !tx.tokenIsFor(m.TokenID, m.Node.Name)) {
			return Outcome{}, &blixard.Error{
				Code: blixard.CodeExists, Message: "a node named " + string(m.Node.Name) + " is a member and in touch",
				Hint: "choose another --node-id, remove it first with `blixard cluster remove-node " + string(m.Node.Name) + "`, or, if its disk is lost, replace it: `blixard cluster join --replace` with a token of `blixard cluster token create --node-id " + string(m.Node.Name) + "`",
			}
		}
		tx.loseInstances(old, true)
	}
	tx.useToken(m.TokenID)
	n := m.Node.node()
	n.RaftID, n.JoinedMS = tx.t.cluster.NextRaftID, tx.nowMS
	if m.TokenID == "" {
		n.ConfigLabels = nil // an operator wrote them, not the node
	}
	if old := tx.t.node(n.Name); old != nil {
		n.Epoch = old.Epoch + 1
	}
	n.Epoch = max(n.Epoch, tx.t.slotsEpoch(n.Name))
	tx.t.cluster.NextRaftID++
	tx.setNode(n)
	tx.event(Event{Kind: "NodeJoined", Node: n.Name, Message: "joined at " + n.Address})
	return Outcome{Version: tx.index, Value: n.RaftID}, nil
}

// ReportNode is what a node's agent says of its machine. It makes a joining
// node ready.
type ReportNode struct {
	Name           blixard.NodeName
	RaftID         uint64
	Address        string
	PublishAddress string
	Zone           string
	Labels         []blixard.Label
	Capacity       blixard.Resources
	Reserved       blixard.Resources
	MaxInstances   int
	Hypervisors    []string
	Acceleration   string
	Release        string
	FeatureLevel   int
}

func (m *ReportNode) kind() uint8 { return 22 }

func (m *ReportNode) code(c *wire.Coder) {
	wire.String(c, &m.Name)
	wire.Uint(c, &m.RaftID)
	wire.String(c, &m.Address)
	wire.String(c, &m.PublishAddress)
	wire.String(c, &m.Zone)
	wire.List(c, &m.Labels, codeLabel)
	codeResources(c, &m.Capacity)
	codeResources(c, &m.Reserved)
	wire.Int(c, &m.MaxInstances)
	wire.Strings(c, &m.Hypervisors)
	wire.String(c, &m.Acceleration)
	wire.String(c, &m.Release)
	wire.Int(c, &m.FeatureLevel)
}

func (m *ReportNode) apply(tx *txn) (Outcome, *blixard.Error) {
	old, err := tx.member(m.Name, m.RaftID)
	if err != nil {
		return Outcome{}, err
	}
	if err := checkLabels(m.Labels); err != nil {
		return Outcome{}, err
	}
	if level := tx.t.cluster.FeatureLevel; max(m.FeatureLevel, 1) < level {
		return Outcome{}, &blixard.Error{
			Code: blixard.CodeRefused, Message: "the node " + string(m.Name) + " knows feature level " + itoa(m.FeatureLevel) + ", and the cluster works at " + itoa(level),
			Hint: "install the release there that the other nodes have",
		}
	}
	if c := m.Capacity; c.MilliCPU < 0 || c.MemoryMiB < 0 || c.DiskMiB < 0 {
		return Outcome{}, blixard.Errorf(blixard.CodeInvalid, "the node %s reports a negative capacity", m.Name)
	}
	n := *old
	n.Address, n.PublishAddress, n.Zone = m.Address, m.PublishAddress, m.Zone
	n.Capacity, n.Reserved, n.MaxInstances, n.Hypervisors = m.Capacity, m.Reserved, m.MaxInstances, m.Hypervisors
	n.Acceleration, n.Version, n.FeatureLevel = clip(m.Acceleration), clip(m.Release), m.FeatureLevel
	stale := func(l blixard.Label) bool { return slices.Contains(old.ConfigLabels, l.Key) }
	n.Labels = mergeLabels(slices.DeleteFunc(slices.Clone(old.Labels), stale), m.Labels)
	n.ConfigLabels = labelKeys(m.Labels)
	if reflect.DeepEqual(*old, n) && n.State != blixard.NodeJoining {
		return Outcome{Version: old.ModifiedIndex, Noop: true}, nil
	}
	if n.State == blixard.NodeJoining {
		n.State = blixard.NodeReady
		tx.event(Event{Kind: "NodeReady", Node: n.Name, Message: "its agent reports"})
	}
	tx.setNode(&n)
	return Outcome{Version: tx.index}, nil
}

// labelKeys are the keys of labels, sorted; nil for none.
func labelKeys(labels []blixard.Label) []string {
	var keys []string
	for _, l := range labels {
		keys = append(keys, l.Key)
	}
	slices.Sort(keys)
	return keys
}

// mergeLabels lets the newer list win; the result is sorted by key.
func mergeLabels(old, now []blixard.Label) []blixard.Label {
	out := slices.Clone(now)
	for _, l := range old {
		if !slices.ContainsFunc(now, func(n blixard.Label) bool { return n.Key == l.Key }) {
			out = append(out, l)
		}
	}
	slices.SortFunc(out, func(a, b blixard.Label) int {
		if a.Key < b.Key {
			return -1
		}
		return 1
	})
	return tidy(out)
}

// tidy gives an empty list the form it has after a snapshot was restored, so
// that comparisons come out alike on every replica.
func tidy(labels []blixard.Label) []blixard.Label {
	if len(labels) == 0 {
		return nil
	}
	return labels
}

func (tx *txn) member(name blixard.NodeName, raftID uint64) (*blixard.Node, *blixard.Error) {
	n := tx.t.node(name)
	if n == nil {
		return nil, tx.noNode(name)
	}
	if raftID != 0 && n.RaftID != raftID {
		return nil, blixard.Errorf(blixard.CodeDenied, "the node %s was replaced by another machine", name)
	}
	return n, nil
}

func (tx *txn) noNode(name blixard.NodeName) *blixard.Error {
	e := &blixard.Error{Code: blixard.CodeNotFound, Message: "there is no node named " + clip(string(name)), Hint: "`blixard cluster list` shows them"}
	if near := blixard.Nearest(string(name), tx.t.nodeNames()); near != "" {
		e.Hint = "did you mean " + near + "?"
	}
	return e
}

func (t *tables) nodeNames() []string {
	var names []string
	t.nodes.Scan(func(n blixard.NodeName, _ *blixard.Node) bool {
		names = append(names, string(n))
		return len(names) < maxHintNames
	})
	return names
}

// SetNode changes what an operator allows a node to do, or its labels.
type SetNode struct {
	Name         blixard.NodeName
	Availability blixard.Availability // "": unchanged
	SetLabels    []blixard.Label
	DropLabels   []string
}

func (m *SetNode) kind() uint8 { return 23 }

func (m *SetNode) code(c *wire.Coder) {
	wire.String(c, &m.Name)
	wire.String(c, &m.Availability)
	wire.List(c, &m.SetLabels, codeLabel)
	wire.Strings(c, &m.DropLabels)
}

func (m *SetNode) apply(tx *txn) (Outcome, *blixard.Error) {
	old, err := tx.member(m.Name, 0)
	if err != nil {
		return Outcome{}, err
	}
	if err := checkLabels(m.SetLabels); err != nil {
		return Outcome{}, err
	}
	n := *old
	switch m.Availability {
	case "":
	case blixard.Active, blixard.Cordoned, blixard.Draining:
		n.Availability = m.Availability
	default:
		return Outcome{}, blixard.Errorf(blixard.CodeInvalid, "the availability %q is not known: active, cordoned or draining", clip(string(m.Availability)))
	}
	n.Labels = tidy(slices.DeleteFunc(mergeLabels(old.Labels, m.SetLabels), func(l blixard.Label) bool { return slices.Contains(m.DropLabels, l.Key) }))
	if n.Availability == old.Availability && slices.Equal(n.Labels, old.Labels) {
		return Outcome{Version: old.ModifiedIndex, Noop: true}, nil
	}
	n.ConfigLabels = nil // but for those that the operator takes over here
	for _, key := range old.ConfigLabels {
		if !slices.ContainsFunc(m.SetLabels, func(l blixard.Label) bool { return l.Key == key }) {
			n.ConfigLabels = append(n.ConfigLabels, key)
		}
	}
	tx.setNode(&n)
	if n.Availability != old.Availability {
		tx.event(Event{Kind: "NodeAvailability", Node: n.Name, Message: "set to " + string(n.Availability) + " by " + tx.who()})
	}
	return Outcome{Version: tx.index}, nil
}

// LoseNode declares a node lost and its instances with it. Proposed by the
// leader when the node's lease has run out.
type LoseNode struct {
	Name   blixard.NodeName
	RaftID uint64
	Epoch  uint64
}

func (m *LoseNode) kind() uint8 { return 24 }

func (m *LoseNode) code(c *wire.Coder) {
	wire.String(c, &m.Name)
	wire.Uint(c, &m.RaftID)
	wire.Uint(c, &m.Epoch)
}

func (m *LoseNode) apply(tx *txn) (Outcome, *blixard.Error) {
	old, err := tx.member(m.Name, m.RaftID)
	if err != nil {
		return Outcome{}, err
	}
	if old.Epoch != m.Epoch || old.State == blixard.NodeLost {
		return Outcome{Noop: true}, nil
	}
	n := *old
	n.State, n.LostMS = blixard.NodeLost, tx.nowMS
	n.Epoch++
	tx.setNode(&n)
	tx.event(Event{Kind: "NodeLost", Node: n.Name, Warning: true, Message: "no heartbeat within its lease"})
	tx.loseInstances(&n, false)
	tx.loseSlots(n.Name)
	return Outcome{Version: tx.index}, nil
}

// loseInstances ends the incarnations of a node that is out of touch. A
// singleton whose user chose to let it run on keeps its place until the node
// is gone for good.
func (tx *txn) loseInstances(n *blixard.Node, forGood bool) {
	var lost []*blixard.Instance
	tx.t.instancesOn(n.Name, func(i *blixard.Instance) bool {
		if !i.State.Terminal() && (forGood || !i.Spec.Singleton || i.Spec.EffectiveOnPartition() == blixard.OnPartitionStop) {
			lost = append(lost, i)
		}
		return true
	})
	for _, old := range lost {
		inst := *old
		inst.State, inst.EndedMS, inst.Message = blixard.Lost, tx.nowMS, "its node "+string(n.Name)+" was lost"
		tx.setInstance(&inst)
		tx.event(Event{Kind: string(blixard.Lost), VM: inst.VM, Instance: inst.ID, Generation: inst.Generation, Node: inst.Node, Warning: true, Message: inst.Message})
	}
}

// forgetEnded drops the incarnations that ended on a node that goes: no agent
// will ever report them removed. Lost ones stay until the leader may replace
// them.
func (tx *txn) forgetEnded(n *blixard.Node) {
	var ended []*blixard.Instance
	tx.t.instancesOn(n.Name, func(i *blixard.Instance) bool {
		if i.State.Terminal() && i.State != blixard.Lost {
			ended = append(ended, i)
		}
		return true
	})
	for _, i := range ended {
		tx.forget(i)
	}
}

// ReviveNode takes a lost node back. Proposed by the leader when it hears from
// it again.
type ReviveNode struct {
	Name   blixard.NodeName
	RaftID uint64
}

func (m *ReviveNode) kind() uint8 { return 25 }

func (m *ReviveNode) code(c *wire.Coder) {
	wire.String(c, &m.Name)
	wire.Uint(c, &m.RaftID)
}

func (m *ReviveNode) apply(tx *txn) (Outcome, *blixard.Error) {
	old, err := tx.member(m.Name, m.RaftID)
	if err != nil {
		return Outcome{}, err
	}
	if old.State != blixard.NodeLost {
		return Outcome{Noop: true}, nil
	}
	n := *old
	n.State, n.LostMS = blixard.NodeReady, 0
	tx.setNode(&n)
	tx.event(Event{Kind: "NodeReady", Node: n.Name, Message: "in touch again"})
	return Outcome{Version: tx.index}, nil
}

// RemoveNode ends a node's membership. Without Force it must hold no running
// instance. The raft configuration follows by itself.
type RemoveNode struct {
	Name  blixard.NodeName
	Force bool
}

func (m *RemoveNode) kind() uint8 { return 26 }

func (m *RemoveNode) code(c *wire.Coder) {
	wire.String(c, &m.Name)
	wire.Bool(c, &m.Force)
}

func (m *RemoveNode) apply(tx *txn) (Outcome, *blixard.Error) {
	n, err := tx.member(m.Name, 0)
	if err != nil {
		return Outcome{}, err
	}
	if tx.t.nodes.Len() == 1 {
		return Outcome{}, &blixard.Error{Code: blixard.CodeRefused, Message: string(n.Name) + " is the only node of the cluster", Hint: "stop its server and delete its data directory instead"}
	}
	if u, _ := tx.t.usage.Get(n.Name); u.Instances > 0 && !m.Force {
		return Outcome{}, &blixard.Error{
			Code: blixard.CodeRefused, Message: string(n.Name) + " still holds " + itoa(u.Instances) + " instances",
			Hint: "drain it first with `blixard cluster drain " + string(n.Name) + "`, or `blixard cluster force-remove-node " + string(n.Name) + "` if it is gone for good",
		}
	}
	if held := tx.t.slotsHeld(n.Name); held > 0 && !m.Force {
		return Outcome{}, &blixard.Error{
			Code: blixard.CodeRefused, Message: string(n.Name) + " still holds " + itoa(held) + " slots of functions",
			Hint: "drain it first with `blixard cluster drain " + string(n.Name) + "`, or `blixard cluster force-remove-node " + string(n.Name) + "` if it is gone for good",
		}
	}
	tx.loseInstances(n, true)
	tx.forgetEnded(n)
	tx.t.nodes.Delete(n.Name)
	tx.changed(ChangeNode, n, true)
	tx.event(Event{Kind: "NodeRemoved", Node: n.Name, Message: "removed by " + tx.who()})
	return Outcome{Version: tx.index}, nil
}

// SetRaftRoles notes the raft configuration that was applied with an entry.
func (s *State) SetRaftRoles(index, term uint64, voters, learners []uint64) []Change {
	tx := &txn{t: &s.t, index: index, nowMS: s.t.cluster.NowMS}
	var changed []*blixard.Node
	s.t.nodes.Scan(func(_ blixard.NodeName, n *blixard.Node) bool {
		role := blixard.RoleNone
		switch {
		case slices.Contains(voters, n.RaftID):
			role = blixard.RoleVoter
		case slices.Contains(learners, n.RaftID):
			role = blixard.RoleLearner
		}
		if role != n.Raft {
			c := *n
			c.Raft = role
			changed = append(changed, &c)
		}
		return true
	})
	for _, n := range changed {
		tx.setNode(n)
		tx.event(Event{Kind: "NodeRole", Node: n.Name, Message: "now " + string(n.Raft)})
	}
	s.Advance(index, term)
	return tx.changes
}
