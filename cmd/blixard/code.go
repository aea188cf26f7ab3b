package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"slices"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/client"
	"github.com/blixard/blixard/internal/cli"
	"github.com/blixard/blixard/internal/code"
	"github.com/blixard/blixard/internal/state"
)

const (
	codeCopies   = 3 // nodes that keep a zip, as far as there are so many
	codeEvery    = 10 * time.Second
	codeCopyTime = time.Minute
)

// codes are the code packages of the cluster as this node sees them: its own
// store, and others' where that lacks something.
type codes struct {
	store code.Store
	peers func(address string) (*client.Client, error)
	view  func() *state.View
	self  blixard.NodeName
	log   *slog.Logger
}

// others are the other nodes that are in touch, those that are to keep a zip
// first: every node ranks them alike.
func (c *codes) others(digest string) []*blixard.Node {
	all := keepers(c.view(), digest)
	return slices.DeleteFunc(all, func(n *blixard.Node) bool { return n.Name == c.self })
}

// keepers ranks the nodes that may keep a zip by the hash of both: a node that
// comes or goes moves only what it keeps.
func keepers(v *state.View, digest string) []*blixard.Node {
	type ranked struct {
		rank uint64
		node *blixard.Node
	}
	var all []ranked
	v.Nodes(func(n *blixard.Node) bool {
		if n.State == blixard.NodeReady && n.RunsInstances() && !n.Simulated {
			h := fnv.New64a()
			h.Write([]byte(digest + "\x00" + string(n.Name))) // a hash never fails to write
			all = append(all, ranked{h.Sum64(), n})
		}
		return true
	})
	slices.SortFunc(all, func(a, b ranked) int { return cmp.Compare(a.rank, b.rank) })
	out := make([]*blixard.Node, len(all))
	for i := range all {
		out[i] = all[i].node
	}
	return out
}

func answerOf(p code.Package) client.Code {
	return client.Code{Digest: p.Digest, Bytes: p.Bytes, UnzippedBytes: p.UnzippedBytes, Files: p.Files}
}

// PutCopy implements api.Code.
func (c *codes) PutCopy(ctx context.Context, zip io.Reader) (client.Code, error) {
	p, err := c.store.Put(ctx, zip)
	return answerOf(p), err
}

// Put implements api.Code. With other nodes in touch a second one keeps the zip
// before it counts as kept.
func (c *codes) Put(ctx context.Context, zip io.Reader) (client.Code, error) {
	p, err := c.store.Put(ctx, zip)
	if err != nil {
		return client.Code{}, err
	}
	var failed []error
	for _, n := range c.others(p.Digest) {
		err := c.send(ctx, n, p.Digest)
		if err == nil {
			return answerOf(p), nil
		}
		failed = append(failed, fmt.Errorf("%s: %w", n.Name, err))
	}
	if len(failed) > 0 {
		return client.Code{}, &blixard.Error{Code: blixard.CodeUnavailable, Message: fmt.Sprintf("the code is kept on %s, and no other node takes a copy: %v", c.self, errors.Join(failed...)), Hint: "send it again when another node is back"}
	}
	return answerOf(p), nil
}

func (c *codes) send(ctx context.Context, n *blixard.Node, digest string) error {
	ctx, cancel := context.WithTimeout(ctx, codeCopyTime)
	defer cancel()
	r, size, err := c.store.Open(digest)
	if err != nil {
		return err
	}
	defer r.Close()
	data := make([]byte, size)
	if _, err := io.ReadFull(r, data); err != nil {
		return fmt.Errorf("reading the code: %w", err)
	}
	peer, err := c.peers(n.Address)
	if err != nil {
		return err
	}
	defer peer.Close()
	_, err = peer.PutCode(ctx, data)
	return err
}

// Open implements api.Code.
func (c *codes) Open(ctx context.Context, digest string, here bool) (io.ReadCloser, int64, error) {
	if !here {
		if err := c.Ensure(ctx, digest); err != nil {
			return nil, 0, err
		}
	}
	return c.store.Open(digest)
}

// Inspect implements api.Code.
func (c *codes) Inspect(ctx context.Context, digest string, spec blixard.FunctionSpec) (int64, error) {
	if err := c.Ensure(ctx, digest); err != nil {
		return 0, err
	}
	if err := c.store.Inspect(ctx, digest, spec); err != nil {
		return 0, err
	}
	p, err := c.store.Get(digest)
	return p.Bytes, err
}

// Ensure brings a zip to this node. Another node that is asked does not ask on:
// it says what it has.
func (c *codes) Ensure(ctx context.Context, digest string) error {
	if c.store.Has(digest) {
		return nil
	}
	_, err := c.store.Get(digest) // in the store's words, if it is nowhere
	failed := []error{err}
	for _, n := range c.others(digest) {
		err := c.fetch(ctx, n, digest)
		if err == nil {
			return nil
		}
		if blixard.CodeOf(err) != blixard.CodeNotFound {
			failed = append(failed, fmt.Errorf("%s: %w", n.Name, err))
		}
	}
	if len(failed) == 1 {
		return failed[0]
	}
	return &blixard.Error{Code: blixard.CodeUnavailable, Message: fmt.Sprintf("no node could give the code %.12s…: %v", digest, errors.Join(failed[1:]...)), Hint: "are the nodes that keep it out of touch? `blixard cluster status` shows it"}
}

func (c *codes) fetch(ctx context.Context, n *blixard.Node, digest string) error {
	ctx, cancel := context.WithTimeout(ctx, codeCopyTime)
	defer cancel()
	peer, err := c.peers(n.Address)
	if err != nil {
		return err
	}
	defer peer.Close()
	r, _, err := peer.GetCode(ctx, digest)
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = c.store.PutDigest(ctx, digest, r)
	return err
}

// run keeps on this node what it is to keep. The dispatcher lets go of what no
// version names any more.
func (c *codes) run(ctx context.Context) error {
	for tick := time.NewTicker(codeEvery); ; {
		select {
		case <-ctx.Done():
			tick.Stop()
			return nil
		case <-tick.C:
		}
		view := c.view()
		for _, digest := range wantedCode(view) {
			first := keepers(view, digest)
			first = first[:min(len(first), codeCopies)]
			if c.store.Has(digest) || !slices.ContainsFunc(first, func(n *blixard.Node) bool { return n.Name == c.self }) {
				continue
			}
			if err := c.Ensure(ctx, digest); err != nil && ctx.Err() == nil {
				c.log.Warn("a copy of a function's code cannot be had", "component", "code", "event", "code_missing", "digest", digest, "error", err)
			}
		}
	}
}

// wantedCode are the digests that versions name.
func wantedCode(v *state.View) []string {
	var out []string
	v.Functions(func(f *blixard.Function) bool {
		v.FunctionVersions(f.Name, func(fv *blixard.FunctionVersion) bool {
			for ; fv != nil; fv = fv.Previous {
				out = append(out, fv.CodeDigest)
			}
			return true
		})
		return true
	})
	slices.Sort(out)
	return slices.Compact(out)
}

// packCode implements cli.Env.PackCode.
func packCode(_ context.Context, path string) (cli.PackedCode, error) {
	zip, err := code.ZipPath(path)
	return cli.PackedCode{Zip: zip, Runtime: code.Runtime(path)}, err
}
