package image_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofs/go-erofs"

	"github.com/blixard/blixard/internal/image"
)

func TestNixRuntimeDisk(t *testing.T) {
	one, err := image.Store{Root: t.TempDir()}.NixRuntime(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	store := image.Store{Root: t.TempDir()}
	two, err := store.Runtime(t.Context(), "nix")
	if err != nil {
		t.Fatal(err)
	}
	if one.Digest != two.Digest || one.Digest == "" || one.Path == two.Path {
		t.Errorf("the disks of two stores differ: %+v, %+v", one, two)
	}
	again, err := store.NixRuntime(t.Context())
	if err != nil || again != two {
		t.Errorf("made anew: %+v, %v", again, err)
	}
	// One that was deleted is made again.
	if err := os.Remove(two.Path); err != nil {
		t.Fatal(err)
	}
	if again, err = store.NixRuntime(t.Context()); err != nil || again != two {
		t.Errorf("after it was deleted: %+v, %v", again, err)
	}
	content, err := os.ReadFile(again.Path)
	if err != nil {
		t.Fatal(err)
	}
	// The reader, unlike kernels, wants to read a little beyond the last inode.
	disk, err := erofs.Open(bytes.NewReader(append(content, make([]byte, 4096)...)))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"bin/nix-instantiate", "lib/ld.so", "lib/libc.so.6", "nix/call.nix", "nix/lib.nix", "nix/warm.nix"} {
		info, err := fs.Stat(disk, name)
		if err != nil || info.Size() == 0 || strings.HasSuffix(name, ".nix") == (info.Mode()&0o111 != 0) {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	left, err := filepath.Glob(filepath.Join(store.Root, ".new-*"))
	if err != nil || len(left) != 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

func TestRuntimesMissing(t *testing.T) {
	store := image.Store{Root: t.TempDir()}
	t.Setenv("BLIXARD_NIX", filepath.Join(t.TempDir(), "nix-instantiate"))
	if _, err := store.NixRuntime(t.Context()); !errors.Is(err, image.ErrMissing) || !strings.Contains(err.Error(), "BLIXARD_NIX") {
		t.Errorf("no Nix: %v", err)
	}
	t.Setenv("BLIXARD_GUEST_WASM", filepath.Join(t.TempDir(), "blixard-guest-wasm"))
	if _, err := store.WasmRuntime(t.Context()); !errors.Is(err, image.ErrMissing) || !strings.Contains(err.Error(), "make build") {
		t.Errorf("no runtime of WebAssembly: %v", err)
	}
	for _, runtime := range []string{"bootstrap", "http"} {
		if disk, err := store.Runtime(t.Context(), runtime); err != nil || disk != (image.Disk{}) {
			t.Errorf("%s needs no disk: %+v, %v", runtime, disk, err)
		}
	}
	// A program of this machine that is no program.
	plain := filepath.Join(t.TempDir(), "nix-instantiate")
	if err := os.WriteFile(plain, bytes.Repeat([]byte("x"), 100), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("BLIXARD_NIX", plain)
	if _, err := store.NixRuntime(t.Context()); err == nil {
		t.Error("took a text for an evaluator")
	}
}
