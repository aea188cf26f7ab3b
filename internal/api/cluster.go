package api

import (
	"context"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/api/blixard/v1/blixardv1connect"
	"github.com/blixard/blixard/internal/state"
)

const (
	defaultTokenTTL = 24 * time.Hour
	maxTokenTTL     = 366 * 24 * time.Hour
	// chunkBytes is how much of a stream of bytes is sent at once.
	chunkBytes = 64 << 10
)

// cluster implements ClusterService.
type cluster struct{ *Handler }

func (h cluster) GetStatus(ctx context.Context, req *blixardv1.GetStatusRequest) (*blixardv1.ClusterStatus, error) {
	consistency := blixardv1.Consistency_CONSISTENCY_STALE
	if req.Linearizable {
		consistency = blixardv1.Consistency_CONSISTENCY_LINEARIZABLE
	}
	view, err := h.view(ctx, consistency)
	if err != nil {
		return nil, err
	}
	st, c := h.opt.Backend.Status(), view.Cluster()
	m := &blixardv1.ClusterStatus{
		Id: c.ID, Name: c.Name, Leader: string(st.Leader), Term: st.Term, Maintenance: c.Maintenance, Node: string(st.Node), Role: st.Role,
		Committed: st.Committed, Applied: st.Applied, Ready: st.Ready, Release: h.opt.Release, FeatureLevel: int32(c.FeatureLevel),
		CreatedMs: c.CreatedMS, Vms: int32(view.VMCount()),
	}
	var allocatable, used blixard.Resources
	view.Nodes(func(n *blixard.Node) bool {
		m.Nodes = append(m.Nodes, nodeMessage(view, n, &st))
		if n.RunsInstances() {
			allocatable = allocatable.Add(n.Allocatable())
		}
		used = used.Add(view.Usage(n.Name).Used)
		return true
	})
	m.Allocatable, m.Used = resourcesMessage(allocatable), resourcesMessage(used)
	view.Instances(func(i *blixard.Instance) bool {
		if i.Holds() {
			m.Instances++
		}
		if i.State == blixard.Running {
			m.Running++
		}
		return ctx.Err() == nil
	})
	return m, ctx.Err()
}

func (h cluster) ListNodes(ctx context.Context, req *blixardv1.ListNodesRequest) (*blixardv1.ListNodesResponse, error) {
	view, err := h.view(ctx, req.Consistency)
	if err != nil {
		return nil, err
	}
	st := h.opt.Backend.Status()
	answer := &blixardv1.ListNodesResponse{Index: view.Index}
	view.Nodes(func(n *blixard.Node) bool {
		answer.Nodes = append(answer.Nodes, nodeMessage(view, n, &st))
		return true
	})
	return answer, nil
}

func (h cluster) GetNode(ctx context.Context, req *blixardv1.GetNodeRequest) (*blixardv1.GetNodeResponse, error) {
	view, err := h.view(ctx, req.Consistency)
	if err != nil {
		return nil, err
	}
	n, err := findNode(view, req.Name)
	if err != nil {
		return nil, err
	}
	st := h.opt.Backend.Status()
	return &blixardv1.GetNodeResponse{Node: nodeMessage(view, n, &st), Index: view.Index}, nil
}

func findNode(view *state.View, name string) (*blixard.Node, error) {
	if n := view.Node(blixard.NodeName(name)); n != nil {
		return n, nil
	}
	return nil, nearestNames(name, "node", func(yield func(string) bool) {
		view.Nodes(func(n *blixard.Node) bool { return yield(string(n.Name)) })
	})
}

func (h cluster) AddNode(ctx context.Context, req *blixardv1.AddNodeRequest) (*blixardv1.Membership, error) {
	command := &state.JoinNode{Node: identityOf(req.Node), Replace: req.Replace}
	return h.join(ctx, req.IdempotencyKey, req.DryRun, command)
}

func (h cluster) Join(ctx context.Context, req *blixardv1.JoinRequest) (*blixardv1.Membership, error) {
	id, secret, err := ParseToken(req.Token)
	if err != nil {
		return nil, err
	}
	command := &state.JoinNode{Node: identityOf(req.Node), TokenID: id, TokenHash: hashToken(secret), Replace: req.Replace}
	return h.join(ctx, req.IdempotencyKey, req.DryRun, command)
}

// join proposes a membership and tells the new member what it must know. A dry
// run tells no secret.
func (h cluster) join(ctx context.Context, key string, dryRun bool, command *state.JoinNode) (*blixardv1.Membership, error) {
	if err := blixard.CheckName(string(command.Node.Name)); err != nil {
		return nil, inField(err, "node.name")
	}
	if err := blixard.CheckZone(command.Node.Zone); err != nil {
		return nil, inField(err, "node.zone")
	}
	if err := checkAddress(command.Node.Address); err != nil {
		return nil, err
	}
	out, err := h.outcome(ctx, key, dryRun, command)
	if err != nil {
		return nil, err
	}
	view, err := h.opt.Backend.ReadView(ctx)
	if err != nil {
		return nil, err
	}
	c := view.Cluster()
	m := &blixardv1.Membership{
		RaftId: out.Value, ClusterId: c.ID, ClusterName: c.Name, Leader: string(h.opt.Backend.Status().Leader), Change: changeMessage(out, dryRun),
	}
	if dryRun {
		return m, nil
	}
	m.Secret = c.Secret
	view.Nodes(func(n *blixard.Node) bool {
		m.Members = append(m.Members, &blixardv1.Member{Name: string(n.Name), RaftId: n.RaftID, Address: n.Address})
		return true
	})
	return m, nil
}

