package accesskey

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// New is what Create makes.
type New struct {
	Name string // for people: 1 to 128 characters
	Role string // one of Roles; "" is RoleAdmin
	// Lifetime is after what time the key is void; 0: never.
	Lifetime time.Duration
	// RequestKey is the idempotency key of the request: a repeat gets the same key.
	RequestKey string
	Actor      string // who asks
	Now        time.Time
}

// Command makes the command that stores a new key, whose ID is in it.
func (n *New) Command(clusterSecret string) (*state.CreateAccessKey, error) {
	name := strings.TrimSpace(n.Name)
	if name == "" || len(name) > 128 || strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return nil, blixard.Invalid("name", "say who or what will use it, such as --name ci", "the access key needs a name of 1 to 128 printable characters")
	}
	key := blixard.AccessKey{ID: NewID(clusterSecret, n.RequestKey), Name: name, Role: n.Role}
	if key.Role == "" {
		key.Role = RoleAdmin
	}
	if !slices.Contains(Roles, key.Role) {
		hint := "known: " + strings.Join(Roles, ", ")
		if near := blixard.Nearest(n.Role, Roles); near != "" {
			hint = "did you mean " + near + "? " + hint
		}
		return nil, blixard.Invalid("role", hint, "the role %.40q is not known", n.Role)
	}
	switch {
	case n.Lifetime < 0 || n.Lifetime > 0 && n.Lifetime < time.Minute:
		return nil, blixard.Invalid("expires", "write such as --expires 720h; without it the key holds until it is revoked", "an access key that holds for %s is of no use", n.Lifetime)
	case n.Lifetime > 0:
		key.ExpiresMS = n.Now.Add(n.Lifetime).UnixMilli()
	}
	return &state.CreateAccessKey{Key: key}, nil
}

// Create makes a key, and returns it with its secret, which is told this once.
func Create(ctx context.Context, b Backend, n New) (key blixard.AccessKey, secret string, err error) {
	view, err := b.ReadView(ctx)
	if err != nil {
		return blixard.AccessKey{}, "", err
	}
	clusterSecret := view.Cluster().Secret
	command, err := n.Command(clusterSecret)
	if err != nil {
		return blixard.AccessKey{}, "", err
	}
	// The time of a repeat differs, and with it the command that a key must be
	// the same for: what is there already is the answer.
	if old := view.AccessKey(command.Key.ID); old != nil && n.RequestKey != "" {
		if old.Name != command.Key.Name || old.Role != command.Key.Role {
			return blixard.AccessKey{}, "", blixard.Errorf(blixard.CodeConflict, "the idempotency key %q was used for another request", n.RequestKey)
		}
		return *old, Secret(clusterSecret, old.ID), nil
	}
	e := state.Envelope{Key: n.RequestKey, NowMS: n.Now.UnixMilli(), Actor: n.Actor, Command: command}
	if _, err := b.Propose(ctx, e); err != nil {
		return blixard.AccessKey{}, "", err
	}
	key = command.Key
	key.CreatedMS = e.NowMS
	return key, Secret(clusterSecret, key.ID), nil
}

// List returns all keys by ID, also those that were revoked or have expired and
// are not forgotten yet.
func List(ctx context.Context, b Backend) ([]blixard.AccessKey, error) {
	view, err := b.ReadView(ctx)
	if err != nil {
		return nil, err
	}
	var out []blixard.AccessKey
	view.AccessKeys(func(k *blixard.AccessKey) bool { out = append(out, *k); return true })
	return out, nil
}

// Revoke makes a key void for good, on each node as soon as it has applied the
// change.
func Revoke(ctx context.Context, b Backend, id, requestKey, actor string, now time.Time) (state.Outcome, error) {
	if err := CheckID(id); err != nil {
		return state.Outcome{}, err
	}
	return b.Propose(ctx, state.Envelope{Key: requestKey, NowMS: now.UnixMilli(), Actor: actor, Command: &state.RevokeAccessKey{ID: id}})
}

// KeysOf finds keys in the view that this node has.
func KeysOf(view func() *state.View) Keys {
	return func(id string) (blixard.AccessKey, string, bool) {
		if CheckID(id) != nil {
			return blixard.AccessKey{}, "", false
		}
		v := view()
		key := v.AccessKey(id)
		clusterSecret := v.Cluster().Secret
		if key == nil || clusterSecret == "" {
			return blixard.AccessKey{}, "", false
		}
		return *key, Secret(clusterSecret, id), true
	}
}

// Verify checks a request whose body is whole. Errors are *Denial.
func Verify(r *http.Request, body []byte, scope Scope, now time.Time, keys Keys) (blixard.AccessKey, error) {
	signed, err := Parse(r, scope, now, keys)
	if err != nil {
		return blixard.AccessKey{}, err
	}
	sum := sha256.Sum256(body)
	if err := signed.Check(hex.EncodeToString(sum[:])); err != nil {
		return blixard.AccessKey{}, err
	}
	return signed.Key, nil
}
