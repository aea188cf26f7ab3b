package main

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
	"github.com/blixard/blixard/internal/api"
	"github.com/blixard/blixard/internal/config"
	"github.com/blixard/blixard/internal/server"
	"github.com/blixard/blixard/internal/state"
)

// version is set by the linker.
var version = "dev"

// release is this build's version.
func release() string {
	if version != "dev" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return version
}

func serverCommand() *cobra.Command {
	f := new(serverFlags)
	cmd := &cobra.Command{
		Use: "server", Short: "Run this node: replica, agent and API",
		Long: `Run this node: its replica of the cluster's state, the agent that runs its
instances, and the API, all on one port.

A data directory that belongs to no cluster yet founds one, unless --join and
--token (or a former "blixard cluster join") say which cluster to join.`,
		Args: cobra.NoArgs, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := f.load()
			if err != nil {
				return err
			}
			return serve(cmd.Context(), cfg, cmd.ErrOrStderr())
		},
	}
	f.bind(cmd)
	return cmd
}

// serve makes this node a member if it is none, and runs it.
func serve(ctx context.Context, cfg config.Config, stderr io.Writer) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	base, closeLog, err := newLog(cfg, stderr)
	if err != nil {
		return err
	}
	defer closeLog()
	named := func(node string) *slog.Logger { return base.With("node_id", node) }
	log := named(cfg.Cluster.NodeID)
	if unused := cfg.Unused(); len(unused) > 0 {
		log.Warn("settings without effect in this release", "event", "settings_unused", "keys", unused)
	}
	id, err := server.ReadIdentity(cfg.Cluster.DataDir)
	if err == nil {
		log = named(string(id.Name)) // who it is was decided when it became a member
	}
	switch {
	case errors.Is(err, server.ErrNoIdentity) && len(cfg.Cluster.Join) > 0:
		id, err = joinUntil(ctx, cfg, log)
	case errors.Is(err, server.ErrNoIdentity):
		id, err = server.Found(cfg.Cluster.DataDir, blixard.NodeName(cfg.Cluster.NodeID))
	case err == nil && id.Name != blixard.NodeName(cfg.Cluster.NodeID) && cfg.Cluster.NodeID != config.Default().Cluster.NodeID:
		err = &blixard.Error{
			Code: blixard.CodeConflict, Message: fmt.Sprintf("%s belongs to the node %s, not to %s", cfg.Cluster.DataDir, id.Name, cfg.Cluster.NodeID),
			Hint: "a node keeps its name; give another --data-dir for another node",
		}
	}
	if err == nil {
		err = server.CheckLog(cfg.Cluster.DataDir, id)
	}
	if err == nil {
		err = forgetJoin(cfg.Cluster.DataDir)
	}
	if err != nil {
		log.Error("the server does not start", "event", "server_failed", "error", err)
		return err
	}
	cfg.Cluster.NodeID = string(id.Name)
	err = runNode(ctx, cfg, id, log)
	if left, ok := errors.AsType[leftError](err); ok {
		// That is what was asked for, so it is no failure. A further start is one.
		log.Warn("the server ends", "event", "server_left", "reason", left.error)
		fmt.Fprintln(stderr, "blixard:", left.error)
		return nil
	}
	if err != nil {
		log.Error("the server ends", "event", "server_failed", "error", err)
		return err
	}
	return nil
}

// newLog makes the structured log with the field names of docs/administrator-guide.
func newLog(cfg config.Config, stderr io.Writer) (*slog.Logger, func(), error) {
	out, closeLog := stderr, func() {}
	if cfg.Cluster.LogFile != "" {
		f, err := os.OpenFile(cfg.Cluster.LogFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
		if err != nil {
			return nil, nil, fmt.Errorf("opening the log file: %w", err)
		}
		out, closeLog = f, func() {
			if err := f.Close(); err != nil {
				fmt.Fprintln(stderr, "closing the log file:", err)
			}
		}
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(cfg.Cluster.LogLevel)); err != nil {
		return nil, nil, fmt.Errorf("reading the log level: %w", err)
	}
	opt := &slog.HandlerOptions{Level: level, ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && a.Key == slog.TimeKey {
			a.Key = "timestamp"
		}
		if e, ok := a.Value.Any().(error); ok {
			a.Value = slog.StringValue(e.Error())
		}
		return a
	}}
	var h slog.Handler = slog.NewJSONHandler(out, opt)
	if cfg.Cluster.LogFormat == "text" {
		h = slog.NewTextHandler(out, opt)
	}
	return slog.New(h), closeLog, nil
}

