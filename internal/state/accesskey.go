package state

import (
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/wire"
)

// maxAccessKeys bounds access keys; those that can no longer be used make room.
const maxAccessKeys = 1000

// accessKeyPrefix begins the ID of each access key; 16 letters or digits follow.
const accessKeyPrefix = "BLXA"

// CreateAccessKey stores an access key. Its secret is not stored: it is derived
// of the cluster's secret and the ID, which the proposer draws.
type CreateAccessKey struct {
	Key blixard.AccessKey // CreatedMS and RevokedMS are not looked at
}

func (m *CreateAccessKey) kind() uint8 { return 56 }

func (m *CreateAccessKey) code(c *wire.Coder) {
	c.Record(func(c *wire.Coder) { codeAccessKey(c, &m.Key) })
}

func (m *CreateAccessKey) apply(tx *txn) (Outcome, *blixard.Error) {
	k := m.Key
	rest, ok := strings.CutPrefix(k.ID, accessKeyPrefix)
	switch {
	case !ok || len(rest) != 16 || strings.Trim(rest, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789") != "":
		return Outcome{}, blixard.Invalid("id", "", "the access key's ID %.40q is not %s and 16 upper-case letters or digits", k.ID, accessKeyPrefix)
	case len(k.Name) > 128 || strings.ContainsAny(k.Name, "\x00\r\n"):
		return Outcome{}, blixard.Invalid("name", "", "the access key's name %.40q is not usable", k.Name)
	case len(k.Role) > 64:
		return Outcome{}, blixard.Invalid("role", "", "the access key's role %.40q is not usable", k.Role)
	case k.ExpiresMS != 0 && k.ExpiresMS <= tx.nowMS:
		return Outcome{}, blixard.Invalid("expires", "", "the access key would have expired already")
	}
	if _, taken := tx.t.accessKeys.Get(k.ID); taken {
		return Outcome{}, blixard.Errorf(blixard.CodeExists, "the access key %s exists", k.ID)
	}
	if tx.t.accessKeys.Len() >= maxAccessKeys && !tx.forgetAccessKeys() {
		return Outcome{}, &blixard.Error{
			Code: blixard.CodeRefused, Message: "there are " + itoa(maxAccessKeys) + " access keys, the most a cluster holds",
			Hint: "revoke some that are not used",
		}
	}
	k.CreatedMS, k.RevokedMS = tx.nowMS, 0
	tx.setAccessKey(&k)
	tx.event(Event{Kind: "AccessKeyCreated", Message: k.ID + " created by " + tx.who()})
	return Outcome{Version: tx.index}, nil
}

// forgetAccessKeys drops those that were revoked or have expired; false if none.
func (tx *txn) forgetAccessKeys() bool {
	var gone []*blixard.AccessKey
	tx.t.accessKeys.Scan(func(_ string, k *blixard.AccessKey) bool {
		if k.RevokedMS != 0 || k.ExpiresMS != 0 && k.ExpiresMS <= tx.nowMS {
			gone = append(gone, k)
		}
		return true
	})
	for _, k := range gone {
		tx.t.accessKeys.Delete(k.ID)
		tx.changed(ChangeAccessKey, k, true)
	}
	return len(gone) > 0
}

func (tx *txn) setAccessKey(k *blixard.AccessKey) {
	tx.t.accessKeys.Set(k.ID, k)
	tx.changed(ChangeAccessKey, k, false)
}

// RevokeAccessKey makes an access key unusable for good. It is kept for a look.
type RevokeAccessKey struct {
	ID string
}

func (m *RevokeAccessKey) kind() uint8 { return 57 }

func (m *RevokeAccessKey) code(c *wire.Coder) { wire.String(c, &m.ID) }

func (m *RevokeAccessKey) apply(tx *txn) (Outcome, *blixard.Error) {
	old, ok := tx.t.accessKeys.Get(m.ID)
	if !ok {
		return Outcome{}, &blixard.Error{Code: blixard.CodeNotFound, Message: "there is no access key " + clip(m.ID)}
	}
	if old.RevokedMS != 0 {
		return Outcome{Noop: true}, nil
	}
	k := *old
	k.RevokedMS = max(tx.nowMS, 1)
	tx.setAccessKey(&k)
	tx.event(Event{Kind: "AccessKeyRevoked", Message: k.ID + " revoked by " + tx.who()})
	return Outcome{Version: tx.index}, nil
}
