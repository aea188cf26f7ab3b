package accesskey

import (
	"context"
	"crypto/hmac"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/blixard/blixard"
)

// Bounds of what is accepted.
const (
	MaxSkew       = 5 * time.Minute    // between the clock of the one who signed and ours
	maxExpires    = 7 * 24 * time.Hour // of a presigned request
	maxSigned     = 64                 // signed headers
	maxAuthLength = 8 << 10            // of the Authorization header
)

const (
	algorithm  = "AWS4-HMAC-SHA256"
	terminator = "aws4_request"
	timeForm   = "20060102T150405Z"
	dayForm    = "20060102"

	// UnsignedPayload stands for the hash of a body that is not signed.
	UnsignedPayload = "UNSIGNED-PAYLOAD"
	// EmptyHash is the hash of an empty body.
	EmptyHash = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
)

// Denial is why a signed request is not accepted, in the words of AWS, which
// clients match on.
type Denial struct {
	Type    string // such as "InvalidSignatureException"
	Status  int    // 400 or 403
	Message string
}

func (d *Denial) Error() string { return d.Type + ": " + d.Message }

func deny(status int, kind, format string, args ...any) *Denial {
	return &Denial{Type: kind, Status: status, Message: fmt.Sprintf(format, args...)}
}

func invalid(format string, args ...any) *Denial {
	return deny(http.StatusForbidden, "InvalidSignatureException", format, args...)
}

func incomplete(format string, args ...any) *Denial {
	return deny(http.StatusBadRequest, "IncompleteSignatureException", format, args...)
}

// Scope is what signatures must be made for.
type Scope struct {
	Region  string
	Service string
}

// Keys finds a key by its ID, with the secret of it.
type Keys func(id string) (key blixard.AccessKey, secret string, ok bool)

// Request is a signed request whose head was found in order.
type Request struct {
	Key blixard.AccessKey
	// PayloadHash is what the head says of the body: a SHA-256 in hexadecimal
	// digits, UnsignedPayload, or "" when it says nothing and the body's own hash
	// is what was signed.
	PayloadHash string

	r         *http.Request
	query     url.Values // without the signature
	presigned bool
	secret    string
	scope     Scope
	signedAt  time.Time
	headers   []string // signed, lower case
	signature []byte
}

// Signed tells whether a request carries a signature, or something like one.
func Signed(r *http.Request) bool {
	return r.Header.Get("Authorization") != "" || strings.Contains(r.URL.RawQuery, "X-Amz-Signature")
}

// Parse judges the head of a request, received by an http.Server, by the clock's
// now. Errors are *Denial.
func Parse(r *http.Request, scope Scope, now time.Time, keys Keys) (*Request, error) {
	// What does not parse would be left out of what is checked, and might be read
	// otherwise elsewhere.
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, incomplete("The query string is malformed.")
	}
	s := &Request{r: r, query: query, scope: scope}
	var credential, signed, signature, date string
	var expires time.Duration
	switch authorization := r.Header.Values("Authorization"); {
	case query.Has("X-Amz-Signature"):
		if len(authorization) > 0 {
			return nil, incomplete("The request carries a signature in its headers and another one in its query string.")
		}
		if credential, signed, signature, date, expires, err = presigned(query); err != nil {
			return nil, err
		}
		s.presigned = true
		query.Del("X-Amz-Signature")
	case len(authorization) == 0:
		return nil, deny(http.StatusForbidden, "MissingAuthenticationTokenException", "Missing Authentication Token")
	case len(authorization) > 1:
		return nil, incomplete("The request carries %d Authorization headers.", len(authorization))
	default:
		if credential, signed, signature, err = parseAuthorization(authorization[0]); err != nil {
			return nil, err
		}
		if date = r.Header.Get("X-Amz-Date"); date == "" || len(r.Header.Values("X-Amz-Date")) > 1 {
			return nil, incomplete("Authorization header requires existence of one 'X-Amz-Date' header.")
		}
	}
	if s.signature, err = hex.DecodeString(signature); err != nil || len(s.signature) != 32 {
		return nil, incomplete("The signature is not 64 hexadecimal digits.")
	}
	if s.signedAt, err = time.Parse(timeForm, date); err != nil {
		return nil, incomplete("Date must be in ISO-8601 'basic format'. Got '%.40s'.", date)
	}
	if err := s.setHeaders(signed); err != nil {
		return nil, err
	}
	if err := s.setKey(credential, now, keys); err != nil {
		return nil, err
	}
	if err := s.checkTime(now, expires); err != nil {
		return nil, err
	}
	return s, s.setPayloadHash()
}

