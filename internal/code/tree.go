package code

import (
	"archive/zip"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"unicode/utf8"
)

// Bounds on what a zip may hold beside those of Limits.
const (
	maxNameBytes      = 1024 // of a path
	maxPartBytes      = 255  // of one part of a path, as file systems have it
	maxDepth          = 64
	maxLinkBytes      = 1024
	maxLinksFollowed  = 40
	directoryPerEntry = 512 // bytes that an entry may have in the central directory, on average
	// A zip may be packed this well, or else be small: zeros are legitimate.
	maxRatio     = 200
	ratioIgnored = 64 << 20 // bytes unpacked below which the ratio is nobody's concern
)

// node is a file, link or directory of a zip.
type node struct {
	name string // clean, relative
	file *zip.File
	kind fs.FileMode // 0, fs.ModeDir or fs.ModeSymlink
	link string      // target of a symbolic link
	exec bool        // the zip says that it can be executed
}

// tree is what a zip holds, by names that were checked.
type tree struct {
	nodes map[string]*node
	names []string // of nodes, in order
	bytes int64    // of all regular files, as the directory has it
	files int      // without directories
}

// budget reads a bounded number of bytes: the directory of a zip is held in
// memory, and a hostile one has millions of entries.
type budget struct {
	r    io.ReaderAt
	left int64 // negative: no bound
}

var errBudget = errors.New("the directory of the zip is too large")

func (b *budget) ReadAt(p []byte, off int64) (int, error) {
	if b.left >= 0 {
		if b.left < int64(len(p)) {
			return 0, errBudget
		}
		b.left -= int64(len(p))
	}
	return b.r.ReadAt(p, off)
}

// readTree reads the directory of a zip and checks all names, types and declared
// sizes; it does not unpack files but for links.
func readTree(r io.ReaderAt, size int64, limits Limits) (*tree, error) {
	if size == 0 {
		return nil, invalid("the zip is empty")
	}
	bounded := &budget{r: r, left: 1<<20 + int64(limits.Files)*directoryPerEntry}
	archive, err := zip.NewReader(bounded, size)
	if errors.Is(err, errBudget) {
		return nil, invalid("the zip has too many entries; at most %d", limits.Files)
	}
	if err != nil {
		return nil, invalid("it is not a zip, or a damaged one: %v", err)
	}
	bounded.left = -1
	if len(archive.File) > limits.Files {
		return nil, invalid("the zip has %d entries; at most %d", len(archive.File), limits.Files)
	}
	t := &tree{nodes: make(map[string]*node)}
	for _, file := range archive.File {
		if err := t.add(file, limits); err != nil {
			return nil, err
		}
	}
	if t.bytes > ratioIgnored && t.bytes/max(size, 1) > maxRatio {
		return nil, invalid("the zip unpacks to %d times its size, as only bombs do; at most %d times", t.bytes/max(size, 1), maxRatio)
	}
	t.names = slices.Sorted(maps.Keys(t.nodes))
	if t.files == 0 {
		return nil, invalid("the zip holds no file")
	}
	for _, name := range t.names {
		if t.nodes[name].kind == fs.ModeSymlink {
			if _, err := t.resolve(name); err != nil {
				return nil, err
			}
		}
	}
	return t, nil
}

func (t *tree) add(file *zip.File, limits Limits) error {
	name, err := cleanName(file.Name)
	if err != nil {
		return err
	}
	if file.Flags&1 != 0 {
		return invalid("%q is encrypted", name)
	}
	if file.Method != zip.Store && file.Method != zip.Deflate {
		return invalid("%q is packed with method %d; only stored and deflated files can be read", name, file.Method)
	}
	mode := file.Mode()
	n := &node{name: name, file: file, kind: mode.Type(), exec: mode&0o111 != 0}
	if strings.HasSuffix(file.Name, "/") {
		n.kind = fs.ModeDir
	}
	switch n.kind {
	case 0:
		if file.UncompressedSize64 > uint64(limits.UnzippedBytes) || t.bytes+int64(file.UncompressedSize64) > limits.UnzippedBytes {
			return invalid("the zip unpacks to more than %d MiB", limits.UnzippedBytes>>20)
		}
		t.bytes += int64(file.UncompressedSize64)
		t.files++
	case fs.ModeSymlink:
		t.files++
		if n.link, err = readLink(file); err != nil {
			return err
		}
	case fs.ModeDir:
		if name == "." {
			return nil
		}
	default:
		return invalid("%q is a device, pipe or socket", name)
	}
	if name == "." {
		return invalid("the zip has an entry without a name")
	}
	if old, ok := t.nodes[name]; ok {
		// A directory may come twice, since those of others are added by themselves.
		if old.kind == fs.ModeDir && n.kind == fs.ModeDir {
			return nil
		}
		return invalid("the zip has %q twice", name)
	}
	t.nodes[name] = n
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		parent, ok := t.nodes[dir]
		if !ok {
			if len(t.nodes) >= 2*limits.Files {
				return invalid("the zip has too many directories")
			}
			t.nodes[dir] = &node{name: dir, kind: fs.ModeDir}
			continue
		}
		if parent.kind != fs.ModeDir {
			return invalid("the zip has %q below %q, which is no directory", name, dir)
		}
		break
	}
	return nil
}

