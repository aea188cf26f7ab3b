package dispatch

import (
	"bufio"
	"compress/flate"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard"
)

// A template on its way is compressed and made of frames: for each file name,
// size and the parts of it that are not zeros, then the SHA-256 of it all.
const (
	frameFile = 'F' // length of the name (2 bytes), name, size (8)
	frameData = 'D' // offset (8), length (4), data
	frameEnd  = 'E' // SHA-256 of everything before this letter

	chunk         = 64 << 10
	templateFiles = 16       // at most
	fetchLimit    = 20 << 30 // bytes of a file
)

func (d *Dispatcher) serveTemplate(w http.ResponseWriter, r *http.Request) {
	key := r.PathValue("key")
	d.templates.mu.Lock()
	t := d.templates.all[key]
	d.templates.mu.Unlock()
	if t == nil || !d.templates.ready(t) {
		http.Error(w, "this node has no such template", http.StatusNotFound)
		return
	}
	dir, _ := d.templates.use(t)
	if err := sendTemplate(w, dir); err != nil {
		panic(http.ErrAbortHandler)
	}
}

// sendTemplate writes a template's files.
func sendTemplate(w io.Writer, dir string) error {
	packed, err := flate.NewWriter(w, flate.BestSpeed)
	if err != nil {
		return err
	}
	sum := sha256.New()
	out := io.MultiWriter(packed, sum)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Type().IsRegular() {
			if err := sendFile(out, dir, e.Name()); err != nil {
				return err
			}
		}
	}
	if _, err := packed.Write(append([]byte{frameEnd}, sum.Sum(nil)...)); err != nil {
		return err
	}
	return packed.Close()
}

func sendFile(w io.Writer, dir, name string) error {
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	head := binary.BigEndian.AppendUint16([]byte{frameFile}, uint16(len(name)))
	head = binary.BigEndian.AppendUint64(append(head, name...), uint64(info.Size()))
	if _, err := w.Write(head); err != nil {
		return err
	}
	buf, zeros := make([]byte, chunk), make([]byte, chunk)
	for at := int64(0); at < info.Size(); {
		// Holes are skipped without reading them.
		if at, err = unix.Seek(int(f.Fd()), at, unix.SEEK_DATA); errors.Is(err, unix.ENXIO) {
			return nil
		} else if err != nil {
			return err
		}
		n, err := f.ReadAt(buf, at)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		if subtle.ConstantTimeCompare(buf[:n], zeros[:n]) == 0 {
			head := binary.BigEndian.AppendUint64([]byte{frameData}, uint64(at))
			if _, err := w.Write(append(binary.BigEndian.AppendUint32(head, uint32(n)), buf[:n]...)); err != nil {
				return err
			}
		}
		at += int64(n)
	}
	return nil
}

// receiveTemplate makes the files of a template in dir, which must be empty.
func receiveTemplate(r io.Reader, dir string) error {
	return receiveFrames(bufio.NewReaderSize(flate.NewReader(r), chunk), dir)
}

