package blixard

import (
	"slices"
	"strings"
)

// What a function's code is started by when its handler does not say.
const (
	BootstrapFile  = "bootstrap"
	DefaultNixFile = "handler.nix"
	// PkgsFile beside a nix function gives it the pkgs that it takes.
	PkgsFile = "pkgs.nix"
)

// NixEntry finds the file and the attribute that the handler of a nix function
// names: "hello.nix", "hello.nix.attribute", "hello" (for hello.nix) or
// "hello.attribute". An empty handler is handler.nix, default.nix, function.nix
// or the only file of its kind beside pkgs.nix. exists tells whether the code has a file, nixFiles are those
// in its root that end in .nix. ok is false when there is no such file.
func NixEntry(handler string, nixFiles []string, exists func(name string) bool) (file, attribute string, ok bool) {
	if handler == "" {
		for _, name := range []string{DefaultNixFile, "default.nix", "function.nix"} {
			if exists(name) {
				return name, "", true
			}
		}
		handlers := slices.DeleteFunc(slices.Clone(nixFiles), func(name string) bool { return name == PkgsFile })
		if len(handlers) == 1 {
			return handlers[0], "", true
		}
		return DefaultNixFile, "", false
	}
	name := strings.TrimPrefix(handler, "./")
	// The longest file name wins; what is behind it is the attribute.
	for rest := ""; ; {
		for _, candidate := range []string{name, name + ".nix"} {
			if strings.HasSuffix(candidate, ".nix") && exists(candidate) {
				return candidate, rest, true
			}
		}
		dot := strings.LastIndexByte(name, '.')
		if dot < 0 || strings.ContainsRune(name[dot:], '/') {
			return handler, "", false
		}
		if rest != "" {
			rest = "." + rest
		}
		name, rest = name[:dot], name[dot+1:]+rest
	}
}

// WasmEntry finds the module of a wasm function: the handler, with or without
// .wasm, or the only file of its kind in the root of the code.
func WasmEntry(handler string, wasmFiles []string, exists func(name string) bool) (file string, ok bool) {
	if handler == "" && len(wasmFiles) == 1 {
		return wasmFiles[0], true
	}
	handler = strings.TrimPrefix(handler, "./")
	for _, name := range []string{handler, handler + ".wasm"} {
		if strings.HasSuffix(name, ".wasm") && exists(name) {
			return name, true
		}
	}
	return handler, false
}

// HTTPEntry finds the program of an http function without a command: bootstrap,
// else the handler, else the only program in the root of the code.
func HTTPEntry(handler string, programs []string, exists func(name string) bool) (file string, ok bool) {
	if exists(BootstrapFile) {
		return BootstrapFile, true
	}
	if name := strings.TrimPrefix(handler, "./"); name != "" && exists(name) {
		return name, true
	}
	if len(programs) == 1 {
		return programs[0], true
	}
	return BootstrapFile, false
}
