package code

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/blixard/blixard"
)

// elfHeadBytes of a program are looked at: enough for its program headers, which
// linkers put at the beginning.
const elfHeadBytes = 64 << 10

// taskRoot is where guests have the code.
const taskRoot = "/var/task/"

// guestPrograms are those of the guest that scripts may name as interpreters.
var guestPrograms = []string{"sh", "ash", "hush", "awk", "sed", "env", "busybox"}

// Inspect tells whether the code can be started as the specification says: what
// is refused here could only fail later, in every guest. Errors are *blixard.Error
// with CodeInvalid and the field "code"; CodeNotFound when the zip is not here.
func (s Store) Inspect(ctx context.Context, digest string, spec blixard.FunctionSpec) error {
	file, size, err := s.open(digest)
	if err != nil {
		return err
	}
	defer file.Close()
	t, err := readTree(file, size, s.Limits.filled())
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	switch blixard.RuntimeKind(spec.Runtime) {
	case "nix":
		return t.inspectNix(spec.Handler)
	case "wasm":
		return t.inspectWasm(spec.Handler)
	case "http":
		return t.inspectHTTP(spec)
	case "bootstrap":
		return t.inspectProgram(blixard.BootstrapFile, spec.Architecture)
	}
	return blixard.Invalid("spec.runtime", "nix, bootstrap, http and wasm are known", "there is no runtime %q", spec.Runtime)
}

func refuse(hint, format string, args ...any) error {
	return blixard.Invalid("code", hint, format, args...)
}

// regular tells whether a name leads to a file.
func (t *tree) regular(name string) bool {
	n, err := t.resolve(name)
	return err == nil && n != nil && n.kind == 0
}

// inRoot are the files in the root of the code that fit.
func (t *tree) inRoot(fits func(*node) bool) []string {
	var names []string
	for _, name := range t.names {
		if !strings.Contains(name, "/") && t.nodes[name].kind == 0 && fits(t.nodes[name]) {
			names = append(names, name)
		}
	}
	return names
}

func (t *tree) inspectNix(handler string) error {
	files := t.inRoot(func(n *node) bool { return path.Ext(n.name) == ".nix" })
	file, _, ok := blixard.NixEntry(handler, files, t.regular)
	if !ok {
		return refuse("the handler is a file and, if its function is not the whole of it, an attribute: handler.nix.process", "the code has no file %q", file)
	}
	n, err := t.resolve(file)
	if err != nil {
		return err
	}
	if n.file.UncompressedSize64 == 0 {
		return refuse("", "%q is empty", file)
	}
	return nil
}

func (t *tree) inspectWasm(handler string) error {
	files := t.inRoot(func(n *node) bool { return path.Ext(n.name) == ".wasm" })
	file, ok := blixard.WasmEntry(handler, files, t.regular)
	if !ok {
		return refuse("the handler names the module, such as hello.wasm", "the code has no module %q", file)
	}
	n, err := t.resolve(file)
	if err != nil {
		return err
	}
	head, err := n.beginning(8)
	if err != nil {
		return err
	}
	switch {
	case !bytes.HasPrefix(head, []byte("\x00asm")):
		return refuse("", "%q is not a WebAssembly module", file)
	case !bytes.Equal(head[4:], []byte{1, 0, 0, 0}):
		return refuse("build a command module for WASI preview 1, as GOOS=wasip1 GOARCH=wasm does", "%q is WebAssembly of another version, or a component", file)
	}
	return nil
}

func (t *tree) inspectHTTP(spec blixard.FunctionSpec) error {
	if len(spec.Command) == 0 {
		programs := t.inRoot(func(n *node) bool {
			mode, err := n.permissions()
			return err == nil && mode&0o111 != 0
		})
		file, ok := blixard.HTTPEntry(spec.Handler, programs, t.regular)
		if !ok {
			return refuse("name it bootstrap, or give the command", "it is not clear which program of the code is the server")
		}
		return t.inspectProgram(file, spec.Architecture)
	}
	name, ok := strings.CutPrefix(spec.Command[0], taskRoot)
	if !ok && (strings.HasPrefix(name, "/") || !strings.Contains(name, "/") && !t.regular(name)) {
		return nil // a program of the guest
	}
	return t.inspectProgram(path.Clean(name), spec.Architecture)
}

// inspectProgram tells whether the guest's kernel can start a file.
func (t *tree) inspectProgram(name, architecture string) error {
	n, err := t.resolve(name)
	switch {
	case err != nil:
		return err
	case n == nil:
		if len(t.names) == 1 && t.nodes[t.names[0]].kind == 0 && t.nodes[t.names[0]].file.UncompressedSize64 == 0 {
			return refuse("", "%q, the only file, is empty", t.names[0])
		}
		hint := ""
		if found := t.elsewhere(name); found != "" {
			hint = fmt.Sprintf("there is %s: pack what is in the directory, not the directory", found)
		}
		return refuse(hint, "the code has no file %q", name)
	case n.kind != 0:
		return refuse("", "%q is a directory", name)
	case n.file.UncompressedSize64 == 0:
		return refuse("", "%q is empty", name)
	}
	head, err := n.beginning(elfHeadBytes)
	if err != nil {
		return err
	}
	if line, ok := bytes.CutPrefix(head, []byte("#!")); ok {
		line, _, _ = bytes.Cut(line, []byte("\n"))
		return t.inspectScript(name, string(line))
	}
	if bytes.HasPrefix(head, []byte("\x7fELF")) {
		return inspectELF(name, head, architecture)
	}
	return refuse("a program is an ELF file for Linux, or a script that begins with #!/bin/sh", "%q is no program", name)
}