func receiveFrames(r io.Reader, dir string) (err error) {
	sum := sha256.New()
	in := &summed{r: r, sum: sum}
	var file *os.File
	size := int64(0)
	finish := func() error {
		if file == nil {
			return nil
		}
		f := file
		file = nil
		return errors.Join(f.Truncate(size), f.Sync(), f.Close())
	}
	defer func() { err = errors.Join(err, finish()) }()
	buf := make([]byte, chunk)
	var names []string
	for {
		before := sum.Sum(nil)
		kind, err := in.bytes(buf[:1])
		if err != nil {
			return err
		}
		switch kind[0] {
		case frameFile:
			if err := finish(); err != nil {
				return err
			}
			var name string
			if name, size, err = in.fileHead(buf); err != nil {
				return err
			}
			if slices.Contains(names, name) || len(names) == templateFiles {
				return fmt.Errorf("a template with the file %q twice, or with too many", name)
			}
			names = append(names, name)
			if file, err = os.OpenFile(filepath.Join(dir, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
				return err
			}
		case frameData:
			at, n, err := in.dataHead(buf)
			if err != nil {
				return err
			}
			if file == nil || n > chunk || at < 0 || at+int64(n) > size {
				return errors.New("a template with data outside of its files")
			}
			data, err := in.bytes(buf[:n])
			if err != nil {
				return err
			}
			if _, err := file.WriteAt(data, at); err != nil {
				return err
			}
		case frameEnd:
			got, err := in.bytes(buf[:sha256.Size])
			if err != nil {
				return err
			}
			if !slices.Equal(got, before) {
				return errors.New("a template that was damaged on its way")
			}
			return nil
		default:
			return fmt.Errorf("a template with an unknown frame %q", kind[0])
		}
	}
}

// summed reads and keeps the sum of what was read.
type summed struct {
	r   io.Reader
	sum hash.Hash
}

func (s *summed) bytes(to []byte) ([]byte, error) {
	if _, err := io.ReadFull(s.r, to); err != nil {
		return nil, fmt.Errorf("reading a template: %w", err)
	}
	s.sum.Write(to)
	return to, nil
}

func (s *summed) fileHead(buf []byte) (name string, size int64, err error) {
	b, err := s.bytes(buf[:2])
	if err != nil {
		return "", 0, err
	}
	if b, err = s.bytes(buf[:min(int(binary.BigEndian.Uint16(b)), 255)]); err != nil {
		return "", 0, err
	}
	name = string(b)
	if b, err = s.bytes(buf[:8]); err != nil {
		return "", 0, err
	}
	size = int64(binary.BigEndian.Uint64(b))
	if name == "" || name == "." || name == ".." || filepath.Base(name) != name || size < 0 || size > fetchLimit {
		return "", 0, fmt.Errorf("a template with the file %q of %d bytes", name, size)
	}
	return name, size, nil
}

func (s *summed) dataHead(buf []byte) (at int64, n int, err error) {
	b, err := s.bytes(buf[:12])
	if err != nil {
		return 0, 0, err
	}
	return int64(binary.BigEndian.Uint64(b)), int(binary.BigEndian.Uint32(b[8:])), nil
}

// fetchAgain is how long after no node had a template none is asked again.
const fetchAgain = 30 * time.Second

// fetchTemplate gets a template from another node; false when none has it. Then
// it is built in the background, for those that come later.
func (d *Dispatcher) fetchTemplate(ctx context.Context, v *version, t *template) bool {
	d.templates.mu.Lock()
	soon := time.Since(t.failed) < fetchAgain || t.state == templateBuilding
	d.templates.mu.Unlock()
	if soon {
		return false
	}
	t.turn.Lock()
	defer t.turn.Unlock()
	if d.templates.ready(t) {
		return true
	}
	if d.o.Peers == nil {
		return false
	}
	d.templates.set(t, templateFetching)
	for _, node := range d.others(v) {
		began := time.Now()
		err := d.fetchFrom(ctx, node, t)
		if err == nil {
			d.tell(v.rev, "template", "", fmt.Sprintf("fetched from %s in %d ms", node, time.Since(began).Milliseconds()))
			poke(d.look)
			return true
		}
		if blixard.CodeOf(err) != blixard.CodeNotFound {
			d.log.Warn("fetching a template", "event", "fetch", "node", string(node), "key", t.key, "error", err)
		}
	}
	d.templates.set(t, templateNone)
	return false
}

func (d *Dispatcher) fetchFrom(ctx context.Context, node blixard.NodeName, t *template) (err error) {
	body, err := d.o.Peers.Get(ctx, node, "template/"+t.key)
	if err != nil {
		return err
	}
	defer body.Close()
	made, err := os.MkdirTemp(d.templates.dir, unfinished)
	if err != nil {
		return fmt.Errorf("making a template's directory: %w", err)
	}
	if err := receiveTemplate(body, made); err != nil {
		return errors.Join(fmt.Errorf("receiving a template: %w", err), os.RemoveAll(made))
	}
	return d.templates.put(t, made)
}
