package qemu

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/vmm"
)

const (
	pageBytes = 4096
	copyBytes = 1 << 20
)

// Snapshot implements vmm.Cloner. Until it is complete, everything is in the
// incarnation's directory or has a name in the template's that nobody reads.
func (d *Driver) Snapshot(ctx context.Context, ref vmm.Ref) error {
	if err := ref.Check(); err != nil {
		return err
	}
	release, err := d.takeTurn(ctx, ref, changing)
	if err != nil {
		return err
	}
	defer release()
	if _, err := d.running(ref); err != nil {
		return err
	}
	inc, err := d.load(ref)
	if err != nil {
		return err
	}
	spec := inc.spec.Spec
	if spec.Template == "" || inc.spec.Clone {
		return fmt.Errorf("%s was not started to become a template: %w", ref, vmm.ErrInvalid)
	}
	probed, err := d.probe(ctx)
	if err != nil {
		return fmt.Errorf("saving %s: %w", ref, err)
	}
	key, err := d.templateKey(probed)
	if err != nil {
		return fmt.Errorf("saving %s: %w", ref, err)
	}
	err = d.saveDevices(ctx, inc)
	// Also what could not be saved is of no use any more. Its memory is complete
	// only when nobody writes to it.
	err = errors.Join(err, d.Stop(context.WithoutCancel(ctx), ref, 0))
	if err == nil {
		err = publish(ctx, inc, newTemplateRecord(spec, key))
	}
	if err != nil {
		return fmt.Errorf("saving %s: %w", ref, err)
	}
	d.log.Info("saved a template", "instance", ref.Instance, "generation", ref.Generation, "directory", spec.Template)
	return nil
}

// saveDevices stops the guest and writes the state of its devices, and of what
// memory is not its RAM, into a file.
func (d *Driver) saveDevices(ctx context.Context, inc *incarnation) (err error) {
	file, err := os.OpenFile(filepath.Join(inc.dir, fileDevices), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("creating the file of the devices' state: %w", err)
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	return d.control(ctx, inc.ref, func(q *qmpConn) error {
		if err := q.execute(ctx, "stop", nil, nil); err != nil {
			return err
		}
		if err := q.execute(ctx, "migrate-set-capabilities", migrationCapabilities, nil); err != nil {
			return err
		}
		// The sandbox lets QEMU start no program that would take it.
		if err := q.executeWith(ctx, "getfd", map[string]string{"fdname": fileDevices}, nil, file); err != nil {
			return err
		}
		if err := q.execute(ctx, "migrate", map[string]string{"uri": "fd:" + fileDevices}, nil); err != nil {
			return err
		}
		return q.awaitMigration(ctx)
	})
}

// publish makes the template's directory of what is in the incarnation's.
func publish(ctx context.Context, inc *incarnation, record templateRecord) error {
	dir := inc.spec.Spec.Template
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("creating the template's directory: %w", err)
	}
	if _, err := os.Lstat(filepath.Join(dir, fileTemplate)); err == nil {
		return fmt.Errorf("%s holds a template already: %w", dir, vmm.ErrInvalid)
	}
	for _, name := range []string{fileMemory, fileDevices} {
		size, err := copySparse(ctx, filepath.Join(inc.dir, name), filepath.Join(dir, name))
		if err != nil {
			return fmt.Errorf("copying %s: %w", name, err)
		}
		if name == fileDevices {
			record.DevicesBytes = size
		}
	}
	if err := writeJSON(filepath.Join(dir, fileTemplate), record, true); err != nil {
		return err
	}
	return syncDir(filepath.Dir(dir))
}

// copySparse copies a file durably, without the pages that hold only zeros, and
// tells its size.
func copySparse(ctx context.Context, from, to string) (size int64, err error) {
	in, err := os.Open(from)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return 0, err
	}
	out, err := os.OpenFile(to+".tmp", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return 0, err
	}
	if err = copyData(ctx, out, in); err == nil {
		err = out.Truncate(info.Size())
	}
	if err == nil {
		err = out.Sync()
	}
	if err = errors.Join(err, out.Close()); err == nil {
		err = os.Rename(to+".tmp", to)
	}
	return info.Size(), err
}

var zeroPage [pageBytes]byte

func copyData(ctx context.Context, out, in *os.File) error {
	buffer := make([]byte, copyBytes)
	offset := int64(0)
	for {
		data, err := unix.Seek(int(in.Fd()), offset, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // only a hole is left
		}
		if err != nil {
			return fmt.Errorf("looking for data: %w", err)
		}
		offset = data &^ (pageBytes - 1)
		n, err := in.ReadAt(buffer, offset)
		if n == 0 || err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		for start := 0; start < n; {
			end := start
			for end < n && !isZero(buffer[end:min(end+pageBytes, n)]) {
				end = min(end+pageBytes, n)
			}
			if end > start {
				if _, err := out.WriteAt(buffer[start:end], offset+int64(start)); err != nil {
					return err
				}
			}
			start = end + pageBytes
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		offset += int64(n)
	}
}

func isZero(page []byte) bool { return bytes.Equal(page, zeroPage[:len(page)]) }

// MemoryUse implements vmm.Meter. What is anonymous is the process's own; the
// rest is of files, a template's memory above all, which stay in the page cache
// once for all that map them.
func (d *Driver) MemoryUse(_ context.Context, ref vmm.Ref) (private, shared int64, err error) {
	p, err := d.running(ref)
	if err != nil {
		return 0, 0, err
	}
	text, err := os.ReadFile("/proc/" + strconv.Itoa(p.pid) + "/smaps_rollup")
	if err != nil {
		return 0, 0, fmt.Errorf("measuring %s: %w", ref, err)
	}
	values := map[string]int64{}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		if fields := strings.Fields(lines.Text()); len(fields) == 3 && fields[2] == "kB" {
			if kib, err := strconv.ParseInt(fields[1], 10, 64); err == nil {
				values[fields[0]] = kib << 10
			}
		}
	}
	if values["Rss:"] == 0 {
		return 0, 0, fmt.Errorf("measuring %s: %w", ref, vmm.ErrNotRunning)
	}
	return values["Anonymous:"] + values["Swap:"], values["Rss:"] - values["Anonymous:"], nil
}