// parseAuthorization takes apart "AWS4-HMAC-SHA256 Credential=…, SignedHeaders=…,
// Signature=…".
func parseAuthorization(header string) (credential, signed, signature string, err error) {
	kind, rest, _ := strings.Cut(header, " ")
	if kind != algorithm || len(header) > maxAuthLength {
		return "", "", "", incomplete("Unsupported authorization type: '%.40s'; requests are signed with %s.", kind, algorithm)
	}
	parts := map[string]*string{"Credential": &credential, "SignedHeaders": &signed, "Signature": &signature}
	for part := range strings.SplitSeq(rest, ",") {
		name, value, ok := strings.Cut(strings.TrimSpace(part), "=")
		at := parts[name]
		if !ok || at == nil || *at != "" || value == "" {
			return "", "", "", incomplete("'%.80s' is not a valid key=value pair (missing equal-sign) in Authorization header.", part)
		}
		*at = value
	}
	for _, name := range []string{"Credential", "Signature", "SignedHeaders"} {
		if *parts[name] == "" {
			return "", "", "", incomplete("Authorization header requires '%s' parameter.", name)
		}
	}
	return credential, signed, signature, nil
}

// presigned reads the query's form of a signature.
func presigned(query url.Values) (credential, signed, signature, date string, expires time.Duration, err error) {
	one := func(name string) string {
		if err == nil && len(query[name]) != 1 {
			err = incomplete("AWS query-string parameters must include one '%s'.", name)
		}
		return query.Get(name)
	}
	kind := one("X-Amz-Algorithm")
	credential, signed, signature, date = one("X-Amz-Credential"), one("X-Amz-SignedHeaders"), one("X-Amz-Signature"), one("X-Amz-Date")
	if err != nil {
		return "", "", "", "", 0, err
	}
	if kind != algorithm {
		return "", "", "", "", 0, incomplete("Unsupported AWS 'algorithm': '%.40s'; requests are signed with %s.", kind, algorithm)
	}
	// Without a time of its own it holds as long as a signed header would.
	expires = MaxSkew
	if text := query.Get("X-Amz-Expires"); text != "" {
		seconds, convErr := strconv.Atoi(text)
		expires = time.Duration(seconds) * time.Second
		if convErr != nil || seconds < 1 || seconds > int(maxExpires/time.Second) || len(query["X-Amz-Expires"]) != 1 {
			return "", "", "", "", 0, incomplete("X-Amz-Expires must be 1 to %d seconds.", int(maxExpires/time.Second))
		}
	}
	return credential, signed, signature, date, expires, nil
}

// setHeaders takes the list of signed headers. Everything that changes what a
// request means must be among them.
func (s *Request) setHeaders(list string) error {
	s.headers = strings.Split(list, ";")
	if len(s.headers) > maxSigned {
		return incomplete("More than %d headers are signed.", maxSigned)
	}
	for _, name := range s.headers {
		if name == "" || name != strings.ToLower(name) {
			return incomplete("'SignedHeaders' must be names in lower case, separated by ';'.")
		}
	}
	if !slices.Contains(s.headers, "host") {
		return invalid("'Host' must be a 'SignedHeader' in the AWS Authorization.")
	}
	for name := range s.r.Header {
		if lower := strings.ToLower(name); strings.HasPrefix(lower, "x-amz-") && !slices.Contains(s.headers, lower) {
			return invalid("'%.60s' must be a 'SignedHeader' in the AWS Authorization.", lower)
		}
	}
	return nil
}

// setKey reads "<id>/<day>/<region>/<service>/aws4_request".
func (s *Request) setKey(credential string, now time.Time, keys Keys) error {
	parts := strings.Split(credential, "/")
	if len(parts) != 5 {
		return incomplete("Credential must have exactly 5 slash-delimited elements, e.g. keyid/date/region/service/term, got '%.120s'", credential)
	}
	key, secret, ok := keys(parts[0])
	if !ok || key.RevokedMS != 0 || s.r.Header.Get("X-Amz-Security-Token") != "" || s.query.Get("X-Amz-Security-Token") != "" {
		return deny(http.StatusForbidden, "UnrecognizedClientException", "The security token included in the request is invalid.")
	}
	if key.ExpiresMS != 0 && key.ExpiresMS <= now.UnixMilli() {
		return deny(http.StatusForbidden, "ExpiredTokenException", "The security token included in the request is expired")
	}
	switch {
	case parts[1] != s.signedAt.Format(dayForm):
		return invalid("Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP: '%.20s' != '%s', from '%s'.", parts[1], s.signedAt.Format(dayForm), s.signedAt.Format(timeForm))
	case parts[2] != s.scope.Region:
		return invalid("Credential should be scoped to a valid region: this cluster is '%s', not '%.40s'.", s.scope.Region, parts[2])
	case parts[3] != s.scope.Service:
		return invalid("Credential should be scoped to correct service: '%s'.", s.scope.Service)
	case parts[4] != terminator:
		return invalid("Credential should be scoped with a valid terminator: '%s', not '%.40s'.", terminator, parts[4])
	}
	s.Key, s.secret = key, secret
	return nil
}