// cleanName gives the name without a trailing slash, and refuses those that
// leave the zip's root or that file systems do not have.
func cleanName(name string) (string, error) {
	switch {
	case name == "" || len(name) > maxNameBytes:
		return "", invalid("the zip has a name of %d bytes", len(name))
	case !utf8.ValidString(name) || strings.ContainsAny(name, "\x00\\"):
		return "", invalid("the zip has the name %q, with characters that names must not have", name)
	case name[0] == '/':
		return "", invalid("the zip has the absolute name %q", name)
	}
	parts := strings.Split(strings.TrimSuffix(name, "/"), "/")
	if len(parts) > maxDepth {
		return "", invalid("the zip has a name with %d directories; at most %d", len(parts), maxDepth)
	}
	for i, part := range parts {
		if part == ".." {
			return "", invalid("the zip has the name %q, which leads out of it", name)
		}
		if len(part) > maxPartBytes || part == "" && !(i == 0 && len(parts) == 1) {
			return "", invalid("the zip has the name %.300q, which file systems do not have", name)
		}
	}
	return path.Clean(name), nil
}

func readLink(file *zip.File) (string, error) {
	if file.UncompressedSize64 == 0 || file.UncompressedSize64 > maxLinkBytes {
		return "", invalid("the link %q leads to a name of %d bytes", file.Name, file.UncompressedSize64)
	}
	r, err := file.Open()
	if err != nil {
		return "", invalid("reading the link %q: %v", file.Name, err)
	}
	target, err := io.ReadAll(io.LimitReader(r, maxLinkBytes+1))
	if err := errors.Join(err, r.Close()); err != nil {
		return "", invalid("reading the link %q: %v", file.Name, err)
	}
	link := string(target)
	if strings.ContainsRune(link, 0) || strings.HasPrefix(link, "/") {
		return "", invalid("the link %q leads to %q, out of the zip", file.Name, link)
	}
	return link, nil
}

// resolve follows links as a kernel would, and gives what is at their end; nil
// when there is nothing. A way that leaves the zip's root is an error.
func (t *tree) resolve(name string) (*node, error) {
	var at []string // where we are, free of links
	todo := strings.Split(name, "/")
	for followed := 0; len(todo) > 0; {
		part := todo[0]
		todo = todo[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			if len(at) == 0 {
				return nil, invalid("the link %q leads out of the zip", name)
			}
			at = at[:len(at)-1]
			continue
		}
		here := strings.Join(append(slices.Clone(at), part), "/")
		n := t.nodes[here]
		switch {
		case n != nil && n.kind == fs.ModeSymlink:
			if followed++; followed > maxLinksFollowed {
				return nil, invalid("the link %q leads in a circle", name)
			}
			todo = append(strings.Split(n.link, "/"), todo...)
		default:
			// What is not there may be passed, so that a dangling link cannot hide
			// that it would leave the root.
			at = append(at, part)
		}
	}
	return t.nodes[strings.Join(at, "/")], nil
}

// check unpacks every file to nowhere: sizes and checksums have to be right.
func (t *tree) check(ctx context.Context) error {
	for _, name := range t.names {
		n := t.nodes[name]
		if n.kind != 0 {
			continue
		}
		if err := n.copyTo(ctx, io.Discard); err != nil {
			return err
		}
	}
	return nil
}

// copyTo unpacks a file.
func (n *node) copyTo(ctx context.Context, w io.Writer) error {
	r, err := n.file.Open()
	if err != nil {
		return invalid("unpacking %q: %v", n.name, err)
	}
	size := int64(n.file.UncompressedSize64)
	sink := &failing{w: w}
	// One byte more than declared, so that the reader comes to the end and compares the checksum.
	written, err := io.Copy(sink, io.LimitReader(contextReader{ctx, r}, size+1))
	err = errors.Join(err, r.Close())
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case sink.err != nil:
		return fmt.Errorf("unpacking %q: %w", n.name, sink.err)
	case err != nil:
		return invalid("unpacking %q: %v", n.name, err)
	case written != size:
		return invalid("unpacking %q: it has more than the %d bytes that the zip says", n.name, size)
	}
	return nil
}

// failing remembers that it was the writer that failed, and not the zip.
type failing struct {
	w   io.Writer
	err error
}

func (f *failing) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	if err != nil {
		f.err = err
	}
	return n, err
}

// beginning is the first bytes of a file, at most n.
func (n *node) beginning(length int) ([]byte, error) {
	r, err := n.file.Open()
	if err != nil {
		return nil, invalid("unpacking %q: %v", n.name, err)
	}
	head := make([]byte, length)
	got, err := io.ReadFull(r, head)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil
	}
	if err := errors.Join(err, r.Close()); err != nil {
		return nil, invalid("unpacking %q: %v", n.name, err)
	}
	return head[:got], nil
}

// permissions are what the guest sees: everything can be read by everybody, and
// programs can be executed, whatever the zip has. Zips made on other systems, or
// by libraries that were not told, have no such bits.
func (n *node) permissions() (fs.FileMode, error) {
	if n.exec {
		return 0o755, nil
	}
	head, err := n.beginning(4)
	if err != nil {
		return 0, err
	}
	if bytes.HasPrefix(head, []byte("#!")) || bytes.Equal(head, []byte("\x7fELF")) {
		return 0o755, nil
	}
	return 0o644, nil
}
