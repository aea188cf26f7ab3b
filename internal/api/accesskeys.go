package api

import (
	"context"
	"time"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// access implements AccessService.
type access struct{ *Handler }

var errNoKeys = blixard.Errorf(blixard.CodeRefused, "this node makes no access keys")

// Keys makes access keys. Errors are *blixard.Error.
type Keys interface {
	// Create makes a key for a request, which its idempotency key names, and tells
	// the secret.
	Create(ctx context.Context, requestKey, actor, name, role string, expiresIn time.Duration) (blixard.AccessKey, string, error)
	Revoke(ctx context.Context, requestKey, actor, id string, dryRun bool) (*blixardv1.Change, error)
}

func (h access) CreateAccessKey(ctx context.Context, req *blixardv1.CreateAccessKeyRequest) (*blixardv1.CreateAccessKeyResponse, error) {
	if h.opt.Keys == nil {
		return nil, errNoKeys
	}
	key, err := keyOf(ctx, req.IdempotencyKey)
	if err != nil {
		return nil, err
	}
	if req.ExpiresInMs < 0 {
		return nil, blixard.Invalid("expiresInMs", "0 is never", "expiresInMs is %d; it must not be negative", req.ExpiresInMs)
	}
	k, secret, err := h.opt.Keys.Create(ctx, key, actor(ctx), req.Name, req.Role, time.Duration(req.ExpiresInMs)*time.Millisecond)
	if err != nil {
		return nil, err
	}
	return &blixardv1.CreateAccessKeyResponse{Key: keyMessage(&k), Secret: secret}, nil
}

func (h access) ListAccessKeys(ctx context.Context, _ *blixardv1.ListAccessKeysRequest) (*blixardv1.ListAccessKeysResponse, error) {
	view, err := h.opt.Backend.ReadView(ctx)
	if err != nil {
		return nil, err
	}
	answer := &blixardv1.ListAccessKeysResponse{}
	view.AccessKeys(func(k *blixard.AccessKey) bool {
		answer.Keys = append(answer.Keys, keyMessage(k))
		return true
	})
	return answer, nil
}

func (h access) RevokeAccessKey(ctx context.Context, req *blixardv1.RevokeAccessKeyRequest) (*blixardv1.Change, error) {
	if h.opt.Keys == nil {
		return nil, errNoKeys
	}
	key, err := keyOf(ctx, req.IdempotencyKey)
	if err != nil {
		return nil, err
	}
	return h.opt.Keys.Revoke(ctx, key, actor(ctx), req.Id, req.DryRun)
}

func keyMessage(k *blixard.AccessKey) *blixardv1.AccessKey {
	return &blixardv1.AccessKey{Id: k.ID, Name: k.Name, Role: k.Role, CreatedMs: k.CreatedMS, ExpiresMs: k.ExpiresMS, RevokedMs: k.RevokedMS}
}
