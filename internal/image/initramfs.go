package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/cavaliergopher/cpio"
)

// Bounds of a root file system that becomes an initial RAM disk. The archive's
// format allows 4 GiB per file; a guest holds all of it in memory.
const (
	maxRootBytes   = 2 << 30
	maxRootEntries = 200_000
	maxNameBytes   = 4000
)

// entry is a file of an initial RAM disk.
type entry struct {
	name     string        // relative, clean, no leading slash
	mode     cpio.FileMode // type and permissions
	uid, gid int
	link     string // target of a symbolic link
	size     int64
	open     func() (io.ReadCloser, error) // content of a regular file
}

// tree is the content of an initial RAM disk by name.
type tree struct {
	entries map[string]entry
	bytes   int64
}

func newTree() *tree { return &tree{entries: make(map[string]entry)} }

// put adds an entry, over one of the same name.
func (t *tree) put(e entry) error {
	if len(e.name) > maxNameBytes || len(e.link) > maxNameBytes {
		return fmt.Errorf("the name %.80q… is too long: %w", e.name, ErrInvalid)
	}
	t.bytes += e.size - t.entries[e.name].size
	if t.bytes > maxRootBytes {
		return fmt.Errorf("more than %d MiB of files (use a disk image for a root file system of that size): %w", maxRootBytes>>20, ErrInvalid)
	}
	t.entries[e.name] = e
	if len(t.entries) > maxRootEntries {
		return fmt.Errorf("more than %d files: %w", maxRootEntries, ErrInvalid)
	}
	return nil
}

// mkdir adds a directory and its parents where there is nothing yet. What is
// there stays: replacing /lib, a link in many systems, would take what is behind.
func (t *tree) mkdir(name string) error {
	if name == "." || name == "/" {
		return nil
	}
	if _, exists := t.entries[name]; exists {
		return nil
	}
	if err := t.mkdir(path.Dir(name)); err != nil {
		return err
	}
	return t.put(entry{name: name, mode: cpio.TypeDir | 0o755})
}

func (t *tree) file(name string, mode cpio.FileMode, content []byte) error {
	if err := t.mkdir(path.Dir(name)); err != nil {
		return err
	}
	return t.put(entry{
		name: name, mode: cpio.TypeReg | mode, size: int64(len(content)),
		open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil },
	})
}

func (t *tree) symlink(name, target string) error {
	if err := t.mkdir(path.Dir(name)); err != nil {
		return err
	}
	return t.put(entry{name: name, mode: cpio.TypeSymlink | 0o777, link: target})
}

// write writes the archive: parents before what is in them, and otherwise in
// order of names, without times, so that equal trees give equal bytes. What is
// ours comes last, since it may lie behind links of the tree.
func (t *tree) write(w io.Writer, ours *tree) error {
	archive := cpio.NewWriter(w)
	for _, part := range []*tree{t, ours} {
		names := make([]string, 0, len(part.entries))
		//order:any sorted below
		for name := range part.entries {
			names = append(names, name)
		}
		slices.SortFunc(names, func(a, b string) int {
			return slices.Compare(strings.Split(a, "/"), strings.Split(b, "/"))
		})
		for _, name := range names {
			if err := writeEntry(archive, part.entries[name]); err != nil {
				return fmt.Errorf("packing %s: %w", name, err)
			}
		}
	}
	return archive.Close()
}

func writeEntry(archive *cpio.Writer, e entry) (err error) {
	header := &cpio.Header{Name: e.name, Mode: e.mode, Uid: e.uid, Guid: e.gid, Size: e.size, Links: 1}
	if e.mode&cpio.ModeType == cpio.TypeSymlink {
		header.Size = int64(len(e.link))
	}
	if err := archive.WriteHeader(header); err != nil {
		return err
	}
	switch e.mode & cpio.ModeType {
	case cpio.TypeSymlink:
		_, err = io.WriteString(archive, e.link)
	case cpio.TypeReg:
		content, openErr := e.open()
		if openErr != nil {
			return openErr
		}
		defer func() { err = errors.Join(err, content.Close()) }()
		var n int64
		n, err = io.Copy(archive, io.LimitReader(content, e.size))
		if err == nil && n != e.size {
			err = fmt.Errorf("it shrank from %d to %d bytes while it was read", e.size, n)
		}
	}
	return err
}

// addGuest adds the guest agent as /init, and the drivers it loads.
func (t *tree) addGuest(agent []byte, early, vsock []module) error {
	if err := t.file("init", 0o755, agent); err != nil {
		return err
	}
	const dir = "lib/blixard/modules/"
	written := make(map[string]bool)
	for _, list := range []struct {
		name    string
		modules []module
	}{{"list", early}, {"vsock", vsock}} {
		var names strings.Builder
		for _, m := range list.modules {
			if written[m.name] {
				continue
			}
			written[m.name] = true
			names.WriteString(m.name + "\n")
			if err := t.file(dir+m.name, 0o644, m.content); err != nil {
				return err
			}
		}
		if err := t.file(dir+list.name, 0o644, []byte(names.String())); err != nil {
			return err
		}
	}
	for _, dir := range []string{"proc", "sys", "dev", "run", "tmp", "etc"} {
		if err := t.mkdir(dir); err != nil {
			return err
		}
	}
	return nil
}

// parseCommand reads a command as the guest agent does: a JSON list, or else a
// line for the shell. nil when there is none.
func parseCommand(text []byte) ([]string, error) {
	line := strings.TrimSpace(string(text))
	if line == "" {
		return nil, nil
	}
	if !strings.HasPrefix(line, "[") {
		return []string{"/bin/sh", "-c", line}, nil
	}
	var command []string
	if err := json.Unmarshal([]byte(line), &command); err != nil {
		return nil, fmt.Errorf("/%s is no JSON list of words: %w: %w", commandName, ErrInvalid, err)
	}
	return command, nil
}

const commandName = "etc/blixard/command"