func (h cluster) SetNode(ctx context.Context, req *blixardv1.SetNodeRequest) (*blixardv1.Change, error) {
	return h.change(ctx, req.IdempotencyKey, req.DryRun, &state.SetNode{
		Name: blixard.NodeName(req.Name), Availability: blixard.Availability(req.Availability), SetLabels: labelsOf(req.SetLabels), DropLabels: req.DropLabels,
	})
}

func (h cluster) RemoveNode(ctx context.Context, req *blixardv1.RemoveNodeRequest) (*blixardv1.Change, error) {
	return h.change(ctx, req.IdempotencyKey, req.DryRun, &state.RemoveNode{Name: blixard.NodeName(req.Name), Force: req.Force})
}

func (h cluster) CreateToken(ctx context.Context, req *blixardv1.CreateTokenRequest) (*blixardv1.CreateTokenResponse, error) {
	ttl := time.Duration(req.TtlMs) * time.Millisecond
	switch {
	case req.TtlMs == 0:
		ttl = defaultTokenTTL
	case req.TtlMs < 0 || req.TtlMs > maxTokenTTL.Milliseconds():
		return nil, blixard.Invalid("ttlMs", "", "ttlMs is %d; it must be between 1 and %d", req.TtlMs, maxTokenTTL.Milliseconds())
	}
	uses := int(req.Uses)
	switch {
	case uses == 0:
		uses = 1
	case uses < -1 || uses > 1_000_000:
		return nil, blixard.Invalid("uses", "", "uses is %d; it must be -1 (no limit) or between 1 and 1000000", uses)
	}
	key, err := keyOf(ctx, req.IdempotencyKey)
	if err != nil {
		return nil, err
	}
	view, err := h.opt.Backend.ReadView(ctx)
	if err != nil {
		return nil, err
	}
	id, secret := newToken(view.Cluster().Secret, key)
	t := state.Token{ID: id, Hash: hashToken(secret), ExpiresMS: time.Now().Add(ttl).UnixMilli(), UsesLeft: uses, Node: blixard.NodeName(req.Node)}
	answer := &blixardv1.CreateTokenResponse{Token: formatToken(id, secret) + h.joinAt(view), Id: id, ExpiresMs: t.ExpiresMS}
	if req.DryRun {
		answer.Token = ""
	}
	// A repeat finds the token of the first request: its times differ, so that
	// the state would take it for another command.
	if old := findToken(view, &t); old != nil {
		answer.ExpiresMs, answer.Change = old.ExpiresMS, &blixardv1.Change{Index: view.Index, Version: view.Index, Noop: true, DryRun: req.DryRun}
		return answer, nil
	}
	answer.Change, err = h.change(ctx, key, req.DryRun, &state.CreateToken{Token: t})
	if err != nil && blixard.CodeOf(err) == blixard.CodeConflict {
		return h.repeatedToken(ctx, answer, &t, err)
	}
	if err != nil {
		return nil, err
	}
	return answer, nil
}

// maxJoinAt bounds the addresses that a token carries.
const maxJoinAt = 3

// joinAt are addresses to join at, as a token carries them: "@" and those of
// voters in touch, the leader's first. Empty when there is none.
func (h cluster) joinAt(view *state.View) string {
	leader := h.opt.Backend.Status().Leader
	var at []string
	view.Nodes(func(n *blixard.Node) bool {
		switch {
		case n.Name == leader && n.Address != "":
			at = slices.Insert(at, 0, n.Address)
		case n.State == blixard.NodeReady && n.Raft == blixard.RoleVoter:
			at = append(at, n.Address)
		}
		return true
	})
	if len(at) == 0 {
		return ""
	}
	return "@" + strings.Join(at[:min(len(at), maxJoinAt)], ",")
}

// repeatedToken answers a request that ran beside its own repeat.
func (h cluster) repeatedToken(ctx context.Context, answer *blixardv1.CreateTokenResponse, t *state.Token, conflict error) (*blixardv1.CreateTokenResponse, error) {
	view, err := h.opt.Backend.ReadView(ctx)
	if err != nil {
		return nil, err
	}
	old := findToken(view, t)
	if old == nil {
		return nil, conflict
	}
	answer.ExpiresMs, answer.Change = old.ExpiresMS, &blixardv1.Change{Index: view.Index, Version: view.Index, Noop: true}
	return answer, nil
}

