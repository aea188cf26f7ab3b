package accesskey_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/accesskey"
)

const (
	keyID  = "BLXAABCDEFGHIJKLMNOP"
	secret = "a-secret-of-the-tests"
)

var (
	scope = accesskey.Scope{Region: "us-east-1", Service: "lambda"}
	now   = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
)

func keys(change func(*blixard.AccessKey)) accesskey.Keys {
	return func(id string) (blixard.AccessKey, string, bool) {
		key := blixard.AccessKey{ID: keyID, Name: "test", Role: accesskey.RoleAdmin}
		if change != nil {
			change(&key)
		}
		return key, secret, id == keyID
	}
}

// received turns a client's request into the one that a server gets, by sending
// it through a server's reader.
func received(t *testing.T, r *http.Request) *http.Request {
	t.Helper()
	var got *http.Request
	var body []byte
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		got = r.Clone(context.Background())
		body, _ = io.ReadAll(r.Body)
	}))
	defer server.Close()
	host := r.Host
	if host == "" {
		host = r.URL.Host
	}
	r = r.Clone(t.Context())
	r.Host = host
	r.URL.Scheme, r.URL.Host = "http", strings.TrimPrefix(server.URL, "http://")
	answer, err := server.Client().Do(r)
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	got.Body = io.NopCloser(bytes.NewReader(body))
	return got
}

func request(t *testing.T, method, url, body string, change func(*http.Request)) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(r)
	}
	return r
}

func hashOf(body string) string {
	sum := sha256.Sum256([]byte(body))
	return hex.EncodeToString(sum[:])
}

// sign signs as the SDK does.
func sign(t *testing.T, r *http.Request, hash string, at time.Time, key string) *http.Request {
	t.Helper()
	credentials := aws.Credentials{AccessKeyID: keyID, SecretAccessKey: key}
	if err := v4.NewSigner().SignHTTP(t.Context(), credentials, r, hash, "lambda", "us-east-1", at); err != nil {
		t.Fatal(err)
	}
	return r
}

func verify(t *testing.T, r *http.Request, k accesskey.Keys) error {
	t.Helper()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	_, err = accesskey.Verify(r, body, scope, now, k)
	return err
}

const target = "http://lambda.test:9000/2015-03-31/functions/arn%3Aaws%3Alambda%3Aus-east-1%3A000000000000%3Afunction%3Aa/invocations?Qualifier=%24LATEST&x=a%2Fb%20c"

