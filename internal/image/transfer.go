package image

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// Export writes a bundle as a tar for ImportTar on another node.
func (s Store) Export(ctx context.Context, digest string, w io.Writer) error {
	m, dir, err := s.manifest(digest)
	if err != nil {
		return err
	}
	out := tar.NewWriter(&countingWriter{ctx: ctx, w: w})
	names := []string{manifestName}
	for _, f := range m.Files {
		names = append(names, f.Name)
	}
	for _, name := range names {
		if err := exportFile(out, dir, name); err != nil {
			return fmt.Errorf("exporting bundle %s: %w", digest, err)
		}
	}
	if err := out.Close(); err != nil {
		return fmt.Errorf("exporting bundle %s: %w", digest, err)
	}
	return nil
}

func exportFile(out *tar.Writer, dir, name string) (err error) {
	file, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	header := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o444, Size: info.Size()}
	if err := out.WriteHeader(header); err != nil {
		return err
	}
	_, err = io.Copy(out, file)
	return err
}

// ImportTar stores what Export of another node wrote, if it is the bundle
// wanted: the manifest has that digest, and every file the size and the hash
// the manifest says. A bundle that is here already is not read again.
func (s Store) ImportTar(ctx context.Context, r io.Reader, wantDigest string) (b Bundle, err error) {
	if !digestPattern.MatchString(wantDigest) {
		return Bundle{}, fmt.Errorf("fetching bundle: %q is no digest: %w", wantDigest, ErrInvalid)
	}
	if b, err := s.Get(wantDigest); err == nil {
		return b, nil
	}
	d, err := s.draft()
	if err != nil {
		return Bundle{}, err
	}
	defer d.discard(&err)
	if err := d.receive(ctx, tar.NewReader(r), wantDigest); err != nil {
		return Bundle{}, fmt.Errorf("fetching bundle %s: %w", wantDigest, err)
	}
	return d.commit(ctx)
}

// broken tells an archive that ends early or is none from one that could not be
// read.
func broken(what string, err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, tar.ErrHeader) {
		return fmt.Errorf("reading %s: the archive is cut off or no tar: %w: %w", what, ErrInvalid, err)
	}
	return fmt.Errorf("reading %s: %w", what, err)
}

func (d *draft) receive(ctx context.Context, in *tar.Reader, wantDigest string) error {
	header, err := in.Next()
	if err != nil {
		return broken("its manifest", err)
	}
	if header.Name != manifestName || header.Typeflag != tar.TypeReg || header.Size > maxManifestBytes {
		return fmt.Errorf("it does not begin with a manifest: %w", ErrInvalid)
	}
	encoded, err := io.ReadAll(io.LimitReader(in, maxManifestBytes))
	if err != nil {
		return broken("its manifest", err)
	}
	if sum := sha256.Sum256(encoded); hex.EncodeToString(sum[:]) != wantDigest {
		return fmt.Errorf("it is another bundle, %x: %w", sum, ErrInvalid)
	}
	want, err := decodeManifest(encoded)
	if err != nil {
		return err
	}
	for i, f := range want.Files {
		header, err := in.Next()
		if err != nil {
			return broken(f.Name, err)
		}
		if header.Name != f.Name || header.Typeflag != tar.TypeReg || header.Size != f.Size {
			return fmt.Errorf("%q of %d bytes where %s of %d bytes belongs: %w", header.Name, header.Size, f.Name, f.Size, ErrInvalid)
		}
		err = d.add(ctx, f, func(w io.Writer) error {
			_, err := io.Copy(w, in)
			return err
		})
		if err != nil {
			return err
		}
		if got := d.manifest.Files[i]; got != f {
			return fmt.Errorf("%s has another content than its hash says: %w", f.Name, ErrInvalid)
		}
	}
	d.manifest.Cmdline, d.manifest.Command = want.Cmdline, want.Command
	if _, digest, err := d.manifest.encode(); err != nil || digest != wantDigest {
		return errors.Join(fmt.Errorf("its manifest is not in the one form there is: %w", ErrInvalid), err)
	}
	return nil
}