func advertise(cfg config.Config) string {
	if cfg.Cluster.Advertise != "" {
		return cfg.Cluster.Advertise
	}
	return cfg.Cluster.Listen
}

func identityOf(cfg config.Config) state.NodeIdentity {
	id := state.NodeIdentity{
		Name: blixard.NodeName(cfg.Cluster.NodeID), Address: advertise(cfg), PublishAddress: cfg.Network.PublishAddress, Zone: cfg.Cluster.Zone,
		Roles: cfg.Cluster.Roles, Witness: cfg.Cluster.Witness,
	}
	for k, v := range cfg.Cluster.Labels {
		id.Labels = append(id.Labels, blixard.Label{Key: k, Value: v})
	}
	slices.SortFunc(id.Labels, func(a, b blixard.Label) int { return strings.Compare(a.Key, b.Key) })
	return id
}

// firstTokenLife is how long the token that a founding prints lets nodes join.
const firstTokenLife = 24 * time.Hour

// firstSecret is a founder's first join token: derived, so that it can be
// printed before there is a cluster to ask. Its form is that of all tokens.
func firstSecret(id server.Identity) (tokenID, secret string) {
	derive := func(what string) []byte {
		sum := sha256.Sum256([]byte("blixard first join token 2 " + what + " " + id.Secret))
		return sum[:]
	}
	return hex.EncodeToString(derive("id")[:8]), base64.RawURLEncoding.EncodeToString(derive("secret"))
}

func firstToken(id server.Identity) state.Token {
	tokenID, secret := firstSecret(id)
	sum := sha256.Sum256([]byte(secret))
	return state.Token{ID: tokenID, Hash: hex.EncodeToString(sum[:]), ExpiresMS: time.Now().Add(firstTokenLife).UnixMilli(), UsesLeft: -1}
}

