// Package accesskey makes the keys with which programs sign requests as AWS
// clients do, and checks requests that were signed with one.
//
// A key is an ID, which is no secret and stands in the replicated state, and a
// secret, which is stored nowhere: it is derived from the cluster's secret and
// the ID, so that every node can check a signature and none can lose a key. Who
// reads the state's snapshot without the cluster's secret learns no secret;
// who has the cluster's secret rules the cluster anyway. A new cluster secret
// makes all keys void.
//
// Checking takes two steps, since the signature covers the body: Parse judges
// what the head of a request tells (form, key, time, scope), and costs a
// stranger his connection before his body is read; Request.Check recomputes the
// signature once the body's hash is known. Nothing that a request asks for may
// be done before Check has returned nil.
//
// The package holds no state and starts no goroutine.
package accesskey

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base32"
	"encoding/base64"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// Prefix begins the ID of every key.
const Prefix = "BLXA"

// idLen is the length of an ID: the prefix and 16 letters or digits (80 bits).
const idLen = len(Prefix) + 16

// Roles tell what a key allows.
const (
	RoleAdmin  = "admin"  // everything
	RoleInvoke = "invoke" // calling functions, nothing else
	RoleRead   = "read"   // reading, not calling
)

// Roles are all of them.
var Roles = []string{RoleAdmin, RoleInvoke, RoleRead}

// derive is HMAC-SHA256 of what under a root that comes from the cluster's
// secret and serves nothing else.
func derive(clusterSecret, what string) []byte {
	root := mac([]byte(clusterSecret), "blixard access keys 1")
	return mac(root, what)
}

func mac(key []byte, data string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(data)) // a hash never fails to write
	return h.Sum(nil)
}

// NewID makes the ID of a new key from the idempotency key of the request for
// it, so that the repeat of a request whose answer was lost gets the same key.
func NewID(clusterSecret, requestKey string) string {
	sum := derive(clusterSecret, "id\x00"+requestKey)
	return Prefix + base32.StdEncoding.EncodeToString(sum[:10])
}

// CheckID tells why id cannot be the ID of a key.
func CheckID(id string) error {
	rest, ok := strings.CutPrefix(id, Prefix)
	if ok && len(id) == idLen && strings.Trim(rest, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789") == "" {
		return nil
	}
	return blixard.Invalid("id", "`blixard auth list-keys` shows the IDs", "%.40q is no access key ID: one is %s and 16 capital letters or digits", id, Prefix)
}

// Secret is the secret of the key with that ID: 43 characters.
func Secret(clusterSecret, id string) string {
	return base64.RawURLEncoding.EncodeToString(derive(clusterSecret, "secret\x00"+id))
}

// Seal signs a text that this cluster gives out and takes back, such as a link.
func Seal(clusterSecret, text string) string {
	return base64.RawURLEncoding.EncodeToString(derive(clusterSecret, "seal\x00"+text))
}

// URLID draws the ID of a function URL, 32 lower-case letters and digits, from
// the idempotency key of the request for it.
func URLID(clusterSecret, requestKey string) string {
	sum := derive(clusterSecret, "url\x00"+requestKey)
	return strings.ToLower(base32.StdEncoding.EncodeToString(sum[:20]))
}

// Backend is the replicated state as these functions need it.
type Backend interface {
	ReadView(ctx context.Context) (*state.View, error)
	Propose(ctx context.Context, e state.Envelope) (state.Outcome, error)
}
