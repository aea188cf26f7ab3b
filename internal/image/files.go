package image

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// add writes a file of the bundle, hashing it on the way.
func (d *draft) add(ctx context.Context, f manifestFile, write func(io.Writer) error) (err error) {
	file, err := os.OpenFile(filepath.Join(d.dir, f.Name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("writing %s: %w", f.Name, err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("writing %s: %w", f.Name, err)
		}
	}()
	hash := sha256.New()
	counter := &countingWriter{ctx: ctx, w: io.MultiWriter(file, hash)}
	buffered := bufio.NewWriterSize(counter, 256<<10)
	err = write(buffered)
	if err == nil {
		err = buffered.Flush()
	}
	if err == nil {
		err = errors.Join(file.Chmod(0o444), file.Sync())
	}
	if err := errors.Join(err, file.Close()); err != nil {
		return err
	}
	f.Size = counter.bytes
	f.SHA256 = hex.EncodeToString(hash.Sum(nil))
	d.manifest.Files = append(d.manifest.Files, f)
	return nil
}

// addCopy adds a file of this machine.
func (d *draft) addCopy(ctx context.Context, f manifestFile, source string) error {
	return d.add(ctx, f, func(w io.Writer) (err error) {
		file, err := os.Open(source)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, file.Close()) }()
		info, err := file.Stat()
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() {
			return fmt.Errorf("%s is no regular file: %w", source, ErrInvalid)
		}
		_, err = io.Copy(w, file)
		return err
	})
}

// countingWriter counts, and stops a long copy when its context ends.
type countingWriter struct {
	ctx   context.Context //nolint:containedctx // of the one copy it is made for
	w     io.Writer
	bytes int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.w.Write(p)
	c.bytes += int64(n)
	return n, err
}

func writeFile(path string, content []byte) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	_, err = file.Write(content)
	if err == nil {
		err = file.Sync()
	}
	return errors.Join(err, file.Close())
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

func hashFile(path string) (sum [sha256.Size]byte, err error) {
	file, err := os.Open(path)
	if err != nil {
		return sum, err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	hash := sha256.New()
	if _, err := io.Copy(hash, file); err != nil {
		return sum, err
	}
	return [sha256.Size]byte(hash.Sum(nil)), nil
}