func TestSignedRequestsAreTaken(t *testing.T) {
	for name, change := range map[string]func(*http.Request){
		"plain": nil,
		"headers": func(r *http.Request) {
			r.Header.Set("Content-Type", "application/json")
			r.Header.Set("X-Amz-Invocation-Type", "Event")
			r.Header.Add("X-Amz-Meta-Many", "  one   two ")
			r.Header.Add("X-Amz-Meta-Many", "three")
			r.Header.Set("User-Agent", "not signed")
		},
		"odd path": func(r *http.Request) {
			r.URL.Path, r.URL.RawPath = "/functions/a:b/c+d e", "/functions/a:b%2Fc+d%20e"
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := sign(t, request(t, "POST", target, "{}", change), hashOf("{}"), now, secret)
			if err := verify(t, received(t, r), keys(nil)); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("unsigned payload", func(t *testing.T) {
		r := request(t, "POST", target, "{}", func(r *http.Request) { r.Header.Set("X-Amz-Content-Sha256", accesskey.UnsignedPayload) })
		if err := verify(t, received(t, sign(t, r, accesskey.UnsignedPayload, now, secret)), keys(nil)); err != nil {
			t.Error(err)
		}
	})
	t.Run("hash in the head", func(t *testing.T) {
		r := request(t, "POST", target, "{}", func(r *http.Request) { r.Header.Set("X-Amz-Content-Sha256", hashOf("{}")) })
		if err := verify(t, received(t, sign(t, r, hashOf("{}"), now, secret)), keys(nil)); err != nil {
			t.Error(err)
		}
	})
}

// The examples of AWS' own test suite for signers.
func TestVectors(t *testing.T) {
	known := func(id string) (blixard.AccessKey, string, bool) {
		return blixard.AccessKey{ID: id}, "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", id == "AKIDEXAMPLE"
	}
	at := time.Date(2015, 8, 30, 12, 36, 0, 0, time.UTC)
	for name, v := range map[string]struct{ method, uri, signature string }{
		"get-vanilla":                      {"GET", "/", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"},
		"post-vanilla":                     {"POST", "/", "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"},
		"get-vanilla-query-order-key-case": {"GET", "/?Param2=value2&Param1=value1", "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500"},
	} {
		r := httptest.NewRequestWithContext(t.Context(), v.method, v.uri, nil)
		r.Host = "example.amazonaws.com"
		r.Header.Set("X-Amz-Date", "20150830T123600Z")
		r.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature="+v.signature)
		if _, err := accesskey.Verify(r, nil, accesskey.Scope{Region: "us-east-1", Service: "service"}, at, known); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestForgedRequestsAreRefused(t *testing.T) {
	const invalid, incomplete, unrecognized = "InvalidSignatureException", "IncompleteSignatureException", "UnrecognizedClientException"
	authorization := func(old, repl string) func(*http.Request) {
		return func(r *http.Request) {
			r.Header.Set("Authorization", strings.Replace(r.Header.Get("Authorization"), old, repl, 1))
		}
	}
	for name, c := range map[string]struct {
		secret string
		at     time.Time
		key    func(*blixard.AccessKey)
		before func(*http.Request) // the client signs it
		after  func(*http.Request) // what the server gets
		want   string
	}{
		"nothing":             {after: func(r *http.Request) { r.Header.Del("Authorization") }, want: "MissingAuthenticationTokenException"},
		"wrong secret":        {secret: "other", want: invalid},
		"revoked":             {key: func(k *blixard.AccessKey) { k.RevokedMS = 1 }, want: unrecognized},
		"expired":             {key: func(k *blixard.AccessKey) { k.ExpiresMS = now.UnixMilli() }, want: "ExpiredTokenException"},
		"not expired":         {key: func(k *blixard.AccessKey) { k.ExpiresMS = now.UnixMilli() + 1 }},
		"unknown key":         {after: authorization(keyID, "BLXAAAAAAAAAAAAAAAAA"), want: unrecognized},
		"session token":       {before: func(r *http.Request) { r.Header.Set("X-Amz-Security-Token", "x") }, want: unrecognized},
		"wrong region":        {after: authorization("us-east-1", "eu-west-1"), want: invalid},
		"wrong service":       {after: authorization("/lambda/", "/s3/"), want: invalid},
		"wrong day":           {after: authorization("/20261124/", "/20261123/"), want: invalid},
		"wrong terminator":    {after: authorization("/aws4_request", "/aws4"), want: invalid},
		"at the edge":         {at: now.Add(-5 * time.Minute)},
		"too old":             {at: now.Add(-5*time.Minute - time.Second), want: invalid},
		"ahead":               {at: now.Add(5 * time.Minute)},
		"too far ahead":       {at: now.Add(5*time.Minute + time.Second), want: invalid},
		"other body":          {after: func(r *http.Request) { r.Body = io.NopCloser(strings.NewReader("[]")) }, want: invalid},
		"other method":        {after: func(r *http.Request) { r.Method = "PUT" }, want: invalid},
		"other query":         {after: func(r *http.Request) { r.URL.RawQuery += "&y=1" }, want: invalid},
		"malformed query":     {after: func(r *http.Request) { r.URL.RawQuery += "&y=1;z" }, want: incomplete},
		"other path":          {after: func(r *http.Request) { r.RequestURI = strings.Replace(r.RequestURI, "invocations", "code", 1) }, want: invalid},
		"other host":          {after: func(r *http.Request) { r.Host = "other" }, want: invalid},
		"added amz header":    {after: func(r *http.Request) { r.Header.Set("X-Amz-Invocation-Type", "Event") }, want: invalid},
		"changed amz header":  {before: func(r *http.Request) { r.Header.Set("X-Amz-Log-Type", "None") }, after: func(r *http.Request) { r.Header.Set("X-Amz-Log-Type", "Tail") }, want: invalid},
		"host not signed":     {after: authorization("host;", ""), want: invalid},
		"two authorizations":  {after: func(r *http.Request) { r.Header.Add("Authorization", "x") }, want: incomplete},
		"other algorithm":     {after: authorization("AWS4-HMAC-SHA256", "AWS4-ECDSA-P256-SHA256"), want: incomplete},
		"no signature":        {after: authorization("Signature=", "Signatur="), want: incomplete},
		"signature twice":     {after: authorization("Signature=", "Signature=00, Signature="), want: incomplete},
		"short signature":     {after: func(r *http.Request) { a := r.Header.Get("Authorization"); r.Header.Set("Authorization", a[:len(a)-2]) }, want: incomplete},
		"no date":             {after: func(r *http.Request) { r.Header.Del("X-Amz-Date") }, want: incomplete},
		"odd date":            {after: func(r *http.Request) { r.Header.Set("X-Amz-Date", "yesterday") }, want: incomplete},
		"hash of other body":  {before: func(r *http.Request) { r.Header.Set("X-Amz-Content-Sha256", hashOf("{}")) }, after: func(r *http.Request) { r.Body = io.NopCloser(strings.NewReader("[]")) }, want: invalid},
		"chunks":              {before: func(r *http.Request) { r.Header.Set("X-Amz-Content-Sha256", "STREAMING-AWS4-HMAC-SHA256-PAYLOAD") }, want: invalid},
		"odd hash":            {before: func(r *http.Request) { r.Header.Set("X-Amz-Content-Sha256", "abc") }, want: incomplete},
		"bearer":              {after: func(r *http.Request) { r.Header.Set("Authorization", "Bearer x") }, want: incomplete},
		"endless":             {after: func(r *http.Request) { r.Header.Set("Authorization", "AWS4-HMAC-SHA256 "+strings.Repeat("a", 9000)) }, want: incomplete},
		"header list too big": {after: authorization("host;", "host;"+strings.Repeat("a;", 70)), want: incomplete},
	} {
		t.Run(name, func(t *testing.T) {
			if c.secret == "" {
				c.secret = secret
			}
			if c.at.IsZero() {
				c.at = now
			}
			r := received(t, sign(t, request(t, "POST", target, "{}", c.before), hashOf("{}"), c.at, c.secret))
			if c.after != nil {
				c.after(r)
			}
			err := verify(t, r, keys(c.key))
			d, ok := errors.AsType[*accesskey.Denial](err)
			switch {
			case c.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case c.want != "" && !ok:
				t.Errorf("not refused, want %s: %v", c.want, err)
			case c.want != "" && d.Type != c.want:
				t.Errorf("%s (%s), want %s", d.Type, d.Message, c.want)
			}
		})
	}
}

func TestPresigned(t *testing.T) {
	presign := func(expires string, at time.Time) *http.Request {
		r := request(t, "GET", "http://lambda.test:9000/2015-03-31/functions/a%3Ab?MaxItems=1", "", func(r *http.Request) {
			q := r.URL.Query()
			if expires != "" {
				q.Set("X-Amz-Expires", expires)
			}
			r.URL.RawQuery = q.Encode()
		})
		credentials := aws.Credentials{AccessKeyID: keyID, SecretAccessKey: secret}
		uri, _, err := v4.NewSigner().PresignHTTP(t.Context(), credentials, r, accesskey.EmptyHash, "lambda", "us-east-1", at)
		if err != nil {
			t.Fatal(err)
		}
		return received(t, request(t, "GET", uri, "", nil))
	}
	for name, c := range map[string]struct {
		expires string
		at      time.Time
		change  func(*http.Request)
		ok      bool
	}{
		"good":            {expires: "60", at: now, ok: true},
		"no time":         {at: now, ok: true},
		"last second":     {expires: "3600", at: now.Add(-time.Hour), ok: true},
		"over":            {expires: "3600", at: now.Add(-time.Hour - time.Second)},
		"over by default": {at: now.Add(-6 * time.Minute)},
		"too long":        {expires: "604801", at: now},
		"none":            {expires: "0", at: now},
		"not yet":         {expires: "60", at: now.Add(6 * time.Minute)},
		"longer":          {expires: "60", at: now, change: func(r *http.Request) { r.URL.RawQuery = strings.Replace(r.URL.RawQuery, "Expires=60", "Expires=61", 1) }},
		"twice":           {expires: "60", at: now, change: func(r *http.Request) { r.URL.RawQuery += "&X-Amz-Signature=00" }},
		"with a header":   {expires: "60", at: now, change: func(r *http.Request) { r.Header.Set("Authorization", "x") }},
		"more":            {expires: "60", at: now, change: func(r *http.Request) { r.URL.RawQuery += "&Marker=x" }},
		"amz header":      {expires: "60", at: now, change: func(r *http.Request) { r.Header.Set("X-Amz-Log-Type", "Tail") }},
	} {
		t.Run(name, func(t *testing.T) {
			r := presign(c.expires, c.at)
			if c.change != nil {
				c.change(r)
			}
			if err := verify(t, r, keys(nil)); (err == nil) != c.ok {
				t.Errorf("err %v, want ok %v", err, c.ok)
			}
		})
	}
}

// FuzzParse: what strangers send can neither panic nor get in.
func FuzzParse(f *testing.F) {
	f.Add("AWS4-HMAC-SHA256 Credential="+keyID+"/20261124/us-east-1/lambda/aws4_request, SignedHeaders=host;x-amz-date, Signature="+strings.Repeat("0", 64), "20261124T120000Z", "a=b", "")
	f.Add("", "", "X-Amz-Signature="+strings.Repeat("0", 64)+"&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential="+keyID+"/20261124/us-east-1/lambda/aws4_request&X-Amz-SignedHeaders=host&X-Amz-Date=20261124T120000Z&X-Amz-Expires=9", "UNSIGNED-PAYLOAD")
	f.Fuzz(func(t *testing.T, authorization, date, query, hash string) {
		r := httptest.NewRequestWithContext(t.Context(), "GET", "/", nil)
		r.URL.RawQuery = query
		for name, value := range map[string]string{"Authorization": authorization, "X-Amz-Date": date, "X-Amz-Content-Sha256": hash} {
			if value != "" {
				r.Header.Set(name, value)
			}
		}
		if _, err := accesskey.Verify(r, nil, scope, now, keys(nil)); err == nil {
			t.Error("a stranger got in")
		}
	})
}
