package api

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"net"
	"strconv"
	"strings"

	"github.com/blixard/blixard"
)

// A join token is "blx1.<id>.<secret>": an ID of 16 hex digits that may be
// shown, and 32 bytes in base64url. The state keeps the SHA-256 of the secret
// only.
const (
	tokenPrefix = "blx1"
	tokenIDLen  = 16
	secretLen   = 43 // 32 bytes in base64url
)

// newToken makes a token. It is derived from the cluster's secret and the key
// of the request, so that the repeat of a request whose answer was lost gets
// the same token; who does not know the cluster's secret cannot guess it. The
// key is 26 random characters unless the caller chose it.
func newToken(clusterSecret, key string) (id, secret string) {
	var seed []byte
	if clusterSecret != "" {
		seed = []byte(clusterSecret)
	} else {
		seed = make([]byte, 32)
		rand.Read(seed) // never fails: it ends the process instead
	}
	derive := func(what string) []byte {
		mac := hmac.New(sha256.New, seed)
		mac.Write([]byte("blixard join token " + what + "\x00" + key)) // a hash never fails to write
		return mac.Sum(nil)
	}
	return hex.EncodeToString(derive("id"))[:tokenIDLen], base64.RawURLEncoding.EncodeToString(derive("secret"))
}

func formatToken(id, secret string) string { return tokenPrefix + "." + id + "." + secret }

// ParseToken takes a join token apart. What it carries behind "@", addresses of
// members, is passed over.
func ParseToken(token string) (id, secret string, err error) {
	token, _, _ = strings.Cut(strings.TrimSpace(token), "@")
	prefix, rest, _ := strings.Cut(token, ".")
	id, secret, found := strings.Cut(rest, ".")
	_, idErr := hex.DecodeString(id)
	_, secretErr := base64.RawURLEncoding.DecodeString(secret)
	if !found || prefix != tokenPrefix || len(id) != tokenIDLen || len(secret) != secretLen || idErr != nil || secretErr != nil {
		return "", "", blixard.Invalid("token", "copy the whole line that `blixard cluster token create` printed", "the join token does not have the form blx1.<id>.<secret>")
	}
	return id, secret, nil
}

// hashToken is what the state keeps of a secret.
func hashToken(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

// checkAddress refuses an address that others cannot dial.
func checkAddress(address string) error {
	host, port, err := net.SplitHostPort(address)
	if n, convErr := strconv.Atoi(port); err != nil || convErr != nil || n < 1 || n > 65535 || host == "" || len(host) > 253 || strings.ContainsAny(host, " /\\@?#\"'<>\x00\r\n") {
		return blixard.Invalid("node.address", "write host:port, such as 10.0.0.4:7400", "the address %.80q cannot be used", address)
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		return blixard.Invalid("node.address", "give the address at which other nodes reach it", "the address %.80q is no address to dial", address)
	}
	return nil
}
