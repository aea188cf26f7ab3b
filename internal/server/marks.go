package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/blixard/blixard"
)

// LogDir is where a node's raft log is.
func LogDir(dir string) string { return filepath.Join(dir, "raft") }

// A mark beside the identity. It counts only for the raft ID it names, so that
// a new identity need not clear the marks of the one before.
type mark struct {
	RaftID uint64 `json:"raft_id"`
	Why    string `json:"why,omitempty"`
}

const (
	// begunMark: the log of this raft ID has begun. A node whose log is gone
	// must not go on under its raft ID: it may have voted, and promised to keep
	// entries that others count on.
	begunMark = "log.json"
	// removedMark: the other members said that this raft ID is removed.
	removedMark = "removed.json"
)

func readMark(dir, name string) (mark, error) {
	var m mark
	b, err := os.ReadFile(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return m, nil
	}
	if err != nil {
		return m, fmt.Errorf("reading what is known of the log: %w", err)
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return m, fmt.Errorf("%s is damaged (%w): move it away if this node's raft log is sound", filepath.Join(dir, name), err)
	}
	return m, nil
}

func writeMark(dir, name string, m mark) error {
	b, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("encoding a mark: %w", err)
	}
	return WriteDurably(filepath.Join(dir, name), append(b, '\n'))
}

// hasLog tells whether dir holds a raft log, sound or not.
func hasLog(dir string) (bool, error) {
	names, err := os.ReadDir(LogDir(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("looking for a raft log: %w", err)
	}
	for _, n := range names {
		if strings.HasSuffix(n.Name(), ".wal") || strings.HasSuffix(n.Name(), ".snap") {
			return true, nil
		}
	}
	return false, nil
}

// CheckLog refuses to start a node that was removed, whose log is gone, or
// whose log is another node's. It must be asked before the log is opened, which
// makes one where there is none.
func CheckLog(dir string, id Identity) error {
	removed, err := readMark(dir, removedMark)
	if err != nil {
		return err
	}
	if removed.RaftID == id.RaftID {
		return removedError(id, dir, removed.Why)
	}
	has, err := hasLog(dir)
	if err != nil {
		return err
	}
	begun, err := readMark(dir, begunMark)
	switch {
	case err != nil:
		return err
	case begun.RaftID == id.RaftID && !has:
		return &blixard.Error{
			Code:    blixard.CodeRefused,
			Message: fmt.Sprintf("the raft log of %s is gone from %s: without it this node cannot know what it voted for and promised to keep, so it must not go on as the member it was", id.Name, LogDir(dir)),
			Hint:    "restore that directory, or " + JoinAgain(dir, id) + "; if no other node is left: `blixard cluster recover --from SNAPSHOT`",
		}
	case begun.RaftID != 0 && begun.RaftID != id.RaftID && has:
		return &blixard.Error{
			Code: blixard.CodeRefused, Message: fmt.Sprintf("the raft log in %s is not of the node that %s names (it began as raft ID %d, not %d)", LogDir(dir), identityPath(dir), begun.RaftID, id.RaftID),
			Hint: "put the right directory back, or " + JoinAgain(dir, id),
		}
	}
	return nil
}

// JoinAgain is how a node whose copy is lost gets a new one.
func JoinAgain(dir string, id Identity) string {
	return "fetch everything anew from the other nodes: make a token there with `blixard cluster token create --node-id " + string(id.Name) + "`, and run here, with this node's --listen, `blixard cluster join --replace --data-dir " + dir + " --token TOKEN --join HOST:PORT`"
}

// MarkLog notes that the log of id has begun. It comes after Prepare and before
// anything is sent.
func MarkLog(dir string, id Identity) error {
	m, err := readMark(dir, begunMark)
	if err != nil || m.RaftID == id.RaftID {
		return err
	}
	return writeMark(dir, begunMark, mark{RaftID: id.RaftID})
}

// MarkRemoved notes that id was removed from its cluster, so that it does not
// ask again at every start. It returns the error to end with.
func MarkRemoved(dir string, id Identity, why string) error {
	return errors.Join(removedError(id, dir, why), writeMark(dir, removedMark, mark{RaftID: id.RaftID, Why: why}))
}

// Removed tells whether id was removed from its cluster.
func Removed(dir string, id Identity) (bool, error) {
	m, err := readMark(dir, removedMark)
	return m.RaftID == id.RaftID && err == nil, err
}

func removedError(id Identity, dir, why string) *blixard.Error {
	return &blixard.Error{
		Code: blixard.CodeRefused, Message: fmt.Sprintf("the node %s was removed from the cluster %s (%s); its server does not run any more", id.Name, id.ClusterID, why),
		Hint: "nothing is left to do if that was meant; to make this machine a node again, make a token on a member with `blixard cluster token create`, and run here, with this node's --listen, `blixard cluster join --data-dir " + dir + " --token TOKEN --join HOST:PORT`",
	}
}

// ReplaceIdentity makes dir the directory of id in place of whom it was of: the
// log is set aside, not deleted. The caller holds the log. A crash in the
// middle leaves a node that refuses to start and says to join again.
func ReplaceIdentity(dir string, id Identity) (aside string, err error) {
	has, err := hasLog(dir)
	if err != nil {
		return "", err
	}
	if has {
		if aside, err = SetAside(dir); err != nil {
			return "", err
		}
	}
	return aside, putIdentity(dir, id)
}

// SetAside renames the log's directory, which may be damaged, and syncs.
func SetAside(dir string) (aside string, err error) {
	aside = LogDir(dir) + ".replaced-" + time.Now().UTC().Format("20060102T150405.000")
	if err := os.Rename(LogDir(dir), aside); err != nil {
		return "", fmt.Errorf("setting the old log aside: %w", err)
	}
	return aside, syncDir(dir)
}