// elsewhere finds a file of that name in a directory, where people pack it by mistake.
func (t *tree) elsewhere(name string) string {
	for _, other := range t.names {
		if path.Base(other) == name && t.nodes[other].kind == 0 {
			return other
		}
	}
	return ""
}

func (t *tree) inspectScript(name, line string) error {
	if strings.HasSuffix(line, "\r") {
		return refuse("save it with Unix line ends", "%q has line ends of Windows, with which its interpreter is not found", name)
	}
	words := strings.Fields(line)
	if len(words) == 0 || !strings.HasPrefix(words[0], "/") {
		return refuse("", "%q begins with %q, which names no interpreter", name, "#!"+line)
	}
	interpreter := words[0]
	if own, ok := strings.CutPrefix(interpreter, taskRoot); ok {
		if !t.regular(own) {
			return refuse("", "%q wants the interpreter %s, which is not in the code", name, interpreter)
		}
		return nil
	}
	program := path.Base(interpreter)
	if program == "env" && len(words) > 1 {
		program = words[1]
	}
	if !slices.Contains([]string{"/bin", "/usr/bin", "/sbin", "/usr/sbin"}, path.Dir(interpreter)) || !slices.Contains(guestPrograms, program) {
		return refuse("guests have busybox's sh; other interpreters have to be in the code, below "+taskRoot, "%q wants the interpreter %s, which guests do not have", name, strings.Join(words, " "))
	}
	return nil
}

func inspectELF(name string, head []byte, architecture string) error {
	file, err := elf.NewFile(bytes.NewReader(head))
	if err != nil {
		// Section headers are at the end of the file, which is not here.
		file, err = elf.NewFile(bytes.NewReader(withoutSections(head)))
	}
	if err != nil {
		return refuse("", "%q is a damaged program: %v", name, err)
	}
	wanted := elf.EM_X86_64
	if architecture == "arm64" || architecture == "aarch64" {
		wanted = elf.EM_AARCH64
	}
	switch {
	case file.Class != elf.ELFCLASS64 || file.Machine != wanted:
		return refuse("build it for the function's architecture, with Go: GOOS=linux GOARCH=amd64", "%q is a program for %s, the function's architecture is %s", name, machineName(file.Machine), machineName(wanted))
	case file.OSABI != elf.ELFOSABI_NONE && file.OSABI != elf.ELFOSABI_LINUX:
		return refuse("", "%q is a program for %s, not for Linux", name, file.OSABI)
	case file.Type != elf.ET_EXEC && file.Type != elf.ET_DYN:
		return refuse("", "%q is no program but a file of type %s", name, file.Type)
	}
	for _, p := range file.Progs {
		if p.Type != elf.PT_INTERP || p.Off+p.Filesz > uint64(len(head)) {
			continue
		}
		interpreter := string(bytes.TrimRight(head[p.Off:p.Off+p.Filesz], "\x00"))
		if !strings.HasPrefix(interpreter, taskRoot) {
			return refuse("link it statically, with Go: CGO_ENABLED=0", "%q is linked dynamically and wants %s, which guests do not have", name, interpreter)
		}
	}
	return nil
}

// withoutSections is a program's beginning with an ELF header that tells of no
// sections.
func withoutSections(head []byte) []byte {
	head = bytes.Clone(head)
	class64 := len(head) > 64 && head[elf.EI_CLASS] == byte(elf.ELFCLASS64)
	switch {
	case class64:
		clear(head[40:48]) // e_shoff
		clear(head[60:64]) // e_shnum, e_shstrndx
	case len(head) > 52:
		clear(head[32:36])
		clear(head[48:52])
	}
	return head
}

func machineName(machine elf.Machine) string {
	names := map[elf.Machine]string{elf.EM_X86_64: "x86_64", elf.EM_AARCH64: "arm64", elf.EM_386: "x86 (32 bits)"}
	if name, ok := names[machine]; ok {
		return name
	}
	return strings.TrimPrefix(machine.String(), "EM_")
}

// Runtime guesses the runtime of what a user would deploy: a file, a directory
// or a zip. "" when it cannot be told.
func Runtime(path string) string {
	zipped, err := ZipPath(path)
	if err != nil {
		return ""
	}
	t, err := readTree(bytes.NewReader(zipped), int64(len(zipped)), Limits{}.filled())
	if err != nil {
		return ""
	}
	has := func(extension string) bool {
		return len(t.inRoot(func(n *node) bool { return strings.HasSuffix(n.name, extension) })) > 0
	}
	switch {
	case t.regular(blixard.BootstrapFile):
		return "bootstrap"
	case has(".nix"):
		return "nix"
	case has(".wasm"):
		return "wasm"
	}
	return ""
}
