package image

import (
	"archive/tar"
	"bufio"
	"compress/flate"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/cavaliergopher/cpio"
)

// readDirectory takes a root file system from a directory. Files belong to
// root in the guest, whoever has them here. Links are taken as they are and
// never followed.
func readDirectory(t *tree, root *os.Root) error {
	return fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("reading the root file system: %w", err)
		}
		if name == "." {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return fmt.Errorf("reading the root file system: %w", err)
		}
		e := entry{name: name, mode: permissions(info.Mode())}
		switch {
		case info.Mode().IsRegular():
			e.mode |= cpio.TypeReg
			e.size = info.Size()
			e.open = func() (io.ReadCloser, error) { return root.Open(name) }
		case info.IsDir():
			e.mode |= cpio.TypeDir
		case info.Mode()&fs.ModeSymlink != 0:
			e.mode |= cpio.TypeSymlink
			if e.link, err = root.Readlink(name); err != nil {
				return fmt.Errorf("reading the root file system: %w", err)
			}
		default:
			return refuseSpecial(name, "a device, pipe or socket")
		}
		return t.put(e)
	})
}

// refuseSpecial lets those below dev pass, which archives of running systems
// have and guests get from their kernel.
func refuseSpecial(name, what string) error {
	if name == "dev" || strings.HasPrefix(name, "dev/") {
		return nil
	}
	return fmt.Errorf("%s is %s: %w", name, what, ErrInvalid)
}

func permissions(mode fs.FileMode) cpio.FileMode {
	p := cpio.FileMode(mode.Perm())
	if mode&fs.ModeSetuid != 0 {
		p |= cpio.ModeSetuid
	}
	if mode&fs.ModeSetgid != 0 {
		p |= cpio.ModeSetgid
	}
	if mode&fs.ModeSticky != 0 {
		p |= cpio.ModeSticky
	}
	return p
}

// What a file begins with.
const (
	fileOther = iota
	fileTar   // a tar, or a gzip of something
	fileExt4  // an ext2, ext3 or ext4 file system without a partition table
	fileQcow2
)

// sniff tells what kind of file it is by its first bytes.
func sniff(file string) (kind int, err error) {
	f, err := os.Open(file)
	if err != nil {
		return fileOther, err
	}
	defer f.Close()
	head := make([]byte, 2048)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return fileOther, err
	}
	switch gzipped := n > 2 && head[0] == 0x1f && head[1] == 0x8b; {
	case gzipped, n >= 512 && string(head[257:262]) == "ustar":
		return fileTar, nil
	case n >= 4 && string(head[:4]) == "QFI\xfb":
		return fileQcow2, nil
	case n == len(head) && head[1080] == 0x53 && head[1081] == 0xef: // s_magic of the superblock at 1024
		return fileExt4, nil
	}
	return fileOther, nil
}

// readTar takes a root file system from a tar, gzipped or not. Contents are
// spooled to one file, from which the entries read them.
func readTar(t *tree, file string, spool *os.File) (err error) {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	buffered := bufio.NewReaderSize(f, 256<<10)
	var r io.Reader = buffered
	if magic, err := buffered.Peek(2); err == nil && magic[0] == 0x1f && magic[1] == 0x8b {
		if r, err = gzip.NewReader(buffered); err != nil {
			return fmt.Errorf("%w: %w", ErrInvalid, err)
		}
	}
	// A bomb may also be made of headers, or of padding behind the end.
	in := tar.NewReader(io.LimitReader(r, maxRootBytes+maxRootEntries*2048))
	s := &spooler{file: spool}
	for {
		header, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("reading the archive: %w: %w", ErrInvalid, err)
		}
		if err := s.take(t, in, header); err != nil {
			return err
		}
	}
	if len(t.entries) == 0 {
		return fmt.Errorf("the archive is empty: %w", ErrInvalid)
	}
	return nil
}

type spooler struct {
	file   *os.File
	offset int64
}

func (s *spooler) take(t *tree, in io.Reader, header *tar.Header) error {
	name, err := cleanName(header.Name)
	if err != nil || name == "." {
		return err
	}
	e := entry{name: name, mode: permissions(header.FileInfo().Mode()), uid: clampID(header.Uid), gid: clampID(header.Gid)}
	if err := t.mkdir(path.Dir(name)); err != nil {
		return err
	}
	switch header.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		if header.Size > maxRootBytes || s.offset+header.Size > maxRootBytes {
			return fmt.Errorf("%s makes it larger than %d MiB (use a disk image for a root file system of that size): %w", name, maxRootBytes>>20, ErrInvalid)
		}
		offset := s.offset
		n, err := io.Copy(io.NewOffsetWriter(s.file, offset), io.LimitReader(in, header.Size))
		if err == nil && n != header.Size {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			if cutOff(err) {
				err = fmt.Errorf("%w: %w", ErrInvalid, err)
			}
			return fmt.Errorf("reading %s from the archive: %w", name, err)
		}
		s.offset += n
		e.mode |= cpio.TypeReg
		e.size = n
		e.open = func() (io.ReadCloser, error) { return io.NopCloser(io.NewSectionReader(s.file, offset, n)), nil }
	case tar.TypeDir:
		e.mode |= cpio.TypeDir
	case tar.TypeSymlink:
		// Where it leads is the guest's affair: it is never followed here.
		e.mode |= cpio.TypeSymlink
		e.link = header.Linkname
		if e.link == "" || strings.ContainsRune(e.link, 0) {
			return fmt.Errorf("the link %s leads nowhere: %w", name, ErrInvalid)
		}
	case tar.TypeLink:
		target, err := cleanName(header.Linkname)
		if err != nil {
			return fmt.Errorf("the link %s: %w", name, err)
		}
		other, ok := t.entries[target]
		if !ok || other.mode&cpio.ModeType == cpio.TypeDir {
			return fmt.Errorf("the link %s leads to %q, which is no file before it: %w", name, header.Linkname, ErrInvalid)
		}
		other.name = name
		e = other
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return refuseSpecial(name, "a device or pipe")
	case tar.TypeXGlobalHeader:
		return nil
	default:
		return fmt.Errorf("%s has the unknown type %q: %w", name, header.Typeflag, ErrInvalid)
	}
	return t.put(e)
}

// cutOff tells an archive that ends early or is damaged from one that cannot be
// read, or be written here.
func cutOff(err error) bool {
	_, corrupt := errors.AsType[flate.CorruptInputError](err)
	return corrupt || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, gzip.ErrChecksum) || errors.Is(err, gzip.ErrHeader)
}

// cleanName refuses names that leave the archive's root.
func cleanName(name string) (string, error) {
	if strings.HasPrefix(name, "/") || strings.ContainsRune(name, 0) || name == "" {
		return "", fmt.Errorf("the name %.200q in the archive is not relative: %w", name, ErrInvalid)
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", fmt.Errorf("the name %.200q in the archive leads out of it: %w", name, ErrInvalid)
		}
	}
	return path.Clean(name), nil
}

func clampID(id int) int { return min(max(id, 0), 65535) }