// joinUntil joins, trying again while no member answers.
func joinUntil(ctx context.Context, cfg config.Config, log *slog.Logger) (server.Identity, error) {
	for {
		id, err := join(ctx, cfg, false, io.Discard)
		if err == nil || blixard.CodeOf(err) != blixard.CodeUnavailable || ctx.Err() != nil {
			return id, err
		}
		log.Warn("no member answers, trying again", "event", "join_retry", "error", err)
		select {
		case <-ctx.Done():
			return id, ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

// join makes this node a member and writes down who it is; with replace in
// place of whom the directory was of. The idempotency key is kept on disk: a
// join whose answer was lost is taken up, not repeated.
func join(ctx context.Context, cfg config.Config, replace bool, words io.Writer) (server.Identity, error) {
	var none server.Identity
	token, at, _ := strings.Cut(cfg.Cluster.Token, "@")
	members := cfg.Cluster.Join
	if at != "" {
		members = append(slices.Clone(members), strings.Split(at, ",")...)
	}
	if token == "" {
		return none, blixard.Invalid("token", "make one on a member with `blixard cluster token create`", "joining needs a join token (--token)")
	}
	if _, _, err := api.ParseToken(token); err != nil {
		return none, err
	}
	if len(members) == 0 {
		return none, blixard.Invalid("join", "give --join host:port", "the token names no member to join")
	}
	c, err := client.New(client.Options{Addresses: members, UserAgent: "blixard-join"})
	if err != nil {
		return none, err
	}
	defer c.Close()
	dir := cfg.Cluster.DataDir
	keyPath := filepath.Join(dir, "join.key")
	if err := reachMember(ctx, c, keyPath); err != nil {
		return none, fmt.Errorf("joining the cluster at %s: %w", strings.Join(members, ", "), err)
	}
	made := firstMissing(dir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return none, fmt.Errorf("making the data directory: %w", err)
	}
	key, err := joinKey(keyPath)
	if err != nil {
		return none, err
	}
	id := identityOf(cfg)
	labels := map[string]string{}
	for _, l := range id.Labels {
		labels[l.Key] = l.Value
	}
	m, err := c.Join(ctx, &blixardv1.JoinRequest{
		Token: token, Replace: replace, IdempotencyKey: key,
		Node: &blixardv1.NodeIdentity{Name: string(id.Name), Address: id.Address, PublishAddress: id.PublishAddress, Zone: id.Zone, Labels: labels, Roles: id.Roles, Witness: id.Witness},
	})
	if err != nil {
		if blixard.CodeOf(err) == blixard.CodeUnavailable {
			return none, &blixard.Error{
				Code: blixard.CodeUnavailable, Message: fmt.Sprintf("joining the cluster at %s: %s; it may have taken this node all the same", strings.Join(members, ", "), blixardv1.AsError(err).Message),
				Hint: "run it again with the same arguments: " + keyPath + " has it taken up, not repeated",
			}
		}
		// Refused for good: the next try is a new one, and nothing is left of this.
		return none, errors.Join(fmt.Errorf("joining the cluster at %s: %w", strings.Join(members, ", "), err), os.Remove(keyPath), removeMade(made, dir))
	}
	out := server.Identity{ClusterID: m.GetClusterId(), Name: id.Name, RaftID: m.GetRaftId(), Secret: m.GetSecret()}
	for _, p := range m.GetMembers() {
		if p.GetRaftId() != out.RaftID {
			out.Peers = append(out.Peers, server.Member{RaftID: p.GetRaftId(), Address: p.GetAddress()})
		}
	}
	if replace {
		aside, err := server.ReplaceIdentity(dir, out)
		if err != nil {
			return none, err
		}
		if aside != "" {
			fmt.Fprintf(words, "What this node knew before is set aside in %s.\n", aside)
		}
	} else if err := server.WriteIdentity(dir, out); err != nil {
		return none, err
	}
	return out, forgetJoin(dir)
}

// reachMember tells whether a member answers, before anything is written for a
// join. A join under way is taken up without.
func reachMember(ctx context.Context, c *client.Client, keyPath string) error {
	if _, err := os.Stat(keyPath); err == nil {
		return nil
	}
	// It is asked without the cluster's secret: that it refuses to say is enough.
	if _, err := c.GetHealth(ctx, &blixardv1.GetHealthRequest{}); err != nil && blixard.CodeOf(err) != blixard.CodeDenied {
		return err
	}
	return nil
}

// firstMissing is the topmost directory that would have to be made for dir, ""
// when dir is there.
func firstMissing(dir string) string {
	missing := ""
	for at := filepath.Clean(dir); ; at = filepath.Dir(at) {
		if _, err := os.Stat(at); !errors.Is(err, os.ErrNotExist) || at == filepath.Dir(at) {
			return missing
		}
		missing = at
	}
}

// removeMade removes the empty directories from dir up to made, which is ""
// when there is none.
func removeMade(made, dir string) error {
	if made == "" {
		return nil
	}
	for at := filepath.Clean(dir); ; at = filepath.Dir(at) {
		if err := os.Remove(at); err != nil || at == made {
			return err
		}
	}
}

// forgetJoin ends a join for good: its key must never be used again, since the
// same answer would make this node go on under a raft ID it had before.
func forgetJoin(dir string) error {
	path := filepath.Join(dir, "join.key")
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		return nil // nothing is written then: the disk may be read-only
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("forgetting the key of the join: %w", err)
	}
	return nil
}

// joinKey reads the key of a join under way, or makes one.
func joinKey(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err == nil && len(b) > 0 {
		return string(b), nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("reading the key of a former join: %w", err)
	}
	key := "join-" + server.RandomID()
	if err := os.WriteFile(path, []byte(key), 0o600); err != nil {
		return "", fmt.Errorf("keeping the key of this join: %w", err)
	}
	return key, nil
}
