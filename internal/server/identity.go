package server

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/raftlog"
	"github.com/blixard/blixard/internal/replica"
)

// Identity is who this node is in which cluster. It is written once, before
// the node's log is, and read at every start: a restart, with or without a join
// token at hand, never makes a node anybody else.
type Identity struct {
	ClusterID string           `json:"cluster_id"`
	Name      blixard.NodeName `json:"node_id"`
	RaftID    uint64           `json:"raft_id"`
	// Secret authenticates members to each other and the operator to the API.
	Secret string `json:"secret"`
	// Founder: this node began the cluster.
	Founder bool `json:"founder"`
	// Peers are the members known when the node joined, until its own state
	// knows better.
	Peers []Member `json:"peers,omitempty"`
}

// Member is where a node can be reached.
type Member struct {
	RaftID  uint64 `json:"raft_id"`
	Address string `json:"address"`
}

// ErrNoIdentity: the data directory belongs to no cluster yet.
var ErrNoIdentity = errors.New("this node belongs to no cluster yet")

const identityName = "node.json"

func identityPath(dir string) string { return filepath.Join(dir, identityName) }

// ReadIdentity reads the identity in a data directory; ErrNoIdentity without.
func ReadIdentity(dir string) (Identity, error) {
	b, err := os.ReadFile(identityPath(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return Identity{}, ErrNoIdentity
	}
	if err != nil {
		return Identity{}, fmt.Errorf("reading the node's identity: %w", err)
	}
	var id Identity
	if err := json.Unmarshal(b, &id); err != nil {
		return Identity{}, fmt.Errorf("the node's identity %s is damaged (%w): restore it from a backup, or remove it and run `blixard cluster join --replace`", identityPath(dir), err)
	}
	if id.RaftID == 0 || id.Name == "" || id.ClusterID == "" {
		return Identity{}, fmt.Errorf("the node's identity %s is incomplete: restore it from a backup, or remove it and run `blixard cluster join --replace`", identityPath(dir))
	}
	return id, nil
}

// WriteIdentity makes an identity durable. It refuses to change one.
func WriteIdentity(dir string, id Identity) error {
	if old, err := ReadIdentity(dir); err == nil {
		return &blixard.Error{
			Code: blixard.CodeExists, Message: fmt.Sprintf("%s belongs to the node %s of cluster %s already", dir, old.Name, old.ClusterID),
			Hint: "start it with `blixard server`, or give another --data-dir",
		}
	} else if !errors.Is(err, ErrNoIdentity) {
		return err
	}
	if has, err := hasLog(dir); err != nil {
		return err
	} else if has {
		return &blixard.Error{
			Code: blixard.CodeExists, Message: fmt.Sprintf("%s holds the raft log of a node, but not %s, which says of which one", dir, identityName),
			Hint: "restore that file, or run `blixard cluster join --replace`, which sets the log aside, or give another --data-dir",
		}
	}
	return putIdentity(dir, id)
}

func putIdentity(dir string, id Identity) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("making the data directory: %w", err)
	}
	b, err := json.MarshalIndent(id, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding the identity: %w", err)
	}
	return WriteDurably(identityPath(dir), append(b, '\n'))
}

// TakeIdentity makes an identity durable whose log is in place already.
func TakeIdentity(dir string, id Identity) error {
	if _, err := ReadIdentity(dir); !errors.Is(err, ErrNoIdentity) {
		return errors.Join(err, fmt.Errorf("%s belongs to a node already", dir))
	}
	return putIdentity(dir, id)
}

// WriteDurably writes a file that is there whole or not at all.
func WriteDurably(path string, b []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".tmp-*")
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	defer os.Remove(tmp.Name()) //nolint:errcheck // gone already when all went well
	_, err = tmp.Write(b)
	if err == nil {
		err = tmp.Chmod(0o600)
	}
	if err == nil {
		err = tmp.Sync()
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	return err
}

// Found makes the identity of the first node of a new cluster.
func Found(dir string, name blixard.NodeName) (Identity, error) {
	id := Identity{ClusterID: "blx-" + randomHex(8), Name: name, RaftID: 1, Secret: randomHex(32), Founder: true}
	return id, WriteIdentity(dir, id)
}

func randomHex(n int) string {
	b := make([]byte, n)
	rand.Read(b) // never fails; it ends the process if the system has no randomness
	return hex.EncodeToString(b)
}

// Prepare gives a founder's empty log its first snapshot, so that from then on
// a founder starts like any other node.
func Prepare(id Identity, opened *raftlog.Opened) error {
	if opened.Snapshot != nil || len(opened.Entries) > 0 || opened.HardState.GetTerm() != 0 || !id.Founder {
		return nil
	}
	boot := replica.NewCluster(id.RaftID)
	view := boot.State.View()
	meta := &raftpb.SnapshotMetadata{ConfState: boot.Conf, Index: new(view.Index), Term: new(view.Term)}
	if err := opened.Log.Install(meta, writeView(view)); err != nil {
		return fmt.Errorf("beginning the log: %w", err)
	}
	if err := opened.Log.Save(boot.HardState, nil, true); err != nil {
		return fmt.Errorf("beginning the log: %w", err)
	}
	opened.Snapshot, opened.HardState, opened.LoadSnapshot = meta, boot.HardState, loadView(view)
	return nil
}

// RandomID is a name that nobody else has.
func RandomID() string { return randomHex(12) }
