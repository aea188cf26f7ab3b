package api

import (
	"context"
	"strconv"
	"time"
	"unicode"

	"connectrpc.com/connect/v2"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
	"github.com/blixard/blixard/internal/state"
)

func itoa(n int) string { return strconv.Itoa(n) }

const (
	maxKeyBytes   = 256
	maxActorBytes = 64
)

// change proposes a command, or with dryRun tells what it would do.
func (h *Handler) change(ctx context.Context, key string, dryRun bool, command state.Command) (*blixardv1.Change, error) {
	out, err := h.outcome(ctx, key, dryRun, command)
	if err != nil {
		return nil, err
	}
	return changeMessage(out, dryRun), nil
}

func changeMessage(out state.Outcome, dryRun bool) *blixardv1.Change {
	return &blixardv1.Change{Version: out.Version, Index: out.Index, Noop: out.Noop, DryRun: dryRun}
}

// outcome is change with the command's own answer.
func (h *Handler) outcome(ctx context.Context, key string, dryRun bool, command state.Command) (state.Outcome, error) {
	key, err := keyOf(ctx, key)
	if err != nil {
		return state.Outcome{}, err
	}
	e := state.Envelope{Key: key, NowMS: time.Now().UnixMilli(), Actor: actor(ctx), Command: command}
	if !dryRun {
		return h.opt.Backend.Propose(ctx, e)
	}
	view, err := h.opt.Backend.ReadView(ctx)
	if err != nil {
		return state.Outcome{}, err
	}
	result := view.Try(e)
	if result.Err != nil {
		return state.Outcome{}, result.Err
	}
	return result.Outcome, nil
}

// keyOf is the idempotency key of a request: its own, the header's, or a new
// one, so that the proposal itself can be repeated.
func keyOf(ctx context.Context, key string) (string, error) {
	if key == "" {
		if info, ok := connect.CallInfoForServerContext(ctx); ok {
			key = info.RequestHeader().Get(client.KeyHeader)
		}
	}
	if key == "" {
		return client.NewKey(), nil
	}
	if len(key) > maxKeyBytes || !printable(key) {
		return "", blixard.Invalid("idempotencyKey", "", "the idempotency key must have 1 to %d printable characters", maxKeyBytes)
	}
	return key, nil
}

func printable(s string) bool {
	for _, r := range s {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			return false
		}
	}
	return true
}

// actor is who wants a change, as the caller says.
func actor(ctx context.Context) string {
	if info, ok := connect.CallInfoForServerContext(ctx); ok {
		if a := info.RequestHeader().Get(client.ActorHeader); a != "" && len(a) <= maxActorBytes && printable(a) {
			return a
		}
	}
	return "operator"
}

// view is the view that a read of that consistency is answered from.
func (h *Handler) view(ctx context.Context, c blixardv1.Consistency) (*state.View, error) {
	if c == blixardv1.Consistency_CONSISTENCY_STALE {
		return h.opt.Backend.View(), nil
	}
	return h.opt.Backend.ReadView(ctx)
}
