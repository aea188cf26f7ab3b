package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"time"

	"github.com/blixard/blixard/internal/guest"
)

const (
	logPoll      = 200 * time.Millisecond
	logRotations = 16 // older files looked for at most
	logChunk     = 32 << 10
)

// logFiles are the files of a log that exist, oldest first.
func logFiles(path string) []string {
	var files []string
	for n := 1; n <= logRotations; n++ {
		older := path + "." + strconv.Itoa(n)
		if _, err := os.Stat(older); err != nil {
			break
		}
		files = append([]string{older}, files...)
	}
	return append(files, path)
}

// copyLog copies a log that consists of path and path.1, path.2, … (older ones)
// to w; with Follow until ctx ends or gone tells that no more will come.
func copyLog(ctx context.Context, path string, o guest.LogOptions, gone func() bool, w io.Writer) error {
	f, err := openLog(ctx, path, o.Follow, gone)
	if err != nil || f == nil {
		return err
	}
	defer func() { f.Close() }()
	offset, err := copyKept(f, path, o.TailLines, w)
	if err != nil || !o.Follow {
		return err
	}
	tick := time.NewTicker(logPoll)
	defer tick.Stop()
	for {
		// Asked before reading: what was written before the end is copied.
		last := gone()
		n, err := copyFrom(f, offset, w)
		if err != nil {
			return err
		}
		offset += n
		if n > 0 {
			continue
		}
		if f, offset, err = reopened(f, path, offset); err != nil {
			return err
		}
		if last {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil // the ordinary end of following
		case <-tick.C:
		}
	}
}

// openLog opens the log; nil without an error when there is none and none will
// come.
func openLog(ctx context.Context, path string, wait bool, gone func() bool) (*os.File, error) {
	for {
		f, err := os.Open(path)
		if err == nil || !errors.Is(err, fs.ErrNotExist) {
			return f, err
		}
		if !wait || gone() || !pause(ctx, logPoll) {
			return nil, nil
		}
	}
}

// copyKept copies the last lines that are kept and tells how far of f is copied.
func copyKept(f *os.File, path string, lines int, w io.Writer) (offset int64, err error) {
	info, err := f.Stat()
	if err != nil {
		return 0, fmt.Errorf("reading the log: %w", err)
	}
	end := info.Size()
	if lines == 0 {
		return end, nil
	}
	files := logFiles(path)
	type part struct {
		path string
		from int64
	}
	var parts []part
	for i := len(files) - 1; i >= 0 && lines != 0; i-- {
		p := part{path: files[i]}
		if lines > 0 {
			var found int
			if p.from, found, err = tailStart(p.path, lines); err != nil {
				return 0, err
			}
			lines -= found
		}
		parts = append([]part{p}, parts...)
	}
	for _, p := range parts {
		if p.path == path {
			n, err := copyFrom(f, p.from, w)
			return p.from + n, err
		}
		if err := copyFile(p.path, p.from, w); err != nil {
			return 0, err
		}
	}
	return end, nil
}

func copyFile(path string, from int64, w io.Writer) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // rotated away meanwhile
	}
	if err != nil {
		return fmt.Errorf("reading the log: %w", err)
	}
	defer f.Close()
	_, err = copyFrom(f, from, w)
	return err
}

func copyFrom(f *os.File, from int64, w io.Writer) (int64, error) {
	n, err := io.Copy(w, io.NewSectionReader(f, from, 1<<62-from))
	if err != nil {
		return n, fmt.Errorf("copying the log: %w", err)
	}
	return n, nil
}

// tailStart finds where the last lines of a file begin, reading backwards, and
// how many there are (at most the number asked for).
func tailStart(path string, lines int) (start int64, found int, err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, fmt.Errorf("reading the log: %w", err)
	}
	defer f.Close()
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return 0, 0, fmt.Errorf("reading the log: %w", err)
	}
	if end == 0 {
		return 0, 0, nil
	}
	buf := make([]byte, logChunk)
	// A newline ends the line before it: the last byte begins no line.
	for pos := end - 1; pos > 0; {
		n := min(int64(len(buf)), pos)
		if _, err := f.ReadAt(buf[:n], pos-n); err != nil {
			return 0, 0, fmt.Errorf("reading the log: %w", err)
		}
		for chunk := buf[:n]; ; {
			i := bytes.LastIndexByte(chunk, '\n')
			if i < 0 {
				break
			}
			if found++; found == lines {
				return pos - n + int64(i) + 1, found, nil
			}
			chunk = chunk[:i]
		}
		pos -= n
	}
	return 0, found + 1, nil
}

// reopened follows a log that was rotated: by renaming, which makes a new file,
// or by truncating, which makes it shorter than what was read.
func reopened(f *os.File, path string, offset int64) (*os.File, int64, error) {
	old, err := f.Stat()
	if err != nil {
		return f, offset, fmt.Errorf("reading the log: %w", err)
	}
	if old.Size() < offset {
		offset = 0
	}
	now, err := os.Stat(path)
	if err != nil || os.SameFile(old, now) {
		return f, offset, nil //nolint:nilerr // removed: what is open stays readable
	}
	next, err := os.Open(path)
	if err != nil {
		return f, offset, nil //nolint:nilerr // removed in between
	}
	if err := f.Close(); err != nil {
		return next, 0, fmt.Errorf("closing the rotated log: %w", err)
	}
	return next, 0, nil
}
