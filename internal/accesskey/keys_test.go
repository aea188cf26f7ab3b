package accesskey_test

import (
	"strings"
	"testing"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/accesskey"
	"github.com/blixard/blixard/internal/api/apitest"
)

func TestKeys(t *testing.T) {
	b := apitest.New(1).Node("node1")
	at := time.Now()
	key, secret, err := accesskey.Create(t.Context(), b, accesskey.New{Name: "ci", Lifetime: time.Hour, RequestKey: "one", Actor: "test", Now: at})
	if err != nil {
		t.Fatal(err)
	}
	if err := accesskey.CheckID(key.ID); err != nil || len(secret) != 43 || key.Role != accesskey.RoleAdmin || key.ExpiresMS != at.Add(time.Hour).UnixMilli() {
		t.Fatalf("key %+v, secret of %d characters, %v", key, len(secret), err)
	}
	// The repeat of a request whose answer was lost, later.
	again, same, err := accesskey.Create(t.Context(), b, accesskey.New{Name: "ci", Lifetime: time.Hour, RequestKey: "one", Actor: "test", Now: at.Add(time.Second)})
	if err != nil || again.ID != key.ID || same != secret || again.ExpiresMS != key.ExpiresMS {
		t.Errorf("the repeat made %+v, %v", again, err)
	}
	if _, _, err := accesskey.Create(t.Context(), b, accesskey.New{Name: "other", RequestKey: "one", Now: at}); blixard.CodeOf(err) != blixard.CodeConflict {
		t.Errorf("another request under the same key: %v", err)
	}
	other, otherSecret, err := accesskey.Create(t.Context(), b, accesskey.New{Name: "ci", Role: accesskey.RoleInvoke, RequestKey: "two", Actor: "test", Now: at})
	if err != nil || other.ID == key.ID || otherSecret == secret {
		t.Fatalf("a second key: %+v, %v", other, err)
	}

	find := accesskey.KeysOf(b.View)
	if k, s, ok := find(key.ID); !ok || k.Name != "ci" || s != secret {
		t.Errorf("found %+v %v", k, ok)
	}
	for _, id := range []string{"", "BLXA", "AKIAABCDEFGHIJKLMNOP", strings.ToLower(key.ID), "BLXAAAAAAAAAAAAAAAAA"} {
		if _, _, ok := find(id); ok {
			t.Errorf("found %q", id)
		}
	}
	if _, err := accesskey.Revoke(t.Context(), b, key.ID, "three", "test", at); err != nil {
		t.Fatal(err)
	}
	all, err := accesskey.List(t.Context(), b)
	if err != nil || len(all) != 2 {
		t.Fatalf("listed %+v, %v", all, err)
	}
	for _, k := range all {
		if revoked := k.RevokedMS != 0; revoked != (k.ID == key.ID) {
			t.Errorf("%s revoked: %v", k.ID, revoked)
		}
	}
	if _, err := accesskey.Revoke(t.Context(), b, "x", "", "test", at); blixard.CodeOf(err) != blixard.CodeInvalid {
		t.Errorf("revoking x: %v", err)
	}
	if _, err := accesskey.Revoke(t.Context(), b, "BLXAAAAAAAAAAAAAAAAA", "", "test", at); blixard.CodeOf(err) != blixard.CodeNotFound {
		t.Errorf("revoking an unknown key: %v", err)
	}
}

func TestUnusableKeysAreRefused(t *testing.T) {
	b := apitest.New(1).Node("node1")
	for _, n := range []accesskey.New{
		{}, {Name: " "}, {Name: "a\nb"}, {Name: strings.Repeat("a", 129)}, {Name: "a", Role: "amin"}, {Name: "a", Lifetime: -1}, {Name: "a", Lifetime: time.Second},
	} {
		n.Now = time.Now()
		if _, _, err := accesskey.Create(t.Context(), b, n); blixard.CodeOf(err) != blixard.CodeInvalid {
			t.Errorf("%+v: %v", n, err)
		}
	}
}

// The state holds no secret, and who has another cluster's secret makes others.
func TestSecretsComeFromTheCluster(t *testing.T) {
	id := accesskey.NewID("one", "request")
	if accesskey.Secret("one", id) == accesskey.Secret("two", id) || accesskey.NewID("two", "request") == id {
		t.Error("another cluster has the same keys")
	}
	if accesskey.Seal("one", "a") == accesskey.Seal("two", "a") || accesskey.URLID("one", "a") == accesskey.URLID("one", "b") {
		t.Error("seals do not tell clusters or texts apart")
	}
}
