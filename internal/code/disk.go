package code

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/erofs/go-erofs"
)

// diskVersion changes when the same zip makes another disk.
const diskVersion = "1"

// Disk gives the path of a read-only EROFS image of the zip's files, which is
// made when it is not there yet. The same zip gives the same bytes on every node:
// no times, all files owned by root. CodeNotFound when the zip is not here.
func (s Store) Disk(ctx context.Context, digest string) (path string, err error) {
	file, size, err := s.open(digest)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	path, err = filepath.Abs(filepath.Join(s.Root, digest+"-"+diskVersion+diskSuffix))
	if err != nil {
		return "", fmt.Errorf("making the disk of code %s: %w", digest, err)
	}
	if info, err := os.Lstat(path); err == nil && info.Mode().IsRegular() {
		return path, nil
	}
	t, err := readTree(file, size, s.Limits.filled())
	if err != nil {
		return "", err
	}
	if err := s.writeDisk(ctx, t, path); err != nil {
		return "", fmt.Errorf("making the disk of code %s: %w", digest, err)
	}
	return path, nil
}

func (s Store) writeDisk(ctx context.Context, t *tree, path string) (err error) {
	out, err := os.CreateTemp(s.Root, temporaryPrefix)
	if err != nil {
		return err
	}
	kept := false
	defer func() {
		err = errors.Join(err, out.Close())
		if !kept {
			err = errors.Join(err, os.Remove(out.Name()))
		}
	}()
	if err := t.writeErofs(ctx, out, s.Root); err != nil {
		return err
	}
	if err := errors.Join(out.Chmod(0o444), out.Sync()); err != nil {
		return err
	}
	if err := os.Rename(out.Name(), path); err != nil {
		return err
	}
	kept = true
	return syncDir(s.Root)
}

// writeErofs gathers contents in a nameless file in spool before it writes the
// image.
func (t *tree) writeErofs(ctx context.Context, out *os.File, spool string) error {
	disk := erofs.Create(out, erofs.WithBuildTime(0, 0), erofs.WithTempDir(spool))
	if err := disk.Mkdir("/", 0o755); err != nil {
		return err
	}
	// Sorted names have a directory before what is in it.
	for _, name := range t.names {
		if err := t.nodes[name].writeErofs(ctx, disk); err != nil {
			return fmt.Errorf("packing %q: %w", name, err)
		}
	}
	return disk.Close()
}

func (n *node) writeErofs(ctx context.Context, disk *erofs.Writer) error {
	name := "/" + n.name
	if n.kind == fs.ModeDir {
		return disk.Mkdir(name, 0o755)
	}
	if n.kind == fs.ModeSymlink {
		return disk.Symlink(n.link, name)
	}
	mode, err := n.permissions()
	if err != nil {
		return err
	}
	file, err := disk.Create(name)
	if err != nil {
		return err
	}
	if err := errors.Join(file.Chmod(mode), n.copyTo(ctx, file)); err != nil {
		return errors.Join(err, file.Close())
	}
	return file.Close()
}