// checkTime compares clocks. A presigned request holds until it expires.
func (s *Request) checkTime(now time.Time, expires time.Duration) error {
	now = now.UTC()
	if s.signedAt.After(now.Add(MaxSkew)) {
		return invalid("Signature not yet current: %s is still later than %s (%s + 5 min.)", s.signedAt.Format(timeForm), now.Add(MaxSkew).Format(timeForm), now.Format(timeForm))
	}
	if !s.presigned {
		expires = MaxSkew
	}
	if !now.After(s.signedAt.Add(expires)) {
		return nil
	}
	if s.presigned {
		return invalid("Signature expired: %s is now earlier than %s", s.signedAt.Add(expires).Format(timeForm), now.Format(timeForm))
	}
	return invalid("Signature expired: %s is now earlier than %s (%s - 5 min.)", s.signedAt.Format(timeForm), now.Add(-MaxSkew).Format(timeForm), now.Format(timeForm))
}

// setPayloadHash reads what the head tells of the body.
func (s *Request) setPayloadHash() error {
	hash := s.r.Header.Get("X-Amz-Content-Sha256")
	if hash == "" {
		hash = s.query.Get("X-Amz-Content-Sha256")
	}
	decoded, err := hex.DecodeString(hash)
	switch {
	case hash == "", hash == UnsignedPayload:
	case strings.HasPrefix(hash, "STREAMING-"):
		return invalid("Bodies signed in chunks ('%.60s') are not accepted: sign the whole body, or send %s.", hash, UnsignedPayload)
	case err != nil || len(decoded) != 32 || hash != strings.ToLower(hash):
		return incomplete("'X-Amz-Content-Sha256' is neither the SHA-256 of the body in hexadecimal digits nor %s.", UnsignedPayload)
	}
	s.PayloadHash = hash
	return nil
}

// Check recomputes the signature, given the SHA-256 of the body in hexadecimal
// digits. nil means that who holds the key has signed this very request. Errors
// are *Denial.
func (s *Request) Check(bodyHash string) error {
	hash := bodyHash
	if s.PayloadHash != "" {
		hash = s.PayloadHash
	}
	want, err := s.sign(hash)
	// Compared in constant time: a wrong signature must not tell how wrong it is.
	if err != nil || !hmac.Equal(want, s.signature) || hash != UnsignedPayload && !hmac.Equal([]byte(hash), []byte(bodyHash)) {
		return invalid("The request signature we calculated does not match the signature you provided. Check your AWS Secret Access Key and signing method. Consult the service documentation for details.")
	}
	return nil
}

// sign makes the signature anew, with AWS' own signer, of a request that has
// nothing but what was signed.
func (s *Request) sign(payloadHash string) ([]byte, error) {
	path, _, _ := strings.Cut(s.r.RequestURI, "?")
	if !strings.HasPrefix(path, "/") {
		path = s.r.URL.EscapedPath() // an absolute URI, as for a proxy
	}
	r := &http.Request{
		Method: s.r.Method, Host: s.r.Host, Header: make(http.Header, len(s.headers)),
		// Opaque keeps the path as it came.
		URL: &url.URL{Opaque: "//host" + path, Host: s.r.Host, RawQuery: s.query.Encode()},
	}
	for _, name := range s.headers {
		switch canonical := http.CanonicalHeaderKey(name); name {
		case "host":
		case "content-length":
			r.ContentLength = s.r.ContentLength
		case "transfer-encoding":
			return nil, fmt.Errorf("transfer-encoding is signed")
		default:
			r.Header[canonical] = slices.Clone(s.r.Header[canonical])
		}
	}
	credentials := aws.Credentials{AccessKeyID: s.Key.ID, SecretAccessKey: s.secret}
	// A signer of its own each time: the signer's cache of derived keys is asked
	// by ID and day only.
	signer := v4.NewSigner(func(o *v4.SignerOptions) { o.DisableHeaderHoisting = true })
	if s.presigned {
		signed, _, err := signer.PresignHTTP(context.Background(), credentials, r, payloadHash, s.scope.Service, s.scope.Region, s.signedAt)
		if err != nil {
			return nil, fmt.Errorf("signing: %w", err)
		}
		_, signature, _ := strings.Cut(signed, "&X-Amz-Signature=")
		return hex.DecodeString(signature)
	}
	if err := signer.SignHTTP(context.Background(), credentials, r, payloadHash, s.scope.Service, s.scope.Region, s.signedAt); err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	_, signature, _ := strings.Cut(r.Header.Get("Authorization"), "Signature=")
	return hex.DecodeString(signature)
}
