package state

import (
	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/wire"
)

// Token lets nodes join. Only the hash of its secret is stored.
type Token struct {
	ID        string
	Hash      string // hex SHA-256 of the secret
	ExpiresMS int64
	UsesLeft  int // -1: no limit
	// Node binds the token to one name; empty: any.
	Node blixard.NodeName
}

func codeToken(c *wire.Coder, t *Token) {
	wire.String(c, &t.ID)
	wire.String(c, &t.Hash)
	wire.Int(c, &t.ExpiresMS)
	wire.Int(c, &t.UsesLeft)
	wire.String(c, &t.Node)
}

// CreateToken stores a join token.
type CreateToken struct {
	Token Token
}

func (m *CreateToken) kind() uint8 { return 27 }

func (m *CreateToken) code(c *wire.Coder) { codeToken(c, &m.Token) }

func (m *CreateToken) apply(tx *txn) (Outcome, *blixard.Error) {
	t := m.Token
	if t.ID == "" || t.Hash == "" || len(t.ID) > 64 || len(t.Hash) > 128 {
		return Outcome{}, blixard.Errorf(blixard.CodeInvalid, "the token has no usable ID or hash")
	}
	if t.Node != "" {
		if err := blixard.CheckName(string(t.Node)); err != nil {
			return Outcome{}, asError(err)
		}
	}
	var expired []string
	tx.t.tokens.Scan(func(id string, old *Token) bool {
		if old.ExpiresMS <= tx.nowMS {
			expired = append(expired, id)
		}
		return true
	})
	if tx.t.tokens.Len()-len(expired) >= maxTokens {
		return Outcome{}, &blixard.Error{Code: blixard.CodeRefused, Message: "there are " + itoa(maxTokens) + " unused join tokens", Hint: "revoke some or wait until they expire"}
	}
	for _, id := range expired {
		tx.t.tokens.Delete(id)
	}
	tx.t.tokens.Set(t.ID, &t)
	return Outcome{Version: tx.index}, nil
}

// RevokeToken makes a join token unusable.
type RevokeToken struct {
	ID string
}

func (m *RevokeToken) kind() uint8 { return 29 }

func (m *RevokeToken) code(c *wire.Coder) { wire.String(c, &m.ID) }

func (m *RevokeToken) apply(tx *txn) (Outcome, *blixard.Error) {
	_, was := tx.t.tokens.Delete(m.ID)
	return Outcome{Version: tx.index, Noop: !was}, nil
}

// checkToken refuses a node whose join token does not hold. All refusals read
// alike.
func (tx *txn) checkToken(id, hash string, node blixard.NodeName) *blixard.Error {
	if id == "" && hash == "" {
		return nil // an operator's own command
	}
	t, ok := tx.t.tokens.Get(id)
	if !ok || t.Hash != hash || t.ExpiresMS <= tx.nowMS || t.UsesLeft == 0 || t.Node != "" && t.Node != node {
		return &blixard.Error{
			Code: blixard.CodeDenied, Message: "the join token is unknown, used up or expired, or was made for another node",
			Hint: "make a new one on a member with `blixard cluster token create`",
		}
	}
	return nil
}

// useToken takes one use from a token that was checked.
func (tx *txn) useToken(id string) {
	t, ok := tx.t.tokens.Get(id)
	if !ok {
		return
	}
	left := *t
	if left.UsesLeft > 0 {
		left.UsesLeft--
	}
	if left.UsesLeft == 0 {
		tx.t.tokens.Delete(id)
	} else {
		tx.t.tokens.Set(id, &left)
	}
}

// tokenIsFor tells whether a token was made for one node by name.
func (tx *txn) tokenIsFor(id string, node blixard.NodeName) bool {
	t, ok := tx.t.tokens.Get(id)
	return ok && t.Node == node
}

// SetMaintenance turns the cluster's maintenance mode on or off.
type SetMaintenance struct {
	On bool
}

func (m *SetMaintenance) kind() uint8 { return 28 }

func (m *SetMaintenance) code(c *wire.Coder) { wire.Bool(c, &m.On) }

func (m *SetMaintenance) apply(tx *txn) (Outcome, *blixard.Error) {
	if tx.t.cluster.Maintenance == m.On {
		return Outcome{Noop: true}, nil
	}
	tx.t.cluster.Maintenance = m.On
	word := "off"
	if m.On {
		word = "on"
	}
	tx.event(Event{Kind: "Maintenance", Message: "turned " + word + " by " + tx.who()})
	return Outcome{Version: tx.index}, nil
}

// Event is something that happened. The newest are kept.
type Event struct {
	Seq        uint64
	Index      uint64
	AtMS       int64
	Kind       string
	VM         blixard.VMName
	Instance   blixard.InstanceID
	Generation uint64
	Node       blixard.NodeName
	Warning    bool
	Message    string
	Function   blixard.FunctionName
}

func codeEvent(c *wire.Coder, e *Event) {
	wire.Uint(c, &e.Seq)
	wire.Uint(c, &e.Index)
	wire.Int(c, &e.AtMS)
	wire.String(c, &e.Kind)
	wire.String(c, &e.VM)
	wire.String(c, &e.Instance)
	wire.Uint(c, &e.Generation)
	wire.String(c, &e.Node)
	wire.Bool(c, &e.Warning)
	wire.String(c, &e.Message)
	if c.Reading() || e.Function != "" { // appended in level 2: older rows keep their bytes
		wire.String(c, &e.Function)
	}
}

// event records that something happened.
func (tx *txn) event(e Event) {
	c := &tx.t.cluster
	c.NextEvent++
	e.Seq, e.Index, e.AtMS, e.Message = c.NextEvent, tx.index, tx.nowMS, clip(e.Message)
	tx.t.events.Set(e.Seq, &e)
	for tx.t.events.Len() > maxEvents {
		tx.t.events.PopMin()
	}
	tx.changed(ChangeEvent, &e, false)
}

// Events calls yield for each kept event, newest first.
func (v *View) Events(yield func(*Event) bool) {
	v.t.events.Reverse(func(_ uint64, e *Event) bool { return yield(e) })
}

// Tokens calls yield for each join token by ID.
func (v *View) Tokens(yield func(*Token) bool) {
	v.t.tokens.Scan(func(_ string, t *Token) bool { return yield(t) })
}