func findToken(view *state.View, want *state.Token) *state.Token {
	var found *state.Token
	view.Tokens(func(t *state.Token) bool {
		if t.ID == want.ID && t.Hash == want.Hash {
			found = t
		}
		return found == nil
	})
	return found
}

func (h cluster) ListTokens(ctx context.Context, req *blixardv1.ListTokensRequest) (*blixardv1.ListTokensResponse, error) {
	view, err := h.view(ctx, req.Consistency)
	if err != nil {
		return nil, err
	}
	answer, now := &blixardv1.ListTokensResponse{Index: view.Index}, time.Now().UnixMilli()
	view.Tokens(func(t *state.Token) bool {
		if t.ExpiresMS > now {
			answer.Tokens = append(answer.Tokens, tokenMessage(t))
		}
		return true
	})
	return answer, nil
}

func (h cluster) RevokeToken(ctx context.Context, req *blixardv1.RevokeTokenRequest) (*blixardv1.Change, error) {
	if req.Id == "" {
		return nil, blixard.Invalid("id", "`blixard cluster token list` shows them", "the request names no token")
	}
	return h.change(ctx, req.IdempotencyKey, req.DryRun, &state.RevokeToken{ID: req.Id})
}

func (h cluster) TransferLeader(ctx context.Context, req *blixardv1.TransferLeaderRequest) (*blixardv1.TransferLeaderResponse, error) {
	if req.To != "" {
		if _, err := findNode(h.opt.Backend.View(), req.To); err != nil {
			return nil, err
		}
	}
	// Only the leader can hand over; a node that does not lead asks it to.
	st := h.opt.Backend.Status()
	if leader := h.opt.Backend.View().Node(st.Leader); leader != nil && st.Leader != st.Node && forwarded(ctx) == "" && h.opt.Peers != nil {
		peer, err := h.opt.Peers(leader.Address)
		if err != nil {
			return nil, err
		}
		defer peer.Close()
		return peer.TransferLeader(ctx, req)
	}
	if err := h.opt.Backend.TransferLeader(ctx, blixard.NodeName(req.To)); err != nil {
		return nil, err
	}
	return &blixardv1.TransferLeaderResponse{Leader: string(h.opt.Backend.Status().Leader)}, nil
}

func (h cluster) SetMaintenance(ctx context.Context, req *blixardv1.SetMaintenanceRequest) (*blixardv1.Change, error) {
	if req.On == nil {
		return nil, blixard.Invalid("on", "true turns maintenance mode on, false turns it off", "on is missing")
	}
	return h.change(ctx, req.IdempotencyKey, req.DryRun, &state.SetMaintenance{On: req.GetOn()})
}

func (h cluster) WriteSnapshot(ctx context.Context, _ *blixardv1.WriteSnapshotRequest) (*blixardv1.WriteSnapshotResponse, error) {
	index, err := h.opt.Backend.Snapshot(ctx)
	if err != nil {
		return nil, err
	}
	return &blixardv1.WriteSnapshotResponse{Index: index}, nil
}

func (h cluster) DownloadSnapshot(ctx context.Context, _ *blixardv1.DownloadSnapshotRequest, stream blixardv1connect.ClusterServiceDownloadSnapshotServerStream) error {
	w := &chunks{send: func(data []byte) error { return stream.Send(&blixardv1.DownloadSnapshotResponse{Data: data}) }}
	if _, err := h.opt.Backend.WriteSnapshot(ctx, w); err != nil {
		return err
	}
	return w.flush()
}

func (h cluster) Record(ctx context.Context, req *blixardv1.RecordRequest, stream blixardv1connect.ClusterServiceRecordServerStream) error {
	return h.opt.Backend.Record(ctx, req.Since, req.Follow, &parts{send: func(data []byte, whole bool) error {
		return stream.Send(&blixardv1.RecordResponse{Data: data, Whole: whole})
	}})
}

// parts cuts large writes into messages; the last one of each write is whole.
type parts struct {
	send func(data []byte, whole bool) error
}

func (p *parts) Write(b []byte) (int, error) {
	for at := 0; at < len(b); {
		end := min(at+4*chunkBytes, len(b))
		if err := p.send(b[at:end], end == len(b)); err != nil {
			return at, err
		}
		at = end
	}
	return len(b), nil
}

// chunks gathers small writes into messages.
type chunks struct {
	send func([]byte) error
	buf  []byte
}

var _ io.Writer = (*chunks)(nil)

func (c *chunks) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		take := min(len(p), chunkBytes-len(c.buf))
		c.buf = append(c.buf, p[:take]...)
		p = p[take:]
		if len(c.buf) == chunkBytes {
			if err := c.flush(); err != nil {
				return n - len(p), err
			}
		}
	}
	return n, nil
}

func (c *chunks) flush() error {
	if len(c.buf) == 0 {
		return nil
	}
	err := c.send(c.buf)
	c.buf = c.buf[:0]
	return err
}
