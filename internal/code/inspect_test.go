package code_test

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/code"
)

// program compiles an empty program.
func program(t *testing.T, goos, goarch string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte("package main\n\nfunc main() {}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "program")
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", out, filepath.Join(dir, "main.go"))
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS="+goos, "GOARCH="+goarch)
	if text, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building for %s/%s: %v\n%s", goos, goarch, err, text)
	}
	return out
}

func read(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

func TestInspect(t *testing.T) {
	amd64 := program(t, "linux", "amd64")
	static := read(t, amd64)
	foreign := read(t, program(t, "linux", "386"))
	module := read(t, program(t, "wasip1", "wasm"))
	dynamic := read(t, "/bin/sh") // of this machine: linked against its C library
	file := func(name, content string) part { return part{name: name, mode: 0o755, content: content} }
	link := func(name, target string) part {
		return part{name: name, mode: fs.ModeSymlink | 0o777, content: target}
	}
	shell := file("bootstrap", "#!/bin/sh\nexit 0\n")
	for _, test := range []struct {
		name   string
		spec   blixard.FunctionSpec
		parts  []part
		reason string // "": it is taken
	}{
		{"static program", blixard.FunctionSpec{Runtime: "bootstrap"}, []part{file("bootstrap", static)}, ""},
		{"as the Lambda API has it", blixard.FunctionSpec{Runtime: "provided.al2023", Architecture: "x86_64"}, []part{file("bootstrap", static)}, ""},
		{"through a link", blixard.FunctionSpec{Runtime: "bootstrap"}, []part{file("bin/program", static), link("bootstrap", "bin/program")}, ""},
		{"script", blixard.FunctionSpec{Runtime: "bootstrap"}, []part{shell}, ""},
		{"script with env", blixard.FunctionSpec{Runtime: "bootstrap"}, []part{file("bootstrap", "#!/usr/bin/env sh\n")}, ""},
		{"script with its own interpreter", blixard.FunctionSpec{Runtime: "bootstrap"}, []part{file("bootstrap", "#!/var/task/bin/lua -v\n"), file("bin/lua", static)}, ""},
		{"wrong architecture", blixard.FunctionSpec{Runtime: "bootstrap"}, []part{file("bootstrap", foreign)}, "program for x86 (32 bits)"},
		{"other architecture", blixard.FunctionSpec{Runtime: "bootstrap", Architecture: "arm64"}, []part{file("bootstrap", static)}, "program for x86_64"},
		{"dynamically linked", blixard.FunctionSpec{Runtime: "bootstrap"}, []part{file("bootstrap", dynamic)}, "CGO_ENABLED=0"},
		{"empty bootstrap", blixard.FunctionSpec{Runtime: "bootstrap"}, []part{file("bootstrap", "")}, "is empty"},
		{"no bootstrap", blixard.FunctionSpec{Runtime: "bootstrap"}, []part{file("main", static)}, `no file "bootstrap"`},
		{"an empty file by another name", blixard.FunctionSpec{Runtime: "bootstrap"}, []part{file("zero", "")}, `"zero", the only file, is empty`},
		{"bootstrap in a directory", blixard.FunctionSpec{Runtime: "bootstrap"}, []part{file("app/bootstrap", static)}, "there is app/bootstrap"},
		{"bootstrap is a directory", blixard.FunctionSpec{Runtime: "bootstrap"}, []part{file("bootstrap/x", static)}, "is a directory"},
		{"text", blixard.FunctionSpec{Runtime: "bootstrap"}, []part{file("bootstrap", "hello")}, "is no program"},
		{"damaged program", blixard.FunctionSpec{Runtime: "bootstrap"}, []part{file("bootstrap", "\x7fELF\x02\x01\x01 and nothing more")}, "damaged"},
		{"object file", blixard.FunctionSpec{Runtime: "bootstrap"}, []part{file("bootstrap", static[:16]+"\x01\x00"+static[18:])}, "ET_REL"},
		{"python", blixard.FunctionSpec{Runtime: "bootstrap"}, []part{file("bootstrap", "#!/usr/bin/env python3\n")}, "do not have"},
		{"Windows script", blixard.FunctionSpec{Runtime: "bootstrap"}, []part{file("bootstrap", "#!/bin/sh\r\n")}, "Windows"},
		{"missing interpreter", blixard.FunctionSpec{Runtime: "bootstrap"}, []part{file("bootstrap", "#!/var/task/lua\n")}, "not in the code"},
		{"no interpreter", blixard.FunctionSpec{Runtime: "bootstrap"}, []part{file("bootstrap", "#!\n")}, "names no interpreter"},

		{"nix", blixard.FunctionSpec{Runtime: "nix"}, []part{file("handler.nix", "1")}, ""},
		{"nix, the only file", blixard.FunctionSpec{Runtime: "nix"}, []part{file("image-processor.nix", "1"), file("lib/a.nix", "1")}, ""},
		{"nix, by name", blixard.FunctionSpec{Runtime: "nix", Handler: "a.process"}, []part{file("a.nix", "1"), file("b.nix", "1")}, ""},
		{"nix, in a directory", blixard.FunctionSpec{Runtime: "nix", Handler: "lib/a.nix.x.y"}, []part{file("lib/a.nix", "1")}, ""},
		{"nix, unclear", blixard.FunctionSpec{Runtime: "nix"}, []part{file("a.nix", "1"), file("b.nix", "1")}, "handler.nix"},
		{"nix, missing", blixard.FunctionSpec{Runtime: "nix", Handler: "c"}, []part{file("a.nix", "1")}, `no file "c"`},
		{"nix, empty", blixard.FunctionSpec{Runtime: "nix"}, []part{file("a.nix", "")}, "is empty"},

		{"wasm", blixard.FunctionSpec{Runtime: "wasm"}, []part{file("hello.wasm", module)}, ""},
		{"wasm, by name", blixard.FunctionSpec{Runtime: "wasm", Handler: "b"}, []part{file("a.wasm", "x"), file("b.wasm", module)}, ""},
		{"wasm, none", blixard.FunctionSpec{Runtime: "wasm", Handler: "b"}, []part{file("a.wasm", module)}, `no module "b"`},
		{"wasm, empty", blixard.FunctionSpec{Runtime: "wasm"}, []part{file("a.wasm", "")}, "not a WebAssembly"},
		{"wasm, component", blixard.FunctionSpec{Runtime: "wasm"}, []part{file("a.wasm", "\x00asm\x0d\x00\x01\x00")}, "component"},

		{"http", blixard.FunctionSpec{Runtime: "http"}, []part{file("server", static), {name: "index.html", content: "x"}}, ""},
		{"http with a command of the guest", blixard.FunctionSpec{Runtime: "http", Command: []string{"httpd", "-f"}}, []part{{name: "index.html", content: "x"}}, ""},
		{"http with its own command", blixard.FunctionSpec{Runtime: "http", Command: []string{"./server"}}, []part{file("server", foreign)}, "program for x86"},
		{"http with a missing command", blixard.FunctionSpec{Runtime: "http", Command: []string{"/var/task/serve"}}, []part{file("server", static)}, `no file "serve"`},
		{"http, unclear", blixard.FunctionSpec{Runtime: "http"}, []part{file("a", static), file("b", static)}, "not clear"},
		{"unknown runtime", blixard.FunctionSpec{Runtime: "cobol"}, []part{shell}, `no runtime "cobol"`},
	} {
		t.Run(test.name, func(t *testing.T) {
			store := code.Store{Root: t.TempDir()}
			p, err := store.Put(t.Context(), bytes.NewReader(pack(t, test.parts...)))
			if err != nil {
				t.Fatal(err)
			}
			err = store.Inspect(t.Context(), p.Digest, test.spec)
			if test.reason == "" {
				if err != nil {
					t.Errorf("refused: %v", err)
				}
				return
			}
			if blixard.CodeOf(err) != blixard.CodeInvalid || !strings.Contains(err.Error(), test.reason) {
				t.Errorf("%v, want it to tell of %q", err, test.reason)
			}
		})
	}

	// A file alone: programs become bootstrap.
	zipped, err := code.ZipPath(amd64)
	if err != nil {
		t.Fatal(err)
	}
	store := code.Store{Root: t.TempDir()}
	p, err := store.Put(t.Context(), bytes.NewReader(zipped))
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Inspect(t.Context(), p.Digest, blixard.FunctionSpec{Runtime: "bootstrap"}); err != nil {
		t.Error(err)
	}
	if got := code.Runtime(amd64); got != "bootstrap" {
		t.Errorf("guessed %q", got)
	}
}
